"""Ours beside the published figures of the same threat, never in one column."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsetrail.core import Claim, Report
from sparsetrail.report.labels import Setting, bare, columns, setting_label, settings, value
from sparsetrail.report.tables import Grid, Row, clean_columns, percent
from sparsetrail.report.trail_tables import FIGURES, by_op, mean_range, spoken_of


@dataclass(frozen=True)
class Comparison:
    """Published figures of one threat: those with ours beside them in `grid`, those without in `rest`."""

    figure: str
    title: str
    stated: str
    coded: str
    grid: Grid
    rest: Grid
    notes: tuple[str, ...]


KNOWN = {  # what a model card and a claim both say: (key of the card, key of the conditions)
    "width": "width",
    "stem": "stem",
    "steps": "time_steps",
    "encoder": "encoder",
    "epochs": "epochs",
}


def comparisons(report: Report) -> tuple[Comparison, ...]:
    """Published figures grouped by the threat they were published under, ours beside them, each threat a column."""
    cards = _cards(report)
    bundles: dict[tuple[str, str, str], list[Claim]] = {}
    for claim in report.claims:
        bundles.setdefault((claim.figure, claim.stated, claim.coded), []).append(claim)
    return tuple(_compare(report, cards, claims) for claims in bundles.values())


def compare(report: Report, *, tablefmt: str = "github") -> str:
    """Ours beside the published figures, as text: one table a published threat, which is stated above it."""
    blocks = []
    for c in comparisons(report):
        blocks.append("\n".join([f"{c.title}.", f"Stated: {c.stated}", f"Coded: {c.coded}"]))
        blocks += [grid.text(tablefmt) for grid in (c.grid, c.rest) if grid.rows]
        blocks += [f"Note: {note}" for note in c.notes]
    return "\n\n".join(blocks) or "No published figure is attached."


def _compare(report: Report, cards: dict[str, dict[str, Any]], claims: Sequence[Claim]) -> Comparison:
    figure = claims[0].figure
    ours = _trail_cells(report, cards, claims) if figure in FIGURES else _run_cells(report, cards, claims)
    heads = list(dict.fromkeys(head for _, head, _ in ours))
    sets = list(dict.fromkeys(claim.dataset for claim in claims))
    several = len(sets) > 1
    lines, rest = [], []
    for i, claim in enumerate(claims):
        first = (claim.row, claim.dataset) if several else (claim.row,)
        printed = f"{claim.value:.2f} {claim.unit}"
        mine: dict[str, dict[tuple[str, str], str]] = {}
        for (j, victim), head, cell in ours:
            if i == j:
                mine.setdefault(victim, {})[head] = cell
        lines += [(*first, v, printed, *(cells.get(head, "") for head in heads)) for v, cells in mine.items()]
        if not mine:
            rest.append((*first, "not measured", printed))
    name = f"{'Table' if figure.startswith('table') else 'Figure'} {figure[-1]}"
    start = ("row", "data", "ours", name) if several else ("row", "ours", name)
    spans: list[tuple[str, int]] = [("", len(start) - 1), ("published", 1)]
    for title, members in itertools.groupby(title for _, title in heads):
        spans.append((title, len(list(members))))
    source = claims[0].source
    return Comparison(
        figure=figure,
        title=f"{name}, {claims[0].metric}" + ("" if several or sets[0] == "not stated" else f", {sets[0]}"),
        stated=claims[0].stated,
        coded=claims[0].coded,
        grid=Grid(source, (*start, *(head for head, _ in heads)), tuple(lines), len(start) - 1, tuple(spans)),
        rest=Grid(source, start, tuple(rest), len(start) - 1, (("", len(start) - 1), ("published", 1))),
        notes=tuple(dict.fromkeys(c.conditions["note"] for c in claims if c.conditions.get("note"))),
    )


def _answers(claim: Claim, where: Setting) -> str:
    """Whether a setting of ours is the threat a claim states or the one its code runs, in words."""

    def same(which: str, mode: str | None) -> bool:
        eps, space = claim.conditions.get(f"eps_{which}"), claim.conditions.get(f"space_{which}")
        near = eps is not None and math.isclose(eps, where.threat.eps, rel_tol=1e-6) and where.threat.norm == "linf"
        return near and space == where.threat.space and mode in (None, where.mode)

    # a text that is silent about BatchNorm is read as eval mode, as everyone else attacks
    stated, coded = same("stated", "eval"), same("coded", claim.conditions.get("mode_coded"))
    return "as stated and coded" if stated and coded else "as stated" if stated else "as coded" if coded else ""


Cell = tuple[tuple[int, str], tuple[str, str], str]  # (claim, our model), (column, its threat), text


def _run_cells(report: Report, cards: dict[str, dict[str, Any]], claims: Sequence[Claim]) -> list[Cell]:
    among, cells = settings(report.runs), columns(report.runs)
    clean = clean_columns(report.runs)
    n = len({run.n for run in report.runs}) > 1
    out: list[Cell] = []
    for i, claim in enumerate(claims):
        attack = claim.conditions.get("attack")

        def ours(row: Row, i: int = i, claim: Claim = claim) -> tuple[int, str] | None:
            card = cards.get(row[0], {})
            same = _same_data(claim.dataset, row[1]) and _same_model(claim, row[0], card)
            return (i, _described(row[0], card, claim)) if same else None

        if attack in (None, "none"):
            for (name, row), rate in clean.items():
                if key := ours(row):
                    out.append((key, (name, "no attack"), percent(rate, n=n)))
            continue
        for (column, row), run in cells.items():
            if run.attack.lower().split()[0] == attack and (key := ours(row)):
                answers, group = _answers(claim, column.setting), setting_label(column.setting, among)
                title = f"{group} ({answers})" if answers else group
                out.append((key, (column.label, title), percent(run.accuracy, n=n)))
    order = list(dict.fromkeys(group for _, (_, group), _ in out))  # columns of one threat stand side by side
    return sorted(out, key=lambda cell: order.index(cell[1][1]))


def _trail_cells(report: Report, cards: dict[str, dict[str, Any]], claims: Sequence[Claim]) -> list[Cell]:
    out: list[Cell] = []
    for i, claim in enumerate(claims):
        for trail in report.trails:
            card = cards.get(trail.victim, {})
            here = [row.zero for row in spoken_of(claim, by_op(trail))]
            if here and _same_model(claim, trail.victim, card):
                head = (f"mean of operations (range), {trail.data}", f"clean images, {trail.mode} mode")
                out.append(((i, _described(trail.victim, card, claim)), head, mean_range(here)))
    return out


def _cards(report: Report) -> dict[str, dict[str, Any]]:
    """Model cards by victim, nested entries lifted to the top."""
    cards = {}
    for card in report.models:
        flat: dict[str, Any] = {}
        for part in (card, *(v for v in card.values() if isinstance(v, dict))):
            for key, entry in part.items():
                flat.setdefault(key, entry)
        cards[str(card.get("victim", card.get("name", "")))] = flat
    return cards


def _same_model(claim: Claim, victim: str, card: dict[str, Any]) -> bool:
    model, pool = bare(str(claim.conditions.get("model", claim.row))), str(claim.conditions.get("pool", ""))
    if str(card.get("defence") or "none") != str(claim.conditions.get("defence") or "none"):
        return False
    arch = card.get("arch", card.get("architecture", card.get("model")))
    if arch is not None and "pool" in card:
        return bare(str(arch)) == model and card["pool"] == pool
    return bare(victim).startswith(model) and pool in re.split(r"[^a-z0-9]+", victim.lower())


def _same_data(dataset: str, data: str) -> bool:
    """Whether 'cifar10/test, 1000 images' is CIFAR-10: not CIFAR-100, not CIFAR10-DVS."""
    name = "[-_ ]?".join(map(re.escape, re.findall(r"[a-z]+|\d+", dataset.lower())))
    return bool(re.search(rf"(?<![a-z0-9]){name}(?!\d|[-_ ]?dvs)", data.lower()))


def _described(victim: str, card: dict[str, Any], claim: Claim) -> str:
    """Our model and, in brackets, where its card differs from the conditions of the claim."""
    apart = [
        f"{key} {value(card[key])}, paper {value(claim.conditions[other])}"
        for key, other in KNOWN.items()
        if key in card and other in claim.conditions and bare(str(card[key])) != bare(str(claim.conditions[other]))
    ]
    return f"{victim} ({'; '.join(apart)})" if apart else victim
