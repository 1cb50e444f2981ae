"""The published figures: as printed, each with the threat its text states and the one its code runs."""

import json
from importlib.resources import files

import pytest

from sparsetrail.data import load, take
from sparsetrail.recipes.paper import row_of
from sparsetrail.recipes.systems import SYSTEMS
from sparsetrail.report import claims

FIGURES = ("table1", "table2", "table3", "fig1", "fig3")
ATTACKS = ("fgsm", "pgd", "none")

# typed from the printed tables, (figure, row, data set): FGSM, PGD, clean
PRINTED = {
    ("table1", "Input discretization", "CIFAR-100"): (15.50, 6.30, 64.40),
    ("table1", "Hire-SNN", "CIFAR-100"): (22.00, 7.50, 65.10),
    ("table1", "Vanilla VGG-11", "CIFAR-100"): (5.30, 0.02, 73.33),
    ("table1", "SNN-RAT WRN-16", "CIFAR-100"): (28.08, 11.31, 69.32),
    ("table1", "SEW-ResNet50", "CIFAR-100"): (21.27, 16.03, 38.91),
    ("table1", "Spiking-ResNet18", "CIFAR-100"): (13.36, 11.15, 23.23),
    ("table1", "Spiking-ResNet34", "CIFAR-100"): (2.43, 1.64, 21.20),
    ("table1", "Spiking-ResNet50", "CIFAR-100"): (3.32, 2.44, 20.56),
    ("table2", "SNN-RAT VGG-11", "CIFAR-10"): (45.23, 21.16, 90.74),
    ("table2", "SNN-RAT WRN-16", "CIFAR-10"): (50.78, 22.71, 92.69),
    ("table2", "SEW-ResNet18", "CIFAR-10"): (46.99, 34.33, 73.78),
    ("table2", "SEW-ResNet34", "CIFAR-10"): (49.20, 36.98, 74.16),
    ("table2", "SEW-ResNet50", "CIFAR-10"): (51.09, 40.55, 73.34),
    ("table2", "SNN-RAT VGG-11", "CIFAR-100"): (25.86, 10.38, 70.89),
    ("table2", "SEW-ResNet18", "CIFAR-100"): (20.81, 13.47, 42.19),
    ("table2", "SEW-ResNet34", "CIFAR-100"): (19.91, 13.25, 41.81),
    ("table3", "SEW-ResNet18", "CIFAR-10"): (45.71, 25.72, 75.76),
    ("table3", "SEW-ResNet34", "CIFAR-10"): (48.72, 29.82, 76.17),
    ("table3", "SEW-ResNet50", "CIFAR-10"): (49.88, 33.29, 75.28),
    ("table3", "SEW-ResNet18", "CIFAR-100"): (17.93, 8.65, 43.32),
    ("table3", "SEW-ResNet34", "CIFAR-100"): (20.07, 10.37, 44.58),
    ("table3", "SEW-ResNet50", "CIFAR-100"): (22.02, 13.37, 43.40),
}


def by_key(figure):
    return {(c.row, c.dataset, c.conditions["attack"]): c for c in claims(figure)}


@pytest.mark.parametrize(
    ("figure", "count"), [("table1", 33), ("table2", 30), ("table3", 18), ("fig1", 2), ("fig3", 2)]
)
def test_every_figure_of_every_row_is_there_once(figure, count):
    found = claims(figure)
    assert len(found) == count
    keys = {(c.row, c.dataset, c.metric) for c in found}
    assert len(keys) == count
    assert {c.figure for c in found} == {figure}


def test_all_is_the_figures_in_order():
    assert claims() == tuple(c for figure in FIGURES for c in claims(figure))


@pytest.mark.parametrize("key", PRINTED)
def test_values_are_as_printed(key):
    figure, row, dataset = key
    found = by_key(figure)
    assert tuple(found[row, dataset, attack].value for attack in ATTACKS) == PRINTED[key]


def test_values_of_the_figures_are_as_printed():
    assert [(c.row, c.value) for c in claims("fig1")] == [("IF neurons", 29.01), ("max pooling", 37.88)]
    assert [(c.row, c.value) for c in claims("fig3")] == [("IF neurons", 16.52), ("average pooling", 0.0)]


def test_tables_1_and_2_agree_where_they_print_the_same_row():
    one, two = by_key("table1"), by_key("table2")
    shared = one.keys() & two.keys()
    assert len(shared) == 15
    assert all(one[key].value == two[key].value for key in shared)


