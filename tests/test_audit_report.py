"""Audits in the report: read back equal, a card of what is known, one threat a table, verdicts in colour and word."""

import dataclasses
import hashlib
import io
import json
import math
import re

import pytest
import test_report
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from rich.console import Console
from test_report import DASH, Page, cells_of, empty, pictures, trail, visit

from sparsetrail import report as room
from sparsetrail.checks import CHECKS, Case
from sparsetrail.core import L0, L2, Audit, Finding, Linf, Rate, Run, Victim
from sparsetrail.report import ReportError, audits, cards, from_json, load, pack, page, to_json, unpack, write
from sparsetrail.report.charts import audit as audit_charts
from sparsetrail.report.labels import Setting, attack_words, setting

PIXEL, CODE = Linf(8 / 255, space="pixel"), Linf(6 / 255, space="encoded")
N, FIRST = 256, 1000  # images, and where they begin in their data set

BATTERY = (  # name, knobs, gradient, images left after it, seconds
    ("pgd", {"steps": 7, "step": 0.01, "loss": "ce", "restarts": 1}, "", 118, 41.3),
    ("fgsm", {}, "", 118, 2.1),
    ("codebook", {"steps": 20, "quantile": 0.1, "momentum": 0.5}, "", 64, 96.0),
    ("pgd", {"steps": 40, "step": 1 / 255, "loss": "margin"}, "", 61, 80.2),
    ("sapgd", {"steps": 100}, "assg, encoder secant", 33, 301.0),
    ("codebook", {"steps": 20, "quantile": 0.1}, "hart", 21, 40.5),
    ("pgd", {"steps": 20, "step": 2 / 255}, "from ReLU twin", 15, 22.0),
    ("square", {"queries": 1000}, "", 12, 130.0),
    ("noise", {"draws": 100, "corners": True}, "", 12, 9.9),
)
EASY = (
    ("pgd", {"steps": 7, "step": 0.0075}, "", 130, 20.0),
    ("apgd", {"steps": 100, "loss": "ce"}, "", 129, 240.0),
)


def finding(id, name, level, value, limit, evidence, advice="", masking=False):
    return Finding(
        id=id, name=name, level=level, value=value, limit=limit, evidence=evidence, advice=advice, masking=masking
    )


FINDINGS = (
    finding("S1", "adversarials are valid", "pass", 0.0, "0", "139 of 139 adversarials lie in ball, box and grid"),
    finding("S4", "forward is deterministic", "pass", 0.0, "1e-4", "5 forwards agree to the bit"),
    finding("S8", "ties", "warn", 0.012, "0.5 %", "3 of 256 images have two equal best scores",
            "count a tie both ways, and say which"),
    finding("G1", "images without gradient", "fail", 0.046, "0", "6 of 128 images have a gradient of exactly zero",
            "widen the surrogate: |u - 1| is beyond its support", masking=True),
    finding("G7", "gradients align", "warn", 0.04, "0.1", "median cosine of two nearby gradients 0.04",
            "the loss is shattered: average gradients over noise", masking=True),
    finding("C10", "no transfer beats the own gradient", "fail", 6 / 256, "warn above 0.2 %, fail above 1 %",
            "6 of 256 images fell to it alone", "the victim's gradient points elsewhere", masking=True),
    finding("C14", "expectation over transformation", "not applicable", None, "1 point", "the victim draws no noise"),
    finding("C15", "the code is attacked as well as it can be", "fail", 54 / 256, "1 %",
            "54 of 256 images fell to it alone", "attack a discrete encoder by its codebook"),
)  # fmt: skip
STEPS = list(range(40))
CURVES = {
    "loss": [
        {"label": "pgd, own route", "steps": STEPS, "mean": [-3 + 3.2 * (1 - 0.93**i) for i in STEPS],
         "low": [-4 + 3.2 * (1 - 0.93**i) for i in STEPS], "high": [-2 + 3.2 * (1 - 0.93**i) for i in STEPS]},
        {"label": "sapgd, assg", "steps": STEPS, "mean": [-3 + 4.6 * (1 - 0.8**i) for i in STEPS],
         "low": [-3.6 + 4.4 * (1 - 0.8**i) for i in STEPS], "high": [-2.4 + 4.8 * (1 - 0.8**i) for i in STEPS]},
        {"label": "codebook", "steps": STEPS[:20], "mean": [-3 + 5.1 * (1 - 0.6**i) for i in STEPS[:20]]},
    ],
    "eps": {"attack": "pgd (steps 10, step eps/4)",
            "eps": [k / 255 for k in (0, 1, 2, 4, 8, 16, 32, 64, 128, 255)],
            "accuracy": [0.82, 0.8, 0.76, 0.66, 0.46, 0.2, 0.06, 0.02, 0.0, 0.0], "n": 128},
}  # fmt: skip
CARD = {
    "name": "SEW-ResNet18", "arch": "sew_resnet18", "pool": "max", "width": 0.25, "stem": "cifar", "steps": 10,
    "parameters": 701_466, "neuron": "IF, threshold 1, hard to 0 reset, detached, atan(2)", "encoder": "phase",
    "encoder settings": "bits 8", "weights sha256": "ab" * 32,
}  # fmt: skip
PROVENANCE = {
    "sparsetrail": "0.1.0", "torch": "2.13.0", "python": "3.12.3", "device": "cpu", "seed": 0,
    "adversarial tensor sha256": "cd" * 32, "command": "sparsetrail audit model",
}  # fmt: skip


