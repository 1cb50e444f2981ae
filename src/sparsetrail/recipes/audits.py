"""An audit as kept work: the model or a foreign victim, one threat or several side by side, adversarials as a file."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsetrail.auditing import Budget, audit, contradiction, fingerprint, misjudged, reaches_code, refuse, verify
from sparsetrail.core import Audit, Report, Threat, Trail, Victim, as_fraction
from sparsetrail.data import Dataset, pixels, take
from sparsetrail.recipes.cells import version
from sparsetrail.recipes.measure import (
    Bench,
    card,
    clean,
    fits_code,
    follow,
    identity,
    provenance,
)
from sparsetrail.recipes.targets import Target, fits, ours
from sparsetrail.report import load
from sparsetrail.report.audits import where
from sparsetrail.snn.weights import load_weights, save_weights

T = TypeVar("T")
SHOWN = 6  # adversarial images on the page
UNSTEADY = ("S2", "S3", "S3e", "S3f", "S4", "S5")  # where one fails, an image scored anew may be judged otherwise


def run(
    bench: Bench,
    what: Target,
    threats: Sequence[Threat],
    data: Dataset,
    *,
    budget: Budget = "standard",
    claim: float | None = None,
    claim_source: str = "",
    guides: Sequence[Target] = (),
    control: Target | None = None,
    eot: int | None = None,
    minutes: float | None = None,
    traced: int = 64,
    command: str = "sparsetrail audit",
) -> tuple[Report, list[dict[str, Any]]]:
    """Audit a target under every threat, one after the other; the report, and example images for its page.

    Finished parts and the adversarials found are kept in `bench.out`; nothing is averaged over threats. `claim` is
    only for one threat: a figure is claimed under one.
    """
    refuse(threats, claim=claim, batch=bench.batch, eot=eot, minutes=minutes, budget=budget)
    for threat in threats:
        if what.model is not None:
            fits_code(what.model.encode, threat)
    started = time.monotonic()
    victim = what.make()
    x, y = pixels(data.images.to(bench.device)), data.labels.to(bench.device)
    fits(victim, x, data)
    name = f"{what.identity} {data.sha256} {fingerprint(what.make(), x)}"
    about: dict[str, Any] = {}
    trails: list[Trail] = []
    if what.model is not None:
        about = card(what.model, what.name, clean(bench, what.model, what.name, data), data)
        some = take(data, min(traced, len(data.labels)), seed=0)
        trails.append(follow(bench, ours(what.model, what.name, device=bench.device), some))
    audits: list[Audit] = []
    images: list[dict[str, Any]] = []
    for threat in threats:
        found, points = audit(
            victim, threat, x, y, budget=budget, claim=claim, claim_source=claim_source,
            guides=[g.make() for g in guides], control=None if control is None else control.make(), fresh=what.make,
            eot=eot, minutes=minutes, batch=bench.batch, seed=bench.seed, card=about, data=identity(data),
            provenance=provenance(bench, started, command) | _contract(what, threat) | {"target sha256": what.identity},
            store=bench.cells, identity=name,
            say=bench.tick, stop=bench.stop,
        )  # fmt: skip
        found = replace(found, provenance=found.provenance | bench.others)  # known when all is read
        audits.append(_keep(bench, what, data, found, points))
        images += [i | {"audit": len(audits) - 1} for i in _examples(victim, found, points, data, bench.device)]
    report = Report(
        title=f"Audit of {what.name}",
        summary=tuple(sentence(a) for a in audits),
        models=(about,) if about else (),
        runs=(),
        trails=tuple(trails),
        claims=(),
        provenance=provenance(bench, started, command),
        audits=tuple(audits),
    )
    return report, images


def _contract(what: Target, threat: Threat) -> dict[str, str]:
    """What the card says beside the model's own: the grid of the attacked tensor, and how state is kept."""
    grid = {"value grid": "256 grey levels"} if threat.space == "pixel" else {}
    own = {"reset contract": "stateless: one call takes the whole sequence"} if what.model is not None else {}
    return grid | own


