"""Sparsity-aware design: what pool, surrogate, time steps and stem do to accuracy, robustness and gradient density.

The paper compares two designs, max and average pooling (arXiv:2509.23762, sec. 5), and asks for more (sec. 6). Here
each design differs from the paper's network in one thing, is trained the same way, attacked in pixel space by several
attacks, of which every image keeps the worst, and traced.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sparsetrail.attacks.pgd import PACE
from sparsetrail.core import Linf, Report, Route, Run, Threat
from sparsetrail.data import Dataset, load
from sparsetrail.recipes.measure import Bench, Job, card, clean, fit_all, follow, provenance, strike
from sparsetrail.recipes.scales import part
from sparsetrail.recipes.targets import Target, ours
from sparsetrail.report.design_tables import tradeoff, tradeoff_sentences
from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.neuron import NeuronSpec
from sparsetrail.snn.pools import POOLS
from sparsetrail.snn.surrogate import Surrogate
from sparsetrail.training import TrainSpec

Factor = Literal["pool", "surrogate", "steps", "stem"]
FACTORS: tuple[Factor, ...] = get_args(Factor)
EPS = (1 / 255, 2 / 255)
ATTACKS: tuple[tuple[str, tuple[Route, ...], dict[str, Any]], ...] = (
    ("pgd", (), {"steps": 7}),
    ("codebook", (), {"steps": 20}),
    ("codebook", (), {"steps": 20, "loss": "margin"}),
    ("codebook", (Route(neuron="assg"),), {"steps": 20, "loss": "margin"}),
    ("square", (), {"queries": 100}),
)
"""The worst case is over these: the usual attack, the encoder taken exactly under two losses and under a surrogate that
adapts to each neuron, whatever the design's own, and one that asks for no gradient at all."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done for each design. None takes all images; `width` is that of the network."""

    images: int | None
    epochs: int
    width: float
    attacked: int | None
    scored: int | None
    traced: int
    steps: tuple[int, ...]
    surrogates: tuple[float, ...]


NAMES = {
    "max": "max pool",
    "avg": "average pool",
    "mix": "half max, half average",
    "learned": "learnt mix",
    "stochastic": "stochastic pool",
    "sum": "sum and fire",
    "conv": "strided convolution",
    "none": "no pool",
}

