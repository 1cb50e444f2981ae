"""The same net, the same start: our attacks beside foolbox 3.3.4, torchattacks 3.5.1 and pyautoattack 0.2.0."""

import contextlib
import copy
import importlib.util
import math
import sys
import types
import warnings

import pytest
import torch
from conftest import MISSING
from lively import lively
from torch import nn
from torch.nn import functional as F

from sparsetrail.attacks import apgd, autoattack, bim, fab, fgsm, mifgsm, pgd, sapgd, square
from sparsetrail.attacks.moves import surface
from sparsetrail.core import L2, Linf, Problem, Streams, correct
from sparsetrail.snn.encode import direct
from sparsetrail.snn.net import NetSpec

STUBS = {"git": ("Repo",), "requests": ()}  # foolbox imports them to download models of its zoo
EPS = 0.06


@contextlib.contextmanager
def _importable():
    """Stand-ins for what is imported and never used, only while the import lasts."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, members in STUBS.items():
            if importlib.util.find_spec(name) is None:
                patch.setitem(sys.modules, name, types.SimpleNamespace(**dict.fromkeys(members)))
        yield


def rival(name):
    with _importable():
        return pytest.importorskip(name, reason=f"{name}: {MISSING}")


class Conv(nn.Module):
    """A small ReLU net with seven classes, of random weights."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(12, 3, 3, 3, generator=g) / 3)
        self.b = nn.Parameter(torch.randn(12 * 16, 7, generator=g) / 4)

    def forward(self, x):
        return F.max_pool2d(F.conv2d(x, self.a, padding=1).relu(), 2).flatten(1) @ self.b


class Spiking(nn.Module):
    """A spiking ResNet behind the direct code: pixels to scores."""

    def __init__(self, x):
        super().__init__()
        self.code = direct(steps=3)
        self.net = lively(NetSpec(width=0.125, steps=3), self.code(x))

    def forward(self, x):
        return self.net(self.code(x))


@pytest.fixture(scope="module", params=["conv", "spiking"])
def posed(request):
    """A net in eval mode, images, and the labels it gives them."""
    size, n = (8, 40) if request.param == "conv" else (32, 12)
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    net = (Conv() if request.param == "conv" else Spiking(x)).eval().requires_grad_(False)
    with torch.no_grad():
        return net, x, net(x).argmax(1), {"conv": 1.0, "spiking": 0.02}[request.param]


def recorded(p):
    """What a problem is asked about from now on."""
    asked, see = [], p._see
    p._see = lambda u, m, rows, *shown: (asked.append(u.detach().clone()), see(u, m, rows, *shown))[1]
    return asked


def played(fn, net, x, y, ball, start=None, **knobs):
    """Every point an attack of ours asks about, from a given start, with nothing dropped; and its problem."""
    p = Problem(net, x, y, ball)
    asked = recorded(p)
    if start is not None:
        p.sample = lambda g, **_: start
    fn(p, Streams(0, range(len(y))), **knobs)
    return asked, p


def same(ours, theirs, net, y, share=1.0, tol=1e-6):
    """Points equal up to rounding, of a `share` of the images, and where they are the same images fooled.

    On the spiking net nine of ten will do: a gradient entry of 1e-8 beside a mean of 0.1 has the sign of its rounding,
    and a pixel moved the other way can flip a spike.
    """
    share = min(share, 0.9) if isinstance(net, Spiking) else share
    near = (ours - theirs).flatten(1).abs().amax(1) <= tol
    assert near.float().mean() >= share, f"{int(near.sum())} of {len(y)} points equal"
    with torch.no_grad():
        a, b = correct(net(ours), y), correct(net(theirs), y)
    assert torch.equal(a[near], b[near])
    assert share < 1 or torch.equal(a, b)


def test_fgsm_bim_and_mifgsm_are_those_of_torchattacks(posed):
    """The same points. Their MI-FGSM divides by the mean, ours by the largest entry and then the mean."""
    ta = rival("torchattacks")
    net, x, y, scale = posed
    eps, step = EPS * scale, EPS * scale / 8
    ball = Linf(eps, space="pixel")
    same(played(fgsm, net, x, y, ball)[0][-1], ta.FGSM(net, eps=eps)(x, y), net, y)
    theirs = ta.BIM(net, eps=eps, alpha=step, steps=10)(x, y)
    same(played(bim, net, x, y, ball, step=step)[0][-1], theirs, net, y, tol=2e-6)
    theirs = ta.MIFGSM(net, eps=eps, alpha=step, steps=10, decay=1.0)(x, y)
    same(played(mifgsm, net, x, y, ball, step=step)[0][-1], theirs, net, y, tol=2e-6)


