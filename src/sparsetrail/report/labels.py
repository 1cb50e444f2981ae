"""Words for what was measured: two numbers may share a column only if they share their `Setting`."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsetrail.core import Mode, Run, Threat, Trail, as_fraction

ATTACKS = {  # names as the literature prints them; any other attack keeps its own
    "fgsm": "FGSM",
    "rfgsm": "R-FGSM",
    "bim": "BIM",
    "mifgsm": "MI-FGSM",
    "pgd": "PGD",
    "sapgd": "SA-PGD",
    "apgd": "APGD",
    "fab": "FAB",
    "autoattack": "AutoAttack",
    "spsa": "SPSA",
    "square": "Square",
    "rays": "RayS",
    "codebook": "codebook",
    "sda": "SDA",
    "sparse_rs": "Sparse-RS",
    "transfer": "transfer",
    "noise": "noise",
}
BY_SCORES = ("noise", "square", "rays", "sparse_rs", "spsa")  # attacks that ask for no gradient
NO_GRADIENT = "none, scores only"


@dataclass(frozen=True)
class Setting:
    """What the adversary may do and how its gradient flows: the threat, BatchNorm's mode, the gradient route."""

    threat: Threat
    mode: Mode
    route: str

    @property
    def short(self) -> str:
        """Space, norm, radius and mode: 'pixel 8/255, eval mode', 'encoded L0 200 entries, eval mode'."""
        return f"{self.threat.space} {radius(self.threat)}, {self.mode} mode"

    @property
    def sentence(self) -> str:
        """The threat in one sentence, for a reader who meets it for the first time."""
        spoken = {  # of each norm: what is changed, in pixel and in encoded space, and by how much
            "linf": (
                "every pixel of the image",
                "every entry of the encoded input, at every step,",
                f"by at most {size(self.threat)} of the range 0..1",
            ),
            "l2": (
                "the pixels of the image",
                "the entries of the encoded input, over all steps together,",
                f"by an L2 distance of at most {size(self.threat)} in all, in units of the range 0..1",
            ),
            "l0": (
                f"at most {size(self.threat)} of the image",
                f"at most {size(self.threat)} of the encoded input, over all steps together,",
                "from one end of the range to the other, and no other entry at all",
            ),
        }[self.threat.norm]
        what = {
            "pixel": f"{spoken[0]} {spoken[2]}; the encoder codes the image as usual",
            "encoded": f"{spoken[1]} {spoken[2]}; no image need encode to the result",
        }[self.threat.space]
        how = {
            "eval": "BatchNorm stays in eval mode while the attack is crafted",
            "train": "BatchNorm runs in train mode while the attack is crafted, on statistics of the attacked batch",
        }[self.mode]
        return f"The adversary may change {what}. {how}."


def radius(threat: Threat) -> str:
    """Radius with its norm, of L-infinity the radius alone: '8/255', 'L2 0.5', 'L0 200 entries'."""
    return {"linf": "", "l2": "L2 ", "l0": "L0 "}[threat.norm] + size(threat)


def size(threat: Threat) -> str:
    """The radius as a number, and the box where it is not 0..1."""
    box = "" if threat.box == (0.0, 1.0) else f" in [{threat.box[0]:g}, {threat.box[1]:g}]"
    if threat.norm == "l0":
        return f"{int(threat.eps)} {'entry' if threat.eps == 1 else 'entries'}{box}"
    exact = as_fraction(threat.eps)
    return f"{exact if '/' in exact or float(exact) == threat.eps else repr(threat.eps)}{box}"


def setting(run: Run) -> Setting:
    """The setting a run was made under; a radius that prints as k/255 is k/255, whatever float it came from."""
    exact = as_fraction(run.threat.eps)
    whole = run.threat.norm == "l0"  # a number of entries, not a radius
    eps = int(exact[:-4]) / 255 if exact.endswith("/255") and not whole else run.threat.eps
    return Setting(dataclasses.replace(run.threat, eps=eps), run.mode, route_of(run))


def route_of(run: Run) -> str:
    """How the gradient of a run flows, in words: an attack by scores has none, the codebook step asks no encoder."""
    name = run.attack.split(" ")[0].lower()
    if name in BY_SCORES or (not run.backwards and any(run.clean)):
        return NO_GRADIENT
    return re.sub(r"encoder: \w+", "encoder: its codebook, exact", run.route) if name == "codebook" else run.route


def settings(runs: Iterable[Run]) -> tuple[Setting, ...]:
    """All settings, in order of appearance."""
    return tuple(dict.fromkeys(map(setting, runs)))


