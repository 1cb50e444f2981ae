"""Every pool against its formula, and the share of gradient entries that it can let through."""

import pytest
import torch
from lively import lively
from torch import nn
from torch.nn import functional as F

from sparsetrail import data
from sparsetrail.recipes import measure
from sparsetrail.snn.encode import phase
from sparsetrail.snn.folded import FoldedNeuron
from sparsetrail.snn.net import NetSpec, build, victim
from sparsetrail.snn.neuron import NeuronSpec
from sparsetrail.snn.pools import POOLS, MixedPool2d, StochasticPool2d, SumPool, make_pool, share_of
from sparsetrail.trails import density_cap, trail
from sparsetrail.training import TrainSpec

T = 3
WINDOWS = [(3, 2, 1), (2, 2, 0)]


def made(pool, window=(3, 2, 1), channels=3):
    def fire(soft=False):
        spec = NeuronSpec()
        return FoldedNeuron(spec.soft() if soft else spec, T)

    return make_pool(pool, channels, window, fire).eval()


def spikes(n=2, channels=3, size=16, seed=0, density=0.3):
    return (torch.rand(T * n, channels, size, size, generator=torch.Generator().manual_seed(seed)) < density).float()


def density(module, x, seed=1):
    x = x.clone().requires_grad_()
    y = module(x)
    g = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    (grad,) = torch.autograd.grad(y, x, g)
    return float((grad != 0).double().mean())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pool", [*POOLS[:-1], "mix:0.25"])
def test_every_pool_halves_the_map_and_lets_through_what_it_says(pool, window):
    """On a map of even size a window of stride 2 has four cells to itself: one of them at most is a quarter."""
    torch.manual_seed(0)
    module, x = made(pool, window), spikes()
    assert module(x).shape == (len(x), 3, 8, 8)
    got = density(module, x)
    if pool == "max":
        assert density_cap(module, 16, 16) == 0.25 and 0.05 < got <= 0.25
    else:  # arctan has no zero, an average leaves no cell out, and a mix is as dense as its denser part
        leaves = [m for m in module.modules() if not list(m.children()) and isinstance(m, nn.Conv2d | nn.AvgPool2d)]
        assert got == 1.0 and all(density_cap(m, 16, 16) == 1.0 for m in leaves)
    assert density(made("none"), x) == 1.0


def test_a_stochastic_pool_is_dense_in_eval_and_forces_zeros_in_training():
    module, x = made("stochastic"), spikes()
    assert density_cap(module, 16, 16) == 1.0 and density(module, x) == 1.0
    module.train()
    assert density_cap(module, 16, 16) == 0.25 and 0.05 < density(module, x) <= 0.25


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_mix_is_the_mix_in_values_and_gradients(share, window):
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = made(f"mix:{share}", window)(x)
    most, mean = F.max_pool2d(x, *window), F.avg_pool2d(x, *window)
    assert torch.allclose(y, share * most + (1 - share) * mean, atol=1e-14)
    g = torch.rand_like(y)
    wanted = [torch.autograd.grad(part, x, g, retain_graph=True)[0] for part in (most, mean)]
    assert torch.allclose(torch.autograd.grad(y, x, g)[0], share * wanted[0] + (1 - share) * wanted[1], atol=1e-14)
    assert share_of(f"mix:{share}") == share and share_of("mix") == 0.5


def test_a_learnt_share_starts_at_one_half_and_has_the_gradient_of_its_formula():
    module = MixedPool2d(2, 2, 0, learn=True)
    x = torch.rand(1, 1, 4, 4)
    y = module(x)
    assert float(module.share.detach()) == 0.5
    (grad,) = torch.autograd.grad(y.sum(), module.logit)
    gap = (F.max_pool2d(x, 2, 2) - F.avg_pool2d(x, 2, 2)).sum()
    assert float(grad) == pytest.approx(0.25 * float(gap), rel=1e-5)  # sigmoid'(0) = 1/4


