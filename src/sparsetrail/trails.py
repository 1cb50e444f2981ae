"""The sparsity trail: for every operation, the zeros in and the norm of the gradient with respect to its input.

The paper's Figures 1 and 3 (arXiv:2509.23762, sec. 4.3). The gradient of the cross-entropy with respect to the input
of an operation *through that operation* is read by a tensor hook on an alias of the input, so in-place adds after it do
no harm; counts are taken as the backward passes and no gradient is kept. Zeros are exact zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail._shapes import Float, Int
from sparsetrail.core import Mode, Trail, TrailRow, Victim, correct


@dataclass
class _Tally:
    op: str
    kind: str
    depth: int
    forced: float = 0.0
    zeros: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))  # per step
    squares: list[Tensor] = field(default_factory=list)  # per image of the batch now seen
    entries: int = 0  # per image
    norms: float = 0.0
    seen: int = 0


def trail(
    victim: Victim,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    *,
    batch: int = 16,
    per_step: bool = False,
    mode: Mode = "eval",
    data: str = "",
    say: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Trail:
    """Measure every leaf operation of `victim.module` on images `x` [n c h w] with labels `y` [n].

    Zero share and L2 norm are those of each image's own loss, averaged over images; `mode="train"` normalises with
    batch statistics as the paper's code does (gradients of one batch then mix; running statistics are put back).
    In eval mode the scores are the victim's own `logits`, which must run `module`; train mode calls the module itself.
    An operation called more than once counts once, over all its calls. No hook is left behind, also after an error.
    """
    if victim.module is None:
        raise ValueError(f"{victim.name}: the trail needs the network behind the victim; give Victim(module=...)")
    net, was = victim.module, {m: m.training for m in victim.module.modules()}
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    tallies: dict[str, _Tally] = {}
    handles = []
    right = total = 0
    try:
        net.train(mode == "train")
        shape: dict[str, int] = {}
        for name, module in net.named_modules():
            if not list(module.children()) and name:
                handles.append(module.register_forward_pre_hook(_watch(name, tallies, shape, victim.steps)))
                handles.append(module.register_forward_hook(_geometry(name, tallies)))
        for i, j in _cuts(len(y), batch, victim.steps if mode == "eval" else 0):
            if stop is not None and stop():
                raise KeyboardInterrupt
            xs, ys = x[i:j], y[i:j]
            shape["n"] = len(ys)
            for t in tallies.values():
                t.squares = []
            u = victim.encode(xs).detach().contiguous().requires_grad_()
            # in eval mode as every attack does it: `logits` may reset state or turn axes around the module
            z = victim.logits(u) if mode == "eval" else net(u)
            F.cross_entropy(z, ys, reduction="sum").backward(inputs=[u])
            right += int(correct(z.detach(), ys).sum())
            total += len(ys)
            for t in tallies.values():
                if t.squares:
                    t.norms += float(torch.stack(t.squares).sum(0).sqrt().sum())
                    t.seen += len(ys)
            if say is not None:
                say(total, len(y))
    finally:
        for h in handles:
            h.remove()
        for m, training in was.items():
            m.training = training
        with torch.no_grad():
            for k, v in net.named_buffers():
                v.copy_(buffers[k])
    if not any(t.seen for t in tallies.values()):
        raise ValueError(f"{victim.name}: expected `logits` to run `module`, found no operation of it in the gradient")
    rows = tuple(_row(t, victim.steps, per_step) for t in tallies.values() if t.seen)
    return Trail(
        victim=victim.name, mode=mode, data=data, n=total, steps=victim.steps, clean_accuracy=right / total, rows=rows
    )


def _cuts(n: int, batch: int, steps: int) -> list[tuple[int, int]]:
    """Batches of [0, n); none of exactly `steps` images, where [n k ...] could not be told from [t n ...]."""
    cuts = []
    for i in range(0, n, batch):
        j = min(i + batch, n)
        cuts += [(i, j - 1), (j - 1, j)] if 1 < steps == j - i else [(i, j)]
    return cuts


def _watch(name: str, tallies: dict[str, _Tally], shape: dict[str, int], steps: int):
    def hook(module: nn.Module, inputs: tuple) -> tuple:
        t = tallies.setdefault(name, _Tally(op=name, kind=kind_of(module), depth=len(tallies)))
        n = shape["n"]

        def watched(v: Tensor, first: bool) -> Tensor:
            # An operation that overwrites its input would lose a hook on an alias; nothing else reads that input.
            seen = v if getattr(module, "inplace", False) else v.view_as(v)
            seen.register_hook(lambda g: _count(t, g.detach(), n, steps, first))
            return seen

        out, first = [], True
        for v in inputs:
            if isinstance(v, Tensor) and v.requires_grad:
                v, first = watched(v, first), False
            out.append(v)
        return tuple(out)

    return hook


def _count(t: _Tally, g: Tensor, n: int, steps: int, first: bool) -> None:
    """Add one gradient to the tally; [t*n ...] folded, [t n ...] or [n ...] are told apart by their leading sizes."""
    if g.shape[0] == steps * n or (g.ndim >= 2 and g.shape[0] == steps and g.shape[1] == n):
        g = g.reshape(steps, n, -1)
    else:
        g = g.reshape(1, n, -1)
    if not t.seen and not t.squares:
        t.entries = 0
    if len(t.zeros) != len(g):
        t.zeros = torch.zeros(len(g), dtype=torch.float64)
    t.zeros += (g == 0).sum((1, 2)).cpu()
    t.squares.append(g.double().square().sum((0, 2)).cpu())
    if not t.seen:
        t.entries += g.shape[0] * g.shape[2]


def _row(t: _Tally, steps: int, per_step: bool) -> TrailRow:
    per = t.entries * t.seen / len(t.zeros)
    return TrailRow(
        op=t.op,
        kind=t.kind,
        depth=t.depth,
        zero=float(t.zeros.sum()) / (t.entries * t.seen),
        forced=t.forced,
        norm=t.norms / t.seen,
        entries=t.entries,
        per_step=tuple((t.zeros / per).tolist()) if per_step and len(t.zeros) == steps else None,
    )


def kind_of(module: nn.Module) -> str:
    """conv, norm, pool, linear, add, neuron or the class name in lower case."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return "norm"
    if isinstance(module, nn.Linear):
        return "linear"
    name = type(module).__name__.lower()
    if "pool" in name:
        return "pool"
    if name == "join":
        return "add"
    if any(word in name for word in ("neuron", "ifnode", "lif", "node")):
        return "neuron"
    return name


