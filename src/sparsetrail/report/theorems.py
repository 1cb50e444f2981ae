"""The page of the theorems: what each says, what its hypotheses ask, what was measured, what may be said of it.

A page is plain data; its plots are Vega-Lite drawn to SVG inside the page, which fetches nothing and runs nothing.
"""

import base64
import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from sparsetrail._files import write_atomic
from sparsetrail.report.charts.look import Spec, config, plain
from sparsetrail.report.io import pack
from sparsetrail.report.labels import value
from sparsetrail.report.page import _cell, _flat, _prose
from sparsetrail.report.tables import Grid, as_csv

TONES = {
    "holds": ("good", "\u2713"),
    "violated (certified)": ("bad", "\u2717"),
    "violated (not certified)": ("warn", "!"),
    "vacuous": ("none", "\u2013"),
    "undefined": ("none", "?"),
    "hypothesis not met": ("warn", "!"),
}
Kind = Literal["ratios", "radius", "linear", "scan", "curve", "tracking", "temperature", "fidelity"]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What is drawn: rows of plain values, reference `marks`, and a `stamp` of n, seed, threat and versions."""

    kind: Kind
    title: str
    caption: str
    stamp: str
    values: tuple[dict[str, Any], ...]
    marks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One hypothesis of a theorem: what it asks, whether it is met (None: not known), what was found."""

    asks: str
    met: bool | None
    found: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """A theorem put to one case: a verdict, the reason with its numbers, hypotheses and tables."""

    of: str
    verdict: str
    why: str
    hypotheses: tuple[Asked, ...] = ()
    tables: tuple[Grid, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One theorem in our own words, its formula and source, what was found, and what holds instead."""

    name: str
    source: str
    says: str
    formula: str
    instead: str
    results: tuple[Result, ...]
    plots: tuple[Plot, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole page; `victims` says what was measured and under which threat, `images` is one row an image and radius
    for the CSV, `numbers` all measurements for the JSON."""

    title: str
    summary: tuple[str, ...]
    victims: Grid | None
    statements: tuple[Statement, ...]
    notes: tuple[str, ...]
    images: tuple[dict[str, Any], ...]
    provenance: dict[str, Any]
    numbers: dict[str, Any]


def write(page: Page, out: str | Path) -> dict[str, Path]:
    """Write theorems.json, .csv, .md and .html and every plot as SVG into the folder `out`; each is whole or absent.

    Plots of an earlier page there are removed.
    """
    import msgspec

    drawn = pictures(page)
    texts = {
        "json": ("theorems.json", msgspec.json.encode(pack(page)) + b"\n"),
        "csv": ("theorems.csv", images_csv(page).encode()),
        "md": ("theorems.md", markdown(page).encode()),
        "html": ("theorems.html", to_html(page, drawn).encode()),
    }
    texts |= {name: (f"{name}.svg", svg.encode()) for name, svg in drawn.items()}
    done = {kind: write_atomic(Path(out) / name, data) for kind, (name, data) in texts.items()}
    for old in Path(out).glob("plot-[0-9][0-9]-*.svg"):  # of an earlier page
        if old not in done.values():
            old.unlink()
    return done


def images_csv(page: Page) -> str:
    """One row an image and radius; only the head of an empty table where no victim was measured."""
    head = tuple(page.images[0]) if page.images else ("victim",)
    return as_csv(head, [tuple(row.values()) for row in page.images])


def named(page: Page) -> dict[str, Plot]:
    """Every plot that has something to show, by the name of its file: 'plot-01-ratios'."""
    plots = (plot for s in page.statements for plot in s.plots if plot.values)
    return {f"plot-{i:02}-{plot.kind}": plot for i, plot in enumerate(plots, 1)}


def pictures(page: Page) -> dict[str, str]:
    """Every plot as SVG, by name."""
    import vl_convert

    light = {"config": config("light")}
    return {name: vl_convert.vegalite_to_svg({**draw(plot), **light}) for name, plot in named(page).items()}


def verdicts(page: Page) -> Grid:
    """Every theorem on every case: the verdict and why."""
    rows = [(s.name, r.of, f"{TONES[r.verdict][1]} {r.verdict}", r.why) for s in page.statements for r in s.results]
    return Grid("What may be said", ("statement", "case", "verdict", "why"), tuple(rows), labels=4)


def markdown(page: Page) -> str:
    """The page in plain text; plots are the SVG files beside it."""
    names = {id(plot): name for name, plot in named(page).items()}
    parts = [f"# {page.title}", *page.summary, *([page.victims.text()] if page.victims else []), verdicts(page).text()]
    for s in page.statements:
        parts += [f"## {s.name}", f"{s.says} ({s.source})", f"    {s.formula}", f"**Instead.** {s.instead}"]
        for r in s.results:
            parts += [f"### {r.of}: {r.verdict}", r.why]
            if r.hypotheses:
                parts += [_hypotheses(r).text()]
            for grid in r.tables:
                parts += [f"{grid.caption}.", grid.text()]
        for plot in s.plots:
            if plot.values:
                parts += [f"![{plot.title}]({names[id(plot)]}.svg)", plot.caption]
    parts += ["## Notes", "\n".join(f"- {note}" for note in page.notes)]
    parts += ["## Provenance", "\n".join(f"- {k}: {value(v)}" for k, v in _flat(page.provenance).items())]
    return "\n\n".join(parts) + "\n"


def to_html(page: Page, drawn: Mapping[str, str] | None = None) -> str:
    """The page as one HTML document with the look of all reports; `drawn` are its `pictures`, if they are at hand."""
    import jinja2

    drawn = pictures(page) if drawn is None else drawn
    source = files("sparsetrail.report")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: source.joinpath(name).read_text("utf-8")),
    )
    environment.filters |= {"cell": _cell, "formula": _formula}
    look = source.joinpath("page.html.j2").read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
    return environment.get_template("theorems.html.j2").render(
        page=page,
        look=look,
        tones=TONES,
        hypotheses=_hypotheses,
        stills={
            id(plot): "data:image/svg+xml;base64," + base64.b64encode(drawn[name].encode()).decode()
            for name, plot in named(page).items()
        },
        key=id,
        provenance=Grid(
            "Provenance", ("what", "value"), tuple((k, value(v)) for k, v in _flat(page.provenance).items())
        ),
    )


