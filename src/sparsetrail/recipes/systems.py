"""The compared systems: each network, how its source trains it, and its defence, by one name.

Published settings and what they leave open are told with each; `train_system` takes other widths, steps and epochs for
a smaller machine. Beside the five of the paper stand two standard defences and newer ones, for an honest table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparsetrail.attacks import settings
from sparsetrail.convert import convert, twin_of
from sparsetrail.data import Dataset, split_validation
from sparsetrail.defend import DEFENCES
from sparsetrail.models import Trained
from sparsetrail.recipes.measure import Bench, fit
from sparsetrail.snn.encode import Encoder, direct, poisson
from sparsetrail.snn.folded import NORMALISATIONS, Readout
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.neuron import NeuronSpec
from sparsetrail.snn.surrogate import Surrogate
from sparsetrail.snn.vgg import Norm
from sparsetrail.training import Seams, TrainSpec

IF = NeuronSpec(detach_reset=False, surrogate=Surrogate("triangle", 1.0))  # called LIF there, with a leak of 1
DIET = NeuronSpec(kind="diet", reset=None, surrogate=Surrogate("damped_triangle", 1.0))
SGD = TrainSpec(
    optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine", batch=64, epochs=200, crop=4, seed=42
)  # fmt: skip
TUNE = replace(SGD, optimizer="adam", lr=1e-4, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Twin:
    """How the network of ReLUs is trained and read that a spiking one starts from; `steps` of them in calibration."""

    train: TrainSpec
    percentile: float
    scale: float
    steps: int
    images: int = 512


@dataclass(frozen=True, kw_only=True)
class System:
    """One compared system as its source has it. `defence` is a name in DEFENCES, or "" for none that acts on training.

    `called` is what published tables call the defence. `open` says what the source leaves open and what is taken,
    `apart` what separates our model at full scale from the published figure.
    """

    arch: str
    title: str
    called: str = "none"
    defence: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    neuron: NeuronSpec = IF
    steps: int = 8
    signed_poisson: bool = False
    norm: Norm = "batch"
    dropout: float = 0.0
    readout: Readout = "mean"
    train: TrainSpec = SGD
    twin: Twin | None = None
    open: str = ""
    apart: str = ""

    def encoder(self, steps: int) -> Encoder:
        """Its input code over so many steps."""
        return poisson(steps=steps, signed=True) if self.signed_poisson else direct(steps=steps)

    def net(self, data: Dataset, *, width: float = 1.0, steps: int | None = None) -> NetSpec:
        """Its network for the images of a data set; normalisation is the first operation."""
        known = data.name if data.name in NORMALISATIONS else "half"
        return NetSpec(
            arch=self.arch, classes=len(data.classes), channels=data.images.shape[1], width=width, norm=self.norm,
            dropout=self.dropout, normalise="none" if self.signed_poisson else known, readout=self.readout,
            neuron=self.neuron, steps=self.steps if steps is None else steps,
        )  # fmt: skip

    def seams(self, knobs: Mapping[str, Any] | None = None) -> Seams:
        """Its defence; `knobs` go before its own."""
        given = dict(self.knobs) | dict(knobs or {})
        if not self.defence:
            if given:
                raise ValueError(f"{self.title}: expected no settings, its training has no defence; got {given}")
            return Seams()
        known = settings(DEFENCES[self.defence])
        if strange := set(given) - set(known):
            raise ValueError(
                f"{self.defence}: expected settings among {', '.join(known)}, got {', '.join(sorted(strange))}"
            )
        return DEFENCES[self.defence](**given)


FEW_STEPS = Twin(train=replace(TUNE, lr=1e-3, batch=128, epochs=300), percentile=99.7, scale=0.3, steps=100)
"""DIET-SNN's: thresholds low enough for the spikes of few time steps to reach the last layer."""

_EPOCHS = (
    "200 epochs on all images, of which a tenth is held out here (validation 0 takes all); the source keeps the epoch "
    "that is best on the test set"
)
_RAT = (
    "single or mixed attack, the gradient behind the published columns, cutout and the retraction's strength for "
    "VGG-11; by default: one FGSM step of 2/255 through time, no cutout, 0.004 (its released tester attacks by the "
    "route cba unless told otherwise)"
)
UNPUBLISHED = "no figure is published in the paper's tables"
_RAT_APART = (
    f"{_EPOCHS}; independent runs of VGG-11 "
    "print 45.0 and 23.0 % (FGSM, PGD-7) for CIFAR-10, as published, but 18.9 and 8.9 % for CIFAR-100"
)
_HIRE = (
    "steps of the noise and their number, whether noise outlasts a batch and potentials a period, epochs of the "
    "spiking stage; by default: two periods, so one step of 0.0155 (0.031 over the periods, never cut), noise from "
    "zero for every batch, potentials go on, 200 epochs"
)
_WEAK = {"eps": 2 / 255, "steps": 2, "step": 1 / 255}

