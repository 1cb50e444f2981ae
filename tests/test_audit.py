"""The audit: the worst case per image, its resumption, the last judgement, and the rules of the verdict."""

import contextlib
import inspect
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from frauds import FRAUDS, case, hard_labels, honest, rejecting
from lively import lively

from sparsetrail.attacks import attack, pgd
from sparsetrail.auditing import (
    Forgetful,
    Stage,
    audit,
    battery,
    fingerprint,
    join,
    judge,
    reaches_code,
    run,
    verify,
    wavers,
    work,
)  # fmt: skip
from sparsetrail.auditing.kept import contradiction
from sparsetrail.auditing.verdict import battery_findings
from sparsetrail.cli import main
from sparsetrail.core import L0, L2, Audit, Finding, Linf, Rate, Run, Streams, Victim, margin
from sparsetrail.data import load as load_images
from sparsetrail.data import pixels, take
from sparsetrail.recipes.audits import sentence, verify_again
from sparsetrail.recipes.cells import Cells
from sparsetrail.recipes.measure import Bench
from sparsetrail.recipes.targets import target_at
from sparsetrail.report import audits, unpack
from sparsetrail.report.labels import route_of
from sparsetrail.snn.encode import phase, poisson
from sparsetrail.snn.net import NetSpec, victim
from sparsetrail.trails import trail

EPS = 8 / 255


@pytest.fixture(scope="module")
def snn():
    x = torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    net = lively(NetSpec(width=0.125, steps=4), phase(steps=4)(x))
    v = victim(net, phase(steps=4), name="snn")
    with torch.no_grad():
        y = v.scores(x).argmax(1)
    return v, x, y


@pytest.fixture
def brief(monkeypatch):
    """A few checks and no curves: these tests are about the battery."""
    some = {k: run.CHECKS[k] for k in ("S0", "S4", "G1", "G3", "C1")}
    monkeypatch.setattr(run, "CHECKS", some)
    monkeypatch.setattr(work.Work, "curves", lambda self, gradient: {})


@pytest.fixture
def unplotted(monkeypatch):
    monkeypatch.setattr(work.Work, "curves", lambda self, gradient: {})


def line(scale=1.0, n=64):
    """A classifier of one pixel: right while the pixel is above a half; images from just above to far above."""
    v = Victim(
        encode=lambda x: x[None],
        logits=lambda u: scale * torch.stack([u[0].flatten(1).sum(1), 1 - u[0].flatten(1).sum(1)], 1),
        steps=1,
        classes=2,
        name="line",
    )
    x = ((128 + torch.arange(n)).float() / 255).view(-1, 1, 1, 1)
    return v, x, torch.zeros(n, dtype=torch.long)


def test_the_worst_case_of_a_line_is_exact():
    v, x, y = line()
    told: list[tuple] = []
    say = lambda *what: told.append(what)  # noqa: E731
    found, points = audit(v, Linf(EPS, space="pixel"), x, y, budget="quick", batch=7, say=say)
    falls = (x.flatten() * 255).round() - 8 < 127.5  # grey levels: strictly below a half after eight steps
    assert list(found.worst) == (~falls).tolist() and all(found.clean)
    assert found.default == found.worst and set(points) == {i for i in range(64) if falls[i]}
    assert found.verdict == "inconclusive" and "too few" in found.reason  # 64 images
    assert found.accuracy == Rate(64 - int(falls.sum()), 64)
    assert all((b is None) == w for b, w in zip(found.broken_by, found.worst, strict=True))
    assert sum(r.n for r in found.runs[:1]) == 64 and found.runs[1].n == sum(found.worst)  # survivors only
    assert [f.id for f in found.findings if f.level == "fail"] == []
    parts = list(dict.fromkeys(task for task, *_ in told))
    assert parts[0] == "checks" and parts[-1] == "curves" and told[-1][1] == told[-1][2] > 10  # nothing is silent


def test_every_fall_is_told_of_the_attack_it_fell_to_and_the_first_attack_is_the_default(brief, monkeypatch):
    """One random point, then FGSM: whom each of them takes of a line is known beforehand."""
    v, x, y = line()
    stages = [
        Stage(label="dice", attack="noise", kind="default", knobs={"draws": 1}),
        Stage(label="sign", attack="fgsm", kind="gradient", knobs={}),
    ]
    monkeypatch.setattr(run, "battery", lambda *a, **k: stages)
    found, points = audit(v, Linf(16 / 255, space="pixel"), x, y, budget="quick", batch=7)
    level, draw = 255 * x.flatten(), Streams(0, range(64)).uniform(x, 0).flatten()
    dice, sign = (level + 16 * draw).round() < 128, (level - 16).round() < 128
    assert 0 < dice.sum() < sign.sum() == 16
    assert found.default == tuple((~dice).tolist()) and found.worst == tuple((~sign).tolist())
    assert found.broken_by == tuple("dice" if d else "sign" if s else None for d, s in zip(dice, sign, strict=True))
    assert set(points) == set(sign.nonzero().flatten().tolist())
    assert [r.n for r in found.runs] == [64, 64 - int(dice.sum())] and found.default_attack == "dice"
    assert found.verdict == "overstated" and "too weak" in found.reason


def test_the_curves_of_a_line_are_exact(monkeypatch):
    v, x, y = line()
    monkeypatch.setattr(run, "CHECKS", {k: run.CHECKS[k] for k in ("S0", "G3")})
    monkeypatch.setattr(run, "battery", lambda *a, **k: battery(*a, **k)[:1])
    found, _ = audit(v, Linf(EPS, space="pixel"), x, y, budget="quick")
    loss, radius = found.curves["loss"], found.curves["eps"]
    levels = [0, 1, 2, 4, 8, 16, 32, 64, 128, 255]
    assert radius["n"] == 32 and radius["eps"] == [k / 255 for k in levels]
    assert radius["accuracy"] == [max(0, 32 - k) / 32 for k in levels]
    assert [c["label"] for c in loss] == ["pgd", "sapgd", "apgd"]
    lowest = float(1 - 2 * (x[:32] - EPS).mean())
    assert all(max(c["mean"]) == pytest.approx(lowest, abs=1e-5) for c in loss)
    assert all(c["mean"][0] < lowest and c["steps"] == list(range(len(c["mean"]))) for c in loss)


def constant(u):
    """Scores of one class, whatever is shown."""
    return u[0].flatten(1).sum(1, keepdim=True) * 0 + torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(
    "grey, logits, level, left", [(40, constant, "warn", 1.0), (40, None, "pass", 0.0), (8, None, "warn", 0.75)]
)
def test_an_undefended_control_must_fall(grey, logits, level, left, brief, tmp_path):
    """To the same attacks as the victim, whose parts are not its own."""
    v, x, y = line(n=32)
    control = replace(v, logits=logits or v.logits)
    found, _ = audit(v, Linf(grey / 255, space="pixel"), x, y, budget="quick", control=control, store=Cells(tmp_path))
    (c18,) = (f for f in found.findings if f.id == "C18")
    assert (c18.level, c18.value) == (level, left) and not c18.masking and bool(c18.advice) == (level == "warn")
    alone, _ = audit(v, Linf(grey / 255, space="pixel"), x, y, budget="quick", store=Cells(tmp_path))
    assert {f.id: f.level for f in alone.findings}["C18"] == "not applicable" and found.worst == alone.worst


def test_it_does_not_depend_on_batch_size(snn, brief):
    v, x, y = snn
    a, p = audit(v, Linf(1 / 255, space="pixel"), x, y, budget="quick", batch=12)
    b, q = audit(v, Linf(1 / 255, space="pixel"), x, y, budget="quick", batch=5)
    assert a.worst == b.worst and a.default == b.default and a.broken_by == b.broken_by
    assert set(p) == set(q) and all(torch.equal(p[j], q[j]) for j in p)


