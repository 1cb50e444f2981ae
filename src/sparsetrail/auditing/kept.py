"""Does a kept audit follow from its own parts? Flags, runs, budget and verdict are held against each other."""

import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sparsetrail.attacks.run import judged
from sparsetrail.auditing.battery import Budget, battery
from sparsetrail.auditing.verdict import judge
from sparsetrail.auditing.work import SAMPLE
from sparsetrail.core import Audit, Victim, correct
from sparsetrail.core.precision import in_full

AGAIN = 32  # scorings of an image whose kept flag is in doubt


def contradiction(found: Audit, victim: Victim, *, code: bool = False, words: bool = True) -> str:
    """What in an audit of `victim` does not follow from the rest of it: 'expected ..., found ...', or '' if all does.

    The ledger is played again from the kept runs. Runs that fit the battery of no budget, as those of an older version,
    say nothing of the budget. `code` says that a gradient reaches the code (`reaches_code`). Without `words` the reason
    may be worded otherwise, as another version words it.
    """
    for j, (clean, default, worst) in enumerate(zip(found.clean, found.default, found.worst, strict=True)):
        if worst > default or default > clean:
            return (
                f"expected images that stand at the end to be right and to stand after the default attack, found image "
                f"{j} clean {clean}, default {default}, worst {worst}"
            )
    standing, tied = list(found.clean), set[int]()
    fell: list[str | None] = [None] * found.n
    for run in found.runs:
        rows = [j for j, held in enumerate(standing) if held]
        places = tuple(found.indices[j] for j in rows)
        if len(run.clean) != len(rows) or len(run.robust) != len(rows) or (run.indices or places) != places:
            return f"expected {run.attack} on the {len(rows)} images that stood before it, found it on others"
        for j, right, held in zip(rows, run.clean, run.robust, strict=True):
            if right and not held:
                standing[j], fell[j] = False, run.attack
        tied |= {rows[k] for k in run.tied if k < len(rows)}
    back = sum(w and not s for w, s in zip(found.worst, standing, strict=True))
    taken = next((f.value for f in found.findings if f.id == "S6"), None)
    if taken is not None and back != taken:
        return f"expected {taken:g} images that fell to a run and stand at the end, as S6 took back, found {back}"
    first = found.runs[0].attack if found.runs else None
    for j, (by, worst) in enumerate(zip(found.broken_by, found.worst, strict=True)):
        if by != (None if worst else fell[j]):
            return f"expected image {j} broken by {None if worst else fell[j]}, as the runs say, found {by}"
        if found.default[j] != (found.clean[j] and (by is None or by != first)):
            return f"expected the default flags of the first run, found another for image {j}"
    if first is not None and found.default_attack != first:
        return f"expected the first run, {first}, as the default attack, found {found.default_attack}"
    if said := _budget(found, victim, any(standing), code):
        return said
    told = judge(
        found.findings, found.default, found.worst, found.clean, found.claim, found.complete,
        cast(Budget, found.budget), tied,
    )  # fmt: skip
    if told[0] != found.verdict or (words and told[1] != found.reason):
        return (
            f"expected the verdict that its findings and flags give, {told[0]}: {told[1]}, found {found.verdict}: "
            + found.reason
        )
    return ""


def _budget(found: Audit, victim: Victim, standing: bool, code: bool) -> str:
    """The same of budget, completeness and claim: from the attacks that were run and from the command, where kept."""
    if found.budget not in SAMPLE:
        return f"expected a budget of {', '.join(SAMPLE)}, found {found.budget}"
    command = str(found.provenance.get("command", ""))
    if asked := re.search(r" --budget (\S+)", command):
        if asked[1] != found.budget:
            return f"expected the budget {asked[1]} of its command, found {found.budget}"
        claim = re.search(r" --claim (\S+)", command)
        here = None if found.claim is None else f"{found.claim:g}"
        if (claim and claim[1]) != here:
            return f"expected {claim[1] if claim else 'no'} claim as in its command, found {here or 'none'}"
    ran = [r.attack for r in found.runs if ", from " not in r.attack]  # transfer: whose, a kept audit need not know
    reaches = not any(f.id == "G3" and f.level == "fail" for f in found.findings)
    labels = {
        b: [s.label for s in battery(victim, found.threat, cast(Budget, b), gradient=reaches, code=code)]
        for b in SAMPLE
    }
    fits = [b for b, names in labels.items() if ran == names[: len(ran)]]
    if fits and found.budget not in fits:
        return f"expected runs of the {found.budget} battery, found those of the {fits[0]} one"
    whole = len(labels[found.budget])
    if fits and found.complete and standing and len(ran) < whole:
        return f"expected all {whole} attacks of a battery that is called complete, found {len(ran)}"
    return ""


@in_full
def misjudged(victim: Victim, x: Tensor, y: Tensor, clean: Sequence[bool], *, batch: int = 64) -> list[int]:
    """Images of `x` [n c h w] with labels `y` [n] that, scored anew, are surely not as the `clean` flags say.

    An image that wavers, since the victim draws noise or the last bit of its pixels decides, may have either flag.
    """
    f, votes = victim.judge("pixel"), 10 if victim.random else 1
    kept, g = torch.tensor(clean, device=y.device), torch.Generator().manual_seed(0)
    with torch.no_grad():
        parts = zip(x.split(batch), y.split(batch), strict=True)
        now = torch.cat([judged(f, u, labels, votes)[0] for u, labels in parts])
        doubt = (now != kept).nonzero()[:, 0]
        if len(doubt) == 0:
            return []
        at, labels, agree = x[doubt], y[doubt], torch.zeros(len(doubt), device=y.device)
        for _ in range(AGAIN):
            bits = 2**-23 * (2 * torch.randint(0, 2, at.shape, generator=g) - 1).to(at)
            parts = zip((at * (1 + bits)).clamp(0, 1).split(batch), labels.split(batch), strict=True)
            agree += torch.cat([correct(f(u).float(), some) for u, some in parts]) == kept[doubt]
    return doubt[agree <= (AGAIN // 20 if victim.random else 0)].tolist()
