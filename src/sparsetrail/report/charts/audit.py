"""The charts of an audit: the fall, which attack broke which share, losses by step, accuracy by radius.

Every chart is of one audit, so of one threat; colours come from the named styles of `look.config`.
"""

from collections.abc import Sequence
from typing import Any

from sparsetrail.core import Audit, Rate, as_fraction
from sparsetrail.report import audits as words
from sparsetrail.report.charts.look import Spec, finite, plain
from sparsetrail.report.tables import percent

STYLES = {"good": "audit-good", "warn": "audit-warn", "bad": "audit-bad", "none": "audit-none"}
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [12, 3], [1, 3]]


def fall_spec(audit: Audit) -> Spec:
    """Clean, claimed, default attack, worst case, each with its interval; an arrow from one to the next."""
    import altair as alt

    stages: list[tuple[str, float, Rate | None]] = [("clean", audit.clean_accuracy.value, audit.clean_accuracy)]
    if audit.claim is not None:
        stages.append(("claimed", audit.claim, None))
    stages += [
        ("default attack", audit.default_accuracy.value, audit.default_accuracy),
        ("worst case", audit.accuracy.value, audit.accuracy),
    ]
    told = ", as published" if audit.claim_source else ""
    marks, arrows = [], []
    for i, (name, value, rate) in enumerate(stages):
        low, high = rate.interval() if rate else (value, value)
        marks.append({
            "at": i, "name": name, "value": 100 * value, "low": 100 * low, "high": 100 * high,
            "text": f"{100 * value:.1f} %", "measured": rate is not None, "last": i == len(stages) - 1,
            "said": percent(rate, n=True) if rate else f"{100 * value:.1f} %{told}",
        })  # fmt: skip
        if i:
            before = 100 * stages[i - 1][1]
            arrows.append({
                "from": i - 1 + 0.05, "to": i - 0.3, "before": before, "after": 100 * value,
                "angle": 0 if 100 * value > before else 180, "moved": abs(100 * value - before) > 2.5,
            })  # fmt: skip

    names = "[" + ",".join(repr(name.split(" ")) for name, _, _ in stages) + "]"
    axis = alt.Axis(
        values=list(range(len(stages))), labelExpr=f"{names}[datum.value]", title=None, ticks=False, offset=8
    )
    scale = alt.Scale(domain=[-0.45, len(stages) - 0.35], nice=False)
    x = alt.X("at:Q", axis=axis, scale=scale)
    height = alt.Scale(domain=[0, 100])
    y = alt.Y("value:Q", scale=height, axis=alt.Axis(tickCount=5, title="correct, %"))
    hints = [alt.Tooltip("name:N", title="stage"), alt.Tooltip("said:N", title="accuracy")]
    points, moves = alt.Chart(alt.Data(values=marks)), alt.Chart(alt.Data(values=arrows))
    level = moves.mark_rule(style="audit-quiet", strokeDash=[2, 2]).encode(
        x=alt.X("from:Q", scale=scale), x2="to:Q", y=alt.Y("before:Q", scale=height)
    )
    drop = moves.transform_filter("datum.moved").mark_rule(style="audit-quiet").encode(
        x=alt.X("to:Q", scale=scale), y=alt.Y("before:Q", scale=height), y2="after:Q"
    )  # fmt: skip
    heads = moves.transform_filter("datum.moved").mark_point(
        style="audit-quiet", shape="triangle", filled=True, size=34, opacity=1
    ).encode(
        x=alt.X("to:Q", scale=scale), y=alt.Y("after:Q", scale=height),
        angle=alt.Angle("angle:Q", scale=alt.Scale(domain=[0, 360], range=[0, 360]), legend=None),
    )  # fmt: skip
    interval = points.transform_filter("datum.measured").mark_rule(style="audit-ink", strokeWidth=1.8)
    layers = [
        level, drop, heads,
        interval.encode(x=x, y=alt.Y("low:Q", scale=height), y2="high:Q", tooltip=hints),
        points.transform_filter("!datum.measured").mark_point(style="audit-ink", shape="diamond", size=80, filled=False)
        .encode(x=x, y=y, tooltip=hints),
        points.transform_filter("datum.measured && !datum.last").mark_point(style="audit-ink", size=52, filled=True,
        opacity=1).encode(x=x, y=y, tooltip=hints),
        points.transform_filter("datum.last").mark_point(style=STYLES[words.VERDICTS[audit.verdict][0]], size=90,
        filled=True, opacity=1).encode(x=x, y=y, tooltip=hints),
        points.mark_text(style="audit-word", align="left", baseline="bottom", dx=7, dy=-4)
        .encode(x=x, y=y, text="text:N"),
    ]  # fmt: skip
    return plain(alt.layer(*layers).properties(width=92 * len(stages), height=190))


