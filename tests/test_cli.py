"""The command line as a user meets it: verbs, exit codes, messages, and results that are kept."""

import errno
import functools
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sparsetrail import cli
from sparsetrail._files import alone
from sparsetrail.auditing import run as auditing
from sparsetrail.auditing import work
from sparsetrail.cli import DATA_VERBS, THEORY_VERBS, VERBS, main
from sparsetrail.models import load_model
from sparsetrail.snn.net import NetSpec, build
from sparsetrail.snn.weights import load_weights, save_weights

WAY = "hard reset detached; phase encoder: identity"


def run(*argv, capsys=None):
    """Exit code, stdout and stderr of a command run in this process."""
    try:
        main(list(map(str, argv)))
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "tiny"
    main(["train", "sew_resnet18", "--data", "fashion-mnist-slice", "--images", "128", "--width", "0.125", "--T", "3",
          "--epochs", "1", "--threads", "1", "--out", str(out)])  # fmt: skip
    return out


def test_the_verbs_are_exactly_these(capsys):
    assert list(VERBS) == ["quick", "train", "defend", "import", "attack", "audit", "trail", "ablate", "design",
                           "reproduce", "report", "bench", "doctor"]  # fmt: skip
    assert list(DATA_VERBS) == ["get", "add", "verify", "list"]
    assert list(THEORY_VERBS) == ["demo", "audit"]
    code, out, _ = run("--help", capsys=capsys)
    assert code == 0 and all(verb in out for verb in [*VERBS, "data", "theory"])
    for verb in [*VERBS, *[f"data {v}" for v in DATA_VERBS], *[f"theory {v}" for v in THEORY_VERBS]]:
        code, out, _ = run(*verb.split(), "--help", capsys=capsys)
        assert code == 0 and "Usage: sparsetrail" in out, verb


def test_a_compared_system_is_one_command_away(tmp_path, capsys):
    small = ("--data", "fashion-mnist-slice", "--images", 48, "--width", "0.0625", "--T", 2, "--epochs", 1,
             "--batch", 16, "--threads", 1, "--out", tmp_path / "d")  # fmt: skip
    code, out, err = run("defend", "rat_vgg11", *small, "--set", "strength=0.01", "--json", capsys=capsys)
    assert code == 0, err
    told = json.loads(out)
    held = load_model(tmp_path / "d" / "models" / "fashion-mnist-slice-rat_vgg11")
    assert told["sha256"] == held.sha256 and "FGSM step of 2/255" in told["open in its source"]
    assert held.card["defence"]["knobs"]["strength"] == 0.01
    code, _, err = run("train", "sew_resnet18", "--defence", "pgd_at", "--set", "steps=1", "--set", "step=2/255",
                       *small[:-4], "--threads", 1, "--out", tmp_path / "at", capsys=capsys)  # fmt: skip
    assert code == 0 and load_model(tmp_path / "at").card["defence"]["knobs"]["steps"] == 1, err
    code, out, _ = run("attack", held.path, "--eps", "8/255", "--space", "pixel", "--n", 4, capsys=capsys)
    assert code == 0 and "crafted in eval mode" in out
    for args, match in (
        (("defend", "rat"), "expected one of vanilla_vgg11"),
        (("train", "sew_resnet18", "--defence", "rat"), "expected one of pgd_at"),
        (("train", "sew_resnet18", "--set", "eps=1/255"), "settings (none)"),
        (("train", "sew_resnet18", "--defence", "pgd_at", "--set", "eps=8/255"), "2 steps of 1/255 reach, got 8/255"),
        (("train", "sew_resnet18", "--defence", "snn_rat", "--weight-decay", "1e-4"), "weight_decay: expected 0"),
        (("defend", "rat_vgg11", "--set", "eps=8"), "grey levels are divided by 255"),
        (("defend", "rat_vgg11", "--set", "steps=8"), "expected key=value of snn_rat's settings"),
        (("defend", "vanilla_vgg11", "--set", "eps=0.1"), "settings (none)"),
        (("defend", "hire_vgg11", "--T", 3), "divisor of the 3 time steps"),
        (("defend", "rat_vgg11", "--calibrate", 3), "has no twin"),
        (("train", "sew_resnet18", "--tau", 7), "--tau: expected none with if neurons"),
        (("train", "sew_resnet18", "--neuron", "diet", "--tau", 7), "--tau: expected none with diet neurons"),
        (("train", "sew_resnet18", "--neuron", "diet", "--no-detach-reset"), "--no-detach-reset: diet neurons detach"),
        (("defend", "rat_vgg11", "--set", "eps=1/255", "--set", "eps=2/255"), "eps: expected once, got it again"),
    ):
        code, _, err = run(*args, "--data", "fashion-mnist-slice", "--out", tmp_path / "no", capsys=capsys)
        assert code == 4 and match in err and not (tmp_path / "no").exists(), err


def test_usage_errors_exit_2(capsys):
    code, _, err = run("attak", capsys=capsys)
    assert code == 2 and "attack" in err  # did you mean
    for no_number in ("eight", "8/255/2", "8/", "/255", "8/0"):
        code, _, err = run("attack", "x", "--eps", no_number, "--space", "pixel", capsys=capsys)
        assert code == 2 and "a fraction such as 8/255" in err and repr(no_number) in err, err
    code, _, err = run("attack", "x", "--spce", "pixel", capsys=capsys)
    assert code == 2 and "--space" in err


