"""How near attacks come to the best point there is: by formula on linear victims, by looking at every image on tiny
spiking ones; and what they do where there is no gradient, no score, or only a tie."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparsetrail.attacks import (
    ATTACKS,
    LOSSES,
    TARGETED,
    apgd,
    attack,
    codebook,
    fab,
    mifgsm,
    noise,
    pgd,
    rays,
    sda,
    settings,
    spsa,
    square,
)
from sparsetrail.attacks.fab import nearest
from sparsetrail.attacks.losses import loss_named
from sparsetrail.attacks.moves import by_mean, checkpoints
from sparsetrail.core import L0, L2, Linf, Problem, Streams, Victim, correct, margin
from sparsetrail.snn.encode import latency, phase
from sparsetrail.snn.neuron import NeuronSpec, fused

FLIPS = ("sda", "sparse_rs")
QUICK = {"apgd": {"steps": 20}, "sapgd": {"steps": 20}, "square": {"queries": 60}, "spsa": {"steps": 4, "samples": 8},
         "sparse_rs": {"queries": 60},
         "rays": {"queries": 200}, "fab": {"steps": 20}, "autoattack": {"steps": 5, "queries": 20}}  # fmt: skip
AXIS = {"pixel": 0, "encoded": 1}


def linear(space, size=12, classes=2, seed=0):
    """Scores linear in the attacked tensor, with the weights [entries classes] of that tensor."""
    steps = 2
    w = torch.randn(steps * size, classes, generator=torch.Generator().manual_seed(seed))
    v = Victim(encode=lambda x: torch.stack([x] * steps), logits=lambda u: u.movedim(1, 0).flatten(1) @ w,
               steps=steps, classes=classes, name="linear")  # fmt: skip
    return v, w if space == "encoded" else w.view(steps, size, classes).sum(0)


def posed(v, space, x):
    u0 = x if space == "pixel" else v.encode(x)
    return u0, (v.scores if space == "pixel" else v.logits), v.scores(x).argmax(1)


def slopes(rows, y):
    """Slope of the margin of a two-class victim, per example [n entries]."""
    return (rows[:, 1 - y] - rows[:, y]).t()


@pytest.mark.parametrize("space", ["pixel", "encoded"])
@pytest.mark.parametrize("loss", list(LOSSES | TARGETED))
def test_linf_reaches_the_corner_cut_to_the_box(space, loss):
    """max over ball and box of a linear margin: per entry, its slope times the reach on that side."""
    v, rows = linear(space)
    x = torch.rand(30, 1, 3, 4, generator=torch.Generator().manual_seed(1))  # many within 0.2 of the box
    u0, f, y = posed(v, space, x)
    s, flat = slopes(rows, y), u0.movedim(AXIS[space], 0).flatten(1)
    reach = torch.where(s > 0, (flat + 0.2).clamp(max=1) - flat, (flat - 0.2).clamp(min=0) - flat)
    best = margin(f(u0), y) + (s * reach).sum(1)
    todo = {"apgd": {"loss": loss}}
    if loss in LOSSES:
        todo |= {"pgd": {"loss": loss, "steps": 50}, "sapgd": {"loss": loss}, "bim": {"loss": loss},
                 "mifgsm": {"loss": loss}, "fgsm": {"loss": loss}, "rfgsm": {"loss": loss, "share": 0.01}}  # fmt: skip
    for name, knobs in todo.items():
        run = attack(ATTACKS[name], v, Linf(0.2, space=space), x, y, keep=True, drop=False, **knobs)
        found = margin(f(run.adversarial), y)
        if name == "rfgsm":  # its first step may go the wrong way, and is not taken back
            assert (found <= best + 1e-4).all() and (found >= best - 2 * 0.01 * 0.2 * s.abs().sum(1) - 1e-4).all()
        else:
            assert torch.allclose(found, best, atol=1e-4), name


@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_spsa_climbs_nearly_to_the_corner(space):
    v, rows = linear(space)
    x = torch.rand(10, 1, 3, 4, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3  # the box is out of reach
    u0, f, y = posed(v, space, x)
    most = 0.05 * slopes(rows, y).abs().sum(1)
    run = attack(spsa, v, Linf(0.05, space=space), x, y, keep=True, drop=False, steps=20, samples=32)
    share = (margin(f(run.adversarial), y) - margin(f(u0), y)) / most
    assert (share <= 1 + 1e-4).all() and (share > 0.9).all()


@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_l2_reaches_the_far_point_of_the_ball(space):
    v, rows = linear(space)
    x = torch.rand(30, 1, 3, 4, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3  # the box is out of reach
    u0, f, y = posed(v, space, x)
    best = margin(f(u0), y) + 0.25 * slopes(rows, y).norm(dim=1)
    for name, knobs in (("fgsm", {}), ("bim", {}), ("mifgsm", {}), ("pgd", {"steps": 80, "step": 0.05}), ("apgd", {}),
                        ("sapgd", {"steps": 200})):  # fmt: skip
        run = attack(ATTACKS[name], v, L2(0.25, space=space), x, y, keep=True, drop=False, **knobs)
        found = margin(f(run.adversarial), y)
        if name == "sapgd":  # its quotient has no more than the signs of a steady gradient: a cone, not the axis
            assert (found > margin(f(u0), y)).all() and (found <= best + 1e-4).all()
        else:
            assert torch.allclose(found, best, atol=1e-4), name


@pytest.mark.parametrize("space", ["pixel", "encoded"])
@pytest.mark.parametrize("flips", [1, 2, 3])
def test_l0_reaches_the_best_flips(space, flips):
    """Linear and binary: the gains of single flips add up, the best `flips` positive ones are the optimum."""
    v, rows = linear(space, seed=3)
    x = (torch.rand(40, 1, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    u0, f, y = posed(v, space, x)
    flat = u0.movedim(AXIS[space], 0).flatten(1)
    gains = slopes(rows, y) * (1 - 2 * flat)
    best = margin(f(u0), y) + gains.clamp(min=0).topk(flips, 1).values.sum(1)
    run = attack(sda, v, L0(flips, space=space), x, y, keep=True, drop=False, lean=False)
    assert torch.allclose(margin(f(run.adversarial), y), best, atol=1e-4)
    lean = attack(sda, v, L0(flips, space=space), x, y, keep=True)
    assert lean.robust == run.robust == tuple((best <= 0).tolist()) and 0 < sum(run.robust) < 40
    # the fewest flips that fool: the best ones, one after the other, until the margin is positive
    ranked = gains.clamp(min=0).sort(1, descending=True).values.cumsum(1)
    fewest = (margin(f(u0), y)[:, None] + ranked <= 0).sum(1) + 1
    changed = (lean.adversarial != u0).movedim(AXIS[space], 0).flatten(1).sum(1)
    broken = ~torch.tensor(lean.robust)
    assert (changed[broken] >= fewest[broken]).all() and (changed[~broken] == 0).sum() <= (~broken).sum()
    assert (changed[broken] == fewest[broken]).float().mean() > 0.8  # a flip measured first may fool before the leanest


@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_sparse_rs_finds_the_best_flips_of_a_linear_score(space):
    """Exactly eps flips of largest gain, which single exchanges reach from anywhere; told by scores alone."""
    v, rows = linear(space, size=6)
    blind = replace(v, logits=lambda u: v.logits(u.detach()))
    x = torch.randint(0, 2, (20, 1, 2, 3), generator=torch.Generator().manual_seed(1)).float()
    u0, f, y = posed(v, space, x)
    s, flat = slopes(rows, y), u0.movedim(AXIS[space], 0).flatten(1)
    gain = s * (1 - 2 * flat)
    best = margin(f(u0), y) + gain.topk(3, 1).values.sum(1)
    run = attack(ATTACKS["sparse_rs"], blind, L0(3, space=space), x, y, keep=True, drop=False, queries=400)
    assert torch.allclose(margin(f(run.adversarial), y), best, atol=1e-5) and run.backwards == 0
    assert torch.equal((run.adversarial != u0).movedim(AXIS[space], 0).flatten(1).sum(1), torch.full((20,), 3))
    with pytest.raises(ValueError, match="sparse_rs: expected an L0 ball around a binary input"):
        attack(ATTACKS["sparse_rs"], v, Linf(0.1, space=space), x, y)


def test_what_sda_undoes_is_undone_for_no_example_that_stands():
    """Of five equal flips of which three fool, two are undone, dropped or not."""
    v = Victim(encode=lambda x: x[None], steps=1, classes=2,
               logits=lambda u: torch.stack([torch.full((u.shape[1],), 2.5), u[0].flatten(1).sum(1)], 1))  # fmt: skip
    x, y = torch.zeros(2, 1, 1, 5), torch.tensor([0, 0])
    for drop in (True, False):
        run = attack(sda, v, L0(5, space="pixel"), x, y, keep=True, drop=drop)
        assert run.robust == (False, False) and (run.adversarial != x).flatten(1).sum(1).tolist() == [3, 3]


def test_codebook_reaches_the_best_grey_levels_of_a_linear_net():
    """Linear in the code, so separable per pixel: the best admissible level of each, by looking at all of them."""
    encoder = phase(steps=10)
    w = torch.randn(10, 12, 2, generator=torch.Generator().manual_seed(2))
    w[4] = 0.0  # a bit that nothing reads
    v = Victim(encode=encoder, logits=lambda u: torch.einsum("tnp,tpk->nk", u.flatten(2), w), steps=10, classes=2,
               codebook=encoder.codebook)  # fmt: skip
    level = torch.randint(0, 256, (40, 1, 3, 4), generator=torch.Generator().manual_seed(1))
    level[:4] = torch.tensor([0, 255]).repeat(6).view(3, 4)
    x = level / 255
    y = v.scores(x).argmax(1)
    for radius in (1, 4, 255):
        gain = torch.einsum("vt,tpn->npv", encoder.codebook, w[:, :, 1 - y] - w[:, :, y])  # all levels of all pixels
        near = (torch.arange(256) - level.flatten(1)[:, :, None]).abs() <= radius
        best = torch.where(near, gain, -math.inf).amax(2).sum(1)
        for knobs in ({"q": 1.0, "steps": 1}, {"steps": 20}):
            run = attack(codebook, v, Linf(radius / 255, space="pixel"), x, y, keep=True, drop=False, **knobs)
            assert torch.allclose(margin(v.scores(run.adversarial), y), best, atol=1e-4)
            back = run.adversarial * 255
            assert torch.equal(run.adversarial, back.round() / 255) and (back.round() - level).abs().max() <= radius


def spiking(seed, pixels, hidden, steps=10, classes=3):
    """A random net of one layer of IF neurons behind the phase code, with a linear readout of their rates."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(pixels, hidden, generator=g) * 1.2 / math.sqrt(pixels)
    b = torch.randn(hidden, classes, generator=g)
    encoder, spec = phase(steps=steps), NeuronSpec()
    return Victim(encode=encoder, logits=lambda u: fused(u.flatten(2) @ a, spec).mean(0) @ b, steps=steps,
                  classes=classes, codebook=encoder.codebook)  # fmt: skip


