"""Threats, streams and the oracle: what an attack may do is enforced here, not believed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from sparsetrail.attacks import attack, pgd
from sparsetrail.attacks.run import judged
from sparsetrail.auditing import misjudged, verify
from sparsetrail.checks import Case
from sparsetrail.core import L0, L2, Linf, Problem, Rate, Streams, Victim, as_fraction, correct, margin, precision
from sparsetrail.core.problem import enough


def linear(w):
    """A linear victim on 1x2x2 images: scores x . w."""
    return lambda u: u.flatten(1) @ w


W = torch.tensor([[1.0, -1.0], [-2.0, 1.0], [0.5, 0.0], [0.0, 3.0]])
X = torch.full((3, 1, 2, 2), 0.5)
Y = torch.tensor([0, 1, 0])


def test_a_radius_in_grey_levels_is_refused_with_the_hint():
    with pytest.raises(ValueError, match="did you mean 8/255"):
        Linf(8, space="pixel")
    with pytest.raises((TypeError, TypeCheckError)):
        Linf(8 / 255)  # no default space
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps"):
            Linf(bad, space="pixel")
    with pytest.raises((ValueError, TypeCheckError), match="space"):
        Linf(0.1, space="pixels")


@given(st.floats(0, 1), st.integers(0, 10_000))
def test_projection_stays_in_ball_and_box_and_is_idempotent(eps, seed):
    g = torch.Generator().manual_seed(seed)
    ball = Linf(eps, space="pixel")
    u0 = torch.rand(4, 1, 2, 2, generator=g)
    u = u0 + 3 * torch.randn(4, 1, 2, 2, generator=g)
    p = ball.project(u, u0)
    assert ball.contains(p, u0, 0).all()
    assert torch.equal(ball.project(p, u0), p)
    near = (u0 + 0.99 * eps * (2 * torch.rand(4, 1, 2, 2, generator=g) - 1)).clamp(0, 1)  # inside: it stays
    assert torch.equal(ball.project(near, u0), near)


def test_projection_is_the_nearest_point():
    ball, u0 = Linf(0.25, space="pixel"), torch.tensor([[[[0.9, 0.1]]]])
    assert torch.allclose(ball.project(torch.tensor([[[[2.0, -1.0]]]]), u0), torch.tensor([[[[1.0, 0.0]]]]))
    assert torch.allclose(ball.project(torch.tensor([[[[0.0, 1.0]]]]), u0), torch.tensor([[[[0.65, 0.35]]]]))


def test_contains_refuses_nan_and_the_outside_per_example():
    ball, u0 = Linf(0.1, space="encoded"), torch.zeros(2, 3, 1, 1, 1)
    u = u0.clone()
    u[1, 0] = 0.2
    u[0, 1] = math.nan
    assert ball.contains(u, u0, 1).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("ball", "inside", "outside"),
    [
        (L2(0.5, space="encoded"), [(0.3, 0.4), (0.5, 0.0)], [(0.4, 0.4), (0.51, 0.0), (-0.1, 0.1)]),
        (L0(1, space="encoded"), [(0.0, 0.0), (0.0, 1.0)], [(1.0, 1.0), (0.5, 0.0)]),
    ],
    ids=["l2", "l0"],
)
def test_contains_refuses_what_is_too_far_in_the_norm_of_the_ball(ball, inside, outside):
    u = torch.tensor([*inside, *outside]).t().reshape(2, -1, 1, 1, 1)
    assert ball.contains(u, torch.zeros_like(u)).tolist() == [True] * len(inside) + [False] * len(outside)


def test_margin_counts_a_tie_as_zero_and_nan_as_never():
    z = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0], [math.nan, 0.0], [math.inf, 0.0]])
    assert margin(z, torch.zeros(5, dtype=torch.long)).tolist() == [0.0, -1.0, 1.0, -math.inf, -math.inf]


def test_scores_that_are_not_finite_are_not_correct():
    z = torch.tensor([[2.0, 1.0], [1.0, 1.0], [math.nan, 0.0], [math.inf, 0.0], [2.0, -math.inf]])
    assert correct(z, torch.zeros(5, dtype=torch.long)).tolist() == [True, False, False, False, False]


def test_streams_do_not_depend_on_batch_or_order():
    like = torch.zeros(4, 1, 2, 2)
    whole = Streams(7, range(4)).uniform(like, 0)
    parts = torch.cat([Streams(7, [i]).uniform(like[:1], 0) for i in range(4)])
    assert torch.equal(whole, parts)
    assert torch.equal(Streams(7, [3, 1]).uniform(like[:2], 0), whole[[3, 1]])
    assert not torch.equal(Streams(8, range(4)).uniform(like, 0), whole)
    assert not torch.equal(whole[0], whole[1])
    assert whole.abs().max() <= 1
    encoded = Streams(7, range(2)).uniform(torch.zeros(5, 2, 1, 2, 2), 1)
    assert torch.equal(encoded[:, 1], Streams(7, [1]).uniform(torch.zeros(5, 1, 1, 2, 2), 1)[:, 0])
    with pytest.raises(ValueError, match="4 images"):
        Streams(7, range(4)).uniform(torch.zeros(3, 1), 0)


def test_grad_is_per_example_and_not_averaged():
    p = Problem(linear(W), X, Y, Linf(0.1, space="pixel"))
    g = p.grad(X)
    alone = torch.cat(
        [Problem(linear(W), X[i : i + 1], Y[i : i + 1], Linf(0.1, space="pixel")).grad(X[i : i + 1]) for i in range(3)]
    )
    assert torch.allclose(g, alone)
    p_true = torch.softmax(X.flatten(1) @ W, 1).gather(1, Y[:, None])
    soft = (torch.softmax(X.flatten(1) @ W, 1) - torch.nn.functional.one_hot(Y, 2)) / (1 - p_true)  # whatever the lead
    assert torch.allclose(g.flatten(1), soft @ W.T, atol=1e-6)
    assert (p.forwards, p.backwards, len(p.trace)) == (3, 3, 1)


def test_the_best_point_is_kept_not_the_last():
    p = Problem(linear(W), X, Y, Linf(0.2, space="pixel"))
    good = p.project(X + 0.2 * p.grad(X).sign())
    p.loss(good)
    p.loss(X)
    assert torch.equal(p.best, good)
    assert torch.allclose(p.best_margin, margin(linear(W)(good), Y))


def test_a_point_outside_is_remembered_and_never_counts():
    p = Problem(linear(W), X, Y, Linf(0.01, space="pixel"))
    p.loss(X)
    p.loss(X + 0.4)
    assert bool(p.left)
    assert torch.equal(p.best, X)


def test_a_nan_never_counts_as_success():
    p = Problem(lambda u: torch.full((len(u), 2), math.nan), X, Y, Linf(0.1, space="pixel"))
    p.loss(X)
    assert not p.fooled.any() and torch.equal(p.best_margin, torch.full((3,), -math.inf))
    q = Problem(linear(W), X, Y, Linf(0.1, space="pixel"))
    q.loss(X * math.nan)
    assert not q.fooled.any() and bool(q.left) and q.best.isfinite().all()


def test_dropping_fooled_examples_changes_no_result():
    seen = []

    def watched(u):
        seen.append(len(u))
        return linear(W)(u)

    def play(drop):
        seen.clear()
        p = Problem(watched, X, Y, Linf(0.3, space="pixel"), drop=drop)
        u = X
        for _ in range(5):
            u = p.project(u + 0.1 * p.grad(u).sign())
        p.loss(u)
        return p, list(seen)

    p, all_calls = play(False)
    q, fewer = play(True)
    assert torch.equal(p.fooled, q.fooled) and p.fooled.any()
    assert sum(fewer) < sum(all_calls)
    first = (p.best_margin > 0).nonzero()[0]
    assert q.best_margin[first] > 0


def test_zero_and_broken_gradients_are_counted():
    p = Problem(lambda u: torch.stack([u.flatten(1)[:, 0] * 0, u.flatten(1)[:, 1]], 1), X, Y, Linf(0.1, space="pixel"))
    p.grad(X)
    assert (float(p.zero_share[0][0]), p.zero_share[0][1]) == (0.75, len(X)) and not p.dead.any()
    q = Problem(lambda u: u.flatten(1)[:, :2] * 0, X, Y, Linf(0.1, space="pixel"))
    q.grad(X)
    assert q.dead.all()
    r = Problem(
        lambda u: torch.stack([(u * 0).sum((1, 2, 3)).sqrt(), u.sum((1, 2, 3))], 1), X, Y, Linf(0.1, space="pixel")
    )
    r.grad(X)
    assert r.nonfinite.all()


def test_a_severed_gradient_is_an_error_not_a_row_of_zeros():
    p = Problem(lambda u: linear(W)(u.detach()), X, Y, Linf(0.1, space="pixel"))
    with pytest.raises(ValueError, match="no gradient reaches the pixel input"):
        p.grad(X)


def test_a_summed_loss_is_refused():
    p = Problem(linear(W), X, Y, Linf(0.1, space="pixel"))
    with pytest.raises(ValueError, match="one number per example"):
        p.grad(X, lambda z, y: torch.nn.functional.cross_entropy(z, y))


def test_wilson_against_scipy():
    from scipy.stats import binomtest

    for k, n in ((0, 10), (3, 10), (340, 1000), (1000, 1000)):
        lo, hi = binomtest(k, n).proportion_ci(method="wilson")
        assert Rate(k, n).interval() == pytest.approx((lo, hi), abs=1e-9)
    assert str(Rate(340, 1000)) == "34.0 % [31.1, 37.0], n=1000"
    with pytest.raises(ValueError):
        Rate(2, 1)


def test_names_of_radii():
    assert (
        as_fraction(8 / 255) == "8/255"
        and as_fraction(0.031) == "0.031"
        and as_fraction(0.0) == "0/255"
        and as_fraction(1e-9) == "1e-09"
    )
    assert str(Linf(6 / 255, space="encoded")) == "encoded space, L-infinity 6/255"


def test_a_route_names_the_encoder_in_pixel_space_only():
    v = Victim(encode=lambda x: x, logits=lambda u: u, steps=1, classes=2, route="BPTT", encoding="phase: identity")
    assert v.path("pixel") == "BPTT; phase: identity" and v.path("encoded") == "BPTT"


def test_a_radius_is_a_number():
    for bad in ("8/255", True, None):
        with pytest.raises((ValueError, TypeCheckError), match="eps"):
            Linf(bad, space="pixel")


@pytest.mark.parametrize("box", [(0.0, 255.0), (-100.0, 100.0), (0.0, 1000.0), (-math.inf, math.inf)])
@pytest.mark.parametrize("make", [Linf, L2])
def test_what_is_projected_is_contained_in_any_box(make, box):
    """Rounding grows with the values; what is surely outside stays so, and infinity is inside nothing."""
    g = torch.Generator().manual_seed(0)
    lo, hi = (max(-1000.0, box[0]), min(1000.0, box[1]))
    u0 = lo + (hi - lo) * torch.rand(64, 1, 4, 4, generator=g)
    ball = make(0.1 * (hi - lo), space="pixel", box=box)
    u = ball.project(u0 + (hi - lo) * torch.randn(u0.shape, generator=g), u0)
    assert ball.contains(u, u0).all() and ball.contains(u0, u0).all()
    assert not ball.contains(u0 + 1.01 * ball.eps, u0).any()
    assert not ball.contains(torch.full_like(u0, math.inf), u0).any()
    assert not ball.contains(torch.full_like(u0, math.inf), torch.full_like(u0, math.inf)).any()


@pytest.mark.parametrize("box", [(0.1, 0.9), (-0.3, 0.7), (0.2, 0.5), (-0.123, 0.456), (0.0, 1.0)])
def test_flips_end_on_the_ends_of_the_box(box):
    u0 = torch.tensor(box)[torch.randint(2, (8, 1, 3, 3), generator=torch.Generator().manual_seed(0))]
    ball = L0(9, space="pixel", box=box)
    assert set(ball.flipped(u0).unique().tolist()) == set(u0.unique().tolist())
    assert not (ball.flipped(u0) == u0).any()
    moved = ball.project(ball.flipped(u0), u0)
    assert ball.contains(moved, u0).all() and not torch.equal(moved, u0)


def test_an_l2_radius_without_bounds_is_not_zero():
    ball, u0 = L2(1e20, space="pixel"), torch.full((2, 1, 2, 2), 0.5)
    assert torch.equal(ball.project(u0 + 1e20, u0), torch.ones_like(u0))


@pytest.mark.parametrize("gpu", [True, False])
def test_whatever_runs_where_there_is_a_gpu_is_in_float32(monkeypatch, gpu):
    @precision.in_full
    def asked(more):
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, more

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # PyTorch's own default
    assert asked(more=1) == (not gpu, False, 1) and torch.backends.cudnn.allow_tf32


def test_a_network_of_ones_own_is_never_asked_in_less_than_float32(monkeypatch):
    """Crafted against, judged, scored and verified: where there is a GPU, whatever the victim moves there."""
    asked = []

    def logits(u):
        asked.append(torch.backends.cudnn.allow_tf32)
        return u[0].flatten(1)[:, :3] * 1.0

    v = Victim(encode=lambda x: x[None], logits=logits, steps=1, classes=3)
    x, ball = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), Linf(0.1, space="pixel")
    y = v.scores(x).argmax(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for f in (
        lambda: attack(pgd, v, ball, x, y),
        lambda: misjudged(v, x, y, [True] * 4),
        lambda: verify(v, ball, x, y, {0: x[0]}),
        lambda: Case(v, ball, x, y).scores(x),
    ):
        asked.clear()
        f()
        assert asked and not any(asked)


def test_fewer_scores_than_labels_are_told_before_a_device_is_asked_for_them():
    z, y = torch.zeros(2, 3), torch.tensor([0, 3])
    with pytest.raises(IndexError, match="of which the largest is 3, found 3 scores"):
        enough(z, y)
    assert enough(z, y - 1) is z
    with pytest.raises(IndexError, match="found 3 scores"):
        judged(lambda u: z, torch.zeros(2, 1), y, 1)
