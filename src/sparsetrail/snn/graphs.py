"""CUDA graphs: at small batches a GPU waits for hundreds of launches a step; a recorded step is launched as one.

`Scores` records the forward and the input gradient of a network, one pair a batch size; `Update` the forward and all
gradients of a training step. A recording works on memory of its own: inputs are copied in, results copied out. Where
recording fails the plain call serves, with one line that says so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail.snn.kernels import say_once

SIZES = 8  # recordings a network keeps at most; each holds the memory of its intermediate maps
Replay = Callable[[], None]
Record = Callable[[Callable[[], Any]], tuple[Replay, Any]]


def on_gpu(pool: Any = None) -> Record:
    """Record what a function launches, in a memory pool that the recordings of one step share."""

    def record(fn: Callable[[], Any]) -> tuple[Replay, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = fn()
        return graph.replay, out

    return record


def warm(fn: Callable[[], Any]) -> None:
    """Run a function on a stream of its own until everything it sets up on the way is there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)


class _Recording:
    """The scores of one batch size and their gradient with respect to the input, recorded."""

    def __init__(self, f: Callable[[Tensor], Tensor], like: Tensor, record: Record, warm: Callable) -> None:
        self.point = torch.zeros_like(like).requires_grad_()

        def both() -> None:
            z = f(self.point)
            torch.autograd.grad(z, self.point, torch.zeros_like(z))

        with torch.enable_grad():  # the first call may be one that only wants scores
            warm(both)
            self.forward, self.z = record(lambda: f(self.point))
            self.push = torch.zeros_like(self.z)
            self.backward, self.gradient = record(lambda: torch.autograd.grad(self.z, self.point, self.push)[0])
        self.turn = 0

    def run(self, u: Tensor) -> Tensor:
        with torch.no_grad():
            self.point.copy_(u)
        self.forward()
        self.turn += 1
        return self.z.detach().clone()


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, recording: _Recording) -> Tensor:
        z = recording.run(u)
        ctx.recording, ctx.turn = recording, recording.turn
        ctx.save_for_backward(u)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (u,) = ctx.saved_tensors
        r = ctx.recording
        if r.turn != ctx.turn:  # another input went through since: its maps lie where ours did
            r.run(u)
        r.push.copy_(grad)
        r.backward()
        return r.gradient.clone(), None


class Scores:
    """`f`, which treats every example alone, by recordings; batches are filled up to the next power of two.

    `axis` counts the examples of the input. A size is recorded when it comes for the second time. Only first
    derivatives with respect to the input.
    """

    def __init__(
        self, f: Callable[[Tensor], Tensor], axis: int, *, record: Record | None = None, warm: Callable = warm
    ) -> None:
        self.f, self.axis, self.record, self.warm = f, axis, record, warm
        self.made: dict[Any, _Recording | None] = {}
        self.failed = False

    def __call__(self, u: Tensor) -> Tensor:
        if self.failed:
            return self.f(u)
        n = u.shape[self.axis]
        room = 1 << (n - 1).bit_length()
        shape = (*u.shape[: self.axis], room, *u.shape[self.axis + 1 :])
        key = (shape, u.dtype)
        if key not in self.made:
            if len(self.made) >= SIZES:
                return self.f(u)
            self.made[key] = None
            return self.f(u)
        if self.made[key] is None:
            try:
                record = self.record or on_gpu(torch.cuda.graph_pool_handle())
                self.made[key] = _Recording(self.f, u.new_zeros(shape), record, self.warm)
            except RuntimeError as error:
                say_once(f"a step could not be recorded as a CUDA graph, it is launched plainly ({_first(error)})")
                self.made.clear()
                self.failed = True
                return self.f(u)
        if n < room:
            u = torch.cat([u, u.new_zeros(*shape[: self.axis], room - n, *shape[self.axis + 1 :])], self.axis)
        recording = self.made[key]
        assert recording is not None
        return _Replayed.apply(u, recording)[:n]


def _first(error: RuntimeError) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]


class Update:
    """Loss and gradients of one training batch, recorded: `loss, norm = update(x, y)` and every `p.grad` is set.

    The batch is always of the size of the first. Where the recording fails `None` is returned and the batch is not
    touched: weights, statistics and gradients are as before.
    """

    def __init__(
        self,
        net: nn.Module,
        scores: Callable[[Tensor], Tensor],
        *,
        record: Record | None = None,
        warm: Callable = warm,
    ) -> None:
        self.net, self.scores, self.record, self.warm = net, scores, record, warm
        self.replay: Replay | None = None
        self.failed = False

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.replay is None and not self.failed:
            self._prepare(x, y)
        if self.replay is None or x.shape != self.x.shape:
            return None
        self.x.copy_(x)
        self.y.copy_(y)
        self.replay()
        for p, g in zip(self.parameters, self.gradients, strict=True):
            p.grad = g
        return self.loss, self.norm

    def _prepare(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.clone(), y.clone()
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        before = {k: v.clone() for k, v in self.net.named_buffers()}

        def step() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            loss = F.cross_entropy(self.scores(self.x).float(), self.y)
            gradients = torch.autograd.grad(loss, self.parameters)
            return loss.detach(), nn.utils.get_total_norm(gradients), gradients

        try:
            self.warm(step)
            record = self.record or on_gpu(torch.cuda.graph_pool_handle())
            self.replay, (self.loss, self.norm, self.gradients) = record(step)
        except RuntimeError as error:
            say_once(f"a training step could not be recorded as a CUDA graph, it is launched plainly ({_first(error)})")
            self.replay, self.failed = None, True
        with torch.no_grad():  # statistics moved while warming up
            for k, v in self.net.named_buffers():
                v.copy_(before[k])
