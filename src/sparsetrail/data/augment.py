"""Pixels as numbers, and the augmentations of the field, as tensor operations where the images already are.

Shape legend: N images, C channels, H and W pixels.
"""

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from sparsetrail.data.sets import DataError


def pixels(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]: v / 255, same shape and device."""
    if images.dtype != torch.uint8:
        raise DataError(f"expected uint8 images 0..255, found {images.dtype}; are these already pixels in [0, 1]?")
    x = images.to(torch.float32)
    return x / x.new_full((), 255)  # a GPU divides by a plain number through its reciprocal, an ulp off


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image [N C H W] left to right with probability one half."""
    _check(images)
    mirrored = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)


def crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Cut each image [N C H W] at a random place out of itself with `padding` zeros on every side; the shape stays."""
    _check(images)
    if padding < 0:
        raise DataError(f"expected a padding of 0 or more pixels, found {padding}; 4 is usual for 32x32")
    n, channels, height, width = images.shape
    corner = torch.randint(2 * padding + 1, (2, n, 1), generator=generator, device=generator.device).to(images.device)
    rows = corner[0] + torch.arange(height, device=images.device)
    columns = corner[1] + torch.arange(width, device=images.device)
    place = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    place = place.view(n, 1, height * width).expand(-1, channels, -1)
    return pad(images, [padding] * 4).flatten(2).gather(2, place).view(n, channels, height, width)


def cutout(images: Tensor, side: int, generator: Generator) -> Tensor:
    """Black out a square of `side` pixels around a random pixel of each image [N C H W], cut at the border.

    DeVries and Taylor 2017, arXiv:1708.04552, who do it behind the normalisation, where zero is the mean colour.
    """
    _check(images)
    if side < 0:
        raise DataError(f"expected a square of 0 or more pixels, found {side}; 8 to 16 are usual for 32x32")
    n, _, *size = images.shape
    out = torch.ones(n, 1, 1, 1, dtype=torch.bool)
    for axis, length in enumerate(size):
        centre = torch.randint(length, (n, 1), generator=generator, device=generator.device).cpu()
        at = torch.arange(length) - centre
        hit = (at >= -(side // 2)) & (at < side - side // 2)
        out = out & (hit[:, None, :, None] if axis == 0 else hit[:, None, None, :])
    return images.masked_fill(out.to(images.device), 0)


def _check(images: Tensor) -> None:
    if images.ndim != 4:
        raise DataError(
            f"expected images [N C H W], found {list(images.shape)}; add the batch dimension with images[None]"
        )