def battery(threat, stages, clean, *, victim, mode="eval", n=N, name=None):
    """Runs as an audit makes them: each on the images then standing, named by its settings and its route."""
    runs, standing, broken = [], [i < clean for i in range(n)], [None] * n
    for attack, knobs, via, left, seconds in stages:
        rows = [i for i in range(n) if standing[i]] if runs else list(range(n))
        right = [standing[i] for i in rows]
        told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in knobs.items())
        label = (f"{attack} ({told})" if told else attack) + (f", {via}" if via else "")
        gradient = attack not in ("square", "noise")
        calls = knobs.get("steps", knobs.get("queries", knobs.get("draws", 1)))
        made = Run(
            attack=label, knobs=knobs, threat=threat, victim=victim, mode=mode, data="cifar10 test, n=10000", seed=0,
            route=f"BPTT {via or 'atan(2)'}; phase code, straight through", clean=tuple(right),
            robust=tuple(standing[i] and i < left for i in rows), ties=0, forwards=(calls + 2) * len(rows),
            backwards=calls * len(rows) if gradient else 0, zero_gradient=0.31 if gradient else None,
            dead_examples=6 if gradient else 0, nonfinite=0, trace=(-3.0, -1.0, 0.5), seconds=seconds,
            indices=tuple(FIRST + i for i in rows), silent=1, adversarial=torch.zeros(2),
        )  # fmt: skip
        for i in rows:
            if standing[i] and i >= left:
                standing[i], broken[i] = False, made.attack
        runs.append(made)
    return runs, standing, broken


def masked(threat=PIXEL, stages=BATTERY, clean=210, **changes):
    """A claim that falls: gradients vanish and every stronger attack breaks more."""
    victim = changes.get("victim", "SEW-ResNet18 max pool")
    n = changes.pop("n", N)
    runs, standing, broken = battery(threat, stages, clean, victim=victim, mode=changes.pop("mode", "eval"), n=n)
    default = stages[0][3]
    fields = {
        "victim": victim, "card": CARD, "threat": threat, "data": "cifar10 test, n=10000",
        "indices": tuple(range(FIRST, FIRST + n)), "clean": tuple(i < clean for i in range(n)),
        "default": tuple(i < default for i in range(n)), "worst": tuple(standing), "broken_by": tuple(broken),
        "runs": tuple(runs), "findings": FINDINGS, "curves": CURVES, "verdict": "masked",
        "reason": "the gradient does not show the way: images without gradient (G1), transfer beats the own gradient "
        "(C10); the worst case lies 41.4 points below the default attack's 46.1 %",
        "claim": 0.50, "claim_source": "Luu 2025, Table 2", "default_attack": runs[0].attack, "budget": "standard",
        "complete": True, "seconds": 723.0, "provenance": PROVENANCE,
    }  # fmt: skip
    return Audit(**(fields | changes))


def supported(threat=CODE, **changes):
    """A default attack that nothing beats, under another threat, of a victim that is known by its name alone."""
    fields = {
        "findings": tuple(f for f in FINDINGS if f.level in ("pass", "not applicable")), "curves": {}, "card": {},
        "verdict": "supported", "claim": None, "claim_source": "", "provenance": {}, "seconds": 260.0,
        "reason": "nothing in the battery beats the default attack's 50.8 % by more than chance",
    }  # fmt: skip
    return masked(threat, EASY, **(fields | changes))


def report(**changes):
    fields = {"title": "Is it robust?", "summary": ("The claim does not hold.",), "audits": (masked(), supported())}
    return empty(**(fields | changes))


browser = test_report.browser  # the fixture


def values_in(spec):
    """The rows of data in a specification, each once: layers repeat them."""
    rows = [v for v in test_report.values_in(spec) if isinstance(v, dict)]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def plain(text):
    """The words of a page, as one line."""
    return re.sub(r"\s+", " ", " ".join(Page(text).words))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two audits as a folder, the first with pictures."""
    images = [image | {"audit": 0} for image in pictures()]
    return write(report(trails=(trail(),)), tmp_path_factory.mktemp("audits"), images=images)


@pytest.fixture(scope="module")
def text(written):
    return written["html"].read_text()


def section(text, i):
    """One audit's part of the page."""
    return text.split(f'<section class="audit" id="audit-{i}">')[1].split("</section>")[0]


# --- JSON -------------------------------------------------------------------------------------------------------


