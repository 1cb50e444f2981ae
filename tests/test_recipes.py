"""Experiments: cells are kept and never mixed, quick runs whole, paper rows stay in their threat's column."""

from dataclasses import replace

import pytest
import torch

from sparsetrail import data
from sparsetrail.core import Linf
from sparsetrail.recipes import measure, paper
from sparsetrail.recipes.quick import QuickSpec, quick
from sparsetrail.report import claims, load, table, write
from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import NetSpec
from sparsetrail.training import TrainSpec

TINY = QuickSpec(images=96, epochs=1, width=0.125, steps=3, batch=16, attacked=12, traced=6)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    report, examples = quick(measure.Bench(out=out), TINY)
    return out, report, examples


def test_quick_from_end_to_end(done, tmp_path):
    _, report, examples = done
    combinations = {(r.victim, r.attack, r.threat.space, r.threat.eps) for r in report.runs}
    assert len(combinations) == len(report.runs) == 2 * 2 * 3
    assert {r.threat for r in report.runs} == {Linf(8 / 255, space="pixel"), Linf(6 / 255, space="encoded")}
    assert [t.rows[3].forced for t in report.trails] == [0.75, 0.0]
    assert report.trails[0].rows[3].zero >= 0.75
    assert all(len(r.clean) == 12 and r.mode == "eval" for r in report.runs)
    files = write(report, tmp_path, images=examples)
    page = files["html"].read_text()
    assert "8/255" in page and "6/255" in page and load(tmp_path) == report
    picture = {"clean": data.load("fashion-mnist-slice", "test").images[0, 0].numpy(), "label": "a", "predicted": "b"}
    write(report, tmp_path, images=[picture | {"adversarial": picture["clean"] // 2, "title": "t"}])
    page = files["html"].read_text()
    write(report, tmp_path)  # drawn again: the pictures stay
    assert files["html"].read_text().count("data:image/png") == page.count("data:image/png") > 0
    for e in examples:
        assert e["clean"].shape == e["adversarial"].shape == (28, 28) and e["predicted"] != e["label"]
        assert abs(e["clean"].astype(int) - e["adversarial"].astype(int)).max() <= 8


def test_the_same_command_computes_nothing_again(done, monkeypatch):
    out, report, _ = done
    for name in ("attack", "trail", "accuracy"):
        monkeypatch.setattr(measure, name, lambda *a, **k: pytest.fail("computed again"))
    again, _ = quick(measure.Bench(out=out), TINY)
    assert (again.runs, again.trails, again.models) == (report.runs, report.trails, report.models)


def test_a_changed_setting_is_a_new_cell_and_a_foreign_cell_is_refused(done, monkeypatch):
    out, _, _ = done
    bench = measure.Bench(out=out)
    subset = data.take(data.load("fashion-mnist-slice", "test"), 8, seed=0)
    model = measure.fit(bench, "max", NetSpec(channels=1, width=0.125, steps=3), phase(steps=3),
                        data.take(data.load("fashion-mnist-slice", "train"), 96, seed=0),
                        TrainSpec(epochs=1, batch=16))  # fmt: skip
    pixel = Linf(8 / 255, space="pixel")
    count = lambda: len(list((out / "cells").glob("*.json")))  # noqa: E731
    before = count()
    runs = [
        measure.strike(bench, model, "m", "pgd", pixel, subset, steps=2),
        measure.strike(bench, model, "m", "pgd", pixel, subset, steps=3),
        measure.strike(bench, model, "m", "pgd", pixel, subset, steps=2, backward="secant"),
        measure.strike(replace(bench, seed=1), model, "m", "pgd", pixel, subset, steps=2),
        measure.strike(bench, model, "m", "pgd", Linf(8 / 255, space="encoded"), subset, steps=2),
    ]
    assert count() == before + 5
    assert len({r.route for r in runs}) == 3  # identity, secant, and no encoder in encoded space
    assert measure.strike(bench, model, "m", "pgd", pixel, subset, steps=2) == runs[0] and count() == before + 5
    other = data.take(data.load("fashion-mnist-slice", "test"), 8, seed=1)
    measure.strike(bench, model, "m", "pgd", pixel, other, steps=2)
    assert count() == before + 6  # other data
    assert measure.strike(bench, model, "renamed", "pgd", pixel, subset, steps=2).victim == "renamed"
    flat, deep = (measure.follow(bench, model, "m", subset, per_step=p) for p in (False, True))
    assert flat.rows[0].per_step is None and len(deep.rows[0].per_step) == 3
    monkeypatch.setattr(measure, "__version__", "0.0.0")
    at = count()
    measure.strike(bench, model, "m", "pgd", pixel, subset, steps=2)
    assert count() == at + 1  # other code
    monkeypatch.undo()
    points = measure.adversarial(bench, runs[0], model, subset)
    assert points is not None and pixel.contains(points, data.pixels(subset.images), 0).all()
    encoded = Linf(8 / 255, space="encoded")
    (cell,) = (p for p in (out / "cells").glob("*.json") if '"eps": 0.03' in (t := p.read_text()) and "encoded" in t)
    for content, match in (
        (cell.read_text().replace('"seed": 0', '"seed": 99'), "found another"),
        ("[", "expected a cell"),
    ):
        cell.write_text(content)
        with pytest.raises(ValueError, match=match):
            measure.strike(bench, model, "m", "pgd", encoded, subset, steps=2)


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """Real pictures in the shape of CIFAR: the shipped slice in three channels of 32x32, for both names."""

    def fake(name, split="test", *, root=None):
        base = data.take(data.load("fashion-mnist-slice", split), 340, seed=0)
        images = torch.nn.functional.pad(base.images, (2, 2, 2, 2)).repeat(1, 3, 1, 1)
        classes = base.classes if name == "cifar10" else tuple(map(str, range(100)))
        return data.Dataset(name=name, split=split, images=images, labels=base.labels, classes=classes,
                            sha256=data.content_hash(images, base.labels), official=False)  # fmt: skip

    monkeypatch.setattr(paper, "load", fake)
    small = replace(paper.SCALES["smoke"], images=64, attacked=8, scored=8, traced=4)
    monkeypatch.setitem(paper.SCALES, "smoke", small)
    return measure.Bench(out=tmp_path / "out")


@pytest.mark.parametrize("figure", paper.FIGURES)
def test_every_figure_runs_and_stands_beside_the_published_value(fake_cifar, figure):
    report = paper.reproduce(fake_cifar, figure, "smoke")
    assert report.claims and all(c in claims() for c in report.claims)
    if figure.startswith("table"):
        threats = {(r.threat.space, r.threat.eps, r.mode) for r in report.runs}
        assert threats == {("pixel", 8 / 255, "eval"), ("encoded", 6 / 255, "eval"), ("encoded", 6 / 255, "train")}
        assert {c.conditions["attack"] for c in report.claims} == {"none", "fgsm", "pgd"}
        ours = [c for c in report.claims if c.conditions["available"] and c.conditions["attack"] != "none"]
        assert ours and all("6/255" in c.coded and "8/255" in c.stated for c in ours)
        assert any("Published (Luu 2025" in line and "SEW-ResNet18" in line for line in report.summary)
    else:
        assert {t.mode for t in report.trails} == {"eval", "train"}
    if figure == "table3":
        assert {m["name"].split()[1] for m in report.models} == {"max", "avg"}
        values = {(c.conditions["pool"], c.conditions["attack"]): c.value for c in report.claims}
        assert values["max", "pgd"] == 34.33 and values["avg", "pgd"] == 25.72
    if figure == "table1":
        assert any("SNN-RAT" in note for note in report.notes)  # rows that cannot be trained yet say so
        assert 28.08 in {c.value for c in report.claims}  # and stand there as published
    if report.runs:
        assert "SEW-ResNet18" in table(report, tablefmt="github")


def test_rows_of_the_paper():
    every = claims("table1")
    rows = paper.rows_of("table1", every, paper.RESNETS, ("cifar100",))
    assert [r.arch for r in rows] == [f"{f}_resnet{d}" for f in ("sew", "spiking") for d in (18, 34, 50)]
    assert {r.pool for r in rows} == {"max"}
    assert len(paper.rows_of("table3", claims("table3"), paper.RESNETS, ("cifar10", "cifar100"))) == 12
    sew = paper.net_spec(paper.Row("sew_resnet18", "max", "cifar10"), paper.SCALES["paper"], 10)
    spiking = paper.net_spec(paper.Row("spiking_resnet18", "max", "cifar10"), paper.SCALES["paper"], 10)
    assert sew.neuron.detach_reset and not spiking.neuron.detach_reset and sew.steps == 10 and sew.width == 1
    assert paper.SCALES["paper"].epochs == 100 and TrainSpec(epochs=100).batch == 16


def test_unknown_rows_and_scales_are_refused(tmp_path):
    bench = measure.Bench(out=tmp_path)
    for args, match in ((("table4", "smoke"), "table4"), (("table3", "huge"), "huge")):
        with pytest.raises(ValueError, match=match):
            paper.reproduce(bench, *args)
    with pytest.raises(ValueError, match="no row left"):
        paper.reproduce(bench, "table1", "smoke", datasets=("cifar10",))


def jobs(names=("one", "two", "three"), epochs=1):
    data_set = data.take(data.load("fashion-mnist-slice", "train"), 64, seed=0)
    net = NetSpec(channels=1, width=0.125, steps=3)
    return [
        (name, net, phase(steps=3), data_set, TrainSpec(epochs=epochs, batch=16, seed=i))
        for i, name in enumerate(names)
    ]


def test_models_trained_side_by_side_are_those_trained_in_turn(tmp_path):
    found = [
        measure.fit_all(measure.Bench(out=tmp_path / str(side)), jobs(), side_by_side=side) for side in (False, True)
    ]
    assert [m.sha256 for m in found[0]] == [m.sha256 for m in found[1]]
    assert len({m.sha256 for m in found[1]}) == 3


def test_one_failure_stops_the_others_at_a_step_from_which_they_go_on(tmp_path, monkeypatch):
    real, bench = measure.train, measure.Bench(out=tmp_path)

    def train(net, encode, data_set, spec, out, **more):
        if spec.seed == 1:
            raise ValueError("the second one breaks")
        return real(net, encode, data_set, spec, out, **more)

    monkeypatch.setattr(measure, "train", train)
    with pytest.raises(ValueError, match="the second one breaks"):
        measure.fit_all(bench, jobs(epochs=200), side_by_side=True)
    states = list(tmp_path.glob("models/*/state.safetensors"))
    assert len(states) == 2 and not list(tmp_path.glob("models/*/last.safetensors"))
