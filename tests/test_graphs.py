"""What replaying recorded steps must not change: tried with a stand-in recorder here, with CUDA graphs on a GPU."""

import copy

import pytest
import torch
from lively import lively
from torch.nn import functional as F

from sparsetrail.snn import graphs
from sparsetrail.snn.encode import phase
from sparsetrail.snn.graphs import Scores, Update
from sparsetrail.snn.net import NetSpec, victim
from sparsetrail.snn.neuron import compile_neurons

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def stand_in(fn):
    """As a CUDA graph: every replay computes anew from the same inputs into the same outputs."""

    def tensors(out):
        return [out] if isinstance(out, torch.Tensor) else [t for part in out for t in tensors(part)]

    out = fn()
    held = tensors(out)

    def replay():
        fresh = tensors(fn())
        with torch.no_grad():
            for a, b in zip(held, fresh, strict=True):
                a.detach().copy_(b.detach())

    return replay, out


def toy(u):
    """Scores [n k] of a sequence [t n m]; every example alone."""
    return torch.stack([u.sin().sum((0, 2)), (u * u).sum((0, 2)), u.cos().prod(0).sum(1)], 1)


class Plain(Scores):
    """Replays that recompute gradients from what lies in the recording's input, as a graph does."""

    def __init__(self, f):
        super().__init__(f, axis=1, record=stand_in, warm=lambda fn: fn())


@pytest.fixture(autouse=True)
def gradient_of_now(monkeypatch):
    """The stand-in cannot replay autograd's own memory: its backward goes through the function again."""

    class Again(graphs._Recording):
        def __init__(self, f, like, record, warm):
            super().__init__(f, like, record, warm)

            def backward():
                point = self.point.detach().requires_grad_()
                with torch.enable_grad():
                    self.gradient.copy_(torch.autograd.grad(f(point), point, self.push)[0])

            if record is stand_in:
                self.backward = backward

    monkeypatch.setattr(graphs, "_Recording", Again)


def test_scores_and_gradients_of_every_batch_size():
    f = Plain(toy)
    g = torch.Generator().manual_seed(0)
    for n in (5, 5, 5, 8, 7, 1, 1, 3, 2, 4, 4, 6):
        u = torch.randn(3, n, 2, generator=g, dtype=torch.float64)
        leaf, other = u.clone().requires_grad_(), u.clone().requires_grad_()
        z, want = f(leaf), toy(other)
        assert torch.allclose(z, want, atol=1e-12)
        push = torch.randn(want.shape, generator=g, dtype=torch.float64)
        a, b = torch.autograd.grad(z, leaf, push)[0], torch.autograd.grad(want, other, push)[0]
        assert torch.allclose(a, b, atol=1e-12)
    assert any(r is not None for r in f.made.values()) and len(f.made) <= graphs.SIZES


def test_results_are_not_overwritten_by_the_next_call_and_old_gradients_are_right():
    f = Plain(toy)
    us = [torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    zs = [f(u) for u in us]
    kept = [z.detach().clone() for z in zs]
    grads = [torch.autograd.grad(z[:, 0].sum(), u)[0] for z, u in zip(zs, us, strict=True)]
    for u, z, k, g in zip(us, zs, kept, grads, strict=True):
        assert torch.equal(z, k) and torch.allclose(g, u.cos())
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(f(us[0]).sum(), us[0], create_graph=True)
        torch.autograd.grad(g.sum(), us[0])


def test_a_recording_that_fails_leaves_the_plain_call(caplog):
    def broken(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    f = Scores(toy, axis=1, record=broken, warm=lambda fn: fn())
    u = torch.randn(3, 4, 2, requires_grad=True)
    for _ in range(4):
        assert torch.equal(f(u), toy(u))
    assert caplog.text.count("could not be recorded") == 1 and "capturing" in caplog.text


def test_the_first_call_may_be_without_gradient():
    f = Plain(toy)
    u = torch.randn(3, 4, 2)
    with torch.no_grad():
        assert all(torch.equal(f(u), toy(u)) for _ in range(3))
    leaf = u.clone().requires_grad_()
    assert torch.autograd.grad(f(leaf).sum(), leaf)[0].abs().sum() > 0


def test_a_recorded_update_gives_the_gradients_of_the_plain_one():
    x = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    y, encode = torch.arange(6), phase(steps=3)
    net = lively(NetSpec(width=0.125, steps=3), encode(x)).train().double()
    twin = copy.deepcopy(net)
    run = Update(net, lambda p: net.scores(p, encode), record=stand_in, warm=lambda fn: fn())
    before = {k: v.clone() for k, v in net.named_buffers()}
    run._prepare(x[:3].double(), y[:3])
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())  # warming up has left no trace
    for rows in (slice(0, 3), slice(3, 6)):
        loss, norm = run(x[rows].double(), y[rows])
        twin.zero_grad()
        want = F.cross_entropy(twin.scores(x[rows].double(), encode).float(), y[rows])
        want.backward()
        assert torch.equal(loss, want) and norm > 0
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-12)
    assert run(x.double(), y) is None  # another batch size


@pytest.mark.gpu
@needs_gpu
def test_cuda_graphs_of_a_victim():
    x = (torch.randint(0, 256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255).double().cuda()
    y, encode = torch.arange(7).cuda(), phase(steps=4)
    net = lively(NetSpec(width=0.25, steps=4), encode(x.float().cpu())).double().cuda()
    v = victim(compile_neurons(net), encode)
    u = encode(x)
    for n in (7, 7, 7, 5, 6, 1, 1, 1):
        for f, point in ((v.logits, u[:, :n]), (v.scores, x[:n])):
            leaf, other = point.clone().requires_grad_(), point.clone().requires_grad_()
            z, want = f(leaf), net(other if other.ndim == 5 else encode(other))
            assert torch.allclose(z, want, atol=1e-9)
            a = torch.autograd.grad(F.cross_entropy(z, y[:n], reduction="sum"), leaf)[0]
            b = torch.autograd.grad(F.cross_entropy(want, y[:n], reduction="sum"), other)[0]
            assert torch.allclose(a, b, atol=1e-9 * b.abs().max())


@pytest.mark.gpu
@needs_gpu
def test_cuda_graphs_of_training():
    x = (torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255).double().cuda()
    y, encode = torch.arange(8).cuda() % 10, phase(steps=4)
    net = lively(NetSpec(width=0.25, steps=4), encode(x.float().cpu())).double().cuda().train()
    twin, run = copy.deepcopy(net), Update(net, lambda p: net.scores(p, encode))
    for _ in range(3):
        loss, _ = run(x, y)
        twin.zero_grad()
        want = F.cross_entropy(twin.scores(x, encode).float(), y)
        want.backward()
        assert torch.allclose(loss, want)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-9)
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double())
