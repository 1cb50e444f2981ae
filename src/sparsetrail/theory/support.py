"""Theorem 3: how many entries of weight and input gradient are not zero. Integers and floats; k is a number of entries.

The paper (arXiv:2509.23762, eq. 12-18) takes |W2 W1|_0 for the input gradient, |W2 S|_0 for the weight gradient, and
bounds E|W2 S|_0 by (T/d) (kS/k1) E|W2 W1|_0, where k2 is the largest row count of W2, k1 and kS the largest column
counts of W1 and of the spikes S. What is proved here instead: for the true gradients |dp/dW1|_0 = |W2|_0 a, with a the
input lines that ever spike, and |dp/dW1|_0 <= (n a / r_min) |dp/ds[t]|_0; for the paper's counts the factor of
`corrected_bound_expect`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparsetrail._shapes import Bool, Float
from sparsetrail.core import Rate


def expected_nnz_bernoulli(m: int, n: int, d: int, p_left: float, p_right: float) -> float:
    """E|A B|_0 of A [m n], B [n d] whose entries are non-zero independently, without cancellation."""
    p = p_left * p_right
    return float(m * d) if p == 1 else -m * d * math.expm1(n * math.log1p(-p))


def expected_nnz_exact(d: int, cols: int, k_left: int, k_right: int, *, exact: bool = False) -> float | Fraction:
    """The same of A [d d] whose rows have `k_left` entries and B [d cols] whose columns have `k_right`, anywhere.

    d cols (1 - C(d - k_right, k_left) / C(d, k_left)); a Fraction with `exact`.
    """
    hit = 1 - Fraction(math.comb(d - k_right, k_left), math.comb(d, k_left))
    return d * cols * hit if exact else float(d * cols * hit)


def density_degrees(w: Float[Tensor, "n d"]) -> tuple[int, int, int]:
    """Largest count of a row, largest of a column, smallest of a row: the paper's eq. 10, and r_min."""
    on = w != 0
    return int(on.sum(1).max()), int(on.sum(0).max()), int(on.sum(1).min())


def structural_product(a: Float[Tensor, "m n"], b: Float[Tensor, "n d"]) -> Bool[Tensor, "m d"]:
    """Where A B is not zero for almost all values on the supports of A and B."""
    return (a != 0).double() @ (b != 0).double() > 0


def nnz_weight_jacobian(w2: Float[Tensor, "m n"], s: Float[Tensor, "t d"]) -> int:
    """|dp/dW1|_0 of the two-layer network: |W2|_0 times the input lines that spike at least once. Exact.

    Each entry is W2 times a sum of positive surrogate terms over the spikes of one line: nothing can cancel.
    """
    return int((w2 != 0).sum()) * int((s != 0).any(0).sum())


def nnz_input_jacobian(w2: Float[Tensor, "m n"], w1: Float[Tensor, "n d"]) -> int:
    """|dp/ds[t]|_0 for given W1 and almost all W2; zeros of the product W2 W1 by cancellation are none of it."""
    return int(structural_product(w2, w1).sum())


