"""Tables of trails: every operation, kinds of operation beside the paper's figures, and the CSVs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsetrail.core import Claim, Trail, TrailRow
from sparsetrail.report.tables import DASH, Grid, as_csv, share

FIGURES = ("fig1", "fig3")  # claims about trails; all others are about accuracies


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
    kinds = list(dict.fromkeys(family(r[op]) for op in group.ops for r in group.rows if op in r))
    figures = [f for f in FIGURES if any(claim.figure == f for claim in claims)]
    lines = []
    for kind in kinds:
        line, spoken = [kind], set()
        for r in group.rows:
            here = [row for row in r.values() if family(row) == kind]
            line += [mean_range([row.zero for row in here]), mean_range([row.forced for row in here])]
            spoken |= {
                c for c in range(len(claims)) if {row.op for row in here} & {row.op for row in spoken_of(claims[c], r)}
            }
        for figure in figures:
            line.append(", ".join(_printed(claims[c]) for c in sorted(spoken) if claims[c].figure == figure))
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


def family(row: TrailRow) -> str:
    """The kind of an operation; a pool stands alone, by its name."""
    if "pool" not in row.kind.lower():
        return row.kind
    return row.kind if row.op == row.kind else f"{row.kind}, {row.op}"


def spoken_of(claim: Claim, rows: dict[str, TrailRow]) -> list[TrailRow]:
    """The operations of a trail that a claim of Figure 1 or 3 speaks of: its neurons, or its first pool."""
    kinds = {"neuron": ("neuron", "if", "lif", "plif", "ifnode", "lifnode"), "pool": ("pool", "maxpool2d", "avgpool2d")}
    wanted = str(claim.conditions.get("operation"))
    found = [row for row in rows.values() if row.kind.lower() in kinds.get(wanted, ())]
    return found[:1] if wanted == "pool" else found


def _printed(claim: Claim) -> str:
    """A published share, with what it is of the operations where it is no mean."""
    return f"{claim.value:.2f} %" + (" (lowest)" if "lowest" in str(claim.conditions.get("note")) else "")


def _pool(claim: Claim) -> str:
    pool = claim.conditions.get("pool")
    return {"max": "max pooling", "avg": "average pooling"}.get(str(pool), str(pool))


def mean_range(values: Sequence[float]) -> str:
    """Mean of shares and their range, '12.00 % (3.00 % .. 20.00 %)'; a dash where there are none."""
    if not values:
        return ""
    mean = share(sum(values) / len(values))
    return mean if len(set(values)) == 1 else f"{mean} ({100 * min(values):.1f}{DASH}{100 * max(values):.1f})"
