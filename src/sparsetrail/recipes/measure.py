"""The steps that experiments are made of, each kept on disk as soon as it is done: a repeated command continues.

A cell is one measured thing; its key is everything that decides the result: weights, data, attack, settings, threat,
route, seed.
"""

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrail import __version__
from sparsetrail.attacks import ATTACKS, attack, authors, settings
from sparsetrail.attacks.pgd import own_step
from sparsetrail.attacks.run import samples
from sparsetrail.core import Linf, Mode, Rate, Route, Run, Threat, Trail, Victim, as_fraction
from sparsetrail.data import Dataset, pixels
from sparsetrail.models import Trained
from sparsetrail.recipes.cells import Cells, version
from sparsetrail.recipes.targets import Target, afresh
from sparsetrail.report import pack, unpack
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.net import NetSpec, describe
from sparsetrail.trails import Detail, trail
from sparsetrail.training import Seams, TrainingStopped, TrainSpec, accuracy, train

AT_ONCE = 4  # models trained side by side on one GPU

Job = tuple[str, NetSpec, Encoder, Dataset, TrainSpec]  # name, network, encoder, training set, how
Tick = Callable[[str, int, int, str], None]  # task, done, total, note


def _silent(task: str, done: int, total: int, note: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where an experiment works: its folder, device, seed, and how it reports and is stopped."""

    out: Path
    device: str = "cpu"
    seed: int = 0
    batch: int = 64
    tick: Tick = _silent
    stop: Callable[[], bool] = lambda: False
    kept: set[str] = field(default_factory=set)  # the versions that made the cells taken from before

    @property
    def cells(self) -> Cells:
        """What is done already."""
        return Cells(self.out / "cells", self.kept)

    @property
    def others(self) -> dict[str, str]:
        """The other versions, for a report, that made what was taken from before; nothing where there is none."""
        others = sorted(self.kept - {version()})
        return {"kept from before, made by": ", ".join(others)} if others else {}


def fit(
    bench: Bench,
    name: str,
    net: NetSpec,
    encode: Encoder,
    data: Dataset,
    spec: TrainSpec,
    *,
    seams: Seams | None = None,
    start: Trained | None = None,
) -> Trained:
    """Train a model into `out/models/name`, or take the finished one from there."""
    folder = bench.out / "models" / name

    def say(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            bench.tick(f"train {name}", event["step"], event["of"], f"loss {event['loss']:.3f}")
        elif event["event"] == "resumed" and "differs" in event:
            bench.tick(f"train {name}", -1, event["of"], f"continues, not to the bit: {event['differs']}")
        elif event["event"] == "epoch" and event["validation"] is not None:
            of = spec.epochs
            bench.tick(
                f"train {name}", -1, of, f"epoch {event['epoch'] + 1}/{of}: validation {event['validation']:.1%}"
            )

    return train(
        net, encode, data, spec, folder, seams=seams, start=start, device=bench.device, say=say, stop=bench.stop
    )


def fit_all(bench: Bench, jobs: Sequence[Job], *, side_by_side: bool | None = None) -> list[Trained]:
    """`fit` for several models; on a GPU side by side, each on a stream of its own, since one alone does not fill it.

    The models are those of training one after the other, as it is done before torch 2.10, whose cuBLAS workspaces are
    the first that are safe from threads (its pull request 167928). If one fails the others stop at their next step,
    resumable.
    """
    if side_by_side is None:
        side_by_side = bench.device.startswith("cuda") and torch.__version__ >= "2.10"  # as versions compare
    if not side_by_side or len(jobs) < 2:
        return [fit(bench, *job) for job in jobs]
    gpu, halt = bench.device.startswith("cuda"), threading.Event()
    if gpu and len(kinds := sorted({job[4].precision for job in jobs})) > 1:
        raise ValueError(f"precision: the switch is the process's; expected one for models side by side, got {kinds}")
    together = replace(bench, stop=lambda: halt.is_set() or bench.stop())

    def one(job: Job) -> Trained:
        try:
            with torch.cuda.stream(torch.cuda.Stream(bench.device)) if gpu else contextlib.nullcontext():
                return fit(together, *job)
        except BaseException:
            halt.set()
            raise

    with ThreadPoolExecutor(min(len(jobs), AT_ONCE)) as pool:
        futures = [pool.submit(one, job) for job in jobs]
    errors = [e for f in futures if (e := f.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, TrainingStopped)), errors[0])
    return [f.result() for f in futures]


def strike(
    bench: Bench,
    what: Target,
    attack_name: str,
    threat: Threat,
    data: Dataset,
    *,
    route: Sequence[Route] = (),
    guide: Target | None = None,
    eot: int | None = None,
    **knobs: Any,
) -> Run:
    """One attack on one target as a cell; pixel-space points are kept beside it."""
    knobs = settings(ATTACKS[attack_name]) | knobs
    v, x = what.make(), pixels(data.images.to(bench.device))
    fits_code(v.encode, threat)
    spec = _spec(bench, what.key(x), v.random, v.path(threat.space), v.mode, data, bench.seed) | {
        "attack": attack_name,
        "knobs": knobs,
        "threat": asdict(threat),
    }
    small = threat.norm == "linf" and threat.eps < 0.01 * threat.span
    if attack_name == "pgd" and knobs["step"] is None and small:  # cells of before took a step longer than the radius
        spec["step"] = own_step(threat, knobs["steps"])
    if threat.space == "pixel" and (threat.levels < 1 or threat.between_levels):
        spec["format"] = 3  # cells of before do not say how many grey levels a radius holds, or that it holds none
    if route:
        spec["routes"] = [str(r) for r in route]
    if guide is not None:
        spec["guide"] = guide.key(x)
    eot = samples(v) if eot is None else eot
    if eot != 1:
        spec["eot"] = eot
    done = bench.cells.get(spec, Run)
    task = f"{attack_name} {threat}: {what.name}"
    if done is not None:
        bench.tick(task, len(data.labels), len(data.labels), "kept from before")
        return replace(done, victim=v.name)
    run = attack(
        ATTACKS[attack_name],
        v,
        threat,
        x,
        data.labels.to(bench.device),
        batch=bench.batch,
        seed=bench.seed,
        keep=threat.space == "pixel",
        data=identity(data),
        route=route or None,
        guide=None if guide is None else guide.make(),
        eot=eot,
        say=lambda done, n: bench.tick(task, done, n, ""),
        stop=bench.stop,
        **knobs,
    )
    bench.cells.put(spec, run)
    return run


def fits_code(encode: Callable[[Tensor], Tensor], threat: Threat) -> None:
    """Refuse a threat in encoded space whose box is not that of a signed code of ours."""
    signed = isinstance(encode, Encoder) and encode.knobs.get("signed")
    if threat.space == "encoded" and signed and threat.box != (-1.0, 1.0):
        raise ValueError(
            f"space: expected the box -1..1 of the model's signed code, found {threat.box[0]:g}..{threat.box[1]:g}; "
            "attack it in pixel space, where it was published, or in Python give box=(-1, 1)"
        )


def strike_as_published(bench: Bench, model: Trained, name: str, data: Dataset, **knobs: Any) -> tuple[Run, Run]:
    """The paper's own evaluation (encoded space, crafted in train mode) as a pair of cells."""
    fits_code(model.encode, Linf(6 / 255, space="encoded"))
    route = describe(model.net)
    known = {k: v for k, v in settings(authors).items() if k in ("eps", "step", "steps", "batch", "seed")} | knobs
    spec = _spec(bench, model.sha256, model.encode.random, route, "train", data, known["seed"])
    spec |= {"attack": "authors", "knobs": known, "format": 3}  # older ones took the time of both for each
    task, n = f"authors' evaluation: {name}", len(data.labels)
    done = bench.cells.read(spec)
    if done is not None:
        bench.tick(task, n, n, "kept from before")
        fgsm, pgd = unpack(Run, done["fgsm"]), unpack(Run, done["pgd"])
        return replace(fgsm, victim=name), replace(pgd, victim=name)
    fgsm, pgd = authors(
        model.net.to(bench.device),
        model.encode,
        pixels(data.images.to(bench.device)),
        data.labels.to(bench.device),
        name=name,
        data=identity(data),
        route=route,
        say=lambda done, n: bench.tick(task, done, n, ""),
        stop=bench.stop,
        **knobs,
    )
    bench.cells.write(spec, {"fgsm": pack(fgsm), "pgd": pack(pgd)})
    return fgsm, pgd


def follow(
    bench: Bench,
    what: Target,
    data: Dataset,
    *,
    per_step: bool = False,
    per_example: bool = False,
    detail: Detail = "plain",
    mode: Mode = "eval",
    batch: int = 16,
    way: Victim | None = None,
    replaced: str = "",
) -> Trail:
    """The sparsity trail of a target as a cell, or of `way`, the same with a part of its backward `replaced`."""
    v, x = what.make() if way is None else way, pixels(data.images.to(bench.device))
    spec = _spec(bench, what.key(x), v.random, v.route, mode, data, 0) | {"trail": True, "per_step": per_step}
    for key, got, usual in (
        ("per_example", per_example, False),
        ("detail", detail, "plain"),
        ("images a batch", batch, 16),
        ("replaced", replaced, ""),
    ):
        if got != usual:  # older cells know none of these
            spec[key] = got
    task, n = f"trail ({replaced or f'{mode} mode'}): {what.name}", len(data.labels)
    done = bench.cells.get(spec, Trail)
    if done is not None:
        bench.tick(task, n, n, "kept from before")
        return replace(done, victim=v.name)
    found = trail(
        v,
        x,
        data.labels.to(bench.device),
        batch=batch,
        mode=mode,
        per_step=per_step,
        per_example=per_example,
        detail=detail,
        data=identity(data),
        say=lambda done, n: bench.tick(task, done, n, ""),
        stop=bench.stop,
    )
    found = replace(found, replaced=replaced)
    bench.cells.put(spec, found)
    return found


def clean(bench: Bench, model: Trained, name: str, data: Dataset) -> Rate:
    """Clean accuracy on a whole set as a cell."""
    spec = _spec(bench, model.sha256, model.encode.random, "", "eval", data, 0) | {"clean": True}
    done = bench.cells.read(spec)
    if done is None:
        rate = accuracy(model.net.to(bench.device), afresh(model.encode), data, device=bench.device)
        done = asdict(rate)
        bench.cells.write(spec, done)
    bench.tick(f"clean accuracy: {name}", len(data.labels), len(data.labels), "")
    return Rate(**done)


def card(model: Trained, name: str, test: Rate, data: Dataset) -> dict[str, Any]:
    """What a report says about a model."""
    net = model.card["net"]
    neuron, surrogate = net["neuron"], net["neuron"]["surrogate"]
    leak = "" if neuron["kind"] == "if" else f" tau {neuron['tau']:g}"
    reset = "soft" if neuron["reset"] is None else f"hard to {neuron['reset']:g}"
    return {
        "name": name,
        "arch": net["arch"],
        "pool": net["pool"],
        "width": net["width"],
        "stem": net["stem"],
        "steps": net["steps"],
        "parameters": sum(p.numel() for p in model.net.parameters()),
        "neuron": f"{neuron['kind'].upper()}{leak}, threshold {neuron['threshold']:g}, {reset} reset"
        f"{', detached' if neuron['detach_reset'] else ''}, {surrogate['name']}({surrogate['width']:g})",
        "encoder": model.card["encoder"]["name"],
        "encoder settings": ", ".join(f"{k} {v}" for k, v in model.card["encoder"]["knobs"].items()),
        **_history(model.card),
        "clean test accuracy": f"{test} ({identity(data)})",
        "weights sha256": model.sha256,
    }


def _history(card: dict[str, Any]) -> dict[str, Any]:
    if "imported" in card:
        return {
            "trained": f"elsewhere; imported from {card['imported']['file']}, sha256 {card['imported']['sha256'][:12]}"
        }
    if "converted" in card:
        how = card["converted"]
        return {
            "trained": f"converted from a network of ReLUs, sha256 {how['from'][:12]}; thresholds the percentile "
            f"{how['percentile']:g} of the currents, times {how['scale']:g}"
        }
    spec, source = card["train"], card["data"]
    defence = card.get("defence")
    began = {"began from": f"a converted network, sha256 {card['start']['sha256'][:12]}"} if "start" in card else {}
    return began | {
        **({} if defence is None else {"defence": defence["name"], "defence settings": told(defence["knobs"])}),
        "trained on": f"{source['name']} {source['split']}, {source['n']} images, content {source['sha256'][:12]}",
        "epochs": card["epochs_done"],
        "training": f"{spec['optimizer']} lr {spec['lr']:g}, batch {spec['batch']}, weights of epoch "
        f"{card['epochs_done']} of {spec['epochs']}, weight decay {spec['weight_decay']:g}, seed {spec['seed']}, "
        f"{spec['precision']}",
        "chosen by": card["chosen_by"],
    }


def told(knobs: dict[str, Any]) -> str:
    """Settings in words."""
    lengths = ("eps", "step")  # in input units, spoken of in 255ths
    said = {k: as_fraction(v) if k in lengths and v and isinstance(v, float) else v for k, v in knobs.items()}
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in said.items())


def provenance(bench: Bench, started: float, command: str) -> dict[str, Any]:
    """Versions, machine and time of a report; other versions too that made cells it took from before."""
    return {
        "command": command,
        "sparsetrail": version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": bench.device,
        "threads": torch.get_num_threads(),
        "seed": bench.seed,
        "date": time.strftime("%Y-%m-%d"),
        "seconds of this command": round(time.monotonic() - started, 1),
    } | bench.others


def identity(data: Dataset) -> str:
    """A data set in one phrase for results."""
    tag = "official" if data.official else "subset or unofficial"
    return f"{data.name} {data.split}, n={len(data.labels)}, content {data.sha256[:12]} ({tag})"


def _spec(bench: Bench, weights: str, random: bool, route: str, mode: str, data: Dataset, seed: int) -> dict[str, Any]:
    spec = {
        "weights": weights,
        "data": data.sha256,
        "route": route,
        "mode": mode,
        "seed": seed,
        "format": 2,
        "version": __version__,
    }
    # fresh draws a batch: it decides the result; 3: drawn by the call, not by what was drawn before
    return spec | {"batch": bench.batch, "format": 3} if random else spec
