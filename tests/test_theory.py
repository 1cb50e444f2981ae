"""The theorems in exact numbers: closed forms, counterexamples, proofs held against enumeration, and refusals."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from lively import lively
from torch import nn
from torch.nn import functional as F

from sparsetrail.adapt import stateful
from sparsetrail.core import Linf, Victim
from sparsetrail.snn.encode import direct, phase
from sparsetrail.snn.net import NetSpec, victim
from sparsetrail.snn.neuron import NeuronSpec, reference
from sparsetrail.snn.surrogate import atan_derivative
from sparsetrail.theory import (
    AdvVuln,
    RandomVuln,
    TwoLayerSNN,
    above_first_switch,
    adversarial_vulnerability,
    against,
    backward_from,
    bn_backward,
    conv_weight_grad_density,
    corner_probability,
    corrected_bound_expect,
    dense_chain,
    density_bound,
    density_degrees,
    directional_gain,
    expected_nnz_bernoulli,
    expected_nnz_exact,
    first_switch_radius,
    first_weights,
    gradient_bound,
    gradient_fidelity,
    layer_gradients,
    lead,
    linear_error,
    linear_vulnerability,
    literal_vs_centred,
    log_odds,
    nnz_input_jacobian,
    nnz_weight_jacobian,
    paper_bound,
    paper_terms,
    participation_ratio,
    phase_flips,
    probability,
    random_vulnerability,
    ratio_interval,
    sandwich,
    score_gradient,
    second_order_interval,
    shortfall,
    smooth_twin,
    structural_bound,
    structural_product,
    support_size,
    switch_levels,
    temperature_probe,
    theorem1_check,
    tracking,
    violation_scan,
)
from sparsetrail.theory.switch import _folded
from sparsetrail.trails import maxpool_density_cap, strided_conv_density


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def vec(*values):
    return torch.tensor(values, dtype=torch.float64)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def near(value, tol=1e-12):
    return pytest.approx(value, rel=tol, abs=tol)


def linear(g):
    """The score x.g of vectors, whatever the class."""
    return lambda u, y: u.double() @ g


NONE = torch.zeros(1, dtype=torch.int64)  # the class of a score that asks for none


# Surrogate -----------------------------------------------------------------------------------------------------------


def test_surrogate_values_of_the_papers_equations():
    at = vec(0, 0.25, 0.5, 1, 2)
    want = [1, 0.6184864581588363, 0.288400439142001, 0.09199966835037524, 0.02470452303185764]
    assert atan_derivative(at, 2.0).tolist() == near(want)
    assert float(atan_derivative(vec(0.0), 4.0)) == 2
    alpha, x = (torch.rand(50, generator=gen(), dtype=torch.float64) * 4 + 0.1 for _ in range(2))
    for a, u in zip(alpha.tolist(), x, strict=True):
        assert float(atan_derivative(u, a)) == near(a / (2 * (1 + (math.pi / 2 * a * float(u)) ** 2)))
    wide = torch.linspace(-1e6, 1e6, 10001)
    assert bool((atan_derivative(wide, 2.0) > 0).all())
    told = literal_vs_centred()
    assert told["centred"] == 1 and told["literal"] == near(want[3]) and told["quotient"] == near(1 + math.pi**2)


# Theorem 1 -----------------------------------------------------------------------------------------------------------


def test_participation_ratio_and_support():
    got = participation_ratio(rows([3, 4, 0, 0], [1, 1, 1, 1], [10, 0, 0, 0], [0, 0, 0, 0])).tolist()
    assert got[:3] == near([1.96, 4, 1]) and math.isnan(got[3])
    g = torch.randn(1000, 20, generator=gen()) * (torch.rand(1000, 20, generator=gen(1)) < 0.5)
    g[:, 0] += 0.1
    pr, l0 = participation_ratio(g), support_size(g)
    assert bool((pr >= 1 - 1e-12).all()) and bool((pr <= l0 + 1e-9).all())
    assert torch.allclose(participation_ratio(1e-30 * g), pr, rtol=1e-5)
    v = vec(1, 1e-7, 1e-13, 0)
    assert [int(support_size(v, rel_tol=r)) for r in (0.0, 1e-12, 1e-6)] == [3, 2, 1]
    assert int(support_size(v, abs_tol=1e-10)) == 2


def test_linear_closed_forms():
    v = linear_vulnerability(rows([3, 4]), 1.0)
    found = [float(t) for t in (v.rho_adv, v.rho_rand, v.ratio, v.l0, v.kurtosis)]
    assert found == near([49, 25 / 3, 5.88, 2, 2.35296])
    assert float(linear_vulnerability(rows([1]), 1.0).kurtosis) == near(1.8)
    assert float(linear_vulnerability(rows([1, 1]), 1.0).kurtosis) == near(2.4)
    g = rows([3, 4, 0, 0, 1])
    want = {"linf": 7.384615384615385, "l2": 7, "l1": 12.923076923076923, "corners": 2.4615384615384617}
    for norm, ratio in want.items():
        assert float(linear_vulnerability(g, 0.7, norm=norm).ratio) == near(ratio)
    assert float(linear_vulnerability(g, 1.0, side="decrease").ratio) == near(14.76923076923077)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "corners"])
def test_closed_forms_against_draws(norm):
    """Mean and kurtosis of the squared change, within four standard errors: sampler and moments fit each other."""
    g, x = vec(3, 4, 0, 0, 1), torch.zeros(1, 5, dtype=torch.float64)
    want = linear_vulnerability(g[None], 0.5, norm=norm)
    got = random_vulnerability(linear(g), x, NONE, 0.5, generator=gen(), draws=60_000, norm=norm, chunk=20_000)
    assert abs(float(got.mean - want.rho_rand)) < 4 * float(got.se)
    assert float(got.kurtosis) == pytest.approx(float(want.kurtosis), rel=0.05)
    assert float(got.max_sq) <= float(want.rho_adv) * (1 + 1e-12)


def test_box():
    for d, want in enumerate((6, 96 / 11, 72 / 7, 192 / 17), 1):
        g, x = torch.ones(1, d, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
        assert float(linear_vulnerability(g, 0.3, box=(0, 1), x=x).ratio) == near(want)
        assert float(linear_vulnerability(g, 0.3, box=(0, 1), x=x + 0.5).ratio) == near(3 * d)
    half = linear_vulnerability(rows([1]), 0.2, box=(0, 1), x=rows([0.9]))
    assert float(half.ratio) == near(4)
    assert float(half.rho_rand) == near(0.04 / 4)  # the mean square m = eps^2/4
    two = linear_vulnerability(rows([1, 1]), 0.2, box=(0, 1), x=rows([0.9, 0.9]))
    assert float(two.rho_rand) == near(2 * 0.04 / 4 + 2 * (0.2 / 16) ** 2)  # and the mean mu = -eps/16
    g, x = torch.randn(1, 6, generator=gen()).double(), torch.rand(1, 6, generator=gen(1)).double()
    want = linear_vulnerability(g, 0.4, box=(0, 1), x=x)
    got = random_vulnerability(linear(g[0]), x, NONE, 0.4, generator=gen(), draws=60_000, box=(0, 1), chunk=20_000)
    assert abs(float(got.mean - want.rho_rand)) < 4 * float(got.se)


def exact(adv, rand):
    """Vulnerabilities known without error."""
    a, r, n = vec(adv), vec(rand), torch.tensor([1000])
    rv = RandomVuln(mean=r, se=0 * r, lo=r, hi=r, least=r, most=r, n=n, n_zero=0 * n, kurtosis=r, max_sq=a)
    return AdvVuln(lower=a, upper=a, best_attack=("known",)), rv


@pytest.mark.parametrize(
    ("share", "ratio", "verdict"),
    [(0, 2, "violated (certified)"), (1 / 3, 3, "holds"), (0.5, 4, "violated (certified)"),
     (0.9, 20, "violated (certified)")],
)  # fmt: skip
def test_threshold_unit(share, ratio, verdict):
    """Theta(x - x0) at distance r: ratio 2 / (1 - r/eps), inside 3..3 at one radius only."""
    score = lambda u, y: (u[:, 0] >= share).double()  # noqa: E731
    x, l0 = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    if share == 0:
        x = x - 1e-9
    rand = random_vulnerability(
        score, x, NONE, 1.0, generator=gen(), draws=200_000, chunk=100_000, limits=(0, 1), alpha=0.01
    )
    p = float(rand.mean)
    assert abs(p - 1 / ratio) < 4 * math.sqrt(p * (1 - p) / 200_000)
    adv = adversarial_vulnerability(score, x, NONE, 1.0, generator=gen(), random=rand, attacks={}, limits=(0, 1))
    assert float(adv.lower) == float(adv.upper) == 1 and adv.best_attack == ("random draws",)
    at = theorem1_check(*exact(1.0, 1 / ratio), l0, 1)
    assert at.verdict == (verdict,) and float(at.ratio) == near(ratio)
    if verdict != "holds":
        drawn = theorem1_check(adv, rand, l0, 1)
        assert drawn.verdict == (verdict,) and float(drawn.lo) < ratio < float(drawn.hi)


def test_square_has_a_ratio_of_five_with_no_gradient():
    score = lambda u, y: u[:, 0] ** 2  # noqa: E731
    x = torch.zeros(1, 1, dtype=torch.float64)
    rand = random_vulnerability(score, x, NONE, 0.1, generator=gen(), draws=200_000, chunk=200_000)
    assert abs(float(rand.mean) - 2e-5) < 4 * float(rand.se)
    adv = adversarial_vulnerability(score, x, NONE, 0.1, generator=gen(), random=rand)
    assert float(adv.lower) == pytest.approx(1e-4, rel=1e-3)
    at = theorem1_check(*exact(1e-4, 2e-5), torch.zeros(1, dtype=torch.int64), 1)
    assert float(at.ratio) == near(5) and at.verdict == ("violated (certified)",) and float(at.bound) == 0


def test_rare_jumps_are_not_certified_by_students_interval():
    """A slope of 1e-6 and a jump on 3 % of the ball: the ratio is 33, the bound 48; 64 draws may all miss the jump."""
    score = lambda u, y: 1e-6 * u.double().sum(1) + (u[:, 0].double() > 0.94)  # noqa: E731
    x, l0 = torch.zeros(64, 16), torch.full((64,), 16)
    y, more = torch.zeros(64, dtype=torch.int64), {"draws": 64, "alpha": 0.05 / 64}
    rand = random_vulnerability(score, x, y, 1.0, generator=gen(4), limits=(-1, 2), **more)
    adv = AdvVuln(lower=torch.ones(64).double(), upper=torch.ones(64).double(), best_attack=("known",) * 64)
    missed = adv.lower / rand.hi > 48
    assert 0 < int(missed.sum()) < 64  # Student's interval of these images excludes the truth
    assert bool((rand.least <= 0.03).all() and (rand.most >= 0.03).all())
    assert "violated (certified)" not in theorem1_check(adv, rand, l0, 16).verdict
    sure = random_vulnerability(score, x, y, 1.0, generator=gen(4), limits=(-1, 2), ci="bernstein", **more)
    assert torch.equal(sure.lo, rand.least) and torch.equal(sure.hi, rand.most)
    assert bool(random_vulnerability(score, x, y, 1.0, generator=gen(4), **more).most.isinf().all())  # no limits


@pytest.mark.parametrize("ahead", [0.5, 30, 35, 60, 200, -105, -200])
def test_a_confident_image_keeps_its_vulnerability(ahead):
    """Linear log-odds at a tiny radius: 3 PR(g) however far the true class is ahead or behind."""
    w = torch.tensor([1.0, 0.5, 2.0, 1.0]).double()
    f = lambda u: torch.stack([u.double() @ w + ahead, torch.zeros(len(u)).double()], 1)  # noqa: E731
    x = torch.zeros(1, 4, dtype=torch.float64)
    score, limits = (shortfall(f), (-1, 0)) if ahead > 0 else (probability(f), (0, 1))
    g = score_gradient(f, x, NONE)
    told = linear_vulnerability(g, 1e-3)
    rand = random_vulnerability(score, x, NONE, 1e-3, generator=gen(), draws=4000)
    adv = adversarial_vulnerability(
        score, x, NONE, 1e-3, generator=gen(), random=rand, follow=log_odds(f), limits=limits
    )
    assert float(adv.lower) == pytest.approx(float(told.rho_adv), rel=0.02, abs=0)
    assert float(rand.mean) == pytest.approx(float(told.rho_rand), rel=0.1, abs=0)
    assert float(told.ratio) == near(3 * float(participation_ratio(g)), 1e-9)
    here = {"generator": gen(), "directions": 200}
    assert float(gradient_fidelity(score, g, x, NONE, 1e-3, **here)) > 0.999
    assert float(linear_error(score, g, x, NONE, 1e-3, **here)) < 0.01
    assert float(shortfall(f)(x, NONE)) == near(float(probability(f)(x, NONE)) - 1, 1e-12)


def test_a_gradient_that_ends_before_the_tensor_is_refused():
    w = torch.ones(4, 2, requires_grad=True)
    with pytest.raises(ValueError, match="a gradient that ends before it; an encoder without a backward"):
        score_gradient(lambda u: u.detach() @ w, torch.zeros(1, 4), NONE)


def test_bounds_of_nothing_are_not_numbers():
    assert math.isnan(paper_bound(4, 0, 1, 1, 3)) and math.isnan(density_bound(0, 0.5, 4, 8))
    assert all(map(math.isnan, corrected_bound_expect(4, 8, 1, 0, 2)))
    assert conv_weight_grad_density(1, 1, 2, 3, 3, 1) == 1 and conv_weight_grad_density(1, 1, 2, 3, 3, 0) == 0


def test_curvature_is_seen_by_the_error_and_not_by_the_fidelity():
    score = lambda u, y: 1e-3 * u[:, 0].double() + 50 * u.double().square().sum(1)  # noqa: E731
    g, x, here = rows([1e-3, 0, 0]), torch.zeros(1, 3, dtype=torch.float64), {"generator": gen(), "directions": 50}
    assert float(gradient_fidelity(score, g, x, NONE, 0.01, **here)) == near(1, 1e-6)
    assert float(linear_error(score, g, x, NONE, 0.01, **here)) > 100
    flat = lambda u, y: u.double() @ rows([3, 4, 1]).T[:, 0]  # noqa: E731
    assert float(linear_error(flat, rows([3, 4, 1]), x, NONE, 0.01, **here)) < 1e-12


def test_second_order_interval():
    low, high = second_order_interval(vec(1.0), 0.1, 0.005)
    assert (low, high) == near((2.293121325661074, 3.9644254372310272))
    exact_ratio = 3.302546180728906  # x + x^2/2 at 0: 0.105^2 over eps^2/3 + eps^4/20
    assert exact_ratio == near(0.105**2 / (0.1**2 / 3 + 0.1**4 / 20)) and low < exact_ratio < high
    assert second_order_interval(vec(1.0), 0.1, 0.06)[1] == math.inf


def test_draws_that_change_nothing():
    flat = lambda u, y: torch.zeros(len(u), dtype=torch.float64)  # noqa: E731
    x = torch.zeros(2, 1)
    for n, want in ((64, 0.045729702330762456), (128, 0.023132405251746757), (1000, 0.0029912495450953314)):
        got = random_vulnerability(flat, x, torch.zeros(2).long(), 1.0, generator=gen(), draws=n, limits=(0, 1))
        assert got.hi.tolist() == near([want, want]) and got.lo.tolist() == [0, 0] and got.n_zero.tolist() == [n, n]
    got = random_vulnerability(flat, x[:1], NONE, 1.0, generator=gen(), draws=8)
    assert float(got.hi) == math.inf
    adv = adversarial_vulnerability(flat, x[:1], NONE, 1.0, generator=gen(), random=got, attacks={}, limits=(0, 1))
    assert theorem1_check(adv, got, torch.ones(1).long(), 1).verdict == ("undefined",)


def test_intervals_cover():
    g, n = vec(3, 4, 1), 500
    x, y = torch.full((n, 3), 0.5, dtype=torch.float64), torch.zeros(n).long()
    truth = float(linear_vulnerability(g[None], 0.05).rho_rand)
    clt, bern = (
        random_vulnerability(linear(g), x, y, 0.05, generator=gen(), draws=256, limits=(0, 1), ci=ci, chunk=100_000)
        for ci in ("clt", "bernstein")
    )
    covered = [float(((v.lo <= truth) & (truth <= v.hi)).double().mean()) for v in (clt, bern)]
    assert 0.92 <= covered[0] <= 0.98 and covered[1] >= 0.95
    assert bool((bern.hi - bern.lo > clt.hi - clt.lo).all())


def test_estimates_do_not_depend_on_the_chunk_and_stop_when_told():
    g, y = torch.randn(7, generator=gen()).double(), torch.zeros(5).long()
    x = torch.rand(5, 7, generator=gen(1), dtype=torch.float64)
    score = lambda u, y: (u * g).sum(1).tanh()  # noqa: E731
    for norm in ("linf", "l2", "l1"):
        a, b = (
            random_vulnerability(score, x, y, 0.3, generator=gen(3), draws=50, norm=norm, chunk=c) for c in (3, 1000)
        )
        assert torch.allclose(a.mean, b.mean, rtol=1e-13) and torch.allclose(a.max_sq, b.max_sq, rtol=1e-13)
    few, many = (random_vulnerability(score, x, y, 0.3, generator=gen(3), draws=50, target_rel_se=0.05, chunk=c)
                 for c in (2, 999))  # fmt: skip
    assert few.n.tolist() == many.n.tolist() and min(few.n.tolist()) > 50
    assert bool((few.se < 0.05 * few.mean).all())
    c, d = (adversarial_vulnerability(score, x, y, 0.3, generator=gen(3), chunk=c) for c in (2, 64))
    assert torch.allclose(c.lower, d.lower, rtol=1e-6)


def test_attacks_reach_the_closed_form_and_never_pass_it():
    """A linear score: sign steps are optimal; the ratio is at least 1, whatever the attacks."""
    g = torch.randn(1, 30, generator=gen()).double()
    x, y = torch.rand(1, 30, generator=gen(1), dtype=torch.float64), NONE
    score = linear(g[0])
    want = linear_vulnerability(g, 0.1, box=(0, 1), x=x)
    rand = random_vulnerability(score, x, y, 0.1, generator=gen(), draws=4000, box=(0, 1))
    adv = adversarial_vulnerability(score, x, y, 0.1, generator=gen(), random=rand, box=(0, 1))
    assert float(adv.lower) == pytest.approx(float(want.rho_adv), rel=1e-5)
    assert float(adv.upper) == math.inf and adv.best_attack[0].split(",")[0] in ("fgsm", "pgd")
    weak = adversarial_vulnerability(score, x, y, 0.1, generator=gen(), random=rand, attacks={}, box=(0, 1))
    assert float(weak.lower) == float(rand.max_sq) and float(weak.lower / rand.mean) >= 1
    lo, hi = ratio_interval(adv, rand)
    assert float(lo) < float(want.ratio) < float(hi)
    prob = adversarial_vulnerability(
        lambda u, y: score(u, y).sigmoid(), x, y, 0.1, generator=gen(), limits=(0, 1), box=(0, 1)
    )
    f = float(score(x, y).sigmoid())
    assert float(prob.upper) == near(max(f, 1 - f) ** 2) and float(prob.lower) <= float(prob.upper)


def test_probability_gradient_keeps_its_support():
    """Two classes, lead of 20: the float32 softmax has no gradient left, the real one has."""
    z = torch.tensor([[20.0, 0.0]])
    for dtype, want in ((torch.float32, 0.0), (torch.float64, 2.0611536879e-9)):
        u = z.to(dtype).requires_grad_()
        (g,) = torch.autograd.grad(u.softmax(1)[0, 0], u)
        assert float(g[0, 0]) == (0 if want == 0 else pytest.approx(want, rel=1e-6))
    g = score_gradient(lambda u: u, z, NONE)
    assert g[0].tolist() == pytest.approx([2.0611536181902037e-9, -2.0611536181902037e-9], rel=1e-9)
    far = score_gradient(lambda u: u, torch.tensor([[200.0, 0.0, -1.0]]), NONE)
    assert int(support_size(far)) == 3 and float(far.abs().max()) < 1e-80
    f = lambda u: u @ torch.randn(4, 3, generator=gen(), dtype=torch.float64)  # noqa: E731
    x, y = torch.rand(6, 4, generator=gen(1), dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    u = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(probability(f)(u, y).sum(), u)
    assert torch.allclose(score_gradient(f, x, y), want, rtol=1e-12)
    assert torch.allclose(
        lead(f)(x, y), -(f(x).scatter(1, y[:, None], -9e9).amax(1) - f(x).gather(1, y[:, None])[:, 0])
    )


def test_fidelity():
    g = torch.randn(3, 40, generator=gen(), dtype=torch.float64)
    x, y = torch.rand(3, 40, generator=gen(1), dtype=torch.float64), torch.arange(3)
    score = lambda u, y: (u * g[y]).sum(1) + 7  # noqa: E731
    one = gradient_fidelity(score, g, x, y, 0.1, generator=gen(), chunk=7)
    assert one.tolist() == near([1, 1, 1], 1e-10)
    assert directional_gain(score, g, x, y, 0.1).tolist() == near([1, 1, 1], 1e-10)
    assert gradient_fidelity(score, g, x, y, 0.1, generator=gen(), box=(0, 1)).tolist() == near([1, 1, 1], 1e-10)
    other = torch.randn(3, 40, generator=gen(5), dtype=torch.float64)
    other -= (other * g).sum(1, keepdim=True) / g.square().sum(1, keepdim=True) * g
    off = gradient_fidelity(score, other, x, y, 0.1, generator=gen(), directions=400)
    assert bool((off.abs() < 3 / math.sqrt(400)).all())
    assert gradient_fidelity(score, -g, x, y, 0.1, generator=gen()).tolist() == near([-1, -1, -1], 1e-10)
    assert bool(gradient_fidelity(score, 0 * g, x, y, 0.1, generator=gen()).isnan().all())


def test_temperature_makes_sparsity_and_robustness_out_of_rounding():
    w = torch.randn(3, 64, generator=gen())
    u = torch.rand(300, 64, generator=gen(1))
    v = Victim(encode=lambda x: x.flatten(1)[None], logits=lambda u: u[0] @ w.T, steps=1, classes=3)
    y = v.scores(u.view(300, 1, 8, 8)).argmax(1)
    x = u.view(300, 1, 8, 8)
    found = temperature_probe(v, Linf(0.05, space="pixel"), x, y, scales=(1.0, 10.0, 100.0, 1000.0))
    assert len({t.margin.k for t in found}) == 1 and len({t.clean.k for t in found}) == 1
    plain = [t.plain.k for t in found]
    assert plain == sorted(plain) and plain[-1] > 2 * plain[0]
    density = [t.density for t in found]
    assert density[0] == 1 and density[-1] < 0.1 and density == sorted(density, reverse=True)
    assert found[-1].all_zero.value > 0.9 and found[0].all_zero.k == 0


# First switch --------------------------------------------------------------------------------------------------------


def small(steps=4, seed=1, **knobs):
    """A small direct-coded network in float64 with images of 12 x 12."""
    x = torch.rand(3, 1, 12, 12, generator=gen(seed), dtype=torch.float64)
    spec = NetSpec(channels=1, width=0.125, steps=steps, stem="cifar", **knobs)
    net = lively(spec, direct(steps=steps)(x.float()), seed=seed).double()
    return victim(net, direct(steps=steps)), x


@pytest.mark.parametrize(
    "neuron",
    [NeuronSpec(), NeuronSpec(threshold=0.7, reset=-0.2), NeuronSpec(reset=None), NeuronSpec(kind="lif"),
     NeuronSpec(kind="lif", tau=3.0, decay_input=False)],
)  # fmt: skip
def test_levels_are_where_the_spike_train_changes(neuron):
    levels = switch_levels(neuron, 6)
    z = torch.linspace(0.02, 3.0, 29_801, dtype=torch.float64)
    train = reference(z.expand(6, -1), neuron)
    moved = (train[:, 1:] != train[:, :-1]).any(0)
    found = z[1:][moved]
    want = [v for v in levels if 0.02 < v < 3.0]
    assert len(found) == len(want) and torch.allclose(found, vec(*want), atol=2e-4)


def test_first_switch_is_where_the_first_spike_changes():
    v, x = small()
    found = first_switch_radius(v, x)
    assert bool((found.eps1 < found.eps2).all()) and bool((found.eps1 > 0).all())
    conv, bn, neuron, _ = v.module.first()

    def spikes(image):
        return neuron(bn(conv(v.encode(image[None]).flatten(0, 1))))

    for i in range(3):
        base = spikes(x[i])
        for share in (0.999, 1.001):
            after = spikes(x[i] + share * found.eps1[i] * found.toward[i])
            changed = (after != base).any(0).flatten().nonzero()[:, 0].tolist()
            assert changed == ([] if share < 1 else [int(found.unit[i])])
        for _ in range(20):  # nothing within the radius changes anything
            u = torch.rand(x[i].shape, generator=gen(i), dtype=torch.float64).mul(2).sub(1).sign()
            assert torch.equal(spikes(x[i] + 0.999 * found.eps1[i] * u), base)
    w = first_weights(v, x[0], int(found.unit[0])).sign().view(1, 12, 12)
    assert torch.equal(w, found.toward[0]) or torch.equal(w, -found.toward[0])


def test_upper_bound_fails_just_above_the_first_switch():
    """Two values reachable, one in a corner alone: the ratio is 1 / P(flip). P against draws, and exactly."""
    w = vec(0.9, -1.0, 1.1, 0.7)
    for share in (0.6, 0.8):
        u = torch.rand(400_000, 4, generator=gen(), dtype=torch.float64) * 2 - 1
        p = float(((u @ w) >= share * float(w.abs().sum())).double().mean())
        exact_p = corner_probability(w, share)
        assert abs(p - exact_p) < 4 * math.sqrt(exact_p / 400_000)
    assert corner_probability(w, 0.0) >= 0.5  # a bound still
    assert corner_probability(vec(1.0), 1 / 3) == near(1 / 3)


def test_first_switch_says_why_not():
    v, x = small()
    x32 = torch.rand(1, 1, 12, 12, generator=gen())
    with pytest.raises(NotImplementedError, match="expected the direct code, a constant current"):
        first_switch_radius(victim(v.module, phase(steps=4)), x32)
    with pytest.raises(NotImplementedError, match=r"expected a network of this package.*found none"):
        first_switch_radius(Victim(encode=lambda x: x[None], logits=lambda u: u[0], steps=1, classes=2), x32)
    with pytest.raises(NotImplementedError, match="expected neurons that spike, found smooth ones"):
        first_switch_radius(victim(smooth_twin(v.module), direct(steps=4)), x)
    with pytest.raises(NotImplementedError, match="found plif"):
        first_switch_radius(small(neuron=NeuronSpec(kind="plif"))[0], x)


def test_units_that_switch_together_certify_nothing():
    """An image of one grey level: every inner unit of a channel has the same current."""
    v, x = small()
    flat = torch.full_like(x[:2], 0.5)
    flat[1] = x[0]
    found = above_first_switch(v, probability(v.scores), flat, torch.zeros(2).long())
    assert 0 < float(found.eps1[0]) == pytest.approx(float(found.eps2[0]), rel=1e-9)
    assert math.isnan(found.jump[0]) and math.isnan(found.chance[0]) and math.isnan(found.ratio[0])
    assert float(found.eps1[1]) < float(found.eps[1]) < float(found.eps2[1]) and 0 < float(found.chance[1]) < 1e-6
    assert float(found.jump[1]) == 0 or float(found.ratio[1]) == near(1 / float(found.chance[1]))


# Theorem 3 -----------------------------------------------------------------------------------------------------------


def test_bernoulli_expectation_by_enumeration():
    total = Fraction(0)
    for bits in itertools.product((0, 1), repeat=8):
        a, b = torch.tensor(bits[:4]).view(2, 2).double(), torch.tensor(bits[4:]).view(2, 2).double()
        total += Fraction(int(structural_product(a, b).sum()), 256)
    assert total == Fraction(7, 4) and expected_nnz_bernoulli(2, 2, 2, 0.5, 0.5) == near(1.75)
    e_in, e_w = expected_nnz_bernoulli(4, 4, 4, 0.5, 1), expected_nnz_bernoulli(4, 4, 2, 0.5, 0.5)
    printed = paper_bound(2, 4, 0.5 * 4, 4, e_in)
    corrected = corrected_bound_expect(2, 4, 2, 4, 2)[1] * e_in
    assert (e_in, e_w, printed, corrected) == near((15, 5.46875, 3.75, 7.5))
    assert against(e_w, printed) == "violated (certified)" and against(e_w, corrected) == "holds"
    assert expected_nnz_bernoulli(3, 4, 5, 1, 1) == 15


def test_exact_counts_and_when_the_printed_inequality_is_true():
    e_in, e_w = (expected_nnz_exact(4, c, 2, k, exact=True) for c, k in ((4, 2), (1, 1)))
    assert (e_in, e_w) == (Fraction(40, 3), 2)
    assert paper_bound(1, 4, 1, 2, float(e_in)) == near(5 / 3)
    assert expected_nnz_exact(4, 4, 2, 2) == near(40 / 3)
    for d in range(1, 9):  # true exactly if kS >= k1 or k2 = 1; ours on both sides, without exception
        for k2, k1, ks in itertools.product(range(1, d + 1), repeat=3):
            e_in, e_w = (expected_nnz_exact(d, c, k2, k, exact=True) for c, k in ((d, k1), (3, ks)))
            assert (e_w <= Fraction(3, d) * Fraction(ks, k1) * e_in) == (ks >= k1 or k2 == 1)
            low, high = corrected_bound_expect(3, d, ks, k1, k2)
            assert low * float(e_in) <= float(e_w) * (1 + 1e-12) <= high * float(e_in) * (1 + 1e-11)


def test_smallest_violation():
    w2, w1, s = rows([1, 2], [3, 5]), rows([1, 1], [1, 2]), rows([1, 0])
    assert int((w2 @ s.T != 0).sum()) == 2 and nnz_input_jacobian(w2, w1) == 4
    assert density_degrees(w1) == (2, 2, 2) and density_degrees(s.T)[1] == 1
    assert paper_bound(1, 2, 1, 2, 4) == 1
    net = TwoLayerSNN(w1=w1, w2=w2)
    of_s, of_w1, _ = net.jacobians(s)
    assert int((of_w1 != 0).sum()) == 4 == nnz_weight_jacobian(w2, s) == gradient_bound(2, 1, 2, 4)
    assert float(of_w1[0, 0, 0]) == near(0.02470452303185764)
    assert of_s[0, 0].tolist() == near([0.07411356909557293, 0.1235226151592882])
    assert against(2, paper_bound(1, 2, 1, 2, 4)) == "violated (certified)"


def test_no_input_gradient_and_a_dense_weight_gradient():
    net = TwoLayerSNN(w1=torch.zeros(2, 2), w2=torch.ones(2, 2))
    s = torch.ones(1, 2)
    of_s, of_w1, _ = net.jacobians(s)
    assert int((of_s != 0).sum()) == 0 == nnz_input_jacobian(net.w2, net.w1)
    assert of_w1.flatten().tolist() == near([0.008463938976579035] * 8) and nnz_weight_jacobian(net.w2, s) == 8
    bound = paper_bound(1, 2, 1, density_degrees(net.w1)[1], 0)
    assert math.isnan(bound) and against(8, bound) == "undefined"
    assert math.isnan(gradient_bound(2, 2, density_degrees(net.w1)[2], 0))


def test_cancellation_hides_an_entry_of_the_product_only():
    w2, w1 = rows([1, -1], [1, 1]), rows([1, 0], [1, 3])
    assert float((w2 @ w1)[0, 0]) == 0 and bool(structural_product(w2, w1).all())
    of_s, *_ = TwoLayerSNN(w1=w1, w2=w2).jacobians(torch.ones(1, 2))
    assert float(of_s[0, 0, 0]) == near(0.0909754747081691)


@pytest.mark.parametrize("memory", [{}, {"stateful": True}, {"stateful": True, "detach_reset": False}])
@pytest.mark.parametrize("centred", [True, False])
def test_jacobians_two_ways_and_the_count_theorem(memory, centred):
    g = gen(2)
    for _ in range(50):
        w1, w2 = (torch.randn(4, k, generator=g) * (torch.rand(4, k, generator=g) < 0.7) for k in (5, 4))
        s = (torch.rand(6, 5, generator=g) < 0.4).double()
        net = TwoLayerSNN(w1=w1, w2=w2, threshold=0.6, centred=centred, **memory)
        closed, auto = net.jacobians(s), net.jacobians(s, closed=False)
        for a, b in zip(closed, auto, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-14)
        if memory.get("detach_reset", True):
            lines, r_min = int((s != 0).any(0).sum()), density_degrees(w1)[2]
            count = int((auto[1] != 0).sum())
            assert count == nnz_weight_jacobian(w2, s) == int((closed[1] != 0).sum())
            for t in range(6):
                nnz_in = int((auto[0][:, t] != 0).sum())
                assert r_min == 0 or count <= gradient_bound(4, lines, r_min, nnz_in)


def test_stateful_network_is_the_packages_own_neuron():
    g = gen(4)
    w1, w2, s = torch.randn(6, 5, generator=g), torch.randn(3, 6, generator=g), torch.rand(7, 5, generator=g) < 0.5
    for detach in (True, False):
        spec = NeuronSpec(threshold=0.5, detach_reset=detach)
        run = lambda a, b: reference(reference(s.double() @ a.T, spec) @ b.T, spec).mean(0)  # noqa: B023, E731
        net = TwoLayerSNN(w1=w1, w2=w2, threshold=0.5, stateful=True, detach_reset=detach)
        assert torch.equal(net.forward(s.double()), run(w1.double(), w2.double()))
        want = torch.autograd.functional.jacobian(run, (w1.double(), w2.double()))
        for got, w in zip(net.jacobians(s.double())[1:], want, strict=True):
            assert torch.allclose(got, w, rtol=1e-12, atol=1e-15)


def test_aligned_supports_break_equation_16():
    w2, w1 = torch.zeros(5, 5), torch.zeros(5, 5)
    w2[:, 0], w1[0] = 1, 1
    terms = paper_terms(1, 5, 1, density_degrees(w1)[1], density_degrees(w2)[0])
    assert int((w2 @ w1 != 0).sum()) == 25 and terms.input_printed == 1 and terms.input_union == 5
    assert against(25, terms.input_printed) == "violated (certified)"
    assert terms.weight_printed == near(0.2) and terms.weight_union == 1


def test_structural_bound_never_fails():
    g = gen(1)
    for _ in range(300):
        d, t = (int(torch.randint(2, 9, (1,), generator=g)) for _ in range(2))
        p = torch.rand(3, generator=g)
        w2, w1, s = (
            torch.rand(d, k, generator=g) * (torch.rand(d, k, generator=g) < q)
            for k, q in zip((d, d, t), p, strict=True)
        )
        bound = structural_bound(w2, w1, s)
        assert math.isnan(bound) or int(structural_product(w2, s).sum()) <= bound * (1 + 1e-12)
    assert math.isnan(structural_bound(torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 1)))


def test_convolution_density_and_density_bound():
    assert conv_weight_grad_density(0.01, 0.05, 10, 8, 8, 1) == near(0.2739090718953232)
    assert conv_weight_grad_density(0.01, 0.01, 10, 2, 2, 1) == near(0.003992209870867125)
    for p2, p1, ps, t, n in itertools.product((0.1, 0.5, 1), (0.1, 1), (0.05, 0.6), (1, 10), (2, 30)):
        dens_w = p2 * (1 - (1 - ps) ** t)
        dens_in = 1 - (1 - p2 * p1) ** n
        assert dens_w <= density_bound(p1, ps, t, n) * dens_in * (1 + 1e-12)


def test_scan_against_the_exact_rule():
    found = violation_scan((8, 24), (4,), (0.1, 1.0), (0.1, 0.3), (0.1, 1.0), generator=gen(), n=200)
    assert len(found) == 16
    for s in found:
        assert s.population_false == (s.p_s < s.p_1) and not s.corrected_false
        assert s.violated.n == 200
    dense = [s for s in found if s.d == 24 and s.p_1 == s.p_2 == 1]
    assert all(s.true_ratio == near(4 / 24 * (1 - (1 - s.p_s) ** 24)) for s in dense)
    assert all(s.violated.value > 0.95 for s in dense if s.p_s == 0.1)
    again = violation_scan((8, 24), (4,), (0.1, 1.0), (0.1, 0.3), (0.1, 1.0), generator=gen(), n=200)
    assert again == found


def test_scan_counts_instances_as_one_by_one():
    (found,) = violation_scan((6,), (3,), (0.5,), (0.4,), (0.5,), generator=gen(7), n=60)
    g = gen(7)
    left, right, spikes = (torch.rand(60, 6, c, generator=g) for c in (6, 6, 3))
    bad = 0
    for a, b, c in zip(left < 0.5, right < 0.5, spikes < 0.4, strict=True):
        a, b, c = a.double(), b.double(), c.double()
        k1, ks = density_degrees(b)[1], density_degrees(c)[1]
        bad += int((a @ c != 0).sum()) > paper_bound(3, 6, ks, k1, int((a @ b != 0).sum())) + 1e-9
    assert found.violated.k == bad > 0


# Single operations ---------------------------------------------------------------------------------------------------


def test_what_geometry_forces():
    assert maxpool_density_cap(16, 3, 2, 1) == 0.25 and strided_conv_density(16, 1, 2, 0) == 0.25
    assert strided_conv_density(32, 7, 2, 3) == 1.0
    for seed in range(5):
        x = torch.randn(2, 3, 16, 16, generator=gen(seed)).round(decimals=1).requires_grad_()
        (g,) = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).sum(), x)
        assert float((g != 0).double().mean()) <= 0.25
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    (g,) = torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)
    assert g.flatten().tolist() == [1, 0, 0, 0]


def test_batchnorm_destroys_zeros_in_train_mode_only():
    g, x = vec(1, 0, 0, 0), vec(0, 1, 2, 5)
    got = bn_backward(g, x, mode="train")
    assert got.tolist() == pytest.approx([0.248171, -0.209990, -0.133630, 0.095450], abs=1e-6)
    bn = torch.nn.BatchNorm1d(1).double()
    u = x[:, None].clone().requires_grad_()
    (want,) = torch.autograd.grad((bn(u)[:, 0] * g).sum(), u)
    assert got.tolist() == near(want[:, 0].tolist(), 1e-9)
    bn.eval()
    (want,) = torch.autograd.grad((bn(u)[:, 0] * g).sum(), u)
    kept = bn_backward(g, x, mode="eval", variance=float(bn.running_var[0]))
    for known in (want[:, 0].tolist(), [0.8553957932772215, 0, 0, 0]):
        assert kept.tolist() == near(known)


def test_a_grey_level_more_flips_two_spikes():
    level = torch.arange(255)
    for steps, total, most in ((8, 502, 8), (10, 506, 10)):
        flips = phase_flips(level, steps)
        assert int(flips.sum()) == total and int(flips.max()) == most == int(flips[127])
        code = phase(steps=steps).codebook
        assert torch.equal(flips, (code[1:] != code[:-1]).sum(1))
    for bits in (1, 4, 6, 10):  # the encoder keeps the highest bits, or shows nothing behind the eighth
        code = phase(steps=7, bits=bits).codebook
        assert torch.equal(phase_flips(level, 7, bits=bits), (code[1:] != code[:-1]).sum(1))


# Theorem 2 -----------------------------------------------------------------------------------------------------------


def test_partial_zeros_do_not_reach_the_input():
    of_s, of_w = backward_from(vec(1, 0), torch.ones(2, 2, dtype=torch.float64), vec(1, 1))
    assert of_s.tolist() == [1, 1] and of_w.tolist() == [[1, 1], [0, 0]]


def test_sandwich():
    g = gen(3)
    for _ in range(100):
        ws = [torch.randn(8, 8, generator=g) for _ in range(4)]
        s = (torch.rand(8, generator=g) < 0.6).double()
        if not bool(s.any()):
            continue
        c = dense_chain(ws, s, torch.randn(8, generator=g))
        size = float(c.input_grad.norm())
        for (low, high), h, dw in zip(sandwich(ws, c.currents), c.inputs, c.weight_grads, strict=True):
            got = float(dw.norm())
            assert float(h.norm()) / high * size <= got * (1 + 1e-9)
            assert low == 0 or got <= float(h.norm()) / low * size * (1 + 1e-9)
    q, _ = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))
    c = dense_chain([q], s, torch.randn(8, generator=g))
    assert float(c.weight_grads[0].norm() / c.input_grad.norm()) == near(float(s.norm()))
    assert sandwich([q], c.currents)[0] == near((1, 1))
    assert sandwich([torch.ones(3, 2)], c.currents)[0][0] == 0


def test_layer_gradients_and_tracking():
    v, _ = small()
    x = torch.rand(12, 1, 12, 12, generator=gen(9), dtype=torch.float64)
    y = torch.arange(12) % 10
    found = layer_gradients(v, x, y, space="pixel")
    assert next(iter(found.layer)) == "conv1" and list(found.layer)[-1] == "fc"
    net = v.module
    u = x[3:4].clone().requires_grad_()
    z = net(v.encode(u))
    want = torch.autograd.grad(F.cross_entropy(z, y[3:4]), [z, u, net.conv1.weight, net.fc.weight])
    assert float(found.dlogits_norm[3]) == pytest.approx(float(want[0].norm()), rel=1e-9)
    for got, w in zip((found.input, found.layer["conv1"], found.layer["fc"]), want[1:], strict=True):
        assert float(got["norm"][3]) == pytest.approx(float(w.norm()), rel=1e-6)
        assert float(got["density"][3]) == float((w != 0).double().mean())
        assert float(got["pr"][3]) == pytest.approx(float(participation_ratio(w.flatten())), rel=1e-6)
    raw = {t.layer: t for t in tracking(found, generator=gen())}
    assert -1 <= raw["conv1"].low <= raw["conv1"].rho <= raw["conv1"].high <= 1
    from scipy.stats import spearmanr

    assert raw["fc"].rho == pytest.approx(
        spearmanr(found.input["norm"].numpy(), found.layer["fc"]["norm"].numpy()).statistic
    )
    assert raw == {t.layer: t for t in tracking(found, generator=gen())}
    flat = tracking(found, generator=gen(), of="density")
    assert [t.rho for t in flat if t.layer == "conv1"] == ["constant"]
    scaled = tracking(found, generator=gen(), normalise="dlogits")
    assert any(a.rho != b.rho for a, b in zip(scaled, raw.values(), strict=True))
    encoded = layer_gradients(v, x[:2], y[:2], space="encoded", layers=["fc"])
    assert list(encoded.layer) == ["fc"] and encoded.space == "encoded"


class Forgetful(torch.nn.Module):
    """A network whose state must be reset, its weights frozen."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 3).requires_grad_(False)
        self.v = 0.0

    def reset(self):
        self.v = 0.0

    def forward(self, u):
        self.v = self.v + self.fc(u.flatten(2)).sigmoid().mean(0)
        return self.v


