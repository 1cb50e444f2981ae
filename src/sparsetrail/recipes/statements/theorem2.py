"""Theorem 2: the sparsity that input and weight gradients share, and which layers follow the input's."""

from collections.abc import Sequence
from typing import Any

import torch

from sparsetrail.recipes.demo import Demo
from sparsetrail.recipes.statements.words import FEW, interval, stamped
from sparsetrail.recipes.theory import TheoryAudit
from sparsetrail.report.tables import Grid
from sparsetrail.report.theorems import Plot, Result, Statement
from sparsetrail.snn.surrogate import atan_derivative
from sparsetrail.theory import (
    Judgement,
    Tracking,
    TwoLayerSNN,
    Verdict,
    backward_from,
    bn_backward,
    conv_weight_grad_density,
    phase_flips,
)
from sparsetrail.trails import maxpool_density_cap, strided_conv_density


def theorem2(shown: Demo | None, audits: Sequence[TheoryAudit], facts: dict[str, Any]) -> Statement:
    """Both parts: counterexamples, random chains, and the layers of every victim."""
    results, plots = [], []
    if shown is not None:
        of_s, of_w = backward_from(torch.tensor([1.0, 0.0]), torch.ones(2, 2), torch.ones(2))
        net = TwoLayerSNN(w1=torch.zeros(2, 2), w2=torch.ones(2, 2))
        a, b, _ = net.jacobians(torch.ones(1, 2))
        results.append(
            Result(
                of="part 1, two counterexamples",
                verdict="violated (certified)",
                why=f"Half of the shared gradient is zero: the input gradient keeps {_density(of_s)} of its entries, "
                f"the weight gradient {_density(of_w)}. With W1 = 0 the input gradient has {_density(a)} and the "
                f"weight gradient {_density(b)}.",
                tables=(_zeros_grid(),),
            )
        )
        c = shown.chains
        ends = c.rho[0], c.rho[-1]
        rows = tuple(
            (str(k), f"{r:.2f}", f"{s:.1f}") for k, (r, s) in enumerate(zip(c.rho, c.log10_cond, strict=True), 1)
        )
        results.append(
            Result(
                of="part 2, random dense chains",
                verdict="holds" if list(c.rho) == sorted(c.rho, reverse=True) else "violated (not certified)",
                why=f"Rank correlation of the norms goes from {ends[0]:.2f} in the first layer to {ends[1]:.2f} in "
                f"the last, layer by layer in the table; the proved bounds failed {c.failed.k} times of {c.failed.n}.",
                tables=(
                    Grid(
                        f"{c.nets} nets, {c.inputs} inputs each, seed {shown.seed}: input gradient against each "
                        "layer's",
                        ("layer", "Spearman's rho of norms", "median log10 of the slack"),
                        rows,
                    ),
                ),
            )
        )
    for a in audits:
        judged = judge2(a)
        rows = tuple(
            (t.layer, f"{100 * a.layer_density[t.layer]:.1f} %", *(interval(v) for v in (z, t, s)))
            for t, z, s in zip(a.tracking, a.tracking_zeros, a.tracking_scaled, strict=True)
        )
        grid = Grid(
            f"{a.victim}, {a.threat.space} space, n={a.n}, seed {a.seed}, eval mode, bootstrap intervals of 95 % for "
            "all layers together; the input "
            f"gradient has {100 * a.input_density:.2f} % non-zero entries",
            ("layer", "non-zero weight gradient", "rho of densities", "rho of norms", "confidence divided out"),
            rows,
        )
        if rows:
            zeros = judge2_zeros(a)
            results.append(Result(of=f"{a.victim}, zeros", verdict=zeros.verdict, why=zeros.why))
        case = f"{a.victim}, norms" if rows else a.victim
        results.append(Result(of=case, verdict=judged.verdict, why=judged.why, tables=(grid,) if rows else ()))
        if rows:
            named = (("norms", a.tracking), ("norms over that at the logits", a.tracking_scaled))
            plots.append(
                Plot(
                    kind="tracking",
                    title=f"Which weight gradients follow the input's: {a.victim}",
                    stamp=stamped(facts, a.n, a.seed, f"{a.threat.space} space, gradients at the clean images"),
                    caption="Rank correlation over images with bootstrap intervals, 95 % for all layers together, "
                    "layers in forward order. How unsure the network is multiplies every gradient; divided out, what "
                    "the layers share remains.",
                    values=tuple(
                        {
                            "layer": t.layer,
                            "what": what,
                            "rho": None if t.rho == "constant" else t.rho,
                            "low": t.low,
                            "high": t.high,
                        }
                        for what, rows_ in named
                        for t in rows_
                    ),
                )
            )
    return Statement(
        name="Theorem 2",
        source="the paper, sec. 5, eq. 7-9",
        says="(1) Any sparsity in the part of the backward pass that input and weights share reaches both gradients. "
        "(2) The nearer a layer is to the input, the more the sparsity of its gradient follows that of the input.",
        formula="dl/ds = W_1^T delta,   dl/dW_1 = delta s^T",
        instead="Only a shared gradient that is wholly zero reaches both: the last factor W1^T fills partial zeros in "
        "the input gradient, while they stay as rows of the weight gradient. What follows are norms: in one step, "
        "|dl/dW| lies between |h| |dl/ds| / sigma_max(J) and |h| |dl/ds| / sigma_min(J), J the Jacobian up to the "
        "layer; its condition number is the slack. A deeper layer may have less of it: the order is not proved.",
        results=tuple(results),
        plots=tuple(plots),
    )


