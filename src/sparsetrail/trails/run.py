"""Taking a trail: the network watched batch by batch, then a row for every operation."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from sparsetrail._shapes import Float, Int
from sparsetrail.core import Mode, Trail, TrailRow, Victim, correct
from sparsetrail.core.inputs import refuse_batch
from sparsetrail.core.precision import in_full
from sparsetrail.trails.geometry import kind_of
from sparsetrail.trails.watch import Tally, Watch

Detail = Literal["plain", "origin", "full"]


@in_full
def trail(
    victim: Victim,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    batch: int = 16,
    per_step: bool = False,
    per_example: bool = False,
    detail: Detail = "plain",
    mode: Mode = "eval",
    data: str = "",
    say: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Trail:
    """Measure every operation of `victim.module` that is a module, on images `x` [n c h w] with labels `y` [n].

    Zero share and L2 norm are those of each image's own loss, averaged over images; `mode="train"` normalises with
    batch statistics as the paper's code does (gradients of one batch then mix; running statistics are put back).
    The scores are the victim's own `logits`, which must run `module`; train mode calls a network of ours itself, and is
    a ValueError where logits refuse it, as those of a network that is reset do.
    An operation called more than once counts once, over all its calls; one that no gradient comes back to is all zeros.
    Modules of which this cannot be read are in `unread`. No hook is left behind, also after an error.

    `detail="origin"` adds which zeros are created and which arrive, and the participation ratio. `"full"` adds the
    gradients of weights, of the mean loss over all images (a mean over each image's own would take a backward an
    image), for which one tensor a weight is kept, and counts zeros once more in float64 behind the same activations.
    `per_step` and `per_example` keep the zero shares of every time step and of every image. Where a foreign network
    holds images in another order than ours, found by gradients of single images, nothing is said of an image or a step.
    """
    if detail not in ("plain", "origin", "full"):
        raise ValueError(f"detail: expected plain, origin or full, got {detail!r}")
    if mode not in ("eval", "train"):
        raise ValueError(f"mode: expected eval or train, got {mode!r}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1 image, got {batch}")
    refuse_batch(victim, x, y)
    if victim.module is None:
        raise ValueError(f"{victim.name}: the trail needs the network behind the victim; give Victim(module=...)")
    net = victim.module
    leaves = _leaves(net)
    watch = Watch(leaves, victim.steps, origin=detail != "plain", record=detail == "full", per_example=per_example)
    again = Watch(leaves, victim.steps)
    weights = _weights(leaves) if detail == "full" else {}
    right = total = 0

    def back(u: Tensor, ys: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        # as every attack does it, since `logits` may reset state or turn axes around the module; ours refuse train mode
        z = net(u) if mode == "train" and victim.time_first else _scores(victim, u, mode)
        loss = F.cross_entropy(z, ys, reduction="sum")
        if not loss.requires_grad:  # nothing of it is differentiated
            return z.detach(), (None,) * len(more)
        return z.detach(), torch.autograd.grad(loss, [u, *more], allow_unused=True)[1:]

    with _left_as_it_was(net):
        net.train(mode == "train")
        for i, j in _cuts(len(y), batch, victim.steps if mode == "eval" else 0):
            if stop is not None and stop():
                raise KeyboardInterrupt
            ys = y[i:j]
            u = victim.encode(x[i:j]).detach().contiguous()
            if i == 0 and not victim.time_first:
                watch.unfolded = again.unfolded = _unfolded(victim, leaves, u, ys)
                net.train(mode == "train")
            u.requires_grad_()
            with watch.batch(u, len(ys)):
                z, found = back(u, ys, *weights.values())
            watch.add(dict(zip(weights, found, strict=True)))
            if detail == "full":
                again.replayed, watch.recorded = watch.recorded, {}
                wide = u.detach().double().requires_grad_()
                with _doubled(net), again.batch(wide, len(ys)):
                    back(wide, ys)
            right += int(correct(z, ys).sum())
            total += len(ys)
            if say is not None:
                say(total, len(y))
    if not any(t.seen for t in watch.tallies.values()):
        raise ValueError(f"{victim.name}: expected `logits` to run `module`, found no operation of it in the gradient")
    rows = tuple(
        _row(t, again.tallies.get(t.op), detail != "plain", total, per_step, per_example)
        for t in watch.tallies.values()
        if t.seen
    )
    return Trail(
        victim=victim.name,
        mode=mode,
        data=data,
        n=total,
        steps=victim.steps,
        clean_accuracy=right / total,
        rows=rows,
        route=victim.route,
        nonfinite=watch.nonfinite,
        unread=_unread(leaves, watch.tallies),
        unfolded=tuple(row.op for row in rows if row.op in watch.unfolded),
    )


@contextlib.contextmanager
def _left_as_it_was(net: nn.Module) -> Iterator[None]:
    """After this block the modes and buffers of a network are those of before."""
    was = {m: m.training for m in net.modules()}
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    try:
        yield
    finally:
        for m, training in was.items():
            m.training = training
        with torch.no_grad():
            for k, v in net.named_buffers():
                v.copy_(buffers[k])


def _scores(victim: Victim, u: Tensor, mode: Mode) -> Tensor:
    """The victim's own logits; ValueError where they refuse train mode or leave it."""
    try:
        z = victim.logits(u)
    except ValueError as error:
        if mode == "train":
            raise ValueError(
                f"mode: expected eval of {victim.name}, got train, which its logits refuse: {error}"
            ) from error
        raise
    if mode == "train" and victim.module is not None and not victim.module.training:
        raise ValueError(f"mode: expected eval of {victim.name}, got train, which its logits leave")
    return z