def test_layers_of_a_network_with_state_and_frozen_weights():
    net = Forgetful().eval()
    net.v = 7.0
    v = stateful(net, lambda x: x[None].repeat(2, 1, 1, 1, 1), classes=3, steps=2, name="forgetful")
    x, y = torch.rand(5, 1, 2, 2, generator=gen()), torch.arange(5) % 3
    found, again = (layer_gradients(v, x, y, space="pixel") for _ in range(2))
    assert torch.equal(found.layer["fc"]["norm"], again.layer["fc"]["norm"])
    w = net.fc.weight.detach().clone().requires_grad_()
    z = (x.flatten(1) @ w.T + net.fc.bias).sigmoid()
    (want,) = torch.autograd.grad(F.cross_entropy(z[2:3], y[2:3]), w)
    assert float(found.layer["fc"]["norm"][2]) == pytest.approx(float(want.norm()), rel=1e-5)
    assert not net.fc.weight.requires_grad and not net._forward_hooks and net.v == 0.0
    apart = replace(v, logits=lambda u: u.flatten(2).mean(0)[:, :3])
    with pytest.raises(ValueError, match="expected `logits` to run `module`, found no gradient of its weights"):
        layer_gradients(apart, x, y, space="pixel")
    assert not net.fc.weight.requires_grad and not net._forward_hooks


