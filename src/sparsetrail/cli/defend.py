"""The verb `defend`: one of the compared systems, trained as its source trains it."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sparsetrail import data
from sparsetrail.attacks import settings
from sparsetrail.cli.flags import KEPT, Kept, chosen, emit
from sparsetrail.cli.screen import Screen
from sparsetrail.defend import DEFENCES
from sparsetrail.recipes import measure
from sparsetrail.recipes.systems import SYSTEMS, facts, plan, train_system


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
    train_set = data.load(data_name, "train", root=common.root)
    if images is not None and images < len(train_set.labels):
        train_set = data.take(train_set, images, seed=0)
    how = {
        "width": width, "steps": steps, "epochs": epochs, "twin_epochs": twin_epochs, "calibrate": calibrate,
        "batch": batch, "weight_decay": weight_decay, "cutout": cutout,
        "validation": validation, "seed": seed, "knobs": knobs,
    }  # fmt: skip
    plan(name, train_set, **how)  # refused before anything is written
    with Screen(quiet=common.as_json) as screen:
        common.folder(out / "models" / f"{train_set.name}-{name}")
        bench = measure.Bench(out=out, device=where, tick=screen.tick, stop=screen.stop)
        model = train_system(bench, name, train_set, **how)
    told = facts(name) | {"defence settings": measure.told(model.card.get("defence", {}).get("knobs", {})) or "none"}
    if common.as_json:
        emit({"model": str(model.path), "sha256": model.sha256, "validation": model.card["validation"]} | told)
        return
    score = model.card["validation"]
    print(
        f"model    {model.path.parent}"
        + (f"   validation accuracy {score['k'] / score['n']:.1%} of {score['n']}" if score else "")
    )
    for key in ("defence settings", "open in its source", "still apart from its published figure"):
        print(f"{key}: {told[key]}")
