"""Where the time of our attack step and training step goes, by operation, from torch.profiler.

    python bench/hotspots.py [--threads 1] [--runs 5] [--top 15] [--weights MODEL]

Self time of an operation, children left out, as a share of the whole step; on a GPU the time of each kernel.
`_SpikeConv`, `_Fire`, `_Pool` and the like are the engine's own functions, `...Backward` their backward; what no
operation accounts for (Python, autograd's engine, a GPU that waits) is a line of its own. The profiler itself slows
steps down: read shares, not milliseconds.
(Not called profile.py: a script's folder comes first on the path, and the standard library imports `profile`.)
"""

import time
from collections import Counter

import torch
from common import Job, Row, begin, case, flags, our_attack, our_training, precisions, save
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def shares(job: Job, runs: int, device: torch.device) -> tuple[dict[str, float], float]:
    """Milliseconds of self time by operation, and of the whole step, a step."""
    job()
    job()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as seen:
        start = time.perf_counter()
        for _ in range(runs):
            job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        whole = time.perf_counter() - start
    found: Counter[str] = Counter()
    for e in seen.key_averages():
        if device.type == "cuda" and (e.device_type != DeviceType.CUDA or e.is_user_annotation):
            continue  # an operation's device time is that of its kernels, which are listed themselves
        own = e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total
        found[e.key.removeprefix("autograd::engine::evaluate_function: ")] += own / 1e3 / runs
    return dict(found), 1e3 * whole / runs


def main() -> None:
    parser = flags(__doc__, runs=5)
    parser.add_argument("--top", type=int, default=15)
    a = begin(parser)
    c = case(a)
    print(c)
    rows: list[Row] = []
    kinds = precisions(c.x.device)
    for step, make in {"attack step": our_attack, "training step": our_training}.items():
        for p in kinds:
            found, whole = shares(make(c, p), a.runs, c.x.device)
            found["(outside operations)"] = max(whole - sum(found.values()), 0.0)
            first = sorted(found, key=lambda k: -found[k])[: a.top]
            print(f"{step}, {p}: {whole:.1f} ms under the profiler")
            for k in first:
                print(f"  {k:<48}{found[k]:>9.2f} ms{found[k] / whole:>8.1%}")
                facts = {"step": step, "precision": p, "operation": k, "share": f"{found[k] / whole:.4f}"}
                facts |= {"clock": "wall time, profiled"} | c.facts()
                rows.append(Row(measure=f"{step}, {p}: {k}", unit="ms", rival=None, ours=found[k], facts=facts))
            rest = sum(v for k, v in found.items() if k not in first)
            print(f"  {'(all others)':<48}{rest:>9.2f} ms{rest / whole:>8.1%}")
    save("hotspots", rows, a, show=False)


if __name__ == "__main__":
    main()
