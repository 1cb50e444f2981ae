"""The loop: batches keyed by (seed, epoch, step), checkpoints, and what ends it."""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail._files import alone, write_atomic
from sparsetrail._shapes import Float
from sparsetrail.core import Rate
from sparsetrail.data import Dataset, cutout, flip, pixels, split_validation
from sparsetrail.data import crop as random_crop
from sparsetrail.models import Trained, load_model, net_spec_from
from sparsetrail.snn.encode import Encoder, build_encoder
from sparsetrail.snn.engine import NO_BF16, halve, has_bf16, share_memory
from sparsetrail.snn.graphs import training_products
from sparsetrail.snn.net import NetSpec, build
from sparsetrail.snn.weights import load_weights
from sparsetrail.training.kept import (
    Log,
    Progress,
    Say,
    check_folder,
    differs_from,
    identity_of,
    keep_model,
    keep_state,
    machine_of,
    restore,
)
from sparsetrail.training.spec import Seams, TrainingFailed, TrainingStopped, TrainSpec
from sparsetrail.training.step import Optimizer, Step, accuracy, not_finite


def train(
    net_spec: NetSpec,
    encode: Encoder,
    data: Dataset,
    spec: TrainSpec,
    out: Path | str,
    *,
    seams: Seams | None = None,
    start: Trained | None = None,
    device: str | torch.device = "cpu",
    checkpoint_seconds: float = 60.0,
    say: Say | None = None,
    stop: Callable[[], bool] | None = None,
) -> Trained:
    """Train `net_spec` on `data` into the folder `out`, or continue what lies there.

    `seams` are a defence; `start` is a model of the same network whose weights training begins from.

    `out` gets `model.safetensors` (best validation accuracy), `last.safetensors`, `state.safetensors` and its
    predecessor, `events.jsonl`. Every `checkpoint_seconds` and at every epoch's end the state is written. `say`
    receives the events as they happen, `stop` is asked after every step, on a GPU at least after every 20. A folder
    that holds another experiment is refused. Raises TrainingStopped and TrainingFailed.
    """
    seams, device = seams or Seams(), torch.device(device)
    _refuse(spec, seams, device)
    identity = identity_of(net_spec, encode, data, spec, seams, start)
    _check_fit(net_spec, encode, data, spec)
    if seams.check is not None:
        seams.check(net_spec, encode, spec)
    if start is not None:
        _check_start(start, net_spec)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    gpu = device.type == "cuda"
    with alone(out), training_products(spec.precision == "tf32") if gpu else contextlib.nullcontext():
        check_folder(out, identity)
        for left in out.glob(".*.part"):  # by a writer that was killed
            left.unlink()
        loop = _Loop(net_spec, encode, data, spec, out, seams, start, device, identity, checkpoint_seconds, stop)
        if loop.done.epoch < spec.epochs or not (out / "last.safetensors").exists():
            loop.run(say)
        return load_model(out)


