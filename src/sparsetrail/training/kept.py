"""What a training keeps on disk: its identity, its state, the model and its card, events."""

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsetrail import __version__
from sparsetrail.core import Rate
from sparsetrail.data import Dataset
from sparsetrail.models import Trained, net_spec_from
from sparsetrail.snn import cuda
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.kernels import available, switched_on
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.weights import CheckpointError, load_weights, save_weights
from sparsetrail.training.spec import Seams, TrainSpec
from sparsetrail.training.step import Optimizer


@dataclass
class Progress:
    """How far a training got, as it is kept."""

    epoch: int = 0
    step: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    loss: float = 0.0  # of the last step
    losses: float = 0.0  # of the epoch so far, their sum
    summed: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    machines: list[dict[str, Any]] = field(default_factory=list)  # what it ran on, each once


Say = Callable[[dict[str, Any]], None]


def identity_of(
    net: NetSpec, encode: Encoder, data: Dataset, spec: TrainSpec, seams: Seams, start: Trained | None
) -> dict[str, Any]:
    """What decides a training, as it lies in the cards of its files."""
    text: dict[str, Any] = {
        "net": asdict(net),
        "encoder": {"name": encode.name, "knobs": encode.knobs},
        "data": {
            "name": data.name,
            "split": data.split,
            "n": len(data.labels),
            "sha256": data.sha256,
            "official": data.official,
        },
        "train": asdict(spec),
    }
    if seams.name:
        text["defence"] = {"name": seams.name, "knobs": dict(seams.knobs)}
    if start is not None:
        text["start"] = {"sha256": start.sha256, "converted": start.card.get("converted")}
    return json.loads(json.dumps(text))


def check_folder(out: Path, identity: dict[str, Any]) -> None:
    """ValueError where `out` holds another experiment."""
    for name in ("state.safetensors", "state.previous.safetensors", "model.safetensors"):
        if not (out / name).exists():
            continue
        try:
            _, card, _ = load_weights(out / name)
        except CheckpointError:
            continue  # a damaged snapshot is dealt with where it is read
        refuse_another(out, identity, card)


def refuse_another(out: Path, identity: dict[str, Any], card: dict[str, Any]) -> None:
    """ValueError where the card of a file in `out` is of another experiment."""
    held = {k: card.get(k) for k in {**identity, "defence": 0, "start": 0} if k in card or k in identity}
    if held.get("net"):  # written before a field was added: its default
        held["net"] = json.loads(json.dumps(asdict(net_spec_from(held["net"]))))
    if held != identity:
        differs = [k for k in held if held[k] != identity.get(k)]
        raise ValueError(
            f"{out}: holds another experiment (different {', '.join(differs)}); give another --out, or --fresh to "
            "move the old one aside"
        )


def keep_state(out: Path, identity, net: nn.Module, optimizer: Optimizer, done: Progress) -> None:
    """Write the state; the one before stays beside it."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"opt.{k}": v for k, v in optimizer.state().items()}
    progress = asdict(done) | {"best": done.best if math.isfinite(done.best) else None}
    path = out / "state.safetensors"
    if path.exists():
        os.replace(path, out / "state.previous.safetensors")
    save_weights(path, tensors, identity | {"kind": "training state", "progress": progress})


def restore(out: Path, identity, net: nn.Module, optimizer: Optimizer, done: Progress) -> bool:
    """Read the newest good state into network, optimiser and progress; False where there is none."""
    problems = []
    for name in ("state.safetensors", "state.previous.safetensors"):
        if not (out / name).exists():
            continue
        try:
            tensors, card, _ = load_weights(out / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        refuse_another(out, identity, card)
        if problems:  # else the next one written would push this one out
            os.replace(out / "state.safetensors", out / "state.damaged.safetensors")
        net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        optimizer.restore({k[4:]: v for k, v in tensors.items() if k.startswith("opt.")})
        for k, v in card["progress"].items():
            setattr(done, k, -math.inf if k == "best" and v is None else v)
        return True
    if problems:
        raise CheckpointError("; ".join(problems) + "; no good snapshot is left: use --fresh to start again")
    return False


def keep_model(
    path: Path, identity, net: nn.Module, done: Progress, score: Rate | None, chosen_by: str, device: torch.device
) -> None:
    """Write the weights with their card."""
    card = identity | {
        "kind": "model",
        "epochs_done": done.epoch,
        "chosen_by": chosen_by,
        "validation": None if score is None else {"k": score.k, "n": score.n},
        "made_with": machine_of(device),
    }
    if before := done.machines[:-1]:
        card["begun_with"] = before
    save_weights(path, net.state_dict(), card)


def machine_of(device: torch.device) -> dict[str, Any]:
    """What a training runs on, as far as its numbers can depend on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    made = cuda.usable() and switched_on() if device.type == "cuda" else device.type == "cpu" and available()
    kernels = "generated" if made else "PyTorch's"
    threads = torch.get_num_threads()
    return {
        "device": f"{device.type} {name}", "torch": torch.__version__, "threads": threads, "kernels": kernels,
        "sparsetrail": __version__,
    }  # fmt: skip


def differs_from(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What of a machine is not as it was when the run was cut off."""
    return "; ".join(f"{k} {before.get(k)}, now {v}" for k, v in now.items() if before.get(k) != v)


class Log:
    """Append-only `events.jsonl`; steps are written every 20th, all events go to `say`."""

    def __init__(self, path: Path, say: Say | None) -> None:
        cut_off = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self.file, self.say = open(path, "a"), say  # noqa: SIM115
        if cut_off:  # a crash in the middle of a line must not take the next one with it
            self.file.write("\n")

    def __call__(self, event: str, *, keep: bool = True, **facts: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3), **facts}
        if keep:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.say is not None:
            self.say(line)

    def close(self) -> None:
        self.file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a run folder; a last line cut off by a crash is left out."""
    for line in (path / "events.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
