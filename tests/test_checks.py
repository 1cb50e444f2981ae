"""Checks: their statistics by hand, each on a case made for it, and that the page describes them all."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from frauds import bent, case, honest
from scipy.stats import binom, binomtest, spearmanr
from torch import nn

from sparsetrail.attacks import attack, pgd
from sparsetrail.checks import CHECKS, Case, sanity, validity
from sparsetrail.checks.chance import at_chance, discordant, sign_test, spearman, surely_over, surely_under
from sparsetrail.core import L0, L2, Linf, Route, Victim
from sparsetrail.snn.graphs import Scores

PAGE = (Path(__file__).parents[1] / "docs" / "findings.md").read_text()


@pytest.fixture(scope="module")
def findings():
    """What every check says of an honest victim."""
    probe = case(honest("ann"), n=4)
    return {id: look(probe) for id, look in CHECKS.items()}


def test_the_page_has_a_paragraph_for_every_check_and_no_other(findings):
    parts = re.split(r"^### ", PAGE, flags=re.M)[1:]
    asked_of_all = ["C9", "C10", "C11", "C15", "C18", "S3f", "C21"]  # by the audit itself
    assert [p.split()[0] for p in parts] == list(CHECKS) + asked_of_all
    for part, (id, look) in zip(parts, CHECKS.items(), strict=False):
        finding = findings[id]
        assert finding.id == id and part.splitlines()[0] == f"{id} {finding.name}"
        for word in ("**Raised if**", "**Why:**", "**What to do:**"):
            assert part.count(word) == 1, (id, word)
        assert look.__doc__


def test_the_page_names_the_masking_checks(findings):
    named = re.search(r"hides adversarials: ([^.]*)\. G7", PAGE)
    assert named
    assert re.split(r",\s+", named[1]) == [id for id, f in findings.items() if f.masking]


@pytest.mark.parametrize("more, less", list(itertools.product([0, 1, 3, 9], [0, 2, 7])))
def test_sign_test_is_the_binomial_tail(more, less):
    expected = binomtest(more, more + less, alternative="greater").pvalue if more + less else 1.0
    assert sign_test(more, less) == pytest.approx(expected)


@pytest.mark.parametrize(
    "k, n, share",
    [
        (0, 1, 0.1),
        (1, 1, 0.1),
        (2, 2, 0.1),
        (5, 30, 0.1),
        (30, 30, 0.25),
        (600, 2000, 0.1),
        (250, 2000, 0.1),
        (1, 3, 1),
    ],
)
def test_what_chance_holds_is_the_binomial_tail(k, n, share):
    want = binomtest(k, n, share, alternative="greater").pvalue
    assert at_chance(k, n, share) == pytest.approx(want, rel=1e-9)


def test_one_image_proves_nothing_about_the_gradient():
    """Each alone, a few of an honest victim's gradients lead down by chance; all together they do not."""
    probe = case(honest("phase"), n=30)
    down = 0
    for i in range(30):
        found = CHECKS["G5"](replace(probe, x=probe.x[i : i + 1], y=probe.y[i : i + 1]))
        down += found.value is not None and found.value < 0
        assert found.level != "fail", found.evidence
    assert down and CHECKS["G5"](probe).level == "pass"