def foolable(v, x, y, radius):
    """Which images are right and have an image of grey levels within `radius` that is not; and how many were asked."""
    level, size = (x * 255).round().flatten(1), x[0].numel()
    offsets = torch.tensor(list(itertools.product(range(-radius, radius + 1), repeat=size)))
    points = (level[:, None] + offsets).clamp(0, 255).view(-1, *x.shape[1:]) / 255
    with torch.no_grad():
        m = margin(v.scores(points), y.repeat_interleave(len(offsets))).view(len(x), -1)
        return (m > 0).any(1) & correct(v.scores(x), y), len(offsets)


@pytest.mark.parametrize(("pixels", "radius", "hidden"), [(5, 1, 16), (4, 2, 24), (5, 2, 24)])
def test_codebook_finds_what_looking_at_every_image_finds(pixels, radius, hidden, record_property):
    """All (2R+1)^d images of grey levels of 480 images and 30 random nets: of those that can be fooled, 99 % are."""
    ball, nets, images = Linf(radius / 255, space="pixel"), 30, 16
    exist = 0
    attacks = {
        "codebook 4 x 100": (codebook, {"steps": 100, "restarts": 4, "loss": "margin"}),
        "codebook 1 x 20": (codebook, {}),
        "PGD 4 x 20": (pgd, {"steps": 20, "step": 0.5 / 255, "restarts": 4, "loss": "margin"}),
    }
    found, calls = dict.fromkeys(attacks, 0), dict.fromkeys(attacks, 0)
    for seed in range(nets):
        v = spiking(seed, pixels, hidden)
        x = torch.randint(0, 256, (images, 1, 1, pixels), generator=torch.Generator().manual_seed(1000 + seed)) / 255
        y = v.scores(x).argmax(1)
        there, number = foolable(v, x, y, radius)
        every = attack(codebook, v, ball, x, y)
        assert not (~torch.tensor(every.robust) & torch.tensor(every.clean) & ~there).any()  # none that is not there
        exist += int(there.sum())
        if there.any():
            for name, (fn, knobs) in attacks.items():
                run = attack(fn, v, ball, x[there], y[there], **knobs)
                found[name] += run.clean_accuracy.k - run.accuracy.k
                calls[name] += run.forwards
    shares = {name: n / exist for name, n in found.items()}
    words = ", ".join(f"{name} {shares[name]:.1%} ({calls[name] / exist:.0f} calls each)" for name in attacks)
    print(f"\n{pixels} pixels, +-{radius} of {number} images each, {exist} can be fooled: {words}")
    record_property("found", shares)
    assert exist > 100
    assert shares["codebook 4 x 100"] >= 0.99 and shares["codebook 1 x 20"] > 0.8
    assert shares["codebook 4 x 100"] > shares["PGD 4 x 20"]


