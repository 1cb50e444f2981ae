"""The networks of the compared defences: sizes to the parameter, shared first frames, learnt leak and threshold."""

import math

import pytest
import torch
from lively import lively
from torch import nn

from sparsetrail.models import import_weights
from sparsetrail.snn.encode import direct, phase, poisson
from sparsetrail.snn.folded import NORMALISATIONS, Dropout, FoldedNeuron, Normalise
from sparsetrail.snn.net import NetSpec, build, running_for, victim
from sparsetrail.snn.neuron import LEAST, Neuron, NeuronSpec, carrying
from sparsetrail.snn.pooling import AvgPool2d
from sparsetrail.snn.surrogate import Surrogate

HIRE = NeuronSpec(kind="diet", reset=None, threshold=0.5, leak=0.9, surrogate=Surrogate("damped_triangle", 1.0))
SMALL = {"width": 0.25, "steps": 4}


@pytest.mark.parametrize(
    ("arch", "classes", "count"),
    [("vgg11", 10, 61_377_034), ("vgg11", 100, 61_745_764), ("wrn16_4", 10, 2_748_902), ("wrn16_4", 100, 2_772_032)],
)
def test_parameter_counts(arch, classes, count):
    assert sum(p.numel() for p in build(NetSpec(arch=arch, classes=classes)).parameters()) == count


def test_hire_vgg_has_neither_biases_nor_batchnorm_and_drops_where_no_pool_follows():
    net = build(NetSpec(arch="vgg11", norm="none", dropout=0.2, readout="sum", neuron=HIRE, steps=2))
    plain = 61_377_034 - 2 * (64 + 128 + 256 + 5 * 512) - (64 + 128 + 256 + 5 * 512) - 2 * 4096 - 10
    neurons = [m for m in net.modules() if isinstance(m, Neuron)]
    assert len(neurons) == 10 and sum(p.numel() for p in net.parameters()) == plain + 2 * 10
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    after = [type(layer.after) for layer in net.features]
    assert after == [AvgPool2d, Dropout, AvgPool2d, Dropout, Dropout, AvgPool2d, Dropout, Dropout]


