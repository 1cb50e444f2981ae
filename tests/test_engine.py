"""The fast paths against the plain ones: dense products, frozen copies, compiled neurons."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lively import lively
from torch import nn
from torch.nn import functional as F

from sparsetrail.snn.encode import phase
from sparsetrail.snn.engine import Conv2d, freeze
from sparsetrail.snn.net import NetSpec, victim
from sparsetrail.snn.neuron import NeuronSpec, can_compile, compile_neurons, compiled


@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)), kernel=st.integers(1, 5), stride=st.integers(1, 3),
    padding=st.integers(0, 2), bias=st.booleans(), frozen=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_tiny_maps_as_one_product(size, kernel, stride, padding, bias, frozen, seed):
    if min(size) + 2 * padding < kernel:
        return
    g = torch.Generator().manual_seed(seed)
    conv = Conv2d(3, 5, kernel, stride, padding, bias=bias).double().requires_grad_(not frozen)
    x = torch.randn(2, 3, *size, generator=g, dtype=torch.float64).requires_grad_()
    for _ in range(2):  # the second call of a frozen weight takes the kept matrix
        found, want = conv(x), F.conv2d(x, conv.weight, conv.bias, stride, padding)
        assert torch.allclose(found, want, atol=1e-12)
        inputs = [x] if frozen else [x, *conv.parameters()]
        push = torch.randn(found.shape, generator=g, dtype=torch.float64)
        for a, b in zip(torch.autograd.grad(found, inputs, push), torch.autograd.grad(want, inputs, push), strict=True):
            assert torch.allclose(a, b, atol=1e-12)


def test_a_kept_matrix_follows_its_weight():
    conv = Conv2d(2, 2, 3, padding=1, bias=False).requires_grad_(False)
    x = torch.randn(1, 2, 2, 2)
    before = conv(x)
    conv.weight.mul_(2)
    assert torch.allclose(conv(x), 2 * before)
    conv.weight = nn.Parameter(torch.zeros_like(conv.weight), requires_grad=False)
    assert not conv(x).any()


def network(**knobs):
    x = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    u = phase(steps=5)(x)
    return lively(NetSpec(width=0.25, steps=5, **knobs), u), u, torch.arange(4)


def scores_and_gradient(net, u, y):
    u = u.clone().requires_grad_()
    z = net(u)
    return z.detach(), torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), u)[0]


@pytest.mark.parametrize("arch", ["sew_resnet18", "spiking_resnet18"])
def test_a_frozen_copy_gives_the_same_to_the_bit(arch):
    net, u, y = network(arch=arch, neuron=NeuronSpec(detach_reset=arch.startswith("sew")))
    frozen = freeze(net)
    for a, b in zip(scores_and_gradient(net, u, y), scores_and_gradient(frozen, u, y), strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in net.parameters())


def test_a_victim_follows_its_network():
    net, u, _ = network()
    v = victim(net, phase(steps=5))
    with torch.no_grad():
        assert torch.equal(v.logits(u), net(u))
        net.fc.bias.add_(1.0)
        assert torch.equal(v.logits(u), net(u))
        net.bn1.running_mean.add_(0.5)
        assert torch.equal(v.logits(u), net(u))


@pytest.mark.skipif(not can_compile(), reason="no C++ compiler on this machine: eager neurons serve")
def test_compiled_neurons_equal_fused_ones():
    """In a process of its own: the shape checks of the tests wrap every function, a compiler sees none."""
    script = Path(__file__).with_name("compiled_neurons.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["kinds", "network", "ways-out"], done.stderr


def test_exact_networks_are_not_compiled():
    net, _, _ = network(exact=True)
    runs = {m.run for m in compile_neurons(net).modules() if hasattr(m, "spec")}
    assert compiled not in runs


def test_without_a_compiler_eager_neurons_serve(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not can_compile()
