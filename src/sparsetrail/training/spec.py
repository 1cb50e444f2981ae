"""What decides a training: the specification, where a defence enters, and how a training may end early."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.net import NetSpec

KINDS: dict[type, tuple[str, tuple[type, ...]]] = {  # of a setting, by that of its default
    bool: ("True or False", (bool,)), int: ("a whole number", (int,)), float: ("a number", (int, float)),
    str: ("a word", (str,)), tuple: ("a pair of numbers", (tuple, list)),
}  # fmt: skip


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
        for field_ in fields(self):
            value, want = getattr(self, field_.name), type(field_.default)
            kind, types = KINDS[want]
            if not isinstance(value, types) or (isinstance(value, bool) and want is not bool):
                raise ValueError(f"{field_.name}: expected {kind}, got {value!r}")
        for name, ok, want in (
            ("optimizer", self.optimizer in ("adam", "sgd"), "adam or sgd"),
            ("schedule", self.schedule in ("none", "cosine"), "none or cosine"),
            ("precision", self.precision in ("fp32", "tf32", "bf16"), "fp32, tf32 or bf16"),
            ("lr", 0 < self.lr < math.inf, "a finite number above 0"),
            ("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two shares from 0 to below 1"),
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
