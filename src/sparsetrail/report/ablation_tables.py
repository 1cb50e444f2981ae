"""What is left of a network's zeros when parts of its backward are replaced."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsetrail.core import Trail, TrailRow
from sparsetrail.report.labels import portion
from sparsetrail.report.tables import DASH, Grid, as_csv, share
from sparsetrail.report.trail_tables import by_op, family

KINDS = ("conv", "conv that leaves cells out", "norm", "pool", "neuron", "linear")  # each with a colour of its own


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

    @property
    def name(self) -> str:
        """What is replaced, with the part it belongs to."""
        return f"{self.part}: {self.replaced}" if self.part else "nothing replaced"


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
                row.name,
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
        begin = f"{self.victim}, eval mode, n={self.n}: "
        if not base.zero:
            return begin + "no gradient entry is exactly zero."
        there = {row.part for row in self.rows}
        words = {
            "architecture": "another backward of pools and strided convolutions removes",
            "neuron": "another backward of the neurons removes",
            "both": "both together",
            "numbers": "float64",
        }
        told = [f"{said} {portion(self.removed(part))}" for part, said in words.items() if part in there]
        every = {"architecture": "the architecture", "neuron": "the spiking neurons"}
        names = {part: name for part, name in every.items() if part in there}
        most = [name for part, name in names.items() if self.removed(part) >= 0.5]
        work = f"they are the work of {' and of '.join(most)}"
        if not most:
            neither = "the work of neither" if len(names) > 1 else "not the work of"
            work = f"they are {neither} {' nor '.join(names.values())} alone"
        text = f"{begin}of the zeros in its gradients ({portion(base.zero)} of all entries) {', '.join(told)}: {work}"
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
    """As `family`; a convolution that leaves cells of its input out stands apart."""
    return "conv that leaves cells out" if row.kind == "conv" and row.forced else family(row)


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
