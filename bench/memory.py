"""Peak memory of one attack step above the weights against SpikingJelly 2.0.0, each side in processes of its own.

    python bench/memory.py [--runs 3] [--weights MODEL] [--device cuda]

On a CPU this is resident memory as Linux counts it, so that buffers of libraries are seen too: the peak (VmHWM, set
back just before) less what was resident with the network loaded once, after a warm-up of libraries on another, tiny
network and after free memory was given back (`malloc_trim`). Two figures: above the weights, where every copy of the
weights that a side makes for itself counts against it; and above what stays between steps once a step at batch 1 was
made: copies of the weights, gradients of the parameters. On a GPU it is PyTorch's allocator, `max_memory_allocated`, of
three steps at either size, so that our recordings of the step (CUDA graphs) are in it.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import Case, begin, build, case, flags, has_rival, precisions, row, save, victim
from torch import Tensor
from torch.nn import functional as F

MB = 1e6
Step = Callable[[Tensor, Tensor], object]


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM the peak since it was set back."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{name}:"):
            return int(text.split()[1]) * 1024
    raise RuntimeError(f"expected {name} in /proc/self/status (Linux), found none")


def settled(device: torch.device) -> int:
    """Bytes in use once everything free was given back; the peak starts again from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # 32 MB a stream on a Hopper: both sides make theirs anew
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: torch.device) -> int:
    """Most bytes in use since `settled`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")


def our_step(c: Case, precision: str) -> Step:
    """The attack step of `net`, on any batch."""
    target = victim(c.net, c.encode, precision=precision)  # type: ignore[arg-type]

    def step(u: Tensor, y: Tensor) -> object:
        point = u.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(target.logits(point), y, reduction="sum"), point)

    return step


def rival_step(c: Case, frozen: bool) -> Step:
    """The rival's, as `rival.rival_attack`, on any batch; from here on its weights are the only ones."""
    from rival import reference_net

    net, reset = reference_net(c.spec, c.net.state_dict(), c.x.device)
    net.eval().requires_grad_(not frozen)
    c.net.to("meta")

    def step(u: Tensor, y: Tensor) -> None:
        point = u.clone().requires_grad_()
        net.zero_grad()
        F.cross_entropy(net(point), y).backward()
        reset()

    return step


def warm_libraries(c: Case, which: str) -> None:
    """Load and start what a step needs, on another network that is let go."""
    if which in ("rival", "frozen"):
        other = replace(c, net=build(c.spec).to(c.x.device))
        rival_step(other, which == "frozen")(c.u[:, :1], c.y[:1])
    else:
        our_step(replace(c, net=build(replace(c.spec, width=0.25)).to(c.x.device).eval()), which)(c.u[:, :1], c.y[:1])


def measure(c: Case, which: str) -> dict[str, float]:
    """Megabytes of the full step above the weights, and above what stays after a step at batch 1."""
    device = c.x.device
    warm_libraries(c, which)
    step = rival_step(c, which == "frozen") if which in ("rival", "frozen") else our_step(c, which)
    weights, times = settled(device), 3 if device.type == "cuda" else 1
    for _ in range(times):
        step(c.u[:, :1], c.y[:1])
    kept = settled(device)
    for _ in range(times):
        step(c.u, c.y)
    most = peak(device)
    return {"weights": (most - weights) / MB, "kept": (most - kept) / MB}


def in_a_process(which: str) -> dict[str, float]:
    """`measure` in a fresh process with the flags of this one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", which]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = flags(__doc__, runs=3)
    parser.add_argument("--side", choices=("rival", "frozen", "fp32", "bf16"), help="measure this side, here")
    a = begin(parser)
    c = case(a)
    if a.side:
        print(json.dumps(measure(c, a.side)))
        return
    print(c)
    kinds = precisions(c.x.device)
    rivals = ("rival", "frozen") if has_rival(c.spec) else ()
    found: dict[str, list[dict[str, float]]] = {which: [] for which in (*rivals, *kinds)}
    for _ in range(a.runs):
        for which, seen in found.items():
            seen.append(in_a_process(which))
    words = {"weights": "above weights", "kept": "above what stays between steps"}
    rows = []
    for which in rivals or ("rival",):
        against = " (rival frozen)" if which == "frozen" else ""
        for above, text in words.items():
            for p in kinds:
                rows.append(
                    row(
                        f"peak memory of the attack step {text}, {p}{against}",
                        [m[above] for m in found[which]] if which in found else None,
                        [m[above] for m in found[p]],
                        unit="MB",
                        goal="ratio >= 4" if which == "rival" and above == "weights" else "",
                        facts={"precision": p, "clock": ""} | c.facts(),
                    )
                )
    save("memory", rows, a)


if __name__ == "__main__":
    main()
