"""Every attack in the table against victims whose best point is known, in both spaces; and the paper's own recipe."""

import contextlib
import copy
import dataclasses
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from lively import lively

from sparsetrail.attacks import ATTACKS, attack, authors, check_settings, fgsm, noise, pgd, settings
from sparsetrail.core import L0, Linf, Problem, Route, Streams, Victim, margin
from sparsetrail.snn.encode import latency, phase, poisson
from sparsetrail.snn.net import NetSpec, build, victim

N = 24
FLIPS = ("sda", "sparse_rs")  # attacks of an L0 ball
QUICK = {  # settings under which an attack is through in a moment
    "apgd": {"steps": 20},
    "sapgd": {"steps": 20},
    "square": {"queries": 60},
    "spsa": {"steps": 4, "samples": 8},
    "sda": {"steps": 3},
    "sparse_rs": {"queries": 30},
    "rays": {"queries": 60},
    "fab": {"steps": 20},
    "autoattack": {"steps": 5, "queries": 20},
}
WITHOUT_DRAWS = (
    "fgsm",
    "bim",
    "mifgsm",
    "codebook",
    "sda",
    "rays",
    "fab",
)  # from their first start, wherever a gradient is left
LOSS = [name for name, fn in ATTACKS.items() if "loss" in settings(fn)]


def strike(name, v, threat, x, y, **more):
    return attack(ATTACKS[name], v, threat, x, y, **(QUICK.get(name, {}) | more))


def ball_for(name, space, eps, flips):
    """The ball that an attack is made for: flips for sda and sparse_rs, L-infinity for the others."""
    return L0(flips, space=space) if name in FLIPS else Linf(eps, space=space)


def refused(name, space):
    """Codebook sees the pixels behind the code and refuses the code itself."""
    return pytest.raises(ValueError, match="in pixel space") if (name, space) == ("codebook", "encoded") else None


def linear_victim(space, seed=0):
    """Scores linear in the attacked tensor; `encode` repeats the image twice so that both spaces are linear."""
    w = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))

    def encode(x):
        return x.unsqueeze(0).repeat(2, 1, 1, 1, 1)

    return Victim(encode=encode, logits=lambda u: u.movedim(1, 0).flatten(1) @ w, steps=2, classes=3, name="linear"), w


