"""Numerical equality with SpikingJelly 2.0.0: neurons, surrogates, encoders and whole networks."""

import contextlib
import itertools
import math

import pytest
import torch
from torch import nn

from sparsetrail.snn import kernels
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.encode import latency, phase, poisson
from sparsetrail.snn.net import NetSpec, build
from sparsetrail.snn.neuron import Neuron, NeuronSpec, reference
from sparsetrail.snn.resnet import FoldedNeuron
from sparsetrail.snn.surrogate import Surrogate

KINDS = [("if", True), ("lif", True), ("lif", False), ("plif", True), ("plif", False)]


def gap(a, b):
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def node(sj, spec):
    """SpikingJelly's neuron of the same kind."""
    knobs = {
        "v_threshold": float(spec.threshold),
        "v_reset": spec.reset,
        "surrogate_function": sj.surrogate.ATan(alpha=spec.surrogate.width),
        "detach_reset": spec.detach_reset,
        "step_mode": "m",
    }
    if spec.kind == "if":
        return sj.neuron.IFNode(**knobs)
    if spec.kind == "lif":
        return sj.neuron.LIFNode(tau=spec.tau, decay_input=spec.decay_input, **knobs)
    return sj.neuron.ParametricLIFNode(init_tau=spec.tau, decay_input=spec.decay_input, **knobs)


@pytest.mark.parametrize("exact", [True, False], ids=["reference", "fused"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "in-graph"])
@pytest.mark.parametrize("reset", [0.0, -0.4, 0.25, None])
@pytest.mark.parametrize(("kind", "decay"), KINDS)
def test_neuron(spikingjelly, kind, decay, reset, detach, exact):
    """Spikes exactly equal, ties included; gradients to 1e-6, that of w too."""
    g = torch.Generator().manual_seed(0)
    drive = 2.5 if decay and kind != "if" else 1.0
    for steps, grid in itertools.product(range(1, 11), (False, True)):
        th = (1.0, 0.5, 0.3)[steps % 3]
        spec = NeuronSpec(kind=kind, decay_input=decay, reset=reset, detach_reset=detach, threshold=th, tau=2.5)
        x = (torch.randn(steps, 6, 40, generator=g) * 0.9 + 0.4) * drive
        if grid:  # multiples of half the threshold: many potentials hit it exactly
            x = (x / th * 2).round() * th / 2
        weight = torch.rand(x.shape, generator=g) - 0.3
        here, there = Neuron(spec, exact=exact), node(spikingjelly, spec)
        found = []
        for layer in (here, there):
            leaf = x.clone().requires_grad_()
            s = layer(leaf)
            found.append((s.detach(), *torch.autograd.grad((s * weight).sum(), [leaf, *layer.parameters()])))
        (s, gx, *gw), (s_ref, gx_ref, *gw_ref) = found
        assert torch.equal(s, s_ref) and 0 < s.mean() < 1
        assert gap(gx, gx_ref) < 1e-6, (steps, grid)
        assert torch.equal(gx == 0, gx_ref == 0)  # the trail counts exact zeros
        if kind == "plif":  # one number summed over neurons, where signs cancel: relative to the sum of magnitudes
            q = torch.sigmoid(here.w.detach()).expand(6, 40).clone().requires_grad_()
            (each,) = torch.autograd.grad((reference(x, spec, q) * weight).sum(), q)
            assert (gw[0] - gw_ref[0]).abs() <= 1e-6 * (each * q * (1 - q)).abs().sum(), (steps, grid)


