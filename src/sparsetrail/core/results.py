"""What was found: runs, findings, an audit, a trail, a claim, and the report that shows them. Plain data."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from sparsetrail.core.threat import Threat
from sparsetrail.core.victim import Mode

Level = Literal["pass", "warn", "fail", "not applicable"]
Verdict = Literal["supported", "overstated", "masked", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one attack left standing, judged by a fresh fp32 forward of its best points.

    `clean` and `robust` are flags per example; an example is robust if it was right before and no point found makes a
    wrong class strictly better than the true one (a tie is not a success; `ties` counts them, `tied` says which of the
    images, by position). `zero_gradient` is the mean share of exactly zero entries in the gradients asked for, `trace`
    the mean margin at every call, over the examples asked about (restarts at once share the calls of one; empty in an
    audit); `dead_examples` counts examples whose gradient was once wholly zero, `nonfinite` those with a NaN or
    infinite gradient, `silent` those that were fooled on the way but not by the last point the attack asked about, None
    where images leave as soon as they are fooled. `indices` are the images attacked, where not all of the data were.
    `eot` and `votes` are the evaluations behind every gradient and behind the judgement, of a victim that draws noise.
    `adversarial` is not written to JSON.
    """

    attack: str
    knobs: dict[str, Any]
    threat: Threat
    victim: str
    route: str
    mode: Mode
    data: str
    seed: int
    clean: tuple[bool, ...]
    robust: tuple[bool, ...]
    ties: int
    forwards: int
    backwards: int
    zero_gradient: float | None
    dead_examples: int
    nonfinite: int
    trace: tuple[float, ...]
    seconds: float
    note: str = ""
    indices: tuple[int, ...] | None = None
    silent: int | None = None
    eot: int = 1
    votes: int = 1
    tied: tuple[int, ...] = ()
    adversarial: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _as_long(self, "robust", "indices")
        _counts(
            self,
            "ties",
            "dead_examples",
            "nonfinite",
            "forwards",
            "backwards",
            *(["silent"] if self.silent is not None else []),
        )
        _shares(self, "zero_gradient")

    @property
    def n(self) -> int:
        """Number of images attacked."""
        return len(self.clean)

    @property
    def clean_accuracy(self) -> "Rate":
        """Share of all images classified correctly before the attack."""
        return Rate(sum(self.clean), self.n)

    @property
    def accuracy(self) -> "Rate":
        """Share of all images classified correctly before and after the attack."""
        return Rate(sum(self.robust), self.n)


@dataclass(frozen=True)
class Rate:
    """`k` of `n`, with its Wilson interval (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""

    k: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.n or self.n == 0:
            raise ValueError(f"expected 0 <= k <= n and n > 0, got k={self.k}, n={self.n}")

    @property
    def value(self) -> float:
        """The share itself, 0..1."""
        return self.k / self.n

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson score interval, 0..1."""
        z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
        p, n = self.value, self.n
        if self.k in (0, n):  # the formula's own end, free of rounding
            far = n / (n + z * z)
            return (0.0, 1 - far) if self.k == 0 else (far, 1.0)
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        lo, hi = self.interval()
        return f"{100 * self.value:.1f} % [{100 * lo:.1f}, {100 * hi:.1f}], n={self.n}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found: `value` against `limit`, the evidence in words, and what to do about it.

    `id` is that of docs/findings.md (S sanity of the evaluation, G health of the gradient, C behaviour of attacks);
    `masking` says that, raised, it is a sign of a masked gradient rather than of a weak attack or a broken evaluation.
    """

    id: str
    name: str
    level: Level
    value: float | None
    limit: str
    evidence: str
    advice: str = ""
    masking: bool = False


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A robustness claim judged: per image whether it was right, survived the default attack, survived everything.

    Flags are per image, in order; `indices` are their places in the data. `broken_by` names the run that first fooled
    an image, None where none did. `runs` are in the order they were made, each on the images then standing.
    `claim` is the claimed robust accuracy 0..1, None where the default attack stands in for it. `complete` says that
    the whole battery ran; `verdict` follows `docs/findings.md` and `reason` is it in words.
    """

    victim: str
    card: dict[str, Any]
    threat: Threat
    data: str
    indices: tuple[int, ...]
    clean: tuple[bool, ...]
    default: tuple[bool, ...]
    worst: tuple[bool, ...]
    broken_by: tuple[str | None, ...]
    runs: tuple[Run, ...]
    findings: tuple[Finding, ...]
    curves: dict[str, Any]
    verdict: Verdict
    reason: str
    claim: float | None
    claim_source: str
    default_attack: str
    budget: str
    complete: bool
    seconds: float
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        _as_long(self, "indices", "default", "worst", "broken_by")
        _shares(self, "claim")

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.clean)

    @property
    def clean_accuracy(self) -> "Rate":
        """Share of images classified correctly."""
        return Rate(sum(self.clean), self.n)

    @property
    def default_accuracy(self) -> "Rate":
        """Share that survived the default attack."""
        return Rate(sum(self.default), self.n)

    @property
    def accuracy(self) -> "Rate":
        """Share that survived everything: the worst case of every image over all runs."""
        return Rate(sum(self.worst), self.n)

    @property
    def alarms(self) -> tuple[Finding, ...]:
        """The findings that are raised, failures first."""
        return tuple(sorted((f for f in self.findings if f.level in ("warn", "fail")), key=lambda f: f.level))