def test_an_attack_in_one_line(model, capsys):
    args = (
        "attack",
        model,
        "--name",
        "pgd",
        "--eps",
        "8/255",
        "--space",
        "pixel",
        "--n",
        "20",
        "--steps",
        "2",
        "--json",
    )
    code, out, err = run(*args, capsys=capsys)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["eps"] == 8 / 255 and facts["space"] == "pixel" and facts["mode"] == "eval" and facts["n"] == 20
    assert "identity" in facts["route"] and facts["interval95"][0] <= facts["robust_acc"] <= facts["interval95"][1]
    again = json.loads(run(*args, capsys=capsys)[1])
    cells = list((model / "attacks" / "cells").glob("*.json"))
    assert again == facts and len(cells) == 1  # kept, not computed again
    other = json.loads(run(*args[:-1], "--seed", "1", "--json", capsys=capsys)[1])
    assert other["seed"] == 1 and len(list((model / "attacks" / "cells").glob("*.json"))) == 2
    secant = json.loads(run(*args[:-1], "--encoder-gradient", "secant", "--json", capsys=capsys)[1])
    assert "secant" in secant["route"]
    code, out, _ = run(
        "attack", model, "--name", "fgsm", "--eps", "0.02", "--space", "encoded", "--n", "20", capsys=capsys
    )
    assert code == 0 and "encoded space" in out and "encoder" not in out.split("route")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--steps", 3, "--step", "3/255", "--restarts", 2), {"steps": 3, "step": 3 / 255, "restarts": 2}),
        (("--set", "loss=margin", "--set", "steps=2"), {"loss": "margin", "steps": 2}),
        (("--name", "noise", "--draws", 3, "--set", "corners=true"), {"draws": 3, "corners": True}),
        (("--norm", "l2", "--steps", 1), {"norm": "l2"}),
        (("--norm", "l0", "--eps", 2, "--space", "encoded", "--name", "sda"), {"norm": "l0", "eps": 2}),
        (("--eot", 2, "--steps", 1), {"eot": 2}),
        (("--route", "own", "--route", "triangle:1", "--steps", 1),
         {"route": f"BPTT atan(2), {WAY} + BPTT triangle(1), {WAY}"}),
        (("--transfer", "other", "--steps", 1), {"route": f"transfer from other: BPTT atan(2), {WAY}"}),
        (("--name", "codebook", "--steps", 1), {"route": f"BPTT atan(2), {WAY[:-8]}its codebook, exact"}),
    ],
    ids=["steps", "set", "draws", "l2", "l0", "eot", "route", "transfer", "codebook"],
)  # fmt: skip
def test_every_setting_of_an_attack_arrives(model, tmp_path, capsys, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "other", ignore=shutil.ignore_patterns("attacks"))
    threat = () if "--eps" in flags else ("--eps", "8/255", "--space", "pixel")
    code, out, err = run("attack", model, *threat, "--n", 4, *flags, "--json", capsys=capsys)
    assert code == 0, err
    facts = json.loads(out)
    assert {k: (facts | facts["knobs"])[k] for k in told} == told


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd", "bim", "mifgsm"])
def test_the_step_told_is_the_step_taken(model, capsys, name, norm):
    args = ("attack", model, "--name", name, "--norm", norm, "--space", "pixel", "--n", 8, "--steps", 2,
            "--eps", "3/255" if norm == "linf" else "1")  # fmt: skip
    code, out, err = run(*args, capsys=capsys)
    assert code == 0, err
    told = json.loads(run(*args, "--json", capsys=capsys)[1])["knobs"]["step"]
    assert f"step={told:g}" in out
    for step in (told, told / 2):
        assert json.loads(run(*args, "--step", repr(step), "--json", capsys=capsys)[1])["knobs"]["step"] == step
    cells = [load_weights(p) for p in (model / "attacks" / "cells").glob("*.safetensors")]
    points = {
        card["knobs"]["step"]: tensors["adversarial"]
        for tensors, card, _ in cells
        if card["attack"] == name and card["threat"]["norm"] == norm and card["threat"]["eps"] in (3 / 255, 1)
    }
    assert torch.equal(points[None], points[told]) and not torch.equal(points[None], points[told / 2])


def test_the_published_recipe_is_explicit(model, capsys):
    code, out, _ = run("attack", model, "--compat", "authors", "--n", "20", "--json", capsys=capsys)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [x["attack"] for x in lines] == ["fgsm (authors)", "pgd (authors)"]
    assert all(x["mode"] == "train" and x["space"] == "encoded" and x["eps"] == 6 / 255 for x in lines)
    code, _, err = run("attack", model, "--compat", "authors", "--eps", "8/255", capsys=capsys)
    assert code == 4 and "fixed" in err


