"""How the statements put their figures."""

from collections.abc import Sequence
from typing import Any

from sparsetrail.recipes.theory import quantile

FEW = "Too few images to rank: {n}, at least 3 are needed."


def three(values: Sequence[float], times: float = 1.0) -> str:
    """Median [10 %, 90 %]."""
    low, mid, high = (times * quantile(values, q) for q in (0.1, 0.5, 0.9))
    return "\u2013" if mid != mid else f"{digits(mid)} [{digits(low)}, {digits(high)}]"


def two(v: float) -> str:
    """Two decimals, no minus before zero; a dash for what is not defined."""
    return "\u2013" if v != v else f"{round(v, 2) + 0.0:.2f}"


def digits(v: float) -> str:
    """Three digits: 1830 rather than 1.83e+03."""
    return f"{float(f'{v:.3g}'):g}"


def stamped(facts: dict[str, Any], n: int | str, seed: int, threat: object) -> str:
    """What a plot is of: n, seed, threat and versions."""
    return f"n={n}, seed {seed}, {threat}; sparsetrail {facts['sparsetrail']}, torch {facts['torch']}"


def interval(t: Any) -> str:
    """A rank correlation with its interval."""
    return "constant" if t.rho == "constant" else f"{t.rho:.2f} [{t.low:.2f}, {t.high:.2f}]"
