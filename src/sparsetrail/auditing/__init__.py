"""Audit a robustness claim: battery, ledger, verdict."""

from sparsetrail.auditing.battery import Budget, Stage, battery
from sparsetrail.auditing.run import Forgetful, Store, audit, fingerprint, join, refuse, verify
from sparsetrail.auditing.verdict import judge

__all__ = [
    "Budget",
    "Forgetful",
    "Stage",
    "Store",
    "audit",
    "battery",
    "fingerprint",
    "join",
    "judge",
    "refuse",
    "verify",
]
