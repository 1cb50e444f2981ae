"""Audit a robustness claim: battery, ledger, verdict."""

from sparsetrail.auditing.battery import Budget, Stage, battery, reaches_code
from sparsetrail.auditing.kept import contradiction, misjudged
from sparsetrail.auditing.refusals import refuse, refuse_flips
from sparsetrail.auditing.run import audit
from sparsetrail.auditing.verdict import judge
from sparsetrail.auditing.work import Forgetful, Store, fingerprint, join, verify, wavers

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
    "reaches_code",
    "refuse",
    "refuse_flips",
    "verify",
    "wavers",
]