def pictures(seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(N, 1, 2, 2, generator=g) * 0.4 + 0.3  # far from the box: the optimum is a corner of the ball


def best_margin(v, w, space, x, y, eps):
    """Closed form: for every wrong class, the margin plus eps times the L1 norm of the weight difference."""
    rows = w if space == "encoded" else w[:4] + w[4:]
    z = v.scores(x)
    out = torch.full((len(y),), -math.inf)
    for k in range(3):
        gap = z[:, k] - z.gather(1, y[:, None]).squeeze(1) + eps * (rows[:, k][:, None] - rows[:, y]).abs().sum(0)
        out = torch.maximum(out, torch.where(y == k, -math.inf, gap))
    return out


def coded_victim(seed=0):
    """Scores linear in a two-step code of the pixels that is no linear function of them."""
    v, w = linear_victim("pixel", seed)
    encoder = latency(steps=2)
    return dataclasses.replace(v, encode=encoder, codebook=encoder.codebook), w


def binary(x):
    """Black and white, the first pixel always white: no image is all black, where every linear score is 0."""
    x = (x > 0.5).to(x.dtype)
    x[..., 0, 0] = 1.0
    return x


def all_images(v, x, y, level0, offsets):
    """The best margin over all images of grey levels whose offsets are given, by looking at every one."""
    choices = torch.tensor(list(itertools.product(offsets, repeat=4))).view(-1, 1, 1, 2, 2)
    points = (level0 + choices).clamp(0, 255) / 255
    return torch.stack([margin(v.scores(p), y) for p in points]).amax(0)


@pytest.mark.parametrize("space", ["pixel", "encoded"])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_never_better_than_the_closed_form(name, space):
    """Not better than the best point there is; for codebook and flips that point is found by looking at all."""
    x = pictures()
    if name == "codebook":
        v, _ = coded_victim()
        level = (x * 255).round()
        x, y = level / 255, v.scores(level / 255).argmax(1)
        with refused(name, space) or contextlib.nullcontext():
            run = strike(name, v, Linf(3 / 255, space=space), x, y, keep=True)
            optimum = all_images(v, x, y, level, (-3, -1, 1, 3))
            assert (margin(v.scores(run.adversarial), y) <= optimum + 1e-6).all()
        return
    v, w = linear_victim(space)
    x = binary(x) if name in FLIPS else x
    y = v.scores(x).argmax(1)
    run = strike(name, v, ball_for(name, space, 0.05, 2), x, y, keep=True)
    f = v.scores if space == "pixel" else v.logits
    if name in FLIPS:
        u0 = (x if space == "pixel" else v.encode(x)).movedim(threat_axis(space), 0).flatten(1)
        flips = [c for r in (0, 1, 2) for c in itertools.combinations(range(u0.shape[1]), r)]
        rows = w if space == "encoded" else w[:4] + w[4:]
        tried = [torch.where(torch.isin(torch.arange(u0.shape[1]), torch.tensor(c)), 1 - u0, u0) for c in flips]
        best = torch.stack([margin(u @ rows, y) for u in tried]).amax(0)
    else:
        best = best_margin(v, w, space, x, y, 0.05)
    assert (margin(f(run.adversarial), y) <= best + 1e-5).all()
    assert all(run.clean)


def threat_axis(space):
    return 0 if space == "pixel" else 1


@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_gradient_attacks_reach_the_closed_form_on_two_classes(space):
    v, w = linear_victim(space)
    two = Victim(encode=v.encode, logits=lambda u: v.logits(u)[:, :2], steps=2, classes=2)
    x = pictures()
    y = two.scores(x).argmax(1)
    rows = w[:, :2] if space == "encoded" else (w[:4] + w[4:])[:, :2]
    optimum = margin(two.scores(x), y) + 0.05 * (rows[:, 0] - rows[:, 1]).abs().sum()
    assert (optimum > 0).any() and (optimum < 0).any()
    for fn, knobs in ((fgsm, {}), (pgd, {"steps": 20, "step": 0.02})):
        run = attack(fn, two, Linf(0.05, space=space), x, y, keep=True, drop=False, **knobs)
        f = two.scores if space == "pixel" else two.logits
        assert torch.allclose(margin(f(run.adversarial), y), optimum, atol=1e-5)
        assert torch.equal(torch.tensor(run.robust), optimum < 0)


@pytest.mark.parametrize("space", ["pixel", "encoded"])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_radius_zero_changes_nothing(name, space):
    v, _ = coded_victim() if name == "codebook" else linear_victim(space)
    x = binary(pictures()) if name in FLIPS else pictures()
    y = v.scores(x).argmax(1)
    with refused(name, space) or contextlib.nullcontext():
        run = strike(name, v, ball_for(name, space, 0.0, 0), x, y, keep=True)
        assert run.robust == run.clean
        assert torch.equal(run.adversarial, x if space == "pixel" else v.encode(x))


@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_exact_logits_judge_whatever_the_attack_was_shown(space):
    v, _ = linear_victim(space)
    x = pictures()
    y = v.scores(x).argmax(1)
    y[::2] = (y[::2] + 1) % 3
    run = attack(pgd, dataclasses.replace(v, logits=lambda u: -v.logits(u), exact=v.logits), Linf(0.05, space=space),
                 x, y, keep=True)  # fmt: skip
    f = v.scores if space == "pixel" else v.logits
    assert list(run.clean) == [bool(i % 2) for i in range(N)]
    assert list(run.robust) == [
        c and bool(m <= 0) for c, m in zip(run.clean, margin(f(run.adversarial), y), strict=True)
    ]


@pytest.fixture(scope="module")
def snn():
    x = torch.randint(0, 256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    net = lively(NetSpec(width=0.125, steps=4), phase(steps=4)(x))
    v = dataclasses.replace(victim(net, phase(steps=4), name="snn"), codebook=phase(steps=4).codebook)
    with torch.no_grad():
        y = v.scores(x).argmax(1)
    return net, v, x, y


@pytest.mark.parametrize("space", ["pixel", "encoded"])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_the_same_result_for_any_batch_size_and_seeded(snn, name, space):
    _, v, x, y = snn
    if name in FLIPS and space == "pixel":
        x = binary(x)
        y = v.scores(x).argmax(1)
    threat = ball_for(name, space, 4 / 255, 6)
    with refused(name, space) or contextlib.nullcontext():
        a = strike(name, v, threat, x, y, batch=10, seed=3, keep=True)
        b = strike(name, v, threat, x, y, batch=3, seed=3, keep=True)
        assert a.robust == b.robust and a.clean == b.clean and (a.forwards > 0)
        if name not in WITHOUT_DRAWS:
            other = strike(name, v, threat, x, y, seed=4, keep=True)
            assert not torch.equal(other.adversarial, a.adversarial)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_the_same_point_for_any_batch_order_and_dropping(name):
    """Every point to the bit: a victim without a matrix product, where no batch rounds otherwise; restarts at once."""
    code = latency(steps=2)
    w = torch.randint(-8, 9, (2, 4, 9), generator=torch.Generator().manual_seed(5)) / 8

    def logits(u):  # in float64, whose rounding float32 does not see
        return (u.double().flatten(2)[:, :, None] * w[:, None]).sum((0, 3)).float()

    v = Victim(encode=code if name == "codebook" else lambda x: torch.stack([x, x]), logits=logits, steps=2, classes=4,
               codebook=code.codebook if name == "codebook" else None)  # fmt: skip
    level = torch.randint(0, 256, (N, 1, 3, 3), generator=torch.Generator().manual_seed(6))
    x = binary(level / 256) if name in FLIPS else level / 255
    y = v.scores(x).argmax(1)
    threat = ball_for(name, "pixel", 8 / 255, 1)
    more = {"keep": True, "seed": 2} | ({"restarts": 3} if "restarts" in settings(ATTACKS[name]) else {})
    whole = strike(name, v, threat, x, y, **more)
    assert 0 < sum(whole.robust) < sum(whole.clean)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(7))
    mixed = strike(name, v, threat, x[order], y[order], batch=5, indices=order.tolist(), **more)
    assert torch.equal(mixed.adversarial, whole.adversarial[order])
    assert mixed.robust == tuple(torch.tensor(whole.robust)[order].tolist())
    assert strike(name, v, threat, x, y, drop=False, **more).robust == whole.robust


@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_adversarials_are_valid_and_judged_afresh(snn, space):
    net, v, x, y = snn
    threat = Linf(8 / 255, space=space)
    run = attack(pgd, v, threat, x, y, keep=True)
    u0 = x if space == "pixel" else v.encode(x)
    assert threat.contains(run.adversarial, u0, 0 if space == "pixel" else 1).all()
    with torch.no_grad():
        z = (v.scores if space == "pixel" else v.logits)(run.adversarial)
    assert [bool(m <= 0) for m in margin(z, y)] == list(run.robust)
    assert run.threat is threat and run.mode == "eval"
    weak = attack(noise, v, Linf(1 / 255, space=space), x, y, draws=1)
    assert run.accuracy.k < weak.accuracy.k  # the radius matters, so the flags are not constant
    assert ("identity" in run.route) == (space == "pixel")
    before = copy.deepcopy(net.state_dict())
    attack(pgd, v, threat, x, y)
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items()) and not net.training