def test_changes_printed_in_table_3_are_differences_from_table_2_but_for_two_slips():
    before, slips = by_key("table2"), {}
    for key, claim in by_key("table3").items():
        change = claim.conditions["printed_change"]
        if round(claim.value - before[key].value, 2) != change:
            slips[key] = change
            assert "printed as a fall" in claim.conditions["note"]
        else:
            assert "note" not in claim.conditions
    assert slips == {
        ("SEW-ResNet34", "CIFAR-100", "fgsm"): -0.16,
        ("SEW-ResNet50", "CIFAR-100", "fgsm"): -0.74,
    }


@pytest.mark.parametrize("claim", claims(), ids=lambda c: f"{c.figure}-{c.row}-{c.dataset}-{c.conditions['attack']}")
def test_every_claim_says_what_is_stated_and_what_is_coded(claim):
    assert claim.stated.endswith(".") and claim.coded.endswith(".")
    assert claim.unit == "%" and 0 <= claim.value <= 100
    assert claim.source.startswith("Luu 2025, arXiv:2509.23762, ")
    number = claim.figure[-1]
    assert f"{'Table' if claim.figure.startswith('table') else 'Figure'} {number}" in claim.source
    keys = {"model", "pool", "attack", "steps", "eps_stated", "eps_coded", "space_stated", "space_coded", "mode_coded"}
    assert keys <= claim.conditions.keys()


def test_the_papers_own_rows_state_pixels_and_run_spikes():
    own = [c for c in claims() if "resnet" in c.conditions["model"] and c.conditions["attack"] in ("fgsm", "pgd")]
    assert len(own) == 12 + 12 + 12
    for claim in own:
        said = claim.conditions
        assert (said["space_stated"], said["eps_stated"]) == ("pixel", 8 / 255)
        assert (said["space_coded"], said["eps_coded"], said["mode_coded"]) == ("encoded", 6 / 255, "train")
        assert "8/255" in claim.stated and "6/255" in claim.coded and "train mode" in claim.coded
        assert said["steps"] == {"fgsm": 1, "pgd": 7}[said["attack"]]


def test_compared_defences_keep_the_threat_they_were_published_under():
    copied = [
        c for c in claims() if "resnet" not in c.conditions["model"] and c.conditions["attack"] in ("fgsm", "pgd")
    ]
    assert len(copied) == 10 + 8
    for claim in copied:
        said = claim.conditions
        assert (said["space_stated"], said["space_coded"]) == ("pixel", "pixel")
        assert said["eps_coded"] == (0.031 if claim.row == "Hire-SNN" else 8 / 255)
        assert said["mode_coded"] != "train"
        assert "copied" in claim.coded and "6/255" not in claim.coded


def test_every_row_of_the_tables_is_a_network_or_a_system_of_ours():
    images = take(load("fashion-mnist-slice", "train"), 2, seed=0)
    rows = {c.row: row_of(c) for c in claims() if c.figure.startswith("table")}
    assert rows == {
        "Input discretization": "discretised_vgg11",
        "Hire-SNN": "hire_vgg11",
        "Vanilla VGG-11": "vanilla_vgg11",
        "SNN-RAT VGG-11": "rat_vgg11",
        "SNN-RAT WRN-16": "rat_wrn16",
        **{f"{f}-ResNet{d}": f"{f.lower()}_resnet{d}" for f in ("SEW", "Spiking") for d in (18, 34, 50)},
    }
    for claim in claims():  # and our model of it answers to the name under which the figure was published
        if (name := row_of(claim)) in SYSTEMS:
            net = SYSTEMS[name].net(images)
            assert (net.arch, net.pool) == (claim.conditions["model"], claim.conditions["pool"])


def test_pools():
    assert {c.conditions["pool"] for c in claims("table3")} == {"avg"}
    pools = {c.conditions["model"]: c.conditions["pool"] for f in ("table1", "table2") for c in claims(f)}
    assert {pool for model, pool in pools.items() if "resnet" in model} == {"max"}
    assert pools["vgg11"] == "avg" and pools["wrn16_4"] == "none"


def test_an_unknown_figure_is_refused_by_name():
    with pytest.raises(ValueError, match=r"expected one of table1, .*fig3, got 'table4'"):
        claims("table4")


def test_the_files_hold_nothing_else():
    folder = files("sparsetrail").joinpath("claims")
    assert sorted(f.name for f in folder.iterdir() if f.name.endswith(".json")) == sorted(f"{f}.json" for f in FIGURES)
    for figure in FIGURES:
        held = json.loads(folder.joinpath(f"{figure}.json").read_text(encoding="utf-8"))
        assert held["schema"] == 1
        assert set(held["threats"]) == {key for row in held["rows"] for key in row["values"]}  # each threat is used
