"""APGD-CE, targeted APGD and Square one after the other, against pyautoattack 0.2.0 on the same victim.

    python bench/battery.py [--images 64] [--eps 8] [--queries 500] [--runs 3] [--weights MODEL]

Pixel space, radius eps/255, eval mode: 100 steps of APGD on cross-entropy, 100 towards each of the nine other classes,
then Square; each attack on the images that still stand, as AutoAttack does it (without FAB). Both sides call the same
function of the pixels, so the engine is in both columns and the ratio is that of the attacks alone: ours leave an image
out as soon as it is fooled, in the middle of an attack. How many images stand at the end is printed for both. Without
`--weights` a model is trained on shipped images in about a minute.
"""

import importlib.util
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from common import (
    Job,
    alternate,
    as_case,
    begin,
    clock,
    flags,
    load,
    load_model,
    net_spec_from,
    pixels,
    row,
    save,
    take,
)
from common import victim as as_victim
from robust_accuracy import stand_in

from sparsetrail.attacks import apgd, attack, square
from sparsetrail.core import Linf


def main() -> None:
    parser = flags(__doc__, runs=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--eps", type=float, default=8.0, help="radius in grey levels")
    parser.add_argument("--queries", type=int, default=500)
    a = begin(parser)
    steps, targets = 100, 9
    if a.smoke:
        a.images, a.queries, steps = 16, 10, 5
    device = torch.device(a.device)
    with tempfile.TemporaryDirectory() as folder:
        model = stand_in(a, Path(folder)) if a.weights is None else load_model(a.weights)
    spec, net, encode = net_spec_from(model.card["net"]), model.net.to(device).eval(), model.encode
    found = load(model.card["data"]["name"], "test")
    found = take(found, min(a.images, len(found)), seed=0)
    x, y = pixels(found.images).to(device), found.labels.to(device)
    origin = "trained for one epoch" if a.weights is None else f"weights {model.sha256[:8]}"
    c = as_case(spec, net, encode, x, y, f"{found.name} test images; {origin}")
    print(c)
    target, threat = as_victim(net, encode), Linf(a.eps / 255, space="pixel")
    left: dict[str, int] = {}

    def ours() -> None:
        rows = torch.arange(len(y), device=device)
        for fn, knobs in (
            (apgd, {"steps": steps, "loss": "ce"}),
            (apgd, {"steps": steps, "loss": "targeted", "targets": targets}),
            (square, {"queries": a.queries}),
        ):
            if len(rows) == 0:
                break
            run = attack(fn, target, threat, x[rows], y[rows], batch=len(rows), indices=rows.tolist(), **knobs)
            rows = rows[torch.tensor(run.robust, device=device)]
        left["ours"] = len(rows)

    jobs: dict[str, Job] = {"ours": ours}
    if importlib.util.find_spec("pyautoattack") is not None:
        jobs = {"rival": published(target, x, y, a.eps / 255, steps, targets, a.queries, left)} | jobs
    else:
        print("note: pyautoattack is not installed, ours only; pip install --no-deps -r tests/references.txt")
    times = alternate(jobs, a.runs, lambda: clock(device), warm=0)
    for name, count in left.items():
        print(f"{name:<6} {count} of {len(y)} images stand at the end")
    facts = {"images": len(y), "queries": a.queries, "precision": "fp32"} | c.facts()
    facts |= {f"{name}_standing": count for name, count in left.items()}
    words = f"APGD-CE, APGD-T, Square of {len(y)} images, pixel space, {a.eps:g}/255 (pyautoattack 0.2.0 on our engine)"
    save("battery", [row(words, times.get("rival"), times["ours"], unit="s", facts=facts)], a)


class _Pixels(torch.nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x)


def published(target, x, y, eps: float, steps: int, targets: int, queries: int, left: dict[str, int]) -> Job:
    """pyautoattack's own loop over its three attacks."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)

    def job() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            aa = AutoAttack(
                _Pixels(target.scores).eval(), attacks=["apgd-ce", "apgd-t", "square"], version="custom", eps=eps,
                device=x.device, seed=0,
            )  # fmt: skip
            aa.apgd.n_iter = aa.apgd_targeted.n_iter = steps
            aa.apgd.n_restarts, aa.apgd_targeted.n_target_classes, aa.square.n_queries = 1, targets, queries
            found = aa.run_standard_evaluation(x, y, batch_size=len(y))
        adversarial = found[0] if isinstance(found, tuple) else found
        with torch.no_grad():
            left["rival"] = int((target.scores(adversarial).argmax(1) == y).sum())

    return job


if __name__ == "__main__":
    main()
