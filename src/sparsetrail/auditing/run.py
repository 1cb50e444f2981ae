"""Judge a robustness claim: checks, a battery of attacks from cheap to expensive, the worst case per image, a verdict.

Every attack is run on the images that still stand, batch by batch; what is done is kept in a store, so that the same
call continues. An image that fell is shown to the victim once more, alone and rounded to grey levels, before it counts.
The rules of the verdict are those of docs/findings.md.
"""

import contextlib
import functools
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from sparsetrail import __version__
from sparsetrail.attacks import ATTACKS, attack
from sparsetrail.attacks.run import judged, mean_trace, samples
from sparsetrail.auditing.battery import Budget, Stage, battery
from sparsetrail.auditing.verdict import NOT_ANEW, battery_findings, judge, sample_size
from sparsetrail.checks import CHECKS, Case
from sparsetrail.checks.chance import at_least
from sparsetrail.checks.sanity import apart, draws
from sparsetrail.core import Audit, Finding, Problem, Rate, Run, Streams, Threat, Victim, correct, grey

T = TypeVar("T")
SAMPLE = {"quick": 32, "standard": 128, "thorough": 256}  # images the checks look at
WHOLE = ("S6",)  # asked here of all adversarials, not of the sample


@runtime_checkable
class Store(Protocol):
    """Where finished parts are kept: by what decides them, as core dataclasses."""

    def get(self, key: Mapping[str, Any], kind: type[T]) -> T | None:
        """The part of a key, None where it is not there yet."""

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep it."""


class Forgetful:
    """A store that keeps nothing."""

    def get(self, key: Mapping[str, Any], kind: type[T]) -> T | None:
        """Nothing."""
        return None

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Not kept."""


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
    After `minutes` no further attack is begun. `store` keeps finished parts under `identity`, which must tell victims
    and data apart. `say(task, done, of, note)` reports, `stop()` is asked between batches (KeyboardInterrupt follows).

    Adversarials come by position in `x`, in the attacked tensor's shape without the image axis. ValueError where input
    is not fit; nothing is attacked then.
    """
    refuse([threat], claim=claim, batch=batch, eot=eot, minutes=minutes, budget=budget)
    indices = tuple(range(len(y)) if indices is None else map(int, indices))
    _refuse_images(victim, threat, x, y, indices)
    _refuse_guides(victim, threat, x, y, guides)
    work = _Work(
        victim, threat, x, y, Forgetful() if store is None else store, identity, budget, batch, seed,
        samples(victim) if eot is None else eot, indices, data, say or _quiet, stop or _never,
    )  # fmt: skip
    started = time.monotonic()
    deadline = math.inf if minutes is None else started + 60 * minutes
    findings = [work.check(name) for name in CHECKS if not name.startswith("C") and name not in WHOLE]
    broken = [f for f in findings if f.id.startswith("S") and f.level == "fail"]
    reaches = not any(f.id == "G3" and f.level == "fail" for f in findings)
    stages = battery(victim, threat, budget, guides=guides, gradient=reaches)
    if broken:  # what is measured on a broken evaluation is worth nothing: the default attack shows what was claimed
        stages = stages[:1]
    if [(f.id, f.value) for f in broken] == [("S9", victim.classes)]:  # but decisions alone can be attacked as such
        blind = battery(victim, threat, budget, guides=guides, gradient=False)
        stages += [s for s in blind if s not in stages and s.attack not in ("square", "spsa")]
    ledger, complete = work.play(stages, deadline)
    if not broken:
        for name in (c for c in CHECKS if c.startswith("C") and c not in WHOLE):
            if time.monotonic() > deadline:
                complete = False
                break
            findings.append(work.check(name))
        findings += battery_findings(ledger.broken_by, ledger.runs, stages)
        findings.append(_control(work, control, budget))
    findings.append(work.forgets(fresh))
    findings += work.verify(ledger, (fresh or (lambda: victim))())
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


def refuse(
    threats: Sequence[Threat],
    *,
    claim: float | None = None,
    batch: int = 64,
    eot: int | None = None,
    minutes: float | None = None,
    budget: str = "standard",
) -> None:
    """ValueError for settings no audit can be made with; before anything is written."""
    if claim is not None and not 0 <= claim <= 1:
        raise ValueError(f"claim: expected a robust accuracy within 0..1, got {claim}; write 0.45 for 45 %")
    if claim is not None and len(threats) > 1:
        raise ValueError("claim: expected one threat to lay the claim beside, got several; audit them one by one")
    if budget not in SAMPLE:
        raise ValueError(f"budget: expected one of {', '.join(SAMPLE)}, got {budget!r}")
    if batch < 1 or (eot is not None and eot < 1):
        raise ValueError(f"expected at least one image a batch and one gradient a step, got batch={batch}, eot={eot}")
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes: expected 0 or more, got {minutes}")
    for t in threats:
        if t.eps == 0:
            raise ValueError("eps: expected a radius above 0, got 0; there is nothing to audit")
    if len(set(threats)) < len(threats):
        raise ValueError("threats: expected each once, got one twice")


def _refuse_images(victim: Victim, threat: Threat, x: Tensor, y: Tensor, indices: tuple[int, ...]) -> None:
    for what, t in (("images", x), ("labels", y)):
        if not isinstance(t, Tensor):
            raise ValueError(f"{what}: expected a tensor, got {type(t).__name__}; use torch.as_tensor")
    if x.dtype != torch.float32 or not bool(((x >= 0) & (x <= 1)).all()):
        ends = f"{float(x.min()):.3g}..{float(x.max()):.3g}" if x.numel() else "none"
        raise ValueError(
            f"images: expected float32 pixels in 0..1, got {x.dtype} in {ends}; divide 8-bit images by 255, and put "
            "mean and standard deviation into encode or logits"
        )
    if y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"labels: expected the class of every image [n], got {tuple(y.shape)} of {y.dtype}")
    if len(x) != len(y) or len(y) == 0 or len(indices) != len(y):
        raise ValueError(f"expected images with a label and a place each, got {len(x)}, {len(y)} and {len(indices)}")
    if int(y.min()) < 0 or int(y.max()) >= victim.classes:
        raise ValueError(f"labels: expected 0..{victim.classes - 1}, got {int(y.min())}..{int(y.max())}")
    _refuse_codebook(victim, x)
    if threat.space != "pixel" or threat.box != (0.0, 1.0):
        return
    on = grey(x)
    if bool(on.any()) and not bool(on.all()):
        raise ValueError(
            f"expected all images on 256 grey levels or none, got {int(on.sum())} of {len(on)}; round them"
        )
    if bool(on.all()) and threat.norm == "linf" and 255 * threat.eps < 1 - 1e-4:
        raise ValueError(f"eps: less than one grey level ({255 * threat.eps:.3g} of one) holds no other 8-bit image")


def _refuse_codebook(victim: Victim, x: Tensor) -> None:
    """A codebook must be the code of the grey levels, or attacks by it aim at another network."""
    if victim.codebook is None or victim.random or not bool(grey(x[:4]).all()):
        return
    with torch.no_grad():
        code = victim.encode(x[:4])
    book = victim.codebook.to(code)
    told = book[(x[:4] * 255).round().long()].movedim(-1, 0) if book.shape == (256, len(code)) else None
    if told is None or told.shape != code.shape or not torch.allclose(told, code, rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"{victim.name}: expected codebook [256 {len(code)}], the code of every grey level step by step, found "
            f"another, {tuple(victim.codebook.shape)}; leave it out, or give encode of the 256 levels"
        )


def _refuse_guides(victim: Victim, threat: Threat, x: Tensor, y: Tensor, guides: Sequence[Victim]) -> None:
    """Every guide must fit the victim and lead somewhere: found out on one image, not in the middle of the battery."""

    def look(p: Problem, g: Streams) -> None:
        p.grad(p.u0)

    for guide in guides:
        try:
            attack(look, victim, threat, x[:8], y[:8], guide=guide)
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{guide.name} cannot lead an attack on {victim.name}: {error}") from None


def fingerprint(victim: Victim, x: Tensor) -> str:
    """What tells victims of one name apart: scores and gradients of the first images, and weights where known.

    Of a victim that draws noise and cannot be reseeded weights alone, where they are known: its scores are others with
    every call. Of a gradient the places and signs of its eight largest entries an image: its last bits are not the same
    on every device and number of threads.
    """
    sha = hashlib.sha256(victim.name.encode())
    if not victim.random or victim.reseed is not None or victim.module is None:
        at = x[:8].detach().clone().requires_grad_()
        try:
            with torch.enable_grad():
                z = victim.scores(at)
                (g,) = torch.autograd.grad(z.float().square().sum(), at, allow_unused=True)
        except RuntimeError:  # the scores carry no gradient
            with torch.no_grad():
                z, g = victim.scores(at), None
        sha.update(z.detach().float().cpu().numpy().tobytes())
        if g is not None:
            flat = g.nan_to_num(0.0).flatten(1)
            top = flat.abs().topk(min(8, flat.shape[1]), 1).indices.sort(1).values
            sha.update(top.cpu().numpy().tobytes() + flat.gather(1, top).sign().to(torch.int8).cpu().numpy().tobytes())
    if victim.module is not None:
        for name, t in victim.module.state_dict().items():
            sha.update(name.encode() + t.detach().cpu().float().numpy().tobytes())
    return sha.hexdigest()[:16]


def _quiet(task: str, done: int, of: int, note: str) -> None:
    pass


def _never() -> bool:
    return False


@dataclass
class _Ledger:
    """What is known of every image so far."""

    clean: list[bool]
    default: list[bool]
    standing: list[bool]
    broken_by: list[str | None]
    runs: list[Run]
    points: dict[int, Tensor]
    tied: set[int]  # images that an attack brought to a tie, whether or not they fell to another


@dataclass
class _Work:
    """One audit under way."""

    victim: Victim
    threat: Threat
    x: Tensor
    y: Tensor
    store: Store
    identity: str
    budget: Budget
    batch: int
    seed: int
    eot: int
    indices: tuple[int, ...]
    data: str
    say: Callable[[str, int, int, str], None]
    stop: Callable[[], bool]

    def key(self, **more: Any) -> dict[str, Any]:
        """What decides a part of this audit."""
        t = self.threat
        return {
            "audit": self.identity,
            "version": __version__,
            "route": self.victim.path(t.space),
            "threat": [t.norm, t.eps, t.space, *t.box],
            "seed": self.seed,
            "eot": self.eot,
        } | more

    def kept(self, key: dict[str, Any], kind: type[T], make: Callable[[], T]) -> T:
        """The part of a key from the store, or made and kept."""
        found = self.store.get(key, kind)
        if found is None:
            if self.stop():
                raise KeyboardInterrupt
            self._reseed(key)
            found = make()
            self.store.put(key, found)
        return found

    def _reseed(self, key: dict[str, Any]) -> None:
        """What a part draws must not depend on which parts before it were kept: a repeated command continues."""
        if self.victim.reseed is not None:
            sha = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode())
            self.victim.reseed(int.from_bytes(sha.digest()[:4], "big"))

    @functools.cached_property
    def case(self) -> Case:
        """The images the checks look at; one case, since checks share what they ask for."""
        k = SAMPLE[self.budget]
        return Case(
            victim=self.victim, threat=self.threat, x=self.x[:k], y=self.y[:k], seed=self.seed, eot=self.eot,
            batch=self.batch,
        )  # fmt: skip

    def check(self, name: str) -> Finding:
        """One check on the sample."""
        checks = list(CHECKS)
        self.say("checks", checks.index(name), len(checks), name)
        found = self.kept(
            self.key(check=name, images=self.indices[: SAMPLE[self.budget]]), Finding, lambda: CHECKS[name](self.case)
        )
        self.say("checks", checks.index(name) + 1, len(checks), f"{name}: {found.level}")
        return found

    def play(self, stages: Sequence[Stage], deadline: float) -> tuple[_Ledger, bool]:
        """Run the battery on the images standing; has all of it been run?"""
        clean = self.clean()
        ledger = _Ledger(clean, list(clean), list(clean), [None] * len(clean), [], {}, set())
        pace: list[tuple[float, float]] = []
        for i, stage in enumerate(stages):
            if time.monotonic() > deadline:
                return ledger, False
            rows = [j for j, held in enumerate(ledger.standing) if held]
            if not rows:
                break
            bound = self._left(stages[i:], len(rows), pace)
            parts = []
            for at in range(0, len(rows), self.batch):
                some = rows[at : at + self.batch]
                note = f"{len(rows)} standing{bound}"
                self.say(f"{i + 1}/{len(stages)} {stage.label}", at, len(rows), note)
                parts.append(self.part(stage, some))
            run = join(parts)
            ran = sum(p.seconds for p in parts)
            pace.append((ran, stage.calls * len(rows)))
            assert run.adversarial is not None
            points = run.adversarial.movedim(self.threat.axis, 0)
            for j, right, held, point in zip(rows, run.clean, run.robust, points, strict=True):
                if not held and right:  # of a victim that draws noise, the clean image alone can fail a vote
                    ledger.standing[j], ledger.broken_by[j], ledger.points[j] = False, stage.label, point.clone()
            ledger.tied |= {rows[k] for k in run.tied}
            if i == 0:
                ledger.default = list(ledger.standing)
            ledger.runs.append(replace(run, attack=stage.label, adversarial=None))
            left = sum(ledger.standing)
            self.say(f"{i + 1}/{len(stages)} {stage.label}", len(rows), len(rows), f"{len(rows)} -> {left} standing")
        return ledger, True

    def _left(self, stages: Sequence[Stage], standing: int, pace: Sequence[tuple[float, float]]) -> str:
        """How long the rest takes at most, if no further image falls."""
        seconds, calls = (sum(p) for p in zip(*pace, strict=True)) if pace else (0.0, 0.0)
        if not calls:
            return ""
        rest = sum(s.calls for s in stages) * standing * seconds / calls
        return f", at most {rest / 60:.0f} min left" if rest > 90 else f", at most {rest:.0f} s left"

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Errors of a victim's own code in here become a ValueError that says whose they are."""
        try:
            yield
        except (ValueError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"{self.victim.name}: expected scores for any number of float32 images, got {type(error).__name__}: "
                f"{error}. A network that keeps state from call to call is reset by sparsetrail.stateful(net, encode, "
                "classes=...); one of a fixed batch size or of another dtype needs padding or a cast in logits"
            ) from error

    def clean(self) -> list[bool]:
        """Which images are classified correctly, by most of ten calls for a victim that draws noise."""
        f, votes = self.victim.judge("pixel"), 10 if self.victim.random else 1
        flags: list[bool] = []
        self._reseed(self.key(clean=1))
        with torch.no_grad():
            for i in range(0, len(self.y), self.batch):
                with self.asking():
                    flags += judged(f, self.x[i : i + self.batch], self.y[i : i + self.batch], votes)[0].tolist()
        return flags

    def part(self, stage: Stage, rows: list[int]) -> Run:
        """One stage on one batch of images."""
        places = tuple(self.indices[j] for j in rows)
        key = self.key(
            attack=stage.attack, knobs=dict(stage.knobs), routes=[str(r) for r in stage.routes], images=places,
            guide=fingerprint(stage.guide, self.x) if stage.guide else "",
        )  # fmt: skip

        def make() -> Run:
            at = torch.tensor(rows, device=self.x.device)
            with self.asking():
                return attack(
                    ATTACKS[stage.attack], self.victim, self.threat, self.x[at], self.y[at],
                    route=stage.routes or None, guide=stage.guide, eot=self.eot, batch=self.batch, seed=self.seed,
                    keep=True, indices=places, data=self.data, **stage.knobs,
                )  # fmt: skip

        return self.kept(key, Run, make)

    def forgets(self, fresh: Callable[[], Victim] | None) -> Finding:
        """Does the victim, after all it was asked, score points near the images as one made anew does?

        A victim that remembers what it was shown can answer an attack's points by the clean image beside them. As much
        as ten times what a change of the input in its last bit does is rounding, as in S5; of victims that draw noise,
        means over draws are compared, as there. The new one is made after the old one was asked: making it may give
        anew what the old one reaches into.
        """
        name, limit = "nothing is remembered from the attacks", "lower end of the share of images that change 0.05"
        if fresh is None:
            return Finding(id="S3f", name=name, level="not applicable", value=None, limit=limit, evidence=NOT_ANEW)
        case, advice = self.case, "score every image by itself: keep nothing of those before it"
        u = case.within(case.u0 + case.corner * case.draw(case.u0, 7, signs=True), case.u0)
        parts = u.split(self.batch, self.threat.axis)

        def scores(f: Callable[[Tensor], Tensor]) -> list[Tensor]:
            with self.asking(), torch.no_grad():
                return [f(part).float() for part in parts]

        if self.victim.random:
            self._reseed(self.key(check="S3f"))
            used = draws(lambda: torch.cat(scores(case.f)))
            f = fresh().of(self.threat.space)
            new = draws(lambda: torch.cat(scores(f)))
            found = apart(case, {"beside those of a victim made anew": [used, new]}, advice)
            return Finding(
                id="S3f", name=name, level=found.level, value=found.value, limit=found.limit, evidence=found.evidence,
                advice=found.advice if found.level == "fail" else "",
            )  # fmt: skip
        before = scores(case.f)
        f, moved = fresh().of(self.threat.space), 0
        for part, a, b in zip(parts, before, scores(f), strict=True):
            with self.asking(), torch.no_grad():
                bit = f(case.boxed(part * (1 + 2**-23 * case.draw(part, 1, signs=True)))).float()
            size = torch.maximum(a.abs(), b.abs()).nan_to_num().amax().clamp(min=1)
            slack = max(1e-4 * float(size), 10 * float((b - bit).abs().nan_to_num().max()))
            moved += int((~((a - b).abs().amax(1) <= slack) & a.isfinite().all(1)).sum())
        fails = at_least(moved, case.n) > 0.05
        return Finding(
            id="S3f", name=name, level="fail" if fails else "pass", value=float(moved), limit=limit,
            evidence=f"{moved} of {case.n} points at corners of the ball get other scores than from a victim made anew",
            advice=advice if fails else "",
        )  # fmt: skip

    def verify(self, ledger: _Ledger, victim: Victim) -> list[Finding]:
        """Show every adversarial to `victim` once more, alone; what does not hold is taken back."""
        bad = verify(victim, self.threat, self.x, self.y, ledger.points)
        for j in bad:
            ledger.standing[j], ledger.broken_by[j] = True, None
            ledger.default[j] = ledger.clean[j]
            del ledger.points[j]
        total = len(bad) + len(ledger.points)
        noise = wavers(self.victim, bad, total)
        why = "; ".join(f"{k} {v}" for k, v in sorted(Counter(bad.values()).items()))
        return [
            Finding(
                id="S6",
                name="adversarials verified again",
                level="warn" if noise else "fail" if bad else "pass" if total else "not applicable",
                value=float(len(bad)),
                limit="0",
                evidence=f"{total - len(bad)} of {total} adversarials hold, shown alone" + (f": {why}" if bad else ""),
                advice="an image alone must score as in a batch, and twice the same; see S3, S4, S5" if bad else "",
            )
        ]

    def curves(self, gradient: bool) -> dict[str, Any]:
        """Mean margin by step and accuracy by radius, on the sample, for the page."""
        if not gradient or self.threat.norm != "linf":
            return {}
        key = self.key(curves=1, images=self.indices[: SAMPLE[self.budget]])
        case, eps = self.case, self.threat.eps
        curves: dict[str, dict[str, Any]] = {
            "pgd": {"steps": 40, "step": eps / 8}, "sapgd": {"steps": 40}, "apgd": {"steps": 40},
            "codebook": {"steps": 40},
        }  # fmt: skip
        if self.victim.codebook is None or self.threat.space == "encoded":
            del curves["codebook"]
        whole = self.threat.box[1] - self.threat.box[0]
        radii = [0.0, *(min(whole, k / 255) for k in (1, 2, 4, 8, 16, 32, 64, 128, 255) if k / 255 < 2 * whole)]
        out: dict[str, Any] = {"loss": []}
        accuracy, of = [], len(curves) + len(radii)
        for i, (name, knobs) in enumerate(curves.items()):
            self.say("curves", i, of, f"margin by step, {name}")
            run = self.kept(key | {"curve": name}, Run, lambda name=name, knobs=knobs: self._whole(case, name, knobs))
            steps = list(range(len(run.trace)))
            out["loss"].append({"label": name, "steps": steps, "mean": list(run.trace)})
        for i, radius in enumerate(radii, len(curves)):
            self.say("curves", i, of, f"accuracy by radius, {radius:.4g}")
            knobs = {"steps": 10, "step": radius / 4}
            run = self.kept(
                key | {"radius": radius}, Run,
                lambda radius=radius, knobs=knobs: self._whole(case, "pgd", knobs, replace(self.threat, eps=radius)),
            )  # fmt: skip
            accuracy.append(run.accuracy.value)
        self.say("curves", of, of, "")
        out["eps"] = {"attack": "pgd (steps 10, step eps/4)", "eps": radii, "accuracy": accuracy, "n": len(case.y)}
        return out

    def _whole(self, case: Case, name: str, knobs: dict[str, Any], threat: Threat | None = None) -> Run:
        drop = threat is not None
        return attack(
            ATTACKS[name], case.victim, threat or case.threat, case.x, case.y, batch=self.batch, seed=self.seed,
            eot=self.eot, drop=drop, **knobs,
        )  # fmt: skip


