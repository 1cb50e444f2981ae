"""Finished parts of an experiment as files: one JSON a part, named by a hash of all that decides it.

A changed setting is a new part and never a mix; which version made a part is noted in it, and asked for by reports.
"""

import functools
import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from sparsetrail import __version__
from sparsetrail._files import write_atomic
from sparsetrail.core import Run
from sparsetrail.report import pack, unpack
from sparsetrail.snn.weights import load_weights, save_weights

T = TypeVar("T")


class Cells:
    """A folder of parts by their keys, adversarial tensors beside them; `kept` collects the versions of those read."""

    def __init__(self, folder: Path, kept: set[str] | None = None) -> None:
        self.folder = folder
        self.kept: set[str] = set() if kept is None else kept

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the part of a key lies."""
        text = json.dumps(key, sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def read(self, key: Mapping[str, Any]) -> Any | None:
        """What is held of a key, None where nothing is yet; ValueError where its file is damaged or another's."""
        held = self._held(key)
        return None if held is None else held["result"]

    def write(self, key: Mapping[str, Any], result: Any, **more: Any) -> None:
        """Keep a result, whole or not at all."""
        body = {"spec": _plain(key), "result": result, "made by": version()} | more
        write_atomic(self.path(key), json.dumps(body).encode())

    def get(self, key: Mapping[str, Any], kind: type[T]) -> T | None:
        """The part of a key as a core dataclass, a run's adversarial points with it; one that lost them is told."""
        held, path = self._held(key), self.path(key)
        if held is None:
            return None
        try:
            found = unpack(kind, held["result"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a {kind.__name__}, found {error!r}; move the file away") from None
        tensor = path.with_suffix(".safetensors")
        if isinstance(found, Run) and held.get("tensor", tensor.exists()):  # older ones do not say
            found = replace(found, adversarial=load_weights(tensor)[0]["adversarial"])  # type: ignore[type-var]
        return found

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep a core dataclass; its tensor first, so that a part that is there is whole."""
        points: Tensor | None = getattr(value, "adversarial", None)
        if points is not None:
            card = _plain(key) | {"kind": "adversarial"}
            save_weights(self.path(key).with_suffix(".safetensors"), {"adversarial": points}, card)
        self.write(key, pack(value), tensor=points is not None)

    def _held(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        path = self.path(key)
        if not path.exists():
            return None
        try:
            held = json.loads(path.read_text())
            spec, _ = held["spec"], held["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a cell, found {error!r}; move the file away and repeat") from None
        if spec != _plain(key):
            raise ValueError(f"{path}: expected the cell of {_plain(key)}, found another; move the file away")
        self.kept.add(held.get("made by") or f"{spec.get('version')}, commit not noted")
        return held


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(key, default=str))


@functools.cache  # code that changes later is not what runs here
def version() -> str:
    """The version, and the commit this code runs from where that is a clone with git at hand; '+changes' if altered."""
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists() or shutil.which("git") is None:
        return __version__
    look = ["git", "-C", str(here), "describe", "--always", "--dirty=+changes", "--exclude=*"]
    found = subprocess.run(look, capture_output=True, text=True)
    return __version__ + (f" at {found.stdout.strip()}" if found.returncode == 0 else "")