def sentence(a: Audit) -> str:
    """An audit in one sentence: verdict, threat, the three figures."""
    claim = "" if a.claim is None else f"claimed {100 * a.claim:.1f} %, "
    figures = f"default attack leaves {a.default_accuracy}, worst case {a.accuracy}"
    threat = f"{a.threat}, {where(a).mode} mode, {a.budget} budget, n={a.n}"
    return (
        f"{a.verdict}, {threat}: clean {a.clean_accuracy}, {claim}{figures}. {a.reason[:1].upper()}"
        f"{a.reason[1:]}. The worst case is an upper bound: an attack that was not run can lower it."
    )


def short(threat: Threat) -> str:
    """A threat as part of a file name: 'pixel-linf-8of255'."""
    exact = as_fraction(threat.eps)
    return f"{threat.space}-{threat.norm}-{exact.replace('/', 'of') if '/' in exact else f'{threat.eps:.9g}'}"


def adversarial_file(folder: Path, threat: Threat) -> Path:
    """Where the adversarials of an audit lie."""
    return folder / f"adversarial-{short(threat)}.safetensors"


def kept_under(place: Path, threat: Threat, n: int) -> Path:
    """The folder of audits of `n` images that holds one under a threat, alone or among others; finished ones first.

    ValueError where there is none. An audit in which no image fell has no adversarials: its folder is known by name.
    """
    found = {p.parent for p in place.glob(f"*_n{n}/{adversarial_file(Path(), threat).name}")}
    found |= {p.parent for p in place.glob(f"*_n{n}/result.json") if short(threat) in p.parent.name.split("_")}
    if not found:
        raise ValueError(f"{place}: expected an audit of {n} images under {threat}, found none; run the audit first")
    return min(sorted(found), key=lambda p: (not (p / "result.json").is_file(), len(p.name)))


def refuse_other(out: Path, what: Target, threats: Sequence[Threat]) -> None:
    """ValueError where a folder holds a result that an audit of a target under these threats would replace."""
    if not (out / "result.json").is_file():
        return
    held = load(out / "result.json")
    others = [] if held.audits else [held.title]
    for a in held.audits:
        of = a.provenance.get("target sha256") or a.card.get("weights sha256") or what.identity
        if of != what.identity or a.threat not in threats:
            others.append(f"that of {a.victim} ({of[:12]}) under {a.threat}")
    if others:
        raise ValueError(
            f"--out {out}: expected no result or one of {what.name} ({what.identity[:12]}) under these threats, found "
            f"{'; '.join(others)}, which would be replaced; give another --out, or --fresh to move it aside"
        )


def verify_again(bench: Bench, what: Target, threat: Threat, data: Dataset) -> tuple[int, dict[int, str]]:
    """Show every kept adversarial of an audit to the model made anew, one by one; how many, and why some do not hold.

    ValueError where none are kept though images fell, or those of other data, or where the result beside them does not
    follow: from them, from the clean images scored anew, or from its own runs and findings.
    """
    path, result = adversarial_file(bench.out, threat), bench.out / "result.json"
    held: Mapping[str, Tensor] = {}
    sha = ""
    if path.exists():
        held, about, sha = load_weights(path)
        if about["victim"] != what.identity:
            raise ValueError(
                f"{path}: expected adversarials of {what.name} as it is now, found those of another model or code"
            )
        if about["threat"] != repr(threat):
            raise ValueError(f"{path}: expected adversarials of {threat}, found those of {about['threat']}")
        if about["data"] != data.sha256:
            raise ValueError(f"{path}: expected adversarials of {data.name} with this --n, found those of other images")
    report, found = _told(result, threat)
    fallen = [j for j, (was, stands) in enumerate(zip(found.clean, found.worst, strict=False)) if was and not stands]
    if not held and (fallen or "adversarial tensor sha256" in found.provenance):
        raise ValueError(f"{path}: expected the adversarials of an audit, found none; run the audit first")
    if held and (held["indices"].tolist() != fallen or found.provenance.get("adversarial tensor sha256") != sha):
        raise ValueError(
            f"{result}: expected a result that follows from the {len(held['indices'])} adversarials kept beside it, "
            f"found one with {len(fallen)} fallen images or of another file; one of the two was changed. Audit again"
        )
    if not held:
        _same(result, found, what, data)
    points = dict(zip(held["indices"].tolist(), held["adversarial"], strict=True)) if held else {}
    x, y = pixels(data.images.to(bench.device)), data.labels.to(bench.device)
    _follows(result, report, found, what, x, y, bench.batch)
    return len(points), verify(what.make(), threat, x, y, points)


