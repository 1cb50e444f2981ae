"""Convolutions on a GPU as products of unfolded maps, where cuDNN's kernels leave it half idle.

What the taps of every output cell see is laid out as a matrix by a kernel of our own, and cuBLAS multiplies. At the
paper's batch that takes half of cuDNN's time in float32, to the same rounding, and in layers of stride 2 in TF32 too;
where it does not, cuDNN serves (H200, torch 2.11).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsetrail.snn import cuda, kernels
from sparsetrail.snn.dense import as_its_forward, plain_backward

ROOM = 2**27  # bytes of a matrix at most: beyond, a map keeps cuDNN busy
FEW = 4  # input channels up to which a matrix lies the other way round


@dataclass(frozen=True)
class _How:
    """Stride and padding; whether products may be TF32, the input's gradient is bf16, and there is room to unfold."""

    stride: int
    padding: int
    rough: bool
    half: bool
    room: bool

    @property
    def window(self) -> tuple[int, int]:
        return self.stride, self.padding


def suits(x: Tensor, conv: nn.Conv2d, weight: Tensor, *, half: bool = False) -> bool:
    """May `conv` on these maps be unfolded where that is faster, and differentiated as precisely as it was computed?"""
    return (
        x.is_cuda
        and x.ndim == 4
        and x.dtype == weight.dtype
        and x.dtype in kernels.REAL
        and not torch.is_autocast_enabled("cuda")
        and min(x.shape) > 0
        and x.shape[1] == conv.in_channels
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and len({*conv.kernel_size}) == len({*conv.stride}) == len({*conv.padding}) == 1
        and min(x.shape[2:]) + 2 * conv.padding[0] >= conv.kernel_size[0]
        and not kernels.overseen(x, weight)
        and (half or kernels.switched_on())
        and _rough(x) is not None
    )


def _rough(x: Tensor) -> bool | None:
    """May convolutions be TF32 here? None where only other products may, or where PyTorch cannot tell."""
    try:
        rough, others = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # somebody set them by the names of torch 2.9, a layer at a time
        return None
    return None if others and not rough and x.dtype == torch.float32 else rough


def _room(x: Tensor, conv: nn.Conv2d, weight: Tensor) -> bool:
    """Is the matrix small enough, and are there kernels?"""
    window = conv.stride[0], int(conv.padding[0])
    _, c, k, _ = weight.shape
    n, _, p, q = _out(x.shape, weight, window)
    small = n * p * q * k * k * c * x.element_size() <= ROOM
    return small and kernels.switched_on() and _program(x, weight, window) is not None


def convolve(x: Tensor, conv: nn.Conv2d, weight: Tensor, *, half: bool = False) -> Tensor:
    """`conv(x)` by unfolded maps; `half` takes the gradient of the input in bf16."""
    how = _How(conv.stride[0], int(conv.padding[0]), bool(_rough(x)), half, _room(x, conv, weight))
    y = _Unfolded.apply(x, weight, how)
    return y if conv.bias is None else y + conv.bias.view(-1, 1, 1)


class _Unfolded(torch.autograd.Function):
    """y [n d p q] of x [n c h w] and weight [d c k k]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, how: _How) -> Tensor:
        ctx.how, ctx.size, ctx.exact = how, x.shape, not how.rough
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        if how.rough or not how.room:
            return nn.functional.conv2d(x, weight, None, *how.window)
        n, d, p, q = _out(x.shape, weight, how.window)
        y = torch.empty((n, d, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        torch.mm(unfolded(x, weight, how.window), _rows(weight).T, out=y.permute(0, 2, 3, 1).view(-1, d))
        return y

    @staticmethod
    @as_its_forward
    def backward(ctx, grad: Tensor):
        (x, weight), how, size, wants = ctx.saved_tensors, ctx.how, ctx.size, ctx.needs_input_grad
        if kernels.differentiable(grad):
            return *plain_backward(wants, grad, x, weight, size, *how.window), None
        flat, (d, c, k, _) = grad.permute(0, 2, 3, 1).reshape(-1, len(weight)), weight.shape
        skips, dx, dw = how.stride > 1, None, None
        if wants[0] and how.room and not how.half and (skips or not how.rough):
            dx = folded(flat, size, weight, how.window)
        elif wants[0]:
            kind = torch.bfloat16 if how.half else grad.dtype
            like = torch.empty(size, dtype=kind, device=grad.device, memory_format=torch.channels_last)
            dx = _cudnn(grad.to(kind), like, weight.to(kind), how, (True, False, False))[0].to(grad.dtype)
        if wants[1] and how.room and (how.rough or (skips and c > FEW)):
            dw = (flat.T @ unfolded(x, weight, how.window)).view(d, k, k, c).permute(0, 3, 1, 2)
        elif wants[1]:
            dw = _cudnn(grad, x, weight, how, (False, True, False))[1]
        return dx, dw, None


def _cudnn(grad: Tensor, x: Tensor, weight: Tensor, how: _How, wants: tuple[bool, bool, bool]):
    knobs = [how.stride] * 2, [how.padding] * 2, [1, 1], False, [0, 0], 1, wants
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *knobs)


def unfolded(x: Tensor, weight: Tensor, window: tuple[int, int]) -> Tensor:
    """What the taps of every output cell see [(n p q) (k k c)]; of few channels the other way round in memory."""
    (n, c, h, w), k = x.shape, weight.shape[2]
    _, _, p, q = _out(x.shape, weight, window)
    x = cuda.aligned(x.detach().contiguous(memory_format=torch.channels_last))
    program, size = _program(x, weight, window), (n, c, h, w, p, q)
    if c <= FEW:
        out = x.new_empty(k * k * c, n * p * q)
        program.unfold_few(x.data_ptr(), out.data_ptr(), size, k)
        return out.T
    out = x.new_empty(n * p * q, k * k * c)
    program.unfold(x.data_ptr(), out.data_ptr(), size)
    return out


def folded(grad: Tensor, size: tuple[int, ...], weight: Tensor, window: tuple[int, int]) -> Tensor:
    """The gradient of the maps [n c h w] from that of the output's cells [(n p q) d]."""
    n, c, h, w = size
    _, _, p, q = _out(size, weight, window)
    columns, out = grad @ _rows(weight), grad.new_empty(n, h, w, c)
    _program(grad, weight, window).fold(columns.data_ptr(), out.data_ptr(), (n, c, h, w, p, q))
    return out.permute(0, 3, 1, 2)


def _rows(weight: Tensor) -> Tensor:
    """The weight [d (k k c)]."""
    return weight.detach().permute(0, 2, 3, 1).flatten(1)


def _out(size: tuple[int, ...], weight: Tensor, window: tuple[int, int]) -> tuple[int, int, int, int]:
    p, q = ((side + 2 * window[1] - weight.shape[2]) // window[0] + 1 for side in size[2:])
    return size[0], len(weight), p, q


def _program(x: Tensor, weight: Tensor, window: tuple[int, int]) -> cuda.Windows:
    """The kernels for these maps; None only before `suits` said that they are there."""
    found = cuda.windows(x.dtype, weight.shape[1], weight.shape[2], *window, x.device)
    return found  # type: ignore[return-value]