def paper_bound(steps: int, d: int, k_s: float, k_1: float, nnz_in: float) -> float:
    """The paper's eq. 18 as printed: (T/d) (kS/k1) |input gradient|_0; nan where k1 or d is 0."""
    return math.nan if k_1 == 0 or d == 0 else steps / d * k_s / k_1 * nnz_in


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Eq. 16 (input) and 17 (weight) as printed, and with the union bound taken over the whole sum."""

    input_printed: float
    weight_printed: float
    input_union: float
    weight_union: float


def paper_terms(steps: int, d: int, k_s: float, k_1: float, k_2: float) -> Terms:
    """Bounds of the two expected counts; the printed ones take the probability of one term for that of the sum."""
    return Terms(
        input_printed=k_2 * k_1,
        weight_printed=steps * k_2 * k_s / d,
        input_union=min(float(d * d), d * k_2 * k_1),
        weight_union=min(float(d * steps), steps * k_2 * k_s),
    )


def corrected_bound_expect(steps: int, d: int, k_s: float, k_1: float, k_2: float) -> tuple[float, float]:
    """Least and largest E|W2 S|_0 / E|W2 W1|_0 for random supports, x = kS/k1 and c = k2 k1 / d:

    (T/d) min(1, x) and (T/d) min(max(1, x), x (1 + c)). Proof: the chance of an entry is increasing and concave in k
    and 0 at 0; the union bound above, 1 - (1-a)^d >= d a / (1 + d a) below. Independent entries: k = d p. nan where k1
    or d is 0.
    """
    if k_1 == 0 or d == 0:
        return math.nan, math.nan
    x, c = k_s / k_1, k_2 * k_1 / d
    return steps / d * min(1.0, x), steps / d * min(max(1.0, x), x * (1 + c))


def structural_bound(w2: Float[Tensor, "m n"], w1: Float[Tensor, "n d"], s: Float[Tensor, "n t"]) -> float:
    """Bound of |W2 S|_0 by supports: sum_k c_k r_k(S) / max_k c_k r_k(W1) times |W2 W1|_0; nan where the latter is 0.

    c_k counts column k of W2, r_k row k of the other matrix: a union of products is at most their sum, at least the
    largest of them.
    """
    c = (w2 != 0).sum(0)
    most = int((c * (w1 != 0).sum(1)).max())
    return math.nan if most == 0 else int((c * (s != 0).sum(1)).sum()) / most * nnz_input_jacobian(w2, w1)


def gradient_bound(n: int, lines: int, r_min: int, nnz_in: float) -> float:
    """Bound of |dp/dW1|_0 by |dp/ds[t]|_0, for the true gradients: (n a / r_min) |dp/ds[t]|_0; nan where r_min = 0.

    n hidden units, a = `lines` inputs that ever spike, r_min the smallest row count of W1. A row of W2 with c entries
    gives at least r_min >= r_min c / n entries of dp/ds; the sum over rows is the bound.
    """
    return math.nan if r_min == 0 else n * lines / r_min * nnz_in


def density_bound(p_1: float, p_s: float, steps: int, n: int) -> float:
    """Largest share of weight-gradient density over input-gradient density for independent supports:
    (1 - (1-pS)^T) / (1 - (1-p1)^n); nan where p1 or n is 0."""
    return math.nan if p_1 == 0 or n == 0 else (1 - (1 - p_s) ** steps) / (1 - (1 - p_1) ** n)


def conv_weight_grad_density(p_delta: float, p_s: float, steps: int, height: int, width: int, images: int) -> float:
    """Chance that an entry of a convolution's weight gradient is not zero: it sums over steps, map and images."""
    sums = steps * height * width * images
    return float(sums > 0) if p_delta * p_s == 1 else -math.expm1(sums * math.log1p(-p_delta * p_s))


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One setting of the scan: instances that violate the printed inequality, and how the expectations stand.

    `true_ratio`, `printed` and `corrected` are E|W2 S|_0, the printed bound and ours, over E|W2 W1|_0. `eq16`, `eq17`
    count instances beyond the printed terms.
    """

    d: int
    steps: int
    p_2: float
    p_1: float
    p_s: float
    violated: Rate
    eq16: Rate
    eq17: Rate
    true_ratio: float
    printed: float
    corrected: float

    @property
    def population_false(self) -> bool:
        """Does the printed inequality fail between the expectations themselves?"""
        return self.true_ratio > self.printed * (1 + 1e-12)

    @property
    def corrected_false(self) -> bool:
        """Does ours?"""
        return self.true_ratio > self.corrected * (1 + 1e-12)


def violation_scan(
    ds: Sequence[int] = (8, 32, 128),
    steps: Sequence[int] = (4, 10),
    p_1s: Sequence[float] = (0.02, 0.1, 0.5, 1.0),
    p_ss: Sequence[float] = (0.02, 0.1, 0.3, 0.6),
    p_2s: Sequence[float] = (0.02, 0.1, 0.5, 1.0),
    *,
    generator: torch.Generator,
    n: int = 50,
) -> tuple[Scan, ...]:
    """Draw `n` independent supports a setting and hold the paper's own counts against its inequality, with the k's met.

    Settings of the same d share their uniform draws, which costs a product a pair of densities instead of one a triple.
    """
    out = []
    for d in ds:
        left, right, spikes = (torch.rand(n, d, cols, generator=generator) for cols in (d, d, max(steps)))
        hidden = {p: (left < p).float() for p in p_2s}
        for p_1 in p_1s:
            w1 = (right < p_1).float()
            k_1 = w1.sum(1).amax(1)
            for p_2, w2 in hidden.items():
                k_2, nnz_in = w2.sum(2).amax(1), (w2 @ w1 > 0).sum((1, 2))
                expected_in = expected_nnz_bernoulli(d, d, d, p_2, p_1)
                for p_s in p_ss:
                    s = (spikes < p_s).float()
                    hit = w2 @ s > 0
                    for t in steps:
                        k_s, nnz_w = s[:, :, :t].sum(1).amax(1), hit[:, :, :t].sum((1, 2))
                        bad = nnz_w * d * k_1 > t * k_s * nnz_in  # whole numbers: no rounding; k1 = 0 bounds nothing
                        out.append(
                            Scan(
                                d=d,
                                steps=t,
                                p_2=p_2,
                                p_1=p_1,
                                p_s=p_s,
                                violated=Rate(int(bad.sum()), n),
                                eq16=Rate(int((nnz_in > k_2 * k_1).sum()), n),
                                eq17=Rate(int((nnz_w * d > t * k_2 * k_s).sum()), n),
                                true_ratio=expected_nnz_bernoulli(d, d, t, p_2, p_s) / expected_in,
                                printed=t / d * p_s / p_1,
                                corrected=corrected_bound_expect(t, d, d * p_s, d * p_1, d * p_2)[1],
                            )
                        )
    return tuple(out)
