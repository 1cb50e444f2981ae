"""AutoAttack. Croce & Hein 2020, arXiv:2003.01690, sec. 5: its standard version, on our own four attacks."""

from sparsetrail.attacks.apgd import apgd
from sparsetrail.attacks.fab import fab
from sparsetrail.attacks.square import square
from sparsetrail.core import Problem, Streams


def autoattack(p: Problem, g: Streams, *, steps: int = 100, targets: int = 9, queries: int = 5000) -> None:
    """APGD on cross-entropy, APGD-T, FAB-T and Square one after the other, each on the images that still stand.

    The defaults are the standard version's: 100 steps, nine classes, 5000 queries, one run of each; fewer are another
    attack of the same name. For L-infinity and L2 balls. Of a victim that draws noise nothing is dropped, and every
    gradient is a mean over draws: the published version for those has other members. In pixel space an image of 256
    grey levels counts as fooled when its point rounded to them is, which the published version does not ask.
    """
    if p.ball.norm == "l0":
        raise ValueError(f"autoattack: expected an L-infinity or L2 ball, got {p.ball}; use sda")
    apgd(p, g, steps=steps, loss="ce")
    apgd(p, g, steps=steps, loss="targeted", targets=targets)
    fab(p, g, steps=steps, targets=targets)
    square(p, g, queries=queries)