MINE = """
import torch
from sparsetrail import Victim


def mine():
    return Victim(encode=lambda x: x[None], logits=lambda u: u[0].flatten(1)[:, :10], steps=1, classes=10)


def fails():
    return Victim(encode=lambda x: x[None], logits=lambda u: u[0] @ torch.ones(3, 3), steps=1, classes=10)


def net():
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)).eval()
    return Victim(encode=lambda x: x[None], logits=lambda u: own(u[0]), steps=1, classes=10, module=own, name="net")


same = net
"""


def test_what_a_python_file_cannot_have_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    ok, on = ("--eps", "8/255", "--space", "pixel", "--n", "10"), ("--data", "fashion-mnist-slice")
    mine = "mine.py:mine"
    half = ("--eps", "0.5/255", "--space", "pixel", "--n", "10")
    for argv, words in (
        (("attack", mine, *half, *on), "less than one grey level (0.5 of one)"),
        (("attack", mine, *ok), "--data: expected the image set to put a foreign victim to"),
        (("attack", mine, *ok, *on, "--precision", "bf16"), "--precision: expected a model of ours for it"),
        (("attack", mine, *ok, *on, "--encoder-gradient", "secant"), "--encoder-gradient: expected a model of ours"),
        (("attack", mine, "--compat", "authors", *on), "--compat authors: expected a model of ours"),
        (("attack", mine, *ok, *on, "--route", "hart"), "expected a victim that can be rewired"),
        (("audit", mine, *ok, *on, "--precision", "bf16"), "--precision: expected a model of ours for it"),
        (("trail", mine), "--data: expected the image set"),
        (("trail", mine, *on), "the trail needs the network behind the victim"),
        (("ablate", mine, *on), "ablate: expected models of ours"),
        (("ablate", "gone.py:mine", *on), "ablate: expected models of ours"),
        (("attack", mine, *ok, *on, "--transfer", "mine.py:fails"), "does not take images"),
        (("trail", "mine.py:net", "mine.py:same", *on), "victims of different names, got net, net"),
    ):
        code, out, err = run(*argv, capsys=capsys)
        assert code == 4 and words in err and "Traceback" not in err, (argv, code, err)
        assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["mine.py"], argv


def test_refused_input_exits_4_and_says_the_fix(model, tmp_path, capsys):
    ok = ("--eps", "8/255", "--space", "pixel", "--n", "10")
    for argv, words in (
        *(
            ((*verb, model, *flags), f"{' '.join(verb)}: expected --eps and --space, e.g. --eps 8/255 --space pixel")
            for verb in (("attack",), ("audit",), ("theory", "audit"))
            for flags in ((), ("--eps", "8/255"), ("--space", "pixel"))
        ),
        (("attack", model, "--eps", "8", "--space", "pixel"), "did you mean 8/255"),
        *(
            ((*verb, model, "--eps", "-8/255", "--space", "pixel"), "within 0..1, got -0.0313725")
            for verb in (("attack",), ("audit",), ("theory", "audit"))
        ),
        (("attack", tmp_path / "nowhere", *ok), "found nothing there"),
        (("attack", model, *ok, "--name", "deepfool"), "expected one of noise, fgsm, rfgsm"),
        (("attack", model, *ok, "--set", "steps"), "expected key=value of pgd's settings"),
        (("attack", model, *ok, "--set", "loss=hinge"), "expected one of ce, margin, dlr"),
        (("attack", model, *ok, "--set", "steps=many"), "expected a value like 7"),
        (("attack", model, *ok, "--name", "apgd", "--set", "targets=3"), "only loss=targeted has targets, found"),
        (("attack", model, *ok, "--route", "magic"), "magic"),
        (("attack", model, "--eps", "1", "--space", "encoded", "--n", "10", "--name", "codebook"), "pixel space"),
        (("audit", model, *ok, "--claim", "45"), "write 0.45"),
        (("audit", model, *ok, "--space", "encoded"), "one --eps for every --space"),
        (("audit", tmp_path / "nowhere", *ok), "file.py:function"),
        (("audit", model, *ok, "--verify"), "run the audit first"),
        (("attack", model, *ok, "--name", "fgsm", "--steps", "3"), "fgsm does not have it"),
        (("attack", model, *ok, "--steps", "-3"), "positive"),
        (("attack", model, *ok, "--data", tmp_path / "gone"), "gone"),
        (("attack", model, *ok, "--encoder-gradient", "magic"), "identity"),
        (("attack", model, *ok, "--encoder-gradient", "none"), "no gradient reaches"),
        (("train", "resnet18", "--data", "fashion-mnist-slice", "--out", tmp_path / "t"), "sew_resnet18"),
        (("train", "--data", "nosuchset", "--out", tmp_path / "t"), "data add"),
        (("train", "--data", "fashion-mnist-slice", "--lr", "0", "--out", tmp_path / "t"), "lr: expected a finite"),
        (("attack", "mine.py:mine", *ok), "expected a Python file with the function mine, found no file"),
        (("report", tmp_path / "nowhere"), "nowhere"),
        (("reproduce", "table3", "--scale", "smoke", "--rows", "vgg11", "--out", tmp_path / "t"), "sew_resnet18"),
        (
            (
                "reproduce",
                "table3",
                "--from-records",
                "--scale",
                "small",
                "--rows",
                "a",
                "--datasets",
                "b",
                "--n",
                1,
                "--models",
                "c",
                "--seeds",
                2,
                "--weight-decay",
                1e-3,
                "--out",
                tmp_path / "t",
                "--fresh",
            ),
            "leave --scale, --rows, --datasets, --n, --models, --seeds, --weight-decay, --out, --fresh out",
        ),
        *(
            (
                (verb, model, *ok[2:], "--eps", "5", "--norm", "l0", *sda),
                "found other values in pixel space; use --space",
            )
            for verb, sda in (("attack", ("--name", "sda")), ("audit", ()))
        ),
        (("attack", model, "--eps", "5", "--space", "encoded", "--name", "sda"), "--name sda: expected --norm l0"),
        (("attack", model, *ok, "--name", "sparse_rs"), "--name sparse_rs: expected --norm l0"),
        (("audit", model, *ok, "--out", tmp_path / "t.html"), f"found that of a file; give --out {tmp_path / 't'}"),
        (("quick", "--images", 0, "--out", tmp_path / "t"), "--images: expected 1 to 6000 of the shipped train"),
        (("quick", "--images", 6001, "--out", tmp_path / "t"), "--images: expected 1 to 6000 of the shipped train"),
        (("quick", "--attacked", 5000, "--out", tmp_path / "t"), "--attacked: expected 1 to 1000 of the shipped test"),
        (("quick", "--epochs", 0, "--out", tmp_path / "t"), "epochs: expected at least 1"),
        (("data", "add", tmp_path / "gone"), "gone"),
    ):
        code, out, err = run(*argv, capsys=capsys)
        assert code == 4 and words in err and "Traceback" not in err, (argv, code, err)
        assert not list(tmp_path.iterdir()), argv  # nothing is left of what was refused
    if not torch.cuda.is_available():
        code, _, err = run("attack", model, *ok, "--device", "cuda", capsys=capsys)
        assert code == 4 and "no CUDA device" in err
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, _, err = run("train", "--data", "fashion-mnist-slice", "--out", blocked / "x", capsys=capsys)
    assert code == 4 and "--out" in err


