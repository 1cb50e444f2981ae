"""The chart of accuracies, a panel per setting."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from sparsetrail.core import Rate, Run
from sparsetrail.report.charts.look import SHAPES, Spec, plain
from sparsetrail.report.labels import NO_GRADIENT, Setting, by_setting, columns, settings
from sparsetrail.report.tables import percent

WIDE, AXIS, ROW = 1120, 70, 520  # panels of accuracy in one line, what is beside one, one with a row per victim


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
    return plain(rows[0] if len(rows) == 1 else alt.vconcat(*rows, spacing=30))


def _title(where: Setting, wide: float, *, route: bool) -> Any:
    """Threat, mode and, where routes differ, the route of a panel."""
    import altair as alt

    lines = [f"{where.mode}-mode BatchNorm", *(textwrap.wrap(where.route, int(wide) // 6) if route else [])]
    return alt.Title(where.short.removesuffix(f", {where.mode} mode"), subtitle=lines, offset=10)


def _accuracies(runs: Sequence[tuple[str, Run]]) -> list[Spec]:
    """Clean accuracies once a victim, then those of the runs."""
    clean = dict.fromkeys((run.victim, run.clean_accuracy) for _, run in runs)
    values = [bar("clean", victim, rate) for victim, rate in clean]
    return values + [bar(label, run.victim, run.accuracy) for label, run in runs]


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


def bar(attack: str, victim: str, rate: Rate) -> Spec:
    """One accuracy with its interval, in percent."""
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