def test_a_stochastic_pool_draws_in_proportion_and_its_mean_is_the_formulas():
    module = StochasticPool2d(2, 2, 0)
    x = torch.tensor([[1.0, 3.0], [0.0, 4.0]]).view(1, 1, 2, 2)
    assert float(module.eval()(x)) == pytest.approx((1 + 9 + 16) / 8)
    module.train().generator = torch.Generator().manual_seed(0)
    drawn = module(x.expand(1, 20_000, 2, 2)).flatten()
    counts = {v: int((drawn == v).sum()) for v in (0.0, 1.0, 3.0, 4.0)}
    assert counts[0.0] == 0 and sum(counts.values()) == 20_000
    for v in (1.0, 3.0, 4.0):
        p = v / 8
        assert abs(counts[v] - 20_000 * p) < 5 * (20_000 * p * (1 - p)) ** 0.5
    module.generator = torch.Generator().manual_seed(0)
    assert torch.equal(module(x.expand(1, 20_000, 2, 2)).flatten(), drawn)
    silent = torch.zeros(1, 1, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(module.eval()(silent).sum(), silent)
    assert torch.equal(grad, torch.full((1, 1, 2, 2), 0.25))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_stochastic_pool_shows_a_max_pools_values_on_spikes(window):
    x = spikes()
    assert torch.equal(made("stochastic", window)(x), F.max_pool2d(x, *window))
    train = made("stochastic", window).train()
    assert torch.equal(train(x), F.max_pool2d(x, *window))  # a spike is drawn wherever there is one


def test_a_sum_pool_keeps_the_count_of_spikes():
    steps, module = 6, None
    neuron = FoldedNeuron(NeuronSpec().soft(), steps)
    module = SumPool(2, 2, 0, neuron)
    x = torch.zeros(steps, 1, 2, 2)
    x[0] = 1.0  # four at once
    x[4, 0, 0, 0] = 1.0
    assert module(x).flatten().tolist() == [1, 1, 1, 1, 1, 0]  # fired one a step, none lost
    sparse = (torch.rand(steps, 2, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    sparse[3:] = 0.0
    assert torch.equal(module(sparse).sum(0), F.avg_pool2d(sparse.sum(0), 2) * 4)
    with_leak = NeuronSpec(kind="lif", threshold=0.5)
    assert with_leak.soft() == NeuronSpec(reset=None)


@pytest.mark.parametrize("pool", [*POOLS, "mix:0.25"])
def test_a_network_of_every_pool_is_the_same_fast_and_plain(pool):
    x = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    encode = phase(steps=T)
    u = encode(x)
    net = lively(NetSpec(width=0.125, steps=T, pool=pool), u).double()
    plain = build(NetSpec(width=0.125, steps=T, pool=pool, exact=True)).double().eval()
    plain.load_state_dict(net.state_dict())
    u = u.double().requires_grad_()
    fast = victim(net, encode).logits(u)
    slow = plain(u)
    assert torch.allclose(fast, slow, atol=1e-10)
    g = torch.rand_like(fast)
    a, b = (torch.autograd.grad(z, u, g)[0] for z in (fast, slow))
    assert torch.allclose(a, b, atol=1e-10, rtol=1e-8) and float(a.abs().sum()) > 0


@pytest.mark.parametrize("pool", POOLS[:-1])
def test_a_vgg_takes_every_pool_that_halves(pool):
    net = build(NetSpec(arch="vgg5", width=0.0625, steps=T, pool=pool)).eval()
    u = torch.rand(T, 2, 3, 32, 32).requires_grad_()
    z = net(u)
    assert z.shape == (2, 10) and net.features[0].after(torch.rand(T, 4, 32, 32)).shape[-2:] == (16, 16)
    (grad,) = torch.autograd.grad(z.sum(), u)
    assert bool(torch.isfinite(grad).all())


def test_the_trail_sees_into_pools_that_fire():
    x = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    encode = phase(steps=T)
    for pool, parts in (("sum", ["pool.sum", "pool.sn"]), ("conv", ["pool.conv", "pool.bn", "pool.sn"]),
                        ("stochastic", ["pool"]), ("none", [])):  # fmt: skip
        v = victim(lively(NetSpec(width=0.125, steps=T, pool=pool), encode(x)), encode)
        rows = [r for r in trail(v, x, torch.tensor([0, 1]), detail="origin").rows if r.op.split(".")[0] == "pool"]
        assert [r.op for r in rows] == parts and all(r.created is not None and r.forced == 0.0 for r in rows)


@pytest.mark.parametrize("pool", ["learned", "stochastic"])
def test_training_draws_by_key_and_learns_the_share(pool, tmp_path):
    seen = data.take(data.load("fashion-mnist-slice", "train"), 64, seed=0)
    spec = NetSpec(channels=1, width=0.125, steps=2, pool=pool)
    nets = []
    for name in ("a", "b"):
        torch.manual_seed(len(nets))  # no global stream is drawn from
        bench = measure.Bench(out=tmp_path / name)
        nets.append(measure.fit(bench, pool, spec, phase(steps=2), seen, TrainSpec(epochs=1, batch=16)).net)
    a, b = (net.state_dict() for net in nets)
    assert all(torch.equal(a[k], b[k]) for k in a)
    if pool == "learned":
        assert float(a["pool.logit"]) != 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("pool", [p for p in POOLS if p != "none"])
def test_gradients_on_a_gpu_are_those_on_a_cpu(pool):
    """PyTorch's own backward of a padded average pool on channels-last maps is wrong there (2.11)."""
    x = (torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255).double()
    u = phase(steps=4)(x)
    net = lively(NetSpec(width=0.25, steps=4, pool=pool), u.float()).double()
    grads = []
    for device in ("cpu", "cuda"):
        leaf = u.detach().to(device).requires_grad_()
        net = net.to(device)
        (g,) = torch.autograd.grad(net(leaf)[:, 0].sum(), leaf)
        grads.append(g.cpu())
    assert grads[0].abs().max() > 0 and (grads[0] - grads[1]).abs().max() <= 1e-8 * grads[0].abs().max()
