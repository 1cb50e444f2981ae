"""Words and tables for audits: three figures, which attack broke which share, what the checks say.

An audit is of one threat and one mode, and so is every table here; runs under other conditions stand apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsetrail.core import Audit, Finding, Rate, Run
from sparsetrail.report.labels import Setting, attack_words, route_of, setting, value
from sparsetrail.report.tables import DASH, Grid, percent

# tone of the colour and a sign, since a colour alone is not seen by everyone nor on every printer
VERDICTS = {
    "supported": ("good", "\u2713"),
    "overstated": ("warn", "!"),
    "masked": ("bad", "\u2717"),
    "inconclusive": ("none", "?"),
}
LEVELS = {
    "fail": ("bad", "\u2717"),
    "warn": ("warn", "!"),
    "pass": ("good", "\u2713"),
    "not applicable": ("none", DASH),
}
ARROW, MINUS = "\u2192", "\u2212"


@dataclass(frozen=True)
class Step:
    """One attack of the battery: how many images it met, how many of them fell, what is left of all images."""

    number: int
    name: str
    knobs: str
    via: str
    run: Run
    met: int
    broken: int
    left: Rate


@dataclass(frozen=True)
class Figure:
    """One of the figures of the headline: its name, its value with interval, and what it rests on."""

    name: str
    value: str
    interval: str
    note: str

    def text(self, mark: str = "") -> str:
        """The figure in one phrase, its value between marks: 'worst case 4.7 % [2.7, 8.0], n=256'."""
        named = f"{mark}{self.value}{mark}"
        return f"{self.name} {named} {self.interval}" if self.interval else named


def of_radius(audit: Audit) -> str:
    """What the chart of accuracy by radius shows, in a sentence."""
    curve = audit.curves.get("eps") or {}
    n = curve.get("n")
    return (
        f"Accuracy of {curve.get('attack', 'one attack')} by its radius"
        f"{f', n={n}, with 95 % Wilson intervals' if n else ''}."
    )


def of_loss(audit: Audit) -> str:
    """What the chart of losses shows, in a sentence."""
    kept = audit.curves.get("loss") or ({},)
    n = kept[0].get("n") or (audit.curves.get("eps") or {}).get("n")  # older ones: of the same images
    return f"Mean loss by step on the images the checks look at{f', n={n}' if n else ''}."


def where(audit: Audit) -> Setting:
    """Threat and mode of an audit; the mode is that of its first run under its threat."""
    made = next((run for run in audit.runs if run.threat == audit.threat), audit.runs[0] if audit.runs else None)
    if made is None:
        return Setting(audit.threat, "eval", "")
    return replace(setting(replace(made, threat=audit.threat)), route="")


def steps(audit: Audit) -> tuple[Step, ...]:
    """The battery in the order it ran, under the audit's threat and mode; a fall counts once and only if it held.

    `audit.worst` has the last word: an image that was taken back at the last judgement is not counted as broken.
    """
    place = {index: i for i, index in enumerate(audit.indices)}
    standing = {i for i, right in enumerate(audit.clean) if right}
    out = []
    for number, run in enumerate(battery(audit), 1):
        indices = run.indices if run.indices is not None else audit.indices if run.n == audit.n else ()
        fell = {
            place[index]
            for index, right, held in zip(indices, run.clean, run.robust, strict=bool(indices))
            if right and not held and index in place and not audit.worst[place[index]]
        }
        broken = standing & fell
        standing -= broken
        name, knobs, via = attack_words(run)
        out.append(Step(number, name, knobs, via, run, sum(run.clean), len(broken), Rate(len(standing), audit.n)))
    return tuple(out)


def taken_back(audit: Audit) -> int:
    """Images that an attack fooled and that stand all the same: their adversarial did not hold when shown alone."""
    return int(next((f.value or 0 for f in audit.findings if f.id == "S6"), 0))


def titles(audit: Audit) -> tuple[str, ...]:
    """Each attack of the battery by number, name and route, its loss and what else tells it from its namesakes."""
    made, out = steps(audit), []
    for step in made:
        alike = [other.run.knobs for other in made if (other.name, other.via) == (step.name, step.via)]
        apart = [
            f"{name} {value(knob)}"
            for name, knob in step.run.knobs.items()
            if (name == "loss" and knob not in ("ce", "targeted")) or any(knobs.get(name) != knob for knobs in alike)
        ]
        out.append(f"{step.number}. {', '.join(filter(None, (step.name, *apart, step.via)))}")
    return tuple(out)


def battery(audit: Audit) -> tuple[Run, ...]:
    """The runs that share the audit's threat and mode."""
    here = where(audit)
    return tuple(run for run in audit.runs if (setting(run).threat, run.mode) == (here.threat, here.mode))


