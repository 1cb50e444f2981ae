"""CUDA graphs: at small batches a GPU waits for hundreds of launches a step; a recorded step is launched as one.

`Scores` records the forward and the input gradient of a network, one pair a batch size; `Update` a training step, the
optimiser's included. A recording works on memory of its own: inputs are copied in, results copied out. Where recording
fails the plain call serves, with one line that says so.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail.core.precision import products
from sparsetrail.snn.kernels import batched, overseen, say_once

SIZES = 8  # recordings a network keeps at most; each holds the memory of its intermediate maps
LARGEST = 64  # examples recorded at most: a larger batch keeps a GPU busy without, and its maps fill the memory
AHEAD = 20  # training steps that may be under way before somebody looks at their losses
_one_at_a_time = threading.Lock()  # recording asks for the whole device, and a compiler for one thread
Replay = Callable[[], None]
Record = Callable[[Callable[[], Any]], tuple[Replay, Any]]


def on_gpu(pool: Any = None) -> Record:
    """Record what a function launches, in a memory pool that the recordings of one step share.

    A recording that fails must not leave this thread on the stream it was made on.
    """

    def record(fn: Callable[[], Any]) -> tuple[Replay, Any]:
        graph, was = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=_aside(was.device), capture_error_mode="thread_local"):
                out = fn()
        finally:
            torch.cuda.set_stream(was)
        return graph.replay, out

    return record


def _forget(device: torch.device) -> None:
    """Let go of cuBLAS's workspaces, 32 MB a stream and thread on a Hopper.

    Before a recording, so that it makes its own in its pool; after, so that no other gets it and the next of the same
    step takes the same memory.
    """
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()


@contextlib.contextmanager
def training_products(tf32: bool) -> Iterator[None]:
    """`products` for a whole training; asked for while no other thread records a step or judges in float32."""
    with contextlib.ExitStack() as stack:
        with _one_at_a_time:
            stack.enter_context(products(tf32))
        yield


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which steps are recorded. Streams come from a pool: one of another priority, since one
    that a training is given too would record what that launches."""
    return torch.cuda.Stream(device, priority=-1)


def warm(fn: Callable[[], Any]) -> None:
    """Run a function on the stream of recordings until everything it sets up on the way is there."""
    here = torch.cuda.current_stream()
    stream = _aside(here.device)
    stream.wait_stream(here)
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                fn()
    finally:
        here.wait_stream(stream)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside this block, a GPU is the current one: recordings and replays act on that."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Inside this block a GPU's products are float32, and no other thread records a step, which would keep them so."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_one_at_a_time)
            stack.enter_context(products(tf32=False))
        yield


class _Recording:
    """The scores of one batch size and their gradient with respect to the input, recorded; for one thread at a time.

    The backward's maps lie over those of the forward: after a backward `turn` is another, and a further backward of the
    same scores begins with the forward again.
    """

    def __init__(self, f: Callable[[Tensor], Tensor], like: Tensor, record: Record, warm: Callable, keep: Any) -> None:
        self.f, self.keep, self.point = f, keep, torch.zeros_like(like).requires_grad_()

        def both() -> None:
            z = f(self.point)
            if z.requires_grad:
                torch.autograd.grad(z, self.point, torch.zeros_like(z))

        with _one_at_a_time, products(tf32=False), torch.enable_grad():  # the first call may only want scores
            try:
                warm(both)
                _forget(like.device)
                self.forward, self.z = record(lambda: f(self.point))
                self.push = torch.zeros_like(self.z)
                _forget(like.device)
                if self.z.requires_grad:  # not behind an encoder without a backward
                    self.backward, self.gradient = record(lambda: torch.autograd.grad(self.z, self.point, self.push)[0])
            finally:
                _forget(like.device)
        self.turn = 0

    def run(self, u: Tensor) -> Tensor:
        with torch.no_grad(), _on(u.device):
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
    def backward(ctx, grad: Tensor):
        (u,) = ctx.saved_tensors
        r = ctx.recording
        if batched(grad):  # many gradients as one: a recording takes one
            with torch.enable_grad():
                point = u.detach().requires_grad_()
                return torch.autograd.grad(r.f(point), point, grad)[0], None
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: a recording has no graph
            with products(tf32=False) if u.is_cuda else contextlib.nullcontext():
                return torch.autograd.grad(r.f(u), u, grad, create_graph=True)[0], None
        if r.turn != ctx.turn:  # another input went through since: its maps lie where ours did
            r.run(u)
        with _on(grad.device):
            r.push.copy_(grad)
            r.backward()
            r.turn += 1
            return r.gradient.clone(), None


def _room(n: int) -> int:
    """As many examples as a recording for `n` holds."""
    return 1 << (n - 1).bit_length()


def filled(u: Tensor, axis: int) -> Tensor:
    """The examples, and zeros up to the size in which they are recorded: products of another size add otherwise."""
    n = u.shape[axis]
    more = _room(n) - n if n <= LARGEST else 0
    return torch.cat([u, u.new_zeros(*u.shape[:axis], more, *u.shape[axis + 1 :])], axis) if more else u


