"""Judge a robustness claim: checks, a battery of attacks from cheap to expensive, the worst case per image, a verdict.

Every attack is run on the images that still stand, batch by batch; what is done is kept in a store, so that the same
call continues. The rules of the verdict are those of docs/findings.md.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparsetrail.attacks.run import samples
from sparsetrail.auditing.battery import Budget, battery, reaches_code
from sparsetrail.auditing.refusals import refuse, refuse_guides, refuse_images
from sparsetrail.auditing.verdict import battery_findings, judge, sample_size
from sparsetrail.auditing.work import SAMPLE, Forgetful, Store, Work, fingerprint
from sparsetrail.checks import CHECKS
from sparsetrail.checks.chance import surely_over
from sparsetrail.core import Audit, Finding, Rate, Threat, Victim
from sparsetrail.core.inputs import refuse_images as of_victim
from sparsetrail.core.inputs import refuse_threat
from sparsetrail.core.precision import in_full

WHOLE = ("S6",)  # asked here of all adversarials, not of the sample


@in_full
def audit(
    victim: Victim,
    threat: Threat,
    x: Tensor,
    y: Tensor,
    *,
    budget: Budget = "standard",
    claim: float | None = None,
    claim_source: str = "",
    guides: Sequence[Victim] = (),
    control: Victim | None = None,
    fresh: Callable[[], Victim] | None = None,
    eot: int | None = None,
    minutes: float | None = None,
    batch: int = 64,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    card: Mapping[str, Any] | None = None,
    data: str = "",
    provenance: Mapping[str, Any] | None = None,
    store: Store | None = None,
    identity: str = "",
    say: Callable[[str, int, int, str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Audit, dict[int, Tensor]]:
    """Audit `victim` under `threat` on images `x` [n c h w] in 0..1 with labels `y` [n]; and the adversarials found.

    `claim` is the robust accuracy 0..1 that is claimed; without one the default attack's stands in for it. `guides` are
    other victims to transfer from, `control` an undefended victim of the same kind that must fall. `fresh` makes the
    victim anew for the last judgement. `eot` gradients are averaged at every step (10 for a victim that draws noise).
    After `minutes` no further attack is begun; the default one always is. `store` keeps finished parts under
    `identity`, which must tell victims and data apart. `say(task, done, of, note)` reports, `stop()` is asked between
    batches (KeyboardInterrupt follows).

    Adversarials come by position in `x`, in the attacked tensor's shape without the image axis. ValueError where input
    is not fit; nothing is attacked then.
    """
    of_victim(victim, x, y)
    refuse_threat(threat)
    refuse([threat], claim=claim, batch=batch, eot=eot, minutes=minutes, budget=budget)
    indices = tuple(range(len(y)) if indices is None else map(int, indices))
    refuse_images(victim, threat, x, y, indices)
    refuse_guides(victim, threat, x, y, guides)
    work = Work(
        victim, threat, x, y, Forgetful() if store is None else store, identity, budget, batch, seed,
        samples(victim) if eot is None else eot, indices, data, say or _quiet, stop or _never,
    )  # fmt: skip
    started = time.monotonic()
    deadline = math.inf if minutes is None else started + 60 * minutes
    findings = [work.check(name) for name in CHECKS if not name.startswith("C") and name not in WHOLE]
    broken = [f for f in findings if f.id.startswith("S") and f.level == "fail"]
    reaches = not any(f.id == "G3" and f.level == "fail" for f in findings)
    code = not reaches and reaches_code(victim, threat, x)
    stages = battery(victim, threat, budget, guides=guides, gradient=reaches, code=code)
    if broken:  # what is measured on a broken evaluation is worth nothing: the default attack shows what was claimed
        stages = stages[:1]
    decisions = [(f.id, f.value) for f in broken] == [("S9", victim.classes)]  # all scores are there, without degrees
    if decisions:  # which can be attacked as such
        blind = battery(victim, threat, budget, guides=guides, gradient=False)
        stages += [s for s in blind if s not in stages and s.attack not in ("square", "spsa")]
    ledger, complete = work.play(stages, deadline)
    if not broken:
        for name in (c for c in CHECKS if c.startswith("C") and c not in WHOLE):
            if time.monotonic() > deadline:
                complete = False
                break
            findings.append(work.check(name))
    forgets = work.forgets(fresh)  # before the victim is made anew
    held = work.verify(ledger, (fresh or (lambda: victim))())  # what is taken back counts for no attack
    if not broken:
        findings += battery_findings(ledger.broken_by, ledger.runs, stages)
        findings.append(_control(work, control, budget))
    findings += [forgets, *held]
    findings.append(sample_size(len(y)))
    default = ledger.default
    verdict, why = judge(findings, default, ledger.standing, ledger.clean, claim, complete, budget, ledger.tied)
    found = Audit(
        victim=victim.name,
        card=dict(card or {}),
        threat=threat,
        data=data,
        indices=work.indices,
        clean=tuple(ledger.clean),
        default=tuple(default),
        worst=tuple(ledger.standing),
        broken_by=tuple(ledger.broken_by),
        runs=tuple(ledger.runs),
        findings=tuple(findings),
        curves=work.curves(reaches and not broken and time.monotonic() <= deadline),
        verdict=verdict,
        reason=why,
        claim=claim,
        claim_source=claim_source,
        default_attack=ledger.runs[0].attack if ledger.runs else "none was run",
        budget=budget,
        complete=complete and not broken,
        seconds=sum(r.seconds for r in ledger.runs),
        provenance={
            **(provenance or {}),
            "wall seconds of this call": round(time.monotonic() - started, 1),
            "image indices sha256": hashlib.sha256(str(work.indices).encode()).hexdigest()[:16],
        },
    )
    return found, ledger.points


def _quiet(task: str, done: int, of: int, note: str) -> None:
    pass


def _never() -> bool:
    return False


def _control(work: Work, control: Victim | None, budget: Budget) -> Finding:
    """C18: an undefended victim of the same kind must fall to the same attack, or the attack is too weak."""
    name, limit = "an undefended control falls", "at most 5 % left"
    if control is None or work.threat.norm != "linf":
        return Finding(id="C18", name=name, level="not applicable", value=None, limit=limit, evidence="none was given")
    other = replace(work, victim=control, identity=f"{work.identity} control {fingerprint(control, work.x)}")
    stages = [s for s in battery(control, work.threat, "quick") if s.kind in ("default", "gradient", "code")]
    k = SAMPLE[budget]
    other.x, other.y, other.indices = work.x[:k], work.y[:k], work.indices[:k]
    ledger, _ = other.play(stages, math.inf)
    left = Rate(sum(ledger.standing), len(ledger.standing))
    weak = surely_over(left.k, left.n, 0.05)
    return Finding(
        id="C18", name=name, level="warn" if weak else "pass", value=left.value, limit=limit,
        evidence=f"{control.name} keeps {left}",
        advice="radius too small or attack too weak to tell a defended from an undefended victim" if weak else "",
    )  # fmt: skip
