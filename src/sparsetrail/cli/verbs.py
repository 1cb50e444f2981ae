"""The verbs: thin functions that turn flags into calls and results into lines; `--json` prints one JSON line."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from rich.console import Console

from sparsetrail import __version__, data
from sparsetrail.attacks import ATTACKS, check_settings, settings
from sparsetrail.attacks.pgd import PACE
from sparsetrail.auditing import refuse
from sparsetrail.cli.flags import (
    COMMON,
    KEPT,
    Common,
    Device,
    Fresh,
    Json,
    Kept,
    Norm,
    Number,
    Space,
    Threads,
    chosen,
    device_named,
    emit,
    images_for,
    model_at,
    output_folder,
)
from sparsetrail.cli.screen import Screen
from sparsetrail.core import Audit, Report, Route, Run, Threat, as_fraction
from sparsetrail.recipes import audits, measure, paper
from sparsetrail.recipes import quick as quick_recipe
from sparsetrail.report import console as print_table
from sparsetrail.report import load as load_report
from sparsetrail.report import write
from sparsetrail.snn import kernels
from sparsetrail.snn.engine import has_bf16


def quick(
    *,
    out: Path = Path("runs/quick"),
    images: int = 6000,
    epochs: int = 2,
    attacked: int = 200,
    seed: int = 0,
    device: Device = "auto",
    threads: Threads = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train two small SEW-ResNets (max and average pool) on shipped Fashion-MNIST images, attack and trace both.

    Writes report.html, report.md, result.json and the models into --out. About a minute and a half on two CPU cores; no
    network and no GPU needed. The same command continues or, when finished, shows the result again.
    """
    where = device_named(device, threads)
    with Screen() as screen:
        bench = measure.Bench(
            out=output_folder(out, fresh), device=where, seed=seed, tick=screen.tick, stop=screen.stop
        )
        spec = quick_recipe.QuickSpec(images=images, epochs=epochs, attacked=attacked)
        report, examples = quick_recipe.quick(bench, spec)
        screen.tick("report", 0, 1, "")
        files = write(report, out, images=examples)
        screen.tick("report", 1, 1, "")
    _finish(report, files, as_json)


def _finish(report: Report, files: dict[str, Path], as_json: bool) -> None:
    if as_json:
        emit(_brief(report) | {"files": {k: str(v) for k, v in files.items()}})
        return
    console = Console()
    console.print()
    print_table(report, console)
    for line in report.summary:
        console.print(line, markup=False, highlight=False)
    page = next((p for p in files.values() if p.suffix == ".html"), None)
    console.print(f"\nreport   {page}", markup=False, highlight=False, soft_wrap=True)


def _brief(report: Report) -> dict[str, Any]:
    return {
        "title": report.title,
        "runs": [_run_line(r) for r in report.runs],
        "trails": [{"victim": t.victim, "mode": t.mode, "n": t.n, "operations": len(t.rows)} for t in report.trails],
        "seconds": report.provenance.get("seconds of this command"),
    }


def _run_line(run: Run) -> dict[str, Any]:
    lo, hi = run.accuracy.interval()
    return {
        "victim": run.victim, "attack": run.attack, "knobs": _knobs(run), "space": run.threat.space,
        "norm": run.threat.norm, "eps": run.threat.eps, "mode": run.mode, "route": _route(run), "data": run.data,
        "n": run.n, "clean_acc": run.clean_accuracy.value, "robust_acc": run.accuracy.value, "interval95": [lo, hi],
        "ties": run.ties, "zero_gradient": run.zero_gradient, "dead_examples": run.dead_examples,
        "nonfinite": run.nonfinite, "forwards": run.forwards, "backwards": run.backwards, "seed": run.seed,
        "seconds": round(run.seconds, 2), "note": run.note, "eot": run.eot, "votes": run.votes,
    }  # fmt: skip


def _route(run: Run) -> str:
    """The gradient route; the codebook step follows the gradient of the code and asks the encoder for none."""
    exact = "encoder: its codebook, exact"
    return re.sub(r"encoder: \w+", exact, run.route) if run.attack == "codebook" else run.route