def test_attacks_that_follow_no_gradient_cannot_follow_that_of_another_model(model, capsys):
    from sparsetrail.attacks import ATTACKS, attack, settings
    from sparsetrail.cli.attacks import FLIPS
    from sparsetrail.core import L0, Linf, Victim
    from sparsetrail.report.labels import BY_SCORES

    flat = Victim(encode=lambda x: x[None], logits=lambda u: u[0].flatten(1), steps=1, classes=4, codebook=torch.eye(1))
    x, y = torch.eye(4).view(4, 1, 2, 2), torch.arange(4)
    few = {"steps": 2, "queries": 4, "draws": 2, "targets": 1}
    asked = set()
    for name, fn in ATTACKS.items():
        if name == "codebook":  # of a code
            continue
        known = {k: v for k, v in few.items() if k in settings(fn)}
        ball = L0(1, space="pixel") if name in FLIPS else Linf(0.1, space="pixel")
        asked |= {name} if attack(fn, flat, ball, x, y, **known).backwards == 0 else set()
    assert asked == set(BY_SCORES)
    for name in BY_SCORES:
        l0 = ("--norm", "l0", "--eps", "2", "--space", "encoded")
        threat = l0 if name in FLIPS else ("--eps", "8/255", "--space", "pixel")
        for flag, given in (("--transfer", model), ("--route", "hart"), ("--encoder-gradient", "secant")):
            code, _, err = run("attack", model, *threat, "--name", name, flag, given, capsys=capsys)
            assert code == 4 and f"{flag}: {name} asks for scores alone" in err, err


def test_a_step_longer_than_the_radius_is_told(model, capsys):
    for eps, step, told in (("1/255", 0.01, True), ("1/255", None, False), ("8/255", None, False)):
        args = ("attack", model, "--eps", eps, "--space", "pixel", "--n", 4, *(("--step", step) if step else ()))
        code, out, err = run(*args, capsys=capsys)
        assert code == 0 and ("note     a step of 0.01 is longer than the radius" in out) == told, (out, err)
        assert f"step={step or (0.00125 if eps == '1/255' else 0.01):g}" in out, out
    assert "eps / steps" in " ".join(run("attack", "--help", capsys=capsys)[1].replace("│", " ").split())


@pytest.mark.parametrize(
    ("argv", "work", "said"),
    [
        (("attack",), "sparsetrail.recipes.measure.strike", "begins anew"),
        (("audit",), "sparsetrail.recipes.audits.run", "continues"),
        (("theory", "audit"), "sparsetrail.cli.theory.run_audit", "begins anew"),
        (("trail",), "sparsetrail.cli.trails.trace", "continues"),
        (("ablate",), "sparsetrail.cli.trails.run_ablation", "continues"),
    ],
)
def test_whoever_interrupts_is_told_what_the_same_command_does(model, capsys, monkeypatch, argv, work, said):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, stop)
    threat = () if argv in (("trail",), ("ablate",)) else ("--eps", "8/255", "--space", "pixel")
    beside = {p.name for p in model.iterdir()}
    code, _, err = run(*argv, model, *threat, "--n", "5", capsys=capsys)
    assert code == 130 and f"interrupted; the same command {said}" in err
    assert {p.name for p in model.iterdir()} == beside  # nothing was done: no empty folder