def test_rank_correlation_with_ties():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 4, (5, 12), generator=g).float(), torch.randn(5, 12, generator=g)
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert spearman(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert spearman(torch.zeros(1, 5), torch.rand(1, 5)).tolist() == [0.0]


def test_discordant():
    a, b = torch.tensor([True, True, False, True]), torch.tensor([False, True, True, False])
    assert discordant(a, b) == (2, 1)


@pytest.mark.parametrize("share", [0.005, 0.01, 0.05, 0.1, 0.2, 0.5])
def test_no_sample_however_small_is_surely_over_or_under_a_share_more_often_than_once_in_forty(share):
    for n in (1, 2, 3, 5, 17, 32, 35, 128, 1000):
        over = [k for k in range(n + 1) if surely_over(k, n, share)]
        under = [k for k in range(n + 1) if surely_under(k, n, share)]
        assert sum(binom.pmf(over, n, share)) < 0.025 and sum(binom.pmf(under, n, share)) < 0.025
        for k in {0, 1, n // 2, n - 1, n}:
            low, high = binomtest(k, n).proportion_ci(0.95, method="exact")  # Clopper and Pearson
            assert surely_over(k, n, share) == (low > share) and surely_under(k, n, share) == (high < share)
    assert not surely_over(1, 17, 0.01) and surely_over(5, 128, 0.01) and not surely_over(0, 0, 0.5)


def linear(**changes) -> Victim:
    w = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    fields = {
        "encode": lambda x: x.unsqueeze(0).repeat(2, 1, 1, 1, 1),
        "logits": lambda u: u.mean(0).flatten(1) @ w,
        "steps": 2,
        "classes": 3,
    }
    return Victim(**(fields | changes))


def sample(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(60, 200, (n, 1, 4, 4), generator=torch.Generator().manual_seed(1)) / 255
    return x, linear().scores(x).argmax(1)


@pytest.mark.parametrize("threat", [Linf(0.05, space="pixel"), Linf(0.05, space="encoded"), L2(0.2, space="pixel"),
                                    L2(0.2, space="encoded"), L0(3, space="encoded")], ids=str)  # fmt: skip
def test_a_linear_victim_passes_under_every_threat(threat):
    x, y = sample()
    victim = linear()
    if threat.norm == "l0":  # entries are flipped: a binary code
        victim = linear(encode=lambda x: (x > 0.5).float().unsqueeze(0).repeat(2, 1, 1, 1, 1))
        y = victim.scores(x).argmax(1)
    found = [look(Case(victim, threat, x, y)) for look in CHECKS.values()]
    assert not [f for f in found if f.level in ("warn", "fail")]
    assert sum(f.level == "pass" for f in found) >= (13 if threat.norm == "l0" else 22)


def test_adversarials_are_held_to_ball_box_and_grid():
    x, y = sample()
    probe = Case(linear(), Linf(0.1, space="pixel"), x, y)
    run = attack(pgd, probe.victim, probe.threat, x, y, keep=True)
    assert validity(probe, run).level == "pass" and not all(run.robust)

    def with_points(points):
        fields = {k: getattr(run, k) for k in run.__dataclass_fields__}
        return type(run)(**(fields | {"adversarial": points}))

    broken = run.adversarial.clone()
    broken[0] = torch.nan
    broken[1] = x[1] + 0.11
    assert validity(probe, with_points(broken)).value >= 2
    faint = torch.where((torch.tensor(run.robust))[:, None, None, None], run.adversarial, x + 1e-3)
    assert "no longer fool" in validity(probe, with_points(faint)).evidence
    assert validity(probe, with_points(faint)).value == len(y) - sum(run.robust)


def test_a_victim_that_raises_fails_sanity_and_does_not_stop_the_rest():
    def logits(u):
        raise RuntimeError("the membrane has another batch size")

    probe = Case(linear(logits=logits), Linf(0.1, space="pixel"), *sample())
    found = {id: look(probe) for id, look in CHECKS.items()}
    assert found["S3"].level == "fail" and "another batch size" in found["S3"].evidence
    assert {f.level for id, f in found.items() if id.startswith(("G", "C"))} == {"not applicable"}


def test_nothing_classified_correctly_leaves_the_gradient_alone():
    x, y = sample()
    found = {id: look(Case(linear(), Linf(0.1, space="pixel"), x, (y + 1) % 3)) for id, look in CHECKS.items()}
    assert found["G1"].level == found["C3"].level == "not applicable"
    assert [f.id for f in found.values() if f.level == "fail"] == ["S9"]
    assert "0.0 % [0.0, 13.8], n=24 of the clean images classified correctly" in found["S9"].evidence


def test_fewer_right_than_by_chance_is_no_evaluation_and_as_many_is_one():
    x, y = sample()
    for right, level in ((0, "fail"), (2, "fail"), (6, "pass")):
        labels = torch.where(torch.arange(24) < right, y, (y + 1) % 3)
        found = CHECKS["S9"](Case(linear(), Linf(0.1, space="pixel"), x, labels))
        assert found.level == level and (level == "pass" or "number the classes alike" in found.advice)


class Membrane(nn.Module):
    """Its potential is a buffer, reset or not; some of its kind count what they are shown."""

    def __init__(self, resets, counts=False):
        super().__init__()
        self.fc, self.resets, self.counts = nn.Linear(16, 3), resets, counts
        self.register_buffer("v", torch.zeros(1))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long))

    def forward(self, u):
        if self.resets:
            self.v = torch.zeros(1)
        for now in u:
            self.v = (0.5 * self.v.mean() + self.fc(now.flatten(1))).detach()
        self.seen += self.counts
        return self.fc(u.mean(0).flatten(1)) + 0 * self.v


@pytest.mark.parametrize(
    ("resets", "counts", "level"), [(True, False, "pass"), (False, False, "fail"), (True, True, "warn")]
)
def test_a_membrane_that_every_call_resets_is_no_change(resets, counts, level):
    torch.manual_seed(0)
    net = Membrane(resets, counts).eval()
    x, y = sample()
    v = Victim(encode=lambda x: torch.stack([x, x]), logits=net, steps=2, classes=3, module=net)
    found = CHECKS["S2"](Case(v, Linf(0.1, space="pixel"), x, y))
    assert found.level == level


def test_no_check_leaves_the_box():
    def logits(u):
        assert bool(((u >= 0) & (u <= 1)).all()), "pixels must be in [0, 1]"
        return linear().logits(u)

    x, y = sample()
    x = x.clone()
    x[0] = 1.0
    found = [look(Case(linear(logits=logits), Linf(0.1, space="pixel"), x, y)) for look in CHECKS.values()]
    assert not [f for f in found if "pixels must be" in f.evidence]


def test_the_forward_that_differentiates_is_counted_however_it_is_written():
    from torch.autograd import grad

    base = linear()

    def by_import(u):
        v = u.detach().clone().requires_grad_()
        grad(base.logits(v).sum(), v)
        return base.logits(u)

    def by_backward(u):
        v = u.detach().clone().requires_grad_()
        base.logits(v).sum().backward()
        return base.logits(u)

    known = {}

    def by_memory(u):
        key = u.detach().numpy().tobytes()
        if key not in known:
            known[key] = by_import(u)
        return base.logits(u)

    for logits in (by_import, by_backward, by_memory):
        found = CHECKS["S10"](Case(linear(logits=logits), Linf(0.1, space="pixel"), *sample()))
        assert found.level == "fail" and found.value == 1


def test_a_step_that_is_recorded_is_no_search():
    """On a GPU a victim takes a gradient within its second forward of a size, to record it."""

    def record(fn):
        out = fn()
        return lambda: None, out

    base = linear()
    scores = Scores(base.logits, axis=1, record=record, warm=lambda fn: fn())
    found = CHECKS["S10"](Case(linear(logits=scores), Linf(0.1, space="pixel"), *sample()))
    assert any(r is not None for r in scores.made.values())
    assert found.level == "pass" and found.value == 0


def test_the_linear_self_test_notices_a_weak_attack(monkeypatch):
    def feeble(p, g, *, steps=1, step=0.0):
        p.loss(p.u0)

    probe = Case(linear(), Linf(0.1, space="pixel"), *sample())
    assert CHECKS["S11"](probe).level == "pass"
    monkeypatch.setattr(sanity, "pgd", feeble)
    assert CHECKS["S11"](probe).level == "fail"


def test_other_time_steps_are_asked_where_the_victim_can_be_rewired():
    base, weak = linear(), linear()

    def rewire(route: Route) -> Victim:
        assert route.steps in (1, 4)
        return weak

    blind = linear(logits=lambda u: base.logits(u.detach()) + 0 * u.mean(0).flatten(1)[:, :3], rewire=rewire)
    x, y = sample()
    own = CHECKS["C19"](Case(blind, Linf(0.1, space="pixel"), x, y))
    assert own.level == "warn" and "T=1" in own.evidence and "T=4" in own.evidence
    assert CHECKS["C19"](Case(linear(), Linf(0.1, space="pixel"), x, y)).level == "not applicable"


def test_batch_statistics_are_reported_and_put_back():
    victim = honest("norm")
    before = {k: v.clone() for k, v in victim.module.state_dict().items()}
    found = CHECKS["C16"](case(victim, n=32))
    assert found.level == "pass" and "batch statistics" in found.evidence
    assert not any(m.training for m in victim.module.modules())
    assert all(torch.equal(v, before[k]) for k, v in victim.module.state_dict().items())


@pytest.mark.parametrize("asked, since, moved, off", [(False, 5, 0, 24), (True, 3, 24, 0), (False, 99, 0, 0)])
def test_an_attack_of_radius_zero_that_changes_a_judgement_fails(asked, since, moved, off):
    """A victim that answers otherwise from some call on: within the attack, or between it and the clean scores."""
    base, calls = linear(), itertools.count(1)
    probe = Case(
        linear(logits=lambda u: base.logits(u) * (1 if next(calls) < since else -1)),
        Linf(0.1, space="pixel"),
        *sample(),
    )
    assert not asked or bool(probe.right.all())
    found = CHECKS["S7"](probe)
    assert (found.level, found.value) == ("fail" if moved + off else "pass", moved + off)
    assert found.evidence.startswith(f"{moved} of 24") and f"; {off} not as first scored" in found.evidence


def stood(left: int, **more):
    """A run that leaves the first of 24 images standing."""
    x, y = sample()
    run = attack(pgd, linear(), Linf(0.1, space="pixel"), x, y, steps=1)
    return replace(run, clean=(True,) * 24, robust=tuple(i < left for i in range(24)), **more)


@pytest.mark.parametrize("id, less, more, level", [
    ("C6", 4, 14, "fail"),  # the finer steps leave more
    ("C6", 4, 9, "fail"),
    ("C6", 4, 8, "pass"),  # four of four are chance
    ("C6", 14, 4, "pass"),
    ("C5", 14, 14, "pass"),
    ("C5", 14, 13, "pass"),  # one image is chance
    ("C5", 14, 12, "warn"),
    ("C5", 14, 10, "warn"),
    ("C5", 14, 9, "fail"),
    ("C5", 10, 14, "pass"),
    ("C7", 14, 13, "pass"),
    ("C7", 14, 12, "warn"),
    ("C7", 14, 10, "warn"),
    ("C7", 14, 9, "fail"),
    ("C7", 10, 14, "pass"),
])  # fmt: skip
def test_more_of_an_attack_is_held_against_less_of_it(id, less, more, level, monkeypatch):
    kinds = {"C5": ((40, 8), (80, 8)), "C6": ((20, 4), (40, 8)), "C7": ((20, 4), (20, 4, 5))}
    made = dict(zip(kinds[id], (stood(less), stood(more)), strict=True))
    monkeypatch.setattr(Case, "pgd", lambda self, steps=20, pace=4, **knobs: made[steps, pace, *knobs.values()])
    found = CHECKS[id](Case(linear(), Linf(0.1, space="pixel"), *sample()))
    assert found.level == level and found.value == ((more - less) if id == "C6" else max(0, less - more)) / 24
    wavers = CHECKS[id](Case(linear(random=True), Linf(0.1, space="pixel"), *sample()))
    sure = id == "C6" or less - more >= 5  # up to four images may be the wavering of a random victim
    assert wavers.level == (level if sure else "pass")


@pytest.mark.parametrize("count, level", [(0, "pass"), (4, "pass"), (5, "warn"), (24, "warn")])
def test_images_fooled_on_the_way_only_are_reported(count, level, monkeypatch):
    monkeypatch.setattr(Case, "pgd", lambda self, *, drop: None if drop else stood(0, silent=count))
    found = CHECKS["C8"](Case(linear(), Linf(0.1, space="pixel"), *sample()))
    assert (found.level, found.value) == (level, count / 24)


@pytest.mark.parametrize("drop", [False, True])
def test_an_image_fooled_on_the_way_and_not_at_the_end_counts_as_silent(drop):
    """Every other image is shown clean last; with `drop` a fooled one is asked nothing after it fell."""
    x, y = sample()
    back = torch.arange(24) % 2 == 0

    def leaves(p, g):
        u = p.project(p.u0 + p.ball.eps * p.steepest(p.grad(p.u0)))
        p.loss(u)
        p.loss(torch.where(p.each(back), p.u0, u))

    run = attack(leaves, linear(), Linf(0.05, space="pixel"), x, y, drop=drop)
    fell = ~torch.tensor(run.robust)
    assert 0 < int(fell.sum()) < 24 and 0 < int((fell & back).sum()) < int(fell.sum())
    assert run.silent == (None if drop else int((fell & back).sum()))


@pytest.mark.parametrize(
    "left, fallen, level, value", [("late", "early", "warn", 10 / 49), ("early", "late", "pass", 0.0)]
)
def test_an_attack_that_still_gains_has_not_converged(left, fallen, level, value, monkeypatch):
    """Of survivors whose margin rises to the end or has risen long before, in two batches; the fallen say nothing."""
    rise = {"late": torch.arange(50) / 49, "early": (torch.arange(50) / 20).clamp(max=1)}
    run = stood(9)

    def climbs(self, fn, *, best, steps, drop, **knobs):
        path = torch.stack([rise[left if held else fallen] for held in run.robust], 1)
        assert steps == 50 and not drop
        best += [*path[:, :16], *path[:, 16:]]
        return run

    monkeypatch.setattr(Case, "run", climbs)
    found = CHECKS["C4"](Case(linear(), Linf(0.1, space="pixel"), *sample()))
    assert found.level == level and found.value == pytest.approx(value) and "9 survivors" in found.evidence


def two_classes(rule) -> Victim:
    """Linear scores of two classes, whose gradient a rule bends."""
    w = torch.randn(16, generator=torch.Generator().manual_seed(2))

    def logits(u):
        z = (u if rule is None else bent(u, rule)).mean(0).flatten(1) @ w
        return torch.stack([z, -z], 1)

    return linear(logits=logits, classes=2)


def spiked(g: torch.Tensor) -> torch.Tensor:
    """All of a gradient in its largest entry, next to nothing in the others: the same change to the steepest corner."""
    flat = g.flatten(2)
    size, most = flat.abs(), flat.abs().amax(2, keepdim=True)
    return torch.where(size == most, size.sum(2, keepdim=True), 1e-6).mul(flat.sign()).view(g.shape)


@pytest.mark.parametrize("rule, level, value", [(None, "pass", 0.0), (lambda g: 1.5 * g, "pass", 0.5),
                                                (lambda g: 3 * g, "warn", 2.0), (torch.neg, "warn", 2.0),
                                                (spiked, "pass", 0.0)])  # fmt: skip
def test_a_gradient_of_another_size_than_the_loss_is_not_linear(rule, level, value):
    """Where the loss is a line the misprediction is what the gradient is bent by; in both directions, or it is none."""
    x, _ = sample()
    victim = two_classes(rule)
    found = CHECKS["G6"](Case(victim, Linf(0.05, space="pixel"), x, victim.scores(x).argmax(1)))
    assert found.level == level and found.value == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("lead, level, value", [(2.0, "pass", 0.125), (1.0, "pass", 0.25), (0.25, "warn", 0.75),
                                                (0.05, "warn", 0.95)])  # fmt: skip
def test_scores_that_noise_overturns_are_not_stable(lead, level, value):
    """One pixel `lead` radii above a half: noise of half a radius changes the margin by |noise| / lead, at most 1."""
    victim = linear(logits=lambda u: torch.stack([u[0].flatten(1)[:, 0], 1 - u[0].flatten(1)[:, 0]], 1), classes=2)
    x = torch.full((24, 1, 1, 1), 0.5 + 0.1 * lead)
    found = CHECKS["G8"](Case(victim, Linf(0.1, space="pixel"), x, torch.zeros(24, dtype=torch.long)))
    assert found.level == level and found.value == pytest.approx(value, abs=0.04)