def _knobs(run: Run) -> dict[str, Any]:
    """The settings of a run, with the length of a step that the attack took by itself where none was given."""
    eps = run.threat.eps
    by_itself = {
        "pgd": 0.01 if run.threat.norm == "linf" else PACE * eps,
        "bim": eps / run.knobs.get("steps", 1),
        "mifgsm": eps / run.knobs.get("steps", 1),
    }
    taken = run.attack in by_itself and run.knobs.get("step", 0) is None
    return run.knobs | ({"step": by_itself[run.attack]} if taken else {})


def attack(
    target: str,
    *,
    name: Annotated[str, Parameter(help=f"one of {', '.join(ATTACKS)}")] = "pgd",
    eps: Number | None = None,
    space: Space | None = None,
    norm: Norm = "linf",
    compat: Annotated[
        Literal["authors"] | None, Parameter(help="the paper's code: encoded 6/255, crafted in train mode")
    ] = None,
    steps: int | None = None,
    step: Number | None = None,
    restarts: int | None = None,
    draws: int | None = None,
    sets: Annotated[
        list[str] | None, Parameter(name="--set", negative="", help="another setting of the attack, e.g. loss=margin")
    ] = None,
    route: Annotated[
        list[str] | None,
        Parameter(negative="", help="another backward of the neurons, e.g. triangle:1, hart, assg; several: the mean"),
    ] = None,
    transfer: Annotated[str | None, Parameter(help="follow the gradient of this model instead")] = None,
    eot: Annotated[int | None, Parameter(help="gradients averaged a step; default 10 for a random encoder")] = None,
    encoder_gradient: Annotated[str | None, Parameter(help="identity, weighted, secant or none")] = None,
    precision: Annotated[
        Literal["fp32", "bf16"], Parameter(help="bf16 crafts with faster input gradients; judged in fp32 either way")
    ] = "fp32",
    data_name: Annotated[str | None, Parameter(name="--data", help="default: the set the model was trained on")] = None,
    n: int | None = 1000,
    batch: int | None = None,
    seed: int | None = None,
    common: Common = COMMON,
) -> None:
    """Attack TARGET (a run folder or model.safetensors) on test images; eval mode, best point kept, judged afresh.

    --eps and --space have no default: say what the adversary may do, e.g. --eps 8/255 --space pixel, or with --name sda
    --norm l0 the number of entries of a binary code that may be flipped. Results are kept beside the model and not
    computed twice.
    """
    where = common.where()
    given = {"steps": steps, "step": step, "restarts": restarts, "draws": draws}
    knobs = {k: v for k, v in given.items() if v is not None} | chosen(
        name, settings(ATTACKS[name]) if name in ATTACKS else {}, sets or []
    )
    threat = _threat(name, eps, space, norm, knobs) if compat is None else None
    asked = (eps, space, encoder_gradient, batch, seed, route, transfer, sets)
    if compat is not None and (knobs or precision != "fp32" or eot is not None or any(a is not None for a in asked)):
        raise ValueError(
            "--compat authors: threat and settings are fixed (encoded space, 6/255, 7 steps of 0.01, batches of "
            "16, seed 3407, fp32); leave --eps, --space, --route, --transfer, --eot, --batch, --seed, --precision and "
            "the attack's settings out"
        )
    model, folder = model_at(target)
    test_set = images_for(model, data_name, n, common.root)
    label = folder.resolve().name
    with Screen(quiet=common.as_json) as screen:
        bench = measure.Bench(
            out=output_folder(folder / "attacks"),
            device=where,
            seed=seed or 0,
            batch=64 if batch is None else batch,
            tick=screen.tick,
            stop=screen.stop,
        )
        if threat is None:
            runs = list(measure.strike_as_published(bench, model, label, test_set))
        else:
            run = measure.strike(
                bench, model, label, name, threat, test_set,
                backward=encoder_gradient, precision=precision, eot=eot,
                route=tuple(Route(neuron=None if r == "own" else r) for r in route or ()),
                guide=None if transfer is None else model_at(transfer)[0], **knobs,
            )  # fmt: skip
            runs = [run]
    for run in runs:
        if common.as_json:
            emit(_run_line(run))
        else:
            _say_run(run)


