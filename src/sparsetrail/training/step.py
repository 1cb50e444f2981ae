"""One update of the weights, by the reference loop or as a CUDA graph, and scores."""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail._shapes import Float, Int
from sparsetrail.core import Rate, correct
from sparsetrail.data import Dataset, pixels
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.folded import Draws
from sparsetrail.snn.graphs import Update, in_float32
from sparsetrail.snn.net import running_for
from sparsetrail.snn.neuron import Neuron, carrying
from sparsetrail.training.spec import Seams, TrainSpec


class Optimizer:
    """The optimiser of a TrainSpec on views of the parameters in their order in memory.

    PyTorch's fused Adam copies channels-last parameters, gradients and moments there and back at every step, a quarter
    of a training step on a CPU; an update is element by element, so the order of the elements is free. On a GPU all its
    state lies there, so that a step can be recorded.
    """

    def __init__(self, net: nn.Module, spec: TrainSpec) -> None:
        self.spec, self.parameters = spec, list(net.parameters())
        self.views = [_in_memory_order(p.detach()) for p in self.parameters]
        self.rate, gpu = spec.lr, all(p.is_cuda for p in self.parameters)
        knobs: dict[str, Any] = {"weight_decay": spec.weight_decay}
        knobs["lr"] = torch.tensor(spec.lr, device=self.views[0].device) if gpu else spec.lr
        if spec.optimizer == "adam":
            knobs |= {"betas": spec.betas, "fused": True, "capturable": gpu}
            self.inner: torch.optim.Optimizer = torch.optim.Adam(self.views, **knobs)
        else:
            self.inner = torch.optim.SGD(self.views, momentum=spec.momentum, fused=gpu or None, **knobs)
        self.inner._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # it runs plainly too, to warm up
        if gpu and spec.optimizer == "sgd" and spec.momentum:  # what the first step would make of no buffer
            for v in self.views:
                self.inner.state[v]["momentum_buffer"] = torch.zeros_like(v)

    def set_rate(self, step: int, total: int) -> None:
        """The learning rate of step `step` of `total`."""
        spec, before = self.spec, self.rate
        self.rate = spec.lr if spec.schedule == "none" else spec.lr * 0.5 * (1 + math.cos(math.pi * step / total))
        for group in self.inner.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = self.rate
            elif self.rate != before:
                group["lr"].fill_(self.rate)

    def step(self, unless: Tensor | None = None) -> None:
        """Update the parameters by their gradients, unless a flag on the device is one."""
        for p, view in zip(self.parameters, self.views, strict=True):
            now = _in_memory_order(p.detach())
            if now.shape != view.shape:
                raise RuntimeError(
                    f"expected a parameter laid out as before, {tuple(view.shape)}, found {tuple(now.shape)}"
                )
            if now.data_ptr() != view.data_ptr():
                view.data = now  # somebody gave the parameter other memory
            grad = p.grad
            if grad is not None and _turns(p, grad):
                grad = grad.contiguous(memory_format=torch.channels_last)
            view.grad = None if grad is None else _in_memory_order(grad, like=p)
        self.inner.found_inf = unless  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells fused optimisers
        self.inner.step()

    def state(self) -> dict[str, Tensor]:
        """Moments and counters by parameter number, shaped as the parameter."""
        found = {}
        for i, held in self.inner.state_dict()["state"].items():
            for k, v in held.items():
                if v is not None:
                    v = torch.as_tensor(v)
                    found[f"{i}.{k}"] = v.permute(0, 3, 1, 2) if _turns(self.parameters[i], v) else v
        return found

    def restore(self, found: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in found.items():
            i, k = key.split(".", 1)
            p = self.parameters[int(i)]
            state.setdefault(int(i), {})[k] = (
                _in_memory_order(torch.empty_like(p).copy_(value)).contiguous() if value.shape == p.shape else value
            )
        self.inner.load_state_dict({"state": state, "param_groups": self.inner.state_dict()["param_groups"]})


def _in_memory_order(t: Tensor, like: Tensor | None = None) -> Tensor:
    """A channels-last tensor seen as contiguous; others as they are. `like` decides for a gradient."""
    return t.permute(0, 2, 3, 1) if _turns(t if like is None else like, t) else t


def _turns(parameter: Tensor, t: Tensor) -> bool:
    last = parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return last and t.ndim == 4 and not parameter.is_contiguous()


class Step:
    """Updates of the weights, one a call: by the reference loop, or as a CUDA graph after `record`.

    `seams` are a defence. `recorded` is the graph, None where there is none.
    """

    def __init__(self, net: nn.Module, optimizer: Optimizer, spec: TrainSpec, seams: Seams | None = None) -> None:
        self.net, self.optimizer, self.spec, self.seams = net, optimizer, spec, seams or Seams()
        self.recorded: Update | None = None

    def __call__(
        self, encode: Encoder, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], generator: torch.Generator
    ) -> float | None:
        """One update on one batch, or one a period; returns the (last) loss, or what else was not finite.

        None says that the graph is under way and `recorded` will tell.
        """
        for m in self.net.modules():
            if isinstance(m, Draws):
                m.generator = generator
        periods = self.seams.periods
        if periods == 1:
            return self._update(encode, x, y, generator)
        part, value = encode.over(encode.steps // periods), 0.0
        with running_for(self.net, part.steps), carrying({} if self.seams.carry else None):
            for _ in range(periods):
                value = self._update(part, x, y, generator)
                if value is None or not math.isfinite(value):
                    break
        return value

    def record(self, encode: Encoder) -> Update | None:
        """Make a CUDA graph of it, where nothing changes from step to step but batch and rate; else None."""
        net, spec, optimizer = self.net, self.spec, self.optimizer  # not this object: the graph would hold itself
        drawn = encode.random or any(isinstance(m, Draws) for m in net.modules())
        if drawn or self.seams.penalty is not None or self.seams.periods > 1:
            return None

        def way(x: Tensor) -> Tensor:
            half = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if spec.precision == "bf16" else None
            with half or contextlib.nullcontext():
                z = scores(net, encode, x)
            return z if half is None else z.float()

        def move(gradients: tuple[Tensor, ...], norm: Tensor, bad: Tensor) -> None:
            for p, g in zip((p for p in net.parameters() if p.requires_grad), gradients, strict=True):
                p.grad = g
            if spec.clip:
                nn.utils.clip_grads_with_norm_(net.parameters(), spec.clip, norm)
            optimizer.step(unless=bad)

        self.recorded = Update(net, way, move, tf32=spec.precision == "tf32")
        return self.recorded

    def _update(
        self, encode: Encoder, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], generator: torch.Generator
    ) -> float | None:
        net, seams, spec = self.net, self.seams, self.spec
        if seams.inputs is not None:
            x = seams.inputs(net, encode, x, y, generator)
        net.train()
        if self.recorded is not None and self.recorded(x, y):
            self._settle(generator)
            return None
        net.zero_grad(set_to_none=True)
        if seams.penalty is not None:
            x = x.detach().requires_grad_()
        half = spec.precision == "bf16" and x.device.type != "cpu"  # there the engine sees to it
        with torch.autocast(x.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            z = scores(net, encode, x)
            z = z.float() if half else z
            loss = F.cross_entropy(z, y)
            if seams.penalty is not None:
                loss = loss + seams.penalty(net, encode, x, y, z, generator)
        value = float(loss.detach())
        if not math.isfinite(value):
            return value
        loss.backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
        if not math.isfinite(norm):
            return not_finite(value, norm)
        if spec.clip:
            told = torch.tensor(norm, dtype=self.optimizer.views[0].dtype)
            nn.utils.clip_grads_with_norm_(net.parameters(), spec.clip, told)
        self.optimizer.step()
        self._settle(generator)
        return value

    def _settle(self, generator: torch.Generator) -> None:
        """What is due to the weights after an update."""
        for m in self.net.modules():
            if isinstance(m, Neuron):
                m.confine()
        if self.seams.after_step is not None:
            self.seams.after_step(self.net, generator)


def not_finite(loss: float, norm: float) -> float:
    """The loss, or the gradient norm if only that is not finite: a NaN weight silences its neurons, the norm tells."""
    return norm if math.isfinite(loss) and not math.isfinite(norm) else loss


def scores(net: nn.Module, encode: Encoder, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """Scores of pixels by the network's own shorter way, if it has one: frames shown again are not computed again."""
    way = getattr(net, "scores", None)
    return net(encode(x)) if way is None else way(x, encode)


def accuracy(
    net: nn.Module, encode: Encoder, data: Dataset, *, batch: int = 128, device: str | torch.device = "cpu"
) -> Rate:
    """Clean accuracy in eval mode, ties and NaN wrong as in `attack`; the network's mode is put back."""
    was = net.training
    net.eval()
    right = 0
    try:
        with torch.no_grad(), in_float32(torch.device(device)):
            for i in range(0, len(data.labels), batch):
                z = scores(net, encode, pixels(data.images[i : i + batch].to(device)))
                right += int(correct(z, data.labels[i : i + batch].to(device)).sum())
    finally:
        net.train(was)
    return Rate(right, len(data.labels))