def _zeros_grid() -> Grid:
    """Where exact zeros come from, by formulas alone."""
    g, x = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 1, 2, 5])
    away = float(atan_derivative(torch.tensor(1e6, dtype=torch.float64), 2.0))
    flips = phase_flips(torch.arange(255), 10).double()
    rows = (
        ("3x3 max pool, stride 2, on 16 x 16: cells that can have a gradient",
         f"at most {100 * maxpool_density_cap(16, 3, 2, 1):.0f} %"),
        ("1x1 convolution, stride 2: cells that are seen at all", f"{100 * strided_conv_density(16, 1, 2, 0):.0f} %"),
        ("arctan derivative a million thresholds away", f"{away:.1e}, never 0"),
        ("BatchNorm in train mode, upstream gradient 25 % dense", _density(bn_backward(g, x, mode="train"))),
        ("BatchNorm in eval mode, the same", _density(bn_backward(g, x, mode="eval"))),
        ("3x3 convolution on 8 x 8, T=10, 1 % of errors and 5 % of inputs not zero: weight gradient",
         f"{100 * conv_weight_grad_density(0.01, 0.05, 10, 8, 8, 1):.0f} %"),
        ("the same, 10 % and 10 %: weight gradient", f"{100 * conv_weight_grad_density(0.1, 0.1, 10, 8, 8, 1):.1f} %"),
        ("spikes of the phase code, T=10, that one grey level more flips",
         f"{float(flips.mean()):.2f} on average, {int(flips.max())} at most"),
    )  # fmt: skip
    return Grid("Where zeros come from, and where they go: formulas of single operations", ("what", "share"), rows)


def judge2_zeros(a: TheoryAudit) -> Judgement:
    """Part 2 on a victim as it is printed, about zeros: layers in order by the share of non-zero entries."""
    what = f"{100 * a.input_density:.2f} % of the entries of the input gradient are not zero"
    vary = [t for t in a.tracking_zeros if t.rho != "constant"]
    if a.n >= 3 and len(vary) < 2:
        return Judgement(
            verdict="vacuous",
            why=f"{what}; its density, or that of all layers but {len(vary)}, is the same for all images: nothing to "
            "follow.",
        )
    return _nearer(a, a.tracking_zeros, f"{what}. Rank correlation of densities")


def judge2(a: TheoryAudit) -> Judgement:
    """What remains of part 2 on a victim, norms: layers in order, confidence divided out."""
    if not a.tracking:
        why = f"The statement is about layers, and this victim shows none. {a.no_tracking}."
        return Judgement(verdict="hypothesis not met", why=why)
    return _nearer(a, a.tracking_scaled, "Rank correlation with the input's norm, confidence divided out")


def _nearer(a: TheoryAudit, layers: Sequence[Tracking], what: str) -> Judgement:
    """Does a layer follow the input the more, the nearer it is? All pairs of layers, in forward order."""
    if a.n < 3:
        return Judgement(verdict="undefined", why=FEW.format(n=a.n))
    vary = [(t, t.rho) for t in layers if not isinstance(t.rho, str)]
    if len(vary) < 2:
        why = f"The gradient varies over the images in {len(vary)} of {len(layers)} layers: nothing to compare."
        return Judgement(verdict="undefined", why=why)
    pairs = [(near, far) for i, near in enumerate(vary) for far in vary[i + 1 :]]
    wrong = [(near, far) for near, far in pairs if near[1] < far[1]]
    sure = [(near, far) for near, far in wrong if near[0].high < far[0].low]
    first, last = vary[0][0], vary[-1][0]
    why = f"{what}: {interval(first)} in {first.layer}, {interval(last)} in {last.layer}. "
    why += f"Of {len(pairs)} pairs of layers the farther one follows more in {len(wrong)}"
    if wrong:
        near, far = max(sure or wrong, key=lambda pair: pair[1][1] - pair[0][1])
        why += f", beyond the intervals in {len(sure)}: {interval(near[0])} in {near[0].layer}, {interval(far[0])} in "
        why += far[0].layer
    verdict: Verdict = "violated (certified)" if sure else "violated (not certified)" if wrong else "holds"
    return Judgement(verdict=verdict, why=f"{why}.")


def _density(g: Any) -> str:
    return f"{100 * float((g != 0).double().mean()):.0f} %"
