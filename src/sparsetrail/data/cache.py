"""The cache of image sets on disk: <root>/<name>/<split>/{images.npy, labels.npy, info.json}. Nothing here downloads.

The root is the argument, else the environment variable SPARSETRAIL_DATA, else ~/.cache/sparsetrail/data.
"""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrail.data import layouts
from sparsetrail.data.sets import CLASSES, KNOWN, SPLITS, DataError, Dataset, learnt, make_dataset

Progress = Callable[[str], None]

SLICE = "fashion-mnist-slice"
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Anything wrong in a folder of the cache surfaces as one of these while it is read.
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One split in the cache. `shape` is (C, H, W); `problem` is empty or says what is wrong and how to mend it."""

    name: str
    split: str
    n: int
    shape: tuple[int, ...]
    sha256: str
    official: bool
    path: Path
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Import:
    """What `add` or `get` put into the cache, by which route, and what the user should know about it."""

    entries: tuple[Entry, ...]
    route: str
    warnings: tuple[str, ...] = ()


def cache_root(root: Path | str | None = None) -> Path:
    """The folder of the cache; it need not exist."""
    return Path(root or os.environ.get("SPARSETRAIL_DATA") or "~/.cache/sparsetrail/data").expanduser()


def load(name: str | Path, split: str = "test", *, root: Path | str | None = None) -> Dataset:
    """A set in the cache, the embedded "fashion-mnist-slice", or whatever recognised layout lies at a path.

    The content hash is recomputed over what is returned. Never downloads; raises DataError with the command that helps.
    """
    if split not in SPLITS:
        raise DataError(f"expected split train or test, found {split!r}; for a validation part use split_validation")
    if name == SLICE:
        return _embedded(split)
    folder = cache_root(root) / name if isinstance(name, str) and _NAME.fullmatch(name) else None
    if folder is not None and folder.is_dir():
        if not (folder / split).is_dir():
            raise DataError(
                f"expected the {split} split of {name} in {folder / split}, found {_listing(folder)}; "
                f"run: sparsetrail data {f'get {name}' if name in KNOWN else _add_command(name, split)}"
            )
        part = _read(folder / split)
        if problem := _mixed(folder):
            raise DataError(problem)
        return part
    path = Path(name).expanduser()
    if path.exists():
        if (path / split / "info.json").is_file():
            return _read(path / split)
        found = layouts.read(path)
        if split not in found.splits:
            how = f"say it: sparsetrail data add {path} --split {split}" if found.notes else "try the other split"
            raise DataError(f"{path}: expected a {split} split, found {found.layout} without it; {how}")
        for note in found.notes:
            warnings.warn(note, stacklevel=2)
        return found.splits[split]
    looked = f"looked in {folder} and for a file or folder {path}" if folder else f"looked for {path}"
    have = ", ".join(sorted({SLICE, *(entry.name for entry in available(root))}))
    command = f"sparsetrail data get {name}" if name in KNOWN else "sparsetrail data add PATH"
    raise DataError(f"expected data set {str(name)!r}, found none ({looked}); there is {have}. Run: {command}")


def add(
    path: Path | str,
    *,
    name: str | None = None,
    split: str | None = None,
    root: Path | str | None = None,
    progress: Progress | None = None,
) -> Import:
    """Read any recognised local layout and write it into the cache, checked first and never half.

    `split` is train or test, for an npz with images and labels that does not say which it is (test unless told).
    The name is by default that of the official set with this content, else what the layout or its folder says. Unknown
    content is let in with a warning, but never over an official set. Raises DataError, and then writes nothing.
    """
    path = Path(path).expanduser()
    if name is not None and (not _NAME.fullmatch(name) or name == SLICE):
        raise DataError(f"expected a name of letters, digits, '.', '_' or '-', found {name!r}; {SLICE} is taken")
    if progress:
        progress(f"reading {path}")
    if split is not None and split not in SPLITS:
        raise DataError(f"expected split train or test, found {split!r}")
    found = layouts.read(path, name=name, split=split)
    if any(part.name == SLICE for part in found.splits.values()):
        raise DataError(f"{path}: expected a set to add, found {SLICE}, which is inside the package; just load it")
    done = store(list(found.splits.values()), route=f"{found.layout} at {path}", root=root, progress=progress)
    return replace(done, warnings=(*done.warnings, *found.notes))


def store(
    sets: list[Dataset], *, route: str, root: Path | str | None = None, progress: Progress | None = None
) -> Import:
    """Write splits of one set into the cache: all to a temporary folder first, synced, then each moved into place."""
    base, name = cache_root(root), sets[0].name
    notes = [
        f"{part.name}/{part.split} is not the official set: content hash {part.sha256}, "
        + (f"official {KNOWN[part.name][part.split]}" if part.name in KNOWN else "none on record for this name")
        for part in sets
        if not part.official
    ]
    needed = sum(part.images.nbytes + part.labels.nbytes for part in sets) + 2**20
    try:
        base.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(base).free
        if free < needed:
            raise DataError(f"{base}: expected {needed} bytes free, found {free}; make room or set SPARSETRAIL_DATA")
        with _locked(base, name), _scratch(base, name) as scratch:
            for part in sets:
                _refuse_to_replace_official(base, part)
                _refuse_the_same_twice(base, part, [other.split for other in sets])
                notes += _learnt(base, part, [other.split for other in sets])
            new = [part for part in sets if not _is_there(base, part)]
            for part in new:
                if progress:
                    progress(f"writing {name}/{part.split}: {len(part)} images, sha256 {part.sha256}")
                _write(part, scratch / part.split, route, _beside(base, part, sets))
            for part in new:
                _move(scratch / part.split, base / name / part.split, scratch / f"old-{part.split}")
    except OSError as error:
        raise DataError(f"{base}: expected to write {name} there, found {error}; set SPARSETRAIL_DATA") from error
    return Import(
        entries=tuple(_entry(part, base / name / part.split) for part in sets), route=route, warnings=tuple(notes)
    )


def available(root: Path | str | None = None) -> list[Entry]:
    """The embedded slice and every split in the cache, as its info.json describes it; contents are not read."""
    return [_entry(_embedded(split), _slice_path()) for split in SPLITS] + [
        _describe(folder) for folder in _split_folders(cache_root(root))
    ]


def verify(root: Path | str | None = None, *, name: str | None = None) -> list[Entry]:
    """The same rows as `available`, or those of one set, with every content hash recomputed; damage is in `problem`."""
    rows = [_entry(_embedded(split), _slice_path()) for split in SPLITS if name in (None, SLICE)]
    for folder in _split_folders(cache_root(root)):
        if name not in (None, folder.parent.name):
            continue
        try:
            rows.append(replace(_entry(_read(folder), folder), problem=_mixed(folder.parent)))
        except DataError as error:
            rows.append(_broken(folder, str(error)))
    return rows


# --- reading ------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> Dataset:
    """One split from its folder in the cache; refused unless contents and info.json agree."""
    try:
        info = _info(folder)
        # Copied before hashing, so that what was checked is what is returned.
        images = np.array(np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False))
        labels = np.array(np.load(folder / "labels.npy", allow_pickle=False))
        part = make_dataset(info["name"], info["split"], images, labels, tuple(info["classes"]), where=str(folder))
    except _UNREADABLE as error:
        raise DataError(f"{folder}: expected a readable set, found {error}; {_mend(folder)}") from error
    if part.sha256 != info["sha256"]:
        raise DataError(
            f"{folder}: expected content hash {info['sha256']}, found {part.sha256}: the files have changed since they "
            f"were checked; {_mend(folder)}"
        )
    return part


def _info(folder: Path) -> dict[str, Any]:
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    if info["format"] != _FORMAT:
        raise DataError(f"expected cache format {_FORMAT}, found {info['format']}")
    if info["split"] != folder.name:
        raise DataError(f"expected the {folder.name} split, found {info['split']}")
    return info


def _mixed(folder: Path) -> str:
    """What is wrong where an import over an older set was cut off between its splits; empty if nothing is.

    A split notes what lay beside it when it was written: of two that belong together the later one knows the other.
    """
    try:
        one, other = (_info(folder / split) for split in SPLITS)
    except _UNREADABLE:
        return ""
    noted = "beside" in one and "beside" in other  # older caches have none
    if not noted or one["beside"] == other["sha256"] or other["beside"] == one["sha256"]:
        return ""
    again = f"sparsetrail data get {folder.name}" if folder.name in KNOWN else "sparsetrail data add PATH"
    return f"{folder}: expected one set, found train and test of two imports, the last one cut off; run: {again}"


def _mend(folder: Path) -> str:
    name = folder.parent.name
    again = f"sparsetrail data get {name}" if name in KNOWN else "sparsetrail data add PATH"
    return f"delete {folder} and run: {again}"


def _embedded(split: str) -> Dataset:
    """The slice of Fashion-MNIST inside the package."""
    with _slice_path().open("rb") as file, np.load(file, allow_pickle=False) as archive:
        images, labels = archive[f"x_{split}"], archive[f"y_{split}"].astype(np.int64)
    part = make_dataset(SLICE, split, images[:, None], labels, CLASSES[SLICE])
    if not part.official:
        raise DataError(
            f"expected the embedded {SLICE}/{split} to have content hash {KNOWN[SLICE][split]}, found {part.sha256}; "
            "install sparsetrail again"
        )
    return part


def _slice_path() -> Path:
    return Path(__file__).parents[1] / "assets" / "fashion_mnist_slice.npz"


def _split_folders(base: Path) -> list[Path]:
    if not base.is_dir():
        return []
    names = [folder for folder in sorted(base.iterdir()) if folder.is_dir() and _NAME.fullmatch(folder.name)]
    return [name / split for name in names for split in SPLITS if (name / split).is_dir()]


def _add_command(name: Path | str, split: str) -> str:
    return f"add PATH --name {name} --split {split} (--split where the files do not say it)"


def _listing(folder: Path) -> str:
    return ", ".join(sorted(item.name for item in folder.iterdir())) or "an empty folder"


def _entry(part: Dataset, path: Path) -> Entry:
    return Entry(
        name=part.name,
        split=part.split,
        n=len(part),
        shape=tuple(part.images.shape[1:]),
        sha256=part.sha256,
        official=part.official,
        path=path,
    )


def _describe(folder: Path) -> Entry:
    try:
        info = _info(folder)
        return Entry(
            name=info["name"],
            split=info["split"],
            n=int(info["n"]),
            shape=tuple(info["shape"]),
            sha256=info["sha256"],
            official=KNOWN.get(info["name"], {}).get(info["split"]) == info["sha256"],
            path=folder,
        )
    except _UNREADABLE as error:
        return _broken(folder, f"{folder}: expected a readable info.json, found {error}; {_mend(folder)}")


def _broken(folder: Path, problem: str) -> Entry:
    return Entry(
        name=folder.parent.name,
        split=folder.name,
        n=0,
        shape=(),
        sha256="",
        official=False,
        path=folder,
        problem=problem,
    )


# --- writing ------------------------------------------------------------------------------------------------------


def _is_there(base: Path, part: Dataset) -> bool:
    """Whether the cache already has this content, whole; what others may be reading then stays untouched."""
    folder = base / part.name / part.split
    try:
        return folder.is_dir() and _read(folder).sha256 == part.sha256
    except DataError:
        return False


def _refuse_to_replace_official(base: Path, part: Dataset) -> None:
    folder = base / part.name / part.split
    if folder.is_dir() and not part.official and _describe(folder).official:
        raise DataError(
            f"{folder} holds the official {part.name}/{part.split}, found other content ({part.sha256}) to put there; "
            "give it a name of its own: sparsetrail data add PATH --name NAME"
        )


def _refuse_the_same_twice(base: Path, part: Dataset, now: list[str]) -> None:
    """A split that is not written now must not hold the same images: a network would be tested on what it learnt."""
    for folder in (base / part.name / split for split in SPLITS if split not in now):
        if folder.is_dir() and _describe(folder).sha256 == part.sha256:
            raise DataError(
                f"{part.name}/{part.split}: expected other images than those of {folder}, found the same; if they were "
                f"taken in there by mistake, delete {folder} and repeat"
            )


def _learnt(base: Path, part: Dataset, now: list[str]) -> tuple[str, ...]:
    """The note of `learnt` on a split and the other one that is there already; none where that cannot be read."""
    (other,) = (split for split in SPLITS if split != part.split)
    folder = base / part.name / other
    if other in now or not folder.is_dir() or (part.official and _describe(folder).official):
        return ()
    try:
        held = _read(folder)
    except DataError:
        return ()
    return learnt(*((part, held) if part.split == "train" else (held, part)), where=f"{base / part.name}")


def _beside(base: Path, part: Dataset, sets: list[Dataset]) -> str:
    """The content hash of the other split, as it is written now or lies there; empty if there is none."""
    (split,) = (split for split in SPLITS if split != part.split)
    now = [other.sha256 for other in sets if other.split == split]
    return now[0] if now else _describe(base / part.name / split).sha256


def _write(part: Dataset, folder: Path, route: str, beside: str) -> None:
    folder.mkdir()
    info = {
        "format": _FORMAT,
        "name": part.name,
        "split": part.split,
        "n": len(part),
        "shape": list(part.images.shape[1:]),
        "classes": list(part.classes),
        "sha256": part.sha256,
        "beside": beside,
        "route": route,
    }
    for file, array in (("images.npy", part.images), ("labels.npy", part.labels)):
        with (folder / file).open("wb") as out:
            np.save(out, array.numpy(), allow_pickle=False)
            _sync(out.fileno())
    with (folder / "info.json").open("w", encoding="utf-8") as out:
        json.dump(info, out, indent=1)
        out.write("\n")
        out.flush()
        _sync(out.fileno())


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _move(new: Path, place: Path, old: Path) -> None:
    """Put a finished folder in its place; one that is there already goes to the scratch folder, and with it away."""
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    if os.name == "posix":
        descriptor = os.open(place.parent, os.O_RDONLY)
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _locked(base: Path, name: str) -> Generator[None, None, None]:
    """One writer per set at a time."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(base / f".{name}.lock", timeout=600):
            yield
    except Timeout as error:
        raise DataError(f"{base}: expected to write {name}, found another process writing it for 10 minutes") from error


@contextmanager
def _scratch(base: Path, name: str) -> Generator[Path, None, None]:
    """A temporary folder beside the sets, removed in any case; also removes those that a killed process left."""
    prefix = f".new-{name}~"  # no name has a ~: cifar10 must not sweep up cifar10-c
    for stale in base.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
