"""The pages of the theorems: a demo without a model, an audit of a tiny victim, and what a reader is told."""

import csv
import functools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from lively import lively
from torch import nn

from sparsetrail import data
from sparsetrail.cli import theory as verbs
from sparsetrail.cli.flags import Kept
from sparsetrail.core import L2, Linf, Victim
from sparsetrail.recipes import demo, theorems
from sparsetrail.recipes import theory as measured
from sparsetrail.recipes.statements import corollary1, theorem1, theorem2, theorem3
from sparsetrail.report.theorems import Plot, draw, markdown, to_html, verdicts, write
from sparsetrail.snn.encode import direct, phase
from sparsetrail.snn.net import NetSpec, victim

FACTS = {"sparsetrail": "0", "torch": "2", "seed": 0}
PIXEL = Linf(8 / 255, space="pixel")


@pytest.fixture(scope="module")
def slice_():
    some = data.take(data.load("fashion-mnist-slice", "train"), 8, seed=0)
    return data.pixels(some.images), some.labels


def tiny(x, encode=None, **knobs):
    encode = encode or direct(steps=3)
    spec = NetSpec(width=0.125, channels=1, steps=3, **knobs)
    if spec.arch == "vgg5":
        x = torch.nn.functional.pad(x, (2, 2, 2, 2))
    return victim(lively(spec, encode(x)), encode, name="tiny")


@pytest.fixture(scope="module")
def found(slice_):
    x, y = slice_
    return measured.audit(tiny(x), x, y, PIXEL, data="slice", draws=16, shares=(1e-5, 0.25), seed=3)


@pytest.fixture(scope="module")
def shown():
    return demo.demo(seed=1, images=8)


def test_audit_finds_what_the_theory_says_of_spiking_networks(found, slice_):
    x, y = slice_
    assert found.n == 8 and found.entries == 784 and found.clean.n == 8
    assert len(found.eps1) == 8 and max(found.eps1) < PIXEL.eps / 100 and found.no_switch == ""
    low, middle, high = found.radii
    assert (low.eps, high.eps) == (1e-5 * PIXEL.eps, PIXEL.eps)
    below = [v for v, e in zip(low.verdict, found.eps1, strict=True) if low.eps < e / 2]
    assert below and set(below) == {"undefined"}  # constant below the first switch: 0/0
    for at in (middle, high):
        assert all(r >= 1 for r in at.ratio if r == r)
        assert all(lo <= r <= hi for lo, r, hi in zip(at.low, at.ratio, at.high, strict=True) if r == r)
    alone = [j for j in found.above.jump if j == j]
    assert len(alone) == found.above.alone and found.above.jumps.k == sum(j != 0 for j in alone) > 0
    assert found.above.violated.k == found.above.jumps.k
    assert theorem1.judge1(found).verdict == "hypothesis not met"
    assert 0 < max(found.clipped) <= 1 and found.noise_floor == 0
    assert all(1 <= p <= s <= 784 for p, s in zip(found.pr, found.support, strict=True))
    assert found.tracking[0].layer == "conv1" and len(found.spikes) == len(found.tracking) - 1
    assert found.layers_left == ("conv1",)  # pixels are no spikes
    assert found.spikes[0].layer == "layer1.0.conv1" and found.spikes[0].violated.n == 8
    assert theorem3.judge3(found).verdict == "violated (certified)"
    assert len(found.tracking_zeros) == len(found.tracking_scaled) == len(found.tracking)
    tied = replace(found.tracking[0], rho="constant")
    alone = replace(found, tracking_zeros=(tied,) * 3 + found.tracking[:1], tracking_scaled=(tied,) * 3)
    assert theorem2.judge2_zeros(alone).verdict == "vacuous" and theorem2.judge2(alone).verdict == "undefined"
    few = theorem2.judge2(replace(found, n=2))
    assert few.verdict == "undefined" and "Too few images to rank: 2" in few.why
    at = [replace(found.tracking[0], layer=f"at {r}", rho=r, low=r - 0.1, high=r + 0.1) for r in (0.1, 0.25, 0.9)]
    for order, verdict, wrong in (
        ((2, 1, 0), "holds", 0),
        ((1, 0), "holds", 0),
        ((0, 1), "violated (not certified)", 1),
        ((1, 2, 0), "violated (certified)", 1),
    ):
        layers = tuple(at[k] for k in order)  # the ends of the last agree with the theorem, its middle does not
        some = replace(found, tracking_zeros=(tied, *layers), tracking_scaled=layers)
        for judged in (theorem2.judge2(some), theorem2.judge2_zeros(some)):
            assert judged.verdict == verdict and f"the farther one follows more in {wrong}" in judged.why
            assert ("0.25 [0.15, 0.35] in at 0.25, 0.90 [0.80, 1.00] in at 0.9" in judged.why) == (order == (1, 2, 0))
    assert [t.scale for t in found.temperature] == [0.1, 1, 10, 100, 1000]


