"""Reports: read back equal, written whole, one threat a column, one page that needs nothing but itself."""

import ast
import base64
import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import vl_convert
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from sparsetrail import report as room
from sparsetrail.core import Linf, Report, Run, Threat, Trail, TrailRow
from sparsetrail.recipes import paper, quick
from sparsetrail.recipes.notes import told_apart
from sparsetrail.report import (
    ReportError,
    charts,
    claims,
    comparison,
    from_json,
    load,
    page,
    seeds,
    tables,
    to_json,
    trail_tables,
    write,
)
from sparsetrail.report.images import examples
from sparsetrail.report.labels import columns, route_of
from sparsetrail.report.tables import facts

PIXEL, CODE = Linf(8 / 255, space="pixel"), Linf(6 / 255, space="encoded")
N = 200
HERE = Path(room.__file__).parent
DASH = "\u2013"


def run(k=100, **changes):
    """A run that leaves exactly `k` of `n` images standing."""
    n = changes.pop("n", N)
    clean = changes.pop("right", 160)
    fields = {
        "attack": "pgd",
        "knobs": {"steps": 7, "step": 0.01},
        "threat": PIXEL,
        "victim": "SEW-ResNet18 max pool",
        "route": "BPTT atan(2)",
        "mode": "eval",
        "data": "cifar10 test, n=200",
        "seed": 0,
        "ties": 1,
        "forwards": 8 * n,
        "backwards": 7 * n,
        "zero_gradient": 0.25,
        "dead_examples": 2,
        "nonfinite": 0,
        "trace": (-2.0, -0.5, 1.25),
        "seconds": 1.5,
    }
    flags = {"clean": tuple(i < clean for i in range(n)), "robust": tuple(i < k for i in range(n))}
    return Run(**(fields | flags | changes))


def trail(pool="max", *, mode="eval", per_step=False, data="cifar10 test, n=64"):
    forced = 0.75 if pool == "max" else 0.0
    rows = [
        ("conv1", "conv", 0.0, 0.0, 1e-3),
        ("bn1", "norm", 0.1, 0.0, 2e-3),
        ("sn1", "neuron", 0.3, 0.0, 3e-3),
        ("pool", "pool", forced and 0.7625, forced, 4e-3),
        ("layer1.0.conv1", "conv", 0.2, 0.0, 1e-2),
        ("layer1.0.sn1", "neuron", 0.2, 0.0, 2e-2),
        ("layer2.0.downsample.0", "conv", 0.76, 0.75, 1e-1),
        ("avgpool", "pool", 0.0, 0.0, 0.0),
        ("fc", "linear", 0.0, 0.0, 1.0),
    ]
    made = []
    for i, (op, kind, zero, least, norm) in enumerate(rows):
        steps = (zero, zero) if per_step else None
        made.append(
            TrailRow(op=op, kind=kind, depth=i, zero=zero, forced=least, norm=norm, entries=640, per_step=steps)
        )
    name = f"SEW-ResNet18 {pool} pool"
    return Trail(victim=name, mode=mode, data=data, n=64, steps=2, clean_accuracy=0.8, rows=tuple(made))


def card(pool="max", **more):
    return {"name": f"SEW-ResNet18 {pool} pool", "arch": "sew_resnet18", "pool": pool} | more


def whole(**changes):
    """A report with everything in it: two victims, three settings, two trails, all published figures."""
    runs = []
    for i, pool in enumerate(("max", "avg")):
        victim = f"SEW-ResNet18 {pool} pool"
        runs += [
            run(150 - i, attack="noise", knobs={"draws": 5}, victim=victim, zero_gradient=None),
            run(30 - i, attack="fgsm", knobs={}, victim=victim),
            run(10 - i, victim=victim),
            run(90 - i, victim=victim, threat=CODE),
            run(120 - i, attack="pgd (authors)", victim=victim, threat=CODE, mode="train", note="statistics moved"),
        ]
    fields = {
        "title": "Max against average pooling",
        "summary": ("PGD leaves 5.0 % in pixel space.",),
        "models": (card("max", width=0.25, neuron={"kind": "IF"}), card("avg")),
        "runs": tuple(runs),
        "trails": (trail("max", per_step=True), trail("avg", per_step=True)),
        "claims": claims(),
        "provenance": {"torch": "2.13.0", "seed": 0, "data": {"sha256": "ab" * 32}},
        "notes": ("A note.",),
    }
    return Report(**(fields | changes))


def empty(**changes):
    fields = {"title": "t", "summary": (), "models": (), "runs": (), "trails": (), "claims": (), "provenance": {}}
    return Report(**(fields | changes))