def _threat(name: str, eps: float | None, space: Space | None, norm: Norm, knobs: dict[str, Any]) -> Threat:
    if eps is None or space is None:
        raise ValueError("attack: expected --eps and --space, e.g. --eps 8/255 --space pixel; they have no default")
    if name not in ATTACKS:
        raise ValueError(f"--name: expected one of {', '.join(ATTACKS)}, got {name!r}")
    allowed = settings(ATTACKS[name])
    for k in knobs:
        if k not in allowed:
            own = ("steps", "step", "restarts", "draws")
            flags = ", ".join(f"--{a}" if a in own else f"--set {a}=" for a in allowed)
            raise ValueError(f"--{k}: {name} does not have it; expected {flags or 'no settings'}")
    check_settings(name, knobs)
    return Threat(eps, space=space, norm=norm)


def audit(
    target: str,
    *,
    eps: Annotated[
        list[Number] | None, Parameter(negative="", help="radius, e.g. 8/255 (l0: entries); one for every --space")
    ] = None,
    space: Annotated[
        list[Space] | None, Parameter(negative="", help="pixel or encoded; repeat both flags for more threats")
    ] = None,
    norm: Norm = "linf",
    data_name: Annotated[str | None, Parameter(name="--data", help="default: the set the model was trained on")] = None,
    n: int | None = 1000,
    budget: Annotated[
        Literal["quick", "standard", "thorough"], Parameter(help="how much is tried: a look, the rule, everything")
    ] = "standard",
    minutes: Annotated[float | None, Parameter(help="begin no further attack after this long")] = None,
    claim: Annotated[float | None, Parameter(help="the robust accuracy that is claimed, 0..1")] = None,
    claim_source: str = "",
    transfer: Annotated[
        list[str] | None, Parameter(negative="", help="another model to transfer from: another seed, pool, an ANN")
    ] = None,
    control: Annotated[str | None, Parameter(help="an undefended model that must fall to the quick attacks")] = None,
    eot: Annotated[int | None, Parameter(help="gradients averaged a step; default 10 for a random encoder")] = None,
    precision: Annotated[
        Literal["fp32", "bf16"], Parameter(help="bf16 crafts with faster input gradients; judged in fp32 either way")
    ] = "fp32",
    verify: Annotated[
        bool, Parameter(negative="", help="attack nothing: show the kept adversarials to the model again, one by one")
    ] = False,
    batch: int = 64,
    seed: int = 0,
    out: Path | None = None,
    common: Kept = KEPT,
) -> None:
    """Judge the robustness of TARGET: checks, a battery of attacks, the worst case per image, a verdict with reasons.

    TARGET is a run folder, a model.safetensors, or file.py:function that returns a sparsetrail Victim (any PyTorch SNN;
    the file is run, so let it be yours). --eps and --space have no default. Writes a page, the machine-readable card
    and the adversarials into --out (default: a folder in audit/ beside the model, named by threats and n); the same
    command continues.
    """
    where = common.where()
    if not eps or not space:
        raise ValueError("audit: expected --eps and --space, e.g. --eps 8/255 --space pixel; they have no default")
    if len(eps) != len(space):
        raise ValueError(f"expected one --eps for every --space, got {len(eps)} and {len(space)}")
    threats = [Threat(e, space=s, norm=norm) for e, s in zip(eps, space, strict=True)]
    refuse(threats, claim=claim, batch=batch, eot=eot, minutes=minutes, budget=budget)
    what = audits.target(target, device=where, precision=precision)
    if what.model is None and data_name is None:
        raise ValueError("--data: expected the image set to audit a foreign victim on, e.g. --data cifar10")
    test_set = images_for(what.model, data_name, n, common.root)
    place = audits.home(target, what) / "audit"
    if verify:
        _verify(target, what, threats, test_set, place, out, common.as_json, device=where, batch=batch, seed=seed)
        return
    if what.model is None:
        what.make()  # refused before a folder is made
    if out is None:
        out = place / "_".join([*map(audits.short, threats), f"n{len(test_set.labels)}"])
    with Screen(quiet=common.as_json) as screen:
        bench = measure.Bench(
            out=common.folder(out), device=where, seed=seed, batch=batch, tick=screen.tick, stop=screen.stop
        )
        report, examples = audits.run(
            bench, what, threats, test_set, budget=budget, claim=claim, claim_source=claim_source, eot=eot,
            minutes=minutes, guides=[audits.target(t, device=where) for t in transfer or ()],
            control=None if control is None else audits.target(control, device=where),
            command=" ".join(
                [f"sparsetrail audit {target}", *(f"--eps {as_fraction(t.eps)} --space {t.space}" for t in threats),
                 f"--norm {norm} --data {test_set.name} --n {len(test_set.labels)} --budget {budget} --seed {seed}",
                 f"--precision {precision}", *([] if claim is None else [f"--claim {claim:g}"]),
                 *([] if eot is None else [f"--eot {eot}"]),
                 *(f"--transfer {t}" for t in transfer or ()), *([] if control is None else [f"--control {control}"])]
            ),
        )  # fmt: skip
        files = write(report, out, images=examples)
    if common.as_json:
        emit({"audits": [_audit_line(a) for a in report.audits], "files": {k: str(v) for k, v in files.items()}})
        return
    console = Console()
    console.print()
    print_table(report, console)
    for line in report.summary:
        console.print(line, markup=False, highlight=False)
    console.print(f"\nreport   {files['html']}", markup=False, highlight=False, soft_wrap=True)


