"""What replaying recorded steps must not change: tried with a stand-in recorder here, with CUDA graphs on a GPU."""

import copy
import gc
import math
import subprocess
import sys
import weakref

import pytest
import torch
from lively import lively
from torch.nn import functional as F

from sparsetrail.core.precision import exact, products
from sparsetrail.data.sets import make_dataset
from sparsetrail.snn import graphs
from sparsetrail.snn.encode import phase
from sparsetrail.snn.graphs import Scores
from sparsetrail.snn.net import NetSpec, build, victim
from sparsetrail.training import Optimizer, Step, TrainingFailed, TrainSpec, train

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
        def __init__(self, f, like, record, warm, keep):
            super().__init__(f, like, record, warm, keep)

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


def test_every_call_of_a_size_is_of_the_shape_that_is_recorded():
    """A GPU's products of another shape add in another order, and a first call must not say other than the second."""
    shapes = []

    def f(u):
        shapes.append(u.shape[1])
        return toy(u)

    scores = Plain(f)
    for n in (3, 3, 3, 5, 1, graphs.LARGEST + 1):
        u = torch.randn(3, n, 2, dtype=torch.float64)
        assert torch.allclose(scores(u), toy(u)) and len(scores(u)) == n
    assert set(shapes) == {1, 4, 8, graphs.LARGEST + 1}