def test_settings_are_read_and_recorded(snn):
    _, v, x, y = snn
    threat = Linf(4 / 255, space="pixel")
    calls = {}
    for fn, knobs in ((pgd, {}), (pgd, {"restarts": 3}), (pgd, {"steps": 2}), (noise, {}), (noise, {"draws": 3})):
        run = attack(fn, v, threat, x, y, drop=False, **knobs)
        assert knobs.items() <= run.knobs.items() and set(run.knobs) == set(settings(fn))
        calls[fn.__name__, *knobs] = run.backwards or run.forwards
    assert calls["pgd", "restarts"] == 3 * calls["pgd",] and calls["pgd", "steps"] * 7 == 2 * calls["pgd",]
    assert calls["noise",] - calls["noise", "draws"] == 7 * 10
    corner = attack(noise, v, threat, x, y, draws=1, corners=True, keep=True, drop=False)
    step = (corner.adversarial - x).abs()
    at_edge = (corner.adversarial == 0) | (corner.adversarial == 1)
    moved = step > 0
    assert moved.any() and torch.allclose(step[moved & ~at_edge], torch.tensor(4 / 255))
    with pytest.raises(ValueError, match="with settings draws, corners"):
        attack(noise, v, threat, x, y, drws=3)


def test_scores_that_are_not_finite_are_neither_right_nor_robust(snn):
    _, v, x, y = snn
    broken = Victim(encode=v.encode, logits=lambda u: v.logits(u) * math.nan, steps=4, classes=10)
    run = attack(pgd, broken, Linf(8 / 255, space="pixel"), x, y)
    assert not any(run.clean) and not any(run.robust)


def test_broken_gradients_are_counted(snn):
    _, v, x, y = snn

    def logits(u):
        z = v.logits(u)
        return z + (u.sum() * 0).sqrt() * 0  # the square root at 0 has an infinite slope: its product with 0 is NaN

    run = attack(
        fgsm, Victim(encode=v.encode, logits=logits, steps=4, classes=10), Linf(8 / 255, space="encoded"), x, y
    )
    assert run.nonfinite == sum(run.clean) > 0 and run.robust == run.clean


