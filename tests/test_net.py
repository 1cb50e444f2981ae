"""Networks by specification: counts, names, maps, seeds, and what a victim made of one promises."""

import copy
import inspect
import itertools
import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from sparsetrail.snn.encode import phase, poisson
from sparsetrail.snn.net import RESNETS, NetSpec, build, describe, victim
from sparsetrail.snn.neuron import NeuronSpec, fused, reference
from sparsetrail.snn.resnet import FoldedNeuron, Join
from sparsetrail.snn.surrogate import Surrogate

PARAMETERS = {  # those of torchvision's ResNets
    (18, 10): 11_181_642,
    (34, 10): 21_289_802,
    (50, 10): 23_528_522,
    (18, 100): 11_227_812,
    (34, 100): 21_335_972,
    (50, 100): 23_712_932,
}
NEURONS = {"sew": {18: 20, 34: 36, 50: 53}, "spiking": {18: 17, 34: 33, 50: 49}}
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
SMALL = {"width": 0.125, "steps": 4}


def layers(net, kind):
    return [m for m in net.modules() if isinstance(m, kind)]


def lively(net, u):
    """Let every layer fire: statistics from the input, raised biases."""
    for m in layers(net, nn.BatchNorm2d):
        nn.init.constant_(m.bias, 0.5)
        m.momentum = 1.0
    net.train()
    with torch.no_grad():
        net(u)
    return net.eval()


def spikes(*shape, seed=0):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).float()


def torchvision_keys(depth):
    """The names of torchvision's resnet18/34/50, written out from its layout."""

    def norm(name):
        return [f"{name}.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    keys = ["conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"]
    for stage, count in enumerate(BLOCKS[depth], 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            for i in (1, 2, 3) if depth == 50 else (1, 2):
                keys += [f"{at}.conv{i}.weight", *norm(f"{at}.bn{i}")]
            if block == 0 and (stage > 1 or depth == 50):
                keys += [f"{at}.downsample.0.weight", *norm(f"{at}.downsample.1")]
    return keys


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("arch", RESNETS)
def test_counts_and_names(arch, classes):
    family, depth = arch.split("_resnet")
    net = build(NetSpec(arch=arch, classes=classes))
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[int(depth), classes]
    assert set(net.state_dict()) == set(torchvision_keys(int(depth)))
    if depth == "18":
        assert len(net.state_dict()) == 122
    assert len(layers(net, FoldedNeuron)) == NEURONS[family][int(depth)]
    assert len(layers(net, nn.MaxPool2d)) == 1 and len(layers(net, nn.ReLU)) == 0
    assert len(layers(net, Join)) == sum(BLOCKS[int(depth)])


@pytest.mark.parametrize(
    ("arch", "stem", "pool", "maps"),
    [
        ("sew_resnet18", "imagenet", "max", (16, 8, 8, 4, 2, 1)),
        ("sew_resnet34", "imagenet", "avg", (16, 8, 8, 4, 2, 1)),
        ("spiking_resnet50", "imagenet", "max", (16, 8, 8, 4, 2, 1)),
        ("sew_resnet18", "cifar", "max", (32, 32, 32, 16, 8, 4)),
        ("spiking_resnet50", "cifar", "max", (32, 32, 32, 16, 8, 4)),
    ],
)
def test_map_sizes(arch, stem, pool, maps):
    net = build(NetSpec(arch=arch, stem=stem, pool=pool, **SMALL)).eval()
    seen = []
    for name in ("conv1", "pool", "layer1", "layer2", "layer3", "layer4"):
        getattr(net, name).register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[2:])))
    out = net.per_step(spikes(4, 2, 3, 32, 32))
    assert seen == [(m, m) for m in maps] and out.shape == (4, 2, 10)
    stem_conv = net.conv1
    if stem == "cifar":
        assert stem_conv.kernel_size == (3, 3) and stem_conv.stride == (1, 1) and isinstance(net.pool, nn.Identity)
        assert "conv1.weight" in net.state_dict()
    else:
        kind = nn.MaxPool2d if pool == "max" else nn.AvgPool2d
        assert isinstance(net.pool, kind) and (net.pool.kernel_size, net.pool.stride, net.pool.padding) == (3, 2, 1)
        if pool == "avg":
            assert net.pool.count_include_pad


def test_strides_sit_where_torchvision_has_them():
    for depth, at in ((18, "conv1"), (50, "conv2")):
        block = build(NetSpec(arch=f"sew_resnet{depth}", **SMALL)).layer2[0]
        assert {n for n, m in block.named_children() if n.startswith("conv") and m.stride == (2, 2)} == {at}
        assert block.downsample[0].stride == (2, 2) and block.downsample[0].kernel_size == (1, 1)


