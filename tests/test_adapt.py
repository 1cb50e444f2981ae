"""Foreign networks that keep state, as victims: reset around every call, surrogates exchanged on a copy."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sparsetrail.adapt import mean_over_time, reset_all, stateful
from sparsetrail.adapt import spikingjelly as adapted
from sparsetrail.attacks import attack, pgd
from sparsetrail.checks import CHECKS, Case
from sparsetrail.core import Linf, Route
from sparsetrail.snn.encode import direct, phase, poisson
from sparsetrail.trails import trail

X = torch.randint(0, 256, (6, 1, 6, 6), generator=torch.Generator().manual_seed(0)) / 255


class Leaky(nn.Module):
    """A layer that forgets nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.v = nn.Linear(36, 3), 0.0

    def reset(self) -> None:
        self.v = 0.0

    def forward(self, u):
        out = []
        for now in u:
            self.v = self.v + self.fc(now.flatten(1))
            out.append(self.v)
        return torch.stack(out), "state"


def test_state_is_gone_before_and_after_every_call():
    torch.manual_seed(0)
    net = Leaky().eval()
    v = stateful(net, direct(steps=3), classes=3)
    with torch.no_grad():
        first = v.scores(X)
        v.scores(X.flip(0))
        assert torch.equal(v.scores(X), first) and net.v == 0.0
        net.v = 5.0
        assert torch.equal(v.scores(X), first)
    assert torch.allclose(first, net.fc(X.flatten(1)) * 2, atol=1e-5)  # the mean of 1, 2 and 3 times
    y = first.argmax(1)
    run = attack(pgd, v, Linf(0.2, space="pixel"), X, y, step=0.1)
    assert sum(run.robust) < sum(run.clean) and net.v == 0.0
    case = Case(v, Linf(0.2, space="pixel"), X, y)
    assert all(CHECKS[k](case).level == "pass" for k in ("S2", "S3", "S4", "S5", "G3"))
    forgetful = stateful(net, direct(steps=3), classes=3, reset=lambda net: None)
    assert CHECKS["S3"](Case(forgetful, Linf(0.2, space="pixel"), X, y)).level == "fail"


def test_what_does_not_fit_is_refused():
    net = Leaky()
    with pytest.raises(ValueError, match=r"call net\.eval"):
        stateful(net, direct(steps=3), classes=3).scores(X)
    with pytest.raises(ValueError, match="pass steps="):
        stateful(net, lambda x: x[None], classes=3)
    with pytest.raises(ValueError, match="take stateful"):
        adapted(net, direct(steps=3), classes=3)
    assert mean_over_time((torch.ones(4, 2, 3), None)).shape == (2, 3)
    assert mean_over_time(torch.ones(2, 3)).shape == (2, 3)
    steps = [torch.full((2, 3), float(t)) for t in range(3)]
    assert torch.equal(mean_over_time(steps), torch.ones(2, 3))  # of all steps, not the first alone
    assert torch.equal(mean_over_time((steps, None)), torch.ones(2, 3))
    for wrong in ([torch.ones(2, 3), torch.ones(2, 4)], [torch.ones(2)], ["spikes"], []):
        with pytest.raises(ValueError, match=r"expected a list of scores \[n k\], one a step"):
            mean_over_time(wrong)


@pytest.fixture
def theirs(spikingjelly):
    torch.manual_seed(1)
    layer, neuron, functional = spikingjelly.layer, spikingjelly.neuron, spikingjelly.functional
    net = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), neuron.IFNode(surrogate_function=spikingjelly.surrogate.ATan(2.0)),
        layer.Flatten(), layer.Linear(8 * 36, 4), neuron.LIFNode(), layer.Linear(4, 3),
    )  # fmt: skip
    for p in net.parameters():
        p.data *= 3
    functional.set_step_mode(net, "m")
    return net.eval()


def test_a_spikingjelly_network_is_audited_by_several_surrogates(theirs):
    v = adapted(theirs, phase(steps=8), classes=3, name="theirs")
    before = copy.deepcopy(theirs.state_dict())
    with torch.no_grad():
        z = v.scores(X)
        own = v.by(Route(neuron="atan:2"))
        wide = v.by(Route(neuron="triangle:4", encoder="secant"))
        assert torch.equal(own.scores(X), z) and torch.equal(wide.scores(X), z)
    assert "atan(2)" in v.route and wide.route == "BPTT triangle(4)" and "secant" in wide.encoding
    y = z.argmax(1)

    def grad(w):
        u = v.encode(X).requires_grad_()
        return torch.autograd.grad(w.logits(u)[:, 0].sum(), u)[0]

    assert grad(v).abs().sum() > 0 and not torch.allclose(grad(v), grad(wide))
    run = attack(pgd, v, Linf(0.2, space="pixel"), X, y, route=Route(neuron="sigmoid"))
    assert run.route.startswith("BPTT sigmoid") and run.n == 6
    assert all(torch.equal(before[k], t) for k, t in theirs.state_dict().items())
    assert all(getattr(m, "v", 0.0) in (0.0, None) for m in theirs.modules())
    for route in (Route(neuron="hart"), Route(steps=4)):
        with pytest.raises(ValueError, match="theirs"):
            v.by(route)
    reset_all(theirs)