def test_what_codebook_draws_on_the_way_does_not_depend_on_the_batch():
    """Images that come back to where they were draw; the others must not, or the batch would decide what they see."""
    for seed in range(2):
        v = spiking(seed, 5, 16)
        x = torch.randint(0, 256, (16, 1, 1, 5), generator=torch.Generator().manual_seed(seed)) / 255
        y = v.scores(x).argmax(1)
        knobs = {"steps": 25, "restarts": 3, "keep": True, "drop": True}
        whole = attack(codebook, v, Linf(1 / 255, space="pixel"), x, y, batch=16, **knobs)
        assert sum(whole.robust) > 0
        parts = attack(codebook, v, Linf(1 / 255, space="pixel"), x, y, batch=5, **knobs)
        assert torch.equal(parts.adversarial, whole.adversarial) and parts.robust == whole.robust


@pytest.mark.parametrize("space", ["pixel", "encoded"])
@pytest.mark.parametrize("fault", ["zero", "nan", "infinite", "tie"])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_no_gradient_no_score_and_no_lead_are_survived(name, space, fault):
    """Gradients that are zero or not finite crash nothing and fool nobody; a tie is never a success."""
    encoder = latency(steps=2)

    def logits(u):
        s = u.movedim(1, 0).flatten(1).sum(1)
        if fault == "zero":
            return torch.stack([s * 0 + 1, s * 0, s * 0], 1)
        if fault == "nan":  # the square root of a zero has an infinite slope, which meets a factor of zero
            return torch.stack([s * 0 + 1 + (s * 0).sqrt() * 0, s * 0, s * 0], 1)
        if fault == "infinite":
            return torch.stack([s * 0 + 1 + (s * 0).sqrt(), s * 0, s * 0], 1)
        lead = (u - encoder(torch.full((1, 1, 2, 2), 0.6)).to(u)).abs().sum((0, 2, 3, 4))  # any change ties all scores
        return torch.stack([torch.where(lead > 0, 0.0, 1.0) + 0 * s, 0 * s, 0 * s], 1)

    v = Victim(encode=encoder, logits=logits, steps=2, classes=3, codebook=encoder.codebook)
    x = torch.full((4, 1, 2, 2), 0.6)
    if name in FLIPS:
        x = torch.ones(4, 1, 2, 2)
    y = torch.zeros(4, dtype=torch.long)
    threat = L0(3, space=space) if name in FLIPS else Linf(30 / 255, space=space)
    balls = [threat] if name in (*FLIPS, "codebook") else [threat, L2(0.3, space=space)]
    for ball in balls:
        for loss in [None] if "loss" not in settings(ATTACKS[name]) else LOSSES | (TARGETED if name == "apgd" else {}):
            knobs = QUICK.get(name, {}) | ({} if loss is None else {"loss": loss})
            if name == "codebook" and space == "encoded":
                with pytest.raises(ValueError, match="in pixel space"):
                    attack(ATTACKS[name], v, ball, x, y, **knobs)
                continue
            run = attack(ATTACKS[name], v, ball, x, y, keep=True, **knobs)
            assert run.robust == run.clean and run.adversarial.isfinite().all()
            assert fault == "tie" or all(run.clean)


