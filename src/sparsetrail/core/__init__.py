"""The nouns shared by both halves: what is attacked, what the adversary may do, and what was found.

`u` is whichever tensor the adversary writes to: pixels [n c h w] or the encoded input [t n c h w]. Input units are
those of the attacked tensor, 0..1 for pixels and for spikes alike; the two are different budgets, never compared.
"""

from sparsetrail.core.problem import Guide, Problem, Streams, correct, cross_entropy, margin
from sparsetrail.core.results import Audit, Claim, Finding, Rate, Report, Run, Trail, TrailRow
from sparsetrail.core.threat import L0, L2, Linf, Space, Threat, as_fraction, grey, image_axis
from sparsetrail.core.victim import Memory, Mode, Route, Victim

__all__ = [
    "L0", "L2", "Audit", "Claim", "Finding", "Guide", "Linf", "Memory", "Mode", "Problem", "Rate", "Report", "Route",
    "Run", "Space", "Streams", "Threat", "Trail", "TrailRow", "Victim", "as_fraction", "correct", "cross_entropy",
    "grey", "image_axis", "margin",
]  # fmt: skip
