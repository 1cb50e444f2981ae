"""What the scripts share: flags, a network that fires like a trained one, the steps, an alternating clock, CSV, table.

Needs torch, numpy and safetensors; SpikingJelly only for its own column, which stays empty where it is not installed.
"""

import argparse
import contextlib
import copy
import csv
import importlib.util
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from sparsetrail.core.precision import products  # noqa: E402
from sparsetrail.data import DataError, load, pixels, take  # noqa: E402
from sparsetrail.models import load_model, net_spec_from  # noqa: E402
from sparsetrail.snn import kernels  # noqa: E402
from sparsetrail.snn.encode import Encoder, build_encoder, phase  # noqa: E402
from sparsetrail.snn.engine import halve, has_bf16, share_memory  # noqa: E402
from sparsetrail.snn.net import NetSpec, build, victim  # noqa: E402
from sparsetrail.snn.neuron import NeuronSpec  # noqa: E402
from sparsetrail.training import Optimizer, Step, TrainSpec  # noqa: E402

RIVAL = "SpikingJelly 2.0.0"
SPIKINGJELLY = all(importlib.util.find_spec(m) is not None for m in ("spikingjelly", "loguru", "h5py"))
SMOKE = {"T": 2, "batch": 2, "runs": 1}
# So small that firing rates stay what they are while the same batch is trained on; the cost does not depend on it.
LR = 1e-6

Job = Callable[[], object]


# ---- flags and environment -------------------------------------------------------------------------------------------


def flags(doc: str, *, runs: int) -> argparse.ArgumentParser:
    """The flags that all scripts take; `--weights` decides arch, T and width of its model."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=runs, help="rounds that alternate; the median counts")
    parser.add_argument("--arch", default="sew_resnet18")
    parser.add_argument("--T", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--weights", type=Path, help="a trained sparsetrail model, measured on its test images")
    parser.add_argument("--out", type=Path, help="folder of the CSV; default bench/results, or a temporary one")
    parser.add_argument("--smoke", action="store_true", help="a tiny size that proves that it runs")
    return parser


def begin(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags, set the threads, print the environment."""
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)  # what is asked for beside it is done
    a = parser.parse_args(argv)
    if min(a.runs, a.threads, a.batch, a.T) < 1:
        parser.error("--runs, --threads, --batch and --T: expected at least 1")
    torch.set_num_threads(a.threads)
    if a.out is None:
        a.out = Path(tempfile.mkdtemp(prefix="bench-")) if a.smoke else ROOT / "bench" / "results"
    cores = os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if clock_name(torch.device(a.device)) == "wall time" and busy + a.threads > cores + 0.5:
        print(f"note: load {busy:.1f} on {cores} cores: other jobs run, wall times are not to be trusted")
    print(f"{Path(sys.argv[0]).stem}: " + ", ".join(f"{k} {v}" for k, v in environment(a).items() if v))
    return a


def environment(a: argparse.Namespace) -> dict[str, str]:
    """What a figure depends on beside the code."""
    device = torch.device(a.device)
    return {
        "device": chip(device),
        "flags": cpu_flags() if device.type == "cpu" else "",
        "kernels": "" if device.type == "cuda" else "ours" if kernels.available() else "none: the plain path",
        "threads": str(a.threads),
        "clock": clock_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        "compared with": RIVAL if SPIKINGJELLY else "nothing (SpikingJelly is not installed)",
    }


