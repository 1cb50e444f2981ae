"""The charts, one Vega-Lite specification each: interactive on the page, vector graphics in a paper.

Colours differ in lightness as well as in hue, and shapes repeat them, so that print and colour-blind eyes lose nothing.
"""

import json
import math
import re
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sparsetrail._files import write_atomic
from sparsetrail.core import Audit, Rate, Report, Run, Trail, TrailRow
from sparsetrail.report.ablation_tables import KINDS, Ablation, ablations
from sparsetrail.report.design_tables import Point, tradeoff, undominated
from sparsetrail.report.io import ReportError
from sparsetrail.report.labels import NO_GRADIENT, Setting, by_setting, columns, settings
from sparsetrail.report.seeds import seeded
from sparsetrail.report.tables import percent
from sparsetrail.report.trail_tables import TrailGroup, trail_groups

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
PANEL = (430, 340)  # of the trade-off, in pixels
WIDE, AXIS, ROW = 1120, 70, 520  # panels of accuracy in one line, what is beside one, one with a row per victim
Spec = dict[str, Any]
Which = Literal["trail", "accuracy", "steps", "examples", "ablation", "tradeoff"]


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


def trail_spec(group: TrailGroup, *, title: str = "") -> Spec:
    """Zero share (above) and L2 norm of the gradient (below) at the input of every operation, in forward order.

    The pale part of a bar is what geometry alone forces, the solid part is what the network adds. Where it is known
    where zeros come from, pale and solid are those that the operation creates, an outline those that it passes on.
    """
    import altair as alt

    many, ops, labels = len(group.labels), list(group.ops), list(group.labels)
    step = max(17, 7 * many + 4)
    bar = max(3.0, (step - 3) / many - 0.5)
    width = step * len(ops)

    bare = alt.Axis(labels=False, ticks=False, title=None)

    def x(axis: Any = bare, **kwargs: Any) -> Any:
        return alt.X("op:N", sort=ops, axis=axis, scale=alt.Scale(paddingInner=0.14, paddingOuter=0.1), **kwargs)

    below = alt.Axis(labelAngle=-90, labelFontSize=11, title=None, labelLimit=180, labelOverlap=False)
    legend = alt.Legend(title=None, orient="top", symbolType="square", symbolOpacity=1) if many > 1 else None
    series = alt.XOffset("victim:N", sort=labels, scale=alt.Scale(paddingInner=0.0))
    colour = alt.Color("victim:N", sort=labels, legend=legend)
    hints = [
        alt.Tooltip("op:N", title="operation"),
        alt.Tooltip("kind:N"),
        alt.Tooltip("victim:N"),
        alt.Tooltip("zero:Q", title="zero, %", format=".3f"),
        alt.Tooltip("forced:Q", title="forced by geometry, %", format=".3f"),
        *(
            alt.Tooltip(f"{name}:Q", title=f"{title}, %", format=".3f")
            for name, title in (("arrives", "zero where it arrives"), ("created", "created"), ("passed", "passed on"))
            if traced(group)
        ),
        alt.Tooltip("norm:Q", title="L2 norm", format=".3e"),
        alt.Tooltip("entries:Q", title="entries an image", format=","),
    ]
    base = alt.Chart(alt.Data(values=_trail_values(group)))
    stages = _stages(group)
    rule = alt.Chart(alt.Data(values=stages[1:])).mark_rule(style="stage", strokeDash=[2, 2])
    names = alt.Chart(alt.Data(values=stages)).mark_text(style="stage-name", align="left", baseline="bottom", dx=2)
    words = "pale: forced by geometry alone; solid: zeros beyond that"
    if traced(group):
        words = "pale: created, forced by geometry alone; solid: created beyond that; outline: passed on"
    key = alt.Chart(alt.Data(values=[{}])).mark_text(style="stage-name", align="right", baseline="bottom", text=words)

    zero = alt.Y("zero:Q", title="zero entries, %", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5))
    top = alt.Y("solid:Q", title="zero entries, %", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5))
    solid = base.mark_bar(size=bar).encode(x=x(), xOffset=series, y=top, y2="pale:Q", color=colour, tooltip=hints)
    outline = (
        base.transform_filter("datum.zero > datum.solid")
        .mark_bar(size=bar - 1, filled=False, strokeWidth=0.8)
        .encode(x=x(), xOffset=series, y=zero, y2="solid:Q", color=colour, tooltip=hints)
    )
    pale = (
        base.transform_filter("datum.pale > 0")
        .mark_bar(size=bar, opacity=0.38)
        .encode(x=x(), xOffset=series, y=alt.Y("pale:Q"), color=colour, tooltip=hints)
    )
    upper = alt.layer(
        rule.encode(x=x(bandPosition=0)),
        pale,
        solid,
        *([outline] if traced(group) else []),
        names.encode(x=x(bandPosition=0), y=alt.value(-3), text="stage:N"),
        *(
            [key.encode(x=alt.value(width), y=alt.value(-24))]
            if any(r.forced for t in group.trails for r in t.rows)
            else []
        ),
    ).properties(width=width, height=190)

    axis = alt.Axis(format=".0e", labelExpr="replace(datum.label, '+', '')", values=_decades(group))
    norm = alt.Y("norm:Q", title="L2 norm", scale=alt.Scale(type="log", nice=True), axis=axis)
    shape = alt.Shape("victim:N", sort=labels, legend=None)
    alive = base.transform_filter("isValid(datum.norm) && datum.norm > 0")  # a zero has no place on a log axis
    lower = alt.layer(
        rule.encode(x=x(below, bandPosition=0)),
        alive.mark_line(strokeWidth=1, opacity=0.5).encode(x=x(below), xOffset=series, y=norm, color=colour),
        alive.mark_point(size=26, filled=True, opacity=1).encode(
            x=x(below), xOffset=series, y=norm, color=colour, shape=shape, tooltip=hints
        ),
    ).properties(width=width, height=150)
    chart = alt.vconcat(upper, lower, spacing=12).resolve_scale(color="shared")
    return _spec(chart.properties(title=title) if title else chart)


