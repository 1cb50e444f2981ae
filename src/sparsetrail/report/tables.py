"""Tables as plain grids of words, drawn alike in Markdown, LaTeX, HTML and the terminal.

A column of accuracies holds one attack with its knobs under one threat, mode and gradient route, never two.
"""

import csv
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsetrail.core import Claim, Rate, Report, Run, Threat, Trail, TrailRow
from sparsetrail.report.labels import Setting, attack_words, columns, portion, setting, setting_label, settings, value

FIGURES = ("fig1", "fig3")  # claims about trails; all others are about accuracies
DASH = "\u2013"
MARKDOWN = ("github", "pipe", "plain", "simple")
Row = tuple[str, str]  # victim and data


@dataclass(frozen=True)
class Grid:
    """Words in rows and columns; the first `labels` columns name the row, `groups` spans the columns (title, width)."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1
    groups: tuple[tuple[str, int], ...] = ()

    @property
    def flat_head(self) -> tuple[str, ...]:
        """One header a column, the title of its group included."""
        titles = [title for title, width in self.groups for _ in range(width)] or [""] * len(self.head)
        return tuple(", ".join(filter(None, pair)) for pair in zip(self.head, titles, strict=True))

    @property
    def starts(self) -> tuple[int, ...]:
        """Columns that begin a group, but for the first."""
        return tuple(sum(width for _, width in self.groups[:i]) for i in range(1, len(self.groups)))

    def text(self, tablefmt: str = "github") -> str:
        """The grid drawn by tabulate."""
        from tabulate import tabulate

        align = ("left",) * self.labels + ("right",) * (len(self.head) - self.labels)
        head, rows = self.flat_head, self.rows
        if tablefmt in MARKDOWN[:2]:  # a bar would end the cell, a break the row
            head, *rows = [
                tuple(" ".join(text.split("\n")).replace("|", "\\|") for text in row) for row in (head, *rows)
            ]
        return tabulate(rows, head, tablefmt=tablefmt, colalign=align, disable_numparse=True)


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


@dataclass(frozen=True)
class TrailGroup:
    """Trails that may share a picture: the same mode, the same data, mostly the same operations."""

    title: str
    labels: tuple[str, ...]
    trails: tuple[Trail, ...]
    ops: tuple[str, ...]

    @property
    def rows(self) -> tuple[dict[str, TrailRow], ...]:
        """Per trail, its rows by operation."""
        return tuple(by_op(trail) for trail in self.trails)


# --- accuracies -------------------------------------------------------------------------------------------------


def percent(rate: Rate, *, n: bool = False) -> str:
    """A share with its 95 % Wilson interval: '34.0 % [31.1, 37.0]'."""
    full, _, count = str(rate).partition(", n=")
    return f"{full}, n={count}" if n else full


def accuracy(runs: Sequence[Run]) -> Grid:
    """Clean and robust accuracy: a row per victim and data, a column per attack and setting, clean first."""
    cells, clean, among = columns(runs), clean_columns(runs), settings(runs)
    heads = list(dict.fromkeys(column for column, _ in cells))
    names = list(dict.fromkeys(name for name, _ in clean))
    rows = list(dict.fromkeys((run.victim, run.data) for run in runs))
    several, n = len({data for _, data in rows}) > 1, len({run.n for run in runs}) > 1
    lines = []
    for row in rows:
        line = list(row) if several else [row[0]]
        line += [percent(clean[name, row], n=n) if (name, row) in clean else "" for name in names]
        line += [percent(cells[head, row].accuracy, n=n) if (head, row) in cells else "" for head in heads]
        lines.append(tuple(line))
    labels = 2 if several else 1
    return Grid(
        caption="Share of images classified correctly, with 95 % Wilson interval",
        head=("victim", *(["data"] if several else []), *names, *(head.label for head in heads)),
        rows=tuple(lines),
        labels=labels,
        groups=(
            ("", labels + len(names)),
            *((setting_label(s, among), sum(head.setting == s for head in heads)) for s in among),
        ),
    )


def clean_columns(runs: Sequence[Run]) -> dict[tuple[str, Row], Rate]:
    """Clean accuracies by (column, (victim, data)): one column if all runs agree, else split until each column does."""
    among, owner = settings(runs), {id(run): column for (column, _), run in columns(runs).items()}

    def by_run(run: Run) -> str:
        where = owner[id(run)]
        return f"clean before {where.label}, {setting_label(where.setting, among)}"

    modes: dict[Row, set[str]] = {}
    for run in runs:
        modes.setdefault((run.victim, run.data), set()).add(run.mode)
    levels: list[Callable[[Run], str]] = [lambda run: "clean", lambda run: f"clean, {run.mode} mode", by_run]
    if len(set(map(frozenset, modes.values()))) > 1:  # one victim in eval mode only, another in train mode only
        del levels[0]
    found: dict[tuple[str, Row], Rate] = {}
    for level in levels:
        found, clash = {}, False
        for run in runs:
            rate = found.setdefault((level(run), (run.victim, run.data)), run.clean_accuracy)
            clash |= rate != run.clean_accuracy
        if not clash:
            break
    return found


def per_setting(runs: Sequence[Run]) -> tuple[tuple[Setting, Grid], ...]:
    """The accuracy table cut into one grid per setting, each with the clean accuracies of its own runs."""
    among = settings(runs)
    return tuple(
        (where, replace(accuracy([run for run in runs if setting(run) == where]), caption=setting_label(where, among)))
        for where in among
    )


def facts(runs: Sequence[Run]) -> tuple[str, ...]:
    """What the numbers of the table share, to be said once; gradient routes by setting where they differ."""
    lines = []
    if len(found := {run.n for run in runs}) == 1:
        lines.append(f"n = {found.pop()} images")
    if len(names := {run.data for run in runs}) == 1:
        lines.append(f"data: {names.pop()}")
    if len(found := {run.seed for run in runs}) == 1:
        lines.append(f"seed {found.pop()}")
    among = settings(runs)
    if len({s.route for s in among}) == 1:
        lines.append(f"gradient: {among[0].route}")
    else:
        lines += [f"gradient under {setting_label(s, among)}: {s.route}" for s in among]
    return tuple(lines)


def table(report: Report, *, tablefmt: str = "github") -> str:
    """The accuracy table in any format of tabulate; in Markdown with what all its numbers share stated once below."""
    if not report.runs:
        return "No attack was run."
    drawn = accuracy(report.runs).text(tablefmt)
    if tablefmt not in MARKDOWN:
        return drawn
    return f"{drawn}\n\nShare of images classified correctly, 95 % Wilson interval; {'; '.join(facts(report.runs))}."


def ledger(runs: Sequence[Run]) -> Grid:
    """What the attacks cost and what they met: calls per image, zero gradients, examples they could not move."""
    owner = {id(run): column for (column, _), run in columns(runs).items()}
    several = len({run.data for run in runs}) > 1
    head = ("forwards", "backwards", "zero entries", "dead images", "non-finite images", "ties")
    return Grid(
        caption="What the attacks cost and met",
        head=("attack", "victim", *(["data"] if several else []), *head, "seed", "seconds"),
        rows=tuple(
            (
                owner[id(run)].label,
                run.victim,
                *([run.data] if several else []),
                f"{run.forwards / run.n:.4g}",
                f"{run.backwards / run.n:.4g}",
                share(run.zero_gradient),
                str(run.dead_examples),
                str(run.nonfinite),
                str(run.ties),
                str(run.seed),
                f"{run.seconds:.1f}",
            )
            for run in runs
        ),
        labels=3 if several else 2,
        groups=(("", 3 if several else 2), ("calls an image", 2), ("gradient", 3), ("", 3)),
    )


def run_notes(runs: Sequence[Run]) -> tuple[str, ...]:
    """The notes that runs carry, each said once with the attacks and victims it belongs to."""
    owner = {id(run): column for (column, _), run in columns(runs).items()}
    notes: dict[str, list[str]] = {}
    for run in runs:
        if run.note:
            notes.setdefault(run.note.rstrip("."), []).append(f"{owner[id(run)].label}, {run.victim}")
    return tuple(f"{'; '.join(names)}: {note}." for note, names in notes.items())


def share(x: float | None) -> str:
    """A share 0..1 in per cent, an exact zero as '0 %'; a dash where there is none."""
    if x is None or math.isnan(x):
        return DASH
    return "0 %" if x == 0 else "< 0.01 %" if 0 < x < 5e-5 else f"{100 * x:.2f} %"


# --- trails -----------------------------------------------------------------------------------------------------


def trail_groups(trails: Sequence[Trail]) -> tuple[TrailGroup, ...]:
    """Trails sorted into pictures: another mode, other data or another architecture is another picture.

    Trails of which a part was replaced have no picture: `ablations` lays them beside those of the network as it is.
    """
    bundles: list[list[Trail]] = []
    for trail in (t for t in trails if not t.replaced):
        ops = set(by_op(trail))
        for bundle in bundles:
            first, other = bundle[0], set(by_op(bundle[0]))
            if (first.mode, first.data) == (trail.mode, trail.data) and 2 * len(ops & other) >= len(ops | other):
                bundle.append(trail)
                break
        else:
            bundles.append([trail])
    out = []
    for bundle in bundles:
        first, names = bundle[0], [trail.victim for trail in bundle]
        labels = tuple(
            name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
        )
        n = {trail.n for trail in bundle}
        size = f"{n.pop()} images" if len(n) == 1 else "images: " + ", ".join(str(trail.n) for trail in bundle)
        title = f"{first.data}, {first.mode} mode, {size}"
        out.append(TrailGroup(title, labels, tuple(bundle), _merge([list(by_op(trail)) for trail in bundle])))
    return tuple(out)


def by_op(trail: Trail) -> dict[str, TrailRow]:
    """Rows by operation, in forward order; an operation met again is named 'op (2)'."""
    rows: dict[str, TrailRow] = {}
    for row in trail.rows:
        name, count = row.op, 1
        while name in rows:
            count += 1
            name = f"{row.op} ({count})"
        rows[name] = row
    return rows


def _merge(lists: Sequence[Sequence[str]]) -> tuple[str, ...]:
    order: list[str] = []
    for ops in lists:
        at = 0
        for op in ops:
            if op in order:
                at = order.index(op) + 1
            else:
                order.insert(at, op)
                at += 1
    return tuple(order)


COLUMNS: tuple[tuple[str, Callable[[TrailRow], float | None]], ...] = (  # shares of a trail that are there on request
    ("arrives", lambda r: r.inherited),
    ("created", lambda r: r.created),
    ("passed on", lambda r: r.passed),
    ("zero, float64", lambda r: r.zero64),
    ("participation", lambda r: r.participation),
    ("weight zero", lambda r: r.weight_zero),
    ("weight participation", lambda r: r.weight_participation),
)


def trail_grid(group: TrailGroup) -> Grid:
    """Every operation: kind, zero share, share forced by geometry, gradient norm, and for each victim what more it has.

    `arrives` is the zero share at the operation's output; zero is created + passed on.
    """
    rows = group.rows
    every = [row for r in rows for row in r.values()]
    more = [(name, of) for name, of in COLUMNS if any(of(row) is not None for row in every)]
    heads = ["zero", "forced", *(name for name, _ in more), "L2 norm"]
    if weighed := any(row.weight_norm is not None for row in every):
        heads.append("weight L2 norm")
    lines = []
    for op in group.ops:
        line = [op, next(r[op].kind for r in rows if op in r)]
        for r in rows:
            if op not in r:
                line += [""] * len(heads)
                continue
            row = r[op]
            line += [share(row.zero), share(row.forced), *(share(of(row)) for _, of in more), norm(row.norm)]
            if weighed:
                line.append(DASH if row.weight_norm is None else norm(row.weight_norm))
        lines.append(tuple(line))
    return Grid(
        caption="Gradient with respect to the input of each operation",
        head=("operation", "kind", *heads * len(rows)),
        rows=tuple(lines),
        labels=2,
        groups=(("", 2), *((label, len(heads)) for label in group.labels)),
    )


def norm(x: float) -> str:
    """A gradient norm with three digits."""
    return DASH if math.isnan(x) else f"{x:.2e}"


def kind_grid(group: TrailGroup, claims: Sequence[Claim]) -> Grid:
    """Zero share by kind of operation, mean and range over operations, and the paper's figure where it printed one.

    Pools stand alone: a strided max pool and the global average before the last layer have nothing in common.
    """
    kinds = list(dict.fromkeys(_family(r[op]) for op in group.ops for r in group.rows if op in r))
    figures = [f for f in FIGURES if any(claim.figure == f for claim in claims)]
    lines = []
    for kind in kinds:
        line, spoken = [kind], set()
        for r in group.rows:
            here = [row for row in r.values() if _family(row) == kind]
            line += [_mean_range([row.zero for row in here]), _mean_range([row.forced for row in here])]
            spoken |= {
                c for c in range(len(claims)) if {row.op for row in here} & {row.op for row in _spoken(claims[c], r)}
            }
        for figure in figures:
            line.append(", ".join(f"{claims[c].value:.2f} %" for c in sorted(spoken) if claims[c].figure == figure))
        lines.append(tuple(line))
    return Grid(
        caption="Exactly zero gradient entries by kind of operation, mean over operations (range)",
        head=("kind", *("zero", "forced by geometry") * len(group.labels), *(f"Figure {f[3:]}" for f in figures)),
        rows=tuple(lines),
        groups=(
            ("", 1),
            *((label, 2) for label in group.labels),
            *((f"paper, {next(_pool(c) for c in claims if c.figure == f)}", 1) for f in figures),
        ),
    )


# --- what is left of the zeros ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """Zeros left with one part replaced, all shares 0..1: of all entries, at the first operation, by kind.

    `part` is what the replacement belongs to: architecture, neuron, both, numbers or statistics; empty for the network
    as it is. `kinds` are shares of the entries of each kind, `of_all` the same zeros as shares of all entries; `left`
    is how many zeros there are for each one of the network as it is. `participation` is the mean over all entries, None
    where it was not measured.
    """

    part: str
    replaced: str
    route: str
    zero: float
    at_input: float
    kinds: tuple[float, ...]
    of_all: tuple[float, ...]
    left: float
    participation: float | None


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What becomes of the zeros of a network when parts of its backward are replaced, behind the same forward.

    The first row is the network as it is; `kinds` names the columns of every row's `kinds`.
    """

    victim: str
    data: str
    n: int
    kinds: tuple[str, ...]
    rows: tuple[AblationRow, ...]

    def removed(self, part: str) -> float:
        """Largest share of the zeros that replacing something of one part removes, 0..1."""
        return max([0.0, *(1 - row.left for row in self.rows if row.part == part)])

    @property
    def grid(self) -> Grid:
        """A row per replacement."""
        lines = [
            (
                f"{row.part}: {row.replaced}" if row.part else "none",
                share(row.zero),
                DASH if math.isnan(row.left) else f"{100 * row.left:.1f} %",
                share(row.at_input),
                share(row.participation),
                *map(share, row.kinds),
            )
            for row in self.rows
        ]
        return Grid(
            caption="Exactly zero gradient entries left, without retraining",
            head=("replaced", "all entries", "of the zeros", "first operation", "participation", *self.kinds),
            rows=tuple(lines),
            groups=(("", 5), ("entries at", len(self.kinds))),
        )

    @property
    def sentence(self) -> str:
        """Where the zeros come from, by what removes them and under no name given before."""
        base = self.rows[0]
        begin = f"{self.victim}, n={self.n}: "
        if not base.zero:
            return begin + "no gradient entry is exactly zero."
        shape, neuron, both = (self.removed(part) for part in ("architecture", "neuron", "both"))
        most = [
            name for name, removed in (("the architecture", shape), ("the spiking neurons", neuron)) if removed >= 0.5
        ]
        origin = " and of ".join(most) or "neither the architecture nor the spiking neurons alone"
        text = (
            f"{begin}of the zeros in its gradients ({portion(base.zero)} of all entries) another backward of pools and "
            f"strided convolutions removes {portion(shape)}, another backward of the neurons {portion(neuron)}, both "
            f"together {portion(both)}, float64 {portion(self.removed('numbers'))}: they are the work of {origin}"
        )
        worst = max((row for row in self.rows if row.part == "neuron"), key=lambda row: row.left, default=base)
        if worst.left > 1.01:
            text += f"; with {worst.replaced} the neurons would bring them to {portion(worst.zero)} of all entries"
        return text + "."


