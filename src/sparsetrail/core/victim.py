"""What is attacked: two stateless functions, and how an adversary may differentiate them."""

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsetrail._shapes import Float
from sparsetrail.core.threat import Space

Mode = Literal["eval", "train"]


@dataclass(frozen=True, kw_only=True)
class Route:
    """How the adversary differentiates: another backward behind the same forward, which stays equal to the bit.

    `neuron` names the backward of the neurons, with a setting after a colon: a surrogate ('atan:4', 'triangle:1', ...)
    through time, or 'rga', 'bptr', 'hart', 'pdsg', 'assg' and their variants. `encoder` is a backward rule of the
    encoder. `steps` takes the gradient at another number of time steps, and the neuron 'cba' that of ReLUs in the place
    of neurons, which are other forwards (`Victim.stand_in`). What is None is the victim's own.
    """

    neuron: str | None = None
    encoder: str | None = None
    steps: int | None = None

    def __str__(self) -> str:
        parts = (self.neuron, self.encoder and f"encoder {self.encoder}", self.steps and f"T={self.steps}")
        return ", ".join(p for p in parts if p) or "own"


class Memory:
    """What a gradient route remembers of every image from one gradient to the next, a problem long.

    Tensors are [t n ...]. `see` says which images the next call holds; a route then asks `recall` and answers with
    `remember`. Of several copies of an image (noise samples) the first is remembered.
    """

    def __init__(self) -> None:
        self.held: dict[Hashable, Tensor] = {}
        self.count = 0
        self.rows: Tensor | None = None
        self.copies, self.keep = 1, True

    def begin(self, count: int) -> None:
        """Forget everything; `count` images are attacked from now on."""
        self.held.clear()
        self.count, self.rows, self.copies, self.keep = count, None, 1, True

    def see(self, rows: Tensor | None, copies: int = 1, *, keep: bool = True) -> None:
        """The next call holds these images (all if None), each `copies` times; `keep` what it learns."""
        self.rows, self.copies, self.keep = rows, copies, keep

    def recall(self, key: Hashable, like: Float[Tensor, "t n ..."], start: float) -> Float[Tensor, "t n ..."]:
        """What is known of the images of this call, `start` where nothing is."""
        whole = self.held.get(key)
        if whole is None:
            return torch.full_like(like, start)
        part = whole if self.rows is None else whole.index_select(1, self.rows)
        return part if self.copies == 1 else part.repeat(1, self.copies, *[1] * (part.ndim - 2))

    def remember(self, key: Hashable, value: Float[Tensor, "t n ..."]) -> None:
        """What is now known of them."""
        if not self.keep:
            return
        value = value.detach()[:, : value.shape[1] // self.copies]
        if self.rows is None:
            self.held[key] = value
            return
        if key not in self.held:
            self.held[key] = value.new_zeros(len(value), self.count, *value.shape[2:])
        self.held[key] = self.held[key].index_copy(1, self.rows, value)


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A classifier as two stateless functions: the same input gives the same scores, there is nothing to reset.

    `encode` maps pixels [n c h w] in 0..1 to the encoded input [t n c h w]; `logits` maps that to class scores [n k].
    `route` says in words how a gradient flows through the network, `encoding` how it flows through the encoder;
    `mode` is that of BatchNorm while crafting. `random` victims draw fresh noise at every call. `module` is the network
    behind `logits`, where there is one: the trail and some checks need it, attacks never see it. `shortcut` gives the
    scores of pixels by fewer operations than `logits(encode(x))`; `exact` are the logits in float32 where `logits`
    computes in less: the final point of every attack is judged by them. `rewire` gives the same victim with another
    backward; `memory` is what that backward remembers between calls, and `stand_in` says that the forward is another
    one too: its gradient is followed, its scores are not the victim's, which are asked for beside. `codebook` [256 t]
    is the code of every grey level, where the encoder looks at each pixel alone. `reseed` lets what a random victim
    draws from here on depend on a number alone: its audit can then be stopped and go on as if it had not been.
    `time_first` says that `module` keeps no state and that all its tensors are [t n ...] or [t*n ...], as ours are.
    """

    encode: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    steps: int
    classes: int
    name: str = "victim"
    route: str = "own gradient"
    encoding: str = ""
    mode: Mode = "eval"
    random: bool = False
    module: nn.Module | None = None
    shortcut: Callable[[Tensor], Tensor] | None = None
    exact: Callable[[Tensor], Tensor] | None = None
    rewire: Callable[[Route], "Victim"] | None = None
    memory: Memory | None = None
    stand_in: bool = False
    codebook: Tensor | None = None
    reseed: Callable[[int], None] | None = None
    time_first: bool = False

    def draw_by(self, words: str) -> None:
        """Let what it draws from here on depend on these words alone; nothing where it cannot be reseeded."""
        if self.reseed is not None:
            self.reseed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big"))

    def scores(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Class scores of images."""
        return self.logits(self.encode(x)) if self.shortcut is None else self.shortcut(x)

    def of(self, space: Space) -> Callable[[Tensor], Tensor]:
        """The function from the attacked tensor to scores, as an attack sees it."""
        return self.scores if space == "pixel" else self.logits

    def judge(self, space: Space) -> Callable[[Tensor], Tensor]:
        """The same function as it is judged: in float32."""
        exact = self.exact
        if exact is None:
            return self.of(space)
        return (lambda x: exact(self.encode(x))) if space == "pixel" else exact

    def path(self, space: Space) -> str:
        """The gradient route from the scores back to the attacked tensor, in words."""
        return f"{self.route}; {self.encoding}" if space == "pixel" and self.encoding else self.route

    def by(self, route: Route) -> "Victim":
        """The same victim differentiated by another route; ValueError if it cannot be."""
        if route == Route():
            return self
        if self.rewire is None:
            raise ValueError(
                f"{self.name}: expected a victim that can be rewired, found none; its gradient is its own: "
                f"give Victim(rewire=...), or leave the route {route} out"
            )
        return self.rewire(route)


def refuse_train_mode(net: nn.Module | None, name: str, *, parts: bool = True) -> None:
    """ValueError where a network, or one of its `parts`, is in train mode: its scores would depend on the batch.

    Of parts those count that act by it: with running statistics, dropout, our own. A linear head put in later does not.
    """
    if net is not None and (net.training or (parts and any(m.training and _counts(m) for m in net.modules()))):
        where = next(path for path, m in net.named_modules() if m.training and (m is net or _counts(m)))
        found = f"its {where} in train mode" if where else "train mode"
        raise ValueError(f"{name}: expected a network in eval mode, found {found}; call net.eval() first")


def normalised_by_batch(net: nn.Module | None) -> str:
    """The first BatchNorm that takes the statistics of the batch in eval mode too, by its name; '' where none does."""
    for name, m in [] if net is None else net.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
            return name or type(m).__name__
    return ""


def _counts(m: nn.Module) -> bool:
    statistics = getattr(m, "running_mean", None) is not None
    return statistics or "dropout" in type(m).__name__.lower() or hasattr(m, "generator")