class Scores:
    """`f`, which treats every example alone, by recordings; batches are filled up to the next power of two.

    `axis` counts the examples of the input. A size up to LARGEST is recorded when it comes for the second time, and
    filled up the first time too. A gradient that is itself to be differentiated (`create_graph`) is taken through `f`,
    unrecorded, as is all that functorch or inference mode ask for. `keep` is what a recording reads beside its input:
    it lives as long as scores that may still be differentiated.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        axis: int,
        *,
        record: Record | None = None,
        warm: Callable = warm,
        keep: Any = None,
    ) -> None:
        self.f, self.axis, self.record, self.warm, self.keep = f, axis, record, warm, keep
        self.made: dict[Any, _Recording | None] = {}
        self.failed = False

    def _key(self, u: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
        """What the recording for `u` is called: its shape, filled up, and type."""
        return (*u.shape[: self.axis], _room(u.shape[self.axis]), *u.shape[self.axis + 1 :]), u.dtype

    def ready(self, u: Tensor) -> bool:
        """Would a call only launch a recording?"""
        return not self._plain(u) and self.made.get(self._key(u)) is not None

    def _plain(self, u: Tensor) -> bool:
        """Must `f` itself be called?"""
        return self.failed or u.shape[self.axis] > LARGEST or torch.is_inference_mode_enabled() or overseen(u)

    def __call__(self, u: Tensor) -> Tensor:
        n = u.shape[self.axis]
        if self._plain(u):
            return self.f(u)
        key = shape, _ = self._key(u)
        if key not in self.made:
            if len(self.made) >= SIZES:
                return self.f(u)
            self.made[key] = None
            return self.f(filled(u, self.axis))[:n]
        if self.made[key] is None:
            try:
                with _on(u.device):
                    record = self.record or on_gpu(torch.cuda.graph_pool_handle())
                    self.made[key] = _Recording(self.f, u.new_zeros(shape), record, self.warm, self.keep)
            except RuntimeError as error:
                say_once(f"a step could not be recorded as a CUDA graph, it is launched plainly ({_first(error)})")
                self.made.clear()
                self.failed = True
                return self.f(u)
        recording, u = self.made[key], filled(u, self.axis)
        assert recording is not None
        return (_Replayed.apply(u, recording) if recording.z.requires_grad else recording.run(u))[:n]


def _flat(t: Tensor) -> Tensor:
    """Its values in their order in memory."""
    last = t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return (t.permute(0, 2, 3, 1) if last else t).reshape(-1)


def _first(error: RuntimeError) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]


class Update:
    """A whole training step on one batch, recorded: scores, gradients and `move`, which acts on the weights by them.

    `update(x, y)` launches it without waiting; `told()` waits and gives loss and gradient norm of every step since.
    Once one of them is not finite, `bad` is one and `move` must leave the weights alone, now and in later steps. The
    batch is always of the size of the first. Where recording fails the call is false, and nothing was touched.
    """

    def __init__(
        self,
        net: nn.Module,
        scores: Callable[[Tensor], Tensor],
        move: Callable[[tuple[Tensor, ...], Tensor, Tensor], None],
        *,
        tf32: bool = False,
        record: Record | None = None,
        warm: Callable = warm,
    ) -> None:
        self.net, self.scores, self.move, self.tf32 = net, scores, move, tf32
        self.record, self.warm = record, warm
        self.replay: Replay | None = None
        self.failed = False
        self.launched = 0

    def __call__(self, x: Tensor, y: Tensor) -> bool:
        if self.replay is None and not self.failed:
            self._prepare(x, y)
        if self.replay is None or x.shape != self.x.shape:
            return False
        with _on(x.device):
            self.x.copy_(x)
            self.y.copy_(y)
            self.replay()
            self.seen[self.launched].copy_(self.found)
        self.launched += 1
        return True

    @property
    def full(self) -> bool:
        """Must `told` be asked before the next step?"""
        return self.launched == AHEAD

    def told(self) -> list[tuple[float, float]]:
        """Loss and gradient norm of the steps launched since the last time, once they are done."""
        values = self.seen[: self.launched].tolist() if self.launched else []
        self.launched = 0
        return [(loss, norm) for loss, norm in values]

    def _prepare(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.clone(), y.clone()
        self.seen = torch.zeros(AHEAD, 2, device=x.device, dtype=torch.float64)
        self.bad = torch.ones((), device=x.device)  # while it is one, warming up moves no weight
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        before = {k: v.clone() for k, v in self.net.named_buffers()}

        def step() -> Tensor:
            loss = F.cross_entropy(self.scores(self.x), self.y)
            gradients = torch.autograd.grad(loss, self.parameters)
            norm = nn.utils.get_total_norm([_flat(g) for g in gradients])  # one kernel where all are contiguous
            found = torch.stack([loss.detach().double(), norm.double()])
            self.bad.copy_(torch.maximum(self.bad, (~found.isfinite().all()).to(self.bad)))
            self.move(gradients, norm, self.bad)
            return found

        gpu = x.is_cuda
        with _one_at_a_time, _on(x.device), products(self.tf32) if gpu else contextlib.nullcontext():
            try:
                self.warm(step)
                record = self.record or on_gpu(torch.cuda.graph_pool_handle())
                _forget(x.device)
                self.replay, self.found = record(step)
            except RuntimeError as error:
                why = _first(error)
                say_once(f"a training step could not be recorded as a CUDA graph, it is launched plainly ({why})")
                self.replay, self.failed = None, True
            finally:
                _forget(x.device)
        self.bad.zero_()
        with torch.no_grad():  # statistics moved while warming up
            for k, v in self.net.named_buffers():
                v.copy_(before[k])