def pictures():
    rng = np.random.default_rng(0)
    clean = rng.integers(20, 230, (8, 8, 3), dtype=np.uint8)
    moved = (clean.astype(int) + rng.choice([-8, 8], clean.shape)).astype(np.uint8)
    grey = clean[:, :, :1]
    return [
        {"clean": clean, "adversarial": moved, "label": "cat", "predicted": "dog", "title": "one"},
        {"clean": grey, "adversarial": grey, "label": "cat", "predicted": "cat", "title": "two"},
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The whole report as a folder, with pictures."""
    return write(whole(), tmp_path_factory.mktemp("whole"), images=pictures())


# --- JSON -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_equal():
    report = whole()
    assert from_json(to_json(report)) == report
    assert isinstance(from_json(to_json(report)).runs[0].threat, Threat)


@given(
    flags=st.lists(st.booleans(), min_size=1, max_size=5),
    trace=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    eps=st.floats(0, 1),
    knobs=st.dictionaries(
        st.text(max_size=5), st.integers(-(2**40), 2**40) | st.text(max_size=5) | st.none(), max_size=3
    ),
    text=st.text(max_size=20),
)
@effort(max_examples=25)
def test_any_report_of_finite_numbers_is_read_back_equal(flags, trace, eps, knobs, text):
    made = run(
        threat=Linf(eps, space="encoded"), clean=tuple(flags), robust=tuple(flags), trace=tuple(trace), knobs=knobs
    )
    report = empty(title=text, runs=(made,), provenance={text: trace})
    assert from_json(to_json(report)) == report


def test_tensors_stay_out_of_the_file():
    kept = run(adversarial=torch.zeros(3))
    data = to_json(empty(runs=(kept,)))
    assert b"adversarial" not in data
    assert from_json(data).runs[0].adversarial is None


def test_nan_and_infinity_become_null_and_read_as_nan():
    rows = (dataclasses.replace(trail().rows[0], norm=math.inf), dataclasses.replace(trail().rows[1], norm=math.nan))
    report = empty(
        runs=(run(trace=(math.nan, 1.0), zero_gradient=None),), trails=(dataclasses.replace(trail(), rows=rows),)
    )
    data = to_json(report)
    assert json.loads(data)["trails"][0]["rows"][0]["norm"] is None
    back = from_json(data)
    assert math.isnan(back.runs[0].trace[0]) and back.runs[0].trace[1] == 1.0
    assert back.runs[0].zero_gradient is None  # none asked for, not "not a number"
    assert all(math.isnan(row.norm) for row in back.trails[0].rows)


def test_free_form_parts_take_what_can_be_said_plainly(tmp_path):
    report = empty(provenance={"n": np.int64(3), "lr": torch.tensor(0.5), "out": tmp_path, "f": card, "pair": (1, 2)})
    assert from_json(to_json(report)).provenance == {
        "n": 3, "lr": 0.5, "out": str(tmp_path), "f": f"{__name__}.card", "pair": [1, 2],
    }  # fmt: skip
    with pytest.raises(ReportError, match=r"expected plain data in a report, found builtins\.object"):
        to_json(empty(provenance={"x": object()}))


def edited(change):
    body = json.loads(to_json(empty(runs=(run(),), trails=(trail(),))))
    change(body)
    return json.dumps(body)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b["runs"][0].update(extra=1), r"unknown field `extra` - at `\$\.runs\[0\]`"),
        (
            lambda b: b["trails"][0]["rows"][2].update(zeros=1),
            r"unknown field `zeros` - at `\$\.trails\[0\]\.rows\[2\]`",
        ),
        (lambda b: b.update(verdict="good"), r"unknown field `verdict`"),
        (
            lambda b: b["runs"][0].update(robust=[True] * 5),
            r"robust: expected 200 .* found 5, at `\$\.runs\[0\]`",
        ),
        (lambda b: b["runs"][0].update(indices=[1]), r"indices: expected 200 entries, .* found 1, at `\$\.runs\[0\]`"),
        (lambda b: b["runs"][0].update(forwards=-1), r"forwards: expected a count of 0 or more, found -1"),
        (lambda b: b["runs"][0].update(zero_gradient=25), r"zero_gradient: expected a share 0\.\.1, found 25"),
        (
            lambda b: b["trails"][0]["rows"][2].update(zero=7.5),
            r"zero: expected a share 0\.\.1, found 7\.5, at `\$\.trails\[0\]\.rows\[2\]`",
        ),
        (lambda b: b["trails"][0]["rows"][0].update(per_step=[0.5, -1]), r"per_step: expected a share .*found -1"),
        (lambda b: b["trails"][0].update(clean_accuracy=43), r"clean_accuracy: expected a share 0\.\.1, found 43"),
        (lambda b: b["trails"][0].update(rows=[]), r"rows: expected at least one operation.*`\$\.trails\[0\]`"),
        (lambda b: b["runs"][0].pop("route"), r"missing required field `route` - at `\$\.runs\[0\]`"),
        (lambda b: b["runs"][0].update(ties="1"), r"at `\$\.runs\[0\]\.ties`"),
        (lambda b: b["runs"][0]["threat"].update(space="latent"), r"at `\$\.runs\[0\]\.threat\.space`"),
        (lambda b: b["runs"][0]["threat"].update(eps=8), r"did you mean 8/255\?, at `\$\.runs\[0\]\.threat`"),
        (lambda b: b.update(schema=2), r"expected schema 1, found 2 .*upgrade"),
        (lambda b: b.update(schema="one"), r"expected schema 1, found 'one'"),
        (lambda b: b.pop("schema"), r"expected a report with the key 'schema', found keys 'title'"),
    ],
)
def test_what_does_not_belong_is_refused_by_its_path(change, words):
    with pytest.raises(ReportError, match=words) as caught:
        from_json(edited(change))
    assert "expected" in str(caught.value) and "likely fix" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null"])
def test_what_is_no_report_is_refused(data):
    with pytest.raises(ReportError, match="likely fix"):
        from_json(data)


def test_load_takes_the_folder_or_the_file_and_names_the_file_in_errors(tmp_path):
    (tmp_path / "result.json").write_bytes(to_json(whole()))
    assert load(tmp_path) == load(tmp_path / "result.json") == whole()
    (tmp_path / "model" / "audit" / "look").mkdir(parents=True)
    (tmp_path / "model" / "audit" / "look" / "result.json").write_text("{}")
    with pytest.raises(ReportError, match=r"likely fix: name one of .*model/audit/look$"):
        load(tmp_path / "model")
    with pytest.raises(ReportError, match=r"nowhere: expected a report folder.*found none.*likely fix"):
        load(tmp_path / "nowhere")
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ReportError, match=r"result\.json: expected .*found an empty object"):
        load(tmp_path)


# --- files ------------------------------------------------------------------------------------------------------


def test_write_leaves_the_named_files_and_nothing_else(written):
    names = {kind: path.name for kind, path in written.items()}
    assert names == {
        "json": "result.json", "md": "report.md", "html": "report.html", "csv": "trail.csv", "steps": "trail_steps.csv",
    }  # fmt: skip
    assert {p.name for p in written["json"].parent.iterdir()} == {*names.values(), "examples.npz"}
    assert load(written["json"]) == whole()


def test_a_broken_write_leaves_the_old_file(tmp_path, monkeypatch):
    write(empty(title="old"), tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(empty(title="new"), tmp_path)
    assert load(tmp_path).title == "old"
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_files_of_another_report_do_not_stay(tmp_path):
    """A second model in the same folder: what its report does not have goes, what is not a report's own stays."""
    row = dataclasses.replace(trail().rows[0], created=0.0, per_example=(0.0,))
    first = empty(
        trails=(dataclasses.replace(trail("max", per_step=True), rows=(row, *trail(per_step=True).rows[1:])),)
    )
    for name in ("notes.csv", "card.json"):
        (tmp_path / name).write_text("mine")
    kinds = {"csv", "steps", "examples", "origins"}
    assert set(write(first, tmp_path)) == {"json", "md", "html"} | kinds and (tmp_path / "card.json").exists()
    write(empty(trails=(trail("avg"),)), tmp_path)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"result.json", "report.md", "report.html", "trail.csv", "notes.csv"}


