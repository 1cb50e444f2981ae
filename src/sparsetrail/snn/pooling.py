"""Pools in the engine: as a part of a neuron's pass on a CPU, and by kernels that keep a byte a cell on a GPU."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail._shapes import Float
from sparsetrail.snn import cuda, kernels
from sparsetrail.snn.cuda import aligned
from sparsetrail.snn.kernels import pointer, watched
from sparsetrail.snn.workspace import Workspace, last, maps


class AvgPool2d(nn.AvgPool2d):
    """nn.AvgPool2d with the right gradient on a GPU too.

    There the backward of a padded average pool on channels-last maps forgets the padding (PyTorch issue 188344, seen in
    2.11): wrong numbers without a word. Maps go through it channels first.
    """

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c p q"]:
        if x.is_cuda and self.padding not in (0, (0, 0)):
            y = super().forward(x.contiguous())
            return y if kernels.overseen(y) else last(y)
        return super().forward(x)


@dataclass(frozen=True)
class Pooling:
    """A max (`most`) or average pool over square windows."""

    kernel: int
    stride: int
    padding: int
    most: bool

    def shape(self, m: int, c: int, h: int, w: int, among: tuple[int, int] = (1, 1)):
        at = self.kernel, self.stride, self.padding, torch.get_num_threads(), among
        return kernels.shape(m, h, w, c, c, *at)

    def on_gpu(self, x: Tensor) -> Any:
        """The kernels for maps like `x`, or None."""
        return cuda.windows(x.dtype, x.shape[1], self.kernel, self.stride, self.padding, x.device)

    def run(self, x: Tensor, space: Workspace | None) -> tuple[Tensor, Tensor | None]:
        """The pooled map, and of a max pool the winning tap of every cell, one byte each."""
        y, at = self.room(x.shape, x, space)
        if x.is_cuda:
            self.on_gpu(x).pool(pointer(x), pointer(y), pointer(at), (*x.shape, *y.shape[2:]))
        else:
            self.fill(x, y, at, 1, 1)
        return y, at

    def room(self, size: tuple[int, ...], like: Tensor, space: Workspace | None) -> tuple[Tensor, Tensor | None]:
        """Those two for maps of this size, not filled in."""
        m, c, *sides = size
        p, q = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in sides)
        at = torch.empty((m, p, q, c), dtype=torch.uint8, device=like.device) if self.most else None
        if like.is_cuda:
            y = torch.empty((m, c, p, q), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
        else:
            y = maps(space, m, c, p, q, like)
        return y, at

    def fill(self, x: Tensor, y: Tensor, at: Tensor | None, some: int, every: int) -> None:
        """Pool x, that is `some` images a step, into y and at, the first images of `every` a step."""
        m, c, h, w = x.shape
        lib, z = kernels.library(x.dtype), self.shape(m, c, h, w, (some, every))
        if at is None:
            lib.avg_pool(z, pointer(x), pointer(y))
        else:
            lib.max_pool(z, pointer(x), pointer(y), pointer(at))

    def back(self, grad: Tensor, at: Tensor | None, size: tuple[int, ...], space: Workspace | None) -> Tensor:
        """The gradient of the map, by differentiable operations where it must be."""
        if kernels.differentiable(grad):
            return _plain_backward(grad, at, size, self.kernel, self.stride, self.padding)
        grad, (m, c, h, w) = last(grad), size
        if grad.is_cuda:
            grad, dx = aligned(grad), grad.new_empty(m, h, w, c)
            self.on_gpu(grad).unpool(pointer(grad), pointer(dx), pointer(at), (m, c, h, w, *grad.shape[2:]))
            return dx.permute(0, 3, 1, 2)
        dx = maps(space, m, c, h, w, grad)
        kernels.library(grad.dtype).pool_grad(self.shape(m, c, h, w), pointer(grad), pointer(at), pointer(dx))
        return dx


def pooling_of(module: nn.Module, x: Tensor) -> Pooling | None:
    """A pool module as the kernels run it on maps like `x`, or None where they do not serve."""
    kind = type(module)
    if kind not in (nn.MaxPool2d, nn.AvgPool2d, AvgPool2d) or watched(module):
        return None
    kernel, stride, padding = module.kernel_size, module.stride, module.padding
    if not (isinstance(kernel, int) and isinstance(stride, int) and isinstance(padding, int)) or module.ceil_mode:
        return None
    if kind is nn.MaxPool2d and (module.dilation != 1 or module.return_indices):
        return None
    if kind is not nn.MaxPool2d and (not module.count_include_pad or module.divisor_override is not None):
        return None
    fits = kernel <= 15 and padding <= kernel // 2 and min(x.shape[2:]) + 2 * padding >= kernel
    return Pooling(kernel, stride, padding, kind is nn.MaxPool2d) if fits else None


class _Pooled(torch.autograd.Function):
    """On a GPU: a pool whose backward keeps a byte a cell, or nothing, instead of the map and its indices."""

    @staticmethod
    def forward(ctx, x: Tensor, pooling: Pooling) -> Tensor:
        y, at = pooling.run(x, None)
        ctx.pooling, ctx.size = pooling, x.shape
        ctx.save_for_backward(at)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.pooling.back(grad, ctx.saved_tensors[0], ctx.size, None), None


def pooled(s: Tensor, pool: nn.Module) -> Tensor:
    """`pool(s)`."""
    fits = s.ndim == 4 and s.dtype in kernels.REAL and 0 < s.numel() < 2**31  # counted in 32 bits
    wanted = s.is_cuda and fits and kernels.switched_on()
    found = pooling_of(pool, s) if wanted and not kernels.overseen(s) else None
    if found is None or found.on_gpu(s) is None:
        return pool(s)
    return _Pooled.apply(aligned(last(s)), found)


def _plain_backward(grad: Tensor, at: Tensor | None, size, kernel: int, stride: int, padding: int) -> Tensor:
    """By differentiable operations, for second derivatives."""
    if at is None:
        with torch.enable_grad():
            x = torch.zeros(size, dtype=grad.dtype, device=grad.device, requires_grad=True)
            y = F.avg_pool2d(x, kernel, stride, padding)
        return torch.autograd.grad(y, x, grad.contiguous(), create_graph=torch.is_grad_enabled())[0]
    tap = at.permute(0, 3, 1, 2).long()
    row = (
        torch.arange(tap.shape[2], device=tap.device).view(-1, 1) * stride
        - padding
        + tap.div(kernel, rounding_mode="floor")
    )
    col = torch.arange(tap.shape[3], device=tap.device) * stride - padding + tap.remainder(kernel)
    flat = (row * size[3] + col).flatten(2)
    into = grad.new_zeros(*size[:2], size[2] * size[3])
    return into.scatter_add(2, flat, grad.reshape(*size[:2], -1)).reshape(size)