def test_audit_does_not_depend_on_the_batch(slice_):
    x, y = slice_
    v = tiny(x[:3], arch="vgg5")
    x, y = torch.nn.functional.pad(x[:3], (2, 2, 2, 2)), y[:3]
    a, b = (measured.audit(v, x, y, PIXEL, draws=6, shares=(), batch=k, probe=False, seed=1) for k in (2, 64))
    for name in ("rho_rand", "linear_adv", "rho_adv"):
        assert getattr(a.at, name) == pytest.approx(getattr(b.at, name), rel=1e-3)
    assert a.fidelity == pytest.approx(b.fidelity, abs=1e-3) and a.eps1 == b.eps1 and a.support == b.support


def test_a_linear_victim_meets_the_hypotheses():
    """Unclipped and linear up to the softmax at a tiny radius: the ratio is 3 PR(g), within the error of the draws."""
    w = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).double()
    v = Victim(encode=lambda x: x.flatten(1)[None], logits=lambda u: u[0] @ w.T, steps=1, classes=3, name="linear")
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.8 + 0.1
    y = torch.arange(6) % 3
    a = measured.audit(v, x, y, Linf(0.001, space="pixel"), draws=400, probe=False)
    assert max(a.clipped) == 0 and a.no_switch.endswith("its first layer is not known") and a.spikes == ()
    assert min(a.fidelity) > 0.9999 and a.gain == pytest.approx([1] * 6, abs=1e-3)
    assert a.at.linear_ratio == pytest.approx([3 * p for p in a.pr], rel=1e-9)
    assert a.at.ratio == pytest.approx(a.at.linear_ratio, rel=0.4)
    assert all(lo <= t <= hi for lo, t, hi in zip(a.at.low, a.at.linear_ratio, a.at.high, strict=True))
    assert theorem1.judge1(a).verdict == "vacuous"  # 16 of 16 entries
    assert "met on 6 of 6 images" in theorem1.judge1(a).why and "met on 6 of 6 images" in theorems.sentence(a)
    curved = replace(a, error=(0.0, 0.0, 0.0, 9.0, 9.0, 9.0), support=(4,) * 6)
    outside = ("holds",) * 3 + ("violated (certified)",) * 3
    judged = theorem1.judge1(replace(curved, radii=(replace(a.at, verdict=outside),)))
    assert judged.verdict == "holds" and "met on 3 of 6 images" in judged.why and "of these 3 images" in judged.why
    further = replace(a.at, rho_adv=tuple(1.3 * v for v in a.at.linear_adv))
    for unfit in ({"error": (0.2,) * 6}, {"gain": (1.2,) * 6}, {"radii": (further,)}, {"support": (0,) * 6}):
        assert theorem1.judge1(replace(a, **unfit)).verdict == "hypothesis not met"
    sparse = replace(a, support=(4,) * 6)
    assert theorem1.judge1(sparse).verdict == "holds"
    outside = replace(a, radii=(replace(a.at, verdict=("violated (certified)",) * 6),))
    assert theorem1.judge1(outside).verdict == "violated (certified)"
    assert theorem1.judge1(replace(a, noise_floor=0.1)).why.startswith("The score is not a function")
    assert "the victim draws noise" in theorem1.judge1(replace(a, random=True)).why
    assert theorem2.judge2(a).verdict == "hypothesis not met" and "Victim(module=" in theorem2.judge2(a).why
    assert corollary1.judge_corollary(a).verdict == "vacuous"
    falls = replace(a, corollary=(replace(a.corollary[1], rho=-0.9, low=-1.0, high=-0.5),))
    assert corollary1.judge_corollary(falls).verdict == "violated (not certified)"  # of lower bounds
    rises = replace(a, corollary=(replace(a.corollary[1], rho=0.9, low=0.5, high=1.0),))
    assert corollary1.judge_corollary(rises).verdict == "holds"
    assert corollary1.judge_corollary(replace(rises, clipped=(0.1,) + (0.0,) * 5)).verdict == "hypothesis not met"


