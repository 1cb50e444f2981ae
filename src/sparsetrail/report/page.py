"""A report as a folder: one page that opens offline, the same in Markdown, and the numbers as JSON and CSV."""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparsetrail._files import write_atomic
from sparsetrail.core import Audit, Report
from sparsetrail.report import (
    ablation_tables,
    audits,
    card,
    charts,
    comparison,
    design_tables,
    tables,
    trail_tables,
)
from sparsetrail.report.images import examples, keep, kept
from sparsetrail.report.io import RESULT, steps_csv, to_json, trail_csv
from sparsetrail.report.labels import by_setting, explain, gradients, setting_label, settings, value
from sparsetrail.report.seeds import seeded, spread
from sparsetrail.report.tables import Grid

NAMES = {  # of what a report may have beside its page, by kind
    "csv": "trail.csv", "origins": "trail_origins.csv", "examples": "trail_examples.csv", "steps": "trail_steps.csv",
    "ablation": "ablation.csv", "tradeoff": "tradeoff.csv", "card": card.CARD,
}  # fmt: skip


def write(report: Report, out: str | Path, *, images: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Path]:
    """Write `result.json`, `report.md` and `report.html` into the folder `out`; each is whole or absent.

    `images` are shown on the page only: mappings with `clean`, `adversarial` (uint8 [h w c] or [h w]), `label`,
    `predicted`, `title`, and of an audit its place among `report.audits` as `audit`; without them, those of an earlier
    call are shown again. `trail.csv` is written where there are trails, `trail_steps.csv` where one kept its time
    steps, `trail_examples.csv` where it kept its images, `trail_origins.csv` where it tells created zeros from
    inherited ones, `ablation.csv` where parts were replaced, `tradeoff.csv` of a sweep of designs, `card.json` where
    there is an audit; those of an earlier report in the folder that this one does not have are removed. Returns paths
    by kind: json, md, html, csv, steps, examples, origins, ablation, tradeoff, card.
    """
    folder = Path(out)
    plain = tuple(t for t in report.trails if not t.replaced)
    images = kept(folder) if images is None else images
    texts = {
        "json": (RESULT, to_json(report)),
        "md": ("report.md", markdown(report).encode()),
        "html": ("report.html", page(report, images=images).encode()),
    }
    if plain:
        texts["csv"] = (NAMES["csv"], trail_csv(replace(report, trails=plain)).encode())
    if any(t.replaced or any(row.created is not None for row in t.rows) for t in report.trails):
        texts["origins"] = (NAMES["origins"], trail_tables.origins_csv(report.trails).encode())
    if any(row.per_example for t in report.trails for row in t.rows):
        texts["examples"] = (NAMES["examples"], trail_tables.examples_csv(report.trails).encode())
    if found := ablation_tables.ablations(report.trails):
        texts["ablation"] = (NAMES["ablation"], ablation_tables.ablation_csv(found).encode())
    if points := design_tables.tradeoff(report):
        texts["tradeoff"] = (NAMES["tradeoff"], design_tables.tradeoff_csv(points).encode())
    if any(row.per_step for trail in report.trails for row in trail.rows):
        texts["steps"] = (NAMES["steps"], steps_csv(replace(report, trails=plain)).encode())
    if report.audits:
        texts["card"] = (NAMES["card"], card.to_json(report))
    folder.mkdir(parents=True, exist_ok=True)
    reported = (folder / RESULT).exists()
    if images:
        keep(folder, images)
    paths = {kind: write_atomic(folder / name, data) for kind, (name, data) in texts.items()}
    if reported:
        for name in {*NAMES.values()} - {path.name for path in paths.values()}:
            (folder / name).unlink(missing_ok=True)
    return paths


