"""The trail against gradients computed another way, geometry against brute force, and no hook left behind."""

import copy
import gc
import inspect
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lively import lively
from torch import nn
from torch.nn import functional as F

from sparsetrail.adapt import stateful
from sparsetrail.core import Victim
from sparsetrail.report import pack
from sparsetrail.report.labels import explain
from sparsetrail.snn.encode import phase
from sparsetrail.snn.folded import FoldedNeuron
from sparsetrail.snn.net import NetSpec, victim
from sparsetrail.snn.neuron import NeuronSpec
from sparsetrail.snn.surrogate import Surrogate
from sparsetrail.trails import density_cap, kind_of, maxpool_density_cap, reach, strided_conv_density, trail

T = 4


def pictures(n=3, seed=0):
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(seed)) / 255
    return x, torch.arange(n) % 10


def model(arch="sew_resnet18", pool="max"):
    x, y = pictures()
    encode = phase(steps=T)
    return victim(lively(NetSpec(arch=arch, pool=pool, width=0.125, steps=T), encode(x)), encode, name=arch), x, y


def test_every_operation_is_there_in_forward_order():
    v, x, y = model()
    rows = trail(v, x, y).rows
    assert [r.op for r in rows][:6] == ["conv1", "bn1", "sn1", "pool", "layer1.0.conv1", "layer1.0.bn1"]
    assert rows[-1].op == "fc" and len(rows) == len({r.op for r in rows})
    kinds = {k: sum(r.kind == k for r in rows) for k in {r.kind for r in rows}}
    assert kinds == {"conv": 20, "norm": 20, "neuron": 20, "add": 8, "pool": 2, "linear": 1}
    assert [r.depth for r in rows] == list(range(len(rows)))


def test_against_gradients_taken_by_retaining_them():
    """An independent route: the whole input gradient, and the pool's output gradient pushed through by hand."""
    v, x, y = model()
    t = {r.op: r for r in trail(v, x, y, per_step=True).rows}
    zero = norm = 0.0
    for i in range(len(y)):  # image by image: the shares are means over images of their own losses
        u = v.encode(x[i : i + 1]).requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(v.logits(u), y[i : i + 1]), u)
        zero += float((g == 0).double().mean()) / len(y)
        norm += float(g.double().norm()) / len(y)
    assert t["conv1"].zero == pytest.approx(zero, abs=1e-12) and t["conv1"].norm == pytest.approx(norm, rel=1e-5)
    assert t["conv1"].entries == T * 3 * 32 * 32

    net = v.module
    seen = {}

    def keep(module, inputs, output):
        seen.update(x=inputs[0], y=output)
        output.retain_grad()

    handle = net.pool.register_forward_hook(keep)
    u = v.encode(x).requires_grad_()
    F.cross_entropy(net(u), y, reduction="sum").backward(inputs=[u])
    handle.remove()
    leaf = seen["x"].detach().requires_grad_()
    (by_hand,) = torch.autograd.grad(F.max_pool2d(leaf, 3, 2, 1), leaf, seen["y"].grad)
    assert t["pool"].zero == pytest.approx(float((by_hand == 0).double().mean()), abs=1e-12)
    steps = (by_hand == 0).double().unflatten(0, (T, -1)).mean((1, 2, 3, 4))
    assert t["pool"].per_step == pytest.approx(steps.tolist(), abs=1e-12)


def test_train_mode_is_a_gradient_through_batch_statistics():
    v, x, _ = model()
    net, u = copy.deepcopy(v.module).train(), v.encode(x).requires_grad_()
    z = net(u)
    y = z.argmax(1)
    y[0] = (y[0] + 1) % 10
    (g,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), u)
    flat = g.double().movedim(1, 0).flatten(1)
    found, other = (trail(v, x, y, mode=mode) for mode in ("train", "eval"))
    first = found.rows[0]
    assert first.zero == pytest.approx(float((flat == 0).double().mean()), abs=1e-12)
    assert first.norm == pytest.approx(float(flat.norm(dim=1).mean()), rel=1e-5)
    assert found.clean_accuracy == pytest.approx(2 / 3) and found.mode == "train"
    assert abs(other.rows[0].norm / first.norm - 1) > 0.01


