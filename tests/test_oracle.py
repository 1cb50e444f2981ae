"""What lies behind `grad` for every attack: noise samples, guides, grey levels, several gradients at once."""

import math
from dataclasses import replace

import pytest
import torch
from frauds import case, honest

from sparsetrail.attacks import attack, pgd
from sparsetrail.core import L0, L2, Guide, Linf, Memory, Problem, Route, Threat, Victim, cross_entropy, margin
from sparsetrail.snn.encode import phase

W = torch.tensor([[1.0, -1.0], [-2.0, 1.0], [0.5, 0.0], [0.0, 3.0]])
X = torch.full((3, 1, 2, 2), 0.5)
Y = torch.tensor([0, 1, 0])
PIXEL = Linf(0.1, space="pixel")


def linear(u):
    return u.flatten(1) @ W


def noisy(seed=0, sizes=None):
    """Scores with fresh noise in every row."""
    g = torch.Generator().manual_seed(seed)

    def f(u):
        if sizes is not None:
            sizes.append(len(u))
        return (u + torch.randn(u.shape, generator=g)).flatten(1) ** 2 @ W

    return f


def test_the_gradient_is_the_mean_over_noise_samples():
    sizes = []
    p = Problem(noisy(sizes=sizes), X, Y, PIXEL, eot=400)
    g = p.grad(X, margin)
    sign = 1 - 2 * torch.tensor([0.0, 1.0, 0.0])
    expected = sign[:, None] * (2 * X.flatten(1)) * (W[:, 1] - W[:, 0])  # d/dx of (x + noise)^2 is 2 (x + noise)
    assert torch.allclose(g.flatten(1), expected, atol=1.0)  # 400 draws of standard deviation at most 2 * 3
    one = Problem(noisy(), X, Y, PIXEL).grad(X, margin).flatten(1)
    assert (one - expected).norm() > 3 * (g.flatten(1) - expected).norm()
    assert p.forwards == p.backwards == 3 * 400 and max(sizes) == 3


def test_noise_samples_share_a_batch_once_images_are_dropped():
    sizes = []
    f = noisy(sizes=sizes)
    y = torch.tensor([0, 0, 1, 0, 0, 0])
    p = Problem(lambda u: f(u) + torch.tensor([0.0, 1e3]), X.repeat(2, 1, 1, 1), y, PIXEL, drop=True, eot=12)
    p.loss(p.u0)  # all of class 0 fall
    sizes.clear()
    p.grad(p.u0)
    assert sizes == [6, 6]  # twelve samples of the one that stands


def test_a_margin_is_the_vote_of_most_draws():
    calls = iter([1.0, 1.0, -1.0, -1.0])

    def f(u):
        return torch.tensor([[0.0, next(calls)]]).expand(len(u), 2)

    p = Problem(f, X[:1], Y[:1], PIXEL, eot=4)
    assert p.loss(X[:1]) < 0 and not p.fooled.any()  # two of four are not most


def test_a_random_victim_is_judged_by_most_of_ten_calls():
    count = [0]

    def lucky(u):
        count[0] += 1
        right = count[0] % 4 != 0  # wrong once in four calls
        return torch.tensor([[1.0, 0.0] if right else [0.0, 1.0]]).expand(u.shape[1], 2) + 0 * u.sum()

    v = Victim(encode=lambda x: x[None], logits=lucky, steps=1, classes=2, random=True)
    run = attack(pgd, v, PIXEL, X, torch.zeros(3, dtype=torch.long))
    assert run.clean == run.robust == (True,) * 3 and run.votes == 10


def test_a_guide_leads_and_the_victim_judges():
    backwards = Guide(lambda u: -linear(u), own=False)
    p = Problem(linear, X, Y, PIXEL, guides=[backwards])
    led = p.u0 + 0.1 * p.grad(X, margin).sign()
    own = Problem(linear, X, Y, PIXEL)
    straight = own.u0 + 0.1 * own.grad(X, margin).sign()
    assert torch.allclose(led - p.u0, p.u0 - straight)
    assert torch.allclose(p.loss(led), margin(linear(led), Y)) and (p.loss(led) < own.loss(straight)).all()