def _verify(
    target: str, what: audits.Target, threats: list[Threat], test_set: data.Dataset, place: Path, out: Path | None,
    as_json: bool, **more: Any,
) -> None:  # fmt: skip
    """Show kept adversarials to the model once more; ValueError where some do not hold."""
    lines: list[dict[str, Any]] = []
    for threat in threats:
        folder = out or audits.kept_under(place, threat, len(test_set.labels))
        shown, bad = audits.verify_again(measure.Bench(out=folder, **more), what, threat, test_set)
        held = shown - len(bad)
        lines.append({"threat": str(threat), "held": held, "n": shown, "bad": bad, "folder": str(folder)})
        if not as_json:
            print(f"{threat}: {held} of {shown} adversarials hold, shown alone to the model loaded anew")
            for j, why in sorted(bad.items())[:10]:
                print(f"  image {j}: {why}")
    if as_json:
        emit({"verified": lines})
    if wrong := sum(len(line["bad"]) for line in lines):
        raise ValueError(f"{target}: {wrong} adversarials do not hold; see above")


def _audit_line(a: Audit) -> dict[str, Any]:
    return {
        "victim": a.victim, "space": a.threat.space, "norm": a.threat.norm, "eps": a.threat.eps, "n": a.n,
        "verdict": a.verdict, "reason": a.reason, "claim": a.claim, "clean_acc": a.clean_accuracy.value,
        "default_attack": a.default_attack, "default_acc": a.default_accuracy.value, "worst_acc": a.accuracy.value,
        "interval95": list(a.accuracy.interval()), "complete": a.complete, "budget": a.budget,
        "alarms": [{"id": f.id, "name": f.name, "level": f.level, "evidence": f.evidence} for f in a.alarms],
        "seconds": round(a.seconds, 1),
    }  # fmt: skip


def _say_run(run: Run) -> None:
    print(f"threat   {run.threat}, crafted in {run.mode} mode")
    print(f"route    {_route(run)}")
    print(f"data     {run.data}")
    print(f"clean    {run.clean_accuracy}")
    told = {k: v for k, v in _knobs(run).items() if v is not None} | ({"eot": run.eot} if run.eot > 1 else {})
    knobs = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in told.items())
    print(f"{run.attack:<8} {run.accuracy}" + (f"   ({knobs})" if knobs else ""))
    if run.zero_gradient is not None:
        print(f"gradient {run.zero_gradient:.1%} exact zeros; {run.dead_examples} images once without any gradient")
    notes = (
        f"{run.ties} ties, counted as not fooled" if run.ties else "",
        f"{run.nonfinite} images with a gradient that is not finite" if run.nonfinite else "",
        run.note,
    )
    for line in filter(None, notes):
        print(f"note     {line}")