@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_a_stopped_audit_goes_on_where_it_was(snn, space, tmp_path, brief, monkeypatch):
    """Stopped after every few parts, again and again, it ends as the one that was never stopped."""
    monkeypatch.setattr(run, "battery", lambda *a, **k: battery(*a, **k)[::3])
    v, x, y = snn
    threat = Linf(1 / 255 if space == "pixel" else 0.002, space=space)
    whole, points = audit(v, threat, x, y, budget="quick", batch=5)
    store, stops, done = Cells(tmp_path / "cells"), 0, None
    while done is None:
        left = iter([False] * 3)
        try:
            done = audit(v, threat, x, y, budget="quick", batch=5, store=store, stop=lambda left=left: next(left, True))
        except KeyboardInterrupt:
            stops += 1
    found, again = done
    assert stops >= 2
    assert found.worst == whole.worst and found.broken_by == whole.broken_by and found.verdict == whole.verdict
    assert [r.attack for r in found.runs] == [r.attack for r in whole.runs]
    assert set(again) == set(points) and all(torch.equal(again[j], points[j]) for j in points)


def test_a_stopped_audit_of_a_random_code_goes_on_with_the_draws_of_the_whole(snn, tmp_path, brief, monkeypatch):
    """What a part draws depends on the part, not on which parts before it were kept."""
    monkeypatch.setattr(run, "battery", lambda *a, **k: battery(*a, **k)[::6])
    _, x, y = snn
    net = lively(NetSpec(width=0.125, steps=4), poisson(steps=4)(x))

    def fresh():
        return victim(net, poisson(steps=4, seed=3), name="random")

    def once(**more):
        return audit(fresh(), Linf(EPS, space="pixel"), x, y, budget="quick", batch=5, eot=2, fresh=fresh, **more)

    with torch.no_grad():
        y = fresh().scores(x).argmax(1)
    whole, _ = once()
    store, stops, done = Cells(tmp_path / "cells"), 0, None
    while done is None:
        left = iter([False] * 4)
        try:
            done = once(store=store, stop=lambda left=left: next(left, True))
        except KeyboardInterrupt:
            stops += 1
    kept = len(list((tmp_path / "cells").glob("*.json")))
    again = once(store=store, stop=lambda: True)  # everything is there
    assert stops >= 2 and len(list((tmp_path / "cells").glob("*.json"))) == kept
    for found, _ in (done, again):
        assert (found.clean, found.worst, found.broken_by) == (whole.clean, whole.worst, whole.broken_by)


def test_findings_of_a_random_code_do_not_depend_on_where_the_audit_was_stopped(tmp_path, unplotted, monkeypatch):
    """Checks share scores, gradients and runs: what these draw must not depend on which check asked first."""
    probe = case(honest("direct"), n=6)
    monkeypatch.setattr(
        run, "CHECKS", {k: run.CHECKS[k] for k in ("S0", "S3", "S5", "G3", "G5", "G6", "G7", "C1", "C6")}
    )

    def fresh():
        code = poisson(steps=4, seed=3)
        return replace(honest("direct"), encode=code, random=True, reseed=code.reseed)

    def once(**more):
        return audit(fresh(), probe.threat, probe.x, probe.y, budget="quick", eot=2, fresh=fresh, **more)[0]

    whole, store = once(), Cells(tmp_path)
    for parts in (2, 5):
        left = iter([False] * parts)
        with pytest.raises(KeyboardInterrupt):
            once(store=store, stop=lambda left=left: next(left, True))
    assert once(store=store).findings == whole.findings
    assert {f.level for f in whole.findings if f.id in ("S3", "S5", "G5")} <= {"pass", "warn"}


def test_parts_are_not_taken_from_another_victim_or_threat(snn, tmp_path, brief):
    v, x, y = snn
    store = Cells(tmp_path)
    threat = Linf(1 / 255, space="pixel")
    a, _ = audit(v, threat, x, y, budget="quick", store=store, identity="a")
    count = len(list(tmp_path.glob("*.json")))
    audit(v, threat, x, y, budget="quick", store=store, identity="a")
    assert len(list(tmp_path.glob("*.json"))) == count
    audit(v, Linf(2 / 255, space="pixel"), x, y, budget="quick", store=store, identity="a")
    more = len(list(tmp_path.glob("*.json")))
    audit(v, threat, x, y, budget="quick", store=store, identity="b")
    assert count < more < len(list(tmp_path.glob("*.json")))
    next(iter(tmp_path.glob("*.json"))).write_text("{}")
    with pytest.raises(ValueError, match="expected a cell"):
        audit(v, threat, x, y, budget="quick", store=store, identity="a")
        audit(v, threat, x, y, budget="quick", store=store, identity="b")
        audit(v, Linf(2 / 255, space="pixel"), x, y, budget="quick", store=store, identity="a")


def test_every_part_is_made_anew_for_another_seed_eot_version_or_route(tmp_path, brief, monkeypatch):
    v, x, y = line(n=16)
    monkeypatch.setattr(run, "battery", lambda *a, **k: battery(*a, **k)[:3])

    def parts(v=v, **more):
        audit(v, Linf(EPS, space="pixel"), x, y, budget="quick", store=Cells(tmp_path), identity="a", **more)
        return len(list(tmp_path.glob("*.json")))

    once = parts()
    assert parts() == once == 5 + 3
    assert [parts(seed=1), parts(eot=2), parts(replace(v, route="another"))] == [2 * once, 3 * once, 4 * once]
    monkeypatch.setattr(work, "__version__", "0.0.0")
    assert parts() == 5 * once


def test_an_adversarial_that_does_not_hold_is_taken_back():
    v, x, y = line(n=32)
    threat = Linf(EPS, space="pixel")
    good = {0: (x[0] - 8 / 255), 5: x[5] - 8 / 255}
    assert verify(v, threat, x, y, good) == {}
    bad = {
        0: x[0] - 9 / 255, 1: x[1] * math.nan, 2: x[2] - 5.5 / 255, 3: x[3].clone(), 31: x[31] - 8 / 255,
    }  # fmt: skip
    assert verify(v, threat, x, y, bad) == {
        0: "outside ball or box", 1: "not finite", 2: "off the grey levels", 3: "not adversarial",
        31: "not adversarial",
    }  # fmt: skip
    robust = Victim(encode=v.encode, logits=lambda u: v.logits(u) * 0 + torch.tensor([1.0, 0.0]), steps=1, classes=2)
    found, points = audit(v, threat, x, y, budget="quick", fresh=lambda: robust)
    s6 = next(f for f in found.findings if f.id == "S6")
    assert s6.level == "fail" and "not adversarial" in s6.evidence
    assert all(found.worst) and not points and found.verdict == "inconclusive"


def finding(id, level, masking=False):
    return Finding(id=id, name=id, level=level, value=None, limit="", evidence="", masking=masking)


def test_the_verdict_follows_its_rules():
    n, yes = 400, [True] * 400
    default = [i < 200 for i in range(n)]
    calm = [finding("S3", "pass"), finding("G1", "pass", True)]

    def verdict(findings=calm, worst=default, claim=None, complete=True, clean=yes, default=default):
        return judge(findings, default, worst, clean, claim, complete)[0]

    assert verdict() == "supported"
    assert verdict([*calm, finding("S3", "fail")]) == "inconclusive"
    assert verdict([*calm, finding("G1", "fail", True)]) == "masked"
    assert verdict([*calm, finding("G1", "fail", True), finding("S3", "fail")]) == "inconclusive"
    assert verdict([*calm, finding("C15", "fail")]) == "supported"  # a weak attack is no masking by itself
    fell = [i < 150 for i in range(n)]
    assert verdict(worst=fell) == "overstated" and verdict(worst=[i < 197 for i in range(n)]) == "supported"
    assert verdict(worst=[i < 194 for i in range(n)]) == "overstated"  # six of 400, all in one direction
    assert verdict(worst=fell, complete=False) == "overstated"  # more attacks cannot raise it again
    assert verdict(complete=False) == "inconclusive"
    assert verdict(claim=0.5) == "supported" and verdict(claim=0.52) == "supported"  # within chance of 400 images
    assert verdict(claim=0.6) == "overstated" and verdict(worst=fell, claim=0.37) == "supported"
    assert judge(calm, default, default, yes, None, True, "quick")[0] == "inconclusive"
    assert judge(calm, default, fell, yes, None, True, "quick")[0] == "overstated"
    assert verdict(claim=0.9, clean=[i < 300 for i in range(n)]) == "overstated"  # 75 % are right at all
    few = [True] * 50
    assert verdict(worst=few, default=few, clean=few) == "inconclusive"
    none = [False] * n
    assert verdict(worst=none, default=none, clean=none) == "inconclusive"
    most = [i < 300 for i in range(n)]
    assert verdict(claim=0.77, default=most, worst=most, clean=most) == "supported"  # 75 % are right, within chance