def page(report: Report, *, images: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The whole page as one HTML document: nothing is fetched, tables and pictures are there without JavaScript."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: files("sparsetrail.report").joinpath(name).read_text("utf-8")),
    )
    environment.filters["prose"] = _prose
    environment.filters["cell"] = _cell
    shown, gain = examples([image for image in images or () if _audit_of(image, report) is None])
    points = design_tables.tradeoff(report)
    groups = () if points else trail_tables.trail_groups(report.trails)
    drawn = _charts(report)
    figures = [claim for claim in report.claims if claim.figure in trail_tables.FIGURES]
    compared = [c for c in comparison.comparisons(report) if c.figure not in trail_tables.FIGURES]
    return environment.get_template("page.html.j2").render(
        report=report,
        audits=[_audit(i, audit, report, images or (), drawn) for i, audit in enumerate(report.audits)],
        summaries=[
            {
                "title": here.short,
                "grid": audits.summary_grid(here, [audit for _, audit in members]),
                "members": [_headline(i, audit) for i, audit in members],
            }
            for here, members in audits.summaries(report.audits)
        ],
        tradeoff=design_tables.tradeoff_grid(points) if points else None,
        tradeoff_words=design_tables.tradeoff_sentences(points),
        spread=spread(report),
        accuracy=tables.accuracy(report.runs) if report.runs else None,
        facts=[fact for fact in tables.facts(report.runs) if not fact.startswith("gradient under")],
        threats=threats(report),
        ledgers=[
            {
                "title": setting_label(s, settings(report.runs)),
                "grid": tables.ledger(runs),
                "notes": tables.run_notes(runs),
            }
            for s, runs in by_setting(report.runs).items()
        ],
        trails=[
            {
                "title": group.title,
                "chart": f"trail-{i}",
                "steps": f"steps-{i}" if f"steps-{i}" in drawn else None,
                "examples": f"examples-{i}" if f"examples-{i}" in drawn else None,
                "kinds": trail_tables.kind_grid(group, figures),
                "grid": trail_tables.trail_grid(group),
                "words": _trail_words(group),
                "caption": _trail_caption(group),
                "origins": _origins(group),
            }
            for i, group in enumerate(groups)
        ],
        ablations=[
            {"victim": a.victim, "chart": f"ablation-{i}", "grid": a.grid, "sentence": a.sentence}
            for i, a in enumerate(ablation_tables.ablations(report.trails))
        ],
        figure_claims=[c for c in comparison.comparisons(report) if c.figure in trail_tables.FIGURES],
        compared=[c for c in compared if c.grid.rows],
        unmeasured=[c for c in compared if c.rest.rows],
        cards=card_grid(report.models),
        provenance=Grid(
            "Provenance", ("what", "value"), tuple((k, value(v)) for k, v in _flat(report.provenance).items())
        ),
        examples=shown,
        gain=gain,
        drawn=drawn,
        stills={name: _still(spec) for name, spec in drawn.items()},
        specs=_script_json(drawn),
        configs=_script_json({"light": charts.config("light"), "dark": charts.config("dark")}),
        library=_library() if drawn else "",
    )


def markdown(report: Report) -> str:
    """The report for a reader of plain text: the same order, charts left out, trails by kind of operation."""
    parts = [f"# {report.title}", *report.summary, *audits.markdown(report.audits)]
    if points := design_tables.tradeoff(report):
        grid = design_tables.tradeoff_grid(points)
        parts += ["## Trade-off", grid.text(), f"{grid.caption}.", *design_tables.tradeoff_sentences(points)]
    if (grid := spread(report)) is not None:
        parts += ["## Over training seeds", grid.text(), f"{grid.caption}."]
    if report.runs or not report.audits:
        parts += ["## Accuracy", tables.table(report)]
    parts += [f"- **{label}**: {sentence}" for label, sentence in threats(report)]
    figures = [claim for claim in report.claims if claim.figure in trail_tables.FIGURES]
    for group in () if points else trail_tables.trail_groups(report.trails):
        grid = trail_tables.kind_grid(group, figures)
        parts += [
            f"## Trail: {group.title}",
            grid.text(),
            f"{grid.caption}. Every operation measured is in `trail.csv`.",
        ]
        parts += _origins(group)
    for a in ablation_tables.ablations(report.trails):
        parts += [
            f"## What is left of the zeros: {a.victim}",
            a.grid.text(),
            f"{a.grid.caption}; {a.data}.",
            a.sentence,
        ]
    measured = [c for c in comparison.comparisons(report) if c.grid.rows]
    if measured:
        parts += ["## Beside the published figures"]
    for c in measured:
        parts += [f"### {c.title}", f"- Stated: {c.stated}\n- Coded: {c.coded}", c.grid.text()]
        parts += [f"- Note: {note}" for note in c.notes]
    if report.models:
        parts += ["## Models"]
    parts += ["\n".join(f"- {key}: {value(entry)}" for key, entry in _flat(card).items()) for card in report.models]
    if report.provenance:
        parts += [
            "## Provenance",
            "\n".join(f"- {key}: {value(entry)}" for key, entry in _flat(report.provenance).items()),
        ]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def card_grid(models: Sequence[Mapping[str, Any]]) -> Grid:
    """Model cards side by side: a row per entry, a column per model."""
    names = [str(card.get("victim", card.get("name", f"model {i}"))) for i, card in enumerate(models, 1)]
    flat = [_flat({k: v for k, v in card.items() if k not in ("victim", "name")}) for card in models]
    keys = dict.fromkeys(key for card in flat for key in card)
    rows = tuple((key, *(value(card[key]) if key in card else "" for card in flat)) for key in keys)
    return Grid("Model cards", ("", *names), rows)


