"""The page of the theorems: what each says, what its hypotheses ask, what `theory` measured, what may be said.

Statements are in our own words. The paper is Luu 2025, arXiv:2509.23762; its Theorem 1 is after Liu et al. 2024,
arXiv:2405.20355.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsetrail.core import Linf, Rate
from sparsetrail.data import load, pixels, take
from sparsetrail.recipes.measure import Bench, as_victim, fit, identity, provenance
from sparsetrail.recipes.theory import LEVEL, Above, Demo, TheoryAudit, audit, demo, quantile, smooth
from sparsetrail.report.tables import Grid
from sparsetrail.report.theorems import Asked, Page, Plot, Result, Statement
from sparsetrail.snn.encode import direct
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.surrogate import atan_derivative
from sparsetrail.theory import (
    Judgement,
    Tracking,
    TwoLayerSNN,
    Verdict,
    backward_from,
    bn_backward,
    conv_weight_grad_density,
    corrected_bound_expect,
    expected_nnz_bernoulli,
    literal_vs_centred,
    nnz_input_jacobian,
    paper_bound,
    phase_flips,
    reliability,
)
from sparsetrail.theory.fidelity import RELIABLE
from sparsetrail.trails import maxpool_density_cap, strided_conv_density
from sparsetrail.training import TrainSpec

PLACE: dict[Verdict, str] = {
    "holds": "inside 3 .. 3 |g|_0",
    "violated (certified)": "outside for certain",
    "violated (not certified)": "outside, not certified",
    "undefined": "0/0",
}
NEAR = 0.1  # a score counts as linear on the ball up to this share of its linear prediction, at random and at worst
FEW = "Too few images to rank: {n}, at least 3 are needed."
SWITCH = "the radius is below the first switch, where the score of a spiking network is constant"


@dataclass(frozen=True, kw_only=True)
class TheoremScale:
    """How much of the page is measured on trained networks; `shares` are further radii, of the audited one."""

    data: str
    images: int | None
    epochs: int
    width: float
    steps: int
    audited: int
    draws: int
    shares: tuple[float, ...] = (1 / 256, 1 / 64, 1 / 16, 1 / 4)


SCALES = {
    "smoke": TheoremScale(
        data="fashion-mnist-slice", images=320, epochs=1, width=0.125, steps=3, audited=8, draws=16, shares=(1 / 64,)
    ),
    "small": TheoremScale(data="fashion-mnist-slice", images=6000, epochs=3, width=0.25, steps=4, audited=64, draws=64),
    "paper": TheoremScale(data="cifar10", images=None, epochs=100, width=1.0, steps=10, audited=500, draws=256),
}


def theorems(bench: Bench, scale: str = "small", *, data: str | None = None, root: str | Path | None = None) -> Page:
    """The page of `reproduce theorems`: the demo, then SEW-ResNet18 with max and average pool and a smooth control.

    Networks are direct-coded, so that pixels are what the first layer sees and the first switch is exact; each is
    audited at 8/255 in pixel space. `data` names another image set than that of the scale. Trained models are kept in
    the folder of `bench`.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    size, started = SCALES[scale], time.monotonic()
    size = size if data is None else replace(size, data=data)
    shown = demo(seed=bench.seed, say=lambda part, done, total: bench.tick("demo", done, total, part))
    train_set, test_set = load(size.data, "train", root=root), load(size.data, "test", root=root)
    train_set = train_set if size.images is None else take(train_set, size.images, seed=bench.seed)
    some = take(test_set, size.audited, seed=bench.seed)
    x, y = pixels(some.images.to(bench.device)), some.labels.to(bench.device)
    found = []
    for pool in ("max", "avg"):
        spec = NetSpec(channels=x.shape[1], classes=len(some.classes), width=size.width, pool=pool, steps=size.steps)
        model = fit(bench, f"theorems-{pool}", spec, direct(steps=size.steps), train_set, TrainSpec(epochs=size.epochs))
        v = as_victim(model, f"SEW-ResNet18 {pool} pool", device=bench.device)
        for w in (v, smooth(model.net, v)) if pool == "max" else (v,):
            found.append(
                audit(
                    w,
                    x,
                    y,
                    Linf(8 / 255, space="pixel"),
                    data=identity(some),
                    identity=model.sha256,
                    draws=size.draws,
                    shares=size.shares,
                    seed=bench.seed,
                    batch=bench.batch,
                    probe=w is v and pool == "max",
                    say=lambda part, done, total: bench.tick(part, done, total, ""),
                    stop=bench.stop,
                )
            )
    chosen = "" if data is None else f" --datasets {data}"
    facts = provenance(bench, started, f"sparsetrail reproduce theorems --scale {scale}{chosen}")
    return page("The paper's theorems, tested", replace(shown, nets=()), found, facts)


def demo_page(found: Demo, facts: dict[str, Any]) -> Page:
    """The page of a demo; `facts` is its provenance."""
    return page("The paper's theorems without a trained model", found, found.nets, facts)


def audit_page(found: TheoryAudit, facts: dict[str, Any]) -> Page:
    """The page of one victim."""
    return page(f"The paper's theorems on {found.victim}", None, (found,), facts)


