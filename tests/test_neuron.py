"""Neurons: `fused` against `reference`, both against derivatives worked out by hand, and what holds of both."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.autograd import forward_ad

from sparsetrail.snn import kernels, neuron
from sparsetrail.snn.neuron import Neuron, NeuronSpec, fused, reference
from sparsetrail.snn.surrogate import SURROGATES, Surrogate

BOTH = (reference, fused)
KINDS = [("if", True), ("lif", True), ("lif", False), ("plif", True), ("plif", False)]
RESETS = (0.0, -0.4, 0.3, None)
SPECS = [
    NeuronSpec(kind=k, decay_input=d, reset=r, detach_reset=detach, threshold=th, tau=1.7)
    for (k, d), r, detach, th in itertools.product(KINDS, RESETS, (True, False), (1.0, 0.7))
]
SMOOTH = Surrogate("sigmoid", 1.5)


@pytest.fixture(autouse=True)
def plain_steps():
    """The steps themselves: a kernel for each of these many neurons would take minutes; test_engine compares those."""
    with kernels.plain():
        yield


def label(spec):
    path = "detached" if spec.detach_reset else "in-graph"
    return f"{spec.kind}-{'decayed' if spec.decay_input else 'whole'}-{spec.reset}-{path}-{spec.threshold}"


def draw(*shape, seed=0, dtype=torch.float64, mean=0.4, std=0.9):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * std + mean).to(dtype)


def current(spec, *shape, seed=0, dtype=torch.float64):
    """Input that makes the neuron spike now and then, stronger where the charge takes only a part of it."""
    decayed = spec.decay_input and spec.kind != "if"
    return draw(*shape, seed=seed, dtype=dtype, mean=1.1 if decayed else 0.4, std=2.4 if decayed else 0.9)


def leak_of(spec, dtype=torch.float64):
    return torch.tensor(0.37, dtype=dtype, requires_grad=True) if spec.kind == "plif" else None


def gap(a, b):
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def backward(run, x, spec, w, leak=None):
    x = x.clone().requires_grad_()
    s = run(x, spec, leak)
    return s.detach(), *torch.autograd.grad((s * w).sum(), [x] if leak is None else [x, leak])


@pytest.mark.parametrize("spec", SPECS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fused_equals_reference(spec, dtype):
    for name, steps in itertools.product(SURROGATES, (1, 2, 7)):
        one = NeuronSpec(**(spec.__dict__ | {"surrogate": Surrogate(name, 1.3)}))
        x, w = current(spec, steps, 40, dtype=dtype, seed=steps), draw(steps, 40, dtype=dtype, seed=9, mean=0)
        slow, fast = (backward(run, x, one, w, leak_of(one, dtype)) for run in BOTH)
        assert torch.equal(slow[0], fast[0]) and 0 < slow[0].mean() < 1
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        assert gap(fast[1], slow[1]) < tolerance, (name, steps)
        if spec.kind == "plif":  # one number summed over neurons, where signs cancel: relative to the sum of magnitudes
            apart = backward(reference, x, one, w, torch.full((40,), 0.37, dtype=dtype, requires_grad=True))[2]
            assert (fast[2] - slow[2]).abs() <= tolerance * apart.abs().sum(), (name, steps)


specs = st.builds(
    lambda kind, threshold, below, detach, tau, name, width: NeuronSpec(
        kind=kind[0],
        decay_input=kind[1],
        threshold=threshold,
        reset=None if below is None else threshold - below,
        detach_reset=detach,
        tau=tau,
        surrogate=Surrogate(name, width),
    ),
    kind=st.sampled_from(KINDS),
    threshold=st.floats(0.05, 5),
    below=st.none() | st.floats(0.01, 5),
    detach=st.booleans(),
    tau=st.floats(1.01, 50),
    name=st.sampled_from(sorted(SURROGATES)),
    width=st.floats(0.2, 8),
)


@given(spec=specs, steps=st.integers(1, 12), seed=st.integers(0, 2**31), scale=st.floats(0.1, 10), grid=st.booleans())
def test_fused_equals_reference_anywhere(spec, steps, seed, scale, grid):
    x = draw(steps, 3, 5, seed=seed, std=scale)
    if grid:  # ties with the threshold
        x = (x / spec.threshold * 2).round() * spec.threshold / 2
    w = draw(steps, 3, 5, seed=seed + 1)
    slow, fast = (backward(run, x, spec, w, leak_of(spec)) for run in BOTH)
    assert torch.equal(slow[0], fast[0])
    for a, b in zip(fast[1:], slow[1:], strict=True):
        assert gap(a, b) < 1e-9
    assert torch.equal(reference(x.float(), spec, leak_of(spec)), fused(x.float(), spec, leak_of(spec)))


def by_hand(x, spec, leak):
    """Spikes of one neuron and their derivatives by every input and by the leak, forward in time, in numpy.

    Independent of autograd: sensitivities of the potential are carried along with the potential itself.
    """
    n, r, th = len(x), spec.rest, spec.threshold
    share = {"if": 0.0, "lif": 1 / spec.tau, "plif": leak}[spec.kind]
    gain = share if spec.decay_input and spec.kind != "if" else 1.0
    v, dv = r, np.zeros(n + 1)  # the last column is the derivative by the leak
    spikes, table = np.zeros(n), np.zeros((n, n + 1))
    for t in range(n):
        h, dh = v - share * (v - r) + gain * x[t], (1 - share) * dv
        if spec.kind == "if":
            h = v + x[t]
        elif spec.decay_input:
            h = v + share * (x[t] - v + r)
        dh[t] += gain
        dh[n] += ((x[t] if spec.decay_input else 0.0) - (v - r)) if spec.kind == "plif" else 0.0
        s = float(h >= th)
        ds = dh * spec.surrogate(torch.tensor(h - th, dtype=torch.float64)).item()
        through = 0.0 if spec.detach_reset else ds
        if spec.reset is None:
            v, dv = h - s * th, dh - th * through
        else:
            v, dv = s * r + (1 - s) * h, (1 - s) * dh + (r - h) * through
        spikes[t], table[t] = s, ds
    return spikes, table


@pytest.mark.parametrize("spec", SPECS, ids=label)
@pytest.mark.parametrize("run", BOTH)
def test_derivatives_by_hand(run, spec):
    x, leak = current(spec, 8, seed=3), leak_of(spec)
    spikes, table = by_hand(x.numpy(), spec, 0.37)
    assert torch.equal(run(x, spec, leak), torch.from_numpy(spikes)) and 0 < spikes.sum() < 8
    jac = torch.func.jacrev(lambda a: run(a, spec, leak))(x)
    assert gap(jac.detach(), torch.from_numpy(table[:, :8])) < 1e-13
    assert torch.equal(jac.triu(1), torch.zeros_like(jac))  # no spike depends on a later input
    if leak is not None:
        by_leak = torch.func.jacrev(lambda q: run(x, spec, q))(leak)
        assert gap(by_leak.detach(), torch.from_numpy(table[:, 8])) < 1e-12


@pytest.mark.parametrize("spec", [s for s in SPECS if s.threshold == 1 and not s.detach_reset], ids=label)
def test_recurrence_with_a_smooth_step(spec, monkeypatch):
    """With the sigmoid in the step's place the recurrence is smooth, and finite differences can judge it."""
    monkeypatch.setattr(neuron, "heaviside", lambda x, surrogate: torch.sigmoid(surrogate.width * x))
    soft = NeuronSpec(**(spec.__dict__ | {"surrogate": SMOOTH}))
    x, leak = draw(5, 2, seed=4).requires_grad_(), leak_of(soft)
    inputs = (x,) if leak is None else (x, leak)
    assert torch.autograd.gradcheck(lambda *a: reference(a[0], soft, *a[1:]), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: reference(a[0], soft, *a[1:]), inputs)


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_double_backward(spec):
    x0, w, q = current(spec, 6, 30, seed=1), draw(6, 30, seed=2, mean=0), draw(6, 30, seed=3, mean=0)
    found = []
    for run in BOTH:
        x, w1, leak = x0.clone().requires_grad_(), w.clone().requires_grad_(), leak_of(spec)
        inputs = [x] if leak is None else [x, leak]
        first = torch.autograd.grad((run(x, spec, leak) * w1).sum(), inputs, create_graph=True)
        pushed = (first[0] * q).sum() + sum((g**2).sum() for g in first[1:])
        found.append([*first, *torch.autograd.grad(pushed, [*inputs, w1])])
    for a, b in zip(*found, strict=True):
        assert gap(a, b) < 1e-12 and b.abs().max() > 0