def test_several_guides_are_followed_by_their_mean():
    twice, own = Guide(lambda u: 3 * linear(u), own=False), Guide(linear)
    both = Problem(linear, X, Y, PIXEL, guides=[own, twice]).grad(X, margin)
    assert torch.allclose(both, 2 * Problem(linear, X, Y, PIXEL).grad(X, margin))


def test_transfer_through_attack_says_whose_gradient_it_is():
    v = Victim(encode=lambda x: x[None], logits=lambda u: linear(u[0]), steps=1, classes=2, name="v")
    w = Victim(encode=v.encode, logits=lambda u: linear(u[0]) * 1.0, steps=1, classes=2, name="twin")
    with torch.no_grad():
        y = v.scores(X).argmax(1)
    a = attack(pgd, v, Linf(0.3, space="pixel"), X, y, step=0.1)
    b = attack(pgd, v, Linf(0.3, space="pixel"), X, y, step=0.1, guide=w)
    assert (
        a.robust == b.robust and "transfer from twin" in b.route and b.forwards == a.forwards
    )  # of the victim; the twin's are not its
    with pytest.raises(ValueError, match="a route or a guide"):
        attack(pgd, v, PIXEL, X, y, guide=w, route=Route(neuron="atan:1"))
    with pytest.raises(ValueError, match="can be rewired"):
        attack(pgd, v, PIXEL, X, y, route=Route(neuron="atan:1"))


def test_a_point_that_fools_only_between_grey_levels_does_not_count():
    """Fooled above 100.4 of 255 levels only: 100.45 fools, both levels next to it do not within one level's reach."""

    def f(u):
        level = u.flatten(1).sum(1) * 255
        between = ((level - 100.45).abs() < 0.2).float()
        return torch.stack([1 - between, between], 1)

    u0 = torch.full((1, 1, 1, 1), 100 / 255)
    point = torch.full_like(u0, 100.45 / 255)
    loose = Problem(f, u0, torch.tensor([0]), Linf(1 / 255, space="pixel"))
    strict = Problem(f, u0, torch.tensor([0]), Linf(1 / 255, space="pixel"), grid=True)
    assert loose.loss(point) > 0 and bool(loose.fooled)
    assert strict.loss(point) < 0 and not bool(strict.fooled)  # shown the level itself

    def between(p, g):
        p.loss(torch.full_like(p.u0, 100.45 / 255))

    run = attack(between, f_victim(f), Linf(1 / 255, space="pixel"), u0, torch.tensor([0]), keep=True)
    assert run.robust == (True,)


def f_victim(f):
    return Victim(encode=lambda x: x[None], logits=lambda u: f(u[0]), steps=1, classes=2)


@pytest.mark.parametrize("levels", [2, 8])
def test_a_code_that_rounds_pixels_sees_no_difference_between_a_point_and_its_grey_levels(levels):
    """Ties between two levels included, which float32 makes of many a point."""
    x = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
    ball = Linf(levels / 255, space="pixel")
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for u in (x + ball.eps * noise, x + 0.5 / 255, x - 0.5 / 255, x + ball.eps, x - ball.eps + 0.01):
        u = ball.project(u, x)
        assert torch.equal(phase()(u), phase()(ball.snap(u, x)))


@pytest.mark.parametrize("ball", [Linf(7.9 / 255, space="pixel"), L2(30.5 / 255, space="pixel")], ids=str)
def test_rounding_to_grey_levels_stays_in_the_ball(ball):
    g = torch.Generator().manual_seed(0)
    u0 = torch.randint(0, 256, (50, 3, 4, 4), generator=g) / 255
    u = ball.project(u0 + torch.randn(u0.shape, generator=g) * 0.1, u0)
    snapped = ball.snap(u, u0)
    levels = snapped * 255
    assert torch.equal(levels.round() / 255, snapped) or (levels - levels.round()).abs().max() < 1e-4
    assert ball.contains(snapped, u0).all() and not torch.equal(snapped, u0)
    assert torch.equal(ball.snap(u0, u0), u0)
    if ball.norm == "linf":
        assert ((snapped - u0).abs() * 255).max() < 7.01


