"""Example images as pixels on a page: clean, adversarial, and their difference under one stated gain."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsetrail._files import write_atomic
from sparsetrail.report.io import ReportError

EXAMPLES = "examples.npz"
Image = NDArray[np.uint8]  # [h w c] or [h w], grey levels 0..255


@dataclass(frozen=True)
class Example:
    """One column of the picture: three data URIs and the words around them."""

    title: str
    label: str
    predicted: str
    fooled: bool
    clean: str
    adversarial: str
    difference: str


def examples(images: Sequence[Mapping[str, Any]]) -> tuple[tuple[Example, ...], int]:
    """Examples ready for the page, and the gain of the difference, a power of two and the same for all of them.

    Each image is a mapping with `clean` and `adversarial` (uint8 [h w c] or [h w]), `label`, `predicted`, `title`.
    """
    pairs = [(_image(item, i, "clean"), _image(item, i, "adversarial")) for i, item in enumerate(images)]
    for i, (clean, adversarial) in enumerate(pairs):
        if clean.shape != adversarial.shape:
            raise ReportError(
                f"images[{i}]: expected clean and adversarial of one shape, found {clean.shape} and "
                f"{adversarial.shape}; likely fix: pass both as pixels, not as encoded input"
            )
    shifts = [adversarial.astype(np.int16) - clean for clean, adversarial in pairs]
    most = max((int(np.abs(shift).max()) for shift in shifts), default=0)
    gain = 1
    while most and 2 * gain * most <= 127:
        gain *= 2
    out = []
    for item, (clean, adversarial), shift in zip(images, pairs, shifts, strict=True):
        label, predicted = str(item.get("label", "")), str(item.get("predicted", ""))
        difference = (128 + gain * shift).clip(0, 255).astype(np.uint8)
        uris = [png(image) for image in (clean, adversarial, difference)]
        out.append(Example(str(item.get("title", "")), label, predicted, label != predicted, *uris))
    return tuple(out), gain


def keep(folder: Path, images: Sequence[Mapping[str, Any]]) -> None:
    """Put example images beside the report, so that it can be drawn again with them."""
    words = [{k: str(v) for k, v in item.items() if k not in ("clean", "adversarial")} for item in images]
    arrays = {f"{k}{i}": np.asarray(item[k]) for i, item in enumerate(images) for k in ("clean", "adversarial")}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, words=np.array(json.dumps(words)), **arrays)
    write_atomic(folder / EXAMPLES, buffer.getvalue())


def kept(folder: Path) -> list[dict[str, Any]]:
    """The example images that `keep` put into a folder; none where there are none."""
    if not (folder / EXAMPLES).exists():
        return []
    with np.load(folder / EXAMPLES, allow_pickle=False) as held:
        words = json.loads(str(held["words"]))
        return [w | {k: held[f"{k}{i}"] for k in ("clean", "adversarial")} for i, w in enumerate(words)]


def png(image: Image) -> str:
    """An image as a PNG data URI."""
    from PIL import Image as Pillow

    out = io.BytesIO()
    Pillow.fromarray(image).save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _image(item: Mapping[str, Any], i: int, key: str) -> Image:
    if key not in item:
        raise ReportError(f"images[{i}]: expected the key {key!r}, found {sorted(item)}; likely fix: add the pixels")
    image = np.asarray(item[key])
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ReportError(
            f"images[{i}].{key}: expected uint8 [h w], [h w 1] or [h w 3], found {image.dtype} {list(image.shape)}; "
            "likely fix: move channels last, then (255 * x).round() as uint8"
        )
    return np.ascontiguousarray(image)