@pytest.mark.parametrize("arch", ["sew_resnet18", "spiking_resnet50"])
def test_width(arch):
    for width in (0.125, 0.25, 0.5, 1.5):
        net = build(NetSpec(arch=arch, width=width, channels=1, classes=7))
        expansion = 4 if arch.endswith("50") else 1
        for i, full in enumerate((64, 128, 256, 512), 1):
            assert getattr(net, f"layer{i}")[-1].conv1.out_channels == round(full * width)
        assert net.conv1.weight.shape[:2] == (round(64 * width), 1)
        assert net.fc.weight.shape == (7, round(512 * width) * expansion)
    tiny = build(NetSpec(arch=arch, width=0.001, steps=2))
    assert tiny.conv1.out_channels == 1
    assert tiny.eval()(spikes(2, 1, 3, 32, 32)).shape == (1, 10)


def test_seeds():
    spec = NetSpec(**SMALL)
    state = torch.get_rng_state()
    a, b, c = build(spec, seed=5), build(spec, seed=5), build(spec, seed=6)
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is left alone
    torch.rand(3)
    same = [torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)]
    assert all(same)
    other = dict(c.named_parameters())
    assert all(
        not torch.equal(p, other[n]) for n, p in a.named_parameters() if "bn" not in n and "downsample.1" not in n
    )


def test_initialisation():
    """Kaiming normal by fan out, BatchNorm 1 and 0, PyTorch's uniform fc; no residual branch starts at zero."""
    net = build(NetSpec(width=0.5))
    for m in layers(net, nn.Conv2d):
        std = math.sqrt(2 / (m.out_channels * m.kernel_size[0] * m.kernel_size[1]))
        n = m.weight.numel()
        assert abs(m.weight.mean()) < 5 * std / math.sqrt(n) and m.bias is None
        assert m.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
    for m in layers(net, nn.BatchNorm2d):
        assert (m.weight == 1).all() and (m.bias == 0).all() and (m.eps, m.momentum) == (1e-5, 0.1)
    bound = net.fc.in_features**-0.5
    assert net.fc.weight.abs().max() <= bound and net.fc.weight.std().item() == pytest.approx(
        bound / math.sqrt(3), rel=0.05
    )


@pytest.mark.parametrize("connect", ["add", "and", "iand"])
def test_join(connect):
    x, y = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    want = {"add": [0, 1, 1, 2, 3], "and": [0, 0, 0, 1, 2], "iand": [0, 0, 1, 0, 0]}
    assert Join(connect)(x, y).tolist() == want[connect] and connect in repr(Join(connect))


@pytest.mark.parametrize(
    ("arch", "connect", "neuron"),
    [
        ("sew_resnet18", "add", NeuronSpec()),
        ("sew_resnet50", "iand", NeuronSpec(detach_reset=False)),
        ("spiking_resnet18", "add", NeuronSpec(kind="plif", threshold=0.5)),
    ],
)
def test_fast_paths_equal_the_plain_ones(arch, connect, neuron):
    """Fused neurons, dense products and channels last, against none of them. In float64: see test_spikingjelly.py."""
    u = spikes(4, 3, 3, 32, 32).double()
    spec = NetSpec(arch=arch, connect=connect, neuron=neuron, width=0.25, steps=4)
    fast = lively(build(spec).double(), u)
    plain = build(NetSpec(**(spec.__dict__ | {"exact": True}))).double().to(memory_format=torch.contiguous_format)
    plain.load_state_dict(fast.state_dict(), strict=True)
    assert (fast.sn1.run, plain.sn1.run, fast.conv1.exact, plain.conv1.exact) == (fused, reference, False, True)
    fired, found = [], []
    for net in (fast, plain.eval()):
        seen = {}
        for name, m in net.named_modules():
            if isinstance(m, FoldedNeuron):
                m.register_forward_hook(lambda _, __, out, name=name, seen=seen: seen.update({name: out.detach()}))
        leaf = u.clone().requires_grad_()
        z = net(leaf)
        found.append((z.detach(), *torch.autograd.grad(z.square().sum(), [leaf, *net.parameters()])))
        fired.append(seen)
    assert all(torch.equal(fired[0][n], s) and 0 < s.mean() < 1 for n, s in fired[1].items())
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max() and b.abs().max() > 0


