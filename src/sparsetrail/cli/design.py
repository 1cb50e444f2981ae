"""The verb `design`: a sweep of pools, surrogates, time steps and stems, and the trade-off that it draws."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sparsetrail.cli.flags import KEPT, Kept, Number, emit
from sparsetrail.cli.screen import Screen, show
from sparsetrail.core import as_fraction
from sparsetrail.recipes import measure
from sparsetrail.recipes.design import EPS, FACTORS, Factor, sweep
from sparsetrail.report import figure, write
from sparsetrail.report.design_tables import tradeoff, tradeoff_grid


def design(
    *,
    data_name: Annotated[str, Parameter(name="--data", help="cifar10, fashion-mnist-slice (shipped), ...")] = "cifar10",
    scale: Literal["smoke", "small", "paper"] = "small",
    only: Annotated[list[Factor] | None, Parameter(negative="", help="what is varied; default all four")] = None,
    eps: Annotated[
        list[Number] | None, Parameter(negative="", help="radii in pixel space; default 1/255, 2/255")
    ] = None,
    seeds: Annotated[int, Parameter(help="networks trained of each design")] = 1,
    out: Path | None = None,
    common: Kept = KEPT,
) -> None:
    """Clean accuracy against the worst case in pixel space, for pools, surrogate widths, time steps and the stem.

    Trains every design the same way, attacks it by several attacks of which every image keeps the worst, traces its
    gradients, and draws the trade-off with intervals on both axes and the gradient density as colour, into --out
    (default: runs/design-DATA-SCALE). The same command continues, whenever it was stopped.
    """
    where = common.where()
    place = out or Path("runs") / f"design-{Path(data_name).name}-{scale}"
    flags = [f"--data {data_name} --scale {scale} --seeds {seeds}", *(f"--only {f}" for f in only or ())]
    with Screen(quiet=common.as_json) as screen, common.folder(place):
        bench = measure.Bench(out=place, device=where, tick=screen.tick, stop=screen.stop)
        report = sweep(
            bench, data_name, scale, factors=only or FACTORS, eps=eps or EPS, seeds=seeds,
            root=common.root,
            command=f"sparsetrail design {' '.join(flags)} {' '.join(f'--eps {as_fraction(e)}' for e in eps or EPS)}",
        )  # fmt: skip
        files = write(report, place)
        drawn = [figure(report, place / f"tradeoff.{kind}", which="tradeoff") for kind in ("svg", "pdf")]
    points = tradeoff(report)
    if common.as_json:
        emit({"points": [asdict(p) for p in points], "files": {k: str(v) for k, v in files.items()}})
        return
    show(tradeoff_grid(points))
    for line in report.summary:
        print(line)
    print(f"figure   {', '.join(map(str, drawn))}")
    print(f"report   {files['html']}")
