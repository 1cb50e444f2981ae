"""One file, one attack, one function of (Problem, Streams, *, knobs); this table lists them."""

from sparsetrail.attacks.apgd import apgd
from sparsetrail.attacks.authors import authors
from sparsetrail.attacks.autoattack import autoattack
from sparsetrail.attacks.bim import bim
from sparsetrail.attacks.codebook import codebook
from sparsetrail.attacks.fab import fab
from sparsetrail.attacks.fgsm import fgsm
from sparsetrail.attacks.losses import LOSSES, TARGETED
from sparsetrail.attacks.mifgsm import mifgsm
from sparsetrail.attacks.noise import noise
from sparsetrail.attacks.pgd import pgd
from sparsetrail.attacks.rays import rays
from sparsetrail.attacks.rfgsm import rfgsm
from sparsetrail.attacks.run import Attack, attack, check_settings, settings
from sparsetrail.attacks.sapgd import sapgd
from sparsetrail.attacks.sda import sda
from sparsetrail.attacks.sparse_rs import sparse_rs
from sparsetrail.attacks.spsa import spsa
from sparsetrail.attacks.square import square

ATTACKS: dict[str, Attack] = {
    "noise": noise,
    "fgsm": fgsm,
    "rfgsm": rfgsm,
    "bim": bim,
    "mifgsm": mifgsm,
    "pgd": pgd,
    "apgd": apgd,
    "sapgd": sapgd,
    "codebook": codebook,
    "sda": sda,
    "sparse_rs": sparse_rs,
    "fab": fab,
    "square": square,
    "spsa": spsa,
    "rays": rays,
    "autoattack": autoattack,
}

__all__ = [
    "ATTACKS", "LOSSES", "TARGETED", "Attack", "apgd", "attack", "authors", "autoattack", "bim", "check_settings",
    "codebook", "fab", "fgsm", "mifgsm", "noise", "pgd", "rays", "rfgsm", "sapgd", "sda", "settings", "sparse_rs",
    "spsa", "square",
]  # fmt: skip
