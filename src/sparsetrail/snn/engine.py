"""The engine: the same networks by faster algorithms, behind the same modules, chosen by themselves.

On a CPU with a C compiler (`kernels`), for float32 and float64:

- a convolution of spikes adds the weights of active inputs only, and so does the gradient of its weights; the gradient
  of its input is dense, without the taps that fall off the map;
- BatchNorm and the neuron behind it (`fire`) are one pass over all steps, forward and back, that keeps one tensor;
- a frame that a code shows at several steps goes through the first layer once (`coded`);
- constant weights (`freeze`) keep and compute nothing for their gradients, and intermediate maps come from a
  `Workspace` that is used again instead of fresh memory.

On a GPU neurons, with BatchNorm where weights are constant, and pools run kernels of our own (`cuda`), convolutions are
products (`unfold`, `dense`) where that is faster, whole steps are recorded (`graphs`), and frames are shared where half
of them are shown again.

Sums run in another order than PyTorch's, so in float32 a potential within rounding of the threshold can flip a spike;
in float64 a network's gradients agree to 1e-10. Modules that somebody watches by hooks, functorch, forward-mode
derivatives and `NetSpec(exact=True)` take the plain operations. Second derivatives are there; they run plain ones too.
A `neuron.Rule` changes the backward of a pass and none of its spikes; it has first derivatives only.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrail._shapes import Float
from sparsetrail.snn import dense, kernels, unfold
from sparsetrail.snn.dense import plain_backward
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.kernels import pointer, watched
from sparsetrail.snn.neuron import Neuron, NeuronSpec, Rule, apart, fused, kernel, parts, through_time
from sparsetrail.snn.pooling import Pooling, pooled, pooling_of
from sparsetrail.snn.workspace import Workspace, last, maps

FEW = 4  # channels up to which a first layer runs the kernels for images
POOLED = 2**19  # spikes that are made before they are pooled


def _serve(*tensors: Tensor | None) -> bool:
    """Do the kernels serve these tensors, outside every transformation?"""
    if torch._C._are_functorch_transforms_active():
        return False
    there = [t for t in tensors if t is not None]
    return not torch.is_autocast_enabled("cpu") and kernels.available(there[0].dtype) and kernels.usable(*there)


# ---- convolution ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Geometry:
    """What a convolution's kernels need to know beside its tensors."""

    kernel: int
    stride: int
    padding: int
    half: bool
    space: Workspace | None

    def shape(self, m: int, cin: int, h: int, w: int, cout: int):
        return kernels.shape(m, h, w, cin, cout, self.kernel, self.stride, self.padding, torch.get_num_threads())

    def out(self, size: int) -> int:
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