class _Loop:
    """A training between two of its steps: network, optimiser, how far it got, and what is due next."""

    log: Log

    def __init__(
        self,
        net_spec: NetSpec,
        encode: Encoder,
        data: Dataset,
        spec: TrainSpec,
        out: Path,
        seams: Seams,
        start: Trained | None,
        device: torch.device,
        identity: dict[str, Any],
        checkpoint_seconds: float,
        stop: Callable[[], bool] | None,
    ) -> None:
        self.encode, self.spec, self.out, self.device = encode, spec, out, device
        self.identity, self.checkpoint_seconds, self.stop = identity, checkpoint_seconds, stop
        held_in, self.held_out = split_validation(data, spec.validation, spec.seed) if spec.validation else (data, None)
        if len(held_in.labels) < spec.batch:
            raise ValueError(f"batch: expected at most the {len(held_in.labels)} training images, got {spec.batch}")
        self.images, self.labels = held_in.images.to(device), held_in.labels.to(device)
        self.net = build(net_spec, seed=spec.seed).to(device)
        if start is not None:
            self.net.load_state_dict(start.net.state_dict())
        self.optimizer = Optimizer(self.net, spec)
        self.done = Progress()
        self.resumed = restore(out, identity, self.net, self.optimizer, self.done)
        self.steps = len(self.labels) // spec.batch  # an epoch
        self.total = self.steps * spec.epochs
        share_memory(self.net)
        if spec.precision == "bf16" and device.type == "cpu":
            halve(self.net)
        self.update = Step(self.net, self.optimizer, spec, seams)
        self.recorded = self.update.record(encode) if device.type == "cuda" else None
        self.started = self.saved = time.monotonic()
        self.before = self.done.seconds

    def run(self, say: Say | None) -> None:
        """Train on from where it stands, to the end; what lies on disk is then whole."""
        self.log, done = Log(self.out / "events.jsonl", say), self.done
        try:
            self._begin()
            for epoch in range(done.epoch, self.spec.epochs):
                self._epoch(epoch)
                self._end(epoch)
            self._keep("last.safetensors", self._validation(), "last epoch")
            self.log("done", epoch=self.spec.epochs, step=self.total, of=self.total, seconds=round(done.seconds, 2))
        finally:
            self.log.close()

    def _begin(self) -> None:
        done, machine = self.done, machine_of(self.device)
        differs = differs_from(done.machines[-1], machine) if done.machines else ""
        done.machines = [m for m in done.machines if m != machine] + [machine]
        more: dict[str, Any] = machine | ({"differs": differs} if differs else {})
        event = "resumed" if self.resumed else "started"
        self.log(event, epoch=done.epoch, step=done.step, of=self.total, **more)

    def _epoch(self, epoch: int) -> None:
        """The steps that an epoch has left."""
        done, steps, size = self.done, self.steps, self.spec.batch
        order = torch.randperm(len(self.labels), generator=_keyed(self.spec.seed, epoch)).to(self.device)
        batches = order[: steps * size].view(steps, size)
        self.net.train()
        for i in range(done.step, steps):
            now = epoch * steps + i
            losses = self._step(epoch, i, batches[i])
            for j, loss in enumerate(losses, i + 1 - len(losses)):
                if not math.isfinite(loss):
                    raise self._failure(epoch, j, batches[j], loss)
                done.step, done.loss, step = j + 1, loss, epoch * steps + j + 1
                done.losses, done.summed = done.losses + loss, done.summed + 1
                self.log("step", epoch=epoch, step=step, of=self.total, loss=loss, keep=step % 20 == 0)
            if not losses:
                continue
            stopping = self.stop is not None and self.stop()
            due = time.monotonic() - self.saved > self.checkpoint_seconds
            # statistics may overflow where no loss and no gradient does
            if (stopping or due or i + 1 == steps) and not _finite(self.net):
                raise self._failure(epoch, i, batches[i], done.loss)
            if stopping or due:
                self._save()
            if stopping:
                self.log("stopped", epoch=epoch, step=now + 1, of=self.total)
                raise TrainingStopped(f"stopped at step {now + 1}/{self.total}; the same command continues")

    def _step(self, epoch: int, i: int, rows: Tensor) -> list[float]:
        """One update; the losses it told: its own, on a GPU none or those of the steps before it too."""
        generator = _keyed(self.spec.seed, epoch, i)
        x = _augment(self.images[rows], self.spec, generator)
        self.optimizer.set_rate(epoch * self.steps + i, self.total)
        encode = _drawn(self.encode, self.spec.seed, epoch, i)
        value = self.update(encode, x, self.labels[rows], generator)
        if value is not None or self.recorded is None:
            return [math.nan if value is None else value]
        if not self.recorded.full and i + 1 < self.steps:  # under way: a GPU is not waited for at every step
            return []
        return [not_finite(*told) for told in self.recorded.told()]

    def _end(self, epoch: int) -> None:
        """Validate, keep the best model and the state."""
        done, score = self.done, self._validation()
        validation = None if score is None else score.value
        whole = done.summed == self.steps  # a state of older code knows the last loss alone
        loss = done.losses / done.summed if whole else done.loss
        done.epoch, done.step, done.losses, done.summed = epoch + 1, 0, 0.0, 0
        done.history.append({"epoch": epoch, "loss": loss, "validation": validation})
        value = float(epoch) if validation is None else validation
        if value > done.best:
            done.best, done.best_epoch = value, epoch
            held_out = "accuracy on the held-out part of the training set"
            self._keep("model.safetensors", score, "last epoch" if score is None else held_out)
        self._save()
        seconds = round(done.seconds, 2)
        self.log("epoch", epoch=epoch, loss=loss, validation=validation, best_epoch=done.best_epoch, seconds=seconds)

    def _validation(self) -> Rate | None:
        if self.held_out is None:
            return None
        judge = _drawn(self.encode, self.spec.seed, -1)  # the same draws every epoch
        return accuracy(self.net, judge, self.held_out, device=self.device)

    def _keep(self, name: str, score: Rate | None, chosen_by: str) -> None:
        keep_model(self.out / name, self.identity, self.net, self.done, score, chosen_by, self.device)

    def _save(self) -> None:
        self.done.seconds = self.before + time.monotonic() - self.started
        keep_state(self.out, self.identity, self.net, self.optimizer, self.done)
        self.saved = time.monotonic()

    def _failure(self, epoch: int, step: int, rows: Tensor, loss: float) -> TrainingFailed:
        """Write `failure.json`: where, and the first module whose output is not finite."""
        x = _augment(self.images[rows], self.spec, _keyed(self.spec.seed, epoch, step))
        first, out = first_nonfinite(self.net, self.encode(x)), self.out
        self.optimizer.set_rate(epoch * self.steps + step, self.total)  # a GPU is told of a loss some steps later
        kept = any((out / name).exists() for name in ("state.safetensors", "state.previous.safetensors"))
        found = {
            "epoch": epoch, "step": step, "lr": self.optimizer.rate, "loss": str(loss), "first_nonfinite": first
        }  # fmt: skip
        write_atomic(out / "failure.json", json.dumps(found, indent=1).encode())
        self.log("failed", **found)
        what = "weights or statistics not finite" if math.isfinite(loss) else f"loss or gradient {loss}"
        return TrainingFailed(
            f"{what} at epoch {epoch}, step {step} (first not finite: {first or 'a gradient'}); lower lr or set clip; "
            f"see {out / 'failure.json'}" + ("; the last good checkpoint is kept" if kept else "")
        )


