"""Encoders: what each spike is, and that every backward rule is its formula and nothing else."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from jaxtyping import TypeCheckError

from sparsetrail.snn.encode import (
    BACKWARD_RULES,
    ENCODERS,
    Encoder,
    bit_plane,
    build_encoder,
    direct,
    from_codebook,
    grey_levels,
    latency,
    phase,
    poisson,
)

LEVELS = torch.arange(256)
GREY = (LEVELS / 255).view(1, 1, 16, 16)  # all grey levels as one image
CODED = {
    "phase": {"steps": 10},
    "phase-weighted": {"steps": 10, "weighting": "input"},
    "phase-3-bits": {"steps": 7, "bits": 3},
    "phase-11-bits": {"steps": 12, "bits": 11},
    "bit_plane": {},
    "bit_plane-5": {"bits": 5},
    "latency": {"steps": 10},
    "latency-log": {"steps": 6, "curve": "log"},
    "from_codebook": {"table": [[float(v >= t) - 0.25 for t in (32, 96, 160, 224, 32)] for v in range(256)]},
}
WEIGHTED = [n for n in CODED if "latency" not in n and "codebook" not in n]


def coded(name, **more) -> Encoder:
    return build_encoder(name.split("-")[0], **(CODED[name] | more))


def rules(name):
    return [r for r in ("identity", "weighted", "secant", "none") if r != "weighted" or name in WEIGHTED]


def images(seed=0, n=3, dtype=torch.float32):
    """Pixels on and off the grid, and outside 0..1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 5, 4, generator=g, dtype=torch.float64) * 1.2 - 0.1
    x[0] = (x[0] * 255).round() / 255
    return x.to(dtype)


def bits_of(v, steps, bits):
    """Bit `t mod bits` of an 8-bit number, most significant first; nothing below the eighth."""
    return [(v >> 7 - t % bits) & 1 if t % bits < 8 else 0 for t in range(steps)]


def test_phase_is_the_bits_of_the_pixel():
    for steps, bits in itertools.product((1, 4, 8, 10, 19), (1, 3, 8, 12)):
        want = torch.tensor([bits_of(v, steps, bits) for v in range(256)], dtype=torch.float32)
        code = phase(steps=steps, bits=bits)
        assert torch.equal(code.codebook, want)
        assert torch.equal(code(GREY).flatten(1).t(), want)
        weights = torch.tensor([2.0 ** -(1 + t % bits) for t in range(steps)])
        weighted = phase(steps=steps, bits=bits, weighting="input")
        assert torch.equal(weighted.codebook, want * weights)
    # one weighted period adds up to v/256, as v = sum of its bits
    whole = phase(steps=8, weighting="input")(GREY).sum(0)
    assert torch.equal(whole.flatten(), LEVELS / 256)


def test_the_papers_phase_code():
    code = phase()
    assert (code.steps, code.knobs["bits"], code.backward) == (10, 8, "identity")
    planes = [(LEVELS.to(torch.uint8) >> 7 - t % 8) & 1 for t in range(10)]
    assert torch.equal(code.codebook, torch.stack(planes, 1).float())
    assert torch.equal(code.codebook[:, 8:], code.codebook[:, :2])  # the period is 8


