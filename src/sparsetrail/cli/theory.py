"""The verbs of the theory: `demo` needs nothing, `audit` puts the theorems to one victim."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from sparsetrail.cli.flags import (
    KEPT,
    Fresh,
    Json,
    Kept,
    Number,
    Space,
    Threads,
    device_named,
    emit,
    images_for,
    output_folder,
)
from sparsetrail.cli.screen import Screen
from sparsetrail.core import Linf, as_fraction
from sparsetrail.data import pixels
from sparsetrail.recipes import audits, theorems
from sparsetrail.recipes.demo import demo as run_demo
from sparsetrail.recipes.measure import Bench, identity, provenance
from sparsetrail.recipes.targets import fits, home, target_at
from sparsetrail.recipes.theory import audit as run_audit
from sparsetrail.report.theorems import Page, write


def demo(
    *, out: Path = Path("runs/theory"), seed: int = 0, threads: Threads = None, fresh: Fresh = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Put the paper's theorems to closed forms, counterexamples and two small networks; no model and no data needed.

    Writes theorems.html, theorems.md and theorems.json into --out. About half a minute on one core.
    """
    device_named("cpu", threads)
    started = time.monotonic()
    bench = Bench(out=out, seed=seed)
    with output_folder(out, fresh):
        with Screen(quiet=as_json) as screen:

            def say(part: str, done: int, total: int) -> None:
                if screen.stop():
                    raise KeyboardInterrupt
                screen.tick("demo", done, total, part)

            found = run_demo(seed=seed, say=say)
        told = provenance(bench, started, f"sparsetrail theory demo --seed {seed}")
        _finish(theorems.demo_page(found, told), out, as_json)


def audit(
    target: str,
    *,
    eps: Annotated[Number | None, Parameter(help="L-infinity radius, e.g. 8/255")] = None,
    space: Space | None = None,
    data_name: Annotated[str | None, Parameter(name="--data", help="default: the set the model was trained on")] = None,
    n: int = 64,
    draws: Annotated[int, Parameter(help="random points an image and radius")] = 64,
    out: Path | None = None,
    batch: int = 8,
    seed: int = 0,
    common: Kept = KEPT,
) -> None:
    """What the paper's theorems say about TARGET and what it does: hypotheses, measurements, a verdict for each.

    TARGET is a run folder, a model.safetensors, or file.py:function that returns a sparsetrail Victim. Writes
    theorems.html, theorems.md and theorems.json into --out (default: a folder in theory/ beside the model, named by
    threat and n).
    """
    where = common.where()
    if eps is None or space is None:
        raise ValueError(
            "theory audit: expected --eps and --space, e.g. --eps 8/255 --space pixel; they have no default"
        )
    threat = Linf(eps, space=space)
    what = target_at(target, device=where)
    test_set = images_for(what.model, data_name, n, common.root)
    if out is None:
        out = home(target, what) / "theory" / f"{audits.short(threat)}_n{len(test_set.labels)}"
    started = time.monotonic()
    with Screen(quiet=common.as_json) as screen, common.folder(out):
        bench = Bench(out=out, device=where, seed=seed, batch=batch, tick=screen.tick, stop=screen.stop)
        victim, x = what.make(), pixels(test_set.images.to(where))
        fits(victim, x, test_set)
        found = run_audit(
            victim, x, test_set.labels.to(where), threat,
            data=identity(test_set), identity=what.identity, draws=draws, seed=seed, batch=batch, stop=screen.stop,
            say=lambda part, done, total: screen.tick(part, done, total, ""),
        )  # fmt: skip
    radius = as_fraction(eps) if "/" in as_fraction(eps) else repr(eps)
    command = f"sparsetrail theory audit {target} --eps {radius} --space {space} --n {n} --draws {draws}"
    command += f" --seed {seed}" + ("" if data_name is None else f" --data {data_name}")
    _finish(theorems.audit_page(found, provenance(bench, started, command)), out, common.as_json)


def reproduce(
    place: Path, scale: str, *, rows: Sequence[str], datasets: Sequence[str], root: Path | None, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """`reproduce theorems`: the demo and three trained networks as one page in `place`/theorems."""
    if rows:
        raise ValueError("--rows: the theorems are put to SEW-ResNet18; leave it out")
    if len(datasets) > 1:
        raise ValueError(f"--datasets: expected one image set for the theorems, got {', '.join(datasets)}")
    with Screen(quiet=as_json) as screen:
        bench = Bench(out=place, device=device, tick=screen.tick, stop=screen.stop)
        page = theorems.theorems(bench, scale, data=datasets[0] if datasets else None, root=root)
    _finish(page, place / "theorems", as_json)


def _finish(page: Page, out: Path, as_json: bool) -> None:
    files = write(page, out)
    results = [(s.name, r) for s in page.statements for r in s.results]
    if as_json:
        emit({
            "title": page.title,
            "verdicts": [{"statement": s, "case": r.of, "verdict": r.verdict, "why": r.why} for s, r in results],
            "files": {k: str(v) for k, v in files.items()},
        })  # fmt: skip
        return
    console = Console()
    for line in page.summary[1:]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, r in results:
        console.print(f"{name:<12} {r.verdict:<25} {r.of}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nreport   {files['html']}", markup=False, highlight=False, soft_wrap=True)
