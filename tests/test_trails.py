"""The trail against gradients computed another way, geometry against brute force, and no hook left behind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lively import lively
from torch import nn
from torch.nn import functional as F

from sparsetrail.core import Victim
from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import NetSpec, victim
from sparsetrail.trails import density_cap, maxpool_density_cap, strided_conv_density, trail

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