def test_audits_are_read_back_equal(written):
    assert from_json(to_json(report())) == report()
    assert load(written["json"]).audits == report().audits
    for audit in report().audits:
        assert unpack(Audit, pack(audit)) == audit


def test_adversarial_tensors_stay_out_of_audits_too():
    assert b'"adversarial":' not in to_json(report()) and "adversarial" not in pack(masked())["runs"][0]
    assert from_json(to_json(report())).audits[0].runs[0].adversarial is None


def test_nan_is_null_in_findings_curves_and_provenance():
    broken = dataclasses.replace(FINDINGS[0], value=math.nan)
    audit = masked(findings=(broken,), curves={"loss": [{"label": "pgd", "steps": [0], "mean": [math.nan]}]},
                   provenance={"share": math.inf})  # fmt: skip
    body = json.loads(to_json(empty(audits=(audit,))))["audits"][0]
    assert body["findings"][0]["value"] is None and body["curves"]["loss"][0]["mean"] == [None]
    assert body["provenance"] == {"share": None}
    back = from_json(to_json(empty(audits=(audit,)))).audits[0]
    page.page(empty(audits=(back,)))  # and null is no number to draw
    assert audits.number(back.findings[0].value) == DASH


def test_a_report_from_before_audits_is_still_read():
    body = json.loads(to_json(empty()))
    del body["audits"]
    assert from_json(json.dumps(body)) == empty()


def test_what_does_not_belong_to_an_audit_is_refused_by_its_path():
    body = json.loads(to_json(report()))
    body["audits"][0]["verdict"] = "robust"
    with pytest.raises(room.ReportError, match=r"at `\$\.audits\[0\]\.verdict`"):
        from_json(json.dumps(body))


# --- the ledger -------------------------------------------------------------------------------------------------


def test_every_image_falls_once_and_what_is_left_is_of_all_images():
    made = audits.steps(masked())
    assert [s.left.k for s in made] == [left for *_, left, _ in BATTERY] and {s.left.n for s in made} == {N}
    assert [s.met for s in made] == [210, *(left for *_, left, _ in BATTERY[:-1])]
    assert sum(s.broken for s in made) == 210 - 12
    by_name = masked().broken_by
    assert all(s.broken == by_name.count(s.run.attack) for s in made)


def test_an_image_that_was_taken_back_at_the_last_judgement_stands():
    audit = masked()
    worst = tuple(held or i == 150 for i, held in enumerate(audit.worst))  # 150 fell to the first attack
    made = audits.steps(dataclasses.replace(audit, worst=worst))
    assert made[0].broken == 91 and made[-1].left == Rate(13, N)


def test_what_no_run_explains_is_said():
    audit = masked(stages=BATTERY[:2], worst=tuple(i < 12 for i in range(N)))
    rows = {row[1]: row for row in audits.battery_grid(audit).rows}
    assert rows["not by a run above"][4:6] == ("106", "4.7 % [2.7, 8.0]")


@pytest.mark.parametrize("change", [{"threat": CODE}, {"mode": "train"}, {"threat": Linf(4 / 255, space="pixel")}])
def test_runs_under_other_conditions_have_no_place_in_the_battery(change):
    audit = masked()
    stray = dataclasses.replace(audit.runs[1], attack="stray", **change)
    audit = dataclasses.replace(audit, runs=(*audit.runs, stray))
    assert stray not in audits.battery(audit) and len(audits.steps(audit)) == len(BATTERY)
    assert "stray" not in audits.battery_grid(audit).text()
    other = audits.other_grid(audit)
    assert other is not None and setting(stray).short in other.text()
    assert "Runs under other conditions" in plain(page.page(empty(audits=(audit,))))


@given(st.lists(st.integers(0, 210), min_size=1, max_size=6), st.integers(0, 210))
@effort(max_examples=20)
def test_shares_left_never_rise_and_end_at_the_worst_case(falls, start):
    left = [min([start, *falls[:i]]) for i in range(len(falls) + 1)]
    audit = masked(stages=tuple(("pgd", {"steps": 7 + i}, "", k, 1.0) for i, k in enumerate(left)))
    made = audits.steps(audit)
    assert [s.left.k for s in made] == left and made[-1].left == audit.accuracy


# --- the card ---------------------------------------------------------------------------------------------------


def test_the_card_extends_robustbench(written):
    assert written["card"].name == "card.json"
    first, second = json.loads(written["card"].read_text())
    theirs = {k: first[k] for k in ("eps", "clean_acc", "reported", "autoattack_acc", "external", "unreliable")}
    assert theirs == {
        "eps": "8/255", "clean_acc": "82.03", "reported": "50.00", "autoattack_acc": None, "external": "4.69",
        "unreliable": True,
    }  # fmt: skip
    assert first["dataset"] == "cifar10 test, n=10000" and first["architecture"] == "sew_resnet18"
    assert not {"link", "name", "authors", "venue"} & set(first)  # not known, so not there
    assert (second["verdict"], second["unreliable"], second["reported"]) == ("supported", False, None)


