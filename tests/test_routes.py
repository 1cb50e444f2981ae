"""Gradient routes: the forward to the bit, every backward against one written here step by step, and no traces left."""

import contextlib
import copy
import math
from dataclasses import replace

import pytest
import torch
from lively import lively
from torch import nn
from torch.nn import functional as F

from sparsetrail.attacks import attack, pgd
from sparsetrail.core import Linf, Memory, Problem, Route, margin
from sparsetrail.core.problem import Guide
from sparsetrail.snn import kernels, routes
from sparsetrail.snn.encode import bit_plane, direct, phase, poisson
from sparsetrail.snn.engine import has_bf16
from sparsetrail.snn.net import NetSpec, victim
from sparsetrail.snn.neuron import Neuron, NeuronSpec, ruled
from sparsetrail.snn.resnet import FoldedNeuron
from sparsetrail.snn.routes import DEFAULTS, ENSEMBLE, NeuronRoute, neuron_route
from sparsetrail.snn.surrogate import SURROGATES, Surrogate

needs_kernels = pytest.mark.skipif(
    not kernels.available(), reason="no C compiler on this machine: the plain path serves"
)
RULES = [name for name in DEFAULTS if name not in SURROGATES]
MANY = [*RULES, "triangle:0.5", "own+reset", "pdsg+reset", "assg:0.41+reset", "atan:4+detach"]
LIF = NeuronSpec(kind="lif", threshold=0.5, detach_reset=False)
NETS = [
    {"arch": "sew_resnet18"},
    {"arch": "sew_resnet18", "connect": "iand", "stem": "cifar", "neuron": LIF},
    {"arch": "spiking_resnet18", "neuron": NeuronSpec(reset=None)},
]


def pictures(n=3, seed=0):
    return torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(seed)) / 255


def network(dtype=torch.float64, steps=4, n=3, **knobs):
    x = pictures(n)
    with kernels.plain():
        net = lively(NetSpec(width=0.125, steps=steps, **knobs), phase(steps=steps)(x)).to(dtype)
    return net, x.to(dtype), torch.arange(n)


def gradient(f, x, y):
    leaf = x.clone().requires_grad_()
    z = f(leaf)
    return z.detach(), torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), leaf)[0]


def close(a, b, tol=1e-10):
    assert a.shape == b.shape and (a - b).abs().max() <= tol * b.abs().max() and b.any()


def modes():
    return [contextlib.nullcontext, kernels.plain] if kernels.available() else [kernels.plain]


# ---- slopes and ways, against plain autograd and loops --------------------------------------------------------------


def by_steps(x, spec, route, leak=None, remembered=None):
    """Spikes [t n c h w] whose backward is the route's, step by step and image by image under autograd.

    `remembered` holds M and D of every image and is moved on.
    """
    name, a = route.name, route.setting
    out = []
    for i in range(x.shape[1]):
        gain = {"if": 1.0, "lif": 1 / spec.tau, "plif": leak}[spec.kind] if spec.decay_input else 1.0
        keep = 1.0 if spec.kind == "if" else 1 - (1 / spec.tau if leak is None else leak)
        current = [gain * now for now in x[:, i]]
        th = spec.threshold - spec.rest
        if name == "hart":
            current = list(mean_back(torch.stack(current)))
        u, spikes, seen = torch.zeros_like(current[0]), [], []
        for t, now in enumerate(current):
            u = keep * (u.detach() if name == "hart" else u) + now
            seen.append(u.detach())
            v = u - th
            s = (v >= 0).to(u.dtype)
            if name in ("hart", "pdsg") or name.startswith("assg"):
                if name == "hart":
                    slope = ((a - v.abs()).clamp(min=0) / a**2).detach()
                elif name == "pdsg":
                    so_far = torch.stack(seen)
                    var = ((so_far - so_far.mean((0, 2, 3), keepdim=True)) ** 2).mean((0, 2, 3))
                    sigma = torch.where(var == 0, 1.0, var.sqrt())[:, None, None]
                    slope = torch.distributions.Normal(sigma / 2, sigma).log_prob(v.detach()).exp()
                else:
                    size = v.detach().abs()
                    m, d = remembered.get((i, t), (torch.ones_like(size), torch.zeros_like(size)))
                    m = 0.9 * m + 0.1 * size
                    d = 0.9 * d + 0.1 * (size - m).abs()
                    remembered[i, t] = m, d
                    slope = adaptive(v.detach(), m + 1.5 * d + 1e-4, a, name)
                s = s + slope * (v - v.detach())
            spikes.append(s)
            s = s if route.in_graph or (route.in_graph is None and not spec.detach_reset) else s.detach()
            u = u - s * th if spec.reset is None else u * (1 - s)
        spikes = torch.stack(spikes)
        if name in ("rga", "bptr", "bptr2", "bptr3"):
            current, rate = torch.stack(current), spikes.detach().mean(0)
            mean = current.detach().mean(0)
            if name == "rga":
                slope = torch.zeros_like(mean)
                for at, value in enumerate(mean.flatten()):
                    bend = (1 - keep) * th
                    if bend <= value <= 2 * th:
                        slope.view(-1)[at] = (1 - a * th + a * th * keep) / ((keep + 1) * th)
                    elif 0 <= value < bend:
                        slope.view(-1)[at] = a
            elif name == "bptr3":
                ratios = [r / m for r, m in zip(rate.flatten(), mean.flatten(), strict=True) if m > 0]
                slope = (mean > 0) * (sum(ratios) / len(ratios))
            else:
                slope = (rate > 0).to(mean.dtype)
            spikes = spikes.detach() + slope * (current - current.detach())
        out.append(spikes)
    return torch.stack(out, 1)


