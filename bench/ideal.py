"""The attack step over its ideal: the products its convolutions need, at the rate of this machine's matrix product.

    python bench/ideal.py [--threads 1] [--runs 9] [--weights MODEL]

Counted are the exact taps of forward and input gradient: pairs of an output and an input cell that meet, times the
channels of both, two operations each; taps on the padding do not exist. The rate is the best of square `torch.mm` of
1024 to 2048 on the same threads. So the ideal does nothing but dense products: no neurons, no memory traffic. An engine
that skips inputs that are zero may go below it. Both precisions have an ideal of their own (of bf16 the input gradient
is bf16, the forward fp32); the rival, in fp32, is laid over both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import alternate, begin, case, clock, flags, has_rival, our_attack, precisions, row, save
from torch import Tensor, nn

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """One convolution as it ran: frames, input map, and the layer's numbers."""

    name: str
    frames: int
    height: int
    width: int
    cin: int
    cout: int
    kernel: int
    stride: int
    padding: int

    @property
    def flops(self) -> int:
        """Operations of the forward; the input gradient needs as many."""
        along = [meets(size, self.kernel, self.stride, self.padding) for size in (self.height, self.width)]
        return 2 * self.frames * along[0] * along[1] * self.cin * self.cout


def meets(size: int, kernel: int, stride: int, padding: int) -> int:
    """Pairs of output cell and input cell that meet, along one side of the map."""
    out = (size + 2 * padding - kernel) // stride + 1
    return sum(0 <= o * stride - padding + tap < size for o in range(out) for tap in range(kernel))


def layers(net: nn.Module, u: Tensor) -> list[Layer]:
    """The convolutions of one forward."""
    found: list[Layer] = []

    def look(name: str) -> Callable[..., None]:
        def hook(m: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
            frames, cin, height, width = inputs[0].shape
            side = m.kernel_size[0], m.stride[0], int(m.padding[0])
            found.append(Layer(name, frames, height, width, cin, m.out_channels, *side))

        return hook

    handles = [m.register_forward_pre_hook(look(n)) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        net(u)
    for h in handles:
        h.remove()
    return found


def rate(kind: torch.dtype, device: torch.device, runs: int, sizes: tuple[int, ...]) -> float:
    """Operations a second of the best square matrix product, median over rounds."""
    g = torch.Generator().manual_seed(0)
    pairs = {n: [torch.randn(n, n, generator=g).to(device, kind) for _ in range(2)] for n in sizes}
    jobs = {str(n): (lambda p=p: torch.mm(*p)) for n, p in pairs.items()}
    times = alternate(jobs, runs, lambda: clock(device))
    return max(2 * n**3 / sorted(times[str(n)])[runs // 2] for n in sizes)


def main() -> None:
    a = begin(flags(__doc__, runs=9))
    c = case(a)
    print(c)
    device, kinds = c.x.device, precisions(c.x.device)
    forward = sum(layer.flops for layer in layers(c.net, c.u)) + 2 * c.u.shape[0] * len(c.y) * c.net.fc.weight.numel()
    need = 2 * forward
    jobs = {p: our_attack(c, p) for p in kinds}
    if has_rival(c.spec):
        from rival import rival_attack

        jobs = {"rival": rival_attack(c)} | jobs
    times = alternate(jobs, a.runs, lambda: clock(device))
    rows = []
    sizes = (256,) if a.smoke else (1024, 1536, 2048)
    speeds = {p: rate(TYPES[p], device, a.runs, sizes) for p in kinds}
    for p, speed in speeds.items():  # the forward is fp32 in either
        ideal = forward / speeds["fp32"] + forward / speed
        print(f"{p}: {need / 1e9:.2f} GFLOP, half of them at {speed / 1e9:.0f} GFLOP/s = {1e3 * ideal:.1f} ms")
        facts = {"precision": p, "gflop": f"{need / 1e9:.3f}", "gemm_gflop_s": f"{speed / 1e9:.1f}"}
        facts |= {"ideal_ms": f"{1e3 * ideal:.2f}"} | c.facts()
        over = {k: [s / ideal for s in v] for k, v in times.items()}
        rows.append(
            row(
                f"attack step over the ideal, {p}",
                over.get("rival"),
                over[p],
                unit="x",
                goal="ours <= 4",
                facts=facts,
            )
        )
    save("ideal", rows, a)


if __name__ == "__main__":
    main()