def test_the_card_says_what_an_entry_of_a_spiking_network_needs():
    (made,) = cards(empty(audits=(masked(),), trails=(trail(),)))
    assert made["network"] == {
        "neuron": "IF", "reset": "hard to 0", "theta": 1.0, "leak": "none", "T": 10, "surrogate": "atan(2)",
        "pooling": "max", "defence": None, "parameters": 701_466,
    }  # fmt: skip
    assert made["encoder"] == {"name": "phase", "settings": "bits 8"}
    threat = made["threat"]
    assert (threat["space"], threat["norm"], threat["eps"], threat["eps_levels"]) == ("pixel", "linf", 8 / 255, 8)
    assert made["bn_mode"] == "eval" and made["stochastic"] == {"draws_noise": False, "eot": 1, "votes": 1}
    indices = tuple(range(FIRST, FIRST + N))
    assert made["images"]["n"] == N
    assert made["images"]["index_sha256"] == hashlib.sha256(str(indices).encode()).hexdigest()
    for key, rate in (("clean", Rate(210, N)), ("default_attack", Rate(118, N)), ("worst_case", Rate(12, N))):
        here = made["accuracy"][key]
        assert (here["value"], here["k"], here["n"], here["low"], here["high"]) == (
            rate.value, rate.k, N, *rate.interval(),
        )  # fmt: skip
    assert made["accuracy"]["claimed"] == 0.5 and made["accuracy"]["claim_source"] == "Luu 2025, Table 2"
    assert [a["accuracy_left"]["k"] for a in made["attacks"]] == [left for *_, left, _ in BATTERY]
    pgd, square = made["attacks"][0], made["attacks"][7]
    assert (pgd["steps"], pgd["restarts"], pgd["queries"]) == (7, 1, None) and square["queries"] == 1000
    assert len(made["gradient_estimators"]) == 4 and not any("Square" in r for r in made["gradient_estimators"])
    assert made["zero_gradient"]["images"]["k"] == 6 and made["zero_gradient"]["images"]["n"] == 210
    flags = {f["id"]: (f["verdict"], f["value"], f["masking"]) for f in made["flags"]}
    assert flags["G1"] == ("fail", 0.046, True) and flags["C14"] == ("not applicable", None, False)
    assert made["adversarial_sha256"] == "cd" * 32 and made["weights_sha256"] == "ab" * 32
    assert made["versions"] == {"sparsetrail": "0.1.0", "torch": "2.13.0", "python": "3.12.3"}
    assert made["seconds"] == 723.0 and made["trails"][0]["most_zero"] == "pool"


def test_what_a_foreign_victim_does_not_tell_is_null():
    (made,) = cards(empty(audits=(supported(),)))
    assert set(made["network"].values()) == {None} and made["encoder"] == {"name": None, "settings": None}
    for key in ("adversarial_sha256", "weights_sha256", "versions", "device", "seed", "architecture", "trails"):
        assert made[key] is None, key
    assert made["threat"]["eps_levels"] is None and made["threat"]["value_grid"] is None  # encoded: no grey levels
    assert cards(empty(audits=(supported(runs=()),)))[0]["bn_mode"] is None


def test_a_card_reads_nested_entries_as_a_model_file_has_them():
    net = {"steps": 4, "neuron": {"kind": "lif", "threshold": 0.5, "reset": None, "tau": 2.0,
                                  "surrogate": {"name": "triangle", "width": 1.0}}}  # fmt: skip
    paper = {"link": "https://arxiv.org/abs/2509.23762", "authors": "Luu"}
    (made,) = cards(
        empty(audits=(masked(card={"net": net, "encoder": {"name": "direct", "knobs": {"steps": 4}}} | paper),))
    )
    assert made["network"] | {"parameters": 0} == {
        "neuron": "LIF", "reset": "soft", "theta": 0.5, "leak": "tau 2", "T": 4, "surrogate": "triangle(1)",
        "pooling": None, "defence": None, "parameters": 0,
    }  # fmt: skip
    assert made["encoder"] == {"name": "direct", "settings": {"steps": 4}}
    assert (made["link"], made["authors"]) == (paper["link"], paper["authors"])


@pytest.mark.parametrize("verdict", ["supported", "overstated", "masked", "inconclusive"])
def test_only_an_evaluation_that_cannot_be_trusted_is_unreliable(verdict):
    (made,) = cards(empty(audits=(masked(verdict=verdict),)))
    assert made["unreliable"] == (verdict in ("masked", "inconclusive"))


def test_no_audit_no_card(tmp_path):
    assert "card" not in write(empty(), tmp_path) and not (tmp_path / "card.json").exists()