def test_other_victims_say_why(slice_):
    x, y = slice_
    v = tiny(x[:3], phase(steps=3))
    a = measured.audit(v, x[:3], y[:3], Linf(6 / 255, space="encoded"), draws=4, shares=(), probe=False)
    assert "encoded space" in a.no_switch and a.entries == 3 * 784 and a.above is None
    b = measured.audit(v, x[:2], y[:2], PIXEL, draws=4, shares=(), probe=False)
    assert "expected the direct code" in b.no_switch and b.eps1 == ()
    assert "first switch not known" in theorems.sentence(b)
    with pytest.raises(ValueError, match="threat: the theorems are about an L-infinity ball of positive radius, got"):
        measured.audit(v, x, y, L2(0.5, space="pixel"))
    with pytest.raises(ValueError, match=r"expected images \[n c h w\] and labels \[n\], n > 0"):
        measured.audit(v, x[:3], y[:2], PIXEL)
    dark = replace(PIXEL, box=(0.5, 1))
    with pytest.raises(ValueError, match=r"expected a clean image in 0.5..1 \(the box of the threat\)"):
        measured.audit(v, x[:3], y[:3], dark, probe=False)
    lost = replace(
        v, logits=lambda u: math.nan * u.sum((0, 2, 3, 4))[:, None].expand(-1, 10), exact=None, shortcut=None
    )
    with pytest.raises(ValueError, match=r"expected finite scores, found others among images 0\.\.2"):
        measured.audit(lost, x[:3], y[:3], PIXEL, probe=False)
    for wrong in ({"batch": 0}, {"draws": 1}):
        with pytest.raises(ValueError, match="expected batch >= 1 and draws >= 2"):
            measured.audit(v, x[:3], y[:3], PIXEL, **wrong)
    with pytest.raises(ValueError, match="scale: expected one of smoke, small, paper, got 'huge'"):
        theorems.theorems(measured_bench(), "huge")


def measured_bench():
    from pathlib import Path

    from sparsetrail.recipes.measure import Bench

    return Bench(out=Path("unused"))


class Reversed(nn.Module):
    """Layers registered in another order than they are called in, one of them never."""

    def __init__(self, backwards):
        super().__init__()
        layers = {"a": nn.Linear(16, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 3), "unused": nn.Linear(3, 3)}
        for name in sorted(layers, reverse=backwards):
            self.add_module(name, layers[name])

    def forward(self, u):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(u.mean(0).flatten(1))))))


