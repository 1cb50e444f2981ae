"""The card of an audit: one JSON object whose fields extend RobustBench's; what is not known is null.

RobustBench's own fields keep its names and its way of writing (Croce et al. 2021, arXiv:2010.09670: accuracies in per
cent as text, `reported` the claim, `external` the lowest accuracy known, `unreliable` where the evaluation is not to be
trusted). `autoattack_acc` is null, since the battery is not AutoAttack. All other shares are numbers 0..1.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from sparsetrail.core import Audit, Rate, Report, Run
from sparsetrail.report.audits import battery, others, steps, where
from sparsetrail.report.io import pack
from sparsetrail.report.labels import bare, route_of, setting, size

CARD = "card.json"
VERSIONS = ("sparsetrail", "torch", "python", "numpy", "cuda", "spikingjelly", "snntorch", "norse")
PAPER = {"link": ("link", "paper link", "url"), "name": ("paper", "paper title"), "authors": ("authors",),
         "venue": ("venue",)}  # fmt: skip


def cards(report: Report) -> list[dict[str, Any]]:
    """One card an audit, in order, as plain data."""
    return [_card(audit, report) for audit in report.audits]


def to_json(report: Report) -> bytes:
    """All cards of a report as one JSON list; NaN and infinity become null."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(pack(cards(report))), indent=1) + b"\n"


def _card(audit: Audit, report: Report) -> dict[str, Any]:
    here, runs, told = where(audit), battery(audit), _Told(audit.card, {**report.provenance, **audit.provenance})
    paper = {name: told(*keys) for name, keys in PAPER.items()}
    return {
        **{name: entry for name, entry in paper.items() if entry is not None},
        "additional_data": told("additional data"),
        "number_forward_passes": told("number forward passes"),
        "dataset": audit.data or None,
        "architecture": told("architecture", "arch", "model"),
        "eps": size(here.threat),
        "clean_acc": _percent(audit.clean_accuracy.value),
        "reported": None if audit.claim is None else _percent(audit.claim),
        "autoattack_acc": None,
        "external": _percent(audit.accuracy.value),
        "footnote": audit.reason,
        "unreliable": audit.verdict in ("masked", "inconclusive"),
        "victim": audit.victim,
        "verdict": audit.verdict,
        "complete": audit.complete,
        "budget": audit.budget,
        "threat": {
            "space": here.threat.space,
            "norm": here.threat.norm,
            "eps": here.threat.eps,
            "eps_levels": _levels(audit),
            "box": list(here.threat.box),
            "value_grid": told("value grid", "grid")
            or ("the two ends of the box" if here.threat.norm == "l0" else None),
            "sentence": here.sentence,
        },
        "bn_mode": here.mode if runs else None,
        "reset_contract": told("reset contract"),
        "stochastic": {
            "draws_noise": any(run.votes > 1 for run in runs) if runs else None,
            "eot": max((run.eot for run in runs), default=None),
            "votes": max((run.votes for run in runs), default=None),
        },
        "network": _network(told),
        "encoder": {"name": told("encoder name", "encoder"), "settings": told("encoder settings", "encoder knobs")},
        "images": {
            "n": audit.n,
            "index_sha256": hashlib.sha256(str(audit.indices).encode()).hexdigest(),
            "data": audit.data or None,
            "tuned_on": told("tuned on"),
        },
        "accuracy": {
            "clean": _rate(audit.clean_accuracy),
            "claimed": audit.claim,
            "claim_source": audit.claim_source or None,
            "default_attack": {"attack": audit.default_attack} | _rate(audit.default_accuracy),
            "worst_case": _rate(audit.accuracy),
        },
        "attacks": _attacks(audit),
        "other_runs": [_outside(run) for run in others(audit)],
        "gradient_estimators": list(dict.fromkeys(route_of(run) for run in runs if run.backwards)),
        "zero_gradient": _zeros(audit),
        "flags": [
            {
                "id": f.id,
                "name": f.name,
                "verdict": f.level,
                "value": f.value,
                "limit": f.limit,
                "masking": f.masking,
                "evidence": f.evidence,
                "advice": f.advice,
            }
            for f in audit.findings
        ],
        "trails": [
            {
                "data": trail.data,
                "mode": trail.mode,
                "n": trail.n,
                "mean_zero": sum(row.zero for row in trail.rows) / len(trail.rows),
                "most_zero": max(trail.rows, key=lambda row: row.zero).op,
            }
            for trail in report.trails
            if trail.victim == audit.victim and trail.rows
        ]
        or None,
        "weights_sha256": told("weights sha256", "checkpoint sha256"),
        "adversarial_sha256": told("adversarial tensor sha256", "adversarial sha256"),
        "seconds": audit.seconds,
        "seed": told("seed"),
        "device": told("device"),
        "versions": {name: told(name) for name in VERSIONS if told(name) is not None} or None,
    }


