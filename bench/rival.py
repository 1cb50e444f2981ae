"""SpikingJelly 2.0.0's network of a NetSpec, driven as the paper's code drives it; without torchvision."""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsetrail.snn.net import NetSpec


class MeanOverTime(nn.Module):
    """The published wrapper: a multi-step network whose scores are averaged over the time steps."""

    def __init__(self, snn: nn.Module) -> None:
        super().__init__()
        self.snn = snn

    def forward(self, u: Tensor) -> Tensor:
        return self.snn(u).mean(0)


def reference_net(spec: NetSpec, weights: dict[str, Tensor]) -> tuple[nn.Module, Callable[[], None]]:
    """The rival's network with the same weights, and the reset it needs after every forward."""
    if importlib.util.find_spec("torchvision") is None:  # its zoo imports one downloader from there
        package = types.ModuleType("torchvision")
        package.__path__ = []
        inner = types.ModuleType("torchvision._internally_replaced_utils")
        inner.load_state_dict_from_url = None  # type: ignore[attr-defined]
        sys.modules |= {package.__name__: package, inner.__name__: inner}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = "spikingjelly.activation_based"
        neuron, surrogate, functional = (
            importlib.import_module(f"{home}.{m}") for m in ("neuron", "surrogate", "functional")
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
    if spec.pool == "avg":
        net.maxpool = importlib.import_module(f"{home}.layer").AvgPool2d(3, 2, 1)
    functional.set_step_mode(net, "m")
    net.load_state_dict({k: v.contiguous() for k, v in weights.items()})
    if torch.cuda.is_available():
        functional.set_backend(net, "triton", instance=neuron.IFNode)
    wrapped = MeanOverTime(net)
    return wrapped, lambda: functional.reset_net(net)