def battery_spec(audit: Audit) -> Spec:
    """A row an attack: what stands after it is pale, what it newly broke is solid, the change stands in words."""
    import altair as alt

    def row(name: str, before: Rate, left: Rate, said: str) -> dict[str, Any]:
        low, high = left.interval()
        return {"row": name, "zero": 0, "before": 100 * before.value, "left": 100 * left.value, "low": 100 * low,
                "high": 100 * high, "said": said, "text": percent(left, n=True)}  # fmt: skip

    clean = audit.clean_accuracy
    rows = [row("clean", clean, clean, f"{percent(clean)} of {audit.n}")]
    standing = clean
    for name, step in zip(words.titles(audit), words.steps(audit), strict=True):
        images = "image" if step.broken == 1 else "images"
        said = (
            f"{words.MINUS}{100 * step.broken / audit.n:.1f} points, {step.broken} {images}" if step.broken else "none"
        )
        rows.append(row(name, standing, step.left, said))
        standing = step.left
    rows.append(row("worst case", audit.accuracy, audit.accuracy, f"{percent(audit.accuracy)} of {audit.n}"))
    order, width = [r["row"] for r in rows], 430

    y = alt.Y("row:N", sort=order, axis=alt.Axis(title=None, labelLimit=300, ticks=False, domain=False))
    scale = alt.Scale(domain=[0, 100])
    axis = alt.Axis(tickCount=5, title=f"correct of all {audit.n} images, %")
    hints = [alt.Tooltip("row:N", title="after"), alt.Tooltip("text:N", title="accuracy left"),
             alt.Tooltip("said:N", title="newly broken")]  # fmt: skip
    base = alt.Chart(alt.Data(values=rows))
    left = base.mark_bar(style="audit-left", height=11).encode(
        y=y, x=alt.X("zero:Q", scale=scale, axis=axis), x2="left:Q", tooltip=hints
    )
    broken = base.mark_bar(style="audit-bad", height=11).encode(y=y, x=alt.X("left:Q", scale=scale), x2="before:Q",
                                                                tooltip=hints)  # fmt: skip
    interval = base.mark_rule(style="audit-ink", strokeWidth=1.4).encode(
        y=y, x=alt.X("low:Q", scale=scale), x2="high:Q", tooltip=hints
    )
    said = base.mark_text(style="audit-word", align="left").encode(y=y, x=alt.value(width + 12), text="said:N")
    return plain(alt.layer(left, broken, interval, said).properties(width=width, height=20 * len(rows)))


def loss_spec(audit: Audit) -> Spec | None:
    """Mean loss by step of every attack that kept it, with its band where one is given; None without any."""
    import altair as alt

    values: list[dict[str, Any]] = []
    for curve in audit.curves.get("loss") or ():
        mean = list(curve.get("mean") or ())
        steps = list(curve.get("steps") or range(len(mean)))
        low, high = (list(curve.get(end) or ()) for end in ("low", "high"))
        for i, (step, value) in enumerate(zip(steps, mean, strict=False)):
            if _number(value) is not None:
                ends = {"low": _number(low[i]) if i < len(low) else None}
                ends["high"] = _number(high[i]) if i < len(high) else None
                values.append({"attack": str(curve.get("label", "attack")), "step": step, "mean": value, **ends})
    if not values:
        return None
    names = list(dict.fromkeys(v["attack"] for v in values))
    legend = alt.Legend(
        title=None, orient="top", columns=2, labelLimit=260, symbolType="stroke", symbolSize=320, symbolOpacity=1
    )
    colour = alt.Color("attack:N", sort=names, scale=alt.Scale(domain=names), legend=legend)
    dash = alt.StrokeDash("attack:N", sort=names, scale=alt.Scale(domain=names, range=DASHES), legend=legend)
    x = alt.X("step:Q", axis=alt.Axis(title="step", tickMinStep=1, tickCount=6), scale=alt.Scale(nice=False))
    scale = alt.Scale(zero=False)
    hints = [alt.Tooltip("attack:N"), alt.Tooltip("step:Q"), alt.Tooltip("mean:Q", format=".4g", title="mean loss")]
    base = alt.Chart(alt.Data(values=values))
    band = base.transform_filter("isValid(datum.low) && isValid(datum.high)").mark_area(opacity=0.16)
    bands = [band.encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=colour)]
    layers = [
        *(bands if any(v["low"] is not None and v["high"] is not None for v in values) else []),
        base.mark_line(strokeWidth=1.8).encode(
            x=x, y=alt.Y("mean:Q", scale=scale, axis=alt.Axis(title="mean loss", tickCount=5)), color=colour,
            strokeDash=dash, tooltip=hints,
        ),
    ]  # fmt: skip
    reach = [v[k] for v in values for k in ("mean", "low", "high") if v[k] is not None]
    if min(reach) < 0 < max(reach):
        zero = alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule(style="audit-quiet", strokeDash=[2, 2])
        layers.insert(0, zero.encode(y=alt.Y("y:Q", scale=scale)))
    return plain(alt.layer(*layers).properties(width=390, height=210))


