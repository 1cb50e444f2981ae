"""The other verbs: thin functions that turn flags into calls and results into lines; `--json` prints one JSON line."""

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.markdown import Markdown

from sparsetrail import __version__, data
from sparsetrail.cli.attacks import run_line, say_report
from sparsetrail.cli.flags import (
    KEPT,
    Device,
    Fresh,
    Json,
    Kept,
    Threads,
    device_named,
    emit,
    output_folder,
    refuse_file,
)
from sparsetrail.cli.screen import Screen
from sparsetrail.core import Report
from sparsetrail.models import load_model
from sparsetrail.recipes import measure, paper
from sparsetrail.recipes import quick as quick_recipe
from sparsetrail.report import console as print_table
from sparsetrail.report import load as load_report
from sparsetrail.report import unpack, write
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
    with Screen() as screen, output_folder(out, fresh):
        bench = measure.Bench(out=out, device=where, seed=seed, tick=screen.tick, stop=screen.stop)
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
    say_report(report, files["html"])


def _brief(report: Report) -> dict[str, Any]:
    return {
        "title": report.title,
        "runs": [run_line(r) for r in report.runs],
        "trails": [{"victim": t.victim, "mode": t.mode, "n": t.n, "operations": len(t.rows)} for t in report.trails],
        "seconds": report.provenance.get("seconds of this command"),
    }


def reproduce(
    figure: Literal["table1", "table2", "table3", "fig1", "fig3", "threats", "theorems"],
    *,
    scale: Annotated[Literal["smoke", "small", "paper"] | None, Parameter(help="how much; default small")] = None,
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
    weight_decay: Annotated[
        float, Parameter(help="of the ResNets; the published code has 1e-3, which its text does not mention")
    ] = 0.0,
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
        given = {
            "--scale": scale, "--rows": rows, "--datasets": datasets, "--n": n, "--models": models,
            "--seeds": None if seeds == 1 else seeds, "--weight-decay": weight_decay or None, "--out": out,
            "--fresh": common.fresh or None,
        }  # fmt: skip
        if asked := ", ".join(flag for flag, value in given.items() if value is not None):
            raise ValueError(f"--from-records: runs nothing and shows all that is kept; leave {asked} out")
        _show_records(figure, records, common.as_json)
        return
    scale = scale or "small"
    if figure == "theorems" and not (n is None and models is None and seeds == 1 and not weight_decay):
        raise ValueError("--n, --models, --seeds, --weight-decay: `theorems` takes none of them; leave them out")
    if models is not None and not models.is_dir():
        raise ValueError(f"--models: expected a folder of trained networks, found none at {models}")
    where = common.where()
    place = out or Path("runs") / f"paper-{scale}"
    if figure == "theorems":
        from sparsetrail.cli import theory

        with common.folder(place):
            return theory.reproduce(
                place, scale, rows=rows or (), datasets=datasets or (), root=common.root, device=where,
                as_json=common.as_json,
            )  # fmt: skip
    with Screen(quiet=common.as_json) as screen, common.folder(place):
        bench = measure.Bench(out=place, device=where, tick=screen.tick, stop=screen.stop)
        report = paper.reproduce(
            bench, figure, scale, rows=rows or (), datasets=datasets or (), root=common.root,
            n=n, models=models, seeds=seeds, weight_decay=weight_decay,
            command=" ".join(
                [f"sparsetrail reproduce {figure} --scale {scale}", *(f"--rows {r}" for r in rows or ()),
                 *(f"--datasets {d}" for d in datasets or ()), *([] if n is None else [f"--n {n}"]),
                 *([] if models is None else [f"--models {models}"]), *([] if seeds == 1 else [f"--seeds {seeds}"]),
                 *([f"--weight-decay {weight_decay:g}"] if weight_decay else [])]
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
            told = [line for line in path.read_text().splitlines() if not line.startswith("![")]  # pictures beside it
            if console.is_terminal:
                console.print(Markdown("\n".join(told)))
            else:  # a file or a pipe has no width to fit
                print("\n".join(told))
            console.print(f"whole, with pictures  {path}", markup=False, highlight=False, soft_wrap=True)
            continue
        held = read(path)
        print_table(held, console)
        for line in held.summary:
            console.print(line, markup=False, highlight=False)
        for name, clean in _clean(held).items():
            console.print(f"clean test accuracy  {name}: {clean}", markup=False, highlight=False, soft_wrap=True)
        day = path.parent.name[:10]  # folders begin with their date
        later = [p for p in found or twins if p.parent.name[:10] > day and p.suffix == ".json"]
        for name, again in _anew(held, [(p, read(p)) for p in later]):
            console.print(f"measured anew  {name}: {again}", markup=False, highlight=False, soft_wrap=True)
        command = held.provenance.get("command", "not told")
        console.print(f"measured by  {command}", markup=False, highlight=False, soft_wrap=True)


def _anew(held: Report, later: Sequence[tuple[Path, Report]]) -> list[tuple[str, Path]]:
    """The victims of a record that later ones of the same title hold too, and the last of these."""
    mine, found = dict.fromkeys(run.victim for run in held.runs), {}
    for path, other in later:
        if other.title == held.title:
            found |= {run.victim: path.parent for run in other.runs if run.victim in mine}
    return list(found.items())


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
    out: Annotated[Path | None, Parameter(help="a folder; default where the report lies")] = None,
    format: Literal["all", "table", "latex", "svg", "pdf"] = "all",
) -> None:
    """Draw the report in PATH (a folder or result.json) again; `table`, `latex` print, `svg`, `pdf` draw every chart.

    Charts are files of their own beside the report: trail, accuracy, steps, battery, radius, whatever it has.
    PATH may be a folder of `theory` too, of which all is drawn.
    """
    from sparsetrail.report import figures, text_tables

    if format in ("table", "latex") and out is not None:
        raise ValueError(f"--out: {format} is printed, not written; leave it out, or send the output to a file")
    if out is not None:
        refuse_file(out)
    place = out or (path if path.is_dir() else path.parent)
    theorems = path / "theorems.json" if path.is_dir() else path
    if theorems.name == "theorems.json" and theorems.is_file() and not (path / "result.json").is_file():
        from sparsetrail.report.theorems import Page
        from sparsetrail.report.theorems import write as write_theorems

        if format != "all":
            raise ValueError(f"--format {format}: expected all for theorems, whose charts it draws too; leave it out")
        page = unpack(Page, json.loads(theorems.read_bytes()))
        print(f"report   {write_theorems(page, place)['html']}")
        return
    found = load_report(path)
    if format == "table":
        print(text_tables(found, "github"))
    elif format == "latex":
        print(text_tables(found, "latex_booktabs"))
    elif format in ("svg", "pdf"):
        for drawn in figures(found, place, format):
            print(f"figure   {drawn}")
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
        load_model(weights)  # refused here, not in the middle of a script
    given = {
        "only": only,
        "threads": threads,
        "runs": runs,
        "weights": weights,
        "device": device_named(device, threads),
        "out": out,
    }
    command = [sys.executable, str(script), *(["--smoke"] if smoke else [])]
    with contextlib.nullcontext() if out is None else output_folder(out):
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
