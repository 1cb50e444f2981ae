"""Corollary 1: vulnerability grows with the number of non-zero entries of the input gradient."""

from collections.abc import Sequence
from typing import Any

from sparsetrail.recipes.demo import Demo
from sparsetrail.recipes.statements.theorem1 import asked, fitting, unmet
from sparsetrail.recipes.statements.words import FEW, interval
from sparsetrail.recipes.theory import TheoryAudit
from sparsetrail.report.tables import Grid
from sparsetrail.report.theorems import Result, Statement
from sparsetrail.theory import Judgement


def corollary1(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Statement:
    """The statement with its counterexample and every victim's verdict."""
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
    why = f"Rank correlation of |g|_0 and rho_adv over {a.n} images: {interval(found)}."
    if unmet(a) or len(fitting(a)) < a.n:
        failed = "; ".join(h.found for h in asked(a) if h.met is False)
        return Judgement(verdict="hypothesis not met", why=f"{why} {failed[:1].upper()}{failed[1:]}.")
    return Judgement(verdict="holds" if found.low > 0 else "violated (not certified)", why=why)


def _rho(rho: float | str) -> str:
    return rho if isinstance(rho, str) else f"{rho:.2f}"