@pytest.mark.parametrize(
    ("arch", "maps"),
    [("vgg11", (32, 16, 16, 8, 8, 8, 4, 4)), ("vgg5", (32, 16, 16)), ("wrn16_4", (32, 32, 16, 16, 8, 8))],
)
def test_map_sizes(arch, maps):
    net, seen = build(NetSpec(arch=arch, width=0.0625, steps=2)), []
    convs = [layer.conv for layer in net.features] if arch != "wrn16_4" else [b.conv1 for b in net.blocks]
    for conv in convs:
        conv.register_forward_hook(lambda _, __, out: seen.append(out.shape[-1]))
    assert net(torch.rand(2, 3, 3, 32, 32)).shape == (3, 10)
    assert tuple(seen) == maps
    assert build(NetSpec(arch=arch, width=0.0625, steps=2, channels=1))(torch.rand(2, 3, 1, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("arch", ["vgg11", "vgg5", "wrn16_4", "sew_resnet18"])
@pytest.mark.parametrize("normalise", ["none", "cifar10"])
@pytest.mark.parametrize("encode", [direct(steps=4), phase(steps=4)], ids=lambda e: e.name)
def test_scores_are_those_of_the_encoded_input(arch, normalise, encode):
    """The first layer is computed once a frame; normalised, since padding is zero behind the normalisation."""
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    net = lively(NetSpec(arch=arch, normalise=normalise, **SMALL), encode(x.float())).double()
    grads = []
    for z in (net.scores(leaf := x.clone().requires_grad_(), encode), net(encode(other := x.clone().requires_grad_()))):
        z.square().sum().backward()
        grads.append(z.detach())
    assert grads[0].std() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-10)
    assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("arch", ["vgg5", "wrn16_4"])
def test_fast_paths_equal_the_plain_ones(arch):
    x, found = torch.rand(3, 3, 32, 32, dtype=torch.float64), []
    for exact in (False, True):
        spec = NetSpec(arch=arch, exact=exact, normalise="cifar10", width=0.25, steps=8)
        net = lively(spec, direct(steps=8)(x.float()), gain=4.0).double().train()
        z = net.scores(x, direct(steps=8))
        z.square().sum().backward()
        found.append([z.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert found[0][1].abs().max() > 0


def test_normalise_is_the_documented_one():
    x = torch.rand(2, 3, 4, 4)
    mean, deviation = NORMALISATIONS["cifar10"]
    torch.testing.assert_close(Normalise("cifar10")(x)[:, 1], (x[:, 1] - mean[1]) / deviation[1])
    torch.testing.assert_close(Normalise("half")(x), 2 * x - 1)


# ---- DIET neurons --------------------------------------------------------------------------------------------------


def by_the_book(x, leak, threshold):
    """HIRE-SNN's own recursion, step by step."""

    class Fire(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return (z >= 0).to(z.dtype)

        @staticmethod
        def backward(ctx, grad):
            (z,) = ctx.saved_tensors
            return grad * 0.3 * (1 - z.abs()).clamp(min=0)

    u, spikes = torch.zeros_like(x[0]), []
    for now in x:
        u = leak * u + now
        z = u / threshold - 1
        spikes.append(Fire.apply(z))
        u = u - threshold * (z.detach() >= 0).to(z.dtype)
    return torch.stack(spikes)


@pytest.mark.parametrize("exact", [False, True])
def test_a_diet_neuron_is_the_published_recursion(exact):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 50, generator=g, dtype=torch.float64)
    w = torch.randn(6, 50, generator=g, dtype=torch.float64)
    neuron = Neuron(HIRE, exact=exact).double()
    leak, threshold = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.9, 0.5))
    with torch.no_grad():
        neuron.leak.fill_(0.9), neuron.threshold.fill_(0.5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = neuron(a), by_the_book(b, leak, threshold)
    assert torch.equal(ours, theirs) and 0.05 < ours.mean() < 0.95
    (ours * w).sum().backward(), (theirs * w).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(neuron.leak.grad, leak.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(neuron.threshold.grad, threshold.grad, rtol=0, atol=1e-10)
    assert leak.grad.abs() > 1e-3 and threshold.grad.abs() > 1e-3


@pytest.mark.parametrize("readout", ["sum", "mean"])
def test_carried_potentials_make_two_halves_one_run(readout):
    x = torch.randn(8, 3, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    neuron = Neuron(HIRE).double()
    whole, kept = neuron(x), {}
    with carrying(kept):
        halves = torch.cat([neuron(x[:4]), neuron(x[4:])])
    assert torch.equal(whole, halves) and not torch.equal(neuron(x[4:]), halves[4:])
    assert not kept[neuron].requires_grad

    spec = NetSpec(arch="vgg5", norm="none", readout=readout, neuron=HIRE, **SMALL)
    net = build(spec).double().eval()
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 3
    with torch.no_grad(), running_for(net, 2), carrying({}):
        net(direct(steps=2)(image))
        last = net(direct(steps=2)(image))
    with torch.no_grad():
        torch.testing.assert_close(net(direct(steps=4)(image)), last)
    assert last.std() > 0 and net.steps == 4


def test_learnt_leak_and_threshold_are_kept_in_their_range():
    neuron = Neuron(HIRE)
    with torch.no_grad():
        neuron.leak.fill_(1.2), neuron.threshold.fill_(-1)
    neuron.confine()
    assert neuron.leak.item() == 1 and neuron.threshold.item() == pytest.approx(LEAST)
    fixed = Neuron(NeuronSpec(kind="diet", reset=None, leak=0.99, learn=False))
    assert not fixed.leak.requires_grad and not fixed.threshold.requires_grad


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"kind": "diet", "reset": None, "leak": 1.1}, "leak: expected a factor 0..1"),
        ({"kind": "diet", "reset": None, "threshold": -0.5}, "threshold: expected a positive number"),
        ({"kind": "diet"}, "give reset=None"),
        ({"kind": "lif", "leak": 0.9}, "only diet neurons have them"),
    ],
)
def test_refused_neurons(knobs, words):
    with pytest.raises(ValueError, match=words):
        NeuronSpec(**knobs)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"arch": "wrn16_4", "pool": "avg"}, "pool: expected one of none in a wrn16_4"),
        ({"arch": "vgg11", "stem": "cifar"}, "stem: expected one of imagenet in a vgg11"),
        ({"arch": "vgg11", "dropout": 1.0}, "dropout: expected a share"),
        ({"dropout": 0.2}, "dropout: expected a share"),
        ({"norm": "none"}, "norm: expected one of batch"),
        ({"normalise": "mnist"}, "normalise: expected one of none, cifar10"),
        ({"normalise": "cifar10", "channels": 1}, "for 3 channels, got 1"),
    ],
)
def test_refused_networks(knobs, words):
    bare = object.__new__(NetSpec)
    bare.__dict__.update(vars(NetSpec()) | {"pool": None} | knobs)
    with pytest.raises(ValueError, match=words):
        bare.__post_init__()


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_the_dropout_mask_is_shared_over_time_and_repeatable():
    drop, x = Dropout(0.25, steps=5), torch.ones(5 * 8, 100)
    drop.generator = torch.Generator().manual_seed(3)
    y = drop(x).unflatten(0, (5, 8))
    assert (y == y[0]).all() and y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs(float((y[0] == 0).float().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 800)
    drop.generator = torch.Generator().manual_seed(3)
    assert torch.equal(drop(x).unflatten(0, (5, 8)), y)
    assert torch.equal(drop.eval()(x), x)


def test_signed_poisson_spikes_have_the_mean_and_the_gradient_of_the_centred_pixel():
    x = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0]).view(1, 1, 1, 5).requires_grad_()
    encode = poisson(steps=20_000, signed=True, seed=5)
    s = encode(x)
    assert set(s.unique().tolist()) == {-1.0, 0.0, 1.0}
    p = 2 * x.detach() - 1
    assert ((s.detach().mean(0) - p).abs() <= 4 * ((p.abs() - p.square()) / 20_000).sqrt() + 1e-7).all()
    s.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 40_000.0))
    again = encode.route("none")
    assert again.knobs["signed"] and not again(x).requires_grad
    assert "signed" not in poisson().knobs