def test_clean_accuracy_is_the_share_of_images_that_are_scored_right():
    v, x, _ = model()
    with torch.no_grad():
        y = v.scores(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    assert trail(v, x, y, batch=2).clean_accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize("arch", ["sew_resnet18", "spiking_resnet18", "sew_resnet50"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_measured_zeros_are_at_least_what_geometry_forces(arch, pool):
    v, x, y = model(arch, pool)
    rows = {r.op: r for r in trail(v, x, y).rows}
    for r in rows.values():
        assert r.zero >= r.forced - 1e-12, r
        assert 0 <= r.zero <= 1 and r.norm >= 0
    assert rows["pool"].forced == (0.75 if pool == "max" else 0.0)
    assert (rows["pool"].zero >= 0.75) == (pool == "max")
    for stage in (2, 3, 4):  # a 1x1/2 convolution sees every fourth cell, and the rest is dense
        op = rows[f"layer{stage}.0.downsample.0"]
        assert op.forced == 0.75 and op.zero >= 0.75


def test_average_over_images_does_not_depend_on_the_batch():
    v, x, y = model()
    a, b = trail(v, x, y, batch=3).rows, trail(v, x, y, batch=1).rows
    for r, s in zip(a, b, strict=True):
        assert (r.op, r.entries) == (s.op, s.entries)
        assert r.zero == pytest.approx(s.zero, abs=1e-4) and r.norm == pytest.approx(s.norm, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_is_left_behind(mode):
    v, x, y = model()
    net = v.module
    before = {k: t.clone() for k, t in net.state_dict().items()}
    trail(v, x, y, mode=mode)
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())
    assert not net.training
    for m in net.modules():
        assert not m._forward_pre_hooks and not m._forward_hooks and not m._backward_hooks
    assert all(p.grad is None for p in net.parameters())


def test_nothing_is_left_behind_after_an_error():
    v, x, y = model()
    broken = Victim(encode=lambda x: v.encode(x)[:2], logits=v.logits, steps=T, classes=10, module=v.module)
    with pytest.raises(Exception, match="encoded input"):
        trail(broken, x, y)
    for m in v.module.modules():
        assert not m._forward_pre_hooks and not m._forward_hooks
    assert not v.module.training


def test_in_place_adds_are_no_obstacle():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.ReLU(inplace=True)

        def forward(self, u):
            x = self.a(u[0])
            out = self.b(x)
            out += x
            return self.relu(out).flatten(1)[:, :2]

    net = Net()
    v = Victim(encode=lambda x: x[None], logits=net, steps=1, classes=2, module=net)
    rows = trail(v, torch.rand(2, 1, 2, 2), torch.tensor([0, 1])).rows
    assert [r.op for r in rows] == ["a", "b", "relu"]
    assert rows[2].zero >= 0.5  # two of four entries never reach the scores


def test_a_victim_without_a_network_is_refused():
    with pytest.raises(ValueError, match="module"):
        trail(
            Victim(encode=lambda x: x[None], logits=lambda u: u[0].flatten(1), steps=1, classes=2),
            torch.rand(1, 1, 1, 2),
            torch.tensor([0]),
        )


def test_structural_figures():
    assert maxpool_density_cap(16, 3, 2, 1) == 0.25
    assert strided_conv_density(8, 1, 2, 0) == 0.25
    assert strided_conv_density(32, 7, 2, 3) == 1.0
    assert strided_conv_density(7, 1, 2, 0) == 16 / 49
    assert density_cap(nn.AvgPool2d(3, 2, 1), 16, 16) == 1.0
    assert density_cap(nn.Conv2d(1, 1, 3, padding="same"), 5, 5) == 1.0


@given(
    size=st.integers(2, 9), kernel=st.integers(1, 4), stride=st.integers(1, 4), padding=st.integers(0, 2),
    dilation=st.integers(1, 2), seed=st.integers(0, 100),
)  # fmt: skip
def test_geometry_against_brute_force(size, kernel, stride, padding, dilation, seed):
    if padding > kernel // 2 or size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    g = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False)
    nn.init.ones_(conv.weight)
    x = torch.rand(1, 1, size, size, generator=g).requires_grad_()
    (grad,) = torch.autograd.grad(conv(x).sum(), x)
    assert density_cap(conv, size, size) == pytest.approx(float((grad != 0).double().mean()), abs=1e-12)
    pool = nn.MaxPool2d(kernel, stride, padding, dilation)
    (grad,) = torch.autograd.grad(pool(x).sum(), x)
    assert float((grad != 0).double().mean()) <= density_cap(pool, size, size) + 1e-12


def test_ties_go_to_the_first_maximum():
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    (g,) = torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)
    assert g.flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


# --- where zeros come from ----------------------------------------------------------------------------------------


class Toy(nn.Sequential):
    """Layers on the first step of the input; scores of two classes."""

    def forward(self, u):
        return super().forward(u[0])


def toy(*layers, steps=1):
    net = Toy(*layers).eval()
    return Victim(encode=lambda x: x[None], logits=net, steps=steps, classes=2, module=net)


def fixed(weight, **more):
    layer = nn.Linear(len(weight[0]), len(weight), bias=False, **more)
    layer.weight = nn.Parameter(torch.tensor(weight))
    return layer


def test_zeros_of_a_max_pool_are_created_by_it_or_inherited():
    """A 4x4 map, four windows, the scores see two of them: 2 of 16 entries have a gradient, 3 in each seen window none,
    4 in each unseen window nothing to pass on."""
    v = toy(nn.MaxPool2d(2), nn.Flatten(), fixed([[1.0, 0.0, -2.0, 0.0], [3.0, 0.0, 1.0, 0.0]]))
    x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    pool, flat, fc = trail(v, x, y, detail="origin").rows
    assert (pool.zero, pool.inherited, pool.created, pool.passed, pool.forced) == (14 / 16, 0.5, 6 / 16, 8 / 16, 0.75)
    assert (flat.zero, flat.inherited, flat.created, flat.passed) == (0.5, 0.5, 0.0, 0.5)
    assert (fc.zero, fc.inherited, fc.created, fc.passed) == (0.5, 0.0, 0.5, 0.0)  # by zeros of the weight


def test_zeros_of_a_strided_convolution_are_its_own():
    conv = nn.Conv2d(1, 2, 1, 2, bias=False)
    v = toy(conv, nn.Flatten(), nn.Linear(8, 2))
    row = trail(v, torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0]), detail="origin").rows[0]
    assert (row.zero, row.forced, row.created, row.passed, row.inherited) == (0.75, 0.75, 0.75, 0.0, 0.0)