def test_stateless():
    """The same input gives the same scores, whatever came before and whoever sits next to it."""
    for arch in ("sew_resnet18", "spiking_resnet18"):
        u = spikes(4, 6, 3, 32, 32).double()  # no potential within rounding of its threshold
        net = lively(build(NetSpec(arch=arch, **SMALL)).double(), u)
        held = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            first = net(u)
            net(1 - u)
            assert torch.equal(net(u), first)
            order = torch.tensor([3, 0, 5, 1, 4, 2])
            torch.testing.assert_close(net(u[:, order]), first[order], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(net.per_step(u).mean(0), first, rtol=0, atol=0)
            past = net.per_step(torch.cat([u[:2], 1 - u[2:]]))
            torch.testing.assert_close(past[:2], net.per_step(u)[:2], rtol=1e-10, atol=1e-12)
        assert all(torch.equal(v, held[k]) for k, v in net.state_dict().items())
        assert first.std(0).max() > 0


def test_batchnorm_runs_over_time_too():
    net = build(NetSpec(**SMALL)).train()
    u = spikes(4, 2, 3, 32, 32)
    current = net.conv1(u.flatten(0, 1))
    net(u)
    torch.testing.assert_close(net.bn1.running_mean, 0.1 * current.mean((0, 2, 3)))
    torch.testing.assert_close(net.bn1.running_var, 0.9 + 0.1 * current.var((0, 2, 3)))
    assert net.bn1.num_batches_tracked == 1


def test_double_backward_and_per_sample_gradients():
    u = spikes(4, 3, 3, 32, 32).double()
    net = lively(
        build(NetSpec(arch="spiking_resnet18", width=0.06, steps=4, neuron=NeuronSpec(detach_reset=False))).double(), u
    )
    y = torch.tensor([0, 1, 2])

    def loss(image, label):
        return nn.functional.cross_entropy(net(image[:, None]), label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(1, 0), out_dims=1)(u, y)
    leaf = u.clone().requires_grad_()
    (whole,) = torch.autograd.grad(nn.functional.cross_entropy(net(leaf), y, reduction="sum"), leaf, create_graph=True)
    torch.testing.assert_close(each, whole.detach(), rtol=1e-9, atol=1e-12)
    (second,) = torch.autograd.grad(whole.square().sum(), leaf)
    assert second.isfinite().all() and second.abs().max() > 0
    weights = torch.autograd.grad(
        torch.autograd.grad(net(leaf).square().sum(), leaf, create_graph=True)[0].abs().sum(),
        list(net.parameters())[:3],
    )
    assert all(w.abs().max() > 0 for w in weights)


def test_bfloat16():
    u = spikes(4, 2, 3, 32, 32)
    net = lively(build(NetSpec(**SMALL)), u).bfloat16()
    z = net(u.bfloat16())
    assert z.dtype == torch.bfloat16 and z.isfinite().all()


def test_victim():
    net = build(NetSpec(steps=5, width=0.125, classes=7))
    code = phase(steps=5)
    f = victim(net, code, name="small")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"small: expected a network in eval mode, found train mode; call net.eval\(\)"
    ):
        f.scores(x)
    net.eval()
    assert torch.equal(f.scores(x), net(code(x))) and f.scores(x).shape == (2, 7)
    assert (f.steps, f.classes, f.name, f.mode, f.random, f.module) == (5, 7, "small", "eval", False, net)
    assert f.route == describe(net) == "BPTT atan(2), hard reset detached"
    assert f.encoding == "phase encoder: identity"
    assert f.path("pixel") == f"{f.route}; {f.encoding}" and f.path("encoded") == f.route
    assert victim(net, poisson(steps=5)).random
    assert victim(nn.Sequential(nn.Flatten()), code, classes=3).classes == 3

    class Holds:
        pass

    held = Holds()
    held.net = net
    with pytest.raises(ValueError, match=r"victim: expected a network, an nn.Module, got a Holds; give its .net"):
        inspect.unwrap(victim)(held, code)
    with pytest.raises(ValueError, match=r"expected an encoded input \[5 n c h w\], got shape \(4, 2, 3, 32, 32\)"):
        net(spikes(4, 2, 3, 32, 32))


def test_routes_in_words():
    soft = NeuronSpec(reset=None, detach_reset=False, surrogate=Surrogate("triangle", 0.5))
    assert describe(build(NetSpec(neuron=soft, **SMALL))) == "BPTT triangle(0.5), soft reset in the graph"
    assert describe(nn.Linear(2, 2)) == "own gradient"
    both = nn.ModuleList([FoldedNeuron(NeuronSpec(), 2), FoldedNeuron(soft, 2)])
    assert describe(both) == "BPTT atan(2), hard reset detached + BPTT triangle(0.5), soft reset in the graph"