def mean_back(current):
    held = current.detach()
    return held + (current - held).mean(0)


def adaptive(v, scale, a, name):
    shape, area = name.partition("-")[2] or "atan", 2 * a
    if shape == "atan":
        alpha = 2 / math.pi * math.tan(math.pi * a) / scale
        return alpha / (2 * (1 + (math.pi * alpha * v / 2) ** 2))
    if shape == "rectangle":
        alpha = area / scale
        return (v.abs() < 1 / alpha) * alpha / 2
    if shape == "triangle":
        alpha = (1 - math.sqrt(1 - area)) / scale
        return (alpha - alpha**2 * v.abs()).clamp(min=0)
    if shape == "sigmoid":
        alpha = math.log((1 + area) / (1 - area)) / scale
        return alpha / (4 * torch.cosh(alpha * v / 2) ** 2)
    alpha = math.sqrt(2) * torch.erfinv(torch.tensor(area, dtype=torch.float64)) / scale
    return torch.distributions.Normal(0.0, 1.0).log_prob(alpha * v).exp() * alpha


SPECS = [
    NeuronSpec(),
    NeuronSpec(reset=None, threshold=0.7, detach_reset=False),
    NeuronSpec(kind="lif", reset=-0.2, threshold=0.5, tau=1.7, detach_reset=False),
    NeuronSpec(kind="lif", decay_input=False, tau=2.5),
    NeuronSpec(kind="plif", threshold=0.5, tau=2.0, detach_reset=False),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.reset}")
@pytest.mark.parametrize("name", [*RULES, "pdsg+reset", "assg+reset", "assg+detach"])
def test_a_route_is_what_its_source_says(name, spec):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, 3, 2, generator=g, dtype=torch.float64) * 1.5 + 0.5
    x[:, 0, 1] = 0  # silent, and nothing varies
    last = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    push = torch.randn(x.shape, generator=g, dtype=x.dtype)
    route, layer = neuron_route(name), FoldedNeuron(spec, 5).double()
    leak = torch.sigmoid(layer.w).detach() if spec.kind == "plif" else None
    want, remembered = [], {}
    for call in range(2):  # the second goes on where the first stopped
        leaf = (x * (1 + 0.3 * call)).requires_grad_()
        s = by_steps(leaf, spec, route, leak, remembered)
        want.append((s.detach().flatten(0, 1), torch.autograd.grad((s * push).sum(), leaf)[0].flatten(0, 1)))
    for mode in modes():
        for order in ((last, last), (last.contiguous(), last)):  # in memory too
            memory = Memory()
            memory.begin(3)
            for call in range(2):
                leaf = (order[call] * (1 + 0.3 * call)).requires_grad_()
                with mode(), ruled(route.rule(memory)):
                    s = layer(leaf)
                    (found,) = torch.autograd.grad(s, leaf, push.flatten(0, 1))
                assert torch.equal(s, want[call][0]) and torch.equal(s, layer(leaf)) and 0 < s.mean() < 1
                close(found, want[call][1])