def ablations(trails: Sequence[Trail]) -> tuple[Ablation, ...]:
    """One table per victim and data of which a trail with something replaced was taken; its own trail comes first."""
    out = []
    for base in trails:
        mine = [t for t in trails if (t.victim, t.data) == (base.victim, base.data)]
        if base.replaced or base.mode != "eval" or not any(t.replaced for t in mine):
            continue
        kinds = {op: _kind(row) for op, row in by_op(base).items()}
        rows = [_ablated(base, "", base, kinds, lambda r: r.zero)]
        rows += [_ablated(t, t.replaced, base, kinds, lambda r: r.zero) for t in mine if t.replaced]
        if all(row.zero64 is not None for row in base.rows):
            rows.append(_ablated(base, "numbers: float64", base, kinds, lambda r: r.zero64 or 0.0))
        rows += [
            _ablated(t, "statistics: batch (train mode)", base, kinds, lambda r: r.zero)
            for t in mine
            if t.mode == "train" and not t.replaced
        ]
        out.append(
            Ablation(
                victim=base.victim,
                data=base.data,
                n=base.n,
                kinds=tuple(dict.fromkeys(kinds.values())),
                rows=tuple(rows),
            )
        )
    return tuple(out)


def _ablated(
    trail: Trail, replaced: str, base: Trail, kinds: dict[str, str], zero: Callable[[TrailRow], float]
) -> AblationRow:
    zeros, entries = dict.fromkeys(kinds.values(), 0.0), dict.fromkeys(kinds.values(), 0)
    for op, row in by_op(trail).items():
        if op in kinds:
            zeros[kinds[op]] += zero(row) * row.entries
            entries[kinds[op]] += row.entries
    part, _, words = replaced.partition(": ")
    known = [(row.participation, row.entries) for row in trail.rows if row.participation is not None]
    weight = sum(entries for _, entries in known)
    before, after, every = sum(r.zero * r.entries for r in base.rows), sum(zeros.values()), sum(entries.values())
    return AblationRow(
        part=part,
        replaced=words,
        route=trail.route,
        zero=after / every,
        at_input=zero(trail.rows[0]),
        kinds=tuple(zeros[k] / entries[k] for k in zeros),
        of_all=tuple(zeros[k] / every for k in zeros),
        left=after / before if before else math.nan,
        participation=sum(p * entries for p, entries in known) / weight if weight and part != "numbers" else None,
    )