class _SpikeConv(torch.autograd.Function):
    """Convolution of maps that are mostly zero, all channels last; x is kept only if the weight wants a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, g: _Geometry) -> Tensor:
        m, cin, h, w = x.shape
        z = g.shape(m, cin, h, w, len(weight))
        turned = _scratch(g, weight)
        y = maps(g.space, m, len(weight), g.out(h), g.out(w), x)
        lib = kernels.library(x.dtype)
        lib.turn_weights(z, pointer(weight), pointer(turned), 0)
        lib.spike_conv(z, pointer(x), pointer(turned), pointer(y))
        ctx.geometry, ctx.size = g, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        g, (m, cin, h, w) = ctx.geometry, ctx.size
        if kernels.differentiable(grad):
            return *plain_backward(ctx.needs_input_grad, grad, x, weight, ctx.size, g.stride, g.padding), None
        grad, lib = last(grad), kernels.library(weight.dtype)
        z = g.shape(m, cin, h, w, len(weight))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = maps(g.space, m, cin, h, w, weight)
            if g.half:
                pairs = _scratch(g, weight, torch.bfloat16)
                lib.pair_weights(z, pointer(weight), pointer(pairs))
                lib.input_grad_bf16(z, pointer(grad), pointer(pairs), pointer(dx))
            else:
                lib.input_grad(z, pointer(grad), pointer(weight), pointer(dx))
        if ctx.needs_input_grad[1]:
            turned, dw = _scratch(g, weight), torch.empty_like(weight)
            lib.spike_weight_grad(z, pointer(x), pointer(grad), pointer(turned))
            lib.turn_weights(z, pointer(dw), pointer(turned), 1)
        return dx, dw, None


class _StemConv(torch.autograd.Function):
    """Convolution of images of few channels [m c h w], contiguous; the result is channels last."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, g: _Geometry) -> Tensor:
        ctx.geometry, ctx.size = g, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _stem(x, weight, g)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        if kernels.differentiable(grad):
            g = ctx.geometry
            return *plain_backward(ctx.needs_input_grad, grad, x, weight, ctx.size, g.stride, g.padding), None
        grad = last(grad)
        dx = _stem_input(grad, weight, ctx.geometry, ctx.size) if ctx.needs_input_grad[0] else None
        dw = _weight_grad(grad, x, weight, ctx.geometry) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def _stem(x: Tensor, weight: Tensor, g: _Geometry) -> Tensor:
    m, cin, h, w = x.shape
    y = maps(g.space, m, len(weight), g.out(h), g.out(w), x)
    turned = weight.detach().permute(2, 3, 1, 0).contiguous()
    z = g.shape(m, cin, h, w, len(weight))
    kernels.library(x.dtype).stem_conv(z, pointer(x), pointer(turned), pointer(y))
    return y


def _stem_input(grad: Tensor, weight: Tensor, g: _Geometry, size: tuple[int, ...]) -> Tensor:
    dx, (m, cin, h, w) = grad.new_empty(size), size
    z, weight = g.shape(m, cin, h, w, len(weight)), weight.contiguous()
    kernels.library(grad.dtype).stem_input_grad(z, pointer(grad), pointer(weight), pointer(dx), g.half)
    return dx


def _weight_grad(grad: Tensor, x: Tensor, weight: Tensor, g: _Geometry) -> Tensor:
    side = [g.stride] * 2, [g.padding] * 2
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, *side, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]


