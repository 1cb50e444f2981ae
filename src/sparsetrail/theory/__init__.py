"""The paper's theorems as things to compute: what their hypotheses ask, what holds instead, what a network says.

`vulnerability` Theorem 1 and Corollary 1, with `fidelity` (does the gradient describe the score), `switch` (how far a
network of spikes is constant) and `temperature` (sparsity by rounding alone); `chain` Theorem 2; `support` Theorem 3;
`toy` the two-layer network of the paper; `structural` single operations; `verdict` what may be said.
"""

from sparsetrail.theory.chain import (
    Chain,
    PerSample,
    Tracking,
    backward_from,
    dense_chain,
    layer_gradients,
    rank_correlation,
    sandwich,
    tracking,
)
from sparsetrail.theory.fidelity import directional_gain, gradient_fidelity, linear_error, reliability
from sparsetrail.theory.smooth import smooth_twin
from sparsetrail.theory.structural import bn_backward, phase_flips
from sparsetrail.theory.support import (
    Scan,
    Terms,
    conv_weight_grad_density,
    corrected_bound_expect,
    density_bound,
    density_degrees,
    expected_nnz_bernoulli,
    expected_nnz_exact,
    gradient_bound,
    nnz_input_jacobian,
    nnz_weight_jacobian,
    paper_bound,
    paper_terms,
    structural_bound,
    structural_product,
    violation_scan,
)
from sparsetrail.theory.switch import (
    FirstSwitch,
    Switched,
    above_first_switch,
    corner_probability,
    first_switch_radius,
    first_weights,
    switch_levels,
)
from sparsetrail.theory.temperature import Temperature, temperature_probe
from sparsetrail.theory.toy import TwoLayerSNN, literal_vs_centred
from sparsetrail.theory.verdict import Judgement, Verdict, against
from sparsetrail.theory.vulnerability import (
    AdvVuln,
    LinearVuln,
    RandomVuln,
    Theorem1,
    adversarial_vulnerability,
    lead,
    linear_vulnerability,
    log_odds,
    participation_ratio,
    probability,
    random_vulnerability,
    ratio_interval,
    score_gradient,
    second_order_interval,
    shortfall,
    support_size,
    theorem1_check,
)

__all__ = [
    "AdvVuln", "Chain", "FirstSwitch", "Judgement", "LinearVuln", "PerSample", "RandomVuln", "Scan", "Switched",
    "Temperature", "Terms", "Theorem1", "Tracking", "TwoLayerSNN", "Verdict", "above_first_switch",
    "adversarial_vulnerability", "against", "backward_from", "bn_backward", "conv_weight_grad_density",
    "corner_probability", "corrected_bound_expect", "dense_chain", "density_bound", "density_degrees",
    "directional_gain", "expected_nnz_bernoulli", "expected_nnz_exact", "first_switch_radius", "first_weights",
    "gradient_bound", "gradient_fidelity", "layer_gradients", "lead", "linear_error", "linear_vulnerability",
    "literal_vs_centred", "log_odds", "nnz_input_jacobian", "nnz_weight_jacobian", "paper_bound", "paper_terms",
    "participation_ratio", "phase_flips", "probability", "random_vulnerability", "rank_correlation", "ratio_interval",
    "reliability", "sandwich", "score_gradient", "second_order_interval", "shortfall", "smooth_twin",
    "structural_bound", "structural_product", "support_size", "switch_levels", "temperature_probe", "theorem1_check",
    "tracking", "violation_scan",
]  # fmt: skip