def _unfolded(victim: Victim, leaves: dict[str, nn.Module], u: Tensor, ys: Tensor) -> set[str]:
    """Operations whose tensors are not [t n ...], [t*n ...] or [n ...]: who knows which entries are an image's?

    Asked of gradients of some images' losses alone, in eval mode: where the order is ours, the entries of every other
    image are exactly zero. [n*t ...] with the same steps in use shows itself unless t is 1 modulo n.
    """
    n, t = len(ys), victim.steps
    if n == t == 1:
        return set()
    if n == 1 or t % n == 1 < t:
        k = next(k for k in range(2, t + 3) if k != t and (t % k != 1 or t == 1))
        rows = torch.arange(k, device=u.device) % n
        u, ys = u.index_select(1, rows), ys.index_select(0, rows)
    found: set[str] = set()
    victim.module.eval()  # type: ignore[union-attr]
    place = torch.arange(len(ys), device=u.device)
    for own in (place == 0, place == 1, place > 1):
        watch, v = Watch(leaves, victim.steps), u.detach().requires_grad_()
        watch.own, watch.unfolded = own, found
        with watch.batch(v, len(ys)):
            loss = F.cross_entropy(victim.logits(v), ys, reduction="none")[own].sum()
            if loss.requires_grad:
                torch.autograd.grad(loss, v, allow_unused=True)
    return found


def _cuts(n: int, batch: int, steps: int) -> list[tuple[int, int]]:
    """Batches of [0, n); none of exactly `steps` images, where [n k ...] could not be told from [t n ...]."""
    cuts = []
    for i in range(0, n, batch):
        j = min(i + batch, n)
        cuts += [(i, j - 1), (j - 1, j)] if 1 < steps == j - i else [(i, j)]
    return cuts


def _leaves(net: nn.Module) -> dict[str, nn.Module]:
    """The operations by name: modules without modules, and neurons that hold nothing but a surrogate.

    What computes a weight (`torch.nn.utils.parametrize`) is a part of the operation that has the weight.
    """
    found: dict[str, nn.Module] = {}
    for name, m in net.named_modules():
        inner = [child for key, child in m.named_children() if key != "parametrizations" or not is_parametrized(m)]
        whole = kind_of(m) == "neuron" and not any(True for child in inner for _ in child.parameters())
        below = any(name.startswith(f"{above}.") for above in found)
        if name and not below and (not inner or whole) and not isinstance(m, nn.Identity):
            found[name] = m
    return found


def _weights(leaves: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The weights that want a gradient, by operation."""
    found = {name: getattr(m, "weight", None) for name, m in leaves.items()}
    return {name: w for name, w in found.items() if isinstance(w, nn.Parameter) and w.requires_grad}


@contextlib.contextmanager
def _doubled(net: nn.Module) -> Iterator[None]:
    """Inside this block the network computes in float64; afterwards its own tensors are back in their places."""
    parameters = [(p, p.data) for p in net.parameters()]
    buffers = [(m._buffers, k, b) for m in net.modules() for k, b in m._buffers.items() if b is not None]
    try:
        for p, own in parameters:
            p.data = own.double() if own.is_floating_point() else own
        for held, k, b in buffers:
            held[k] = b.double() if b.is_floating_point() else b
        yield
    finally:
        for p, own in parameters:
            p.data = own
        for held, k, b in buffers:
            held[k] = b


def _unread(leaves: dict[str, nn.Module], tallies: dict[str, Tally]) -> tuple[str, ...]:
    """The operations without a row, and why."""
    found = []
    for name in leaves:
        t = tallies.get(name)
        if t is None:
            found.append(f"{name} (not called)")
        elif t.overwritten:
            found.append(f"{name} (writes into its input)")
        elif not t.seen:
            found.append(f"{name} (no gradient at its input)")
    return tuple(found)


def _row(t: Tally, again: Tally | None, origin: bool, n: int, per_step: bool, per_example: bool) -> TrailRow:
    traced = origin and t.traced
    weight = None if t.weight is None else t.weight.abs() / n
    square = 0.0 if weight is None else float(weight.square().sum())
    return TrailRow(
        op=t.op,
        kind=t.kind,
        depth=t.depth,
        zero=t.zeros / t.entries,
        forced=next(iter(t.forced)) if len(t.forced) == 1 else sum(s * k for s, k in t.forced.items()) / t.entries,
        norm=t.norms / t.images if t.images else math.nan,
        entries=t.entries // t.seen,
        per_step=tuple(z * len(t.steps) / t.entries for z in t.steps) if per_step and t.steps and t.stepped else None,
        inherited=t.arrived_zeros / t.arrived if origin and t.arrived else None,
        created=t.created / t.entries if traced else None,
        participation=t.shares / t.alive if origin and t.alive else None,
        zero64=again.zeros / again.entries if again is not None and again.entries else None,
        per_example=tuple(t.examples) if per_example and t.images else None,
        weight_zero=None if weight is None else float((weight == 0).double().mean()),
        weight_participation=float(weight.sum()) ** 2 / square / weight.numel()
        if weight is not None and square
        else None,
        weight_norm=None if weight is None else square**0.5,
    )