def join(parts: Sequence[Run]) -> Run:
    """Runs of one attack on several batches as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    zero = [(p.zero_gradient, p.backwards) for p in parts if p.zero_gradient is not None]
    axis = first.threat.axis
    return replace(
        first,
        clean=sum((p.clean for p in parts), ()),
        robust=sum((p.robust for p in parts), ()),
        indices=sum((p.indices or () for p in parts), ()),
        ties=sum(p.ties for p in parts),
        forwards=sum(p.forwards for p in parts),
        backwards=sum(p.backwards for p in parts),
        dead_examples=sum(p.dead_examples for p in parts),
        nonfinite=sum(p.nonfinite for p in parts),
        silent=sum(p.silent for p in parts),
        tied=tuple(
            i + at for at, p in zip(accumulate((p.n for p in parts), initial=0), parts, strict=False) for i in p.tied
        ),
        zero_gradient=sum(z * n for z, n in zero) / sum(n for _, n in zero) if zero else None,
        trace=mean_trace([[(m, sum(p.clean)) for m in p.trace] for p in parts if any(p.clean)]),
        seconds=sum(p.seconds for p in parts),
        adversarial=torch.cat([p.adversarial for p in parts if p.adversarial is not None], axis)
        if first.adversarial is not None
        else None,
    )


def verify(
    victim: Victim, threat: Threat, x: Tensor, y: Tensor, points: Mapping[int, Tensor], *, votes: int = 10
) -> dict[int, str]:
    """Adversarials that do not hold, by position in `x`, with the reason; each is shown alone, in float32.

    A point must be finite, inside ball and box, in pixel space a grey-level image where `x` is one, and classified
    strictly wrong, by most of `votes` calls where the victim draws noise.
    """
    judge, axis, bad = victim.judge(threat.space), threat.axis, {}
    coded = threat.space == "encoded"
    with torch.no_grad():
        for j, point in points.items():
            u = point.to(x).unsqueeze(axis)
            clean = x[j : j + 1]
            u0 = victim.encode(clean) if coded else clean
            grid = not coded and bool(grey(clean).all())
            _, m = judged(judge, u, y[j : j + 1], votes if victim.random else 1)
            if not bool(correct(judge(u0).float(), y[j : j + 1]).all()) and not victim.random:
                bad[j] = "wrong before the attack"
            elif not bool(u.isfinite().all()):
                bad[j] = "not finite"
            elif not (coded and victim.random) and not bool(threat.contains(u, u0).all()):  # u0 is another draw there
                bad[j] = "outside ball or box"
            elif grid and not bool(grey(u).all()):
                bad[j] = "off the grey levels"
            elif not bool(m > 0):
                bad[j] = "not adversarial"
    return bad


def wavers(victim: Victim, bad: Mapping[int, str], shown: int) -> bool:
    """Are adversarials that do not hold votes of a victim that draws noise, which may turn, and surely not most?"""
    return bool(bad) and victim.random and set(bad.values()) <= {"not adversarial"} and at_least(len(bad), shown) <= 0.5


def _control(work: _Work, control: Victim | None, budget: Budget) -> Finding:
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
    weak = left.interval()[0] > 0.05
    return Finding(
        id="C18", name=name, level="warn" if weak else "pass", value=left.value, limit=limit,
        evidence=f"{control.name} keeps {left}",
        advice="radius too small or attack too weak to tell a defended from an undefended victim" if weak else "",
    )  # fmt: skip