def _kind(row: TrailRow) -> str:
    """As `_family`; a convolution that leaves cells of its input out stands apart."""
    return "conv that leaves cells out" if row.kind == "conv" and row.forced else _family(row)


def ablation_csv(found: Sequence[Ablation]) -> str:
    """One row a replacement and kind of operation ('all' and 'first operation' too): the zero share 0..1 left."""
    rows = [
        (
            a.victim,
            a.data,
            a.n,
            row.part,
            row.replaced,
            row.route,
            kind,
            zero,
            row.participation if kind == "all" else None,
        )
        for a in found
        for row in a.rows
        for kind, zero in (("all", row.zero), ("first operation", row.at_input), *zip(a.kinds, row.kinds, strict=True))
    ]
    return as_csv(("victim", "data", "n", "part", "replaced", "route", "kind", "zero", "participation"), rows)


def origins_csv(trails: Sequence[Trail]) -> str:
    """All that is known of every operation of every trail, shares 0..1; empty where it was not asked for."""
    names = ("zero", "forced", "inherited", "created", "passed", "zero64", "participation", "norm", "entries")
    names += ("weight_zero", "weight_participation", "weight_norm")
    rows = [
        (t.victim, t.mode, t.data, t.n, t.route, t.replaced, i, r.op, r.kind, *(getattr(r, name) for name in names))
        for t in trails
        for i, r in enumerate(t.rows)
    ]
    return as_csv(("victim", "mode", "data", "n", "route", "replaced", "order", "op", "kind", *names), rows)


