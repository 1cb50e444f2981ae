"""Networks by specification: build one, and hand it to the adversary as a `Victim`."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import chain
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsetrail.core import Memory, Route, Victim
from sparsetrail.core.precision import products
from sparsetrail.core.victim import refuse_train_mode
from sparsetrail.snn import kernels
from sparsetrail.snn.convolution import Conv2d
from sparsetrail.snn.encode import Encoder
from sparsetrail.snn.engine import NO_BF16, freeze, has_bf16
from sparsetrail.snn.folded import NORMALISATIONS, Dropout, FoldedNet, FoldedNeuron, Readout
from sparsetrail.snn.graphs import Scores, filled
from sparsetrail.snn.kernels import watched
from sparsetrail.snn.neuron import Neuron, NeuronSpec, ruled
from sparsetrail.snn.pools import POOLS, share_of
from sparsetrail.snn.resnet import DEPTHS, Connect, SpikingResNet, Stem
from sparsetrail.snn.routes import NeuronRoute, neuron_route, put_relus, refuse_relus
from sparsetrail.snn.vgg import PLANS, Norm, SpikingVGG
from sparsetrail.snn.workspace import Workspace
from sparsetrail.snn.wrn import SpikingWRN

RESNETS = tuple(f"{family}_resnet{depth}" for family in ("sew", "spiking") for depth in DEPTHS)
VGGS = tuple(f"vgg{depth}" for depth in PLANS)
ARCHITECTURES = (*RESNETS, *VGGS, "wrn16_4")


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """What to build; a setting that would not be read is refused. `width` multiplies all channel counts.

    The stem "imagenet" is 7x7/2 and a 3x3/2 pool (the paper's, on 32x32 images too), "cifar" one 3x3 and no pool; it is
    the ResNets'. `pool` is that of the imagenet stem, or of a VGG, one of POOLS or a mix as in "mix:0.25" (of max);
    None takes the family's own (max, in a VGG avg).
    `connect` is SEW-ResNet's; `norm` and `dropout` are a VGG's. `normalise` is the network's first operation, a name of
    NORMALISATIONS. `readout` averages the scores of all steps or adds them up.
    `exact` switches the fast paths off: neurons step by step under autograd, PyTorch's own convolutions.
    """

    arch: str = "sew_resnet18"
    classes: int = 10
    channels: int = 3
    width: float = 1.0
    stem: Stem = "imagenet"
    pool: str | None = None
    connect: Connect = "add"
    norm: Norm = "batch"
    dropout: float = 0.0
    normalise: str = "none"
    readout: Readout = "mean"
    neuron: NeuronSpec = field(default_factory=NeuronSpec)
    steps: int = 10
    exact: bool = False

    def __post_init__(self) -> None:
        vgg, resnet = self.arch in VGGS, self.arch in RESNETS
        if self.pool is None:
            object.__setattr__(self, "pool", "max" if resnet else "avg" if vgg else "none")
        pool = str(self.pool)
        for name, got, allowed in (
            ("arch", self.arch, ARCHITECTURES),
            ("stem", self.stem, ("imagenet", "cifar") if resnet else ("imagenet",)),
            ("pool", pool.partition(":")[0], POOLS if resnet else POOLS[:-1] if vgg else ("none",)),
            ("connect", self.connect, ("add", "and", "iand") if resnet else ("add",)),
            ("norm", self.norm, ("batch", "none") if vgg else ("batch",)),
            ("normalise", self.normalise, ("none", *NORMALISATIONS)),
            ("readout", self.readout, ("mean", "sum")),
        ):
            if got not in allowed:
                of = "" if name == "arch" or resnet else f" in a {self.arch}"
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}{of}, got {got!r}")
        if self.arch.startswith("spiking") and self.connect != "add":
            raise ValueError(f"connect: a Spiking-ResNet adds currents; {self.connect!r} is for SEW-ResNet")
        share_of(pool)
        if self.stem == "cifar" and pool not in ("max", "none"):  # max, the default, is not read there
            raise ValueError(f"pool: the cifar stem has no pool; {pool!r} is for the imagenet stem; leave it out")
        if self.neuron.kind == "relu" and pool in ("sum", "stochastic"):
            raise ValueError(f"pool: {pool} is made of spikes and a ReLU network has none; take avg, max, mix or conv")
        if not 0 <= self.dropout < 1 or (self.dropout and not vgg):
            raise ValueError(f"dropout: expected a share 0..1 in a VGG, 0 elsewhere, got {self.dropout} in {self.arch}")
        if self.normalise != "none" and len(NORMALISATIONS[self.normalise][0]) not in (1, self.channels):
            raise ValueError(f"normalise: {self.normalise} is for 3 channels, got {self.channels}; try half or none")
        if min(self.classes, self.channels, self.steps) < 1 or not 0 < self.width <= 64:
            raise ValueError(
                f"expected positive classes, channels, steps and a width up to 64, got classes={self.classes}, "
                f"channels={self.channels}, steps={self.steps}, width={self.width}"
            )


def build(spec: NetSpec, *, seed: int = 3407) -> FoldedNet:
    """A freshly initialised network; the same spec and seed give the same weights, no other stream is drawn from."""
    common: dict[str, Any] = {
        k: getattr(spec, k)
        for k in ("classes", "channels", "width", "normalise", "readout", "neuron", "steps", "exact")
    }
    pool: Any = spec.pool  # never None: NetSpec filled in the family's own
    with torch.random.fork_rng(devices=[]):  # PyTorch's layers draw weights of their own, overwritten below
        if spec.arch in VGGS:
            depth = int(spec.arch.removeprefix("vgg"))
            net: FoldedNet = SpikingVGG(depth=depth, pool=pool, norm=spec.norm, dropout=spec.dropout, **common)
        elif spec.arch in RESNETS:
            family, depth = spec.arch.split("_resnet")
            net = SpikingResNet(
                depth=int(depth), sew=family == "sew", stem=spec.stem, pool=pool, connect=spec.connect, **common
            )
        else:
            net = SpikingWRN(**common)
    for m in net.modules():
        if isinstance(m, Conv2d):
            m.exact = spec.exact
    net.initialise(torch.Generator().manual_seed(seed))
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def victim(
    net: nn.Module,
    encode: Encoder,
    *,
    name: str = "victim",
    classes: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Victim:
    """A network and its encoder as a `Victim` in eval mode; a net in train mode is refused at every call.

    Scores are those of `net` as it is at the call, without gradients of its weights. On a GPU its steps are replayed as
    CUDA graphs; a gradient that is differentiated again (`create_graph`) is computed without them.

    `precision="bf16"` crafts faster: the products of the convolutions' input gradients are bf16, the scores stay those
    of fp32 to the bit. ValueError where the device has no bf16.

    `victim.by(Route(...))` takes the routes of `routes`, backward rules of the encoder, and other steps: the same
    weights and code run for T' steps, which is another forward, as is that of cba. Routes give first derivatives, and
    no recordings.
    """
    if not isinstance(net, nn.Module):
        found = f"a {type(net).__name__}; give its .net" if hasattr(net, "net") else type(net).__name__
        raise ValueError(f"{name}: expected a network, an nn.Module, got {found}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision: expected 'fp32' or 'bf16', got {precision!r}")
    if classes is None and not hasattr(net, "fc"):
        raise ValueError(f"{name}: expected the number of classes, which this network does not tell; pass classes=")
    k = classes if classes is not None else net.fc.out_features  # type: ignore[union-attr]
    half, space = precision == "bf16", Workspace()
    if half:
        _check_bf16(net)

    def by(route: Route) -> Victim:
        code = encode if route.encoder is None or route.encoder == encode.backward else encode.route(route.encoder)
        code = code if route.steps is None else code.over(route.steps)
        rule = None if route.neuron is None else _neurons(net, route.neuron, name)
        memory = Memory() if rule is not None and rule.remembers else None
        stretched = None if code.steps == encode.steps else code.steps
        relus = rule is not None and rule.name == "cba"
        if (stretched or relus) and freeze(net) is net:
            raise ValueError(
                f"{name}: expected a network of PyTorch's and our own modules to run "
                f"{f'for {stretched} steps' if stretched else 'with ReLUs'}, found others; leave that out of the route"
            )
        if relus:
            refuse_relus(net, name)
        recorded: dict[str, Scores] = {}
        known = _Known()

        def run(x: Tensor, task: str) -> Tensor:
            refuse_train_mode(net, name, parts=False)

            def plain(x: Tensor, seen: bool = False) -> Tensor:
                refuse_train_mode(net, name)
                # who watches this very network sees it called
                now = net if seen and not (stretched or relus) else freeze(net, space, half=half)
                if stretched:
                    _stretch(now, stretched)
                if relus:
                    put_relus(now)
                exact = products(tf32=False) if x.is_cuda else contextlib.nullcontext()
                backward = ruled(None if rule is None or relus else rule.rule(memory))
                with exact, backward:
                    return now(x) if task == "logits" else now.scores(x, code)  # type: ignore[operator]

            # what autocast makes of weights it keeps, and lets go of, by itself
            if not x.is_cuda or rule is not None or stretched or torch.is_autocast_enabled("cuda"):
                seen, axis = watched(*net.modules()), 1 if task == "logits" else 0
                if seen or not x.is_cuda or memory is not None or kernels.overseen(x):
                    return plain(x, seen)
                return plain(filled(x, axis))[: x.shape[axis]]  # as in the victim's recordings, whose scores these are
            key = f"{task} {kernels.switched_on()}"
            z, made = None, recorded.get(key)
            if made is not None and made.ready(x):
                z = made(x)  # the GPU works while the network is looked at; what an older one said is thrown away
            changed, seen = known.look(net)
            if changed:  # a recording follows values in their places, not new tensors or settings
                recorded.clear()
            if seen:
                return plain(x, True)
            if z is None or changed:
                made = Scores(plain, axis=1 if task == "logits" else 0, keep=known.kept)
                z = recorded.setdefault(key, made)(x)
            return z

        return Victim(
            encode=code,
            logits=lambda u: run(u, "logits"),
            shortcut=(lambda x: run(x, "scores")) if hasattr(net, "scores") and not code.random else None,
            steps=code.steps,
            classes=k,
            name=name,
            route=describe(net, rule)
            + (f", T={code.steps}" if stretched else "")
            + (", input gradients in bf16" if half else ""),
            encoding=f"{code.name} encoder: {code.backward}",
            random=code.random,
            module=net,
            rewire=lambda other: by(_both(route, other)),
            memory=memory,
            stand_in=bool(stretched or relus),
            codebook=code.codebook,
            reseed=code.reseed if code.draws is not None else None,
            time_first=isinstance(net, FoldedNet),
        )

    return by(Route())


def _both(route: Route, other: Route) -> Route:
    """`other`, and `route` where it leaves things as they are."""
    return Route(**{f.name: getattr(route if getattr(other, f.name) is None else other, f.name) for f in fields(Route)})


def _neurons(net: nn.Module, text: str, name: str) -> NeuronRoute:
    found = neuron_route(text)
    if not any(isinstance(m, Neuron) for m in net.modules()):
        raise ValueError(f"{name}: expected a network of our neurons for the route {text}, found none in it")
    return found


def _stretch(twin: nn.Module, steps: int) -> None:
    for m in twin.modules():
        if isinstance(m, FoldedNet | FoldedNeuron | Dropout):
            m.steps = steps


@contextlib.contextmanager
def running_for(net: nn.Module, steps: int) -> Iterator[None]:
    """Inside this block, `net` runs for another number of steps."""
    was = {m: m.steps for m in net.modules() if isinstance(m, FoldedNet | FoldedNeuron | Dropout)}
    _stretch(net, steps)
    try:
        yield
    finally:
        for m, own in was.items():
            m.steps = own


class _Known:
    """A network as it was seen last. Looked at in every step on a GPU, after its launch.

    What a recording reads is kept alive, so that an older one may be launched before it is known to be older.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.held: list[dict[str, Any]] = []  # what the modules refer to by name
        self.values: list[Any] = []  # and what that was
        self.hooks: list[dict[int, Any]] = []
        self.replaced = False  # has one another `forward`
        self.tensors: list[Tensor] = []
        self.places: list[Any] = []
        self.kept: list[Tensor] = []

    def look(self, net: nn.Module) -> tuple[bool, bool]:
        """Has a module, a tensor's place or a setting changed since the last time? Is one `watched`?

        What is changed inside an object that is neither a module nor a tensor, such as a list, is not seen.
        """
        values, places = list(chain.from_iterable(map(dict.values, self.held))), _places(self.modules, self.tensors)
        same = self.modules[:1] == [net] and len(values) == len(self.values) and places == self.places
        if same and all(map(is_, values, self.values)):
            return False, self.replaced or any(self.hooks) or watched()
        old = self.values
        self.modules = list(net.modules())
        self.held = [d for m in self.modules for d in (m.__dict__, m._parameters, m._buffers, m._modules)]
        self.values = list(chain.from_iterable(map(dict.values, self.held)))
        self.hooks = [
            d
            for m in self.modules
            for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self.replaced = any("forward" in m.__dict__ for m in self.modules)
        self.tensors = [t for t in self.values if isinstance(t, Tensor) and t.layout == torch.strided]
        self.places, self.kept = _places(self.modules, self.tensors), [t.detach() for t in self.tensors]
        same = same and len(self.values) == len(old) and all(map(_as_good, self.values, old))
        return not same, watched(*self.modules)


def _places(modules: list[nn.Module], tensors: list[Tensor]) -> list[Any]:
    """Of what kind modules are, and where and how tensors lie."""
    return [
        *map(type, modules),
        *map(Tensor.data_ptr, tensors),
        *map(Tensor.stride, tensors),
        *map(Tensor.size, tensors),
    ]


def _as_good(a: Any, b: Any) -> bool:
    """Is it all the same to a recording which of two attributes a module has?"""
    plain, of_no_matter = (bool, int, float, str, NeuronSpec, type(None)), (torch.Generator, Workspace)
    if a is b or (isinstance(a, of_no_matter) and isinstance(b, (*of_no_matter, type(None)))):
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_as_good, a, b))
    return type(a) is type(b) and isinstance(a, plain) and a == b


def _check_bf16(net: nn.Module) -> None:
    device = next(net.parameters()).device
    if freeze(net) is net:
        raise ValueError(
            "precision: bf16 is for networks of PyTorch's and our own modules, found others; leave it at fp32"
        )
    fits = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bf16()
    if not fits:
        raise ValueError(NO_BF16.format(device.type))


def describe(net: nn.Module, rule: NeuronRoute | None = None) -> str:
    """The gradient route of a network's neurons in words, e.g. 'BPTT atan(2), hard reset detached'."""
    specs = {m.spec for m in net.modules() if isinstance(m, Neuron)}
    words = [(rule or NeuronRoute("own")).words(s) for s in sorted(specs, key=str)]
    return " + ".join(dict.fromkeys(words)) or "own gradient"
