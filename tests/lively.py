"""A small untrained network whose every layer fires: statistics set by data, gains raised."""

import torch
from torch import nn

from sparsetrail.snn.net import NetSpec, build


def lively(spec: NetSpec, u: torch.Tensor, *, seed: int = 1, gain: float = 1.5) -> nn.Module:
    """Build `spec` and let BatchNorm take its running statistics from the encoded input `u`; returned in eval mode."""
    net = build(spec, seed=seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.constant_(m.weight, gain)
            m.momentum = 1.0
        elif (
            isinstance(m, nn.Linear) and m.out_features != spec.classes
        ):  # spikes of these have no BatchNorm before them
            m.weight.data *= 8
    net.train()
    with torch.no_grad():
        net(u)
    return net.eval()