@pytest.mark.parametrize("name", [n for n in ATTACKS if n not in ("noise",)])
def test_a_tiny_slope_moves_as_far_as_a_large_one(name):
    """Scores scaled by 1e-30 are attacked as well as those they were scaled from; starts and draws are the same."""
    encoder = latency(steps=2)
    w = torch.randn(8, 2, generator=torch.Generator().manual_seed(4))

    def victim(scale):
        return Victim(encode=encoder if name == "codebook" else lambda x: torch.stack([x, x]), steps=2, classes=2,
                      codebook=encoder.codebook if name == "codebook" else None,
                      logits=lambda u: u.movedim(1, 0).flatten(1) @ w * scale)  # fmt: skip

    x = torch.randint(0, 256, (30, 1, 2, 2), generator=torch.Generator().manual_seed(1)) / 255
    x = (x > 0.5).float() if name in FLIPS else x
    y = victim(1.0).scores(x).argmax(1)
    for ball in [L0(1, space="pixel")] if name in FLIPS else [Linf(50 / 255, space="pixel")]:
        knobs = QUICK.get(name, {})
        one = attack(ATTACKS[name], victim(1.0), ball, x, y, keep=True, **knobs)
        tiny = attack(ATTACKS[name], victim(2.0**-100), ball, x, y, keep=True, **knobs)  # 8e-31
        assert (one.adversarial != x).flatten(1).any(1).float().mean() > 0.5
        assert tiny.robust == one.robust and torch.allclose(tiny.adversarial, one.adversarial, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_shortest_move_to_a_hyperplane(norm):
    """Against a search for the time, and against random other points beyond the hyperplane: none is nearer."""
    g = torch.Generator().manual_seed(0)
    ball = (Linf if norm == "linf" else L2)(1.0, space="pixel")
    u, w = torch.rand(200, 12, generator=g), torch.randn(200, 12, generator=g)
    w[:, :4] *= torch.randint(0, 2, (200, 4), generator=g)  # some entries do nothing, some images have no slope
    u[:50, 4:] = u[:50, 4:].round()  # some begin at the box
    w[0] = 0
    most = torch.maximum(w * (1 - u), -w * u).sum(1)
    least = torch.minimum(w * (1 - u), -w * u).sum(1)
    need = (torch.rand(200, generator=g) * 2.4 - 1.2) * torch.where(torch.arange(200) % 2 == 0, most, -least)
    need[1] = 0
    d = nearest(u, w, need, ball)
    gained = (w * d).sum(1)
    out = (need > most) | (need < least)
    assert out.any() and ((u + d >= -1e-6) & (u + d <= 1 + 1e-6)).all() and (d[w == 0] == 0).all()
    assert torch.allclose(gained, torch.minimum(torch.maximum(need, least), most), atol=1e-5)
    size = d.abs().amax(1) if norm == "linf" else d.norm(dim=1)
    way, need = w.sign() * need.sign()[:, None], need.abs()
    room, pace = torch.where(way > 0, 1 - u, u), (w.abs() if norm == "l2" else (w != 0).float())
    low, high = torch.zeros(200), torch.full((200,), 1e4)
    for _ in range(60):
        time = (low + high) / 2
        far = (w.abs() * torch.minimum(time[:, None] * pace, room)).sum(1) >= need
        low, high = torch.where(far, low, time), torch.where(far, time, high)
    assert torch.allclose(d, way * torch.minimum(high[:, None] * pace, room), atol=2e-4)
    for k in range(300):
        other = (u + (k / 100) * torch.randn(u.shape, generator=g)).clamp(0, 1) - u
        reaches = (w.abs() * way * other).sum(1) >= need
        length = other.abs().amax(1) if norm == "linf" else other.norm(dim=1)
        assert (~reaches | out | (length >= size - 1e-5)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_fab_decides_a_linear_victim_without_a_step_size(space, norm):
    """Exactly the images whose nearest point of the other class lies in the ball, box and all."""
    v, rows = linear(space)
    x = torch.rand(60, 1, 3, 4, generator=torch.Generator().manual_seed(2))
    u0, f, y = posed(v, space, x)
    flat, w = u0.movedim(AXIS[space], 0).flatten(1), slopes(rows, y)
    away = nearest(
        flat, w, -(w * flat).sum(1) * 1.0001, L2(1.0, space=space) if norm == "l2" else Linf(1.0, space=space)
    )
    reached = margin(f((flat + away).view(u0.movedim(AXIS[space], 0).shape).movedim(0, AXIS[space])), y) > 0
    size = away.norm(dim=1) if norm == "l2" else away.abs().amax(1)
    eps = float(size.median())
    sure = (size - eps).abs() > 1e-3 * eps
    run = attack(fab, v, (L2 if norm == "l2" else Linf)(eps, space=space), x, y, steps=10)
    expected = ~(reached & (size < eps))
    assert 10 < expected.sum() < 50 and sure.sum() > 50
    assert torch.equal(torch.tensor(run.robust)[sure], expected[sure])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_finds_grey_images_behind_a_near_boundary(norm):
    """The shortest way, rounded to grey levels, is often none at all."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(300, generator=g)
    x = torch.randint(60, 200, (40, 3, 10, 10), generator=g) / 255
    ball = (Linf if norm == "linf" else L2)(8 / 255 if norm == "linf" else 0.5, space="pixel")
    reach = float((w.abs().sum() if norm == "linf" else w.norm()) / 255)  # of the score, by one level
    near = (0.2 + torch.arange(40) / 15) * (1 if norm == "linf" else 10) * reach
    offset = near - x.flatten(1) @ w

    def logits(u):  # the image is told by its place: all are asked at once
        z = u[0].flatten(1) @ w + offset[: u.shape[1]]
        return torch.stack([z, -z], 1)

    v = Victim(encode=lambda x: x[None], logits=logits, steps=1, classes=2, name="line")
    run = attack(fab, v, ball, x, torch.zeros(40, dtype=torch.long), steps=20, drop=False, keep=True)
    assert all(run.clean) and not any(run.robust)
    assert ball.contains(run.adversarial, x).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_fab_gains_nothing_by_the_rounding_of_the_ball(norm, eps):
    """Boundaries 8e-7 beyond the radius: what `contains` forgives is no room to attack."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4, 12, generator=g, dtype=torch.float64)[0]
    x = torch.rand(30, 1, 3, 4, generator=g, dtype=torch.float64) * 0.5 + 0.25
    size = w.abs().sum() if norm == "linf" else w.norm()
    offset = (eps + 8e-7) * size - x.flatten(1) @ w
    v = Victim(encode=lambda x: x[None], steps=1, classes=2, name="line", logits=lambda u: torch.stack(
        [u[0].flatten(1) @ w + offset, -(u[0].flatten(1) @ w + offset)], 1))  # fmt: skip
    ball = (Linf if norm == "linf" else L2)(eps, space="pixel")
    run = attack(fab, v, ball, x, torch.zeros(30, dtype=torch.long), steps=20, drop=False)
    assert all(run.clean) and all(run.robust)


@pytest.mark.parametrize("ball", [Linf(0.1, space="pixel"), L2(0.6, space="pixel")], ids=str)
def test_square_takes_features_that_are_no_map(ball):
    w = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    x = torch.rand(20, 24, generator=torch.Generator().manual_seed(1))
    p = Problem(lambda u: u @ w, x, (x @ w).argmax(1), ball, drop=True)
    square(p, Streams(0, range(20)), queries=100)
    assert 0 < p.fooled.sum() < 20 and not p.left


def test_gradients_over_their_mean():
    g = torch.tensor([[1e-30, -3e-30], [0.0, 0.0], [math.nan, 2.0], [math.inf, 1.0], [1e-44, 0.0], [3e38, -3e38]])
    d = by_mean(g, 0)
    assert d.isfinite().all() and torch.allclose(d[0], torch.tensor([0.5, -1.5])) and (d[1] == 0).all()
    assert d[2].tolist() == [0.0, 2.0] and torch.allclose(d[4], torch.tensor([2.0, 0.0]))
    assert d[5].tolist() == [1.0, -1.0]
    assert torch.equal(by_mean(g.t(), 1).t(), d)
    m = torch.zeros(1, 1, 1, 2)
    p = Problem(lambda u: torch.stack([u.sum((1, 2, 3)) * 0, -u.sum((1, 2, 3)) - 1], 1), m, torch.tensor([0]),
                Linf(0.1, space="pixel"))  # fmt: skip
    mifgsm(p, Streams(0, [0]))
    assert p.best.isfinite().all()


def test_checkpoints_are_those_of_the_paper():
    assert list(checkpoints(100)) == [
        22,
        41,
        57,
        70,
        80,
        87,
        93,
        99,
    ]  # sec. 3.1: .22, .41, .57, .70, .80, .87, .93, .99
    assert checkpoints(100)[22] == 22 and checkpoints(100)[99] == 6
    assert list(checkpoints(1)) == [1] and list(checkpoints(0)) == []


def test_losses_are_finite_and_point_the_right_way_on_ties():
    y = torch.zeros(1, dtype=torch.long)
    for row in ([1.0, 1, 1, 1], [2, 2, 2, 0], [0, 2, 2, 2], [1, 1 - 1e-7, 1 - 2e-7, 0.0], [3, 3, 1, 0], [0.5, 0.5, 0.5],
                [0.0, 0.0], [2.0, 1.0], [1e-30, 0, 0, 0], [1e30, 0, 0, 0]):  # fmt: skip
        for name, fn in (LOSSES | TARGETED).items():
            z = torch.tensor([row], dtype=torch.float32, requires_grad=True)
            value = fn(z, y, torch.ones_like(y)) if name in TARGETED else fn(z, y)
            (slope,) = torch.autograd.grad(value.sum(), z)
            assert value.isfinite().all() and slope.isfinite().all(), (name, row)
            assert value.abs().max() < 1e5 or name in ("margin", "ce")
            if len(set(row)) == 1 or row in ([2, 2, 2, 0], [3, 3, 1, 0], [2.0, 1.0]):
                assert slope[0, 0] < 0 < slope[0, 1], (name, row)  # down with the true score, up with a rival's
    z = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    assert float(LOSSES["dlr"](z, y)) == pytest.approx(-1 / 2)
    assert float(TARGETED["targeted"](z, y, torch.ones_like(y))) == pytest.approx(-2 / 2.5)
    z3 = torch.tensor([[3.0, 1.0, 2.5]])
    assert float(TARGETED["targeted"](z3, y, torch.ones_like(y))) == pytest.approx(-2 / 2)
    with pytest.raises(ValueError, match=r"loss: expected one of ce, margin, dlr, got 'mse'"):
        loss_named("mse")


def test_targets_are_the_best_wrong_classes_of_the_clean_image_one_after_the_other():
    """Each target in its own restart; with most images fooled, several targets share a batch, and the same fall."""
    w = torch.randn(8, 6, generator=torch.Generator().manual_seed(9))
    v = Victim(encode=lambda x: x[None], logits=lambda u: u[0].flatten(1) @ w, steps=1, classes=6)
    x = torch.rand(20, 1, 2, 4, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3
    z = v.scores(x)
    y = z.argmax(1)
    p = Problem(v.scores, x, y, Linf(0.2, space="pixel"))
    assert torch.equal(p.ranked(x, 3), z.argsort(1, descending=True)[:, 1:4])
    assert p.ranked(x, 9).shape == (20, 5) and p.forwards == 40
    gap = (w[:, None, :] - w[:, y][:, :, None]).abs().sum(0)  # of the scores of two classes, at the corner between them
    best = torch.where(torch.arange(6) == y[:, None], -math.inf, z - z.gather(1, y[:, None]) + 0.2 * gap).amax(1)
    runs = [attack(apgd, v, Linf(0.2, space="pixel"), x, y, steps=20, loss="targeted", batch=b) for b in (20, 1)]
    assert runs[0].robust == runs[1].robust == tuple((best <= 0).tolist()) and 0 < sum(runs[0].robust) < 20
    one = attack(apgd, v, Linf(0.2, space="pixel"), x, y, steps=20, loss="targeted", targets=1, drop=False)
    assert one.backwards == 20 * 20 and one.forwards == 20 * (1 + 1 + 21 + 1)


def test_noise_in_every_ball_stays_in_it_and_reaches_its_edge():
    v, _ = linear("pixel")
    x = torch.full((8, 1, 3, 4), 0.5)
    y = v.scores(x).argmax(1)
    for ball in (Linf(0.1, space="pixel"), L2(0.1, space="pixel")):
        run = attack(noise, v, ball, x, y, draws=3, corners=True, keep=True, drop=False)
        d = (run.adversarial - x).flatten(1)
        size = d.abs().amax(1) if ball.norm == "linf" else d.norm(dim=1)
        assert torch.allclose(size, torch.full((8,), 0.1), atol=1e-6)


def shortest_rays(fools, draw, x, eps, box, queries, tolerance):
    """RayS of one flat image, written out: final length, direction, queries asked; `draw` gives signs of k blocks."""
    lo, hi = box
    asked = 0

    def ask(sign, length):
        nonlocal asked
        asked += 1
        return fools((x + np.float32(length) * sign).clip(lo, hi))

    sign, best, level, k, started = np.ones_like(x), hi - lo, 1, 0, False
    while asked < queries and best > eps:
        new = sign.copy()
        if started:
            new[k * len(x) // level : (k + 1) * len(x) // level] *= -1
        else:
            for b, s in enumerate(draw(level)):
                new[b * len(x) // level : (b + 1) * len(x) // level] = s
        k += 1
        if k == level:
            level, k = min(2 * level, len(x)), 0
        if not ask(new, best):
            continue
        sign, started = new, True
        if asked < queries and ask(sign, eps):
            return eps, sign, asked
        short = eps
        while asked < queries and best - short > tolerance * (hi - lo):
            middle = (short + best) / 2
            short, best = (short, middle) if ask(sign, middle) else (middle, best)
    return best, sign, asked


@pytest.mark.parametrize("space", ["pixel", "encoded"])
def test_rays_is_the_published_search(space):
    """Image by image the same as the search of one image at a time: same result, same queries, same point."""
    w = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
    x = torch.rand(30, 1, 2, 4, generator=torch.Generator().manual_seed(3))

    def classes(u):  # decisions alone
        return torch.nn.functional.one_hot((u.movedim(1, 0).flatten(1) @ w).argmax(1), 3).float()

    v = Victim(encode=lambda x: torch.stack([x, 1 - x]), logits=classes, steps=2, classes=3)
    y = v.scores(x).argmax(1)
    threat, knobs = Linf(0.05, space=space), {"queries": 90, "tolerance": 2e-3}
    run = attack(rays, v, threat, x, y, keep=True, seed=7, **knobs)
    u0 = (x if space == "pixel" else v.encode(x)).movedim(AXIS[space], 0)
    f, queries = v.of(space), 0
    for i, image in enumerate(u0):

        def fools(u, image=image, label=y[i]):
            return int(f(torch.tensor(u).view(image.shape).unsqueeze(AXIS[space])).argmax()) != label

        def draw(blocks, stream=Streams(7, [i])):  # noqa: B008
            return stream.uniform(torch.zeros(1, blocks), 0)[0].sign().tolist()

        best, sign, asked = shortest_rays(fools, draw, image.flatten().numpy(), 0.05, (0, 1), **knobs)
        assert run.robust[i] == (best > 0.05)
        found = run.adversarial.movedim(AXIS[space], 0)[i].flatten()
        if best <= 0.05:
            assert torch.equal(found, (image.flatten() + 0.05 * torch.tensor(sign)).clamp(0, 1))
        queries += asked
    assert 0 < sum(run.robust) < 30 and run.forwards == queries + 60  # and one call before, one after
    assert run.backwards == 0


@pytest.mark.parametrize("ball", [Linf, L2])
def test_rays_finds_nearly_all_that_there_is_without_scores(ball):
    """Two linear classes told as decisions: fooled where the closed-form distance is a little below the radius, never
    above it. Square, which goes by scores, finds next to nothing here."""
    w = torch.randn(12, generator=torch.Generator().manual_seed(4)).sign() * 0.25  # an L2 optimum is a corner too
    x = torch.rand(60, 1, 3, 4, generator=torch.Generator().manual_seed(5)) * 0.2 + 0.4  # nothing is cut to the box

    def logits(u):
        s = u[0].flatten(1) @ w
        return torch.nn.functional.one_hot((s > float(x.flatten(1).mean(0) @ w)).long(), 2).float()

    v = Victim(encode=lambda x: x[None], logits=logits, steps=1, classes=2)
    y = v.scores(x).argmax(1)
    away = (x.flatten(1) @ w - x.flatten(1).mean(0) @ w).abs() / (w.abs().sum() if ball is Linf else w.norm())
    eps = float(away.median())
    run = attack(rays, v, ball(eps, space="pixel"), x, y, queries=400, keep=True)
    held = torch.tensor(run.robust)
    assert all(run.clean) and held[away > eps * 1.0001].all()
    assert not held[away < eps * 0.99].any()
    if ball is Linf:
        blind = attack(square, v, ball(eps, space="pixel"), x, y, queries=400)
        assert sum(blind.robust) > sum(run.robust) + 5


def test_rays_refuses_a_ball_of_flips():
    v, _ = linear("pixel")
    x = torch.ones(2, 1, 3, 4)
    with pytest.raises(ValueError, match=r"rays: expected an L-infinity or L2 ball.*use sda"):
        attack(rays, v, L0(2, space="pixel"), x, v.scores(x).argmax(1))