def test_a_masked_verdict_tells_of_a_gap_only_where_there_is_one():
    default, fell = ([i < k for i in range(400)] for k in (200, 198))
    rang = [finding("G4", "fail", True)]
    same, lower = (judge(rang, default, worst, [True] * 400, None, True) for worst in (default, fell))
    assert same[0] == lower[0] == "masked"
    assert all("a gradient hides adversarials" in why and ": G4 (G4); " in why for _, why in (same, lower))
    assert "no attack found more than the default: 50.0 %" in same[1] and "points below" not in same[1]
    assert "49.5 % [44.6, 54.4], n=400, is 0.5 points below the default attack's 50.0 %" in lower[1]


@pytest.mark.parametrize("n, before, lost, claim, tied, expected", [
    (1000, 500, 6, None, 0, "supported"),  # surely lower, by less than a point
    (1000, 500, 10, None, 0, "supported"),
    (1000, 500, 11, None, 0, "overstated"),
    (100, 50, 2, None, 0, "supported"),  # two points, which chance may be
    (100, 50, 4, None, 0, "supported"),
    (100, 50, 5, None, 0, "overstated"),
    (10_000, 4910, 0, 0.5, 0, "supported"),  # surely lower, by less than a point
    (10_000, 4890, 0, 0.5, 0, "overstated"),
    (100, 47, 0, 0.5, 0, "supported"),
    (100, 40, 0, 0.5, 0, "overstated"),
    (400, 200, 0, None, 3, "supported"),  # three ties, below a point
    (100, 50, 0, None, 2, "supported"),  # two of them, above it
    (250, 125, 0, None, 3, "inconclusive"),
])  # fmt: skip
def test_a_verdict_takes_more_than_a_point_and_more_than_chance(n, before, lost, claim, tied, expected):
    default, worst = ([i < k for i in range(n)] for k in (before, before - lost))
    findings = [finding("S3", "pass"), finding("G1", "pass", True)]
    verdict, why = judge(findings, default, worst, [True] * n, claim, True, "standard", range(tied))
    assert verdict == expected, why