def _hypotheses(result: Result) -> Grid:
    word = {True: "\u2713 met", False: "\u2717 not met", None: "? not known"}
    rows = tuple((a.asks, word[a.met], a.found) for a in result.hypotheses)
    return Grid(f"{result.of}: what the hypotheses ask", ("asked", "met", "found"), rows, labels=3)


def _formula(text: str) -> Any:
    """'3 <= rho_adv / rho_rand <= 3 |g|_0' in running text, as a reader of mathematics expects it."""
    from markupsafe import Markup

    text = html.escape(_prose(text), quote=False)
    text = re.sub(r"\brho_(\w+)", "\u03c1<sub>\\1</sub>", text)
    text = re.sub(r"\bsigma_(\w+)", "\u03c3<sub>\\1</sub>", text)
    text = re.sub(r"\|([^|]+)\|_([A-Z]|\d)", "\u2016\\1\u2016<sub>\\2</sub>", text)
    text = re.sub(r"\b(d?[a-zA-Z])_(\w+)", r"\1<sub>\2</sub>", text)
    text = re.sub(r"\^(\w)", r"<sup>\1</sup>", text)
    return Markup(text.replace("&lt;=", "\u2264").replace("&gt;=", "\u2265"))


def draw(plot: Plot) -> Spec:
    """The Vega-Lite specification of a plot, its stamp below its title."""
    import altair as alt

    chart = DRAWN[plot.kind](alt, plot.values, plot.marks)
    return plain(chart.properties(title=alt.TitleParams(plot.title, subtitle=plot.stamp)))


Values = Sequence[Mapping[str, Any]]


def _rows(alt: Any, values: Values) -> Any:
    return alt.Chart(alt.Data(values=[{k: _plain(v) for k, v in row.items()} for row in values]))


def _plain(v: Any) -> Any:
    return None if isinstance(v, float) and not math.isfinite(v) else v


def _log(alt: Any, name: str, title: str, **scale: Any) -> dict[str, Any]:
    return {
        "shorthand": f"{name}:Q",
        "title": title,
        "scale": alt.Scale(type="log", **scale),
        "axis": alt.Axis(format="~g", tickCount=6),
    }


def _series(alt: Any, name: str, values: Values) -> dict[str, Any]:
    """Colour and shape of a series: never one without the other.

    Their domains are said, since layers without shapes would otherwise part the two legends.
    """
    names = list(dict.fromkeys(v[name] for v in values))
    legend, scale = alt.Legend(orient="top", labelLimit=320, symbolOpacity=1, columns=2), alt.Scale(domain=names)
    return {
        "color": alt.Color(f"{name}:N", title="", legend=legend, scale=scale),
        "shape": alt.Shape(f"{name}:N", title="", legend=legend, scale=scale),
    }


