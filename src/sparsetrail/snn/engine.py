"""The engine: the same networks by faster algorithms, behind the same modules, chosen by themselves.

On a CPU with a C compiler (`kernels`), for float32 and float64:

- a convolution of spikes adds the weights of active inputs only, and so does the gradient of its weights; the gradient
  of its input is dense, without the taps that fall off the map;
- BatchNorm and the neuron behind it (`fire`) are one pass over all steps, forward and back, that keeps one tensor;
- a frame that a code shows at several steps goes through the first layer once (`coded`);
- constant weights (`freeze`) keep and compute nothing for their gradients, and intermediate maps come from a
  `Workspace` that is used again instead of fresh memory.

On a GPU neurons, with BatchNorm where weights are constant, and pools run kernels of our own (`cuda`), convolutions are
products (`unfold`, `dense`) where that is faster, whole steps are recorded (`graphs`), and frames are shared where half
of them are shown again.

Sums run in another order than PyTorch's, so in float32 a potential within rounding of the threshold can flip a spike;
in float64 a network's gradients agree to 1e-10. Modules that somebody watches by hooks, functorch, forward-mode
derivatives and `NetSpec(exact=True)` take the plain operations. Second derivatives are there; they run plain ones too.
A `neuron.Rule` changes the backward of a pass and none of its spikes; it has first derivatives only.
"""

import torch
from torch import nn

from sparsetrail.snn import kernels
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.neuron import Neuron
from sparsetrail.snn.workspace import Workspace


def share_memory(net: nn.Module, space: Workspace | None = None) -> nn.Module:
    """Let the layers of `net` take their intermediate maps from one workspace of their own, or from `space`."""
    space = space or Workspace()
    for m in net.modules():
        if isinstance(m, Conv2d | Neuron):
            m.space = space
    return net


def freeze(net: nn.Module, space: Workspace | None = None, *, half: bool = False) -> nn.Module:
    """`net` as it is now with constant weights, for attacks: nothing is kept or computed for their gradients.

    A second tree of the same modules around the same tensors, made in a millisecond: make it anew at every call and it
    cannot be out of date, whoever changed what. The same numbers to the bit. `half` takes the products of input
    gradients in bf16; scores stay the same to the bit. A network with modules that are neither PyTorch's nor ours,
    which may hold anything, is given back itself.
    """
    modules = list(net.modules())
    if not all(type(m).__module__.startswith(("torch.nn.modules.", "sparsetrail.")) for m in modules):
        return net
    twins = {m: _twin(m) for m in modules}
    for twin in twins.values():
        twin.__dict__["_modules"] = {k: None if m is None else twins[m] for k, m in twin._modules.items()}
    frozen = share_memory(twins[net], space)
    return halve(frozen) if half else frozen


def _twin(module: nn.Module) -> nn.Module:
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {k: None if p is None else p.detach() for k, p in module._parameters.items()}
    twin.__dict__["_buffers"] = dict(module._buffers)
    return twin


def halve(net: nn.Module) -> nn.Module:
    """Let the convolutions of `net` take the products of their input gradients in bf16."""
    for m in net.modules():
        if isinstance(m, Conv2d):
            m.half_products = True
    return net


NO_BF16 = (
    "precision: expected a device that multiplies bf16, found {} without (a CPU needs AVX-512 BF16, a C compiler, and "
    "kernels switched on); leave precision at fp32"
)


def has_bf16() -> bool:
    """Does this CPU multiply bf16, and is there a kernel for it?"""
    return kernels.available() and bool(kernels.library(torch.float32).has_bf16())
