"""Parts of a backward replaced: the same scores to the bit, gradients by hand, zeros that go with their cause."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsetrail import data
from sparsetrail.core import Trail, TrailRow
from sparsetrail.models import Trained
from sparsetrail.recipes import measure
from sparsetrail.recipes.ablation import ablate, averaged, rebuilt, spread, trace, variants
from sparsetrail.recipes.targets import as_victim, ours
from sparsetrail.report import charts, figure, load, pack, text_tables, write
from sparsetrail.report.ablation_tables import Ablation, AblationRow, ablations
from sparsetrail.report.labels import explain
from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import NetSpec, build
from sparsetrail.snn.neuron import NeuronSpec
from sparsetrail.snn.surrogate import Surrogate
from sparsetrail.training import TrainSpec


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two models that saw a few batches of real pictures, with max and average pool."""
    bench = measure.Bench(out=tmp_path_factory.mktemp("ablation"))
    seen = data.take(data.load("fashion-mnist-slice", "train"), 96, seed=0)
    models = [
        (pool, measure.fit(bench, pool, NetSpec(channels=1, width=0.125, steps=3, pool=pool), phase(steps=3), seen,
                           TrainSpec(epochs=1, batch=16)))
        for pool in ("max", "avg")
    ]  # fmt: skip
    return bench, models, data.take(data.load("fashion-mnist-slice", "test"), 6, seed=0)


@pytest.fixture(scope="module")
def report(tiny):
    bench, models, images = tiny
    return ablate(bench, models, images, batch=4, command="sparsetrail ablate")


def input_gradient(module, x, seed=0):
    x = x.clone().requires_grad_()
    y = module(x)
    g = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed))
    return y.detach(), torch.autograd.grad(y, x, g)[0], g


