"""AutoAttack: APGD-CE, APGD-T, FAB-T and Square one after the other, against pyautoattack 0.2.0 on the same victim.

    python bench/battery.py [--images 64] [--eps 8] [--queries 500] [--runs 3] [--weights MODEL]

Pixel space, radius eps/255, eval mode, the standard version but for the queries of Square: 100 steps of APGD on
cross-entropy, 100 of APGD and of FAB towards each of the nine other classes, then Square. Both sides call the same
function of the pixels, so the engine is in both columns and the ratio is that of the attacks alone: ours leave an image
out as soon as it is fooled, in the middle of an attack, and count it only if its point rounded to grey levels is. How
many images stand at the end is printed for both. Without `--weights` a model is trained on shipped images in about a
minute.
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

from sparsetrail.attacks import attack, autoattack
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
        run = attack(autoattack, target, threat, x, y, batch=len(y), steps=steps, targets=targets, queries=a.queries)
        left["ours"] = run.accuracy.k

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
    words = f"AutoAttack of {len(y)} images, pixel space, {a.eps:g}/255 (pyautoattack 0.2.0 on our engine)"
    save("battery", [row(words, times.get("rival"), times["ours"], unit="s", facts=facts)], a)


class _Pixels(torch.nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x)


def published(target, x, y, eps: float, steps: int, targets: int, queries: int, left: dict[str, int]) -> Job:
    """pyautoattack's own loop over its four attacks."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)

    def job() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            aa = AutoAttack(
                _Pixels(target.scores).eval(), attacks=["apgd-ce", "apgd-t", "fab-t", "square"], version="custom",
                eps=eps, device=x.device, seed=0,
            )  # fmt: skip
            aa.apgd.n_iter = aa.apgd_targeted.n_iter = aa.fab.n_iter = steps
            aa.apgd_targeted.n_target_classes = aa.fab.n_target_classes = targets
            aa.apgd.n_restarts, aa.fab.n_restarts, aa.square.n_queries = 1, 1, queries
            found = aa.run_standard_evaluation(x, y, batch_size=len(y))
        adversarial = found[0] if isinstance(found, tuple) else found
        with torch.no_grad():
            left["rival"] = int((target.scores(adversarial).argmax(1) == y).sum())

    return job


if __name__ == "__main__":
    main()