SIZES = {
    "smoke": Size(
        images=96, epochs=1, width=0.125, attacked=8, scored=16, traced=4, steps=(3, 2), surrogates=(2.0, 4.0)
    ),
    "small": Size(
        images=4000,
        epochs=4,
        width=0.5,
        attacked=200,
        scored=2000,
        traced=64,
        steps=(10, 5, 20),
        surrogates=(2.0, 1.0, 4.0),
    ),
    "paper": Size(
        images=None,
        epochs=100,
        width=1.0,
        attacked=1000,
        scored=None,
        traced=1000,
        steps=(10, 5, 20),
        surrogates=(2.0, 0.5, 1.0, 4.0, 8.0),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Design:
    """One network of the sweep: what it is called, what sets it apart, and how it is built."""

    name: str
    factor: Factor
    net: NetSpec


def designs(size: Size, channels: int, classes: int, factors: Sequence[Factor] = FACTORS) -> Iterator[Design]:
    """The paper's network first (max pool, arctan(2), the first of `size.steps`), then one thing changed at a time."""
    base = NetSpec(
        pool="max",
        channels=channels,
        classes=classes,
        width=size.width,
        steps=size.steps[0],
        neuron=NeuronSpec(surrogate=Surrogate("atan", size.surrogates[0])),
    )
    yield Design(name=NAMES["max"], factor="pool", net=base)
    if "pool" in factors:
        for pool in POOLS[1:]:
            yield Design(name=NAMES[pool], factor="pool", net=replace(base, pool=pool))
    if "surrogate" in factors:
        for width in size.surrogates[1:]:
            neuron = replace(base.neuron, surrogate=Surrogate("atan", width))
            yield Design(name=f"arctan({width:g})", factor="surrogate", net=replace(base, neuron=neuron))
    if "steps" in factors:
        for steps in size.steps[1:]:
            yield Design(name=f"T={steps}", factor="steps", net=replace(base, steps=steps))
    if "stem" in factors:
        yield Design(name="CIFAR stem", factor="stem", net=replace(base, stem="cifar", pool="none"))


def sweep(
    bench: Bench,
    dataset: str = "cifar10",
    scale: str = "small",
    *,
    factors: Sequence[Factor] = FACTORS,
    eps: Sequence[float] = EPS,
    seeds: int = 1,
    root: Path | None = None,
    command: str = "",
) -> Report:
    """Train, attack and trace every design; `seeds` networks of each. Every step is a cell, a repeated call continues.

    ValueError for an unknown scale, no factor, no radius, or no seed.
    """
    if scale not in SIZES:
        raise ValueError(f"scale: expected one of {', '.join(SIZES)}, got {scale!r}")
    if not factors or not eps or seeds < 1:
        raise ValueError(f"expected a factor, a radius and a seed at least, got {factors}, {tuple(eps)}, {seeds} seeds")
    size, started = SIZES[scale], time.monotonic()
    threats = [Linf(e, space="pixel") for e in eps]
    train_set, test_set = (load(dataset, split, root=root) for split in ("train", "test"))
    seen = part(train_set, size.images)
    scored, attacked, traced = (part(test_set, n) for n in (size.scored, size.attacked, size.traced))
    every = list(designs(size, int(train_set.images.shape[1]), len(train_set.classes), factors))
    cards, runs, trails = [], [], []
    specs = [TrainSpec(epochs=size.epochs, seed=TrainSpec().seed + seed) for seed in range(seeds)]
    for spec in specs:
        models = fit_all(bench, [_job(design, train_set.name, seen, spec) for design in every])
        for design, model in zip(every, models, strict=True):
            name = design.name if seeds == 1 else f"{design.name}, seed {spec.seed}"
            rate = clean(bench, model, name, scored)
            facts = {"design": design.name, "factor": design.factor, "clean": {"k": rate.k, "n": rate.n}}
            cards.append(card(model, name, rate, scored) | facts)
            what = ours(model, name, device=bench.device)
            trails.append(follow(bench, what, traced, detail="origin"))
            for threat in threats:
                runs += _struck(bench, what, threat, attacked)
    report = Report(
        title=f"Sparsity-aware design on {train_set.name}, {scale} scale",
        summary=(),
        models=tuple(cards),
        runs=tuple(runs),
        trails=tuple(trails),
        claims=(),
        provenance=provenance(bench, started, command or f"sparsetrail design --data {dataset} --scale {scale}"),
        notes=_notes(size, seeds),
    )
    return replace(report, summary=tradeoff_sentences(tradeoff(report)))


def _job(design: Design, dataset: str, data: Dataset, spec: TrainSpec) -> Job:
    words = re.sub(r"[^A-Za-z0-9.=]+", "-", design.name).strip("-")
    return f"{dataset}-{words}-{spec.seed}", design.net, phase(steps=design.net.steps), data, spec


def _struck(bench: Bench, what: Target, threat: Threat, data: Dataset) -> list[Run]:
    runs = []
    for attack, route, knobs in ATTACKS:
        # the paper's step of 0.01 at 8/255, scaled to the radius
        pace: dict[str, Any] = {"step": PACE * threat.eps} if attack == "pgd" else {}
        runs.append(strike(bench, what, attack, threat, data, route=route, **knobs, **pace))
    return runs


def _notes(size: Size, seeds: int) -> tuple[str, ...]:
    images = "all" if size.images is None else f"{size.images:,}"
    return (
        "Every design differs from the first, the paper's network with max pool, in one thing. The worst case of an "
        f"image is over {len(ATTACKS)} attacks, so robust accuracies are upper bounds; `sparsetrail audit` tries more.",
        f"Trained on {images} images for {size.epochs} epochs at width x{size.width:g}, {seeds} training seed"
        f"{'s' * (seeds > 1)} a design: intervals are those of the test images and not of training.",
        "Density is the share of gradient entries that are not exactly zero, over the inputs of all operations.",
    )