@pytest.mark.parametrize("spec", SPECS[::2], ids=label)
@pytest.mark.parametrize("run", BOTH)
def test_function_transforms(run, spec):
    x, d, leak = current(spec, 5, 3, 4, seed=5), draw(5, 3, 4, seed=6), leak_of(spec)
    if leak is not None:
        leak = leak.detach()

    def loss(a, q=leak):
        return (run(a, spec, q) * d[:, : a.shape[1]]).sum()

    # per sample: vmap over the images equals one gradient after the other
    each = torch.func.vmap(torch.func.grad(lambda a: run(a, spec, leak).square().sum()), in_dims=1, out_dims=1)(x)
    whole = torch.func.grad(lambda a: run(a, spec, leak).square().sum())(x)
    assert gap(each, whole) < 1e-14
    # forward mode equals the transpose of reverse mode
    spikes, tangent = torch.func.jvp(lambda a: run(a, spec, leak), (x,), (d,))
    jac = torch.func.jacrev(lambda a: run(a, spec, leak))(x).flatten(3)
    assert torch.equal(spikes, run(x, spec, leak))
    assert gap(tangent, jac @ d.flatten()) < 1e-13
    assert gap(torch.func.jacfwd(lambda a: run(a, spec, leak))(x).flatten(3), jac) < 1e-13
    # Hessian times vector: forward over reverse, in two ways, equals reverse over reverse
    twice = torch.func.vjp(torch.func.grad(loss), x)[1](d)[0]
    assert gap(torch.func.jvp(torch.func.grad(loss), (x,), (d,))[1], twice) < 1e-12
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), d)
        assert gap(forward_ad.unpack_dual(torch.autograd.grad(loss(dual), dual)[0]).tangent, twice) < 1e-12
    if leak is not None:
        q, back = torch.ones_like(leak), torch.func.grad(loss, argnums=1)(x, leak)
        assert gap(torch.func.jvp(lambda u: loss(x, u), (leak,), (q,))[1], back) < 1e-12
        both = torch.func.jvp(loss, (x, leak), (d, q))[1]
        assert gap(both, (torch.func.grad(loss)(x) * d).sum() + back) < 1e-12
        shares = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
        many = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(x, shares)
        assert gap(many, torch.stack([torch.func.grad(loss, argnums=1)(x, u) for u in shares])) < 1e-12


