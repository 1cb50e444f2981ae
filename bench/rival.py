"""SpikingJelly 2.0.0's network of a NetSpec, driven as the paper's code drives it; without torchvision."""

import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.net import NetSpec

logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # one warning an operation where Triton is missing


class MeanOverTime(nn.Module):
    """The published wrapper: a multi-step network whose scores are averaged over the time steps."""

    def __init__(self, snn: nn.Module) -> None:
        super().__init__()
        self.snn = snn

    def forward(self, u: Tensor) -> Tensor:
        return self.snn(u).mean(0)


def reference_net(
    spec: NetSpec, weights: dict[str, Tensor], device: torch.device | str = "cpu"
) -> tuple[nn.Module, Callable[[], None]]:
    """The rival's network with the same weights, and the reset it needs after every forward."""
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        # its zoo imports one downloader from there
        package = types.ModuleType("torchvision")
        package.__path__ = []
        inner = types.ModuleType("torchvision._internally_replaced_utils")
        inner.load_state_dict_from_url = None  # type: ignore[attr-defined]
        sys.modules |= {package.__name__: package, inner.__name__: inner}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = "spikingjelly.activation_based"
        neuron, surrogate, functional, layer = (
            importlib.import_module(f"{home}.{m}") for m in ("neuron", "surrogate", "functional", "layer")
        )
        zoo = importlib.import_module(f"{home}.model.{spec.arch.split('_')[0]}_resnet")
    knobs = {
        "spiking_neuron": neuron.IFNode,
        "surrogate_function": surrogate.ATan(),
        "detach_reset": spec.neuron.detach_reset,
    }
    if spec.arch.startswith("sew"):
        knobs["cnf"] = spec.connect.upper()
    net = getattr(zoo, spec.arch)(num_classes=spec.classes, **knobs)
    if spec.channels != 3:
        net.conv1 = layer.Conv2d(spec.channels, 64, 7, 2, 3, bias=False)
    if spec.pool == "avg":
        net.maxpool = layer.AvgPool2d(3, 2, 1)
    functional.set_step_mode(net, "m")
    net = net.to(device, weights["conv1.weight"].dtype)
    net.load_state_dict({k: v.contiguous() for k, v in weights.items()})
    return MeanOverTime(net), lambda: functional.reset_net(net)


def straight_through(encode: Encoder, x: Tensor) -> Tensor:
    """The code of `x`, each step of which hands its gradient on to the pixel as it is; in plain torch."""
    return encode(x.detach()) + (x - x.detach())


def rival_training(c, lr: float) -> Callable[[], object]:
    """One update as published: Adam, gradients by `backward`; the batch is encoded in the step."""
    net, reset = reference_net(c.spec, c.net.state_dict(), c.x.device)
    adam = torch.optim.Adam(net.parameters(), lr)

    def job() -> None:
        net.train()
        loss = F.cross_entropy(net(c.encode(c.x)), c.y)
        adam.zero_grad()
        loss.backward()
        adam.step()
        reset()

    return job


def rival_attack(c, space: str = "encoded", *, frozen: bool = False) -> Callable[[], Tensor]:
    """One input gradient as published: `backward`, which computes the parameters' too unless they are `frozen`."""
    net, reset = reference_net(c.spec, c.net.state_dict(), c.x.device)
    net.eval().requires_grad_(not frozen)
    start = c.u if space == "encoded" else c.x

    def job() -> Tensor:
        point = start.clone().requires_grad_()
        u = point if space == "encoded" else straight_through(c.encode, point)
        net.zero_grad()
        F.cross_entropy(net(u), c.y).backward()
        reset()
        return point.grad

    return job


def published_pgd(
    net: nn.Module,
    reset: Callable[[], None],
    u0: Tensor,
    y: Tensor,
    g: torch.Generator,
    *,
    eps: float = 6 / 255,
    step: float = 0.01,
    steps: int = 7,
) -> Tensor:
    """The paper's PGD on encoded inputs and its scoring forward, with the network in eval mode: which labels hold.

    From the description of its loop: a uniform start, steps along the sign of the gradient of the mean cross-entropy,
    parameter gradients included, projection onto the ball and onto 0..1; the last point is scored.
    """
    u = (u0 + (torch.rand(u0.shape, generator=g).to(u0) * 2 - 1) * eps).clamp(0, 1)
    for _ in range(steps):
        u = u.detach().requires_grad_()
        net.zero_grad()
        F.cross_entropy(net(u), y).backward()
        reset()
        u = u0 + (u.detach() + step * u.grad.sign() - u0).clamp(-eps, eps)
        u = u.clamp(0, 1)
    with torch.no_grad():
        z = net(u)
    reset()
    return z.argmax(1) == y