def test_every_setting_is_read():
    """Changing any field of a spec changes the network, or is refused."""
    base = NetSpec(**SMALL)
    u = spikes(4, 2, 3, 32, 32)
    others = {
        "arch": ["spiking_resnet18", "sew_resnet34"],
        "classes": [7],
        "channels": [1],
        "width": [0.25],
        "stem": ["cifar"],
        "pool": ["avg"],
        "connect": ["and", "iand"],
        "neuron": [
            NeuronSpec(threshold=0.7),
            NeuronSpec(reset=None),
            NeuronSpec(reset=-0.3),
            NeuronSpec(kind="lif"),
            NeuronSpec(kind="plif"),
            NeuronSpec(detach_reset=False),
            NeuronSpec(surrogate=Surrogate("triangle")),
        ],
        "steps": [3],
        "normalise": ["cifar10", "half"],
        "readout": ["sum"],
        "norm": [],  # a VGG's: tests of test_vgg_wrn
        "dropout": [],
        "exact": [],  # the same numbers by other means: test_fast_paths_equal_the_plain_ones
    }
    assert others.keys() == base.__dict__.keys()

    def traits(spec):
        net = lively(build(spec), u[: spec.steps, :, : spec.channels])
        leaf = u[: spec.steps, :, : spec.channels].clone().requires_grad_()
        z = net(leaf)
        (g,) = torch.autograd.grad(z.square().sum(), leaf)
        return [*map(tuple, (p.shape for p in net.parameters()))], tuple(leaf.shape), z.detach(), g, repr(net)

    shapes, size, z, g, text = traits(base)
    for name, value in ((n, v) for n, vs in others.items() for v in vs):
        shapes2, size2, z2, g2, text2 = traits(NetSpec(**(base.__dict__ | {name: value})))
        assert shapes2 != shapes or size2 != size or not torch.equal(z2, z) or not torch.equal(g2, g), (name, value)
        assert name in ("steps", "channels") or text2 != text


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"arch": "resnet18"}, "arch: expected one of sew_resnet18, sew_resnet34, .*, got 'resnet18'"),
        ({"arch": "sew_resnet101"}, "arch: expected one of"),
        ({"stem": "tiny"}, "stem: expected one of imagenet, cifar, got 'tiny'"),
        ({"pool": "min"}, "pool: expected one of max, avg, mix, learned, stochastic, sum, conv, none, got 'min'"),
        ({"stem": "cifar", "pool": "avg"}, "the cifar stem has no pool"),
        ({"pool": "mix:2"}, "a share of max 0..1 as in 'mix:0.25'"),
        ({"pool": "avg:0.5"}, "and of mix alone, got 'avg:0.5'"),
        ({"pool": "sum", "neuron": NeuronSpec(kind="relu")}, "made of spikes"),
        ({"arch": "vgg5", "pool": "none"}, "stochastic, sum, conv in a vgg5, got 'none'"),
        ({"connect": "xor"}, "connect: expected one of add, and, iand, got 'xor'"),
        ({"arch": "spiking_resnet18", "connect": "iand"}, "a Spiking-ResNet adds currents; 'iand' is for SEW-ResNet"),
        ({"classes": 0}, "expected positive classes, channels, steps and a width up to 64, got classes=0"),
        ({"channels": 0}, "channels=0"),
        ({"steps": 0}, "steps=0"),
        ({"width": 0.0}, "width=0.0"),
        ({"width": math.nan}, "width=nan"),
    ],
    ids=lambda k: "-".join(map(str, itertools.chain(*k.items()))) if isinstance(k, dict) else "",
)
def test_refusals(knobs, words):
    bare = object.__new__(NetSpec)  # as a caller would see it without the type checker of the tests
    bare.__dict__.update(vars(NetSpec()) | knobs)
    with pytest.raises(ValueError, match=words):
        bare.__post_init__()
    with pytest.raises((ValueError, TypeCheckError)):
        NetSpec(**knobs)


def test_shapes_are_checked_in_tests():
    """The annotations are live here: a wrong rank is caught at the door of every function."""
    net = build(NetSpec(**SMALL))
    with pytest.raises(TypeCheckError):
        net(spikes(4, 3, 32, 32))
    with pytest.raises(TypeCheckError):
        phase()(torch.zeros(3, 32, 32))


def test_a_network_without_a_last_layer_of_that_name_is_asked_for_its_classes():
    net = nn.Sequential(build(NetSpec(**SMALL))).eval()
    with pytest.raises(ValueError, match="pass classes="):
        victim(net, phase(steps=4))
    assert victim(net, phase(steps=4), classes=10).scores(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_vmap_over_images_and_over_an_ensemble():
    u = spikes(4, 3, 3, 8, 8)
    nets = [lively(build(NetSpec(**SMALL), seed=s), u).double() for s in (0, 1)]
    u = u.double()
    want = nets[0](u)
    assert (want[0] - want[1]).abs().max() > 1e-3  # the images arrive
    alone = torch.func.vmap(lambda one: nets[0](one[:, None])[0], in_dims=1)(u)
    assert torch.allclose(alone, want, atol=1e-10)
    values, buffers = torch.func.stack_module_state(nets)
    both = torch.func.vmap(lambda p, b: torch.func.functional_call(nets[0], (p, b), (u,)))(values, buffers)
    assert torch.allclose(both, torch.stack([net(u) for net in nets]), atol=1e-10)