def test_threats_of_other_norms_say_what_they_are():
    assert str(L2(128 / 255, space="pixel")) == "pixel space, L2 128/255"
    assert str(L0(12, space="encoded")) == "encoded space, L0 12 entries"
    with pytest.raises(ValueError, match="whole number"):
        Threat(1.5, space="encoded", norm="l0")
    with pytest.raises(ValueError, match="at least 0"):
        L2(-1.0, space="pixel")
    with pytest.raises(ValueError, match="no steepest direction"):
        L0(3, space="encoded").steepest(torch.ones(1, 1, 2))


def test_the_rescaled_cross_entropy_points_where_the_true_one_does():
    z = torch.tensor([[3.0, 1.0, -1.0], [0.0, 2.0, 1.0]]).requires_grad_()
    y = torch.tensor([0, 2])
    true = torch.nn.functional.cross_entropy(z, y, reduction="none")
    ours = cross_entropy(z, y)
    assert torch.allclose(true, ours)
    a, b = (torch.autograd.grad(v.sum(), z)[0] for v in (true, ours))
    assert torch.allclose(a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True), atol=1e-6)
    far = torch.tensor([[3e4, 1.0, 0.5]]).requires_grad_()
    assert torch.autograd.grad(torch.nn.functional.cross_entropy(far, y[:1]), far)[0].abs().sum() == 0
    assert torch.autograd.grad(cross_entropy(far, y[:1]).sum(), far)[0].abs().sum() > 1


def test_memory_follows_the_rows():
    m = Memory()
    m.begin(4)
    like = torch.zeros(2, 4, 3)
    assert torch.equal(m.recall("a", like, 1.0), torch.ones(2, 4, 3))
    m.remember("a", torch.arange(4.0).view(1, 4, 1).expand(2, 4, 3))
    m.see(torch.tensor([1, 3]), copies=2)
    got = m.recall("a", torch.zeros(2, 4, 3), 0.0)
    assert got[0, :, 0].tolist() == [1, 3, 1, 3]
    m.remember("a", got + torch.tensor([10.0, 20.0, 99.0, 99.0]).view(1, 4, 1))
    m.see(None)
    assert m.recall("a", like, 0.0)[0, :, 0].tolist() == [0, 11, 2, 23]
    m.see(None, keep=False)
    m.remember("a", like)
    assert m.recall("a", like, 0.0)[0, 1, 0] == 11
    m.begin(2)
    assert m.recall("a", like[:, :2], 7.0).unique().tolist() == [7.0]


def test_a_run_does_not_depend_on_the_places_it_is_given_in():
    """Random streams are keyed by the image's place in its data: a part, in another order, finds the same."""
    v = Victim(encode=lambda x: x[None], logits=lambda u: linear(u[0]), steps=1, classes=2)
    x = torch.randint(90, 160, (8, 1, 2, 2), generator=torch.Generator().manual_seed(1)) / 255
    with torch.no_grad():
        y = v.scores(x).argmax(1)
    whole = attack(pgd, v, PIXEL, x, y, seed=5, keep=True, drop=False)
    order = [6, 1, 4]
    part = attack(pgd, v, PIXEL, x[order], y[order], seed=5, keep=True, drop=False, indices=order)
    assert torch.equal(part.adversarial, whole.adversarial[order]) and part.indices == (6, 1, 4)
    assert part.robust == tuple(whole.robust[i] for i in order)
    with pytest.raises(ValueError, match="one an image"):
        attack(pgd, v, PIXEL, x, y, indices=[1])
    assert math.isfinite(part.seconds)


@pytest.mark.parametrize(
    "ball", [L2(0.2, space="pixel"), Linf(0.01, space="pixel"), Linf(8 / 255, space="pixel")], ids=str
)
def test_an_image_is_dropped_only_for_a_point_that_will_be_judged_so(ball):
    """A code rounds to the nearest level, the ball holds others where its radius is no whole number of levels."""
    honest_one = replace(honest("phase"), codebook=phase(steps=8).codebook)
    probe = case(honest_one, n=80)
    knobs = {"steps": 10, "step": ball.eps / 4, "keep": True}
    dropped = attack(pgd, honest_one, ball, probe.x, probe.y, **knobs)
    kept = attack(pgd, honest_one, ball, probe.x, probe.y, drop=False, **knobs)
    assert dropped.robust == kept.robust and sum(dropped.robust) < sum(dropped.clean)
    plain = attack(pgd, replace(honest_one, codebook=None), ball, probe.x, probe.y, **knobs)
    assert plain.robust == dropped.robust