def test_zeros_of_a_neuron_are_those_of_its_surrogates_tails():
    """IF, rectangle of width 1 (|u| < 1/2) at threshold 1, two steps, reset detached: one neuron's potential never
    comes near, one is near at the first step only, one at both, and of the last no score knows."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.sn = FoldedNeuron(NeuronSpec(surrogate=Surrogate("rectangle", 1.0), detach_reset=True), 2)
            self.fc = fixed([[1.0, -1.0, 2.0, 0.0], [0.5, 1.0, -1.0, 0.0]])

        def forward(self, u):
            return self.fc(self.sn(u.flatten(0, 1))).unflatten(0, (2, -1)).mean(0)

    net = Net().eval()
    currents = torch.tensor([[[0.1, 0.8, 0.6, 0.6]], [[0.1, 1.0, 0.6, 0.6]]])  # potentials .1 .2, .8 1.8, .6 1.2
    v = Victim(encode=lambda x: currents.clone(), logits=net, steps=2, classes=2, module=net)
    sn, fc = trail(v, torch.zeros(1, 1, 1, 1), torch.tensor([0]), detail="origin", per_step=True).rows
    assert (fc.zero, fc.created, fc.inherited) == (0.25, 0.25, 0.0)
    # zero at both steps: never near (2, created), unknown to the scores (2, inherited); at step 2 alone: near once (1)
    assert (sn.zero, sn.inherited, sn.created, sn.passed) == (5 / 8, 2 / 8, 3 / 8, 2 / 8)
    assert sn.per_step == (2 / 4, 3 / 4)


@pytest.mark.parametrize("training", [False, True])
def test_batch_statistics_spread_a_gradient_over_the_channel(training):
    norm = nn.BatchNorm2d(2)
    arrived = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    arrived[0, 1, 0, 0] = True
    there = reach(norm.train(training), arrived, arrived.shape)
    assert int(there.sum()) == (8 if training else 1) and (not there[:, 0].any())


def test_what_enters_a_neuron_leads_to_later_steps():
    arrived = torch.tensor([[False, True, False], [True, False, False]])  # two steps of one image
    there = reach(FoldedNeuron(NeuronSpec(), 2), arrived, arrived.shape, steps=2)
    assert there.tolist() == [[True, True, False], [True, False, False]]


def test_an_unknown_operation_says_that_it_does_not_know():
    class Strange(nn.Module):
        def forward(self, x):
            return x.flip(-1)

    v = toy(Strange(), nn.Flatten(), nn.Linear(3, 2))
    row = trail(v, torch.rand(1, 1, 1, 3), torch.tensor([0]), detail="origin").rows[0]
    assert row.created is None and row.passed is None and row.inherited == 0.0 and row.zero == 0.0


@given(
    size=st.integers(2, 7), kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 2),
    kind=st.sampled_from(["conv", "grouped", "avg", "adaptive"]), seed=st.integers(0, 100),
)  # fmt: skip
def test_reach_against_a_backward_of_ones(size, kernel, stride, padding, kind, seed):
    """With positive weights a gradient of ones and zeros cancels nowhere: it is zero exactly where nothing leads."""
    if padding > kernel // 2 or size + 2 * padding < kernel:
        return
    g = torch.Generator().manual_seed(seed)
    module = {
        "conv": nn.Conv2d(2, 3, kernel, stride, padding, bias=False),
        "grouped": nn.Conv2d(2, 4, kernel, stride, padding, groups=2, bias=False),
        "avg": nn.AvgPool2d(kernel, stride, padding),
        "adaptive": nn.AdaptiveAvgPool2d(min(size, kernel)),
    }[kind]
    for p in module.parameters():
        nn.init.ones_(p)
    x = torch.rand(2, 2, size, size, generator=g).requires_grad_()
    out = module(x)
    arrived = torch.rand(out.shape, generator=g) < 0.3
    (grad,) = torch.autograd.grad(out, x, arrived.float())
    unseen = torch.autograd.grad(module(x).sum(), x)[0] == 0
    assert torch.equal(reach(module, arrived, x.shape), (grad != 0) | unseen)


def test_created_and_passed_make_up_the_zeros_of_a_whole_network():
    v, x, y = model()
    plain, full = trail(v, x, y), trail(v, x, y, detail="full", per_example=True)
    for a, b in zip(plain.rows, full.rows, strict=True):
        assert (a.op, a.zero, a.norm, a.forced, a.entries) == (b.op, b.zero, b.norm, b.forced, b.entries)
        assert b.created is not None and b.created + b.passed == pytest.approx(b.zero, abs=1e-12)
        assert 0 <= b.created <= b.zero and 0 <= b.inherited <= 1
        assert b.participation is None or 0 < b.participation <= 1 - b.zero + 1e-9
        assert len(b.per_example) == len(y) and sum(b.per_example) / len(y) == pytest.approx(b.zero, abs=1e-12)
    rows = {r.op: r for r in full.rows}
    assert rows["layer2.0.downsample.0"].created >= 0.75 and rows["pool"].created > 0
    assert rows["pool"].zero64 == rows["pool"].zero  # none of these is a rounding


def test_underflow_is_told_from_zeros_by_a_recount_in_float64():
    tiny = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(tiny.weight, 1e-30)
    again = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(again.weight, 1e-30)
    v = toy(tiny, again, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    first, second, pool, *_ = trail(v, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), detail="full").rows
    assert (first.zero, first.zero64, first.underflow) == (1.0, 0.75, 0.25)  # 1e-60 is no number of float32
    assert (second.zero, second.zero64, second.underflow) == (0.75, 0.75, 0.0)
    assert (pool.zero, pool.zero64, pool.underflow) == (0.75, 0.75, 0.0)
    assert tiny.weight.dtype == torch.float32


def test_weight_gradients_are_those_of_the_mean_loss():
    v, x, y = model()
    net = v.module
    parameters = dict(net.named_parameters())
    loss = F.cross_entropy(net(v.encode(x)), y)
    names = ["conv1.weight", "layer2.0.downsample.0.weight", "bn1.weight", "fc.weight"]
    wanted = dict(zip(names, torch.autograd.grad(loss, [parameters[k] for k in names]), strict=True))
    rows = {f"{r.op}.weight": r for r in trail(v, x, y, detail="full", batch=1).rows}
    for name, g in wanted.items():
        g, row = g.double(), rows[name]
        assert row.weight_norm == pytest.approx(float(g.norm()), rel=1e-4)
        ratio = float(g.abs().sum() ** 2 / g.square().sum() / g.numel())
        assert row.weight_participation == pytest.approx(ratio, rel=1e-4)
    seen = [r for r in rows.values() if r.weight_zero is not None]
    assert {r.kind for r in seen} == {"conv", "norm", "linear"}
    dead = toy(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(4, 2))
    x = torch.zeros(2, 1, 2, 2)  # nothing is seen: no weight of the first operation gets a gradient
    row = trail(dead, x, torch.tensor([0, 1]), detail="full").rows[0]
    assert (row.weight_zero, row.weight_norm, row.weight_participation) == (1.0, 0.0, None)


@pytest.mark.parametrize("when", ["forward", "backward", "second backward"])
def test_nothing_is_left_behind_after_an_error_anywhere(when):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.dtype = x.dtype
            if when == "forward":
                raise RuntimeError("on purpose")
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            if when == "backward" or ctx.dtype == torch.float64:
                raise RuntimeError("on purpose")
            return g

    class Layer(nn.Module):
        def forward(self, x):
            return Bad.apply(x)

    v = toy(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), Layer(), nn.Flatten(), nn.Linear(4, 2))
    net = v.module
    held = [*net.parameters(), *net.buffers()]
    where = [t.data_ptr() for t in held]
    with pytest.raises(RuntimeError, match="on purpose"):
        trail(v, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), detail="full", mode="train")
    assert all(a is b for a, b in zip(held, [*net.parameters(), *net.buffers()], strict=True))
    assert [t.data_ptr() for t in held] == where and all(t.dtype != torch.float64 for t in held)
    for m in net.modules():
        assert not m._forward_pre_hooks and not m._forward_hooks and not m._backward_hooks and not m.training
    assert all(p.grad is None and not p._backward_hooks for p in net.parameters())


def test_memory_does_not_grow_with_the_number_of_images():
    v, x, y = model()
    x, y = x.repeat(2, 1, 1, 1), y.repeat(2)
    held = []

    def tensors():
        gc.collect()
        return [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]

    before = tensors()  # held here: what other tests left must not die meanwhile
    known = set(map(id, before))

    def say(done, of):
        held.append(sum(t.numel() * t.element_size() for t in tensors() if id(t) not in known))

    trail(v, x, y, batch=2, detail="full", per_step=True, say=say)
    assert len(held) == 3 and held[2] == held[1] > 0


# --- networks that are not ours -------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """Layers by name, and how they are called on the mean of the input over time; every entry goes into the scores."""

    def __init__(self, call, **layers):
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, u):
        h = self.call(self, u.mean(0)).flatten(1)
        return h @ torch.randn(h.shape[1], 3, generator=torch.Generator().manual_seed(0)).to(h)


def foreign(call, n=4, size=8, **layers):
    torch.manual_seed(0)
    net = Foreign(call, **layers).eval()
    x = torch.rand(n, 2, size, size, generator=torch.Generator().manual_seed(0))
    v = Victim(encode=lambda x: x[None], logits=net, steps=1, classes=3, module=net)
    return v, x, torch.arange(n) % 3


def conv(*args, **more):
    return nn.Conv2d(*(args or (2, 4, 3)), **({"padding": 1} | more))


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm"])
@pytest.mark.parametrize("detail", ["plain", "full"])
def test_a_layer_with_a_computed_weight_is_an_operation(kind, detail):
    layer = getattr(nn.utils.parametrizations, kind)(conv(2, 3, 3))
    v, x, y = foreign(lambda net, x: net.b(F.relu(net.a(x))), a=layer, b=conv(3, 4, 3))
    found = trail(v, x, y, detail=detail)
    assert [(r.op, r.kind) for r in found.rows] == [("a", "conv"), ("b", "conv")] and found.unread == ()
    (g,) = torch.autograd.grad(F.cross_entropy(v.logits(u := x[None].requires_grad_()), y, reduction="sum"), u)
    assert found.rows[0].norm == pytest.approx(float(g[0].flatten(1).norm(dim=1).mean()), rel=1e-5)


def test_operations_that_no_gradient_reaches_are_told():
    """Behind the threshold nothing is differentiated: in front of it every entry is zero, behind it there is none."""
    layers = {"a": conv(), "m": nn.BatchNorm2d(4), "after": conv(4, 4, 3), "b": conv(), "idle": nn.Linear(2, 2)}
    v, x, y = foreign(lambda net, x: net.after((net.m(net.a(x)) > 0).float()) + net.b(x), **layers)
    for detail in ("plain", "origin", "full"):
        found = trail(v, x, y, detail=detail)
        rows = {r.op: r for r in found.rows}
        assert list(rows) == ["a", "m", "b"] and (rows["a"].zero, rows["m"].zero) == (1.0, 1.0)
        assert rows["a"].norm == 0 and rows["a"].entries == 2 * 64 and rows["m"].entries == 4 * 64
        assert found.unread == ("after (no gradient at its input)", "idle (not called)")
    assert (rows["a"].created, rows["a"].inherited, rows["m"].created, rows["m"].zero64) == (0.0, 1.0, 0.0, 1.0)


def test_a_call_without_a_gradient_counts_among_the_others():
    v, x, y = foreign(lambda net, x: net.b(net.a(x)) + (net.a(2 * x) > 0), a=conv(), b=conv(4, 4, 3))
    a, _ = trail(v, x, y, detail="origin").rows
    assert (a.zero, a.entries, a.created) == (0.5, 2 * 2 * 64, 0.0) and a.inherited == 0.5


def test_what_no_image_leads_to_is_no_zero():
    """A learnt constant goes through an operation too: its gradient is not of the images."""

    class Add(nn.Module):
        def forward(self, a, b):
            return a + b

    def call(net, x):
        return net.add(net.a(x), net.a.weight.sum())

    v, x, y = foreign(call, a=conv(), add=Add())
    a, add = trail(v, x, y).rows
    assert add.zero < 1 and add.entries == 4 * 64


@pytest.mark.parametrize("how", ["input=x", "a list", "a dict"])
def test_operations_are_seen_however_they_are_called(how):
    class Sum(nn.Module):
        def forward(self, parts):
            return sum(parts.values() if isinstance(parts, dict) else parts)

    def call(net, x):
        a = net.a(input=x) if how == "input=x" else net.a(x)
        return a if how == "input=x" else net.sum([a, a] if how == "a list" else {"one": a, "two": a})

    v, x, y = foreign(call, a=conv(), **({} if how == "input=x" else {"sum": Sum()}))
    found = trail(v, x, y, detail="full")
    assert [r.op for r in found.rows] == ["a", "sum"][: len(found.rows)] and found.unread == ()
    assert found.rows[-1].entries == (2 * 64 if how == "input=x" else 2 * 4 * 64)


def test_an_operation_that_overwrites_its_input_unasked_is_told():
    class Double(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    v, x, y = foreign(lambda net, x: net.b(net.twice(net.a(x))), a=conv(), twice=Double(), b=conv(4, 4, 3))
    found = trail(v, x, y, detail="full")
    assert found.unread == ("twice (writes into its input)",) and [r.op for r in found.rows] == ["a", "b"]


def test_no_operation_of_our_networks_goes_unread():
    for arch, pool in (("sew_resnet18", "max"), ("vgg5", "avg"), ("wrn16_4", "none")):
        v, x, y = model(arch, pool)
        assert trail(v, x, y).unread == ()


class Hard(nn.Module):
    """A threshold that says float() and has a backward of its own: of nothing, or of ones near it."""

    def __init__(self, backward):
        super().__init__()

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return (x > 0).float()

            @staticmethod
            def backward(ctx, g):
                near = (ctx.saved_tensors[0].abs() < 0.5).to(g)
                return {"none": None, "zeros": 0 * g, "near": g * near}[backward]

        self.function = Function

    def forward(self, x):
        return self.function.apply(x)


@pytest.mark.parametrize("detail", ["plain", "origin", "full"])
@pytest.mark.parametrize("backward", ["none", "zeros", "near"])
def test_a_threshold_of_foreign_code_is_measured(backward, detail):
    v, x, y = foreign(lambda net, x: net.b(net.hard(net.a(x))) + net.c(x), a=conv(), hard=Hard(backward),
                      b=conv(4, 4, 3), c=conv())  # fmt: skip
    a, hard, b, c = trail(v, x, y, detail=detail).rows
    assert (a.zero == hard.zero == 1.0) == (backward != "near") and b.zero < 1 and c.zero < 1
    if backward == "near":
        h = v.module.a(x)
        assert hard.zero == pytest.approx(float((h.abs() >= 0.5).double().mean()), abs=1e-9)
    if detail == "full":
        assert (hard.zero64, b.zero64, hard.inherited) == (hard.zero, b.zero, b.zero)


def test_a_network_of_which_nothing_is_differentiated_is_all_zeros():
    v, x, y = foreign(lambda net, x: net.b(net.hard(net.a(x))), a=conv(), hard=Hard("none"), b=conv(4, 4, 3))
    assert [r.zero for r in trail(v, x, y, detail="full").rows] == [1.0, 1.0, 0.0]
    v, x, y = foreign(lambda net, x: (net.a(x) > 0).float(), a=conv())
    found = trail(v, x, y, detail="full")
    assert [r.zero for r in found.rows] == [1.0] and found.rows[0].norm == 0.0


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "replicate", "reflect"])
@pytest.mark.parametrize("size, kernel, stride, padding", [(5, 1, 2, 1), (7, 2, 3, 2), (6, 3, 4, "same"), (4, 3, 5, 3)])
def test_a_padding_mode_decides_what_the_geometry_forces(size, kernel, stride, padding, padding_mode):
    stride = 1 if padding == "same" else stride
    layer = nn.Conv2d(1, 2, kernel, stride, padding, dilation=2 if padding == "same" else 1, padding_mode=padding_mode)
    nn.init.ones_(layer.weight)
    x = torch.rand(2, 1, size, size, requires_grad=True)
    out = layer(x)
    (g,) = torch.autograd.grad(out.sum(), x)
    assert density_cap(layer, size, size) == pytest.approx(float((g != 0).double().mean()), abs=1e-12)
    arrived = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    (some,) = torch.autograd.grad(layer(x), x, arrived.float())
    assert torch.equal(reach(layer, arrived, x.shape), (some != 0) | (g == 0))


def test_forced_is_that_of_all_calls_by_their_entries():
    """One strided 1x1 on 7x7, then on 4x4: 33 of 49 and 12 of 16 cells are left out, 45 of 65 together."""
    v, x, y = foreign(lambda net, x: net.down(net.down(net.a(x))), size=7, a=conv(), down=conv(4, 4, 1, 2, padding=0))
    _, down = trail(v, x, y, detail="origin").rows
    assert down.forced == pytest.approx(45 / 65, abs=1e-12) and down.created == pytest.approx(45 / 65, abs=1e-12)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("detail", ["plain", "full"])
def test_a_way_taken_before_an_overwriting_operation_is_not_its_own(detail, view):
    """The skip reads the map, then the ReLU overwrites it: through the ReLU goes what the ReLU lets through."""

    def call(net, x):
        h = net.a(x)
        skip = h / 2
        return net.relu(h.flatten(1) if view else h).reshape(h.shape) + skip

    v, x, y = foreign(call, a=conv(), relu=nn.ReLU(inplace=True))
    a, relu = trail(v, x, y, detail=detail).rows
    h = v.module.a(x)
    u = h.detach().requires_grad_()
    z = (torch.relu(u) + h.detach() / 2).flatten(1)
    scores = z @ torch.randn(z.shape[1], 3, generator=torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(F.cross_entropy(scores, y, reduction="sum"), u)
    assert 0.2 < relu.zero == pytest.approx(float((g == 0).double().mean()), abs=1e-12)
    assert relu.norm == pytest.approx(float(g.flatten(1).norm(dim=1).mean()), rel=1e-5) and a.zero == 0
    if detail == "full":
        assert (relu.created, relu.inherited, relu.zero64) == (relu.zero, 0.0, relu.zero)


def test_an_operation_that_may_overwrite_and_does_not_leaves_what_was_kept():
    """Dropout in eval mode gives its input back: the square before it can still be differentiated."""

    def call(net, x):
        h = net.a(x)
        square = h * h
        return net.drop(h) + square

    v, x, y = foreign(call, a=conv(), drop=nn.Dropout(inplace=True))
    _, drop = trail(v, x, y, detail="full").rows
    assert drop.zero == drop.created == 0.0 and drop.inherited == 0.0
    (g,) = torch.autograd.grad(F.cross_entropy(v.logits(u := x[None].requires_grad_()), y, reduction="sum"), u)
    first = trail(v, x, y).rows[0]
    assert first.norm == pytest.approx(float(g[0].flatten(1).norm(dim=1).mean()), rel=1e-5)


class Folded(nn.Module):
    """Its tensors are folded [n*t ...] (images first), [t*n ...] or tokens first; the first step counts alone."""

    def __init__(self, order):
        super().__init__()
        self.order, self.conv, self.relu, self.fc = order, conv(), nn.ReLU(), nn.Linear(4 * 64, 3)
        self.token = nn.Linear(16, 32)

    def forward(self, u):
        t, n = u.shape[:2]
        if self.order == "tokens":  # [s n d], of the first step
            h = self.relu(self.token(u[0].reshape(n, 8, 16).transpose(0, 1)))
            return self.fc(h.transpose(0, 1).flatten(1))
        if self.order == "images":
            u = u.transpose(0, 1)
        z = self.fc(self.relu(self.conv(u.flatten(0, 1))).flatten(1)).unflatten(0, u.shape[:2])
        return z[:, 0] if self.order == "images" else z[0]


@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.parametrize("order", ["images", "steps", "tokens"])
def test_steps_and_images_are_told_only_where_they_lie_as_ours_do(order, n):
    torch.manual_seed(0)
    net = Folded(order).eval()
    x, y = torch.rand(n, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3
    x[0] *= 3
    v = Victim(encode=lambda x: x.expand(T, *x.shape), logits=net, steps=T, classes=3, module=net)
    found = trail(v, x, y, detail="origin", per_step=True, per_example=True)
    rows = {r.op: r for r in found.rows}
    mine = ("token" if order == "tokens" else "conv", "relu") + (("fc",) if order == "images" else ())
    u = v.encode(x).clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net(u), y, reduction="sum"), u)
    first = rows[mine[0]]
    if order == "steps":
        assert found.unfolded == () and first.per_step == (float((g[0] == 0).double().mean()), 1, 1, 1)
        assert first.norm == pytest.approx(float(g.movedim(1, 0).flatten(1).norm(dim=1).mean()), rel=1e-5)
        assert len(first.per_example) == n and first.participation is not None
    else:
        assert found.unfolded == mine and "another order" in explain(found)
        for op in mine:
            r = rows[op]
            assert math.isnan(r.norm) and (r.per_step, r.per_example, r.participation) == (None, None, None)
        part = g if order == "images" else g[0]  # shares over everything are as before
        assert first.zero == pytest.approx(float((part == 0).double().mean()), abs=1e-9)
    assert found.n == n and pack(found)["unfolded"] == list(found.unfolded)


class Integrate(nn.Module):
    """A neuron that keeps its potential from call to call, until it is reset."""

    v = 0.0

    def reset(self):
        self.v = 0.0

    def forward(self, x):
        h = self.v + x
        s = torch.sigmoid(4 * (h - 1))
        self.v = (h * (1 - s)).detach()
        return s


def test_train_mode_takes_the_victims_own_logits_or_is_refused():
    class Stepwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.sn, self.fc = conv(), Integrate(), nn.Linear(256, 3)

        def forward(self, u):
            return sum(self.fc(self.sn(3 * self.conv(step)).flatten(1)) for step in u)

    torch.manual_seed(0)
    net = Stepwise().eval()
    x, y = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
    kept = stateful(net, lambda x: x.expand(3, *x.shape), classes=3, steps=3)
    assert trail(kept, x, y, batch=2).rows == trail(kept, x, y, batch=2).rows
    with pytest.raises(ValueError, match="mode: expected eval of victim, got train, which its logits refuse"):
        trail(kept, x, y, batch=2, mode="train")
    with pytest.raises(ValueError, match="which its logits leave"):
        trail(replace(kept, logits=lambda u: kept.logits(net.eval() and u)), x, y, mode="train")

    def anew(u):
        net.sn.reset()
        try:
            return net(u)
        finally:
            net.sn.reset()

    own = replace(kept, logits=anew)
    for batch in (2, 5):  # the last batch is smaller
        first, again = (trail(own, x, y, batch=batch, mode="train") for _ in range(2))
        assert first.rows == again.rows and first.mode == "train" and not net.training


def test_what_cannot_be_measured_is_refused_first():
    v, x, y = foreign(lambda net, x: net.a(x), a=conv())
    for change, words in (
        ({"batch": 0}, "batch: expected at least 1 image, got 0"),
        ({"mode": "test"}, "mode: expected eval or train, got 'test'"),
        ({"y": y[:3]}, r"labels \[n\], n > 0, got \(4, .*\) and \(3,\)"),
        ({"x": x[:0], "y": y[:0]}, "n > 0, got"),
        ({"y": y + 99}, "labels: expected 0..2, got 99"),
        ({"victim": v.module}, "expected a Victim, got"),
    ):
        with pytest.raises(ValueError, match=words):
            inspect.unwrap(trail)(**({"victim": v, "x": x, "y": y} | change))


def test_images_whose_gradient_is_not_finite_are_counted():
    v, x, y = foreign(lambda net, x: net.b(net.relu(net.a(x))), a=conv(), relu=nn.ReLU(), b=conv(4, 4, 3))
    whole = trail(v, x[[0, 2, 3]], y[[0, 2, 3]], detail="origin")
    x = x.clone()
    x[1, 0, 0, 0] = float("nan")
    found = trail(v, x, y, detail="origin", batch=3)
    assert found.nonfinite == 1 and whole.nonfinite == 0 and math.isnan(found.rows[0].norm)
    assert [r.participation for r in found.rows] == pytest.approx([r.participation for r in whole.rows], rel=1e-6)
    assert "1 of 4 images have a gradient that is not finite" in explain(found)


def test_a_kind_is_told_by_the_words_of_a_name():
    names = {
        "neuron": "IFNode LIF LIFNode ParametricLIFNode PLIF FoldedNeuron LIFBoxCell StepIF ALIF Node lifnode Lif",
        "": "Amplifier Clif Simplified LifeLong If Diff Anode GIF Shift Lifted",
    }
    for kind, words in names.items():
        for name in words.split():
            assert (kind_of(type(name, (nn.Module,), {})()) == "neuron") == bool(kind), name