def test_the_deviation_of_potentials_that_hardly_vary():
    h = 1000 + 1e-6 * torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slopes = routes.pdsg(h, NeuronSpec(threshold=1000.0))
    assert slopes.isfinite().all() and slopes.max() > 1e5
    assert (slopes[:, 0] - routes.pdsg(h[:, :1], NeuronSpec(threshold=1000.0))[:, 0]).abs().max() <= 1e-9 * slopes.max()
    one = routes.pdsg(torch.full((3, 2, 4, 1, 1), 1.5), NeuronSpec())  # no deviation at all
    assert torch.allclose(one, torch.tensor(1 / math.sqrt(2 * math.pi)))
    for shape in ((3, 5), (3, 5, 7), (3, 5, 7, 2)):
        for slope in (routes.pdsg(torch.rand(shape), NeuronSpec()), routes.bptr3(torch.rand(shape), NeuronSpec())):
            assert slope.isfinite().all() and slope.shape[1] == 5


def test_a_silent_channel_is_counted_once():
    """A mean current of exactly 0 lies in one interval of RGA, and lone neurons [t] have routes too."""
    x = torch.zeros(3, 2, 1, 1, 1)
    assert torch.equal(routes.rga(x, NeuronSpec(), None, 0.2), torch.full((1, 2, 1, 1, 1), 0.5))
    assert torch.equal(routes.bptr3(x, NeuronSpec()), torch.zeros(1, 2, 1, 1, 1))
    leaf = torch.tensor([0.4, 0.9, 0.3]).requires_grad_()
    with ruled(neuron_route("rga").rule(None)):
        assert torch.autograd.grad(Neuron(NeuronSpec())(leaf).sum(), leaf)[0].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("shape", ["atan", "rectangle", "triangle", "sigmoid", "gaussian"])
def test_the_bound_of_adaptive_sharpness(shape):
    """At sharpness omega, the share A = 2a of a surrogate's integral lies within |u| <= 1."""
    slope, omega = routes._SHAPES[shape]
    for a in (0.35, 0.43, 0.49):
        u = torch.linspace(-400, 400, 8_000_001, dtype=torch.float64)
        h = slope(u, torch.tensor(omega(a), dtype=torch.float64)) * (u[1] - u[0])
        assert h[u.abs() <= 1].sum().item() == pytest.approx(2 * a, abs=2e-4)
        assert h.sum().item() == pytest.approx(1, abs=1e-2 if shape == "atan" else 2e-4)


# ---- whole networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", NETS, ids=["sew", "iand-lif", "spiking-soft"])
def test_scores_stay_to_the_bit(knobs):
    net, x, y = network(torch.float32, **knobs)
    encode = phase(steps=4)
    own = victim(net, encode)
    assert own.by(Route()) is own
    for mode in modes():
        with mode():
            (z, g), code = gradient(own.scores, x, y), own.logits(encode(x))
            for name in MANY:
                other = own.by(Route(neuron=name))
                now, found = gradient(other.scores, x, y)
                assert torch.equal(now, z) and torch.equal(other.logits(encode(x)), code), name
                same = name == "own+reset" and not net.sn1.spec.detach_reset
                assert found.isfinite().all() and found.any() and torch.equal(found, g) == same, name


@needs_kernels
@pytest.mark.parametrize("knobs", NETS, ids=["sew", "iand-lif", "spiking-soft"])
def test_kernels_and_plain_operations_give_the_same_gradient(knobs):
    net, x, y = network(**knobs)
    for encode, names in (
        (phase(steps=4), ("rga", "bptr", "bptr3", "hart", "pdsg", "assg", "own+reset", "pdsg+reset")),
        (phase(steps=4, bits=2), ("hart", "rga", "assg")),  # frames shown again
        (direct(steps=4), ("hart", "pdsg")),
    ):
        for name in names:
            found = []
            for mode in modes():
                other = victim(net, encode).by(Route(neuron=name))
                with mode():
                    grads = [gradient(other.scores, x, y)[1] for _ in range(2)]
                    grads.append(gradient(other.logits, encode(x), y)[1])
                found.append(grads)
            for fast, slow in zip(*found, strict=True):
                close(fast, slow, 1e-9)