def _level(alt: Any, at: float, word: str, axis: str = "y") -> Any:
    """A dashed line across the plot, named."""
    rule = alt.Chart(alt.Data(values=[{axis: at, "word": word}]))
    place = {axis: f"{axis}:Q"}
    other = {"x": alt.value(4)} if axis == "y" else {"y": alt.value(0)}
    text = {"align": "left", "baseline": "bottom" if axis == "y" else "top", "dx": 3}
    return rule.mark_rule(style="audit-quiet", strokeDash=[3, 3]).encode(**place) + rule.mark_text(
        style="audit-soft", **text
    ).encode(text="word:N", **place, **other)


def _ratios(alt: Any, values: Values, marks: Mapping[str, Any]) -> Any:
    """Ratio met against the linear theory, an image a point, its interval a bar."""
    series, bound = _series(alt, "net", values), marks["bound"]
    across, up = ([v[k] for v in values] for k in ("predicted", "ratio"))
    x0, x1, y0, y1 = min(across) / 2, max(across) * 2, min(2.0, *up) / 1.3, max(bound, *up) * 1.5
    x = _log(alt, "predicted", "3 PR, the ratio of a linear score", domain=[x0, x1], nice=False)
    y = _log(alt, "ratio", "ratio met", domain=[y0, y1], nice=False, clamp=True)
    diagonal = alt.Chart(alt.Data(values=[{"a": max(x0, y0)}, {"a": min(x1, y1)}])).mark_line(style="audit-quiet")
    base = _rows(alt, values)
    points = base.mark_point(filled=True, size=45, opacity=0.85).encode(x=alt.X(**x), y=alt.Y(**y), **series)
    return alt.layer(
        points,
        base.mark_rule(opacity=0.35).encode(x=alt.X(**x), y=alt.Y("lo:Q"), y2="hi:Q", color=series["color"]),
        diagonal.encode(x=alt.X("a:Q"), y=alt.Y("a:Q")),
        _level(alt, 3, "3, the lower bound"),
        _level(alt, bound, f"3 x {bound / 3:.0f} entries, the upper bound"),
    ).properties(width=420, height=300)


def _radius(alt: Any, values: Values, marks: Mapping[str, Any]) -> Any:
    """Ratio by radius: median and the range between the 10 % and 90 % quantiles."""
    base = _rows(alt, values)
    x, colour = _log(alt, "eps", "radius, in 255ths"), _series(alt, "net", values)["color"]
    layers = [
        base.mark_area(opacity=0.18).encode(
            x=alt.X(**x), y=alt.Y(**_log(alt, "low", "rho_adv / rho_rand")), y2="high:Q", color=colour
        ),
        base.mark_line(point=True).encode(x=alt.X(**x), y=alt.Y("mid:Q"), color=colour),
        _level(alt, 3, "3"),
    ]
    layers += [_level(alt, at, name, "x") for name, at in marks["radii"].items()]
    return alt.layer(*layers).properties(width=420, height=260)


def _linear(alt: Any, values: Values, marks: Mapping[str, Any]) -> Any:
    """Measured vulnerability over its linear prediction by radius; 1 where the gradient says all. Dashed: noise."""
    base, names = _rows(alt, values), list(dict.fromkeys(v["what"] for v in values))
    found = [v["quotient"] for v in values]
    y = _log(alt, "quotient", "measured / linear prediction", domain=[min(0.5, *found), max(2, *found)])
    return alt.layer(
        base.mark_line(point=True).encode(
            x=alt.X(**_log(alt, "eps", "radius, in 255ths")),
            strokeDash=alt.StrokeDash("what:N", scale=alt.Scale(domain=names), legend=None),
            y=alt.Y(**y),
            color=_series(alt, "net", values)["color"],
        ),
        _level(alt, 1, "as the gradient predicts"),
    ).properties(width=420, height=260)


