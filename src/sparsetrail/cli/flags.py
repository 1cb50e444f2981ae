"""What verbs share: the flags of every one of them, and how flags become devices, folders, models and image sets."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter, Token

from sparsetrail import data
from sparsetrail._files import alone
from sparsetrail.models import Trained


def _fraction(_type: Any, tokens: Sequence[Token]) -> float:
    """A number as the field writes it: 8/255 or 0.031."""
    text = tokens[0].value
    above, line, below = text.partition("/")
    try:
        if "/" in below:
            raise ValueError
        return float(Fraction(above) / Fraction(below) if line else Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"expected a number or a fraction such as 8/255, got {text!r}") from None


Number = Annotated[float, Parameter(converter=_fraction, allow_leading_hyphen=True)]
Device = Annotated[str, Parameter(help="auto, cpu, cuda or cuda:i")]
Threads = Annotated[int | None, Parameter(help="CPU threads; default all cores")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="print one JSON line instead of text")]
Fresh = Annotated[bool, Parameter(negative="", help="move an older result in --out aside and start again")]
Space = Literal["pixel", "encoded"]
Norm = Literal["linf", "l2", "l0"]
FILES = (".csv", ".html", ".json", ".md", ".pdf", ".png", ".svg")  # no names of folders


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of verbs that work on images: where those lie, where to compute, how to print."""

    root: Path | None = None
    device: Device = "auto"
    threads: Threads = None
    as_json: Json = False

    def where(self) -> str:
        """The device, its threads set."""
        return device_named(self.device, self.threads)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Kept(Common):
    """The same of verbs whose result is kept, and may be made anew."""

    fresh: Fresh = False

    def folder(self, out: Path) -> AbstractContextManager[Path]:
        """The output folder, writable, an older one moved aside if so told."""
        return output_folder(out, self.fresh)


COMMON, KEPT = Common(), Kept()


def device_named(name: str, threads: int | None) -> str:
    """The device of a name, its CPU threads set; on a GPU fp32 is fp32."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions; fp32 is said and meant
    if name == "auto" and torch.cuda.is_available():
        return "cuda"
    if name == "auto":
        print(f"device   cpu, {counted(torch.get_num_threads(), 'thread')} (no CUDA device)", file=sys.stderr)
        return "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: no CUDA device; this is torch {torch.__version__}. Use --device cpu or auto"
        )
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ValueError(f"--device {name}: expected auto, cpu, cuda or cuda:i")
        torch.empty(0, device=name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; expected auto, cpu, cuda or cuda:i") from None
    return name


@contextlib.contextmanager
def output_folder(out: Path, fresh: bool = False) -> Iterator[Path]:
    """The output folder, writable before any work starts; `fresh` moves an older one aside unless one trains there.

    Work that fails before it has written anything leaves no folder, and the older one where it was.
    """
    refuse_file(out)
    aside = _set_aside(out) if fresh and out.exists() else None
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        _make(out)
        yield out
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        if aside is not None and not out.exists():
            os.replace(aside, out)
            print(f"moved {aside} back to {out}: nothing was written", file=sys.stderr)
        raise


def refuse_file(out: Path) -> None:
    """ValueError for an --out that is named as a file is."""
    if out.suffix in FILES and not out.is_dir():
        raise ValueError(
            f"--out {out}: expected the name of a folder, found that of a file; give --out {out.with_suffix('')}"
        )


def _set_aside(out: Path) -> Path:
    n = 1
    while (aside := out.with_name(f"{out.name}.old{n}")).exists():
        n += 1
    with contextlib.ExitStack() as held:
        for lock in sorted(out.rglob(".lock")):
            held.enter_context(alone(lock.parent))
        os.replace(out, aside)
    print(f"moved {out} to {aside}", file=sys.stderr)
    return aside


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--out {out}: expected a folder to write to, found {error.strerror}; choose another"
        ) from None


def counted(n: int, what: str) -> str:
    """So many of a thing, in words: '1 thread', '3 threads'."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def emit(facts: dict[str, Any]) -> None:
    """Facts as one JSON line."""
    print(json.dumps(facts, default=str))


def images_for(model: Trained | None, name: str | None, n: int | None, root: Path | None) -> data.Dataset:
    """The test images of a named set or of the model's own, `n` of them; they must fit the model."""
    if model is None and name is None:
        raise ValueError("--data: expected the image set to put a foreign victim to, e.g. --data cifar10")
    found = data.load(name or model.card["data"]["name"], "test", root=root)  # type: ignore[union-attr]
    if model is not None:
        net = model.card["net"]
        want, got = (net["channels"], net["classes"]), (found.images.shape[1], len(found.classes))
        if want != got:
            raise ValueError(
                f"{found.name}: expected {counted(want[0], 'channel')} and {want[1]} classes as in the model, found "
                f"{got[0]} and {got[1]}; name another set with --data"
            )
    if n is not None and n < 1:
        raise ValueError(f"--n: expected at least 1 image, got {n}")
    if n is not None and n > len(found.labels):
        print(f"note     {found.name} has {len(found.labels)} test images; --n {n} takes all", file=sys.stderr)
    return found if n is None or n >= len(found.labels) else data.take(found, n, seed=0)


def chosen(name: str, allowed: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """`key=value` settings of an attack or a defence, as the types of their defaults."""
    out: dict[str, Any] = {}
    for text in given:
        key, found, value = text.partition("=")
        if not found or key not in allowed:
            known = ", ".join(f"{k}={v}" for k, v in allowed.items()) or "none"
            raise ValueError(f"--set {text}: expected key=value of {name}'s settings ({known})")
        if key in out:
            raise ValueError(f"--set {text}: {key}: expected once, got it again; leave one of them out")
        default = allowed[key]
        try:
            if isinstance(default, bool):
                out[key] = {"true": True, "false": False}[value.lower()]
            elif isinstance(default, int):
                out[key] = int(value)
            else:
                out[key] = value if isinstance(default, str) else float(Fraction(value))
        except (ValueError, KeyError, ZeroDivisionError):
            raise ValueError(f"--set {text}: expected a value like {default!r}") from None
    return out