def test_surrogates(spikingjelly):
    x = torch.linspace(-6, 6, 4001)
    for a in (0.5, 1.0, 2.0, 4.0, 7.3):
        same = [
            (Surrogate("atan", a), spikingjelly.surrogate.ATan(a), 1),
            (Surrogate("sigmoid", a), spikingjelly.surrogate.Sigmoid(a), 1),
            (Surrogate("triangle", 1 / a), spikingjelly.surrogate.PiecewiseQuadratic(a), 1),
            (Surrogate("gaussian", 1 / (a * math.sqrt(2))), spikingjelly.surrogate.Erf(a), 1),
            (Surrogate("exponential", a), spikingjelly.surrogate.PiecewiseExp(a), 1),
            (Surrogate("fast_sigmoid", a), spikingjelly.surrogate.SoftSign(a), 2 / a),
            (Surrogate("fast_sigmoid", 1.0), spikingjelly.surrogate.SuperSpike(a), 1 / a),
        ]
        for ours, theirs, scale in same:
            leaf = x.clone().requires_grad_()
            s = theirs(leaf)
            (g,) = torch.autograd.grad(s.sum(), leaf)
            assert torch.equal(s.detach(), (x >= 0).float())
            assert gap(ours(x), g * scale) < 1e-6, (ours, theirs)


def test_phase_encoder(spikingjelly):
    """SpikingJelly takes v/256 (1.0 is out of its range), we take v/255: the same bits for all 256 grey levels."""
    v = torch.arange(256)
    for bits, steps in ((8, 10), (8, 8), (8, 21), (4, 6)):
        seen = v[v <= 256 - 2 ** (8 - bits)]  # it refuses more than 1 - 2^-bits
        encoder = spikingjelly.encoding.WeightedPhaseEncoder(bits)
        theirs = torch.stack([encoder(seen / 256) for _ in range(steps)])
        ours = phase(steps=steps, bits=bits)((seen / 255).view(1, 1, 1, -1)).flatten(1)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("curve", ["linear", "log"])
def test_latency_encoder(spikingjelly, curve):
    x = torch.arange(256) / 255
    for steps in (2, 3, 4, 8, 10, 16, 32, 64, 89):  # its log curve overflows from 90 steps on
        encoder = spikingjelly.encoding.LatencyEncoder(steps, enc_function=curve)
        theirs = torch.stack([encoder(x) for _ in range(steps)])
        assert torch.equal(latency(steps=steps, curve=curve)(x.view(1, 1, 16, 16)).flatten(1), theirs)


def test_poisson_encoder(spikingjelly):
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[1, 1] = 0.0, 1.0
    encoder = spikingjelly.encoding.PoissonEncoder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = torch.stack([encoder(x) for _ in range(12)])
    assert torch.equal(poisson(steps=12, seed=7)(x), theirs)


def ours(spec, u, *, contiguous=True, dtype=torch.float32):
    """A network whose every layer fires: random gains, statistics taken from the input."""
    net = build(spec, seed=1).to(dtype)
    if contiguous:  # PyTorch's own convolutions in SpikingJelly's memory order, so that not even rounding differs
        net = net.to(memory_format=torch.contiguous_format)
        for m in net.modules():
            if isinstance(m, Conv2d):
                m.exact = True
    g = torch.Generator().manual_seed(2)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        nn.init.uniform_(m.weight, 0.8, 1.4, generator=g)
        nn.init.uniform_(m.bias, 0.2, 0.8, generator=g)
        m.momentum = 1.0
    net.train()
    with torch.no_grad():
        net(u)
    for m in norms:
        m.momentum = 0.1
    return net


def theirs(sj, spec, net):
    """SpikingJelly's network with the weights of ours, every key of both used."""
    nodes = {"if": "IFNode", "lif": "LIFNode", "plif": "ParametricLIFNode"}
    n = spec.neuron
    knobs = {
        "spiking_neuron": getattr(sj.neuron, nodes[n.kind]),
        "num_classes": spec.classes,
        "v_threshold": n.threshold,
        "v_reset": n.reset,
        "detach_reset": n.detach_reset,
        "surrogate_function": sj.surrogate.ATan(),
    }
    if n.kind != "if":
        knobs |= {"tau" if n.kind == "lif" else "init_tau": n.tau, "decay_input": n.decay_input}
    if spec.arch.startswith("sew"):
        ref = getattr(sj.sew_resnet, spec.arch)(cnf=spec.connect.upper(), **knobs)
    else:
        ref = getattr(sj.spiking_resnet, spec.arch)(**knobs)
    if spec.pool == "avg":
        ref.maxpool = sj.layer.AvgPool2d(3, 2, 1)
    sj.functional.set_step_mode(ref, "m")
    ref = ref.to(next(net.parameters()).dtype)
    ref.load_state_dict(net.state_dict(), strict=True)
    return ref


