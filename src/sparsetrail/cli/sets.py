"""`data`: image sets fetched, taken in, verified, listed."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sparsetrail import data


def data_get(name: str, *, root: Path | None = None) -> None:
    """Download NAME (cifar10, cifar100, fashion-mnist), check it against the known content hash, keep it."""
    _say_import(data.get(name, root=root, progress=lambda line: print(line, file=sys.stderr)))


def data_add(
    path: Path,
    *,
    name: str | None = None,
    split: Annotated[
        Literal["train", "test"] | None,
        Parameter(help="of an npz with images and labels; default by its name, or test"),
    ] = None,
    root: Path | None = None,
) -> None:
    """Take in PATH: official python or binary files, PNG sheets, npz, IDX, or an image folder; checked before kept."""
    _say_import(data.add(path, name=name, split=split, root=root))


def _say_import(found: Any) -> None:
    for e in found.entries:
        tag = "official content" if e.official else "not the official content"
        print(f"{e.name}/{e.split}: {e.n} images {e.shape}, sha256 {e.sha256[:12]} ({tag})")
    for line in found.warnings:
        print(f"note: {line}")


def data_verify(*names: str, root: Path | None = None) -> None:
    """Read every set in the cache, or those of these NAMES, and compare it with its recorded content hash."""
    held = {e.name for e in data.available(root)}
    if unknown := sorted(set(names) - held):
        known = ", ".join(sorted(held)) or "no set, the cache is empty"
        raise ValueError(f"{', '.join(unknown)}: expected some of {known}")
    bad = 0
    for e in (e for name in names or (None,) for e in data.verify(root, name=name)):
        print(f"{e.name}/{e.split}: {e.problem or 'ok'}")
        bad += bool(e.problem)
    if bad:
        raise ValueError(f"{bad} damaged; see above")


def data_list(*, root: Path | None = None) -> None:
    """Name, split, size and identity of every set at hand."""
    for e in data.available(root):
        tag = "official" if e.official else "unofficial"
        print(f"{e.name:<22}{e.split:<7}{e.n:>7}  {'x'.join(map(str, e.shape)):<10} {e.sha256[:12]}  {tag}  {e.path}")
