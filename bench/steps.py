"""Training step and attack step against SpikingJelly 2.0.0: the same network, weights and batch, in one process run.

    python bench/steps.py [--threads 1] [--batch 16] [--T 10] [--runs 7] [--arch sew_resnet18]

Needs `pip install --no-deps -r tests/references.txt`. The rival is driven as the paper's code drives it: Adam for the
training step, `loss.backward()` with parameter gradients included for the attack step; a second attack row freezes its
parameters, which the published code does not. Rounds alternate; figures are medians of process CPU time (wall time on a
GPU) and their ratio. Prints a table and writes bench/results/steps_<device>_<torch>.csv.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from rival import reference_net  # noqa: E402

from sparsetrail.snn.encode import phase  # noqa: E402
from sparsetrail.snn.net import NetSpec, build, victim  # noqa: E402
from sparsetrail.snn.neuron import can_compile, compile_neurons  # noqa: E402


def clock(device: torch.device) -> float:
    """Seconds: CPU time of the process, or wall time after the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def rounds(jobs: dict[str, Callable[[], None]], runs: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each job; the jobs take turns, after one warm-up each."""
    for job in jobs.values():
        job()
        job()
    seen: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            start = clock(device)
            job()
            seen[name].append(clock(device) - start)
    return {name: statistics.median(times) for name, times in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--T", type=int, default=10)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--arch", default="sew_resnet18")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    spec = NetSpec(arch=a.arch, steps=a.T)
    ours = build(spec).to(device)
    if can_compile(device):
        compile_neurons(ours)
    rival, reset = reference_net(spec, ours.state_dict())
    rival = rival.to(device)
    g = torch.Generator().manual_seed(0)
    x = (torch.randint(0, 256, (a.batch, 3, 32, 32), generator=g) / 255).to(device)
    y = torch.randint(0, 10, (a.batch,), generator=g).to(device)
    u = phase(steps=a.T)(x)

    def trainer(net: nn.Module, adam: torch.optim.Optimizer, after: Callable[[], None]) -> Callable[[], None]:
        def job() -> None:
            net.train()
            loss = F.cross_entropy(net(u), y)
            adam.zero_grad()
            loss.backward()
            adam.step()
            after()

        return job

    def rival_attack(frozen: bool) -> Callable[[], None]:
        def job() -> None:
            rival.eval()
            for p in rival.parameters():
                p.requires_grad_(not frozen)
            point = u.clone().requires_grad_()
            F.cross_entropy(rival(point), y).backward()
            rival.zero_grad()
            for p in rival.parameters():
                p.requires_grad_(True)
            reset()

        return job

    trained = build(spec).to(device).eval()
    target = victim(trained, phase(steps=a.T), compile=can_compile(device))

    def our_attack() -> None:
        point = u.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(target.logits(point), y, reduction="sum"), point)

    fused = torch.optim.Adam(ours.parameters(), 1e-3, fused=True)
    plain = torch.optim.Adam(rival.parameters(), 1e-3)
    table = []
    for measure, jobs in {
        "training step": {"rival": trainer(rival, plain, reset), "ours": trainer(ours, fused, lambda: None)},
        "attack step, rival as published": {"rival": rival_attack(False), "ours": our_attack},
        "attack step, rival frozen": {"rival": rival_attack(True), "ours": our_attack},
    }.items():
        seconds = rounds(jobs, a.runs, device)
        table.append((measure, seconds["rival"] * 1e3, seconds["ours"] * 1e3, seconds["rival"] / seconds["ours"]))
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}-{a.threads}thread"
    print(f"{a.arch}, T={a.T}, batch {a.batch}, 3x32x32, fp32, {chip}, torch {torch.__version__}, median of {a.runs}")
    print(f"{'measure':<34}{'SpikingJelly 2.0.0':>20}{'sparsetrail':>14}{'ratio':>8}")
    for measure, r, o, ratio in table:
        print(f"{measure:<34}{r:>17.1f} ms{o:>11.1f} ms{ratio:>8.2f}")
    out = ROOT / "bench" / "results" / f"steps_{chip.replace(' ', '-')}_torch{torch.__version__}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("measure", "rival_ms", "ours_ms", "ratio", "arch", "T", "batch", "runs"))
        writer.writerows((m, f"{r:.2f}", f"{o:.2f}", f"{q:.3f}", a.arch, a.T, a.batch, a.runs) for m, r, o, q in table)
    print(f"written {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
