"""The engine against the plain operations: kernels, whole networks, second derivatives, bf16, and doing without."""

import contextlib
import copy
import functools
import gc
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import lively
from torch import nn
from torch.nn import functional as F

import sparsetrail
from sparsetrail.attacks import attack, pgd
from sparsetrail.core import Linf
from sparsetrail.core.precision import products
from sparsetrail.data import load
from sparsetrail.snn import dense, firing, kernels
from sparsetrail.snn import neuron as neurons
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.encode import BACKWARD_RULES, bit_plane, direct, latency, phase, poisson
from sparsetrail.snn.engine import freeze, has_bf16, share_memory
from sparsetrail.snn.firing import fire
from sparsetrail.snn.graphs import Scores
from sparsetrail.snn.net import NetSpec, _Known, victim
from sparsetrail.snn.neuron import Neuron, NeuronSpec, fused, kernel, reference
from sparsetrail.snn.pooling import AvgPool2d, pooling_of
from sparsetrail.snn.resnet import FoldedNeuron, SpikingResNet
from sparsetrail.snn.routes import neuron_route
from sparsetrail.snn.surrogate import SURROGATES, Surrogate
from sparsetrail.snn.workspace import Workspace
from sparsetrail.training import TrainSpec, train

REASON = "no C compiler on this machine: the plain path serves"
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=REASON)
needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this CPU has no AVX-512 BF16, or no C compiler was found")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


def spikes(*size, share=0.3, seed=0, most=3, dtype=torch.float64):
    """Small whole numbers, mostly zero, as the sums of spikes in a residual network."""
    g = torch.Generator().manual_seed(seed)
    return ((torch.rand(size, generator=g) < share) * torch.randint(1, most, size, generator=g)).to(dtype)


def close(a, b, tol=1e-12):
    assert a.shape == b.shape and (a - b).abs().max() <= tol * max(1.0, b.abs().max().item())


# ---- kernels one by one, in float64 where a fault is no rounding -----------------------------------------------------


@needs_kernels
@settings(max_examples=150)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), frames=st.integers(1, 8), cin=st.sampled_from([8, 16, 40]),
    cout=st.sampled_from([8, 24, 72]), kernel=st.integers(1, 5), stride=st.integers(1, 3), padding=st.integers(0, 4),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.95]), bias=st.booleans(), frozen=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolution_of_spikes(size, frames, cin, cout, kernel, stride, padding, share, bias, frozen, seed):
    if min(size) + 2 * padding < kernel or padding >= kernel:
        return
    conv = Conv2d(cin, cout, kernel, stride, padding, bias=bias).double().requires_grad_(not frozen)
    x = spikes(frames, cin, *size, share=share, seed=seed).requires_grad_()
    assert conv.served(x, conv.weight)
    against_torch(conv, x, seed)


@needs_kernels
@settings(max_examples=100)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)), frames=st.integers(1, 3), cin=st.integers(1, 4),
    cout=st.sampled_from([8, 24]), kernel=st.integers(1, 7), stride=st.integers(1, 2), padding=st.integers(0, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_convolution_of_images(size, frames, cin, cout, kernel, stride, padding, seed):
    if min(size) + 2 * padding < kernel or padding >= kernel:
        return
    conv = Conv2d(cin, cout, kernel, stride, padding, bias=False).double()
    x = torch.rand(frames, cin, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert conv.served(x, conv.weight)
    against_torch(conv, x.requires_grad_(), seed)


def against_torch(conv, x, seed):
    for _ in range(2):  # the second call of a frozen weight takes what the first made
        found, want = conv(x), F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        close(found, want)
        inputs = [x, *(p for p in conv.parameters() if p.requires_grad)]
        push = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        for a, b in zip(torch.autograd.grad(found, inputs, push), torch.autograd.grad(want, inputs, push), strict=True):
            close(a, b)


@needs_kernels
def test_a_sum_does_not_depend_on_the_batch_or_on_how_many_inputs_are_active():
    """Frames that are mostly active go through the dense tile together, alone each through the sparse sum."""
    conv = Conv2d(32, 80, 3, padding=1, bias=False)
    with torch.no_grad():
        for share in (0.2, 0.69, 0.71, 1.0):
            x = spikes(13, 32, 5, 5, share=share, dtype=torch.float32)
            together = conv(x)
            for i in range(13):
                assert torch.equal(together[i : i + 1], conv(x[i : i + 1]))


@needs_kernels
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)), kernel=st.integers(1, 5), stride=st.integers(1, 3),
    padding=st.integers(0, 2), bias=st.booleans(), frozen=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_tiny_maps_as_one_product(size, kernel, stride, padding, bias, frozen, seed):
    if min(size) + 2 * padding < kernel:
        return
    conv = Conv2d(3, 5, kernel, stride, padding, bias=bias).double().requires_grad_(not frozen)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    tiny = size[0] * size[1] <= dense.TINY and kernel != 1 and padding < kernel
    assert not conv.served(x, conv.weight) and dense.suits(x, conv, conv.weight) == tiny
    against_torch(conv, x, seed)


def test_tiny_maps_in_bf16_and_when_mapped():
    g = torch.Generator().manual_seed(0)
    conv, x = Conv2d(6, 5, 3, padding=1), torch.randn(4, 6, 2, 2, generator=g)
    leaf = x.clone().requires_grad_()
    push = torch.randn(4, 5, 2, 2, generator=g)
    want, near = (dense.convolve(leaf, conv, conv.weight, half=half) for half in (False, True))
    assert torch.equal(want, near) and torch.allclose(want, F.conv2d(x, conv.weight, conv.bias, padding=1), atol=1e-6)
    a, b = ([*torch.autograd.grad(y, [leaf, conv.weight], push)] for y in (want, near))
    assert 1e-4 < (a[0] - b[0]).norm() / a[0].norm() < 1e-2 and torch.equal(a[1], b[1])
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(leaf)
    (c,) = torch.autograd.grad(y, leaf, push.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - want).norm() < 1e-2 * want.norm() and (c - a[0]).norm() < 1e-2 * a[0].norm()
    y = dense.convolve(leaf, conv, conv.weight)
    with torch.autocast("cpu", torch.bfloat16):  # of a forward without
        assert torch.equal(torch.autograd.grad(y, leaf, push)[0], a[0])
    with torch.no_grad():
        y = Conv2d(6, 5, 3, padding=1, bias=False)(x)
    y += 1  # no view
    with pytest.raises(RuntimeError):
        conv(x.double())
    each = torch.func.vmap(lambda v: conv(v[None])[0])(x)
    assert torch.allclose(each, want, atol=1e-6) and not dense.suits(torch.empty(2, 6, 0, 2), conv, conv.weight)
    rows = []
    for f in (lambda v: conv(v), lambda v: F.conv2d(v, conv.weight, conv.bias, padding=1)):
        (first,) = torch.autograd.grad(f(leaf).pow(3).sum(), leaf, create_graph=True)
        rows.append(torch.autograd.grad(first.pow(2).sum(), [leaf, conv.weight]))
    assert all(torch.allclose(p, q, rtol=1e-4, atol=1e-4) for p, q in zip(*rows, strict=True))


