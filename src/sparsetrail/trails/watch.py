"""Hooks on every operation that count the zeros and norms of gradients as backward passes."""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail.trails.geometry import density_cap, kind_of, reach


@dataclass
class Tally:
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

    tally: Tally
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


class Watch:
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
        self.tallies: dict[str, Tally] = {}
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
            t = self.tallies.setdefault(name, Tally(op=name, kind=kind_of(module), depth=len(self.tallies)))
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

    def _part(self, t: Tally, g: Tensor) -> None:
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
