"""What training does to a figure: a row trained from several seeds, its mean and range, and the difference of two rows.

Wilson intervals tell of the images alone; networks trained from another seed differ by more.
"""

import math
import statistics
from collections.abc import Sequence

from sparsetrail.core import Report
from sparsetrail.report.labels import columns, setting_label, settings
from sparsetrail.report.tables import Grid, clean_columns


def spread(report: Report) -> Grid | None:
    """Rows trained from several seeds, a column per attack and setting as in `tables.accuracy`; None without such rows.

    Cards tell `row` and `training seed`. A row's cell is the mean over its seeds (lowest to highest). Two rows of one
    architecture on the same data get their difference too, seed by seed, with its 95 % t-interval (Student 1908,
    Biometrika 6:1), which tells of training on these images, and the number of seeds in which the first is above.
    """
    cards = {c["name"]: c for c in report.models if "training seed" in c}
    runs = [run for run in report.runs if run.victim in cards]
    if len({card["training seed"] for card in cards.values()}) < 2 or not runs:
        return None
    cells, clean, among = columns(runs), clean_columns(runs), settings(runs)
    heads = [*dict.fromkeys(name for name, _ in clean), *dict.fromkeys(column for column, _ in cells)]
    found: dict[str, dict[int, dict[int, float]]] = {}  # row, place among heads, seed
    rates = [*clean.items(), *((key, run.accuracy) for key, run in cells.items())]
    for (head, (victim, _)), rate in rates:
        card = cards[victim]
        found.setdefault(card["row"], {}).setdefault(heads.index(head), {})[card["training seed"]] = rate.value
    lines = []
    kinds = {card["row"]: (card["arch"], card["trained on"]) for card in cards.values()}
    pools = {card["row"]: card["pool"] for card in cards.values()}
    for kind in dict.fromkeys(kinds.values()):
        rows = [row for row in found if kinds[row] == kind]
        lines += [(row, *(_mean(found[row].get(i, {})) for i in range(len(heads)))) for row in rows]
        if len(rows) == 2:
            pairs = [_pairs(*(found[row].get(i, {}) for row in rows)) for i in range(len(heads))]
            one, other = (pools[row] for row in rows)
            lines.append((f"{one} minus {other}, points", *(_difference(pair) for pair in pairs)))
            lines.append((f"{one} above {other}, seeds", *(_above(pair) for pair in pairs)))
    named = len(heads) - len(dict.fromkeys(column for column, _ in cells))
    return Grid(
        caption="Mean over training seeds (lowest to highest); differences seed by seed with 95 % t-interval",
        head=("row", *(h if isinstance(h, str) else h.label for h in heads)),
        rows=tuple(lines),
        groups=(
            ("", 1 + named),
            *((setting_label(s, among), sum(not isinstance(h, str) and h.setting == s for h in heads)) for s in among),
        ),
    )


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
