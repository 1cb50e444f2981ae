"""BatchNorm, the neuron behind it, another map added and a pool, as one pass over all steps."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrail._shapes import Float
from sparsetrail.snn import kernels
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.kernels import pointer, watched
from sparsetrail.snn.neuron import Neuron, NeuronSpec, Rule, apart, by_rule, fused, kernel, parts, through_time
from sparsetrail.snn.pooling import Pooling, pooled, pooling_of
from sparsetrail.snn.workspace import Workspace, last, maps

POOLED = 2**19  # spikes that are made before they are pooled


@dataclass(frozen=True)
class _Layer:
    """What a pass of `_Fire` needs to know beside its tensors."""

    norm: nn.BatchNorm2d
    spec: NeuronSpec
    order: tuple[int, ...]
    space: Workspace | None
    own: bool
    pooling: Pooling | None
    kernel: Any
    rule: Rule | None = None
    number: int = 0


class _Fire(torch.autograd.Function):
    """Frames of currents -> BatchNorm -> neuron over all steps (-> plus another map) (-> pool), and the potentials.

    The potentials are an output so that a second derivative sees them depend on the input. The input is kept only where
    BatchNorm wants it: batch statistics, or gradients of its weight and bias.
    """

    @staticmethod
    def forward(ctx, y, plus, gamma, beta, layer: _Layer):
        norm, order, space = layer.norm, layer.order, layer.space
        _, c, p, q = y.shape
        n = len(y) // (max(order) + 1)
        rows, steps, threads = n * p * q, len(order), torch.get_num_threads()
        batch = norm.training or norm.running_mean is None
        mean, var = _batch(norm, y, order, rows) if batch else (t.contiguous() for t in _running(norm))
        inv = torch.rsqrt(var + norm.eps)
        scale = inv if gamma is None else inv * gamma
        shift = -mean.double() * scale.double() + (0.0 if beta is None else beta.double())  # one rounding, as PyTorch
        shift = shift.to(y.dtype)
        keep = any(ctx.needs_input_grad)
        with_input = keep and (batch or ctx.needs_input_grad[2] or ctx.needs_input_grad[3])
        h = None
        if keep:  # where nobody needs the currents any more, the potentials take their place
            over = layer.own and not with_input and order == tuple(range(steps))
            h = y.detach() if over else maps(space, steps * n, c, p, q, y)
        frame, _ = kernels.frames(order)

        def run(s: Tensor, first: int, some: int) -> None:
            """The spikes of some images."""
            here = (None if t is None else t[first:] for t in (plus, h))
            plus_, h_ = map(pointer, here)
            at = (pointer(y[first:]), *map(pointer, (frame, scale, shift)), plus_, None, pointer(s), h_)
            layer.kernel.fire(*at, steps, some * p * q, rows, c, threads)

        winners = None
        if layer.pooling is None:
            s = maps(space, steps * n, c, p, q, y)
            run(s, 0, n)
        else:  # a few images at a time, so that spikes are pooled before they leave the cache, and never all there
            s, winners = layer.pooling.room((steps * n, c, p, q), y, space)
            few = min(n, max(threads, POOLED // (steps * c * p * q)))
            part = maps(space, steps * few, c, p, q, y)
            for first in range(0, n, few):
                some = min(few, n - first)
                run(part, first, some)
                layer.pooling.fill(
                    part[: steps * some], s[first:], None if winners is None else winners[first:], some, n
                )
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.batch = layer, batch
        if h is None:
            h = s.new_empty(0)
        ctx.save_for_backward(h, y if with_input else None, gamma, beta, mean, inv, scale, winners)
        return s, h

    @staticmethod
    def backward(ctx, grad_s: Tensor | None, grad_h: Tensor | None):
        kept = _kept(ctx)
        grad_s = _before_pool(ctx, kept, grad_s)
        if grad_h is not None or grad_s is None or kernels.differentiable(grad_s):
            return (*_fire_backward(ctx, kept, grad_s, grad_h), None)
        return _kernel_backward(ctx, kept, grad_s)


class _FireByRule(_Fire):
    """As _Fire, differentiated by a rule; first derivatives only."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_s: Tensor | None, grad_h: Tensor | None):
        layer, wants, spec, kept = ctx.layer, ctx.needs_input_grad, ctx.layer.spec, _kept(ctx)
        grad_s = _before_pool(ctx, kept, grad_s)
        if grad_s is None or not (wants[0] or wants[2] or wants[3]):
            return None, grad_s if wants[1] else None, None, None, None
        flat, scale = kept.h, kept.scale
        order, rule = layer.order, layer.rule
        h, grad = (t.reshape(len(order), -1, *t.shape[1:]) for t in (flat, grad_s))
        slopes = rule.slopes(h, spec, None, layer.number)
        through = rule.flow == "through"
        if kernels.differentiable(grad_s) or (not through and (ctx.batch or wants[2] or wants[3])):
            every = slopes(slice(None))
            if through:
                g, _ = through_time(grad, None, h, None, None, spec, every)
            else:
                g = apart(grad, every, None, spec, rule.flow)
            dy, d_gamma, d_beta = _through_norm(ctx, kept, g)
            return dy, grad_s if wants[1] else None, d_gamma, d_beta, None
        frames, (_, n, c, p, q) = len(order) if through else max(order) + 1, h.shape
        into = maps(layer.space, frames * n, c, p, q, flat)
        whole, scale = into.unflatten(0, (frames, n)), scale.view(-1, 1, 1)
        for part in parts(h):
            if through:
                whole[:, part] = slopes(part)
                continue
            g = apart(grad[:, part], slopes(part), None, spec, rule.flow)
            if order == tuple(range(frames)):
                torch.mul(g, scale, out=whole[:, part])
                continue
            whole[:, part] = 0
            for t, f in enumerate(order):
                whole[f, part] += g[t] * scale
        if through:
            return _kernel_backward(ctx, kept, grad_s, into)
        return into, grad_s if wants[1] else None, None, None, None