def _refuse(spec: TrainSpec, seams: Seams, device: torch.device) -> None:
    if spec.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: tf32 is for products on a GPU, found {device}; take fp32 or bf16")
    if spec.precision == "bf16" and device.type == "cpu" and not has_bf16():
        raise ValueError(NO_BF16.format("cpu"))
    if not seams.name and (seams.inputs or seams.penalty or seams.after_step or seams.periods > 1):
        raise ValueError("seams: expected a name, by which a resumed run and the card know the defence; give name")


def _check_start(start: Trained, net_spec: NetSpec) -> None:
    """The card names the file of `start`, so the weights must be the file's."""
    if asdict(net_spec_from(start.card["net"])) != asdict(net_spec):
        raise ValueError(f"start: expected a model of the network asked for, found another in {start.path}")
    held, now = load_weights(start.path)[0], start.net.state_dict()
    if any(not torch.equal(now[k].cpu(), v.to(now[k].dtype)) for k, v in held.items()):
        raise ValueError(
            f"start: expected the weights of {start.path}, found others; save them as a model of their own"
        )


def _check_fit(net: NetSpec, encode: Encoder, data: Dataset, spec: TrainSpec) -> None:
    if data.split == "test":
        raise ValueError(
            f"data: expected images to train on, got the test split of {data.name}, on which figures are measured; "
            'take load(..., "train")'
        )
    side = min(data.images.shape[2:])
    for name, many in (("crop", spec.crop), ("cutout", spec.cutout)):
        if many >= side:
            raise ValueError(f"{name}: expected fewer pixels than the images' {side}, got {many}")
    for name, want, got in (
        ("steps", encode.steps, net.steps),
        ("channels", data.images.shape[1], net.channels),
        ("classes", len(data.classes), net.classes),
    ):
        if want != got:
            raise ValueError(f"{name}: encoder and data have {want}, the network was asked for {got}")


def _keyed(*key: int) -> torch.Generator:
    """A generator that depends on the key only."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def _drawn(encode: Encoder, *key: int) -> Encoder:
    """The encoder itself, or a random one with draws that depend on the key only, none carried from call to call."""
    if not encode.random:
        return encode
    knobs = {k: v for k, v in encode.knobs.items() if k != "seed"}
    return build_encoder(encode.name, **knobs, generator=_keyed(encode.knobs["seed"], *key))


def _augment(images: Tensor, spec: TrainSpec, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    if spec.crop:
        images = random_crop(images, spec.crop, generator)
    if spec.flip:
        images = flip(images, generator)
    if spec.cutout:
        images = cutout(images, spec.cutout, generator)
    return pixels(images)


def _finite(net: nn.Module) -> bool:
    return all(bool(t.isfinite().all()) for t in net.state_dict().values())


def first_nonfinite(net: nn.Module, u: Tensor) -> str | None:
    """Name of the first parameter, leaf module by its output, or buffer that is not finite; None if all are."""
    for name, p in net.named_parameters():
        if not p.isfinite().all():
            return f"parameter {name}"
    found: list[str] = []

    def look(name: str):
        def hook(_m, _inputs, output) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [m.register_forward_hook(look(n)) for n, m in net.named_modules() if not list(m.children())]
    try:
        with torch.no_grad():
            net(u)
    finally:
        for h in handles:
            h.remove()
    found += [f"buffer {name}" for name, t in net.named_buffers() if not t.isfinite().all()]
    return found[0] if found else None
