"""Trained models as files: a network, its encoder and its card, taken back whole or not at all."""

import hashlib
import json
import pickle
import pickletools
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail.snn.encode import Encoder, build_encoder
from sparsetrail.snn.net import NetSpec, build
from sparsetrail.snn.neuron import NeuronSpec
from sparsetrail.snn.surrogate import Surrogate
from sparsetrail.snn.weights import CheckpointError, load_weights, save_weights

STATE_DICT = "a state dict of tensors, as torch.save(net.state_dict(), ...) writes"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model as it lies in a run folder: network in eval mode, encoder and card."""

    net: nn.Module
    encode: Encoder
    card: dict[str, Any]
    path: Path
    sha256: str


def load_model(path: str | Path) -> Trained:
    """The model of a run folder, or of one `.safetensors` file, rebuilt from its card; never a partial load."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    tensors, card, sha256 = load_weights(file)
    if card.get("kind") != "model":
        raise CheckpointError(f"{file}: expected a model, found {card.get('kind', 'another file')}")
    try:
        spec = net_spec_from(card["net"])
        encode = build_encoder(card["encoder"]["name"], **card["encoder"]["knobs"])
        net = build(spec, seed=0)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: expected a card of a network and an encoder of this version, found one that makes none "
            f"({type(error).__name__}: {error})"
        ) from None
    if encode.steps != spec.steps:
        raise CheckpointError(f"{file}: expected an encoder of {spec.steps} steps, found one of {encode.steps}")
    ours, theirs = set(net.state_dict()), set(tensors)
    if ours != theirs:
        raise CheckpointError(
            f"{file}: parameters do not fit {card['net']['arch']}: missing {sorted(ours - theirs)[:5]}, "
            f"unexpected {sorted(theirs - ours)[:5]}"
        )
    if wrong := [k for k, v in net.state_dict().items() if v.shape != tensors[k].shape]:
        raise CheckpointError(f"{file}: parameters do not fit {card['net']['arch']}: other shape {wrong[:5]}")
    broken = [k for k, v in tensors.items() if not v.isfinite().all()]
    if broken:
        raise CheckpointError(f"{file}: expected finite weights, found NaN or infinity in {', '.join(broken[:5])}")
    net.load_state_dict(tensors)  # of a compact file, upcast
    return Trained(
        net=net.eval(),
        encode=encode,
        card=card,
        path=file,
        sha256=sha256,
    )


def compact(model: Trained, file: str | Path) -> Trained:
    """A copy of half the size: the weights of convolutions and linear layers in bf16, all else as it is.

    Another model, with a SHA-256 of its own: rounding moves weights by up to 1/256 of themselves and flips spikes. Its
    card names the one it was made from, whose validation accuracy it keeps.
    """
    file = Path(file)
    if file.exists():
        raise ValueError(f"{file}: already there; give another file")
    tensors = {k: v.to(torch.bfloat16) if v.ndim > 1 else v for k, v in model.net.state_dict().items()}
    save_weights(file, tensors, model.card | {"compact": {"type": "bf16", "of": model.sha256}})
    return load_model(file)


