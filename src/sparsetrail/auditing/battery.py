"""The attacks of an audit, from cheap to expensive; each is run on the images that still stand."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsetrail.attacks import ATTACKS, settings
from sparsetrail.attacks.pgd import PACE
from sparsetrail.core import Guide, Problem, Route, Threat, Victim
from sparsetrail.snn.routes import ENSEMBLE

Budget = Literal["quick", "standard", "thorough"]
Kind = Literal["default", "gradient", "route", "code", "time", "transfer", "black box", "noise"]
# one surrogate of every shape and the extremes of width; `thorough` runs all of them
SHAPES = ("triangle:1", "rectangle:1", "exponential:2", "sigmoid:4", "straight_through:1")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One attack of the battery: what it is called, how it is run, and which question it answers."""

    label: str
    attack: str
    kind: Kind
    knobs: Mapping[str, Any]
    routes: tuple[Route, ...] = ()
    guide: Victim | None = None

    @property
    def calls(self) -> int:
        """Forward and backward passes an image can cost, about."""
        knobs = settings(ATTACKS[self.attack]) | dict(self.knobs)
        towards = ["targets"] if knobs.get("loss", "targeted") == "targeted" else []
        names = ("steps", "restarts", "draws", "queries", *towards)
        count = math.prod(knobs[k] for k in names if knobs.get(k))
        return max(1, count) * max(1, len(self.routes)) * (2 if self.guide else 1)


def battery(
    victim: Victim,
    threat: Threat,
    budget: Budget = "standard",
    *,
    guides: Sequence[Victim] = (),
    gradient: bool = True,
    code: bool = False,
) -> list[Stage]:
    """The attacks of an audit, the default one first, then cheap to expensive; only what the victim allows.

    `gradient` says whether a gradient reaches the attacked tensor. Without one, only attacks that need none are left,
    and those by the codebook where `code` says that one reaches the code.
    """
    eps, much = threat.eps, {"quick": 0.2, "standard": 1.0, "thorough": 2.0}[budget]
    if threat.norm == "l0":
        own = [_stage("sda", "default", steps=max(5, int(30 * much)))] if gradient else []
        queries = {"quick": 200, "standard": 1000, "thorough": 5000}[budget]
        return [
            *own,
            _stage("sparse_rs", "black box", queries=queries),
            _stage("noise", "noise", draws=max(2, int(100 * much))),
        ]

    def n(count: int) -> int:
        return max(2, int(count * much))

    linf, coded = threat.norm == "linf", victim.codebook is not None and threat.space == "pixel"
    by_code = [
        _stage("codebook", "code", steps=n(20)),
        _stage("codebook", "code", steps=n(40), loss="margin", restarts=3),
    ]
    stages: list[Stage] = []
    if gradient:
        # the paper's PGD-7 of step 0.01 at 8/255, scaled to the radius
        stages.append(_stage("pgd", "default", steps=7, step=PACE * eps))
        stages.append(_stage("fgsm", "gradient"))
        attack = "codebook" if coded and linf else "pgd"
        best: dict[str, Any] = {"steps": n(20)}
        if attack == "pgd":
            best |= {"step": eps / 4, "loss": "margin"}
        if coded and linf:
            stages += by_code
        stages.append(_stage("pgd", "gradient", steps=n(40), step=eps / 8, loss="margin"))
        rewired = victim.rewire is not None
        if coded and rewired:
            stages.append(_stage("pgd", "code", Route(encoder="secant"), steps=n(40), step=eps / 8))
        secant = "secant" if coded else None
        if rewired:
            stages.append(_stage("sapgd", "route", Route(neuron="assg", encoder=secant), steps=n(100)))
            surrogates = ENSEMBLE if budget == "thorough" else SHAPES
            for name in dict.fromkeys(("assg", "hart", "rga", "bptr", "pdsg", "own+reset", "own+detach", *surrogates)):
                stages.append(_stage(attack, "route", Route(neuron=name), **best))
            both = (Route(), Route(neuron="hart"))
            stages.append(_stage(attack, "route", *both, **best))
            if budget != "quick":  # other starts, and the margin: what one run of it on cross-entropy leaves
                again = {"steps": n(100), "loss": "margin", "restarts": 3}
                stages.append(_stage("sapgd", "route", Route(neuron="assg", encoder=secant), **again))
            if threat.space == "pixel" and budget != "quick":
                steps = {victim.steps // 2, 2 * victim.steps} - {0, victim.steps}
                stages += [_stage("pgd", "time", Route(steps=s), steps=n(10), step=eps / 4) for s in sorted(steps)]
        if budget != "quick":
            own = (Route(encoder=secant),) if coded and rewired else ()
            stages.append(_stage("apgd", "gradient", *own, steps=n(100), loss="ce"))
            targets = min(9, victim.classes - 1)
            stages.append(_stage("apgd", "gradient", *own, steps=n(50), loss="targeted", targets=targets))
            if budget == "thorough":  # the last of the four of AutoAttack; Square follows
                stages.append(_stage("fab", "gradient", *own, steps=n(50), targets=targets))
    elif code and coded and linf:
        stages += by_code
    for guide in guides:
        knobs = {"steps": n(20), "step": eps / 4, "loss": "margin"}
        if guide.codebook is not None and coded and linf:
            stages.append(_stage("codebook", "transfer", guide=guide, steps=n(20)))
        stages.append(_stage("pgd", "transfer", guide=guide, **knobs))
    stages.append(_stage("square", "black box", queries={"quick": 200, "standard": 1000, "thorough": 5000}[budget]))
    if not gradient or not linf:
        stages.append(_stage("spsa", "black box", steps=n(20)))
    if not gradient or budget == "thorough":  # scores that stop the gradient may tell a class and nothing else
        queries = {"quick": 400, "standard": 2000, "thorough": 5000}[budget]
        stages.append(_stage("rays", "black box", queries=queries))
    stages.append(_stage("noise", "noise", draws=n(100), corners=True))
    stages.append(_stage("noise", "noise", draws=n(100)))
    return [s for s in stages if all(_adds(victim, r, threat) for r in s.routes)]


def reaches_code(victim: Victim, threat: Threat, x: Tensor) -> bool:
    """Does a gradient reach the code of the image x[0], of which a codebook is known, whatever the encoder stops?"""
    if threat.space != "pixel" or victim.codebook is None:
        return False
    x, guide = x[:1], Guide.of(victim, threat, own=True)
    y = torch.zeros(1, dtype=torch.long, device=x.device)
    try:
        Problem(guide.f, x, y, threat, guides=(guide,), codebook=victim.codebook).code_grad(x)
    except (RuntimeError, ValueError, TypeError):  # scores that carry no gradient, a code of whole numbers
        return False
    return True


def _adds(victim: Victim, route: Route, threat: Threat) -> bool:
    """Can this victim be differentiated so, and is that another way than its own? A foreign one may know few."""
    try:
        return route == Route() or victim.by(route).path(threat.space) != victim.path(threat.space)
    except ValueError:
        return False


def _stage(attack: str, kind: Kind, *routes: Route, guide: Victim | None = None, **knobs: Any) -> Stage:
    if unknown := set(knobs) - set(settings(ATTACKS[attack])):
        raise AssertionError(f"{attack} has no setting {unknown}")
    words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in knobs.items()]
    via = " + ".join(map(str, routes)) if routes else f"from {guide.name}" if guide else ""
    label = f"{attack} ({', '.join(words)})" if words else attack
    return Stage(
        label=f"{label}, {via}" if via else label, attack=attack, kind=kind, knobs=knobs, routes=routes, guide=guide
    )
