"""Theorem 1: the ratio of what an adversary and what noise moves, between 3 and 3 |g|_0."""

import math
from collections.abc import Sequence
from typing import Any

from sparsetrail.core import Rate
from sparsetrail.recipes.demo import Demo
from sparsetrail.recipes.statements.words import digits, stamped, three, two
from sparsetrail.recipes.theory import LEVEL, Above, TheoryAudit, quantile
from sparsetrail.report.tables import Grid
from sparsetrail.report.theorems import Asked, Plot, Result, Statement
from sparsetrail.theory import Judgement, Verdict

PLACE: dict[Verdict, str] = {
    "holds": "inside 3 .. 3 |g|_0",
    "violated (certified)": "outside for certain",
    "violated (not certified)": "outside, not certified",
    "undefined": "0/0",
}
NEAR = 0.1  # a score counts as linear on the ball up to this share of its linear prediction, at random and at worst
SWITCH = "the radius is below the first switch, where the score of a spiking network is constant"


def theorem1(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Statement:
    """The statement on closed forms, just above first switches, and on every victim."""
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
            Result(of=a.victim, verdict=judged.verdict, why=judged.why, hypotheses=asked(a), tables=(_radii_grid(a),))
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
    fit = fitting(a)
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
    if failed := unmet(a):
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


def unmet(a: TheoryAudit) -> str:
    """What is asked and met by no image, in words; empty where some meet all that decides."""
    if fitting(a) and a.noise_floor == 0 and not a.random:
        return ""
    return "; ".join(h.found for h in asked(a) if h.met is False)


def fitting(a: TheoryAudit) -> list[int]:
    """Images that meet what Theorem 1 asks: linear on the ball, no pixel cut, a gradient. A switch does not decide."""
    return [i for i in range(a.n) if _linear(a, i) and a.clipped[i] == 0 and a.support[i] > 0]


def _linear(a: TheoryAudit, i: int) -> bool:
    """Is the score linear on the ball of image `i`, at random, along the sign of its gradient and at worst?"""
    most = (1 + NEAR) ** 2 * a.at.linear_adv[i]
    return a.error[i] <= NEAR and abs(a.gain[i] - 1) <= NEAR and a.at.rho_adv[i] <= most


def asked(a: TheoryAudit) -> tuple[Asked, ...]:
    """What Theorem 1 asks of a victim, met or not, and what was found."""
    error, gain = quantile(a.error, 0.5), quantile(a.gain, 0.5)
    straight, uncut = sum(_linear(a, i) for i in range(a.n)), sum(c == 0 for c in a.clipped)
    if a.eps1:
        beyond = Rate(sum(e < a.threat.eps for e in a.eps1), a.n)
        median = quantile(a.eps1, 0.5)
        small = Asked(
            asks=SWITCH,
            met=beyond.k == 0,
            found=f"the radius is beyond the first switch on {beyond} images, {digits(a.threat.eps / median)} times "
            "it in the median",
        )
    else:
        small = Asked(asks=SWITCH, met=None, found=a.no_switch)
    return (
        Asked(
            asks="the score is linear on the ball (g is its gradient)",
            met=straight == a.n,
            found=f"linear on {straight} of {a.n} images; in the median the score is {digits(error)} times the "
            f"prediction away from it at random (0: linear) and moves {two(gain)} times as told along the sign of the "
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
        ("first switch, in 255ths", three(part.eps1, 255)),
        ("second switch / first", three([b / a for a, b in zip(part.eps1, part.eps2, strict=True) if a > 0])),
        ("jump of the score", three(jumps)),
        ("certified ratio, at least", three(part.ratio)),
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
                three(r.ratio),
                three(r.linear_ratio),
                three(_over(r.rho_adv, r.linear_adv)),
                three(_over(r.rho_rand, r.linear_rand)),
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


def _gone(left: Sequence[int], of: Sequence[int]) -> str:
    return f"{digits(100 * (1 - sum(left) / max(1, sum(of))))} %"


def _plots1(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> tuple[Plot, ...]:
    out = []
    if audits:
        first = audits[0]
        stamp = stamped(facts, first.n, first.seed, first.threat)
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
                "predicts, over random directions at the audited radius. 1: it does; 0: it tells nothing "
                "of them. Whether that is masking, only an audit tells.",
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
                stamp=stamped(facts, rows[0].clean.n, seed, threat),
                caption="The same decisions, the logits multiplied. The float32 gradient of the probability empties, "
                "PGD on plain cross-entropy loses its way and robustness seems to rise; with the margin nothing "
                "changes.",
                values=values,
            )
        )
    return tuple(out)