def reproduce(
    figure: Literal["table1", "table2", "table3", "fig1", "fig3", "threats", "theorems"],
    *,
    scale: Literal["smoke", "small", "paper"] = "small",
    rows: Annotated[
        list[str] | None,
        Parameter(negative="", help="networks or systems, e.g. sew_resnet18, rat_vgg11; repeat it for more"),
    ] = None,
    datasets: Annotated[
        list[str] | None, Parameter(negative="", help="image sets; default by figure and scale")
    ] = None,
    n: Annotated[int | None, Parameter(help="test images attacked and audited; default by scale")] = None,
    models: Annotated[
        Path | None, Parameter(help="a folder of trained networks to take instead of training, e.g. sew_resnet18-max/")
    ] = None,
    seeds: Annotated[int, Parameter(help="networks trained of each ResNet, from the paper's seed on")] = 1,
    from_records: Annotated[
        bool, Parameter(negative="", help="show what was measured and is kept in --records; runs nothing")
    ] = False,
    records: Annotated[Path, Parameter(help="where records are kept")] = Path("records"),
    out: Path | None = None,
    common: Kept = KEPT,
) -> None:
    """Run a table or figure of the paper on real CIFAR: ours beside the published value, each threat in its own column.

    `threats` puts SEW-ResNet18 with both pools under every threat, by weak attacks and by the audit; `theorems` is the
    page of the paper's theorems: statement, hypotheses, what was measured, verdict.
    Resumes cell by cell; the figures of one --out share their models. `smoke` proves that it runs (minutes), `small`
    trains SEW-ResNet18 in half an hour on one core and the compared systems of tables 1 and 2 in a quarter of an hour
    each, `paper` is the published scale (a GPU and days). --rows takes one at a time.
    """
    if from_records:
        _show_records(figure, records, common.as_json)
        return
    if figure == "theorems" and not (n is None and models is None and seeds == 1):
        raise ValueError("--n, --models, --seeds: `theorems` takes none of them; leave them out")
    if models is not None and not models.is_dir():
        raise ValueError(f"--models: expected a folder of trained networks, found none at {models}")
    where = common.where()
    place = common.folder(out or Path("runs") / f"paper-{scale}")
    if figure == "theorems":
        from sparsetrail.cli import theory

        return theory.reproduce(
            place,
            scale,
            rows=rows or (),
            datasets=datasets or (),
            root=common.root,
            device=where,
            as_json=common.as_json,
        )
    with Screen(quiet=common.as_json) as screen:
        bench = measure.Bench(out=place, device=where, tick=screen.tick, stop=screen.stop)
        report = paper.reproduce(
            bench, figure, scale, rows=rows or (), datasets=datasets or (), root=common.root,
            n=n, models=models, seeds=seeds,
            command=" ".join(
                [f"sparsetrail reproduce {figure} --scale {scale}", *(f"--rows {r}" for r in rows or ()),
                 *(f"--datasets {d}" for d in datasets or ()), *([] if n is None else [f"--n {n}"]),
                 *([] if models is None else [f"--models {models}"]), *([] if seeds == 1 else [f"--seeds {seeds}"])]
            ),
        )  # fmt: skip
        files = write(report, place / figure)
    _finish(report, files, common.as_json)