def _flat(entries: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested entries under one key each: {'neuron': {'kind': 'IF'}} as {'neuron, kind': 'IF'}."""
    out: dict[str, Any] = {}
    for key, entry in entries.items():
        if isinstance(entry, Mapping) and entry:
            out.update(_flat(entry, f"{path}{key}, "))
        else:
            out[f"{path}{key}"] = entry
    return out


def threats(report: Report) -> tuple[tuple[str, str], ...]:
    """Every threat of the runs: its label, and what the adversary may do; the gradient routes where routes differ."""
    among = settings(report.runs)
    flows = gradients(report.runs)
    several = len({s.route for s in among}) > 1
    spoken = {s.short: s.sentence for s in among}
    return tuple((short, f"{spoken[short]} Gradient: {flows[short]}." if several else spoken[short]) for short in flows)


def _charts(report: Report) -> dict[str, charts.Spec]:
    """All charts of the page by the id of their place."""
    out = {
        name: charts.stamped(spec, report, [report.audits[int(name.split("-")[1])]])  # audit-0-fall
        for name, spec in charts.audit_specs(report.audits).items()
    }
    if points := design_tables.tradeoff(report):  # of a sweep, a panel or a bar each would be too many to read
        return out | {"tradeoff": charts.stamped(charts.tradeoff_spec(points), report, report.runs)}
    if report.runs:
        spec = charts.accuracy_spec(report.runs, seeded(report.models))
        out["accuracy"] = charts.stamped(spec, report, report.runs)
    for i, group in enumerate(trail_tables.trail_groups(report.trails)):
        for name, spec in (
            ("trail", charts.trail_spec(group)),
            ("steps", charts.steps_spec(group)),
            ("examples", charts.examples_spec(group)),
        ):
            if spec is not None:
                out[f"{name}-{i}"] = charts.stamped(spec, report, group.trails)
    for i, a in enumerate(ablation_tables.ablations(report.trails)):
        mine = [t for t in report.trails if t.victim == a.victim]
        out[f"ablation-{i}"] = charts.stamped(charts.ablation_spec(a), report, mine)
    return out


def _headline(i: int, audit: Audit) -> dict[str, Any]:
    """Where an audit stands on the page, and its verdict with colour and sign."""
    tone, sign = audits.VERDICTS[audit.verdict]
    return {"id": f"audit-{i}", "tone": tone, "sign": sign, "verdict": audit.verdict}


def _audit(
    i: int, audit: Audit, report: Report, images: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any]
) -> dict[str, Any]:
    """What the page says about one audit."""
    here = audits.where(audit)
    shown, gain = examples([image for image in images if _audit_of(image, report) == i])
    known = {} if audit.card in report.models else audit.card  # said once
    known = {**known, "provenance": audit.provenance} if audit.provenance else known
    figures = audits.figures(audit)
    figures_said = ", ".join(figure.text() for figure in figures)
    of = audits.of_radius(audit)
    return _headline(i, audit) | {
        "victim": audit.victim,
        "threat": here.short,
        "sentence": here.sentence,
        "reason": audit.reason,
        "figures": figures,
        "claimed": audit.claim is not None,
        "fall": audits.fall(audit),
        "fall_words": f"Clean {tables.percent(audit.clean_accuracy)}, {figures_said}.",
        "words": audits.words(audit),
        "battery": audits.battery_grid(audit) if audit.runs else None,
        "battery_words": f"{audits.title(audit)}: accuracy left after each of {len(audits.battery(audit))} attacks; "
        "the numbers are in the table below.",
        "notes": tables.run_notes(audits.battery(audit)),
        "others": audits.other_grid(audit),
        "tally": audits.tally(audit),
        "checks": [
            {
                "id": f.id,
                "name": f.name,
                "tone": audits.LEVELS[f.level][0],
                "sign": audits.LEVELS[f.level][1],
                "level": f.level,
                "raised": f.level in ("warn", "fail"),
                "masking": f.masking and f.level in ("warn", "fail"),
                "value": audits.number(f.value),
                "limit": f.limit,
                "evidence": f.evidence,
                "advice": f.advice,
            }
            for f in audits.ordered(audit.findings)
        ],
        "loss": f"audit-{i}-loss" in drawn,
        "band": any(part.get("low") and part.get("high") for part in audit.curves.get("loss") or ()),
        "eps": f"audit-{i}-eps" in drawn,
        "loss_caption": audits.of_loss(audit),
        "eps_words": f"{of} The numbers are in result.json.",
        "eps_caption": of,
        "trail": any(trail.victim == audit.victim for trail in report.trails),
        "examples": shown,
        "gain": gain,
        "card": Grid("The audit", ("what", "value"), tuple((k, value(v)) for k, v in _flat(known).items()))
        if known
        else None,
    }


def _audit_of(image: Mapping[str, Any], report: Report) -> int | None:
    """The place of the audit that an image belongs to, None where it belongs to none of this report."""
    place = str(image.get("audit", ""))
    return int(place) if place.isdigit() and int(place) < len(report.audits) else None


def _trail_words(group: trail_tables.TrailGroup) -> str:
    """The trail chart in a sentence, for who cannot see it."""
    parts = []
    for label, rows in zip(group.labels, group.rows, strict=True):
        op, top = max(rows.items(), key=lambda item: item[1].zero)
        mean = sum(row.zero for row in rows.values()) / len(rows)
        parts.append(f"{label}: {tables.share(mean)} on average, most at {op} with {tables.share(top.zero)}")
    return f"Zero share over {len(group.ops)} operations. " + "; ".join(parts) + "."


def _trail_caption(group: trail_tables.TrailGroup) -> str:
    """What the trail chart shows, for who can see it."""
    bars = "the pale part of a bar is forced by geometry alone (strides and pooling windows)"
    if charts.traced(group):
        bars = (
            "pale: created there and forced by geometry alone (strides and pooling windows); solid: created there "
            "beyond that; outline: passed on, since all that arrives is zero"
        )
    return (
        "Gradient of the loss with respect to the input of each operation, in the order of the forward pass. Above: "
        f"share of exactly zero entries; {bars}. Below: L2 norm per image, logarithmic."
    )


def _origins(group: trail_tables.TrailGroup) -> list[str]:
    """Where the zeros of each trail come from, where that was measured."""
    return [
        explain(replace(trail, victim=label))
        for label, trail in zip(group.labels, group.trails, strict=True)
        if any(row.created is not None for row in trail.rows)
    ]


def _still(spec: charts.Spec) -> str:
    """A chart as an SVG data URI, for pages without JavaScript and for print."""
    import vl_convert

    svg = vl_convert.vegalite_to_svg({**spec, "config": charts.config("light")})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _script_json(data: Any) -> Any:
    """JSON that cannot end the script element it stands in."""
    from markupsafe import Markup

    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


@cache
def _library() -> Any:
    """Vega, Vega-Lite and Vega-Embed as one script (about 0.9 MB)."""
    import vl_convert
    from markupsafe import Markup

    return Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"))


def _prose(text: str) -> str:
    """Running text in which no line breaks between a number and its unit."""
    return re.sub(r"(?<=\d) (?=%|s\b|min\b|h\b)", "\u00a0", text)


def _cell(text: str) -> Any:
    """'34.0 % [31.1, 37.0]' with the interval set back; a range in brackets likewise."""
    from markupsafe import Markup

    for mark in (" [", " ("):
        head, found, rest = text.partition(mark)
        if found and text[-1:] in "])":
            return Markup(f'{html.escape(head)} <span class="aside">{html.escape(found[1:] + rest)}</span>')
    return text
