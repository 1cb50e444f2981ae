"""The network of the same weights that is differentiable: what "a differentiable SNN" of Theorem 1 can mean."""

import copy
import math

import torch
from torch import Tensor, nn

from sparsetrail.snn.neuron import Neuron, NeuronSpec, charge, discharge


def smooth_twin(net: nn.Module) -> nn.Module:
    """A copy whose neurons emit arctan(pi/2 alpha (h - V)) / pi + 1/2 instead of a step: a primitive of the surrogate.

    Another function than the network: its accuracy is its own. The reset is in its gradient, as in any function.
    """
    twin = copy.deepcopy(net)
    found = [m for m in twin.modules() if isinstance(m, Neuron)]
    kinds = {(m.spec.kind, m.spec.surrogate.name) for m in found}
    if not found or any(kind not in ("if", "lif") or name != "atan" for kind, name in kinds):
        raise ValueError(
            f"smooth twin: expected IF or LIF neurons with the arctan surrogate, found "
            f"{', '.join(' '.join(k) for k in sorted(kinds)) or 'no neuron'}"
        )
    for m in found:
        m.run = _glide
    return twin


def is_smooth(net: nn.Module) -> bool:
    """Is this network a smooth twin?"""
    return any(isinstance(m, Neuron) and m.run is _glide for m in net.modules())


def _glide(x: Tensor, spec: NeuronSpec, leak: Tensor | None = None) -> Tensor:
    v, out = torch.full_like(x[0], spec.rest), []
    for now in x.unbind(0):
        h = charge(now, v, spec, leak)
        s = torch.atan(math.pi / 2 * spec.surrogate.width * (h - spec.threshold)) / math.pi + 0.5
        v = discharge(h, s, spec)
        out.append(s)
    return torch.stack(out)
