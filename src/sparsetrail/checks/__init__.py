"""Alarms: each check looks at a victim on a small sample of images and says what it found.

S: is the evaluation sound? G: does the gradient lead anywhere? C: do attacks behave as on an unmasked victim? What each
is raised for, and how a verdict is drawn from them, is in docs/findings.md.
"""

from sparsetrail.checks.behaviour import (
    batch_statistics,
    converged,
    doubling,
    iterative,
    monotone,
    never_weaker,
    noise_samples,
    other_steps,
    random_noise,
    restarts,
    silent,
    unbounded,
)
from sparsetrail.checks.case import Case, Check, Outcome, Skip, check
from sparsetrail.checks.gradient import (
    agrees,
    alignment,
    finite_gradients,
    linearity,
    reaches,
    same_gradient,
    saturation,
    sparse_gradients,
    stability,
    zero_gradients,
)
from sparsetrail.checks.sanity import (
    batch_invariance,
    determinism,
    encoder_reset,
    finite_scores,
    judged_alone,
    kind_of_scores,
    optimisation,
    own_adversarials,
    radius_zero,
    self_test,
    state_reset,
    ties,
    unchanged,
    validity,
)

CHECKS: dict[str, Check] = {
    "S0": finite_scores,
    "S1": own_adversarials,
    "S2": unchanged,
    "S3": state_reset,
    "S3e": encoder_reset,
    "S4": determinism,
    "S5": batch_invariance,
    "S6": judged_alone,
    "S7": radius_zero,
    "S8": ties,
    "S9": kind_of_scores,
    "S10": optimisation,
    "S11": self_test,
    "G1": zero_gradients,
    "G2": sparse_gradients,
    "G3": reaches,
    "G4": saturation,
    "G5": agrees,
    "G6": linearity,
    "G7": alignment,
    "G8": stability,
    "G-nan": finite_gradients,
    "G-rand": same_gradient,
    "C1": iterative,
    "C2": monotone,
    "C3": unbounded,
    "C4": converged,
    "C5": doubling,
    "C6": never_weaker,
    "C7": restarts,
    "C8": silent,
    "C13": random_noise,
    "C14": noise_samples,
    "C16": batch_statistics,
    "C19": other_steps,
}

__all__ = ["CHECKS", "Case", "Check", "Outcome", "Skip", "check", "validity"]
