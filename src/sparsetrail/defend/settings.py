"""What settings, encoders and networks defences refuse."""

import math

from sparsetrail.core import as_fraction
from sparsetrail.defend.crafting import NOISE
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.net import NetSpec
from sparsetrail.training import TrainSpec


def check_radius(name: str, value: float) -> None:
    """Refuse what is no length in pixels 0..1."""
    if not 0 <= value < 1:
        raise ValueError(
            f"{name}: expected a length in pixels 0..1 such as 8/255, got {value:g}"
            + ("; grey levels are divided by 255" if value >= 1 else "")
        )


def check_positive(**values: float) -> None:
    """Refuse numbers that are not above 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value:g}")


def check_count(**values: int) -> None:
    """Refuse what is no whole number from 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")


def check_strength(**values: float) -> None:
    """Refuse what is neither 0 (off) nor a positive number."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected 0 (off) or a positive number, got {value:g}")


def check_reached(*, eps: float, steps: int, step: float, start: str = "none") -> None:
    """Refuse a radius that the start and all steps in one direction fall short of."""
    begun = {"none": 0.0, "uniform": eps, "normal": NOISE, "corner": eps / 2}[start]
    if begun + steps * step < eps * (1 - 1e-9):
        enough = math.ceil((eps - begun) / step - 1e-9)
        raise ValueError(
            f"eps: expected a radius that {steps} steps of {as_fraction(step)} reach, got {as_fraction(eps)}; give "
            f"steps {enough}, or step {as_fraction((eps - begun) / steps)}"
        )


def check_one_of(name: str, got: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not allowed."""
    if got not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {got!r}")


def differentiable(_net: NetSpec, encode: Encoder, _spec: TrainSpec) -> None:
    """Refuse an encoder that no gradient goes through."""
    if encode.backward == "none":
        raise ValueError(
            f"encoder: expected one with a backward rule to craft through, found {encode.name} with none; give another "
            "backward, e.g. identity"
        )


def paired(net: NetSpec, encode: Encoder, spec: TrainSpec) -> None:
    """Two forwards are compared: what they draw must not come between them."""
    differentiable(net, encode, spec)
    if encode.random:
        raise ValueError(
            f"encoder: expected one that draws nothing, since two forwards are compared, found {encode.name}; try "
            "direct or phase, or pgd_at as the defence"
        )
