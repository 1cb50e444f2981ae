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
from sparsetrail.data import Dataset, cutout, flip, pixels, split_validation
from sparsetrail.data import crop as random_crop
from sparsetrail.models import Trained, load_model, net_spec_from
from sparsetrail.snn.encode import Encoder, build_encoder
from sparsetrail.snn.engine import halve, has_bf16, share_memory
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
from sparsetrail.training.step import Optimizer, accuracy, not_finite, recorder, update


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
    receives the events as they happen, `stop` is asked after every step, on a GPU at
    least after every 20. A folder that holds another experiment is refused. Raises TrainingStopped and TrainingFailed.
    """
    seams, device = seams or Seams(), torch.device(device)
    if spec.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: tf32 is for products on a GPU, found {device}; take fp32 or bf16")
    if not seams.name and (seams.inputs or seams.penalty or seams.after_step or seams.periods > 1):
        raise ValueError("seams: expected a name, by which a resumed run and the card know the defence; give name")
    identity = identity_of(net_spec, encode, data, spec, seams, start)
    _check_fit(net_spec, encode, data, spec)
    if seams.check is not None:
        seams.check(net_spec, encode, spec)
    if start is not None and asdict(net_spec_from(start.card["net"])) != asdict(net_spec):
        raise ValueError(f"start: expected a model of the network asked for, found another in {start.path}")
    if start is not None:  # the card names the file
        held, now = load_weights(start.path)[0], start.net.state_dict()
        if any(not torch.equal(now[k].cpu(), v.to(now[k].dtype)) for k, v in held.items()):
            raise ValueError(
                f"start: expected the weights of {start.path}, found others; save them as a model of their own"
            )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    gpu = device.type == "cuda"
    with alone(out), training_products(spec.precision == "tf32") if gpu else contextlib.nullcontext():
        check_folder(out, identity)
        for left in out.glob(".*.part"):  # by a writer that was killed
            left.unlink()
        held_in, held_out = split_validation(data, spec.validation, spec.seed) if spec.validation else (data, None)
        if len(held_in.labels) < spec.batch:
            raise ValueError(f"batch: expected at most the {len(held_in.labels)} training images, got {spec.batch}")
        images, labels = held_in.images.to(device), held_in.labels.to(device)

        net = build(net_spec, seed=spec.seed).to(device)
        if start is not None:
            net.load_state_dict(start.net.state_dict())
        optimizer = Optimizer(net, spec)
        done = Progress()
        resumed = restore(out, identity, net, optimizer, done)
        steps_per_epoch = len(labels) // spec.batch
        total = steps_per_epoch * spec.epochs
        share_memory(net)
        if spec.precision == "bf16" and device.type == "cpu" and has_bf16():
            halve(net)
        recorded = recorder(net, encode, optimizer, spec, seams) if gpu else None
        if done.epoch >= spec.epochs and (out / "last.safetensors").exists():
            return load_model(out)
        log = Log(out / "events.jsonl", say)
        machine = machine_of(device)
        differs = differs_from(done.machines[-1], machine) if done.machines else ""
        done.machines = [m for m in done.machines if m != machine] + [machine]
        more: dict[str, Any] = machine | ({"differs": differs} if differs else {})
        log("resumed" if resumed else "started", epoch=done.epoch, step=done.step, of=total, **more)
        started, saved, before = time.monotonic(), time.monotonic(), done.seconds

        def save_state() -> None:
            done.seconds = before + time.monotonic() - started
            keep_state(out, identity, net, optimizer, done)

        def pixels_of(epoch: int, i: int, rows: Tensor) -> tuple[Tensor, torch.Generator]:
            generator = _keyed(spec.seed, epoch, i)
            return _augment(images[rows], spec, generator), generator

        try:
            for epoch in range(done.epoch, spec.epochs):
                order = torch.randperm(len(labels), generator=_keyed(spec.seed, epoch)).to(device)
                net.train()
                for i in range(done.step, steps_per_epoch):
                    now = epoch * steps_per_epoch + i
                    rows = order[i * spec.batch : (i + 1) * spec.batch]
                    x, generator = pixels_of(epoch, i, rows)
                    optimizer.set_rate(now, total)
                    now_encode = _drawn(encode, spec.seed, epoch, i)
                    value = update(net, now_encode, optimizer, spec, seams, x, labels[rows], generator, recorded)
                    if value is None and recorded is not None:  # under way: a GPU is not waited for at every step
                        if not recorded.full and i + 1 < steps_per_epoch:
                            continue
                        losses = [not_finite(*told) for told in recorded.told()]
                    else:
                        losses = [math.nan if value is None else value]
                    for j, loss in enumerate(losses, i + 1 - len(losses)):
                        if not math.isfinite(loss):
                            x, _ = pixels_of(epoch, j, order[j * spec.batch : (j + 1) * spec.batch])
                            raise _failure(out, log, net, encode, x, epoch, j, optimizer.rate, loss)
                        done.step, done.loss, step = j + 1, loss, epoch * steps_per_epoch + j + 1
                        log("step", epoch=epoch, step=step, of=total, loss=loss, keep=step % 20 == 0)
                    stopping, due = stop is not None and stop(), time.monotonic() - saved > checkpoint_seconds
                    # statistics may overflow where no loss and no gradient does
                    if (stopping or due or i + 1 == steps_per_epoch) and not _finite(net):
                        raise _failure(out, log, net, encode, x, epoch, i, optimizer.rate, done.loss)
                    if stopping:
                        save_state()
                        log("stopped", epoch=epoch, step=now + 1, of=total)
                        raise TrainingStopped(f"stopped at step {now + 1}/{total}; the same command continues")
                    if due:
                        save_state()
                        saved = time.monotonic()
                judge = _drawn(encode, spec.seed, -1)  # the same draws every epoch
                score = accuracy(net, judge, held_out, device=device) if held_out is not None else None
                value = score.value if score is not None else float(epoch)
                done.epoch, done.step = epoch + 1, 0
                done.history.append(
                    {"epoch": epoch, "loss": done.loss, "validation": None if score is None else score.value}
                )
                if value > done.best:
                    done.best, done.best_epoch = value, epoch
                    keep_model(out / "model.safetensors", identity, net, done, score, device)
                save_state()
                saved = time.monotonic()
                log(
                    "epoch",
                    epoch=epoch,
                    loss=done.loss,
                    validation=None if score is None else score.value,
                    best_epoch=done.best_epoch,
                    seconds=round(done.seconds, 2),
                )
            judge = _drawn(encode, spec.seed, -1)
            score = accuracy(net, judge, held_out, device=device) if held_out is not None else None
            keep_model(out / "last.safetensors", identity, net, done, score, device)
            log("done", epoch=spec.epochs, step=total, of=total, seconds=round(done.seconds, 2))
        finally:
            log.close()
        return load_model(out)


def _check_fit(net: NetSpec, encode: Encoder, data: Dataset, spec: TrainSpec) -> None:
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


def _failure(out, log, net, encode, x, epoch: int, step: int, rate: float, loss: float) -> TrainingFailed:
    """Write `failure.json`: where, and the first module whose output is not finite."""
    first = first_nonfinite(net, encode(x))
    kept = any((out / name).exists() for name in ("state.safetensors", "state.previous.safetensors"))
    found = {"epoch": epoch, "step": step, "lr": rate, "loss": str(loss), "first_nonfinite": first}
    write_atomic(out / "failure.json", json.dumps(found, indent=1).encode())
    log("failed", **found)
    what = "weights or statistics not finite" if math.isfinite(loss) else f"loss or gradient {loss}"
    return TrainingFailed(
        f"{what} at epoch {epoch}, step {step} (first not finite: {first or 'a gradient'}); lower lr or set clip; see "
        f"{out / 'failure.json'}" + ("; the last good checkpoint is kept" if kept else "")
    )


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