def test_a_random_victim_is_not_stopped_at_a_lucky_draw():
    g = torch.Generator().manual_seed(0)
    v = Victim(encode=lambda x: x[None], steps=1, classes=2, random=True,
               logits=lambda u: torch.randn(u.shape[1], 2, generator=g))  # fmt: skip
    x, y = torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.long)
    run = attack(noise, v, Linf(0.1, space="pixel"), x, y, draws=20)
    assert "majority of 10 fresh draws" in run.note
    assert run.eot == 10 and run.forwards == 80 + sum(run.clean) * (20 * 10 + 10)
    assert attack(noise, v, Linf(0.1, space="pixel"), x, y, draws=20, eot=1).eot == 1


def test_only_images_that_were_right_are_attacked(snn):
    _, v, x, y = snn
    wrong = y.clone()
    wrong[::2] = (wrong[::2] + 1) % 10
    run = attack(fgsm, v, Linf(0.0, space="pixel"), x, wrong, keep=True)
    assert list(run.clean) == [bool(i % 2) for i in range(10)] and run.robust == run.clean
    assert run.backwards == 5


def test_a_tie_is_not_a_success():
    tie = Victim(
        encode=lambda x: x[None],
        logits=lambda u: torch.stack([u[0].flatten(1).sum(1), torch.full((u.shape[1],), 0.8)], 1),
        steps=1,
        classes=2,
    )
    x = torch.full((1, 1, 1, 2), 0.6)  # score 1.2 against 0.8; at 0.4 (grey level 102) each it is a tie

    def to_the_tie(p, g):
        p.loss(torch.full_like(p.u0, 0.4))

    run = attack(to_the_tie, tie, Linf(0.2, space="pixel"), x, torch.tensor([0]))
    assert run.robust == (True,) and run.ties == 1


def test_an_attack_that_leaves_the_ball_is_refused(snn):
    _, v, x, y = snn

    def cheat(p, g):
        p.loss(p.u0 + 0.5)

    with pytest.raises(ValueError, match="cheat left the perturbation set"):
        attack(cheat, v, Linf(1 / 255, space="pixel"), x, y)


def test_bad_input_is_refused(snn):
    _, v, x, y = snn
    ball = Linf(8 / 255, space="pixel")
    for images, labels, match in (
        ((x * 255).to(torch.uint8), y, "divide uint8"),
        (x.half(), y, "float32"),
        (x * 2, y, "0..1"),
        (x * math.nan, y, "0..1"),
        (x[:3], y, "labels"),
        (x, y + 10, "labels: expected 0..9"),
        (x[:0], y[:0], "n > 0"),
    ):
        with pytest.raises(ValueError, match=match):
            attack(pgd, v, ball, images, labels)
    net = build(NetSpec(width=0.125, steps=4)).train()
    with pytest.raises(ValueError, match="eval mode"):
        attack(pgd, victim(net, phase(steps=4)), ball, x, y)
    with pytest.raises(ValueError, match="no gradient reaches"):
        attack(pgd, victim(snn[0], phase(steps=4, backward="none")), ball, x, y)


def test_the_published_loop_as_it_was_coded(snn):
    """An independent transcription of the described loop: train-mode crafting, 6/255 on spikes, BatchNorm drifting."""
    net, _, x, y = snn
    net, seen = copy.deepcopy(net), []
    net.register_forward_pre_hook(lambda m, given: seen.append((m.training, given[0].detach().clone())))
    before = copy.deepcopy(net.state_dict())
    one, seven = authors(net, phase(steps=4), x, y, batch=4, seed=5)
    assert (one.forwards, seven.forwards) == (30, 90) and 0 < one.seconds < seven.seconds  # each with the clean images
    ours = seen[3:]  # behind the clean images
    seen.clear()
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items()) and not net.training

    twin = copy.deepcopy(net)
    ce, eps, g = torch.nn.CrossEntropyLoss(), 6 / 255, torch.Generator().manual_seed(5)
    flags = {1: [], 7: []}
    for i in range(0, 10, 4):
        spikes, labels = phase(steps=4)(x[i : i + 4]), y[i : i + 4]
        twin.train()
        leaf = spikes.clone().requires_grad_()
        ce(twin(leaf), labels).backward()
        single = torch.clamp(spikes + eps * leaf.grad.sign(), 0, 1)
        now = torch.clamp(spikes + (torch.rand(spikes.shape, generator=g) * 2 - 1) * eps, 0, 1)
        for _ in range(7):
            leaf = now.clone().requires_grad_()
            ce(twin(leaf), labels).backward()
            moved = now + 0.01 * leaf.grad.sign()
            now = torch.clamp(spikes + torch.clamp(moved - spikes, -eps, eps), 0, 1).detach()
        twin.eval()
        with torch.no_grad():
            flags[1] += (twin(single).argmax(1) == labels).tolist()
            flags[7] += (twin(now).argmax(1) == labels).tolist()
    assert [m for m, _ in ours] == [m for m, _ in seen] == [*[True] * 8, False, False] * 3
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for (_, a), (_, b) in zip(ours, seen, strict=True))
    assert list(one.robust) == flags[1] and list(seven.robust) == flags[7]
    assert 0 < sum(flags[1]) < 10 and 0 < sum(flags[7]) < 10
    assert f"{sum(flags[1])} of 10" in one.note and f"{sum(flags[7])} of 10" in seven.note
    assert one.mode == seven.mode == "train" and one.threat == Linf(6 / 255, space="encoded")
    assert not torch.equal(twin.bn1.running_mean, net.bn1.running_mean)  # the contamination is real