def made(n):
    """A run on so many images."""
    return Run(
        attack="pgd", knobs={}, threat=Linf(EPS, space="pixel"), victim="v", route="", mode="eval", data="", seed=0,
        clean=(True,) * n, robust=(True,) * n, ties=0, forwards=0, backwards=0, zero_gradient=None, dead_examples=0,
        nonfinite=0, trace=(), seconds=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("kind, id", [("route", "C9"), ("code", "C15"), ("transfer", "C10"), ("black box", "C11")])
@pytest.mark.parametrize("n, left, fell, route, other, hides", [
    (1000, 900, 0, "pass", "pass", False),
    (1000, 900, 2, "pass", "pass", False),
    (1000, 900, 3, "pass", "warn", False),
    (1000, 900, 10, "pass", "warn", False),
    (1000, 900, 11, "warn", "fail", False),  # of 900 left to it no sign of a masked gradient
    (1000, 900, 50, "warn", "fail", False),
    (1000, 900, 51, "fail", "fail", False),
    (1000, 20, 8, "pass", "warn", False),
    (1000, 20, 9, "pass", "warn", True),  # of 20 left surely more than a fifth
    (1000, 60, 60, "fail", "fail", True),
    (1000, 3, 3, "pass", "warn", True),
    (1000, 2, 2, "pass", "pass", False),  # two are chance
    (20, 2, 2, "warn", "warn", False),
])  # fmt: skip
def test_what_a_kind_of_attack_takes_beyond_the_ones_before_it(kind, id, n, left, fell, route, other, hides):
    """Masking is told of transfer and black box alone, where they surely take over a fifth of those left to them."""
    stages = [
        Stage(label=label, attack="pgd", kind=k, knobs={})
        for label, k in (("first", "default"), ("one", kind), ("two", kind), ("rest", "noise"))
    ]
    two = fell // 2
    broken_by = ["first"] * (n - left) + ["one"] * (fell - two) + ["two"] * two + [None] * (left - fell)
    runs = [made(n), made(left), made(left - fell + two)]
    found = {f.id: f for f in battery_findings(broken_by, runs, stages)}
    masked = hides and kind in ("transfer", "black box")
    level = "fail" if masked else route if kind == "route" else other
    assert (found[id].level, found[id].masking, found[id].value) == (level, masked, fell / n)
    assert f"{fell} of the {left} images" in found[id].evidence and bool(found[id].advice) == (level != "pass")
    assert [f.level for f in found.values() if f.id != id] == ["not applicable"] * 3
    assert {f.level for f in battery_findings([None] * n, runs[:1], stages)} == {"not applicable"}
    said = judge(list(found.values()), [True] * 400, [True] * 400, [True] * 400, None, True)[0]
    assert said == ("masked" if masked else "supported")


def test_ties_and_a_blind_gradient_support_nothing():
    n, yes = 400, [True] * 400
    default = [i < 200 for i in range(n)]
    calm = [finding("S3", "pass"), finding("G5", "pass", True)]

    def verdict(tied=(), findings=calm, claim=None):
        return judge(findings, default, default, yes, claim, True, "standard", tied)

    assert verdict()[0] == verdict(range(2))[0] == verdict(range(200, 400))[0] == "supported"  # fell to another attack
    for claim in (None, 0.5):
        said = verdict(range(6), claim=claim)
        assert said[0] == "inconclusive" and "6 images stand by a tie" in said[1] and "48.5 %" in said[1]
        assert verdict(findings=[finding("G5", "warn", True)], claim=claim)[0] == "inconclusive"


def remembering():
    """Answers what lies near an image it has seen by the scores of that image; the gradient stays live."""
    base, seen = honest("ann"), []

    def logits(u):
        z, out = base.logits(u), []
        for i in range(u.shape[1]):
            near = next((s for v, s in seen if (u[:, i] - v).abs().max() <= 0.15), None)
            if near is None:
                seen.append((u[:, i].detach(), z[i].detach()))
            out.append(z[i] if near is None else near + 0 * z[i])
        return torch.stack(out)

    return replace(base, logits=logits, module=None)


def test_a_victim_that_remembers_what_it_was_shown_supports_nothing(brief):
    probe = case(honest("ann"), n=24)

    def s3f(**more):
        found, _ = audit(probe.victim if not more else more.pop("of"), probe.threat, probe.x, probe.y,
                         budget="quick", **more)  # fmt: skip
        return next(f for f in found.findings if f.id == "S3f"), found.verdict, found.reason

    told, verdict, reason = s3f(of=remembering(), fresh=remembering)
    assert told.level == "fail" and verdict == "inconclusive" and "S3f" in reason
    assert s3f(of=honest("ann"), fresh=lambda: honest("ann"))[0].level == "pass"
    assert s3f()[0].level == "not applicable"


def drawing(base):
    """The same with a little noise in its scores."""
    return replace(base, logits=lambda u: base.logits(u) + 1e-3 * torch.randn(u.shape[1], base.classes), random=True)


@pytest.mark.parametrize("build, level", [(remembering, "fail"), (lambda: honest("ann"), "pass")])
def test_a_victim_that_draws_noise_is_asked_what_it_remembers(build, level, brief):
    probe = case(drawing(build()), n=24)
    found, _ = audit(
        probe.victim, probe.threat, probe.x, probe.y, budget="quick", eot=1, fresh=lambda: drawing(build())
    )
    told = {f.id: f for f in found.findings}["S3f"]
    assert told.level == level and ("S3f" in found.reason) == (level == "fail"), told


def test_a_supported_victim_says_what_was_not_asked_where_it_could_not_be_made_anew(brief, monkeypatch):
    v, x, y = line(n=128)
    monkeypatch.setattr(run, "battery", lambda *a, **k: battery(*a, **k)[:1])
    found, _ = audit(v, Linf(EPS, space="pixel"), x, y)
    assert found.verdict == "supported" and "not asked (S3f): no victim made anew was given" in found.reason
    found, _ = audit(v, Linf(EPS, space="pixel"), x, y, fresh=lambda: line()[0])
    assert found.verdict == "supported" and "S3f" not in found.reason


HELPER = """
import torch

W = torch.randn(784, 10, generator=torch.Generator().manual_seed(0))
SEEN = []


def scores(u):
    z, out = u[0].flatten(1) @ W, []
    for v, s in zip(u[0], z):
        near = next((t for w, t in SEEN if (v - w).abs().max() <= 0.15), None)
        if near is None:
            SEEN.append((v.detach(), s.detach()))
        out.append(s if near is None else near + 0 * s)
    return torch.stack(out)
"""
BESIDE = """
import sys

if {folder!r} != "":  # modules beside the file are found without
    sys.path.insert(0, {folder!r})
import torch
from sparsetrail import Victim

{early}


def mine():
    def logits(u):
        {late}
        return helper_of_mine.scores(u)

    return Victim(encode=lambda x: x[None], logits=logits, steps=1, classes=10)
"""


@pytest.mark.parametrize("folder", ["", "elsewhere"])
@pytest.mark.parametrize("early", [True, False])
def test_what_a_module_beside_the_victim_remembers_is_found(folder, early, tmp_path, brief, monkeypatch):
    """Imported by the file or not before it is called, from the folder of the file or from another."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (place := tmp_path / folder).mkdir(exist_ok=True)
    (home := tmp_path / "home").mkdir()
    file = (home if folder else tmp_path) / "victim_of_mine.py"
    (place / "helper_of_mine.py").write_text(HELPER)
    words = {True: "import helper_of_mine", False: "pass"}
    file.write_text(BESIDE.format(folder=folder and str(place), early=words[early], late=words[not early]))
    what = target_at(f"{file}:mine")
    probe = case(honest("ann"), n=24)
    numbers = sys.modules["numpy"]
    x = probe.x[:, :1]
    victim = what.make()
    x = torch.nn.functional.interpolate(x, (28, 28)).mul(255).round() / 255
    with torch.no_grad():
        y = victim.scores(x).argmax(1)
    found, _ = audit(victim, Linf(EPS, space="pixel"), x, y, budget="quick", fresh=what.make)
    told = {f.id: f.level for f in found.findings}
    assert told["S3f"] == "fail" and found.verdict == "inconclusive"
    assert sys.modules["numpy"] is numbers and sys.modules["sparsetrail.auditing.run"] is run
    sys.modules.pop("helper_of_mine", None)


def test_a_random_victim_whose_adversarials_mostly_do_not_hold_is_not_sound(brief):
    v, x, y = line(n=32)
    noisy = replace(v, random=True)
    robust = replace(noisy, logits=lambda u: v.logits(u) * 0 + torch.tensor([1.0, 0.0]))
    found, points = audit(noisy, Linf(EPS, space="pixel"), x, y, budget="quick", eot=1, fresh=lambda: robust)
    s6 = next(f for f in found.findings if f.id == "S6")
    assert s6.level == "fail" and found.verdict == "inconclusive" and not points
    held = dict.fromkeys(range(6), "not adversarial")
    assert wavers(noisy, held, 12) and not wavers(noisy, held, 6) and not wavers(v, held, 12)
    assert not wavers(noisy, {}, 8)
    assert not wavers(noisy, held | {6: "outside ball or box"}, 80)
    far = {0: x[0] - 60 / 255}
    assert verify(noisy, Linf(EPS, space="pixel"), x, y, far) == {0: "outside ball or box"}


def test_page_and_ledger_of_a_victim_that_draws_noise_agree(brief):
    """Images near the boundary lose votes by chance, clean ones and adversarials: all figures count the same falls."""
    v, x, y = line(n=64)

    def fresh():
        g = torch.Generator()

        def logits(u):
            return v.logits(u) + 0.04 * torch.randn(u.shape[1], 2, generator=g)

        return replace(v, logits=logits, random=True, reseed=lambda key: g.manual_seed(key))

    found, points = audit(fresh(), Linf(EPS, space="pixel"), x, y, budget="quick", eot=2, fresh=fresh)
    made = audits.steps(found)
    assert any(not all(r.clean) for r in found.runs), "some image loses the vote of a run while it is clean"
    assert [s.broken for s in made] == [sum(b == r.attack for b in found.broken_by) for r in found.runs]
    assert made[0].left == found.default_accuracy and made[-1].left == found.accuracy
    assert set(points) == {j for j, b in enumerate(found.broken_by) if b is not None}
    standing = sum(found.clean)
    for r in found.runs:  # what a second vote does not hold is met again
        assert r.n == standing
        standing -= sum(right and not held for right, held in zip(r.clean, r.robust, strict=True))
    assert standing + audits.taken_back(found) == found.accuracy.k and contradiction(found, fresh()) == ""


def test_a_random_victim_is_known_by_its_weights_or_not_at_all():
    torch.manual_seed(0)
    net, x = torch.nn.Linear(16, 3), torch.rand(4, 1, 4, 4)
    v = Victim(encode=lambda x: (x + 0.1 * torch.rand_like(x)).flatten(1)[None], logits=lambda u: net(u[0]), steps=1,
               classes=3, random=True)  # fmt: skip
    assert fingerprint(v, x) != fingerprint(v, x)
    known = replace(v, module=net)
    before = fingerprint(known, x)
    assert fingerprint(known, x) == before
    with torch.no_grad():
        net.weight[0, 0] += 1
    assert fingerprint(known, x) != before


def test_a_victim_that_raises_is_told_from_a_bug_of_ours(brief):
    base, kept = honest("ann"), []

    def logits(u):
        kept.append(base.logits(u))
        return kept[0] + kept[-1]  # state of the first batch: the last one is smaller

    probe = case(replace(base, logits=logits), n=20)
    with pytest.raises(ValueError, match=r"got RuntimeError.*sparsetrail\.stateful") as raised:
        audit(probe.victim, probe.threat, probe.x, probe.y, budget="quick", batch=8)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_no_further_attack_is_begun_after_the_time(snn, brief):
    v, x, y = snn
    found, _ = audit(v, Linf(1 / 255, space="pixel"), x, y, budget="quick", minutes=0)
    assert not found.complete and found.verdict == "inconclusive"
    (run,) = found.runs  # a figure of the default attack is that of an attack that ran
    assert run.attack == found.default_attack and tuple(found.default) == run.robust


def test_what_is_not_fit_is_refused_before_anything_runs(snn):
    v, x, y = snn
    with pytest.raises(ValueError, match=r"write 0\.45"):
        audit(v, Linf(EPS, space="pixel"), x, y, claim=45.0)
    with pytest.raises(ValueError, match="nothing to audit"):
        audit(v, Linf(0, space="pixel"), x, y)


def test_images_labels_and_codebooks_that_do_not_fit_are_refused(snn):
    v, x, y = snn
    ball = Linf(EPS, space="pixel")
    for images, match in (
        (255 * x, "divide 8-bit images by 255"),
        (2 * x - 1, "0..1, got -1"),
        (x.double(), "expected float32 pixels"),
    ):
        with pytest.raises(ValueError, match=match):
            audit(v, ball, images, y)
    with pytest.raises(ValueError, match=r"labels \[n\], n > 0, got .* and \(12, 10\)"):
        audit(v, ball, x, torch.nn.functional.one_hot(y, 10))
    book = v.codebook
    for wrong in (book.flip(1), book.flip(0), book[:, :2]):
        with pytest.raises(ValueError, match=r"expected codebook \[256 4\], the code of every grey level") as told:
            audit(replace(v, codebook=wrong), ball, x, y)
        assert ("one of (256, 2)" if wrong.shape[1] == 2 else "where encode gives") in str(told.value)


def flipped(gradient):
    """An event classifier whose gradient points where it is told; scores are smooth, so flips by score find the way."""
    w = torch.randn(2 * 400, 3, generator=torch.Generator().manual_seed(0))

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            return u.clone()

        @staticmethod
        def backward(ctx, g):
            return gradient * g

    v = Victim(encode=lambda x: torch.stack([x, x]), steps=2, classes=3, name="events",
               logits=lambda u: Turned.apply(u).movedim(1, 0).flatten(1).tanh() @ w)  # fmt: skip
    x = torch.randint(0, 2, (110, 1, 20, 20), generator=torch.Generator().manual_seed(1)).float()
    return v, x, v.scores(x).argmax(1)


@pytest.mark.parametrize(("gradient", "verdict"), [(1, "supported"), (-1, "masked")])
def test_under_l0_a_gradient_that_leads_nowhere_is_found_by_flips_that_ask_for_scores(gradient, verdict, unplotted):
    v, x, y = flipped(gradient)
    found, _ = audit(v, L0(8, space="encoded"), x, y, budget="standard", fresh=lambda: v)
    assert found.verdict == verdict and any("sparse_rs" in r.attack for r in found.runs)
    assert found.accuracy.value < 0.9


def test_settings_that_audit_nothing_are_refused(snn):
    v, x, y = snn
    pixel = Linf(EPS, space="pixel")
    for knobs, text in (
        ({"batch": 0}, "one image a batch"), ({"eot": 0}, "one gradient a step"), ({"minutes": -1.0}, "0 or more"),
        ({"indices": [1]}, "indices: expected one an image"), ({"guides": [replace(v, classes=5)]}, "cannot lead"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            audit(v, pixel, x, y, budget="quick", **knobs)
    with pytest.raises(ValueError, match="holds no other 8-bit image"):
        audit(v, Linf(0.5 / 255, space="pixel"), x, y, budget="quick")
    mixed = x.clone()
    mixed[0] *= 0.999
    with pytest.raises(ValueError, match="256 grey levels or none"):
        audit(v, pixel, mixed, y, budget="quick")
    with pytest.raises(ValueError, match="labels"):
        audit(v, pixel, x, y + 8, budget="quick")


def test_a_victim_of_one_name_is_not_another(snn):
    v, x, _ = snn
    other = replace(v, logits=lambda u: -v.logits(u), shortcut=None)
    assert fingerprint(v, x) == fingerprint(replace(v), x) != fingerprint(other, x)
    turned = replace(v, shortcut=lambda x: 2 * v.scores(x).detach() - v.scores(x))  # the same scores, downhill
    assert torch.equal(turned.scores(x), v.scores(x)) and fingerprint(turned, x) != fingerprint(v, x)
    assert fingerprint(replace(v, shortcut=lambda x: v.scores(x).detach()), x) not in map(
        fingerprint, (v, turned), (x, x)
    )


def test_a_broken_evaluation_stops_the_battery(snn, brief):
    v, x, y = snn
    g = torch.Generator().manual_seed(0)
    loose = replace(
        v, logits=lambda u: v.logits(u) + torch.rand(u.shape[1], 10, generator=g) * 1e-2, shortcut=None, rewire=None
    )
    found, _ = audit(loose, Linf(EPS, space="pixel"), x, y, budget="quick")
    assert found.verdict == "inconclusive" and "S4" in found.reason and len(found.runs) == 1 and not found.complete


def test_the_battery_asks_only_what_the_victim_allows(snn):
    v, x, y = snn
    pixel = [s.attack for s in battery(v, Linf(EPS, space="pixel"))]
    encoded = [s.attack for s in battery(v, Linf(EPS, space="encoded"))]
    assert "codebook" in pixel and "codebook" not in encoded
    plain = replace(v, rewire=None, codebook=None)
    assert all(not s.routes for s in battery(plain, Linf(EPS, space="pixel")))
    blind = battery(v, Linf(EPS, space="pixel"), gradient=False)
    assert {s.kind for s in blind} == {"black box", "noise"} and "rays" in {s.attack for s in blind}
    behind = battery(v, Linf(EPS, space="pixel"), gradient=False, code=True)
    assert [s.attack for s in behind if s not in blind] == ["codebook", "codebook"] and behind[2:] == blind
    assert "rays" not in pixel + encoded
    sizes = [len(battery(v, Linf(EPS, space="pixel"), b)) for b in ("quick", "standard", "thorough")]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    labels = [s.label for s in battery(v, Linf(EPS, space="pixel"), "thorough", guides=[plain])]
    assert len(set(labels)) == len(labels) and any("from snn" in s for s in labels)
    for space in ("pixel", "encoded"):  # all four of AutoAttack, as long as there
        whole = battery(v, Linf(EPS, space=space), "thorough")
        found = [(s.attack, s.knobs, s.calls) for s in whole if s.attack in ("apgd", "fab", "square")]
        assert found == [
            ("apgd", {"steps": 200, "loss": "ce"}, 200),
            ("apgd", {"steps": 100, "loss": "targeted", "targets": 9}, 900),
            ("fab", {"steps": 100, "targets": 9}, 900),
            ("square", {"queries": 5000}, 5000),
        ]
    assert "fab" not in pixel + encoded
    euclidean = [s.attack for s in battery(v, L2(0.5, space="pixel"))]
    assert "square" in euclidean and "spsa" in euclidean and "codebook" not in euclidean


def test_an_encoder_that_stops_the_gradient_does_not_stop_its_codebook(brief):
    """It is played first, where the code has a gradient; where the network stops it too, nothing of it is tried."""
    code, v, probe = phase(steps=8), honest("phase"), case(honest("phase"), eps=4 / 255, n=48)
    cut = replace(v, encode=lambda x: code(x).detach(), codebook=code.codebook)
    found, _ = audit(cut, probe.threat, probe.x, probe.y, budget="quick")
    assert {f.id: f.level for f in found.findings}["G3"] == "fail" and found.complete
    assert [r.attack.split()[0] for r in found.runs[:2]] == ["codebook", "codebook"]
    levels = {f.id: f.level for f in found.findings}
    assert 0 == found.accuracy.k < sum(found.runs[0].robust) and levels["C15"] == "not applicable"
    assert reaches_code(cut, probe.threat, probe.x) and contradiction(found, cut, code=True) == ""
    assert "of the thorough battery" in contradiction(replace(found, budget="thorough"), cut, code=True)
    dead = replace(cut, logits=lambda u: v.logits(u).detach())
    found, _ = audit(dead, probe.threat, probe.x, probe.y, budget="quick")
    assert len(found.runs) > 1 and not any("codebook" in r.attack for r in found.runs)
    assert not reaches_code(dead, probe.threat, probe.x)
    (c11,) = (f for f in found.findings if f.id == "C11")  # Square came first: there is no gradient that it could beat
    assert c11.level == "not applicable" and found.runs[0].attack.startswith("square")


def outside(code):
    def encode(x):
        with torch.inference_mode():
            return code(x)

    return encode


@pytest.mark.parametrize(
    ("encode", "reached"),
    [
        (lambda code: lambda x: code(x).detach().double(), True),
        (lambda code: lambda x: code(x).detach().bfloat16(), True),
        (outside, True),
        (lambda code: lambda x: code(x).detach().mul(256).int().div(256, rounding_mode="floor"), False),
    ],
    ids=["float64", "bf16", "inference", "whole"],
)
def test_a_code_of_any_type_is_attacked_by_its_book_or_left(encode, reached, brief):
    """An audit ends with its battery, whatever the encoder gives; a code of whole numbers has no gradient."""
    code, v, probe = phase(steps=8), honest("phase"), case(honest("phase"), eps=4 / 255, n=12)
    cut = replace(v, encode=encode(code), logits=lambda u: v.logits(u.float()), codebook=code.codebook)
    assert reaches_code(cut, probe.threat, probe.x) == reached
    found, _ = audit(cut, probe.threat, probe.x, probe.y, budget="quick")
    assert found.complete and any("codebook" in r.attack for r in found.runs) == reached


ROUTES = ("assg", "hart", "rga", "bptr", "pdsg", "own+reset", "triangle:1", "rectangle:1", "exponential:2",
          "sigmoid:4", "straight_through:1", "own + hart")  # fmt: skip
FIRST = ["default: pgd (steps 7, step 0.01)", "gradient: fgsm"]
BATTERIES = {
    ("quick", "pixel"): [
        *FIRST, "code: codebook (steps 4)", "code: codebook (steps 8, loss margin, restarts 3)",
        "gradient: pgd (steps 8, step 0.003922, loss margin)", "code: pgd (steps 8, step 0.003922), encoder secant",
        "route: sapgd (steps 20), assg, encoder secant", *(f"route: codebook (steps 4), {r}" for r in ROUTES),
        "black box: square (queries 200)", "noise: noise (draws 20, corners True)", "noise: noise (draws 20)",
    ],
    ("quick", "encoded"): [
        *FIRST, "gradient: pgd (steps 8, step 0.003922, loss margin)", "route: sapgd (steps 20), assg",
        *(f"route: pgd (steps 4, step 0.007843, loss margin), {r}" for r in ROUTES),
        "black box: square (queries 200)", "noise: noise (draws 20, corners True)", "noise: noise (draws 20)",
    ],
    ("standard", "pixel"): [
        *FIRST, "code: codebook (steps 20)", "code: codebook (steps 40, loss margin, restarts 3)",
        "gradient: pgd (steps 40, step 0.003922, loss margin)", "code: pgd (steps 40, step 0.003922), encoder secant",
        "route: sapgd (steps 100), assg, encoder secant", *(f"route: codebook (steps 20), {r}" for r in ROUTES),
        "route: sapgd (steps 100, loss margin, restarts 3), assg, encoder secant",
        "time: pgd (steps 10, step 0.007843), T=2", "time: pgd (steps 10, step 0.007843), T=8",
        "gradient: apgd (steps 100, loss ce), encoder secant",
        "gradient: apgd (steps 50, loss targeted, targets 9), encoder secant",
        "black box: square (queries 1000)", "noise: noise (draws 100, corners True)", "noise: noise (draws 100)",
    ],
    ("standard", "encoded"): [
        *FIRST, "gradient: pgd (steps 40, step 0.003922, loss margin)", "route: sapgd (steps 100), assg",
        *(f"route: pgd (steps 20, step 0.007843, loss margin), {r}" for r in ROUTES),
        "route: sapgd (steps 100, loss margin, restarts 3), assg", "gradient: apgd (steps 100, loss ce)",
        "gradient: apgd (steps 50, loss targeted, targets 9)", "black box: square (queries 1000)",
        "noise: noise (draws 100, corners True)", "noise: noise (draws 100)",
    ],
}  # fmt: skip


@pytest.mark.parametrize("budget, space", list(BATTERIES))
def test_the_battery_is_exactly_this(snn, budget, space):
    stages = battery(snn[0], Linf(8 / 255, space=space), budget)
    assert [f"{s.kind}: {s.label}" for s in stages] == BATTERIES[budget, space]
    guided = battery(snn[0], Linf(8 / 255, space=space), budget, guides=[replace(snn[0], name="another")])
    more = [s for s in guided if s.guide is not None]
    assert {(s.kind, s.guide.name) for s in more} == {("transfer", "another")}
    assert [s.attack for s in more] == (["codebook", "pgd"] if space == "pixel" else ["pgd"])
    assert [s for s in guided if s.guide is None] == stages and guided[-3 - len(more) : -3] == more


def test_runs_of_batches_join_to_one(snn):
    from sparsetrail.attacks import attack, pgd

    v, x, y = snn
    threat = Linf(1 / 255, space="encoded")
    whole = attack(pgd, v, threat, x, y, keep=True, batch=4)
    parts = [
        attack(pgd, v, threat, x[i : i + 4], y[i : i + 4], keep=True, indices=range(i, i + 4), batch=4)
        for i in (0, 4, 8)
    ]
    one = join(parts)
    assert one.robust == whole.robust and one.forwards == whole.forwards and one.indices == tuple(range(12))
    assert torch.equal(one.adversarial, whole.adversarial)
    assert isinstance(one, Run) and Forgetful().get({}, Run) is None


def test_means_over_images_do_not_depend_on_the_batch():
    from sparsetrail.attacks import attack, authors, pgd

    v, x, y = line(n=33)
    clear = lambda u: torch.where(u < 0.601, u, u.detach())  # noqa: E731  # no gradient reaches the brighter images
    v = replace(v, logits=lambda u, own=v.logits: own(clear(u)))
    dead = float((x > 0.601).float().mean())
    assert 0.1 < dead < 0.9

    def play(first=0, last=33, batch=33, drop=False):
        some = range(33)[first:last]
        threat, knobs = Linf(0.01, space="pixel"), {"steps": 4, "step": 0.0025}
        return attack(pgd, v, threat, x[some], y[some], batch=batch, drop=drop, indices=some, **knobs)

    for batch in (7, 8, 32):
        for drop in (False, True):
            run, whole = play(batch=batch, drop=drop), play(drop=drop)
            assert run.zero_gradient == pytest.approx(whole.zero_gradient, abs=1e-6)
            assert run.trace == pytest.approx(whole.trace, abs=1e-5)
        one, whole = join([play(i, i + batch) for i in range(0, 33, batch)]), play()
        assert one.zero_gradient == pytest.approx(whole.zero_gradient, abs=1e-6) and one.trace == ()
        net = torch.nn.Sequential()
        net.forward = v.logits
        fast, _ = authors(net, lambda x: x[None], x, y, batch=batch)
        assert fast.zero_gradient == pytest.approx(dead, abs=1e-6)


@pytest.mark.parametrize("name, verdict", [("scores x 1000", "masked"), ("layer with zero gradient", "masked"),
                                           ("surrogate of the wrong sign", "masked"), ("k winners take all", "masked"),
                                           ("membrane not reset", "inconclusive")])  # fmt: skip
def test_a_fraud_is_not_supported(name, verdict, unplotted):
    probe = case(FRAUDS[name].build(), eps=FRAUDS[name].eps, n=120)
    found, _ = audit(probe.victim, probe.threat, probe.x, probe.y, budget="standard")
    assert found.verdict == verdict, found.reason
    assert verdict == "inconclusive" or any(f.masking and f.level == "fail" for f in found.findings)


@pytest.mark.parametrize(
    "build, budget, said", [(rejecting, "standard", "stand by a tie"), (hard_labels, "quick", "S9")]
)
def test_what_no_attack_of_ours_gets_through_is_not_supported_for_that(build, budget, said, unplotted):
    probe = case(build(), eps=4 / 255, n=120)
    found, _ = audit(probe.victim, probe.threat, probe.x, probe.y, budget=budget, claim=0.0)
    assert found.verdict == "inconclusive" and said in found.reason, found.reason


@pytest.mark.parametrize("kind, space", [("ann", "pixel"), ("direct", "pixel"), ("phase", "pixel"),
                                         ("phase", "encoded"), ("hardened", "pixel")])  # fmt: skip
def test_an_honest_victim_is_not_called_masked(kind, space, unplotted):
    probe = case(honest(kind), eps=8 / 255, space=space, n=120)
    found, _ = audit(probe.victim, probe.threat, probe.x, probe.y, budget="quick")
    assert found.verdict == "overstated" or "a quick look" in found.reason, found.reason
    assert not [f for f in found.findings if f.masking and f.level == "fail"]
    if kind == "hardened":
        assert found.accuracy.value > 0.3


FOREIGN = """
import torch
from sparsetrail import Victim

W = torch.randn(784, 10, generator=torch.Generator().manual_seed(0))


def ann():
    return Victim(encode=lambda x: x[None], logits=lambda u: u[0].flatten(1) @ W, steps=1, classes=10, name="ann")


def wrong():
    return 1
"""


SPIKING = """
import torch
from pathlib import Path
from torch import nn
import sparsetrail as st


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v >= 0).float()

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + ctx.saved_tensors[0].square())


