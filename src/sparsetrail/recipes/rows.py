"""The models of the paper's tables, one a row, and which rows a figure has."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsetrail.core import Claim
from sparsetrail.data import Dataset
from sparsetrail.recipes.measure import (
    Job,
)
from sparsetrail.recipes.scales import Scale, part
from sparsetrail.recipes.systems import SYSTEMS
from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import RESNETS, NetSpec
from sparsetrail.snn.neuron import NeuronSpec
from sparsetrail.training import TrainSpec

PAIRS = ("table3", "threats")  # figures of ResNets with either pool


@dataclass(frozen=True)
class Row:
    """One model of the paper's tables: a ResNet with its pool, or a system by its name."""

    arch: str
    pool: str
    dataset: str
    seed: int | None = None  # of training, where several are taken
    decay: float = 0.0  # weight decay in training; of a system that of its source

    @property
    def system(self) -> bool:
        """Whether it is one of SYSTEMS."""
        return self.arch in SYSTEMS

    @property
    def name(self) -> str:
        """As the paper writes it, with its pool and data set."""
        if self.system:
            return f"{SYSTEMS[self.arch].title}, {self.dataset}"
        family, depth = self.arch.split("_resnet")
        seed = "" if self.seed is None else f"seed {self.seed}, "
        decay = f"weight decay {self.decay:g}, " if self.decay else ""
        return f"{'SEW' if family == 'sew' else 'Spiking'}-ResNet{depth} {self.pool} pool, {decay}{seed}{self.dataset}"

    @property
    def folder(self) -> str:
        """Name of its model folder."""
        seed = "" if self.seed in (None, TrainSpec().seed) else f"-{self.seed}"
        decay = f"-decay{self.decay:g}" if self.decay else ""
        return f"{self.dataset}-{self.arch}" + ("" if self.system else f"-{self.pool}") + decay + seed

    @property
    def told(self) -> dict[str, Any]:
        """What its card says beside the model: a row of several seeds, and the one of this network."""
        if self.seed is None:
            return {"name": self.name}
        return {"name": self.name, "row": replace(self, seed=None).name, "training seed": self.seed}


def row_of(claim: Claim) -> str:
    """The architecture or the system a published figure is about."""
    arch = str(claim.conditions.get("model", claim.row)).lower().replace("-", "_")
    found = (n for n, s in SYSTEMS.items() if (s.arch, s.called) == (arch, claim.conditions.get("defence")))
    return arch if arch in RESNETS else next(found)


def rows_of(
    figure: str, found: Sequence[Claim], chosen: Sequence[str], datasets: Sequence[str], asked: Sequence[str] = ()
) -> list[Row]:
    """The rows of a figure among those `chosen`, on every data set; table 3 has both pools and no other system.

    Systems that no published row is about stand below the others in tables 1 and 2, and so do ResNets that are `asked`
    for by name in table 3 and under the threats.
    """
    if figure.startswith("fig"):
        if set(asked) - {"sew_resnet18"}:
            raise ValueError(f"rows: {figure} is the trail of sew_resnet18, got {', '.join(asked)}; leave them out")
        return [Row("sew_resnet18", "max" if figure == "fig1" else "avg", datasets[0])]
    pairs = figure in PAIRS
    names = dict.fromkeys(row_of(c) for c in found if c.figure == ("table3" if pairs else figure))
    names |= dict.fromkeys([name for name in asked if name in RESNETS] if pairs else SYSTEMS)
    pools = ("max", "avg") if pairs else ("max",)
    return [
        Row(name, "" if name in SYSTEMS else pool, dataset)
        for dataset in datasets
        for name in names
        if name in chosen
        for pool in pools
    ]


def net_spec(row: Row, size: Scale, classes: int) -> NetSpec:
    """The paper's network: IF, arctan(2), T=10; the reset is detached in SEW and in the graph of Spiking-ResNet."""
    neuron = NeuronSpec(detach_reset=row.arch.startswith("sew"))
    return NetSpec(arch=row.arch, pool=row.pool, classes=classes, width=size.width, neuron=neuron)  # type: ignore[arg-type]


def job(row: Row, size: Scale, train_set: Dataset) -> Job:
    """The training of a ResNet of the tables."""
    spec = replace(net_spec(row, size, len(train_set.classes)), channels=train_set.images.shape[1])
    how = TrainSpec(epochs=size.epochs, weight_decay=row.decay)
    how = how if row.seed is None else replace(how, seed=row.seed)
    return row.folder, spec, phase(), part(train_set, size.images), how