# --- labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threat", "short", "words"),
    [
        (L2(0.5, space="pixel"), "pixel L2 0.5, eval mode", "the pixels of the image by an L2 distance of at most 0.5"),
        (L2(128 / 255, space="encoded"), "encoded L2 128/255, eval mode", "over all steps together, by an L2 distance"),
        (L0(200, space="encoded"), "encoded L0 200 entries, eval mode", "at most 200 entries of the encoded input"),
        (L0(1, space="pixel"), "pixel L0 1 entry, eval mode", "at most 1 entry of the image"),
        (PIXEL, "pixel 8/255, eval mode", "every pixel of the image by at most 8/255 of the range 0..1"),
    ],
    ids=str,
)
def test_norms_are_named(threat, short, words):
    here = Setting(threat, "eval", "")
    assert here.short == short and words in here.sentence
    made = masked(threat, EASY)
    assert audits.title(made).endswith(short) and setting(made.runs[0]).threat == threat
    assert short in plain(page.page(empty(audits=(made,))))


def test_two_norms_of_one_size_are_two_settings():
    here = {Setting(t, "eval", "").short for t in (L2(8 / 255, space="pixel"), PIXEL, L0(8, space="pixel"))}
    assert len(here) == 3


def test_names_of_runs_are_those_of_the_literature():
    run = masked().runs[4]
    assert attack_words(run) == ("SA-PGD-100", "", "assg, encoder secant")
    assert attack_words(masked().runs[0]) == ("PGD-7", "step 0.01, loss ce, restarts 1", "")
    assert attack_words(masked().runs[6])[2] == "from ReLU twin"
    assert attack_words(dataclasses.replace(run, attack="pgd (authors)", knobs={"steps": 7}))[0] == "PGD-7 (authors)"
    noisy = attack_words(dataclasses.replace(run, attack="apgd", knobs={"steps": 100}, eot=10, votes=5))
    assert noisy[:2] == ("APGD-100", "mean of 10 gradients, 5 votes")
    for name, said in {
        "mifgsm": "MI-FGSM-10",
        "rfgsm": "R-FGSM-10",
        "bim": "BIM-10",
        "sda": "SDA-10",
        "x": "x-10",
    }.items():
        assert attack_words(dataclasses.replace(run, attack=name, knobs={"steps": 10}))[0] == said


# --- the page ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "tone"), [("supported", "good"), ("overstated", "warn"), ("masked", "bad"), ("inconclusive", "none")]
)
def test_a_verdict_is_a_word_and_a_colour(verdict, tone):
    text = page.page(empty(audits=(masked(verdict=verdict),)))
    headline = text.split('<div class="verdict')[1].split("</div>")[0]
    assert f"tone-{tone}" in headline and re.search(rf"</span> {verdict}</p>", headline)
    assert "the gradient does not show the way" in headline


def test_the_headline_has_three_figures_with_intervals_n_and_the_threat(text):
    said = plain(section(text, 0))
    assert "Audit: SEW-ResNet18 max pool pixel 8/255, eval mode" in said
    assert re.search(
        r"claimed 50\.0 % as published Luu 2025, Table 2 default attack 46\.1 % \[40\.1, 52\.2\], n=256 PGD-7", said
    )
    assert "worst case 4.7 % [2.7, 8.0], n=256" in said
    assert "The worst case lies 45.3 points below the claim; 106 of the 118 images" in said
    assert "The adversary may change every pixel of the image by at most 8/255" in said
    other = plain(section(text, 1))
    assert "no claim" in other and "the default attack stands in for it" in other


def test_the_battery_is_on_the_page_with_knobs_route_calls_and_seconds(text):
    said = plain(section(text, 0))
    for words in (
        "PGD-7 (step 0.01, loss ce, restarts 1)", "BPTT hart; phase code, straight through", "54 (21.1 %)",
        "25.0 % [20.1, 30.6]", "15\u202f030", "301.0", "not applicable", "left of 256",
    ):  # fmt: skip
        assert words.replace("\u202f", " ") in said.replace("\u202f", " "), words


def test_every_check_has_a_colour_and_a_word_failures_first(text):
    rows = re.findall(r'<tr class="tone-(\w+)( raised)?">(.*?)</tr>', section(text, 0), re.S)
    assert [tone for tone, _, _ in rows] == ["bad"] * 3 + ["warn"] * 2 + ["good"] * 2 + ["none"]
    for finding, (_, raised, row) in zip(audits.ordered(FINDINGS), rows, strict=True):
        said = plain(row)
        for words in (finding.id, finding.name, finding.level, audits.number(finding.value), finding.limit,
                      finding.evidence, finding.advice):  # fmt: skip
            assert words in said.replace("\u00a0", " "), words
        assert bool(raised) == (finding.level in ("warn", "fail"))
        assert ("sign of masking" in said) == (finding.masking and bool(raised))


def test_every_accuracy_stands_with_its_interval():
    body = page.page(report()).split("</main>")[0]
    for audit in report().audits:
        rates = [audit.clean_accuracy, audit.default_accuracy, audit.accuracy, *(s.left for s in audits.steps(audit))]
        for rate in rates:
            low, high = rate.interval()
            assert f"[{100 * low:.1f}, {100 * high:.1f}" in body
            assert f"{100 * rate.value:.1f} %" in body