def _scratch(g: _Geometry, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a weight in another order; made anew at every call, so that it cannot be a weight of yesterday."""
    size, dtype = (weight.numel(),), dtype or weight.dtype
    return torch.empty(size, dtype=dtype, device="cpu") if g.space is None else g.space.take(size, dtype)


class Conv2d(nn.Conv2d):
    """nn.Conv2d by the kernels for spikes or images where they serve, else tiny maps as one product.

    The same parameters, the same numbers up to the order of sums. `exact` keeps PyTorch's own convolution,
    `half_products` takes the gradient of the input in bf16: on a CPU the factors, on a GPU the sums too.
    """

    exact = False
    half_products = False
    space: Workspace | None = None

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m d p q"]:
        if self.served(x):
            if self.in_channels <= FEW:
                y = _StemConv.apply(x.contiguous(), self.weight, self.geometry(x))
            else:
                y = _SpikeConv.apply(last(x), last(self.weight), self.geometry(x))
            return y if self.bias is None else y + self.bias.view(-1, 1, 1)
        if self.exact:
            return super().forward(x)
        half = self.half_products
        if dense.suits(x, self):
            return dense.convolve(x, self, half=half)
        if x.is_cuda and x.ndim == 4 and not kernels.overseen(x):
            x = last(x)  # otherwise the gradient is turned round, and back, on its way
        return unfold.convolve(x, self, half=half) if unfold.suits(x, self, half=half) else super().forward(x)

    def served(self, x: Tensor) -> bool:
        """Do the kernels serve this layer and input?"""
        if self.exact or x.ndim != 4 or min(x.shape) == 0 or not _serve(x, self.weight):
            return False
        lanes = kernels.library(x.dtype).lanes()
        few = self.in_channels <= FEW
        kernel, stride, padding = self.kernel_size, self.stride, self.padding
        return (
            self.out_channels % lanes == 0
            and (few or self.in_channels % lanes == 0)
            and max(self.in_channels, self.out_channels) < 2**16
            and x.shape[1] == self.in_channels
            and self.groups == 1
            and self.dilation == (1, 1)
            and self.padding_mode == "zeros"
            and not isinstance(padding, str)
            and kernel[0] == kernel[1]
            and stride[0] == stride[1]
            and padding[0] == padding[1] < kernel[0]
            and min(x.shape[2:]) + 2 * padding[0] >= kernel[0]
            and (not few or stride[0] in (1, 2))
        )

    def geometry(self, x: Tensor) -> _Geometry:
        """Sizes, and memory for maps."""
        half = self.half_products and bool(kernels.library(x.dtype).has_bf16())
        return _Geometry(self.kernel_size[0], self.stride[0], int(self.padding[0]), half, self.space)

    def usual(self) -> bool:
        """Is calling it nothing but its convolution?"""
        return type(self).forward is Conv2d.forward and not watched(self)


class _CodedConv(torch.autograd.Function):
    """Convolution of the distinct frames [f n c h w] of an encoded image; the gradient goes back to the pixels.

    `slope` [f], or [f n c h w] where the rule looks at the pixel, is the encoder's backward rule. Both steps are
    linear, so where the slope is one number a frame the frames are summed before they are convolved back: once an image
    instead of once a step.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, planes: Tensor, slope: Tensor | None, encode: Encoder, g: _Geometry
    ) -> Tensor:
        ctx.geometry, ctx.encode = g, encode
        ctx.save_for_backward(x, planes, weight, slope)
        return _stem(planes.flatten(0, 1), weight, g)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, planes, weight, slope = ctx.saved_tensors
        g, (f, n, *rest) = ctx.geometry, planes.shape
        if kernels.differentiable(grad):
            if x.requires_grad:  # the frames again, as something that depends on the pixels
                planes = ctx.encode(x)[[ctx.encode.frames.index(i) for i in range(f)]]
            at = planes.flatten(0, 1), weight, (f * n, *rest), g.stride, g.padding
            d_planes, dw = plain_backward(ctx.needs_input_grad, grad, *at)
            dx = None if d_planes is None else _through_code(d_planes.unflatten(0, (f, n)), slope)
            return dx, dw, None, None, None, None
        dx = dw = None
        if ctx.needs_input_grad[0] and slope.ndim == 1:
            summed = torch.einsum("f...,f->...", grad.unflatten(0, (f, n)), slope.to(grad.dtype))
            dx = _stem_input(last(summed), weight, g, (n, *rest))
        elif ctx.needs_input_grad[0]:
            dx = _through_code(_stem_input(last(grad), weight, g, (f * n, *rest)).unflatten(0, (f, n)), slope)
        if ctx.needs_input_grad[1]:
            dw = _weight_grad(last(grad), planes.flatten(0, 1), weight, g)
        return dx, dw, None, None, None, None


def _through_code(grad: Tensor, slope: Tensor) -> Tensor:
    slope = slope.to(grad.dtype)
    return (grad * (slope.view(-1, *[1] * (grad.ndim - 1)) if slope.ndim == 1 else slope)).sum(0)


def coded(x: Float[Tensor, "n c h w"], encode: Encoder, conv: nn.Module) -> Tensor | None:
    """Currents [f*n d p q] of the distinct frames of `encode(x)`, or None where frames cannot be shared.

    On a GPU where half of the steps or more show a frame again: `fire` copies the currents there.
    """
    if encode.frames is None or not isinstance(conv, Conv2d) or conv.in_channels > FEW or not conv.usual():
        return None
    frames = range(max(encode.frames) + 1)
    plain = conv.exact or not kernels.switched_on() or kernels.overseen(x, conv.weight)
    if x.is_cuda and not plain and 2 * len(frames) <= encode.steps:
        shown = encode(x).unbind(0)
        return conv(torch.cat([shown[encode.frames.index(f)] for f in frames]))
    if not conv.served(x):
        return None
    planes, slope = encode.distinct(x.detach())
    if slope is None and x.requires_grad:
        return None
    y = _CodedConv.apply(x, conv.weight, planes.contiguous(), slope, encode, conv.geometry(x))
    return y if conv.bias is None else y + conv.bias.view(-1, 1, 1)


