"""What experiments are done on: a trained model of ours, or the victim that a function in a Python file makes."""

import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparsetrail.auditing import fingerprint
from sparsetrail.core import Victim
from sparsetrail.data import Dataset
from sparsetrail.models import Trained, load_model
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.net import victim

LENT = ("__main__", "torch", "numpy", "sparsetrail")  # modules that are never imported anew
COMPILED = tuple(EXTENSION_SUFFIXES)

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is measured: a victim that can be made again, and what identifies it; `model` where it is one of ours."""

    name: str
    make: Callable[[], Victim]
    identity: str
    model: Trained | None = None

    def key(self, x: Tensor) -> str:
        """What identifies the figures of this target: its weights, or its file and its scores of images [n c h w]."""
        return self.identity if self.model is not None else f"{self.identity} {fingerprint(self.make(), x)}"


def target_at(text: str, *, device: str = "cpu", precision: Precision = "fp32", backward: str | None = None) -> Target:
    """A run folder, a model.safetensors, or `file.py:function`, a function without arguments that returns a `Victim`.

    `precision` and `backward`, another backward rule of the encoder, are for our models. ValueError says which of the
    three was expected. The Python file is run: it is your own code.
    """
    if text.endswith(".py"):
        raise ValueError(f"{text}: expected file.py:function, found no function; name the one that returns the Victim")
    file, _, function = text.rpartition(":")
    if file.endswith(".py"):
        for flag, given in (("--precision", precision != "fp32"), ("--encoder-gradient", backward is not None)):
            if given:
                raise ValueError(f"{flag}: expected a model of ours for it, got {text}; leave it out, and say so there")
        return _foreign(Path(file), function)
    path = Path(text)
    if not path.exists():
        raise ValueError(
            f"{text}: expected a run folder, a model.safetensors or file.py:function that returns a Victim, found "
            "nothing there"
        )
    folder = path if path.is_dir() else path.parent
    name, model = folder.resolve().name, load_model(path)

    def make() -> Victim:  # from its file: no checkpoint may be other in memory
        return as_victim(load_model(path), name, backward=backward, device=device, precision=precision)

    return Target(name=name, make=make, identity=model.sha256, model=model)


def ours(model: Trained, name: str, *, device: str = "cpu") -> Target:
    """A trained model under a name, as it is in memory."""
    return Target(name=name, make=lambda: as_victim(model, name, device=device), identity=model.sha256, model=model)


def as_victim(
    model: Trained,
    name: str,
    *,
    backward: str | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
) -> Victim:
    """The adversary's view of a trained model; `backward` swaps the encoder's backward rule."""
    encode = model.encode if backward is None else model.encode.route(backward)
    return victim(model.net.to(device), afresh(encode), name=name, precision=precision)


def afresh(encode: Encoder) -> Encoder:
    """A random encoder from its seed again: what was measured before must not decide the draws."""
    return encode.route(encode.backward) if encode.random else encode


def home(text: str, what: Target) -> Path:
    """Where results on a target lie: beside its model; of a Python file in runs/, by its path and function."""
    if what.model is not None:
        path = Path(text)
        return path if path.is_dir() else path.parent
    file, _, function = text.rpartition(":")
    parts = [p for p in Path(file).with_suffix("").parts if p not in ("..", Path(file).anchor)]
    return Path("runs") / "-".join([*parts, function])


def fits(victim: Victim, x: Tensor, data: Dataset) -> None:
    """ValueError where a victim does not take images `x` [n c h w] of `data`, or has other classes."""
    if victim.classes != len(data.classes):
        raise ValueError(
            f"{victim.name}: expected {victim.classes} classes, found {len(data.classes)} in {data.name}; name its own "
            "set with --data"
        )
    try:
        with torch.no_grad():
            z = victim.scores(x[:2])
    except Exception as error:
        raise ValueError(f"{victim.name} does not take images {tuple(x[:2].shape)} of {data.name}: {error}") from None
    if not isinstance(z, torch.Tensor):
        raise ValueError(
            f"{victim.name}: expected a tensor of scores, got {type(z).__name__}; return the part that holds them, or "
            "give stateful(read=...)"
        )
    if tuple(z.shape) != (len(x[:2]), victim.classes):
        raise ValueError(
            f"{victim.name}: expected scores {(len(x[:2]), victim.classes)}, got {tuple(z.shape)} for {data.name}"
        )


def _foreign(path: Path, function: str) -> Target:
    if not path.is_file():
        raise ValueError(f"{path}: expected a Python file with the function {function}, found no file")
    code = path.read_bytes()
    if (beside := str(path.resolve().parent)) not in sys.path:  # modules next to it, as for a script; others go first
        sys.path.append(beside)
    known: set[str] = set()  # modules there before the first execution

    def make() -> Victim:
        anew = bool(known)
        if anew:
            _let_go(known, path)
        else:
            known.update(sys.modules)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            build = getattr(module, function, None)
            victim = None if build is None else build()
        except Exception as error:
            again = "; made once more, with its modules imported anew: let that be possible" if anew else ""
            raise ValueError(f"{path}:{function} raised {type(error).__name__}: {error}{again}") from error
        if build is None:
            raise ValueError(f"{path}: expected a function {function}, found none of that name")
        if not isinstance(victim, Victim):
            raise ValueError(
                f"{path}:{function}: expected a sparsetrail Victim, got {type(victim).__name__}; wrap a network: "
                "sparsetrail.stateful(net, encode, classes=...) or Victim(encode=..., logits=..., steps=..., "
                "classes=...)"
            )
        return victim if victim.name != "victim" else replace(victim, name=f"{path.stem}:{function}")

    return Target(name=f"{path.stem}:{function}", make=make, identity=hashlib.sha256(code).hexdigest())


def _let_go(known: Collection[str], path: Path) -> None:
    """Have Python import anew what a victim's file brought in or has in its folder: it may hold what it was shown.

    Not torch, numpy, this package, the standard library, installed packages and compiled modules.
    """
    folder = path.resolve().parent
    library = [Path(sysconfig.get_path(k)) for k in ("stdlib", "platstdlib")]
    for name, module in list(sys.modules.items()):
        held = getattr(module, "__dict__", {})
        place = held.get("__file__") or next(iter(held.get("__path__") or ()), None)
        if name.partition(".")[0] in LENT or not isinstance(place, str) or place.endswith(COMPILED):
            continue
        at = Path(place).absolute()
        if any(d in at.parents for d in library) or {"site-packages", "dist-packages"} & set(at.parts):
            continue
        if name not in known or folder in at.resolve().parents:
            del sys.modules[name]