def _decades(group: TrailGroup) -> list[float]:
    """Powers of ten that cover the norms, at most seven."""
    norms = [r.norm for t in group.trails for r in t.rows if r.norm > 0 and math.isfinite(r.norm)]
    if not norms:
        return []
    low, high = math.floor(math.log10(min(norms))), math.ceil(math.log10(max(norms)))
    return [10.0**k for k in range(low, high + 1, max(1, math.ceil((high - low) / 6)))]


def traced(group: TrailGroup) -> bool:
    """Is it known of some operation which zeros it creates?"""
    return any(row.created is not None for trail in group.trails for row in trail.rows)


def _trail_values(group: TrailGroup) -> list[Spec]:
    def bar(row: TrailRow) -> Spec:
        made = row.zero if row.created is None else row.created
        parts = {"solid": made, "pale": min(row.forced, made)}
        parts |= {"arrives": row.inherited, "created": row.created, "passed": row.passed}
        return {name: _finite(100 * part) for name, part in parts.items() if part is not None}

    return [
        {
            "op": op,
            "kind": rows[op].kind,
            "victim": label,
            "zero": _finite(100 * rows[op].zero),
            "forced": _finite(100 * rows[op].forced),
            **bar(rows[op]),
            "norm": _finite(rows[op].norm),
            "entries": rows[op].entries,
        }
        for label, rows in zip(group.labels, group.rows, strict=True)
        for op in group.ops
        if op in rows
    ]


def _stages(group: TrailGroup) -> list[Spec]:
    """Where a new stage of the network begins: 'layer2.0.conv1' opens 'layer2'; single operations have no name."""
    out: list[Spec] = []
    for op in group.ops:
        stage = op.split(".")[0] if "." in op else ""
        if not out or out[-1]["stage"] != stage:
            out.append({"op": op, "stage": stage})
    return out