def test_the_demo_of_the_theory_stops_when_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sparsetrail.cli.screen.Screen.stop", lambda self: True)
    code, _, err = run("theory", "demo", "--out", tmp_path / "a" / "b", capsys=capsys)
    assert code == 130 and "begins anew" in err and not (tmp_path / "a").exists()


def test_an_audit_replaces_no_result_of_another_question(model, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    net = load_model(model)
    shutil.copy(model / "model.safetensors", other)
    out = tmp_path / "out"
    monkeypatch.setattr(auditing, "CHECKS", {k: auditing.CHECKS[k] for k in ("S0", "G3")})
    monkeypatch.setattr(work.Work, "curves", lambda self, gradient: {})

    def audit(target, *more, eps="8/255"):
        flags = ("--eps", eps, "--space", "pixel", "--n", 20, "--budget", "quick", "--minutes", 0, "--out", out)
        return run("audit", target, *flags, *more, capsys=capsys)

    code, told, err = audit(model, "--json")
    assert code == 0, err
    (line,) = json.loads(told)["audits"]
    assert line["default_attack"].startswith("pgd") and not line["complete"]
    before = (out / "result.json").read_bytes()
    with torch.no_grad():
        changed = {k: v + 1e-3 if v.ndim > 1 else v for k, v in net.net.state_dict().items()}
    save_weights(other / "model.safetensors", changed, net.card)
    for argv, eps in ((other, "8/255"), (model, "4/255")):
        code, _, err = audit(argv, eps=eps)
        assert code == 4 and "which would be replaced; give another --out, or --fresh" in err, err

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsetrail.recipes.audits.run", stop)
    assert (
        audit(model)[0] == audit(model, "--eps", "4/255", "--space", "pixel")[0] == 130
    )  # all is told again, and more
    code, _, err = audit(other, "--fresh")
    assert code == 130 and "back to" in err and (out / "result.json").read_bytes() == before


def test_pages_of_the_theory_lie_apart_by_n_and_are_drawn_again(model, tmp_path, capsys, monkeypatch):
    from sparsetrail.cli import theory

    monkeypatch.setattr(theory, "run_audit", functools.partial(theory.run_audit, shares=(), probe=False))  # is slow
    for n in (1, 2):
        args = ("theory", "audit", model, "--eps", "8/255", "--space", "pixel", "--n", n, "--draws", 2)
        code, _, err = run(*args, capsys=capsys)
        assert code == 0, err
    pages = [model / "theory" / f"pixel-linf-8of255_n{n}" for n in (1, 2)]
    assert sorted((model / "theory").iterdir()) == pages
    code, out, err = run("report", pages[0], "--out", tmp_path / "again", capsys=capsys)
    assert code == 0 and out == f"report   {tmp_path / 'again' / 'theorems.html'}\n", err
    for name in ("theorems.html", "theorems.md", "theorems.json"):
        assert (tmp_path / "again" / name).read_bytes() == (pages[0] / name).read_bytes()
    code, _, err = run("report", pages[0], "--format", "pdf", "--out", tmp_path / "p", capsys=capsys)
    assert code == 4 and "expected all for theorems" in err
    for name in ("o.pdf", "o.html"):
        code, _, err = run("report", pages[0], "--out", tmp_path / name, capsys=capsys)
        assert code == 4 and f"give --out {tmp_path / 'o'}" in err and not (tmp_path / name).exists()


def test_a_wide_table_is_folded_and_nothing_is_cut_off(monkeypatch, capsys):
    from sparsetrail.cli.screen import show
    from sparsetrail.report.tables import Grid

    head = ("replaced", *(f"kind{i}, entries at" for i in range(9)))
    row = ("neuron: straight_through(1) and the reset in the graph", *(f"{i}1.5 % [1{i}.0, 2{i}.0]" for i in range(9)))
    for width in (80, 400):
        monkeypatch.setenv("COLUMNS", str(width))
        show(Grid("of a net", head, (row, row)))
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= width and "…" not in out
        assert set(" ".join((*head, *row)).split()) <= set(out.split())
        assert ("continued" in out) == (width == 80)


def test_things_are_counted_in_words(model, capsys):
    from sparsetrail.cli.flags import counted

    assert (counted(1, "channel"), counted(3, "channel")) == ("1 channel", "3 channels")
    if not torch.cuda.is_available():
        err = run("attack", model, "--threads", "1", capsys=capsys)[2]
        assert "device   cpu, 1 thread (no CUDA device)" in err


def test_a_damaged_model_is_refused(model, tmp_path, capsys):
    bad = tmp_path / "bad.safetensors"
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-9] ^= 1
    bad.write_bytes(raw)
    code, _, err = run("attack", bad, "--eps", "8/255", "--space", "pixel", capsys=capsys)
    assert code == 4 and "SHA-256" in err


