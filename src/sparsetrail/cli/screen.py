"""What the terminal shows while work goes on: a live bar on a terminal, elsewhere a plain line every 30 s to 2 min."""

import re
import signal
import sys
import textwrap
import threading
import time
from dataclasses import replace
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsetrail.report.tables import Grid
from sparsetrail.report.terminal import draw

EVERY = 30.0  # seconds between plain lines, at least
SILENCE = 120.0  # after which a line says that work goes on

LABEL = 22  # letters of a row's name on one line


def show(grid: Grid) -> None:
    """A table on stdout; where the terminal is too narrow, words go on several lines and columns into several tables.

    Nothing is cut off: a column is as wide as its longest cell or the longest word of its head.
    """
    console, grid = Console(), replace(grid, head=grid.flat_head, groups=())
    if max(map(len, grid.text("simple").split("\n"))) > console.width:
        cells = zip(*grid.rows, strict=True)
        columns = [[textwrap.fill(cell, LABEL) for cell in column] if i < grid.labels else list(column)
                   for i, column in enumerate(cells)]  # fmt: skip
        widths = [
            max(len(part) for text in (*head.split(), *column) for part in re.split(r"\n| (?=[\[(])", text))
            for head, column in zip(grid.head, columns, strict=True)
        ]
        heads = tuple(textwrap.fill(head, width) for head, width in zip(grid.head, widths, strict=True))
        grid = replace(grid, head=heads, rows=tuple(zip(*columns, strict=True)))
    draw(grid, console)


class Screen:
    """Progress on stderr, so that stdout stays clean for results; and the first Ctrl-C asks for an orderly stop."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self.quiet = quiet
        self.stopping = False
        self.last, self.started = 0.0, time.monotonic()
        self.begun: dict[str, tuple[float, int]] = {}  # per task: when it was first heard of, and how far it was
        self.at: dict[str, int] = {}  # how far it is
        self.now = ""  # where the work is, in words
        self.over = threading.Event()
        self.progress: Progress | None = None
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Screen":
        self.before = {s: signal.signal(s, self._signal) for s in (signal.SIGINT, signal.SIGTERM)}
        if self.live:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
            )
            self.progress.start()
        elif not self.quiet:
            threading.Thread(target=self._breathe, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.progress is not None:
            self.progress.stop()
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def stop(self) -> bool:
        """Has the user asked to stop?"""
        return self.stopping

    def tick(self, task: str, done: int, total: int, note: str) -> None:
        """`done` of `total` of a task; done < 0 is a message about it. One that goes back is another of that name."""
        if self.quiet:
            return
        if done < 0:
            self.say(f"{task}: {note}")
            return
        fresh = done < self.at.get(task, sys.maxsize)
        if fresh:
            self.begun[task] = (time.monotonic(), done)
        self.at[task], self.now = done, f"{task}  {done}/{total}"
        if self.progress is not None:
            if task not in self.tasks:
                self.tasks[task] = self.progress.add_task(task, total=total, note=note)
            elif fresh:
                self.progress.reset(self.tasks[task], total=total)
            self.progress.update(self.tasks[task], completed=done, total=total, note=note)
        elif done == total or time.monotonic() - self.last > (1 if fresh else EVERY):
            now = time.monotonic()
            left = "" if fresh or done in (0, total) else f"  {self._left(task, done, total):.0f} s left"
            self.say(f"{now - self.started:6.0f} s  {self.now}  {note}".rstrip() + left)
            self.last = now

    def _breathe(self) -> None:
        """A line where a single step of the work takes so long that nothing else is said."""
        while not self.over.wait(SILENCE / 4):
            now = time.monotonic()
            if self.now and now - max(self.last, self.started) > SILENCE:
                self.say(f"{now - self.started:6.0f} s  {self.now}  still at work")
                self.last = now

    def _left(self, task: str, done: int, total: int) -> float:
        """Seconds that the task still needs at the pace it has kept."""
        since, first = self.begun[task]
        return (time.monotonic() - since) / max(1, done - first) * (total - done)

    def say(self, line: str) -> None:
        """One line of plain text."""
        if not self.quiet:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:  # the second one means now
            signal.signal(number, signal.SIG_DFL)
            sys.exit(130)
        self.stopping = True
        self.say("stopping after the current batch; once more to stop at once")
