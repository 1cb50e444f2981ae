"""Convolutions of spikes and of images by the engine's kernels, and frames that a code shows at several steps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sparsetrail._shapes import Float
from sparsetrail.snn import dense, kernels, unfold
from sparsetrail.snn.dense import plain_backward
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.kernels import pointer, watched
from sparsetrail.snn.workspace import Workspace, last, maps

FEW = 4  # channels up to which a first layer runs the kernels for images


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
        grad, weight, lib = last(grad), last(weight), kernels.library(weight.dtype)
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
            x, turned, dw = last(x), _scratch(g, weight), torch.empty_like(weight)
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
        weight = self.weight  # once: where it is made of others (a parametrisation), asking is work, or another draw
        if self.served(x, weight):
            if self.in_channels <= FEW:
                y = _StemConv.apply(x.contiguous(), weight, self.geometry(x))
            else:
                y = _SpikeConv.apply(last(x), last(weight), self.geometry(x))
            return y if self.bias is None else y + self.bias.view(-1, 1, 1)
        if self.exact:
            return self._conv_forward(x, weight, self.bias)
        half = self.half_products
        if dense.suits(x, self, weight):
            return dense.convolve(x, self, weight, half=half)
        if x.is_cuda and x.ndim == 4 and not kernels.overseen(x):
            x = last(x)  # otherwise the gradient is turned round, and back, on its way
        if unfold.suits(x, self, weight, half=half):
            return unfold.convolve(x, self, weight, half=half)
        return self._conv_forward(x, weight, self.bias)

    def served(self, x: Tensor, weight: Tensor) -> bool:
        """Do the kernels serve this layer with this weight, and input?"""
        if self.exact or x.ndim != 4 or min(x.shape) == 0 or not kernels.serve(x, weight):
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
    if is_parametrized(conv):  # asked for its weight once, by the convolution itself
        return None
    frames = range(max(encode.frames) + 1)
    weight = conv.weight
    plain = conv.exact or not kernels.switched_on() or kernels.overseen(x, weight)
    if x.is_cuda and not plain and 2 * len(frames) <= encode.steps:
        shown = encode(x).unbind(0)
        return conv(torch.cat([shown[encode.frames.index(f)] for f in frames]))
    if not conv.served(x, weight):
        return None
    planes, slope = encode.distinct(x.detach())
    if slope is None and x.requires_grad:
        return None
    y = _CodedConv.apply(x, weight, planes.contiguous(), slope, encode, conv.geometry(x))
    return y if conv.bias is None else y + conv.bias.view(-1, 1, 1)
