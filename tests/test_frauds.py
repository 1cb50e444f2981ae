"""Every fraud of the zoo rings its own check; honest victims ring no masking check and fail none."""

from dataclasses import replace

import pytest
import torch
from frauds import FRAUDS, case, honest

from sparsetrail.checks import CHECKS
from sparsetrail.core import Finding

LOUD = ["not applicable", "pass", "warn", "fail"]
HONEST = [("ann", "pixel"), ("norm", "pixel"), ("direct", "pixel"), ("phase", "encoded"), ("hardened", "pixel")]
TABLE: list[tuple[str, str, str]] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints what rang (pytest -s)."""
    yield
    print(f"\n\n{'victim':<34}{'its own':<14}others")
    for row in TABLE:
        print("{:<34}{:<14}{}".format(*row))


def look(probe) -> dict[str, Finding]:
    return {id: check(probe) for id, check in CHECKS.items()}


def rang(found: dict[str, Finding]) -> list[str]:
    return [f"{id} {f.level}" for id, f in found.items() if f.level in ("warn", "fail")]


@pytest.mark.parametrize("name", list(FRAUDS))
def test_a_fraud_rings_its_own_check(name):
    fraud = FRAUDS[name]
    found = look(case(fraud.build(), eps=fraud.eps, n=40))
    own = found[fraud.rings]
    TABLE.append((name, f"{own.id} {own.level}", ", ".join(r for r in rang(found) if r.split()[0] != own.id)))
    assert LOUD.index(own.level) >= LOUD.index(fraud.level), own
    assert own.evidence and own.advice and own.limit


@pytest.mark.parametrize("kind, space", HONEST)
def test_an_honest_victim_rings_no_masking_check_and_fails_none(kind, space):
    found = look(case(honest(kind), space=space))
    TABLE.append((f"honest: {kind}, {space}", "", ", ".join(rang(found))))
    assert not [f for f in found.values() if f.level == "fail" or (f.level == "warn" and f.masking)]
    assert found["G5"].value > 0.15


def test_a_phase_code_in_pixels_passes_all_but_what_its_identity_rule_deserves():
    """The rule knows nothing of bits that flip: noise and restarts may find more, the gradient itself is sound."""
    found = look(case(honest("phase")))
    TABLE.append(("phase code in pixels, identity", "", ", ".join(rang(found))))
    assert {id for id, f in found.items() if f.level == "fail"} <= {"C7", "C13"}


def test_a_declared_random_victim_is_not_accused_of_its_noise():
    victim = replace(FRAUDS["Poisson not declared"].build(), random=True)
    found = look(case(victim, n=24, eot=2))
    TABLE.append(("honest: Poisson declared", "", ", ".join(rang(found))))
    assert not [f for f in found.values() if f.level == "fail"]
    assert found["S3"].level == found["S5"].level == "pass" and found["C14"].level != "not applicable"


@pytest.mark.parametrize("name, id", [("scores centred on the batch", "S5"), ("membrane not reset", "S3")])
def test_declared_noise_hides_no_fault_of_state_or_batch(name, id):
    for noise in (0.0, 0.01):
        base, g = FRAUDS[name].build(), torch.Generator().manual_seed(0)

        def logits(u, base=base, g=g, noise=noise):
            z = base.logits(u)
            return z + noise * torch.randn(z.shape, generator=g)

        found = CHECKS[id](case(replace(base, logits=logits, random=True), eps=FRAUDS[name].eps, n=24))
        assert found.level == "fail", found
    silent = CHECKS["S4"](case(replace(honest("ann"), random=True), n=8))
    assert silent.level == "warn"  # declared, and draws nothing


def test_every_check_looks_at_a_radius_of_one_grey_level():
    probe = case(honest("direct"), eps=1 / 255, n=24)
    assert probe.grid
    found = look(probe)
    failed = [f"{id}: {f.evidence}" for id, f in found.items() if f.level == "fail"]
    assert not failed and found["C2"].level == "pass" and "0.25/255" not in found["C2"].evidence