class Fires(nn.Module):
    def forward(self, x):
        return Spike.apply(x - 0.1)


def victim():
    torch.manual_seed(int(Path("seed").read_text()))
    net = nn.Sequential(nn.Conv2d(1, 4, 5, 4), Fires(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)).eval()
    def logits(u):
        return torch.stack([net(now) for now in u]).mean(0)

    return st.Victim(encode=st.phase(steps=3), logits=logits, steps=3, classes=10, module=net)
"""


def test_attacks_and_trails_of_a_victim_of_your_own_are_those_of_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SPIKING)
    (tmp_path / "seed").write_text("1")
    on = ["--data", "fashion-mnist-slice", "--n", "24"]
    hit = ["attack", "mine.py:victim", "--eps", "8/255", "--space", "pixel", *on, "--steps", "3", "--json"]

    def line():
        main(hit)
        return json.loads(capsys.readouterr().out)

    first = line()
    few = take(load_images("fashion-mnist-slice", "test"), 24, seed=0)
    v = target_at("mine.py:victim").make()
    run = attack(pgd, v, Linf(8 / 255, space="pixel"), pixels(few.images), few.labels, steps=3)
    assert first["robust_acc"] < first["clean_acc"]
    assert (first["robust_acc"], first["forwards"], first["route"]) == (run.accuracy.value, run.forwards, route_of(run))
    assert first["victim"] == v.name == "mine:victim" and line() == first  # kept, whose seconds are the same
    (tmp_path / "seed").write_text("0")
    line()  # other weights behind the same file are another cell
    assert len(list((tmp_path / "runs").rglob("cells/*.json"))) == 2
    main(["trail", "mine.py:victim", *on, "--detail", "plain", "--json"])
    told = json.loads(capsys.readouterr().out)
    alone = trail(target_at("mine.py:victim").make(), pixels(few.images), few.labels, detail="plain")
    assert [(r["op"], r["zero"]) for r in told["rows"]] == [(r.op, r.zero) for r in alone.rows]
    assert (tmp_path / "runs" / "mine-victim" / "trail-plain-n24" / "report.html").is_file()


def test_a_victim_of_your_own_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FOREIGN)
    flags = ["--eps", "8/255", "--space", "pixel", "--data", "fashion-mnist-slice", "--n", "40", "--budget", "quick"]
    main(["audit", "mine.py:ann", *flags, "--json"])
    out = json.loads(capsys.readouterr().out)
    (line,) = out["audits"]
    assert line["n"] == 40 and line["space"] == "pixel" and line["worst_acc"] <= line["default_acc"]
    page = (tmp_path / "runs" / "mine-ann" / "audit" / "pixel-linf-8of255_n40" / "report.html").read_text()
    assert line["verdict"] in page
    main(["audit", "mine.py:ann", *flags, "--verify"])
    held = capsys.readouterr().out
    assert "adversarials hold" in held
    folder = tmp_path / "runs" / "mine-ann" / "audit"
    folder = folder / "pixel-linf-8of255_n40"
    both = folder.rename(folder.with_name("pixel-linf-8of255_encoded-linf-6of255_n40"))  # as of two threats at once
    main(["audit", "mine.py:ann", *flags, "--verify", "--json"])
    (line,) = json.loads(capsys.readouterr().out)["verified"]
    assert line["held"] == line["n"] > 0 and line["bad"] == {} and line["folder"] == str(both.relative_to(tmp_path))
    whole = (both / "result.json").read_text()
    told = json.loads(whole)
    told["audits"][0]["worst"] = told["audits"][0]["clean"]  # nothing fell, it says now
    (both / "result.json").write_text(json.dumps(told))
    with pytest.raises(SystemExit) as stop:
        main(["audit", "mine.py:ann", *flags, "--verify"])
    assert stop.value.code == 4 and "one of the two was changed" in capsys.readouterr().err
    (both / "result.json").write_text(whole)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text(FOREIGN)
    main(["audit", "sub/mine.py:ann", *flags, "--minutes", "0", "--json"])
    assert "runs/sub-mine-ann/audit" in capsys.readouterr().out  # not into the folder of its namesake
    for asked, text in (("mine.py:wrong", "expected a sparsetrail Victim"), ("mine.py:none", "found none of that")):
        with pytest.raises(SystemExit) as stop:
            main(["audit", asked, *flags])
        assert stop.value.code == 4 and text in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"mine-ann", "sub-mine-ann"}  # refused, nothing is made
    with pytest.raises(SystemExit) as stop:
        main(["audit", "mine.py:ann", "--eps", "8/255", "--space", "pixel", "--space", "encoded", "--data", "cifar10"])
    assert stop.value.code == 4 and "one --eps for every --space" in capsys.readouterr().err


NEAREST = """
import torch
import sparsetrail as st