SYSTEMS: dict[str, System] = {
    "vanilla_vgg11": System(
        arch="vgg11", title="Vanilla VGG-11", apart=_EPOCHS
    ),
    "vanilla_wrn16": System(
        arch="wrn16_4", title="Vanilla WRN-16-4", apart=UNPUBLISHED
    ),
    "rat_vgg11": System(
        arch="vgg11", title="SNN-RAT VGG-11", called="snn_rat", defence="snn_rat",
        train=replace(SGD, weight_decay=0.0), open=_RAT, apart=_RAT_APART,
    ),
    "rat_wrn16": System(
        arch="wrn16_4", title="SNN-RAT WRN-16-4", called="snn_rat", defence="snn_rat",
        train=replace(SGD, weight_decay=0.0), open=_RAT.replace(" and the retraction's strength for VGG-11", ""),
        apart=_RAT_APART,
    ),
    "hire_vgg11": System(
        arch="vgg11", title="HIRE-SNN VGG-11", called="hire_snn", defence="hire_snn", neuron=DIET, norm="none",
        dropout=0.2, readout="sum", train=TUNE, twin=FEW_STEPS,
        open=_HIRE, apart="the training code was never released, so the settings above are guesses",
    ),
    "hire_vgg5": System(
        arch="vgg5", title="HIRE-SNN VGG-5", called="hire_snn", defence="hire_snn", neuron=DIET, norm="none",
        dropout=0.2, readout="sum", train=TUNE, twin=FEW_STEPS, open=f"{_HIRE}, 8 time steps as of VGG-11",
        apart=f"the training code was never released, so the settings above are guesses; {UNPUBLISHED}",
    ),
    "discretised_vgg11": System(
        arch="vgg11", title="Input discretisation VGG-11", called="input_discretisation",
        neuron=replace(DIET, leak=0.99, learn=False), steps=120, signed_poisson=True, norm="none", dropout=0.3,
        readout="sum", train=replace(TUNE, epochs=50),
        twin=Twin(
            train=replace(SGD, lr=1e-2, epochs=300), percentile=100.0, scale=0.7, steps=2500
        ),
        open="the number of steps of the published VGG-11; by default: 120, as a later plot has it",
        apart="its VGG-11 has one convolution more, its neurons fire from the potential of the step before (a delay a "
        "layer), its learning rates fall in stairs, its Adam is AMSGrad; published attacks draw one spike train a "
        "gradient, take steps of 2/255 and the cross-entropy of the mean over the steps, tables here average ten "
        "draws, take steps of 0.01 and the cross-entropy of the sum",
    ),
    "pgd_at_vgg11": System(
        arch="vgg11", title="PGD-AT VGG-11", called="pgd_at", defence="pgd_at", knobs=_WEAK,
        open="none; 2/255 in two steps is what SNN papers compare with", apart=UNPUBLISHED,
    ),
    "trades_vgg11": System(
        arch="vgg11", title="TRADES VGG-11", called="trades", defence="trades",
        open="made for other networks; by default: beta 6, ten steps of 2/255 in 8/255",
        apart=UNPUBLISHED,
    ),
    "sr_vgg11": System(
        arch="vgg11", title="SR VGG-11", called="sr", defence="sr", train=replace(SGD, batch=32),
        open="the weight of the regulariser; by default: 0.004",
        apart="its own tables were not at hand; later papers print 31.7 % under FGSM and 8.6 % under PGD-7 at 8/255",
    ),
    "sr_at_vgg11": System(
        arch="vgg11", title="SR with AT VGG-11", called="sr", defence="sr", knobs=_WEAK, train=replace(SGD, batch=32),
        open="the weight of the regulariser and the attack in training; by default: 0.004, two steps of 1/255 in 2/255 "
        "(its code's own default is seven steps of 0.01 in 8/255)",
        apart="later papers that train it again differ by 15 points, at different numbers of time steps",
    ),
    "mppd_vgg11": System(
        arch="vgg11", title="MS-MPPD VGG-11", called="mppd", defence="mppd",
        neuron=replace(IF, kind="lif", tau=100.0, decay_input=False), train=replace(SGD, epochs=100),
        open="none", apart="without the learnt gain of every layer and step that its source also has",
    ),
    "tg_reg_vgg11": System(
        arch="vgg11", title="TG-Reg VGG-11", called="tg_reg", defence="tg_reg", knobs=_WEAK, steps=4,
        open="normalisation of the penalty and where its gradient is taken; by default: the mean over images of weight "
        "100, behind the network's normalisation (at raw pixels it would weigh 25 times as much)",
        apart="known by its formula alone, no code to compare with",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained, and how."""

    net: NetSpec
    encode: Encoder
    seams: Seams
    spec: TrainSpec
    twin: Twin | None


def plan(
    name: str,
    data: Dataset,
    *,
    width: float = 1.0,
    steps: int | None = None,
    epochs: int | None = None,
    twin: Twin | None = None,
    twin_epochs: int | None = None,
    calibrate: int | None = None,
    batch: int | None = None,
    weight_decay: float | None = None,
    cutout: int | None = None,
    validation: float | None = None,
    seed: int | None = None,
    knobs: Mapping[str, Any] | None = None,
) -> Plan:
    """What `train_system` would train, and how; ValueError for what does not exist or does not fit."""
    if name not in SYSTEMS:
        raise ValueError(f"system: expected one of {', '.join(SYSTEMS)}, got {name!r}")
    system = SYSTEMS[name]
    if system.twin is None and (twin, twin_epochs, calibrate) != (None, None, None):
        raise ValueError(f"{name}: has no twin of ReLUs; leave it, its epochs and the steps of its calibration out")
    if calibrate is not None and calibrate < 1:
        raise ValueError(f"calibrate: expected at least 1 step, got {calibrate}")
    net = system.net(data, width=width, steps=steps)
    encode, seams = system.encoder(net.steps), system.seams(knobs)
    given: dict[str, Any] = {"batch": batch, "cutout": cutout, "validation": validation, "seed": seed}
    spec = _changed(system.train, epochs=epochs, weight_decay=weight_decay, **given)
    twin = twin or system.twin
    if twin is not None:
        relus = _changed(twin.train, epochs=twin_epochs, **given)
        twin = replace(twin, train=relus, steps=twin.steps if calibrate is None else calibrate)
    for s in (spec, *([twin.train] if twin else [])):
        if s.batch > (held_in := len(data.labels) - int(s.validation * len(data.labels))):
            raise ValueError(f"batch: expected at most the {held_in} training images, got {s.batch}")
    if seams.check is not None:
        seams.check(net, encode, spec)
    return Plan(net=net, encode=encode, seams=seams, spec=spec, twin=twin)


def train_system(bench: Bench, name: str, data: Dataset, **how: Any) -> Trained:
    """Train a system into `out/models/DATA-NAME`, its twin and conversion first where it has one; or go on, or take it.

    `how` are the settings of `plan`; whatever is left out is as the source has it: width 1, time `steps`, `epochs`, the
    `twin`, its epochs and the steps in which thresholds are read (`calibrate`), `batch`, `weight_decay`, `cutout`,
    `seed`, and `knobs` of the defence. A tenth of the images is held out, unless `validation` says another share (0
    keeps the last epoch); thresholds are read on the others. ValueError, before anything is written, for what does not
    exist or does not fit.
    """
    p, folder, start = plan(name, data, **how), f"{data.name}-{name}", None
    if p.twin is not None:
        twin = fit(bench, f"{folder}/twin", twin_of(p.net, p.encode), direct(steps=1), data, p.twin.train)
        held_in = split_validation(data, p.spec.validation, p.spec.seed)[0] if p.spec.validation else data
        start = convert(
            twin, p.net, p.encode, held_in, bench.out / "models" / folder / "converted",
            percentile=p.twin.percentile, scale=p.twin.scale, steps=p.twin.steps, images=p.twin.images,
            seed=p.spec.seed, device=bench.device,
            say=lambda done, of: bench.tick(f"calibrate {folder}", done, of, ""),
        )  # fmt: skip
    return fit(bench, folder, p.net, p.encode, data, p.spec, seams=p.seams, start=start)


def _changed(spec: TrainSpec, **given: Any) -> TrainSpec:
    return replace(spec, **{k: v for k, v in given.items() if v is not None})


def facts(name: str) -> dict[str, str]:
    """What a report says of a system beside its model's card."""
    s = SYSTEMS[name]
    return {
        "name": s.title,
        "defence": s.called,
        "open in its source": s.open or "nothing",
        "still apart from its published figure": s.apart,
    }