def test_a_whole_network_by_steps():
    """Every layer's backward put together: a network whose neurons are the per-step ones of this file."""

    class ByHand(Neuron):
        def __init__(self, spec, steps, route, remembered):
            super().__init__(spec)
            self.steps, self.route, self.remembered = steps, route, remembered

        def forward(self, x):
            return by_steps(x.unflatten(0, (self.steps, -1)), self.spec, self.route, None, self.remembered).flatten(
                0, 1
            )

    for knobs in (NETS[0], NETS[2]):
        net, x, y = network(steps=3, n=2, **knobs)
        u = phase(steps=3)(x)
        for name in ("rga", "bptr2", "hart", "pdsg", "assg", "own+reset"):
            route = neuron_route(name)
            if name == "own+reset":
                slow = copy.deepcopy(net)
                for m in slow.modules():
                    if isinstance(m, FoldedNeuron):
                        m.spec = NeuronSpec(**(m.spec.__dict__ | {"detach_reset": False}))
            else:
                slow = by_hand(copy.deepcopy(net), ByHand, route)
            other = victim(net, phase(steps=3)).by(Route(neuron=name))
            for _ in range(2):
                with kernels.plain():
                    z, want = gradient(slow, u, y)
                now, found = gradient(other.logits, u, y)
                close(now, z, 1e-9)
                close(found, want, 1e-8)


def by_hand(net, make, route):
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FoldedNeuron):
                setattr(parent, name, make(child.spec, child.steps, route, {}))
    return net


def test_surrogates_are_the_network_built_with_them():
    for detach in (True, False):
        net, x, y = network(torch.float32, neuron=NeuronSpec(detach_reset=not detach))
        for text, surrogate in (("triangle:0.5", Surrogate("triangle", 0.5)), ("own", Surrogate())):
            twin, _, _ = network(torch.float32, neuron=NeuronSpec(detach_reset=detach, surrogate=surrogate))
            other = victim(net, phase(steps=4)).by(Route(neuron=f"{text}+{'detach' if detach else 'reset'}"))
            want = victim(twin, phase(steps=4))
            assert other.route == want.route
            assert torch.equal(gradient(other.scores, x, y)[1], gradient(want.scores, x, y)[1])


@pytest.mark.parametrize("knobs", NETS, ids=["sew", "iand-lif", "spiking-soft"])
def test_every_image_is_alone(knobs):
    net, x, y = network(**knobs)
    for name in (*RULES, "own+reset"):
        together = gradient(victim(net, phase(steps=4)).by(Route(neuron=name)).scores, x, y)[1]
        for i in range(3):
            alone = gradient(victim(net, phase(steps=4)).by(Route(neuron=name)).scores, x[i : i + 1], y[i : i + 1])[1]
            close(alone[0], together[i], 1e-9)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_some_images_go_on_as_in_the_whole_batch():
    net, x, y = network(n=4)
    whole, some = (victim(net, phase(steps=4)).by(Route(neuron="assg")) for _ in range(2))
    for v in (whole, some):
        v.memory.begin(4)
        gradient(v.scores, x, y)
    moved = (x + 0.1).clamp(max=1)
    for rows in (torch.tensor([0, 2, 3]), torch.tensor([2])):
        _, want = gradient(whole.scores, moved, y)
        some.memory.see(rows)
        _, found = gradient(some.scores, moved[rows], y[rows])
        close(found, want[rows], 1e-9)


def test_copies_use_what_the_first_one_left():
    """Two noise samples of each image in one pass, or in two, are the same two gradients."""
    net, x, y = network()
    noisy = torch.cat([x, (x + 0.2).clamp(max=1)])
    at_once, apart = (victim(net, phase(steps=4)).by(Route(neuron="assg")) for _ in range(2))
    for v in (at_once, apart):
        v.memory.begin(3)
    for _ in range(2):
        at_once.memory.see(None, 2)
        _, both = gradient(at_once.scores, noisy, y.repeat(2))
        for k in range(2):
            apart.memory.see(None, 1, keep=k == 0)
            close(gradient(apart.scores, noisy[3 * k : 3 * k + 3], y)[1], both[3 * k : 3 * k + 3], 1e-9)