def examples_csv(trails: Sequence[Trail]) -> str:
    """Zero share 0..1 of every image (from 0), one row an operation and image."""
    rows = [
        (t.victim, t.mode, t.data, t.replaced, i, r.op, r.kind, image, zero)
        for t in trails
        for i, r in enumerate(t.rows)
        for image, zero in enumerate(r.per_example or ())
    ]
    return as_csv(("victim", "mode", "data", "replaced", "order", "op", "kind", "image", "zero"), rows)


def as_csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Comma-separated values; None is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([head, *rows])
    return out.getvalue()


# --- the trade-off ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Point:
    """One design under one threat: clean accuracy, the worst case over its attacks, and how dense its gradients are.

    `density` is the share of gradient entries that are not zero over all operations, None where there is no trail;
    `strongest` is the attack that leaves least on its own.
    """

    victim: str
    design: str
    factor: str
    threat: Threat
    clean: Rate
    robust: Rate
    attacks: int
    strongest: str
    density: float | None


def tradeoff(report: Report) -> tuple[Point, ...]:
    """The points of a sweep: of every model whose card names a `factor`, under every threat it was attacked with."""
    points = []
    trails = {t.victim: t for t in report.trails if not t.replaced and t.mode == "eval"}
    for card in (c for c in report.models if "factor" in c and "clean" in c):
        mine = [run for run in report.runs if run.victim == card["name"] and run.mode == "eval"]
        for threat, data in dict.fromkeys((run.threat, run.data) for run in mine):
            here = [run for run in mine if (run.threat, run.data) == (threat, data)]
            standing = [all(flags) for flags in zip(*(run.robust for run in here), strict=True)]
            least = min(here, key=lambda run: sum(run.robust))
            trail = trails.get(card["name"])
            entries = 0 if trail is None else sum(row.entries for row in trail.rows)
            zeros = 0.0 if trail is None else sum(row.zero * row.entries for row in trail.rows)
            points.append(
                Point(
                    victim=card["name"],
                    design=str(card.get("design", card["name"])),
                    factor=str(card["factor"]),
                    threat=threat,
                    clean=Rate(card["clean"]["k"], card["clean"]["n"]),
                    robust=Rate(sum(standing), len(standing)),
                    attacks=len(here),
                    strongest=" ".join(filter(None, (attack_words(least)[0], attack_words(least)[2]))),
                    density=1 - zeros / entries if entries else None,
                )
            )
    return tuple(points)


