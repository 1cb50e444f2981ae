"""Theorem 3: non-zero entries of the weight gradient, bounded by those of the input gradient."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from sparsetrail.core import Rate
from sparsetrail.recipes.demo import Demo
from sparsetrail.recipes.statements.words import stamped
from sparsetrail.recipes.theory import TheoryAudit
from sparsetrail.report.tables import Grid
from sparsetrail.report.theorems import Asked, Plot, Result, Statement
from sparsetrail.theory import (
    Judgement,
    corrected_bound_expect,
    expected_nnz_bernoulli,
    nnz_input_jacobian,
    paper_bound,
)


def theorem3(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Statement:
    """The statement by the paper's own counts, on true gradients, and on the spikes of every victim."""
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
        stamp=stamped(facts, f"{n} a setting", shown.seed, f"d in {sorted({s.d for s in shown.scan})}, no threat"),
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
        stamp=stamped(facts, "all", shown.seed, "exact expectations, no draws, no threat"),
        caption="Left of the density of W1 the printed bound lies below the truth.",
        values=tuple(values),
    )
