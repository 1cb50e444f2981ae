"""One audit under way: attacks on the images that still stand, kept part by part, and the ledger per image.

An image that fell is shown to the victim once more, alone and rounded to grey levels, before it counts.
"""

import contextlib
import functools
import hashlib
import json
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
from sparsetrail.attacks.run import judged
from sparsetrail.auditing.battery import Budget, Stage
from sparsetrail.auditing.verdict import NOT_ANEW
from sparsetrail.checks import CHECKS, Case
from sparsetrail.checks.chance import surely_over
from sparsetrail.checks.sanity import apart, draws
from sparsetrail.core import Finding, Run, Threat, Victim, correct, grey
from sparsetrail.core.precision import in_full

T = TypeVar("T")
SAMPLE = {"quick": 32, "standard": 128, "thorough": 256}  # images the checks look at


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
class Work:
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
            "format": 2,
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
        self.victim.draw_by(json.dumps(key, sort_keys=True, default=str))

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
            self.key(check=name, images=self.indices[: SAMPLE[self.budget]], batch=self.batch), Finding,
            lambda: CHECKS[name](self.case),
        )  # fmt: skip
        self.say("checks", checks.index(name) + 1, len(checks), f"{name}: {found.level}")
        return found

    def play(self, stages: Sequence[Stage], deadline: float) -> tuple[_Ledger, bool]:
        """Run the battery on the images standing, its first attack whatever the deadline; has all of it been run?"""
        clean = self.clean()
        ledger = _Ledger(clean, list(clean), list(clean), [None] * len(clean), [], {}, set())
        pace: list[tuple[float, float]] = []
        for i, stage in enumerate(stages):
            if i and time.monotonic() > deadline:
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
            run = self._confirmed(stage, join(parts), rows)
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

    def _confirmed(self, stage: Stage, run: Run, rows: Sequence[int]) -> Run:
        """Of a victim that draws noise: a run whose adversarials fool once more, shown alone as in the end.

        The vote of a point near the boundary turns; an image that it would take back is met by later attacks instead.
        """
        if not self.victim.random or run.adversarial is None:
            return run
        points = run.adversarial.movedim(self.threat.axis, 0)
        fell = {j: p for j, r, h, p in zip(rows, run.clean, run.robust, points, strict=True) if r and not h}
        self._reseed(self.key(confirmed=stage.label, images=[self.indices[j] for j in fell]))
        bad = verify(self.victim, self.threat, self.x, self.y, fell)
        return replace(run, robust=tuple(held or j in bad for j, held in zip(rows, run.robust, strict=True)))

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
        name, limit = "nothing is remembered from the attacks", "surely a share of 0.05 of images that change"
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
        fails = surely_over(moved, case.n, 0.05)
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
            out["loss"].append({"label": name, "steps": steps, "mean": list(run.trace), "n": len(case.y)})
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
    first = replace(parts[0], trace=())  # of how many images each mean is, runs do not tell
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
        silent=None if any(p.silent is None for p in parts) else sum(p.silent or 0 for p in parts),
        tied=tuple(
            i + at for at, p in zip(accumulate((p.n for p in parts), initial=0), parts, strict=False) for i in p.tied
        ),
        zero_gradient=sum(z * n for z, n in zero) / sum(n for _, n in zero) if zero else None,
        seconds=sum(p.seconds for p in parts),
        adversarial=torch.cat([p.adversarial for p in parts if p.adversarial is not None], axis)
        if first.adversarial is not None
        else None,
    )


@in_full
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
    most = surely_over(len(bad), shown, 0.5)
    return bool(bad) and victim.random and set(bad.values()) <= {"not adversarial"} and not most