def test_a_relu_twin_is_a_network_and_a_victim():
    spec = NetSpec(arch="vgg5", width=0.25, steps=1, neuron=NeuronSpec(kind="relu"))
    net = build(spec).eval()
    v = victim(net, direct(steps=1))
    assert v.route == "ReLU"
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    z = x
    for layer in net.features:
        z = layer.after(torch.relu(layer.bn(layer.conv(z))))
    z = net.fc(torch.relu(net.fc2(torch.relu(net.fc1(z.flatten(1))))))
    torch.testing.assert_close(v.scores(x), z, rtol=1e-4, atol=1e-5)
    assert len([m for m in net.modules() if isinstance(m, FoldedNeuron)]) == 5


@pytest.mark.parametrize("arch", ["vgg5", "wrn16_4"])
def test_a_checkpoint_is_taken_in_whatever_its_names_begin_with(arch, tmp_path):
    spec = NetSpec(arch=arch, width=0.125, steps=2)
    net = build(spec, seed=5)
    for prefix in ("", "module.", "module.snn."):
        file = tmp_path / f"{prefix}pth"
        torch.save({"state_dict": {prefix + k: v for k, v in net.state_dict().items()}}, file)
        model = import_weights(file, spec, direct(steps=2), "cifar10", tmp_path / f"run{prefix}")
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.net.state_dict().items())
