"""Tables as plain grids of words, drawn alike in Markdown, LaTeX, HTML and the terminal; those of runs.

A column of accuracies holds one attack with its knobs under one threat, mode and gradient route, never two.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsetrail.core import Rate, Report, Run
from sparsetrail.report.labels import Setting, by_setting, columns, gradients, setting_label, settings

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
        (where, replace(accuracy(here), caption=setting_label(where, among)))
        for where, here in by_setting(runs).items()
    )


def facts(runs: Sequence[Run]) -> tuple[str, ...]:
    """What the numbers of the table share, to be said once; gradient routes by threat where they differ."""
    lines = []
    if len(found := {run.n for run in runs}) == 1:
        lines.append(f"n = {found.pop()} images")
    if len(names := {run.data for run in runs}) == 1:
        lines.append(f"data: {names.pop()}")
    if seeds := sorted({run.seed for run in runs}):
        lines.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    flows = gradients(runs)
    if len({s.route for s in settings(runs)}) == 1:
        lines.append(f"gradient: {next(iter(flows.values()))}")
    else:
        lines += [f"gradient under {short}: {route}" for short, route in flows.items()]
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


def as_csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated values; None is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([head, *rows])
    return out.getvalue()
