"""The look of all charts, one for page and paper, and the lines below each that say what it rests on.

Colours differ in lightness as well as in hue, and shapes repeat them, so that print and colour-blind eyes lose nothing.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from sparsetrail.core import Audit, Report, Run, Trail
from sparsetrail.report.audits import where

SERIF = "'Iowan Old Style', 'Palatino Linotype', Palatino, 'URW Palladio L', P052, 'Liberation Serif', Georgia, serif"
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
LIGHT = {
    "ink": "#22262b", "soft": "#6b7178", "line": "#c9cdd2", "ground": "#ffffff",
    "good": "#2a7550", "warn": "#8f5b00", "bad": "#b3261e", "left": "#cfd8e3",
}  # fmt: skip
DARK = {
    "ink": "#e6e4df", "soft": "#a3a6aa", "line": "#4a4f55", "ground": "#16181b",
    "good": "#7cc9a0", "warn": "#e9b44c", "bad": "#f2857c", "left": "#3d4a59",
}  # fmt: skip
SERIES = {
    "light": ["#1d4e89", "#e58a1f", "#5aa89a", "#9b3f6c", "#7f7f7f", "#b5a642", "#3f6b35", "#b59bd6"],
    "dark": ["#82b4f0", "#f0a24a", "#7fd0c0", "#e191b5", "#b0b0b0", "#d8ca6a", "#93c47d", "#b9a4e0"],
}
Spec = dict[str, Any]


def config(theme: Literal["light", "dark"] = "light") -> Spec:
    """The look: serif, no grid, thin axes; the same for page and paper but for the colours of a dark page."""
    c = LIGHT if theme == "light" else DARK
    return {
        "font": SERIF,
        "background": c["ground"],
        "view": {"stroke": None},
        "axis": {
            "grid": False,
            "domainColor": c["soft"],
            "tickColor": c["soft"],
            "labelColor": c["ink"],
            "titleColor": c["ink"],
            "titleFontWeight": "normal",
            "titleFontSize": 13,
            "labelFontSize": 12,
        },
        "legend": {
            "labelColor": c["ink"],
            "titleColor": c["ink"],
            "labelFontSize": 13,
            "labelLimit": 340,
            "titleFontWeight": "normal",
        },
        "title": {
            "color": c["ink"],
            "subtitleColor": c["soft"],
            "fontWeight": "normal",
            "fontSize": 14,
            "subtitleFontSize": 12,
            "anchor": "start",
        },
        "range": {"category": SERIES[theme], "symbol": SHAPES},
        "style": {
            "stage": {"color": c["line"]},
            "stage-name": {"color": c["soft"], "fill": c["soft"], "fontSize": 11.5},
            "halo": {"color": c["ground"], "stroke": c["ground"], "strokeWidth": 4, "fontSize": 11},
            **{f"audit-{name}": {"color": c[name]} for name in ("ink", "good", "warn", "bad", "left")},
            "audit-none": {"color": c["soft"]},
            "audit-quiet": {"color": c["soft"]},
            "audit-word": {"color": c["ink"], "fill": c["ink"], "fontSize": 12},
            "audit-soft": {"color": c["soft"], "fill": c["soft"], "fontSize": 11},
        },
    }


def stamped(spec: Spec, report: Report, of: Sequence[Run | Trail | Audit]) -> Spec:
    """A chart with what it rests on below it: images and their number, seed, threat and mode, versions."""
    return {"vconcat": [spec], "title": {"text": stamp(report, of), "orient": "bottom", "fontSize": 11.5, "offset": 14}}


def stamp(report: Report, of: Sequence[Run | Trail | Audit]) -> list[str]:
    """The lines below a chart: data and n, threats or that there are none, seed and versions."""
    sizes = dict.fromkeys(f"{one.data}{'' if f'n={one.n}' in one.data else f', n={one.n}'}" for one in of)
    threats = dict.fromkeys(
        f"gradient of the cross-entropy at the images themselves (no threat), {one.mode}-mode BatchNorm"
        if isinstance(one, Trail)
        else f"{one.threat}, crafted in {(where(one) if isinstance(one, Audit) else one).mode} mode"
        for one in of
    )
    known = report.provenance
    seeds = dict.fromkeys(
        [f"seed {one.seed}" for one in of if isinstance(one, Run)] or [f"seed {known.get('seed', 0)}"]
    )
    trained = sorted({s for card in report.models for s in re.findall(r"seed (\d+)", str(card.get("training", "")))})
    seeds |= {f"training seed {', '.join(trained)}": None} if trained else {}
    versions = [f"{name} {known[name]}" for name in ("sparsetrail", "torch") if name in known]
    return ["; ".join(sizes), "; ".join(threats), "; ".join([*seeds, *versions])]


def finite(x: float) -> float | None:
    """The number, or None where it has no place in JSON."""
    return x if math.isfinite(x) else None


def plain(chart: Any) -> Spec:
    """The chart as plain data, without altair's own look and without a link to the schema."""
    spec: Spec = chart.to_dict(validate=True)
    for key in ("$schema", "config"):
        spec.pop(key, None)
    return spec
