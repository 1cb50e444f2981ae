"""One chart of a report as a file."""

import json
import typing
from pathlib import Path
from typing import Literal

from sparsetrail._files import write_atomic
from sparsetrail.core import Report
from sparsetrail.report.ablation_tables import ablations
from sparsetrail.report.charts.ablation import ablation_spec
from sparsetrail.report.charts.accuracy import accuracy_spec
from sparsetrail.report.charts.look import Spec, config, stamped
from sparsetrail.report.charts.tradeoff import tradeoff_spec
from sparsetrail.report.charts.trail import examples_spec, steps_spec, trail_spec
from sparsetrail.report.design_tables import tradeoff
from sparsetrail.report.io import ReportError
from sparsetrail.report.seeds import seeded
from sparsetrail.report.trail_tables import trail_groups

Which = Literal["trail", "accuracy", "steps", "examples", "ablation", "tradeoff"]


def figure(report: Report, path: str | Path, *, which: Which = "trail") -> Path:
    """One chart as vector or raster graphics: .svg, .pdf, .png, or .json for the Vega-Lite specification itself.

    `trail` and `steps` with trails of several modes, data or architectures give one picture with a panel each.
    """
    path = Path(path)
    kinds = (".svg", ".pdf", ".png", ".json")
    if path.suffix not in kinds:
        raise ReportError(
            f"expected a path ending in {', '.join(kinds)}, found {path.name!r}; likely fix: name the file trail.pdf"
        )
    spec = {**_which(report, which), "config": config()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        return write_atomic(path, json.dumps(spec, indent=1).encode())
    import vl_convert

    if path.suffix == ".svg":
        return write_atomic(path, vl_convert.vegalite_to_svg(spec).encode())
    if path.suffix == ".pdf":
        return write_atomic(path, vl_convert.vegalite_to_pdf(spec))
    return write_atomic(path, vl_convert.vegalite_to_png(spec, scale=3))


def _which(report: Report, which: str) -> Spec:
    groups = trail_groups(report.trails)
    if which == "accuracy":
        spec = accuracy_spec(report.runs, seeded(report.models))
        specs = [stamped(spec, report, report.runs)] if report.runs else []
    elif which == "ablation":
        specs = [
            stamped({**ablation_spec(a), "title": a.victim}, report, [t for t in report.trails if t.victim == a.victim])
            for a in ablations(report.trails)
        ]
    elif which == "tradeoff":
        points = tradeoff(report)
        specs = [stamped(tradeoff_spec(points), report, report.runs)] if points else []
    elif which in ("trail", "steps", "examples"):
        title = {g.title: g.title if len(groups) > 1 else "" for g in groups}
        drawn = [
            trail_spec(g, title=title[g.title])
            if which == "trail"
            else steps_spec(g)
            if which == "steps"
            else examples_spec(g)
            for g in groups
        ]
        specs = [stamped(spec, report, g.trails) for spec, g in zip(drawn, groups, strict=True) if spec]
    else:
        raise ReportError(
            f"which: expected one of {', '.join(typing.get_args(Which))}, found {which!r}; likely fix: choose one"
        )
    if not specs:
        need = {
            "trail": "a trail",
            "accuracy": "a run",
            "steps": "a trail with per-step shares",
            "examples": "a trail with per-example shares",
            "ablation": "trails of which a part was replaced",
            "tradeoff": "a sweep of designs",
        }[which]
        raise ReportError(f"expected a report with {need}, found none; likely fix: measure it, then draw it")
    return specs[0] if len(specs) == 1 else {"vconcat": specs, "spacing": 40}