def test_encoded_steps_are_cut_by_the_box():
    """A 0-spike can only rise and a 1-spike only fall: half of the sign directions are lost."""
    ball, u0 = Linf(6 / 255, space="encoded"), torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1)
    down_up = ball.project(u0 + torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1), u0)
    assert torch.equal(down_up, u0)


@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_restarts_at_once_find_what_restarts_in_turn_find(snn, space, monkeypatch):
    """The same starting points, so the same images fall; later restarts share a batch once few images stand."""
    _, v, x, y = snn
    x = x * 0.9995  # off the grid of grey levels, where half a level is not nothing
    eps = 0.6 / 255 if space == "pixel" else 0.0005
    played = []
    real = Problem.sample

    def sample(p, g, **more):
        played.append((p.whose is not None, len(p.y)))
        return real(p, g, **more)

    monkeypatch.setattr(Problem, "sample", sample)
    knobs = {"steps": 2, "step": eps / 2, "restarts": 6, "seed": 3, "keep": True}
    together = attack(pgd, v, Linf(eps, space=space), x, y, **knobs)
    assert any(at_once for at_once, _ in played) and max(n for _, n in played) <= sum(together.clean)
    assert (sum(together.robust) > 0) == (space == "encoded") and sum(together.robust) < sum(together.clean)
    monkeypatch.setattr(Problem, "restarts", lambda p, most: contextlib.nullcontext((p, 1)))
    in_turn = attack(pgd, v, Linf(eps, space=space), x, y, **knobs)
    assert together.robust == in_turn.robust and together.clean == in_turn.clean
    standing = [i for i, r in enumerate(together.robust) if r]
    axis = 0 if space == "pixel" else 1
    a, b = (r.adversarial.movedim(axis, 0)[standing] for r in (together, in_turn))
    assert torch.allclose(a, b, atol=1e-6)