def others(audit: Audit) -> tuple[Run, ...]:
    """Runs under another threat or mode than the audit's: they have no place in its battery."""
    inside = set(map(id, battery(audit)))
    return tuple(run for run in audit.runs if id(run) not in inside)


def figures(audit: Audit) -> tuple[Figure, ...]:
    """Claim, default attack, worst case."""

    def rate(name: str, of: Rate, note: str) -> Figure:
        value, _, interval = percent(of).partition(" [")
        return Figure(name, value, f"[{interval}, n={of.n}", note)

    if audit.claim is None:
        claim = Figure("claimed", "no claim", "", "the default attack stands in for it")
    else:
        source = audit.claim_source or "source not stated"
        claim = Figure("claimed", f"{100 * audit.claim:.1f} %", "as published" if audit.claim_source else "", source)
    attacks = len(battery(audit))
    return (
        claim,
        rate("default attack", audit.default_accuracy, default_words(audit)),
        rate("worst case", audit.accuracy, f"every image over all {attacks} attacks" if attacks != 1 else "one attack"),
    )


def default_words(audit: Audit) -> str:
    """The default attack as the field writes it, where its run is known."""
    for run in battery(audit):
        if run.attack == audit.default_attack:
            name, knobs, via = attack_words(run)
            return f"{name}{f', {knobs}' if knobs else ''}{f', {via}' if via else ''}"
    return audit.default_attack


def fall(audit: Audit) -> str:
    """By how much the worst case lies below claim and default attack, in words."""
    lost = sum(a and not b for a, b in zip(audit.default, audit.worst, strict=True))
    survived = sum(audit.default)
    after = f"{lost} of the {survived} images that survive the default attack fall to a stronger one"
    after = after if survived else "no image survives the default attack"
    if audit.claim is None:
        return f"{after[:1].upper()}{after[1:]}."
    gap = 100 * (audit.accuracy.value - audit.claim)
    return f"The worst case lies {abs(gap):.1f} points {'below' if gap < 0 else 'above'} the claim; {after}."


def title(audit: Audit) -> str:
    """Victim and threat: 'SEW-ResNet18, pixel 8/255, eval mode'."""
    return f"{audit.victim}, {where(audit).short}"


def words(audit: Audit) -> tuple[str, ...]:
    """What every number of an audit rests on, each said once."""
    return (
        f"n = {audit.n} images",
        f"data: {audit.data}" if audit.data else "data not stated",
        f"clean accuracy {percent(audit.clean_accuracy)}",
        f"{audit.budget} budget, {'complete' if audit.complete else 'not complete'}",
        f"attacks took {duration(audit.seconds)}",
        "95 % Wilson intervals",
    )


def tally(audit: Audit) -> str:
    """How many checks stand at each level, failures first."""
    counts = {level: sum(f.level == level for f in audit.findings) for level in LEVELS}
    return ", ".join(f"{count} {level}" for level, count in counts.items() if count) or "no check was run"


def ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Failures first, then warnings, passes and what does not apply; in the order they were made among equals."""
    order = list(LEVELS)
    return tuple(sorted(findings, key=lambda f: order.index(f.level)))


def battery_grid(audit: Audit) -> Grid:
    """Which attack broke which share: one row an attack in the order they ran, accuracy left of all images."""
    made = steps(audit)
    clean, worst = audit.clean_accuracy, audit.accuracy
    rows = [("", "no attack", "", "", "", percent(clean), "", "", "")]
    rows += [
        (
            str(s.number),
            f"{s.name} ({s.knobs})" if s.knobs else s.name,
            route_of(s.run),
            str(s.met),
            f"{s.broken} ({100 * s.broken / audit.n:.1f} %)" if s.broken else "0",
            percent(s.left),
            count(s.run.forwards),
            count(s.run.backwards),
            f"{s.run.seconds:.1f}",
        )
        for s in made
    ]
    if again := taken_back(audit):
        words = f"{again} taken back at the last judgement (S6), met by no attack after"
        rows.append(("", words, "", "", "", "", "", "", ""))
    last = made[-1].left if made else clean
    if last != worst:
        lost = last.k - worst.k
        rows.append(("", "not by a run above", "", "", str(lost), percent(worst), "", "", ""))
    runs = [s.run for s in made]
    fell = clean.k - worst.k
    rows.append(
        (
            "",
            "worst case",
            "",
            "",
            f"{fell} ({100 * fell / audit.n:.1f} %)" if fell else "0",
            percent(worst),
            count(sum(run.forwards for run in runs)),
            count(sum(run.backwards for run in runs)),
            f"{sum(run.seconds for run in runs):.1f}",
        )
    )
    return Grid(
        caption=f"{title(audit)}; shares are of all n={audit.n} images, an attack meets only images that still stand",
        head=(
            "#",
            "attack",
            "gradient",
            "met",
            "newly broken",
            f"left of {audit.n}",
            "forwards",
            "backwards",
            "seconds",
        ),
        rows=tuple(rows),
        labels=3,
    )


def short_grid(audit: Audit) -> Grid:
    """The battery without settings and calls, for a narrow place."""
    whole, names = battery_grid(audit), titles(audit)
    rows = [
        (names[int(at) - 1] if at else attack, *cells, seconds) for at, attack, _, *cells, _, _, seconds in whole.rows
    ]
    head = (whole.head[1], *whole.head[3:6], whole.head[-1])
    return Grid(f"{title(audit)}: which attack broke which share", head, tuple(rows))


def other_grid(audit: Audit) -> Grid | None:
    """Runs that belong to the audit but not to its threat: each with its own, none beside the battery's numbers."""
    runs = others(audit)
    if not runs:
        return None
    return Grid(
        caption="Runs under other conditions than the audit's; they do not count towards its worst case",
        head=("attack", "conditions", "its own result"),
        rows=tuple((attack_words(run)[0], setting(run).short, percent(run.accuracy, n=True)) for run in runs),
        labels=2,
    )