@pytest.mark.parametrize("run", BOTH)
@pytest.mark.parametrize("kind", ["if", "lif"])
def test_bfloat16_keeps_a_float32_state(run, kind):
    spec = NeuronSpec(kind=kind, detach_reset=False)
    x = draw(10, 4000, std=0.5, mean=0.2).bfloat16()
    w = draw(10, 4000, seed=1).bfloat16()
    s, g = backward(run, x, spec, w)
    wide, g_wide = backward(run, x.float(), spec, w.float())
    assert s.dtype == g.dtype == torch.bfloat16
    assert torch.equal(s.float(), wide) and torch.equal(g, g_wide.bfloat16())
    v, narrow = torch.zeros(4000, dtype=torch.bfloat16), []
    for now in x:
        h = neuron.charge(now, v, spec, None)
        narrow.append((h >= 1).to(h.dtype))
        v = neuron.discharge(h, narrow[-1], spec)
    assert not torch.equal(torch.stack(narrow), s)  # a bfloat16 state would have been seen


@pytest.mark.parametrize("run", BOTH)
@pytest.mark.parametrize("spec", SPECS[::5], ids=label)
def test_no_state_and_no_neighbours(run, spec):
    x = current(spec, 6, 8, 3, seed=7, dtype=torch.float32)
    leak = leak_of(spec, torch.float32)
    first = run(x, spec, leak)
    run(draw(6, 8, 3, seed=8, dtype=torch.float32) * 10, spec, leak)
    assert torch.equal(run(x, spec, leak), first)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(x[:, order], spec, leak), first[:, order])
    assert torch.equal(run(x[:3], spec, leak), first[:3])  # the past does not know the future
    assert torch.equal(run(x.transpose(1, 2), spec, leak), first.transpose(1, 2))