def test_pgd_is_that_of_torchattacks(posed):
    """From the clean image, and from a start drawn as theirs: uniform in the ball."""
    ta = rival("torchattacks")
    net, x, y, scale = posed
    eps = EPS * scale
    knobs = {"steps": 12, "step": eps / 5}
    for random in (False, True):
        torch.manual_seed(3)
        start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1) if random else x
        torch.manual_seed(3)
        theirs = ta.PGD(net, eps=eps, alpha=eps / 5, steps=12, random_start=random)(x, y)
        same(played(pgd, net, x, y, Linf(eps, space="pixel"), start, **knobs)[0][-1], theirs, net, y, tol=2e-6)


def test_fgsm_and_pgd_are_those_of_foolbox(posed):
    """In L-infinity and in L2, where they divide by the norm plus nothing and we by the largest entry first."""
    fb = rival("foolbox")
    net, x, y, scale = posed
    model = fb.PyTorchModel(net, bounds=(0, 1), device="cpu")
    knobs = {"random_start": False, "steps": 12}
    linf = fb.attacks.LinfFastGradientAttack, fb.attacks.LinfProjectedGradientDescentAttack
    l2 = fb.attacks.L2FastGradientAttack, fb.attacks.L2ProjectedGradientDescentAttack
    balls = Linf(EPS * scale, space="pixel"), L2(20 * EPS * scale, space="pixel")
    for ball, (one, many) in zip(balls, (linf, l2), strict=True):
        tol, share = (2e-6, 1.0) if ball.norm == "linf" else (1e-4, 0.9)
        theirs = one(random_start=False).run(model, x, fb.criteria.Misclassification(y), epsilon=ball.eps)
        same(played(fgsm, net, x, y, ball)[0][-1], theirs, net, y, share, tol)
        theirs = many(abs_stepsize=ball.eps / 5, **knobs).run(
            model, x, fb.criteria.Misclassification(y), epsilon=ball.eps
        )
        ours = played(pgd, net, x, y, ball, x, steps=12, step=ball.eps / 5)[0][-1]
        same(ours, theirs, net, y, share, tol)


def _watched(net):
    """The net, and the list of the inputs that were asked of it."""
    asked = []
    return (lambda x: (asked.append(x.detach().clone()), net(x))[1]), asked


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_is_that_of_pyautoattack(posed, norm, loss, monkeypatch):
    """The same iterates from the same start, through all checkpoints.

    One line of theirs is mended: at the first checkpoint they compare the loss after the first step with a row of
    zeros, where the paper (alg. 1, condition 1) has the loss at the start; without it steps may halve at another
    checkpoint. On the spiking net DLR is left out: tied scores there are what their 1e-12 divides by. CE differs by
    rounding, and a spike that flips for it starts another run: nearly all images agree, not all.
    """
    base = rival("pyautoattack.autopgd_base")
    net, x, y, scale = posed
    spiking = isinstance(net, Spiking)
    if spiking and loss == "dlr":
        pytest.skip("spike counts tie, and a tie is where their DLR divides by 1e-12")
    eps = EPS * scale * (1 if norm == "Linf" else 20)
    ball = (Linf if norm == "Linf" else L2)(eps, space="pixel")
    start = surface(Problem(net, x, y, ball), Streams(5, range(len(y))))

    class Mended(base.APGDAttack):
        def check_oscillation(self, x, j, k, y5, k3=0.75):
            values = torch.cat([at_start[None], x[: j + 1]])
            return ((values[1:] > values[:-1])[-k:].sum(0) <= k * k3).float()

    model, asked = _watched(net)
    reference = Mended(model, n_iter=40, norm=norm, eps=eps, loss=loss, device="cpu")
    reference.init_hyperparam(x)
    criterion = nn.CrossEntropyLoss(reduction="none") if loss == "ce" else reference.dlr_loss
    at_start = criterion(net(start), y)
    _, right, _, _ = reference.attack_single_run(x, y, x_init=start)
    monkeypatch.setattr(sys.modules["sparsetrail.attacks.apgd"], "surface", lambda q, g: start)
    ours, p = played(apgd, net, x, y, ball, steps=40, loss=loss)
    assert len(ours) == len(asked) == 41
    apart = torch.stack([(a - b).flatten(1).abs().amax(1) for a, b in zip(ours, asked, strict=True)])
    same_path = apart.amax(0) <= (2e-6 if norm == "Linf" else 1e-4)
    print(f"\n{type(net).__name__}, {norm}, {loss}: {int(same_path.sum())} of {len(y)} images on the same path, "
          f"{int((p.fooled == ~right).sum())} the same outcome, {int(p.fooled.sum())} fooled")  # fmt: skip
    assert torch.equal(p.fooled[same_path], ~right[same_path])
    assert same_path.float().mean() >= (0.7 if spiking else 0.95)
    assert (p.fooled != ~right).float().mean() <= 0.1
    assert same_path.all() or spiking or norm == "L2"


