"""The paper's tables and figures (Luu 2025, arXiv:2509.23762), run again, with every threat in a column of its own.

The text states a pixel perturbation of 8/255; the code perturbs the encoded spikes by 6/255 in train mode. Both are
run, and the code's space once more in eval mode; the published figure stands beside them, never in their column. The
systems the paper compares with were published under pixel threats, and are attacked and audited under those. `threats`
asks what is left of a network of table 3 under every threat, weak attacks and audits.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsetrail.core import Audit, Claim, Linf, Report, Run, Trail
from sparsetrail.data import Dataset, load
from sparsetrail.models import Trained, load_model
from sparsetrail.recipes import audits
from sparsetrail.recipes.measure import (
    Bench,
    card,
    clean,
    fit_all,
    follow,
    provenance,
    strike,
    strike_as_published,
)
from sparsetrail.recipes.notes import caveats, left_standing, published, summary, told_apart
from sparsetrail.recipes.rows import PAIRS, Row, job, row_of, rows_of
from sparsetrail.recipes.scales import ROWS, SCALES, Scale, SystemScale, part
from sparsetrail.recipes.systems import SYSTEMS, facts, train_system
from sparsetrail.recipes.targets import ours, target_at
from sparsetrail.report import claims
from sparsetrail.training import TrainSpec

FIGURES = ("table1", "table2", "table3", "fig1", "fig3", "threats")
TWINS = {"table1": "table2", "table2": "table1"}  # of the same models, but for the data set at `paper` scale
TEXT = Linf(8 / 255, space="pixel")
CODE = Linf(6 / 255, space="encoded")
THREATS = (TEXT, CODE, Linf(8 / 255, space="encoded"))
HIRE = Linf(0.031, space="pixel")  # HIRE-SNN's own radius, 7.905/255: images of 256 grey levels differ by 7


def reproduce(
    bench: Bench,
    figure: str,
    scale: str = "small",
    *,
    rows: Sequence[str] = (),
    datasets: Sequence[str] = (),
    root: Path | None = None,
    command: str = "",
    n: int | None = None,
    models: Path | None = None,
    seeds: int = 1,
    weight_decay: float = 0.0,
) -> Report:
    """Train what the figure needs, attack or trace it, and lay it beside the published values.

    `n` test images are attacked and audited instead of the scale's; `models` is a folder with trained networks, one
    a folder named after architecture and pool (sew_resnet18-max), that are taken instead of training: by default all of
    the figure that are there, on the scale's first image set. `seeds` networks are trained of each ResNet, with the
    paper's seed and those that follow it; compared systems once. `weight_decay` is that of the ResNets: the published
    code has 1e-3, which the text does not mention.
    """
    size = _size(figure, scale, rows, n)
    if seeds < 1 or (seeds > 1 and models is not None):
        raise ValueError(f"seeds: expected at least 1, and 1 of trained `models`, got {seeds}")
    if weight_decay and models is not None:
        raise ValueError(f"weight_decay: expected none beside trained `models`, got {weight_decay:g}; leave one out")
    started = time.monotonic()
    found = claims("table3") + claims("table2") if figure in PAIRS else claims(figure)
    chosen = _chosen(figure, found, scale, size, rows, datasets, models, seeds)
    if weight_decay and all(row.system for row in chosen):
        raise ValueError("weight_decay: expected a ResNet among the rows, found compared systems alone")
    chosen = [row if row.system else replace(row, decay=weight_decay) for row in chosen]
    sets = {row.dataset: [load(row.dataset, s, root=root) for s in ("train", "test")] for row in chosen}
    own = [row for row in chosen if not row.system]
    if models is None:
        nets = dict(zip(own, fit_all(bench, [job(row, size, sets[row.dataset][0]) for row in own]), strict=True))
    else:
        nets = {row: _kept(models, row) for row in own}
    cards: list[dict[str, Any]] = []
    runs: list[Run] = []
    trails: list[Trail] = []
    judged: list[Audit] = []
    for row in chosen:
        train_set, test_set = sets[row.dataset]
        model = _system(bench, row, size.systems, train_set) if row.system else nets[row]
        scored = part(test_set, size.scored)
        told = card(model, row.name, clean(bench, model, row.name, scored), scored)
        cards.append(told | (facts(row.arch) if row.system else {}) | row.told)
        if row.system:
            struck, verdicts = _judge(bench, row, model, size.systems, test_set)
            runs += struck
            judged += [replace(a, victim=row.name) for a in verdicts]
        elif figure == "threats":
            others = [m for r, m in nets.items() if r != row and (r.dataset, r.seed) == (row.dataset, row.seed)]
            struck, verdicts = _under_all(bench, row, model, size, test_set, others)
            runs += struck
            judged += verdicts
        elif figure.startswith("table"):
            runs += _struck(bench, row, model, part(test_set, size.attacked))
        else:
            what, traced = ours(model, row.name, device=bench.device), part(test_set, size.traced)
            trails += [follow(bench, what, traced, per_step=True), follow(bench, what, traced, mode="train")]
    shown = _shown(figure, found, chosen)
    return Report(
        title=f"{figure.replace('fig', 'Figure ').replace('table', 'Table ').replace('threats', 'Threats')} at {scale} "
        "scale",
        summary=(
            *published(shown),
            *summary(runs, trails, cards),
            *told_apart(chosen, judged),
            *left_standing(chosen, judged),
        ),
        models=tuple(cards),
        runs=tuple(runs),
        trails=tuple(trails),
        claims=shown,
        provenance=provenance(bench, started, command or f"sparsetrail reproduce {figure} --scale {scale}"),
        notes=caveats(figure, found, chosen, size, models is not None),
        audits=tuple(judged),
    )


def beside(report: Report, figure: str) -> Report:
    """The same models beside the published figures of another table; tables 1 and 2 differ in nothing else here."""
    held = {(name.split(", ")[0], name.split(", ")[-1]) for name in (m["name"] for m in report.models)}  # what, of what
    shown = tuple(
        c for c in claims(figure) if held & {tuple(Row(row_of(c), "max", of).name.split(", ")) for _, of in held}
    )
    return replace(
        report,
        title=report.title.replace(report.title.split(" at ")[0], figure.replace("table", "Table ")),
        claims=shown,
        summary=(*published(shown), *(line for line in report.summary if not line.startswith("Published "))),
    )


def _size(figure: str, scale: str, rows: Sequence[str], n: int | None) -> Scale:
    """How much is run, `n` images where that is told; ValueError for names that nothing has."""
    if figure not in FIGURES:
        raise ValueError(f"reproduce: expected one of {', '.join(FIGURES)}, got {figure!r}")
    if scale not in SCALES:
        raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    unknown = [r for r in rows if r not in ROWS]
    if unknown:
        raise ValueError(f"rows: expected some of {', '.join(ROWS)}, got {', '.join(unknown)}")
    size = SCALES[scale]
    if n is None:
        return size
    if n < 1:
        raise ValueError(f"n: expected at least 1 image, got {n}")
    systems = replace(size.systems, audited=n, audited_random=n)
    return replace(size, attacked=n, traced=min(n, size.traced), systems=systems)


def _chosen(
    figure: str,
    found: Sequence[Claim],
    scale: str,
    size: Scale,
    rows: Sequence[str],
    datasets: Sequence[str],
    models: Path | None,
    seeds: int,
) -> list[Row]:
    """The rows to run, each of several seeds where these are asked for; ValueError where none is left."""
    sets = tuple(datasets) or (("cifar100",) if figure == "table1" and scale == "paper" else size.datasets)
    if len(datasets) > 1 and figure.startswith("fig"):
        raise ValueError(f"datasets: {figure} is one trail, on one image set; got {', '.join(datasets)}; name one")
    if models is not None and not datasets:
        sets = sets[:1]
    chosen = rows_of(figure, found, tuple(rows) or size.rows, sets, rows)
    if models is not None and not rows:  # those that are there
        chosen = [row for row in chosen if (models / f"{row.arch}-{row.pool}").is_dir()]
    if not chosen:
        raise ValueError(f"{figure}: no row left for rows {', '.join(rows) or size.rows} on {', '.join(sets)}")
    if seeds == 1:
        return chosen
    first = TrainSpec().seed
    several = [replace(row, seed=first + i) for i in range(seeds) for row in chosen if not row.system]
    if not several:
        raise ValueError("seeds: expected a ResNet among the rows, found compared systems alone")
    return [*several, *(row for row in chosen if row.system)]


def _struck(bench: Bench, row: Row, model: Trained, attacked: Dataset) -> list[Run]:
    """A network of tables 1 to 3 by the text's threat, the code's in eval mode, and as the code has it."""
    what = ours(model, row.name, device=bench.device)
    return [
        strike(bench, what, "noise", TEXT, attacked),
        strike(bench, what, "fgsm", TEXT, attacked),
        strike(bench, what, "pgd", TEXT, attacked),
        strike(bench, what, "fgsm", CODE, attacked),
        strike(bench, what, "pgd", CODE, attacked),
        *strike_as_published(bench, model, row.name, attacked),
    ]


def _system(bench: Bench, row: Row, size: SystemScale, train_set: Dataset) -> Trained:
    s = SYSTEMS[row.arch]
    return train_system(
        bench, row.arch, part(train_set, size.images), width=size.width,
        steps=size.poisson_steps if s.signed_poisson else size.steps, epochs=size.epochs, batch=size.batch,
        twin=size.twins.get(row.arch), twin_epochs=size.twin_epochs if s.twin else None,
        calibrate=size.calibrate if s.twin else None, knobs=size.knobs.get(row.arch),
    )  # fmt: skip


def _judge(
    bench: Bench, row: Row, model: Trained, size: SystemScale, test_set: Dataset
) -> tuple[list[Run], tuple[Audit, ...]]:
    """A compared system under the pixel threats of its publication: the weak attacks printed there, and an audit."""
    attacked = part(test_set, size.audited_random if model.encode.random else size.audited)
    what = ours(model, row.name, device=bench.device)
    runs = [strike(bench, what, a, TEXT, attacked) for a in ("noise", "fgsm", "pgd")]
    if SYSTEMS[row.arch].called == "hire_snn":
        runs += [strike(bench, what, a, HIRE, attacked) for a in ("fgsm", "pgd")]
    place = replace(bench, out=bench.out / "audits" / row.folder)
    kept = target_at(str(model.path), device=bench.device)
    found, _ = audits.run(place, replace(kept, name=row.folder), [TEXT], attacked, budget=size.budget)
    return runs, found.audits


def _under_all(
    bench: Bench, row: Row, model: Trained, size: Scale, test_set: Dataset, others: Sequence[Trained]
) -> tuple[list[Run], list[Audit]]:
    """A network under each of THREATS by weak attacks, as published, and audited under the text's and the code's.

    Audits also transfer from the other networks.
    """
    attacked, audited = part(test_set, size.attacked), part(test_set, size.systems.audited)
    what = ours(model, row.name, device=bench.device)
    runs = [strike(bench, what, a, t, attacked) for t in THREATS for a in ("noise", "fgsm", "pgd")]
    runs += strike_as_published(bench, model, row.name, attacked)
    place = replace(bench, out=bench.out / "audits" / row.folder)
    kept, *guides = (target_at(str(m.path), device=bench.device) for m in (model, *others))
    named = replace(kept, name=row.folder)
    found, _ = audits.run(place, named, [TEXT, CODE], audited, budget=size.systems.budget, guides=guides)
    return runs, [replace(a, victim=row.name) for a in found.audits]


def _kept(folder: Path, row: Row) -> Trained:
    """A trained network of a row from a folder of them."""
    name = f"{row.arch}-{row.pool}"
    model = load_model(folder / name)
    net, held = model.card["net"], model.card["data"]["name"]
    if (net["arch"], net["pool"], held) != (row.arch, row.pool, row.dataset):
        raise ValueError(
            f"{folder / name}: expected {row.arch} with {row.pool} pool trained on {row.dataset}, found {net['arch']} "
            f"with {net['pool']} pool trained on {held}"
        )
    return model


def _shown(figure: str, found: Sequence[Claim], chosen: Sequence[Row]) -> tuple[Claim, ...]:
    """The published figures of the rows that are run: on their data sets, or on whatever set they were published."""
    if figure.startswith("fig"):
        return tuple(found)
    sets = {row.dataset for row in chosen}
    here = [c for c in found if row_of(c) in {row.arch for row in chosen}]
    same = [c for c in here if c.dataset.lower().replace("-", "") in sets]
    return tuple(same or here)