def _show_records(figure: str, folder: Path, as_json: bool) -> None:
    """What records hold of a figure: accuracies or shares with n and interval, and the command that measured them.

    The clean accuracy of a table is that of the attacked images; the models' cards hold that of all images scored.
    Where none holds it, but one holds a table of the same models, that one is shown beside the figures asked for.
    """
    found, other = _records(figure, folder), paper.TWINS.get(figure, "")
    twins = [] if found or not other else _records(other, folder)
    if not (found or twins):
        held = sorted({p.stem for p in folder.glob("*/*.md")} & {*paper.FIGURES, "theorems"})
        raise ValueError(
            f"--from-records: expected {folder / '*' / figure}.json, found none"
            + (f"; there are records of {', '.join(held)}" if held else "; run in a clone, or give --records FOLDER")
        )

    def read(path: Path) -> Report:
        return paper.beside(load_report(path), figure) if twins else load_report(path)

    if as_json:
        told = {p: read(p) for p in found or twins if p.suffix == ".json"}
        emit({str(p): _brief(told[p]) | {"clean_test_accuracy": _clean(told[p])} if p in told else p.read_text()
              for p in found or twins})  # fmt: skip
        return
    console = Console()
    if twins:
        said = f"no record of {figure}; of the same models, those of {other}, with the figures of {figure}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    for path in found or twins:
        console.rule(str(path.parent))
        if path.suffix == ".md":
            console.print(path.read_text(), markup=False, highlight=False)
            continue
        held = read(path)
        print_table(held, console)
        for line in held.summary:
            console.print(line, markup=False, highlight=False)
        for name, clean in _clean(held).items():
            console.print(f"clean test accuracy  {name}: {clean}", markup=False, highlight=False, soft_wrap=True)
        command = held.provenance.get("command", "not told")
        console.print(f"measured by  {command}", markup=False, highlight=False, soft_wrap=True)


def _clean(held: Report) -> dict[str, str]:
    """The clean test accuracy in the card of every model, by its name."""
    return {c["name"]: c["clean test accuracy"] for c in held.models if {"name", "clean test accuracy"} <= c.keys()}


def _records(figure: str, folder: Path) -> list[Path]:
    """Where the records of a figure lie: reports, and pages where there is no report beside them."""
    found = sorted(p for p in folder.glob(f"*/{figure}.*") if p.suffix in (".json", ".md"))
    return [p for p in found if p.suffix == ".json" or p.with_suffix(".json") not in found]


def report(
    path: Path,
    *,
    out: Path | None = None,
    format: Literal["all", "table", "latex", "svg", "pdf"] = "all",
) -> None:
    """Draw the report in PATH (a folder or result.json) again; `table`, `latex` print, `svg`, `pdf` draw the trail."""
    from sparsetrail.report import figure as draw
    from sparsetrail.report import text_tables

    found = load_report(path)
    place = out or (path if path.is_dir() else path.parent)
    if format in ("table", "latex") and out is not None:
        raise ValueError(f"--out: {format} is printed, not written; leave it out, or send the output to a file")
    if format == "table":
        print(text_tables(found, "github"))
    elif format == "latex":
        print(text_tables(found, "latex_booktabs"))
    elif format in ("svg", "pdf"):
        print(f"figure   {draw(found, place / f'trail.{format}')}")
    else:
        print(f"report   {write(found, place)['html']}")


def bench(
    *,
    only: Annotated[
        str | None,
        Parameter(help="steps, robust_accuracy, battery, memory, ideal, scaling, hotspots, separated by commas"),
    ] = None,
    threads: Annotated[int, Parameter(help="CPU threads; one is measured in CPU time, more in wall time")] = 1,
    runs: Annotated[int | None, Parameter(help="rounds that alternate; default by script")] = None,
    weights: Annotated[Path | None, Parameter(help="a trained model; default an untrained one that fires")] = None,
    smoke: Annotated[bool, Parameter(negative="", help="a tiny size that proves that it runs")] = False,
    out: Annotated[Path | None, Parameter(help="folder of the CSVs; default bench/results")] = None,
    device: Device = "auto",
) -> None:
    """Measure training step, attack step, robust accuracy, memory, scaling and profile against SpikingJelly 2.0.0.

    Runs the scripts in bench/ of a clone one after the other; ours and the rival take turns in one process. Prints a
    Markdown table of medians, ratios and goals. Takes about ten minutes on one core.
    """
    script = Path(__file__).resolve().parents[3] / "bench" / "run.py"
    if not script.is_file():
        raise ValueError(f"bench: expected a clone with bench/ in it, found no {script}; clone it and pip install -e .")
    if any(importlib.util.find_spec(m) is None for m in ("spikingjelly", "loguru", "h5py")):
        raise ValueError(
            "bench: SpikingJelly 2.0.0 to compare with is not installed; pip install --no-deps -r tests/references.txt"
        )
    if runs is not None and runs < 1:
        raise ValueError(f"--runs: expected at least 1, got {runs}")
    if weights is not None:
        model_at(str(weights))
    given = {
        "only": only,
        "threads": threads,
        "runs": runs,
        "weights": weights,
        "device": device_named(device, threads),
    }
    if out is not None:
        given["out"] = output_folder(out)
    command = [sys.executable, str(script), *(["--smoke"] if smoke else [])]
    done = subprocess.run(command + [t for k, v in given.items() if v is not None for t in (f"--{k}", str(v))])
    if done.returncode:
        sys.exit(done.returncode)