def test_bit_plane():
    for bits in range(1, 9):
        want = torch.tensor([[v // 2 ** (8 - k) % 2 for k in range(1, bits + 1)] for v in range(256)])
        assert torch.equal(bit_plane(bits=bits).codebook, want.float())
    assert torch.equal(bit_plane()(GREY), phase(steps=8)(GREY))


@pytest.mark.parametrize("steps", [2, 3, 10, 16, 256])
def test_latency(steps):
    for curve in ("linear", "log"):
        code = latency(steps=steps, curve=curve).codebook
        assert torch.equal(code.sum(1), torch.ones(256)) and code.unique().tolist() == [0, 1]
        when = code.argmax(1)
        assert when[0] == steps - 1 and when[255] == 0  # black last, white first
        assert (when.diff() <= 0).all()
        for v in range(0, 256, 5):
            x = v / 255
            late = (steps - 1) * (1 - x)
            if curve == "log":
                late = steps - 1 - np.logaddexp(steps - 1 + math.log(x), math.log1p(-x)) if 0 < v < 255 else late
            assert abs(when[v].item() - late) <= 0.5 + 1e-6
    assert latency(steps=2).codebook.argmax(1).tolist() == [1] * 128 + [0] * 128
    assert latency(steps=1000, curve="log").codebook.sum() == 256  # e^999 is nowhere computed


def test_direct():
    x = images().requires_grad_()
    code = direct(steps=4)
    s = code(x)
    assert torch.equal(s, x.expand(4, *x.shape)) and code.backward == "true" and code.codebook is None
    w = torch.rand(s.shape, generator=torch.Generator().manual_seed(1))
    (g,) = torch.autograd.grad((s * w).sum(), x)
    torch.testing.assert_close(g, w.sum(0), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(code, images(dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_poisson_statistics(p):
    steps, x = 200, torch.full((2, 3, 20, 20), p)
    s = poisson(steps=steps, seed=5)(x)
    assert s.shape == (steps, 2, 3, 20, 20) and set(s.unique().tolist()) <= {0.0, 1.0}
    if p in (0.0, 1.0):  # 1[U <= x] with U in 0..1, 1 left out: a white pixel always, a black one at U = 0 only
        assert (s == p).all()
        return
    sigma = math.sqrt(p * (1 - p))
    assert abs(s.mean() - p) < 4 * sigma / math.sqrt(s.numel())
    assert ((s.mean(0) - p).abs() < 6 * sigma / math.sqrt(steps)).all()  # pixel by pixel
    centred = s - p
    for shift, axis in ((1, 0), (1, 4), (1, 2)):  # steps and neighbours are independent
        r = (centred * centred.roll(shift, axis)).mean() / sigma**2
        assert abs(r) < 5 / math.sqrt(s.numel())


def test_poisson_draws():
    x = images().clamp(0, 1)
    code = poisson(steps=6, seed=3)
    assert code.random and code.codebook is None
    first, second = code(x), code(x)
    assert not torch.equal(first, second)  # afresh at each call
    again = poisson(steps=6, seed=3)
    assert torch.equal(again(x), first) and torch.equal(again(x), second)
    assert torch.equal(poisson(steps=6, generator=torch.Generator().manual_seed(3))(x), first)
    state = torch.get_rng_state()
    code(x)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global stream
    u = torch.rand((6, *x.shape), generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, (u <= x).float())
    drawn = torch.rand((1, *x.shape), generator=torch.Generator().manual_seed(3))[0]
    for rule in ("identity", "none"):  # a tie spikes
        assert (poisson(steps=1, seed=3, backward=rule)(drawn) == 1).all()


def test_poisson_backward():
    x = images().clamp(0, 1).requires_grad_()
    s = poisson(steps=6, seed=3)(x)
    w = torch.rand(s.shape, generator=torch.Generator().manual_seed(1))
    (g,) = torch.autograd.grad((s * w).sum(), x)
    torch.testing.assert_close(g, w.sum(0), rtol=1e-6, atol=0)
    severed = poisson(steps=6, seed=3, backward="none")(x)
    assert torch.equal(severed, s) and not severed.requires_grad


@pytest.mark.parametrize("name", CODED)
def test_codebook_is_the_code(name):
    code = coded(name)
    assert code.codebook.shape == (256, code.steps)
    assert torch.equal(code(GREY).flatten(1).t(), code.codebook)
    for dtype in (torch.float32, torch.float64):  # and v/255 finds its level in either precision
        assert torch.equal(grey_levels(LEVELS.to(dtype) / 255), LEVELS)
        assert code(GREY.to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", CODED)
def test_forward_is_the_same_under_every_rule(name):
    x = images()
    want = coded(name).codebook[(x * 255).round().clamp(0, 255).long()].movedim(-1, 0)
    for rule in rules(name):
        code = coded(name, backward=rule)
        assert code.backward == rule in BACKWARD_RULES
        assert torch.equal(code(x), want) and torch.equal(code(x.clone().requires_grad_()), want)
        assert torch.equal(coded(name).route(rule)(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CODED)
def test_each_rule_is_its_formula(name, dtype):
    x = images(dtype=dtype)
    v = (x * 255).round().clamp(0, 255).long()
    book = coded(name).codebook.to(dtype)
    steps, bits = book.shape[1], coded(name).knobs.get("bits", 8)
    g = torch.rand((steps, *x.shape), generator=torch.Generator().manual_seed(2), dtype=dtype) - 0.5
    want = {
        "identity": sum(g[t] for t in range(steps)),
        "weighted": sum(g[t] * 2.0 ** -(1 + t % bits) for t in range(steps)),
        "secant": torch.zeros_like(x),
    }
    for n, c, h, w in itertools.product(*map(range, x.shape)):
        k = int(v[n, c, h, w])
        up, down = min(k + 1, 255), max(k - 1, 0)
        slope = (book[up] - book[down]) * 255 / (up - down)
        want["secant"][n, c, h, w] = (g[:, n, c, h, w] * slope).sum()
    for rule in rules(name):
        leaf = x.clone().requires_grad_()
        s = coded(name, backward=rule)(leaf)
        if rule == "none":
            assert not s.requires_grad
            with pytest.raises(RuntimeError, match="does not require grad"):
                torch.autograd.grad((s * g).sum(), leaf)
            continue
        (got,) = torch.autograd.grad((s * g).sum(), leaf)
        assert got.dtype == dtype
        scale = want[rule].abs().max()
        assert (got - want[rule]).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-14) * scale and scale > 0
    if name in WEIGHTED:  # the two rules differ, and so does the secant
        assert not torch.allclose(want["identity"], want["weighted"])


def test_secant_of_the_weighted_period_is_the_true_slope():
    x = images().requires_grad_()
    (g,) = torch.autograd.grad(phase(steps=8, weighting="input", backward="secant")(x).sum(), x)
    torch.testing.assert_close(g, torch.full_like(g, 255 / 256))  # sum over a period is v/256, v = 255 x


@pytest.mark.parametrize("name", [*CODED, "direct", "poisson"])
def test_per_sample_gradients(name):
    code = build_encoder(name) if name in ENCODERS and name not in CODED else coded(name)
    x = images(n=4).clamp(0, 1)
    w = torch.rand((code.steps, 1, *x.shape[1:]), generator=torch.Generator().manual_seed(3))

    def loss(image):
        return (code(image[None]) * w).sum()

    randomness = "different" if code.random else "error"
    each = torch.func.vmap(torch.func.grad(loss), randomness=randomness)(x)
    torch.testing.assert_close(each, torch.stack([torch.func.grad(loss)(image) for image in x]))


def test_rounding_and_clamping():
    code = phase(steps=8)
    for v in (0, 1, 100, 127, 254, 255):
        for off in (-0.49, -0.2, 0.0, 0.3, 0.49):
            x = torch.full((1, 1, 1, 1), (v + off) / 255, dtype=torch.float64)
            assert code(x).flatten().tolist() == bits_of(v, 8, 8)
    half = torch.tensor([0.5, 1.5, 2.5, 126.5, 127.5], dtype=torch.float64) / 255
    assert grey_levels(half).tolist() == [0, 2, 2, 126, 128]
    out = torch.tensor([-0.2, -5.0, -math.inf, math.nan, 1.001, 7.0, 1e30, math.inf])
    assert grey_levels(out).tolist() == [0, 0, 0, 0, 255, 255, 255, 255]


pixels = npst.arrays(
    np.float32, npst.array_shapes(min_dims=4, max_dims=4, max_side=4), elements=st.floats(-1, 2, width=32)
)


@given(x=pixels, name=st.sampled_from(sorted(CODED)), data=st.data())
def test_coded_anywhere(x, name, data):
    code = coded(name, backward=data.draw(st.sampled_from(rules(name))))
    leaf = torch.from_numpy(x.copy()).requires_grad_()
    s = code(leaf)
    v = np.clip(np.rint(x.astype(np.float32) * np.float32(255)), 0, 255).astype(int)
    assert s.shape == (code.steps, *x.shape) and torch.equal(s, code.codebook[v].movedim(-1, 0))
    if code.backward != "none":
        (g,) = torch.autograd.grad(s.sum(), leaf)
        assert g.shape == leaf.shape and g.isfinite().all()


@given(v=st.integers(0, 255), steps=st.integers(1, 40), bits=st.integers(1, 20))
def test_phase_of_any_length(v, steps, bits):
    code = phase(steps=steps, bits=bits)(torch.full((1, 1, 1, 1), v / 255)).flatten().int().tolist()
    assert code == bits_of(v, steps, bits)
    seen = min(bits, 8, steps)
    assert sum(b << 7 - t for t, b in enumerate(code[:seen])) == v >> 8 - seen << 8 - seen


def test_encoders_have_no_memory():
    a, b = images(1), images(2)
    for name in CODED:
        code = coded(name)
        first = code(a)
        assert not torch.equal(first, code(b)) and torch.equal(code(a), first)
        assert torch.equal(code(a.flip(0)), first.flip(1))


@pytest.mark.parametrize("name", [*CODED, "direct", "poisson"])
def test_round_trip_through_knobs(name):
    code = build_encoder(name, steps=3) if name in ("direct", "poisson") else coded(name)
    again = build_encoder(code.name, **code.knobs)
    x = images().clamp(0, 1)
    assert again == code and torch.equal(again(x), code(x))
    assert code.route(code.backward) == code
    for rule in [] if name == "direct" else ["identity", "none"]:
        other = code.route(rule)
        assert other.backward == rule and other.knobs == code.knobs | {"backward": rule}


def test_a_given_generator_is_found_in_the_knobs():
    code = poisson(steps=3, generator=torch.Generator().manual_seed(11))
    assert code.knobs["seed"] == 11
    x = images().clamp(0, 1)
    assert torch.equal(code.route("none")(x), code(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: phase(steps=0), "expected steps >= 1 and bits >= 1, got steps=0"),
        (lambda: phase(bits=0), "expected steps >= 1 and bits >= 1"),
        (lambda: phase(weighting="full"), "weighting expected 'none' or 'input', got 'full'"),
        (lambda: phase(backward="true"), "expected one of identity, weighted, secant, none, got 'true'"),
        (lambda: bit_plane(bits=9), "expected 1 to 8 bits, got 9"),
        (lambda: latency(steps=1), "expected at least 2 steps, got 1"),
        (lambda: latency(curve="square"), "curve expected 'linear' or 'log', got 'square'"),
        (lambda: latency(backward="weighted"), "expected one of identity, secant, none, got 'weighted'"),
        (lambda: direct(steps=0), "expected steps >= 1, got 0"),
        (lambda: direct().route("identity"), "its backward rule is true and cannot be changed"),
        (lambda: poisson(steps=0), "expected steps >= 1, got 0"),
        (lambda: poisson(backward="secant"), "expected identity or none, got 'secant'"),
        (lambda: phase().route("soft"), "got 'soft'"),
        (lambda: build_encoder("rate"), "expected one of phase, direct, .*, from_codebook, got 'rate'"),
        (lambda: from_codebook(torch.zeros(4, 256)), r"finite table \[256 t\], one row a grey level, got \(4, 256\)"),
        (lambda: from_codebook(torch.full((256, 2), math.nan)), "finite table"),
        (lambda: build_encoder("phase", step=3), "encoder phase: .*'step'"),
        (lambda: Encoder.__call__.__wrapped__(phase(), GREY.to(torch.uint8)), "float pixels in 0..1, got torch.uint8"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_frames_without_a_codebook_are_the_pixels_themselves():
    """The first layer is computed once a distinct frame, of which nothing else is known."""
    knobs = {"name": "twice", "knobs": {}, "steps": 3, "backward": "true", "frames": (0, 0, 0), "slope": torch.ones(3)}
    with pytest.raises(ValueError, match="expected frames that show the pixels themselves"):
        Encoder(apply=lambda x: (2 * x - 1).unsqueeze(0).expand(3, *x.shape), **knobs)
    Encoder(apply=lambda x: x.unsqueeze(0).expand(3, *x.shape), **knobs)
    Encoder(apply=lambda x: (2 * x - 1).unsqueeze(0).expand(3, *x.shape), **(knobs | {"frames": None}))
    with pytest.raises((ValueError, TypeCheckError), match=r"whole number of steps|type"):
        Encoder(apply=lambda x: x[None], **(knobs | {"steps": 0, "frames": None}))