def page(title: str, shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Page:
    """The page of a demo, of victims, or of both."""
    statements = tuple(make(shown, audits, facts) for make in (_theorem1, _corollary1, _theorem2, _theorem3))
    return Page(
        title=title,
        summary=(
            "Four statements link sparse gradients to robustness. Each is put to closed forms, counterexamples and "
            "networks; a verdict says what was met, never that a theorem is true.",
            "Proved, whatever is measured below: Theorem 1 is exact for a score that is linear on the ball, with PR(g) "
            "in the place of |g|_0, and bounds nothing of a network of spikes; Corollary 1 and Theorem 3 are false as "
            "printed; of Theorem 2 the bound on norms from both sides is proved, the order of the layers is not, and "
            "about zeros it is wrong.",
            *(sentence(a) for a in audits),
        ),
        victims=_victims(audits),
        statements=statements,
        notes=NOTES,
        images=tuple(row for a in audits for row in _images(a)),
        provenance=facts,
        numbers={"demo": None if shown is None else asdict(shown), "audits": [asdict(a) for a in audits]},
    )


def _victims(audits: Sequence[TheoryAudit]) -> Grid | None:
    """What was measured, on what, under which threat."""
    if not audits:
        return None
    rows = [
        (a.victim, str(a.threat), f"{a.mode} mode", a.route, a.data, str(a.seed), a.identity[:12])
        for a in audits
    ]  # fmt: skip
    head = ("victim", "threat", "BatchNorm", "gradient", "images", "seed", "sha256 of weights or file")
    return Grid("What was measured", head, tuple(rows), labels=7)


def _images(a: TheoryAudit) -> Iterator[dict[str, Any]]:
    """One row an image and radius."""
    for r in a.radii:
        for i in range(a.n):
            yield {
                "victim": a.victim, "space": a.threat.space, "norm": a.threat.norm, "eps": r.eps, "mode": a.mode,
                "route": a.route, "data": a.data, "image": i, "n": a.n, "draws": a.draws, "seed": a.seed,
                "rho_adv": r.rho_adv[i], "rho_rand": r.rho_rand[i], "ratio": r.ratio[i],
                "low": r.low[i], "high": r.high[i], "linear_adv": r.linear_adv[i], "linear_rand": r.linear_rand[i],
                "verdict": r.verdict[i], "support": a.support[i], "pr": a.pr[i], "l1": a.l1[i],
                "fidelity": a.fidelity[i], "linear_error": a.error[i], "first_switch": a.eps1[i] if a.eps1 else None,
            }  # fmt: skip


NOTES = (
    "rho_rand is the mean and rho_adv the largest squared change of the score of the true class over the ball; g is "
    "the input gradient of that score, |g|_0 how many of its entries are not zero, PR(g) how many there are in effect: "
    "1 if one entry outweighs all others, |g|_0 if all are of one size.",
    "Verdicts. Holds: no value met contradicts the statement. Violated (certified): contradicted by exact arithmetic, "
    "or beyond the interval of the estimate. Violated (not certified): contradicted within the error, or by values "
    "that are bounds on one side alone. Vacuous: the bound allows every value there is, or nothing varies. Undefined: "
    "0/0. Hypothesis not met: the statement says nothing about this case.",
    "rho_adv is what attacks reached, a lower bound, so ratios below a line certify nothing unless the upper bound of "
    "rho_adv (the largest change a probability can make) is below it as well.",
    "Two budgets are never compared: every number carries its space. In encoded space a radius of 6/255 flips no "
    "spike.",
    "The paper prints the surrogate at the potential, its code takes it at the potential minus the threshold: at "
    f"threshold {literal_vs_centred()['literal']:.4f} against 1. The code's version is used here.",
    f"A gradient counts as describing the score from a median fidelity of {RELIABLE:g}. A score counts as linear on "
    f"the ball of an image where, at random and along the sign of the gradient, it is within {NEAR:g} of what the "
    "gradient predicts, in root mean squares, and no attack moves it further than that. These are lines of our own. "
    "None says whether attacks that follow the gradient succeed.",
    "The definitions of rho_adv and rho_rand are recalled from Liu et al.; they are the natural ones that give the "
    "constant 3 (1 / E[U^2] for U uniform on -1..1).",
)


def sentence(a: TheoryAudit) -> str:
    """One victim in one sentence: ratio, linear theory, first switch, hypothesis, fidelity."""
    at = a.at
    ratio = _three([r for r in at.ratio if r == r])
    fidelity = quantile(a.fidelity, 0.5)
    switch = (
        f"its first switch is {_digits(quantile(a.eps1, 0.5) * 255)}/255 away in the median image"
        if a.eps1
        else f"first switch not known ({a.no_switch})"
    )
    met = "not met" if _unmet(a) else f"met on {len(_fit(a))} of {a.n} images"
    line = "reaches" if reliability(fidelity) == "reliable" else "does not reach"
    trust = (
        "Gradient fidelity is undefined: the score or what the gradient predicts of it does not move."
        if fidelity != fidelity
        else "Gradient fidelity, the median correlation of what the score does with what the gradient predicts over "
        f"random directions of this radius, is {_two(fidelity)}; it {line} {RELIABLE:g}, our line for a gradient that "
        "describes the score. Whether attacks that follow it miss adversarials, `sparsetrail audit` tells."
    )
    return (
        f"{a.victim[:1].upper()}{a.victim[1:]}, {a.threat}, n={a.n}: vulnerability ratio {ratio}; the linear theory "
        f"says {_three(at.linear_ratio)}; {switch}; the hypotheses of Theorem 1 are {met}. {trust}"
    )


# Theorem 1 -----------------------------------------------------------------------------------------------------------


def _theorem1(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Statement:
    results, above = [], [a.above for a in audits if a.above is not None]
    if shown is not None:
        bad = [c for c in shown.cases if c.verdict != "holds"]
        results.append(
            Result(
                of="scores with a closed form",
                verdict="violated (certified)" if bad else "holds",
                why=f"The inequality is true for {len(shown.cases) - len(bad)} of {len(shown.cases)} scores, the "
                f"linear ones without a box, and false for {'; '.join(f'{c.name} ({c.lacks})' for c in bad)}.",
                tables=(_cases_grid(shown),),
            )
        )
        above = [shown.above, *(part for part in above if part.net != shown.above.net)]
    for part in above:
        judged = judge_above(part)
        case = f"{part.net}, just above the first switch"
        results.append(Result(of=case, verdict=judged.verdict, why=judged.why, tables=(_above_grid(part),)))
    for a in audits:
        judged = judge1(a)
        results.append(
            Result(of=a.victim, verdict=judged.verdict, why=judged.why, hypotheses=_asked(a), tables=(_radii_grid(a),))
        )
    return Statement(
        name="Theorem 1",
        source="the paper, sec. 4.3, after Liu et al. 2024",
        says="For a small radius in an L-infinity ball, an adversary moves the score of the true class at least 3 and "
        "at most 3 |g|_0 times as much, in squares, as uniform noise does; g is the gradient of that score.",
        formula="3 <= rho_adv / rho_rand <= 3 |g|_0",
        instead="For a score that is linear on the ball, with no pixel cut, the ratio is exactly 3 PR(g), with "
        "PR = |g|_1^2 / |g|_2^2 between 1 and |g|_0. For a smooth one it lies near that, with a remainder; for any "
        "score it is at least 1. A network of spikes is piecewise constant: 0/0 below its first switch, and above it "
        "the surrogate gradient bounds nothing.",
        results=tuple(results),
        plots=_plots1(shown, audits, facts),
    )


def judge_above(part: Above) -> Judgement:
    """Theorem 1 just above the first switch: a certificate by geometry, for every image whose score jumps there."""
    v, jumps, n = part.violated, part.jumps, len(part.jump)
    shared = "" if part.alone == n else f" On {n - part.alone} of {n} images several units switch at one radius."
    if jumps.k == 0:
        why = f"The first switch moves the score of none of {part.alone} images: 0/0.{shared}"
        return Judgement(verdict="undefined", why=why)
    return Judgement(
        verdict="violated (certified)" if v.k else "holds",
        why=f"The score jumps on {jumps} images; on {v.k} of them the ratio exceeds {part.bound:.0f}, three times all "
        "entries: the upper bound fails there whatever the gradient is. No sampling: the flip needs a corner of the "
        f"ball, whose volume is known. The ball is not cut to the range of pixels.{shared}",
    )


def judge1(a: TheoryAudit) -> Judgement:
    """Theorem 1 on a victim: its hypotheses first, then the inequality on the images that meet them."""
    fit = _fit(a)
    here = [a.at.verdict[i] for i in fit or range(a.n)]
    counts = {v: here.count(v) for v in dict.fromkeys(here)}
    of = f"{a.n} images" if len(here) == a.n else f"these {len(here)} images"
    said = f"the ratio is {', '.join(f'{PLACE[v]} on {k}' for v, k in counts.items())} of {of}"
    if a.random or a.noise_floor > 0:
        why = "the victim draws noise" if a.random else "calls on the same images differ"
        return Judgement(verdict="hypothesis not met", why=f"The score is not a function: {why}; {said}.")
    if a.at.verdict.count("undefined") == a.n:
        why = f"No attack and no draw within {a.threat} changes the score of any image: 0/0."
        return Judgement(verdict="undefined", why=why)
    if failed := _unmet(a):
        return Judgement(verdict="hypothesis not met", why=f"{failed[:1].upper()}{failed[1:]}; {said}.")
    met = f"The hypotheses are met on {len(fit)} of {a.n} images"
    for verdict in ("violated (certified)", "violated (not certified)"):
        if counts.get(verdict):
            return Judgement(verdict=verdict, why=f"{met}; {said}.")
    support = quantile([a.support[i] for i in fit], 0.5)
    if 2 * support >= a.entries:
        return Judgement(
            verdict="vacuous",
            why=f"{met}. The gradient has {support:.0f} of {a.entries} entries in the median of them: the upper bound "
            f"is that of any gradient; {said}.",
        )
    return Judgement(verdict="holds", why=f"{met}; {said}.")


def _unmet(a: TheoryAudit) -> str:
    """What is asked and met by no image, in words; empty where some meet all that decides."""
    if _fit(a) and a.noise_floor == 0 and not a.random:
        return ""
    return "; ".join(h.found for h in _asked(a) if h.met is False)


def _fit(a: TheoryAudit) -> list[int]:
    """Images that meet what Theorem 1 asks: linear on the ball, no pixel cut, a gradient. A switch does not decide."""
    return [i for i in range(a.n) if _linear(a, i) and a.clipped[i] == 0 and a.support[i] > 0]


def _linear(a: TheoryAudit, i: int) -> bool:
    """Is the score linear on the ball of image `i`, at random, along the sign of its gradient and at worst?"""
    most = (1 + NEAR) ** 2 * a.at.linear_adv[i]
    return a.error[i] <= NEAR and abs(a.gain[i] - 1) <= NEAR and a.at.rho_adv[i] <= most


def _asked(a: TheoryAudit) -> tuple[Asked, ...]:
    error, gain = quantile(a.error, 0.5), quantile(a.gain, 0.5)
    straight, uncut = sum(_linear(a, i) for i in range(a.n)), sum(c == 0 for c in a.clipped)
    if a.eps1:
        beyond = Rate(sum(e < a.threat.eps for e in a.eps1), a.n)
        median = quantile(a.eps1, 0.5)
        small = Asked(
            asks=SWITCH,
            met=beyond.k == 0,
            found=f"the radius is beyond the first switch on {beyond} images, {_digits(a.threat.eps / median)} times "
            "it in the median",
        )
    else:
        small = Asked(asks=SWITCH, met=None, found=a.no_switch)
    return (
        Asked(
            asks="the score is linear on the ball (g is its gradient)",
            met=straight == a.n,
            found=f"linear on {straight} of {a.n} images; in the median the score is {_digits(error)} times the "
            f"prediction away from it at random (0: linear) and moves {_two(gain)} times as told along the sign of the "
            "gradient (1: linear)",
        ),
        small,
        Asked(
            asks="no pixel is cut by the box",
            met=uncut == a.n,
            found=f"no pixel cut on {uncut} of {a.n} images; {100 * sum(a.clipped) / a.n:.1f} % of the entries lie "
            "within the radius of the box",
        ),
        Asked(
            asks="the gradient is not zero",
            met=min(a.support) > 0,
            found=f"{sum(s == 0 for s in a.support)} of {a.n} images without any; float32 softmax loses "
            f"{_gone(a.support32, a.support)} of the entries to rounding, {_gone(a.support_large, a.support)} are "
            "below a millionth of the largest",
        ),
        Asked(
            asks="the score is a function: calls on the same images agree",
            met=a.noise_floor == 0 and not a.random,
            found=f"mean squared difference {a.noise_floor:.2g}" + ("; the victim draws noise" if a.random else ""),
        ),
    )


def _cases_grid(d: Demo) -> Grid:
    rows = [
        (c.name, c.lacks or "nothing", f"{c.exact:.4f}", f"{c.drawn:.3f} [{c.low:.3f}, {c.high:.3f}]", f"{c.bound:g}",
         c.verdict)
        for c in d.cases
    ]  # fmt: skip
    head = ("score", "what it lacks", "ratio, closed form", "by draws", "3 |g|_0", "verdict")
    caption = f"n={d.cases[0].n} draws each, seed {d.seed}, eps = 1 around 0; intervals of 95 % for all rows together"
    return Grid(caption, head, tuple(rows), labels=2)


def _above_grid(part: Above) -> Grid:
    jumps = [abs(j) for j in part.jump if j == j and j != 0]
    rows = [
        ("first switch, in 255ths", _three(part.eps1, 255)),
        ("second switch / first", _three([b / a for a, b in zip(part.eps1, part.eps2, strict=True) if a > 0])),
        ("jump of the score", _three(jumps)),
        ("certified ratio, at least", _three(part.ratio)),
    ]
    return Grid(f"n={len(part.eps1)} images: median [10 %, 90 %]", ("quantity", "value"), tuple(rows))


def _radii_grid(a: TheoryAudit) -> Grid:
    rows = []
    for r in a.radii:
        gone = Rate(r.verdict.count("undefined"), a.n)
        rows.append(
            (
                f"{255 * r.eps:.3g}/255",
                f"{gone.k} of {gone.n}",
                _three(r.ratio),
                _three(r.linear_ratio),
                _three(_over(r.rho_adv, r.linear_adv)),
                _three(_over(r.rho_rand, r.linear_rand)),
                f"{sum(v.startswith('violated') for v in r.verdict)} ({r.verdict.count('violated (certified)')})",
            )
        )
    head = ("radius", "0/0", "ratio", "linear theory", "rho_adv / linear", "rho_rand / linear", "outside (certified)")
    return Grid(
        f"{a.victim}, {a.threat.space} space, n={a.n}, {a.draws} draws, seed {a.seed}: median [10 %, 90 %] over "
        f"images; outside of 3 .. 3 |g|_0, certified by Bernstein's bound on the draws, {100 * LEVEL:.0f} % for all "
        "images together",
        head,
        tuple(rows),
    )


def _over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y if y > 0 else math.nan for x, y in zip(a, b, strict=True)]


def _three(values: Sequence[float], times: float = 1.0) -> str:
    """Median [10 %, 90 %]."""
    low, mid, high = (times * quantile(values, q) for q in (0.1, 0.5, 0.9))
    return "\u2013" if mid != mid else f"{_digits(mid)} [{_digits(low)}, {_digits(high)}]"


def _gone(left: Sequence[int], of: Sequence[int]) -> str:
    return f"{_digits(100 * (1 - sum(left) / max(1, sum(of))))} %"


def _two(v: float) -> str:
    """Two decimals, no minus before zero; a dash for what is not defined."""
    return "\u2013" if v != v else f"{round(v, 2) + 0.0:.2f}"


def _digits(v: float) -> str:
    """Three digits: 1830 rather than 1.83e+03."""
    return f"{float(f'{v:.3g}'):g}"


def _stamp(facts: dict[str, Any], n: int | str, seed: int, threat: object) -> str:
    return f"n={n}, seed {seed}, {threat}; sparsetrail {facts['sparsetrail']}, torch {facts['torch']}"


def _plots1(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> tuple[Plot, ...]:
    out = []
    if audits:
        first = audits[0]
        stamp = _stamp(facts, first.n, first.seed, first.threat)
        points = tuple(
            {"net": a.victim, "predicted": p, "ratio": r, "lo": lo, "hi": hi if math.isfinite(hi) else None}
            for a in audits
            for p, r, lo, hi in zip(a.at.linear_ratio, a.at.ratio, a.at.low, a.at.high, strict=True)
            if r == r and math.isfinite(r) and r > 0 and p > 0
        )
        entries = max(a.entries for a in audits)
        out.append(
            Plot(
                kind="ratios",
                title="Ratio met against the linear theory",
                stamp=stamp,
                caption="Each point is an image, its bar Student's interval. On the diagonal the score is linear. "
                "rho_adv is a lower bound: points may lie higher, not lower.",
                values=points,
                marks={"bound": 3.0 * entries},
            )
        )
        curve = tuple(
            {"net": a.victim, "eps": 255 * r.eps, "low": quantile(r.ratio, 0.1), "mid": quantile(r.ratio, 0.5),
             "high": quantile(r.ratio, 0.9)}
            for a in audits for r in a.radii if 0 < quantile(r.ratio, 0.9) < math.inf
        )  # fmt: skip
        marks = {"audited": 255 * first.threat.eps}
        switches = [quantile(a.eps1, 0.5) for a in audits if a.eps1]
        if switches:
            marks["median first switch"] = 255 * switches[0]
        out.append(
            Plot(
                kind="radius",
                title="Ratio by radius",
                stamp=stamp,
                caption="Median and the range from 10 % to 90 % of images where it is defined. Left of its first "
                "switch the score of a spiking network is constant and the ratio is 0/0.",
                values=curve,
                marks={"radii": marks},
            )
        )
        against = [
            {"net": a.victim, "what": what, "eps": 255 * r.eps, "quotient": quantile(_over(*pair), 0.5)}
            for a in audits
            for r in a.radii
            for what, pair in (("rho_adv", (r.rho_adv, r.linear_adv)), ("rho_rand", (r.rho_rand, r.linear_rand)))
        ]
        out.append(
            Plot(
                kind="linear",
                title="Vulnerability over its linear prediction",
                stamp=stamp,
                caption="Medians over images; rho_adv solid, rho_rand dashed. 1: the gradient predicts what happens. A "
                "spiking network moves under noise far more than its surrogate gradient says.",
                values=tuple(v for v in against if 0 < v["quotient"] < math.inf),
            )
        )
        out.append(
            Plot(
                kind="fidelity",
                title="Does the gradient describe the score?",
                stamp=stamp,
                caption="Correlation, image by image, of the change of the score with the change the gradient "
                "predicts, over random directions at the audited radius. 1: it does; 0: the gradient is masked.",
                values=tuple(
                    {"net": a.victim, "fidelity": min(f, 0.9999)} for a in audits for f in a.fidelity if f == f
                ),
            )
        )
    probes = [("a linear classifier", shown.temperature, shown.seed, "pixel space, L-infinity 8/255")] if shown else []
    probes += [(a.victim, a.temperature, a.seed, str(a.threat)) for a in audits if a.temperature]
    for name, rows, seed, threat in probes:
        values = tuple(
            {"scale": t.scale, "what": what, "share": 100 * share}
            for t in rows
            for what, share in (
                ("non-zero gradient entries", t.density),
                ("left by PGD, cross-entropy", t.plain.value),
                ("left by PGD, margin", t.margin.value),
            )
        )
        out.append(
            Plot(
                kind="temperature",
                title=f"Sparsity out of rounding: {name}",
                stamp=_stamp(facts, rows[0].clean.n, seed, threat),
                caption="The same decisions, the logits multiplied. The float32 gradient of the probability empties, "
                "PGD on plain cross-entropy loses its way and robustness seems to rise; with the margin nothing "
                "changes.",
                values=values,
            )
        )
    return tuple(out)


# Corollary 1 ---------------------------------------------------------------------------------------------------------


def _corollary1(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Statement:
    results = []
    if shown is not None:
        results.append(
            Result(
                of="two linear scores",
                verdict="violated (certified)",
                why="g = (10, 0) has one entry and rho_adv = 100 eps^2; g = (1, 1) has two and 4 eps^2. Multiplying a "
                "score by c leaves |g|_0 as it is and multiplies rho_adv by c^2.",
            )
        )
    for a in audits:
        judged = judge_corollary(a)
        rows = tuple((c.layer, _rho(c.rho), f"{c.low:.2f} .. {c.high:.2f}" if c.rho != "constant" else "") for c in
                     a.corollary)  # fmt: skip
        grid = Grid(
            f"{a.victim}, {a.threat}, n={a.n}, seed {a.seed}: rank correlation with rho_adv over images, 95 % "
            "bootstrap",
            ("size of the gradient", "Spearman's rho", "interval"),
            rows,
        )
        results.append(Result(of=a.victim, verdict=judged.verdict, why=judged.why, tables=(grid,)))
    return Statement(
        name="Corollary 1",
        source="the paper, sec. 4.3",
        says="The adversarial vulnerability grows with the number of non-zero entries of the input gradient.",
        formula="rho_adv grows with |g|_0",
        instead="For a linear score rho_adv = eps^2 |g|_1^2: it grows with PR(g) at fixed |g|_2, that is at fixed "
        "vulnerability to noise. It is no function of |g|_0. Few entries say that an adversary gains little over "
        "noise, and both may be devastating.",
        results=tuple(results),
    )


def judge_corollary(a: TheoryAudit) -> Judgement:
    """Corollary 1 on a victim: does rho_adv rank its images as |g|_0 does? Its hypotheses are those of Theorem 1.

    Never certified: rho_adv is what attacks reached, and a rank correlation of lower bounds binds nothing.
    """
    found = a.corollary[0]
    if found.rho == "constant":
        if a.n < 3:
            return Judgement(verdict="undefined", why=FEW.format(n=a.n))
        least, most = min(a.support), max(a.support)
        what = f"|g|_0 is {most} of {a.entries} for all {a.n} images" if least == most else "rho_adv does not vary"
        return Judgement(verdict="vacuous", why=f"{what}: there is nothing to grow with.")
    why = f"Rank correlation of |g|_0 and rho_adv over {a.n} images: {_interval(found)}."
    if _unmet(a) or len(_fit(a)) < a.n:
        failed = "; ".join(h.found for h in _asked(a) if h.met is False)
        return Judgement(verdict="hypothesis not met", why=f"{why} {failed[:1].upper()}{failed[1:]}.")
    return Judgement(verdict="holds" if found.low > 0 else "violated (not certified)", why=why)


def _rho(rho: float | str) -> str:
    return rho if isinstance(rho, str) else f"{rho:.2f}"


# Theorem 2 -----------------------------------------------------------------------------------------------------------


def _theorem2(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Statement:
    results, plots = [], []
    if shown is not None:
        of_s, of_w = backward_from(torch.tensor([1.0, 0.0]), torch.ones(2, 2), torch.ones(2))
        net = TwoLayerSNN(w1=torch.zeros(2, 2), w2=torch.ones(2, 2))
        a, b, _ = net.jacobians(torch.ones(1, 2))
        results.append(
            Result(
                of="part 1, two counterexamples",
                verdict="violated (certified)",
                why=f"Half of the shared gradient is zero: the input gradient keeps {_density(of_s)} of its entries, "
                f"the weight gradient {_density(of_w)}. With W1 = 0 the input gradient has {_density(a)} and the "
                f"weight gradient {_density(b)}.",
                tables=(_zeros_grid(),),
            )
        )
        c = shown.chains
        ends = c.rho[0], c.rho[-1]
        rows = tuple(
            (str(k), f"{r:.2f}", f"{s:.1f}") for k, (r, s) in enumerate(zip(c.rho, c.log10_cond, strict=True), 1)
        )
        results.append(
            Result(
                of="part 2, random dense chains",
                verdict="holds" if list(c.rho) == sorted(c.rho, reverse=True) else "violated (not certified)",
                why=f"Rank correlation of the norms goes from {ends[0]:.2f} in the first layer to {ends[1]:.2f} in "
                f"the last, layer by layer in the table; the proved bounds failed {c.failed.k} times of {c.failed.n}.",
                tables=(
                    Grid(
                        f"{c.nets} nets, {c.inputs} inputs each, seed {shown.seed}: input gradient against each "
                        "layer's",
                        ("layer", "Spearman's rho of norms", "median log10 of the slack"),
                        rows,
                    ),
                ),
            )
        )
    for a in audits:
        judged = judge2(a)
        rows = tuple(
            (t.layer, f"{100 * a.layer_density[t.layer]:.1f} %", *(_interval(v) for v in (z, t, s)))
            for t, z, s in zip(a.tracking, a.tracking_zeros, a.tracking_scaled, strict=True)
        )
        grid = Grid(
            f"{a.victim}, {a.threat.space} space, n={a.n}, seed {a.seed}, eval mode, bootstrap intervals of 95 % for "
            "all layers together; the input "
            f"gradient has {100 * a.input_density:.2f} % non-zero entries",
            ("layer", "non-zero weight gradient", "rho of densities", "rho of norms", "confidence divided out"),
            rows,
        )
        if rows:
            zeros = judge2_zeros(a)
            results.append(Result(of=f"{a.victim}, zeros", verdict=zeros.verdict, why=zeros.why))
        case = f"{a.victim}, norms" if rows else a.victim
        results.append(Result(of=case, verdict=judged.verdict, why=judged.why, tables=(grid,) if rows else ()))
        if rows:
            named = (("norms", a.tracking), ("norms over that at the logits", a.tracking_scaled))
            plots.append(
                Plot(
                    kind="tracking",
                    title=f"Which weight gradients follow the input's: {a.victim}",
                    stamp=_stamp(facts, a.n, a.seed, f"{a.threat.space} space, gradients at the clean images"),
                    caption="Rank correlation over images with bootstrap intervals, 95 % for all layers together, "
                    "layers in forward order. How unsure the network is multiplies every gradient; divided out, what "
                    "the layers share remains.",
                    values=tuple(
                        {
                            "layer": t.layer,
                            "what": what,
                            "rho": None if t.rho == "constant" else t.rho,
                            "low": t.low,
                            "high": t.high,
                        }
                        for what, rows_ in named
                        for t in rows_
                    ),
                )
            )
    return Statement(
        name="Theorem 2",
        source="the paper, sec. 5, eq. 7-9",
        says="(1) Any sparsity in the part of the backward pass that input and weights share reaches both gradients. "
        "(2) The nearer a layer is to the input, the more the sparsity of its gradient follows that of the input.",
        formula="dl/ds = W_1^T delta,   dl/dW_1 = delta s^T",
        instead="Only a shared gradient that is wholly zero reaches both: the last factor W1^T fills partial zeros in "
        "the input gradient, while they stay as rows of the weight gradient. What follows are norms: in one step, "
        "|dl/dW| lies between |h| |dl/ds| / sigma_max(J) and |h| |dl/ds| / sigma_min(J), J the Jacobian up to the "
        "layer; its condition number is the slack. A deeper layer may have less of it: the order is not proved.",
        results=tuple(results),
        plots=tuple(plots),
    )


def _zeros_grid() -> Grid:
    """Where exact zeros come from, by formulas alone."""
    g, x = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 1, 2, 5])
    away = float(atan_derivative(torch.tensor(1e6, dtype=torch.float64), 2.0))
    flips = phase_flips(torch.arange(255), 10).double()
    rows = (
        ("3x3 max pool, stride 2, on 16 x 16: cells that can have a gradient",
         f"at most {100 * maxpool_density_cap(16, 3, 2, 1):.0f} %"),
        ("1x1 convolution, stride 2: cells that are seen at all", f"{100 * strided_conv_density(16, 1, 2, 0):.0f} %"),
        ("arctan derivative a million thresholds away", f"{away:.1e}, never 0"),
        ("BatchNorm in train mode, upstream gradient 25 % dense", _density(bn_backward(g, x, mode="train"))),
        ("BatchNorm in eval mode, the same", _density(bn_backward(g, x, mode="eval"))),
        ("3x3 convolution on 8 x 8, T=10, 1 % of errors and 5 % of inputs not zero: weight gradient",
         f"{100 * conv_weight_grad_density(0.01, 0.05, 10, 8, 8, 1):.0f} %"),
        ("the same, 10 % and 10 %: weight gradient", f"{100 * conv_weight_grad_density(0.1, 0.1, 10, 8, 8, 1):.1f} %"),
        ("spikes of the phase code, T=10, that one grey level more flips",
         f"{float(flips.mean()):.2f} on average, {int(flips.max())} at most"),
    )  # fmt: skip
    return Grid("Where zeros come from, and where they go: formulas of single operations", ("what", "share"), rows)


def judge2_zeros(a: TheoryAudit) -> Judgement:
    """Part 2 on a victim as it is printed, about zeros: layers in order by the share of non-zero entries."""
    what = f"{100 * a.input_density:.2f} % of the entries of the input gradient are not zero"
    vary = [t for t in a.tracking_zeros if t.rho != "constant"]
    if a.n >= 3 and len(vary) < 2:
        return Judgement(
            verdict="vacuous",
            why=f"{what}; its density, or that of all layers but {len(vary)}, is the same for all images: nothing to "
            "follow.",
        )
    return _nearer(a, a.tracking_zeros, f"{what}. Rank correlation of densities")


def judge2(a: TheoryAudit) -> Judgement:
    """What remains of part 2 on a victim, norms: layers in order, confidence divided out."""
    if not a.tracking:
        why = f"The statement is about layers, and this victim shows none. {a.no_tracking}."
        return Judgement(verdict="hypothesis not met", why=why)
    return _nearer(a, a.tracking_scaled, "Rank correlation with the input's norm, confidence divided out")


def _nearer(a: TheoryAudit, layers: Sequence[Tracking], what: str) -> Judgement:
    """Does a layer follow the input the more, the nearer it is? All pairs of layers, in forward order."""
    if a.n < 3:
        return Judgement(verdict="undefined", why=FEW.format(n=a.n))
    vary = [(t, t.rho) for t in layers if not isinstance(t.rho, str)]
    if len(vary) < 2:
        why = f"The gradient varies over the images in {len(vary)} of {len(layers)} layers: nothing to compare."
        return Judgement(verdict="undefined", why=why)
    pairs = [(near, far) for i, near in enumerate(vary) for far in vary[i + 1 :]]
    wrong = [(near, far) for near, far in pairs if near[1] < far[1]]
    sure = [(near, far) for near, far in wrong if near[0].high < far[0].low]
    first, last = vary[0][0], vary[-1][0]
    why = f"{what}: {_interval(first)} in {first.layer}, {_interval(last)} in {last.layer}. "
    why += f"Of {len(pairs)} pairs of layers the farther one follows more in {len(wrong)}"
    if wrong:
        near, far = max(sure or wrong, key=lambda pair: pair[1][1] - pair[0][1])
        why += (
            f", beyond the intervals in {len(sure)}: {_interval(near[0])} in {near[0].layer}, {_interval(far[0])} in "
        )
        why += far[0].layer
    verdict: Verdict = "violated (certified)" if sure else "violated (not certified)" if wrong else "holds"
    return Judgement(verdict=verdict, why=f"{why}.")


def _density(g: Any) -> str:
    return f"{100 * float((g != 0).double().mean()):.0f} %"


def _interval(t: Any) -> str:
    return "constant" if t.rho == "constant" else f"{t.rho:.2f} [{t.low:.2f}, {t.high:.2f}]"


# Theorem 3 -----------------------------------------------------------------------------------------------------------


def _theorem3(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Statement:
    results, plots = [], []
    if shown is not None:
        scan = shown.scan
        false, total = Rate(sum(s.population_false for s in scan), len(scan)), scan[0].violated.n
        w2, w1 = torch.tensor([[1.0, 2], [3, 5]]), torch.tensor([[1.0, 1], [1, 2]])
        rows = []
        for name, want in (("below", -1), ("as dense as", 0), ("denser than", 1)):
            some = [s for s in scan if (s.p_s > s.p_1) - (s.p_s < s.p_1) == want]
            pooled = [Rate(sum(getattr(s, k).k for s in some), len(some) * total) for k in ("violated", "eq16", "eq17")]
            rows.append(
                (f"spikes {name} W1" if want else "spikes as dense as W1", str(len(some)),
                 f"{sum(s.population_false for s in some)} of {len(some)}", *(f"{100 * r.value:.1f} %" for r in pooled),
                 f"{sum(s.corrected_false for s in some)}")
            )  # fmt: skip
        results += [
            Result(
                of="the paper's own counts, random supports",
                verdict="violated (certified)" if false.k else "holds",
                why=f"Between expectations it fails in {false.k} of {false.n} settings, exactly those in which the "
                "spikes are sparser than W1: always, for dense weights. The corrected factor fails in "
                f"{sum(s.corrected_false for s in scan)}.",
                hypotheses=(
                    Asked(
                        asks="supports random, independent, uniform (used in eq. 14, not stated)",
                        met=True,
                        found="drawn so",
                    ),
                    Asked(
                        asks="the weight gradient has as many entries as W2 S (eq. 12)",
                        met=False,
                        found="it has |W2|_0 times the inputs that ever spike",
                    ),
                ),
                tables=(
                    Grid(
                        f"{len(scan)} settings, {total} instances each, seed {shown.seed}: share of instances "
                        "violated; no interval, since settings share their draws",
                        ("regime", "settings", "false in expectation", "eq. 18", "eq. 16", "eq. 17", "corrected false"),
                        tuple(rows),
                    ),
                ),
            ),
            Result(
                of="smallest counterexample",
                verdict="violated (certified)",
                why=f"W2 = (1 2; 3 5), W1 = (1 1; 1 2), s = (1, 0): W2 s has 2 entries, the bound says "
                f"{paper_bound(1, 2, 1, 2, nnz_input_jacobian(w2, w1)):.0f}.",
            ),
            Result(
                of="true gradients of random two-layer networks",
                verdict="violated (certified)" if shown.counts.printed.k < shown.counts.printed.n else "holds",
                why=f"The printed bound covers the true weight gradient in {shown.counts.printed}. What is proved "
                f"here: the exact count {shown.counts.exact_count}, the corrected bound {shown.counts.gradient_bound}.",
            ),
        ]
        plots += [_scan_plot(shown, audits, facts), _curve_plot(shown, facts)]
    for a in audits:
        judged = judge3(a)
        rows = tuple(
            (s.layer, str(s.lines), f"{100 * s.density:.2f} %", f"{100 * s.weight_density:.1f} %", _share(s.violated))
            for s in a.spikes
        )
        grid = Grid(
            f"{a.victim}, n={a.n}: the input of each layer as S between dense square weights, where the counts are "
            "exact",
            ("layer", "input lines", "not zero", "weights not zero", "printed bound fails"),
            rows,
        )
        results.append(Result(of=a.victim, verdict=judged.verdict, why=judged.why, tables=(grid,) if rows else ()))
    return Statement(
        name="Theorem 3",
        source="the paper, sec. 5, eq. 10-18",
        says="The number of non-zero entries of the weight gradient is bounded by that of the input gradient, by a "
        "factor of steps, width and the largest column counts of spikes and weights.",
        formula="E|W2 S|_0 <= (T/d) (k_S / k_1) E|W2 W1|_0",
        instead="For random supports true exactly if the spikes are at least as dense as W1 (or W2 has one entry a "
        "row). Proved in its place: the factor (T/d) min(max(1, x), x (1 + k2 k1 / d)) with x = kS/k1; and for the "
        "true gradients |dp/dW1|_0 = |W2|_0 a and |dp/dW1|_0 <= (n a / r_min) |dp/ds|_0, a the inputs that ever spike, "
        "r_min the smallest row count of W1. Both densities grow with that of W2: so much survives.",
        results=tuple(results),
        plots=tuple(plots),
    )


def judge3(a: TheoryAudit) -> Judgement:
    """Theorem 3 on a victim's own spikes, between dense weights."""
    if not a.spikes:
        return Judgement(
            verdict="hypothesis not met",
            why=f"The statement is about spikes, and the inputs of all {len(a.layers_left)} layers are none."
            if a.layers_left
            else "The statement is about the inputs of layers at every step, and the layers of this victim are not "
            "known: its module is no network of this package.",
        )
    bad = [s for s in a.spikes if s.violated.k]
    k, n = (sum(getattr(s.violated, part) for s in a.spikes) for part in ("k", "n"))
    why = (
        f"For dense square weights on the inputs of its {len(a.spikes)} layers that take spikes the printed bound "
        f"fails in {len(bad)}, on {k} of {n} pairs of layer and image. {_share_words(a)}"
    )
    if a.layers_left:
        why += f" Left out, since their inputs are no spikes: {', '.join(a.layers_left)}."
    return Judgement(verdict="violated (certified)" if bad else "holds", why=why)


def _share_words(a: TheoryAudit) -> str:
    weights, lines = (sum(getattr(s, k) for s in a.spikes) / len(a.spikes) for k in ("weight_density", "density"))
    return f"Of its weights {100 * weights:.0f} % are not zero, of their inputs {100 * lines:.0f} %."


def _share(rate: Rate) -> str:
    low, high = rate.interval()
    return f"{100 * rate.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _scan_plot(shown: Demo, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Plot:
    p_1s, p_ss = (sorted({getattr(s, k) for s in shown.scan}) for k in ("p_1", "p_s"))
    values, n = [], shown.scan[0].violated.n
    for p_1 in p_1s:
        for p_s in p_ss:
            some = [s.violated for s in shown.scan if (s.p_1, s.p_s) == (p_1, p_s)]
            values.append({"p_1": p_1, "p_s": p_s, "violated": 100 * sum(r.k for r in some) / sum(r.n for r in some)})

    def nearest(p: float, of: list[float]) -> float:
        return min(of, key=lambda q: abs(math.log(max(p, 1e-6) / q)))

    own = {(nearest(s.weight_density, p_1s), nearest(s.density, p_ss)) for a in audits for s in a.spikes}
    caption = "Share of instances in which the printed inequality fails. Framed: spikes as dense as W1."
    return Plot(
        kind="scan",
        title="Where the printed inequality fails, %",
        stamp=_stamp(facts, f"{n} a setting", shown.seed, f"d in {sorted({s.d for s in shown.scan})}, no threat"),
        caption=caption + (" Diamonds: the layers of the networks on this page, nearest cell." if own else ""),
        values=tuple(values),
        marks={"own": tuple({"p_1": a, "p_s": b} for a, b in sorted(own))},
    )


def _curve_plot(shown: Demo, facts: dict[str, Any], d: int = 64, steps: int = 10, p_1: float = 0.5) -> Plot:
    p_2, values = 0.1, []
    for k in range(25):
        p_s = 10 ** (-2 + 2 * k / 24)
        truth = expected_nnz_bernoulli(d, d, steps, p_2, p_s) / expected_nnz_bernoulli(d, d, d, p_2, p_1)
        ours = corrected_bound_expect(steps, d, d * p_s, d * p_1, d * p_2)[1]
        for what, value in (("true ratio", truth), ("printed bound", steps / d * p_s / p_1), ("corrected bound", ours)):
            values.append({"p_s": p_s, "what": what, "value": value})
    return Plot(
        kind="curve",
        title=f"The ratio of the counts and its bounds, d={d}, T={steps}, W1 {p_1:g}, W2 {p_2:g} dense",
        stamp=_stamp(facts, "all", shown.seed, "exact expectations, no draws, no threat"),
        caption="Left of the density of W1 the printed bound lies below the truth.",
        values=tuple(values),
    )