def test_the_trail_of_a_spikingjelly_network_tells_where_its_zeros_come_from(spikingjelly):
    net = nn.Sequential(
        spikingjelly.layer.Conv2d(1, 4, 3, padding=1, bias=False),
        spikingjelly.layer.BatchNorm2d(4),
        spikingjelly.neuron.IFNode(surrogate_function=spikingjelly.surrogate.ATan(), detach_reset=True),
        spikingjelly.layer.MaxPool2d(2, 2),
        spikingjelly.layer.Flatten(),
        spikingjelly.layer.Linear(4 * 16, 10),
    )
    spikingjelly.functional.set_step_mode(net, "m")
    v = adapted(net.eval(), direct(steps=4), classes=10)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = trail(v, x, torch.tensor([0, 1]), detail="full", per_step=True).rows
    assert [r.kind for r in rows] == ["conv", "norm", "neuron", "pool", "flatten", "linear"]
    assert all(r.created is not None and r.zero64 == r.zero and len(r.per_step) == 4 for r in rows)
    pool, sn = rows[3], rows[2]
    assert (pool.zero, pool.created, pool.inherited) == (0.75, 0.75, 0.0) and 0 < sn.passed <= sn.zero <= 0.75
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_neurons_in_single_step_mode_are_told(spikingjelly):
    """SpikingJelly's default takes the steps for examples; a network that loops over them is left alone."""
    layer, neuron = spikingjelly.layer, spikingjelly.neuron
    net = nn.Sequential(layer.Flatten(2), layer.Linear(36, 8), neuron.IFNode(), layer.Linear(8, 3)).eval()
    with pytest.raises(ValueError, match=r"called once for 4 steps; call functional\.set_step_mode"):
        adapted(net, direct(steps=4), classes=3).scores(X)
    with pytest.raises(ValueError, match="called once for 4 steps"):
        stateful(net, direct(steps=4), classes=3).scores(X)
    net = nn.Sequential(layer.Conv2d(1, 2, 3), neuron.IFNode(), layer.Flatten(), layer.Linear(32, 3)).eval()
    with pytest.raises(ValueError, match=r"in single-step mode behind 4 steps: Expected .*set_step_mode\(net, 'm'\)"):
        adapted(net, direct(steps=4), classes=3).scores(X)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(1), nn.Linear(36, 8), neuron.IFNode(), nn.Linear(8, 3))

        def forward(self, u):
            return torch.stack([self.body(part) for part in u])

    v = adapted(Loop().eval(), direct(steps=4), classes=3)
    assert torch.equal(v.scores(X), v.scores(X))
    assert not any(m._forward_pre_hooks for m in v.module.modules())


def test_a_network_of_one_step_at_a_time_is_told_as_such():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    with pytest.raises(ValueError, match=r"\(4, 6, 1, 6, 6\) refused: Expected .*loop over the steps"):
        stateful(net, direct(steps=4), classes=3).scores(X)


def test_steps_that_are_not_the_encoders_are_refused():
    net = Leaky().eval()
    for steps in (4, 0, -1):
        with pytest.raises(ValueError, match="steps: expected"):
            stateful(net, direct(steps=8), classes=3, steps=steps)
    assert stateful(net, direct(steps=3), classes=3, steps=3).steps == 3


def test_a_network_with_state_serves_one_thread_at_a_time():
    net, inside, most = Leaky().eval(), [0], [0]
    v = stateful(net, direct(steps=3), classes=3)

    def count(change):
        inside[0] += change
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)

    net.register_forward_pre_hook(lambda *_: count(1))
    net.register_forward_hook(lambda *_: count(-1))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: v.scores(X), range(8)))
    assert most == [1] and all(torch.equal(z, found[0]) for z in found)


def test_a_seeded_encoder_stays_seeded():
    v = stateful(Leaky().eval(), poisson(steps=3, seed=5), classes=3)
    draws = []
    for key in (1, 1, 2):
        v.reseed(key)
        draws.append(v.encode(X))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_surrogate_without_a_width_has_that_of_our_networks(theirs):
    v = adapted(theirs, phase(steps=8), classes=3)
    assert v.by(Route(neuron="sigmoid")).route == "BPTT sigmoid(4)"
