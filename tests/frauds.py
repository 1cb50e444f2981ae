"""A zoo of victims that are broken or deliberately masked, each built around a small honest one.

Honest nets see 8x8 pictures of clothes in shades of 256 grey levels; they are trained here, in seconds, and reach
about 80 %. `FRAUDS` names for every fraud the check that must ring, and how loudly.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrail import data
from sparsetrail.checks import Case
from sparsetrail.core import Linf, Space, Victim, cross_entropy
from sparsetrail.snn.encode import Encoder, direct, phase, poisson
from sparsetrail.snn.neuron import Neuron, NeuronSpec
from sparsetrail.snn.surrogate import Surrogate

CLASSES = 10


@functools.cache
def pictures(split: str = "train") -> tuple[Tensor, Tensor]:
    """Fashion-MNIST in 8x8 pixels of 256 grey levels."""
    found = data.load("fashion-mnist-slice", split)
    x = F.avg_pool2d(found.images[..., 2:26, 2:26].float(), 3).round() / 255
    return x, found.labels


class Net(nn.Module):
    """conv - norm - neuron, twice, and a read-out averaged over time; plain ReLU without a neuron."""

    def __init__(self, spec: NeuronSpec | None, *, norm: bool = False, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.act, self.act2 = (nn.ReLU(), nn.ReLU()) if spec is None else (Neuron(spec), Neuron(spec))
        self.fc = nn.Linear(2 * width * 16, CLASSES)

    def frames(self, u: Tensor) -> Tensor:
        """Scores of every time step."""
        t, n = u.shape[:2]
        h = self.norm(self.first(u.flatten(0, 1)))
        h = self.act(h.unflatten(0, (t, n)))
        h = self.act2(self.second(h.flatten(0, 1)).unflatten(0, (t, n)))
        return self.fc(h.flatten(2))

    def forward(self, u: Tensor) -> Tensor:
        return self.frames(u).mean(0)


IF = NeuronSpec(surrogate=Surrogate("atan", 2.0), threshold=1.0)


def trained(
    net: nn.Module,
    encode: Encoder,
    *,
    seed: int,
    epochs: int = 4,
    eps: float = 0.0,
    space: Space = "pixel",
    lr: float = 5e-3,
) -> Any:
    """Adam on the slice; with `eps` on PGD points of three steps."""
    x, y = pictures()
    g = torch.Generator().manual_seed(seed)
    best = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=g).split(64):
            u, labels = encode(x[i]), y[i]
            if eps and space == "pixel":
                v = x[i] + eps * (2 * torch.rand(x[i].shape, generator=g) - 1)
                for _ in range(3):
                    v = v.detach().clamp(0, 1).requires_grad_()
                    (grad,) = torch.autograd.grad(cross_entropy(net(encode(v)), labels).sum(), v)
                    v = torch.minimum(torch.maximum(v + eps / 2 * grad.sign(), x[i] - eps), x[i] + eps)
                u = encode(v.detach().clamp(0, 1))
            best.zero_grad()
            F.cross_entropy(net(u), labels).backward()
            best.step()
    return net.eval().requires_grad_(False)


Kind = Literal["ann", "norm", "direct", "phase", "hardened"]
ENCODE: dict[str, Encoder] = {
    "ann": direct(steps=1), "norm": direct(steps=1), "direct": direct(steps=4), "phase": phase(steps=8),
    "hardened": direct(steps=4),
}  # fmt: skip


@functools.cache
def net(kind: Kind, seed: int = 0) -> Net:
    """A trained honest network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Net(None if kind in ("ann", "norm") else IF, norm=kind == "norm")
    hard = kind == "hardened"
    return trained(fresh, ENCODE[kind], seed=seed, eps=16 / 255 if hard else 0.0, epochs=3 if hard else 2)


def honest(kind: Kind, seed: int = 0) -> Victim:
    """An honest victim."""
    own, encode = net(kind, seed), ENCODE[kind]
    return Victim(encode=encode, logits=own, steps=encode.steps, classes=CLASSES, name=kind, module=own)


def case(victim: Victim, *, eps: float = 8 / 255, space: Space = "pixel", n: int = 64, eot: int = 1) -> Case:
    """Test pictures to check a victim on."""
    x, y = pictures("test")
    return Case(victim, Linf(eps, space=space), x[:n], y[:n], eot=eot)