def test_trail_and_report(model, tmp_path, capsys):
    code, out, err = run("trail", model, "--n", "8", "--per-step", "--out", tmp_path / "trail", capsys=capsys)
    assert code == 0, err
    assert "layer4.1.sn2" in out and "are created where they stand" in out
    files = {p.name for p in (tmp_path / "trail").iterdir()}
    assert {"result.json", "report.html", "report.md", "trail.csv", "trail.svg", "trail.pdf"} <= files
    assert {"trail_steps.csv", "trail_origins.csv"} <= files and "trail_examples.csv" not in files
    drawn = (tmp_path / "trail" / "trail.svg").read_text()
    assert "n=8" in drawn and "no threat" in drawn and "seed 0" in drawn and "sparsetrail 0" in drawn
    before = (tmp_path / "trail" / "result.json").read_bytes()
    code, out, _ = run("report", tmp_path / "trail", capsys=capsys)
    assert code == 0 and (tmp_path / "trail" / "result.json").read_bytes() == before
    facts = json.loads(run("trail", model, "--n", "8", "--out", tmp_path / "t2", "--json", capsys=capsys)[1])
    assert len(facts["rows"]) == 71 and facts["n"] == 8
    args = ("trail", model, "--example", "3", "--per-example", "--out", tmp_path / "t3")
    path = json.loads(run(*args, "--json", capsys=capsys)[1])
    assert path["n"] == 1 and len(path["rows"][0]["per_step"]) == 3
    assert all(r["per_example"] == [pytest.approx(r["zero"])] for r in path["rows"])
    assert (tmp_path / "t3" / "trail_examples.csv").is_file()
    code, out, err = run("report", tmp_path / "trail", "--format", "table", capsys=capsys)
    assert code == 0 and "Exactly zero gradient entries" in out and "No attack" not in out
    code, out, err = run("report", tmp_path / "trail", "--format", "svg", "--out", tmp_path / "drawn", capsys=capsys)
    drawn = [tmp_path / "drawn" / f"{name}.svg" for name in ("trail", "steps")]
    assert code == 0 and out == "".join(f"figure   {path}\n" for path in drawn), err
    code, _, err = run("report", tmp_path / "trail", "--format", "latex", "--out", tmp_path / "t4", capsys=capsys)
    assert code == 4 and "is printed, not written" in err and not (tmp_path / "t4").exists()
    beside = {p.name for p in model.iterdir()}
    assert run("trail", model, "--n", "4", "--detail", "plain", "--json", capsys=capsys)[0] == 0
    assert {p.name for p in model.iterdir()} - beside == {"trail-plain-n4"}  # a result of 64 images is not written over
    code, _, err = run("trail", model, "--example", "100000", capsys=capsys)
    assert code == 4 and "expected an image from 0 to" in err
    code, _, err = run("trail", model, model, "--n", "4", capsys=capsys)
    assert code == 4 and "different names" in err


def test_fresh_moves_aside_and_deletes_nothing(model, tmp_path, capsys):
    out = tmp_path / "run"
    args = (
        "train",
        "--data",
        "fashion-mnist-slice",
        "--images",
        "64",
        "--width",
        "0.125",
        "--T",
        "2",
        "--epochs",
        "1",
        "--out",
        out,
    )
    assert run(*args, capsys=capsys)[0] == 0
    code, _, err = run(*args, "--lr", "0.01", capsys=capsys)
    assert code == 4 and "--fresh" in err
    assert run(*args, "--lr", "0.01", "--fresh", capsys=capsys)[0] == 0
    assert (tmp_path / "run.old1" / "model.safetensors").exists() and (out / "model.safetensors").exists()
    (out / "models" / "inner").mkdir(parents=True)
    for busy in (out, out / "models" / "inner"):
        with alone(busy):
            code, _, err = run(*args, "--lr", "0.02", "--fresh", capsys=capsys)
        assert code == 4 and f"{busy}: another process is training here" in err and not (tmp_path / "run.old2").exists()


