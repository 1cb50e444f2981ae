"""The sparsity trail: for every operation, the zeros in and the norm of the gradient with respect to its input.

The paper's Figures 1 and 3 (arXiv:2509.23762, sec. 4.3), and where the zeros come from: which of them an operation
creates and which it passes on. The gradient of the cross-entropy with respect to the input of an operation *through
that operation* is read by a tensor hook on an alias of the input, so in-place adds after it do no harm; the gradient
that arrives at its output by a hook on that. Counts are taken as the backward passes and no gradient is kept. Zeros are
exact zeros. docs/trail.md defines every number.
"""

import contextlib
import functools
import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from sparsetrail._shapes import Bool, Float, Int
from sparsetrail.core import Mode, Trail, TrailRow, Victim, correct

Detail = Literal["plain", "origin", "full"]


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
    if len(x) == 0 or y.shape != x.shape[:1]:
        raise ValueError(f"y: expected a label for each of at least 1 image, got {len(x)} images and {tuple(y.shape)}")
    if victim.module is None:
        raise ValueError(f"{victim.name}: the trail needs the network behind the victim; give Victim(module=...)")
    net, was = victim.module, {m: m.training for m in victim.module.modules()}
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    leaves = _leaves(net)
    watch = _Watch(leaves, victim.steps, origin=detail != "plain", record=detail == "full", per_example=per_example)
    again = _Watch(leaves, victim.steps)
    weights = _weights(leaves) if detail == "full" else {}
    right = total = 0

    def back(u: Tensor, ys: Tensor, *more: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        # as every attack does it, since `logits` may reset state or turn axes around the module; ours refuse train mode
        z = net(u) if mode == "train" and victim.time_first else _scores(victim, u, mode)
        loss = F.cross_entropy(z, ys, reduction="sum")
        if not loss.requires_grad:  # nothing of it is differentiated
            return z.detach(), (None,) * len(more)
        return z.detach(), torch.autograd.grad(loss, [u, *more], allow_unused=True)[1:]

    try:
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
    finally:
        for m, training in was.items():
            m.training = training
        with torch.no_grad():
            for k, v in net.named_buffers():
                v.copy_(buffers[k])
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
        watch, v = _Watch(leaves, victim.steps), u.detach().requires_grad_()
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


# ---- watching a backward -------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What is known of one operation so far; counts are of entries over all images."""

    op: str
    kind: str
    depth: int
    forced: dict[float, int] = field(default_factory=dict)  # the share of each map, with the entries that have it
    entries: int = 0
    zeros: int = 0
    created: int = 0
    traced: bool = True  # was it known of every zero where it comes from?
    arrived: int = 0  # entries of the gradient that arrives at the output
    arrived_zeros: int = 0
    steps: list[int] = field(default_factory=list)  # zeros of each step
    stepped: bool = True  # were all gradients of the whole sequence?
    norms: float = 0.0
    shares: float = 0.0  # participation ratios by their number of entries
    alive: int = 0  # images whose gradient is not zero
    images: int = 0  # of which it is known where they lie
    seen: int = 0
    examples: list[float] = field(default_factory=list)
    weight: Tensor | None = None  # gradient of the summed loss
    parts: list[Tensor] = field(default_factory=list)  # of the batch now seen: zeros, sum of |g|, of g^2 [3 n]
    size: int = 0  # of the batch now seen: entries an image
    called: bool = False  # in the batch now seen
    overwritten: bool = False  # did it write into an input, without the word `inplace`?


@dataclass(eq=False)
class _Call:
    """One call of an operation: what was seen of its gradients, and what still has to be."""

    tally: _Tally
    module: nn.Module
    arrived: list[Tensor] = field(default_factory=list)  # where the output has a gradient, once that is known
    inputs: list[tuple[Tensor, int]] = field(default_factory=list)  # while it runs: with their versions
    waiting: dict[int, tuple[Any, torch.Size]] = field(default_factory=dict)  # of inputs without a gradient as yet
    output: torch.Size | None = None
    counted: bool = False


class _Enter(torch.autograd.Function):
    """A tensor as it is when an operation is about to overwrite it: what read it before is another way of it."""

    @staticmethod
    def forward(ctx, x: Tensor, count: Callable[[Tensor], None]) -> Tensor:
        ctx.mark_dirty(x)
        ctx.count = count
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.count(grad.detach())
        return grad, None


class _Replay(torch.autograd.Function):
    """Other values in the place of an operation's result, in float64; its gradient is that of the result."""

    @staticmethod
    def forward(ctx, result: Tensor, values: Tensor) -> Tensor:
        return values.to(torch.float64 if values.is_floating_point() else values.dtype, copy=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Watch:
    """Hooks on the leaf operations of a network for the length of a batch, and what they have counted."""

    def __init__(
        self,
        leaves: dict[str, nn.Module],
        steps: int,
        *,
        origin: bool = False,
        record: bool = False,
        per_example: bool = False,
    ) -> None:
        self.leaves, self.steps = leaves, steps
        self.origin, self.record, self.per_example = origin, record, per_example
        self.own: Tensor | None = None  # which images a gradient is of, where only that is asked
        self.unfolded: set[str] = set()
        self.tallies: dict[str, _Tally] = {}
        self.recorded: dict[str, deque[Tensor]] = {}  # results of every operation in a batch, in the order of its calls
        self.replayed: dict[str, deque[Tensor]] = {}
        self.nonfinite = 0  # images with a gradient that is NaN or infinite
        self.open: list[_Call] = []
        self.calls: list[_Call] = []
        self.n = 0

    @contextlib.contextmanager
    def batch(self, u: Tensor, n: int) -> Iterator[None]:
        """Count the backward that runs inside this block, to the encoded input `u` of `n` images."""
        self.n, self.open, self.calls = n, [], []
        for t in self.tallies.values():
            t.parts, t.size, t.called = [], 0, False
        handles = []
        try:
            for name, module in self.leaves.items():
                handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(name), with_kwargs=True))
            yield
            self._rest(u)
        finally:
            self.open, self.calls = [], []
            for h in handles:
                h.remove()
        broken = torch.zeros(n, dtype=torch.bool)
        for t in self.tallies.values():
            if t.called and self.own is None:
                t.seen += n
            if t.parts:
                zeros, sums, squares = torch.stack(t.parts).sum(0)
                there = (squares > 0) & squares.isfinite()
                broken |= ~squares.isfinite()
                t.norms += float(squares.sqrt().sum())
                t.shares += float((sums[there].square() / squares[there]).sum()) / t.size
                t.alive += int(there.sum())
                t.images += n
                if self.per_example:
                    t.examples += (zeros / t.size).tolist()
        self.nonfinite += int(broken.sum())

    def add(self, gradients: dict[str, Tensor | None]) -> None:
        """Gradients of the weights of a batch, to be summed."""
        for name, g in gradients.items():
            if g is not None and name in self.tallies:
                t = self.tallies[name]
                t.weight = g.double() if t.weight is None else t.weight.add_(g)

    def _before(self, name: str):
        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            t = self.tallies.setdefault(name, _Tally(op=name, kind=kind_of(module), depth=len(self.tallies)))
            call = _Call(t, module)  # one call's own, so that calls of one module are not mistaken for each other
            self.open.append(call)
            seen = functools.partial(self._seen, call)
            return _each_tensor(inputs, seen), _each_tensor(named, seen)

        return hook

    def _seen(self, call: _Call, v: Tensor) -> Tensor:
        """An input as the operation is to see it: its gradient is counted."""
        if self.replayed and v.is_floating_point():  # foreign code may have said float()
            v = v.double()
        if not (v.requires_grad and torch.is_grad_enabled()):
            return v
        place = len(call.inputs)
        if getattr(call.module, "inplace", False) and not v.is_leaf:  # it would lose a hook on an alias
            with torch.autograd._unsafe_preserve_version_counter(v):  # nothing has changed: what was kept of it holds
                seen = _Enter.apply(v, functools.partial(self._count, call, place))
        else:
            seen = v.view_as(v)
            nothing = functools.partial(torch.zeros, seen.shape, dtype=seen.dtype, device=seen.device)
            seen.register_hook(lambda g: self._count(call, place, nothing() if g is None else g.detach()))
        call.inputs.append((seen, seen._version))
        call.waiting[place] = seen.grad_fn, seen.shape
        return seen

    def _after(self, name: str):
        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> Tensor | None:
            call = self.open.pop()
            t, seen, call.inputs = call.tally, call.inputs, []
            overwrites = getattr(module, "inplace", False)
            if not overwrites and any(v._version != version for v, version in seen):
                t.overwritten, call.waiting = True, {}  # a hook may be lost: without a gradient says nothing
            if call.waiting:
                self.calls.append(call)
            if not isinstance(output, Tensor):
                return None
            if self.record:
                self.recorded.setdefault(name, deque()).append(output.detach().clone())
            known = self.replayed.get(name)
            if known and known[0].shape == output.shape:  # code for float64 may call other operations
                output = _Replay.apply(output, known.popleft())
            elif not overwrites and any(output is v for v, _ in seen):
                output = output.view_as(output)  # a hook on it would run after the one on the input
            if self.origin and output.requires_grad:
                call.output = output.shape
                nothing = functools.partial(torch.zeros, output.shape, dtype=output.dtype, device=output.device)
                output.register_hook(lambda g: self._arrive(call, nothing() if g is None else g))
            return output

        return hook

    def _rest(self, u: Tensor) -> None:
        """What no gradient has come to, of all that was computed from `u`, has a gradient of zeros."""
        leads: dict[Any, bool] = {}
        for call in self.calls:
            waiting = {place: size for place, (node, size) in call.waiting.items() if _leads(node, u, leads)}
            if (waiting or call.counted) and call.output is not None and not call.arrived:
                self._arrive(call, u.new_zeros(call.output))
            for place, size in waiting.items():
                self._count(call, place, u.new_zeros(size))

    def _arrive(self, call: _Call, g: Tensor) -> None:
        t, call.arrived = call.tally, [g != 0]
        t.arrived += g.numel()
        t.arrived_zeros += g.numel() - int(call.arrived[0].sum())

    def _count(self, call: _Call, place: int, g: Tensor) -> None:
        t, zero = call.tally, g == 0
        call.counted = t.called = True
        call.waiting.pop(place, None)
        if self.own is not None:
            if g.numel() % self.n or not (zero | g.isnan()).reshape(self._folded(g.shape))[:, ~self.own].all():
                self.unfolded.add(t.op)
            return
        t.entries += g.numel()
        t.zeros += int(zero.sum())
        share = 1 - density_cap(call.module, g.shape[-2], g.shape[-1]) if g.ndim >= 4 else 0.0
        t.forced[share] = t.forced.get(share, 0) + g.numel()
        ours = t.op not in self.unfolded
        if ours:
            self._part(t, g)
        if self.origin:
            there, steps = None, self._steps(g.shape)
            if call.arrived and (ours or t.kind != "neuron" or self.steps == 1):
                there = reach(call.module, call.arrived[0], g.shape, steps=steps)
            t.traced &= there is not None
            t.created += 0 if there is None else int((zero & there).sum())

    def _part(self, t: _Tally, g: Tensor) -> None:
        """What is counted image by image and step by step."""
        folded = g.reshape(self._folded(g.shape))
        parts = (folded == 0).sum(2)
        t.stepped &= len(parts) == self.steps
        if t.stepped:
            t.steps = [a + b for a, b in zip(t.steps or [0] * self.steps, parts.sum(1).tolist(), strict=True)]
        wide = folded.double()
        sums = wide.abs().sum((0, 2)) if self.origin else wide.new_zeros(self.n)
        t.parts.append(torch.stack([parts.sum(0).double(), sums, wide.square().sum((0, 2))]).cpu())
        t.size += g.numel() // self.n

    def _steps(self, shape: torch.Size) -> int:
        """Time steps in a gradient: [t*n ...] and [t n ...] are told from [n ...] by their leading sizes."""
        whole = shape[0] == self.steps * self.n
        return self.steps if whole or (len(shape) >= 2 and shape[:2] == (self.steps, self.n)) else 1

    def _folded(self, shape: torch.Size) -> tuple[int, int, int]:
        return self._steps(shape), self.n, -1


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed; lists, tuples and dicts are looked into."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_each_tensor(v, change) for v in value)
    if type(value) is dict:
        return {k: _each_tensor(v, change) for k, v in value.items()}
    return value