class _Told:
    """What card and provenance say, by key: nested entries by their last keys too, spelling of keys aside."""

    def __init__(self, *sources: Mapping[str, Any]) -> None:
        self.known: dict[str, Any] = {}
        for source in sources:
            self._take(source, ())

    def _take(self, entries: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for key, entry in entries.items():
            here = (*path, str(key))
            for i in range(len(here)):
                self.known.setdefault(bare(" ".join(here[i:])), entry)
        for key, entry in entries.items():  # after its own level, so that an outer entry comes before an inner one
            if isinstance(entry, Mapping):
                self._take(entry, (*path, str(key)))

    def __call__(self, *keys: str) -> Any:
        """The first of `keys` that is known to be something, None if none is."""
        return next((self.known[key] for key in map(bare, keys) if self.known.get(key) is not None), None)


def _network(told: _Told) -> dict[str, Any]:
    """Neuron, reset, threshold, leak, steps, surrogate, pool: from entries, or from the sentence of a model card."""
    neuron = told("neuron")
    if isinstance(neuron, Mapping):
        kind, reset, surrogate = neuron.get("kind"), neuron.get("reset"), neuron.get("surrogate")
        if isinstance(surrogate, Mapping) and "name" in surrogate:
            width = surrogate.get("width")
            surrogate = f"{surrogate['name']}({width:g})" if isinstance(width, (int, float)) else surrogate["name"]
        if "reset" in neuron and not isinstance(reset, str):
            reset = "soft" if reset is None else f"hard to {reset:g}"
        theta, tau = neuron.get("threshold", neuron.get("theta")), neuron.get("tau")
    else:
        text = neuron if isinstance(neuron, str) else ""
        kind = text.partition(",")[0] or None
        theta, tau = _after(r"threshold ([\d.e+-]+)", text), _after(r"tau ([\d.e+-]+)", text)
        reset = found[1] if (found := re.search(r"(soft|hard to [\d.e+-]+) reset", text)) else None
        surrogate = found[1] if (found := re.search(r", (\w+\([\d.e+-]+\))$", text)) else None
    kind = str(kind).upper() if kind is not None else None
    leak = told("leak")
    if leak is None:
        leak = "none" if kind == "IF" else None if tau is None else f"tau {tau:g}"
    return {
        "neuron": kind,
        "reset": reset if reset is not None else told("reset"),
        "theta": theta if theta is not None else told("theta", "threshold"),
        "leak": leak,
        "T": told("T", "steps", "time steps"),
        "surrogate": surrogate if surrogate is not None else told("surrogate"),
        "pooling": told("pooling", "pool"),
        "defence": told("defence", "defense"),
        "parameters": told("parameters"),
    }


def _after(pattern: str, text: str) -> float | None:
    found = re.search(pattern, text)
    return float(found[1]) if found else None


def _levels(audit: Audit) -> float | int | None:
    """The radius in grey levels where the threat has any, in entries for L0."""
    threat = where(audit).threat
    if threat.norm == "l0":
        return int(threat.eps)
    if threat.space == "encoded" or threat.box != (0.0, 1.0):
        return None
    levels = 255 * threat.eps
    return round(levels) if abs(levels - round(levels)) < 1e-6 else levels


def _rate(rate: Rate) -> dict[str, Any]:
    low, high = rate.interval()
    return {"value": rate.value, "k": rate.k, "n": rate.n, "low": low, "high": high, "level": 0.95}


def _attacks(audit: Audit) -> list[dict[str, Any]]:
    return [
        {
            "attack": step.name,
            "label": step.run.attack,
            "route": route_of(step.run),
            "steps": step.run.knobs.get("steps"),
            "restarts": step.run.knobs.get("restarts"),
            "queries": step.run.knobs.get("queries"),
            "knobs": step.run.knobs,
            "seed": step.run.seed,
            "eot": step.run.eot,
            "votes": step.run.votes,
            "met": step.met,
            "broken": step.broken,
            "accuracy_left": _rate(step.left),
            "forwards": step.run.forwards,
            "backwards": step.run.backwards,
            "zero_gradient": step.run.zero_gradient,
            "dead_images": step.run.dead_examples,
            "nonfinite_images": step.run.nonfinite,
            "silent_images": step.run.silent,
            "ties": step.run.ties,
            "seconds": step.run.seconds,
        }
        for step in steps(audit)
    ]


def _outside(run: Run) -> dict[str, Any]:
    found = {"label": run.attack, "conditions": setting(run).short, "route": route_of(run)}
    return found | {"accuracy": _rate(run.accuracy)}


def _zeros(audit: Audit) -> dict[str, Any] | None:
    """Of the first attack that asked for gradients: share of images whose gradient was once wholly zero, of entries."""
    for run in battery(audit):
        if run.backwards and any(run.clean):
            met = sum(run.clean)
            return {
                "attack": run.attack,
                "images": _rate(Rate(min(run.dead_examples, met), met)),
                "entries": run.zero_gradient,
            }
    return None


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