# ---- BatchNorm and neuron ------------------------------------------------------------------------------------------


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
        grad_s = _before_pool(ctx, grad_s)
        if grad_h is not None or grad_s is None or kernels.differentiable(grad_s):
            return (*_fire_backward(ctx, grad_s, grad_h), None)
        return _kernel_backward(ctx, grad_s)


class _FireByRule(_Fire):
    """As _Fire, differentiated by a rule; first derivatives only."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_s: Tensor | None, grad_h: Tensor | None):
        layer, wants, spec = ctx.layer, ctx.needs_input_grad, ctx.layer.spec
        grad_s = _before_pool(ctx, grad_s)
        if grad_s is None or not (wants[0] or wants[2] or wants[3]):
            return None, grad_s if wants[1] else None, None, None, None
        flat, _, _, _, _, _, scale, _ = ctx.saved_tensors
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
            dy, d_gamma, d_beta = _through_norm(ctx, g)
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
            return _kernel_backward(ctx, grad_s, into)
        return into, grad_s if wants[1] else None, None, None, None


def _before_pool(ctx, grad_s: Tensor | None) -> Tensor | None:
    """The gradient of the spikes from that of the pooled map."""
    pooling, (h, *_, winners) = ctx.layer.pooling, ctx.saved_tensors
    return grad_s if pooling is None or grad_s is None else pooling.back(grad_s, winners, h.shape, ctx.layer.space)


def _kernel_backward(ctx, grad_s: Tensor, slopes: Tensor | None = None):
    """By the kernels: gradients of the input, of the other map, and of BatchNorm's weight and bias."""
    h, y, gamma, beta, mean, inv, scale, winners = ctx.saved_tensors
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
        count, (running_mean, running_var) = len(order) * rows, _running(norm)
        norm.num_batches_tracked.add_(1)
        share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        running_mean.mul_(1 - share).add_(mean * share)
        running_var.mul_(1 - share).add_(var * (count / max(count - 1, 1)) * share)
    return mean, var


@functools.cache
def _weights(order: tuple[int, ...]) -> Tensor:
    """How often each frame is shown, int32; kept, since a kernel is given its address only."""
    with torch.inference_mode(False):
        return torch.bincount(torch.tensor(order, device="cpu")).to(torch.int32)


def _fire_backward(ctx, grad_s: Tensor | None, grad_h: Tensor | None):
    """By differentiable operations: for second derivatives, and where the potentials themselves have a gradient."""
    if grad_s is None and grad_h is None:
        return None, None, None, None
    h, steps = ctx.saved_tensors[0], len(ctx.layer.order)
    for_s, for_h = (None if g is None else g.reshape(steps, -1, *g.shape[1:]) for g in (grad_s, grad_h))
    g, _ = through_time(for_s, for_h, h.unflatten(0, (steps, -1)), None, None, ctx.layer.spec)
    dy, d_gamma, d_beta = _through_norm(ctx, g)
    return dy, grad_s if ctx.needs_input_grad[1] else None, d_gamma, d_beta


