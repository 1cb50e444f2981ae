"""What is said beside a table of the paper: published figures, what was found, how it is apart from them."""

from collections.abc import Sequence
from typing import Any

from sparsetrail.core import Audit, Claim, Run, Trail, as_fraction
from sparsetrail.recipes import audits
from sparsetrail.recipes.rows import Row, row_of
from sparsetrail.recipes.scales import Scale
from sparsetrail.recipes.systems import SYSTEMS, UNPUBLISHED, Twin, facts
from sparsetrail.report.seeds import seeded, sentences
from sparsetrail.report.tables import share


def published(shown: Sequence[Claim]) -> tuple[str, ...]:
    """One line a published row: its figures and the threat, or the two threats, they may belong to."""
    rows: dict[str, list[str]] = {}
    for c in shown:
        if "operation" in c.conditions:
            continue
        attack = str(c.conditions.get("attack")).replace("none", "clean")
        pool = "" if row_of(c) in SYSTEMS else f", {c.conditions.get('pool')} pool"
        row = f"Published ({c.source}): {c.row}{pool}, {c.dataset}"
        eps, space = c.conditions.get("eps_coded"), c.conditions.get("space_coded")
        eps = as_fraction(eps) if isinstance(eps, float) else eps
        threat = f" ({space} {eps})" if row_of(c) in SYSTEMS and eps else ""
        rows.setdefault(row, []).append(f"{attack} {c.value:g} %{threat}")
    two = " Threat in the text: pixel 8/255; in the code: encoded 6/255, crafted in train mode."
    return tuple(f"{row}: {', '.join(values)}.{two if ' pool, ' in row else ''}" for row, values in rows.items())


def told_apart(chosen: Sequence[Row], judged: Sequence[Audit]) -> tuple[str, ...]:
    """One line a system: what is left of it, and what separates it from its published figure."""
    found = {a.victim: a for a in judged}
    lines = []
    for row in chosen:
        if row.system and row.name in found:
            apart = SYSTEMS[row.arch].apart
            begin = "From its published figure it is apart by the scale, and: "
            said = f"{apart[:1].upper()}{apart[1:]}" if UNPUBLISHED in apart else f"{begin}{apart}"
            lines.append(f"{row.name}: {audits.sentence(found[row.name])} {said}.")
    return tuple(lines)


def left_standing(chosen: Sequence[Row], judged: Sequence[Audit]) -> tuple[str, ...]:
    """One line an audit of a network."""
    nets = {row.name for row in chosen if not row.system}
    return tuple(f"{a.victim}: {audits.sentence(a)}" for a in judged if a.victim in nets)


def summary(runs: list[Run], trails: list[Trail], cards: list[dict[str, Any]]) -> tuple[str, ...]:
    """What PGD leaves, a line a network or, of networks from several training seeds, a line a threat; zeros."""
    several = seeded(cards)
    lines = [
        *sentences(runs, cards),
        *(
            f"{r.victim}: PGD leaves {r.accuracy} ({r.threat}, crafted in {r.mode} mode)."
            for r in runs
            if r.attack.startswith("pgd") and r.victim not in several
        ),
    ]
    for t in trails:
        kinds: dict[str, list[float]] = {}
        for r in t.rows:
            if r.kind in ("conv", "norm", "neuron") or r.op == "pool":
                kinds.setdefault("stem pool" if r.op == "pool" else r.kind, []).append(r.zero)
        shares = ", ".join(f"{k} {share(sum(v) / len(v))}" for k, v in kinds.items())
        lines.append(f"{t.victim}, {t.mode} mode: mean share of exact zeros: {shares} (n={t.n}).")
    return tuple(lines)


def _twin(twin: Twin | None) -> str:
    assert twin is not None
    how = twin.train
    return (
        f"twin by {how.optimizer} lr {how.lr:g} with weight decay {how.weight_decay:g}, thresholds {twin.scale:g} "
        f"times the percentile {twin.percentile:g} of the currents"
    )


def caveats(
    figure: str, found: Sequence[Claim], chosen: Sequence[Row], size: Scale, kept: bool = False
) -> tuple[str, ...]:
    """What to keep in mind as the figures are read; `kept` networks were trained before."""
    left = dict.fromkeys(c.row for c in found if c.figure == figure and figure.startswith("table"))
    run = {row.arch for row in chosen}
    left = [c for c in left if not any(row_of(f) in run for f in found if f.row == c)]
    own = not all(row.system for row in chosen)
    decays = [f"{row.decay:g}" for row in chosen if row.decay]
    decay = (
        f"with a weight decay of {decays[0]} (its code's 1e-3)" if decays else "without its code's weight decay of 1e-3"
    )
    notes: list[str] = []
    if own:
        notes += [
            "The paper's text perturbs the image by 8/255; its code perturbs the encoded spikes by 6/255, crafting in "
            "train mode on the test batches. Each is a threat of its own here; the published figure belongs to the "
            "code's.",
            f"The paper's networks are trained {decay}, the best epoch chosen on held-out training images instead of "
            "the test set.",
        ]
    if own and kept:
        notes.append(
            "The networks were trained before; how, and for how many of the paper's 100 epochs, is in their cards."
        )
    elif own and size.images is not None:
        notes.append(
            f"Scale: {size.images:,} training images, {size.epochs} epochs, width x{size.width:g}; the paper uses all "
            "50,000 images and 100 epochs, so levels are not comparable, only directions are."
        )
    systems, how = [row for row in chosen if row.system], size.systems
    if systems:
        notes.append(
            "The compared systems were published under pixel threats (8/255; HIRE-SNN 0.031, of which an image of 256 "
            "grey levels has 7) in eval mode, and trained at radii of their own (see each card): theirs are columns of "
            "their own, beside none of the encoded ones."
        )
        notes += [f"{row.name}: open in its source: {facts(row.arch)['open in its source']}." for row in systems]
    if systems and how.images is not None:
        changed = [
            f"{SYSTEMS[n].title}: {', '.join(f'{k} {v:.4g}' for k, v in kn.items())}"
            for n, kn in how.knobs.items()
            if n in run
        ] + [
            f"{SYSTEMS[n].title}: {_twin(t)}, where the source has {_twin(SYSTEMS[n].twin)}"
            for n, t in how.twins.items()
            if n in run
        ]
        notes.append(
            f"Scale of the compared systems: {how.images:,} training images, {how.epochs} epochs, batch {how.batch}, "
            f"width x{how.width:g}, {how.steps} time steps, n = {how.audited} (of Poisson code {how.poisson_steps}, "
            f"n = {how.audited_random}). "
            + "".join(
                f"{SYSTEMS[row.arch].title}: its twin of ReLUs {how.twin_epochs} epochs, thresholds read over "
                f"{how.calibrate} steps. "
                for row in systems
                if SYSTEMS[row.arch].twin
            )
            + "Their sources train 50 to 200 epochs, twins 300, on 50,000 images."
            + (f" Other settings than the source's: {'; '.join(changed)}." if changed else "")
        )
    if left:
        notes.append("Not run here, name them with --rows: " + "; ".join(left) + ".")
    return tuple(notes)