def import_weights(
    file: str | Path,
    net_spec: NetSpec,
    encode: Encoder,
    data_name: str,
    out: str | Path,
    *,
    trust_pickle: bool = False,
) -> Trained:
    """Take a foreign PyTorch checkpoint (.pth, .pt) of a known architecture into a run folder.

    The file may hold a state dict, or a dict with one under model_state_dict, state_dict, model or net; a prefix that
    all names share (module., snn.) is taken off. Names and shapes must fit `net_spec` exactly. Only tensors are read;
    a pickle that wants more is refused unless `trust_pickle`, since reading it runs its code. SEW- and Spiking-ResNet
    of one depth have the same names: which of the two it is, the file cannot tell.
    """
    file, out = Path(file), Path(out)
    if not file.is_file():
        raise CheckpointError(f"{file}: expected a PyTorch checkpoint, found no file")
    if (out / "model.safetensors").exists():
        raise ValueError(f"{out}: already holds a model; give another --out, or --fresh to move the old one aside")
    with open(file, "rb") as f:
        head = f.read(2)
    if head != b"PK" and head[:1] != b"\x80":  # a zip of torch.save, or a bare pickle
        raise CheckpointError(f"{file}: expected a PyTorch checkpoint, found a file that begins with {head!r}")
    try:
        held = torch.load(file, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError:
        if whole := _whole(file):
            raise CheckpointError(
                f"{file}: expected {STATE_DICT}, found a pickle of a whole {whole}, which only its own code can read; "
                "load it where that code is at hand and trusted, and save its state dict"
            ) from None
        raise CheckpointError(
            f"{file}: expected tensors only, found a pickle that wants to run code; look into it on a machine that may "
            f"be lost, or pass --trust-pickle if you trust its source and it holds {STATE_DICT}: nothing else is taken"
        ) from None
    except Exception as error:  # what a damaged file makes a reader of pickles raise can be anything
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file}: expected a PyTorch checkpoint, found {why}") from None
    for key in ("model_state_dict", "state_dict", "model", "net"):
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    if not isinstance(held, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items()):
        raise CheckpointError(f"{file}: expected {STATE_DICT}, found {type(held).__name__}")
    net = build(net_spec, seed=0)
    want = net.state_dict()
    prefix = _prefix(held, want)
    tensors = got = {k.removeprefix(prefix): v for k, v in held.items()}
    wrong = [k for k in want if k in got and want[k].shape != got[k].shape]
    if set(want) != set(got) or wrong:
        raise CheckpointError(
            f"{file}: does not fit {net_spec.arch}: missing {sorted(set(want) - set(got))[:5]}, unexpected "
            f"{sorted(set(got) - set(want))[:5]}, other shape {wrong[:5]}; check arch, classes, width and stem"
        )
    for k, v in tensors.items():
        if not _held(v, want[k].dtype):
            like, found = (str(t).removeprefix("torch.") for t in (want[k].dtype, v.dtype))
            raise CheckpointError(
                f"{file}: expected numbers that {like} holds, found {found} in {k}; if they are meant, save the state "
                f"dict in {like}"
            )
    net.load_state_dict(tensors)
    if not all(v.isfinite().all() for v in net.state_dict().values()):
        raise CheckpointError(f"{file}: expected finite weights, found NaN or infinity")
    if below := [k for k, v in net.state_dict().items() if k.endswith("running_var") and (v < 0).any()]:
        raise CheckpointError(f"{file}: expected variances of 0 or more, found negative ones in {below[0]}")
    card = {
        "kind": "model",
        "net": asdict(net_spec),
        "encoder": {"name": encode.name, "knobs": encode.knobs},
        "data": {"name": data_name},
        "imported": {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        "validation": None,
    }
    save_weights(out / "model.safetensors", net.state_dict(), json.loads(json.dumps(card)))
    return load_model(out)


def _prefix(held: Iterable[str], want: Iterable[str]) -> str:
    """What stands before the names of a network in a file: what most of its names fit with, the shortest of several."""
    known = set(want)
    starts = Counter(
        k[:i] for k in held for i in [0, *(j + 1 for j, letter in enumerate(k) if letter == ".")] if k[i:] in known
    )
    return max(starts, key=lambda p: (starts[p], -len(p)), default="")


def _held(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor of another type, as whole or as real numbers, is the same in `dtype`."""
    if (
        t.is_meta
        or t.layout != torch.strided
        or t.is_complex()
        or t.is_quantized
        or t.is_floating_point() != dtype.is_floating_point
    ):
        return False
    return t.dtype == dtype or torch.equal(t.to(dtype).to(t.dtype).nan_to_num(), t.nan_to_num())


def _whole(file: Path) -> str:
    """The class that a pickle as a whole is of, told by its first opcodes; nothing is run. Empty of a dict."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as held:
                part = next(name for name in held.namelist() if name.endswith("data.pkl"))
                with held.open(part) as f:
                    return _first_class(pickletools.genops(f))
        with open(file, "rb") as f:
            old = f.read(3)[2:] == pickle.LONG1  # torch.save before zips: magic number, version, system, then the thing
            f.seek(0)
            for _ in range(3 * old):
                for _ in pickletools.genops(f):
                    pass
            return _first_class(pickletools.genops(f))
    except (ValueError, StopIteration, RuntimeError, OSError, EOFError, zipfile.BadZipFile):
        return ""


def _first_class(ops: Iterable[tuple[Any, Any, Any]]) -> str:
    words: list[str] = []
    for op, value, _ in ops:
        if op.name in ("GLOBAL", "STACK_GLOBAL"):
            name = ".".join(value.split(" ") if op.name == "GLOBAL" else words[-2:])
            return "" if name == "collections.OrderedDict" else name
        if "UNICODE" in op.name:
            words.append(value)
        elif op.name not in ("PROTO", "FRAME", "MARK", "MEMOIZE") and not op.name.endswith("PUT"):
            break
    return ""


def net_spec_from(card: dict[str, Any]) -> NetSpec:
    """The NetSpec that `asdict` wrote."""
    neuron = dict(card["neuron"])
    neuron["surrogate"] = Surrogate(**neuron["surrogate"])
    return NetSpec(**(card | {"neuron": NeuronSpec(**neuron)}))
