"""Surrogate derivatives against closed forms, and the step in front of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.integrate import quad

from sparsetrail.snn.surrogate import SURROGATES, Surrogate, atan, heaviside

WIDTHS = (0.3, 1.0, 2.0, 5.0)
CLOSED = {
    "atan": lambda x, a: a / 2 / (1 + (math.pi * a * x / 2) ** 2),
    "sigmoid": lambda x, a: a / (4 * math.cosh(a * x / 2) ** 2),
    "triangle": lambda x, g: max(0.0, 1 - abs(x) / g) / g,
    "rectangle": lambda x, w: 1 / w if abs(x) < w / 2 else 0.0,
    "gaussian": lambda x, s: math.exp(-(x**2) / (2 * s**2)) / math.sqrt(2 * math.pi * s**2),
    "fast_sigmoid": lambda x, k: (1 + k * abs(x)) ** -2,
    "exponential": lambda x, a: a / 2 * math.exp(-a * abs(x)),
    "unit_exponential": lambda x, g: math.exp(-g * abs(x)),
    "damped_triangle": lambda x, g: 0.3 * max(0.0, g - abs(x)) / g**2,
    "damped_exponential": lambda x, g: 0.3 * math.exp(-g * abs(x)),
    "straight_through": lambda x, w: 1 / w,
}
CASES = [(name, width) for name in SURROGATES for width in WIDTHS]
FLOATS = {"allow_nan": False, "allow_infinity": False}


def at(s, x):
    return s(torch.tensor(x, dtype=torch.float64)).item()


@pytest.mark.parametrize(("name", "width"), CASES)
def test_closed_form(name, width):
    s = Surrogate(name, width)
    for x in (-7.3, -1.0, -0.4, -0.1499, 0.0, 1e-9, 0.1501, 0.51, 2.0, 11.0):
        assert at(s, x) == pytest.approx(CLOSED[name](x, width), rel=1e-12, abs=1e-300), x


def test_every_name_has_a_closed_form():
    assert CLOSED.keys() == SURROGATES.keys()


def test_values_of_the_papers_surrogate():
    values = {0: 1.0, 0.25: 0.6184864581588363, 0.5: 0.288400439142001, 1: 0.09199966835037524, 2: 0.02470452303185764}
    for x, value in values.items():
        assert at(atan(), float(x)) == pytest.approx(value, rel=1e-15)
        assert at(atan(2.0), float(-x)) == pytest.approx(value, rel=1e-15)
    assert atan() == Surrogate() == Surrogate("atan", 2.0)


@pytest.mark.parametrize(("name", "width"), [c for c in CASES if c[0] != "straight_through"])  # a constant has none
def test_integral(name, width):
    s = Surrogate(name, width)
    edge = {"triangle": width, "damped_triangle": width, "rectangle": width / 2}.get(name)
    if edge is None:
        half, error = quad(lambda x: at(s, x), 0, math.inf)
    else:
        half, error = quad(lambda x: at(s, x), 0, edge)
        assert at(s, edge * (1 + 1e-12)) == 0
    peak = {"fast_sigmoid": 1.0, "unit_exponential": 1.0, "damped_exponential": 0.3}.get(name)
    want = 0.3 if name == "damped_triangle" else 1.0 if peak is None else 2 * peak / width
    assert 2 * half == pytest.approx(want, abs=1e-6) and error < 1e-6


@pytest.mark.parametrize("name", SURROGATES)
@given(x=npst.arrays(np.float64, 20, elements=st.floats(-1e6, 1e6, **FLOATS)), width=st.floats(0.05, 20))
def test_symmetric_non_negative_peaked(name, x, width):
    s = Surrogate(name, width)
    g = s(torch.from_numpy(x))
    assert torch.equal(g, s(torch.from_numpy(-x)))
    assert (g >= 0).all() and g.isfinite().all()
    assert (g <= s(torch.zeros_like(g)) * (1 + 1e-15)).all()  # the last bit differs between vector lanes and tail
    assert g.dtype == torch.float64 and s(torch.zeros(3)).dtype == torch.float32


@pytest.mark.parametrize("name", SURROGATES)
@given(x=npst.arrays(np.float32, 20, elements=st.floats(width=32, **FLOATS)))
def test_forward_is_the_heaviside_step(name, x):
    x = torch.from_numpy(x).requires_grad_()
    y = heaviside(x, Surrogate(name, 0.7))
    assert torch.equal(y, torch.from_numpy((x.detach().numpy() >= 0).astype(np.float32)))
    y.sum().backward()
    assert torch.equal(x.grad, Surrogate(name, 0.7)(x.detach()))


def test_step_at_the_edges():
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan])
    assert heaviside(x, atan()).tolist() == [1, 1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("name", ["atan", "sigmoid", "gaussian"])
def test_second_derivative_and_forward_mode(name):
    s = Surrogate(name, 1.3)
    x = torch.tensor([-0.8, -0.1, 0.2, 1.1], dtype=torch.float64)
    d = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    y, tangent = torch.func.jvp(lambda a: heaviside(a, s), (x,), (d,))
    assert torch.equal(y, (x >= 0).double()) and torch.equal(tangent, d * s(x))
    second = torch.func.vmap(torch.func.grad(torch.func.grad(lambda a: heaviside(a, s))))(x)
    numeric = (s(x + 1e-6) - s(x - 1e-6)) / 2e-6
    torch.testing.assert_close(second, numeric, rtol=1e-7, atol=1e-8)


def test_refusals():
    with pytest.raises(ValueError, match=r"expected one of atan, sigmoid, .* got 'arctan'"):
        Surrogate("arctan")
    for width in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="surrogate width: expected a positive number"):
            Surrogate("atan", width)
