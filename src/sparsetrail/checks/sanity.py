"""S: is the evaluation itself sound? A failure here makes every number that follows meaningless."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsetrail._shapes import Float
from sparsetrail.attacks import attack, noise, pgd
from sparsetrail.checks.case import Case, Outcome, Skip, check, flags, graded
from sparsetrail.checks.chance import surely_over, surely_under
from sparsetrail.core import Linf, Rate, Run, Victim, correct, margin


@check("S0", "finite scores")
def finite_scores(case: Case) -> Outcome:
    """Scores are finite at clean images, at corners of the ball and at adversarial points, and so are the network's
    weights (a neuron turns a NaN into silence). Any other fails."""
    corner = case.within(case.u0 + case.corner * case.draw(case.u0, signs=True), case.u0)
    points = {"clean": case.u0, "corner": corner}
    module = case.victim.module
    broken = [] if module is None else [
        *(k for k, t in module.named_parameters() if not bool(t.isfinite().all())),
        *(k for k, t in module.named_buffers() if bool(t.isnan().any())),  # a mask may be infinite
    ]  # fmt: skip
    if bool(case.z.isfinite().all()):
        points["attacked"] = _points(case.usual).to(case.u0)
    bad = {k: int((~case.scores(u).isfinite()).any(1).sum()) for k, u in points.items()}
    total = sum(bad.values())
    where = ", ".join(f"{v} of {case.n} {k}" for k, v in bad.items())
    return Outcome(
        graded(False, total + len(broken) > 0),
        total + len(broken),
        "0",
        f"images with a NaN or infinite score: {where}"
        + (f"; {len(broken)} of the network's tensors are not finite: {', '.join(broken[:3])}" if broken else ""),
        "find the operation that overflows or divides by zero; a NaN is never a success here, so it hides adversarials",
    )


@check("S1", "valid adversarials")
def own_adversarials(case: Case) -> Outcome:
    """The points of the case's own attack stand up to `validity`."""
    return validity(case, case.usual)


def validity(case: Case, run: Run) -> Outcome:
    """Adversarials are finite, in ball and box (1e-6), and still fool once rounded to 256 grey levels. Any other fails.

    Croce & Hein 2020, arXiv:2003.01690 (final check of AutoAttack's code); rounding as an image file rounds.
    """
    if run.adversarial is None:
        raise Skip("the run kept no adversarial points (keep=True)")
    u = run.adversarial.to(case.u0)
    fooled = flags(run.clean) & ~flags(run.robust)
    outside = ~run.threat.contains(u, case.u0).cpu()
    lost = torch.zeros_like(fooled)  # stays so for a random victim: votes on a point near the boundary waver
    count = int(fooled.sum())
    held = f"{count} {'adversarial' if count == 1 else 'adversarials'} in {case.threat.space} space, not rounded"
    if case.grid and not case.victim.random:
        rounded = run.threat.snap(u.nan_to_num(), case.u0)
        with torch.no_grad():
            z = torch.cat([case.victim.judge("pixel")(part).float() for part in rounded.split(case.batch)])
        lost = fooled & (margin(z, case.y) <= 0).cpu()
        gone = int(lost.sum())
        held = f"rounded to grey levels, {gone} of {count} no longer {'fools' if gone == 1 else 'fool'}"
    bad = int((outside | lost).sum())
    advice = "project to the ball and round before judging; count what then fools"
    if bad and not bool(outside.any()):
        advice = "where S3 or S4 fails, begin there: scores change by themselves; else round before judging"
    return Outcome(
        graded(False, bad > 0),
        bad,
        "0",
        f"{int(outside.sum())} of {case.n} points outside ball or box or not finite; {held}",
        advice,
    )


