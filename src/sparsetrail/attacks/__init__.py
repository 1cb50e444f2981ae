"""One file, one attack, one function of (Problem, Streams, *, knobs); this table lists them."""

from sparsetrail.attacks.authors import authors
from sparsetrail.attacks.fgsm import fgsm
from sparsetrail.attacks.noise import noise
from sparsetrail.attacks.pgd import pgd
from sparsetrail.attacks.run import Attack, attack, settings

ATTACKS: dict[str, Attack] = {"noise": noise, "fgsm": fgsm, "pgd": pgd}

__all__ = ["ATTACKS", "Attack", "attack", "authors", "fgsm", "noise", "pgd", "settings"]