def _told(result: Path, threat: Threat) -> tuple[Report, Audit]:
    """A result, and the audit under a threat that it tells of."""
    if not result.is_file():
        raise ValueError(f"{result}: expected the result that the adversarials belong to, found none; audit again")
    report = load(result)
    found = next((a for a in report.audits if a.threat == threat), None)
    if found is None:
        raise ValueError(f"{result}: expected an audit under {threat}, found none; audit again")
    return report, found


def _follows(result: Path, report: Report, found: Audit, what: Target, x: Tensor, y: Tensor, batch: int) -> None:
    """ValueError where an audit does not follow from the images [n c h w], from its own parts, or its summary from it.

    On victims of their own: what these draw must not change what the adversarials are shown to.
    """
    said = "" if found.n == len(y) else f"expected flags of {len(y)} images, found {found.n}"
    code, same = reaches_code(what.make(), found.threat, x), found.provenance.get("sparsetrail") == version()
    said = said or contradiction(found, what.make(), code=code, words=same)
    if not said and same and report.title.startswith("Audit of ") and sentence(found) not in report.summary:
        said = "expected a summary of what its flags, verdict and reason say, found another"
    steady = not any(f.id in UNSTEADY and f.level == "fail" for f in found.findings)
    if not said and steady and (bad := misjudged(what.make(), x, y, found.clean, batch=batch)):
        said = (
            f"expected images right and wrong without an attack as its clean flags say, found {len(bad)} of {found.n} "
            f"that are not when scored anew, the first of them image {bad[0]}"
        )
    if said:
        raise ValueError(f"{result}: {said}; it was changed, or the model was. Audit again")


def _same(result: Path, found: Audit, what: Target, data: Dataset) -> None:
    """ValueError where an audit without adversarials is of other images or, as far as it says, of another model."""
    if found.data != identity(data):
        raise ValueError(f"{result}: expected an audit on {identity(data)}, found one on {found.data}")
    of = found.provenance.get("target sha256", what.identity)
    weights = what.identity if what.model is None else found.card.get("weights sha256", what.identity)
    if not of == weights == what.identity:
        raise ValueError(
            f"{result}: expected an audit of {what.name} as it is now, found one of another model or code; audit again"
        )


def _keep(bench: Bench, what: Target, data: Dataset, found: Audit, points: Mapping[int, Tensor]) -> Audit:
    """The adversarials as one file, its content hash in the audit."""
    if not points:
        adversarial_file(bench.out, found.threat).unlink(missing_ok=True)  # of an earlier audit with other settings
        return found
    order = sorted(points)
    tensors = {
        "adversarial": torch.stack([points[j].cpu() for j in order]),
        "indices": torch.tensor(order),
        "labels": data.labels.cpu()[order],
    }
    about = {
        "kind": "adversarial", "victim": what.identity, "data": data.sha256, "threat": repr(found.threat),
    }  # fmt: skip
    sha = save_weights(adversarial_file(bench.out, found.threat), tensors, about)
    return replace(found, provenance=found.provenance | {"adversarial tensor sha256": sha})


def _examples(
    victim: Victim, found: Audit, points: Mapping[int, Tensor], data: Dataset, device: str
) -> list[dict[str, Any]]:
    if found.threat.space != "pixel":
        return []
    rows = sorted(points)[:SHOWN]
    out = []
    for j in rows:
        with torch.no_grad():
            k = int(victim.scores(points[j][None].to(device)).argmax(1))
        out.append(
            {
                "clean": data.images[j].movedim(0, -1).squeeze(-1).numpy(),
                "adversarial": (points[j].cpu() * 255).round().to(torch.uint8).movedim(0, -1).squeeze(-1).numpy(),
                "label": data.classes[int(data.labels[j])],
                "predicted": data.classes[k],
                "title": f"{found.threat}: {found.broken_by[j]}",
            }
        )
    return out
