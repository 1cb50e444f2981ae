"""The charts of a trail: zeros and norms along the operations, zeros by step and by image."""

import math
from collections.abc import Callable
from typing import Any

from sparsetrail.core import TrailRow
from sparsetrail.report.charts.look import Spec, finite, plain
from sparsetrail.report.trail_tables import TrailGroup


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
    return plain(chart.properties(title=title) if title else chart)


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
        return {name: finite(100 * part) for name, part in parts.items() if part is not None}

    return [
        {
            "op": op,
            "kind": rows[op].kind,
            "victim": label,
            "zero": finite(100 * rows[op].zero),
            "forced": finite(100 * rows[op].forced),
            **bar(rows[op]),
            "norm": finite(rows[op].norm),
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
            {"op": op, "kind": row.kind, "along": i, "zero": finite(100 * zero)}
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
    return plain(alt.hconcat(*panels, spacing=24).resolve_scale(color="shared", y="shared")) if panels else None