@check("S2", "nothing changes while scoring")
def unchanged(case: Case) -> Outcome:
    """Weights and mode are the same before and after scores and gradients, buffers once the same images were scored
    again after others (a membrane that is reset with every call is one). Change, or train mode, fails; a change of
    whole numbers alone, such as a count of calls, warns."""
    module = case.victim.module
    if module is None:
        raise Skip("the victim names no module to look at")
    training = sum(m.training for m in module.modules()) if case.victim.mode == "eval" else 0
    before, modes = _digest(module), [m.training for m in module.modules()]
    weights, again = {k for k, _ in module.named_parameters()}, before
    if not module.training:
        case.scores(case.u0)
        case.reach(case.u0, case.y)
        again = _digest(module)
        case.scores(case.boxed(case.u0.flip(case.u0.ndim - 1)))
        case.scores(case.u0)
        case.reach(case.u0, case.y)
    after = _digest(module)
    held = {k: sha for k, sha in before.items() if k in weights} | {k: v for k, v in again.items() if k not in weights}
    moved = [k for k in held if held[k] != after.get(k)] + [k for k in after if k not in held]
    switched = sum(a != b.training for a, b in zip(modes, module.modules(), strict=True))
    words = f"; first {moved[0]}" if moved else ""
    counts = {k for k, t in module.named_buffers() if not t.is_floating_point()}
    return Outcome(
        graded(bool(moved), bool(set(moved) - counts or training or switched)),
        len(moved),
        "0",
        f"{len(moved)} of {len(held)} tensors changed{words}; {training} modules in train mode, {switched} switched",
        "call net.eval() and keep running statistics fixed while attacking; restore the weights from their file",
    )


@check("S3", "no state from one batch to the next")
def state_reset(case: Case) -> Outcome:
    """logits(u), logits(v), logits(u) again: first and third equal to 1e-5. (Forgotten reset: SpikingJelly #594.)

    Of a victim that draws noise, the scores after one stranger and after another, as `apart` tells.
    """
    if case.victim.random:
        few = case.x[: min(32, case.batch)]
        return apart(
            case,
            {"after another batch": [_after(case, few, few.flip(3)), _after(case, few, 1 - few)]},
            "reset every membrane and counter at the start of each forward",
        )
    with torch.no_grad():
        u = case.victim.encode(case.x)
        a = case.victim.logits(u).float()
        case.victim.logits(u.flip(u.ndim - 1).flip(0))
        b = case.victim.logits(u).float()
    gap = _gap(a, b)
    return Outcome(
        graded(False, not gap <= 1e-5),
        gap,
        "1e-5 of the largest score",
        f"scores of the same {case.n} inputs differ by {gap:.2g} after another batch was scored in between",
        "reset every membrane and counter at the start of each forward (undeclared noise looks the same, see S4)",
    )


@check("S3e", "no state in the encoder")
def encoder_reset(case: Case) -> Outcome:
    """encode(x), encode(x'), encode(x) again: first and third equal to 1e-5. A phase code that counts on fails."""
    if case.victim.random:
        raise Skip("the victim draws noise: equal codes are not expected")
    with torch.no_grad():
        a = case.victim.encode(case.x).float()
        case.victim.encode(1 - case.x)
        b = case.victim.encode(case.x).float()
    gap = _gap(a, b)
    return Outcome(
        graded(False, not gap <= 1e-5),
        gap,
        "1e-5",
        f"the codes of the same {case.n} images, others coded in between, differ by {gap:.2g}",
        "reset the encoder's counter before each batch (undeclared noise in it looks the same, see S4)",
    )


@check("S4", "the same scores twice")
def determinism(case: Case) -> Outcome:
    """Five forwards from pixels; scores of length one differ by no more than 1e-4 (AutoAttack's checks.py)."""
    with torch.no_grad():
        z = [nn.functional.normalize(case.victim.scores(case.x).float(), dim=1) for _ in range(5)]
    gap = max(float((v - z[0]).norm(dim=1).max()) for v in z[1:])
    random = not gap <= 1e-4
    declared = case.victim.random
    return Outcome(
        graded(declared and not random, random and not declared),
        gap,
        "1e-4 unless declared random, and then more",
        f"5 forwards of {case.n} images differ by {gap:.2g}; declared {'random' if declared else 'deterministic'}",
        "declare Victim(random=True) and attack with eot > 1, or remove what draws (or what is not reset, see S3)",
    )