def test_layers_come_in_the_order_they_are_called():
    x, y = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
    for backwards in (False, True):
        net = Reversed(backwards).eval()
        v = Victim(encode=lambda x: x[None], logits=net, steps=1, classes=3, module=net)
        a = measured.audit(v, x, y, Linf(0.01, space="pixel"), draws=4, shares=(), probe=False)
        assert [t.layer for t in a.tracking] == ["a", "b", "c"] and list(a.layer_density) == ["a", "b", "c"]


def test_demo_measures_what_is_known(shown):
    assert sum(shown.seconds.values()) < 60
    exact = {c.name: c for c in shown.cases}
    assert exact["a spike at distance 0.9 eps"].exact == pytest.approx(20)
    assert exact["tanh(3 x / eps) at 0"].exact == pytest.approx(1.482, abs=5e-4)
    assert exact["linear, g = (3, 4)"].exact == pytest.approx(5.88)
    for c in shown.cases:
        spread = (c.high - c.low) / 4  # about one standard error
        assert abs(c.drawn - c.exact) < 5 * spread
        assert (c.verdict == "holds") == c.name.startswith("linear")
    assert shown.chains.failed.k == 0 and shown.chains.rho[0] > shown.chains.rho[-1]
    assert list(shown.chains.log10_cond) == sorted(shown.chains.log10_cond)
    assert shown.counts.exact_count.value == shown.counts.gradient_bound.value == 1
    assert shown.above.violated.value > 0.8 and min(r for r in shown.above.ratio if r == r) > 1e6
    plain, real = ([getattr(t, k).k for t in shown.temperature] for k in ("plain", "margin"))
    assert len(set(real)) == 1 and plain[-1] > 1.3 * real[0]
    spiking, control = shown.nets
    assert theorem1.judge1(spiking).verdict == "hypothesis not met"
    assert theorem1.judge1(control).verdict == "vacuous" and min(control.fidelity) > 0.99
    assert control.at.ratio == pytest.approx(control.at.linear_ratio, rel=1)
    assert measured.quantile(spiking.at.ratio, 0.5) < 0.05 * measured.quantile(spiking.at.linear_ratio, 0.5)


def test_demo_is_the_same_again():
    a, b = (demo._cases(torch.Generator().manual_seed(2), draws=500) for _ in range(2))
    assert a == b != demo._cases(torch.Generator().manual_seed(3), draws=500)


def test_pages_tell_the_reader(shown, found, tmp_path):
    page = theorems.page("Title <b>", shown, (*shown.nets, found), FACTS)
    names = [s.name for s in page.statements]
    assert names == ["Theorem 1", "Corollary 1", "Theorem 2", "Theorem 3"]
    (tmp_path / "plot-01-scan.svg").write_text("of an earlier page")
    (tmp_path / "plot-mine.svg").write_text("of somebody else")
    files = write(page, tmp_path)
    assert not (tmp_path / "plot-01-scan.svg").exists() and (tmp_path / "plot-mine.svg").exists()
    raw = json.loads(files["json"].read_text())
    assert raw["numbers"]["audits"][2]["eps1"] == pytest.approx(found.eps1)
    assert raw["numbers"]["demo"]["seed"] == 1
    text, html = files["md"].read_text(), files["html"].read_text()
    for s in page.statements:
        assert s.results and s.instead and f"## {s.name}" in text
        for r in s.results:
            assert r.verdict in text and r.of in html and len(r.why) > 20
    for kind in ("ratios", "radius", "linear", "fidelity", "temperature", "scan", "curve", "tracking"):
        plots = [p for s in page.statements for p in s.plots if p.kind == kind]
        assert plots, kind
        for p in plots:
            assert p.values and "seed" in p.stamp and "torch 2" in p.stamp and re.search(r"n=|all", p.stamp)
            assert any(w in p.stamp for w in ("space", "no threat"))
            spec = draw(p)
            assert spec["title"]["subtitle"] == p.stamp
    assert html.count("data:image/svg+xml") == sum(len(s.plots) for s in page.statements)
    assert "<script" not in html and "http" not in re.sub(r"base64,[^\"]*", "", html).replace("http-equiv", "")
    assert "Title &lt;b&gt;" in html and "\u2264" in html
    body = html[html.index("<body>") :]
    assert "`" not in body and "dW_1" not in body and "dW<sub>1</sub>" in body and "gradient is masked" not in text
    assert '<table class="card">' in body and "white-space: normal; }\n@media" in html  # commands and verdicts wrap
    for words in (text, html):
        assert not re.search(r"theorem( \d)? holds|is true[.]", words, re.I) or "never that a theorem is true" in words
    assert "Theorem holds" not in text + html
    for name in re.findall(r"\((plot-\S+)\)", text):
        assert (tmp_path / name).read_text().startswith("<svg")
    assert len(re.findall(r"!\[", text)) == sum(len(s.plots) for s in page.statements)
    assert len(verdicts(page).rows) == sum(len(s.results) for s in page.statements)
    assert markdown(page) == text
    assert not [w for w in re.findall(r"\bnan\b|\binf\b", text)]