def _leads(node: Any, u: Tensor, known: dict[Any, bool]) -> bool:
    """Was the result of this node of the graph computed from `u`?"""
    path = [node]
    while path:
        at = path[-1]
        if at is None or at in known:
            path.pop()
            continue
        below = [below for below, _ in at.next_functions if below is not None]
        if getattr(at, "variable", None) is u or any(known.get(b) for b in below):
            known[path.pop()] = True
        elif fresh := [b for b in below if b not in known]:
            path.append(fresh[0])
        else:
            known[path.pop()] = False
    return known.get(node, False)


def _unread(leaves: dict[str, nn.Module], tallies: dict[str, _Tally]) -> tuple[str, ...]:
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


def _row(t: _Tally, again: _Tally | None, origin: bool, n: int, per_step: bool, per_example: bool) -> TrailRow:
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


_FIRES = re.compile(r"IF|[A-Z]{0,2}LIF|Lif|[a-z]{0,2}lif|lif(node|cell)")  # LIFNode, PLIF, ParametricLIFNode


def kind_of(module: nn.Module) -> str:
    """conv, norm, pool, linear, add, neuron or the class name in lower case."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return "norm"
    if isinstance(module, nn.Linear):
        return "linear"
    name = type_before_parametrizations(module).__name__.lower()
    if "pool" in name:
        return "pool"
    if name == "join":
        return "add"
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", type_before_parametrizations(module).__name__)
    if "neuron" in name or any(w.lower() in ("node", "ifnode") or _FIRES.fullmatch(w) for w in words):
        return "neuron"
    return name


# ---- geometry ------------------------------------------------------------------------------------------------------

ENTRYWISE = (  # kinds in which one entry of the input leads to one of the output
    "neuron", "add", "normalise", "dropout", "dropout2d", "relu", "relu6", "leakyrelu", "elu", "gelu",
    "silu", "sigmoid", "tanh", "hardtanh", "softplus",
)  # fmt: skip
WINDOWED: dict[int, tuple[type[nn.Module], ...]] = {  # by the number of sides of the map
    1: (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}


def reach(
    module: nn.Module, arrived: Bool[Tensor, "..."], size: torch.Size, *, steps: int = 1
) -> Bool[Tensor, "..."] | None:
    """Which entries of an operation's input, of shape `size`, lead to no output or to one whose gradient is not zero.

    `arrived` says where the gradient at the output is not zero. A zero of the input gradient at such an entry is
    created by the operation, every other is passed on. What enters a neuron at one of `steps` leads to that step and
    all later ones, what enters a BatchNorm on batch statistics to its whole channel. None for an operation that is not
    known.
    """
    kind = kind_of(module)
    if kind == "norm":
        return _reach_norm(module, arrived)
    if isinstance(module, nn.Linear):
        return arrived.any(-1, keepdim=True).expand(size)
    if isinstance(module, nn.Flatten | nn.Unflatten):
        return arrived.reshape(size)
    if kind in ENTRYWISE:
        if arrived.shape != size:
            return None
        if kind != "neuron" or steps == 1:
            return arrived
        return (arrived.reshape(steps, -1).flip(0).cumsum(0) > 0).flip(0).reshape(size)
    sides = _sides(module, tuple(size), tuple(arrived.shape))
    if sides is None:
        return None
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _spread(arrived, sides)
    channel = len(size) - 1 - len(sides)  # an input leads to all channels of its group
    there = _spread(arrived.unflatten(channel, (module.groups, -1)).any(channel + 1), sides)
    return there.repeat_interleave(size[channel] // module.groups, channel)


def _reach_norm(module: nn.Module, arrived: Tensor) -> Tensor | None:
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return None
    if not module.training and module.running_mean is not None:
        return arrived
    sides = 3 if isinstance(module, nn.BatchNorm3d) else 2 if isinstance(module, nn.BatchNorm2d) else arrived.ndim - 2
    there = arrived
    for d in range(arrived.ndim):
        if d != arrived.ndim - 1 - sides:
            there = there.any(d, keepdim=True)
    return there.expand(arrived.shape)


def _spread(arrived: Tensor, sides: list[Tensor]) -> Tensor:
    """Input cells that lie in no window, or in one whose output has a gradient."""
    there, seen = arrived.float(), torch.ones((), dtype=torch.bool, device=arrived.device)
    for axis, side in zip(range(-len(sides), 0), sides, strict=True):
        side = side.to(arrived.device)
        there = (there.movedim(axis, -1) @ side.float()).movedim(-1, axis)
        seen = seen.unsqueeze(-1) & side.any(0)
    return (there > 0.5) | ~seen


def _sides(module: nn.Module, size: tuple[int, ...], out: tuple[int, ...]) -> list[Tensor] | None:
    """Which cells every window sees, a matrix [windows cells] for each side of the map; None where it is not known."""
    dims = next((d for d, kinds in WINDOWED.items() if isinstance(module, kinds)), None)
    if dims is None:
        return None
    cells, windows = size[-dims:], out[-dims:]
    if type(module).__name__.startswith("Adaptive"):
        return [_adaptive(c, w) for c, w in zip(cells, windows, strict=True)]
    knobs = zip(cells, *_knobs(module, dims), strict=True)
    return [_windows(*side, *_edge(module)) for side in knobs]


def density_cap(module: nn.Module, height: int, width: int) -> float:
    """Largest share of non-zero entries that the geometry of an operation allows in its input gradient, 0..1.

    A cell outside every window has no gradient; a max pool hands each window's gradient to one cell (the first
    maximum in row-major order where several tie), so at most one cell a window is reached. A 3x3/2 max pool with
    padding 1 on an even map: 1/4. A 1x1/2 convolution: exactly 1/4.
    """
    if not isinstance(module, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d):
        return 1.0
    knobs = zip((height, width), *_knobs(module, 2), strict=True)
    rows, columns = (_windows(*side, *_edge(module)) for side in knobs)
    cells = int(rows.any(0).sum()) * int(columns.any(0).sum())
    if isinstance(module, nn.MaxPool2d) or getattr(module, "one_a_window", False):
        cells = min(cells, len(rows) * len(columns))
    return cells / (height * width)


def maxpool_density_cap(size: int, kernel: int, stride: int, padding: int) -> float:
    """`density_cap` of a square max pool on a size x size map."""
    return density_cap(nn.MaxPool2d(kernel, stride, padding), size, size)


def strided_conv_density(size: int, kernel: int, stride: int, padding: int) -> float:
    """Share of cells that a square convolution on a size x size map sees at all."""
    return density_cap(nn.Conv2d(1, 1, kernel, stride, padding), size, size)


def _knobs(module: Any, dims: int) -> list[tuple]:
    """Kernel, stride, padding before and after, and dilation, one of each a side."""
    kernel = _each(module.kernel_size, dims)
    stride, dilation = _each(module.stride, dims), _each(getattr(module, "dilation", 1), dims)
    if module.padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [kernel, stride, tuple(w // 2 for w in whole), tuple(w - w // 2 for w in whole), dilation]
    padding = _each(0 if module.padding == "valid" else module.padding, dims)
    return [kernel, stride, padding, padding, dilation]


def _edge(module: nn.Module) -> tuple[bool, str]:
    """Whether windows may go over the edge, and what they see there."""
    return getattr(module, "ceil_mode", False), getattr(module, "padding_mode", "zeros")


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


@functools.lru_cache(maxsize=256)
def _windows(
    size: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil: bool, padding: str
) -> Bool[Tensor, "windows cells"]:
    """Which cells of one side of a map lie in each window, with what a padding mode puts beyond the edge."""
    room = size + before + after - dilation * (kernel - 1) - 1
    count = -(-room // stride) + 1 if ceil else room // stride + 1
    if ceil and (count - 1) * stride >= size + before:  # PyTorch drops a window that would start beyond the map
        count -= 1
    seen = torch.zeros(count, size, dtype=torch.bool)
    for i in range(count):
        for c in range(i * stride - before, i * stride - before + kernel * dilation, dilation):
            if padding == "circular":
                c %= size
            elif padding == "replicate":
                c = min(max(c, 0), size - 1)
            elif padding == "reflect":
                c = abs(c) if c < size else 2 * (size - 1) - c
            if 0 <= c < size:
                seen[i, c] = True
    return seen


@functools.lru_cache(maxsize=256)
def _adaptive(size: int, count: int) -> Bool[Tensor, "windows cells"]:
    seen = torch.zeros(count, size, dtype=torch.bool)
    for i in range(count):
        seen[i, i * size // count : -(-(i + 1) * size // count)] = True
    return seen
