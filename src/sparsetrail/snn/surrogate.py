"""Surrogate derivatives: forward the exact Heaviside step (1 where h - threshold >= 0), only the backward differs.

Each derivative is a plain function of the centred potential x = h - threshold and one `width` parameter, named as the
literature names it (alpha, gamma, ...), written so that the engine can run it on symbols too. All integrate to one over
the real line unless their docstring says otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrail.snn.kernels import Value


def atan_derivative(x: Value, alpha: float) -> Value:
    """(alpha/2) / (1 + (pi/2 alpha x)^2): never zero. Fang et al. 2021, arXiv:2007.05785; the paper: alpha=2."""
    return (alpha / 2) / (1 + (math.pi / 2 * alpha * x).square())


def sigmoid_derivative(x: Value, alpha: float) -> Value:
    """alpha s (1 - s) with s = sigmoid(alpha x); 1 - s as sigmoid(-alpha x), which does not cancel to 0 far above."""
    return alpha * (torch.sigmoid(alpha * x) * torch.sigmoid(-alpha * x))


def triangle_derivative(x: Value, gamma: float) -> Value:
    """max(0, gamma - |x|) / gamma^2: zero beyond gamma. Esser et al. 2016, arXiv:1603.08270; SNN-RAT (Ding 2022)."""
    return (gamma - x.abs()).clamp(min=0) / gamma**2


def damped_triangle_derivative(x: Value, gamma: float) -> Value:
    """0.3 max(0, gamma - |x|) / gamma^2: integral 0.3. Bellec et al. 2018, arXiv:1803.09574; DIET- and HIRE-SNN."""
    return 0.3 * triangle_derivative(x, gamma)


def rectangle_derivative(x: Value, width: float) -> Value:
    """1/width where |x| < width/2, else zero. Wu et al. 2018, arXiv:1706.02609, eq. 25."""
    return (x.abs() < width / 2).to(x.dtype) / width


def gaussian_derivative(x: Value, sigma: float) -> Value:
    """Normal density of standard deviation sigma. Wu et al. 2018, arXiv:1706.02609, eq. 27."""
    return torch.exp(-(x / sigma).square() / 2) / (sigma * math.sqrt(2 * math.pi))


def fast_sigmoid_derivative(x: Value, slope: float) -> Value:
    """1 / (1 + slope |x|)^2. Zenke & Ganguli 2018, arXiv:1705.11146 (SuperSpike). Peak 1, integral 2/slope."""
    return 1 / (1 + slope * x.abs()).square()


def exponential_derivative(x: Value, alpha: float) -> Value:
    """(alpha/2) exp(-alpha |x|). Shrestha & Orchard 2018, arXiv:1810.08646 (SLAYER)."""
    return (alpha / 2) * torch.exp(-alpha * x.abs())


def unit_exponential_derivative(x: Value, gamma: float) -> Value:
    """exp(-gamma |x|): peak 1, integral 2/gamma. As Ozdenizci & Legenstein 2024 attack, arXiv:2311.09266."""
    return torch.exp(-gamma * x.abs())


def damped_exponential_derivative(x: Value, gamma: float) -> Value:
    """0.3 exp(-gamma |x|): peak 0.3, integral 0.6/gamma. As Ozdenizci & Legenstein 2024 attack, arXiv:2311.09266."""
    return 0.3 * torch.exp(-gamma * x.abs())


def straight_through_derivative(x: Value, width: float) -> Value:
    """1/width everywhere: the straight-through estimator. Bengio et al. 2013, arXiv:1308.3432. Integral infinite."""
    return torch.full_like(x, 1 / width)


SURROGATES: dict[str, Callable[[Value, float], Value]] = {
    "atan": atan_derivative,
    "sigmoid": sigmoid_derivative,
    "triangle": triangle_derivative,
    "damped_triangle": damped_triangle_derivative,
    "rectangle": rectangle_derivative,
    "gaussian": gaussian_derivative,
    "fast_sigmoid": fast_sigmoid_derivative,
    "exponential": exponential_derivative,
    "unit_exponential": unit_exponential_derivative,
    "damped_exponential": damped_exponential_derivative,
    "straight_through": straight_through_derivative,
}


@dataclass(frozen=True)
class Surrogate:
    """A surrogate by name and width; calling it gives the derivative at the centred potential x = h - threshold."""

    name: str = "atan"
    width: float = 2.0

    def __post_init__(self) -> None:
        if self.name not in SURROGATES:
            raise ValueError(f"surrogate: expected one of {', '.join(SURROGATES)}, got {self.name!r}")
        if not (self.width > 0 and math.isfinite(self.width)):
            raise ValueError(f"surrogate width: expected a positive number, got {self.width}")

    def __call__(self, x: Value) -> Value:
        return SURROGATES[self.name](x, self.width)


def atan(alpha: float = 2.0) -> Surrogate:
    """The paper's arctan surrogate; alpha=2 gives 1 / (1 + (pi x)^2)."""
    return Surrogate("atan", alpha)


class _Heaviside(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: Surrogate) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.surrogate = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ctx.surrogate(x), None

    @staticmethod
    def jvp(ctx, tangent, _):
        (x,) = ctx.saved_tensors
        return tangent * ctx.surrogate(x)


def heaviside(x: Tensor, surrogate: Surrogate) -> Tensor:
    """1 where x >= 0, else 0 (a tie spikes); the gradient is multiplied by `surrogate(x)`."""
    return _Heaviside.apply(x, surrogate)