class _Bent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.rule = rule
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.rule(grad), None


def bent(x: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """`x` itself, whose gradient a rule replaces."""
    return _Bent.apply(x, rule)


def misled(kind: Kind, rule: Callable[[Tensor], Tensor]) -> Victim:
    """An honest victim, the gradient at its encoded input bent."""
    base = honest(kind)
    return replace(base, logits=lambda u: base.logits(bent(u, rule)), module=None)


def distance(u: Tensor) -> Tensor:
    """L-infinity distance of [t n c h w] frames to the nearest test picture, shaped to multiply them."""
    known = pictures("test")[0][:64].flatten(1)
    flat = u.detach().flatten(2)
    return torch.stack([torch.cdist(f, known, p=float("inf")).amin(1) for f in flat])[..., None, None, None]


def by_distance(rule: Callable[[Tensor], Tensor]) -> Victim:
    """The gradient multiplied by a rule of the distance to the test pictures."""
    base = honest("ann")
    return replace(base, logits=lambda u: base.logits(bent(u, lambda g: g * rule(distance(u)))), module=None)


def with_neuron(spec: NeuronSpec) -> Net:
    """The trained network of direct code, its neurons exchanged."""
    other = Net(spec)
    other.load_state_dict(net("direct").state_dict())
    return other.eval().requires_grad_(False)


def hot_scores() -> Victim:
    base = honest("ann")
    return replace(base, logits=lambda u: 1000 * base.logits(u))


def probabilities() -> Victim:
    base = honest("ann")
    return replace(base, logits=lambda u: base.logits(u).softmax(1))


def rounding_encoder() -> Victim:
    return replace(honest("ann"), encode=lambda x: (x * 15).round().unsqueeze(0) / 15, encoding="16 levels: identity")


def integer_input() -> Victim:
    base = honest("ann")
    return replace(base, logits=lambda u: base.logits((u * 15).long() / 15))


def zero_layer() -> Victim:
    return misled("ann", torch.zeros_like)


def dead_surrogate() -> Victim:
    own = with_neuron(replace(IF, surrogate=Surrogate("rectangle", 1e-5)))
    return replace(honest("direct"), logits=own, module=own)


class Contrary(nn.Module):
    """Neurons whose surrogate has the wrong sign."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return bent(self.inner(x), torch.neg)


def contrary_surrogate() -> Victim:
    own = with_neuron(IF)
    own.act = Contrary(own.act)
    return replace(honest("direct"), logits=own.eval(), module=own)


class Severed(nn.Module):
    """Neurons that keep their graph in train mode only, as some libraries' do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out if self.training else out.detach()


def severed_in_eval() -> Victim:
    own = with_neuron(IF)
    own.act2 = Severed(own.act2)
    return replace(honest("direct"), logits=own.eval(), module=own)


def exported() -> Victim:
    base = honest("ann")
    return replace(base, logits=lambda u: torch.from_numpy(base.logits(u).detach().numpy().copy()).requires_grad_())


def random_scores() -> Victim:
    base, g = honest("ann"), torch.Generator().manual_seed(0)

    def logits(u: Tensor) -> Tensor:
        z = base.logits(u)
        return z + 0.5 * torch.randn(z.shape, generator=g)

    return replace(base, logits=logits)


def undeclared_poisson() -> Victim:
    return replace(honest("direct"), encode=poisson(steps=4), encoding="poisson encoder: identity")


def membrane_kept() -> Victim:
    base, own, held = honest("direct"), net("direct"), {}

    def logits(u: Tensor) -> Tensor:  # a membrane that goes on is a longer sequence
        before = held.get(u.shape, u[:0])
        held[u.shape] = u.detach()
        return own.frames(torch.cat([before, u]))[-len(u) :].mean(0)

    return replace(base, logits=logits)


def batch_centred() -> Victim:
    base = honest("ann")

    def logits(u: Tensor) -> Tensor:
        z = base.logits(u)
        return z - z.mean(0)

    return replace(base, logits=logits)


def noise_by_place() -> Victim:
    base = honest("ann")

    def logits(u: Tensor) -> Tensor:
        z = base.logits(u)
        return z + torch.randn(z.shape, generator=torch.Generator().manual_seed(0))

    return replace(base, logits=logits)


def train_mode() -> Victim:
    own = copy.deepcopy(net("norm")).train()
    return replace(honest("norm"), logits=own, module=own)


class Drifting(nn.BatchNorm2d):
    """Running statistics that move at every call, whatever the mode."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean.lerp_(input.detach().mean((0, 2, 3)), 0.05)
        return super().forward(input)


def drifting_statistics() -> Victim:
    own = copy.deepcopy(net("norm"))
    drifting = Drifting(8)
    drifting.load_state_dict(own.norm.state_dict())
    own.norm = drifting
    own = own.eval().requires_grad_(False)
    return replace(honest("norm"), logits=own, module=own)


def tied_readout() -> Victim:
    base = honest("ann")

    def logits(u: Tensor) -> Tensor:
        z = base.logits(u)
        return z + (z.round() - z).detach()

    return replace(base, logits=logits)


def rejecting() -> Victim:
    """Abstains where it is unsure: all scores 0, a tie; the gradient stays."""
    base = honest("ann")

    def logits(u: Tensor) -> Tensor:
        z = base.logits(u)
        two = z.topk(2, 1).values
        return z + torch.where((two[:, 0] - two[:, 1] > 1.0)[:, None], torch.zeros_like(z), -z).detach()

    return replace(base, logits=logits)


def hard_labels() -> Victim:
    """Tells its decision and nothing else; the gradient is that of noise."""
    base, w = honest("ann"), torch.randn(64, CLASSES, generator=torch.Generator().manual_seed(0))

    def logits(u: Tensor) -> Tensor:
        best = F.one_hot(base.logits(u).detach().argmax(1), CLASSES)
        return best.float() + 5e-4 * (u[0].flatten(1) @ w)

    return replace(base, logits=logits, module=None)


def nan_off_the_data() -> Victim:
    base = honest("ann")
    return replace(base, logits=lambda u: base.logits(u) + 0 * (1e-4 - distance(u)[0, :, 0, 0]).sqrt())


def counting_encoder() -> Victim:
    base, shown = honest("phase"), [0]

    def encode(x: Tensor) -> Tensor:
        shown[0] += 10
        return base.encode(x).roll(-shown[0], 0)

    return replace(base, encode=encode)


def detaching_encoder() -> Victim:
    base = honest("direct")
    return replace(base, encode=lambda x: base.encode(x).detach().requires_grad_(), encoding="direct encoder: identity")


def noisy_backward() -> Victim:
    g = torch.Generator().manual_seed(0)
    return misled("ann", lambda grad: grad + grad.abs().amax() * torch.randn(grad.shape, generator=g))


def underflow() -> Victim:
    return misled("ann", lambda grad: grad * 1e-40)


def nan_backward() -> Victim:
    base = honest("ann")
    return replace(base, logits=lambda u: base.logits(u + 0 * (0 * u).sqrt()), module=None)


def searching_forward() -> Victim:
    base = honest("ann")

    def logits(u: Tensor) -> Tensor:
        with torch.enable_grad():
            v = u.detach().clone().requires_grad_()
            (g,) = torch.autograd.grad(base.logits(v).amax(1).sum(), v)
        return base.logits(u + 0.02 * g.sign())

    return replace(base, logits=logits)


def wrong_classes() -> Victim:
    return replace(honest("ann"), classes=12)


def contrary_near() -> Victim:
    return by_distance(lambda d: torch.where(d < 60 / 255, -1.0, 1.0))


def contrary_off_the_data() -> Victim:
    return by_distance(lambda d: torch.where(d > 1e-4, -1.0, 1.0))


def contrary_far() -> Victim:
    return by_distance(lambda d: torch.where(d > 8.5 / 255, -1.0, 1.0))


def few_entries() -> Victim:
    def rule(g: Tensor) -> Tensor:
        flat = g.flatten(2).abs()
        return g * (flat >= flat.topk(3, 2).values[..., -1:]).view(g.shape)

    return misled("ann", rule)


def strange_gradient() -> Victim:
    stranger = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return misled("ann", lambda g: stranger[torch.arange(g.shape[1]) % 64].expand(g.shape).clone())


class Winners(nn.Module):
    """k-winners-take-all: all but the largest share of activations are zero. Xiao et al. 2020, arXiv:1905.10510."""

    def forward(self, h: Tensor) -> Tensor:
        least = h.topk(max(1, h.shape[-1] // 50), -1).values[..., -1:]
        return torch.where(h >= least, h, 0.0)


@functools.cache
def winners_take_all() -> Victim:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = (nn.Linear(64, 512), Winners(), nn.Linear(512, 512), Winners(), nn.Linear(512, 512), Winners())
        own = nn.Sequential(nn.Flatten(2), *wide, nn.Linear(512, CLASSES))
    with torch.no_grad():
        for p in own.parameters():
            if p.ndim == 2:
                p *= 1.5  # the sharper the competition, the more discontinuous

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = own

        def forward(self, u: Tensor) -> Tensor:
            return self.own(u).mean(0)

    whole = trained(Mean(), direct(steps=1), seed=0, lr=1e-3)
    return replace(honest("ann"), logits=whole, module=whole, name="k-WTA")


def ripples() -> Victim:
    base = honest("ann")
    return replace(base, logits=lambda u: base.logits(u + 1e-3 * torch.sin(1e5 * u)), module=None)


def stale_shortcut() -> Victim:
    base, other = honest("ann"), net("ann", 1)
    return replace(base, shortcut=lambda x: other(x.unsqueeze(0)))


def one_way_phase() -> Victim:
    return misled("phase", torch.ones_like)


def too_few_samples() -> Victim:
    base, g = honest("norm"), torch.Generator().manual_seed(0)

    def logits(u: Tensor) -> Tensor:
        return base.logits(u + 1e-3 * torch.sin(4e3 * u + 6.3 * torch.rand(u.shape, generator=g)))

    return replace(base, logits=logits, random=True, module=None)


@dataclass(frozen=True)
class Fraud:
    """A broken victim, the check that must ring and at what level."""

    build: Callable[[], Victim]
    rings: str
    level: str = "fail"
    eps: float = 8 / 255


FRAUDS: dict[str, Fraud] = {
    "scores x 1000": Fraud(hot_scores, "G4"),
    "softmax in the model": Fraud(probabilities, "S9", "warn"),
    "rounding encoder": Fraud(rounding_encoder, "G1"),
    "input cast to integers": Fraud(integer_input, "G3"),
    "layer with zero gradient": Fraud(zero_layer, "G1"),
    "dead surrogate": Fraud(dead_surrogate, "G1"),
    "surrogate of the wrong sign": Fraud(contrary_surrogate, "G5"),
    "no graph in eval mode": Fraud(severed_in_eval, "G3"),
    "exported through numpy": Fraud(exported, "G3"),
    "k winners take all": Fraud(winners_take_all, "C13", eps=16 / 255),
    "random scores": Fraud(random_scores, "S4"),
    "Poisson not declared": Fraud(undeclared_poisson, "S4"),
    "membrane not reset": Fraud(membrane_kept, "S3"),
    "scores centred on the batch": Fraud(batch_centred, "S5"),
    "noise by place in the batch": Fraud(noise_by_place, "S5"),
    "network in train mode": Fraud(train_mode, "S2"),
    "drifting statistics": Fraud(drifting_statistics, "S2"),
    "tied read-out": Fraud(tied_readout, "S8", "warn"),
    "NaN off the data": Fraud(nan_off_the_data, "S0"),
    "encoder goes on counting": Fraud(counting_encoder, "S3e"),
    "encoder detaches": Fraud(detaching_encoder, "G3"),
    "noise in the backward": Fraud(noisy_backward, "G-rand"),
    "gradient underflows": Fraud(underflow, "G1"),
    "NaN in the backward": Fraud(nan_backward, "G-nan"),
    "search in the forward": Fraud(searching_forward, "S10"),
    "wrong number of classes": Fraud(wrong_classes, "S9"),
    "wrong sign near the data": Fraud(contrary_near, "C3"),
    "wrong sign after a step": Fraud(contrary_off_the_data, "C1"),
    "wrong sign far from the data": Fraud(contrary_far, "C2"),
    "few gradient entries": Fraud(few_entries, "G2", "warn"),
    "gradient of a stranger": Fraud(strange_gradient, "G5", "warn"),
    "ripples": Fraud(ripples, "G7", "warn"),
    "shortcut to another net": Fraud(stale_shortcut, "S6"),
    "one-way gradient, phase code": Fraud(one_way_phase, "C13", eps=4 / 255),
    "too few noise samples": Fraud(too_few_samples, "C14", "warn", 16 / 255),
}