@pytest.mark.parametrize("channels", [2, 16])
def test_what_was_made_of_a_weight_follows_it(channels):
    conv = Conv2d(channels, channels, 3, padding=1, bias=False).requires_grad_(False)
    x = torch.randn(1, channels, 2, 2)
    before = conv(x)
    conv.weight.mul_(2)
    assert torch.allclose(conv(x), 2 * before)
    conv.weight = nn.Parameter(torch.zeros_like(conv.weight), requires_grad=False)
    assert not conv(x).any()


@needs_kernels
@pytest.mark.parametrize("most", [True, False], ids=["max", "average"])
def test_pools(most):
    for kernel_size, stride, padding in ((3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)):
        module = (nn.MaxPool2d if most else AvgPool2d)(kernel_size, stride, padding)
        for x in (spikes(3, 5, 9, 12), torch.randn(2, 3, 7, 7, dtype=torch.float64)):  # ties everywhere, and none
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            run = pooling_of(module, x)
            with torch.no_grad():
                found, at = run.run(x, None)
            want = module(x)
            close(found, want)
            push = torch.randn_like(want)
            (b,) = torch.autograd.grad(want, x, push)
            with torch.no_grad():
                a = run.back(push, at, x.shape, None)
            close(a, b)
            assert torch.equal(a == 0, b == 0)
            close(run.back(push, at, x.shape, None), b)  # in grad mode
    if most:
        x = torch.zeros(1, 1, 4, 4)
        x[0, 0, 1, 1] = float("nan")
        assert pooling_of(nn.MaxPool2d(2), x).run(x, None)[0].isnan().sum() == 1
    for odd in (
        nn.MaxPool2d(3, ceil_mode=True),
        AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.MaxPool2d((2, 3)),
    ):
        assert pooling_of(odd, x) is None


FIRES = [
    ("eval", {}, (0, 1, 2, 3, 4), True),
    ("eval", {}, (0, 1, 2, 0, 1), False),
    ("train", {}, (0, 1, 2, 3, 4), True),
    ("train", {"momentum": None}, (0, 1, 2, 0, 1), False),
    ("train", {"affine": False}, (0, 0, 0, 0, 0), False),
    ("eval", {}, (2, 0, 1, 4, 3), False),
    ("eval", {"affine": False}, (0, 1, 1, 2, 3), True),
]


@needs_kernels
@pytest.mark.parametrize(("mode", "knobs", "order", "plus"), FIRES)
@pytest.mark.parametrize("channels", [8, 3])
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(3, 2, 1), AvgPool2d(2, 2, 0)], ids=["none", "max", "avg"])
def test_batchnorm_and_neuron_in_one_pass(monkeypatch, mode, knobs, order, plus, channels, pool):
    """Pooled two images at a time of three."""
    monkeypatch.setattr(firing, "POOLED", 2 * len(order) * channels * 5 * 4)
    g = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(channels, **knobs).double().train(mode == "train")
    for name, value in norm.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=g) + 0.5 * (name != "running_mean"))
    frames, steps = max(order) + 1, len(order)
    y = torch.randn(frames * 3, channels, 5, 4, generator=g, dtype=torch.float64).mul_(1.5)
    y = y.contiguous(memory_format=torch.channels_last)
    more = spikes(steps * 3, channels, 5, 4) if plus else None
    neuron = FoldedNeuron(NeuronSpec(detach_reset=False), steps)
    found = []
    for plain in (True, False):
        bn, a = copy.deepcopy(norm), y.clone().requires_grad_()
        b = None if more is None else more.clone().requires_grad_()
        assert plain or firing._can_fire(a, bn, neuron, b)
        with kernels.plain() if plain else contextlib.nullcontext():
            s = fire(a, bn, neuron, steps, plus=b, order=order, pool=pool)
            inputs = [t for t in (a, b, *bn.parameters()) if t is not None]
            grads = torch.autograd.grad((s * torch.linspace(-1, 1, s.numel()).view(s.shape)).sum(), inputs)
        found.append((s.detach(), grads, bn.state_dict()))
    (s, grads, state), (fast, fast_grads, fast_state) = found
    assert torch.equal(s, fast) and s.any()
    for p, q in zip(grads, fast_grads, strict=True):
        assert p.abs().max() > 0
        close(q, p)
    for name, value in state.items():
        close(fast_state[name].double(), value.double())


@needs_kernels
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_generated_neurons_equal_the_plain_steps(surrogate):
    """Spikes to the bit, ties included; gradients to 1e-6, exact zeros where the plain path has them."""
    g = torch.Generator().manual_seed(0)
    for kind, reset, detach, decay in (
        ("if", 0.0, True, True), ("if", None, False, True), ("if", -0.3, False, True), ("lif", 0.0, False, True),
        ("lif", None, True, False), ("lif", 0.25, False, False),
    ):  # fmt: skip
        spec = NeuronSpec(kind=kind, reset=reset, detach_reset=detach, decay_input=decay, tau=2.5, threshold=0.5,
                          surrogate=Surrogate(surrogate, 1.3))  # fmt: skip
        for dtype, shape in ((torch.float32, (7, 5, 33)), (torch.float64, (3, 40)), (torch.float32, (1, 4099))):
            x = torch.randn(shape, generator=g, dtype=dtype) * 1.5 + 0.3
            x = torch.where(x > 1, (x * 4).round() / 8, x)
            found = []
            for plain in (True, False):
                with kernels.plain() if plain else contextlib.nullcontext():
                    assert plain or kernel(spec, x) is not None
                    leaf = x.clone().requires_grad_()
                    s = fused(leaf, spec)
                    found.append((s.detach(), torch.autograd.grad((s * x.cos()).sum(), leaf)[0]))
            (s, grad), (fast, fast_grad) = found
            assert torch.equal(s, fast) and 0 < s.mean() < 1
            assert (grad - fast_grad).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-14) * grad.abs().max()
            assert torch.equal(grad == 0, fast_grad == 0)


