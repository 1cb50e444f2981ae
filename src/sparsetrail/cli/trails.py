"""The verbs `trail` and `ablate`: the gradients of trained models operation by operation, and their zeros' origin."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sparsetrail import data
from sparsetrail.cli.flags import COMMON, Common, emit, images_for, output_folder
from sparsetrail.cli.screen import Screen, show
from sparsetrail.recipes import measure
from sparsetrail.recipes.ablation import ablate as run_ablation
from sparsetrail.recipes.ablation import trace
from sparsetrail.recipes.targets import Target, fits, home, target_at
from sparsetrail.report import figure, write
from sparsetrail.report.ablation_tables import ablations
from sparsetrail.report.tables import share

Models = Annotated[list[str], Parameter(help="run folders or model.safetensors, of one data set")]
Targets = Annotated[list[str], Parameter(help="run folders, model.safetensors or file.py:function, of one data set")]
IMAGES = 64
Named = Annotated[str | None, Parameter(name="--data", help="default: the set the model was trained on")]


def trail(
    targets: Targets,
    *,
    data_name: Named = None,
    n: int = IMAGES,
    detail: Annotated[
        Literal["plain", "origin", "full"],
        Parameter(help="zeros and norms; also where zeros come from; also weight gradients and float64"),
    ] = "full",
    per_step: Annotated[bool, Parameter(help="the zero share of every time step, as a chart and a CSV")] = False,
    per_example: Annotated[bool, Parameter(help="the zero share of every image, as a chart and a CSV")] = False,
    example: Annotated[
        int | None, Parameter(help="follow this one image of the test set (from 0) instead of n, step by step")
    ] = None,
    mode: Literal["eval", "train"] = "eval",
    batch: int = 16,
    out: Path | None = None,
    common: Common = COMMON,
) -> None:
    """The sparsity trail of TARGETS: exact zeros in, and L2 norm of, the gradient at the input of every operation.

    Several models of one architecture stand side by side in one picture; file.py:function returns a sparsetrail Victim
    with its module, any PyTorch network (the file is run, so let it be yours). Writes a page, CSVs, trail.svg and
    trail.pdf into --out (default: beside the first model trail/, with mode, detail, other models and n in its name
    where they are not the default). --mode train uses batch statistics, as the paper's code does; the models are left
    as they were. docs/trail.md says what every column means.
    """
    where = common.where()
    whats, test_set, first = _targets(targets, data_name, None if example is not None else n, common.root, batch, where)
    kind = "-".join(["trail", *(["train-mode"] if mode == "train" else []), *([detail] if detail != "full" else [])])
    name = _named(kind, whats, n, example is None)
    command = f"sparsetrail trail {' '.join(targets)} --n {n} --detail {detail} --mode {mode}"
    if example is not None:
        test_set, per_step = data.pick(test_set, example), True
        name, command = f"{name}-example-{example}", f"{command.replace(f'--n {n}', f'--example {example}')}"
    with Screen(quiet=common.as_json) as screen, output_folder(out or first / name) as place:
        bench = measure.Bench(out=place, device=where, tick=screen.tick, stop=screen.stop)
        report = trace(
            bench, whats, test_set, detail=detail, mode=mode, per_step=per_step, per_example=per_example, batch=batch,
            command=command,
        )  # fmt: skip
        files = write(report, place)
        drawn = [figure(report, place / f"trail.{kind}") for kind in ("svg", "pdf")]
    if common.as_json:
        for found in report.trails:
            emit(asdict(found))
        return
    for found in report.trails:
        print(found.victim)
        print(f"{'operation':<28}{'kind':<9}{'zeros %':>9}{'forced %':>10}{'created':>10}{'passed on':>10}{'norm':>12}")
        for r in found.rows:
            parts = f"{share(r.created):>10}{share(r.passed):>10}"
            print(f"{r.op:<28}{r.kind:<9}{100 * r.zero:>9.2f}{100 * r.forced:>10.2f}{parts}{r.norm:>12.3e}")
    for line in report.summary:
        print(line)
    print(f"figure   {', '.join(map(str, drawn))}")
    print(f"report   {files.get('html', place)}")


def ablate(
    targets: Models,
    *,
    data_name: Named = None,
    n: int = IMAGES,
    batch: int = 16,
    out: Path | None = None,
    common: Common = COMMON,
) -> None:
    """Where the zeros in the gradients of TARGETS come from: each part of the backward is replaced, zeros are counted.

    The scores stay the same to the bit and nothing is retrained. Writes a page, Markdown, CSVs, ablation.svg and
    ablation.pdf into --out (default: ablation/ beside the first model, named as `trail` names it). The same command
    continues.
    """
    where = common.where()
    if files := [text for text in targets if ".py" in Path(text).suffix]:
        raise ValueError(
            f"ablate: expected models of ours, whose parts it replaces, got the Python file {files[0]}; trail takes one"
        )
    whats, test_set, first = _targets(targets, data_name, n, common.root, batch, where)
    models = [(what.name, what.model) for what in whats if what.model is not None]
    place = out or first / _named("ablation", whats, n)
    with Screen(quiet=common.as_json) as screen, output_folder(place):
        bench = measure.Bench(out=place, device=where, tick=screen.tick, stop=screen.stop)
        report = run_ablation(
            bench, models, test_set, batch=batch, command=f"sparsetrail ablate {' '.join(targets)} --n {n}"
        )
        files = write(report, place)
        drawn = [figure(report, place / f"ablation.{kind}", which="ablation") for kind in ("svg", "pdf")]
    tables = ablations(report.trails)
    if common.as_json:
        emit({"ablations": [asdict(t) for t in tables], "files": {k: str(v) for k, v in files.items()}})
        return
    for table in tables:
        show(replace(table.grid, caption=table.victim))
        print(f"{table.sentence}\n")
    print(f"figure   {', '.join(map(str, drawn))}")
    print(f"report   {files.get('html', place)}")


def _named(name: str, whats: Sequence[Target], n: int, counted: bool = True) -> str:
    """The folder of a result: other targets and n, where they are not the default, are in its name."""
    others = [what.name.replace(":", "-") for what in whats[1:]]
    return "-".join([name, *(["with", *others] if others else []), *([f"n{n}"] if counted and n != IMAGES else [])])


def _targets(
    texts: Sequence[str], data_name: str | None, n: int | None, root: Path | None, batch: int, device: str
) -> tuple[list[Target], data.Dataset, Path]:
    """The targets, the images they share, and the folder of the first."""
    if not texts:
        raise ValueError("expected at least one model, got none; name a run folder")
    if batch < 1:
        raise ValueError(f"--batch: expected at least 1 image, got {batch}")
    found = [target_at(text, device=device) for text in texts]
    sets = [images_for(what.model, data_name, n, root) for what in found]
    if len({s.sha256 for s in sets}) > 1:
        names = ", ".join(dict.fromkeys(s.name for s in sets))
        raise ValueError(f"expected models of one data set, got {names}; name one with --data")
    labels = []
    for what in found:
        victim = None if what.model is not None else what.make()
        if victim is not None:
            fits(victim, data.pixels(sets[0].images[:2].to(device)), sets[0])
        labels.append(what.name if victim is None else victim.name)
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"expected models in folders of different names, and victims of different names, got {', '.join(labels)}; "
            "rename a folder, or give Victim(name=...)"
        )
    return found, sets[0], home(texts[0], found[0])