@pytest.mark.parametrize("fidelity, line", [(0.42, "does not reach 0.5"), (0.5, "reaches 0.5")])
def test_a_fidelity_is_told_with_its_line_and_claims_nothing_of_attacks(found, fidelity, line):
    said = theorems.sentence(replace(found, fidelity=(fidelity,) * len(found.fidelity)))
    assert f"is {fidelity:.2f}; it {line}, our line" in said and "robustness numbers" not in said


def test_an_audit_alone_has_a_page(found):
    page = theorems.audit_page(replace(found, identity="abcdef" * 9), FACTS)
    told = ("tiny", "pixel space, L-infinity 8/255", "eval mode", found.route, "slice", "3", "abcdefabcdef")
    assert page.victims.rows == (told,)
    for text in (markdown(page), to_html(page)):
        assert all(part in text for part in told)
    assert {(r["norm"], r["mode"], r["route"], r["data"]) for r in page.images} == {
        ("linf", "eval", found.route, "slice")
    }
    assert found.victim in page.title and all(s.results for s in page.statements)
    assert page.summary[2].startswith("tiny, pixel space, L-infinity 8/255, n=8") and "not met" in page.summary[2]


def test_empty_plots_are_left_out():
    plot = Plot(kind="radius", title="t", caption="c", stamp="s", values=(), marks={"radii": {}})
    empty = theorems.page("t", None, (), FACTS)
    assert all(not s.plots for s in empty.statements)
    s = replace(empty.statements[0], plots=(plot,))
    assert "data:image" not in to_html(replace(empty, statements=(s,)))


FOREIGN = """
import torch
from sparsetrail import Victim

def straight():
    w = torch.randn(10, 784, generator=torch.Generator().manual_seed(0))
    return Victim(encode=lambda x: x.flatten(1)[None], logits=lambda u: u[0] @ w.T, steps=1, classes=10)

def cut():
    return Victim(encode=lambda x: x.flatten(1)[None], logits=lambda u: u[0].detach()[:, :10], steps=1, classes=10)

def dark():
    return Victim(encode=lambda x: x.flatten(1)[None], logits=lambda u: 0 * u[0][:, :10], steps=1, classes=10)

def three():
    return Victim(encode=lambda x: x.flatten(1)[None], logits=lambda u: u[0][:, :3], steps=1, classes=3)

def noisy():
    code = lambda x: torch.rand_like(x).flatten(1)[None] + 0 * x.flatten(1)
    return Victim(encode=code, logits=lambda u: u[0][:, :10], steps=1, classes=10)
"""