def undominated(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one accuracy without losing in the other, by clean accuracy."""

    def beaten(p: Point) -> bool:
        return any(
            q.clean.value >= p.clean.value
            and q.robust.value >= p.robust.value
            and (q.clean.value, q.robust.value) != (p.clean.value, p.robust.value)
            for q in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: p.clean.value)


def tradeoff_sentences(points: Sequence[Point]) -> tuple[str, ...]:
    """For each threat: is there a trade-off, does it go with density, and which designs no other dominates."""
    lines = []
    for threat in dict.fromkeys(p.threat for p in points):
        here = [p for p in points if p.threat == threat]
        text = f"{threat}, worst of {here[0].attacks} attacks, {len(here)} networks: "
        pairs = [("clean and robust accuracy", [(p.clean.value, p.robust.value) for p in here])]
        known = [(p.density, p) for p in here if p.density is not None]
        pairs.append(("density and robust accuracy", [(d, p.robust.value) for d, p in known]))
        pairs.append(("density and clean accuracy", [(d, p.clean.value) for d, p in known]))
        found = [(name, r) for name, pair in pairs if (r := rank_correlation(pair)) is not None]
        if found:
            chance = min(1.0, 1.96 / math.sqrt(len(here) - 1))
            text += "rank correlation of " + ", of ".join(f"{name} {r:+.2f}" for name, r in found)
            text += f" (within {chance:.2f} of 0 is chance); "
        lines.append(f"{text}not dominated: {', '.join(p.victim for p in undominated(here))}.")
    return tuple(lines)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, ties by their mean rank; None for fewer than three pairs or where one side does not vary."""
    if len(pairs) < 3:
        return None
    sides = []
    for side in zip(*pairs, strict=True):
        order = sorted(side)
        sides.append([order.index(v) + (order.count(v) - 1) / 2 for v in side])
    try:
        return statistics.correlation(*sides)
    except statistics.StatisticsError:
        return None


def tradeoff_grid(points: Sequence[Point]) -> Grid:
    """A row per network and threat, the number of images in the head where it is one, else in the cells."""
    sizes = [{p.clean.n for p in points}, {p.robust.n for p in points}]
    clean, worst = (
        f"{name}, n={next(iter(ns))}" if len(ns) == 1 else name
        for name, ns in zip(("clean", "worst case"), sizes, strict=True)
    )
    caption = "Clean accuracy and worst case per image, with 95 % Wilson intervals"
    if any(p.clean.n != p.robust.n for p in points):
        caption += "; the two are of different sets of images, so the worst case can come out above clean"
    return Grid(
        caption=caption,
        head=("network", "threat", clean, worst, "strongest attack alone", "gradient density"),
        rows=tuple(
            (p.victim, str(p.threat), percent(p.clean, n=len(sizes[0]) > 1), percent(p.robust, n=len(sizes[1]) > 1),
             p.strongest, share(p.density))
            for p in points
        ),
        labels=2,
    )  # fmt: skip


def tradeoff_csv(points: Sequence[Point]) -> str:
    """One row a network and threat: counts, intervals and density, shares 0..1."""
    head = ("victim", "design", "factor", "threat", "clean_k", "clean_n", "clean_low", "clean_high", "robust_k",
            "robust_n", "robust_low", "robust_high", "attacks", "density")  # fmt: skip
    rows = [
        (p.victim, p.design, p.factor, str(p.threat), p.clean.k, p.clean.n, *p.clean.interval(), p.robust.k, p.robust.n,
         *p.robust.interval(), p.attacks, p.density)
        for p in points
    ]  # fmt: skip
    return as_csv(head, rows)


def _family(row: TrailRow) -> str:
    if "pool" not in row.kind.lower():
        return row.kind
    return row.kind if row.op == row.kind else f"{row.kind}, {row.op}"


def _spoken(claim: Claim, rows: dict[str, TrailRow]) -> list[TrailRow]:
    """The operations of a trail that a claim of Figure 1 or 3 speaks of: its neurons, or its first pool."""
    kinds = {"neuron": ("neuron", "if", "lif", "plif", "ifnode", "lifnode"), "pool": ("pool", "maxpool2d", "avgpool2d")}
    wanted = str(claim.conditions.get("operation"))
    found = [row for row in rows.values() if row.kind.lower() in kinds.get(wanted, ())]
    return found[:1] if wanted == "pool" else found


def _pool(claim: Claim) -> str:
    pool = claim.conditions.get("pool")
    return {"max": "max pooling", "avg": "average pooling"}.get(str(pool), str(pool))


def _mean_range(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = share(sum(values) / len(values))
    return mean if len(set(values)) == 1 else f"{mean} ({100 * min(values):.1f}{DASH}{100 * max(values):.1f})"


# --- published figures ------------------------------------------------------------------------------------------

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
            here = [row.zero for row in _spoken(claim, by_op(trail))]
            if here and _same_model(claim, trail.victim, card):
                head = (f"mean of operations (range), {trail.data}", f"clean images, {trail.mode} mode")
                out.append(((i, _described(trail.victim, card, claim)), head, _mean_range(here)))
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
    model, pool = _bare(str(claim.conditions.get("model", claim.row))), str(claim.conditions.get("pool", ""))
    if str(card.get("defence") or "none") != str(claim.conditions.get("defence") or "none"):
        return False
    arch = card.get("arch", card.get("architecture", card.get("model")))
    if arch is not None and "pool" in card:
        return _bare(str(arch)) == model and card["pool"] == pool
    return _bare(victim).startswith(model) and pool in re.split(r"[^a-z0-9]+", victim.lower())


def _same_data(dataset: str, data: str) -> bool:
    """Whether 'cifar10/test, 1000 images' is CIFAR-10: not CIFAR-100, not CIFAR10-DVS."""
    name = "[-_ ]?".join(map(re.escape, re.findall(r"[a-z]+|\d+", dataset.lower())))
    return bool(re.search(rf"(?<![a-z0-9]){name}(?!\d|[-_ ]?dvs)", data.lower()))


def _described(victim: str, card: dict[str, Any], claim: Claim) -> str:
    """Our model and, in brackets, where its card differs from the conditions of the claim."""
    apart = [
        f"{key} {value(card[key])}, paper {value(claim.conditions[other])}"
        for key, other in KNOWN.items()
        if key in card and other in claim.conditions and _bare(str(card[key])) != _bare(str(claim.conditions[other]))
    ]
    return f"{victim} ({'; '.join(apart)})" if apart else victim


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
