"""What an audit refuses before it begins: settings, images, codebooks and guides that would mislead."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetrail.attacks import attack
from sparsetrail.attacks.run import on_grey_levels
from sparsetrail.auditing.work import SAMPLE
from sparsetrail.core import Problem, Streams, Threat, Victim, grey


def refuse(
    threats: Sequence[Threat],
    *,
    claim: float | None = None,
    batch: int = 64,
    eot: int | None = None,
    minutes: float | None = None,
    budget: str = "standard",
) -> None:
    """ValueError for settings no audit can be made with; before anything is written."""
    if claim is not None and not 0 <= claim <= 1:
        raise ValueError(f"claim: expected a robust accuracy within 0..1, got {claim}; write 0.45 for 45 %")
    if claim is not None and len(threats) > 1:
        raise ValueError("claim: expected one threat to lay the claim beside, got several; audit them one by one")
    if budget not in SAMPLE:
        raise ValueError(f"budget: expected one of {', '.join(SAMPLE)}, got {budget!r}")
    if batch < 1 or (eot is not None and eot < 1):
        raise ValueError(f"expected at least one image a batch and one gradient a step, got batch={batch}, eot={eot}")
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes: expected 0 or more, got {minutes}")
    for t in threats:
        if t.eps == 0:
            raise ValueError("eps: expected a radius above 0, got 0; there is nothing to audit")
    if len(set(threats)) < len(threats):
        raise ValueError("threats: expected each once, got one twice")


def refuse_images(victim: Victim, threat: Threat, x: Tensor, y: Tensor, indices: tuple[int, ...]) -> None:
    """ValueError for images, places, codebooks and radii that do not fit a victim and a threat."""
    if x.dtype != torch.float32:
        raise ValueError(f"images: expected float32 pixels in 0..1, got {x.dtype}; use x.float()")
    if len(indices) != len(y):
        raise ValueError(f"indices: expected one an image ({len(y)}), got {len(indices)}")
    _refuse_codebook(victim, x)
    refuse_flips(victim, threat, x)
    if threat.space != "pixel" or threat.box != (0.0, 1.0):
        return
    on = grey(x)
    if bool(on.any()) and not bool(on.all()):
        raise ValueError(
            f"expected all images on 256 grey levels or none, got {int(on.sum())} of {len(on)}; round them"
        )
    on_grey_levels(threat, x)


def refuse_flips(victim: Victim, threat: Threat, x: Tensor) -> None:
    """ValueError for an L0 ball, which flips entries of two values, around images or a code of others."""
    if threat.norm != "l0" or (threat.space == "encoded" and victim.random):  # its draws are the victim's own affair
        return
    with torch.no_grad():
        u0 = x if threat.space == "pixel" else victim.encode(x[:8])
    lo, hi = threat.box
    if not bool(((u0 == lo) | (u0 == hi)).all()):
        what, fix = ("images", "space encoded") if threat.space == "pixel" else ("a code", "norm linf or l2")
        raise ValueError(
            f"norm l0: expected {what} of {lo:g} and {hi:g} alone, whose entries can be flipped, found other values in "
            f"{threat.space} space; use --{fix}"
        )


def _refuse_codebook(victim: Victim, x: Tensor) -> None:
    """A codebook must be the code of the grey levels, or attacks by it aim at another network."""
    if victim.codebook is None or victim.random or not bool(grey(x[:4]).all()):
        return
    with torch.no_grad():
        code = victim.encode(x[:4])
    book = victim.codebook.to(code)
    told = book[(x[:4] * 255).round().long()].movedim(-1, 0) if book.shape == (256, len(code)) else None
    if told is None or told.shape != code.shape or not torch.allclose(told, code, rtol=1e-5, atol=1e-6):
        found = f"one of {tuple(victim.codebook.shape)}"
        if told is not None and told.shape == code.shape:
            t, *where = (~torch.isclose(told, code, rtol=1e-5, atol=1e-6)).nonzero()[0].tolist()
            at = (t, *where)
            level = round(255 * float(x[tuple(where)]))
            found = f"{float(told[at]):g} for grey level {level} at step {t}, where encode gives {float(code[at]):g}"
        raise ValueError(
            f"{victim.name}: expected codebook [256 {len(code)}], the code of every grey level step by step, found "
            f"{found}; leave it out, or give encode of the 256 levels"
        )


def refuse_guides(victim: Victim, threat: Threat, x: Tensor, y: Tensor, guides: Sequence[Victim]) -> None:
    """Every guide must fit the victim and lead somewhere: found out on one image, not in the middle of the battery."""

    def look(p: Problem, g: Streams) -> None:
        p.grad(p.u0)

    for guide in guides:
        try:
            attack(look, victim, threat, x[:8], y[:8], guide=guide)
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{guide.name} cannot lead an attack on {victim.name}: {error}") from None