class _Kept(NamedTuple):
    """What a pass keeps for its backward."""

    h: Tensor
    y: Any  # a tensor, or None where nothing asks for it
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    inv: Tensor
    scale: Tensor
    winners: Tensor | None


def _kept(ctx) -> _Kept:
    """That, asked for once, as a checkpoint gives it back; maps channels last, whatever a hook of somebody's made."""
    h, y, *others = ctx.saved_tensors
    return _Kept(last(h), None if y is None else last(y), *others)


def _before_pool(ctx, kept: _Kept, grad_s: Tensor | None) -> Tensor | None:
    """The gradient of the spikes from that of the pooled map."""
    pooling, size = ctx.layer.pooling, kept.h.shape
    return grad_s if pooling is None or grad_s is None else pooling.back(grad_s, kept.winners, size, ctx.layer.space)


def _kernel_backward(ctx, kept: _Kept, grad_s: Tensor, slopes: Tensor | None = None):
    """By the kernels: gradients of the input, of the other map, and of BatchNorm's weight and bias."""
    h, y, _, _, mean, inv, scale, _ = kept
    layer, batch, wants = ctx.layer, ctx.batch, ctx.needs_input_grad
    order, space = layer.order, layer.space
    grad_s = last(grad_s)
    grad_plus = grad_s if wants[1] else None
    if not (wants[0] or wants[2] or wants[3]):
        return None, grad_plus, None, None, None
    _, c, p, q = h.shape
    steps, frames = len(order), max(order) + 1
    n = len(h) // steps
    rows, threads = n * p * q, torch.get_num_threads()
    # a gradient that is ours alone makes room for the next
    mine = layer.pooling is not None and grad_plus is None and order == tuple(range(steps))
    dy = grad_s if mine else maps(space, frames * n, c, p, q, h)
    frame, final = kernels.frames(order)
    sums = torch.zeros(threads, 2, c, dtype=torch.float64, device="cpu") if y is not None else None
    by = None if batch else scale
    where = mean if y is not None else None
    at = map(pointer, (grad_s, h, frame, final, by, y, where, inv, None, None, slopes, dy, sums, None))
    layer.kernel.back(*at, steps, rows, c, threads)
    d_gamma = d_beta = None
    if sums is not None:
        sum_g, sum_gx = sums.sum(0).to(h.dtype)
        d_gamma = sum_gx if wants[2] else None
        d_beta = sum_g if wants[3] else None
        if batch:
            weight, total = _weights(order), float(steps * rows)
            at = map(pointer, (dy, y, weight))
            more = map(pointer, (mean, inv, scale, sum_g, sum_gx))
            kernels.library(h.dtype).norm_grad(*at, frames, rows, c, *more, total, threads)
    return dy, grad_plus, d_gamma, d_beta, None


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def _batch(norm: nn.BatchNorm2d, y: Tensor, order: tuple[int, ...], rows: int) -> tuple[Tensor, Tensor]:
    """Batch statistics over all steps, and the running ones moved as nn.BatchNorm2d moves them."""
    c, frames = y.shape[1], max(order) + 1
    if len(order) * rows == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}")
    found = torch.empty(2, c, dtype=torch.float64, device="cpu")
    at = map(pointer, (y, _weights(order)))
    out = map(pointer, found)
    kernels.library(y.dtype).batch_stats(*at, frames, rows, c, *out, torch.get_num_threads())
    mean, var = found.to(y.dtype)
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.training and norm.num_batches_tracked is not None and norm.running_mean is not None:
        count, (running_mean, running_var) = len(order) * rows, _running(norm)
        share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        running_mean.mul_(1 - share).add_(mean * share)
        running_var.mul_(1 - share).add_(var * (count / max(count - 1, 1)) * share)
    return mean, var


