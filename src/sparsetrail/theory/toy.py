"""The paper's two-layer network (eq. 7-9) in float64, its Jacobians by autograd and in closed form.

p = (1/T) sum_t Theta(W2 Theta(W1 s[t])), so p is a vector and its derivatives are [m t d], [m n d] and [m m n] (output
first). Legend: t steps, d inputs, n hidden, m outputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrail._shapes import Float
from sparsetrail.snn.neuron import NeuronSpec, charge, discharge
from sparsetrail.snn.surrogate import atan_derivative

Jacobians = tuple[Tensor, Tensor, Tensor]  # dp/dS [m t d], dp/dW1 [m n d], dp/dW2 [m m n]


@dataclass(frozen=True, kw_only=True)
class TwoLayerSNN:
    """Weights W1 [n d], W2 [m n] and what a neuron is.

    The paper's eq. 8 is a threshold without memory; `stateful` gives hard-reset IF neurons, the reset in the gradient
    or not. Its derivative is printed at h where the code takes h - V: `centred=False` is the printed one.
    """

    w1: Tensor
    w2: Tensor
    threshold: float = 1.0
    alpha: float = 2.0
    stateful: bool = False
    detach_reset: bool = True
    centred: bool = True

    def __post_init__(self) -> None:
        if self.w1.ndim != 2 or self.w2.ndim != 2 or self.w2.shape[1] != self.w1.shape[0]:
            raise ValueError(
                f"weights: expected W1 [n d] and W2 [m n], got {tuple(self.w1.shape)} and {tuple(self.w2.shape)}; "
                "the columns of W2 are the rows of W1"
            )

    def forward(self, s: Float[Tensor, "t d"]) -> Float[Tensor, " m"]:
        """Share of steps at which each output spikes."""
        return self._run(s.double(), self.w1.double(), self.w2.double())

    def jacobians(self, s: Float[Tensor, "t d"], *, closed: bool = True) -> Jacobians:
        """Derivatives of p, in closed form or by autograd through the same forward."""
        s, w1, w2 = s.double(), self.w1.double(), self.w2.double()
        if not closed:
            return torch.autograd.functional.jacobian(self._run, (s, w1, w2))  # type: ignore[return-value]
        spikes, inner = self._flow(s @ w1.T)
        _, outer = self._flow(spikes @ w2.T)
        a = outer.sum(0) / len(s)  # dp_o / dz2_o[t]: [t m]
        b = torch.einsum("uo,utn->otn", a, inner)  # the same down to z1_n[t], without W2
        along = w2[:, None, :] * b
        of_w2 = torch.zeros(len(w2), *w2.shape, dtype=torch.float64)
        of_w2[torch.arange(len(w2)), torch.arange(len(w2))] = a.T @ spikes
        return torch.einsum("otn,nd->otd", along, w1), torch.einsum("otn,td->ond", along, s), of_w2

    def _run(self, s: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return self._fire(self._fire(s @ w1.T) @ w2.T).mean(0)

    def _spike(self, h: Tensor) -> Tensor:
        """The step, with the derivative of a smooth primitive: another path than the package's own surrogate."""
        at = h - self.threshold if self.centred else h
        smooth = torch.atan(math.pi / 2 * self.alpha * at) / math.pi
        return (h >= self.threshold).double() + (smooth - smooth.detach())

    def _fire(self, z: Tensor) -> Tensor:
        if not self.stateful:
            return self._spike(z)
        spec, v, out = self._spec(), torch.zeros_like(z[0]), []
        for now in z:
            h = charge(now, v, spec, None)
            s = self._spike(h)
            v = discharge(h, s.detach() if self.detach_reset else s, spec)
            out.append(s)
        return torch.stack(out)

    def _flow(self, z: Float[Tensor, "t k"]) -> tuple[Tensor, Tensor]:
        """Spikes [t k] and their derivative by the currents [t t k], spike first."""
        steps, spec = len(z), self._spec()
        spikes, v = torch.zeros_like(z), torch.zeros_like(z[0])
        flow, carry = torch.zeros(steps, *z.shape, dtype=z.dtype), torch.zeros_like(z)
        for t in range(steps):
            h = charge(z[t], v, spec, None) if self.stateful else z[t]
            slope = atan_derivative(h - self.threshold if self.centred else h, self.alpha)
            spikes[t] = (h >= self.threshold).double()
            carry[t] = 1.0  # dh[t] / dz[t']: [t' k]
            flow[t] = slope * carry
            kept = (1 - spikes[t]) - (0.0 if self.detach_reset else slope * h)
            carry = carry * kept if self.stateful else torch.zeros_like(carry)
            v = discharge(h, spikes[t], spec)
        return spikes, flow

    def _spec(self) -> NeuronSpec:
        return NeuronSpec(threshold=self.threshold, detach_reset=self.detach_reset)


def literal_vs_centred(threshold: float = 1.0, alpha: float = 2.0) -> dict[str, float]:
    """The surrogate at threshold as the paper prints it (at h) and as its code takes it (at h - V)."""
    literal, centred = (float(atan_derivative(torch.tensor(u, dtype=torch.float64), alpha)) for u in (threshold, 0.0))
    return {"literal": literal, "centred": centred, "quotient": centred / literal}