def checks_grid(findings: Sequence[Finding], caption: str = "Checks, failures first") -> Grid:
    """The checks in words, for Markdown and the terminal."""
    return Grid(
        caption=caption,
        head=("check", "level", "value", "limit", "evidence", "what to do"),
        rows=tuple(
            (f"{f.id} {f.name}", level(f), number(f.value), f.limit, f.evidence, f.advice) for f in ordered(findings)
        ),
        labels=6,
    )


def level(finding: Finding) -> str:
    """The level with its sign, and whether it is a sign of masking: '✗ fail, sign of masking'."""
    said = f"{LEVELS[finding.level][1]} {finding.level}"
    return f"{said}, sign of masking" if finding.masking and finding.level in ("warn", "fail") else said


def summaries(audits: Sequence[Audit]) -> tuple[tuple[Setting, tuple[tuple[int, Audit], ...]], ...]:
    """Audits with their places, by threat and mode: a table each, since its numbers answer one question."""
    bundles: dict[Setting, list[tuple[int, Audit]]] = {}
    for i, audit in enumerate(audits):
        bundles.setdefault(where(audit), []).append((i, audit))
    return tuple((s, tuple(members)) for s, members in bundles.items())


def summary_grid(here: Setting, audits: Sequence[Audit]) -> Grid:
    """Audits of one threat, a row each: clean, claimed (if any is), default attack, worst case, verdict."""
    several = len({audit.data for audit in audits}) > 1
    claimed = any(audit.claim is not None for audit in audits)
    return Grid(
        caption=here.short,
        head=(
            "victim",
            *(["data"] if several else []),
            "n",
            "clean",
            *(["claimed"] if claimed else []),
            "default attack",
            "worst case",
            "verdict",
        ),
        rows=tuple(
            (
                audit.victim,
                *([audit.data] if several else []),
                str(audit.n),
                percent(audit.clean_accuracy),
                *(["no claim" if audit.claim is None else f"{100 * audit.claim:.1f} %"] if claimed else []),
                percent(audit.default_accuracy),
                percent(audit.accuracy),
                f"{VERDICTS[audit.verdict][1]} {audit.verdict}",
            )
            for audit in audits
        ),
        labels=2 if several else 1,
    )


def number(x: float | None) -> str:
    """A check's value with three digits; a dash where there is none."""
    if x is None or math.isnan(x):
        return DASH
    if math.isinf(x):
        return "infinite"
    return f"{x:.0f}" if x == round(x) and abs(x) < 1e6 else f"{x:.3g}"


def count(n: int) -> str:
    """A count in groups of three."""
    return f"{n:,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def markdown(audits: Sequence[Audit]) -> list[str]:
    """Audits as paragraphs of Markdown: headline, figures, battery, checks."""
    parts: list[str] = []
    if len(audits) > 1:
        parts += ["## Audits"]
        for here, members in summaries(audits):
            parts += [f"### {here.short}", summary_grid(here, [audit for _, audit in members]).text()]
    for audit in audits:
        sign = VERDICTS[audit.verdict][1]
        shown = [f"{f.text('**')} ({f.note})" for f in figures(audit)]
        parts += [
            f"## Audit: {title(audit)}",
            f"**{sign} {audit.verdict}**: {audit.reason}",
            f" {ARROW} ".join(shown),
            fall(audit),
            f"{where(audit).sentence} {'; '.join(words(audit))}.",
            "### Which attack broke which share",
            battery_grid(audit).text(),
            f"{battery_grid(audit).caption}.",
        ]
        if (apart := other_grid(audit)) is not None:
            parts += [apart.text(), f"{apart.caption}."]
        parts += ["### Checks", f"{tally(audit)}."]
        if audit.findings:
            parts += [checks_grid(audit.findings).text()]
    return parts
