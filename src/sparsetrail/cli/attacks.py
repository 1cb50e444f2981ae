"""`attack` and `audit`, and what both say of a run."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from sparsetrail import data
from sparsetrail.attacks import ATTACKS, check_settings, settings
from sparsetrail.attacks.bim import own_step as in_parts
from sparsetrail.attacks.pgd import own_step as paced
from sparsetrail.auditing import refuse, refuse_flips, wavers
from sparsetrail.cli.flags import (
    COMMON,
    KEPT,
    Common,
    Kept,
    Norm,
    Number,
    Space,
    chosen,
    emit,
    images_for,
    output_folder,
)
from sparsetrail.cli.screen import Screen
from sparsetrail.core import Audit, Report, Route, Run, Threat, as_fraction
from sparsetrail.recipes import audits, measure
from sparsetrail.recipes.targets import Target, fits, home, target_at
from sparsetrail.report import console as print_table
from sparsetrail.report import write
from sparsetrail.report.labels import BY_SCORES, route_of

OWN_STEPS = {"pgd": paced, "bim": in_parts, "mifgsm": in_parts}
FLIPS = ("sda", "sparse_rs")  # attacks of an L0 ball


def attack(
    target: str,
    *,
    name: Annotated[str, Parameter(help=f"one of {', '.join(ATTACKS)}")] = "pgd",
    eps: Number | None = None,
    space: Space | None = None,
    norm: Norm = "linf",
    compat: Annotated[
        Literal["authors"] | None, Parameter(help="the paper's code: encoded 6/255, crafted in train mode")
    ] = None,
    steps: int | None = None,
    step: Annotated[
        Number | None,
        Parameter(
            help="length of a step; default for pgd 0.01, in l2 and in smaller balls the share of eps that 0.01 is of "
            "8/255, for spsa 0.01, for bim and mifgsm eps / steps"
        ),
    ] = None,
    restarts: int | None = None,
    draws: int | None = None,
    sets: Annotated[
        list[str] | None, Parameter(name="--set", negative="", help="another setting of the attack, e.g. loss=margin")
    ] = None,
    route: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="another backward of the neurons, e.g. triangle:1, hart, assg; several: the mean; this, --transfer and"
            f" --encoder-gradient not with {', '.join(BY_SCORES)}",
        ),
    ] = None,
    transfer: Annotated[str | None, Parameter(help="follow the gradient of this model instead")] = None,
    eot: Annotated[int | None, Parameter(help="gradients averaged a step; default 10 for a random encoder")] = None,
    encoder_gradient: Annotated[str | None, Parameter(help="identity, weighted, secant or none")] = None,
    precision: Annotated[
        Literal["fp32", "bf16"], Parameter(help="bf16 crafts with faster input gradients; judged in fp32 either way")
    ] = "fp32",
    data_name: Annotated[str | None, Parameter(name="--data", help="default: the set the model was trained on")] = None,
    n: int | None = 1000,
    batch: int | None = None,
    seed: int | None = None,
    common: Common = COMMON,
) -> None:
    """Attack TARGET on test images; eval mode, best point kept, judged afresh.

    TARGET is a run folder, a model.safetensors, or file.py:function that returns a sparsetrail Victim (any PyTorch SNN;
    the file is run, so let it be yours).

    --eps and --space have no default: say what the adversary may do, e.g. --eps 8/255 --space pixel, or with --name sda
    --norm l0 the number of entries of a binary code that may be flipped. Results are kept beside the model and not
    computed twice.
    """
    where = common.where()
    given = {"steps": steps, "step": step, "restarts": restarts, "draws": draws}
    knobs = {k: v for k, v in given.items() if v is not None} | chosen(
        name, settings(ATTACKS[name]) if name in ATTACKS else {}, sets or []
    )
    gradients = {"--transfer": transfer, "--route": route, "--encoder-gradient": encoder_gradient}
    threat = _threat(name, eps, space, norm, knobs, gradients) if compat is None else None
    asked = (eps, space, encoder_gradient, batch, seed, route, transfer, sets)
    if compat is not None and (knobs or precision != "fp32" or eot is not None or any(a is not None for a in asked)):
        raise ValueError(
            "--compat authors: threat and settings are fixed (encoded space, 6/255, 7 steps of 0.01, batches of "
            "16, seed 3407, fp32); leave --eps, --space, --route, --transfer, --eot, --batch, --seed, --precision and "
            "the attack's settings out"
        )
    what = target_at(target, device=where, precision=precision, backward=encoder_gradient)
    if threat is None and what.model is None:
        raise ValueError("--compat authors: expected a model of ours, whose train mode it needs, got a Python file")
    test_set = images_for(what.model, data_name, n, common.root)
    guide = None if transfer is None else target_at(transfer, device=where)
    if threat is not None:
        victim, x = what.make(), data.pixels(test_set.images[:8].to(where))
        for v in (victim, *([] if guide is None else [guide.make()])):
            fits(v, x, test_set)
        refuse_flips(victim, threat, x)
    with Screen(quiet=common.as_json) as screen, output_folder(home(target, what) / "attacks") as place:
        bench = measure.Bench(
            out=place,
            device=where,
            seed=seed or 0,
            batch=64 if batch is None else batch,
            tick=screen.tick,
            stop=screen.stop,
        )
        if threat is None:
            assert what.model is not None
            runs = list(measure.strike_as_published(bench, what.model, what.name, test_set))
        else:
            run = measure.strike(
                bench, what, name, threat, test_set, eot=eot,
                route=tuple(Route(neuron=None if r == "own" else r) for r in route or ()),
                guide=guide, **knobs,
            )  # fmt: skip
            runs = [run]
    for run in runs:
        if common.as_json:
            emit(run_line(run))
        else:
            _say_run(run)
    if not common.as_json:
        print(f"kept     {place / 'cells'}")


def _threat(
    name: str, eps: float | None, space: Space | None, norm: Norm, knobs: dict[str, Any], gradients: dict[str, Any]
) -> Threat:
    if eps is None or space is None:
        raise ValueError("attack: expected --eps and --space, e.g. --eps 8/255 --space pixel; they have no default")
    if name not in ATTACKS:
        raise ValueError(f"--name: expected one of {', '.join(ATTACKS)}, got {name!r}")
    allowed = settings(ATTACKS[name])
    for k in knobs:
        if k not in allowed:
            own = ("steps", "step", "restarts", "draws")
            flags = ", ".join(f"--{a}" if a in own else f"--set {a}=" for a in allowed)
            raise ValueError(f"--{k}: {name} does not have it; expected {flags or 'no settings'}")
    check_settings(name, knobs)
    loss = str(knobs.get("loss", allowed.get("loss", "targeted")))
    if "targets" in knobs and "targeted" not in loss:
        raise ValueError(f"--set targets: only loss=targeted has targets, found loss={loss}")
    if name in FLIPS and norm != "l0":
        raise ValueError(f"--name {name}: expected --norm l0, got {norm}; its radius is a number of entries to flip")
    if name in BY_SCORES and (given := [flag for flag, value in gradients.items() if value is not None]):
        raise ValueError(f"{given[0]}: {name} asks for scores alone and follows no gradient; leave it out")
    return Threat(eps, space=space, norm=norm)


def audit(
    target: str,
    *,
    eps: Annotated[
        list[Number] | None,
        Parameter(
            negative="", allow_leading_hyphen=True, help="radius, e.g. 8/255 (l0: entries); one for every --space"
        ),
    ] = None,
    space: Annotated[
        list[Space] | None, Parameter(negative="", help="pixel or encoded; repeat both flags for more threats")
    ] = None,
    norm: Norm = "linf",
    data_name: Annotated[str | None, Parameter(name="--data", help="default: the set the model was trained on")] = None,
    n: int | None = 1000,
    budget: Annotated[
        Literal["quick", "standard", "thorough"], Parameter(help="how much is tried: a look, the rule, everything")
    ] = "standard",
    minutes: Annotated[
        float | None, Parameter(help="begin no further attack after this long; the default attack always runs")
    ] = None,
    claim: Annotated[float | None, Parameter(help="the robust accuracy that is claimed, 0..1")] = None,
    claim_source: Annotated[str, Parameter(help="where it is claimed, told beside it, e.g. arXiv:2509.23762")] = "",
    transfer: Annotated[
        list[str] | None, Parameter(negative="", help="another model to transfer from: another seed, pool, an ANN")
    ] = None,
    control: Annotated[str | None, Parameter(help="an undefended model that must fall to the quick attacks")] = None,
    eot: Annotated[int | None, Parameter(help="gradients averaged a step; default 10 for a random encoder")] = None,
    precision: Annotated[
        Literal["fp32", "bf16"], Parameter(help="bf16 crafts with faster input gradients; judged in fp32 either way")
    ] = "fp32",
    verify: Annotated[
        bool, Parameter(negative="", help="attack nothing: show the kept adversarials to the model again, one by one")
    ] = False,
    batch: int = 64,
    seed: int = 0,
    out: Path | None = None,
    common: Kept = KEPT,
) -> None:
    """Judge the robustness of TARGET: checks, a battery of attacks, the worst case per image, a verdict with reasons.

    TARGET is a run folder, a model.safetensors, or file.py:function that returns a sparsetrail Victim (any PyTorch SNN;
    the file is run, so let it be yours). --eps and --space have no default. Writes a page, the machine-readable card
    and the adversarials into --out (default: a folder in audit/ beside the model, named by threats and n); the same
    command continues.
    """
    where = common.where()
    if not eps or not space:
        raise ValueError("audit: expected --eps and --space, e.g. --eps 8/255 --space pixel; they have no default")
    if len(eps) != len(space):
        raise ValueError(f"expected one --eps for every --space, got {len(eps)} and {len(space)}")
    threats = [Threat(e, space=s, norm=norm) for e, s in zip(eps, space, strict=True)]
    refuse(threats, claim=claim, batch=batch, eot=eot, minutes=minutes, budget=budget)
    what = target_at(target, device=where, precision=precision)
    test_set = images_for(what.model, data_name, n, common.root)
    place = home(target, what) / "audit"
    if verify:
        _verify(target, what, threats, test_set, place, out, common.as_json, device=where, batch=batch, seed=seed)
        return
    victim = what.make()  # refused before a folder is made
    for threat in threats:
        refuse_flips(victim, threat, data.pixels(test_set.images[:8].to(where)))
    if out is not None and not common.fresh:
        audits.refuse_other(out, what, threats)
    if out is None:
        out = place / "_".join([*map(audits.short, threats), f"n{len(test_set.labels)}"])
    with Screen(quiet=common.as_json) as screen, common.folder(out):
        bench = measure.Bench(out=out, device=where, seed=seed, batch=batch, tick=screen.tick, stop=screen.stop)
        report, examples = audits.run(
            bench, what, threats, test_set, budget=budget, claim=claim, claim_source=claim_source, eot=eot,
            minutes=minutes, guides=[target_at(t, device=where) for t in transfer or ()],
            control=None if control is None else target_at(control, device=where),
            command=" ".join(
                [f"sparsetrail audit {target}", *(f"--eps {as_fraction(t.eps)} --space {t.space}" for t in threats),
                 f"--norm {norm} --data {test_set.name} --n {len(test_set.labels)} --budget {budget} --seed {seed}",
                 f"--precision {precision}", *([] if claim is None else [f"--claim {claim:g}"]),
                 *([] if eot is None else [f"--eot {eot}"]),
                 *(f"--transfer {t}" for t in transfer or ()), *([] if control is None else [f"--control {control}"])]
            ),
        )  # fmt: skip
        files = write(report, out, images=examples)
    if common.as_json:
        emit({"audits": [_audit_line(a) for a in report.audits], "files": {k: str(v) for k, v in files.items()}})
        return
    say_report(report, files["html"])


def say_report(report: Report, page: Path) -> None:
    """The tables and the summary of a report in the terminal, and where its page is."""
    console = Console()
    console.print()
    print_table(report, console)
    for line in report.summary:
        console.print(line, markup=False, highlight=False)
    console.print(f"\nreport   {page}", markup=False, highlight=False, soft_wrap=True)


def _verify(
    target: str, what: Target, threats: list[Threat], test_set: data.Dataset, place: Path, out: Path | None,
    as_json: bool, **more: Any,
) -> None:  # fmt: skip
    """Show kept adversarials to the model once more; ValueError where some do not hold but for votes that turned."""
    lines: list[dict[str, Any]] = []
    for threat in threats:
        folder = out or audits.kept_under(place, threat, len(test_set.labels))
        shown, bad = audits.verify_again(measure.Bench(out=folder, **more), what, threat, test_set)
        held = shown - len(bad)
        turned = bool(bad) and wavers(what.make(), bad, shown)
        lines.append(
            {"threat": str(threat), "held": held, "n": shown, "bad": bad, "wavering": turned, "folder": str(folder)}
        )
        if not as_json:
            print(f"{threat}: {held} of {shown} adversarials hold, shown alone to the model loaded anew")
            for j, why in sorted(bad.items())[:10]:
                print(f"  image {j}: {why}" + (", this time: the victim draws noise" if turned else ""))
    if as_json:
        emit({"verified": lines})
    if wrong := sum(len(line["bad"]) for line in lines if not line["wavering"]):
        raise ValueError(f"{target}: {wrong} adversarials do not hold; see above")


def run_line(run: Run) -> dict[str, Any]:
    """A run as one line of `--json`: its threat, mode, route and settings, n, accuracies with the Wilson interval."""
    lo, hi = run.accuracy.interval()
    return {
        "victim": run.victim, "attack": run.attack, "knobs": _knobs(run), "space": run.threat.space,
        "norm": run.threat.norm, "eps": run.threat.eps, "mode": run.mode, "route": route_of(run), "data": run.data,
        "n": run.n, "clean_acc": run.clean_accuracy.value, "robust_acc": run.accuracy.value, "interval95": [lo, hi],
        "ties": run.ties, "zero_gradient": run.zero_gradient, "dead_examples": run.dead_examples,
        "nonfinite": run.nonfinite, "forwards": run.forwards, "backwards": run.backwards, "seed": run.seed,
        "seconds": round(run.seconds, 2), "note": run.note, "eot": run.eot, "votes": run.votes,
    }  # fmt: skip


def _audit_line(a: Audit) -> dict[str, Any]:
    return {
        "victim": a.victim, "space": a.threat.space, "norm": a.threat.norm, "eps": a.threat.eps, "n": a.n,
        "verdict": a.verdict, "reason": a.reason, "claim": a.claim, "clean_acc": a.clean_accuracy.value,
        "default_attack": a.default_attack, "default_acc": a.default_accuracy.value, "worst_acc": a.accuracy.value,
        "interval95": list(a.accuracy.interval()), "complete": a.complete, "budget": a.budget,
        "alarms": [{"id": f.id, "name": f.name, "level": f.level, "evidence": f.evidence} for f in a.alarms],
        "seconds": round(a.seconds, 1),
    }  # fmt: skip


def _say_run(run: Run) -> None:
    print(f"victim   {run.victim}")
    print(f"threat   {run.threat}, crafted in {run.mode} mode")
    print(f"route    {route_of(run)}")
    print(f"data     {run.data}")
    print(f"clean    {run.clean_accuracy}")
    told = {k: v for k, v in _knobs(run).items() if v is not None} | ({"eot": run.eot} if run.eot > 1 else {})
    told["seed"] = run.seed
    if told.get("loss") not in (None, "targeted"):
        told.pop("targets", None)  # without effect
    knobs = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in told.items())
    print(f"{run.attack:<8} {run.accuracy}" + (f"   ({knobs})" if knobs else ""))
    if run.zero_gradient is not None:
        print(f"gradient {run.zero_gradient:.1%} exact zeros; {run.dead_examples} images once without any gradient")
    step = told.get("step", 0)
    notes = (
        f"a step of {step:g} is longer than the radius; give a shorter --step" if step > run.threat.eps > 0 else "",
        f"{run.ties} ties, counted as not fooled" if run.ties else "",
        f"{run.nonfinite} images with a gradient that is not finite" if run.nonfinite else "",
        run.note,
    )
    for line in filter(None, notes):
        print(f"note     {line}")


def _knobs(run: Run) -> dict[str, Any]:
    """The settings of a run, with the length of a step that the attack took by itself where none was given."""
    if run.attack not in OWN_STEPS or run.knobs.get("step", 0) is not None:
        return run.knobs
    return run.knobs | {"step": OWN_STEPS[run.attack](run.threat, run.knobs["steps"])}