def test_results_are_not_overwritten_by_the_next_call_and_old_gradients_are_right():
    f = Plain(toy)
    us = [torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    zs = [f(u) for u in us]
    kept = [z.detach().clone() for z in zs]
    grads = [torch.autograd.grad(z[:, 0].sum(), u)[0] for z, u in zip(zs, us, strict=True)]
    for u, z, k, g in zip(us, zs, kept, grads, strict=True):
        assert torch.equal(z, k) and torch.allclose(g, u.cos())


@pytest.mark.parametrize("loss", [lambda z: z.square().sum(), lambda z: z[:, 1].sum()], ids=["square", "linear"])
def test_a_gradient_of_the_gradient_goes_through_the_function_itself(loss):
    f, found = Plain(toy), []
    u = torch.randn(3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    f(u), f(u)
    assert any(r is not None for r in f.made.values())
    for scores in (f, toy):
        (g,) = torch.autograd.grad(loss(scores(u)), u, create_graph=True)
        assert g.requires_grad
        found.append((g.detach(), torch.autograd.grad(g.pow(3).sum(), u)[0]))
    (a, second), (b, want) = found
    assert torch.allclose(a, b) and torch.allclose(second, want) and second.abs().min() > 0


def test_a_second_backward_through_the_same_scores_begins_with_the_forward():
    """A recorded backward leaves its own maps where those of the forward lay."""
    f = Plain(toy)
    u = torch.randn(3, 4, 2, dtype=torch.float64)
    f(u)
    leaf, played = u.clone().requires_grad_(), []
    z = f(leaf)
    (r,) = f.made.values()
    forward, backward = r.forward, r.backward
    r.forward, r.backward = lambda: (played.append("forward"), forward()), lambda: (played.append("back"), backward())
    rows = [torch.autograd.grad(z[:, k].sum(), leaf, retain_graph=True)[0] for k in range(3)]
    assert played == ["back", "forward", "back", "forward", "back"]
    want = torch.autograd.functional.jacobian(lambda v: toy(v).sum(0), u)
    assert all(torch.allclose(a, b) for a, b in zip(rows, want, strict=True))


def recorded():
    """`toy` by a recording that is there, and an input."""
    f, u = Plain(toy), torch.randn(3, 4, 2, dtype=torch.float64)
    f(u), f(u)
    assert f.ready(u)
    return f, u


def test_scores_without_a_gradient_are_recorded_too(capsys):
    """Behind an encoder without a backward there is a forward to launch and nothing to come back."""
    f = Plain(lambda u: toy(u.detach()))
    u = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    found = [f(u) for _ in range(3)]
    assert f.ready(u) and not f.failed and "recorded" not in capsys.readouterr().err
    assert all(torch.equal(z, toy(u)) and not z.requires_grad for z in found)


def test_many_gradients_as_one_through_a_recording():
    f, u = recorded()
    found, want = (torch.autograd.functional.jacobian(lambda v, g=g: g(v).sum(0), u, vectorize=True) for g in (f, toy))
    assert torch.allclose(found, want) and want.abs().max() > 0


def test_functorch_goes_around_a_recording_that_is_there():
    f, u = recorded()
    for name in ("grad", "vmap", "jacrev", "jvp"):
        found = []
        for g in (f, toy):

            def one(v, g=g):
                return g(v[:, None]).square().sum()

            if name == "vmap":
                found.append(torch.func.vmap(torch.func.grad(one), in_dims=1)(u))
            elif name == "jvp":
                found.append(torch.func.jvp(lambda v, g=g: g(v), (u,), (u.cos(),))[1])
            else:
                found.append(getattr(torch.func, name)(lambda v, g=g: g(v).square().sum())(u))
        assert torch.allclose(*found) and found[1].abs().max() > 0, name


def test_inference_mode_neither_records_nor_ends_recording(caplog):
    f = Plain(toy)
    with torch.inference_mode():
        u = torch.randn(3, 4, 2)
        assert all(torch.equal(f(u), toy(u)) and not f.ready(u) for _ in range(3))
    assert not f.failed and not f.made and not caplog.text
    f, u = recorded()
    with torch.inference_mode():
        assert torch.equal(f(u), toy(u)) and not f.ready(u)
    assert f.ready(u)


@pytest.mark.gpu
@needs_gpu
def test_a_jacobian_through_a_recording():
    u = torch.randn(3, 4, 2, dtype=torch.float64, device="cuda")
    f = Scores(lambda v: (v.tanh() @ torch.ones(2, 5, device="cuda").double()).exp().mean(0), axis=1)
    for _ in range(3):
        found = torch.autograd.functional.jacobian(lambda v: f(v).sum(0), u)
    want = torch.autograd.functional.jacobian(lambda v: f.f(v).sum(0), u)
    assert torch.allclose(found, want) and want.abs().max() > 0


def test_products_are_put_back_whoever_leaves_first():
    cudnn, seen = torch.backends.cudnn, []
    was = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = True
        first, second, inner = products(False), products(False), products(True)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        seen.append(cudnn.allow_tf32)
        inner.__enter__()
        seen.append(cudnn.allow_tf32)
        inner.__exit__(None, None, None)
        seen.append(cudnn.allow_tf32)
        second.__exit__(None, None, None)
        assert seen == [False, True, False] and cudnn.allow_tf32
    finally:
        cudnn.allow_tf32 = was


NEW_NAMES = """
import torch
from sparsetrail.core.precision import exact, products
from sparsetrail.snn import unfold
b, told = torch.backends, lambda: [w.fp32_precision for w in (b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul)]
SET
was = told()
for inner in (False, True):
    with products(False), products(inner):
        assert b.cudnn.allow_tf32 is b.cuda.matmul.allow_tf32 is inner and exact() is not inner
        assert unfold._rough(torch.ones(1)) is inner
    assert told() == was, (told(), was)
try:
    print(b.cudnn.allow_tf32, b.cuda.matmul.allow_tf32)
except RuntimeError:
    print("as before")
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="older than torch 2.9")
@pytest.mark.parametrize("change", ["b.cuda.matmul.fp32_precision = 'tf32'", "b.cudnn.conv.fp32_precision = 'ieee'"])
def test_products_serve_who_set_them_by_pytorchs_newer_names(change):
    """In a process of its own: PyTorch has no way back to the older ones."""
    run = subprocess.run([sys.executable, "-c", NEW_NAMES.replace("SET", change)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "as before", run.stderr


def test_nobody_records_while_another_measures_in_float32():
    inside = []
    with products(True):
        with graphs.in_float32(torch.device("cuda")):
            inside.append((exact(), graphs._one_at_a_time.locked()))
        with graphs.in_float32(torch.device("cpu")):
            inside.append((exact(), graphs._one_at_a_time.locked()))
        assert not exact()
    assert inside == [(True, True), (False, False)]


@pytest.mark.parametrize("tf32", [False, True])
def test_a_training_step_is_recorded_in_its_own_precision_whoever_asked_last(monkeypatch, tf32):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    net, seen = torch.nn.Linear(2, 3), []

    def scores(x):
        seen.append(exact())
        return net(x)

    step = graphs.Update(net, scores, lambda *_: None, tf32=tf32, record=stand_in, warm=lambda fn: fn())
    with products(not tf32):  # of another thread
        assert step(torch.ones(2, 2), torch.tensor([0, 1]))
    assert seen[0] is seen[1] is not tf32


def test_a_recorded_gradient_is_taken_in_float32():
    seen = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v * 2

        @staticmethod
        def backward(ctx, g):
            seen.append(torch.backends.cudnn.allow_tf32)
            return g * 2

    with products(tf32=True):
        f = Scores(lambda v: Ask.apply(v).sum((0, 2))[:, None], axis=1, record=stand_in, warm=lambda fn: fn())
        for _ in range(2):
            f(torch.randn(3, 4, 2))
    assert seen and not any(seen)


def test_a_recording_that_fails_leaves_the_plain_call(caplog):
    def broken(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    f = Scores(toy, axis=1, record=broken, warm=lambda fn: fn())
    u = torch.randn(3, 4, 2, requires_grad=True)
    for _ in range(4):
        assert torch.equal(f(u), toy(u))
    assert caplog.text.count("could not be recorded") == 1 and "capturing" in caplog.text


def test_large_batches_are_not_recorded_an_audit_keeps_many_networks():
    f, sizes = Plain(lambda u: (sizes.append(u.shape[1]), toy(u))[1]), []
    for _ in range(3):
        for n in (graphs.LARGEST, graphs.LARGEST + 1, 500):
            u = torch.randn(2, n, 2)
            assert torch.equal(f(u), toy(u))
    assert {key[0][1] for key in f.made} == {graphs.LARGEST}
    assert {500, graphs.LARGEST + 1} <= set(sizes), "a large batch is computed at its own size, not filled up"


def test_the_first_call_may_be_without_gradient():
    f = Plain(toy)
    u = torch.randn(3, 4, 2)
    with torch.no_grad():
        assert all(torch.equal(f(u), toy(u)) for _ in range(3))
    leaf = u.clone().requires_grad_()
    assert torch.autograd.grad(f(leaf).sum(), leaf)[0].abs().sum() > 0


def steps_of(net, encode, spec, x, y, batch, record=None):
    """The same steps plainly and recorded: losses and weights of both."""
    twin, out = copy.deepcopy(net), []
    for one, recorded in ((net, True), (twin, False)):
        optimizer = Optimizer(one, spec)
        step = Step(one, optimizer, spec)
        run = step.record(encode) if recorded else None
        if run is not None and record is not None:
            run.record, run.warm = record, lambda fn: fn()
        losses = []
        for i in range(0, len(x), batch):
            optimizer.set_rate(i, len(x))
            value = step(encode, x[i : i + batch], y[i : i + batch], torch.Generator())
            assert (value is None) == recorded
            losses += [] if value is None else [value]
        out.append((losses if run is None else [loss for loss, _ in run.told()], optimizer))
    (ours, kept), (theirs, plain) = out
    assert len(ours) == len(theirs) == len(x) // batch
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-6)
    for (name, a), (_, b) in zip(net.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-7), name
    for a, b in zip(kept.state().values(), plain.state().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-9)
    return kept


SPECS = [
    TrainSpec(lr=1e-3),
    TrainSpec(lr=1e-2, clip=0.1, weight_decay=0.01, schedule="cosine"),
    TrainSpec(optimizer="sgd", lr=0.05, schedule="cosine", weight_decay=1e-3),
]


@pytest.mark.parametrize("spec", SPECS[:2], ids=["adam", "clipped"])
def test_recorded_steps_are_the_plain_ones(spec):
    x = (torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255).double()
    y, encode = torch.arange(12) % 10, phase(steps=3)
    net = lively(NetSpec(width=0.125, steps=3), encode(x.float())).train().double()
    steps_of(net, encode, spec, x, y, 3, record=stand_in)


def test_a_recorded_step_goes_with_its_owner_and_waits_for_no_collector():
    net = build(NetSpec(width=0.125, steps=3))
    step = Step(net, Optimizer(net, TrainSpec()), TrainSpec())
    held = weakref.ref(step.record(phase(steps=3)))
    gc.disable()
    try:
        assert held() is not None
        del step
        assert held() is None
    finally:
        gc.enable()


def test_a_recorded_step_that_is_not_finite_moves_no_weight_and_none_after_it_does():
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    y, encode, spec = torch.arange(4), phase(steps=3), TrainSpec(lr=1e-2)
    net = lively(NetSpec(width=0.125, steps=3), encode(x.float())).train().double()
    optimizer = Optimizer(net, spec)
    run = Step(net, optimizer, spec).record(encode)
    run.record, run.warm = stand_in, lambda fn: fn()
    before = copy.deepcopy(net.state_dict())
    run._prepare(x[:2], y[:2])
    run.bad.zero_()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # warming up has left no trace
    run.replay()
    moved = {k: v.clone() for k, v in net.named_parameters()}
    assert not torch.equal(moved["conv1.weight"], before["conv1.weight"])
    with torch.no_grad():
        net.fc.bias[0] = math.nan
    moved["fc.bias"] = net.fc.bias.detach().clone()
    assert run(x[:2], y[:2])
    with torch.no_grad():
        net.fc.bias[0] = 0.0
    moved["fc.bias"][0] = 0.0
    assert run(x[2:], y[2:]) and not run(x, y)  # another batch size is not recorded
    told = run.told()
    assert math.isnan(told[0][0]) and math.isfinite(told[1][0]) and run.told() == []
    for k, v in net.named_parameters():
        assert torch.equal(v, moved[k]), k


@pytest.mark.gpu
@needs_gpu
def test_cuda_graphs_of_a_victim():
    x = (torch.randint(0, 256, (7, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255).double().cuda()
    y, encode = torch.arange(7).cuda(), phase(steps=4)
    net = lively(NetSpec(width=0.25, steps=4), encode(x.float().cpu())).double().cuda()
    v = victim(net, encode)
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
@pytest.mark.parametrize("spec", SPECS, ids=["adam", "clipped", "sgd"])
def test_cuda_graphs_of_training(spec):
    x = (torch.randint(0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255).double().cuda()
    y, encode = torch.arange(24).cuda() % 10, phase(steps=4)
    net = lively(NetSpec(width=0.25, steps=4), encode(x.float().cpu())).double().cuda().train()
    steps_of(net, encode, spec, x, y, 8)


@pytest.mark.gpu
@needs_gpu
def test_training_on_a_gpu_fails_where_it_must(tmp_path):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (640, 3, 32, 32), generator=g, dtype=torch.uint8).numpy()
    data = make_dataset("noise", "train", images, torch.arange(640).numpy() % 10, tuple("0123456789"))
    spec = TrainSpec(batch=16, epochs=2, lr=1e-3, validation=0.1)
    seen = []
    made = train(
        NetSpec(width=0.25, steps=4), phase(steps=4), data, spec, tmp_path / "a", device="cuda", say=seen.append
    )
    steps = [e["step"] for e in seen if e["event"] == "step"]
    assert steps == list(range(1, 73)) and made.net.fc.weight.isfinite().all()
    with pytest.raises(TrainingFailed, match="epoch 0"):
        train(
            NetSpec(width=0.25, steps=4), phase(steps=4), data, TrainSpec(batch=16, epochs=2, lr=1e30, validation=0.1),
            tmp_path / "b", device="cuda",
        )  # fmt: skip
