"""Trails of trained networks, and where their zeros come from: parts of a backward are replaced, and zeros counted.

Nothing is retrained and no forward changes: every variant gives the scores of the network as it is, to the bit, or the
recipe stops. The paper calls zeros of pooling architectural and zeros of the spikes natural (arXiv:2509.23762, sec.
4.3); here either is what goes away when that part is replaced.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail.core import Mode, Report, Route, Victim
from sparsetrail.data import Dataset, pixels
from sparsetrail.models import Trained
from sparsetrail.recipes import measure
from sparsetrail.recipes.measure import Bench, follow
from sparsetrail.recipes.targets import Target, as_victim, ours
from sparsetrail.report.ablation_tables import ablations
from sparsetrail.report.labels import explain
from sparsetrail.snn.graphs import filled
from sparsetrail.snn.neuron import Neuron
from sparsetrail.snn.pooling import AvgPool2d
from sparsetrail.trails import Detail


def trace(
    bench: Bench,
    targets: Sequence[Target],
    data: Dataset,
    *,
    detail: Detail = "full",
    mode: Mode = "eval",
    per_step: bool = False,
    per_example: bool = False,
    batch: int = 16,
    command: str = "",
) -> Report:
    """The trails of `targets` on `data` in one report, so that they stand side by side; every trail is a cell."""
    started, knobs = time.monotonic(), {"per_step": per_step, "per_example": per_example}
    trails = [follow(bench, what, data, detail=detail, mode=mode, batch=batch, **knobs) for what in targets]
    return Report(
        title=f"Sparsity trail of {' and '.join(what.name for what in targets)}",
        summary=tuple(explain(t) for t in trails),
        models=tuple(_card(bench, what.model, what.name, data) for what in targets if what.model is not None),
        runs=(),
        trails=tuple(trails),
        claims=(),
        provenance=measure.provenance(bench, started, command),
    )


def ablate(
    bench: Bench, models: Sequence[tuple[str, Trained]], data: Dataset, *, batch: int = 16, command: str = ""
) -> Report:
    """What is left of the zeros of each named model on `data` when parts of its backward are replaced, as a report.

    Replaced are, one by one: max pools by average pools, strided 1x1 convolutions by averaging and 1x1, both; the
    surrogate by the straight-through estimator, a rectangle and a triangle; the reset in the graph or out of it; all of
    the neuron; all of both. Beside them float64 and BatchNorm in train mode. `tables.ablations(report.trails)` is the
    table; every trail is a cell, so a repeated command continues.
    """
    started, trails = time.monotonic(), []
    for name, model in models:
        if not any(True for _ in variants(model.net)):
            raise ValueError(
                f"{name}: expected a max pool, a strided 1x1 convolution or spiking neurons to replace, found none; "
                "sparsetrail trail says where its zeros are"
            )
    for name, model in models:
        what = ours(model, name, device=bench.device)
        own = what.make()
        trails.append(follow(bench, what, data, batch=batch, detail="full"))
        trails.append(follow(bench, what, data, batch=batch, detail="origin", mode="train"))
        for way in variants(model.net):
            changed = way.victim(model, name, bench.device)
            _check(own, changed, pixels(data.images.to(bench.device)), batch, way.words)
            trails.append(follow(bench, what, data, batch=batch, detail="origin", way=changed, replaced=way.words))
    found = ablations(trails)
    return Report(
        title="Where the zeros come from",
        summary=(*(a.sentence for a in found), *(explain(t) for t in trails if not t.replaced)),
        models=tuple(_card(bench, model, name, data) for name, model in models),
        runs=(),
        trails=tuple(trails),
        claims=(),
        provenance=measure.provenance(bench, started, command),
        notes=(
            "Every replacement leaves all scores equal to the bit, which was checked on these images; only the "
            "backward differs, and nothing was retrained.",
        ),
    )


def _card(bench: Bench, model: Trained, name: str, data: Dataset) -> dict[str, Any]:
    return measure.card(model, name, measure.clean(bench, model, name, data), data)


def _check(own: Victim, changed: Victim, x: Tensor, batch: int, words: str) -> None:
    with torch.no_grad():
        for i in range(0, len(x), batch):
            u = own.encode(filled(x[i : i + batch], 0))
            assert torch.equal(own.logits(u), changed.logits(u)), f"{words}: the forward has changed"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One replacement: in words as `Trail.replaced` has them, a change of the modules, a route of the neurons."""

    words: str
    change: Callable[[nn.Module], nn.Module] | None = None
    neuron: str | None = None

    def victim(self, model: Trained, name: str, device: str) -> Victim:
        """The model differentiated this way; the model itself is left as it is."""
        if self.change is not None:
            model = replace(model, net=rebuilt(model.net, self.change))
        v = as_victim(model, name, device=device)
        return v if self.neuron is None else v.by(Route(neuron=self.neuron))