def test_a_broken_write_removes_nothing(tmp_path, monkeypatch):
    files = write(whole(), tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(empty(), tmp_path)
    assert all(path.exists() for path in files.values())


def test_trail_csv_is_tidy(written):
    rows = list(csv.DictReader(written["csv"].read_text().splitlines()))
    assert len(rows) == 18
    assert rows[3] == {
        "victim": "SEW-ResNet18 max pool", "mode": "eval", "data": "cifar10 test, n=64", "n": "64", "steps": "2",
        "order": "3", "op": "pool", "kind": "pool", "depth": "3", "zero": "0.7625", "forced": "0.75", "norm": "0.004",
        "entries": "640",
    }  # fmt: skip
    steps = list(csv.DictReader(written["steps"].read_text().splitlines()))
    assert len(steps) == 36 and {r["step"] for r in steps} == {"1", "2"}


def test_a_report_of_nothing_is_still_a_page(tmp_path):
    files = write(empty(title="Nothing yet"), tmp_path)
    text = files["html"].read_text()
    assert "Nothing yet" in text and "vegaEmbed" not in text
    assert "csv" not in files and not (tmp_path / "trail.csv").exists()


# --- one threat a column ----------------------------------------------------------------------------------------

SPACE = st.fixed_dictionaries(
    {
        "attack": st.sampled_from(["fgsm", "pgd", "pgd (authors)"]),
        "knobs": st.sampled_from([{}, {"steps": 7}, {"steps": 7, "step": 0.01}, {"steps": 20}]),
        "threat": st.sampled_from([PIXEL, CODE, Linf(8 / 255, space="encoded"), Linf(0.031, space="pixel")]),
        "mode": st.sampled_from(["eval", "train"]),
        "route": st.sampled_from(["BPTT atan(2)", "rate path"]),
        "victim": st.sampled_from(["a", "b"]),
        "seed": st.integers(0, 1),
    }
)


def cells_of(markdown):
    """Columns of a Markdown table: header and cells."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {head: [row[i] for row in table[2:]] for i, head in enumerate(table[0])}, table[0]


@given(st.lists(SPACE, min_size=1, max_size=8))
@effort(max_examples=60)
def test_a_column_never_holds_two_threats_modes_routes_or_attacks(drawn):
    runs = [run(10 + i, **fields) for i, fields in enumerate(drawn)]
    found, heads = cells_of(room.table(empty(runs=tuple(runs)), tablefmt="github"))
    assert len(found) == len(heads)  # no two columns carry the same header
    of = {f"{100 * r.accuracy.value:.1f} %": r for r in runs}
    seen = []
    for head, cells in found.items():
        here = [of[cell.split(" [")[0]] for cell in cells if cell.split(" [")[0] in of]
        assert len({(r.threat, r.mode, r.route, r.attack, json.dumps(r.knobs)) for r in here}) <= 1, head
        for r in here:
            assert r.threat.space in head and r.mode in head  # a column says what it is
        seen += here
    assert sorted(map(id, seen)) == sorted(map(id, runs))  # every run is shown, once


@pytest.mark.parametrize(
    "change",
    [
        {"threat": CODE},
        {"threat": Linf(8 / 255, space="encoded")},
        {"threat": Linf(4 / 255, space="pixel")},
        {"threat": Linf(8 / 255, space="pixel", box=(-1.0, 1.0))},
        {"mode": "train"},
        {"route": "rate path"},
        {"knobs": {"steps": 20, "step": 0.01}},
        {"knobs": {"steps": 7, "step": 0.02}},
        {"attack": "apgd"},
        {"seed": 1},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("victim", ["SEW-ResNet18 max pool", "another"])
def test_two_numbers_share_a_column_only_if_they_answer_one_question(change, victim):
    pair = (run(10), run(20, victim=victim, **change))
    heads = tables.accuracy(pair).flat_head
    shared = victim == "another" and change in ({}, {"seed": 1})
    attacks = [head for head in heads if not head.startswith(("victim", "clean"))]
    assert len(attacks) == len(set(attacks)) == (1 if shared else 2)


def test_one_radius_written_as_two_floats_is_one_radius():
    half = float(np.float32(8 / 255))
    assert half != 8 / 255
    pair = (run(10), run(20, victim="another", threat=Linf(half, space="pixel")))
    assert len(tables.accuracy(pair).groups) == 2  # names and clean, one setting


def test_columns_name_the_knob_that_sets_them_apart():
    runs = [run(1, knobs={"steps": 7, "step": s}) for s in (0.01, 2 / 255)] + [run(2, knobs={"steps": 20})]
    assert [column.label for column, _ in columns(runs)] == ["PGD-7, step 0.01", "PGD-7, step 2/255", "PGD-20"]
    twice = [run(1), run(2), run(3, seed=5)]
    assert [column.label for column, _ in columns(twice)] == ["PGD-7, seed 0", "PGD-7, seed 0 (2)", "PGD-7, seed 5"]


def test_routes_are_in_the_header_only_where_they_are_needed():
    same = tables.accuracy([run(1), run(2, threat=CODE, route="other")]).flat_head
    assert not any("BPTT" in head for head in same)
    apart = tables.accuracy([run(1), run(2, route="other")]).flat_head
    assert any("BPTT" in head for head in apart) and any("other" in head for head in apart)
    assert "gradient under encoded 6/255, eval mode: other" in room.table(
        empty(runs=(run(1), run(2, threat=CODE, route="other")))
    )


def test_every_attack_stands_under_the_route_its_gradient_takes():
    way = "BPTT atan(2), hard reset detached; phase encoder: identity"
    code = "BPTT atan(2), hard reset detached; phase encoder: its codebook, exact"
    runs = [
        run(1, route=way),
        run(2, route=way, attack="codebook (steps 20, loss margin)", knobs={"steps": 20, "loss": "margin"}),
        run(3, route=f"{way} + HART(0.5); phase encoder: identity", attack="codebook"),
        *(run(4, route=way, attack=name, knobs={}, backwards=0) for name in ("noise", "Square", "my search")),
        run(0, route=way, attack="noise", knobs={"draws": 2}, backwards=0, right=0, victim="dead"),
        run(0, route=way, attack="fgsm", knobs={}, backwards=0, right=0, victim="dead"),  # met no image
    ]
    mixed = f"{code} + HART(0.5); phase encoder: its codebook, exact"
    told = [way, code, mixed, *["none, scores only"] * 4, way]
    assert [route_of(r) for r in runs] == told
    report = empty(runs=tuple(runs))
    ((label, sentence),) = page.threats(report)
    assert label == "pixel 8/255, eval mode" and f"{way} (PGD-7, FGSM); {code} (codebook-20)" in sentence
    assert "none, scores only (noise, Square, my search)" in sentence
    for head in tables.accuracy(runs).flat_head[2:]:
        assert ("identity" in head) == head.startswith(("PGD", "FGSM"))
        assert ("scores only" in head) == head.startswith(("noise", "Square", "my search"))
    assert "gradient: none, scores only" in room.table(empty(runs=tuple(runs[3:7])))
    plain = [run(1, route=way), run(4, route=way, attack="noise", knobs={}, backwards=0)]
    assert tables.accuracy(plain).flat_head[2:] == (
        "PGD-7, pixel 8/255, eval mode",
        "noise, pixel 8/255, eval mode, scores only",
    )
    ((_, grid),) = tables.per_setting(plain)
    assert grid.head == ("victim", "clean", "PGD-7", "noise")  # one table and one panel a threat
    assert len(charts.accuracy_spec(plain)["hconcat"]) == 1


def test_a_quick_look_gives_every_accuracy_its_interval_and_mode():
    line, _, traced = quick._summary([run(68), run(90, threat=CODE, attack="pgd")], [trail()])
    assert "crafted in eval mode: SEW-ResNet18 max pool: clean 80.0 % [" in line
    assert "PGD leaves 34.0 % [27.8, 40.8], n=200." in line and ", eval mode, n=64: 76.2%" in traced


def test_a_system_without_a_published_figure_is_not_set_apart_from_one(monkeypatch):
    monkeypatch.setattr(paper.audits, "sentence", lambda audit: "Judged.")
    rows = [paper.Row(arch=arch, pool="", dataset="cifar10", seed=None) for arch in ("vanilla_wrn16", "rat_wrn16")]
    kept = load(HERE.parents[2] / "records/2026-11-24_audit-small_cpu/max-pixel.result.json").audits[0]
    unknown, known = told_apart(rows, [dataclasses.replace(kept, victim=row.name) for row in rows])
    assert unknown.endswith(": Judged. No figure is published in the paper's tables.")
    assert "Judged. From its published figure it is apart by the scale, and: " in known


def test_cells_are_shares_with_wilson_intervals():
    text = room.table(empty(runs=(run(340, n=1000, right=800),)), tablefmt="github")
    assert "34.0 % [31.1, 37.0]" in text
    assert text.count("n = 1000 images") == 1


def test_n_stands_in_the_cells_where_it_differs():
    text = room.table(empty(runs=(run(10), run(5, n=50, right=40, attack="fgsm"))))
    assert "n=200" in text and "n=50" in text and "images;" not in text


def test_clean_accuracy_is_one_column_unless_runs_disagree():
    assert tables.accuracy([run(1), run(2, mode="train")]).head[1:3] == ("clean", "PGD-7")
    split = tables.accuracy([run(1), run(2, mode="train", right=150)]).head
    assert split[1:3] == ("clean, eval mode", "clean, train mode")
    apart = tables.accuracy([run(1), run(2, mode="train", victim="another")]).head
    assert apart[1:3] == ("clean, eval mode", "clean, train mode")
    noisy = tables.accuracy([run(1), run(2, attack="fgsm", knobs={}, right=150)])
    assert noisy.head[1:3] == (
        "clean before PGD-7, pixel 8/255, eval mode",
        "clean before FGSM, pixel 8/255, eval mode",
    )
    assert noisy.rows[0][1].startswith("80.0 %") and noisy.rows[0][2].startswith("75.0 %")


def test_data_sets_are_rows_of_their_own():
    grid = tables.accuracy([run(10), run(20, data="cifar100 test")])
    assert grid.head[:2] == ("victim", "data") and len(grid.rows) == 2


def test_no_run_no_table():
    assert room.table(empty()) == "No attack was run."


def test_latex_is_a_booktabs_table():
    text = room.table(whole(), tablefmt="latex_booktabs")
    assert "\\toprule" in text and "34.0" not in text and "75.0 \\%" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_shows_every_number(width):
    out = io.StringIO()
    report = whole()
    room.console(report, Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text
    for r in report.runs:
        low, high = r.accuracy.interval()
        assert f"{100 * r.accuracy.value:.1f} %" in text and f"[{100 * low:.1f}, {100 * high:.1f}]" in text
    for title in ("pixel 8/255, eval mode", "encoded 6/255, eval mode", "encoded 6/255, train mode"):
        assert title in text


def test_the_ledger_is_cut_by_setting(written):
    text = written["html"].read_text()
    assert "25.00 %" in text and "statistics moved" in text


# --- published figures ------------------------------------------------------------------------------------------


def beside(report, figure, attack):
    return next(
        c for c in comparison.comparisons(report) if c.figure == figure and attack in c.title and "spikes" in c.coded
    )  # fmt: skip


def test_a_published_figure_has_a_column_of_its_own():
    c = beside(whole(), "table2", "PGD")
    at = c.grid.head.index("Table 2")
    assert [row[at] for row in c.grid.rows] == ["34.33 %"]
    for i, head in enumerate(c.grid.head):
        if i != at:
            assert not any(row[i] == "34.33 %" for row in c.grid.rows), head
    assert "8/255" in c.stated and "6/255" in c.coded


def test_ours_say_which_of_the_two_threats_they_answer():
    heads = beside(whole(), "table2", "PGD").grid.flat_head
    assert [h for h in heads if "as stated" in h] == ["PGD-7, pixel 8/255, eval mode (as stated)"]
    assert [h for h in heads if "as coded" in h] == ["PGD-7 (authors), encoded 6/255, train mode (as coded)"]
    assert "PGD-7, encoded 6/255, eval mode" in heads  # neither


def test_published_tables_hold_one_published_threat_each():
    made = comparison.comparisons(whole())
    for c in made:
        held = [f"{k.value:.2f} {k.unit}" for k in claims(c.figure) if (k.stated, k.coded) == (c.stated, c.coded)]
        at = len(c.rest.head) - 1
        assert sorted(row[at] for row in (*c.grid.rows, *c.rest.rows)) == sorted(held) != []
    threats = {(k.figure, k.stated, k.coded) for k in whole().claims}
    assert sorted((c.figure, c.stated, c.coded) for c in made) == sorted(threats)
    assert len(threats) > len({figure for figure, *_ in threats})


def test_pools_and_data_sets_are_not_confused():
    report = whole()
    assert [row[:3] for row in beside(report, "table3", "PGD").grid.rows] == [
        ("SEW-ResNet18", "CIFAR-10", "SEW-ResNet18 avg pool")
    ]
    assert not beside(report, "table1", "PGD").grid.rows  # CIFAR-100, and ours is CIFAR-10
    assert not comparison._same_data("CIFAR-10", "cifar100 test") and not comparison._same_data(
        "CIFAR-10", "CIFAR10-DVS"
    )
    assert comparison._same_data("CIFAR-10", "CIFAR-10, 500 images") and comparison._same_data(
        "CIFAR-100", "cifar100/test"
    )


def test_a_card_that_differs_from_the_papers_network_says_so():
    assert beside(whole(), "table2", "PGD").grid.rows[0][2] == "SEW-ResNet18 max pool (width 0.25, paper 1)"


def test_a_victim_is_known_by_its_name_where_it_has_no_card():
    c = beside(whole(models=()), "table2", "PGD")
    assert c.grid.rows[0][2] == "SEW-ResNet18 max pool"
    other = tuple(dataclasses.replace(r, victim="VGG-11") for r in whole().runs)
    assert not beside(whole(models=(), runs=other), "table2", "PGD").grid.rows


def test_a_defended_model_is_not_put_beside_an_undefended_row():
    assert not beside(whole(models=(card(defence="snn_rat"), card("avg"))), "table2", "PGD").grid.rows


def test_compare_as_text_states_both_threats():
    text = room.compare(whole(claims=claims("table2")))
    assert "Stated: Pixels of the image, L-infinity 8/255" in text
    assert "Coded: Phase-coded spikes of all 10 time steps, L-infinity 6/255" in text
    assert "not measured" in text
    assert room.compare(empty()) == "No published figure is attached."


# --- trails -----------------------------------------------------------------------------------------------------


def test_trails_of_two_modes_or_data_are_two_pictures():
    groups = trail_tables.trail_groups((trail(), trail("avg"), trail(mode="train"), trail(data="cifar100 test")))
    assert [(len(g.trails), g.trails[0].mode) for g in groups] == [(2, "eval"), (1, "train"), (1, "eval")]


def test_operations_keep_the_forward_order_when_victims_differ():
    first, second = trail(), trail("avg")
    renamed = dataclasses.replace(second.rows[3], op="meanpool")
    second = dataclasses.replace(second, rows=(*second.rows[:3], renamed, *second.rows[4:]))
    ops = trail_tables.trail_groups((first, second))[0].ops
    assert ops[2:6] == ("sn1", "meanpool", "pool", "layer1.0.conv1")
    assert len(ops) == 10


def test_zero_share_by_kind_stands_beside_the_papers_figure():
    grid = trail_tables.kind_grid(
        trail_tables.trail_groups((trail(), trail("avg")))[0], claims("fig1") + claims("fig3")
    )
    rows = {row[0]: row[1:] for row in grid.rows}
    assert rows["neuron"] == (
        f"25.00 % (20.0{DASH}30.0)",
        "0 %",
        f"25.00 % (20.0{DASH}30.0)",
        "0 %",
        "29.01 %",
        "16.52 % (lowest)",
    )
    assert rows["pool"] == ("76.25 %", "75.00 %", "0 %", "0 %", "37.88 %", "0.00 %")
    assert rows["pool, avgpool"] == ("0 %", "0 %", "0 %", "0 %", "", "")  # never averaged with the stem's pool
    assert grid.groups[-2:] == (("paper, max pooling", 1), ("paper, average pooling", 1))


def test_trail_comparison_uses_the_first_pool_and_the_right_victim():
    found = {c.figure: c.grid for c in comparison.comparisons(whole()) if c.figure in trail_tables.FIGURES}
    assert [row[2:] for row in found["fig1"].rows] == [("29.01 %", f"25.00 % (20.0{DASH}30.0)"), ("37.88 %", "76.25 %")]
    assert all("max" in row[1] for row in found["fig1"].rows) and all("avg" in row[1] for row in found["fig3"].rows)


def test_shares_tell_an_exact_zero_from_a_small_one():
    assert [tables.share(x) for x in (0.0, 1e-6, 0.0004, 0.5, math.nan, None)] == [
        "0 %", "< 0.01 %", "0.04 %", "50.00 %", DASH, DASH,
    ]  # fmt: skip


# --- charts -----------------------------------------------------------------------------------------------------


def values_in(spec):
    """All inline data of a specification."""
    if isinstance(spec, dict):
        here = spec.get("values") if isinstance(spec.get("values"), list) else []
        named = [v for rows in spec.get("datasets", {}).values() for v in rows]
        return here + named + [v for part in spec.values() for v in values_in(part)]
    return [v for part in spec for v in values_in(part)] if isinstance(spec, list) else []


def test_charts_scroll_and_captions_wrap(written):
    text = written["html"].read_text()
    style = text[text.index("<style>") : text.index("</style>")]
    assert re.search(r"caption \{[^}]*max-width: min\(60rem, 100vw - 3rem\)", style)
    assert re.search(r"\.vega-embed details, [^{]*\{ position: static", style)  # the menu covers nothing
    assert re.search(r"\.threats \{[^}]*fit-content\(14rem\)", style)
    assert re.search(r"\.groups th \{ text-align: left", style) and "<span>pixel 8/255, eval mode</span>" in text
    for group in trail_tables.trail_groups(whole().trails):
        axes = [layer["encoding"]["x"]["axis"] for layer in charts.trail_spec(group)["vconcat"][1]["layer"]]
        assert min(axis.get("labelFontSize", 12) for axis in axes) >= 11


def test_many_victims_are_rows_of_their_own_and_no_two_attacks_are_drawn_alike():
    names = [f"victim {i}" for i in range(11)]
    ways = [{"route": f"BPTT {name[-1]}"} for name in ("a", "b")]
    runs = [run(i, victim=name, attack=f"attack{k}", **ways[i < 2]) for i, name in enumerate(names) for k in range(7)]
    runs += [run(3, victim=name, attack="noise", knobs={}, backwards=0, **ways[0]) for name in names]
    spec = charts.accuracy_spec(runs)
    panels = [line["hconcat"][0] for line in spec["vconcat"]]
    rows = [panel["layer"][0]["encoding"]["y"]["sort"] for panel in panels]
    assert sorted([*rows[0], *rows[1]]) == sorted(names) and len(rows) == 2  # each beside its own route, noise too
    assert all(panel["layer"][0]["encoding"]["y"]["axis"].get("labels", True) for panel in panels)
    attacks = panels[0]["layer"][1]["encoding"]["color"]["scale"]["domain"]
    ranges = charts.config()["range"]
    looks = {tuple(ranges[name][i % len(ranges[name])] for name in ("category", "symbol")) for i in range(len(attacks))}
    assert len(attacks) == len(looks) == 9
    assert drawn_width(spec) <= 1170


def test_panels_stand_under_each_other_before_they_are_drawn_small():
    runs = [run(5, victim=f"v{i}", threat=Linf(k / 255, space="pixel")) for i in range(5) for k in range(1, 7)]
    assert 600 < drawn_width(charts.accuracy_spec(runs)) <= 1170


def drawn_width(spec):
    """Of the picture, in pixels: what the page has room for at a width of 1280 is drawn in its own size."""
    svg = vl_convert.vegalite_to_svg({**spec, "config": charts.config()})
    return float(re.search(r'<svg[^>]* width="([\d.]+)"', svg)[1])


def test_the_accuracy_chart_has_one_panel_a_setting():
    runs = whole().runs
    panels = charts.accuracy_spec(runs)["hconcat"]
    names = [(p["title"]["text"], p["title"]["subtitle"][0]) for p in panels]
    assert names == [
        ("pixel 8/255", "eval-mode BatchNorm"),
        ("encoded 6/255", "eval-mode BatchNorm"),
        ("encoded 6/255", "train-mode BatchNorm"),
    ]


def test_trail_chart_data_are_the_trails():
    group = trail_tables.trail_groups((trail(), trail("avg")))[0]
    values = [v for v in values_in(charts.trail_spec(group)) if isinstance(v, dict) and "zero" in v]
    pool = next(v for v in values if v["op"] == "pool" and "max" in v["victim"])
    assert (pool["zero"], pool["forced"], pool["pale"], pool["norm"]) == (76.25, 75.0, 75.0, 4e-3)


def test_the_time_step_chart_is_there_only_with_time_steps():
    assert charts.steps_spec(trail_tables.trail_groups((trail(),))[0]) is None
    assert charts.steps_spec(trail_tables.trail_groups((trail(per_step=True),))[0]) is not None


def test_every_chart_says_what_it_rests_on(tmp_path):
    report = whole(
        provenance={"torch": "2.13.0", "sparsetrail": "0.1.0", "seed": 7},
        models=(card("max", training="adam, seed 3407"),),
    )
    page.write(report, tmp_path)
    drawn = page._charts(report)
    assert set(drawn) == {"accuracy", "trail-0", "steps-0"}
    for name, spec in drawn.items():
        text = " | ".join(spec["title"]["text"])
        assert "n=" in text and "training seed 3407" in text and "sparsetrail 0.1.0; torch 2.13.0" in text, name
        assert ("no threat" in text and "seed 7" in text) == (name != "accuracy")
    told = drawn["accuracy"]["title"]["text"][1]
    assert "pixel space, L-infinity 8/255, crafted in eval mode" in told and "crafted in train mode" in told


def test_results_of_before_are_still_read():
    """Trails written before it was known where zeros come from."""
    files = sorted((Path(__file__).parents[1] / "records").glob("*/fig?.json"))
    assert files
    for file in files:
        report = load(file)
        assert report.trails and all(row.created is None for t in report.trails for row in t.rows)
        assert page.markdown(report)


def test_all_seeds_of_a_table_are_told_and_none_where_nothing_ran():
    runs = whole().runs
    assert [f for f in facts(runs[:1]) if f.startswith("seed")] == [f"seed {runs[0].seed}"]
    two = (runs[0], dataclasses.replace(runs[0], seed=3407, attack="fgsm (authors)", mode="train"))
    assert f"seeds {runs[0].seed}, 3407" in facts(two) and facts(()) == ()


def test_figures_are_exported_as_vectors(tmp_path):
    report = whole()
    svg = room.figure(report, tmp_path / "new" / "trail.svg").read_text()
    assert svg.startswith("<svg") and "layer2.0.downsample.0" in svg and "L2 norm" in svg and "max pool" in svg
    assert room.figure(report, tmp_path / "trail.pdf").read_bytes().startswith(b"%PDF")
    assert room.figure(report, tmp_path / "acc.png", which="accuracy").read_bytes().startswith(b"\x89PNG")
    assert "config" in json.loads(room.figure(report, tmp_path / "steps.json", which="steps").read_text())


def test_a_trail_without_any_gradient_can_still_be_drawn(tmp_path):
    dead = tuple(dataclasses.replace(row, zero=1.0, norm=0.0) for row in trail().rows)
    report = empty(trails=(dataclasses.replace(trail(), rows=dead),))
    assert "zero entries" in room.figure(report, tmp_path / "dead.svg").read_text()


def test_figures_that_cannot_be_drawn_say_why(tmp_path):
    with pytest.raises(ReportError, match=r"expected a path ending in \.svg.*found 'trail\.gif'"):
        room.figure(whole(), tmp_path / "trail.gif")
    with pytest.raises(ReportError, match="expected a report with a trail, found none"):
        room.figure(empty(), tmp_path / "trail.svg")
    with pytest.raises(ReportError, match="per-step"):
        room.figure(empty(trails=(trail(),)), tmp_path / "trail.svg", which="steps")


# --- images -----------------------------------------------------------------------------------------------------


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def test_pictures_keep_their_pixels_and_share_one_gain():
    shown, gain = examples(pictures())
    given = pictures()[0]
    assert gain == 8  # 8 * 8 = 64, and 16 * 8 = 128 would be cut
    assert (pixels(shown[0].clean) == given["clean"]).all() and (
        pixels(shown[0].adversarial) == given["adversarial"]
    ).all()
    assert set(np.unique(pixels(shown[0].difference))) == {128 - 64, 128 + 64}
    assert set(np.unique(pixels(shown[1].difference))) == {128}
    assert (shown[0].fooled, shown[1].fooled) == (True, False)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"clean": np.zeros((4, 4), np.uint8)}, "expected the key 'adversarial'"),
        ({"clean": np.zeros((4, 4)), "adversarial": np.zeros((4, 4))}, r"expected uint8 .*found float64 \[4, 4\]"),
        ({"clean": np.zeros((3, 4, 4), np.uint8), "adversarial": np.zeros((3, 4, 4), np.uint8)}, "move channels last"),
        ({"clean": np.zeros((4, 4), np.uint8), "adversarial": np.zeros((4, 5), np.uint8)}, "of one shape"),
    ],
)
def test_pictures_that_are_none_are_refused(item, words):
    with pytest.raises(ReportError, match=words):
        examples([item])


# --- the page ---------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """What a browser would fetch, which tables lack a caption or a scope, which tags are left open."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.styles, self.tables, self.words, self.unscoped = [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        for key in ("src", "href", "srcset", "data", "poster", "action", "xlink:href", "background"):
            link = named.get(key)
            if link is not None and not link.startswith(("#", "data:")):
                self.fetched.append((tag, link))
        self.styles.append(named.get("style") or "")
        if tag == "table":
            self.tables.append(0)
        if tag == "caption":
            self.tables[-1] += 1
        if tag == "th" and "scope" not in named:
            self.unscoped.append(self.getpos())
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
        elif self.open and self.open[-1] != "script":
            self.words.append(data)

    @property
    def outside(self):
        """Everything that would leave the page."""
        styles = " ".join(self.styles)
        return self.fetched + re.findall(r"@import[^;]*|url\((?!['\"]?(?:data:|#))[^)]*\)", styles)


def test_the_page_fetches_nothing(written):
    seen = Page(written["html"].read_text())
    assert seen.outside == [] and seen.open == []
    assert "default-src 'none'" in written["html"].read_text()  # and the browser is told to see to it


@pytest.mark.parametrize(
    "planted",
    [
        '<script src="https://example.org/x.js"></script>',
        '<link rel="stylesheet" href="http://example.org/x.css">',
        '<img src="//example.org/x.png">',
        '<img src="x.png">',
        "<style>@import 'https://example.org/x.css';</style>",
        "<p style=\"background: url('https://example.org/x.png')\"></p>",
    ],
)
def test_the_check_sees_what_would_be_fetched(planted):
    assert Page(planted).outside


def test_tables_have_captions_and_scoped_headers(written):
    seen = Page(written["html"].read_text())
    assert len(seen.tables) > 8 and set(seen.tables) == {1}
    assert seen.unscoped == []


def test_the_page_says_everything_without_a_script(written):
    text = re.sub("[ \n]+", " ", " ".join(Page(written["html"].read_text()).words))
    for words in (
        "Max against average pooling",
        "PGD leaves 5.0\u00a0% in pixel space.",
        "5.0 % [2.7, 9.0]",
        "The adversary may change every pixel of the image by at most 8/255",
        "BatchNorm runs in train mode while the attack is crafted",
        "76.25 %",
        "as coded",
        "as stated",
        "34.33 %",
        "neuron, kind",
        "difference \u00d7 8",
        "✗ fooled",
        "✓ still right",
        "A note.",
    ):
        assert words in text, words
    order = ["Accuracy", "Sparsity trail", "Beside the published figures", "Models", "Examples", "Provenance", "Notes"]
    found = re.findall(r"<h2>(.*?)</h2>", written["html"].read_text().split("</main>")[0])
    assert found == order


def test_names_cannot_break_out_of_the_page():
    nasty = "</script><script>alert(1)</script><b>&"
    report = empty(
        title=nasty, summary=(nasty,), runs=(run(victim=nasty, note=nasty),), provenance={nasty: nasty}, notes=(nasty,)
    )
    text = page.page(report)
    assert nasty not in text and "<script>alert" not in text
    seen = Page(text)
    assert seen.open == [] and nasty in "".join(seen.words)


def test_markdown_has_the_tables_and_the_threats(written):
    text = written["md"].read_text()
    for words in (
        "# Max against",
        "| victim",
        "**pixel 8/255, eval mode**",
        "Stated: ",
        "Coded: ",
        "as coded",
        "76.25 %",
    ):
        assert words in text, words


@pytest.mark.parametrize("module", sorted(p.name for p in HERE.glob("*.py")))
def test_the_room_imports_core_and_no_heavy_library_at_the_top(module):
    for node in ast.parse((HERE / module).read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.startswith("sparsetrail"):
                assert name.startswith(("sparsetrail.core", "sparsetrail._files", "sparsetrail.report")), name
            assert name.split(".")[0] not in {"altair", "vl_convert", "jinja2", "tabulate", "msgspec", "PIL", "rich"}, (
                name
            )


# --- a real browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra e2e)")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on PATH")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def visit(browser, path, **context):
    """Open the page with the network cut; what it complained of and what it asked for."""
    view = browser.new_context(offline=True, **context)
    tab = view.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url) if not request.url.startswith("data:") else None)
    tab.goto(path.as_uri())
    return tab, said, asked