@needs_kernels
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("reset", [0.0, -0.2, None])
def test_a_learnt_leak(reset, decay):
    """PLIF: spikes and gradient of the input to rounding, gradient of the leak summed in another order."""
    spec = NeuronSpec(kind="plif", reset=reset, decay_input=decay, detach_reset=False, threshold=0.5)
    x = torch.randn(6, 4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5
    found = []
    for plain in (True, False):
        leaf, leak = x.clone().requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        with kernels.plain() if plain else contextlib.nullcontext():
            assert plain or kernel(spec, leaf, leak) is not None
            s = fused(leaf, spec, leak)
            found.append((s.detach(), *torch.autograd.grad((s * x.cos()).sum(), [leaf, leak])))
    (s, g, of_leak), (fast, fast_g, fast_of_leak) = found
    assert torch.equal(s, fast) and 0 < s.mean() < 1 and of_leak.abs() > 0.1
    close(fast_g, g)
    close(fast_of_leak, of_leak)


@needs_kernels
def test_a_surrogate_without_a_c_form_runs_plainly(monkeypatch, caplog):
    monkeypatch.setitem(SURROGATES, "bell", lambda x, width: torch.cosh(x / width) ** -2)
    spec, x = NeuronSpec(surrogate=Surrogate("bell", 1.0)), torch.randn(3, 8, requires_grad=True)
    assert kernel(spec, x) is None and "cosh" in caplog.text
    (grad,) = torch.autograd.grad(fused(x, spec).sum(), x)
    assert grad.abs().max() > 0


# ---- whole networks --------------------------------------------------------------------------------------------------


def pictures(n=4, seed=0, channels=3):
    return torch.randint(0, 256, (n, channels, 32, 32), generator=torch.Generator().manual_seed(seed)) / 255


def network(dtype=torch.float64, steps=5, n=4, **knobs):
    """A network whose every layer fires, its input, and labels."""
    x = pictures(n)
    spec = NetSpec(width=knobs.pop("width", 0.25), steps=steps, **knobs)
    with kernels.plain():
        net = lively(spec, phase(steps=steps)(x)).to(dtype)
    return net, x.to(dtype), torch.arange(n)


def outcome(net, u, y, parameters=True, way=None):
    """Scores, gradients of the input and of the parameters, running statistics after the call."""
    net, u = copy.deepcopy(net), u.clone().requires_grad_()
    z = net(u) if way is None else net.scores(u, way)
    inputs = [u, *(p for p in net.parameters() if p.requires_grad and parameters)]
    grads = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), inputs)
    return z.detach(), grads, net.state_dict()


NETS = [
    ({"arch": "sew_resnet18"}, {}, "eval"),
    ({"arch": "sew_resnet18", "pool": "avg"}, {}, "train"),
    ({"arch": "sew_resnet18", "connect": "iand", "stem": "cifar"}, {"kind": "lif", "threshold": 0.5}, "eval"),
    ({"arch": "sew_resnet34", "connect": "and"}, {"reset": None}, "train"),
    ({"arch": "sew_resnet50"}, {}, "eval"),
    ({"arch": "spiking_resnet18"}, {"detach_reset": False}, "train"),
    ({"arch": "spiking_resnet50", "pool": "avg"}, {"kind": "plif", "threshold": 0.5}, "train"),
]


@needs_kernels
@pytest.mark.parametrize(("knobs", "neuron", "mode"), NETS)
def test_a_network_is_the_same_with_the_engine_and_without(knobs, neuron, mode):
    net, x, y = network(neuron=NeuronSpec(**neuron), **knobs)
    net.train(mode == "train")
    u = phase(steps=5)(x)
    with kernels.plain():
        z, grads, state = outcome(net, u, y)
    for n in (net, share_memory(copy.deepcopy(net))):
        for _ in range(2):  # the second time in memory that was used before
            fast, fast_grads, fast_state = outcome(n, u, y)
        close(fast, z, 1e-11)
        for a, b in zip(fast_grads, grads, strict=True):
            assert (a - b).abs().max() <= 1e-10 * b.abs().max()
        assert torch.equal(fast_grads[0] == 0, grads[0] == 0)
        for name, value in state.items():
            close(fast_state[name].double(), value.double(), 1e-11)


@needs_kernels
def test_in_float32_too():
    """Sums in another order: 1e-5 of the gradient as long as no potential lies within rounding of its threshold."""
    net, x, y = network(torch.float32)
    with kernels.plain():
        z, grads, _ = outcome(net, phase(steps=5)(x), y)
    fast, fast_grads, _ = outcome(net, phase(steps=5)(x), y)
    close(fast, z, 1e-6)
    for a, b in zip(fast_grads, grads, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def rules():
    for make in (phase, bit_plane, latency):
        for rule in BACKWARD_RULES[1:]:
            with contextlib.suppress(ValueError):
                yield make(**({"bits": 5} if make is bit_plane else {"steps": 5}), backward=rule)
    yield phase(steps=5, bits=3, weighting="input")
    yield direct(steps=5)


def test_the_rules_that_are_tried():
    names: dict[str, list[str]] = {}
    for encode in rules():
        names.setdefault(encode.name, []).append(encode.backward)
    assert names == {
        "phase": ["identity", "weighted", "secant", "none", "identity"],
        "bit_plane": ["identity", "weighted", "secant", "none"],
        "latency": ["identity", "secant", "none"],
        "direct": ["true"],
    }


@needs_kernels
@pytest.mark.parametrize("encode", list(rules()), ids=lambda e: f"{e.name}-{e.backward}-{e.knobs.get('bits', '')}")
def test_frames_shown_again_go_through_the_first_layer_once(encode):
    """Scores, pixel gradient, weight gradient and batch statistics are those of the whole sequence."""
    net, x, y = network()
    net.train()
    severed = encode.backward == "none"
    found = []
    for way in (None, encode):
        n = copy.deepcopy(net)
        leaf = x.clone().requires_grad_(not severed)
        z = n(encode(leaf)) if way is None else n.scores(leaf, encode)
        grads = torch.autograd.grad(F.cross_entropy(z, y), [*([] if severed else [leaf]), *n.parameters()])
        found.append((z.detach(), grads, n.state_dict()))
    (z, grads, state), (short, short_grads, short_state) = found
    close(short, z, 1e-11)
    for a, b in zip(short_grads, grads, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-10 * b.abs().max()
    for name, value in state.items():
        close(short_state[name].double(), value.double(), 1e-11)


def test_frames_of_the_encoders():
    assert phase(steps=10).frames == (0, 1, 2, 3, 4, 5, 6, 7, 0, 1)
    assert direct(steps=3).frames == (0, 0, 0) and poisson(steps=3).frames is None
    x = pictures(2)
    deep = phase(steps=20, bits=10, backward="weighted")  # two planes of zeros, each with its weight
    for encode in (phase(steps=10), latency(steps=6), bit_plane(), direct(steps=4), deep):
        planes, slope = encode.distinct(x)
        assert torch.equal(planes[list(encode.frames)], encode(x))
        assert torch.equal(slope[list(encode.frames)], encode.slope)


def test_a_frozen_copy_gives_the_same_to_the_bit():
    for knobs in ({"arch": "sew_resnet18"}, {"arch": "spiking_resnet18", "neuron": NeuronSpec(detach_reset=False)}):
        net, x, y = network(torch.float32, **knobs)
        u, frozen = phase(steps=5)(x), freeze(net)
        (z, grads, _), (same, same_grads, _) = (outcome(n, u, y, parameters=False) for n in (net, frozen))
        assert torch.equal(z, same) and torch.equal(grads[0], same_grads[0])
        assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in net.parameters())


@needs_kernels
def test_the_number_of_threads_does_not_matter():
    net, x, y = network(torch.float32)
    u, before = phase(steps=5)(x), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(outcome(net, u, y))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1][0], found[1][1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * a.abs().max())


