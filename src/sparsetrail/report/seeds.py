"""What training does to a figure: a row trained from several seeds, its mean and range, and the difference of two rows.

Wilson intervals tell of the images alone; networks trained from another seed differ by more.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparsetrail.core import Report, Run
from sparsetrail.report.labels import Column, Setting, columns, setting_label, settings
from sparsetrail.report.tables import Grid, clean_columns


def spread(report: Report) -> Grid | None:
    """Rows trained from several seeds, a column per attack and setting as in `tables.accuracy`; None without such rows.

    Cards tell `row` and `training seed`. A row's cell is the mean over its seeds (lowest to highest). Two rows of one
    architecture on the same data get their difference too, seed by seed, with its 95 % t-interval (Student 1908,
    Biometrika 6:1), which tells of training on these images, and the number of seeds in which the first is above.
    """
    if not (found := _found(report.runs, report.models)):
        return None
    heads, rows, among = found.heads, found.rows, found.settings
    lines = []
    for alike in found.alike:
        lines += [(row, *(_mean(rows[row].get(head, {})) for head in heads)) for row in alike]
        if len(alike) == 2:
            pairs = [_pairs(*(rows[row].get(head, {}) for row in alike)) for head in heads]
            one, other = (found.pools[row] for row in alike)
            lines.append((f"{one} minus {other}, points", *(_difference(pair) for pair in pairs)))
            lines.append((f"{one} above {other}, seeds", *(_above(pair) for pair in pairs)))
    return Grid(
        caption="Mean over training seeds (lowest to highest); differences seed by seed with 95 % t-interval",
        head=("row", *(h if isinstance(h, str) else h.label for h in heads)),
        rows=tuple(lines),
        groups=(
            ("", 1 + sum(isinstance(h, str) for h in heads)),
            *((setting_label(s, among), sum(not isinstance(h, str) and h.setting == s for h in heads)) for s in among),
        ),
    )


def sentences(runs: Sequence[Run], models: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What PGD leaves of rows trained from several seeds, a line per setting and column; none without such rows."""
    if (found := _found(runs, models)) is None:
        return ()
    out = []
    for head in found.heads:
        if isinstance(head, str) or not head.label.startswith("PGD"):
            continue
        n = {run.accuracy.n for (column, _), run in columns(runs).items() if column == head}
        said = [f"{row} {_mean(found.rows[row][head])}" for row in found.rows if head in found.rows[row]]
        for one, other in (alike for alike in found.alike if len(alike) == 2):
            apart = _difference(_pairs(found.rows[one].get(head, {}), found.rows[other].get(head, {})))
            said += [f"{found.pools[one]} minus {found.pools[other]}, seed by seed, {apart} points"] if apart else []
        where = f"{setting_label(head.setting, found.settings)}, n={' or '.join(map(str, sorted(n)))}"
        out.append(f"{head.label}, {where}, mean over training seeds (range), their number: {'; '.join(said)}.")
    return tuple(out)


def seeded(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The row of every network by its name, where rows were trained from several seeds; empty elsewhere."""
    cards = [card for card in models if "training seed" in card]
    several = len({card["training seed"] for card in cards}) > 1
    return {card["name"]: card["row"] for card in cards} if several else {}


class _Found(NamedTuple):
    heads: list[str | Column]  # clean columns, then one per attack and setting
    rows: dict[str, dict[str | Column, dict[int, float]]]  # row, head, seed
    alike: list[list[str]]  # rows of one architecture on the same data
    pools: dict[str, str]
    settings: tuple[Setting, ...]


def _found(runs: Sequence[Run], models: Sequence[Mapping[str, Any]]) -> _Found | None:
    """The share that is right of every row, column and seed."""
    named = seeded(models)
    runs = [run for run in runs if run.victim in named]
    if not runs:
        return None
    cards = {card["name"]: card for card in models if card.get("name") in named}
    cells, clean = columns(runs), clean_columns(runs)
    rates = [*clean.items(), *((key, run.accuracy) for key, run in cells.items())]
    rows: dict[str, dict[str | Column, dict[int, float]]] = {}
    for (head, (victim, _)), rate in rates:
        rows.setdefault(named[victim], {}).setdefault(head, {})[cards[victim]["training seed"]] = rate.value
    kinds: dict[tuple[str, str], list[str]] = {}
    for card in cards.values():
        alike = kinds.setdefault((card["arch"], card["trained on"]), [])
        if card["row"] in rows and card["row"] not in alike:
            alike.append(card["row"])
    heads = [*dict.fromkeys(name for name, _ in clean), *dict.fromkeys(column for column, _ in cells)]
    pools = {card["row"]: card["pool"] for card in cards.values()}
    return _Found(heads, rows, [*kinds.values()], pools, settings(runs))


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of at least two values."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = _quantile(len(values) - 1, 0.5 + level / 2) * error
    return mean - half, mean + half


def _quantile(freedom: int, p: float) -> float:
    """Where Student's distribution reaches p > 1/2."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < 2 * p - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 2 * p - 1 else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), the finite sums of Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    term, total = (1.0, 0.0) if freedom % 2 == 0 else (math.cos(angle), 0.0)
    for k in range(2 if freedom % 2 == 0 else 3, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)


def _mean(by_seed: dict[int, float]) -> str:
    values = by_seed.values()
    if not values:
        return ""
    return f"{100 * statistics.fmean(values):.1f} % ({100 * min(values):.1f} to {100 * max(values):.1f}), {len(values)}"


def _pairs(one: dict[int, float], other: dict[int, float]) -> list[tuple[float, float]]:
    return [(one[seed], other[seed]) for seed in one if seed in other]


def _difference(pairs: list[tuple[float, float]]) -> str:
    apart = [100 * (a - b) for a, b in pairs]
    if len(apart) < 2:
        return ""
    low, high = t_interval(apart)
    return f"{statistics.fmean(apart):+.1f} [{low:+.1f}, {high:+.1f}]"


def _above(pairs: list[tuple[float, float]]) -> str:
    return f"{sum(a > b for a, b in pairs)} of {len(pairs)}" if pairs else ""
