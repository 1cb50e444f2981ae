"""Audit a robustness claim: battery, ledger, verdict."""

from sparsetrail.auditing.battery import Budget, Stage, battery
from sparsetrail.auditing.run import Forgetful, Store, audit, join, verify
from sparsetrail.auditing.verdict import judge

__all__ = ["Budget", "Forgetful", "Stage", "Store", "audit", "battery", "join", "judge", "verify"]