def test_a_victim_follows_its_network():
    net, x, _ = network(torch.float32)
    v, u = victim(net, phase(steps=5)), phase(steps=5)(x)
    with torch.no_grad():
        assert torch.equal(v.logits(u), net(u)) and torch.equal(v.scores(x), net(u))
        net.fc.bias.add_(1.0)
        assert torch.equal(v.logits(u), net(u))
        net.bn1.running_mean.add_(0.5)
        assert torch.equal(v.logits(u), net(u)) and torch.equal(v.scores(x), net(u))
        net.train()
    with pytest.raises(ValueError, match="train mode"):
        v.scores(x)


# ---- derivatives beyond the first, and transformations ---------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("pool_kind", ["max", "avg"])
def test_second_derivatives(mode, pool_kind):
    """The norm of the input gradient, differentiated: what gradient regularisation needs."""
    net, x, y = network(width=0.125, steps=3, n=3, pool=pool_kind, neuron=NeuronSpec(detach_reset=False))
    net.train(mode == "train")
    u, found = phase(steps=3)(x), []
    for plain in (True, False):
        n, leaf = copy.deepcopy(net), u.clone().requires_grad_()
        with kernels.plain() if plain else contextlib.nullcontext():
            loss = F.cross_entropy(n(leaf), y)
            (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
            found.append(torch.autograd.grad(loss + g.square().sum() * 100, [leaf, *n.parameters()]))
    for a, b in zip(found[1], found[0], strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_second_derivative_of_a_frozen_copy():
    net, x, y = network(width=0.125, steps=3, n=3, neuron=NeuronSpec(detach_reset=False))
    u, found = phase(steps=3)(x), []
    for n in (net, freeze(net)):
        leaf = u.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(n(leaf), y), leaf, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), leaf)[0])
    assert found[0].abs().max() > 0
    close(found[1] / found[0].abs().max(), found[0] / found[0].abs().max(), 1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_functorch_takes_the_plain_operations(device, pool):
    net, x, y = network(width=0.125, steps=3, n=3, pool=pool)
    net, x, y = net.to(device), x.to(device), y.to(device)
    u, weights = phase(steps=3)(x), dict(net.named_parameters())

    def loss(point, label):
        z = torch.func.functional_call(net, weights, (point.unsqueeze(1),))
        return F.cross_entropy(z, label.unsqueeze(0))

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(1, 0), out_dims=1)(u, y)
    leaf = u.clone().requires_grad_()
    (want,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
    close(each, want, 1e-10)
    along = torch.func.jvp(lambda v: net(v), (u,), (torch.ones_like(u),))[1]
    assert along.abs().max() > 0


@pytest.mark.parametrize("route", [None, "pdsg"])
def test_a_plain_forward_has_a_plain_backward_in_any_thread(monkeypatch, route):
    """A GPU's backward runs in a thread of its own, where no `plain` block was entered."""
    layer, served = Neuron(NeuronSpec()), []
    x, made = torch.rand(3, 2, 4, 5, requires_grad=True), neurons.kernel
    monkeypatch.setattr(neurons, "kernel", lambda *a, **k: served.append(made(*a, **k)) or served[-1])

    def backward_of(mode):
        served.clear()
        with mode, neurons.ruled(None if route is None else neuron_route(route).rule(None)):
            loss = layer(x).sum()
        with ThreadPoolExecutor(1) as pool:
            grad = pool.submit(lambda: torch.autograd.grad(loss, x)[0]).result()
        return grad, [k is not None for k in served]

    (plain, without), (fast, by) = backward_of(kernels.plain()), backward_of(contextlib.nullcontext())
    assert not any(without) and all(by) == kernels.available() and len(by) == 2
    close(fast, plain, 1e-6)


def test_watched_layers_are_called():
    net, x, _ = network(torch.float32)
    called = []
    watch = [
        m.register_forward_hook(lambda *_, n=n: called.append(n)) for n, m in net.named_modules() if not [*m.children()]
    ]
    with torch.no_grad():
        z = victim(net, phase(steps=5)).scores(x)
    for h in watch:
        h.remove()
    assert {"conv1", "bn1", "sn1", "pool", "layer1.0.join", "layer4.1.sn2", "fc"} <= set(called)
    with torch.no_grad():
        assert torch.allclose(z, net(phase(steps=5)(x)), atol=1e-5)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_used_again_only_when_nobody_holds_it():
    space = Workspace()
    a = space.take((4, 5), torch.float32).fill_(1.0)
    view, b = a.t(), space.take((4, 5), torch.float32)
    first, second = a.data_ptr(), b.data_ptr()
    assert first != second
    del a
    assert space.take((4, 5), torch.float32).data_ptr() not in (first, second)  # a view still lives there
    del view
    held = [space.take((4, 5 - i), torch.float32) for i in range(2)]
    assert first in {t.data_ptr() for t in held} and second not in {t.data_ptr() for t in held}
    assert len({t.data_ptr() for t in held}) == 2 and held[1].shape == (4, 4) and held[1].is_contiguous()
    large = space.take((1000, 1000), torch.float32)
    assert large.numel() == 10**6 and space.take((4, 5), torch.float64).dtype == torch.float64
    assert copy.deepcopy(space).held == {}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_memory_goes_back_with_its_owner():
    """Between small tensors too: a heap, which a freed large block makes the place of smaller ones, would keep it."""

    def pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    torch.zeros(20_000_000, dtype=torch.uint8)
    space, kept, between = Workspace(), [], []
    before = pages()
    for i in range(1, 9):
        kept.append(space.take((250_000 * i,), torch.float32).fill_(1.0))
        between.append(torch.zeros(40_000))
    there = pages() - before
    assert there * os.sysconf("SC_PAGE_SIZE") > 30e6 and len(between) == 8
    del kept, space
    gc.collect()
    assert pages() - before < there / 5


def test_gradients_survive_the_next_call():
    net, x, y = network(torch.float32)
    v, u = victim(net, phase(steps=5)), phase(steps=5)(x)
    kept = []
    for i in range(3):
        leaf = (u * (1 - 0.1 * i)).requires_grad_()
        kept.append((leaf, torch.autograd.grad(F.cross_entropy(v.logits(leaf), y), leaf)[0]))
    for leaf, g in kept:
        again = leaf.detach().requires_grad_()
        assert torch.equal(g, torch.autograd.grad(F.cross_entropy(net(again), y), again)[0])


# ---- bf16 ------------------------------------------------------------------------------------------------------------


BF16 = [pytest.param("cpu", marks=needs_bf16), pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@pytest.mark.parametrize("device", BF16)
def test_bf16_changes_input_gradients_only_and_little(device):
    net, x, y = network(torch.float32, width=0.5)
    net, x, y = net.to(device), x.to(device), y.to(device)
    u = phase(steps=5)(x)
    full, half = victim(net, phase(steps=5)), victim(net, phase(steps=5), precision="bf16")
    assert "bf16" in half.route and "bf16" not in full.route
    found = []
    for v in (full, half):
        leaf = u.clone().requires_grad_()
        z = v.logits(leaf)
        found.append((z.detach(), torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), leaf)[0]))
    (z, g), (same, near) = found
    assert torch.equal(z, same) and torch.equal(half.judge("encoded")(u), z)
    assert not torch.equal(g, near)
    assert F.cosine_similarity(g.flatten(), near.flatten(), 0) > 0.999
    assert ((g > 0) == (near > 0))[g.abs() > 0.05 * g.abs().max()].all()