def test_ctrl_c_stops_in_order_and_the_same_command_continues(tmp_path):
    out = tmp_path / "run"
    script = "from sparsetrail.cli import main; main()"
    flags = ["--images", "300", "--width", "0.125", "--T", "2", "--epochs", "3", "--threads", "1"]
    command = [sys.executable, "-c", script, "train", "--data", "fashion-mnist-slice", *flags, "--out", str(out)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "events.jsonl").exists() or "step" not in (out / "events.jsonl").read_text():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "the same command continues" in err and "Traceback" not in err
    assert not (out / "last.safetensors").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "continuing at" in done.stderr, done.stderr


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_a_foreign_checkpoint_is_taken_in_without_running_it(model, tmp_path, capsys):
    net = load_model(model).net
    held = {"model_state_dict": {f"snn.{k}": v for k, v in net.state_dict().items()}, "epoch": 3, "val_loss": 0.5}
    torch.save(held, tmp_path / "best.pth")
    flags = ("--arch", "sew_resnet18", "--data", "fashion-mnist-slice", "--width", "0.125", "--T", "3")
    code, _, err = run("import", tmp_path / "best.pth", *flags, "--out", tmp_path / "in", capsys=capsys)
    assert code == 0, err
    taken = load_model(tmp_path / "in")
    assert all(torch.equal(v, taken.net.state_dict()[k]) for k, v in net.state_dict().items())
    code, out, err = run("attack", tmp_path / "in", "--eps", "8/255", "--space", "pixel", "--n", "10", capsys=capsys)
    assert code == 0, err
    code, _, err = run("import", tmp_path / "best.pth", *flags, "--out", tmp_path / "in", capsys=capsys)
    assert code == 4 and "--fresh" in err
    (tmp_path / "page.pth").write_text("<html>404</html>")
    before = (tmp_path / "in" / "model.safetensors").read_bytes()
    code, _, err = run("import", tmp_path / "page.pth", *flags, "--fresh", "--out", tmp_path / "in", capsys=capsys)
    assert code == 4 and "expected a PyTorch checkpoint" in err  # looked at before the old model is moved
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == before and not (tmp_path / "in.old1").exists()
    code, _, err = run("import", tmp_path / "best.pth", *flags, "--fresh", "--out", tmp_path / "in", capsys=capsys)
    assert code == 0 and (tmp_path / "in.old1" / "model.safetensors").read_bytes() == before
    assert load_model(tmp_path / "in").sha256 == taken.sha256
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "tmp"))]
    lif = ("--neuron", "lif", "--tau", "1.5", "--threshold", "0.8", "--out", tmp_path / "lif")
    assert run("import", tmp_path / "best.pth", *flags, *lif, capsys=capsys)[0] == 0
    spec = load_model(tmp_path / "lif").card["net"]["neuron"]
    assert (spec["kind"], spec["tau"], spec["threshold"], spec["detach_reset"]) == ("lif", 1.5, 0.8, True)
    code, _, err = run("import", tmp_path / "best.pth", *flags[:-4], "--out", tmp_path / "in2", capsys=capsys)
    assert code == 4 and "other shape" in err and not (tmp_path / "in2").exists()
    torch.save({"model_state_dict": net.state_dict(), "extra": Bomb()}, tmp_path / "bomb.pth")
    code, _, err = run("import", tmp_path / "bomb.pth", *flags, "--out", tmp_path / "in3", capsys=capsys)
    assert code == 4 and "--trust-pickle" in err and "the pickle ran" not in err
    assert "torch.save(net.state_dict(), ...)" in err
    for name, whole in (("net", net), ("bomb2", Bomb())):
        for old in (False, True):
            torch.save(whole, tmp_path / f"{name}.pth", _use_new_zipfile_serialization=not old)
            code, _, err = run("import", tmp_path / f"{name}.pth", *flags, "--out", tmp_path / "in3", capsys=capsys)
            said = type(net).__qualname__ if name == "net" else "builtin__.exec"
            assert code == 4 and "torch.save(net.state_dict(), ...)" in err and f"{said}, which only" in err, err
            assert "--trust-pickle" not in err and "the pickle ran" not in err
    (tmp_path / "page.pth").write_text("<html>404</html>")
    code, _, err = run("import", tmp_path / "page.pth", *flags, "--out", tmp_path / "in4", capsys=capsys)
    assert code == 4 and "expected a PyTorch checkpoint" in err, err
    assert not (tmp_path / "in3").exists() and not (tmp_path / "in4").exists()
    code, _, err = run("attack", tmp_path / "best.pth", "--eps", "8/255", "--space", "pixel", capsys=capsys)
    assert code == 4 and "sparsetrail import" in err


def test_what_an_imported_file_cannot_say_is_said_or_told(model, tmp_path, capsys):
    torch.save(load_model(model).net.state_dict(), tmp_path / "net.pth")
    shape = ("--data", "fashion-mnist-slice", "--width", "0.125", "--T", "3")
    args = ("import", tmp_path / "net.pth", "--arch", "sew_resnet18", *shape)
    code, out, err = run(*args, "--out", tmp_path / "a", capsys=capsys)
    assert code == 0, err
    assert "taken    normalise none, readout mean, norm batch, dropout 0" in out and "surrogate atan(2)" in out
    more = ("--normalise", "half", "--readout", "sum", "--out", tmp_path / "b")
    code, out, err = run(*args, *more, capsys=capsys)
    assert code == 0 and "normalise half, readout sum" in out, err
    net = load_model(tmp_path / "b").card["net"]
    assert (net["normalise"], net["readout"]) == ("half", "sum")
    plain = build(NetSpec(arch="vgg5", channels=1, width=0.125, steps=3, norm="none"))
    torch.save(plain.state_dict(), tmp_path / "vgg.pth")
    vgg = ("import", tmp_path / "vgg.pth", "--arch", "vgg5", *shape, "--norm", "none", "--dropout", "0.2")
    assert run(*vgg, "--out", tmp_path / "c", capsys=capsys)[0] == 0
    net = load_model(tmp_path / "c").card["net"]
    assert (net["norm"], net["dropout"]) == ("none", 0.2)