def setting_label(one: Setting, among: Sequence[Setting]) -> str:
    """`one.short`, with the route where another gradient differs in nothing else that the short form tells."""
    alone = all(s.route in (one.route, NO_GRADIENT) or s.short != one.short for s in among)
    return one.short if alone else f"{one.short}, {one.route.removeprefix('none, ')}"


def by_setting(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    """The runs of every setting; one without a gradient joins one that has, of its victim and under its threat."""
    out: dict[Setting, list[Run]] = {s: [] for s in settings(runs)}
    for run in runs:
        mine = setting(run)
        near = [r for r in runs if setting(r).short == mine.short and route_of(r) != NO_GRADIENT]
        near = [r for r in near if (r.victim, r.data) == (run.victim, run.data)] or near
        out[setting(near[0]) if near and mine.route == NO_GRADIENT else mine].append(run)
    return {s: members for s, members in out.items() if members}


def gradients(runs: Sequence[Run]) -> dict[str, str]:
    """By threat and mode in short, which route the gradient takes; of several, which attacks take it."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for run in runs:
        where = setting(run)
        found.setdefault(where.short, {}).setdefault(where.route, {})[attack_words(run)[0]] = None
    return {
        short: "; ".join(f"{route} ({', '.join(names)})" if len(by) > 1 else route for route, names in by.items())
        for short, by in found.items()
    }


@dataclass(frozen=True)
class Column:
    """One column of the accuracy table: an attack with its knobs, under one setting; `label` is unique within it."""

    setting: Setting
    label: str


def columns(runs: Sequence[Run]) -> dict[tuple[Column, tuple[str, str]], Run]:
    """Every run in a cell of its own: keys are (column, (victim, data)), in order of appearance by setting.

    Runs share a column only if attack, knobs and setting are equal. Where that is not enough to keep cells apart,
    seeds, then counters, make further columns: a run is never hidden or merged.
    """
    cells: dict[tuple[Column, tuple[str, str]], Run] = {}
    for where in settings(runs):
        here = [run for run in runs if setting(run) == where]
        plain = {_exact(run): attack_label(run) for run in here}
        for run in here:
            rivals = [r for r in here if attack_label(r) == attack_label(run)]
            base = plain[_exact(run)] + _knobs_apart(run, rivals)
            twins = [r for r in rivals if _exact(r) == _exact(run)]
            if len({(r.victim, r.data) for r in twins}) < len(twins) and len({r.seed for r in twins}) > 1:
                base += f", seed {run.seed}"
            label, count = base, 1
            while (key := (Column(where, label), (run.victim, run.data))) in cells:
                count += 1
                label = f"{base} ({count})"
            cells[key] = run
    order = list(dict.fromkeys(column for column, _ in cells))
    return dict(sorted(cells.items(), key=lambda item: order.index(item[0][0])))


def attack_label(run: Run) -> str:
    """The attack as the field writes it, with its number of steps: 'PGD-7', 'PGD-7 (authors)'."""
    name, space, rest = run.attack.partition(" ")
    steps = run.knobs.get("steps")
    count = f"-{steps}" if isinstance(steps, int) and not isinstance(steps, bool) else ""
    aimed = "-T" if run.knobs.get("loss") == "targeted" else ""
    return f"{ATTACKS.get(name.lower(), name)}{aimed}{count}{space}{rest}"


def attack_words(run: Run) -> tuple[str, str, str]:
    """Name, settings and the route that the name of a run tells: ('PGD-7', 'step 0.01, loss margin', 'hart').

    A run of an audit is named by its settings and its route too: 'pgd (steps 7, step 0.01), hart'.
    """
    found = re.fullmatch(r"([\w.&-]+)(?: \((.*?)\))?(?:, (.+))?", run.attack)
    name, told, via = (part or "" for part in found.groups()) if found else (run.attack, "", "")
    name = attack_label(dataclasses.replace(run, attack=name))
    if told and not all(part.split()[0] in run.knobs for part in told.split(", ") if part):
        name += f" ({told})"  # '(authors)' is no setting
    knobs = [
        f"{k} {value(v)}" for k, v in run.knobs.items() if v is not None and not (k == "steps" and f"-{v}" in name)
    ]
    if run.votes > 1 or run.eot > 1:
        knobs.append(f"mean of {run.eot} gradients, {run.votes} votes")
    return name, ", ".join(knobs), via


def explain(trail: Trail) -> str:
    """One sentence: how many gradient entries of a trail are zero, and which operations create them.

    It speaks of what was measured, the inputs of modules, and names those that were not. Operations that create zeros
    are named until they account for 95 % of the zeros created, five at most. Of a max pool it is known how many zeros
    geometry forces, not which: the smaller of both shares counts as forced.
    """
    zeros, entries = sum(r.zero * r.entries for r in trail.rows), sum(r.entries for r in trail.rows)
    begin, count = f"{trail.victim}, {trail.mode} mode, n={trail.n}: ", len(trail.rows)
    where = f"at the inputs of the {count} modules measured" if count > 1 else "at the input of the module measured"
    missing = _missing(trail)
    if not zeros:
        most = max(trail.rows, key=lambda r: r.inherited or 0.0)
        more = f", {portion(most.inherited)} of those at the output of {most.op} are" if most.inherited else ""
        return f"{begin}no gradient entry {where} is exactly zero{more}{missing}."
    begin += f"{portion(zeros / entries)} of the gradient entries {where} are exactly zero"
    known = [(r.created * r.entries, r) for r in trail.rows if r.created is not None]
    if not known:
        most = max(trail.rows, key=lambda r: r.zero)
        text = f"{begin}, most at {most.op} ({portion(most.zero)}); where they come from was not measured"
        return f"{text}{missing}."
    created = sum(count for count, _ in known)
    forced = sum(min(count, r.forced * r.entries) for count, r in known)
    parts, named = [], 0.0
    for count, r in sorted(known, key=lambda item: -item[0]):
        if count and named < 0.95 * created and len(parts) < 5:
            parts.append(f"{r.op} {portion(count / created)}")
            named += count
    text = f"{begin}; {portion(created / zeros)} of them are created where they stand"
    if created:
        text += f" (by {', '.join(parts)}{', others the rest' if named < created else ''}), "
        text += f"{portion(forced / created)} of those by geometry alone"
        text += ", the others arrive with the gradient" if created < zeros * (1 - 1e-9) else ""
    if unknown := [r for r in trail.rows if r.created is None]:
        text += f", {len(unknown)} of {len(trail.rows)} operations not traced"
    if all(r.zero64 is not None for r in trail.rows):
        lost = sum(max(0.0, r.underflow or 0.0) * r.entries for r in trail.rows)
        text += f"; {portion(lost / zeros) if lost else 'none'} of the zeros are float underflow"
    first = trail.rows[0]
    place = "the first module to run" if first.depth == 0 else "the first of them"
    return f"{text}; {portion(first.zero)} of the entries at {first.op}, {place}, are zero{missing}."


def _missing(trail: Trail) -> str:
    """Which modules get no gradient at all, and of which it was not read."""
    dead = [r.op for r in trail.rows if r.zero == 1]
    text = f"; wholly zero at {_some(dead)}" if dead else ""
    if trail.nonfinite:
        text += (
            f"; {trail.nonfinite} of {trail.n} images have a gradient that is not finite, and participation is without"
        )
    if trail.unfolded:
        text += (
            f"; nothing is said of single images or steps at {_some(trail.unfolded)}, which hold them in another order"
        )
    return text + (f"; not all was read at {_some(trail.unread)}" if trail.unread else "")


def _some(names: Sequence[str]) -> str:
    """The first five by name."""
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")


def portion(x: float) -> str:
    """A share 0..1 in running text: '0 %' and '100 %' only where it is exactly so."""
    if x in (0, 1):
        return "0 %" if x == 0 else "100 %"
    return "< 0.1 %" if x < 5e-4 else "> 99.9 %" if 1 - 5e-4 < x < 1 else f"{100 * x:.1f} %"


def _exact(run: Run) -> tuple[str, str]:
    return run.attack, json.dumps(run.knobs, sort_keys=True, default=str)


def _knobs_apart(run: Run, rivals: Sequence[Run]) -> str:
    """The knobs in which a run differs from others of the same name, in words; empty if there are none."""
    parts = []
    for name in sorted({k for r in rivals for k in r.knobs}):
        if len({json.dumps(r.knobs.get(name, "-"), sort_keys=True, default=str) for r in rivals}) > 1:
            parts.append(f"{name} {value(run.knobs[name])}" if name in run.knobs else f"no {name}")
    if len({r.attack for r in rivals}) > 1:
        parts.append(run.attack)
    return "".join(f", {part}" for part in parts)


def value(v: Any) -> str:
    """A knob or a card entry in words."""
    if v is None:
        return "none"
    if isinstance(v, bool):
        return "yes" if v else "no"
    if isinstance(v, float):
        if not math.isfinite(v):
            return "not a number" if math.isnan(v) else "infinite"
        return as_fraction(v) if 0 < v < 0.5 else f"{v:g}"
    if isinstance(v, dict):
        return ", ".join(f"{k} {value(x)}" for k, x in v.items())
    if isinstance(v, (list, tuple)):
        return ", ".join(map(value, v))
    return str(v)


def bare(text: str) -> str:
    """Letters and digits alone, small: by which names written in several ways are one."""
    return re.sub(r"[^a-z0-9]", "", text.lower())