def tables_of(text):
    """Tables of a page: caption and words."""
    return [
        (re.search(r"<caption[^>]*>(.*?)</caption>", table, re.S)[1], plain(table))
        for table in re.findall(r"<table.*?</table>", text.split("<script>")[0], re.S)
    ]


def test_no_table_holds_two_threats(text):
    pixel, code = "pixel 8/255", "encoded 6/255"
    found = tables_of(text)
    assert len(found) > 6
    for caption, words in found:
        assert not (pixel in words and code in words), caption
    summaries = [(caption, words) for caption, words in found if caption.endswith(", eval mode")]
    assert [caption for caption, _ in summaries] == ["pixel 8/255, eval mode", "encoded 6/255, eval mode"]
    assert "✗ masked" in summaries[0][1] and "✓ supported" in summaries[1][1]
    assert "46.1 %" in summaries[0][1] and "50.8 %" in summaries[1][1]


def test_audits_of_one_threat_share_a_table_and_other_modes_do_not():
    twin = masked(victim="SEW-ResNet18 avg pool")
    trained = masked(mode="train")
    bundles = audits.summaries((masked(), supported(), twin, trained))
    assert [(s.short, [i for i, _ in members]) for s, members in bundles] == [
        ("pixel 8/255, eval mode", [0, 2]), ("encoded 6/255, eval mode", [1]), ("pixel 8/255, train mode", [3]),
    ]  # fmt: skip


def test_an_unfinished_battery_says_so():
    assert "standard budget, not complete" in plain(page.page(empty(audits=(masked(complete=False),))))


def test_the_page_needs_nothing_and_is_well_formed(text):
    seen = Page(text)
    assert seen.outside == [] and seen.open == [] and seen.unscoped == []
    assert set(seen.tables) == {1}
    ids = re.findall(r'\bid="([^"]+)"', text.split("<script>")[0])
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    stills = re.findall(r'<div id="(audit-[^"]+)"><img alt="([^"]+)" src="data:image/svg\+xml;base64,', text)
    assert [name for name, _ in stills] == [
        "audit-0-fall", "audit-0-battery", "audit-0-loss", "audit-0-eps", "audit-1-fall", "audit-1-battery",
    ]  # fmt: skip
    assert "Clean 82.0 % [76.9, 86.2], claimed 50.0 % as published, default attack 46.1 %" in stills[0][1]


def test_pictures_of_an_audit_stand_in_its_section(text, written):
    assert "difference \u00d7 8" in plain(section(text, 0)) and "difference" not in plain(section(text, 1))
    assert '<section id="examples">' not in text
    again = write(load(written["json"]), written["json"].parent)  # pictures are kept with their place
    assert "difference \u00d7 8" in plain(section(again["html"].read_text(), 0))


def test_the_trail_of_the_victim_is_linked(text):
    assert 'href="#trail"' in section(text, 0) and '<section id="trail">' in text
    assert 'href="#trail"' not in section(page.page(report(trails=())), 0)


def test_names_cannot_break_out_of_the_audit():
    nasty = "</script><script>alert(1)</script><b>&\"'"
    audit = masked(
        victim=nasty, reason=nasty, claim_source=nasty, data=nasty, budget=nasty, card={nasty: nasty},
        findings=(finding(nasty, nasty, "fail", 1.0, nasty, nasty, nasty),), provenance={nasty: nasty},
        curves={"loss": [{"label": nasty, "steps": [0, 1], "mean": [0, 1]}],
                "eps": {"attack": nasty, "eps": [0.0], "accuracy": [1.0], "n": 8}},
    )  # fmt: skip
    runs = tuple(dataclasses.replace(run, attack=nasty, route=nasty, note=nasty) for run in audit.runs)
    whole = empty(audits=(dataclasses.replace(audit, runs=runs), supported(victim=nasty)))
    text = page.page(whole)
    assert nasty not in text and "<script>alert" not in text
    seen = Page(text)
    assert seen.open == [] and nasty in "".join(seen.words)


def test_a_report_without_audits_has_no_word_of_them():
    body = page.page(empty()).split("<main>")[1]
    assert "audit" not in body.lower() and "Audit" not in page.markdown(empty())


def test_an_audit_of_nothing_is_still_a_page():
    bare = masked(runs=(), findings=(), curves={}, card={}, provenance={}, claim=None, claim_source="", data="",
                  default_attack="none")  # fmt: skip
    said = plain(page.page(empty(audits=(bare,))))
    assert "no check was run" in said and "data not stated" in said
    gone = dataclasses.replace(bare, default=(False,) * N, worst=(False,) * N)
    assert audits.fall(gone) == "No image survives the default attack."


# --- charts -----------------------------------------------------------------------------------------------------