def stable(net, x, y, start, eps, steps):
    """SA-PGD as its authors' code has it, written out: every point asked about."""
    u, asked, m, v = start, [], None, None
    length, window, seen = eps, max(int(0.22 * steps), 1), 0
    for _ in range(steps):
        asked.append(u)
        u = u.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(u), y, reduction="sum"), u)
        d, d2 = (t / t.abs().mean((1, 2, 3), keepdim=True) for t in (g, g**2))
        m, v = (d, d2) if m is None else (0.5 * m + d, 0.8 * v + d2)
        u = u.detach() + (length * m / (v**0.5 + 1e-12)).clamp(-length, length)
        u = (x + (u - x).clamp(-eps, eps)).clamp(0, 1)
        seen += 1
        if seen == window:
            length, seen = length / 2, 0
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return [*asked, u]


def test_sapgd_is_the_published_rule(posed, monkeypatch):
    """The same points from the same start, in float64, where no spike flips by rounding."""
    net, x, y, scale = posed
    net, x, y = copy.deepcopy(net).double(), x[:8].double(), y[:8]
    ball = Linf(EPS * scale, space="pixel")
    start = surface(Problem(net, x, y, ball), Streams(5, range(len(y))))
    monkeypatch.setattr(sys.modules["sparsetrail.attacks.sapgd"], "surface", lambda q, g: start)
    ours, _ = played(sapgd, net, x, y, ball, steps=20)
    theirs = stable(net, x, y, start, ball.eps, 20)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_targeted_apgd_fools_what_that_of_pyautoattack_fools(posed):
    """Nine targets (six here) with other draws for the starts: the same images, but for one."""
    base = rival("pyautoattack.autopgd_base")
    net, x, y, scale = posed
    x, y = (x[:8], y[:8]) if isinstance(net, Spiking) else (x[:24], y[:24])
    eps = EPS * scale / 4 / (4 if isinstance(net, Spiking) else 1)
    theirs = base.APGDAttack_targeted(net, n_iter=30, norm="Linf", eps=eps, n_target_classes=6, device="cpu")
    with torch.no_grad():
        right = correct(net(theirs.perturb(x, y)), y)
    p = Problem(net, x, y, Linf(eps, space="pixel"), drop=True)
    apgd(p, Streams(0, range(len(y))), steps=30, loss="targeted", targets=6)
    print(f"\n{type(net).__name__}: ours {int(p.fooled.sum())}, theirs {int((~right).sum())} of {len(y)} fooled")
    assert (p.fooled != ~right).sum() <= 1 and p.fooled.any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_is_that_of_pyautoattack(posed, norm):
    """Every point asked about, in and out of the ball; on the spiking net up to where a last bit flips a spike."""
    module = rival("pyautoattack.fab_pt")
    net, x, y, scale = posed
    spiking = isinstance(net, Spiking)
    ball = (
        Linf(EPS * scale / 4, space="pixel")
        if norm == "linf"
        else L2(EPS * scale * (16 if spiking else 2), space="pixel")
    )
    model, theirs = _watched(net)
    fab_pt = module.FABAttack_PT(
        model, norm="Linf" if norm == "linf" else "L2", n_iter=15, eps=ball.eps, targeted=True, n_target_classes=1,
        device="cpu",
    )  # fmt: skip
    found = fab_pt.perturb(x, y)
    p = Problem(net, x, y, ball)
    asked = recorded(p)
    fab(p, Streams(0, range(len(y))), steps=15, targets=1)
    with torch.no_grad():
        right = correct(net(found), y) | ~ball.contains(found, x)
    assert len(asked) == 31 and p.fooled.any() and not p.fooled.all()  # the last of ours is one more, on the surface
    assert (~p.fooled & ~right).sum() <= (1 if spiking else 0)
    theirs = theirs[-1 - 30 : -1]  # before them the labels, the ranks; after them the verdict
    for ours, other in zip(asked[:30], theirs, strict=True):
        near = (ours - other).flatten(1).abs().amax(1) <= 1e-5
        assert near.float().mean() >= (0.8 if spiking else 1.0), float(near.float().mean())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_is_that_of_pyautoattack(posed, norm, monkeypatch):
    """Given the same draws, image by image: every query the same, so also the number until an image falls.

    Their draws are replaced by ours: they draw one position for all images of a batch, from 0 to below h - s, which
    leaves out the last row and column.
    """
    module = rival("pyautoattack.square")
    net, x, y, scale = posed
    queries, linf = 60, norm == "linf"
    ball = (Linf if linf else L2)(EPS * scale / 3 if linf else EPS * scale * 20, space="pixel")
    fallen = 0
    for i in range(3 if isinstance(net, Spiking) else 16):
        draws = []
        real = Problem.noise

        def noise(p, g, shape=None, real=real, draws=draws):
            draws.append(real(p, g, shape))
            return draws[-1]

        monkeypatch.setattr(Problem, "noise", noise)
        p = Problem(net, x[i : i + 1], y[i : i + 1], ball, drop=True)
        asked = recorded(p)
        square(p, Streams(0, [i]), queries=queries)
        monkeypatch.setattr(Problem, "noise", real)
        model, theirs = _watched(net)
        if linf:
            signs = [draws[0], *(d[:, 2:] for d in draws[1:])]
            places = [d[:, k] for d in draws[1:] for k in (0, 1)]
            turned = []
        else:
            tiles, whole = draws[0], x.shape[-1] // max(x.shape[-1] // 5, 1)
            laid = [  # theirs lays further tiles outside the image
                tiles[:, :, r, c] if max(r, c) < tiles.shape[-1] else tiles[:, :, 0, 0]
                for r in range(whole)
                for c in range(whole)
            ]
            signs = [t[:, 1:] for t in laid] + [d[:, 5:] for d in draws[1:]]
            turned = [t[:, 0] for t in laid] + [d[:, 4] for d in draws[1:]]
            places = [d[:, k] for d in draws[1:] for k in range(4)]
        signs, places, turned = iter(signs), iter(places), iter(turned)

        class Fed(module.SquareAttack):
            def random_choice(self, shape, signs=signs):
                return next(signs).sign().view(shape)

            def random_int(self, low=0, high=1, shape=(1,), places=places):
                return ((next(places) + 1) / 2 * (high + 1)).long().clamp(max=high)

        fed = Fed(model, norm="Linf" if linf else "L2", n_queries=queries, eps=ball.eps, device="cpu")
        fed.init_hyperparam(x[i : i + 1])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, turned=turned: (next(turned) + 1) / 2)
            fed.attack_single_run(x[i : i + 1], y[i : i + 1])
        assert len(theirs) == len(asked) and bool(p.fooled) == (len(asked) < queries + 1 or bool(p.best_margin > 0))
        apart = torch.stack([(a - b).abs().amax() for a, b in zip(asked, theirs, strict=True)]).amax()
        assert apart <= (2e-6 if linf else 2e-5), apart
        fallen += int(p.fooled)
    assert fallen > 0
    assert math.isfinite(float(p.best_margin))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_leaves_what_that_of_pyautoattack_leaves(posed, norm):
    """The same four attacks, 15 steps and 60 queries each, with other draws: the same images stand, but for one."""
    module = rival("pyautoattack")
    net, x, y, scale = posed
    spiking, linf = isinstance(net, Spiking), norm == "linf"
    x, y, targets = (x[:8], y[:8], 3) if spiking else (x, y, 6)
    ball = (Linf if linf else L2)(EPS * scale / (4 if spiking else 3) * (1 if linf else 15), space="pixel")
    aa = module.AutoAttack(
        net, attacks=["apgd-ce", "apgd-t", "fab-t", "square"], version="custom", norm="Linf" if linf else "L2",
        eps=ball.eps, device="cpu", seed=0,
    )  # fmt: skip
    aa.apgd.n_iter = aa.apgd_targeted.n_iter = aa.fab.n_iter = 15
    aa.apgd.n_restarts = aa.fab.n_restarts = 1
    aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = targets
    aa.square.n_queries = 60
    found = aa.run_standard_evaluation(x, y, batch_size=len(y))
    with torch.no_grad():
        right = correct(net(found[0] if isinstance(found, tuple) else found), y)
    p = Problem(net, x, y, ball, drop=True)
    autoattack(p, Streams(0, range(len(y))), steps=15, targets=targets, queries=60)
    print(
        f"\n{type(net).__name__}, {norm}: ours {int(p.fooled.sum())}, theirs {int((~right).sum())} of {len(y)} fooled"
    )
    assert (p.fooled == right).sum() <= 1 and p.fooled.any() and not p.fooled.all()
