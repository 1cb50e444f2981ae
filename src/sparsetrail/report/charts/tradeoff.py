"""The chart of a sweep of designs: accuracy under attack against clean accuracy."""

import math
from collections.abc import Sequence

from sparsetrail.report.charts.accuracy import bar
from sparsetrail.report.charts.look import Spec, plain
from sparsetrail.report.design_tables import Point, undominated

PANEL = (430, 340)  # of the trade-off, in pixels


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
                **{f"clean_{k}": v for k, v in bar("", "", p.clean).items() if k != "victim"},
                **{f"robust_{k}": v for k, v in bar("", "", p.robust).items() if k != "victim"},
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
    return plain(alt.hconcat(*panels, spacing=34) if len(panels) > 1 else panels[0])


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
