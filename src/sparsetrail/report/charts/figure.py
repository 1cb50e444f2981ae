"""Charts of a report as files."""

import json
from pathlib import Path
from typing import Literal

from sparsetrail._files import write_atomic
from sparsetrail.core import Audit, Report
from sparsetrail.report.ablation_tables import ablations
from sparsetrail.report.audits import of_loss, of_radius
from sparsetrail.report.charts.ablation import ablation_spec
from sparsetrail.report.charts.accuracy import accuracy_spec
from sparsetrail.report.charts.audit import battery_spec, eps_spec, fall_spec, loss_spec
from sparsetrail.report.charts.look import Spec, config, stamped
from sparsetrail.report.charts.tradeoff import tradeoff_spec
from sparsetrail.report.charts.trail import examples_spec, steps_spec, trail_spec
from sparsetrail.report.design_tables import tradeoff
from sparsetrail.report.io import ReportError
from sparsetrail.report.seeds import seeded
from sparsetrail.report.trail_tables import TrailGroup, trail_groups

Which = Literal[
    "trail", "accuracy", "steps", "examples", "ablation", "tradeoff", "fall", "battery", "loss", "radius"
]  # fmt: skip
NEEDS = {
    "trail": "a trail",
    "accuracy": "a run",
    "steps": "a trail with per-step shares",
    "examples": "a trail with per-example shares",
    "ablation": "trails of which a part was replaced",
    "tradeoff": "a sweep of designs",
    "fall": "an audit",
    "battery": "an audit with its battery",
    "loss": "an audit that kept losses by step",
    "radius": "an audit over several radii",
}
AUDITS = {"fall": fall_spec, "battery": battery_spec, "loss": loss_spec, "radius": eps_spec}
WORDS = {"loss": of_loss, "radius": of_radius}  # what is drawn of the images the checks look at, not of all
KINDS = (".svg", ".pdf", ".png", ".json")


def figure(report: Report, path: str | Path, *, which: Which = "trail") -> Path:
    """One chart as vector or raster graphics: .svg, .pdf, .png, or .json for the Vega-Lite specification itself.

    `trail` and `steps` with trails of several modes, data or architectures, and audits under several threats, give one
    picture with a panel each.
    """
    path = Path(path)
    if path.suffix not in KINDS:
        raise ReportError(
            f"expected a path ending in {', '.join(KINDS)}, found {path.name!r}; likely fix: name the file trail.pdf"
        )
    if which not in NEEDS:
        raise ReportError(f"which: expected one of {', '.join(NEEDS)}, found {which!r}; likely fix: choose one")
    specs = _panels(report, which)
    if not specs:
        raise ReportError(f"expected a report with {NEEDS[which]}, found none; likely fix: measure it, then draw it")
    return _draw(specs, path)


def figures(report: Report, folder: str | Path, kind: str) -> list[Path]:
    """Every chart that a report has, each as a file in `folder` named after it; `kind` is svg, pdf, png or json."""
    if f".{kind}" not in KINDS:
        raise ReportError(f"kind: expected one of svg, pdf, png, json, found {kind!r}; likely fix: choose one")
    found = [(which, specs) for which in NEEDS if (specs := _panels(report, which))]
    if not found:
        raise ReportError("expected a report with trails, runs or audits to draw, found none; measure something first")
    return [_draw(specs, Path(folder) / f"{which}.{kind}") for which, specs in found]


def _draw(specs: list[Spec], path: Path) -> Path:
    spec = {**(specs[0] if len(specs) == 1 else {"vconcat": specs, "spacing": 40}), "config": config()}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        return write_atomic(path, json.dumps(spec, indent=1).encode())
    import vl_convert

    if path.suffix == ".svg":
        return write_atomic(path, vl_convert.vegalite_to_svg(spec).encode())
    if path.suffix == ".pdf":
        return write_atomic(path, vl_convert.vegalite_to_pdf(spec))
    return write_atomic(path, vl_convert.vegalite_to_png(spec, scale=3))


def _panels(report: Report, which: str) -> list[Spec]:
    """The panels of one chart, empty where the report has nothing for it."""
    if which in AUDITS:
        drawn = [(a, AUDITS[which](a)) for a in report.audits if which != "battery" or a.runs]
        return [
            stamped({**spec, "title": _audit_title(which, a)}, report, [a]) for a, spec in drawn if spec is not None
        ]
    if which == "accuracy":
        if not report.runs:
            return []
        return [stamped(accuracy_spec(report.runs, seeded(report.models)), report, report.runs)]
    if which == "ablation":
        return [
            stamped({**ablation_spec(a), "title": a.victim}, report, [t for t in report.trails if t.victim == a.victim])
            for a in ablations(report.trails)
        ]
    if which == "tradeoff":
        points = tradeoff(report)
        return [stamped(tradeoff_spec(points), report, report.runs)] if points else []
    groups = trail_groups(report.trails)
    if which == "trail":
        drawn = [trail_spec(g, title=_title(g, len(groups))) for g in groups]
    else:
        drawn = [(steps_spec if which == "steps" else examples_spec)(g) for g in groups]
    return [stamped(spec, report, g.trails) for spec, g in zip(drawn, groups, strict=True) if spec]


def _audit_title(which: str, a: Audit) -> Spec:
    return {"text": f"{a.victim}: {a.verdict}"} | ({"subtitle": WORDS[which](a)} if which in WORDS else {})


def _title(group: TrailGroup, groups: int) -> str:
    """What a panel is told by: its network where there is one alone, and what sets it apart from other panels."""
    names = {t.victim for t in group.trails}
    return ": ".join([*(names if len(names) == 1 else ()), *([group.title] if groups > 1 else ())])
