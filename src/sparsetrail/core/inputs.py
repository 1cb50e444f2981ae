"""What attacks, audits and trails refuse before they run: images, labels, victims and threats that do not fit."""

from typing import Any

import torch
from torch import Tensor

from sparsetrail.core.threat import Threat
from sparsetrail.core.victim import Victim

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def refuse_images(victim: Any, x: Any, y: Any) -> None:
    """ValueError for anything but images [n c h w] of finite floats in 0..1 with a class [n] of the victim's each."""
    refuse_batch(victim, x, y)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images: expected float32 pixels in 0..1, got {x.dtype}; divide uint8 images by 255")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(
            f"images: expected finite pixels in 0..1, got {float(x.min()):.3g}..{float(x.max()):.3g}; divide 8-bit "
            "images by 255, and put mean and standard deviation into encode or logits"
        )


def refuse_batch(victim: Any, x: Any, y: Any) -> None:
    """ValueError for anything but a victim, and tensors [n ...] with a class [n] of the victim's each."""
    refuse_victim(victim)
    for what, t in (("images", x), ("labels", y)):
        if not isinstance(t, Tensor):
            raise ValueError(f"{what}: expected a tensor, got {type(t).__name__}; use torch.as_tensor")
    if x.device != y.device:
        raise ValueError(f"expected images and labels on one device, got {x.device} and {y.device}; move the labels")
    if x.ndim < 2 or len(x) == 0 or y.shape != x.shape[:1]:
        raise ValueError(f"expected images [n c h w] and labels [n], n > 0, got {tuple(x.shape)} and {tuple(y.shape)}")
    if y.dtype not in WHOLE:
        raise ValueError(f"labels: expected whole numbers, the class of every image, got {y.dtype}; use y.long()")
    if int(y.min()) < 0 or int(y.max()) >= victim.classes:
        raise ValueError(f"labels: expected 0..{victim.classes - 1}, got {int(y.min())}..{int(y.max())}")


def refuse_victim(victim: Any) -> None:
    """ValueError for anything but a `Victim`."""
    if not isinstance(victim, Victim):
        raise ValueError(
            f"expected a Victim, got {type(victim).__name__}; make one of a network and its encoder: "
            "sparsetrail.victim(net, encode)"
        )


def refuse_threat(threat: Any) -> None:
    """ValueError for anything but a `Threat`."""
    if not isinstance(threat, Threat):
        raise ValueError(f"expected a threat such as Linf(8 / 255, space='pixel'), got {threat!r}")