def cpu_facts(name: str) -> str:
    """A field of /proc/cpuinfo, or an empty string."""
    try:
        found = re.search(rf"^{name}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else ""


def cpu_flags() -> str:
    """Which of the instruction sets that matter here the CPU has."""
    have = cpu_facts("flags").split()
    return " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in have)


def chip(device: torch.device) -> str:
    """The GPU's name, or the CPU's model name in short."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor|\d+-Core)\b", "", cpu_facts("model name")) or platform.machine()
    return " ".join(name.split())


def clock_name(device: torch.device) -> str:
    """Which clock serves: CPU time leaves other jobs out, but sums over threads."""
    return "process CPU time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"


def clock(device: torch.device) -> float:
    """Seconds of `clock_name`, after the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if clock_name(device).startswith("process") else time.perf_counter()


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network in eval mode and one batch: pixels x [n c h w], labels y [n], spikes u [t n c h w].

    `firing` is the share of non-zero inputs of the convolutions behind the first, `lowest` that of the quietest one.
    """

    spec: NetSpec
    net: nn.Module
    encode: Encoder
    x: Tensor = field(repr=False)
    y: Tensor = field(repr=False)
    u: Tensor = field(repr=False)
    firing: float
    lowest: float
    inputs: str

    def facts(self) -> dict[str, Any]:
        """What a row of the CSV says about it."""
        return {
            "arch": self.spec.arch,
            "T": self.spec.steps,
            "batch": len(self.y),
            "width": f"{self.spec.width:g}",
            "image": "x".join(map(str, self.x.shape[1:])),
            "firing_rate": f"{self.firing:.3f}",
            "firing_lowest": f"{self.lowest:.3f}",
            "inputs": self.inputs,
        }

    def __str__(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.facts().items())


def case(a: argparse.Namespace, *, T: int | None = None, batch: int | None = None, width: float | None = None) -> Case:
    """The network of `--weights` on its test images, or an untrained one on random pixels.

    A fresh network in eval mode hardly fires in its deep layers and would flatter an engine that skips zeros. So its
    BatchNorm statistics are taken from the batch, as training sets them: 36 % of the inputs are then non-zero (SEW-
    ResNet18, T=10), against 38 % in one trained on CIFAR-10. `T`, `batch`, `width` go before the flags.
    """
    device, n = torch.device(a.device), batch or a.batch
    g = torch.Generator().manual_seed(0)
    trained = load_model(a.weights) if a.weights is not None and width is None else None
    if trained is not None:
        spec, encode = net_spec_from(trained.card["net"]), trained.encode
        if T not in (None, spec.steps):
            spec, encode = replace(spec, steps=T), build_encoder(encode.name, **(encode.knobs | {"steps": T}))
        net = build(spec).to(device)
        net.load_state_dict(trained.net.state_dict())
        x, y, inputs = test_images(trained.card["data"]["name"], n, spec, g)
        inputs = f"{inputs}; weights {trained.sha256[:8]}"
    else:
        neuron = NeuronSpec(detach_reset=a.arch.startswith("sew"))  # the paper's
        spec = NetSpec(arch=a.arch, steps=T or a.T, width=width or a.width, neuron=neuron)
        net, encode = build(spec).to(device), phase(steps=spec.steps)
        x, y = random_images(n, spec, g)
        inputs = "random pixels; untrained weights, BatchNorm statistics of the batch"
    x, y = x.to(device), y.to(device)
    if trained is None:
        settle(net, encode(x))
    return as_case(spec, net.eval(), encode, x, y, inputs)


def as_case(spec: NetSpec, net: nn.Module, encode: Encoder, x: Tensor, y: Tensor, inputs: str) -> Case:
    """A Case, its firing rates measured in one forward."""
    u = encode(x).contiguous()
    rates = firing_rates(net, u)
    firing = sum(active for active, _ in rates.values()) / sum(size for _, size in rates.values())
    lowest = min(active / size for active, size in rates.values())
    return Case(spec=spec, net=net, encode=encode, x=x, y=y, u=u, firing=firing, lowest=lowest, inputs=inputs)


def random_images(n: int, spec: NetSpec, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform grey levels and labels."""
    x = torch.randint(0, 256, (n, spec.channels, 32, 32), generator=g) / 255
    return x, torch.randint(0, spec.classes, (n,), generator=g)


def test_images(name: str, n: int, spec: NetSpec, g: torch.Generator) -> tuple[Tensor, Tensor, str]:
    """Test images of a set, class-balanced; random pixels where this machine does not hold the set."""
    try:
        found = take(load(name, "test"), n, seed=0)
    except DataError:
        print(f"note: {name} is not on this machine, random pixels instead: firing rates are not those of training")
        return *random_images(n, spec, g), "random pixels"
    return pixels(found.images), found.labels, f"{name} test images"


def settle(net: nn.Module, u: Tensor) -> None:
    """Set BatchNorm's running statistics to those of the encoded batch `u`."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    held = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    net.train()
    with torch.no_grad():
        net(u)
    for m, momentum in zip(norms, held, strict=True):
        m.momentum = momentum


def firing_rates(net: nn.Module, u: Tensor) -> dict[str, tuple[int, int]]:
    """Non-zero entries and size of the input of every convolution behind the first, in one forward."""
    seen: dict[str, tuple[int, int]] = {}

    def look(name: str):
        return lambda _m, inputs: seen.update({name: (int(inputs[0].count_nonzero()), inputs[0].numel())})

    convs = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d)][1:]
    handles = [m.register_forward_pre_hook(look(name)) for name, m in convs]
    with torch.no_grad():
        net(u)
    for h in handles:
        h.remove()
    return seen


def precisions(device: torch.device) -> tuple[str, ...]:
    """fp32, and bf16 where the device multiplies it."""
    half = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else has_bf16()
    if not half:
        print("note: no bf16 here (a CPU needs AVX-512 BF16 and a C compiler), fp32 only")
    return ("fp32", "bf16") if half else ("fp32",)


def our_training(c: Case, precision: str) -> Job:
    """One update as `train` runs it, from pixels; the network prepared as there."""
    device = c.x.device
    net = copy.deepcopy(c.net)
    spec = TrainSpec(lr=LR, batch=len(c.y), precision=precision)  # type: ignore[arg-type]
    optimizer = Optimizer(net, spec)
    share_memory(net)
    if precision == "bf16" and device.type == "cpu":
        halve(net)
    g, step = torch.Generator(), Step(net, optimizer, spec)
    if device.type == "cpu":
        return lambda: step(c.encode, c.x, c.y, g)
    run = step.record(c.encode)

    def job() -> None:
        with products(precision == "tf32"):
            step(c.encode, c.x, c.y, g)
        if run is not None and run.full:
            run.told()

    return job


def our_attack(c: Case, precision: str, space: str = "encoded") -> Job:
    """One gradient of the loss with respect to the attacked tensor, as our attacks ask for it."""
    target = victim(c.net, c.encode, precision=precision)  # type: ignore[arg-type]
    f, start = target.of(space), c.u if space == "encoded" else c.x  # type: ignore[arg-type]

    def job() -> Tensor:
        point = start.clone().requires_grad_()
        with products(tf32=False) if point.is_cuda else contextlib.nullcontext():
            return torch.autograd.grad(F.cross_entropy(f(point), c.y, reduction="sum"), point)[0]

    return job


def has_rival(spec: NetSpec) -> bool:
    """Is SpikingJelly installed, and has it this network?"""
    usual = spec.neuron == NeuronSpec(detach_reset=spec.neuron.detach_reset)
    return SPIKINGJELLY and usual and spec.width == 1 and spec.stem == "imagenet"


# ---- measuring -------------------------------------------------------------------------------------------------------


def alternate(jobs: dict[str, Job], runs: int, now: Callable[[], float], *, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each job, `runs` of each in turns (a, b, a, b, ...), after `warm` calls each that do not count."""
    for _ in range(warm):
        for job in jobs.values():
            job()
    seen: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            start = now()
            job()
            seen[name].append(now() - start)
    return seen


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure: medians of the rival and of ours, and what it took.

    `goal` reads 'ratio >= 3' (rival over ours) or 'ours <= 4'; `remark` limits it to some machines. `low` and `high`
    are the smallest and largest ratio of a round.
    """

    measure: str
    unit: str
    rival: float | None
    ours: float
    goal: str = ""
    remark: str = ""
    low: float | None = None
    high: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Rival over ours: how many times faster, or smaller."""
        return None if self.rival is None else self.rival / self.ours

    @property
    def reached(self) -> str:
        """yes, no, or nothing where there is no goal or no rival to compare with."""
        if not self.goal:
            return ""
        what, sign, bound = self.goal.split()
        value = {"ratio": self.ratio, "ours": self.ours}[what]
        if value is None:
            return ""
        return "yes" if (value >= float(bound) if sign == ">=" else value <= float(bound)) else "no"


def row(measure: str, rival: list[float] | None, ours: list[float], *, unit: str = "ms", **knobs: Any) -> Row:
    """A Row of the figures of all rounds, already in `unit`; rounds are paired for the range of the ratio."""
    pairs = [r / o for r, o in zip(rival, ours, strict=True)] if rival else []
    return Row(
        measure=measure,
        unit=unit,
        rival=statistics.median(rival) if rival else None,
        ours=statistics.median(ours),
        low=min(pairs, default=None),
        high=max(pairs, default=None),
        **knobs,
    )


def ms(seconds: list[float] | None) -> list[float] | None:
    """Milliseconds."""
    return None if seconds is None else [1e3 * s for s in seconds]


# ---- results ---------------------------------------------------------------------------------------------------------


def csv_path(name: str, a: argparse.Namespace) -> Path:
    """<measure>_<device>-<n>thread_torch<version>.csv in `--out`."""
    device = torch.device(a.device)
    where = chip(device).replace(" ", "-") + (f"-{a.threads}thread" if device.type == "cpu" else "")
    return a.out / f"{name}_{where}_torch{torch.__version__}.csv"


def save(name: str, rows: list[Row], a: argparse.Namespace, *, show: bool = True) -> Path:
    """Print the rows and write them, each with everything needed to understand it alone."""
    for r in rows if show else ():
        print(line(r))
    path = csv_path(name, a)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for r in rows:
        told = {"measure": r.measure, "unit": r.unit, "rival": number(r.rival), "ours": number(r.ours)}
        told |= {"ratio": number(r.ratio), "ratio_low": number(r.low), "ratio_high": number(r.high)}
        told |= {"goal": r.goal, "remark": r.remark, "reached": r.reached, "runs": a.runs}
        lines.append(told | r.facts | environment(a) | r.facts)
    columns = list(dict.fromkeys(k for told in lines for k in told))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(f"written {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV that `save` wrote."""
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def number(value: float | None) -> str:
    """Four significant digits; empty for None."""
    return "" if value is None else f"{value:.4g}"


def line(r: Row) -> str:
    """One measure for the screen."""
    rival = "-" if r.rival is None else f"{number(r.rival)} {r.unit}"
    ratio = "" if r.ratio is None else f"{r.ratio:.2f}x"
    spread = "" if r.low is None else f"[{r.low:.2f}, {r.high:.2f}]"
    goal = f"goal {r.goal}{f' ({r.remark})' if r.remark else ''}: {r.reached or 'not compared'}" if r.goal else ""
    ours = f"{number(r.ours)} {r.unit}"
    return f"{r.measure:<62} rival {rival:>12}   ours {ours:>12} {ratio:>8} {spread:<16}{goal}".rstrip()


def table(rows: list[dict[str, str]]) -> str:
    """Rows of CSVs as a Markdown table: measure, rival, ours, ratio, goal, reached."""
    head = ("measure", RIVAL, "sparsetrail", "ratio", "goal", "reached")
    cells = [head, ("---",) * len(head)]
    for r in rows:
        unit = f" {r['unit']}" if r["unit"] != "x" else "x"
        goal = r["goal"].replace("ratio >= ", "≥ ").replace("ours <= ", "≤ ")
        goal = f"{goal}x" + (f" ({r['remark']})" if r["remark"] else "") if goal else "-"
        cells.append(
            (
                r["measure"],
                f"{r['rival']}{unit}" if r["rival"] else "-",
                f"{r['ours']}{unit}",
                f"{float(r['ratio']):.1f}x" if r["ratio"] else "-",
                goal,
                r["reached"] or "-",
            )
        )
    return "\n".join("| " + " | ".join(c) + " |" for c in cells)