train = st.load("fashion-mnist-slice", "train")
means = torch.stack([st.pixels(train.images[train.labels == k]).mean(0).flatten() for k in range(10)])


def ann():
    scores = lambda u: u[0].flatten(1) @ means.T - means.square().sum(1) / 2
    return st.Victim(encode=lambda x: x[None], logits=scores, steps=1, classes=10, name="ann")
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A kept audit of a victim of one's own; its result as JSON."""
    folder = tmp_path_factory.mktemp("told")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "mine.py").write_text(NEAREST)
        flags = ["--eps", "8/255", "--space", "pixel", "--data", "fashion-mnist-slice", "--n", "40"]
        main(["audit", "mine.py:ann", *flags, "--budget", "quick", "--json"])
        (file,) = folder.glob("runs/*/audit/*/result.json")
        yield ["audit", "mine.py:ann", *flags, "--verify"], file, json.loads(file.read_text())


def raised_flags(a, runs):
    """An image that was wrong, of which it says that it stands; in its runs too where asked."""
    j = a["clean"].index(False)
    a["clean"][j] = a["default"][j] = a["worst"][j] = True
    for r in a["runs"] if runs else []:
        at = sum(i < j for i in r["indices"])
        for key, value in (("indices", j), ("clean", True), ("robust", True)):
            r[key].insert(at, value)