def watch(net, kind):
    """Spikes of every neuron layer by name, filled at the next call."""
    seen = {}
    for name, m in net.named_modules():
        if isinstance(m, kind):
            m.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.detach()}))
    return seen


def tolerance(spec):
    """Of gradients in float32, relative to the largest value of each.

    Measured (torch 2.13, CPU): 0 with step-by-step neurons, and with fused IF neurons whose reset is detached;
    otherwise `fused` multiplies factors in another order, as SpikingJelly's GPU kernels do: 4e-6 after 50 layers.
    """
    same_order = spec.exact or (spec.neuron.kind == "if" and spec.neuron.detach_reset)
    return 1e-6 if same_order else 1e-5


def check(sj, spec, mode, *, dtype=torch.float32, contiguous=True, tol=None):
    """Scores, spikes of every layer, gradients and running statistics of one net in both libraries.

    In contiguous memory by PyTorch's own operations, so that not even rounding differs; else as the engine runs it.
    """
    with kernels.plain() if contiguous else contextlib.nullcontext():
        compare(sj, spec, mode, dtype=dtype, contiguous=contiguous, tol=tol or tolerance(spec))


def compare(sj, spec, mode, *, dtype, contiguous, tol):
    g = torch.Generator().manual_seed(0)
    u = torch.randint(2, (spec.steps, 2, 3, 32, 32), generator=g).to(dtype)
    weight = torch.randn(spec.steps, 2, spec.classes, generator=g).to(dtype)
    net = ours(spec, u, contiguous=contiguous, dtype=dtype)
    ref = theirs(sj, spec, net)
    net.train(mode == "train"), ref.train(mode == "train")
    fired = watch(net, FoldedNeuron), watch(ref, sj.neuron.BaseNode)
    scores, pixel = [], []
    for forward in (net.per_step, ref):
        leaf = u.clone().requires_grad_()
        z = forward(leaf)
        (z * weight).sum().backward()
        scores.append(z.detach())
        pixel.append(leaf.grad)
    assert fired[0].keys() == fired[1].keys() and len(fired[0]) >= 17
    for name, s in fired[1].items():
        assert torch.equal(fired[0][name], s.flatten(0, 1)), name
        assert 0.02 < s.mean() < 0.98, name  # the deepest layers fire too, else this would prove nothing
    assert gap(*scores) < 1e-6 and scores[1].std() > 0
    assert gap(*pixel) < tol and pixel[1].abs().max() > 0
    if contiguous:
        assert torch.equal(pixel[0] == 0, pixel[1] == 0)
    want = dict(ref.named_parameters())
    for name, p in net.named_parameters():
        # w of PLIF is one number, a sum over a whole layer where signs cancel: 1.5e-5 measured
        assert gap(p.grad, want[name].grad) < (10 * tol if name.endswith(".w") else tol), name
        assert want[name].grad.abs().max() > 0, name
    after = ref.state_dict()
    for name, value in net.state_dict().items():  # running statistics among them
        assert gap(value.double(), after[name].double()) < 1e-6, name
    sj.functional.reset_net(ref)
    with torch.no_grad():
        assert gap(net.eval()(u), ref.eval()(u).mean(0)) < 1e-6


