"""From the bytes of published files to arrays: CIFAR pickles, records and sheets, IDX, and single pictures.

Each reader takes the files of one split and checks that they agree among themselves. Shape legend: N images, C
channels, H and W pixels.
"""

import io
import json
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsetrail.data.sets import DataError, Labels, Pixels

Arrays = tuple[Pixels, Labels]


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, with which Python 3 writes bytes into old pickles."""
    if encoding not in ("latin1", "latin-1"):
        raise DataError(f"expected latin1 bytes in the pickle, found encoding {encoding!r}; not an official file")
    return text.encode("latin1")


def _empty_array(_kind: object, _shape: object, _code: object) -> np.ndarray:
    """Stands in for numpy's _reconstruct: an empty array, whose shape and bytes the pickle fills in afterwards."""
    return np.empty(0, dtype=np.uint8)


def _dtype(code: str, align: int = 0, copy: int = 0) -> np.dtype[Any]:
    """Stands in for numpy.dtype, which from numpy 2.4 on warns about the whole numbers in old pickles."""
    if code not in ("u1", "i4", "i8"):  # a structured type can be told to read beyond its bytes
        raise DataError(f"expected arrays of u1, i4 or i8 in the pickle, found {code!r}; not an official file")
    return np.dtype(code, align=bool(align), copy=bool(copy))


class _Maker:
    """A function that a pickle may call and may not alter."""

    __slots__ = ("_make",)

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: object) -> None:
        raise DataError(
            "expected plain arrays in the pickle, found an attempt to alter a function; not an official file"
        )


_ARRAY_KIND = object()
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Maker(_empty_array),
    ("numpy._core.multiarray", "_reconstruct"): _Maker(_empty_array),
    ("numpy", "ndarray"): _ARRAY_KIND,
    ("numpy", "dtype"): _Maker(_dtype),
    ("_codecs", "encode"): _Maker(_latin1),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and numpy arrays; any other class or function is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(
                f"expected a pickle of plain numpy arrays, found a call to {module}.{name}, which was not made; "
                "this is not an official file, so do not open it elsewhere: get it again from its publisher"
            )
        return _ALLOWED[module, name]


def unpickle(blob: bytes) -> dict[str, Any]:
    """The dict of an official CIFAR batch, read without running anything that the file names."""
    try:
        batch = _ArraysOnly(io.BytesIO(blob), encoding="latin1").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle raises nearly any exception
        raise DataError(f"expected a CIFAR pickle, found {type(error).__name__}: {error}; download it again") from error
    if not isinstance(batch, dict):
        raise DataError(f"expected a pickled dict, found {type(batch).__name__}; not an official file")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in batch.items()}


def cifar_pickles(label_key: str) -> Callable[[Sequence[bytes]], Arrays]:
    """A reader of official CIFAR python batches: their bytes to images [n 3 32 32] and the labels under `label_key`."""

    def read(blobs: Sequence[bytes]) -> Arrays:
        images, labels = [], []
        for blob in blobs:
            batch = unpickle(blob)
            if "data" not in batch or label_key not in batch:
                raise DataError(f"expected keys data and {label_key}, found {', '.join(sorted(batch))}; wrong file?")
            pixels = batch["data"]
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
                raise DataError(f"expected data uint8 [N 3072], found {_describe(pixels)}; wrong file?")
            images.append(pixels.reshape(-1, 3, 32, 32))
            labels.append(label_array(batch[label_key], len(pixels)))
        return np.concatenate(images), np.concatenate(labels)

    return read


def label_array(values: Any, n: int) -> Labels:
    """Whole-number labels [N] from a list or an array [N] or [N 1]."""
    try:
        labels = np.asarray(values)
    except ValueError:
        labels = np.empty(0, dtype=object)
    if labels.ndim == 2 and labels.shape[1:] == (1,):
        labels = labels[:, 0]
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise DataError(f"expected {n} whole-number labels, one per image, found {_describe(labels)}; cut short?")
    return labels.astype(np.int64)


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def cifar_binary(label_bytes: int) -> Callable[[Sequence[bytes]], Arrays]:
    """Records of 1 or 2 label bytes (of two the last is the fine label) and 3072 CHW pixel bytes."""

    def read(blobs: Sequence[bytes]) -> Arrays:
        record = label_bytes + 3072
        for blob in blobs:
            if len(blob) % record:
                raise DataError(f"expected records of {record} bytes, found {len(blob) % record} left over; cut short?")
        rows = np.concatenate([np.frombuffer(blob, dtype=np.uint8).reshape(-1, record) for blob in blobs])
        return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].astype(np.int64)

    return read


def cifar_sheets(blobs: Sequence[bytes]) -> Arrays:
    """PNG sheets with one 32x32 RGB image (HWC) in each row of 1024 pixels, then a JSON list of labels."""
    images = []
    for blob in blobs[:-1]:
        sheet = decode(blob)
        if sheet.shape[0] != 3 or sheet.shape[2] != 1024:
            raise DataError(f"expected an RGB sheet 1024 pixels wide, found [C H W] {list(sheet.shape)}; wrong file?")
        images.append(sheet.reshape(3, -1, 32, 32).transpose(1, 0, 2, 3))
    pixels = np.concatenate(images)
    try:
        labels = json.loads(blobs[-1])
    except ValueError as error:
        raise DataError(f"expected a JSON list of labels, found {error}; download it again") from error
    return pixels, label_array(labels, len(pixels))


def idx(blobs: Sequence[bytes]) -> Arrays:
    """IDX files of uint8: images [N H W], labels [N] (the MNIST format: magic 00 00 08 ndim, big-endian sizes)."""
    images, labels = (_idx_array(blob, ndim) for blob, ndim in zip(blobs, (3, 1), strict=True))
    return images[:, None], label_array(labels, len(images))


def _idx_array(blob: bytes, ndim: int) -> Pixels:
    head = 4 + 4 * ndim
    if len(blob) < head or blob[:4] != bytes([0, 0, 8, ndim]):
        raise DataError(
            f"expected an IDX file of uint8 with {ndim} dimensions, found a start of {blob[:4]!r}; wrong file?"
        )
    shape = [int(size) for size in np.frombuffer(blob, dtype=">u4", count=ndim, offset=4)]
    size = int(np.prod(shape, dtype=object))
    if len(blob) != head + size:
        raise DataError(f"expected {size} bytes for {shape}, found {len(blob) - head}; cut short? download it again")
    return np.frombuffer(blob, dtype=np.uint8, offset=head).reshape(shape)


def decode(blob: bytes) -> Pixels:
    """A grey, RGB or palette picture as uint8 [C H W]."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(blob)) as picture:
            if picture.mode not in ("L", "RGB", "P"):
                raise DataError(f"expected an 8-bit grey or RGB picture, found mode {picture.mode}; convert it first")
            array = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"expected a PNG or JPEG picture, found {error}; is the file damaged?") from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