@pytest.mark.e2e
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_draws_its_charts_offline_and_in_silence(browser, written, scheme):
    tab, said, asked = visit(browser, written["html"], color_scheme=scheme)
    for place in ("accuracy", "trail-0"):
        tab.wait_for_selector(f"#{place} svg.marks", timeout=20_000)
    tab.wait_for_selector("#steps-0 svg.marks", state="attached", timeout=20_000)  # inside a closed section
    assert tab.locator("#trail-0 svg.marks").text_content().count("layer1.0.sn1") == 1
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert said == []
    assert asked == [written["html"].as_uri()]
    tab.context.close()


@pytest.mark.e2e
def test_charts_follow_the_colour_scheme(browser, written):
    tab, said, _ = visit(browser, written["html"], color_scheme="light")
    ink = "document.querySelector('#accuracy svg.marks text').getAttribute('fill')"
    tab.wait_for_selector("#accuracy svg.marks", timeout=20_000)
    before = tab.evaluate(ink)
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_function(f"{ink} !== '{before}'", timeout=20_000)
    assert said == []
    tab.context.close()


@pytest.mark.e2e
def test_the_page_is_complete_without_javascript(browser, written):
    tab, _, _ = visit(browser, written["html"], java_script_enabled=False)
    still = tab.locator("#trail-0 img")
    assert still.bounding_box()["width"] > 300
    assert "76.25 %" in tab.content()
    tab.context.close()