@pytest.mark.parametrize("size", [4, 5, 7])
@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (3, 2, 1)])
def test_a_max_pool_shows_its_values_and_averages_its_gradient(size, kernel, stride, padding):
    x = (torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    pool = nn.MaxPool2d(kernel, stride, padding)
    values, grad, g = input_gradient(averaged(pool), x)
    assert torch.equal(values, pool(x))
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(F.avg_pool2d(leaf, kernel, stride, padding), leaf, g)
    assert torch.equal(grad, wanted)
    assert averaged(nn.AvgPool2d(2)).__class__ is nn.AvgPool2d and isinstance(averaged(pool), nn.AvgPool2d)


@pytest.mark.parametrize("size", [4, 5, 7])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_strided_1x1_shows_its_values_and_spreads_its_gradient(size, groups):
    conv = nn.Conv2d(4, 6, 1, 2, bias=False, groups=groups)
    x = torch.rand(2, 4, size, size, generator=torch.Generator().manual_seed(1))
    values, grad, g = input_gradient(spread(conv), x)
    assert torch.equal(values, conv(x))
    _, own, _ = input_gradient(conv, x)
    # each cell that the 1x1 sees hands a quarter of its gradient to each of the four it steps over
    wanted = torch.nn.functional.interpolate(own[..., ::2, ::2], scale_factor=2)[..., :size, :size] / 4
    assert torch.allclose(grad, wanted, atol=1e-7) and bool((grad != 0).all()) and not bool((own != 0).all())
    for other in (nn.Conv2d(1, 1, 3, 2), nn.Conv2d(1, 1, 1)):
        assert spread(other) is other


def test_a_rebuilt_network_leaves_the_first_as_it_was():
    net = build(NetSpec(width=0.125, steps=2)).eval()
    twin = rebuilt(net, averaged)
    assert type(net.pool) is nn.MaxPool2d and type(twin.pool) is not nn.MaxPool2d
    u = (torch.rand(2, 1, 3, 32, 32) < 0.5).float()
    assert torch.equal(net(u), twin(u))


def words(net):
    return [v.words for v in variants(net)]


def test_only_what_is_there_is_replaced():
    spec = NetSpec(width=0.125, steps=2)
    every = words(build(spec))
    assert len(every) == len(set(every)) == 9 and "neuron: reset in the graph" in every
    assert not [w for w in words(build(replace(spec, pool="avg"))) if "max pool" in w]
    graph = words(build(replace(spec, neuron=NeuronSpec(detach_reset=False))))
    assert "neuron: reset detached" in graph and "neuron: reset in the graph" not in graph
    assert words(nn.Sequential(nn.Linear(2, 2))) == []
    assert every[-1] == "both: pools, strided 1x1, straight-through, reset in the graph"
    assert graph[-1] == "both: pools, strided 1x1, straight-through"
    twin = words(build(replace(spec, neuron=NeuronSpec(kind="relu"))))
    assert len(twin) == 3 and all(w.startswith("architecture") for w in twin)


def test_variants_of_learnt_neurons_run_too(tiny):
    spec = NetSpec(channels=1, width=0.125, steps=2, neuron=NeuronSpec(kind="diet", reset=None))
    net = build(spec).eval()
    x = torch.rand(2, 1, 28, 28)
    card = {"encoder": {"name": "phase"}}
    model = Trained(net=net, encode=phase(steps=2), card=card, sha256="0", path=tiny[0].out)
    u = phase(steps=2)(x)
    for way in variants(net):
        assert torch.equal(way.victim(model, "diet", "cpu").logits(u), net(u))


def test_zeros_go_with_what_makes_them(report):
    """Untrained but for a moment: all exact zeros of arctan networks are geometry's, with max pool and without."""
    found = {a.victim: a for a in ablations(report.trails)}
    assert list(found) == ["max", "avg"]
    for name, a in found.items():
        rows = {r.replaced: r for r in a.rows if r.part}
        base, skips = a.rows[0], rows["strided 1x1 convolution by average and 1x1"]
        assert base.zero > 0 and base.left == 1 and not base.part
        place = a.kinds.index("conv that leaves cells out")
        assert base.kinds[place] >= 33 / 49 and skips.kinds[place] < 0.5
        assert a.removed("architecture") > 0 and 0 <= a.removed("both") <= 1
        pool = next((i for i, k in enumerate(a.kinds) if "pool" in k), None)
        if name == "max":
            assert pool is not None and base.kinds[pool] >= 0.75
            assert rows["max pool by average pool"].kinds[pool] < base.kinds[pool]
        rectangle = rows["surrogate rectangle(1)"]
        assert rectangle.zero > base.zero and rectangle.route != base.route  # tails that are zero make zeros
        assert all(r.participation is None or 0 < r.participation <= 1 - r.zero for r in a.rows)
        assert base.participation is not None and rows["float64"].participation is None
        assert (
            f"{name}, eval mode, n=6" in a.sentence
            and "both together" in a.sentence
            and "are the work of" in a.sentence
        )
    assert report.summary[:2] == tuple(a.sentence for a in found.values())


def test_a_surrogate_with_tails_of_zero_is_found_out(tiny):
    bench, (_, *_), images = tiny
    seen = data.take(data.load("fashion-mnist-slice", "train"), 32, seed=0)
    neuron = NeuronSpec(surrogate=Surrogate("rectangle", 0.5), detach_reset=True)
    net = NetSpec(channels=1, width=0.125, steps=3, pool="avg", neuron=neuron)
    model = measure.fit(bench, "rectangle", net, phase(steps=3), seen, TrainSpec(epochs=1, batch=16))
    (a,) = ablations(ablate(bench, [("rectangle", model)], images).trails)
    assert a.removed("neuron") > 0.5 > a.removed("architecture")
    assert "the spiking neurons" in a.sentence.split("work of")[1]


def test_nothing_is_said_of_what_was_not_replaced():
    def row(part, left):
        return AblationRow(part=part, replaced=part, route="r", zero=0.5 * left, at_input=0.0, kinds=(), of_all=(),
                           left=left, participation=None)  # fmt: skip

    found = Ablation(victim="v", data="d", n=1, kinds=(), rows=(row("", 1.0), row("neuron", 0.0), row("numbers", 1.0)))
    assert found.sentence == (
        "v, eval mode, n=1: of the zeros in its gradients (50.0 % of all entries) another backward of the neurons "
        "removes 100 %, float64 0 %: they are the work of the spiking neurons."
    )
    weak = replace(found, rows=(row("", 1.0), row("neuron", 0.9)))
    assert weak.sentence.endswith("removes 10.0 %: they are not the work of the spiking neurons alone.")


def test_a_report_as_text_holds_what_is_left_and_says_of_what(report):
    told = text_tables(report, "github")
    for name in ("max", "avg"):
        assert f"Exactly zero gradient entries left, without retraining; {name}, eval mode, " in told
    assert "max pool by average pool" in told and "by kind of operation, mean over operations (range); " in told


def test_the_same_command_computes_nothing_again_and_draws_the_same(tiny, report, tmp_path, monkeypatch):
    bench, models, images = tiny
    monkeypatch.setattr(measure, "trail", lambda *a, **k: pytest.fail("computed again"))
    again = ablate(bench, models, images, batch=4, command="sparsetrail ablate")
    assert again.trails == report.trails and again.summary == report.summary
    files = write(report, tmp_path)
    assert load(tmp_path) == report
    lines = files["ablation"].read_text().splitlines()
    assert lines[0] == "victim,data,n,part,replaced,route,kind,zero,participation" and len(lines) > 40
    assert "What is left of the zeros" in files["html"].read_text() and "What is left" in files["md"].read_text()
    assert "straight-through" not in files["csv"].read_text()  # trails of the networks as they are only
    drawn = figure(report, tmp_path / "ablation.svg", which="ablation").read_text()
    assert "nothing replaced" in drawn and "n=6" in drawn and "seed 0" in drawn


def test_a_kind_has_one_colour_in_every_chart_and_a_row_one_name():
    def spec(*kinds):
        row = AblationRow(part="", replaced="", route="r", zero=0.5, at_input=0.0, kinds=(0.5,) * len(kinds),
                          of_all=(0.1,) * len(kinds), left=1.0, participation=None)  # fmt: skip
        found = Ablation(victim="v", data="d", n=1, kinds=kinds, rows=(row,))
        chart = charts.ablation_spec(found)["layer"][1]
        assert {v["replaced"] for v in chart["data"]["values"]} == {found.grid.rows[0][0]}
        colour = chart["encoding"]["color"]
        assert colour["legend"]["values"] == list(kinds)
        return [colour["scale"]["domain"].index(kind) for kind in kinds]

    assert spec("conv that leaves cells out") == [1] and spec("pool", "conv that leaves cells out") == [3, 1]
    assert spec("add", "neuron")[0] == 6


def test_a_changed_forward_stops_the_recipe(tiny, monkeypatch):
    bench, models, images = tiny
    monkeypatch.setattr("sparsetrail.recipes.ablation.behind", lambda shown, x, hidden: hidden)
    with pytest.raises(AssertionError, match="the forward has changed"):
        ablate(replace(bench, out=bench.out / "other"), models[:1], images)


def test_models_stand_side_by_side_in_one_picture(tiny, tmp_path):
    bench, models, images = tiny
    found = trace(
        bench, [ours(m, n) for n, m in models], images, per_step=True, per_example=True, command="sparsetrail trail"
    )
    assert [t.victim for t in found.trails] == ["max", "avg"] and len(found.models) == 2
    for t, line in zip(found.trails, found.summary, strict=True):
        assert t.victim in line and "created where they stand" in line
    page = write(found, tmp_path)["html"].read_text()
    assert '"trail-0"' in page and '"trail-1"' not in page and '"steps-0"' in page and '"examples-0"' in page


def test_cells_of_before_are_still_read(tiny):
    """A plain trail's key and content are those written before trails knew where zeros come from."""
    bench, models, images = tiny
    name, model = models[0]
    bench = replace(bench, out=bench.out / "old")
    spec = measure._spec(bench, model.sha256, False, as_victim(model, name).route, "eval", images, 0)
    row = {"op": "conv1", "kind": "conv", "depth": 0, "zero": 0.5, "forced": 0.0, "norm": 1.0, "entries": 4,
           "per_step": None}  # fmt: skip
    old = {"victim": "x", "mode": "eval", "data": "d", "n": 6, "steps": 3, "clean_accuracy": 0.5, "rows": [row]}
    bench.cells.write(spec | {"trail": True, "per_step": False}, old)
    found = measure.follow(bench, ours(model, name), images)
    assert found.victim == name and found.rows[0].zero == 0.5 and found.rows[0].created is None
    assert "was not measured" in explain(found)


def rows(*given):
    return tuple(
        TrailRow(op=op, kind=kind, depth=i, zero=zero, forced=forced, norm=1.0, entries=100, inherited=0.0,
                 created=created, zero64=zero)
        for i, (op, kind, zero, forced, created) in enumerate(given)
    )  # fmt: skip


def test_the_sentence_counts_by_hand():
    t = Trail(victim="m", mode="eval", data="d", n=2, steps=1, clean_accuracy=1.0,
              rows=rows(("conv1", "conv", 0.0, 0.0, 0.0), ("pool", "pool", 0.8, 0.75, 0.8),
                        ("skip", "conv", 0.75, 0.75, 0.75), ("bn", "norm", 0.45, 0.0, 0.0)))  # fmt: skip
    said = explain(t)
    assert (
        "50.0 % of the gradient entries at the inputs of the 4 modules measured are exactly zero" in said
    )  # 200 of 400
    assert "77.5 % of them are created where they stand" in said  # 155 of 200
    assert "pool 51.6 %, skip 48.4 %" in said and "96.8 % of those by geometry alone" in said  # 80, 75; 150 of 155
    assert (
        "none of the zeros are float underflow" in said
        and "0 % of the entries at conv1, the first module to run, are" in said
    )
    assert pack(t)["rows"][1]["created"] == 0.8
    lost = replace(t, rows=(replace(t.rows[0], zero=0.5, created=0.5, zero64=0.0), *t.rows[1:]))
    assert "20.0 % of the zeros are float underflow" in explain(lost)  # 50 of 250
    none = replace(t, rows=rows(("conv1", "conv", 0.0, 0.0, 0.0)))
    begin = "m, eval mode, n=2: no gradient entry at the input of the module measured is exactly zero"
    assert explain(none) == f"{begin}."
    arrives = replace(none, rows=(replace(none.rows[0], inherited=0.5),))  # an operation that is no module made them
    assert explain(arrives) == f"{begin}, 50.0 % of those at the output of conv1 are."
    cut = replace(lost, rows=(*lost.rows[1:3], replace(t.rows[0], op="dead", zero=1.0, created=0.0)), unread=("a (x)",))
    assert "at pool, the first of them, are zero; wholly zero at dead; not all was read at a (x)." in explain(cut)


def test_a_module_of_two_names_and_a_network_that_is_one_module_are_rebuilt():
    net = nn.Module()
    net.one = net.two = nn.MaxPool2d(2)
    twin = rebuilt(net, averaged)
    assert type(twin.one) is not nn.MaxPool2d and twin.one is twin.two and type(net.one) is nn.MaxPool2d
    assert type(rebuilt(nn.MaxPool2d(2), averaged)) is not nn.MaxPool2d


def test_a_network_without_a_part_to_replace_is_refused_before_it_is_measured(tiny, monkeypatch):
    bench, models, images = tiny
    monkeypatch.setattr(measure, "trail", lambda *a, **k: pytest.fail("measured"))
    plain = replace(models[0][1], net=nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2)))
    with pytest.raises(ValueError, match=r"plain: expected a max pool, .* found none"):
        ablate(replace(bench, out=bench.out / "plain"), [models[0], ("plain", plain)], images)