@dataclass(frozen=True, kw_only=True)
class TrailRow:
    """One operation of the trail: the gradient of the loss with respect to its input, averaged over images.

    Shares are of gradient entries, 0..1. `zero` are exactly zero, `forced` are zero by geometry alone whatever arrives,
    `norm` is the L2 norm per image, `entries` the number of gradient entries per image (all time steps), `per_step` and
    `per_example` are the zero share of each time step and of each image.

    `inherited` is the share of zeros in the gradient that arrives at the output. `created` are zeros at entries that
    lead to no output, or to one whose gradient is not zero; the rest of `zero` is passed on. `participation` is
    ||g||_1^2 / ||g||_2^2 by the number of entries, the mean over images with a gradient; `zero64` is the zero share of
    a backward in float64 through the same activations. `weight_*` are of the gradient of the operation's weight, of the
    mean loss over all images. What was not asked for, or is not known, is None.
    """

    op: str
    kind: str
    depth: int
    zero: float
    forced: float
    norm: float
    entries: int
    per_step: tuple[float, ...] | None = None
    inherited: float | None = None
    created: float | None = None
    participation: float | None = None
    zero64: float | None = None
    per_example: tuple[float, ...] | None = None
    weight_zero: float | None = None
    weight_participation: float | None = None
    weight_norm: float | None = None

    def __post_init__(self) -> None:
        _shares(self, "zero", "forced", "per_step", "inherited", "created", "participation", "zero64", "per_example")
        _shares(self, "weight_zero", "weight_participation")
        _counts(self, "entries")

    @property
    def passed(self) -> float | None:
        """Share of zeros that are passed on: every output the entry leads to has a zero gradient."""
        return None if self.created is None else self.zero - self.created

    @property
    def underflow(self) -> float | None:
        """Share of zeros that are no zeros in float64."""
        return None if self.zero64 is None else self.zero - self.zero64


@dataclass(frozen=True, kw_only=True)
class Trail:
    """The sparsity trail of a network: one row per operation in the order of the forward pass.

    `route` is how the gradient flows, in words; `replaced` what stands in for a part of the backward, for this
    measurement only and behind the same forward. `unread` are modules of which not every gradient was read, each with
    the reason in brackets; of `unfolded` it is not known which entries belong to an image: their norm is not a number,
    and participation and shares by step and image are left out. Of `nonfinite` images a gradient is NaN or infinite:
    they are left out of participation there, and the norm is not a number. All are empty in older records.
    """

    victim: str
    mode: Mode
    data: str
    n: int
    steps: int
    clean_accuracy: float
    rows: tuple[TrailRow, ...]
    route: str = ""
    replaced: str = ""
    unread: tuple[str, ...] = ()
    unfolded: tuple[str, ...] = ()
    nonfinite: int = 0

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows: expected at least one operation, found none")
        _shares(self, "clean_accuracy")
        _counts(self, "nonfinite")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published value with the threat its text states and the threat its code runs."""

    figure: str
    row: str
    dataset: str
    metric: str
    value: float
    unit: str
    source: str
    stated: str
    coded: str
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a page shows: plain data, written whole to `result.json` and read back to draw it again."""

    title: str
    summary: tuple[str, ...]
    models: tuple[dict[str, Any], ...]
    runs: tuple[Run, ...]
    trails: tuple[Trail, ...]
    claims: tuple[Claim, ...]
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()
    audits: tuple[Audit, ...] = ()


def _as_long(of: Run | Audit, *names: str) -> None:
    """Refuse fields that do not hold one entry an image, as `clean` does."""
    for name in names:
        if (held := getattr(of, name)) is not None and len(held) != len(of.clean):
            raise ValueError(f"{name}: expected {len(of.clean)} entries, one an image as in clean, found {len(held)}")


def _shares(of: Any, *names: str) -> None:
    """Refuse fields that are no shares 0..1; what is not known may be None or NaN."""
    for name in names:
        held = getattr(of, name)
        for share in held if isinstance(held, tuple) else (held,):
            if share is not None and not (math.isnan(share) or -1e-6 <= share <= 1 + 1e-6):
                raise ValueError(f"{name}: expected a share 0..1, found {share:g}")


def _counts(of: Any, *names: str) -> None:
    """Refuse fields that are no counts."""
    for name in names:
        if (held := getattr(of, name)) < 0:
            raise ValueError(f"{name}: expected a count of 0 or more, found {held}")