def _geometry(name: str, tallies: dict[str, _Tally]):
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0] if inputs else None
        if isinstance(x, Tensor) and x.ndim >= 4:
            tallies[name].forced = 1 - density_cap(module, x.shape[-2], x.shape[-1])

    return hook


def density_cap(module: nn.Module, height: int, width: int) -> float:
    """Largest share of non-zero entries that the geometry of an operation allows in its input gradient, 0..1.

    A cell outside every window has no gradient; a max pool hands each window's gradient to one cell (the first
    maximum in row-major order where several tie), so at most one cell a window is reached. A 3x3/2 max pool with
    padding 1 on an even map: 1/4. A 1x1/2 convolution: exactly 1/4.
    """
    kernel = _pair(getattr(module, "kernel_size", 1))
    stride = _pair(getattr(module, "stride", None) or kernel)
    padding = getattr(module, "padding", 0)
    if padding == "same":
        return 1.0
    padding = 0 if padding == "valid" else padding
    pad, dilation = _pair(padding), _pair(getattr(module, "dilation", 1))
    if isinstance(module, nn.MaxPool2d):
        windows = covered = 1
        for size, k, s, p, d in zip((height, width), kernel, stride, pad, dilation, strict=True):
            w, c = _windows(size, k, s, p, d, module.ceil_mode)
            windows, covered = windows * w, covered * c
        return min(windows, covered) / (height * width)
    if isinstance(module, nn.Conv2d | nn.AvgPool2d):
        cells = 1
        for size, k, s, p, d in zip((height, width), kernel, stride, pad, dilation, strict=True):
            cells *= _windows(size, k, s, p, d, getattr(module, "ceil_mode", False))[1]
        return cells / (height * width)
    return 1.0


def maxpool_density_cap(size: int, kernel: int, stride: int, padding: int) -> float:
    """`density_cap` of a square max pool on a size x size map."""
    return density_cap(nn.MaxPool2d(kernel, stride, padding), size, size)


def strided_conv_density(size: int, kernel: int, stride: int, padding: int) -> float:
    """Share of cells that a square convolution on a size x size map sees at all."""
    return density_cap(nn.Conv2d(1, 1, kernel, stride, padding), size, size)


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> tuple[int, int]:
    """Number of windows along one side, and of cells that lie in at least one."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = -(-room // stride) + 1 if ceil else room // stride + 1
    if ceil and (count - 1) * stride >= size + padding:  # PyTorch drops a window that would start beyond the map
        count -= 1
    seen = {i * stride - padding + j * dilation for i in range(count) for j in range(kernel)}
    return count, sum(0 <= c < size for c in seen)


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
