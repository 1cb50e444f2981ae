"""What a data set is here: uint8 images, labels, class names and the content hash that identifies them.

Shape legend: N images, C channels, H and W pixels.
"""

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]
Labels = np.ndarray  # integers, any byte order; kept as int64

SPLITS = ("train", "test")


class DataError(ValueError):
    """A data set is missing, damaged or not what it claims to be; the text says what to do."""


# Content hashes (see content_hash) of the sets as published, each taken from files whose MD5 are the published ones:
# CIFAR-10 from the six binary batches (test: 803d5f7f4d78ea53de84dbe85f74fb6d), CIFAR-100 with fine labels from the
# python files (test: f0ef6b0ae62326f3e7ffdfab6717acfc), Fashion-MNIST from the four IDX archives (test images:
# bef4ecab320f06d8554ea6380940ec79; Debian's copies differ from these in the time and name in the gzip header only).
KNOWN: dict[str, dict[str, str]] = {
    "cifar10": {
        "train": "83e33fc8b0d69a3ae88c4d98630b5a24899c46ca82278d1be89de4bdfb353c05",
        "test": "47d3d8850b7f7e41388912ddec4cdb552fdf0dc69793387d9ce07186121bd5b8",
    },
    "cifar100": {
        "train": "a900cffaa12efbbe3a109f990582f538e37456faa11c8acec888c7e3ae8f2c1d",
        "test": "82737c169f845d0fae23aa9477ef8d3ea34ad5a728d20f7c6522a78c11cad0a0",
    },
    "fashion-mnist": {
        "train": "eda00cd3d73a80927df7db6c62724357ceba7f77bfb83fb5fbb960fda55f6f63",
        "test": "9c8964dafafc02938e75f361f54a6fe317b18bed56ef570c09d1c1c0d762de6e",
    },
    "fashion-mnist-slice": {
        "train": "3cf01123b4873456e284199c3082d48aff426d397e721bee467daf9bb774bb25",
        "test": "4688c49f2338187cf9a04fd3598a51f65629822efbc78254df2567d3f3a4bfc6",
    },
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CLASSES: dict[str, tuple[str, ...]] = {
    "cifar10": _words("airplane automobile bird cat deer dog frog horse ship truck"),
    "cifar100": _words(
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
        "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup "
        "dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower "
        "leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid "
        "otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray "
        "road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
        "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle "
        "wardrobe whale willow_tree wolf woman worm"
    ),
    "fashion-mnist": _FASHION,
    "fashion-mnist-slice": _FASHION,
}
SHAPES: dict[str, tuple[int, int, int]] = {
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "fashion-mnist": (1, 28, 28),
    "fashion-mnist-slice": (1, 28, 28),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images as they are, with their identity.

    `images` is uint8 [N C H W], `labels` int64 [N], both on the CPU. `official` says that `sha256` is the known hash of
    this name and split. Made by `make_dataset`, which checks and hashes.
    """

    name: str
    split: str
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    sha256: str
    official: bool

    def __post_init__(self) -> None:
        if self.labels.shape != self.images.shape[:1]:
            raise DataError(f"{self.name}: expected a label an image, found {len(self.images)} and {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.images)


def content_hash(images: Pixels | Tensor, labels: Labels | Tensor) -> str:
    """SHA-256 of a text header with the shape, then the uint8 NCHW bytes, then the labels as little-endian int64.

    The header keeps two sets apart whose bytes agree but whose shapes do not.
    """
    pixels, targets = np.asarray(images), np.asarray(labels)
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise DataError(f"expected uint8 images [N C H W] to hash, found {pixels.dtype} {list(pixels.shape)}")
    shape = " ".join(str(size) for size in pixels.shape)
    digest = hashlib.sha256(f"sparsetrail-data 1; images uint8 {shape}; labels int64 {len(targets)}\n".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    digest.update(np.ascontiguousarray(targets, dtype="<i8").data)
    return digest.hexdigest()


def identify(sha256: str, split: str) -> str | None:
    """The name of the official set with this hash and split, if there is one."""
    return next((name for name, known in KNOWN.items() if known.get(split) == sha256), None)


def check(images: Pixels, labels: Labels, classes: int, *, where: str) -> None:
    """Refuse arrays that cannot be a data set: wrong type, unequal counts, labels out of range."""
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise DataError(
            f"{where}: expected uint8 images [N C H W] with no empty side, found {images.dtype} {list(images.shape)}; "
            "save pixel values 0..255 as uint8"
        )
    if labels.shape != (len(images),):
        raise DataError(
            f"{where}: expected one label for each of {len(images)} images, found labels {list(labels.shape)}; "
            "the file is cut short or the labels belong to another split"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{where}: expected labels 0..{classes - 1}, found {low}..{high}; is this the set and label kind you meant?"
        )


def make_dataset(
    name: str, split: str, images: Pixels, labels: Labels, classes: tuple[str, ...], *, where: str = ""
) -> Dataset:
    """Check, hash and wrap arrays; errors name `where` they came from."""
    check(images, labels, len(classes), where=where or f"{name}/{split}")
    # torch wants writable memory; arrays read straight from a file's bytes are not.
    images, labels = np.require(images, requirements=["C", "W"]), np.require(labels, np.int64, requirements=["C", "W"])
    sha256 = content_hash(images, labels)
    return Dataset(
        name=name,
        split=split,
        images=torch.from_numpy(images),
        labels=torch.from_numpy(labels),
        classes=classes,
        sha256=sha256,
        official=KNOWN.get(name, {}).get(split) == sha256,
    )


def learnt(train: Dataset, test: Dataset, *, where: str) -> tuple[str, ...]:
    """A note of the test images that are among the training images to the last pixel; DataError if all are."""
    if train.images.shape[1:] != test.images.shape[1:]:
        return ()
    known = set(map(_fingerprint, train.images.numpy()))
    shared = sum(_fingerprint(image) in known for image in test.images.numpy())
    if shared == len(test):
        raise DataError(
            f"{where}: expected a test set that was not trained on, found that all {shared} test images are among the "
            "training images; give other images for one of them"
        )
    return (f"{where}: {shared} of {len(test)} test images are among the training images",) if shared else ()


def _fingerprint(image: Pixels) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def take(dataset: Dataset, n: int | None, *, seed: int | None = None) -> Dataset:
    """The first `n` images, or with a seed a random subset in which class counts differ by as little as possible.

    Images keep their order. For one seed a smaller subset lies inside a larger one. `n=None` is the whole set.
    """
    if n is None or n == len(dataset):
        return dataset
    if not 0 < n < len(dataset):
        raise DataError(
            f"expected 1 to {len(dataset)} images of {dataset.name}/{dataset.split}, found n={n}; "
            "leave n out for the whole set"
        )
    if seed is None:
        return _subset(dataset, np.arange(n))
    labels = dataset.labels.numpy()
    kinds = len(dataset.classes)
    # Taking the n smallest (rank within the class, shuffled class) deals one image to each class in turn.
    turn = np.empty(kinds, dtype=np.int64)
    turn[_shuffled(kinds, seed ^ 0x5EED)] = np.arange(kinds)
    order = np.argsort(_rank_within_class(labels, seed) * kinds + turn[labels], kind="stable")
    return _subset(dataset, np.sort(order[:n]))


def pick(dataset: Dataset, *places: int) -> Dataset:
    """The images at these places, counted from 0, in the order given; DataError for a place that is not there."""
    for i in places:
        if not 0 <= i < len(dataset):
            raise DataError(
                f"expected an image from 0 to {len(dataset) - 1} of {dataset.name}/{dataset.split}, found {i}; "
                "name another"
            )
    return _subset(dataset, np.array(places, dtype=np.int64))


def split_validation(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Cut a set in two disjoint parts, the second with `fraction` of each class; its split is called "validation".

    Class shares are rounded by largest remainder, so the second part has round(fraction * N) images.
    """
    wanted = round(fraction * len(dataset)) if 0.0 < fraction < 1.0 else 0
    if not 0 < wanted < len(dataset):
        raise DataError(
            f"expected a fraction that leaves both parts images, found {fraction} of {len(dataset)}; 0.1 is usual"
        )
    labels = dataset.labels.numpy()
    share = np.bincount(labels, minlength=len(dataset.classes)) * fraction
    quota = np.floor(share).astype(np.int64)
    quota[np.argsort(quota - share, kind="stable")[: wanted - int(quota.sum())]] += 1
    held_out = _rank_within_class(labels, seed) < quota[labels]
    rest, validation = _subset(dataset, np.flatnonzero(~held_out)), _subset(dataset, np.flatnonzero(held_out))
    return rest, replace(validation, split="validation")


def _subset(dataset: Dataset, index: NDArray[np.int64]) -> Dataset:
    chosen = torch.from_numpy(index)
    images, labels = dataset.images[chosen], dataset.labels[chosen]
    return replace(dataset, images=images, labels=labels, sha256=content_hash(images, labels), official=False)


def _rank_within_class(labels: Labels, seed: int) -> NDArray[np.int64]:
    """For each image its place, from 0, in a seeded shuffle of its class."""
    order = _shuffled(len(labels), seed)
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - starts[labels[order]]
    return rank


def _shuffled(n: int, seed: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1: the order of n SplitMix64 numbers (Steele, Lea and Flood, OOPSLA 2014).

    Written out, not drawn from torch or numpy, whose shuffles may change with their version: a subset is part of a
    published result.
    """
    with np.errstate(over="ignore"):
        step = np.uint64(0x9E3779B97F4A7C15)
        z = (
            np.uint64(seed & 0xFFFFFFFFFFFFFFFF) * np.uint64(0xD1342543DE82EF95)
            + np.arange(1, n + 1, dtype="u8") * step
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable").astype(np.int64)