# Refusals ------------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_what_was_expected():
    x, g = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"box: expected norm='linf'.*leave box=None"):
        linear_vulnerability(g, 0.1, norm="l2", box=(0, 1), x=x)
    with pytest.raises(ValueError, match=r"limits: bernstein needs the range.*give \(0, 1\)"):
        random_vulnerability(linear(g[0].double()), x, NONE, 0.1, generator=gen(), ci="bernstein")
    with pytest.raises(ValueError, match="expected draws >= 2"):
        random_vulnerability(linear(g[0].double()), x, NONE, 0.1, generator=gen(), draws=1)
    with pytest.raises(ValueError, match=r"level: expected grey levels 0\.\.254, got 0\.\.255"):
        phase_flips(torch.arange(256), 8)
    with pytest.raises(ValueError, match=r"expected W1 \[n d\] and W2 \[m n\].*columns of W2 are the rows of W1"):
        TwoLayerSNN(w1=torch.ones(2, 3), w2=torch.ones(2, 3))
    v, images = small()
    with pytest.raises(ValueError, match="found none named 'conv9'"):
        layer_gradients(v, images, torch.zeros(3).long(), space="pixel", layers=["conv9"])
    with pytest.raises(ValueError, match=r"expected the network behind the victim.*give Victim\(module="):
        layer_gradients(
            Victim(encode=lambda x: x[None], logits=lambda u: u[0], steps=1, classes=2), images[:1], NONE, space="pixel"
        )


def test_a_first_layer_without_a_bias_stays_where_it_lies():
    """Elsewhere, a device's tensors and the CPU's meet: a stand-in device tells."""
    conv, norm = nn.Conv2d(1, 4, 3, bias=False, device="meta"), nn.BatchNorm2d(4, device="meta")
    assert [t.device.type for t in _folded(conv, norm)] == ["meta", "meta"]