@needs_bf16
@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1), (1, 1)])
def test_an_input_gradient_in_bf16(channels, kernel, stride):
    """Off by no more than the rounding of its two factors, 2^-9 each of their products; exact zeros stay."""
    g = torch.Generator().manual_seed(0)
    conv = Conv2d(channels, 48, kernel, stride, kernel // 2, bias=False)
    x = torch.rand(7, channels, 9, 11, generator=g).requires_grad_()
    y = conv(x)
    push = torch.randn(y.shape, generator=g)
    push[:, :, 3:] = 0  # some pixels are seen by nothing else
    push[2] = 0
    absolute = F.conv2d(x, conv.weight.abs(), None, stride, kernel // 2)
    (dx,), (size,) = torch.autograd.grad(y, [x], push), torch.autograd.grad(absolute, [x], push.abs())
    conv.half_products = True
    z = conv(x)
    (near,) = torch.autograd.grad(z, [x], push)
    assert torch.equal(y, z) and not torch.equal(near, dx)
    assert ((near - dx).abs() <= 2**-8 * size).all() and torch.equal(near == 0, dx == 0) and (dx == 0).any()


def test_bf16_is_refused_where_there_is_none(monkeypatch, tmp_path):
    net, x, y = network(torch.float32)
    monkeypatch.setattr("sparsetrail.training.run.has_bf16", lambda: False)
    data = load("fashion-mnist-slice", "train")
    with pytest.raises(ValueError, match="multiplies bf16"):
        train(
            NetSpec(channels=1, width=0.125, steps=2), phase(steps=2), data, TrainSpec(precision="bf16"), tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()
    monkeypatch.setattr("sparsetrail.snn.net.has_bf16", lambda: False)
    with pytest.raises(ValueError, match="multiplies bf16"):
        victim(net, phase(steps=5), precision="bf16")
    net.fc = type("Foreign", (nn.Linear,), {})(128, 10)
    with pytest.raises(ValueError, match="found others"):
        victim(net, phase(steps=5), precision="bf16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network trained for seconds on real images, and real test images."""
    data = sparsetrail.data.take(sparsetrail.load("fashion-mnist-slice", "train"), 2000, seed=0)
    net = NetSpec(channels=1, width=0.25, steps=4)
    model = train(net, phase(steps=4), data, TrainSpec(epochs=2, batch=32), tmp_path_factory.mktemp("trained"))
    test = sparsetrail.data.take(sparsetrail.load("fashion-mnist-slice", "test"), 300, seed=0)
    return model, sparsetrail.pixels(test.images), test.labels


@pytest.mark.parametrize("device", BF16)
@pytest.mark.parametrize(("space", "eps"), [("pixel", 8 / 255), ("encoded", 6 / 255)])
def test_an_attack_in_bf16_is_no_weaker_on_real_images(trained, space, eps, device):
    """Robust under bf16 but not under fp32, against the other way round: no more than chance gives (two sigma)."""
    model, x, y = trained
    net, x, y = copy.deepcopy(model.net).to(device), x.to(device), y.to(device)
    runs = [attack(pgd, victim(net, model.encode, precision=p), Linf(eps, space=space), x, y) for p in ("fp32", "bf16")]
    assert runs[0].clean == runs[1].clean and runs[0].clean_accuracy.value > 0.5
    only = [sum(a and not b for a, b in zip(p.robust, q.robust, strict=True)) for p, q in (runs, runs[::-1])]
    assert only[1] - only[0] <= 2 * (sum(only) ** 0.5) + 1
    assert runs[1].accuracy.value < runs[1].clean_accuracy.value


@needs_bf16
def test_training_in_bf16_learns(tmp_path):
    data = sparsetrail.data.take(sparsetrail.load("fashion-mnist-slice", "train"), 1200, seed=0)
    spec = TrainSpec(epochs=2, batch=32, precision="bf16")
    model = train(NetSpec(channels=1, width=0.25, steps=4), phase(steps=4), data, spec, tmp_path)
    held = model.card["validation"]
    assert held["k"] / held["n"] > 0.35


# ---- doing without ---------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import NetSpec, build
for steps, n in ((2, 1), (3, 2), (2, 5)):
    net = build(NetSpec(width=0.25, steps=steps))
    u = phase(steps=steps)(torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    net(u).sum().backward()
print(float(u.grad.abs().sum()))
"""


def program(tmp_path, **environment):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return float(done.stdout), done.stderr.splitlines()


@needs_kernels
def test_compiled_once_and_for_every_size(tmp_path):
    """Two libraries, whatever the steps and the batch; the second process compiles nothing; the plain path agrees."""
    fast, said = program(tmp_path)
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "sparsetrail").iterdir()}
    assert len(files) == 2 and said == []
    assert program(tmp_path)[0] == fast
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "sparsetrail").iterdir()} == files
    off, said = program(tmp_path / "off", SPARSETRAIL_KERNELS="0")
    assert abs(off - fast) <= 1e-4 * abs(fast) and said == [] and not (tmp_path / "off").exists()


def test_without_a_compiler_one_line_says_so(tmp_path):
    value, said = program(tmp_path, PATH="/nowhere", CC="")
    assert value > 0 and len(said) == 1 and "no C compiler" in said[0]


def test_a_compiler_that_fails_is_named(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    value, said = program(tmp_path, CC=f"{broken} -with arguments", PATH="/nowhere")
    assert value > 0 and len(said) == 1 and "it is broken" in said[0]


@needs_kernels
@pytest.mark.parametrize("cc", ['gcc "', "{}/wrong", "{}/silent"])
def test_a_compiler_that_cannot_be_asked_or_makes_no_library_leaves_it_to_the_next(tmp_path, cc):
    (tmp_path / "wrong").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "silent").write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do [ $# = 0 ] && exit; shift; done; echo no > "$2"\n'
    )
    for name in ("wrong", "silent"):
        (tmp_path / name).chmod(0o755)
    value, said = program(tmp_path / "cache", CC=cc.format(tmp_path))
    assert value > 0 and said == [] and len(list((tmp_path / "cache" / "sparsetrail").glob("*.so"))) >= 2


@needs_kernels
def test_a_damaged_library_is_made_anew(tmp_path):
    value, _ = program(tmp_path)
    for file in (tmp_path / "sparsetrail").iterdir():
        code = file.read_bytes()
        file.write_bytes(code[: len(code) // 2] + bytes(len(code) - len(code) // 2))
    assert program(tmp_path) == (value, [])


@needs_kernels
def test_kernels_that_are_there_need_no_temporary_folder(tmp_path):
    value, _ = program(tmp_path)
    code = f"import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/none']\n{PROGRAM}"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and float(done.stdout) == value and done.stderr == ""


@needs_kernels
def test_an_unwritable_cache_falls_back_to_another_folder(tmp_path):
    taken = tmp_path / "file"
    taken.write_text("not a folder")
    value, said = program(taken)
    assert value > 0 and said == []


def test_exact_networks_run_plainly():
    net, x, _ = network(torch.float32, exact=True)
    assert not net.conv1.served(x, net.conv1.weight) and all(
        m.run is reference for m in net.modules() if isinstance(m, Neuron)
    )
    assert not firing._can_fire(torch.rand(5, 16, 4, 4), net.bn1, net.sn1, None)


# ---- GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_same_on_a_gpu(mode):
    net, x, y = network()
    net.train(mode == "train")
    u = phase(steps=5)(x)
    z, grads, _ = outcome(net, u, y)
    there, there_grads, _ = outcome(copy.deepcopy(net).cuda(), u.cuda(), y.cuda())
    close(there.cpu(), z, 1e-9)
    for a, b in zip(there_grads, grads, strict=True):
        assert (a.cpu() - b).abs().max() <= 1e-8 * b.abs().max()


# ---- what a network's owner may do between two calls -----------------------------------------------------------------


CHANGES = {
    "fused-optimiser": lambda net: torch.optim.Adam(adam(net), 0.1, fused=True).step(),  # counts no versions (2.13)
    "in-place": lambda net: net.layer1[0].conv1.weight.data.mul_(-1),
    "other-data": lambda net: setattr(net.fc.weight, "data", -net.fc.weight.data),
    "statistics": lambda net: net.bn1.running_var.data.mul_(4),
    "eps": lambda net: setattr(net.bn1, "eps", 0.5),
    "neuron": lambda net: setattr(net.sn1, "spec", NeuronSpec(threshold=0.4)),
    "head": lambda net: setattr(net, "fc", nn.Linear(128, 10).to(net.fc.weight.device)),
    "norm": lambda net: setattr(net.layer2[0], "bn1", nn.GroupNorm(4, 32).to(net.fc.weight.device)),
    "mode": lambda net: net.bn1.train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_victim_is_never_out_of_date(change, device):
    net, x, y = network(torch.float32)
    net, x = net.to(device), x.to(device)
    encode = phase(steps=5)
    v = victim(net, encode)
    for n in (1, 4) * 3:  # few and many frames; on a GPU the second time is recorded
        v.logits(encode(x[:n]))
    before = v.scores(x)
    change(net)
    with torch.no_grad(), products(False):
        want = copy.deepcopy(net)(encode(x))
    if net.bn1.training:  # an image's scores would depend on the others
        for n in (1, 4) * 2:
            with pytest.raises(ValueError, match="found its bn1 in train mode"):
                v.logits(encode(x[:n]))
        net.bn1.eval()
        assert torch.allclose(v.scores(x), before, atol=1e-5)
        return
    for n in (1, 4) * (3 if device == "cuda" else 1):
        assert torch.allclose(v.logits(encode(x[:n])), want[:n], atol=1e-5)
    assert not torch.allclose(before, want, atol=1e-3)


def test_a_look_at_a_network_sees_what_a_recording_would_miss():
    for name, change in CHANGES.items():
        net, _, _ = network(torch.float32)
        known = _Known()
        assert known.look(net) == (True, False)
        assert known.look(net) == (False, False) == known.look(net)
        change(net)
        in_place = name in ("fused-optimiser", "in-place", "statistics")
        assert known.look(net) == (not in_place, False), name
        assert known.look(net) == (False, False), name
        net.bn1.momentum = net.bn1.momentum + 0.0  # the same value in another object
        net.conv1.stride = tuple(net.conv1.stride)
        net.layer1[0].generator = torch.Generator()
        assert known.look(net) == (True, False) and known.look(net) == (False, False)
        net.layer1[0].generator = torch.Generator()  # as a training step sets it
        assert known.look(net) == (False, False)
        net.layer1[0].mask = [1]
        assert known.look(net) == (True, False)
        for other in ([1], torch.ones(2), torch.ones(2), (1, torch.ones(2))):
            net.layer1[0].mask = other
            assert known.look(net) == (True, False) and known.look(net) == (False, False)
        net.fc.weight.data = net.fc.weight.data[:, :64]  # the same place, another shape
        assert known.look(net) == (True, False)
        net.layer1[0].conv1.weight.data = net.layer1[0].conv1.weight.data.transpose(2, 3)
        assert known.look(net) == (True, False)
        net.layer1[0].conv1.__class__ = type("Other", (Conv2d,), {})
        assert known.look(net) == (True, False) and known.look(net) == (False, False)
        handle = net.layer1[0].conv2.register_forward_hook(lambda *_: None)
        assert known.look(net) == (False, True) == known.look(net)
        handle.remove()
        assert known.look(net) == (False, False)
        net.layer1[0].conv2.forward = net.layer1[0].conv2.forward
        assert known.look(net) == (True, True) and known.look(net) == (False, True)
        other, _, _ = network(torch.float32)
        assert known.look(other) == (True, False)


@pytest.mark.parametrize("name", [n for n in CHANGES if n not in ("fused-optimiser", "in-place", "statistics")])
def test_what_an_older_recording_says_is_thrown_away(monkeypatch, name):
    """On a CPU that says it is a GPU, with recordings that say for ever what they said the first time."""
    launched = []

    def record(fn):
        out = fn()

        def replay():
            if not launched:
                out.data.copy_(fn())
            launched.append(name)

        return replay, out

    monkeypatch.setattr("sparsetrail.snn.net.Scores", functools.partial(Scores, record=record, warm=lambda fn: None))
    net, x, _ = network(torch.float32)
    u = phase(steps=5)(x)
    v = victim(net, phase(steps=5))
    with kernels.plain(), torch.no_grad():
        before = net(u)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        for count in (0, 1, 2, 3):  # plainly, recorded, and launched twice
            assert torch.equal(v.logits(u), before) and len(launched) == count
        CHANGES[name](net)
        after = copy.deepcopy(net)(u)
        assert not torch.allclose(after, before, atol=1e-3)
        if net.bn1.training:
            with pytest.raises(ValueError, match="found its bn1 in train mode"):
                v.logits(u)
            return
        assert torch.equal(v.logits(u), after) and len(launched) == 4  # the old one, in vain
        handle = net.fc.register_forward_hook(lambda m, i, y: 2 * y)
        assert torch.equal(v.logits(u), net(u)) and not torch.allclose(v.logits(u), after, atol=1e-3)
        handle.remove()


def adam(net):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return net.parameters()


@needs_kernels
def test_a_weight_that_comes_and_goes_is_not_mistaken_for_another():
    conv = Conv2d(16, 16, 3, padding=1, bias=False)
    x = spikes(2, 16, 4, 4, dtype=torch.float32)
    with torch.no_grad():
        for i in range(20):
            weight = torch.full_like(conv.weight, float(i))
            found = torch.func.functional_call(conv, {"weight": weight}, (x,))
            assert torch.allclose(found, F.conv2d(x, weight, padding=1))


def test_a_module_that_does_more_is_called():
    net, x, _ = network(torch.float32)
    u = phase(steps=5)(x)

    class Loud(FoldedNeuron):
        def forward(self, x):
            return 2 * super().forward(x)

    class Keeps(Conv2d):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    with torch.no_grad():
        net.sn1 = Loud(net.sn1.spec, 5)
        with kernels.plain():
            want = net(u)
        assert torch.allclose(net(u), want, atol=1e-5) and torch.allclose(
            net.scores(x, phase(steps=5)), want, atol=1e-5
        )
        keeps = Keeps(16, 16, 3, padding=1, bias=False)
        keeps.weight = net.layer1[0].conv1.weight
        net.layer1[0].conv1 = keeps
        net(u)
        assert ((keeps.last * 1.0) != 0).any() and keeps.last.min() < 0  # currents, not potentials over them
        net.layer2[0].downsample.append(nn.Identity())
        assert torch.allclose(net(u), want, atol=1e-5)


@needs_kernels
def test_a_name_given_another_surrogate(monkeypatch):
    x = torch.full((1, 4), 0.5, requires_grad=True)
    for factor in (1.0, 5.0):
        monkeypatch.setitem(SURROGATES, "mine", lambda x, width, f=factor: f * (x == x))
        assert torch.autograd.grad(fused(x, NeuronSpec(surrogate=Surrogate("mine", 1.0))).sum(), x)[0][0, 0] == factor


@needs_kernels
@pytest.mark.parametrize(
    ("name", "width"), [("sigmoid", 50.0), ("gaussian", 0.05), ("exponential", 60.0), ("atan", 99.0)]
)
def test_steep_surrogates_have_the_same_exact_zeros(name, width):
    x = torch.linspace(-4, 6, 20001).view(1, -1)
    spec, shares = NeuronSpec(surrogate=Surrogate(name, width)), []
    for plain in (True, False):
        leaf = x.clone().requires_grad_()
        with kernels.plain() if plain else contextlib.nullcontext():
            (g,) = torch.autograd.grad(fused(leaf, spec).sum(), leaf)
        shares.append((g == 0).float().mean().item())
    assert abs(shares[0] - shares[1]) <= 2e-4 and (shares[0] > 0.3) == (name != "atan")


@needs_kernels
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_second_derivatives_in_contiguous_memory(mode):
    net, x, y = network(width=0.125, steps=3, n=3)
    net = net.to(memory_format=torch.contiguous_format).train(mode == "train")
    u, found = phase(steps=3)(x), []
    for plain in (True, False):
        n = copy.deepcopy(net)
        with kernels.plain() if plain else contextlib.nullcontext():
            leaf = u.clone().requires_grad_()
            g = torch.autograd.grad(F.cross_entropy(n(leaf), y), [leaf, *n.parameters()], create_graph=True)
            found.append(torch.autograd.grad(sum(p.square().sum() for p in g), [leaf, *n.parameters()]))
    for a, b in zip(found[1], found[0], strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-300)


@needs_kernels
@pytest.mark.parametrize("encode", [direct(steps=3), phase(steps=3, bits=2)], ids=["direct", "phase"])
def test_pixels_of_a_weight_gradient(encode):
    """Gradient matching: the weight gradient, differentiated with respect to the pixels."""
    net, x, y = network(width=0.125, steps=3, n=3)
    found = []
    for way in (lambda p: net(encode(p)), lambda p: net.scores(p, encode)):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(way(leaf), y), [net.conv1.weight], create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), leaf)[0])
    assert (found[0] - found[1]).abs().max() <= 1e-10 * found[0].abs().max() and found[0].any()


@needs_kernels
def test_gradients_of_many_outputs_at_once():
    net, x, _ = network(width=0.125, steps=3, n=1)
    leaf = phase(steps=3)(x).requires_grad_()
    z = net(leaf)
    (together,) = torch.autograd.grad(
        z, leaf, torch.eye(10).double()[:, None], is_grads_batched=True, retain_graph=True
    )
    for i in range(10):
        close(together[i], torch.autograd.grad(z[0, i], leaf, retain_graph=True)[0], 1e-10)


@needs_kernels
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_what_hooks_on_saved_tensors_give_back_in_another_memory_order(mode):
    net, x, _ = network(width=0.125, steps=3, n=2)
    net.train(mode == "train")
    leaf, found = phase(steps=3)(x), []
    for pack in (None, lambda t: t.detach().contiguous()):
        again, u = copy.deepcopy(net), leaf.clone().requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t) if pack else contextlib.nullcontext()
        with hooks:
            z = again(u)[:, 0].sum()
        found.append(torch.autograd.grad(z, [u, *again.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        close(b, a, 1e-10)
    assert found[0][0].abs().max() > 0


@needs_kernels
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_checkpoint_that_computes_again_what_it_let_go(mode):
    net, x, _ = network(width=0.125, steps=3, n=2)
    net.train(mode == "train")
    leaf, found = phase(steps=3)(x), []
    for again in (False, True):
        twin, u = copy.deepcopy(net), leaf.clone().requires_grad_()
        z = torch.utils.checkpoint.checkpoint(twin, u, use_reentrant=False) if again else twin(u)
        found.append(torch.autograd.grad(z[:, 0].sum(), [u, *twin.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        close(b, a, 1e-10)


def test_modes_of_torch_that_hand_out_other_tensors():
    net, x, y = network(torch.float32)
    u, v = phase(steps=5)(x), victim(net, phase(steps=5))
    with torch.inference_mode():
        v.scores(x), net(u)
    leaf = u.clone().requires_grad_()
    z = v.logits(leaf)
    with kernels.plain():  # the backward of a forward that ran with kernels
        assert torch.autograd.grad(F.cross_entropy(z, y), leaf)[0].any()
    with torch.device("meta"):
        again = u.clone().requires_grad_()
        assert torch.autograd.grad(F.cross_entropy(net(again), y), again)[0].any()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert net(fake.from_tensor(u)).shape == (4, 10)
    conv = Conv2d(16, 16, 3, padding=1)
    assert not conv.served(torch.zeros(2, 16, 0, 0), conv.weight)


def test_memory_of_smaller_batches_is_let_go():
    def held(sizes):
        space = Workspace()
        for n in sizes:
            for _ in range(2):
                kept = [space.take((n, 1000 * i), torch.float32) for i in (40, 10, 10, 40, 3)]
                del kept
        return sum(size for size, _ in space.held[torch.float32])

    assert held(range(1, 33)) <= 1.3 * held([32])


@needs_kernels
def test_a_library_cut_off_is_made_again(tmp_path):
    value, _ = program(tmp_path)
    for path in (tmp_path / "sparsetrail").iterdir():
        path.write_bytes(path.read_bytes()[:4096])
    again, said = program(tmp_path)
    assert again == value and said == [] and len(list((tmp_path / "sparsetrail").iterdir())) == 2


@pytest.mark.parametrize(
    "spec", [NeuronSpec(detach_reset=False), NeuronSpec(kind="plif", tau=2.0)], ids=lambda s: s.kind
)
@pytest.mark.parametrize("last", [True, False])
def test_steps_taken_plainly_may_be_differentiated_by_the_kernel(spec, last):
    """Whatever the memory order that the plain steps left behind."""
    g = torch.Generator().manual_seed(0)
    y, push = (torch.randn(6, 4, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    y = y.to(memory_format=torch.channels_last) if last else y
    leak = torch.tensor(0.4, dtype=torch.float64, requires_grad=True) if spec.kind == "plif" else None
    found = []
    for there, back in ((True, True), (True, False), (False, True), (False, False)):
        leaf = y.clone(memory_format=torch.preserve_format).requires_grad_()
        with kernels.plain() if there else contextlib.nullcontext():
            s = fused(leaf.unflatten(0, (3, -1)), spec, leak).flatten(0, 1)
        with kernels.plain() if back else contextlib.nullcontext():
            found.append(torch.autograd.grad(s, [leaf] if leak is None else [leaf, leak], push))
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found[0], other, strict=True))


# ---- networks that somebody has a hand in ----------------------------------------------------------------------------


class Turned(SpikingResNet):
    def forward(self, u):
        return super().forward(u).roll(1, 1)


class Late(SpikingResNet):
    def per_step(self, u):
        return super().per_step(u)[-1:]


def _hooked(net):
    net.register_forward_hook(lambda _m, _u, z: z.roll(1, 1))


def _before(net):
    net.register_forward_pre_hook(lambda _m, u: (1 - u[0],))


def _patched(net):
    net.forward = lambda u, own=net.forward: own(u).roll(1, 1)


def _subclass(net):
    net.__class__ = Turned


def _steps(net):
    net.__class__ = Late


@pytest.mark.parametrize("change", [_hooked, _before, _patched, _subclass, _steps])
def test_what_somebody_changes_in_the_forward_of_a_network_counts_in_both_spaces(change):
    net, x, _ = network(torch.float32)
    code = phase(steps=5)
    usual = victim(net, code).scores(x)
    change(net)
    v = victim(net, code)
    z = net(code(x))
    assert not torch.allclose(z, usual, atol=1e-3)  # it does something
    for found in (v.scores(x), v.logits(code(x)), net.scores(x, code)):
        assert torch.equal(found, z)


def test_a_weight_made_of_others_is_made_once_a_forward():
    conv = torch.nn.utils.parametrizations.weight_norm(Conv2d(16, 16, 3, padding=1))
    asked = []
    conv.parametrizations.weight[0].register_forward_hook(lambda *_: asked.append(1))
    for x in (spikes(2, 16, 8, 8, dtype=torch.float32), spikes(2, 16, 2, 2, dtype=torch.float32)):
        asked.clear()
        y = conv(x)
        assert len(asked) == 1
        close(y, F.conv2d(x, conv.weight, conv.bias, padding=1), 1e-5)


def test_a_first_layer_made_of_others_is_made_once_in_both_ways():
    net, x, _ = network(torch.float32)
    torch.nn.utils.parametrizations.weight_norm(net.conv1)
    asked, code = [], phase(steps=5)
    net.conv1.parametrizations.weight[0].register_forward_hook(lambda *_: asked.append(1))
    close(net.scores(x, code), net(code(x)), 1e-6)
    assert len(asked) == 2


def test_batchnorm_without_running_tensors_trains_as_pytorchs():
    net, x, y = network(torch.float32)
    plain = copy.deepcopy(net)
    for each in (net, plain):
        for m in each.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean = m.running_var = None
        each.train()
    with kernels.plain():
        want = plain(phase(steps=5)(x))
    close(net(phase(steps=5)(x)), want, 1e-5)


@pytest.mark.parametrize("kind", ["if", "lif"])
def test_an_infinite_potential_at_the_last_step_spoils_no_other(kind):
    spec = NeuronSpec(kind=kind, detach_reset=False)
    found = []
    for run in (reference, fused):
        u = torch.tensor([[0.5] * 16, [-math.inf] * 16]).requires_grad_()
        found.append(torch.autograd.grad(run(u, spec).sum(), u)[0])
    assert torch.equal(found[0].isfinite(), found[1].isfinite()) and torch.allclose(*found, equal_nan=True)