def test_foreign_victims_from_a_file(tmp_path, capsys):
    """Any Victim is audited; one without a gradient is refused, one that never moves or always moves is named so."""
    from sparsetrail.cli import main

    file = tmp_path / "foreign.py"
    file.write_text(FOREIGN)

    def audit(function):
        argv = ["theory", "audit", f"{file}:{function}", "--data", "fashion-mnist-slice", "--eps", "8/255", "--space",
                "pixel", "--n", "3", "--draws", "8", "--out", str(tmp_path / function), "--device", "cpu"]  # fmt: skip
        try:
            main([*argv, "--json"])
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        found = json.loads(capsys.readouterr().out)
        return found["title"], {v["statement"]: v for v in found["verdicts"]}

    title, found = audit("straight")
    assert title == "The paper's theorems on foreign:straight" and (tmp_path / "straight" / "theorems.html").exists()
    assert found["Theorem 1"]["verdict"] == "hypothesis not met" and "within the radius" in found["Theorem 1"]["why"]
    assert found["Theorem 2"]["verdict"] == found["Theorem 3"]["verdict"] == "hypothesis not met"
    with open(tmp_path / "straight" / "theorems.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 3 * 5 and {r["space"] for r in rows} == {"pixel"} and float(rows[0]["eps"]) < 8 / 255
    assert audit("cut") == (4, "sparsetrail: expected scores with a gradient, found none; the function detaches its "
                            "input or runs without autograd\n")  # fmt: skip
    code, said = audit("three")
    assert code == 4 and "three: expected 3 classes, found 10 in fashion-mnist-slice" in said
    assert audit("dark")[1]["Theorem 1"]["verdict"] == "undefined"
    assert "Gradient fidelity is undefined" in (tmp_path / "dark" / "theorems.md").read_text()
    assert "not a function: calls on the same images differ" in audit("noisy")[1]["Theorem 1"]["why"]


def test_reproduce_theorems_and_the_verbs(tmp_path, monkeypatch, capsys, shown):
    from sparsetrail.recipes.measure import Bench

    monkeypatch.setattr(theorems, "demo", lambda **_: shown)
    size = theorems.SCALES["smoke"]
    monkeypatch.setitem(theorems.SCALES, "smoke", replace(size, images=64, steps=2, audited=3, draws=4, shares=()))
    page = theorems.theorems(Bench(out=tmp_path), "smoke")
    cases = [r.of for r in page.statements[0].results]
    for name in ("SEW-ResNet18 max pool", "SEW-ResNet18 max pool, smooth control", "SEW-ResNet18 avg pool"):
        assert name in cases
    assert f"{cases[0]}" == "scores with a closed form" and page.numbers["audits"][0]["data"].startswith("fashion")
    out = tmp_path / "audit"
    monkeypatch.setattr(verbs, "run_audit", functools.partial(measured.audit, shares=(), probe=False))
    verbs.audit(str(tmp_path / "models" / "theorems-max"), eps=8 / 255, space="pixel", n=3, draws=4, out=out,
                common=Kept(device="cpu", as_json=True))  # fmt: skip
    line = json.loads(capsys.readouterr().out)
    assert {v["statement"] for v in line["verdicts"]} == {"Theorem 1", "Corollary 1", "Theorem 2", "Theorem 3"}
    assert (out / "theorems.html").exists()
    monkeypatch.setattr(verbs, "run_demo", lambda **_: shown)
    verbs.demo(out=tmp_path / "demo", seed=1)
    said = capsys.readouterr().out
    assert "violated (certified)" in said and str(tmp_path / "demo" / "theorems.html") in said


def test_quantile():
    q = measured.quantile
    assert q([3, math.nan, 1, 2], 0.5) == 2 and math.isnan(q([math.nan], 0.5)) and math.isnan(q([], 0.1))
    assert q([4, 1], 0.5) == 2.5 and q([1, 2, math.inf], 0.5) == 2 and q([1, math.inf], 0.5) == math.inf
    assert q([math.inf, math.inf], 0.5) == math.inf and q([7.0], 0.9) == 7
    values = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert q(values.tolist(), share) == pytest.approx(float(values.quantile(share)), rel=1e-12)
