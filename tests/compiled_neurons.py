"""Run by test_engine.py: generated kernels against the fused definition; prints a word for every part that holds."""

import copy

import torch
from lively import lively
from torch.nn import functional as F

from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.neuron import NeuronSpec, compile_neurons, compiled, fused
from sparsetrail.snn.surrogate import Surrogate

torch.set_num_threads(1)
KINDS = (
    NeuronSpec(),
    NeuronSpec(reset=None, detach_reset=False),
    NeuronSpec(kind="lif", detach_reset=False, surrogate=Surrogate("gaussian", 0.5)),
)


def kinds() -> None:
    """Spikes to the bit, gradients to 1e-6, one kernel for every size."""
    g = torch.Generator().manual_seed(0)
    for spec in KINDS:
        for m in (40, 333):
            x = torch.randn(5, m, 3, generator=g)
            found = []
            for run in (fused, compiled):
                leaf = x.clone().requires_grad_()
                s = run(leaf, spec)
                found.append((s.detach(), torch.autograd.grad((s * x.cos()).sum(), leaf)[0]))
            (s, grad), (fast, fast_grad) = found
            assert torch.equal(s, fast) and 0 < s.mean() < 1, spec
            assert (grad - fast_grad).abs().max() <= 1e-6 * grad.abs().max(), spec
    print("kinds")


def network() -> None:
    """Scores and input gradient of a whole network."""
    x = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    u = phase(steps=5)(x)
    net = lively(NetSpec(width=0.25, steps=5), u)
    found = []
    for n in (net, compile_neurons(copy.deepcopy(net))):
        leaf = u.clone().requires_grad_()
        z = n(leaf)
        found.append((z.detach(), torch.autograd.grad(F.cross_entropy(z, torch.arange(4)), leaf)[0]))
    for a, b in zip(*found, strict=True):
        assert a.any() and (a - b).abs().max() <= 1e-6 * a.abs().max()
    print("network")


def ways_out() -> None:
    """Double backward and functorch take the fused definition."""
    x, spec = torch.randn(5, 4, requires_grad=True), KINDS[0]
    first = [torch.autograd.grad(f(x, spec).sum(), x, create_graph=True)[0] for f in (fused, compiled)]
    second = [torch.autograd.grad(g.square().sum(), x)[0] for g in first]
    assert second[0].any() and torch.allclose(second[0], second[1])
    each = [torch.func.vmap(torch.func.grad(lambda a, f=f: f(a, spec).sum()), 1)(x.detach()) for f in (fused, compiled)]
    assert torch.equal(each[0], each[1])
    print("ways-out")


if __name__ == "__main__":
    kinds()
    network()
    ways_out()