def accuracy_spec(runs: Sequence[Run], named: Mapping[str, str] | None = None) -> Spec:
    """Accuracy with Wilson intervals, a panel per setting: panels of different threats never share an axis.

    `named` says what victims of several training seeds are told by, one colour for all of them. Where more victims are
    told apart than there are shapes, each is a row and the attacks are colours.
    """
    import altair as alt

    cells, datas = columns(runs), list(dict.fromkeys(run.data for run in runs))
    victims = list(dict.fromkeys(run.victim for run in runs))
    routes = len({s.route for s in settings(runs)} - {NO_GRADIENT}) > 1
    told = named or {}
    listed = len({told.get(victim, victim) for victim in victims}) > len(SHAPES)
    attacks = list(dict.fromkeys(["clean", *(column.label for column, _ in cells)]))
    rows = []
    for data in datas:
        lines: list[list[Any]] = [[]]
        room = WIDE
        for where, members in by_setting(runs).items():
            inside = set(map(id, members))
            here = [(c.label, run) for (c, _), run in cells.items() if id(run) in inside and run.data == data]
            if not here:
                continue
            wide = _width(here, victims, told) + AXIS
            if lines[-1] and (listed or wide > room):
                lines.append([])
            room = (room if lines[-1] else WIDE) - wide
            if listed:
                lines[-1].append(_listing(where, here, attacks, route=routes))
            else:
                lines[-1].append(_panel(where, here, victims, told, route=routes, first=not lines[-1]))
        drawn = [
            alt.hconcat(*panels, spacing=34).resolve_scale(
                x="independent", y="independent" if listed else "shared", color="shared", shape="shared"
            )
            for panels in lines
        ]
        row = drawn[0] if len(drawn) == 1 else alt.vconcat(*drawn, spacing=24)
        rows.append(row.properties(title=data) if len(datas) > 1 else row)
    return _spec(rows[0] if len(rows) == 1 else alt.vconcat(*rows, spacing=30))