def doctor(*, root: Path | None = None, as_json: Json = False) -> None:
    """What was found on this machine, and what will not work."""
    tools = {t: shutil.which(t) for t in ("npm", "chromium", "g++", "nvcc")}
    facts = {
        "sparsetrail": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else f"cpu ({os.cpu_count()} cores, no CUDA)",
        "threads": torch.get_num_threads(),
        "engine": _engine(),
        "data": [
            f"{e.name}/{e.split}: {e.n} images{'' if e.official else ' (not the official content)'}"
            for e in data.available(root)
        ],
        "data folder": str(data.cache_root(root)),
        "tools": {k: v or "not found" for k, v in tools.items()},
    }
    if as_json:
        emit(facts)
        return
    for k, v in facts.items():
        if isinstance(v, list):
            print(f"{k:<12} " + (f"\n{'':<12} ".join(v) if v else "none; `sparsetrail data get cifar10`"))
        elif isinstance(v, dict):
            print(f"{k:<12} " + ", ".join(f"{a}: {b}" for a, b in v.items()))
        else:
            print(f"{k:<12} {v}")


def _engine() -> str:
    """What runs networks on the CPU, in words."""
    found = kernels.compilers()
    if not kernels.available():
        why = "switched off or not compiled" if found else "no C compiler found"
        return f"plain PyTorch, several times slower ({why})"
    half = "bf16 input gradients" if has_bf16() else "no bf16 on this CPU"
    return f"kernels compiled by {' '.join(found[0])}, kept in {kernels.folders()[0]}, {half}"


def data_get(name: str, *, root: Path | None = None) -> None:
    """Download NAME (cifar10, cifar100, fashion-mnist), check it against the known content hash, keep it."""
    _say_import(data.get(name, root=root, progress=lambda line: print(line, file=sys.stderr)))


def data_add(
    path: Path,
    *,
    name: str | None = None,
    split: Annotated[
        Literal["train", "test"] | None,
        Parameter(help="of an npz with images and labels; default by its name, or test"),
    ] = None,
    root: Path | None = None,
) -> None:
    """Take in PATH: official python or binary files, PNG sheets, npz, IDX, or an image folder; checked before kept."""
    _say_import(data.add(path, name=name, split=split, root=root))


def _say_import(found: Any) -> None:
    for e in found.entries:
        tag = "official content" if e.official else "not the official content"
        print(f"{e.name}/{e.split}: {e.n} images {e.shape}, sha256 {e.sha256[:12]} ({tag})")
    for line in found.warnings:
        print(f"note: {line}")


def data_verify(*names: str, root: Path | None = None) -> None:
    """Read every set in the cache, or those of these NAMES, and compare it with its recorded content hash."""
    held = {e.name for e in data.available(root)}
    if unknown := sorted(set(names) - held):
        known = ", ".join(sorted(held)) or "no set, the cache is empty"
        raise ValueError(f"{', '.join(unknown)}: expected some of {known}")
    bad = 0
    for e in (e for name in names or (None,) for e in data.verify(root, name=name)):
        print(f"{e.name}/{e.split}: {e.problem or 'ok'}")
        bad += bool(e.problem)
    if bad:
        raise ValueError(f"{bad} damaged; see above")


def data_list(*, root: Path | None = None) -> None:
    """Name, split, size and identity of every set at hand."""
    for e in data.available(root):
        tag = "official" if e.official else "unofficial"
        print(f"{e.name:<22}{e.split:<7}{e.n:>7}  {'x'.join(map(str, e.shape)):<10} {e.sha256[:12]}  {tag}  {e.path}")
