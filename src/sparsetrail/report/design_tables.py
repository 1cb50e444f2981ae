"""The sweep of designs as points, sentences and tables: clean accuracy against the worst case."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sparsetrail.core import Rate, Report, Threat
from sparsetrail.report.labels import attack_words
from sparsetrail.report.tables import Grid, as_csv, percent, share


@dataclass(frozen=True, kw_only=True)
class Point:
    """One design under one threat: clean accuracy, the worst case over its attacks, and how dense its gradients are.

    `density` is the share of gradient entries that are not zero over all operations, None where there is no trail;
    `strongest` is the attack that leaves least on its own, "none" where none fooled an image.
    """

    victim: str
    design: str
    factor: str
    threat: Threat
    clean: Rate
    robust: Rate
    attacks: int
    strongest: str
    density: float | None


def tradeoff(report: Report) -> tuple[Point, ...]:
    """The points of a sweep: of every model whose card names a `factor`, under every threat it was attacked with."""
    points = []
    trails = {t.victim: t for t in report.trails if not t.replaced and t.mode == "eval"}
    for card in (c for c in report.models if "factor" in c and "clean" in c):
        mine = [run for run in report.runs if run.victim == card["name"] and run.mode == "eval"]
        for threat, data in dict.fromkeys((run.threat, run.data) for run in mine):
            here = [run for run in mine if (run.threat, run.data) == (threat, data)]
            standing = [all(flags) for flags in zip(*(run.robust for run in here), strict=True)]
            least = min(here, key=lambda run: sum(run.robust))
            strongest = " ".join(filter(None, (attack_words(least)[0], attack_words(least)[2])))
            trail = trails.get(card["name"])
            entries = 0 if trail is None else sum(row.entries for row in trail.rows)
            zeros = 0.0 if trail is None else sum(row.zero * row.entries for row in trail.rows)
            points.append(
                Point(
                    victim=card["name"],
                    design=str(card.get("design", card["name"])),
                    factor=str(card["factor"]),
                    threat=threat,
                    clean=Rate(card["clean"]["k"], card["clean"]["n"]),
                    robust=Rate(sum(standing), len(standing)),
                    attacks=len(here),
                    strongest=strongest if sum(least.robust) < sum(least.clean) else "none",
                    density=1 - zeros / entries if entries else None,
                )
            )
    return tuple(points)


def undominated(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one accuracy without losing in the other, by clean accuracy."""

    def beaten(p: Point) -> bool:
        return any(
            q.clean.value >= p.clean.value
            and q.robust.value >= p.robust.value
            and (q.clean.value, q.robust.value) != (p.clean.value, p.robust.value)
            for q in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: p.clean.value)


def tradeoff_sentences(points: Sequence[Point]) -> tuple[str, ...]:
    """For each threat: is there a trade-off, does it go with density, and which designs no other dominates."""
    lines = []
    for threat in dict.fromkeys(p.threat for p in points):
        here = [p for p in points if p.threat == threat]
        text = f"{threat}, worst of {here[0].attacks} attacks, {len(here)} networks: "
        pairs = [("clean and robust accuracy", [(p.clean.value, p.robust.value) for p in here])]
        known = [(p.density, p) for p in here if p.density is not None]
        pairs.append(("density and robust accuracy", [(d, p.robust.value) for d, p in known]))
        pairs.append(("density and clean accuracy", [(d, p.clean.value) for d, p in known]))
        found = [(name, r) for name, pair in pairs if (r := rank_correlation(pair)) is not None]
        if found:
            chance = min(1.0, 1.96 / math.sqrt(len(here) - 1))
            text += "rank correlation of " + ", of ".join(f"{name} {r:+.2f}" for name, r in found)
            text += f" (within {chance:.2f} of 0 is chance); "
        lines.append(f"{text}not dominated: {'; '.join(p.victim for p in undominated(here))}.")
    return tuple(lines)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, ties by their mean rank; None for fewer than three pairs or where one side does not vary."""
    if len(pairs) < 3:
        return None
    sides = []
    for side in zip(*pairs, strict=True):
        order = sorted(side)
        sides.append([order.index(v) + (order.count(v) - 1) / 2 for v in side])
    try:
        return statistics.correlation(*sides)
    except statistics.StatisticsError:
        return None


def tradeoff_grid(points: Sequence[Point]) -> Grid:
    """A row per network and threat, the number of images in the head where it is one, else in the cells."""
    sizes = [{p.clean.n for p in points}, {p.robust.n for p in points}]
    clean, worst = (
        f"{name}, n={next(iter(ns))}" if len(ns) == 1 else name
        for name, ns in zip(("clean", "worst case"), sizes, strict=True)
    )
    caption = "Clean accuracy and worst case per image, with 95 % Wilson intervals"
    if any(p.clean.n != p.robust.n for p in points):
        caption += "; the two are of different sets of images, so the worst case can come out above clean"
    return Grid(
        caption=caption,
        head=("network", "threat", clean, worst, "strongest attack alone", "gradient density"),
        rows=tuple(
            (p.victim, str(p.threat), percent(p.clean, n=len(sizes[0]) > 1), percent(p.robust, n=len(sizes[1]) > 1),
             p.strongest, share(p.density))
            for p in points
        ),
        labels=2,
    )  # fmt: skip


def tradeoff_csv(points: Sequence[Point]) -> str:
    """One row a network and threat: counts, intervals and density, shares 0..1."""
    head = ("victim", "design", "factor", "threat", "clean_k", "clean_n", "clean_low", "clean_high", "robust_k",
            "robust_n", "robust_low", "robust_high", "attacks", "density")  # fmt: skip
    rows = [
        (p.victim, p.design, p.factor, str(p.threat), p.clean.k, p.clean.n, *p.clean.interval(), p.robust.k, p.robust.n,
         *p.robust.interval(), p.attacks, p.density)
        for p in points
    ]  # fmt: skip
    return as_csv(head, rows)
