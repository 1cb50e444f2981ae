"""A report in the terminal: what a person wants to see at the end."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsetrail.core import Audit, Report
from sparsetrail.report import audits as words
from sparsetrail.report.ablation_tables import ablations
from sparsetrail.report.design_tables import tradeoff, tradeoff_grid
from sparsetrail.report.seeds import spread
from sparsetrail.report.tables import Grid, facts, per_setting, table
from sparsetrail.report.trail_tables import FIGURES, kind_grid, trail_groups

if TYPE_CHECKING:
    from rich.console import Console

TONES = {"good": "green", "warn": "yellow", "bad": "red", "none": "dim"}


def console(report: Report, console: "Console") -> None:
    """An accuracy table a threat, verdicts of audits, zero shares by kind of operation.

    Audits beside other runs are a row each, told at length in the report's other forms.
    """
    from rich.text import Text

    for _, grid in per_setting(report.runs):
        draw(grid, console)
    if (grid := spread(report)) is not None:
        draw(Grid(grid.caption, grid.flat_head, grid.rows), console)
    if report.runs:
        console.print(Text(f"95 % Wilson intervals; {'; '.join(facts(report.runs))}", style="dim"))
        _audits_in_short(report.audits, console)
    else:
        show_audits(report.audits, console)
    figures = [claim for claim in report.claims if claim.figure in FIGURES]
    for group in trail_groups(report.trails):
        grid = kind_grid(group, figures)
        keep = [i for i, name in enumerate(grid.head) if not name.startswith("forced")]  # at length in the other forms
        head = tuple(grid.flat_head[i].removeprefix("zero, ") for i in keep)
        rows = tuple(tuple(row[i] for i in keep) for row in grid.rows)
        draw(Grid(f"{grid.caption}; {group.title}", head, rows), console)


def text_tables(report: Report, tablefmt: str) -> str:
    """All tables of a report in a format of tabulate: accuracy, audits, ablations, sweeps, zeros by kind."""
    grids = [grid for here, held in words.summaries(report.audits) for grid in
             (words.summary_grid(here, [a for _, a in held]), *(words.battery_grid(a) for _, a in held))]  # fmt: skip
    grids += [
        replace(a.grid, caption=f"{a.grid.caption}; {a.victim}, eval mode, {a.data}") for a in ablations(report.trails)
    ]
    points = tradeoff(report)
    grids += [tradeoff_grid(points)] if points else []
    figures = [claim for claim in report.claims if claim.figure in FIGURES]
    for group in () if points else trail_groups(report.trails):  # of a sweep one column a design: on the page
        grid = kind_grid(group, figures)
        grids.append(replace(grid, caption=f"{grid.caption}; {group.title}"))
    grids += [grid] if (grid := spread(report)) is not None else []
    told = [table(report, tablefmt=tablefmt)] if report.runs or not grids else []
    if report.runs and tablefmt.startswith("latex"):
        told.append("\n".join(f"% {fact}" for fact in facts(report.runs)))
    mark = "% " if tablefmt.startswith("latex") else ""
    return "\n\n".join([*told, *(f"{mark}{grid.caption}\n\n{grid.text(tablefmt)}" for grid in grids)])


def _audits_in_short(audits: Sequence[Audit], console: "Console") -> None:
    """A table a threat, a row an audit; then the checks that are raised, by name."""
    from rich.text import Text

    for here, members in words.summaries(audits):
        grid = words.summary_grid(here, [audit for _, audit in members])
        draw(replace(grid, caption=f"audit, {grid.caption}"), console)
        for _, audit in members:
            raised = ", ".join(f"{words.level(f)}: {f.id} {f.name}" for f in words.ordered(audit.alarms))
            if raised:
                console.print(Text(f"{audit.victim}: {raised}", style="dim"))


def show_audits(audits: Sequence[Audit], console: "Console") -> None:
    """Per audit the battery, the checks that are raised, and last, where the eye rests, the verdict."""
    from rich.padding import Padding
    from rich.text import Text

    for audit in audits:
        draw(words.short_grid(audit), console)
        if audit.alarms:
            console.print(Padding(Text("Checks raised", style="bold"), (1, 0, 0, 0)))
        for finding in words.ordered(audit.alarms):
            tone = TONES[words.LEVELS[finding.level][0]]
            value = f"{words.number(finding.value)}, limit {finding.limit}; " if finding.limit else ""
            line = Text.assemble(
                (words.level(finding), tone), f"  {finding.id} {finding.name}: {value}{finding.evidence}"
            )
            if finding.advice:
                line.append(f" \u2192 {finding.advice}", style="dim")
            console.print(Padding(line, (0, 0, 0, 2)))
        console.print(Text(f"checks: {words.tally(audit)}; {'; '.join(words.words(audit))}", style="dim"))
        tone, sign = words.VERDICTS[audit.verdict]
        said = [figure.text() for figure in words.figures(audit)]
        console.print(Padding(Text(f" {words.ARROW} ".join(said)), (1, 0, 0, 0)))
        console.print(Text.assemble((f"{sign} {audit.verdict}", f"bold {TONES[tone]}"), f": {audit.reason}"))


def draw(grid: Grid, console: "Console") -> None:
    """The grid as one table, or as several under each other where the terminal is too narrow for all columns."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    def width(i: int) -> int:
        words = [*grid.head[i].split(), *(line for row in grid.rows for line in str(_two_lines(row[i])).split("\n"))]
        return max(map(len, words)) + 3  # of padding and the line between

    label = list(range(grid.labels))
    room = console.width - sum(min(24, width(i)) for i in label)
    parts: list[list[int]] = [[]]
    for i in range(grid.labels, len(grid.head)):
        if parts[-1] and sum(map(width, parts[-1])) + width(i) > room:
            parts.append([])
        parts[-1].append(i)
    for number, part in enumerate(parts):
        title = Text(grid.caption + (", continued" if number else ""), style="bold")
        drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for i in label + part:
            drawn.add_column(Text(grid.head[i], overflow="fold"), justify="left" if i in label else "right")
        for row in grid.rows:
            drawn.add_row(*(Text(row[i]) if i in label else _two_lines(row[i]) for i in label + part))
        console.print(Padding(drawn, (1, 0, 0, 0)))


def _two_lines(cell: str) -> Any:
    """A number, and what stands in brackets behind it dimmed on a second line."""
    from rich.text import Text

    at = max(cell.find(" ["), cell.find(" ("))
    return Text(cell) if at < 0 else Text.assemble(cell[:at], (f"\n{cell[at + 1 :]}", "dim"), no_wrap=True)