def variants(net: nn.Module) -> Iterator[Variant]:
    """The replacements that change something about this network."""
    pools = any(averaged(m) is not m for m in net.modules())
    skips = any(spread(m) is not m for m in net.modules())
    if pools:
        yield Variant(words="architecture: max pool by average pool", change=averaged)
    if skips:
        yield Variant(words="architecture: strided 1x1 convolution by average and 1x1", change=spread)
    if pools and skips:
        yield Variant(words="architecture: pools and strided 1x1", change=lambda m: averaged(spread(m)))
    specs = {m.spec for m in net.modules() if isinstance(m, Neuron) and m.spec.kind != "relu"}
    if not specs:
        return
    for route in ("straight_through:1", "rectangle:1", "triangle:1"):
        yield Variant(words=f"neuron: surrogate {route.replace(':', '(')})", neuron=route)
    whole, words = "straight_through:1", "straight-through"
    if any(s.detach_reset for s in specs):
        whole, words = f"{whole}+reset", f"{words}, reset in the graph"
        yield Variant(words="neuron: reset in the graph", neuron="own+reset")
        yield Variant(words=f"neuron: {words}", neuron=whole)
    else:
        yield Variant(words="neuron: reset detached", neuron="own+detach")
    if pools or skips:
        yield Variant(words=f"both: pools, strided 1x1, {words}", change=lambda m: averaged(spread(m)), neuron=whole)


# ---- another backward behind the same forward ----------------------------------------------------------------------


def rebuilt(net: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of a network with `change` made to each of its modules, itself among them; what is shared stays shared."""
    twin = copy.deepcopy(net)
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(twin.modules()):
        for name, child in list(parent._modules.items()):  # named_children tells a module of two names once
            if child is None:
                continue
            if child not in made:
                made[child] = change(child)
            if made[child] is not child:
                setattr(parent, name, made[child])
    return change(twin)


def averaged(module: nn.Module) -> nn.Module:
    """A max pool with the backward of an average pool over the same windows; any other module is given back.

    Padding counts in the average, as it does in an average pool.
    """
    if type(module) is not nn.MaxPool2d or module.dilation not in (1, (1, 1)) or module.return_indices:
        return module
    return AveragedMaxPool2d(module)


def spread(module: nn.Module) -> nn.Module:
    """A strided 1x1 convolution with the backward of averaging, then 1x1; any other module is given back.

    The mean is over as many cells at the edge of a map that the stride does not divide: those beyond count as zeros.
    """
    if not isinstance(module, nn.Conv2d) or isinstance(module, SpreadConv2d):
        return module
    skips = module.kernel_size == (1, 1) and max(module.stride) > 1 and module.padding in (0, (0, 0))
    return SpreadConv2d(module) if skips else module


class AveragedMaxPool2d(AvgPool2d):
    """The values of a max pool, the gradient of the average over each window."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__(pool.kernel_size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)
        self.shown = pool.forward

    def forward(self, x: Tensor) -> Tensor:
        return behind(self.shown, x, AvgPool2d.forward(self, x))


class SpreadConv2d(nn.Conv2d):
    """The values of a strided 1x1 convolution, the gradient of one that sees the mean of all cells it steps over.

    Mean, then 1x1, is one convolution as wide as its stride, of the same weight at every tap, divided by their number.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        rows, columns = conv.stride
        super().__init__(
            conv.in_channels, conv.out_channels, (rows, columns), (rows, columns), groups=conv.groups, bias=False,
            device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        self.weight = nn.Parameter(conv.weight.detach().expand_as(self.weight) / (rows * columns))
        self.ceil_mode = True  # as many windows as the 1x1 has, the last ones over the edge
        self.shown = conv.forward

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        edge = (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows)
        return behind(self.shown, x, F.conv2d(F.pad(x, edge), self.weight, None, self.stride, groups=self.groups))


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, shown: Tensor) -> Tensor:
        return shown.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def behind(shown: Callable[[Tensor], Tensor], x: Tensor, hidden: Tensor) -> Tensor:
    """The values `shown(x)` to the bit, with the gradient of `hidden`."""
    with torch.no_grad():
        values = shown(x)
    if values.shape != hidden.shape:
        raise ValueError(
            f"expected a replacement of shape {tuple(values.shape)}, got {tuple(hidden.shape)}; only pools and "
            "convolutions over the same windows can stand in for each other"
        )
    return _Behind.apply(hidden, values)
