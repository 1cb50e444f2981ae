"""What can be said of a statement that was put to the test. Never that a theorem is true: only what was met."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal[
    "holds",
    "violated (certified)",
    "violated (not certified)",
    "vacuous",
    "undefined",
    "hypothesis not met",
]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict and the numbers it rests on, in a sentence.

    holds: no value met contradicts the statement. violated (certified): contradicted beyond the error of the estimate,
    or by exact arithmetic; (not certified): within it. vacuous: the bound allows every value there is. undefined: 0/0.
    hypothesis not met: the statement says nothing about this case.
    """

    verdict: Verdict
    why: str


def against(value: float, bound: float) -> Verdict:
    """Exact counts or expectations against an upper bound on them: `value <= bound`; nan is undefined."""
    if value != value or bound != bound:
        return "undefined"
    return "holds" if value <= bound * (1 + 1e-12) else "violated (certified)"