def test_numbers_that_an_import_would_lose_are_refused(model, tmp_path, capsys):
    held = load_model(model).net.state_dict()
    flags = ("--arch", "sew_resnet18", "--data", "fashion-mnist-slice", "--width", "0.125", "--T", "3")
    exact = {k: v.double() if v.is_floating_point() else v.int() for k, v in held.items()}
    third = {k: v.double() / 3 if v.ndim > 1 else v for k, v in held.items()}
    for name, tensors in (
        ("int8", {k: v.to(torch.int8) if v.ndim > 1 else v for k, v in held.items()}),
        ("complex64", {k: v.to(torch.complex64) if v.ndim > 1 else v for k, v in held.items()}),
        ("float64", third),
    ):
        torch.save(tensors, tmp_path / f"{name}.pth")
        code, _, err = run("import", tmp_path / f"{name}.pth", *flags, "--out", tmp_path / name, capsys=capsys)
        assert code == 4 and f"expected numbers that float32 holds, found {name} in conv1.weight" in err, (name, err)
        assert not (tmp_path / name / "model.safetensors").exists()
    for name, tensors in (("half", {k: v.half() if v.ndim > 1 else v for k, v in held.items()}), ("exact", exact)):
        torch.save(tensors, tmp_path / f"{name}.pth")
        assert run("import", tmp_path / f"{name}.pth", *flags, "--out", tmp_path / name, capsys=capsys)[0] == 0
        taken = load_model(tmp_path / name).net.state_dict()
        assert all(torch.equal(taken[k], v.to(held[k].dtype)) for k, v in tensors.items())


def test_a_training_split_can_be_added(tmp_path, capsys):
    for file, value in (("a.npz", 1), ("b.npz", 2)):
        np.savez(tmp_path / file, images=np.full((4, 8, 8), value, np.uint8), labels=np.arange(4))
    root = ("--root", tmp_path / "root")
    code, out, _ = run("data", "add", tmp_path / "a.npz", "--name", "mine", *root, capsys=capsys)
    assert code == 0 and "mine/test: 4 images" in out and "taken as test" in out
    code, _, err = run("train", "--data", "mine", *root, "--out", tmp_path / "t", capsys=capsys)
    assert code == 4 and "data add PATH --name mine --split train" in err
    code, out, _ = run("data", "add", tmp_path / "b.npz", "--name", "mine", "--split", "train", *root, capsys=capsys)
    assert code == 0 and "mine/train: 4 images" in out


def test_doctor_and_data_list(tmp_path, capsys):
    code, out, _ = run("doctor", capsys=capsys)
    assert code == 0 and torch.__version__ in out
    facts = json.loads(run("doctor", "--json", capsys=capsys)[1])
    assert facts["torch"] == torch.__version__
    code, out, _ = run("data", "list", "--root", tmp_path, capsys=capsys)
    assert code == 0 and "fashion-mnist-slice" in out
    code, out, _ = run("data", "verify", "fashion-mnist-slice", "--root", tmp_path, capsys=capsys)
    assert code == 0 and out == "fashion-mnist-slice/train: ok\nfashion-mnist-slice/test: ok\n"
    code, _, err = run("data", "verify", "cifar11", "--root", tmp_path, capsys=capsys)
    assert code == 4 and "cifar11: expected some of fashion-mnist-slice" in err


def test_reproduce_without_data_says_how_to_get_it(tmp_path, capsys):
    code, _, err = run(
        "reproduce", "table3", "--scale", "smoke", "--root", tmp_path / "empty", "--out", tmp_path / "o", capsys=capsys
    )
    assert code == 4 and "data get cifar10" in err


def test_a_bug_of_ours_is_not_hidden():
    assert cli.exit_code(RuntimeError("x")) == 1 and cli.exit_code(KeyError("x")) == 1
    assert cli.exit_code(ValueError("x")) == 4
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a/state.safetensors")
    assert cli.exit_code(full) == 4 and "runs/a/state.safetensors" in str(full)
    assert cli.exit_code(OSError(errno.EIO, "x")) == 1


def test_a_second_task_of_the_same_name_has_a_clock_of_its_own(monkeypatch, capsys):
    from sparsetrail.cli import screen

    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    with screen.Screen() as shown:
        for start in (100.0, 1000.0):  # two audits in one command: ten checks each, ten seconds a check
            for done in range(11):
                now[0] = start + 10 * done
                shown.tick("checks", done, 10, "")
    left = [line.split()[-3] for line in capsys.readouterr().err.splitlines() if line.endswith("left")]
    assert left == ["60", "20", "60", "20"]


def test_a_device_that_only_pretends_is_refused(tmp_path, capsys):
    code, _, err = run(
        "train", "--data", "fashion-mnist-slice", "--device", "meta", "--out", tmp_path / "m", capsys=capsys
    )
    assert code == 4 and "expected auto, cpu, cuda" in err and not (tmp_path / "m").exists()


def test_the_package_is_a_command_too():
    run = subprocess.run([sys.executable, "-m", "sparsetrail", "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip().endswith(cli.__version__)


def test_a_log_says_that_a_long_step_is_still_at_work(monkeypatch, capsys):
    from sparsetrail.cli import screen

    monkeypatch.setattr(screen, "SILENCE", 0.05)
    with screen.Screen() as shown:
        shown.tick("attack", 3, 9, "pgd")
        for _ in range(200):
            if "still" in (said := capsys.readouterr().err):
                break
            time.sleep(0.02)
    assert "attack  3/9  still at work" in said
    capsys.readouterr()
    with screen.Screen(quiet=True) as quiet:
        quiet.tick("attack", 3, 9, "pgd")
        time.sleep(0.2)
    assert capsys.readouterr().err == ""  # nor does the one before speak on