FAMILIES = [("sew_resnet18", "add"), ("sew_resnet18", "and"), ("sew_resnet18", "iand"), ("spiking_resnet18", "add")]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "in-graph"])
@pytest.mark.parametrize("reset", [0.0, None], ids=["hard", "soft"])
@pytest.mark.parametrize(("arch", "connect"), FAMILIES)
def test_resnet18(spikingjelly, arch, connect, reset, detach, mode):
    """Both pools and both ways to run a neuron meet both resets, both gradient paths and both modes."""
    pool = "avg" if detach == (mode == "train") else "max"
    exact = (reset is None) == (mode == "train")
    neuron = NeuronSpec(reset=reset, detach_reset=detach)
    check(spikingjelly, NetSpec(arch=arch, connect=connect, pool=pool, neuron=neuron, steps=4, exact=exact), mode)


def words(k):
    return "-".join(map(str, k.values())) if isinstance(k, dict) else str(k)


@pytest.mark.parametrize(
    ("knobs", "neuron", "mode"),
    [
        ({"arch": "sew_resnet34", "connect": "iand"}, {}, "train"),
        ({"arch": "spiking_resnet34", "pool": "avg"}, {"detach_reset": False}, "eval"),
        ({"arch": "sew_resnet50", "connect": "add"}, {}, "train"),
        ({"arch": "sew_resnet50", "connect": "and", "pool": "avg"}, {"reset": None}, "eval"),
        ({"arch": "sew_resnet50", "connect": "iand", "exact": True}, {"detach_reset": False}, "eval"),
        ({"arch": "spiking_resnet50"}, {"detach_reset": False}, "train"),
    ],
    ids=words,
)
def test_deeper(spikingjelly, knobs, neuron, mode):
    check(spikingjelly, NetSpec(neuron=NeuronSpec(**neuron), steps=3, **knobs), mode)


@pytest.mark.parametrize("exact", [True, False], ids=["reference", "fused"])
@pytest.mark.parametrize(
    "neuron",
    [
        {"kind": "lif", "tau": 1.5, "threshold": 0.5},
        {"kind": "lif", "decay_input": False, "reset": -0.2, "detach_reset": False},
        {"kind": "plif", "threshold": 0.5, "detach_reset": False},
        {"kind": "plif", "decay_input": False, "reset": None},
    ],
    ids=words,
)
def test_other_neurons(spikingjelly, neuron, exact):
    check(spikingjelly, NetSpec(neuron=NeuronSpec(**neuron), steps=4, classes=100, exact=exact), "train")


@pytest.mark.parametrize(
    ("knobs", "neuron", "mode"),
    [
        ({"arch": "sew_resnet18", "pool": "avg"}, {}, "train"),
        ({"arch": "sew_resnet18"}, {"kind": "plif", "threshold": 0.5, "detach_reset": False}, "eval"),
        ({"arch": "spiking_resnet18"}, {"detach_reset": False}, "train"),
        ({"arch": "sew_resnet50", "connect": "iand"}, {}, "eval"),
    ],
    ids=words,
)
def test_fast_paths(spikingjelly, knobs, neuron, mode):
    """As `build` hands it over: channels last, dense products on tiny maps, fused neurons.

    Sums run in another order there: in float32 1e-5 of the gradient (SEW-18 and -50, torch 2.13, CPU), as long as no
    potential lies within rounding of its threshold. Where one does, a spike flips and all that follows is another
    run, so this is judged in float64, where none does.
    """
    spec = NetSpec(neuron=NeuronSpec(**neuron), steps=4, **knobs)
    check(spikingjelly, spec, mode, dtype=torch.float64, contiguous=False, tol=1e-11)


def test_their_weights_fit_ours(spikingjelly):
    for arch in ("sew_resnet18", "spiking_resnet18"):
        spec = NetSpec(arch=arch)
        net = build(spec, seed=3)
        ref = theirs(spikingjelly, spec, build(spec, seed=4))
        assert list(net.state_dict()) != [] and net.state_dict().keys() == ref.state_dict().keys()
        net.load_state_dict(ref.state_dict(), strict=True)
        assert all(torch.equal(v, ref.state_dict()[k]) for k, v in net.state_dict().items())