def lowered_default(a):
    a["default"][a["worst"].index(True)] = False


def other_first_attack(a):
    j = next(j for j, by in enumerate(a["broken_by"]) if by)
    a["broken_by"][j] = a["runs"][1]["attack"]
    a["default"][j] = True


def of_another_battery(a):
    a["budget"] = "standard"
    a["provenance"]["command"] = a["provenance"]["command"].replace("quick", "standard")


def run_short(a):
    del a["runs"][5:]


FORGED = {
    "flags": (lambda a: raised_flags(a, False), "images that stood before it"),
    "flags and runs": (lambda a: raised_flags(a, True), "scored anew"),
    "default flags": (lambda a: lowered_default(a), "stand at the end"),
    "the first to break": (other_first_attack, "broken by pgd"),
    "verdict": (lambda a: a.update(verdict="supported"), "findings and flags give, inconclusive"),
    "reason": (lambda a: a.update(reason="all is well"), "found inconclusive: all is well"),
    "budget": (lambda a: a.update(budget="standard"), "budget quick of its command"),
    "budget and command": (of_another_battery, "runs of the standard battery, found those of the quick one"),
    "claim": (lambda a: a.update(claim=0.01), "expected no claim as in its command, found 0.01"),
    "unfinished": (run_short, "called complete"),
    "default attack": (lambda a: a.update(default_attack="autoattack"), "as the default attack, found autoattack"),
}