def test_every_chart_says_what_it_rests_on():
    report = empty(audits=(masked(), supported()), provenance={"seed": 3, "torch": "2", "sparsetrail": "0.1"})
    drawn = page._charts(report)
    assert {name.split("-")[1] for name in drawn} == {"0", "1"}
    for name, spec in drawn.items():
        data, threat, rest = spec["title"]["text"]
        assert f"n={N}" in data and rest == "seed 3; sparsetrail 0.1; torch 2"
        assert threat == f"{PIXEL if name.startswith('audit-0') else CODE}, crafted in eval mode"


def test_the_fall_chart_holds_the_figures_and_no_interval_for_the_claim():
    marks = [v for v in values_in(audit_charts.fall_spec(masked())) if "name" in v]
    by_name = {v["name"]: v for v in marks}
    assert list(dict.fromkeys(by_name)) == ["clean", "claimed", "default attack", "worst case"]
    assert by_name["worst case"]["value"] == 100 * 12 / N and by_name["worst case"]["low"] < 4.7
    assert by_name["claimed"]["low"] == by_name["claimed"]["high"] == 50.0
    assert "claimed" not in {v.get("name") for v in values_in(audit_charts.fall_spec(supported()))}


def test_the_battery_chart_says_what_each_attack_broke():
    rows = {v["row"]: v for v in values_in(audit_charts.battery_spec(masked()))}
    order = list(rows)
    assert (order[0], order[-1], len(order)) == ("clean", "worst case", len(BATTERY) + 2)
    row = rows["6. codebook-20, hart"]
    assert (row["before"], row["left"]) == (100 * 33 / N, 100 * 21 / N)
    assert row["said"] == "\u22124.7 points, 12 images" and rows["2. FGSM"]["said"] == "none"


def test_attacks_of_one_name_are_told_apart_in_chart_and_terminal():
    more = (
        ("pgd", {"steps": 8, "loss": "margin"}, "", 14, 1.0),
        ("noise", {"draws": 5, "corners": True}, "", 13, 1.0),
        ("noise", {"draws": 5, "corners": False}, "", 13, 1.0),
        ("noise", {"draws": 5, "corners": False}, "hart", 12, 1.0),
    )
    audit = masked(stages=(BATTERY[0], *more))
    names = ["2. PGD-8, loss margin", "3. noise, corners yes", "4. noise, corners no", "5. noise, hart"]
    assert [v["row"] for v in values_in(audit_charts.battery_spec(audit)) if "row" in v][2:6] == names
    assert [row[0] for row in audits.short_grid(audit).rows][2:6] == names


def test_an_l0_ball_has_no_steepest_direction_and_a_code_no_grey_levels():
    def logits(u):
        s = u.mean((0, 2, 3, 4))
        return torch.stack([s, 0.7 - s], 1)

    v = Victim(encode=lambda x: (x > 0.5).float()[None], logits=logits, steps=1, classes=2)
    x = torch.zeros(3, 1, 2, 2)
    x[:, :, 0] = 1
    x[0, :, :, 0] = 1
    y = torch.tensor([0, 0, 0])
    probe = Case(v, L0(2, space="encoded"), x, y)
    found = CHECKS["G4"](probe)
    assert (found.level, found.evidence) == ("not applicable", "an L0 ball has no steepest direction")
    told = CHECKS["S1"](probe).evidence
    assert "grey levels" not in told and re.search(r"; (1 adversarial|\d+ adversarials) in encoded space, not", told)
    assert "rounded to grey levels, 0 of" in CHECKS["S1"](Case(v, Linf(0.6, space="pixel"), x, y)).evidence


def test_curves_are_drawn_as_far_as_they_are_there():
    assert audit_charts.loss_spec(supported()) is None and audit_charts.eps_spec(supported()) is None
    values = values_in(audit_charts.loss_spec(masked()))
    assert {v["low"] for v in values if v.get("attack") == "codebook"} == {None}
    assert max(v["step"] for v in values if v.get("attack") == "sapgd, assg") == 39
    odd = masked(
        curves={"loss": [{"label": "x", "mean": [1.0, None, 2.0]}, {}], "eps": {"eps": [0.1], "accuracy": [0.5]}}
    )
    assert [v["step"] for v in values_in(audit_charts.loss_spec(odd))] == [0, 2]
    point = next(v for v in values_in(audit_charts.eps_spec(odd)) if "value" in v)
    assert point["low"] == point["high"] == 50.0  # without n there is no interval
    assert "n=" not in plain(page.page(empty(audits=(odd,)))).split("Accuracy of one attack by its radius")[1][:60]


def test_the_radius_axis_counts_in_255ths_and_marks_the_audited_one():
    values = values_in(audit_charts.eps_spec(masked()))
    assert [round(v["eps"]) for v in values if "value" in v] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 255]
    low, high = Rate(59, 128).interval()
    eight = next(v for v in values if v.get("said") == "8/255")
    assert (eight["low"], eight["high"], eight["n"]) == (100 * low, 100 * high, 128)
    assert [round(v["eps"]) for v in values if v.get("word") == "audited"] == [8]