@pytest.mark.parametrize("run", BOTH)
def test_a_tie_spikes(run):
    for th in (1.0, 0.1, 0.3, 0.7, 2.5):
        x = torch.tensor([[th], [0.0], [th], [math.nextafter(th, 0) - 1e-6]])
        assert run(x, NeuronSpec(threshold=th)).flatten().tolist() == [1, 0, 1, 0]
        # half the current, doubled by tau=2: a tie again
        assert run(2 * x, NeuronSpec(kind="lif", threshold=th)).flatten().tolist() == [1, 0, 1, 0]
        # soft reset of a tie leaves exactly nothing
        twice = torch.tensor([[th], [th], [0.0]])
        assert run(twice, NeuronSpec(threshold=th, reset=None)).flatten().tolist() == [1, 1, 0]
    quarters = torch.full((8, 1), 0.25)
    assert run(quarters, NeuronSpec()).flatten().tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert run(quarters, NeuronSpec(reset=-0.25)).flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert run(quarters * 5, NeuronSpec(reset=None)).flatten().tolist() == [1] * 8


@pytest.mark.parametrize("spec", SPECS[::7], ids=label)
def test_fused_keeps_one_tensor(spec):
    """Held for the backward: h and nothing else (PLIF: also its input and 1/tau), never more than the reference."""
    held = {}
    for run in BOTH:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            run(draw(10, 50).requires_grad_(), spec, leak_of(spec))
        held[run] = sum(sizes)
    extra = (500 * spec.decay_input + 1) if spec.kind == "plif" else 0
    assert held[fused] == 500 + extra <= held[reference]


def test_module():
    spec = NeuronSpec(kind="plif", tau=3.0, detach_reset=False)
    for exact in (False, True):
        layer = Neuron(spec, exact=exact)
        assert [n for n, _ in layer.named_parameters()] == ["w"] and not list(layer.buffers())
        assert torch.sigmoid(layer.w).item() == pytest.approx(1 / 3, rel=1e-6)
        x = draw(4, 6, dtype=torch.float32)
        assert torch.equal(layer(x), reference(x, spec, torch.sigmoid(layer.w)))
        layer(x).sum().backward()
        assert layer.w.grad.abs() > 0
        before = dict(vars(layer))
        layer(x + 1)
        assert vars(layer) == before and str(spec) in repr(layer)
    for kind in ("if", "lif"):
        assert not Neuron(NeuronSpec(kind=kind)).state_dict()


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"kind": "izhikevich"}, "expected if, lif, plif, diet or relu, got 'izhikevich'"),
        ({"threshold": 0.0}, "threshold: expected a positive number, got 0.0"),
        ({"threshold": math.inf}, "threshold: expected a positive number"),
        ({"threshold": math.nan}, "threshold: expected a positive number"),
        ({"reset": 1.0}, "reset: expected a potential below the threshold 1.0, got 1.0"),
        ({"reset": -math.inf}, "reset: expected a potential"),
        ({"reset": math.nan}, "reset: expected a potential"),
        ({"kind": "lif", "tau": 1.0}, "tau: expected a time constant above 1 step, got 1.0"),
        ({"kind": "plif", "tau": math.inf}, "tau: expected a time constant"),
    ],
)
def test_refusals(knobs, words):
    bare = object.__new__(NeuronSpec)  # as a caller would see it without the type checker of the tests
    bare.__dict__.update(vars(NeuronSpec()) | knobs)
    with pytest.raises(ValueError, match=words):
        bare.__post_init__()
    with pytest.raises((ValueError, TypeCheckError)):
        NeuronSpec(**knobs)
