"""The sweep of designs: one thing changed at a time, counts by hand, a repeated command computes nothing."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lively import lively

from sparsetrail import data
from sparsetrail.attacks import pgd
from sparsetrail.cli import main
from sparsetrail.core import Linf, Rate, Report, Route, Run, Trail, TrailRow
from sparsetrail.models import Trained
from sparsetrail.recipes import design as recipe
from sparsetrail.recipes import measure
from sparsetrail.recipes.design import ATTACKS, SIZES, designs, sweep
from sparsetrail.recipes.targets import as_victim, ours
from sparsetrail.report import charts, figure, load, text_tables, write
from sparsetrail.report.charts.tradeoff import PANEL, _span
from sparsetrail.report.design_tables import (
    rank_correlation,
    tradeoff,
    tradeoff_csv,
    tradeoff_grid,
    tradeoff_sentences,
    undominated,
)
from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import NetSpec
from sparsetrail.snn.pools import POOLS

ONE, TWO = (Linf(e / 255, space="pixel") for e in (1, 2))


@pytest.mark.parametrize("scale", SIZES)
def test_every_design_differs_from_the_first_in_one_thing(scale):
    first, *others = designs(SIZES[scale], 3, 10)
    assert [d.net.pool for d in others if d.factor == "pool"] == list(POOLS[1:])
    for d in others:
        same = {
            "pool": lambda net: replace(net, pool="max"),
            "surrogate": lambda net: replace(net, neuron=first.net.neuron),
            "steps": lambda net: replace(net, steps=first.net.steps),
            "stem": lambda net: replace(net, stem="imagenet", pool="max"),
        }[d.factor](d.net)
        assert d.net != first.net and same == first.net
    assert len({d.name for d in (first, *others)}) == len(others) + 1
    assert [d.name for d in designs(SIZES[scale], 3, 10, ["stem"])] == ["max pool", "CIFAR stem"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("design")
    short = tuple(
        (name, route, knobs | {k: 2 for k in ("steps", "queries") if k in knobs}) for name, route, knobs in ATTACKS
    )
    args = ["design", "--data", "fashion-mnist-slice", "--scale", "smoke", "--only", "steps", "--eps",
            "8/255", "--seeds", "2", "--threads", "1", "--out", str(out)]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "ATTACKS", short)
        main(args)
        yield out, args


def test_a_sweep_from_end_to_end(swept, capsys, monkeypatch):
    out, args = swept
    report = load(out)
    points = tradeoff(report)
    assert [p.design for p in points] == ["max pool", "T=2"] * 2
    assert {p.victim for p in points} == {f"{p.design}, seed {s}" for p in points for s in (3407, 3408)}
    assert all(p.threat == Linf(8 / 255, space="pixel") and p.attacks == len(ATTACKS) for p in points)
    assert all(p.robust.n == 8 and p.clean.n == 16 and 0 < p.density <= 1 for p in points)
    files = {p.name for p in out.iterdir()}
    assert {"tradeoff.svg", "tradeoff.pdf", "tradeoff.csv", "report.html", "report.md", "result.json"} <= files
    drawn = (out / "tradeoff.svg").read_text()
    assert "n=8" in drawn and "L-infinity 8/255" in drawn and "seed 0" in drawn and "sparsetrail 0" in drawn
    page = (out / "report.html").read_text()
    assert "<h2>Trade-off</h2>" in page and '"tradeoff"' in page and '"trail-0"' not in page
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "250")
    main(args)
    for told in (page, (out / "report.md").read_text(), capsys.readouterr().out):
        assert "clean, n=16" in told and "worst case, n=8" in told and "different sets of images" in told
    for name in ("attack", "trail", "accuracy"):
        monkeypatch.setattr(measure, name, lambda *a, **k: pytest.fail("computed again"))
    capsys.readouterr()
    main([*args, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert len(told["points"]) == len(points) and load(out).runs == report.runs


def awake(name, seed, x):
    """A model whose every layer fires, as if it lay in a folder."""
    code = phase(steps=3)
    net = lively(NetSpec(width=0.125, channels=1, steps=3), code(x), seed=seed)
    card = {"encoder": {"name": code.name, "knobs": code.knobs}}
    return Trained(net=net, encode=code, card=card, path=Path(name) / "model.safetensors", sha256=name)


def test_routes_and_guides_arrive_and_are_cells_of_their_own(tmp_path):
    few = data.take(data.load("fashion-mnist-slice", "test"), 8, seed=0)
    x, bench, ball = data.pixels(few.images), measure.Bench(out=tmp_path), Linf(2 / 255, space="pixel")
    model, other = awake("m", 1, x), awake("other", 2, x)
    v, guide, route = as_victim(model, "m"), as_victim(other, "other"), (Route(neuron="triangle:1"),)
    y = v.scores(x).argmax(1)
    few, found = replace(few, labels=y), []
    by_other = {"guide": ours(other, "other")}
    for mine, theirs in (({}, {}), ({"route": route}, {"route": route}), (by_other, {"guide": guide})):
        run = measure.strike(bench, ours(model, "m"), "pgd", ball, few, steps=2, **mine)
        alone = measure.attack(pgd, v, ball, x, y, steps=2, keep=True, **theirs)
        assert run.route == alone.route and torch.equal(run.adversarial, alone.adversarial)
        assert measure.strike(bench, ours(model, "m"), "pgd", ball, few, steps=2, **mine) == run
        found.append(run)
    assert len(list((tmp_path / "cells").glob("*.json"))) == len({run.route for run in found}) == 3
    assert not any(torch.equal(found[0].adversarial, run.adversarial) for run in found[1:])


def test_a_sweep_that_cannot_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "load", lambda *a, **k: pytest.fail("looked for data"))
    bench = measure.Bench(out=tmp_path)
    for knobs, words in (
        ({"scale": "huge"}, "expected one of smoke, small, paper"),
        ({"factors": []}, "a factor, a radius and a seed"),
        ({"eps": ()}, "a factor, a radius and a seed"),
        ({"seeds": 0}, "got .* 0 seeds"),
    ):
        with pytest.raises(ValueError, match=words):
            sweep(bench, "cifar10", **knobs)


def made(*given, threats=(ONE,)):
    """A report of designs (name, factor, clean of 10, flags left by attack a, by attack b, zero share)."""
    cards, runs, trails = [], [], []
    for name, factor, clean, a, b, zero in given:
        cards.append({"name": name, "factor": factor, "clean": {"k": clean, "n": 10}})
        for threat in threats:
            for attack, flags in (("pgd", a), ("square", b)):
                robust = tuple(f == "1" for f in flags)
                runs.append(
                    Run(attack=attack, knobs={}, threat=threat, victim=name, route="own", mode="eval", data="d, n=4",
                        seed=0, clean=(True,) * len(robust), robust=robust, ties=0, forwards=1, backwards=1,
                        zero_gradient=0.0, dead_examples=0, nonfinite=0, trace=(), seconds=1.0)
                )  # fmt: skip
        rows = (
            TrailRow(op="a", kind="conv", depth=0, zero=zero, forced=0.0, norm=1.0, entries=300),
            TrailRow(op="b", kind="conv", depth=1, zero=0.0, forced=0.0, norm=1.0, entries=100),
        )
        trails.append(Trail(victim=name, mode="eval", data="d", n=4, steps=1, clean_accuracy=1.0, rows=rows))
    return Report(title="t", summary=(), models=tuple(cards), runs=tuple(runs), trails=tuple(trails), claims=(),
                  provenance={"seed": 0, "torch": "2", "sparsetrail": "0"})  # fmt: skip


THREE = (
    ("x", "pool", 9, "1100", "0110", 0.8),
    ("y", "pool", 7, "1110", "1111", 0.4),
    ("z", "stem", 6, "1110", "1011", 0.0),
)


def test_points_by_hand():
    x, y, z = tradeoff(made(*THREE))
    assert (x.robust, y.robust, z.robust) == (Rate(1, 4), Rate(3, 4), Rate(2, 4))  # images that survive both
    assert (x.clean, y.factor, z.factor) == (Rate(9, 10), "pool", "stem")
    assert (x.density, y.density, z.density) == (pytest.approx(0.4), pytest.approx(0.7), 1.0)
    assert [p.victim for p in undominated([x, y, z])] == ["y", "x"]
    (line,) = tradeoff_sentences([x, y, z])
    assert "clean and robust accuracy -0.50" in line and "not dominated: y; x." in line
    assert "density and robust accuracy +0.50" in line and "worst of 2 attacks, 3 networks" in line
    rows = list(csv.DictReader(io.StringIO(tradeoff_csv([x]))))
    assert rows[0]["robust_k"] == "1" and rows[0]["robust_n"] == "4" and float(rows[0]["density"]) == pytest.approx(0.4)
    assert tradeoff(replace(made(*THREE), models=())) == ()  # a report that is no sweep
    grid = tradeoff_grid([x, replace(y, clean=Rate(2, 4))])
    assert grid.head[2:4] == ("clean", "worst case, n=4") and [row[2][-5:] for row in grid.rows] == [" n=10", ", n=4"]
    assert "different sets" in grid.caption and "different" not in tradeoff_grid([replace(y, clean=Rate(2, 4))]).caption


def test_an_attack_that_fooled_nothing_is_not_the_strongest():
    report = made(("x", "pool", 9, "1111", "1111", 0.0), ("y", "pool", 9, "1111", "1101", 0.0))
    gone = tuple(replace(run, victim="z", clean=(False,) * 4, robust=(False,) * 4) for run in report.runs[:2])
    report = replace(report, runs=report.runs + gone, models=(*report.models, report.models[0] | {"name": "z"}))
    assert [p.strongest for p in tradeoff(report)] == ["none", "Square", "none"]


def test_two_threats_are_never_one_worst_case():
    points = tradeoff(made(*THREE, threats=(ONE, TWO)))
    assert [(p.victim, p.threat) for p in points] == [(n, t) for n in "xyz" for t in (ONE, TWO)]
    assert all(p.attacks == 2 for p in points) and len(tradeoff_sentences(points)) == 2


def test_rank_correlation():
    assert rank_correlation([(1, 10), (2, 20), (3, 15), (4, 40)]) == pytest.approx(0.8)
    assert rank_correlation([(1, 1), (1, 2), (2, 3)]) == pytest.approx(3**0.5 / 2)  # ties share a rank
    assert rank_correlation([(1, 1), (2, 1), (3, 1)]) is None and rank_correlation([(1, 1), (2, 2)]) is None


def test_the_plot_holds_intervals_both_ways_and_names_that_do_not_meet(tmp_path):
    report = made(*THREE, *((f"crowd {i}", "steps", 7, "1110", "1111", 0.1 * i) for i in range(5)))
    points = tradeoff(report)
    spec = charts.tradeoff_spec(points)
    (values,) = {json.dumps(layer["data"]["values"]) for layer in spec["layer"] if len(layer["data"]["values"]) == 8}
    rows = {v["network"]: v for v in json.loads(values)}
    lo, hi = Rate(1, 4).interval()
    assert (rows["x"]["robust_low"], rows["x"]["robust_high"]) == (pytest.approx(100 * lo), pytest.approx(100 * hi))
    assert rows["x"]["clean_accuracy"] == 90 and rows["x"]["density"] == pytest.approx(40)
    span = [_span([r.interval() for r in rs]) for rs in ([p.clean for p in points], [p.robust for p in points])]
    scale = [size / (b - a) for size, (a, b) in zip(PANEL, span, strict=True)]
    places = [[v[k] for k in ("name_x", "name_y", "line_x", "line_y", "clean_accuracy", "robust_accuracy")] for v in
              rows.values()]  # fmt: skip
    pixels = [[(v - span[i % 2][0]) * scale[i % 2] for i, v in enumerate(place)] for place in places]
    at = [(x, y, 5.4 * len(name)) for (x, y, *_), name in zip(pixels, rows, strict=True)]
    for i, (x, y, wide) in enumerate(at):
        for u, w, size in at[:i]:
            assert abs(y - w) > 11.9 or x + wide <= u + 0.1 or u + size <= x + 0.1
        assert x >= 0 and x + wide <= PANEL[0] and 6 <= y <= PANEL[1] - 6
        for *_, dot, height in pixels:  # no name lies on a dot
            assert dot < x - 5 or dot > x + wide + 5 or abs(height - y) > 11.9
        end, rise, dot, height = pixels[i][2:]
        led = (end, rise) != pytest.approx((dot, height))  # a line leads to a name that is not beside its dot
        assert led or (min(abs(x - dot), abs(x + wide - dot), abs(x + wide / 2 - dot)) < 14 and abs(y - height) < 21)
        assert not led or (x - 1 <= end <= x + wide + 5 and abs(rise - y) < 7)
    files = write(report, tmp_path)
    assert files["tradeoff"].name == "tradeoff.csv" and "## Trade-off" in files["md"].read_text()
    told = text_tables(report, "latex_booktabs")
    assert "Clean accuracy and worst case per image" in told and "Exactly zero gradient entries" not in told
    assert figure(report, tmp_path / "t.pdf", which="tradeoff").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="expected a report with a sweep of designs"):
        figure(replace(report, models=()), tmp_path / "t.pdf", which="tradeoff")
