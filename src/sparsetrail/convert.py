"""From a network of ReLUs to a spiking one of the same weights, by thresholds read off the currents it sees.

Rathi & Roy 2020, arXiv:2008.03658 (DIET-SNN), the start of HIRE-SNN; by the maximum over many more steps Rathi et al.
2020 (ICLR), the start of input discretisation. The spiking network is trained on from there.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrail._shapes import Float
from sparsetrail.core.precision import in_full
from sparsetrail.data import Dataset, pixels, take
from sparsetrail.models import Trained, load_model, net_spec_from
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.folded import FoldedNet
from sparsetrail.snn.net import NetSpec, build, running_for
from sparsetrail.snn.neuron import LEAST, Neuron, NeuronSpec
from sparsetrail.snn.weights import save_weights


def twin_of(spec: NetSpec, encode: Encoder) -> NetSpec:
    """The network of ReLUs that a spiking one may begin with: one look at the pixels, as the code shows them.

    The mean of a signed code is 2x - 1, which of a network without normalisation the first operation "half" shows.
    """
    half = encode.knobs.get("signed") and spec.normalise == "none"
    normalise = "half" if half else spec.normalise
    return replace(spec, neuron=NeuronSpec(kind="relu"), steps=1, readout="mean", normalise=normalise)


def convert(
    twin: Trained,
    spec: NetSpec,
    encode: Encoder,
    data: Dataset,
    out: Path | str,
    *,
    percentile: float = 99.7,
    scale: float = 0.3,
    steps: int = 100,
    images: int = 512,
    seed: int = 0,
    batch: int | None = None,
    device: str | torch.device = "cpu",
    say: Callable[[int, int], None] = lambda done, of: None,
) -> Trained:
    """A model file in `out`: the weights of `twin` in the network `spec`, its thresholds calibrated and scaled.

    Thresholds are what `calibrate` finds on `images` of `data` over `steps` steps, times `scale` (0.2 to 0.3 for few
    steps at the end, 0.6 to 0.8 for a hundred and more). A finished one of the same settings is taken from `out`.
    ValueError where the twin is not `twin_of` the spec, whatever its readout, or a layer sees no current.
    """
    if spec.neuron.kind != "diet":
        raise ValueError(
            f"neuron: expected diet neurons, whose thresholds are set one by one, found {spec.neuron.kind}"
        )
    if twin.card["net"]["neuron"]["kind"] != "relu":
        raise ValueError(f"twin: expected a network of ReLUs, found {twin.card['net']['neuron']['kind']} neurons")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile: expected 0..100, got {percentile:g}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive factor, got {scale:g}")
    if steps < 1 or images < 1:
        raise ValueError(f"steps, images: expected at least 1 of each, got {steps} and {images}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected at least 1 image, got {batch}")
    if encode.steps != spec.steps:
        raise ValueError(f"encoder: expected {spec.steps} steps as the network's, found {encode.steps}")
    if data.images.shape[1] != spec.channels:
        raise ValueError(f"data: expected {spec.channels} channels as the network's, found {data.images.shape[1]}")
    own, asked = asdict(net_spec_from(twin.card["net"])), asdict(twin_of(spec, encode))
    if strange := [k for k in asked if k not in ("neuron", "steps", "readout", "exact") and own[k] != asked[k]]:
        told = ", ".join(f"{k} {own[k]} where {asked[k]} is asked for" for k in strange)
        raise ValueError(f"twin: expected the same network but for neurons and steps, found {told}")
    out = Path(out)
    some = take(data, min(images, len(data.labels)), seed=seed)
    how = {"from": twin.sha256, "percentile": percentile, "scale": scale, "steps": steps, "data": some.sha256}
    card: dict[str, Any] = {
        "kind": "model",
        "net": asdict(spec),
        "encoder": {"name": encode.name, "knobs": encode.knobs},
        "data": twin.card["data"],
        "validation": None,
    }
    card = json.loads(json.dumps(card))
    file = out / "model.safetensors"
    if file.exists():
        held = load_model(file)
        known = {k: v for k, v in held.card.get("converted", {}).items() if k in how}
        if known != how or any(held.card.get(k) != card[k] for k in card):
            raise ValueError(f"{out}: holds another model; give another --out, or --fresh to move the old one aside")
        return held
    net = build(spec)
    missing, unexpected = net.load_state_dict(twin.net.state_dict(), strict=False)
    strange = [k for k in missing if not k.endswith((".leak", ".threshold"))]
    if strange or unexpected:
        raise ValueError(
            f"twin: expected the weights of {spec.arch}, missing {strange[:5]}, unexpected {unexpected[:5]}"
        )
    net, x = net.eval().to(device), pixels(some.images).to(device)
    found = calibrate(net, encode.over(steps), x, percentile=percentile, batch=batch, say=say)
    with torch.no_grad():
        for m in neurons(net):
            assert m.threshold is not None
            m.threshold.mul_(scale).clamp_(min=LEAST)
    out.mkdir(parents=True, exist_ok=True)
    save_weights(file, net.state_dict(), card | {"converted": how | {"thresholds": [float(v) for v in found]}})
    return load_model(file)


def neurons(net: nn.Module) -> list[Neuron]:
    """The layers of learnt thresholds."""
    return [m for m in net.modules() if isinstance(m, Neuron) and m.threshold is not None]


@in_full
def calibrate(
    net: FoldedNet,
    encode: Encoder,
    x: Float[Tensor, "n c h w"],
    *,
    percentile: float = 99.7,
    batch: int | None = None,
    say: Callable[[int, int], None] = lambda done, of: None,
) -> list[float]:
    """Set the threshold of every layer, first to last, to that percentile of its input currents without leak.

    Each layer sees the spikes of those before it with the thresholds they have by then, over the steps of `encode`.
    The percentile is exact: the smallest current that so many of all (steps, images, neurons) do not exceed, whatever
    the `batch`; None holds about FRAMES image steps at a time.
    """
    batch = max(1, FRAMES // encode.steps) if batch is None else batch
    layers = _in_order(net, encode, x[:1])
    leaks = [m.leak.item() for m in layers if m.leak is not None]
    found: list[float] = []
    try:
        with torch.no_grad(), running_for(net, encode.steps):
            for m in layers:
                assert m.leak is not None
                m.leak.fill_(1.0)
            for i, m in enumerate(layers):
                top = _Top(percentile)
                for part in x.split(batch):
                    top.see(_current(net, m, encode(part)), of=len(x) / len(part))
                found.append(top.value())
                if not found[-1] > 0:
                    raise ValueError(
                        f"neuron layer {i + 1}: expected positive currents, found a percentile {percentile:g} of "
                        f"{found[-1]:.3g}; calibrate over more steps, so that spikes get there, or train the twin "
                        f"longer{', or raise the percentile' if percentile < 100 else ''}"
                    )
                assert m.threshold is not None
                m.threshold.fill_(found[-1])
                say(i + 1, len(layers))
    finally:
        with torch.no_grad():
            for m, leak in zip(layers, leaks, strict=True):
                assert m.leak is not None
                m.leak.fill_(leak)
    return found


FRAMES = 2048  # of 64 channels of 32x32 floats: half a gigabyte


class _Enough(Exception):
    """The layer in question has seen its currents."""


def _current(net: FoldedNet, layer: Neuron, u: Tensor) -> Tensor:
    """What enters `layer`; nothing behind it is computed."""
    seen: list[Tensor] = []

    def stop(_m: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])
        raise _Enough

    handle = layer.register_forward_pre_hook(stop)
    try:
        net(u)
    except _Enough:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError("expected every neuron layer to be called, found one that was not")


def _in_order(net: FoldedNet, encode: Encoder, x: Tensor) -> list[Neuron]:
    """The layers in the order of their calls."""
    order: list[Neuron] = []
    handles = [m.register_forward_pre_hook(lambda m, _given: order.append(m)) for m in neurons(net)]
    try:
        with torch.no_grad(), running_for(net, encode.steps):
            net(encode(x))
    finally:
        for h in handles:
            h.remove()
    return order


class _Top:
    """The largest of a stream of numbers, as many as its percentile needs."""

    def __init__(self, percentile: float) -> None:
        self.above, self.total = 1 - percentile / 100, 0
        self.kept: Tensor | None = None

    def see(self, x: Tensor, *, of: float) -> None:
        """Take in a part of the stream, which is `of` times as long in the end."""
        x = x.flatten()
        self.total += len(x)
        need = math.ceil(self.above * max(self.total, len(x) * of)) + 1
        most = x.topk(min(need, len(x))).values
        both = most if self.kept is None else torch.cat([self.kept, most])
        self.kept = both.topk(min(need, len(both))).values

    def value(self) -> float:
        assert self.kept is not None
        return float(self.kept[math.floor(self.above * self.total + 1e-9)])