@functools.cache
def _weights(order: tuple[int, ...]) -> Tensor:
    """How often each frame is shown, int32; kept, since a kernel is given its address only."""
    with torch.inference_mode(False):
        return torch.bincount(torch.tensor(order, device="cpu")).to(torch.int32)


def _fire_backward(ctx, kept: _Kept, grad_s: Tensor | None, grad_h: Tensor | None):
    """By differentiable operations: for second derivatives, and where the potentials themselves have a gradient."""
    if grad_s is None and grad_h is None:
        return None, None, None, None
    steps = len(ctx.layer.order)
    for_s, for_h = (None if g is None else g.reshape(steps, -1, *g.shape[1:]) for g in (grad_s, grad_h))
    g, _ = through_time(for_s, for_h, kept.h.unflatten(0, (steps, -1)), None, None, ctx.layer.spec)
    dy, d_gamma, d_beta = _through_norm(ctx, kept, g)
    return dy, grad_s if ctx.needs_input_grad[1] else None, d_gamma, d_beta


def _through_norm(ctx, kept: _Kept, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the frames and of BatchNorm's weight and bias from those of the neuron's input [t n c h w]."""
    _, y, gamma, beta, mean, inv, _, _ = kept
    norm, order, batch, wants = ctx.layer.norm, ctx.layer.order, ctx.batch, ctx.needs_input_grad
    steps, frames = len(order), max(order) + 1
    dy = d_gamma = d_beta = None
    if batch:
        inputs: list[Any] = [t for t, want in ((y, wants[0]), (gamma, wants[2]), (beta, wants[3])) if want]
        again = torch.is_grad_enabled()  # not in the last backward of several
        with torch.enable_grad():
            shown = y.unflatten(0, (frames, -1))[list(order)].flatten(0, 1)
            out = F.batch_norm(shown, None, None, gamma, beta, True, 0.0, norm.eps)
        found = iter(torch.autograd.grad(out, inputs, g.flatten(0, 1), create_graph=again))
        dy, d_gamma, d_beta = (next(found) if want else None for want in (wants[0], wants[2], wants[3]))
    else:
        if order == tuple(range(steps)):
            g = g.reshape(-1, *g.shape[2:])
        else:
            g = torch.cat([g[[t for t in range(steps) if order[t] == f]].sum(0) for f in range(frames)])
        view = (1, -1, 1, 1)
        dy = g * (inv if gamma is None else inv * gamma).view(view)
        if wants[2]:
            d_gamma = (g * (y - mean.view(view)) * inv.view(view)).sum((0, 2, 3))
        if wants[3]:
            d_beta = g.sum((0, 2, 3))
    return dy, d_gamma, d_beta


class _FireNormed(torch.autograd.Function):
    """On a GPU: currents -> BatchNorm in eval mode with constant weights -> neuron over all steps (-> plus a map)."""

    @staticmethod
    def forward(ctx, y, plus, norm: nn.BatchNorm2d, spec: NeuronSpec, steps: int, run: Any):
        _, c, p, q = y.shape
        s, rows = torch.empty_like(y), len(y) // steps * p * q
        h = torch.empty_like(y) if any(ctx.needs_input_grad) else None
        mean, var = _running(norm)
        at = map(pointer, (y, mean, var, norm.weight, norm.bias))
        run.fire_normed(*at, norm.eps, pointer(plus), pointer(s), pointer(h), rows, c)
        ctx.norm, ctx.spec, ctx.steps, ctx.run = norm, spec, steps, run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h)
        return s, h  # the potentials too: what is saved of an output can be differentiated again

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_h: Tensor | None):
        (h,), norm, steps = ctx.saved_tensors, ctx.norm, ctx.steps
        plus = grad if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0] or (grad is None and grad_h is None):
            return None, plus, None, None, None, None
        _, c, p, q = h.shape
        transformed = torch._C._are_functorch_transforms_active() or any(map(kernels.batched, ctx.saved_tensors))
        if grad is None or grad_h is not None or transformed or kernels.batched(grad) or torch.is_grad_enabled():
            # `unflatten` has no rule for many gradients as one
            for_s, for_h = (None if g is None else g.reshape(steps, -1, *g.shape[1:]) for g in (grad, grad_h))
            g, _ = through_time(for_s, for_h, h.unflatten(0, (steps, -1)), None, None, ctx.spec)
            return g.reshape(-1, *g.shape[2:]) * _scale(norm), plus, None, None, None, None
        grad, h = last(grad), last(h)
        out = torch.empty_like(h)
        at = map(pointer, (grad, h, norm.running_var, norm.weight))
        ctx.run.back_normed(*at, norm.eps, pointer(out), len(h) // steps * p * q, c)
        return out, plus, None, None, None, None


class _FireNormedByRule(_FireNormed):
    """As _FireNormed, differentiated by a rule; first derivatives only."""

    @staticmethod
    def forward(ctx, y, plus, norm: nn.BatchNorm2d, spec: NeuronSpec, steps: int, run: Any, rule: Rule, number: int):
        ctx.rule, ctx.number = rule, number
        return _FireNormed.forward(ctx, y, plus, norm, spec, steps, run)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, _grad_h: Tensor | None):
        (h,), norm, none = ctx.saved_tensors, ctx.norm, [None] * 6
        plus = grad if ctx.needs_input_grad[1] else None
        if grad is None or not ctx.needs_input_grad[0]:
            return None, plus, *none
        for_s, charged = (t.reshape(ctx.steps, -1, *t.shape[1:]) for t in (grad, h))
        g = by_rule(for_s, charged, None, ctx.spec, ctx.rule, ctx.number, kernels_on=True)
        return g.reshape(-1, *g.shape[2:]) * _scale(norm), plus, *none


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    """What eval-mode BatchNorm multiplies maps [n c h w] by."""
    inv = (_running(norm)[1] + norm.eps).rsqrt()
    return (inv if norm.weight is None else inv * norm.weight).view(1, -1, 1, 1)


def _fire_normed(y: Tensor, norm: nn.Module, neuron: Neuron, steps: int, plus: Tensor | None) -> Tensor | None:
    """The pass on a GPU where it serves: in networks with constant weights, as `freeze` makes them."""
    if not y.is_cuda or type(norm) is not nn.BatchNorm2d or norm.training or norm.running_mean is None or not y.numel():
        return None
    spec, rule = neuron.differentiated()
    constant: list[Any] = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if not all(type(t) is Tensor and not t.requires_grad for t in constant) or watched(norm, neuron):
        return None
    if neuron.run is not fused:
        return None
    if not type(neuron).__module__.startswith("sparsetrail.") or torch._C._are_functorch_transforms_active():
        return None
    y, plus = last(y), None if plus is None else last(plus)
    run = kernel(
        spec, y.permute(0, 2, 3, 1).unflatten(0, (steps, -1)), None, *constant, *([] if plus is None else [plus])
    )
    if run is None:
        return None
    if rule is None:
        return _FireNormed.apply(y, plus, norm, spec, steps, run)[0]
    return _FireNormedByRule.apply(y, plus, norm, spec, steps, run, rule, rule.number())[0]


def fire(
    y: Float[Tensor, "m c h w"],
    norm: nn.Module,
    neuron: Neuron,
    steps: int,
    *,
    plus: Tensor | None = None,
    order: tuple[int, ...] | None = None,
    own: bool = False,
    pool: nn.Module | None = None,
) -> Float[Tensor, "k c p q"]:
    """`neuron(norm(y))` in one pass, plus another map and pooled where these are given.

    y holds the currents of all steps, or only those of the distinct frames that `order` shows at each step. `own` says
    that nobody else looks at y: its memory may be written to.
    """
    order = order or tuple(range(steps))
    if not _can_fire(y, norm, neuron, plus):
        if order != tuple(range(steps)):
            shown = y.unflatten(0, (max(order) + 1, -1)).unbind(0)
            y = torch.cat([shown[f] for f in order])
        s = _fire_normed(y, norm, neuron, steps, plus)
        if s is None:
            s = neuron(norm(y))
            s = s if plus is None else plus + s
        return s if pool is None else pooled(s, pool)
    pooling = None if pool is None else pooling_of(pool, y)
    spec, rule = neuron.differentiated()
    run, number = kernel(spec, y, given=rule is not None), 0 if rule is None else rule.number()
    layer = _Layer(norm, spec, order, neuron.space, own, pooling, run, rule, number)  # type: ignore[arg-type]
    plus = None if plus is None else last(plus)
    function = _Fire if rule is None else _FireByRule
    s = function.apply(last(y), plus, norm.weight, norm.bias, layer)[0]
    return s if pool is None or pooling is not None else pool(s)


def conv_fire(
    x: Float[Tensor, "m c h w"], conv: nn.Module, norm: nn.Module, neuron: Neuron, steps: int, **more: Any
) -> Float[Tensor, "m d p q"]:
    """`neuron(norm(conv(x)))`; `more` as in `fire`."""
    return fire(conv(x), norm, neuron, steps, own=isinstance(conv, Conv2d) and conv.usual(), **more)


def _can_fire(y: Tensor, norm: nn.Module, neuron: Neuron, plus: Tensor | None) -> bool:
    spec, rule = neuron.differentiated()
    return (
        type(norm) is nn.BatchNorm2d
        and neuron.run is fused
        and type(neuron).__module__.startswith("sparsetrail.")  # a subclass may do more
        and not watched(norm, neuron)
        and y.numel() > 0
        and kernels.serve(y, plus, norm.weight, norm.bias, norm.running_mean)
        and (norm.training or norm.running_mean is not None)
        and not (norm.training and not norm.track_running_stats)
        and kernel(spec, y, given=rule is not None) is not None
    )