@pytest.mark.parametrize("what", [*FORGED, "summary"])
def test_a_result_that_was_changed_is_refused(told, what, capsys):
    argv, file, whole = told
    change, words = FORGED.get(what, (lambda a: None, "expected a summary"))
    body = json.loads(json.dumps(whole))
    (a,) = body["audits"]
    assert any(a["worst"]) and not all(a["clean"]) and any(a["broken_by"])
    change(a)
    body["summary"] = ["robust"] if what == "summary" else [sentence(unpack(Audit, a))]
    file.write_text(json.dumps(body))
    try:
        with pytest.raises(SystemExit) as stop:
            main(argv)
    finally:
        file.write_text(json.dumps(whole))
    said = capsys.readouterr().err
    assert stop.value.code == 4 and words in said and "Audit again" in said
    main(argv)
    assert "adversarials hold" in capsys.readouterr().out


def test_a_result_of_more_images_than_it_has_is_refused_where_it_is_read(told, capsys):
    argv, file, whole = told
    body = json.loads(json.dumps(whole))
    body["audits"][0]["worst"].append(True)
    file.write_text(json.dumps(body))
    try:
        with pytest.raises(SystemExit) as stop:
            main(argv)
    finally:
        file.write_text(json.dumps(whole))
    assert stop.value.code == 4 and "worst: expected" in (said := capsys.readouterr().err) and "one an image" in said


def test_a_result_of_another_version_may_word_its_reason_otherwise(told, capsys):
    argv, file, whole = told
    for verdict, code in ((None, 0), ("supported", 4)):
        body = json.loads(json.dumps(whole))
        (a,) = body["audits"]
        a["reason"], a["verdict"] = "in other words", verdict or a["verdict"]
        a["provenance"]["sparsetrail"] = "0.0.9"
        body["summary"] = [sentence(unpack(Audit, a))]
        file.write_text(json.dumps(body))
        try:
            with pytest.raises(SystemExit) if code else contextlib.nullcontext():
                main(argv)
        finally:
            file.write_text(json.dumps(whole))
        assert ("findings and flags give, inconclusive" if code else "hold") in "".join(capsys.readouterr())


@pytest.mark.parametrize("noise, declared, more", [
    (0, False, ("--minutes", "0")), (0, False, ("--claim", "0.9")), (1, True, ("--eot", "2", "--seed", "1")),
    (9, False, ("--batch", "7")),
])  # fmt: skip
def test_an_honest_result_is_verified_however_it_was_made(noise, declared, more, tmp_path, monkeypatch):
    """Out of time, beside a claim, of a victim that draws noise so that images waver, declared or not."""
    monkeypatch.chdir(tmp_path)
    file = NEAREST.replace(".square().sum(1) / 2", f".square().sum(1) / 2 + {noise} * torch.randn(u.shape[1], 10)")
    (tmp_path / "mine.py").write_text(file.replace("steps=1", f"steps=1, random={declared}"))
    flags = ["--eps", "8/255", "--space", "pixel", "--data", "fashion-mnist-slice", "--n", "40"]
    main(["audit", "mine.py:ann", *flags, "--budget", "quick", *more])
    what, data = target_at("mine.py:ann"), take(load_images("fashion-mnist-slice", "test"), 40, seed=0)
    (folder,) = tmp_path.glob("runs/*/audit/*")
    for _ in range(3):
        shown, _ = verify_again(Bench(out=folder), what, Linf(EPS, space="pixel"), data)
        assert shown or noise == 9


STEADY = """
import torch
from sparsetrail import Victim


def mine():
    scores = lambda u: 0 * u[0].flatten(1).sum(1, keepdim=True) + torch.eye(10)[{best}]
    return Victim(encode=lambda x: x[None], logits=scores, steps=1, classes=10, name="steady")
"""


def test_an_audit_in_which_no_image_fell_is_verified_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steady.py").write_text(STEADY.format(best=3))
    flags = ["--eps", "8/255", "--space", "pixel", "--data", "fashion-mnist-slice", "--budget", "quick"]
    main(["audit", "steady.py:mine", *flags, "--n", "40"])
    capsys.readouterr()
    main(["audit", "steady.py:mine", *flags, "--n", "40", "--verify"])
    assert "0 of 0 adversarials hold" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["audit", "steady.py:mine", *flags, "--n", "30", "--verify"])
    assert stop.value.code == 4 and "run the audit first" in capsys.readouterr().err
    (tmp_path / "steady.py").write_text(STEADY.format(best=4))
    with pytest.raises(SystemExit) as stop:
        main(["audit", "steady.py:mine", *flags, "--n", "40", "--verify"])
    assert stop.value.code == 4 and "of another model or code" in capsys.readouterr().err


def test_margin_is_what_decides():
    z = torch.tensor([[1.0, 1.0], [math.nan, 0.0]])
    assert margin(z, torch.tensor([0, 0])).tolist() == [0.0, -math.inf]


def test_a_victim_that_tells_decisions_alone_falls_to_the_attack_that_asks_for_no_more(unplotted):
    """No gradient, no degrees: RayS takes what Square leaves, and the worst case says so."""
    base = honest("ann")
    blind = replace(base, logits=lambda u: torch.eye(base.classes)[base.logits(u).argmax(1)], rewire=None, module=None)
    probe = case(blind, eps=16 / 255, n=60)
    found, _ = audit(probe.victim, probe.threat, probe.x, probe.y, budget="quick")
    taken = {r.attack.split()[0]: sum(r.clean) - sum(r.robust) for r in found.runs}
    assert taken["rays"] > 5 * taken["square"] or taken["rays"] > 10
    assert found.accuracy.k == sum(found.clean) - sum(taken.values())
    assert found.verdict == "inconclusive" and "S9" in found.reason


def test_memory_is_asked_for_before_the_victim_is_made_anew(brief):
    """Making it anew empties what the old one reaches into: the old one must have been asked by then."""
    v, x, y = line(n=24)
    asked: list[int] = []  # gradients, since it was made

    def make():
        asked.clear()
        return replace(v, logits=remembers)

    def remembers(u):
        if u.requires_grad:
            asked.append(1)
            return v.logits(u)
        return v.logits(u) + (torch.tensor([2.0, 0.0]) if asked else 0)

    found, _ = audit(make(), Linf(EPS, space="pixel"), x, y, budget="quick", fresh=make, minutes=0)
    assert next(f for f in found.findings if f.id == "S3f").level == "fail"


def test_a_part_whose_points_are_lost_is_told(snn, tmp_path, brief):
    v, x, y = snn
    store = Cells(tmp_path)
    ask = lambda: audit(v, Linf(1 / 255, space="pixel"), x, y, budget="quick", store=store, identity="a")  # noqa: E731
    ask()
    next(iter(tmp_path.glob("*.safetensors"))).unlink()
    with pytest.raises(ValueError, match="found no file"):
        ask()


def test_what_is_no_victim_threat_or_image_is_told_before_an_audit(snn):
    v, x, y = snn
    plain, ball = inspect.unwrap(audit), Linf(EPS, space="pixel")
    for args, match in (
        ((v.module, ball, x, y), "expected a Victim"), ((v, "8/255", x, y), "expected a threat such as Linf"),
        ((v, ball, x, None), "labels: expected a tensor, got NoneType"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            plain(*args)
