"""Cut the embedded slice out of the official Fashion-MNIST in the cache: 600 train and 100 test images of each class.

Run: sparsetrail data get fashion-mnist, then python scripts/make_slice.py. The first images of each class are taken, in
official order, so that the slice can be made again to the byte. Prints the content hashes that belong in KNOWN.
"""

from pathlib import Path

import numpy as np

from sparsetrail.data import DataError, content_hash, load

PER_CLASS = {"train": 600, "test": 100}
OUT = Path(__file__).parents[1] / "src" / "sparsetrail" / "assets" / "fashion_mnist_slice.npz"


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for split, per_class in PER_CLASS.items():
        whole = load("fashion-mnist", split)
        if not whole.official:
            raise DataError(f"expected the official fashion-mnist/{split}, found content hash {whole.sha256}")
        images, labels = whole.images.numpy(), whole.labels.numpy()
        first = [np.flatnonzero(labels == label)[:per_class] for label in range(len(whole.classes))]
        index = np.sort(np.concatenate(first))
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images[index, 0], labels[index].astype(np.uint8)
        print(f"{split}: {len(index)} images, sha256 {content_hash(images[index], labels[index])}")
    np.savez_compressed(OUT, allow_pickle=False, **arrays)
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
