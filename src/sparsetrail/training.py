"""Training: one specification, one loop, resumable to the bit.

All randomness is keyed by (seed, epoch) or (seed, epoch, step), none is carried along: a run killed at any moment and
started again with the same command ends with the weights of the uninterrupted run (same version, CPU and threads; the
sums of a GPU differ from run to run).
"""

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail import __version__
from sparsetrail._files import alone, write_atomic
from sparsetrail._shapes import Float, Int
from sparsetrail.core import Rate
from sparsetrail.core.precision import products
from sparsetrail.data import Dataset, cutout, flip, pixels, split_validation
from sparsetrail.data import crop as random_crop
from sparsetrail.models import Trained, load_model, net_spec_from
from sparsetrail.snn import cuda
from sparsetrail.snn.encode import Encoder, build_encoder
from sparsetrail.snn.engine import halve, has_bf16, share_memory
from sparsetrail.snn.folded import Draws
from sparsetrail.snn.graphs import Update, in_float32
from sparsetrail.snn.kernels import available, switched_on
from sparsetrail.snn.net import NetSpec, build, running_for
from sparsetrail.snn.neuron import Neuron, carrying
from sparsetrail.snn.weights import CheckpointError, load_weights, save_weights


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How to train; every field is used and written into the card. Defaults are the paper's text.

    The paper's code adds weight_decay=1e-3 and picks the best epoch on the test set; we validate on `validation`, a
    held-out share of the training set (0 keeps the last epoch). `clip` bounds the gradient norm (0: off), `crop` is
    the zero padding of random crops (0: off), `cutout` the side of a square blacked out (0: off), `schedule` acts on
    the learning rate per step. `precision` is that of the products: tf32, as PyTorch runs convolutions on a GPU by
    default, is for GPUs only.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["none", "cosine"] = "none"
    batch: int = 16
    epochs: int = 100
    flip: bool = True
    crop: int = 0
    cutout: int = 0
    clip: float = 0.0
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    validation: float = 0.1
    seed: int = 3407

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("optimizer", self.optimizer in ("adam", "sgd"), "adam or sgd"),
            ("schedule", self.schedule in ("none", "cosine"), "none or cosine"),
            ("precision", self.precision in ("fp32", "tf32", "bf16"), "fp32, tf32 or bf16"),
            ("lr", 0 < self.lr < math.inf, "a finite number above 0"),
            ("betas", all(0 <= b < 1 for b in self.betas), "shares from 0 to below 1"),
            ("momentum", 0 <= self.momentum < 1, "a share from 0 to below 1"),
            ("batch", self.batch >= 1, "at least 1 image"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("crop", self.crop >= 0, "0 (off) or more pixels"),
            ("cutout", self.cutout >= 0, "0 (off) or more pixels"),
            ("clip", 0 <= self.clip < math.inf, "0 (off) or a finite norm above it"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or a finite number above it"),
            ("validation", 0 <= self.validation < 1, "a share of the training images, 0 or more and below 1"),
        ):
            if not ok:
                raise ValueError(f"{name}: expected {want}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Seams:
    """Where a defence enters the loop; each is optional, and a defence switched off is bit-equal to plain training.

    `inputs(net, encode, x, y, generator)` gives the pixels trained on, `penalty(net, encode, x, y, z, generator)` is
    added to the loss of the scores z at those pixels x (which ask for a gradient then), `after_step(net, generator)`
    acts on the weights after every optimiser step. With several `periods` a batch is as many updates, each over its
    share of the time steps; potentials go on from one to the next if they `carry`. `check` refuses, by ValueError and
    before anything is written, what the defence does not fit. `name` and `knobs` are what a model's card tells.
    """

    inputs: Callable[[nn.Module, Encoder, Tensor, Tensor, torch.Generator], Tensor] | None = None
    penalty: Callable[[nn.Module, Encoder, Tensor, Tensor, Tensor, torch.Generator], Tensor] | None = None
    after_step: Callable[[nn.Module, torch.Generator], None] | None = None
    periods: int = 1
    carry: bool = True
    check: Callable[[NetSpec, Encoder, TrainSpec], None] | None = None
    name: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)


class TrainingStopped(Exception):
    """Training ended early but cleanly: the same command continues it."""


class TrainingFailed(Exception):
    """The loss or a gradient was not finite; `failure.json` tells where, the last good checkpoint is kept."""


@dataclass
class _Progress:
    epoch: int = 0
    step: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    loss: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    machines: list[dict[str, Any]] = field(default_factory=list)  # what it ran on, each once


Say = Callable[[dict[str, Any]], None]


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
    identity = _identity(net_spec, encode, data, spec, seams, start)
    _check_fit(net_spec, encode, data, spec)
    if seams.check is not None:
        seams.check(net_spec, encode, spec)
    if start is not None and asdict(net_spec_from(start.card["net"])) != asdict(net_spec):
        raise ValueError(f"start: expected a model of the network asked for, found another in {start.path}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    gpu = device.type == "cuda"
    with alone(out), products(spec.precision == "tf32") if gpu else contextlib.nullcontext():
        _check_folder(out, identity)
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
        done = _Progress()
        resumed = _restore(out, identity, net, optimizer, done)
        steps_per_epoch = len(labels) // spec.batch
        total = steps_per_epoch * spec.epochs
        share_memory(net)
        if spec.precision == "bf16" and device.type == "cpu" and has_bf16():
            halve(net)
        recorded = recorder(net, encode, optimizer, spec, seams) if gpu else None
        if done.epoch >= spec.epochs and (out / "last.safetensors").exists():
            return load_model(out)
        log = _Log(out / "events.jsonl", say)
        machine = _machine(device)
        differs = _differs(done.machines[-1], machine) if done.machines else ""
        done.machines = [m for m in done.machines if m != machine] + [machine]
        more: dict[str, Any] = machine | ({"differs": differs} if differs else {})
        log("resumed" if resumed else "started", epoch=done.epoch, step=done.step, of=total, **more)
        started, saved, before = time.monotonic(), time.monotonic(), done.seconds

        def save_state() -> None:
            done.seconds = before + time.monotonic() - started
            _save_state(out, identity, net, optimizer, done)

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
                        losses = [_not_finite(*told) for told in recorded.told()]
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
                    _save_model(out / "model.safetensors", identity, net, done, score, device)
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
            _save_model(out / "last.safetensors", identity, net, done, score, device)
            log("done", epoch=spec.epochs, step=total, of=total, seconds=round(done.seconds, 2))
        finally:
            log.close()
        return load_model(out)


class Optimizer:
    """The optimiser of a TrainSpec on views of the parameters in their order in memory.

    PyTorch's fused Adam copies channels-last parameters, gradients and moments there and back at every step, a quarter
    of a training step on a CPU; an update is element by element, so the order of the elements is free. On a GPU all its
    state lies there, so that a step can be recorded.
    """

    def __init__(self, net: nn.Module, spec: TrainSpec) -> None:
        self.spec, self.parameters = spec, list(net.parameters())
        self.views = [_in_memory_order(p.detach()) for p in self.parameters]
        self.rate, gpu = spec.lr, all(p.is_cuda for p in self.parameters)
        knobs: dict[str, Any] = {"weight_decay": spec.weight_decay}
        knobs["lr"] = torch.tensor(spec.lr, device=self.views[0].device) if gpu else spec.lr
        if spec.optimizer == "adam":
            knobs |= {"betas": spec.betas, "fused": True, "capturable": gpu}
            self.inner: torch.optim.Optimizer = torch.optim.Adam(self.views, **knobs)
        else:
            self.inner = torch.optim.SGD(self.views, momentum=spec.momentum, fused=gpu or None, **knobs)
        self.inner._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # it runs plainly too, to warm up
        if gpu and spec.optimizer == "sgd" and spec.momentum:  # what the first step would make of no buffer
            for v in self.views:
                self.inner.state[v]["momentum_buffer"] = torch.zeros_like(v)

    def set_rate(self, step: int, total: int) -> None:
        """The learning rate of step `step` of `total`."""
        spec, before = self.spec, self.rate
        self.rate = spec.lr if spec.schedule == "none" else spec.lr * 0.5 * (1 + math.cos(math.pi * step / total))
        for group in self.inner.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = self.rate
            elif self.rate != before:
                group["lr"].fill_(self.rate)

    def step(self, unless: Tensor | None = None) -> None:
        """Update the parameters by their gradients, unless a flag on the device is one."""
        for p, view in zip(self.parameters, self.views, strict=True):
            now = _in_memory_order(p.detach())
            if now.shape != view.shape:
                raise RuntimeError(
                    f"expected a parameter laid out as before, {tuple(view.shape)}, found {tuple(now.shape)}"
                )
            if now.data_ptr() != view.data_ptr():
                view.data = now  # somebody gave the parameter other memory
            grad = p.grad
            if grad is not None and _turns(p, grad):
                grad = grad.contiguous(memory_format=torch.channels_last)
            view.grad = None if grad is None else _in_memory_order(grad, like=p)
        self.inner.found_inf = unless  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells fused optimisers
        self.inner.step()

    def state(self) -> dict[str, Tensor]:
        """Moments and counters by parameter number, shaped as the parameter."""
        found = {}
        for i, held in self.inner.state_dict()["state"].items():
            for k, v in held.items():
                if v is not None:
                    v = torch.as_tensor(v)
                    found[f"{i}.{k}"] = v.permute(0, 3, 1, 2) if _turns(self.parameters[i], v) else v
        return found

    def restore(self, found: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in found.items():
            i, k = key.split(".", 1)
            p = self.parameters[int(i)]
            state.setdefault(int(i), {})[k] = (
                _in_memory_order(torch.empty_like(p).copy_(value)).contiguous() if value.shape == p.shape else value
            )
        self.inner.load_state_dict({"state": state, "param_groups": self.inner.state_dict()["param_groups"]})


def _in_memory_order(t: Tensor, like: Tensor | None = None) -> Tensor:
    """A channels-last tensor seen as contiguous; others as they are. `like` decides for a gradient."""
    return t.permute(0, 2, 3, 1) if _turns(t if like is None else like, t) else t


def _turns(parameter: Tensor, t: Tensor) -> bool:
    last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return last and t.ndim == 4 and not parameter.is_contiguous()


def update(
    net: nn.Module,
    encode: Encoder,
    optimizer: Optimizer,
    spec: TrainSpec,
    seams: Seams,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    generator: torch.Generator,
    recorded: Update | None = None,
) -> float | None:
    """One update on one batch, or one a period; returns the (last) loss, or what else was not finite.

    `recorded` does it by a CUDA graph; None then says that the step is under way and `recorded` will tell.
    """
    for m in net.modules():
        if isinstance(m, Draws):
            m.generator = generator
    if seams.periods == 1:
        return _one_update(net, encode, optimizer, spec, seams, x, y, generator, recorded)
    part, value = encode.over(encode.steps // seams.periods), 0.0
    with running_for(net, part.steps), carrying({} if seams.carry else None):
        for _ in range(seams.periods):
            value = _one_update(net, part, optimizer, spec, seams, x, y, generator, None)
            if value is None or not math.isfinite(value):
                break
    return value


def _one_update(
    net: nn.Module,
    encode: Encoder,
    optimizer: Optimizer,
    spec: TrainSpec,
    seams: Seams,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    generator: torch.Generator,
    recorded: Update | None,
) -> float | None:
    if seams.inputs is not None:
        x = seams.inputs(net, encode, x, y, generator)
    net.train()
    if recorded is not None and recorded(x, y):
        _settle(net, seams, generator)
        return None
    net.zero_grad(set_to_none=True)
    if seams.penalty is not None:
        x = x.detach().requires_grad_()
    half = spec.precision == "bf16" and not (x.device.type == "cpu" and has_bf16())  # else the engine sees to it
    with torch.autocast(x.device.type, torch.bfloat16) if half else contextlib.nullcontext():
        z = scores(net, encode, x)
        z = z.float() if half else z
        loss = F.cross_entropy(z, y)
        if seams.penalty is not None:
            loss = loss + seams.penalty(net, encode, x, y, z, generator)
    value = float(loss.detach())
    if not math.isfinite(value):
        return value
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    return _finish(net, optimizer, spec, seams, generator, value, float(norm))


def _finish(
    net: nn.Module,
    optimizer: Optimizer,
    spec: TrainSpec,
    seams: Seams,
    generator: torch.Generator,
    value: float,
    norm: float,
) -> float:
    """Move the weights along their gradients unless loss or norm are not finite; the loss, or what was not finite."""
    if not math.isfinite(value) or not math.isfinite(norm):
        return _not_finite(value, norm)
    if spec.clip:
        nn.utils.clip_grads_with_norm_(net.parameters(), spec.clip, torch.tensor(norm, dtype=optimizer.views[0].dtype))
    optimizer.step()
    _settle(net, seams, generator)
    return value


def _not_finite(loss: float, norm: float) -> float:
    """The loss, or the gradient norm if only that is not finite: a NaN weight silences its neurons, the norm tells."""
    return norm if math.isfinite(loss) and not math.isfinite(norm) else loss


def _settle(net: nn.Module, seams: Seams, generator: torch.Generator) -> None:
    """What is due to the weights after a step."""
    for m in net.modules():
        if isinstance(m, Neuron):
            m.confine()
    if seams.after_step is not None:
        seams.after_step(net, generator)


def recorder(net: nn.Module, encode: Encoder, optimizer: Optimizer, spec: TrainSpec, seams: Seams) -> Update | None:
    """The training step as a CUDA graph, where nothing in it changes from step to step but batch and rate."""
    drawn = encode.random or any(isinstance(m, Draws) for m in net.modules())
    if drawn or seams.penalty is not None or seams.periods > 1:
        return None

    def way(x: Tensor) -> Tensor:
        half = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if spec.precision == "bf16" else None
        with half or contextlib.nullcontext():
            z = scores(net, encode, x)
        return z if half is None else z.float()

    def move(gradients: tuple[Tensor, ...], norm: Tensor, bad: Tensor) -> None:
        for p, g in zip((p for p in net.parameters() if p.requires_grad), gradients, strict=True):
            p.grad = g
        if spec.clip:
            nn.utils.clip_grads_with_norm_(net.parameters(), spec.clip, norm)
        optimizer.step(unless=bad)

    return Update(net, way, move, tf32=spec.precision == "tf32")


def scores(net: nn.Module, encode: Encoder, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """Scores of pixels by the network's own shorter way, if it has one: frames shown again are not computed again."""
    way = getattr(net, "scores", None)
    return net(encode(x)) if way is None else way(x, encode)


def accuracy(
    net: nn.Module, encode: Encoder, data: Dataset, *, batch: int = 128, device: str | torch.device = "cpu"
) -> Rate:
    """Clean accuracy in eval mode; the network's mode is put back."""
    was = net.training
    net.eval()
    right = 0
    try:
        with torch.no_grad(), in_float32(torch.device(device)):
            for i in range(0, len(data.labels), batch):
                z = scores(net, encode, pixels(data.images[i : i + batch].to(device)))
                right += int((z.argmax(1) == data.labels[i : i + batch].to(device)).sum())
    finally:
        net.train(was)
    return Rate(right, len(data.labels))


def _identity(
    net: NetSpec, encode: Encoder, data: Dataset, spec: TrainSpec, seams: Seams, start: Trained | None
) -> dict[str, Any]:
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


def _check_folder(out: Path, identity: dict[str, Any]) -> None:
    for name in ("state.safetensors", "state.previous.safetensors", "model.safetensors"):
        if not (out / name).exists():
            continue
        try:
            _, card, _ = load_weights(out / name)
        except CheckpointError:
            continue  # a damaged snapshot is dealt with where it is read
        _refuse_another(out, identity, card)


def _refuse_another(out: Path, identity: dict[str, Any], card: dict[str, Any]) -> None:
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


def _save_state(out: Path, identity, net: nn.Module, optimizer: Optimizer, done: _Progress) -> None:
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"opt.{k}": v for k, v in optimizer.state().items()}
    progress = asdict(done) | {"best": done.best if math.isfinite(done.best) else None}
    path = out / "state.safetensors"
    if path.exists():
        os.replace(path, out / "state.previous.safetensors")
    save_weights(path, tensors, identity | {"kind": "training state", "progress": progress})


def _restore(out: Path, identity, net: nn.Module, optimizer: Optimizer, done: _Progress) -> bool:
    problems = []
    for name in ("state.safetensors", "state.previous.safetensors"):
        if not (out / name).exists():
            continue
        try:
            tensors, card, _ = load_weights(out / name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        _refuse_another(out, identity, card)
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


def _save_model(
    path: Path, identity, net: nn.Module, done: _Progress, score: Rate | None, device: torch.device
) -> None:
    card = identity | {
        "kind": "model",
        "epochs_done": done.epoch,
        "chosen_by": "last epoch" if score is None else "accuracy on the held-out part of the training set",
        "validation": None if score is None else {"k": score.k, "n": score.n},
        "made_with": _machine(device),
    }
    if before := done.machines[:-1]:
        card["begun_with"] = before
    save_weights(path, net.state_dict(), card)


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    made = cuda.usable() and switched_on() if device.type == "cuda" else device.type == "cpu" and available()
    kernels = "generated" if made else "PyTorch's"
    threads = torch.get_num_threads()
    return {
        "device": f"{device.type} {name}", "torch": torch.__version__, "threads": threads, "kernels": kernels,
        "sparsetrail": __version__,
    }  # fmt: skip


def _differs(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What of a machine is not as it was when the run was cut off."""
    return "; ".join(f"{k} {before.get(k)}, now {v}" for k, v in now.items() if before.get(k) != v)


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


class _Log:
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