@pytest.mark.e2e
def test_a_phone_scrolls_the_tables_and_not_the_page(browser, written):
    tab, said, _ = visit(browser, written["html"], viewport={"width": 390, "height": 800})
    tab.wait_for_selector("#trail-0 svg.marks", timeout=20_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert said == []
    tab.context.close()


# Student's quantiles at 97.5 %, from printed tables
@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_the_interval_of_a_mean_is_students(freedom, t):
    n = freedom + 1
    values = [float(i) for i in range(n)]
    deviation = math.sqrt(sum((v - freedom / 2) ** 2 for v in values) / freedom)
    low, high = seeds.t_interval(values)
    assert low + high == pytest.approx(freedom)
    assert (high - low) / 2 == pytest.approx(t * deviation / math.sqrt(n), rel=2e-4)


def seeded(pool, seed, **changes):
    """A card and the name of a network of several."""
    name = f"SEW-ResNet18 {pool} pool, seed {seed}, cifar10"
    row = f"SEW-ResNet18 {pool} pool, cifar10"
    return card(pool, **{"trained on": "cifar10"} | changes) | {"name": name, "row": row, "training seed": seed}


def test_the_spread_over_seeds_is_of_differences_seed_by_seed():
    left = {"max": {1: 100, 2: 60, 3: 80}, "avg": {1: 98, 2: 54, 3: 70, 4: 10}}  # of 200; max has no fourth seed
    cards = [seeded(pool, seed) for pool in left for seed in left[pool]]
    runs = [run(left[c["pool"]][c["training seed"]], victim=c["name"]) for c in cards]
    runs += [run(5, victim=c["name"], threat=CODE) for c in cards if c["pool"] == "avg"]
    grid = seeds.spread(empty(models=tuple(cards), runs=tuple(runs)))
    assert grid.flat_head == ("row", "clean", "PGD-7, pixel 8/255, eval mode", "PGD-7, encoded 6/255, eval mode")
    assert [row[2] for row in grid.rows] == [
        "40.0 % (30.0 to 50.0), 3",
        "29.0 % (5.0 to 49.0), 4",
        "+3.0 [-2.0, +8.0]",  # 1, 3 and 5 points: 3 -+ 4.303 x 2 / sqrt(3)
        "3 of 3",
    ]
    assert [row[3] for row in grid.rows] == ["", "2.5 % (2.5 to 2.5), 4", "", ""]
    alone = [c for c in cards if c["training seed"] == 1]
    assert seeds.spread(empty(models=tuple(alone), runs=tuple(runs[:1] + runs[3:4]))) is None


def test_networks_of_two_architectures_or_data_sets_get_no_difference():
    for other in ({"arch": "sew_resnet34"}, {"trained on": "cifar100"}):
        cards = [seeded(pool, seed, **(other if pool == "avg" else {})) for pool in ("max", "avg") for seed in (1, 2)]
        grid = seeds.spread(empty(models=tuple(cards), runs=tuple(run(50, victim=c["name"]) for c in cards)))
        assert [row[0].split()[1] for row in grid.rows] == ["max", "avg"]


def test_the_first_lines_of_a_report_over_seeds_are_of_rows_and_its_chart_has_their_colours():
    left = {"max": {1: 100, 2: 60}, "avg": {1: 90, 2: 40}}  # of 200
    cards = [seeded(pool, seed) for pool in left for seed in left[pool]]
    runs = [run(left[c["pool"]][c["training seed"]], victim=c["name"]) for c in cards]
    assert seeds.sentences(runs, cards) == (
        "PGD-7, pixel 8/255, eval mode, n=200, mean over training seeds (range), their number: "
        "SEW-ResNet18 max pool, cifar10 40.0 % (30.0 to 50.0), 2; "
        "SEW-ResNet18 avg pool, cifar10 32.5 % (20.0 to 45.0), 2; "
        "max minus avg, seed by seed, +7.5 [-24.3, +39.3] points.",  # 5 and 10 points: 7.5 -+ 12.706 x 3.54 / sqrt(2)
    )
    assert seeds.sentences(runs, [c for c in cards if c["training seed"] == 1]) == ()
    point = charts.accuracy_spec(runs, seeds.seeded(cards))["hconcat"][0]["layer"][1]["encoding"]
    rows = ["SEW-ResNet18 max pool, cifar10", "SEW-ResNet18 avg pool, cifar10"]
    assert point["color"]["scale"]["domain"] == point["shape"]["scale"]["domain"] == rows
    assert len(point["xOffset"]["sort"]) == 4
