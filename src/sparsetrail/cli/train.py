"""The verbs that make models: `train`, `defend` (a compared system, as its source trains it), `import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sparsetrail import data
from sparsetrail.attacks import settings
from sparsetrail.cli.flags import KEPT, Fresh, Kept, chosen, emit, output_folder
from sparsetrail.cli.screen import Screen
from sparsetrail.defend import DEFENCES
from sparsetrail.models import Trained, import_weights
from sparsetrail.recipes import measure
from sparsetrail.recipes.systems import SYSTEMS, facts, plan, train_system
from sparsetrail.snn.encode import Encoder, build_encoder
from sparsetrail.snn.folded import NORMALISATIONS, Readout
from sparsetrail.snn.net import ARCHITECTURES, NetSpec
from sparsetrail.snn.neuron import NeuronSpec
from sparsetrail.snn.pools import POOLS
from sparsetrail.snn.surrogate import Surrogate
from sparsetrail.snn.vgg import Norm
from sparsetrail.training import TrainSpec
from sparsetrail.training import train as train_model


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Network:
    """Flags that say what a network is, beside its architecture and the shape of its data."""

    pool: Annotated[str | None, Parameter(help=f"{', '.join(POOLS)} or mix:0.25; default: max, in a VGG avg")] = None
    connect: Literal["add", "and", "iand"] = "add"
    stem: Literal["imagenet", "cifar"] = "imagenet"
    width: float = 1.0
    steps: Annotated[int, Parameter(name=["--steps", "--T"])] = 10
    encoder: Literal["phase", "direct", "poisson", "latency", "bit_plane"] = "phase"
    neuron: Literal["if", "lif", "plif", "diet"] = "if"
    threshold: float = 1.0
    soft_reset: bool = False
    detach_reset: bool | None = None
    tau: Annotated[float | None, Parameter(help="of lif and plif; default 2")] = None
    surrogate: str = "atan"
    surrogate_width: float = 2.0

    def spec(self, arch: str, shaped: data.Dataset, **more: Any) -> NetSpec:
        """The network of an architecture for an image set, `more` of its settings given; ValueError as of its parts."""
        diet = self.neuron == "diet"
        if self.tau is not None and self.neuron not in ("lif", "plif"):
            raise ValueError(
                f"--tau: expected none with {self.neuron} neurons, got {self.tau:g}; give --neuron lif or plif"
            )
        if diet and self.detach_reset is False:
            raise ValueError("--no-detach-reset: diet neurons detach it always; leave it out, or give another --neuron")
        detach = arch.startswith("sew") if self.detach_reset is None else self.detach_reset
        return NetSpec(
            arch=arch, classes=len(shaped.classes), channels=shaped.images.shape[1], width=self.width, stem=self.stem,
            pool=self.pool, connect=self.connect, steps=self.steps,
            neuron=NeuronSpec(
                kind=self.neuron, threshold=self.threshold, reset=None if self.soft_reset or diet else 0.0,
                detach_reset=detach or diet, tau=2.0 if self.tau is None else self.tau,
                surrogate=Surrogate(self.surrogate, self.surrogate_width),
            ),
            **more,
        )  # fmt: skip

    def code(self) -> Encoder:
        """The encoder, of as many steps as the network."""
        return build_encoder(self.encoder, **{"bits" if self.encoder == "bit_plane" else "steps": self.steps})


NETWORK = Network()


def train(
    arch: Annotated[str, Parameter(help=f"one of {', '.join(ARCHITECTURES)}")] = "sew_resnet18",
    *,
    data_name: Annotated[
        str, Parameter(name="--data", help="cifar10, cifar100, fashion-mnist, fashion-mnist-slice or a path")
    ],
    out: Path | None = None,
    network: Network = NETWORK,
    images: int | None = None,
    epochs: int = 100,
    batch: int = 16,
    lr: float = 1e-3,
    optimizer: Literal["adam", "sgd"] = "adam",
    weight_decay: float = 0.0,
    schedule: Literal["none", "cosine"] = "none",
    clip: float = 0.0,
    flip: bool = True,
    crop: int = 0,
    cutout: Annotated[int, Parameter(help="side of a square blacked out in every image")] = 0,
    precision: Literal["fp32", "tf32", "bf16"] = "fp32",
    validation: float = 0.1,
    defence: Annotated[
        str | None,
        Parameter(help=f"one of {', '.join(DEFENCES)}; none by default; hire_snn with --neuron diet --encoder direct"),
    ] = None,
    sets: Annotated[
        list[str] | None, Parameter(name="--set", negative="", help="a setting of the defence, e.g. eps=2/255")
    ] = None,
    seed: int = 3407,
    common: Kept = KEPT,
) -> None:
    """Train ARCH on a data set; the same command continues.

    Defaults are the paper's: Adam 1e-3, batch 16, 100 epochs, flip, seed 3407, IF neurons, arctan(2), phase code with
    T=10. The reset is detached in SEW-ResNets and in the graph of Spiking-ResNets, unless --detach-reset says
    otherwise. The best epoch is chosen on --validation of the training set. --defence trains with one of the defences
    on this network; `defend` takes the networks and schedules of their sources instead.
    """
    where = common.where()
    if defence is not None and defence not in DEFENCES:
        raise ValueError(f"--defence: expected one of {', '.join(DEFENCES)}, got {defence!r}")
    known = settings(DEFENCES[defence]) if defence else {}
    given = chosen(defence or "no defence", known, sets or [])
    seams = DEFENCES[defence](**given) if defence else None
    train_set = _training_images(data_name, images, common.root)
    net, code = network.spec(arch, train_set), network.code()
    spec = TrainSpec(
        optimizer=optimizer, lr=lr, weight_decay=weight_decay, schedule=schedule, batch=batch, epochs=epochs, flip=flip,
        crop=crop, cutout=cutout, clip=clip, precision=precision, validation=validation, seed=seed,
    )  # fmt: skip
    if seams is not None and seams.check is not None:
        seams.check(net, code, spec)  # refused before anything is written
    name = f"{train_set.name}-{arch}-{net.pool}{f'-{defence}' if defence else ''}".replace(":", "-")
    with Screen() as screen, common.folder(out or Path("runs") / name) as folder:

        def say(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                screen.tick(
                    "train", event["step"], event["of"], f"epoch {event['epoch'] + 1}/{epochs} loss {event['loss']:.3f}"
                )
            elif event["event"] == "epoch":
                score = "" if event["validation"] is None else f", validation {event['validation']:.1%}"
                screen.say(f"epoch {event['epoch'] + 1}/{epochs}: mean loss {event['loss']:.3f}{score}")
            elif event["event"] == "resumed":
                other = f" ({event['differs']}: not to the bit)" if "differs" in event else ""
                screen.say(f"continuing at epoch {event['epoch'] + 1}, step {event['step']}{other}")

        model = train_model(net, code, train_set, spec, folder, seams=seams, device=where, say=say, stop=screen.stop)
    if common.as_json:
        emit(_told(model))
    else:
        _say_model(model, model.path)


def import_(
    file: Path,
    *,
    arch: Annotated[str, Parameter(help=f"one of {', '.join(ARCHITECTURES)}")],
    data_name: Annotated[
        str, Parameter(name="--data", help="the set it was trained on, for its shape and for later attacks")
    ],
    out: Path,
    network: Network = NETWORK,
    normalise: Annotated[
        str, Parameter(help=f"the network's first operation: none, {', '.join(NORMALISATIONS)}")
    ] = "none",
    readout: Readout = "mean",
    norm: Annotated[Norm, Parameter(help="of a VGG")] = "batch",
    dropout: Annotated[float, Parameter(help="of a VGG")] = 0.0,
    root: Path | None = None,
    trust_pickle: Annotated[
        bool, Parameter(negative="", help="let FILE run code while it is read; of it a state dict alone is taken")
    ] = False,
    fresh: Fresh = False,
) -> None:
    """Take a foreign PyTorch checkpoint FILE of a known architecture into --out, so that it can be attacked and traced.

    Reads tensors only; names and shapes must fit. What the file does not say (normalisation, readout, neuron, encoder,
    pool) you say here, and what is taken for it is told.
    """
    found = data.load(data_name, "test", root=root)
    net = network.spec(arch, found, normalise=normalise, readout=readout, norm=norm, dropout=dropout)
    code = network.code()
    with output_folder(out, fresh):
        model = import_weights(file, net, code, found.name, out, trust_pickle=trust_pickle)
    print(f"model    {model.path}   sha256 {model.sha256[:12]}")
    print(f"taken    {_assumed(net, code)}")


def _assumed(net: NetSpec, code: Encoder) -> str:
    """What the names and shapes of a file cannot tell."""
    n = net.neuron
    reset = "soft" if n.reset is None else f"hard to {n.reset:g}"
    tau = f", tau {n.tau:g}" if n.kind in ("lif", "plif") else ""
    return (
        f"normalise {net.normalise}, readout {net.readout}, norm {net.norm}, dropout {net.dropout:g}, pool {net.pool}, "
        f"connect {net.connect}, neuron {n.kind}, threshold {n.threshold:g}{tau}, {reset} reset"
        f"{', detached' if n.detach_reset else ''}, surrogate {n.surrogate.name}({n.surrogate.width:g}), encoder "
        f"{code.name}, T={net.steps}"
    )


def defend(
    name: Annotated[str, Parameter(help=f"one of {', '.join(SYSTEMS)}")],
    *,
    data_name: Annotated[
        str, Parameter(name="--data", help="cifar10, cifar100, fashion-mnist, fashion-mnist-slice or a path")
    ],
    width: float = 1.0,
    steps: Annotated[int | None, Parameter(name=["--steps", "--T"], help="time steps; default the source's")] = None,
    images: int | None = None,
    epochs: Annotated[int | None, Parameter(help="default the source's, 200 for most")] = None,
    twin_epochs: Annotated[int | None, Parameter(help="of the ReLU twin that hire and discretised start from")] = None,
    calibrate: Annotated[int | None, Parameter(help="time steps in which its thresholds are read")] = None,
    batch: int | None = None,
    weight_decay: float | None = None,
    cutout: Annotated[int | None, Parameter(help="side of a square blacked out in every image; default 0")] = None,
    validation: Annotated[
        float | None, Parameter(help="share of the training images held out; 0 keeps the last epoch; default 0.1")
    ] = None,
    seed: int | None = None,
    sets: Annotated[
        list[str] | None, Parameter(name="--set", negative="", help="a setting of the defence, e.g. strength=0.002")
    ] = None,
    out: Path = Path("runs/defences"),
    common: Kept = KEPT,
) -> None:
    """Train NAME, a system the paper compares with or a defence beside it, into OUT/models; the same command continues.

    Network, normalisation, neuron, optimiser and defence are as the source has them, settings it leaves open are told
    at the end. The result is attacked, audited and traced like any model.
    """
    where = common.where()
    if name not in SYSTEMS:
        raise ValueError(f"defend: expected one of {', '.join(SYSTEMS)}, got {name!r}")
    defence = SYSTEMS[name].defence
    knobs = chosen(defence or name, settings(DEFENCES[defence]) if defence else {}, sets or [])
    train_set = _training_images(data_name, images, common.root)
    how = {
        "width": width, "steps": steps, "epochs": epochs, "twin_epochs": twin_epochs, "calibrate": calibrate,
        "batch": batch, "weight_decay": weight_decay, "cutout": cutout,
        "validation": validation, "seed": seed, "knobs": knobs,
    }  # fmt: skip
    plan(name, train_set, **how)  # refused before anything is written
    with Screen(quiet=common.as_json) as screen, common.folder(out / "models" / f"{train_set.name}-{name}"):
        bench = measure.Bench(out=out, device=where, tick=screen.tick, stop=screen.stop)
        model = train_system(bench, name, train_set, **how)
    told = facts(name) | {"defence settings": measure.told(model.card.get("defence", {}).get("knobs", {})) or "none"}
    if common.as_json:
        emit(_told(model) | told)
        return
    _say_model(model, model.path.parent)
    for key in ("defence settings", "open in its source", "still apart from its published figure"):
        print(f"{key}: {told[key]}")


def _training_images(name: str, images: int | None, root: Path | None) -> data.Dataset:
    found = data.load(name, "train", root=root)
    return found if images is None or images >= len(found.labels) else data.take(found, images, seed=0)


def _told(model: Trained) -> dict[str, Any]:
    return {"model": str(model.path), "sha256": model.sha256, "validation": model.card["validation"]}


def _say_model(model: Trained, where: Path) -> None:
    score = model.card["validation"]
    tail = f"   validation accuracy {score['k'] / score['n']:.1%} of {score['n']}" if score else ""
    print(f"model    {where}{tail}")