# --- Markdown and the terminal ----------------------------------------------------------------------------------


def test_markdown_says_the_same(written):
    text = written["md"].read_text()
    for words in (
        "## Audits", "### encoded 6/255, eval mode", "## Audit: SEW-ResNet18 max pool, pixel 8/255, eval mode",
        "**✗ masked**: the gradient", "claimed **50.0 %** as published (Luu 2025, Table 2) → default attack **46.1 %**",
        "→ worst case **4.7 %** [2.7, 8.0], n=256", "54 (21.1 %)", "25.0 % [20.1, 30.6]",
        "3 fail, 2 warn, 2 pass, 1 not applicable.", "✗ fail, sign of masking", "**no claim** (the default attack",
    ):  # fmt: skip
        assert words in text, words
    assert "No attack was run" not in text


def test_a_bar_in_a_check_does_not_end_its_cell():
    text = audits.checks_grid(FINDINGS).text()
    assert r"\|u - 1\|" in text
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}
    assert bars == {7}


def test_a_markdown_summary_has_one_threat_a_table():
    for here, members in audits.summaries(report().audits):
        found, heads = cells_of(audits.summary_grid(here, [a for _, a in members]).text())
        assert found["n"] == ["256"] and heads[0] == "victim" and len(found["worst case"]) == 1


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_terminal_ends_with_the_verdict(width):
    out = io.StringIO()
    room.console(empty(audits=(masked(),)), Console(file=out, width=width))
    text = re.sub(r"\s+", " ", out.getvalue())
    for words in ("✗ masked: the gradient", "default attack 46.1 % [40.1,", "6. codebook-20, hart", "[20.1, 30.6]",
                  "✗ fail, sign of masking G1", "3 fail, 2 warn"):  # fmt: skip
        assert words in text or (width == 60 and words.startswith("6.")), words
    assert "…" not in text and "S1" not in text  # what passed is counted, not listed
    assert text.rindex("masked") > text.rindex("Checks raised")


def test_beside_other_runs_an_audit_is_a_row_in_the_terminal():
    whole, out = report(), io.StringIO()
    attack = whole.audits[0].runs[0]
    room.console(dataclasses.replace(whole, runs=(attack,)), Console(file=out, width=120))
    text = re.sub(r"\s+", " ", out.getvalue())
    for audit in whole.audits:
        assert f"{100 * audit.accuracy.value:.1f} %" in text and audit.verdict in text
        assert all(f"{f.id} {f.name}" in text for f in audit.alarms)
    assert "newly broken" not in text and text.index("worst case") > text.index("Wilson")


# --- a real browser ---------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_audits_are_drawn_offline_and_in_silence(browser, written, scheme):
    tab, said, asked = visit(browser, written["html"], color_scheme=scheme, viewport={"width": 390, "height": 800})
    for place in ("audit-0-fall", "audit-0-battery", "audit-0-loss", "audit-0-eps", "audit-1-fall"):
        tab.wait_for_selector(f"#{place} svg.marks", timeout=20_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert said == [] and asked == [written["html"].as_uri()]
    tab.context.close()


# --- figures ----------------------------------------------------------------------------------------------------


def test_every_chart_of_an_audit_is_a_figure_with_its_threat_and_its_own_n(tmp_path):
    report = empty(audits=(masked(), supported()), trails=(trail(),))
    drawn = room.figures(report, tmp_path, "json")
    assert [p.name for p in drawn] == ["trail.json", "fall.json", "battery.json", "loss.json", "radius.json"]
    told = {p.stem: json.loads(p.read_text()) for p in drawn}
    assert len(told["fall"]["vconcat"]) == len(told["battery"]["vconcat"]) == 2  # a panel a threat
    for panel, threat in zip(told["battery"]["vconcat"], ("pixel space", "encoded space"), strict=True):
        assert threat in panel["title"]["text"][1] and "crafted in eval mode" in panel["title"]["text"][1]
        assert "max pool" in panel["vconcat"][0]["title"]["text"]
    n = CURVES["eps"]["n"]
    for name in ("loss", "radius"):  # only the first audit kept curves; of a sample, which is not all
        (panel,) = told[name]["vconcat"]
        assert panel["title"]["subtitle"].count(f"n={n}") == 1 and n < N
    (vector,) = [p for p in room.figures(report, tmp_path, "svg") if p.stem == "radius"]
    assert vector.read_text().startswith("<svg") and f"n={n}" in vector.read_text()
    with pytest.raises(ReportError, match="expected a report with an audit over several radii, found none"):
        room.figure(empty(audits=(supported(),)), tmp_path / "r.svg", which="radius")
    with pytest.raises(ReportError, match="kind: expected one of svg, pdf, png, json, found 'gif'"):
        room.figures(report, tmp_path / "gif", "gif")
    assert not (tmp_path / "gif").exists()
    with pytest.raises(ReportError, match="trails, runs or audits to draw, found none"):
        room.figures(empty(), tmp_path, "svg")