def eps_spec(audit: Audit) -> Spec | None:
    """Accuracy of one attack by its radius, with Wilson intervals; a line marks the audit's own radius."""
    import altair as alt

    curve, threat = audit.curves.get("eps") or {}, words.where(audit).threat
    n = curve.get("n")
    grey = 255.0 if threat.norm != "l0" and threat.box == (0.0, 1.0) else 1.0  # radii are spoken of in 255ths
    values: list[dict[str, Any]] = []
    for eps, share in zip(curve.get("eps") or (), curve.get("accuracy") or (), strict=False):
        if _number(eps) is None or _number(share) is None:
            continue
        low, high = Rate(round(share * n), n).interval() if n else (share, share)
        values.append({"eps": grey * eps, "value": 100 * share, "low": 100 * low, "high": 100 * high, "n": n or None,
                       "said": as_fraction(eps) if grey > 1 else f"{eps:g}"})  # fmt: skip
    if not values:
        return None
    ticks = sorted({v["eps"] for v in values})
    what = {"linf": "radius, L-infinity", "l2": "radius, L2", "l0": "entries flipped"}[threat.norm]
    axis = alt.Axis(
        values=ticks,
        labelExpr="format(datum.value, '.4~g')",
        title=f"{what}{', in 255ths' if grey > 1 else ''}",
        labelOverlap="greedy",
        labelSeparation=3,
    )
    x = alt.X("eps:Q", axis=axis, scale=alt.Scale(type="symlog", constant=1, nice=False))
    height = alt.Scale(domain=[0, 100])
    hints = [alt.Tooltip("said:N", title="radius"), alt.Tooltip("value:Q", format=".1f", title="correct, %"),
             alt.Tooltip("n:Q", title="images")]  # fmt: skip
    base = alt.Chart(alt.Data(values=values))
    own = alt.Chart(alt.Data(values=[{"eps": grey * threat.eps, "word": "audited"}]))
    layers = [
        own.mark_rule(style="audit-quiet", strokeDash=[2, 2]).encode(x=x),
        own.mark_text(style="audit-soft", align="left", baseline="top", dx=4).encode(
            x=x, y=alt.value(0), text="word:N"
        ),
        base.mark_rule(style="audit-ink", strokeWidth=1.4).encode(x=x, y=alt.Y("low:Q", scale=height), y2="high:Q"),
        base.mark_line(style="audit-ink", strokeWidth=1.2, opacity=0.6).encode(x=x, y=alt.Y("value:Q", scale=height)),
        base.mark_point(style="audit-ink", filled=True, size=40, opacity=1).encode(
            x=x, y=alt.Y("value:Q", scale=height, axis=alt.Axis(title="correct, %", tickCount=5)), tooltip=hints
        ),
    ]  # fmt: skip
    return plain(alt.layer(*layers).properties(width=390, height=210))


def audit_specs(audits: Sequence[Audit]) -> dict[str, Spec]:
    """All charts of the audits by the id of their place."""
    out: dict[str, Spec] = {}
    for i, audit in enumerate(audits):
        out[f"audit-{i}-fall"] = fall_spec(audit)
        if audit.runs:
            out[f"audit-{i}-battery"] = battery_spec(audit)
        for name, spec in (("loss", loss_spec(audit)), ("eps", eps_spec(audit))):
            if spec is not None:
                out[f"audit-{i}-{name}"] = spec
    return out


def _number(value: Any) -> float | None:
    """A number of free-form data; None for anything else, and for what is not finite."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return finite(float(value)) if plain else None