def _through_norm(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the frames and of BatchNorm's weight and bias from those of the neuron's input [t n c h w]."""
    _, y, gamma, beta, mean, inv, scale, _ = ctx.saved_tensors
    norm, order, batch, wants = ctx.layer.norm, ctx.layer.order, ctx.batch, ctx.needs_input_grad
    steps, frames = len(order), max(order) + 1
    dy = d_gamma = d_beta = None
    if batch:
        inputs = [t for t, want in ((y, wants[0]), (gamma, wants[2]), (beta, wants[3])) if want]
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
            for_s, for_h = (None if g is None else g.unflatten(0, (steps, -1)) for g in (grad, grad_h))
            g, _ = through_time(for_s, for_h, h.unflatten(0, (steps, -1)), None, None, ctx.spec)
            inv = (norm.running_var + norm.eps).rsqrt()
            scale = inv if norm.weight is None else inv * norm.weight
            return g.flatten(0, 1) * scale.view(1, -1, 1, 1), plus, None, None, None, None
        grad, out = last(grad), torch.empty_like(h)
        at = map(pointer, (grad, h, norm.running_var, norm.weight))
        ctx.run.back_normed(*at, norm.eps, pointer(out), len(h) // steps * p * q, c)
        return out, plus, None, None, None, None


def _fire_normed(y: Tensor, norm: nn.Module, neuron: Neuron, steps: int, plus: Tensor | None) -> Tensor | None:
    """The pass on a GPU where it serves: in networks with constant weights, as `freeze` makes them."""
    if not y.is_cuda or type(norm) is not nn.BatchNorm2d or norm.training or norm.running_mean is None or not y.numel():
        return None
    spec, rule = neuron.differentiated()
    constant: list[Any] = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if not all(type(t) is Tensor and not t.requires_grad for t in constant) or watched(norm, neuron):
        return None
    if rule is not None or neuron.run is not fused:
        return None
    if not type(neuron).__module__.startswith("sparsetrail.") or torch._C._are_functorch_transforms_active():
        return None
    y, plus = last(y), None if plus is None else last(plus)
    run = kernel(
        spec, y.permute(0, 2, 3, 1).unflatten(0, (steps, -1)), None, *constant, *([] if plus is None else [plus])
    )
    return None if run is None else _FireNormed.apply(y, plus, norm, spec, steps, run)[0]


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
        and _serve(y, plus, norm.weight, norm.bias, norm.running_mean)
        and (norm.training or norm.running_mean is not None)
        and not (norm.training and not norm.track_running_stats)
        and kernel(spec, y, given=rule is not None) is not None
    )


# ---- whole networks ------------------------------------------------------------------------------------------------


def share_memory(net: nn.Module, space: Workspace | None = None) -> nn.Module:
    """Let the layers of `net` take their intermediate maps from one workspace of their own, or from `space`."""
    space = space or Workspace()
    for m in net.modules():
        if isinstance(m, Conv2d | Neuron):
            m.space = space
    return net


def freeze(net: nn.Module, space: Workspace | None = None, *, half: bool = False) -> nn.Module:
    """`net` as it is now with constant weights, for attacks: nothing is kept or computed for their gradients.

    A second tree of the same modules around the same tensors, made in a millisecond: make it anew at every call and it
    cannot be out of date, whoever changed what. The same numbers to the bit. `half` takes the products of input
    gradients in bf16; scores stay the same to the bit. A network with modules that are neither PyTorch's nor ours,
    which may hold anything, is given back itself.
    """
    modules = list(net.modules())
    if not all(type(m).__module__.startswith(("torch.nn.modules.", "sparsetrail.")) for m in modules):
        return net
    twins = {m: _twin(m) for m in modules}
    for twin in twins.values():
        twin.__dict__["_modules"] = {k: None if m is None else twins[m] for k, m in twin._modules.items()}
    frozen = share_memory(twins[net], space)
    return halve(frozen) if half else frozen


def _twin(module: nn.Module) -> nn.Module:
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {k: None if p is None else p.detach() for k, p in module._parameters.items()}
    twin.__dict__["_buffers"] = dict(module._buffers)
    return twin


def halve(net: nn.Module) -> nn.Module:
    """Let the convolutions of `net` take the products of their input gradients in bf16."""
    for m in net.modules():
        if isinstance(m, Conv2d):
            m.half_products = True
    return net


def has_bf16() -> bool:
    """Does this CPU multiply bf16, and is there a kernel for it?"""
    return kernels.available() and bool(kernels.library(torch.float32).has_bf16())
