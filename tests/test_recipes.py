"""Experiments: cells are kept and never mixed, quick runs whole, paper rows stay in their threat's column."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from sparsetrail import data
from sparsetrail.attacks.run import EOT
from sparsetrail.auditing import battery, work
from sparsetrail.auditing import run as auditing
from sparsetrail.cli import attacks, main
from sparsetrail.core import L2, Audit, Linf, Rate, Report, Run
from sparsetrail.models import compact, load_model
from sparsetrail.recipes import audits, cells, measure, paper, systems
from sparsetrail.recipes.notes import caveats
from sparsetrail.recipes.quick import QuickSpec, quick
from sparsetrail.recipes.rows import net_spec
from sparsetrail.recipes.targets import ours, target_at
from sparsetrail.report import claims, load, table, text_tables, write
from sparsetrail.report.comparison import comparisons
from sparsetrail.report.seeds import spread
from sparsetrail.report.tables import accuracy
from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import RESNETS, NetSpec
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
        measure.strike(bench, ours(model, "m"), "pgd", pixel, subset, steps=2),
        measure.strike(bench, ours(model, "m"), "pgd", pixel, subset, steps=3),
        measure.strike(bench, target_at(str(model.path), backward="secant"), "pgd", pixel, subset, steps=2),
        measure.strike(replace(bench, seed=1), ours(model, "m"), "pgd", pixel, subset, steps=2),
        measure.strike(bench, ours(model, "m"), "pgd", Linf(8 / 255, space="encoded"), subset, steps=2),
    ]
    assert count() == before + 5
    assert len({r.route for r in runs}) == 3  # identity, secant, and no encoder in encoded space
    assert measure.strike(bench, ours(model, "m"), "pgd", pixel, subset, steps=2) == runs[0] and count() == before + 5
    other = data.take(data.load("fashion-mnist-slice", "test"), 8, seed=1)
    measure.strike(bench, ours(model, "m"), "pgd", pixel, other, steps=2)
    assert count() == before + 6  # other data
    assert measure.strike(bench, ours(model, "renamed"), "pgd", pixel, subset, steps=2).victim == "renamed"
    flat, deep = (measure.follow(bench, ours(model, "m"), subset, per_step=p) for p in (False, True))
    assert flat.rows[0].per_step is None and len(deep.rows[0].per_step) == 3
    monkeypatch.setattr(measure, "__version__", "0.0.0")
    at = count()
    measure.strike(bench, ours(model, "m"), "pgd", pixel, subset, steps=2)
    assert count() == at + 1  # other code
    monkeypatch.undo()
    points = measure.strike(bench, ours(model, "m"), "pgd", pixel, subset, steps=2).adversarial  # of the kept cell
    assert points is not None and pixel.contains(points, data.pixels(subset.images), 0).all()
    encoded = Linf(8 / 255, space="encoded")
    (cell,) = (p for p in (out / "cells").glob("*.json") if '"eps": 0.03' in (t := p.read_text()) and "encoded" in t)
    for content, match in (
        (cell.read_text().replace('"seed": 0', '"seed": 99'), "found another"),
        ("[", "expected a cell"),
    ):
        cell.write_text(content)
        with pytest.raises(ValueError, match=match):
            measure.strike(bench, ours(model, "m"), "pgd", encoded, subset, steps=2)


def test_a_report_names_the_other_versions_that_made_what_it_kept(tmp_path, monkeypatch):
    bench = measure.Bench(out=tmp_path)
    subset = data.take(data.load("fashion-mnist-slice", "test"), 8, seed=0)
    model = measure.fit(bench, "max", NetSpec(channels=1, width=0.125, steps=2), phase(steps=2),
                        data.take(data.load("fashion-mnist-slice", "train"), 32, seed=0),
                        TrainSpec(epochs=1, batch=16))  # fmt: skip
    told = lambda: measure.provenance(bench, 0.0, "c").get("kept from before, made by")  # noqa: E731
    strike = lambda steps: measure.strike(  # noqa: E731
        bench, ours(model, "m"), "pgd", Linf(8 / 255, space="pixel"), subset, steps=steps
    )
    now = lambda name: [monkeypatch.setattr(m, "version", lambda: name) for m in (cells, measure)]  # noqa: E731
    now("1 at abc")
    first = strike(4)
    assert told() is None and strike(4) == first and told() is None
    now("1 at def")
    bench = replace(bench, kept=set())
    strike(5)
    assert told() is None and strike(4) == first and told() == "1 at abc"
    for cell in (bench.out / "cells").glob("*.json"):
        held = json.loads(cell.read_text())
        cell.write_text(json.dumps({k: held[k] for k in ("spec", "result")}))  # as older ones are
    bench = replace(bench, kept=set())
    strike(5)
    assert told() == f"{cells.__version__}, commit not noted"


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
    few = replace(paper.SCALES["smoke"].systems, images=64, audited=4, width=0.0625)
    small = replace(paper.SCALES["smoke"], images=64, attacked=8, scored=8, traced=4, systems=few)
    monkeypatch.setitem(paper.SCALES, "smoke", small)
    return measure.Bench(out=tmp_path / "out")


@pytest.mark.parametrize("figure", [f for f in paper.FIGURES if f != "threats"])
def test_every_figure_runs_and_stands_beside_the_published_value(fake_cifar, figure):
    report = paper.reproduce(fake_cifar, figure, "smoke", rows=("sew_resnet18",))
    assert report.claims and all(c in claims() for c in report.claims)
    if figure.startswith("table"):
        threats = {(r.threat.space, r.threat.eps, r.mode) for r in report.runs}
        assert threats == {("pixel", 8 / 255, "eval"), ("encoded", 6 / 255, "eval"), ("encoded", 6 / 255, "train")}
        assert {c.conditions["attack"] for c in report.claims} == {"none", "fgsm", "pgd"}
        ours = [c for c in report.claims if c.conditions["attack"] != "none"]
        assert ours and all("6/255" in c.coded and "8/255" in c.stated for c in ours)
        assert any("Published (Luu 2025" in line and "SEW-ResNet18" in line for line in report.summary)
    else:
        assert {t.mode for t in report.trails} == {"eval", "train"}
    if figure == "table3":
        assert {m["name"].split()[1] for m in report.models} == {"max", "avg"}
        values = {(c.conditions["pool"], c.conditions["attack"]): c.value for c in report.claims}
        assert values["max", "pgd"] == 34.33 and values["avg", "pgd"] == 25.72
    if figure == "table1":
        assert any("Not run here" in note and "SNN-RAT WRN-16" in note for note in report.notes)
        assert 20.81 in {c.value for c in report.claims}  # CIFAR-100, whatever we trained on
    if report.runs:
        assert "SEW-ResNet18" in table(report, tablefmt="github")


def test_rows_of_several_seeds_are_networks_of_their_own_and_their_spread_is_told(fake_cifar, tmp_path):
    alone = paper.reproduce(fake_cifar, "table3", "smoke", rows=("sew_resnet18",))
    report = paper.reproduce(fake_cifar, "table3", "smoke", rows=("sew_resnet18",), seeds=2)
    assert [m["name"] for m in report.models] == [
        f"SEW-ResNet18 {pool} pool, seed {seed}, cifar10" for seed in (3407, 3408) for pool in ("max", "avg")
    ]
    weights = [m["weights sha256"] for m in report.models]
    assert len(set(weights)) == 4 and weights[:2] == [m["weights sha256"] for m in alone.models]  # not trained again
    assert all(f"seed {m['training seed']}," in m["training"] for m in report.models)
    assert spread(alone) is None
    grid = spread(report)
    assert [row[0] for row in grid.rows] == [
        "SEW-ResNet18 max pool, cifar10", "SEW-ResNet18 avg pool, cifar10", "max minus avg, points",
        "max above avg, seeds",
    ]  # fmt: skip
    assert grid.flat_head[1:] == accuracy(report.runs).flat_head[1:]
    place = grid.flat_head.index("PGD-7, encoded 6/255, eval mode")
    found = {r.victim: 100 * r.accuracy.value for r in report.runs
             if r.attack == "pgd" and (r.threat.space, r.mode) == ("encoded", "eval")}  # fmt: skip
    for row, pool in zip(grid.rows, ("max", "avg"), strict=False):
        a, b = (found[f"SEW-ResNet18 {pool} pool, seed {seed}, cifar10"] for seed in (3407, 3408))
        assert row[place] == f"{(a + b) / 2:.1f} % ({min(a, b):.1f} to {max(a, b):.1f}), 2"
    folder = tmp_path / "page"
    write(report, folder)
    for text in ((folder / "report.md").read_text(), (folder / "report.html").read_text()):
        assert "Over training seeds" in text and "max minus avg, points" in text
    assert "max above avg" in text_tables(report, "github")
    assert sum("over training seeds" in s for s in report.summary) == 3 and not any(
        "seed 34" in s for s in report.summary
    )
    assert {c.row for c in paper.beside(report, "table2").claims} == {"SEW-ResNet18"}
    for wrong, match in (({"seeds": 0}, "at least 1"), ({"seeds": 2, "models": tmp_path}, "1 of trained")):
        with pytest.raises(ValueError, match=match):
            paper.reproduce(fake_cifar, "table3", "smoke", **wrong)


def test_weight_decay_of_the_published_code_makes_networks_of_their_own(fake_cifar, tmp_path):
    alone = paper.reproduce(fake_cifar, "table2", "smoke", rows=("sew_resnet18",))
    report = paper.reproduce(fake_cifar, "table2", "smoke", rows=("sew_resnet18", "rat_wrn16"), weight_decay=0.1)
    system, ours = report.models
    assert ours["name"] == "SEW-ResNet18 max pool, weight decay 0.1, cifar10"
    assert "weight decay 0.1," in ours["training"]
    assert ours["weights sha256"] != alone.models[0]["weights sha256"]
    assert system["name"] == "SNN-RAT WRN-16-4, cifar10" and "weight decay 0," in system["training"]  # its source's
    assert {c.value for c in report.claims} >= {c.value for c in alone.claims}  # beside the same published figures
    for page, words in (
        (alone, "without its code's weight decay of 1e-3"),
        (report, "with a weight decay of 0.1"),
    ):
        assert any(f"trained {words}" in note for note in page.notes)
    assert {c.row for c in paper.beside(report, "table1").claims} == {"SEW-ResNet18", "SNN-RAT WRN-16"}
    write(report, tmp_path / "page")
    assert "SEW-ResNet18 max pool, weight decay 0.1, cifar10" in (tmp_path / "page" / "report.md").read_text()
    with pytest.raises(ValueError, match="expected none beside trained `models`"):
        paper.reproduce(fake_cifar, "table3", "smoke", weight_decay=1e-3, models=tmp_path)
    with pytest.raises(ValueError, match="weight_decay: expected a ResNet among the rows"):
        paper.reproduce(fake_cifar, "table2", "smoke", rows=("rat_wrn16",), weight_decay=1e-3)
    with pytest.raises(ValueError, match="weight_decay: expected 0 or a finite number"):
        paper.reproduce(fake_cifar, "table3", "smoke", rows=("sew_resnet18",), weight_decay=-1.0)


def test_compared_systems_alone_have_no_seeds(fake_cifar):
    with pytest.raises(ValueError, match="expected a ResNet among the rows"):
        paper.reproduce(fake_cifar, "table2", "smoke", rows=("rat_vgg11",), seeds=2)


def test_a_compared_system_is_trained_attacked_audited_and_kept_in_its_own_columns(fake_cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(paper.audits, "run", judged)  # tests of the audit are elsewhere, and slow
    report = paper.reproduce(fake_cifar, "table2", "smoke", rows=("sew_resnet18", "rat_wrn16"))
    rat, sew = names = [m["name"] for m in report.models]
    assert names == ["SNN-RAT WRN-16-4, cifar10", "SEW-ResNet18 max pool, cifar10"]
    threats = {(r.threat.space, r.threat.eps, r.mode) for r in report.runs if r.victim == rat}
    assert threats == {("pixel", 8 / 255, "eval")}
    (audit,) = report.audits
    assert audit.victim == rat and audit.threat == Linf(8 / 255, space="pixel") and audit.budget == "quick"
    assert (audit.n, audit.card["folder"]) == (4, "cifar10-rat_wrn16")
    assert any(line.startswith(f"{rat}: ") and "From its published figure it is apart" in line
               for line in report.summary)  # fmt: skip
    assert any(note.startswith(f"{rat}: open in its source") for note in report.notes)
    assert [m.get("defence") for m in report.models] == ["snn_rat", None]
    assert "strength 0.004" in report.models[0]["defence settings"]
    beside = comparisons(report)
    assert {line[0] for c in beside for line in c.grid.rows} == {"SNN-RAT WRN-16", "SEW-ResNet18"}
    for c in beside:
        if any(line[0] == "SNN-RAT WRN-16" for line in c.grid.rows):
            assert "6/255" not in c.coded and "encoded" not in " ".join(c.grid.flat_head)
    files = write(report, tmp_path)
    assert load(tmp_path) == report and "SNN-RAT" in files["html"].read_text()
    monkeypatch.setattr(systems, "fit", refuse_training(measure.fit))
    monkeypatch.setattr(paper, "strike", refuse_training(measure.strike))
    again = paper.reproduce(fake_cifar, "table1", "smoke", rows=("rat_wrn16",))
    assert again.runs == tuple(r for r in report.runs if r.victim == rat)  # tables share what was measured
    assert {c.dataset for c in again.claims} == {"CIFAR-100"}  # where it was published, whatever we trained on


def judged(bench, what, threats, images, *, budget, guides=()):
    """The audit of a target as a report, without attacks: nothing stands but the first image."""
    n = len(images.labels)
    first = (True,) + (False,) * (n - 1)
    found = [
        Audit(
            victim=what.name, card={"folder": bench.out.name, "guides": [g.name for g in guides]}, threat=threat,
            data="d", indices=tuple(range(n)), clean=(True,) * n, default=first, worst=first,
            broken_by=(None,) + ("pgd",) * (n - 1), runs=(), findings=(), curves={}, verdict="supported",
            reason="nothing rang", claim=None, claim_source="", default_attack="pgd", budget=budget, complete=True,
            seconds=1.0, provenance={},
        )
        for threat in threats
    ]  # fmt: skip
    return replace(EMPTY, audits=tuple(found)), []


def test_a_network_under_every_threat_trained_here_or_before(fake_cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper.audits, "run", judged)
    report = paper.reproduce(fake_cifar, "threats", "smoke", n=6)
    names = ["SEW-ResNet18 max pool, cifar10", "SEW-ResNet18 avg pool, cifar10"]
    assert [m["name"] for m in report.models] == names and {r.n for r in report.runs} == {6}
    for name in names:
        found = sorted((r.threat.space, round(r.threat.eps * 255), r.mode) for r in report.runs if r.victim == name)
        once = [("encoded", 6, "eval"), ("encoded", 8, "eval"), ("pixel", 8, "eval")]
        assert found == sorted(once * 3 + [("encoded", 6, "train")] * 2)
        held = [a for a in report.audits if a.victim == name]
        assert [(a.threat.space, a.n) for a in held] == [("pixel", 6), ("encoded", 6)]
        other = next(n for n in ("max", "avg") if f"{n} pool" not in name)
        assert held[0].card["guides"] == [f"cifar10-sew_resnet18-{other}"]
        assert sum(line.startswith(f"{name}: supported, ") for line in report.summary) == 2
    kept = tmp_path / "kept"
    for pool in ("max", "avg"):
        model = load_model(fake_cifar.out / "models" / f"cifar10-sew_resnet18-{pool}")
        small = compact(model, str(kept / f"sew_resnet18-{pool}" / "model.safetensors"))
        weights = zip(small.net.parameters(), model.net.parameters(), strict=True)
        assert all(torch.equal(a, b.bfloat16().float() if b.ndim > 1 else b) for a, b in weights)
        assert small.card["compact"] == {"type": "bf16", "of": model.sha256} and small.sha256 != model.sha256
        assert small.path.stat().st_size < 0.6 * model.path.stat().st_size
    with pytest.raises(ValueError, match="already there"):
        compact(model, small.path)
    monkeypatch.setattr(paper, "fit_all", refuse_training(measure.fit))
    again = paper.reproduce(replace(fake_cifar, out=tmp_path / "other"), "threats", "smoke", n=6, models=kept)
    assert [m["weights sha256"] for m in again.models] != [m["weights sha256"] for m in report.models]
    assert any("trained before" in note for note in again.notes)
    write(again, tmp_path / "records" / "a" / "written")
    (tmp_path / "records" / "a" / "written" / "result.json").rename(tmp_path / "records" / "a" / "threats.json")
    show = ["--from-records", "--records", str(tmp_path / "records")]
    main(["reproduce", "threats", *show])
    shown = capsys.readouterr().out
    assert "measured by" in shown and "SEW-ResNet18 avg pool" in shown and "n=6" in shown
    told = [c["clean test accuracy"] for c in again.models]
    assert all(f"{name}: {clean}" in shown for name, clean in zip(names, told, strict=True)) and "n=6 " not in told[0]
    main(["reproduce", "threats", *show, "--json"])
    (brief,) = json.loads(capsys.readouterr().out).values()
    assert brief["clean_test_accuracy"] == dict(zip(names, told, strict=True))
    assert "measured anew" not in shown
    later = tmp_path / "records" / "b"
    later.mkdir()
    (later / "threats.json").write_bytes((tmp_path / "records" / "a" / "threats.json").read_bytes())
    main(["reproduce", "threats", *show])
    shown = capsys.readouterr().out
    assert shown.count("measured anew") == len(names) and f"measured anew  {names[0]}: {later}" in shown
    (later / "threats.json").unlink()
    later.rmdir()
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "table1", *show])
    assert stop.value.code == 4 and "there are records of" not in capsys.readouterr().out
    (tmp_path / "records" / "a" / "threats.json").rename(tmp_path / "records" / "a" / "table2.json")
    main(["reproduce", "table1", *show])
    shown = " ".join(capsys.readouterr().out.split())
    assert "no record of table1; of the same models, those of table2" in shown
    assert "Table 1): SEW-ResNet18, max pool, CIFAR-100: fgsm" in shown and "Table 2)" not in shown
    other = paper.beside(again, "table1")
    assert other.runs == again.runs and {c.figure for c in other.claims} == {"table1"}
    (kept / "sew_resnet18-max" / "model.safetensors").unlink()
    (kept / "sew_resnet18-avg" / "model.safetensors").rename(kept / "sew_resnet18-max" / "model.safetensors")
    with pytest.raises(ValueError, match=r"with max pool .* found sew_resnet18 with avg pool"):
        paper.reproduce(fake_cifar, "threats", "smoke", models=kept)
    with pytest.raises(ValueError, match="n: expected"):
        paper.reproduce(fake_cifar, "threats", "smoke", n=0)


def test_hire_is_attacked_at_its_own_radius_too_and_random_codes_on_fewer_images_over_draws(fake_cifar, monkeypatch):
    seen = []

    def strike(bench, what, attack, threat, images):
        seen.append((what.name, attack, threat.eps, len(images.labels)))
        return NOTHING

    monkeypatch.setattr(paper, "strike", strike)
    monkeypatch.setattr(paper.audits, "run", lambda *a, **k: (replace(EMPTY), []))
    test_set = paper.load("cifar10")
    few, sizes = data.take(paper.load("cifar10", "train"), 20, seed=0), {"width": 0.0625, "steps": 4}
    hire = systems.train_system(
        fake_cifar, "hire_vgg11", few, epochs=1, twin_epochs=1, calibrate=40, batch=16, **sizes
    )  # fmt: skip
    coded = systems.SYSTEMS["discretised_vgg11"]  # without its conversion
    spec = TrainSpec(epochs=1, batch=16, validation=0.0)
    rated = measure.fit(fake_cifar, "rated", coded.net(few, **sizes), coded.encoder(4), few, spec)
    size = replace(paper.SCALES["smoke"].systems, audited=7, audited_random=5)
    for name, model in (("hire_vgg11", hire), ("discretised_vgg11", rated)):
        paper._judge(fake_cifar, paper.Row(name, "", "cifar10"), model, size, test_set)
    hire, coded = ([s[1:] for s in seen if s[0].startswith(n)] for n in ("HIRE", "Input"))
    assert {(a, e) for a, e, *_ in hire} == {(a, 8 / 255) for a in ("noise", "fgsm", "pgd")} | {
        ("fgsm", 0.031), ("pgd", 0.031)
    }  # fmt: skip
    assert {n for *_, n in hire} == {7} and {n for *_, n in coded} == {5}
    assert measure.strike(fake_cifar, ours(rated, "rated"), "fgsm", paper.TEXT, few).eot == EOT
    assert measure.strike(fake_cifar, ours(rated, "rated"), "fgsm", paper.TEXT, few, eot=2).eot == 2
    with pytest.raises(ValueError, match=r"box -1\.\.1"):  # its code is signed
        measure.strike(fake_cifar, ours(rated, "rated"), "pgd", Linf(8 / 255, space="encoded"), few)
    with pytest.raises(ValueError, match=r"box -1\.\.1"):
        measure.strike_as_published(fake_cifar, rated, "rated", few)
    started = load_model(fake_cifar.out / "models" / "cifar10-hire_vgg11").card
    converted = load_model(fake_cifar.out / "models" / "cifar10-hire_vgg11" / "converted")
    assert started["start"]["sha256"] == converted.sha256
    assert "converted from" in measure.card(converted, "c", Rate(1, 2), test_set)["trained"]


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_every_system_is_trained_and_taken_again(tmp_path, name):
    few = data.take(data.load("fashion-mnist-slice", "train"), 40, seed=0)
    few = replace(few, images=torch.nn.functional.pad(few.images, (2, 2, 2, 2)))  # 32x32, as a VGG wants
    has_twin = systems.SYSTEMS[name].twin is not None
    how = {"epochs": 1, "batch": 16, "width": 0.0625, "steps": 4}
    how |= {"twin_epochs": 1, "calibrate": 40} if has_twin else {}
    bench = measure.Bench(out=tmp_path)
    trained = systems.train_system(bench, name, few, **how)
    net = systems.SYSTEMS[name].net(few, width=0.0625, steps=4)
    assert trained.card["net"] == json.loads(json.dumps(asdict(net)))
    assert ("start" in trained.card) == has_twin
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert systems.train_system(bench, name, few, **how).sha256 == trained.sha256
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before


@pytest.mark.parametrize("figure", ["fig1", "fig3"])
def test_a_trail_of_another_network_than_the_figures_is_refused(tmp_path, figure):
    bench = measure.Bench(out=tmp_path / "out")
    for more, told in (
        ({"rows": ("sew_resnet34",)}, "is the trail of sew_resnet18, got sew_resnet34"),
        ({"datasets": ("cifar10", "cifar100")}, "is one trail, on one image set"),
    ):
        with pytest.raises(ValueError, match=told):
            paper.reproduce(bench, figure, "smoke", **more)
    assert not (tmp_path / "out").exists()


def test_settings_that_are_no_length_are_no_255ths():
    told = measure.told({"eps": 8 / 255, "step": 2 / 255, "temperature": 1.0, "rho": 0.5, "steps": 3, "start": "none"})
    assert told == "eps 8/255, step 2/255, temperature 1, rho 0.5, steps 3, start none"
    assert measure.told({"eps": 0.0}) == "eps 0"


def test_thresholds_are_not_read_off_the_images_held_out(monkeypatch):
    train_set, read = data.load("fashion-mnist-slice", "train"), {}
    monkeypatch.setattr(systems, "fit", lambda *a, **k: None)

    def convert(_twin, _net, _encode, given, *_, seed, **__):
        read.update(of=given, seed=seed)
        raise StopIteration

    monkeypatch.setattr(systems, "convert", convert)
    bench = measure.Bench(out=data.cache_root(None) / "never")
    for seed, validation in ((None, None), (7, 0.2), (7, 0.0)):
        with pytest.raises(StopIteration):
            systems.train_system(bench, "hire_vgg11", train_set, seed=seed, validation=validation)
        share = 0.1 if validation is None else validation
        some = data.take(read["of"], 512, seed=read["seed"])
        assert len(read["of"]) == round((1 - share) * len(train_set)) and len(some) == 512
        if share:
            _, held_out = data.split_validation(train_set, share, 42 if seed is None else seed)
            kept = {x.numpy().tobytes() for x in held_out.images}
            assert not any(x.numpy().tobytes() in kept for x in some.images)


NOTHING = Run(
    attack="pgd", knobs={}, threat=Linf(8 / 255, space="pixel"), victim="v", route="", mode="eval", data="d", seed=0,
    clean=(True,), robust=(True,), ties=0, forwards=0, backwards=0, zero_gradient=None, dead_examples=0, nonfinite=0,
    trace=(), seconds=0.0,
)  # fmt: skip
EMPTY = Report(title="", summary=(), models=(), runs=(), trails=(), claims=(), provenance={})


def refuse_training(real):
    """Everything is there already: nothing may be trained or attacked again."""

    def wrapped(bench, *args, **knobs):
        def halt():
            raise AssertionError("computed again")

        return (real or measure.fit)(replace(bench, stop=halt), *args, **knobs)

    return wrapped


def test_rows_of_the_paper():
    every = claims("table1")
    rows = paper.rows_of("table1", every, RESNETS, ("cifar100",))
    assert [r.arch for r in rows] == [f"{f}_resnet{d}" for f in ("sew", "spiking") for d in (18, 34, 50)]
    assert {r.pool for r in rows} == {"max"}
    everything = [r.arch for r in paper.rows_of("table2", claims("table2"), paper.ROWS, ("cifar10",))]
    assert sorted(everything) == sorted(
        {*systems.SYSTEMS, "sew_resnet18", "sew_resnet34", "sew_resnet50"}
    )  # also those no row is about
    assert len(paper.rows_of("table3", claims("table3"), paper.ROWS, ("cifar10", "cifar100"))) == 12
    asked = ("spiking_resnet18",)  # no published figure, run all the same where somebody asks for it
    for figure in ("table3", "threats"):
        rows = paper.rows_of(figure, claims("table3"), asked, ("cifar10",), asked)
        assert [(r.arch, r.pool) for r in rows] == [("spiking_resnet18", "max"), ("spiking_resnet18", "avg")]
    sew = net_spec(paper.Row("sew_resnet18", "max", "cifar10"), paper.SCALES["paper"], 10)
    spiking = net_spec(paper.Row("spiking_resnet18", "max", "cifar10"), paper.SCALES["paper"], 10)
    assert sew.neuron.detach_reset and not spiking.neuron.detach_reset and sew.steps == 10 and sew.width == 1
    assert paper.SCALES["paper"].epochs == 100 and TrainSpec(epochs=100).batch == 16


def test_systems_are_as_their_sources_have_them():
    cifar = replace(data.take(data.load("fashion-mnist-slice", "test"), 2, seed=0), name="cifar10")
    cifar = replace(cifar, images=torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    for name, s in systems.SYSTEMS.items():
        net, seams = s.net(cifar), s.seams()
        if seams.check is not None:
            seams.check(net, s.encoder(net.steps), s.train)
        told = systems.facts(name)
        assert told["still apart from its published figure"] and told["open in its source"], name
        assert net.normalise == ("none" if s.signed_poisson else "cifar10") and s.train.schedule == "cosine"
    deep, flat = systems.SYSTEMS["hire_vgg11"], systems.SYSTEMS["hire_vgg5"]
    assert replace(flat, arch="vgg11", title=deep.title, open=deep.open, apart=deep.apart) == deep
    assert flat.open.startswith(deep.open) and flat.net(cifar).arch == "vgg5"
    rat = systems.SYSTEMS["rat_vgg11"]
    assert rat.net(cifar).steps == 8 and rat.train.weight_decay == 0 and rat.train.epochs == 200
    assert rat.seams().knobs["eps"] == 2 / 255 and systems.SYSTEMS["vanilla_vgg11"].train.weight_decay == 5e-4
    with pytest.raises(ValueError, match="expected settings among attack, gradient"):
        rat.seams({"epsilon": 1})
    with pytest.raises(ValueError, match="has no defence"):
        systems.SYSTEMS["vanilla_vgg11"].seams({"eps": 1})
    bench = measure.Bench(out=data.cache_root(None) / "never")
    with pytest.raises(ValueError, match="expected one of vanilla_vgg11"):
        systems.train_system(bench, "rat", cifar)
    few = replace(cifar, images=torch.zeros(200, 3, 32, 32, dtype=torch.uint8), labels=torch.zeros(200).long())
    for name, how, match in (
        ("rat_vgg11", {"twin_epochs": 3}, "has no twin"),
        ("rat_vgg11", {"epochs": 0}, "epochs: expected at least 1, got 0"),
        ("rat_vgg11", {"batch": 0}, "batch: expected at least 1 image, got 0"),
        ("hire_vgg11", {"twin_epochs": -1}, "epochs: expected at least 1, got -1"),
        ("hire_vgg11", {"calibrate": 0}, "calibrate: expected at least 1"),
        ("hire_vgg11", {"batch": 190}, "batch: expected at most the 180 training images"),
    ):
        with pytest.raises(ValueError, match=match):
            systems.train_system(bench, name, few, **how)
    changed = systems.plan("rat_vgg11", few, weight_decay=5e-4, seed=3, knobs={"regulariser": "none"})
    assert (changed.spec.weight_decay, changed.spec.seed) == (5e-4, 3)
    assert not bench.out.exists()


def test_a_scale_may_train_another_twin_and_says_so():
    few = replace(data.take(data.load("fashion-mnist-slice", "train"), 200, seed=0), name="cifar10")
    few = replace(few, images=torch.zeros(200, 3, 32, 32, dtype=torch.uint8))
    small, its = paper.SCALES["small"], {"batch": 16, "twin_epochs": 18, "calibrate": 50}
    twin = small.systems.twins["discretised_vgg11"]
    took = systems.plan("discretised_vgg11", few, twin=twin, **its).twin
    assert took == replace(twin, steps=50, train=replace(twin.train, batch=16, epochs=18))
    assert (took.train.optimizer, took.train.lr, took.percentile, took.scale) == ("adam", 1e-3, 99.7, 0.3)
    own = systems.plan("discretised_vgg11", few).twin
    assert own == systems.SYSTEMS["discretised_vgg11"].twin and not paper.SCALES["paper"].systems.twins
    assert (own.train.optimizer, own.train.lr, own.percentile, own.scale) == ("sgd", 1e-2, 100, 0.7)
    with pytest.raises(ValueError, match="has no twin"):
        systems.plan("rat_vgg11", few, twin=twin)
    for name, told in (("discretised_vgg11", True), ("hire_vgg11", False)):
        notes = " ".join(caveats("table2", claims("table2"), [paper.Row(name, "", "cifar10")], small))
        assert ("twin by adam lr 0.001" in notes and "where the source has twin by sgd lr 0.01" in notes) is told


def test_unknown_rows_and_scales_are_refused(tmp_path):
    bench = measure.Bench(out=tmp_path)
    for args, match in ((("table4", "smoke"), "table4"), (("table3", "huge"), "huge")):
        with pytest.raises(ValueError, match=match):
            paper.reproduce(bench, *args)
    with pytest.raises(ValueError, match="no row left"):
        paper.reproduce(bench, "table3", "smoke", rows=("rat_vgg11",))


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


def test_the_audit_of_a_trained_model_is_made_as_it_was_asked_for(done, tmp_path, monkeypatch):
    """Claim, transfer, control, budget, seed, gradients a step and the time it may take arrive."""
    monkeypatch.setattr(auditing, "CHECKS", {"G3": auditing.CHECKS["G3"]})
    monkeypatch.setattr(work.Work, "curves", lambda self, gradient: {})

    def few(*args, **more):
        stages = [s for s in battery(*args, **more) if s.kind in ("default", "transfer") and s.attack == "pgd"]
        return [replace(s, knobs=s.knobs | {"steps": 1}) for s in stages]

    monkeypatch.setattr(auditing, "battery", few)
    what, guide = (target_at(str(done[0] / "models" / pool)) for pool in ("max", "avg"))
    images = data.take(data.load("fashion-mnist-slice", "test"), 8, seed=0)
    with torch.no_grad():
        images = replace(images, labels=what.make().scores(data.pixels(images.images)).argmax(1))
    bench, threat = measure.Bench(out=tmp_path, seed=3, batch=8), Linf(8 / 255, space="pixel")

    def asked(**more):
        report, _ = audits.run(bench, what, [threat], images, budget="quick", eot=2, traced=4, **more)
        (found,) = report.audits
        return report, found, {f.id: f for f in found.findings}

    report, found, told = asked(claim=0.99, claim_source="a paper", guides=[guide], control=guide, command="audit it")
    assert (found.claim, found.claim_source, found.budget, found.n) == (0.99, "a paper", "quick", 8)
    assert found.verdict == "overstated" and "99.0 % were claimed" in found.reason
    stages = few(what.make(), threat, "quick", guides=[guide.make()])
    assert [s.kind for s in stages] == ["default", "transfer"] and 0 < sum(found.default) < 8
    assert [r.attack for r in found.runs] == [s.label for s in stages]
    assert "from avg" in found.runs[1].attack and "transfer from avg" in found.runs[1].route
    assert {(r.seed, r.eot, r.data) for r in found.runs} == {(3, 2, measure.identity(images))}
    assert told["C18"].level != "not applicable" and told["C18"].evidence.startswith("avg keeps")
    assert told["S3f"].level == told["S6"].level == "pass"  # by the model loaded anew
    assert found.victim == "max" and found.card == report.models[0]
    assert found.card["weights sha256"] == what.model.sha256
    assert (report.trails[0].victim, report.trails[0].n) == ("max", 4)
    assert found.provenance["command"] == report.provenance["command"] == "audit it"
    assert audits.adversarial_file(tmp_path, threat).is_file()
    _, late, told = asked(minutes=0.0, guides=[guide])
    assert not late.complete and [r.attack for r in late.runs] == [stages[0].label]  # always run: its figure is told
    assert late.default == found.default != late.clean and late.verdict == "inconclusive"
    assert late.claim is None and told["C18"].level == "not applicable"


def test_the_command_line_hands_an_audit_over_as_it_was_asked_for(done, tmp_path, monkeypatch, capsys):
    asked = {}

    def run(bench, what, threats, images, **more):
        asked.update(more | {"bench": bench, "what": what, "threats": threats, "images": images})
        return judged(bench, what, threats, images, budget=more["budget"])

    monkeypatch.setattr(attacks.audits, "run", run)
    monkeypatch.setattr(attacks, "write", lambda report, out, images: {"html": out / "report.html"})
    most, mean = (str(done[0] / "models" / pool) for pool in ("max", "avg"))
    main(["audit", most, "--eps", "8/255", "--space", "pixel", "--norm", "l2", "--n", "8", "--budget", "thorough",
          "--claim", "0.5", "--claim-source", "a paper", "--transfer", mean, "--transfer", most, "--control", mean,
          "--eot", "2", "--minutes", "7", "--seed", "3", "--batch", "5", "--out", str(tmp_path), "--json"])  # fmt: skip
    assert asked["threats"] == [L2(8 / 255, space="pixel")] and len(asked["images"].labels) == 8
    assert (asked["what"].name, [g.name for g in asked["guides"]], asked["control"].name) == (
        "max", ["avg", "max"], "avg"
    )  # fmt: skip
    assert {k: asked[k] for k in ("budget", "claim", "claim_source", "eot", "minutes")} == {
        "budget": "thorough", "claim": 0.5, "claim_source": "a paper", "eot": 2, "minutes": 7
    }  # fmt: skip
    bench = asked["bench"]
    assert (bench.seed, bench.batch, bench.out) == (3, 5, tmp_path)
    (line,) = json.loads(capsys.readouterr().out)["audits"]
    assert (line["norm"], line["budget"], line["n"], line["verdict"]) == ("l2", "thorough", 8, "supported")
    flags = "--norm l2 --data fashion-mnist-slice --n 8 --budget thorough --seed 3 --precision fp32 --claim 0.5 --eot 2"
    assert flags in asked["command"] and asked["command"].endswith(
        f"--transfer {mean} --transfer {most} --control {mean}"
    )