def test_copies_of_a_problem_keep_its_ledger():
    """Two images of three fall at their first step; the third is tried in three copies at once."""
    w = torch.tensor([1.0, 1.0, 0.0])
    u0, y = torch.zeros(3, 1, 1, 1), torch.zeros(3, dtype=torch.long)
    f = lambda u: torch.stack([torch.zeros(len(u)), u.flatten() - 0.5], 1)  # noqa: E731
    p = Problem(f, u0, y, Linf(1.0, space="pixel"), drop=True)
    p.loss(w.view(3, 1, 1, 1))
    assert p.fooled.tolist() == [True, True, False]
    with p.restarts(7) as (q, played):
        assert played == 3 and q.whose.tolist() == [2, 2, 2]
        starts = q.sample(Streams(0, range(3)))
        q.loss(torch.tensor([0.1, 0.4, 0.3]).view(3, 1, 1, 1))
    again = Streams(0, range(3))
    assert torch.equal(starts.flatten(), torch.cat([again.uniform(u0, 0)[2] for _ in range(3)]).clamp(0, 1).flatten())
    assert p.best.flatten().tolist() == pytest.approx([1, 1, 0.4]) and p.forwards == 6 and not p.fooled[2]
    with p.restarts(2) as (q, played):
        q.loss(torch.tensor([0.9, 0.2]).view(2, 1, 1, 1))
        assert q.grad(q.u0).count_nonzero() == 0 and q.backwards == 0  # its other copy is left out too
    assert p.fooled.all() and p.best[2] == pytest.approx(0.9)
    with p.restarts(5) as (q, played):
        assert q is p and played == 1


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_scores_of_any_float_type_are_attacked_and_an_odd_code_is_refused(kind):
    """As a network inside of float64 or bf16 gives them; images dropped on the way must not trip over it."""
    w = torch.randn(27, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.rand(12, 3, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3
    plain = Victim(encode=lambda x: x[None], logits=lambda u: u[0].flatten(1) @ w.float(), steps=1, classes=4)
    typed = dataclasses.replace(plain, logits=lambda u: u[0].flatten(1).to(kind) @ w.to(kind))
    y = typed.scores(x).argmax(1)
    for name in ("fgsm", "bim", "mifgsm", "pgd", "apgd", "sapgd", "spsa", "square"):
        for space in ("pixel", "encoded"):
            few = {"queries": 20} if name == "square" else {} if name == "fgsm" else {"steps": 4}
            runs = [attack(ATTACKS[name], typed, Linf(0.05, space=space), x, y, drop=d, **few) for d in (True, False)]
            assert runs[0].robust == runs[1].robust and all(runs[0].clean)
            if kind == torch.float64 and name == "pgd":
                assert runs[0].robust == attack(pgd, plain, Linf(0.05, space=space), x, y, **few).robust
    odd = dataclasses.replace(
        plain, encode=lambda x: x[None].to(torch.bfloat16), logits=lambda u: plain.logits(u.float())
    )
    with pytest.raises(ValueError, match=r"expected a code of float32 .* got torch\.bfloat16"):
        attack(pgd, odd, Linf(0.05, space="encoded"), x, y)
    centred = dataclasses.replace(plain, encode=lambda x: (x[None] - 0.5) / 0.25)
    with pytest.raises(ValueError, match=r"expected a clean code in 0\.\.1 .* box=\(lo, hi\)"):
        attack(pgd, centred, Linf(0.05, space="encoded"), x, y)
    assert attack(pgd, centred, Linf(0.05, space="encoded", box=(-2, 2)), x, centred.scores(x).argmax(1)).backwards
    with pytest.raises(ValueError, match="image of 0 and 1 alone"):
        attack(ATTACKS["sda"], plain, L0(3, space="pixel"), x, y)
    assert attack(pgd, plain, Linf(0.05, space="pixel"), x, y.to(torch.uint8)).clean == (True,) * 12


def test_progress_is_told_from_the_start(snn):
    net, v, x, y = snn
    told = []
    attack(fgsm, v, Linf(1 / 255, space="pixel"), x, y, batch=4, say=lambda *at: told.append(at))
    assert told == [(0, 10), (4, 10), (8, 10), (10, 10)]
    told.clear()
    authors(net, phase(steps=4), x, y, batch=5, steps=1, say=lambda *at: told.append(at))
    assert told == [(0, 10), (5, 10), (10, 10)]


@pytest.mark.parametrize(("name", "knobs"), [
    ("pgd", {"restarts": 0}), ("pgd", {"restarts": -2}), ("pgd", {"steps": -1}), ("pgd", {"steps": 2.5}),
    ("pgd", {"step": 0.0}), ("pgd", {"step": -0.01}), ("pgd", {"step": math.inf}), ("apgd", {"restarts": 0}),
    ("square", {"queries": -5}), ("square", {"p_init": 50}), ("noise", {"draws": 0}), ("codebook", {"momentum": -0.1}),
    ("fab", {"targets": 0}), ("rfgsm", {"share": 1.5}),
])  # fmt: skip
def test_settings_that_leave_an_attack_without_work_are_refused(name, knobs):
    """Every image would stand: no robustness, nothing was tried."""
    v, x = linear_victim("pixel")[0], pictures()
    (setting,) = knobs
    with pytest.raises(ValueError, match=f"{name}: {setting}: expected a"):
        strike(name, v, Linf(0.1, space="pixel"), x, v.scores(x).argmax(1), **knobs)


def test_every_default_and_every_quick_setting_is_allowed():
    for name, fn in ATTACKS.items():
        check_settings(name, settings(fn) | QUICK.get(name, {}))
    check_settings("pgd", {"step": 0.0}, still=True)
    check_settings("pgd", {"loss": margin})


def test_a_victim_that_writes_into_its_input_is_refused_and_nobodys_images_are_touched():
    w = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    x = (torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    kept, y = x.clone(), torch.zeros(4, dtype=torch.long)

    def made(write):
        return Victim(
            encode=(lambda v: v.sub_(0.5).unsqueeze(0)) if write == "encode" else lambda v: v.unsqueeze(0).clone(),
            logits=lambda u: (u.mul_(2) if write == "logits" else u)[0].flatten(1) @ w, steps=1, classes=3,
        )  # fmt: skip

    for write, space in (("encode", "pixel"), ("encode", "encoded"), ("logits", "encoded")):
        box = {"box": (-1.0, 1.0)} if space == "encoded" else {}
        for name in ("pgd", "square"):
            with pytest.raises(ValueError, match="leaves its input as it is"):
                strike(name, made(write), Linf(0.1, space=space, **box), x, y)
        assert torch.equal(x, kept)
    assert attack(pgd, made(""), Linf(0.1, space="pixel"), x, y).n == 4


def test_what_a_victim_says_between_grey_levels_is_never_asked():
    """At a radius that is no whole level, answers off the grid that point the other way change no result."""
    v, x = linear_victim("pixel")[0], (pictures() * 255).round() / 255

    def hidden(u):
        level = u[0] * 255
        between = ((level - level.round()).abs() > 1e-3).flatten(1).any(1)
        return torch.where(between[:, None], -v.logits(u), v.logits(u))

    y0 = v.scores(x).argmax(1)
    liar = dataclasses.replace(v, logits=hidden, shortcut=None)
    for name in ("noise", "fgsm", "bim", "mifgsm", "pgd", "apgd", "sapgd", "square", "spsa"):
        a, b = (strike(name, w, Linf(0.031, space="pixel"), x, y0, batch=len(x)) for w in (v, liar))
        assert a.robust == b.robust and sum(a.robust) < len(x), name


def test_a_route_may_be_given_by_its_name(snn):
    _, v, x, y = snn
    a, b = (attack(pgd, v, Linf(8 / 255, space="pixel"), x, y, route=r) for r in ("atan:4", Route(neuron="atan:4")))
    assert a.robust == b.robust and a.route == b.route != v.path("pixel")
    with pytest.raises(ValueError, match="nonsense"):
        attack(pgd, v, Linf(8 / 255, space="pixel"), x, y, route="nonsense")


def test_numbers_of_other_libraries_are_numbers():
    """One that leaves an attack without work is refused whatever library it is of; a tensor is told to be one."""
    import numpy as np

    v, _ = linear_victim("pixel")
    x = pictures()
    y, ball = v.scores(x).argmax(1), Linf(0.05, space="pixel")
    same = [attack(pgd, v, ball, x, y, steps=5, step=s).robust for s in (0.01, np.float64(0.01))]
    assert same[0] == same[1]
    run = attack(pgd, v, ball, x, y, steps=np.int64(3))
    assert run.knobs["steps"] == 3 and type(run.knobs["steps"]) is int
    for wrong in ({"steps": np.int64(0)}, {"step": np.float32(-0.01)}, {"restarts": np.int32(0)}):
        with pytest.raises(ValueError, match="expected a positive"):
            attack(pgd, v, ball, x, y, **wrong)
    with pytest.raises(ValueError, match="expected a plain number, got a tensor"):
        attack(pgd, v, ball, x, y, steps=torch.tensor(0))
    for keys in ({"indices": [0.5] * N}, {"seed": "a"}, {"seed": 0.5}):
        with pytest.raises((ValueError, TypeError), match=r"expected whole numbers|[Tt]ype-check|type hint"):
            attack(pgd, v, ball, x, y, **keys)


def test_a_part_of_a_network_left_in_train_mode_is_refused():
    """Its statistics would make one image's robustness depend on the others, and move while it is attacked."""
    net = build(NetSpec(width=0.125, channels=1, steps=2), seed=0).eval()
    v, x = victim(net, phase(steps=2)), torch.rand(4, 1, 8, 8)
    y = v.scores(x).argmax(1)
    before = {k: b.clone() for k, b in net.named_buffers()}
    net.layer1.train()
    for call in (
        lambda: attack(pgd, v, Linf(0.1, space="pixel"), x, y),
        lambda: v.scores(x),
        lambda: v.logits(v.encode(x)),
    ):
        with pytest.raises(ValueError, match=r"found its layer1\.0\.bn1 in train mode; call net\.eval"):
            call()
    assert all(torch.equal(b, before[k]) for k, b in net.named_buffers())


def test_spsa_has_nothing_to_do_in_an_l0_ball():
    v, _ = linear_victim("encoded")
    x = (pictures() > 0.5).float()
    with pytest.raises(ValueError, match="use sda or sparse_rs"):
        attack(ATTACKS["spsa"], v, L0(2, space="encoded"), x, v.scores(x).argmax(1))


@pytest.mark.parametrize("name", ["fgsm", "pgd", "spsa", "rays", "square"])
def test_a_box_of_another_size_changes_nothing_but_the_unit(name):
    """The same classifier, images and radius, measured in another unit and from another zero."""
    plain, w = linear_victim("encoded")
    x = pictures()
    y = plain.scores(x).argmax(1)
    lo, hi = -32.0, 32.0

    def logits(u):
        return plain.logits((u - lo) / (hi - lo))

    wide = dataclasses.replace(plain, encode=lambda x: lo + (hi - lo) * plain.encode(x), logits=logits)
    knobs = {"steps": 30} if name == "spsa" else {}
    a = strike(name, plain, Linf(0.06, space="encoded"), x, y, **knobs)
    b = strike(name, wide, Linf(0.06 * (hi - lo), space="encoded", box=(lo, hi)), x, y, **knobs)
    assert 0 < sum(a.robust) < N and sum(x != z for x, z in zip(a.robust, b.robust, strict=True)) <= 1  # rounding


def test_rays_in_a_box_without_ends():
    v, w = linear_victim("encoded")
    x = pictures()
    y, ends = v.scores(x).argmax(1), (-math.inf, math.inf)
    found = [strike(n, v, Linf(0.1, space="encoded", box=ends), x, y) for n in ("fgsm", "rays")]
    assert sum(found[0].robust) < N and sum(found[1].robust) < N


def test_what_is_no_attack_victim_or_threat_is_told_and_numbers_of_other_libraries_are_taken(snn):
    net, v, x, y = snn
    ball = Linf(8 / 255, space="pixel")
    plain = inspect.unwrap(attack)
    for args, match in (
        (("pgd", v, ball), "expected an attack as a function, such as sparsetrail.pgd, got 'pgd'"),
        ((pgd, net, ball), "expected a Victim, got SpikingResNet"),
        ((pgd, v, "8/255"), "expected a threat such as Linf.* got '8/255'"),
    ):
        with pytest.raises(ValueError, match=match):
            plain(*args, x, y)
    given = attack(noise, v, ball, x, y, indices=range(len(y)))
    for places in (torch.arange(len(y)), np.arange(len(y))):
        assert plain(noise, v, ball, x, y, indices=places, batch=np.int64(64)).robust == given.robust
    with pytest.raises(ValueError, match="eot: expected a whole number of at least 1, got True"):
        plain(noise, v, ball, x, y, eot=True)


def test_a_radius_between_grey_levels_is_told_and_one_below_the_first_is_refused(snn):
    _, v, x, y = snn
    for eps in (0.0039, 0.5 / 255):
        with pytest.raises(ValueError, match="holds no other 8-bit image; expected at least 1/255"):
            attack(fgsm, v, Linf(eps, space="pixel"), x, y)
    still = attack(fgsm, v, Linf(0.0, space="pixel"), x, y)  # a radius of 0 moves nothing, and is meant to
    assert still.robust == still.clean
    told = attack(fgsm, v, Linf(0.031, space="pixel"), x, y, keep=True)
    assert told.note == "images of 256 grey levels: the radius holds 7"
    assert float((told.adversarial - x).abs().max()) == pytest.approx(7 / 255, abs=1e-6)
    assert attack(fgsm, v, Linf(8 / 255, space="pixel"), x, y).note == ""
    assert attack(fgsm, v, Linf(0.031, space="encoded"), x, y).note == ""  # a code has no levels


def test_the_published_evaluation_is_no_attack_on_a_problem(snn):
    _, v, x, y = snn
    with pytest.raises(ValueError, match="expected an attack of a problem and its streams"):
        attack(authors, v, Linf(8 / 255, space="pixel"), x, y)


def test_what_a_random_victim_draws_is_that_of_the_call(snn):
    net, _, x, y = snn
    v = victim(net, poisson(steps=4, seed=1))
    ball = Linf(8 / 255, space="pixel")

    def fallen(**more):
        return attack(fgsm, v, ball, x, y, eot=1, votes=1, **more).robust

    first = fallen()
    v.scores(x)  # draws on
    assert fallen() == first
    assert len({fallen(seed=s) for s in range(8)}) > 1
    guide = victim(net, poisson(steps=4, seed=2), name="guide")
    led = attack(fgsm, v, ball, x, y, eot=1, votes=1, guide=guide).robust
    guide.scores(x)
    assert attack(fgsm, v, ball, x, y, eot=1, votes=1, guide=guide).robust == led


def test_autocast_around_an_attack_decides_nothing(snn):
    _, v, x, y = snn
    ball = Linf(8 / 255, space="pixel")
    plain = attack(pgd, v, ball, x, y, keep=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attack(pgd, v, ball, x, y, keep=True)
    assert torch.equal(cast.adversarial, plain.adversarial) and cast.robust == plain.robust


def test_images_that_are_normalised_by_their_batch_stay_in_it_and_it_is_told(snn):
    net, _, x, y = snn
    net = copy.deepcopy(net)
    norm = net.layer1[0].bn1
    norm.running_mean = norm.running_var = None
    v = victim(net, phase(steps=4), name="mixed")
    run = attack(pgd, v, Linf(8 / 255, space="pixel"), x, y, keep=True)
    assert (
        run.note == "layer1.0.bn1 keeps no running statistics, so that the images of a batch of 64 decide of each other"
    )
    again = attack(pgd, v, Linf(8 / 255, space="pixel"), x, y, drop=False, keep=True)
    assert run.robust == again.robust and torch.equal(run.adversarial, again.adversarial)