@check("S5", "an image is scored alone")
def batch_invariance(case: Case) -> Outcome:
    """Scores alone, permuted and beside strangers equal those in the batch, to 1e-4 or ten times what rounding does.

    So do those of pixels by `logits(encode(x))` instead of the shortcut, where there is one. What rounding does is
    measured: the input changed in its last bit. A spike within rounding of the threshold may flip when a library sums
    in another order, as GPUs do from one batch size to the next, which is no fault: surely more than one image in
    twenty must change. (foolbox #243, TRADES #3.) Of a victim that draws noise,
    as `apart` tells.
    """
    axis, u = case.axis, case.u0.narrow(case.axis, 0, min(case.n, case.batch))
    if case.victim.random:
        few = u.narrow(axis, 0, min(8, u.shape[axis]))
        whole = draws(lambda: case.f(u).float()[: few.shape[axis]])
        alone = draws(lambda: torch.cat([case.f(part).float() for part in few.split(1, axis)]))
        beside = draws(lambda: case.f(torch.cat([few, case.boxed(1 - u)], axis)).float()[: few.shape[axis]])
        return apart(
            case,
            {"alone": [whole, alone], "beside strangers": [whole, beside]},
            "use running statistics in eval mode, and nothing else that mixes the images of a batch",
        )
    count = u.shape[axis]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(case.seed)).to(u.device)
    with torch.no_grad():
        z = case.f(u).float()
        few = min(8, count)
        alone = torch.cat([case.f(part).float() for part in u.narrow(axis, 0, few).split(1, axis)])
        shuffled = case.f(u.index_select(axis, order)).float()
        padded = case.f(torch.cat([u, case.boxed(1 - u)], axis)).float()[:count]
        last_bit = case.f(case.boxed(u * (1 + 2**-23 * case.draw(u, 1, signs=True)))).float()
        plain = None
        if case.victim.shortcut is not None and case.threat.space == "pixel":
            plain = case.victim.logits(case.victim.encode(u)).float()
    gaps = {"alone": _gaps(z[:few], alone), "permuted": _gaps(z[order], shuffled), "padded": _gaps(z, padded)}
    gaps |= {} if plain is None else {"without the shortcut": _gaps(z, plain)}
    slack = max(1e-4, 10 * _gap(z, last_bit))
    moved = {k: Rate(int((~(gap <= slack)).sum()), len(gap)) for k, gap in gaps.items()}
    return Outcome(
        graded(False, any(surely_over(r.k, r.n, 0.05) for r in moved.values())),
        max(float(gap.max()) for gap in gaps.values()),
        f"surely a share of 0.05 of images that change by {slack:.2g} of the largest score",
        ", ".join(f"{k} {float(gap.max()):.2g} ({moved[k].k} of {moved[k].n} images over)" for k, gap in gaps.items())
        + ": change of scores",
        "use running statistics in eval mode, and nothing else that mixes the images of a batch",
    )


