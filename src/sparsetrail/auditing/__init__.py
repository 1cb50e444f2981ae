"""Audit a robustness claim: battery, ledger, verdict."""

from sparsetrail.auditing.battery import Budget, Stage, battery
from sparsetrail.auditing.kept import contradiction, misjudged
from sparsetrail.auditing.run import Forgetful, Store, audit, fingerprint, join, refuse, verify, wavers
from sparsetrail.auditing.verdict import judge

__all__ = [
    "Budget",
    "Forgetful",
    "Stage",
    "Store",
    "audit",
    "battery",
    "contradiction",
    "fingerprint",
    "join",
    "judge",
    "misjudged",
    "refuse",
    "verify",
    "wavers",
]