def _scan(alt: Any, values: Values, marks: Mapping[str, Any]) -> Any:
    """Share of instances that violate the printed inequality, by the densities of weights and spikes."""
    base = _rows(alt, values)
    x, y = alt.X("p_s:O", title="density of the spikes"), alt.Y("p_1:O", title="density of W1", sort="descending")
    layers = [
        base.mark_rect().encode(
            x=x,
            y=y,
            color=alt.Color("violated:Q", title="violated, %", scale=alt.Scale(domain=[0, 100], scheme="reds")),
        ),
        base.mark_text(fontSize=12).encode(
            x=x,
            y=y,
            text=alt.Text("violated:Q", format=".0f"),
            color=alt.condition("datum.violated > 55", alt.value("#ffffff"), alt.value("#22262b")),
        ),
        base.transform_filter("datum.p_s == datum.p_1")
        .mark_rect(filled=False, strokeWidth=2, style="audit-ink")
        .encode(x=x, y=y),
    ]
    if marks.get("own"):
        own = _rows(alt, marks["own"]).mark_point(style="audit-ink", shape="diamond", size=70, filled=True, yOffset=-15)
        layers.append(own.encode(x=x, y=y))
    return alt.layer(*layers).properties(width=300, height=240)


def _curve(alt: Any, values: Values, marks: Mapping[str, Any]) -> Any:
    """Weight count over input count by spike density: the truth, the printed bound, ours."""
    names = list(dict.fromkeys(v["what"] for v in values))
    return (
        _rows(alt, values)
        .mark_line()
        .encode(
            x=alt.X(**_log(alt, "p_s", "density of the spikes")),
            y=alt.Y(**_log(alt, "value", "E|W2 S| / E|W2 W1|")),
            color=_series(alt, "what", values)["color"],
            strokeDash=alt.StrokeDash("what:N", sort=names, legend=None),
        )
        .properties(width=420, height=240)
    )


def _tracking(alt: Any, values: Values, marks: Mapping[str, Any]) -> Any:
    """Rank correlation of each layer's gradient with the input's, with intervals; 'constant' in words."""
    order = list(dict.fromkeys(v["layer"] for v in values))
    names = list(dict.fromkeys(v["what"] for v in values))
    base = _rows(alt, values)
    x = alt.X("layer:N", sort=order, title=None, axis=alt.Axis(labelAngle=-60, labelLimit=160))
    shift = alt.XOffset("what:N", sort=names)
    y = alt.Y("rho:Q", title="Spearman's rho", scale=alt.Scale(domain=[-1, 1]))
    colour = alt.Color("what:N", sort=names, legend=alt.Legend(title=None, orient="top", labelLimit=320))
    return alt.layer(
        base.transform_filter("isValid(datum.rho)")
        .mark_bar(opacity=0.75)
        .encode(x=x, xOffset=shift, y=y, color=colour),
        base.transform_filter("isValid(datum.rho)")
        .mark_rule(style="audit-ink")
        .encode(x=x, xOffset=shift, y=alt.Y("low:Q"), y2="high:Q"),
        base.transform_filter("!isValid(datum.rho)")
        .mark_text(style="audit-soft", text="constant", angle=270)
        .encode(x=x, xOffset=shift, y=alt.datum(0)),
    ).properties(width=max(260, 22 * len(order) * len(names)), height=220)


def _temperature(alt: Any, values: Values, marks: Mapping[str, Any]) -> Any:
    """Density of the float32 gradient and accuracy left by two losses, by the scale of the logits."""
    return (
        _rows(alt, values)
        .mark_line(point=alt.OverlayMarkDef(size=50, filled=True))
        .encode(
            x=alt.X(**_log(alt, "scale", "logits multiplied by")),
            y=alt.Y("share:Q", title="%", scale=alt.Scale(domain=[0, 100])),
            **_series(alt, "what", values),
        )
        .properties(width=420, height=240)
    )


def _fidelity(alt: Any, values: Values, marks: Mapping[str, Any]) -> Any:
    """How many images have which fidelity, a net a row."""
    names = list(dict.fromkeys(v["net"] for v in values))
    return (
        _rows(alt, values)
        .mark_bar()
        .encode(
            x=alt.X(
                "fidelity:Q",
                bin=alt.Bin(step=0.1, extent=[-1, 1]),
                title="gradient fidelity",
                axis=alt.Axis(values=[-1, -0.5, 0, 0.5, 1]),
            ),
            y=alt.Y("count():Q", title="images", axis=alt.Axis(tickMinStep=1)),
            color=alt.Color("net:N", sort=names, legend=None),
            row=alt.Row(
                "net:N", sort=names, title=None, header=alt.Header(labelAngle=0, labelAlign="left", labelOrient="top")
            ),
        )
        .properties(width=420, height=90)
    )


DRAWN: dict[str, Callable[..., Any]] = {
    "ratios": _ratios,
    "radius": _radius,
    "linear": _linear,
    "scan": _scan,
    "curve": _curve,
    "tracking": _tracking,
    "temperature": _temperature,
    "fidelity": _fidelity,
}
