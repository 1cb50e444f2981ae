"""How much of the paper is run: everything, small, or a glimpse that only shows that it works."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsetrail.auditing import Budget
from sparsetrail.data import Dataset, take
from sparsetrail.recipes.systems import FEW_STEPS, SYSTEMS, Twin
from sparsetrail.snn.net import RESNETS

ROWS = (*RESNETS, *SYSTEMS)


@dataclass(frozen=True, kw_only=True)
class SystemScale:
    """How the compared systems are trained and audited; None is as the source has it, `poisson_steps` are of Poisson
    coded ones. `knobs` and `twins` are a defence's settings and the ReLU twin (its training, the reading of
    thresholds) where they differ from the source's. `audited_random` is for systems whose code is random.
    """

    images: int | None = None
    epochs: int | None = None
    twin_epochs: int | None = None
    calibrate: int | None = None
    width: float = 1.0
    steps: int | None = None
    poisson_steps: int | None = None
    batch: int | None = None
    knobs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    twins: Mapping[str, Twin] = field(default_factory=dict)
    audited: int = 1000
    audited_random: int = 1000
    budget: Budget = "standard"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of the paper is run. None means all; `rows` are the architectures taken unless others are named."""

    images: int | None
    epochs: int
    width: float
    attacked: int | None
    scored: int | None
    traced: int
    rows: tuple[str, ...]
    datasets: tuple[str, ...]
    systems: SystemScale


SCALES = {
    "smoke": Scale(
        images=320,
        epochs=1,
        width=0.125,
        attacked=32,
        scored=64,
        traced=16,
        rows=("sew_resnet18", *SYSTEMS),
        datasets=("cifar10",),
        systems=SystemScale(
            images=320,
            epochs=1,
            twin_epochs=2,
            calibrate=100,
            width=0.125,
            steps=4,
            poisson_steps=4,
            batch=32,
            knobs={"trades_vgg11": {"steps": 2, "step": 4 / 255}},
            twins={"discretised_vgg11": FEW_STEPS},
            audited=8,
            audited_random=8,
            budget="quick",
        ),
    ),
    "small": Scale(
        images=10_000,
        epochs=5,
        width=1.0,
        attacked=500,
        scored=2000,
        traced=64,
        rows=("sew_resnet18", *SYSTEMS),
        datasets=("cifar10",),
        systems=SystemScale(
            images=4000,
            epochs=6,
            twin_epochs=18,
            calibrate=50,
            width=0.25,
            steps=4,
            poisson_steps=10,
            batch=32,
            knobs={"trades_vgg11": {"steps": 3, "step": 4 / 255}, "tg_reg_vgg11": {"weight": 1.0}},
            twins={"discretised_vgg11": FEW_STEPS},
            audited=200,
            audited_random=100,
        ),
    ),
    "paper": Scale(
        images=None,
        epochs=100,
        width=1.0,
        attacked=None,
        scored=None,
        traced=1000,
        rows=ROWS,
        datasets=("cifar10", "cifar100"),
        systems=SystemScale(),
    ),
}


def part(data: Dataset, n: int | None) -> Dataset:
    """`n` images of a set, the same ones every time; all of them where it has no more."""
    return data if n is None or n >= len(data.labels) else take(data, n, seed=0)