def test_memory_is_fresh_and_only_where_it_is_needed():
    net, x, y = network(torch.float32)
    own = victim(net, phase(steps=4))
    assert own.memory is None and own.by(Route(neuron="pdsg")).memory is None
    first, again = own.by(Route(neuron="assg")), own.by(Route(neuron="assg"))
    assert first.memory is not again.memory
    one, two = gradient(first.scores, x, y)[1], gradient(first.scores, x, y)[1]
    assert not torch.equal(one, two) and torch.equal(gradient(again.scores, x, y)[1], one)
    held = {k: v.clone() for k, v in first.memory.held.items()}
    with torch.no_grad():  # scores alone teach nothing
        first.scores(x)
    assert len(held) == 2 * sum(isinstance(m, Neuron) for m in net.modules())
    assert all(torch.equal(first.memory.held[k], v) for k, v in held.items())
    with pytest.raises(ValueError, match=r"assg: expected the images it remembers .*memory.begin\(count\)"):
        gradient(first.scores, x[..., :16, :16], y)
    first.memory.begin(2)
    assert torch.equal(gradient(first.scores, x[:2], y[:2])[1], one[:2])


def test_a_problem_with_a_route():
    """Dropped images, noise samples and the ledger, all with a guide that remembers."""
    net, x, y = network(torch.float32)
    own = victim(net, phase(steps=4))
    ball = Linf(8 / 255, space="pixel")
    for name in ("assg", "hart"):
        other = own.by(Route(neuron=name))
        problem = Problem(
            own.scores, x, own.scores(x).argmax(1), ball, drop=True, eot=2, guides=[Guide.of(other, ball, own=True)]
        )
        u = x
        for _ in range(3):
            u = problem.project(u + 2 / 255 * problem.grad(u).sign())
        assert problem.backwards > 0 and not problem.nonfinite.any() and not problem.dead.any()


# ---- nothing is left behind ------------------------------------------------------------------------------------------