def _title(where: Setting, wide: float, *, route: bool) -> Any:
    """Threat, mode and, where routes differ, the route of a panel."""
    import altair as alt

    lines = [f"{where.mode}-mode BatchNorm", *(textwrap.wrap(where.route, int(wide) // 6) if route else [])]
    return alt.Title(where.short.removesuffix(f", {where.mode} mode"), subtitle=lines, offset=10)


def _accuracies(runs: Sequence[tuple[str, Run]]) -> list[Spec]:
    """Clean accuracies once a victim, then those of the runs."""
    clean = dict.fromkeys((run.victim, run.clean_accuracy) for _, run in runs)
    values = [_bar("clean", victim, rate) for victim, rate in clean]
    return values + [_bar(label, run.victim, run.accuracy) for label, run in runs]


def _hints() -> list[Any]:
    import altair as alt

    names = {"victim:N": "victim", "attack:N": "attack", "text:N": "accuracy", "n:Q": "images"}
    return [alt.Tooltip(field, title=title) for field, title in names.items()]


def _width(runs: Sequence[tuple[str, Run]], victims: Sequence[str], named: Mapping[str, str]) -> int:
    """Of a panel, in pixels: room for every victim at every attack; of seeds only the spread is read."""
    count = len({"clean", *(label for label, _ in runs)})
    return max(130, count * max(64, (10 if named else 24) * len(victims)))


def _listing(where: Setting, runs: Sequence[tuple[str, Run]], attacks: Sequence[str], *, route: bool) -> Any:
    """A row per victim, an attack a colour and a shape."""
    import altair as alt

    values = _accuracies(runs)
    rows = list(dict.fromkeys(value["victim"] for value in values))
    here = [attack for attack in attacks if any(value["attack"] == attack for value in values)]
    legend = alt.Legend(title=None, orient="top", columns=6)
    across = alt.Scale(domain=[0, 100])
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("victim:N", sort=rows, axis=alt.Axis(title=None, labelLimit=300, ticks=False)),
        yOffset=alt.YOffset("attack:N", sort=here, scale=alt.Scale(paddingInner=0.3, paddingOuter=0.6)),
        color=alt.Color("attack:N", sort=attacks, scale=alt.Scale(domain=attacks), legend=legend),
        tooltip=_hints(),
    )
    interval = base.mark_rule(strokeWidth=1.8).encode(x=alt.X("low:Q", scale=across), x2="high:Q")
    point = base.mark_point(size=40, filled=True, opacity=1).encode(
        x=alt.X("accuracy:Q", scale=across, axis=alt.Axis(title="correct, %", tickCount=5)),
        shape=alt.Shape("attack:N", sort=attacks, scale=alt.Scale(domain=attacks), legend=legend),
    )
    step = alt.Step(8, **{"for": "offset"})
    return (interval + point).properties(width=ROW, height=step, title=_title(where, ROW, route=route))


def _panel(
    where: Setting,
    runs: Sequence[tuple[str, Run]],
    victims: list[str],
    named: Mapping[str, str],
    *,
    route: bool,
    first: bool,
) -> Any:
    """An attack a place, a victim a colour and a shape."""
    import altair as alt

    drawn_as = list(dict.fromkeys(named.get(victim, victim) for victim in victims))
    values = [value | {"row": named.get(value["victim"], value["victim"])} for value in _accuracies(runs)]
    order = list(dict.fromkeys(["clean", *(label for label, _ in runs)]))
    wide = _width(runs, victims, named)

    words = alt.Axis(title=None, labelAngle=0, labelLimit=220, labelExpr="split(datum.label, ' ')")
    offset = alt.XOffset("victim:N", sort=victims, scale=alt.Scale(paddingInner=0.6, paddingOuter=0.6))
    scale, axis = alt.Scale(domain=[0, 100]), alt.Axis(tickCount=5, title="correct, %" if first else None)
    legend = alt.Legend(title=None, orient="top") if len(drawn_as) > 1 else None
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("attack:N", sort=order, axis=words),
        xOffset=offset,
        color=alt.Color("row:N", sort=drawn_as, scale=alt.Scale(domain=drawn_as), legend=legend),
        tooltip=_hints(),
    )
    low = alt.Y("low:Q", scale=scale, axis=axis)
    shape = alt.Shape("row:N", sort=drawn_as, scale=alt.Scale(domain=drawn_as), legend=legend)
    interval = base.mark_rule(strokeWidth=1.8).encode(y=low, y2="high:Q")
    point = base.mark_point(size=46, filled=True, opacity=1).encode(
        y=alt.Y("accuracy:Q", scale=scale, axis=axis), shape=shape
    )
    return (interval + point).properties(width=wide, height=220, title=_title(where, wide, route=route))


def _bar(attack: str, victim: str, rate: Rate) -> Spec:
    low, high = rate.interval()
    return {
        "attack": attack,
        "victim": victim,
        "accuracy": 100 * rate.value,
        "low": 100 * low,
        "high": 100 * high,
        "n": rate.n,
        "text": percent(rate),
    }


def steps_spec(group: TrailGroup) -> Spec | None:
    """Zero share of every operation at every time step, a panel per victim; None where no step was kept."""
    return _squares(group, "time step", lambda row: row.per_step, first=1, size=26)


def examples_spec(group: TrailGroup) -> Spec | None:
    """Zero share of every operation in every image, a panel per victim; None where no image was kept."""
    count = max((len(row.per_example or ()) for rows in group.rows for row in rows.values()), default=0)
    return _squares(group, "image", lambda row: row.per_example, first=0, size=max(1, min(26, 640 // max(1, count))))


def _squares(
    group: TrailGroup, along: str, of: Callable[[TrailRow], tuple[float, ...] | None], *, first: int, size: int
) -> Spec | None:
    import altair as alt

    panels = []
    for label, rows in zip(group.labels, group.rows, strict=True):
        values = [
            {"op": op, "kind": row.kind, "along": i, "zero": _finite(100 * zero)}
            for op, row in rows.items()
            for i, zero in enumerate(of(row) or (), first)
        ]
        if not values:
            continue
        ops = alt.Axis(
            title=None, labelFontSize=11, labelOverlap=False, labelLimit=180, labels=not panels, ticks=not panels
        )
        count = len({v["along"] for v in values})
        panels.append(
            alt.Chart(alt.Data(values=values))
            .mark_rect()
            .encode(
                x=alt.X("along:O", axis=alt.Axis(title=along, labelAngle=0, labelOverlap=True, ticks=size > 6)),
                y=alt.Y("op:N", sort=list(group.ops), axis=ops),
                color=alt.Color(
                    "zero:Q",
                    scale=alt.Scale(domain=[0, 100], scheme="cividis"),
                    legend=alt.Legend(title="zero entries, %", gradientLength=180),
                ),
                tooltip=[
                    alt.Tooltip("op:N", title="operation"),
                    alt.Tooltip("kind:N"),
                    alt.Tooltip("along:O", title=along),
                    alt.Tooltip("zero:Q", title="zero, %", format=".3f"),
                ],
            )
            .properties(width=size * count, height=14 * len(group.ops), title=label)
        )
    return _spec(alt.hconcat(*panels, spacing=24).resolve_scale(color="shared", y="shared")) if panels else None


def tradeoff_spec(points: Sequence[Point]) -> Spec:
    """Clean accuracy against the worst case, a panel per threat: Wilson intervals both ways, density as colour.

    Shapes are what sets a design apart from the first; the line joins the designs that no other dominates.
    """
    import altair as alt

    factors = list(dict.fromkeys(p.factor for p in points))
    dense = [100 * p.density for p in points if p.density is not None]
    shown = alt.Scale(scheme="cividis", domain=[min(dense, default=0), max(dense, default=100)])
    panels = []
    for threat in dict.fromkeys(p.threat for p in points):
        here = [p for p in points if p.threat == threat]
        spans = [_span([r.interval() for r in rates]) for rates in ([p.clean for p in here], [p.robust for p in here])]
        places = _places([(100 * p.clean.value, 100 * p.robust.value) for p in here], [p.victim for p in here], spans)
        values = [
            {
                "network": p.victim,
                "factor": p.factor,
                "density": None if p.density is None else 100 * p.density,
                **{f"clean_{k}": v for k, v in _bar("", "", p.clean).items() if k != "victim"},
                **{f"robust_{k}": v for k, v in _bar("", "", p.robust).items() if k != "victim"},
                "strongest": p.strongest,
                "name_x": place[0],
                "name_y": place[1],
                "line_x": place[2],
                "line_y": place[3],
            }
            for p, place in zip(here, places, strict=True)
        ]
        base = alt.Chart(alt.Data(values=values))
        x_scale, y_scale = (alt.Scale(domain=span, nice=False) for span in spans)
        sizes = [
            ", ".join(dict.fromkeys(f"n={r.n}" for r in rates))
            for rates in zip(*((p.clean, p.robust) for p in here), strict=True)
        ]
        x = alt.X("clean_accuracy:Q", title=f"clean accuracy, %, {sizes[0]}", scale=x_scale)
        worst = f"worst case of {here[0].attacks} attacks, correct, %, {sizes[1]}"
        y = alt.Y("robust_accuracy:Q", title=worst, scale=y_scale)
        hints = [
            alt.Tooltip("network:N"),
            alt.Tooltip("clean_text:N", title="clean"),
            alt.Tooltip("robust_text:N", title="worst case"),
            alt.Tooltip("robust_n:Q", title="images attacked"),
            alt.Tooltip("density:Q", title="gradient density, %", format=".2f"),
            alt.Tooltip("strongest:N", title="strongest attack"),
        ]
        front = [{"x": 100 * p.clean.value, "y": 100 * p.robust.value} for p in undominated(here)]
        line = alt.Chart(alt.Data(values=front)).mark_line(style="stage", strokeDash=[4, 3]).encode(x="x:Q", y="y:Q")
        across = base.mark_rule(style="stage").encode(x=alt.X("clean_low:Q"), x2="clean_high:Q", y=y)
        along = base.mark_rule(style="stage").encode(x=x, y=alt.Y("robust_low:Q"), y2="robust_high:Q")
        dots = base.mark_point(size=110, filled=True, opacity=1).encode(
            x=x,
            y=y,
            shape=alt.Shape("factor:N", sort=factors, scale=alt.Scale(domain=factors), legend=alt.Legend(title=None)),
            color=alt.Color(
                "density:Q", scale=shown, legend=alt.Legend(title="gradient density, %", gradientLength=140)
            ),
            tooltip=hints,
        )
        leader = base.mark_rule(style="audit-quiet", strokeWidth=0.7).encode(x=x, y=y, x2="line_x:Q", y2="line_y:Q")
        halo, names = (
            base.mark_text(style=style, align="left", baseline="middle").encode(
                x="name_x:Q", y="name_y:Q", text="network:N"
            )
            for style in ("halo", "audit-soft")
        )
        layers = alt.layer(line, across, along, leader, halo, dots, names)
        panels.append(layers.properties(width=PANEL[0], height=PANEL[1], title=str(threat)))
    return _spec(alt.hconcat(*panels, spacing=34) if len(panels) > 1 else panels[0])


def _span(intervals: Sequence[tuple[float, float]]) -> list[float]:
    """An axis in % that holds all intervals with a little room."""
    low, high = min(a for a, _ in intervals), max(b for _, b in intervals)
    room = 0.04 * (high - low) or 0.02
    return [max(0.0, 100 * (low - room)), min(100.0, 100 * (high + room))]


def _places(
    dots: Sequence[tuple[float, float]], names: Sequence[str], spans: Sequence[Sequence[float]]
) -> list[tuple[float, float, float, float]]:
    """Where the name of each dot begins and where a line to it ends, in units of the axes.

    Names cover neither dots nor each other. Of the free places the nearest is taken, rather one that is nearer to its
    own dot than to any other.
    """
    (x0, x1), (y0, y1) = spans
    wide, high, letter, tall = *PANEL, 5.6, 13.0
    pixels = [((x - x0) / (x1 - x0) * wide, (y - y0) / (y1 - y0) * high) for x, y in dots]

    def meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

    def near(box: tuple[float, ...], dot: tuple[float, float]) -> tuple[float, float]:
        return min(max(dot[0], box[0]), box[2]), min(max(dot[1], box[1]), box[3])

    def cost(box: tuple[float, ...], own: tuple[float, float]) -> float:
        others = [math.dist(near(box, dot), dot) for dot in pixels if dot != own]
        gap = math.dist(near(box, own), own)
        outside = max(0.0, -box[0], box[2] - wide, -box[1], box[3] - high)
        covered = sum(meet(box, other) for other in taken)
        return gap + (40 if min(others, default=math.inf) < gap + 4 else 0) + 1e3 * outside + 1e4 * covered

    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    out: dict[int, tuple[float, float, float, float]] = {}
    for i, (x, y) in sorted(enumerate(pixels), key=lambda one: one[1]):
        size = letter * len(names[i])
        spots = [
            (dx, dy) for dy in range(-108, 109, 6) for dx in (9, -9 - size, -size / 2, 24, -24 - size, 60, -60 - size)
        ]
        boxes = [(x + dx, y + dy - tall / 2, x + dx + size, y + dy + tall / 2) for dx, dy in spots]
        box = min(boxes, key=lambda one: cost(one, pixels[i]))
        taken.append(box)
        to = near(box, pixels[i])
        end = to if math.dist(to, pixels[i]) > 12 else pixels[i]
        across, up = (x1 - x0) / wide, (y1 - y0) / high
        out[i] = (x0 + box[0] * across, y0 + (box[1] + box[3]) / 2 * up, x0 + end[0] * across, y0 + end[1] * up)
    return [out[i] for i in range(len(names))]


def ablation_spec(found: Ablation) -> Spec:
    """Zeros left in all operations, by kind, a bar per replacement; longer than the first where one adds zeros."""
    import altair as alt

    base = found.rows[0]
    names = [row.name for row in found.rows]
    values = [
        {"replaced": name, "kind": kind, "order": i, "zero": _finite(100 * zero), "left": _finite(100 * row.left)}
        for name, row in zip(names, found.rows, strict=True)
        for i, (kind, zero) in enumerate(zip(found.kinds, row.of_all, strict=True))
        if zero
    ]
    kinds = [k for k in found.kinds if any(v["kind"] == k for v in values)]
    known = [*KINDS, *(k for k in kinds if k not in KINDS)]  # the colour of a kind is that of its place here
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_bar(size=13)
        .encode(
            x=alt.X("zero:Q", title="zero entries, % of all", stack="zero"),
            y=alt.Y("replaced:N", scale=alt.Scale(domain=names), axis=alt.Axis(title=None, labelLimit=420)),
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=known),
                legend=alt.Legend(title=None, orient="top", columns=3, values=kinds),
            ),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("replaced:N"),
                alt.Tooltip("kind:N"),
                alt.Tooltip("zero:Q", title="zero, % of all entries", format=".3f"),
                alt.Tooltip("left:Q", title="of the zeros, %", format=".1f"),
            ],
        )
        .properties(width=520, height=alt.Step(20))
    )
    rule = alt.Chart(alt.Data(values=[{"zero": 100 * base.zero}])).mark_rule(style="stage", strokeDash=[2, 2])
    return _spec(alt.layer(rule.encode(x="zero:Q"), chart))


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


def stamped(spec: Spec, report: Report, of: Sequence[Run | Trail | Audit]) -> Spec:
    """A chart with what it rests on below it: images and their number, seed, threat and mode, versions."""
    return {"vconcat": [spec], "title": {"text": stamp(report, of), "orient": "bottom", "fontSize": 11.5, "offset": 14}}


def stamp(report: Report, of: Sequence[Run | Trail | Audit]) -> list[str]:
    """The lines below a chart: data and n, threats or that there are none, seed and versions."""
    sizes = dict.fromkeys(f"{one.data}{'' if f'n={one.n}' in one.data else f', n={one.n}'}" for one in of)
    threats = dict.fromkeys(
        f"gradient of the cross-entropy at the images themselves (no threat), {one.mode}-mode BatchNorm"
        if isinstance(one, Trail)
        else str(one.threat) + ("" if isinstance(one, Audit) else f", crafted in {one.mode} mode")
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


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _spec(chart: Any) -> Spec:
    """The chart as plain data, without altair's own look and without a link to the schema."""
    spec: Spec = chart.to_dict(validate=True)
    for key in ("$schema", "config"):
        spec.pop(key, None)
    return spec