@check("S6", "adversarials judged alone")
def judged_alone(case: Case) -> Outcome:
    """What fooled the victim in a batch fools it in a batch of one, by encode and logits without shortcut. All but
    chance of it, which is rounding of a near tie: more than one image in twenty fails. (AutoAttack #74.)"""
    run, space = case.usual, case.threat.space
    if case.victim.random:
        raise Skip("the victim draws noise: points are judged by votes")
    fooled = (flags(run.clean) & ~flags(run.robust)).nonzero()[:32, 0].to(case.x.device)
    if len(fooled) == 0:
        raise Skip("the attack fooled no image")
    u, logits = _points(run).to(case.u0).index_select(case.axis, fooled), case.victim.exact or case.victim.logits
    with torch.no_grad():
        z = [logits(part if space == "encoded" else case.victim.encode(part)) for part in u.split(1, case.axis)]
    lost = int((margin(torch.cat(z).float(), case.y[fooled]) <= 0).sum())
    return Outcome(
        graded(lost > 0, lost > max(1, len(fooled) // 20)),
        lost,
        "0; 1 in 20 for near ties",
        f"{lost} of {len(fooled)} adversarials do not fool when scored one by one, without the shortcut",
        "find what makes a score depend on the batch (S5), on earlier batches (S3) or on the shortcut",
    )


@check("S7", "radius zero changes nothing")
def radius_zero(case: Case) -> Outcome:
    """An attack of radius 0 leaves clean accuracy, image by image. (torchattacks #124.)"""
    if case.victim.random:
        raise Skip("the victim draws noise: accuracy differs from draw to draw")
    run = case.run(noise, threat=replace(case.threat, eps=0.0), draws=2)
    moved = int((flags(run.clean) != flags(run.robust)).sum())
    off = int((flags(run.clean) != case.right.cpu()).sum())
    return Outcome(
        graded(False, moved + off > 0),
        moved + off,
        "0",
        f"{moved} of {case.n} images judged otherwise after an attack of radius 0; {off} not as first scored",
        "scores depend on more than the input: look at S2, S3, S4 and S5",
    )


@check("S8", "no ties between scores")
def ties(case: Case) -> Outcome:
    """Share of images whose two best scores are equal, over clean and attacked points; over 0.5 % warns."""
    z = torch.cat([case.z, case.scores(_points(case.usual).to(case.u0))])
    top = z.topk(2, 1).values
    tied = int((top[:, 0] == top[:, 1]).sum())
    return Outcome(
        graded(tied / len(z) > 0.005, False),
        tied / len(z),
        "0.005",
        f"{tied} of {len(z)} score rows have two equal best scores",
        "a tie counts as robust where the clean image won outright; read out potentials or rates of finer steps",
    )


@check("S9", "scores are logits of the right classes")
def kind_of_scores(case: Case) -> Outcome:
    """One score a class, else fails; no probabilities, which warn: their loss saturates (AutoAttack's checks.py).

    Surely fewer images classified correctly than by chance fail: the classes stand in another order, or the
    network expects other pixels. Scores that take no more different values than there are classes, over the images and
    four corners of the ball, to a twentieth of the largest, fail: they tell a decision and no way to another one.
    """
    with torch.no_grad():
        z = case.f(case.u0).detach().float()
    shaped = z.shape == (case.n, case.victim.classes)
    off = float((z.sum(1) - 1).abs().max()) if shaped else math.nan
    probabilities = shaped and bool((z >= 0).all()) and off < 1e-3
    points, values = 5 * case.n, math.inf
    if shaped and points >= 4 * case.victim.classes and bool(z.isfinite().all()):
        corners = [case.within(case.u0 + case.corner * case.draw(case.u0, i, signs=True), case.u0) for i in range(4)]
        seen = torch.cat([z, *map(case.scores, corners)]).nan_to_num()
        size = seen.abs().amax().clamp(min=1e-30)
        values = len((20 * seen / size).round().unique(dim=0))
    decisions = values <= case.victim.classes
    right = Rate(int(correct(z, case.y).sum()), case.n) if shaped else Rate(case.n, case.n)
    if not decisions and surely_under(right.k, right.n, 1 / case.victim.classes):
        return Outcome(
            "fail",
            right.value,
            f"not surely below {1 / case.victim.classes:.3g}, chance",
            f"{right} of the clean images classified correctly, fewer than by chance",
            "look whether scores and labels number the classes alike, and whether pixels reach the network as it was "
            "trained on them (0..1 here; put mean and standard deviation into encode or logits)",
        )
    return Outcome(
        graded(probabilities, not shaped or decisions),
        z.shape[1] if z.ndim == 2 and len(z) == case.n else None,
        f"{case.victim.classes} scores, not probabilities",
        f"scores {tuple(z.shape)} for {case.n} images and {case.victim.classes} classes"
        + (f"; none negative, sums within {off:.1g} of 1" if probabilities else "")
        + (f"; {values} different ones at {points} points: decisions, without degrees" if decisions else ""),
        "return what the decision is made of"
        if decisions
        else "return what goes into the softmax"
        if shaped
        else "let Victim(classes=...) be the number of scores",
    )


@check("S10", "no optimisation inside the forward")
def optimisation(case: Case) -> Outcome:
    """Derivatives that a forward takes by itself, counted; any fails: its gradient is that of one step of a search.

    Croce et al. 2022, arXiv:2202.13711: such defences need attacks of their own. Of three forwards, two of the same
    images and one of others, the first or the last counts, whichever has fewer: on a GPU our own victims record their
    step when a size comes for the second time, and a search may remember what it found for the same images.
    """
    part = case.u0.narrow(case.axis, 0, min(4, case.n))
    counts = []
    for u in (part, part, part.flip(-1)):
        with _Derivatives() as seen, torch.enable_grad():
            case.f(u.clone().requires_grad_())
        counts.append(seen.count)
    count = min(counts[0], counts[2])
    return Outcome(
        graded(False, count > 0),
        count,
        "0",
        f"{count} calls of autograd within one forward",
        "the battery is not made for a victim that searches at test time: attack it by what it optimises",
    )


@check("S11", "the attack solves a linear problem")
def self_test(case: Case) -> Outcome:
    """PGD reaches the closed-form worst margin of a linear classifier, in this threat's space, to 1e-4."""
    if case.threat.norm != "linf":
        raise Skip("closed form written for L-infinity")
    g = torch.Generator().manual_seed(case.seed)
    w, x = torch.randn(2, 27, generator=g), torch.rand(16, 3, 3, 3, generator=g) * 0.4 + 0.3
    linear = Victim(
        encode=lambda x: x.unsqueeze(0), logits=lambda u: u.movedim(1, 0).flatten(1) @ w.T, steps=1, classes=2
    )
    y = linear.scores(x).argmax(1)
    run = attack(pgd, linear, Linf(0.05, space=case.threat.space), x, y, drop=False, keep=True, steps=20, step=0.02)
    found = margin(linear.of(case.threat.space)(_points(run)), y)
    best = margin(linear.scores(x), y) + 0.05 * (w[0] - w[1]).abs().sum()
    gap = float((best - found).abs().max())
    return Outcome(
        graded(False, not gap <= 1e-4),
        gap,
        "1e-4",
        f"PGD ends {gap:.2g} from the closed form on {len(y)} points of a linear classifier",
        "the attack itself is broken on this machine: reinstall, run the tests",
    )


DRAWS = 16  # of a victim that draws noise, where means are compared
FAR = 6.0  # standard errors between two means of DRAWS: about one in a million by chance


def draws(scores: Callable[[], Tensor]) -> Float[Tensor, "d n k"]:
    """DRAWS calls of a victim that draws noise."""
    with torch.no_grad():
        return torch.stack([scores().detach() for _ in range(DRAWS)])


def _after(case: Case, x: Tensor, other: Tensor) -> Float[Tensor, "d n k"]:
    """Scores of `x`, each time right after others were scored."""

    def once() -> Tensor:
        case.victim.scores(other)
        return case.victim.scores(x).float()

    return draws(once)


def apart(case: Case, pairs: dict[str, list[Tensor]], advice: str) -> Outcome:
    """Images whose mean scores over DRAWS differ by more than FAR standard errors (Welch) between two circumstances;
    surely more than one image in twenty fails."""
    said, worst, fails = [], 0, False
    for name, (a, b) in pairs.items():
        error = ((a.var(0) + b.var(0)) / DRAWS).sqrt()
        slack = FAR * error + 1e-4 * a.abs().amax().clamp(min=1)
        moved = int(((a.mean(0) - b.mean(0)).abs() > slack).any(1).sum())
        said.append(f"{name} {moved} of {a.shape[1]} images")
        worst, fails = max(worst, moved), fails or surely_over(moved, a.shape[1], 0.05)
    return Outcome(
        graded(False, fails),
        worst,
        f"surely a share of 0.05 of images whose mean of {DRAWS} draws moves by {FAR:g} standard errors",
        "mean scores move: " + ", ".join(said),
        advice,
    )


class _Derivatives(TorchFunctionMode):
    """Counts the calls of autograd made inside."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _points(run: Run) -> Tensor:
    assert run.adversarial is not None
    return run.adversarial


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the largest entry where that exceeds 1; two NaN are equal."""
    return float(_gaps(a, b).max())


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """The same of every image [n]."""
    a, b = a.detach(), b.detach()  # an exported network may hand out scores that ask for a gradient
    size = a.nan_to_num().abs().max().clamp(min=1)
    far = ((a - b).abs() / size).nan_to_num(math.inf).where(a.isfinite() | b.isfinite(), 0.0)
    return far.flatten(1).amax(1)


def _digest(module: nn.Module) -> dict[str, str]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {
        k: hashlib.sha256(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for k, v in named
    }
