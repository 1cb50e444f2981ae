"""Adversarial training. Madry et al. 2018, arXiv:1706.06083."""

from sparsetrail.defend.crafting import STARTS, attacked
from sparsetrail.defend.settings import (
    check_count,
    check_one_of,
    check_positive,
    check_radius,
    check_reached,
    differentiable,
)
from sparsetrail.training import Seams


def pgd_at(*, eps: float = 2 / 255, steps: int = 2, step: float = 1 / 255, start: str = "none") -> Seams:
    """Adversarial training: every batch is replaced by its adversarial points. Madry et al. 2018, arXiv:1706.06083.

    Defaults are the weak kind that SNN papers compare with (2/255, two steps of 1/255); strong is 8/255 with 5 steps
    of 4/255 from a uniform start. One step of the radius is FGSM training.
    """
    check_radius("eps", eps), check_radius("step", step), check_count(steps=steps), check_positive(step=step)
    check_one_of("start", start, STARTS), check_reached(eps=eps, steps=steps, step=step, start=start)
    knobs = {"eps": eps, "steps": steps, "step": step, "start": start}
    inputs = attacked(eps=eps, steps=steps, step=step, start=start)
    return Seams(inputs=inputs, check=differentiable, name="pgd_at", knobs=knobs)