def traces(net):
    return {n: {k: v for k, v in m.__dict__.items() if not k.startswith("_")} for n, m in net.named_modules()}, {
        n: [len(getattr(m, k)) for k in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        for n, m in net.named_modules()
    }


def test_nothing_is_left_on_the_network():
    net, x, y = network(torch.float32)
    before, state, own = traces(net), copy.deepcopy(net.state_dict()), victim(net, phase(steps=4))
    g = gradient(own.scores, x, y)[1]
    for route in (*(Route(neuron=n) for n in MANY), Route(steps=6, neuron="pdsg"), Route(encoder="secant")):
        other = own.by(route)
        gradient(other.scores, x, y)
        with pytest.raises((RuntimeError, ValueError)):
            other.logits(torch.zeros(other.steps, 2, 5, 32, 32))  # five channels
        assert traces(net) == before and torch.equal(gradient(own.scores, x, y)[1], g)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_networks_that_are_watched_or_foreign():
    """Hooks are called, also while steps are stretched; a module of somebody else's may hold our neurons."""
    net, x, y = network()
    own = victim(net, phase(steps=4))
    want = {r: gradient(own.by(r).scores, x, y) for r in (Route(neuron="hart"), Route(neuron="pdsg", steps=5))}
    seen = []
    handle = net.layer2.register_forward_hook(lambda *_: seen.append(1))
    for route, (z, g) in want.items():
        now, found = gradient(own.by(route).scores, x, y)
        close(now, z, 1e-9)
        close(found, g, 1e-8)
    handle.remove()
    assert len(seen) == 2

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.rest = [net]  # where no tree of modules shows it
            self.last = net.sn1
            self.fc = net.fc

        def forward(self, u):
            return self.rest[0](u)

    other = victim(Mine().eval(), phase(steps=4)).by(Route(neuron="hart"))
    close(gradient(other.scores, x, y)[1], want[Route(neuron="hart")][1], 1e-8)
    with pytest.raises(ValueError, match="to run for 5 steps, found others"):
        other.by(Route(steps=5))


def test_first_derivatives_only_and_many_at_once():
    net, x, y = network(steps=3, n=1)
    for name in ("hart", "pdsg", "rga"):
        f = victim(net, phase(steps=3)).by(Route(neuron=name))
        leaf = phase(steps=3)(x).requires_grad_()
        z = f.logits(leaf)
        eye = torch.eye(10).double()[:, None]
        (together,) = torch.autograd.grad(z, leaf, eye, is_grads_batched=True, retain_graph=True)
        for i in range(0, 10, 3):
            close(together[i], torch.autograd.grad(z[0, i], leaf, retain_graph=True)[0])
        (g,) = torch.autograd.grad(z[0, 0], leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            torch.autograd.grad(g.square().sum(), leaf)


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_weights_that_want_gradients(statistics):
    """A network called by itself under a rule, also one that keeps no running statistics."""
    net, x, y = network()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d) and statistics == "batch":
            m.track_running_stats, m.running_mean, m.running_var = False, None, None
    for name in ("hart", "pdsg", "rga"):
        found = []
        for mode in modes():
            with mode(), ruled(neuron_route(name).rule(None)):
                leaf = phase(steps=4)(x).requires_grad_()
                z = net(leaf)
            found.append(torch.autograd.grad(F.cross_entropy(z, y), [leaf, *net.parameters()]))
        for a, b in zip(found[0], found[-1], strict=True):
            close(a, b, 1e-8)


# ---- encoder and steps -----------------------------------------------------------------------------------------------


def test_another_backward_of_the_encoder():
    net, x, y = network(torch.float32)
    own = victim(net, phase(steps=4))
    other = own.by(Route(encoder="secant"))
    z, found = gradient(other.scores, x, y)
    assert torch.equal(z, own.scores(x)) and other.encoding == "phase encoder: secant" and other.route == own.route
    assert torch.equal(found, gradient(victim(net, phase(steps=4, backward="secant")).scores, x, y)[1])
    assert torch.equal(other.codebook, phase(steps=4).codebook) and own.codebook is not None
    both = own.by(Route(neuron="hart")).by(Route(encoder="secant"))  # what a route leaves alone stays
    assert torch.equal(
        gradient(both.scores, x, y)[1], gradient(own.by(Route(neuron="hart", encoder="secant")).scores, x, y)[1]
    )
    assert both.path("pixel") == "HART(0.5); phase encoder: secant"
    draws = torch.Generator().manual_seed(0)
    noisy = victim(net, poisson(steps=4, generator=draws))
    assert noisy.by(Route(neuron="hart", encoder="identity")).encode is noisy.encode and noisy.codebook is None
    assert victim(net, direct(steps=4)).codebook is None
    with pytest.raises(ValueError, match=r"encoder phase: backward expected one of .*secant.*, got 'slope'"):
        own.by(Route(encoder="slope"))


@pytest.mark.parametrize("knobs", [*NETS, {"arch": "sew_resnet50", "neuron": NeuronSpec(kind="plif")}])
def test_other_steps(knobs):
    net, x, y = network(**knobs)
    for make in (phase, direct):
        own = victim(net, make(steps=4))
        for steps in (2, 6):
            other = own.by(Route(steps=steps))
            twin, _, _ = network(steps=steps, **knobs)
            twin.load_state_dict(net.state_dict())
            want = victim(twin, make(steps=steps))
            for a, b in zip(gradient(other.scores, x, y), gradient(want.scores, x, y), strict=True):
                assert torch.equal(a, b)
            assert other.steps == steps and other.route == f"{own.route}, T={steps}"
            assert other.encode(x).shape[0] == steps and torch.equal(other.logits(other.encode(x)), want.scores(x))
            assert own.by(Route(steps=steps, neuron="rga")).route == f"RGA(0.2), T={steps}"
    assert own.by(Route(steps=4)).route == own.route
    with pytest.raises(ValueError, match="encoder bit_plane: its number of steps is 4 and cannot be changed"):
        victim(net, bit_plane(bits=4)).by(Route(steps=5))


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no AVX-512 BF16, or no C compiler was found")
def test_bf16_products():
    net, x, y = network(torch.float32)
    own = victim(net, phase(steps=4))
    half = victim(net, phase(steps=4), precision="bf16")
    for name in ("hart", "pdsg", "triangle:1"):
        z, want = gradient(own.by(Route(neuron=name)).scores, x, y)
        now, found = gradient(half.by(Route(neuron=name)).scores, x, y)
        assert torch.equal(now, z) and not torch.equal(found, want)
        assert F.cosine_similarity(found.flatten(), want.flatten(), 0) > 0.99
        assert half.by(Route(neuron=name)).route.endswith(", input gradients in bf16")


def test_exact_networks():
    net, x, y = network(exact=True)
    fast, _, _ = network()
    net.load_state_dict(fast.state_dict())
    for name in ("hart", "assg", "bptr3", "triangle:1+reset"):
        a, b = (gradient(victim(n, phase(steps=4)).by(Route(neuron=name)).scores, x, y)[1] for n in (net, fast))
        close(a, b, 1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_gpu():
    net, x, y = network()
    want = {n: gradient(victim(net, phase(steps=4)).by(Route(neuron=n)).scores, x, y)[1] for n in MANY}
    net, x, y = net.cuda(), x.cuda(), y.cuda()
    own = victim(net, phase(steps=4))
    for name, g in want.items():
        other = own.by(Route(neuron=name))
        z, found = gradient(other.scores, x, y)
        assert torch.allclose(z, own.scores(x)), name
        close(found.cpu(), g, 1e-8)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_words():
    net, _, _ = network(torch.float32)
    own = victim(net, phase(steps=4))
    for name, words in {
        "own": "BPTT atan(2), hard reset detached",
        "own+reset": "BPTT atan(2), hard reset in the graph",
        "triangle:1": "BPTT triangle(1), hard reset detached",
        "sigmoid": "BPTT sigmoid(4), hard reset detached",
        "rga": "RGA(0.2)",
        "rga:0.1": "RGA(0.1)",
        "bptr": "BPTR2",
        "bptr3": "BPTR3",
        "hart:0.35": "HART(0.35)",
        "pdsg": "PDSG, hard reset detached",
        "assg": "ASSG(0.43, atan), hard reset detached",
        "assg-rectangle:0.41+reset": "ASSG(0.41, rectangle), hard reset in the graph",
    }.items():
        assert own.by(Route(neuron=name)).route == words
    plain = victim(nn.Sequential(nn.Flatten()), phase(steps=4), classes=3)
    assert plain.by(Route(encoder="secant")).encoding == "phase encoder: secant"


CBA = Route(neuron="cba")


@pytest.mark.parametrize(
    "spec",
    [
        NeuronSpec(threshold=0.5),
        NeuronSpec(kind="lif", threshold=0.7, reset=-0.1),
        NeuronSpec(kind="diet", reset=None, threshold=0.625, leak=0.9),
    ],
    ids=lambda s: s.kind,
)
def test_cba_is_the_network_of_relus_of_current_over_threshold(spec):
    class Over(Neuron):
        def __init__(self, _spec, steps, *_):
            super().__init__(NeuronSpec(kind="relu"))
            self.steps = steps

        def forward(self, x):
            return (x / (spec.threshold - (spec.reset or 0.0))).relu()

    for arch in ("sew_resnet18", "vgg5", "spiking_resnet18"):
        net, x, y = network(arch=arch, neuron=spec, n=2)
        before, own = copy.deepcopy(net.state_dict()), victim(net, phase(steps=4))
        twin, u = by_hand(copy.deepcopy(net), Over, None), phase(steps=4)(x)
        for f, g, at in ((own.by(CBA).logits, twin, u), (own.by(CBA).scores, victim(twin, phase(steps=4)).scores, x)):
            (z, found), (want, right) = gradient(f, at, y), gradient(g, at, y)
            close(z, want)
            close(found, right, 1e-8)
            assert not torch.allclose(z, own.scores(x))
        assert own.by(CBA).route == "CBA"
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
        assert torch.equal(own.logits(u), victim(net, phase(steps=4)).logits(u))


def test_an_attack_by_cba_is_judged_and_kept_by_the_networks_own_scores():
    net, x, _ = network(torch.float32, n=4)
    own, seen = victim(net, phase(steps=4)), []
    y = own.scores(x).argmax(1)

    def look(p, g):
        m = p.loss(p.u0)
        p.grad(p.u0)
        seen.append(torch.equal(p.best_margin, m))

    ball = Linf(8 / 255, space="pixel")
    run = attack(look, own, ball, x, y, route=CBA)
    assert seen == [True] and run.route.startswith("CBA") and run.robust == (True,) * 4
    assert (attack(pgd, own, ball, x, y, route=CBA, keep=True).adversarial - x).abs().max() > 0.02
    with pytest.raises(ValueError, match="victim's own forward first"):
        attack(pgd, own, ball, x, y, route=(CBA, Route()))
    assert attack(pgd, own, ball, x, y, route=(Route(), CBA)).backwards > 0


def test_scores_of_a_stand_in_are_never_taken_for_the_victims():
    net, x, _ = network(torch.float32, n=4)
    own = victim(net, phase(steps=4))
    longer = own.by(Route(steps=6))
    assert longer.stand_in and own.by(CBA).stand_in and not own.stand_in and not own.by(Route(neuron="rga")).stand_in

    def margins_kept(of, route):
        """Are the margins an attack keeps those of the victim it is played on? And the calls it took."""
        y, seen = of.scores(x).argmax(1), []

        def look(p, g):
            p.grad(p.u0)
            seen.append(torch.equal(p.best_margin, margin(of.scores(x), y)))

        run = attack(look, of, Linf(8 / 255, space="pixel"), x, y, route=route)
        return seen == [True], run.robust == (True,) * 4

    # one played on itself gives its own scores; back at four steps, others
    for of, route in (
        (own, Route(steps=6)),
        (longer, Route()),
        (longer, Route(steps=4)),
        (longer, Route(neuron="rga")),
    ):
        assert margins_kept(of, route) == (True, True), (of.route, route)
    foreign = replace(
        own, rewire=lambda route: replace(own, logits=lambda u: -own.logits(u), shortcut=None, stand_in=True)
    )
    assert margins_kept(foreign, Route(neuron="rga")) == (True, True)
    lying = replace(foreign, rewire=lambda route: replace(foreign.rewire(route), stand_in=False))
    assert margins_kept(lying, Route(neuron="rga"))[0] is False  # nothing but the field tells


def test_cba_where_it_cannot_be():
    for pool in ("sum", "stochastic"):
        net, *_ = network(pool=pool, n=2)
        with pytest.raises(ValueError, match="needs spikes"):
            victim(net, phase(steps=4)).by(CBA)
    for text in ("cba:2", "cba+reset"):
        with pytest.raises(ValueError, match="cba"):
            neuron_route(text)


def test_the_ensemble():
    assert len(ENSEMBLE) == len(set(ENSEMBLE)) == 19
    found = [neuron_route(name) for name in ENSEMBLE]
    assert [f.name for f in found if f.name not in SURROGATES] == ["bptr", "cba"]
    assert set(SURROGATES) <= set(DEFAULTS)
    x = torch.tensor(0.5, dtype=torch.float64)
    values = {f"{f.name}:{f.setting:g}": Surrogate(f.name, f.setting)(x).item() for f in found if f.name in SURROGATES}
    assert values["triangle:0.25"] == 0 and values["triangle:2"] == 1.5 / 4
    assert values["damped_exponential:2"] == pytest.approx(0.3 * math.exp(-1))
    assert values["unit_exponential:0.5"] == pytest.approx(math.exp(-0.25))
    assert values["rectangle:1"] == 0 and values["rectangle:4"] == 0.25 and values["straight_through:1"] == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stbp", r"neuron route: expected own, a surrogate \(atan, .*\) or one of rga, .*assg-gaussian.*, got 'stbp'"),
        ("", "neuron route: expected own"),
        ("atan:2+rest", r"\+reset or \+detach as in 'atan:4\+reset', got 'atan:2\+rest'"),
        ("assg-fast_sigmoid", "neuron route: expected own"),
        ("bptr:2", "neuron route: bptr has no setting, got 'bptr:2'; leave ':2' out"),
        ("own:2", "neuron route: own has no setting"),
        ("pdsg:1", "neuron route: pdsg has no setting"),
        ("hart:wide", "neuron route: expected a number behind 'hart:', got 'hart:wide'"),
        ("rga+reset", r"neuron route: rga does not go through the reset, got 'rga\+reset'; leave '\+reset' out"),
        ("assg:0.5", "expected a = A/2 between 0 and 0.5"),
        ("assg-sigmoid:0", "expected a = A/2 between 0 and 0.5"),
        ("hart:0", "neuron route hart: expected a half width above 0"),
        ("hart:inf", "neuron route hart: expected a half width above 0"),
        ("rga:2", r"neuron route rga: expected a slope gamma in 0..1 \(the source: 0.2\), got 2"),
        ("atan:-1", "surrogate width: expected a positive number, got -1"),
        ("atan:nan", "surrogate width: expected a positive number, got nan"),
    ],
)
def test_refusals(name, words):
    with pytest.raises(ValueError, match=words):
        neuron_route(name)


def test_what_cannot_be_rewired():
    plain = victim(nn.Sequential(nn.Flatten()), phase(steps=4), classes=3, name="relu")
    with pytest.raises(
        ValueError, match="relu: expected a network of our neurons for the route hart, found none in it"
    ):
        plain.by(Route(neuron="hart"))
    assert NeuronRoute("own").surrogate
