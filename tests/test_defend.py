"""Defences: each is the loop its source writes, off is plain training to the bit, crafting leaves the network alone."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from lively import lively
from torch import nn
from torch.nn import functional as F

from sparsetrail import data
from sparsetrail.convert import calibrate, convert
from sparsetrail.core import Route
from sparsetrail.defend import DEFENCES, hire_snn, mppd, pgd_at, snn_rat, sr, tg_reg, trades
from sparsetrail.defend.snn_rat import retract, to_simplex
from sparsetrail.recipes.systems import DIET, IF
from sparsetrail.snn.encode import direct, phase, poisson
from sparsetrail.snn.net import NetSpec, build, victim
from sparsetrail.snn.neuron import Neuron, NeuronSpec
from sparsetrail.training import Optimizer, Seams, Step, TrainingStopped, TrainSpec, scores, train

NET = NetSpec(arch="wrn16_4", width=0.0625, channels=1, steps=3, neuron=IF, normalise="half")
CODE = direct(steps=3)
SPEC = TrainSpec(optimizer="sgd", lr=0.05, batch=8, epochs=1, validation=0.0)
HIRE = replace(
    NET, arch="vgg5", pool=None, norm="none", neuron=replace(DIET, threshold=0.05), steps=4, dropout=0.2, readout="sum"
)


@pytest.fixture(scope="module")
def images():
    return data.take(data.load("fashion-mnist-slice", "train"), 160, seed=0)


def keyed(i):
    return torch.Generator().manual_seed(i)


# ---- each is the loop its source writes ------------------------------------------------------------------------------


def ce(z, y):
    return F.cross_entropy(z, y)


def ascend(net, x, y, eps, steps, step, start=None, loss=None):
    """Projected signed ascent by plain autograd on a copy in eval mode."""
    net = copy.deepcopy(net).eval()
    u = x if start is None else start
    for _ in range(steps):
        u = u.detach().requires_grad_()
        z = net(CODE(u))
        (ce(z, y) if loss is None else loss(z)).backward()
        u = (u + step * u.grad.sign()).detach()
        u = (x + (u - x).clamp(-eps, eps)).clamp(0, 1)
    return u.detach()


def plain_loss(net, x, y, g):
    return ce(net(CODE(x)), y)


def at_loss(net, x, y, g):
    return ce(net(CODE(ascend(net, x, y, 2 / 255, 2, 1 / 255))), y)


def strong_at_loss(net, x, y, g):
    start = (x + 8 / 255 * (2 * torch.rand(x.shape, generator=g) - 1)).clamp(0, 1)
    return ce(net(CODE(ascend(net, x, y, 8 / 255, 3, 4 / 255, start))), y)


def rfgsm_loss(net, x, y, g):
    start = (x + 1 / 255 * torch.randn(x.shape, generator=g).sign()).clamp(0, 1)
    return ce(net(CODE(ascend(net, x, y, 2 / 255, 1, 1 / 255, start))), y)


def trades_loss(net, x, y, g, temperature=1.0):
    def soft(z):
        return (z / temperature).softmax(1)

    still = soft(copy.deepcopy(net).eval()(CODE(x))).detach()
    start = (x + 0.001 * torch.randn(x.shape, generator=g)).clamp(0, 1)

    def kl(p, q):
        return (p * (p.log() - q.log())).sum()

    moved = ascend(net, x, y, 8 / 255, 3, 4 / 255, start, lambda s: kl(still, soft(s)))
    z = net(CODE(x))  # in train mode, when the point is made
    return ce(z, y) + 6 / len(x) * temperature**2 * kl(soft(z), soft(net(CODE(moved))))


def warm_trades_loss(net, x, y, g):
    return trades_loss(net, x, y, g, 2.0)


def sr_loss(net, x, y, g):
    x = ascend(net, x, y, 2 / 255, 2, 1 / 255).requires_grad_()
    z = net(CODE(x))

    def lead(z, js):
        return torch.stack([torch.sigmoid(row[k] - row[j]) for row, k, j in zip(z, y, js, strict=True)])

    js = [max((j for j in range(10) if j != k), key=lambda j, row=row: row[j]) for row, k in zip(z, y, strict=True)]
    slope = torch.autograd.grad(lead(z, js).sum(), x, retain_graph=True)[0]
    there = lead(net(CODE((x + 0.01 * slope.sign()).detach())), js)
    return ce(z, y) + 0.004 * (((there - lead(z, js)) / 0.01) ** 2).mean()


def mppd_loss(net, x, y, g, size=torch.square):
    seen = []
    start = (x + 0.001 * torch.randn(x.shape, generator=g)).clamp(0, 1)
    moved = ascend(net, x, y, 4 / 255, 1, 4 / 255, start)
    handle = net.sn.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    z = net(CODE(x))
    handle.remove()
    handle = net.sn.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    other = net(CODE(moved))
    handle.remove()
    apart = seen[0].detach().unflatten(0, (3, -1)) - seen[1].unflatten(0, (3, -1))
    first = apart[0]
    second = 0.99 * first + apart[1]
    third = 0.99 * second + apart[2]
    return 0.5 * ce(z, y) + 0.5 * ce(other, y) + size(torch.stack([first, second, third])).mean()


def absolute_mppd_loss(net, x, y, g):
    return mppd_loss(net, x, y, g, torch.abs)


def tg_loss(net, x, y, g):
    z = net(CODE(x))
    drawn = torch.multinomial(z.detach().softmax(1), 1, generator=g)[:, 0]
    u = CODE(x).detach().requires_grad_()
    logs = net(u).log_softmax(1)
    likely = sum(logs[i, k] for i, k in enumerate(drawn))
    (grad,) = torch.autograd.grad(likely, u, create_graph=True)
    total = sum(grad[t, i].sum() ** 2 for t in range(3) for i in range(len(x)))
    return ce(z, y) + 3.0 * total / len(x)


def retraction(net):
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            u, s, v = torch.linalg.svd(m.weight.data.flatten(1), full_matrices=False)
            m.weight.data.copy_((u @ torch.diag(s * (1.004 - 0.004 * s**2)) @ v).view_as(m.weight))
        elif hasattr(m, "shares"):
            a, b = m.shares.tolist()  # in the plane, the foot of the perpendicular, or the nearer corner
            foot = min(max((a - b + 1) / 2, 0.0), 1.0)
            m.shares.data.copy_(torch.tensor([foot, 1 - foot], dtype=torch.float64))


@pytest.mark.parametrize(
    ("seams", "loss", "after"),
    [
        (Seams(), plain_loss, None),
        (pgd_at(), at_loss, None),
        (pgd_at(eps=8 / 255, steps=3, step=4 / 255, start="uniform"), strong_at_loss, None),
        (trades(steps=3, step=4 / 255), trades_loss, None),
        (trades(temperature=2.0, steps=3, step=4 / 255), warm_trades_loss, None),
        (snn_rat(attack="pgd"), at_loss, retraction),
        (snn_rat(attack="rfgsm"), rfgsm_loss, retraction),
        (sr(eps=2 / 255), sr_loss, None),
        (mppd(), mppd_loss, None),
        (mppd(norm="l1"), absolute_mppd_loss, None),
        (tg_reg(weight=3.0, at="pixel"), tg_loss, None),
        (tg_reg(weight=12.0), tg_loss, None),  # deviation 0.5: a gradient half as long behind the normalisation
    ],
    ids=["plain", "pgd_at", "strong_at", "trades", "warm_trades", "snn_rat", "rfgsm", "sr_at", "mppd", "l1_mppd",
         "tg_reg_pixel", "tg_reg"],
)  # fmt: skip
def test_twenty_steps_follow_the_loop_written_out(images, seams, loss, after):
    torch.manual_seed(0)
    spec = NET  # where noise flips no spike of an image, TRADES starts from a gradient that is rounding: smooth neurons
    if loss in (trades_loss, warm_trades_loss):
        spec = replace(NET, neuron=NeuronSpec(kind="relu"))
    ours, theirs = build(spec).double(), build(replace(spec, exact=True)).double()
    step = Step(ours, Optimizer(ours, SPEC), SPEC, seams)
    plain = torch.optim.SGD(theirs.parameters(), SPEC.lr, momentum=0.9)
    steps = {tg_loss: 6, rfgsm_loss: 3, warm_trades_loss: 2, absolute_mppd_loss: 3}.get(loss, 20)
    for i in range(steps):
        x, y = data.pixels(images.images[8 * i : 8 * i + 8]).double(), images.labels[8 * i : 8 * i + 8]
        found = step(CODE, x, y, keyed(i))
        theirs.train()
        plain.zero_grad()
        value = loss(theirs, x, y, keyed(i))
        plain.zero_grad()
        value.backward()
        plain.step()
        if after is not None:
            after(theirs)
        assert found == pytest.approx(float(value.detach()), rel=1e-7), i
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if not (loss is tg_loss or "num_batches" in name):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9), name


def test_hire_crafts_from_period_to_period(images):
    """Two periods written out: update, gradient with the new weights from the old potentials, noise, update."""
    x, y = data.pixels(images.images[:8]).double(), images.labels[:8]
    results = {}
    for gradient in ("updated", "reused"):
        for carry in (True, False):
            ours = awake(HIRE, x)
            theirs = copy.deepcopy(ours)
            seams = hire_snn(periods=2, eps=0.05, gradient=gradient, carry=carry)
            assert seams.knobs["step"] == 0.025
            spec = replace(SPEC, optimizer="sgd", lr=0.01)
            found = Step(ours, Optimizer(ours, spec), spec, seams)(direct(steps=4), x, y, keyed(0))
            results[gradient, carry] = found
            assert found == pytest.approx(two_periods(theirs, x, y, gradient, carry), rel=1e-6), (gradient, carry)
            for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                assert torch.allclose(a, b, rtol=1e-6, atol=1e-8), name
    assert len({round(v, 8) for v in results.values()}) >= 3  # the settings matter


def awake(spec, x):
    """An untrained network without BatchNorm whose layers fire: thresholds read off the data."""
    net = build(spec).double()
    calibrate(net.eval(), direct(steps=spec.steps), x)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, Neuron):
                m.threshold.mul_(0.3)
                m.leak.fill_(0.9)
    return net.train()


def two_periods(net, x, y, gradient, carry):
    """HIRE-SNN by hand on a network of five layers, all potentials kept in a list."""
    plain = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    neurons = [layer.sn for layer in net.features] + [net.sn1, net.sn2]
    masks = [None] * 5

    def run(u, state, steps=2):
        state, total = list(state), state[-1]
        for _ in range(steps):
            a = net.normalise(u)
            for i, n in enumerate(neurons):
                if i < 3:
                    a = net.features[i].conv(a)
                else:
                    a = (net.fc1 if i == 3 else net.fc2)(F.adaptive_avg_pool2d(a, 8).flatten(1) if i == 3 else a)
                h = n.leak * state[i] + a / n.threshold
                a = spike(h)
                state[i] = h - a.detach()
                if i < 3 and isinstance(net.features[i].after, nn.AvgPool2d):
                    a = net.features[i].after(a)
                elif masks[i] is not None:
                    a = a * masks[i]
            total = total + net.fc(a)
        state[-1] = total
        return total, [s.detach() if isinstance(s, torch.Tensor) else s for s in state]

    def spike(h):
        slope = h * (0.3 * (1 - (h - 1).abs()).clamp(min=0)).detach()
        return (h >= 1).double() + slope - slope.detach()

    def draw(g):
        """Dropout masks in the order in which the network asks for them."""
        shapes = {1: net.features[1].conv.weight.shape[0], 3: net.fc1.out_features, 4: net.fc2.out_features}
        for i, c in shapes.items():
            shape = (8, c, 14, 14) if i == 1 else (8, c)
            masks[i] = ((torch.rand(shape, generator=g) >= 0.2) / 0.8).double()

    g, rest = keyed(0), [0.0] * 6
    draw(g)
    leaf = x.clone().requires_grad_()
    z, after = run(leaf, rest)
    ce(z, y).backward()
    plain.step()
    for n in neurons:
        n.confine()
    if gradient == "updated":
        leaf = x.clone().requires_grad_()
        masks[:] = [None] * 5
        (slope,) = torch.autograd.grad(ce(run(leaf, rest)[0], y), leaf)
    else:
        slope = leaf.grad
    moved = (x + 0.025 * slope.sign()).clamp(0, 1)
    plain.zero_grad()
    draw(g)
    value = ce(run(moved, after if carry else rest)[0], y)
    value.backward()
    plain.step()
    for n in neurons:
        n.confine()
    return float(value.detach())


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (64, 3, 3, 3), (10, 30), (30, 10)])
def test_singular_values_under_the_retraction(shape):
    weight = torch.randn(shape, generator=keyed(1), dtype=torch.float64)
    before = torch.linalg.svdvals(weight.flatten(1))
    after = weight.clone()
    retract(after, 0.004)
    expected = (before * (1.004 - 0.004 * before**2)).sort(descending=True).values
    assert torch.allclose(torch.linalg.svdvals(after.flatten(1)), expected, rtol=1e-12)
    for _ in range(781):  # an epoch of the source
        retract(after, 0.004)
    assert torch.allclose(torch.linalg.svdvals(after.flatten(1)), torch.ones(len(before)).double(), atol=0.1)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.997), (1.9, 1.001), (0.1, 0.916)])
def test_one_epoch_of_retraction_brings_a_singular_value_to_one(start, end):
    w = torch.tensor([[start]], dtype=torch.float64)
    for _ in range(781):
        retract(w, 0.004)
    assert float(w) == pytest.approx(end, abs=1e-3)


def test_retraction_of_some_rows_leaves_the_others():
    w = torch.randn(6, 4, generator=keyed(2))
    before, rows = w.clone(), torch.tensor([1, 4])
    retract(w, 0.1, rows)
    part = before[rows]
    assert torch.allclose(w[rows], 1.1 * part - 0.1 * part @ part.T @ part)
    others = [0, 2, 3, 5]
    assert torch.equal(w[others], before[others])


def test_wide_layers_are_retracted_by_a_share_of_their_rows():
    net = nn.Sequential(nn.Linear(8, 200, bias=False), nn.Linear(200, 199, bias=False))
    before = [m.weight.clone() for m in net]
    seams = snn_rat(rows=0.3)
    assert seams.after_step is not None
    seams.after_step(net, keyed(0))
    moved = [(m.weight != b).any(1).sum() for m, b in zip(net, before, strict=True)]
    assert moved == [60, 199]
    again = nn.Sequential(nn.Linear(8, 200, bias=False))
    again[0].weight.data.copy_(before[0])
    seams.after_step(again, keyed(0))
    assert torch.equal(again[0].weight, net[0].weight)  # which rows is decided by the key


@pytest.mark.parametrize("a", [(0.5, 0.5), (2.0, 0.1), (-1.0, -3.0), (0.9, 0.4), (0.0, 1.0)])
def test_simplex_projection_is_the_nearest_point(a):
    p = to_simplex(torch.tensor(a))
    assert p.sum() == pytest.approx(1) and (p >= 0).all()
    grid = torch.linspace(0, 1, 20_001)
    near = ((grid - a[0]) ** 2 + (1 - grid - a[1]) ** 2).argmin()
    assert float(p[0]) == pytest.approx(float(grid[near]), abs=1e-4)
    three = to_simplex(torch.tensor([0.8, 0.6, -0.5]))
    assert torch.allclose(three, torch.tensor([0.6, 0.4, 0.0]))


def test_lipschitz_penalty_is_the_largest_row_of_either_sign():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    penalty = snn_rat(regulariser="lipschitz", strength=0.5).penalty
    assert penalty is not None and penalty(net).item() == pytest.approx(0.5 * (3.5 + 2.0))


class Linear2(nn.Module):
    """Two classes, scores W x: the gradient of their difference is W[0] - W[1]."""

    def __init__(self, w):
        super().__init__()
        self.weight = nn.Parameter(w)

    def forward(self, u):
        return u.mean(0).flatten(1) @ self.weight.T


def test_sr_on_a_linear_model_tends_to_the_squared_l1_norm():
    w = torch.randn(2, 12, generator=keyed(3), dtype=torch.float64)
    net, x, y = Linear2(w), torch.rand(4, 1, 3, 4, generator=keyed(4)).double(), torch.tensor([0, 1, 1, 0])
    for h, near in ((0.01, 0.2), (1e-6, 1e-4)):
        leaf = x.clone().requires_grad_()
        penalty = sr(weight=1.0, h=h).penalty
        assert penalty is not None
        found = penalty(net, CODE, leaf, y, net(CODE(leaf)), keyed(0))
        side = torch.where(y == 0, 1.0, -1.0)
        lead = side * (x.flatten(1) @ (w[0] - w[1]))
        slope = lead.sigmoid() * (1 - lead.sigmoid())
        moved = (lead + h * (w[0] - w[1]).abs().sum()).sigmoid()
        assert found.item() == pytest.approx(float((((moved - lead.sigmoid()) / h) ** 2).mean()), rel=1e-6)
        l1 = float(((slope * (w[0] - w[1]).abs().sum()) ** 2).mean())
        assert found.item() == pytest.approx(l1, rel=near)


@pytest.mark.parametrize("name", ["pgd_at", "trades", "snn_rat", "sr", "mppd"])
def test_crafting_leaves_statistics_weights_and_gradients_alone(images, name):
    """Everything a seam does before the forward in train mode: only that one may move the statistics."""
    x, y = data.pixels(images.images[:6]), images.labels[:6]
    net = lively(NET, CODE(x)).train()
    before = copy.deepcopy(net.state_dict())
    v = victim(net, CODE)
    seams = DEFENCES[name]()
    if name in ("trades", "sr", "mppd"):  # their penalties also run the network in train mode: once more, counted
        leaf = x.clone().requires_grad_()
        if seams.inputs is not None:
            assert torch.equal(seams.inputs(net, CODE, x, y, keyed(0)), x)
            assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
        z = scores(net, CODE, leaf)
        assert seams.penalty is not None
        seams.penalty(net, CODE, leaf, y, z, keyed(0))
        assert next(int(m.num_batches_tracked) for m in net.modules() if isinstance(m, nn.BatchNorm2d)) == 1 + 2
    else:
        assert seams.inputs is not None
        moved = seams.inputs(net, CODE, x, y, keyed(0))
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
        assert 0 < float((moved - x).abs().max()) <= 2 / 255 + 1e-7 and moved.min() >= 0 and moved.max() <= 1
        with pytest.raises(ValueError, match="train mode"):
            v.scores(x)  # back in train mode, as it was
    assert net.training and all(p.grad is None for p in net.parameters())
    assert not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("make", "knobs"),
    [
        (pgd_at, {"eps": 8 / 255}),
        (pgd_at, {"eps": 8 / 255, "steps": 3}),
        (pgd_at, {"eps": 8 / 255, "start": "corner", "steps": 3}),
        (sr, {"eps": 8 / 255}),
        (tg_reg, {"eps": 8 / 255}),
        (trades, {"eps": 32 / 255}),
    ],
)
def test_a_radius_that_the_steps_do_not_reach_is_refused(make, knobs):
    with pytest.raises(ValueError, match=r"eps: expected a radius that .* steps of .* reach"):
        make(**knobs)


def test_a_radius_that_start_or_steps_reach_is_taken(images):
    x, y = data.pixels(images.images[:6]), images.labels[:6]
    net = lively(NET, CODE(x)).train()
    for knobs in ({"steps": 8}, {"step": 4 / 255}, {"start": "uniform"}, {"start": "corner", "steps": 4}):
        inputs = pgd_at(eps=8 / 255, **knobs).inputs
        assert inputs is not None
        moved = inputs(net, CODE, x, y, keyed(0))
        assert 7 / 255 < float((moved - x).abs().max()) <= 8 / 255 + 1e-7, knobs
    assert pgd_at(eps=0.0).inputs is None and trades(eps=0.0).name


def test_mixed_attacks_and_gradients_are_drawn_by_key(images):
    x, y = data.pixels(images.images[:6]), images.labels[:6]
    net = lively(NET, CODE(x)).train()
    mixed, kinds = snn_rat(attack="mix", gradient="both"), {}
    single = {
        (a, g): snn_rat(attack=a, gradient=g) for a in ("fgsm", "rfgsm") for g in ("bptt", "bptr")
    }  # fmt: skip
    for i in range(12):
        assert mixed.inputs is not None
        found = mixed.inputs(net, CODE, x, y, keyed(i))
        assert torch.equal(found, mixed.inputs(net, CODE, x, y, keyed(i)))
        which = [int(torch.randint(2, (), generator=g)) for g in [keyed(i)] for _ in range(2)]
        kind = ("fgsm", "rfgsm")[which[0]], ("bptt", "bptr")[which[1]]
        kinds[kind] = kinds.get(kind, 0) + 1
        if kind[0] == "fgsm":  # without noise: the same point as that attack alone
            alone = single[kind].inputs
            assert alone is not None and torch.equal(found, alone(net, CODE, x, y, keyed(99)))
    assert len(kinds) == 4
    by_rate = victim(net.eval(), CODE).by(Route(neuron="bptr"))
    u = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(by_rate.scores(u), y, reduction="sum"), u)
    net.train()
    inputs = single["fgsm", "bptr"].inputs
    assert inputs is not None
    assert torch.equal(
        inputs(net, CODE, x, y, keyed(0)), (x + 2 / 255 * g.sign()).clamp(x - 2 / 255, x + 2 / 255).clamp(0, 1)
    )


# ---- off, resumed, refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "off",
    [pgd_at(eps=0), trades(beta=0), snn_rat(eps=0, strength=0), snn_rat(eps=0, regulariser="none"), sr(weight=0),
     mppd(eps=0, rho=0), tg_reg(weight=0)],
    ids=lambda s: s.name,
)  # fmt: skip
def test_switched_off_is_plain_training_to_the_bit(images, tmp_path, off):
    spec = replace(SPEC, batch=32)
    plain = train(NET, CODE, images, spec, tmp_path / "plain")
    other = train(NET, CODE, images, spec, tmp_path / "off", seams=off)
    assert plain.sha256 != other.sha256 and other.card["defence"]["name"] == off.name  # the card tells them apart
    for (k, a), b in zip(plain.net.state_dict().items(), other.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), k


def test_one_period_is_plain_training_to_the_bit(images, tmp_path):
    spec, code = replace(SPEC, batch=32, optimizer="adam", lr=1e-3), direct(steps=4)
    plain = train(HIRE, code, images, spec, tmp_path / "plain")
    other = train(HIRE, code, images, spec, tmp_path / "off", seams=hire_snn(periods=1))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.net.state_dict().values(), other.net.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", ["snn_rat", "hire_snn", "mppd", "trades"])
def test_a_defended_run_resumes_to_the_bit(images, tmp_path, name):
    knobs = {"snn_rat": {"attack": "mix", "rows": 0.5}, "trades": {"steps": 2, "step": 4 / 255}}.get(name, {})
    net, code = (HIRE, direct(steps=4)) if name == "hire_snn" else (NET, CODE)
    spec = replace(SPEC, batch=32, lr=0.01)
    whole = train(net, code, images, spec, tmp_path / "whole", seams=DEFENCES[name](**knobs))
    steps = iter(range(1, 100))
    with pytest.raises(TrainingStopped):
        train(net, code, images, spec, tmp_path / "cut", seams=DEFENCES[name](**knobs), stop=lambda: next(steps) == 2)
    with pytest.raises(ValueError, match="another experiment"):
        train(net, code, images, spec, tmp_path / "cut", seams=pgd_at())
    again = train(net, code, images, spec, tmp_path / "cut", seams=DEFENCES[name](**knobs))
    assert again.sha256 == whole.sha256


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: pgd_at(eps=8), "grey levels are divided by 255"),
        (lambda: pgd_at(step=2), "grey levels"),
        (lambda: pgd_at(steps=0), "steps: expected a whole number"),
        (lambda: pgd_at(start="middle"), "expected one of none, uniform"),
        (lambda: trades(eps=8), "grey levels"),
        (lambda: snn_rat(strength=50.0), "still converges"),
        (lambda: trades(beta=-1), "beta"),
        (lambda: trades(temperature=0), "temperature"),
        (lambda: snn_rat(attack="pgd7"), "fgsm, rfgsm, pgd, mix"),
        (lambda: snn_rat(gradient="rate"), "bptt, bptr, both"),
        (lambda: snn_rat(rows=30), "rows: expected a share"),
        (lambda: snn_rat(strength=-0.1), "strength"),
        (lambda: hire_snn(eps=8), "grey levels"),
        (lambda: hire_snn(periods=0), "periods"),
        (lambda: hire_snn(step=0), "step"),
        (lambda: sr(h=0), "h: expected a positive"),
        (lambda: sr(weight=math.nan), "weight"),
        (lambda: mppd(leak=1.5), "above 1 it grows"),
        (lambda: mppd(norm="l3"), "l2, l1"),
        (lambda: tg_reg(weight=math.inf), "weight"),
        (lambda: tg_reg(at="frame"), "normalised, pixel"),
        (lambda: NeuronSpec(kind="diet", reset=None, leak=1.2), "above 1 it grows"),
        (lambda: NeuronSpec(kind="diet", reset=None, threshold=-1.0), "threshold"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("seams", "net", "code", "spec", "match"),
    [
        (snn_rat(), NET, CODE, replace(SPEC, weight_decay=5e-4), "weight_decay: expected 0"),
        (hire_snn(periods=3), HIRE, direct(steps=4), SPEC, "divisor of the 4 time steps, got 3; try one of 1, 2, 4"),
        (hire_snn(), replace(NET, steps=4), direct(steps=4), SPEC, "diet neurons"),
        (hire_snn(), HIRE, phase(steps=4), SPEC, "expected direct"),
        (pgd_at(), NET, poisson(steps=3, backward="none"), SPEC, "backward rule"),
        (sr(), NET, poisson(steps=3), SPEC, "draws nothing"),
        (mppd(), NET, poisson(steps=3), SPEC, "draws nothing"),
        (trades(), NET, poisson(steps=3), SPEC, "draws nothing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(images, tmp_path, seams, net, code, spec, match):
    with pytest.raises(ValueError, match=match):
        train(net, code, images, spec, tmp_path / "out", seams=seams)
    assert not (tmp_path / "out").exists()


# ---- conversion ------------------------------------------------------------------------------------------------------


def test_thresholds_of_a_network_that_can_be_computed_by_hand(tmp_path):
    """One input channel, weights 1: layer 1 sees x itself; what the others see follows from its spikes."""
    spec = NetSpec(arch="vgg5", width=1 / 64, channels=1, classes=2, steps=2, norm="none", neuron=DIET, readout="sum")
    net = build(spec)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim:
                p.zero_()
        for layer in net.features:
            layer.conv.weight[0, 0, 1, 1] = 1.0  # the other channels stay silent
        net.fc1.weight[0, 0] = 2.0
        net.fc2.weight[0, 0] = 3.0
    x = torch.zeros(4, 1, 32, 32)
    x[0] = 0.5  # one image of four is grey, three are black
    # layer 1: 0.5 at a quarter of the pixels of one of one channel
    # layer 2 sees its spikes, averaged over 2x2: with threshold 0.5 and no leak one at every step, so 1
    # layer 3: the same 1 in one of its two channels; fc1 sees 2 x 1 in one of its neurons, fc2 3 x 1
    net.eval()
    found = calibrate(net, direct(steps=4), x, percentile=100.0)
    assert found == [0.5, 1.0, 1.0, 2.0, 3.0]
    assert [m.threshold.item() for m in net.modules() if isinstance(m, Neuron)] == found
    assert all(m.leak.item() == 1.0 for m in net.modules() if isinstance(m, Neuron))
    with pytest.raises(ValueError, match="layer 1: expected positive currents"):
        calibrate(net, direct(steps=4), x, percentile=70.0)  # three quarters of the currents are zero
    assert calibrate(net, direct(steps=4), x, percentile=99.9, batch=1) == found


def test_a_percentile_is_exact_whatever_the_batch(images):
    x = data.pixels(images.images[:10])
    net = awake(replace(HIRE, dropout=0.0), x.double())
    whole = [calibrate(net.eval(), direct(steps=5), x.double(), percentile=97.0, batch=b) for b in (10, 3, 1)]
    assert whole[0] == whole[1] == whole[2]
    seen = []
    handle = net.features[0].sn.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    net(direct(steps=4)(x.double()))
    handle.remove()
    flat = seen[0].flatten().sort().values
    assert whole[0][0] == flat[len(flat) - 1 - math.floor(0.03 * len(flat))].item()
    assert all(m.leak.item() == pytest.approx(0.9) for m in net.modules() if isinstance(m, Neuron))  # put back


def test_conversion_keeps_weights_is_taken_again_and_starts_training(images, tmp_path):
    relu = replace(HIRE, neuron=NeuronSpec(kind="relu"), steps=1, readout="mean")
    spec = TrainSpec(batch=16, epochs=2, validation=0.0, lr=1e-3)
    twin = train(relu, direct(steps=1), images, spec, tmp_path / "twin")
    spiking = replace(HIRE, neuron=DIET)
    knobs = {"steps": 6, "images": 16, "scale": 0.3}
    found = convert(twin, spiking, direct(steps=4), images, tmp_path / "converted", **knobs)
    held, theirs = found.net.state_dict(), twin.net.state_dict()
    assert all(torch.equal(held[k], v) for k, v in theirs.items()) and len(held) == len(theirs) + 2 * 5
    told = found.card["converted"]
    assert told["from"] == twin.sha256 and len(told["thresholds"]) == 5
    for m, raw in zip([m for m in found.net.modules() if isinstance(m, Neuron)], told["thresholds"], strict=True):
        assert m.threshold.item() == pytest.approx(0.3 * raw)
    assert convert(twin, spiking, direct(steps=4), images, tmp_path / "converted", **knobs).sha256 == found.sha256
    with pytest.raises(ValueError, match="holds another model"):
        convert(twin, spiking, direct(steps=4), images, tmp_path / "converted", **(knobs | {"scale": 0.7}))
    tuned = train(spiking, direct(steps=4), images, replace(spec, lr=1e-4), tmp_path / "tuned", seams=hire_snn(),
                  start=found)  # fmt: skip
    assert tuned.card["start"]["sha256"] == found.sha256
    gone = [(a - b).abs().max().item() for a, b in zip(tuned.net.parameters(), found.net.parameters(), strict=True)]
    assert 0 < max(gone) < 0.05  # it began there: a few small steps away
    with pytest.raises(ValueError, match="start: expected a model of the network asked for"):
        train(NET, CODE, images, spec, tmp_path / "x", start=found)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"percentile": 0}, "percentile"), ({"scale": -1}, "scale"), ({"steps": 0}, "at least 1"),
     ({"batch": 0}, "batch")],
)  # fmt: skip
def test_bad_conversions_are_refused(images, tmp_path, change, match):
    relu = replace(HIRE, neuron=NeuronSpec(kind="relu"), steps=1)
    twin = train(relu, direct(steps=1), images, replace(SPEC, batch=64, lr=1e-3), tmp_path / "twin")
    with pytest.raises(ValueError, match=match):
        convert(twin, HIRE, direct(steps=4), images, tmp_path / "out", **change)
    with pytest.raises(ValueError, match="diet neurons"):
        convert(twin, relu, direct(steps=1), images, tmp_path / "out")
    for spec, code, words in (
        (replace(HIRE, pool="max" if HIRE.pool != "max" else "avg"), direct(steps=4), "but for neurons and steps"),
        (replace(HIRE, normalise="cifar10", channels=3), direct(steps=4), "expected 3 channels"),
        (replace(HIRE, normalise="none"), direct(steps=4), "but for neurons and steps"),
        (replace(HIRE, width=2 * HIRE.width), direct(steps=4), "but for neurons and steps"),
        (HIRE, direct(steps=8), "expected 4 steps"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(twin, spec, code, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()
