"""Whole parts on a GPU against the same on a CPU, in float64 where no order of sums may flip a spike."""

import copy
from dataclasses import replace

import pytest
import torch
from lively import lively

from sparsetrail import data
from sparsetrail.attacks import ATTACKS, attack
from sparsetrail.auditing import audit
from sparsetrail.core import L2, Linf, Route, Victim
from sparsetrail.defend import DEFENCES
from sparsetrail.recipes.theory import audit as theory_audit
from sparsetrail.snn.encode import direct, phase
from sparsetrail.snn.net import NetSpec, victim
from sparsetrail.trails import trail
from sparsetrail.training import Optimizer, Step, TrainSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
GPU = "cuda"
PIXEL, CODE = Linf(8 / 255, space="pixel"), Linf(6 / 255, space="encoded")
SPEC = NetSpec(width=0.125, channels=1, steps=4)


@pytest.fixture(scope="module")
def pair():
    """One network on both devices, and images that both classify."""
    some = data.take(data.load("fashion-mnist-slice", "test"), 12, seed=0)
    x = data.pixels(some.images)
    net, x = lively(SPEC, phase(steps=4)(x)).double(), x.double()
    with torch.no_grad():
        y = net(phase(steps=4)(x)).argmax(1)
    return net, copy.deepcopy(net).to(GPU), x, y


def both(pair, encode, f):
    """`f(victim, x, y)` on the CPU and on the GPU."""
    here, there, x, y = pair
    return f(victim(here, encode), x, y), f(victim(there, encode), x.to(GPU), y.to(GPU))


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "sapgd", "square", "codebook", "rays", "fab"])
@pytest.mark.parametrize("encode", [phase(steps=4), direct(steps=4)], ids=["phase", "direct"])
def test_attacks_leave_the_same_images(pair, name, encode):
    if name == "codebook" and encode.codebook is None:
        pytest.skip("direct code has no codebook")
    knobs = {"square": {"queries": 40}, "rays": {"queries": 40}, "apgd": {"steps": 10}, "sapgd": {"steps": 10}}
    here, there = both(pair, encode, lambda v, x, y: attack(ATTACKS[name], v, PIXEL, x, y, **knobs.get(name, {})))
    assert here.robust == there.robust and here.forwards == there.forwards and here.backwards == there.backwards


def test_an_l2_ball_and_an_encoded_one(pair):
    for ball in (L2(0.5, space="pixel"), CODE):
        here, there = both(pair, phase(steps=4), lambda v, x, y, b=ball: attack(ATTACKS["pgd"], v, b, x, y))
        assert here.robust == there.robust


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("encode", [phase(steps=4), direct(steps=4)], ids=["phase", "direct"])
def test_trails_hold_the_same_zeros(pair, mode, encode):
    here, there = both(pair, encode, lambda v, x, y: trail(v, x, y, detail="full", mode=mode, per_step=True))
    for a, b in zip(here.rows, there.rows, strict=True):
        assert a.op == b.op and a.entries == b.entries and a.zero == pytest.approx(b.zero, abs=1e-6)
        assert a.norm == pytest.approx(b.norm, rel=1e-8) and a.created == pytest.approx(b.created, abs=1e-6)


def test_the_theorems_of_a_direct_code_are_measured(pair):
    """First switches and all; random directions are drawn on the device, so figures differ within their draws."""
    here, there = both(
        pair, direct(steps=4),
        lambda v, x, y: theory_audit(v, x[:4], y[:4], PIXEL, data="slice", draws=16, shares=(0.25,)),
    )  # fmt: skip
    assert here.support == there.support
    assert there.eps1 == pytest.approx(here.eps1, rel=1e-6)


def test_an_audit_comes_to_the_same_verdict(pair):
    """Audits take float32, where a spike may fall otherwise: what is compared is the verdict, and what is sound."""
    here, there, x, y = pair
    x, found = x.float(), []
    for net, device in ((here, "cpu"), (there, GPU)):
        v = victim(copy.deepcopy(net).float(), direct(steps=4))
        found.append(audit(v, PIXEL, x.to(device), y.to(device), budget="quick")[0])
    assert found[0].verdict == found[1].verdict
    sound = [[(f.id, f.level) for f in a.findings if f.id.startswith("S")] for a in found]
    assert sound[0] == sound[1] and not any(level == "fail" for _, level in sound[0])


@pytest.mark.parametrize("text", ["rga", "bptr", "hart", "pdsg", "triangle:1", "own+reset"])
def test_a_route_keeps_the_scores_to_the_bit_in_float32(pair, text):
    _, there, x, _ = pair
    v = victim(copy.deepcopy(there).float(), phase(steps=4))
    u = x[:8].float().to(GPU)
    own = [v.scores(u) for _ in range(3)]  # plainly, recorded, replayed
    assert all(torch.equal(own[0], z) for z in (*own[1:], v.by(Route(neuron=text)).scores(u)))


@pytest.mark.parametrize("n", [3, 12])
def test_the_first_call_of_a_size_says_what_its_recording_says(pair, n):
    _, there, x, _ = pair
    v = victim(copy.deepcopy(there).float(), direct(steps=4))
    u = x[:n].float().to(GPU)
    first, *others = [v.scores(u) for _ in range(4)]
    assert all(torch.equal(first, z) for z in others)


def test_a_network_of_ones_own_is_judged_in_float32_too(pair):
    """PyTorch's own default is TF32 in convolutions; neither crafting nor judging may use it."""
    _, _, x, _ = pair
    asked = []

    def logits(u):
        asked.append(torch.backends.cudnn.allow_tf32)
        return u[0].flatten(1)[:, :10] * 1.0

    v = Victim(encode=lambda x: x[None], logits=logits, steps=1, classes=10)
    x = x.float().to(GPU)
    attack(ATTACKS["pgd"], v, PIXEL, x, v.scores(x).argmax(1))
    assert asked.pop(0) is True and not any(asked)


@pytest.mark.parametrize("name", sorted(DEFENCES))
def test_defences_take_the_same_steps(name):
    """Losses of three updates, in float64; what a graph can record is recorded."""
    seams = DEFENCES[name]()
    spec = TrainSpec(batch=8, epochs=1)
    some = data.take(data.load("fashion-mnist-slice", "train"), 24, seed=0)
    x, y, encode, losses = data.pixels(some.images), some.labels, direct(steps=4), []
    net = lively(replace(SPEC, arch="vgg5", pool=None), encode(x)).double()
    x = x.double()
    for device in ("cpu", GPU):
        own = copy.deepcopy(net).to(device)
        optimizer = Optimizer(own, spec)
        step = Step(own, optimizer, spec, seams)
        recorded = step.record(encode) if device == GPU else None
        found = []
        for i in range(3):
            part = slice(8 * i, 8 * i + 8)
            generator = torch.Generator().manual_seed(i)
            value = step(encode, x[part].to(device), y[part].to(device), generator)
            found += [loss for loss, _ in recorded.told()] if value is None else [value]
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
