"""PGD-7 robust accuracy of many images against SpikingJelly 2.0.0 in the authors' loop: the job, not the step.

    python bench/robust_accuracy.py [--images 1000] [--rival-images 96] [--runs 3] [--weights MODEL]

Threat and settings are those of the paper's code: encoded space, eps 6/255, 7 steps of 0.01 from a uniform start; both
sides in eval mode. The rival takes all images in batches of 16, all 7 steps with parameter gradients, then a scoring
forward of the last point. Ours is `sparsetrail.attack` with its defaults: only images that were right, dropped once
fooled, the best point on the way judged in fp32 (it fools more than the last). So its time grows with the model's
accuracy, which is printed with it, as is the number of image gradients taken. The rival's time is linear in the number
of images: each round measures it on the next `--rival-images` of them and scales. Without `--weights` a model is
trained on shipped images in about a minute.
"""

import tempfile
from pathlib import Path

import torch
from common import (
    Job,
    alternate,
    as_case,
    begin,
    clock,
    flags,
    has_rival,
    load,
    load_model,
    net_spec_from,
    pixels,
    precisions,
    row,
    save,
    take,
    victim,
)

from sparsetrail.attacks import attack, pgd
from sparsetrail.core import Linf, Rate, Run
from sparsetrail.models import Trained
from sparsetrail.snn.encode import phase
from sparsetrail.snn.net import NetSpec
from sparsetrail.training import TrainSpec, train

THREAT, BATCH = Linf(6 / 255, space="encoded"), 16


def stand_in(a, out: Path) -> Trained:
    """A model that classifies, trained for one epoch on the shipped slice of Fashion-MNIST."""
    print("no --weights: training on the shipped Fashion-MNIST slice first")
    data = load("fashion-mnist-slice", "train")
    data = take(data, 64, seed=0) if a.smoke else data
    spec = NetSpec(channels=data.images.shape[1], steps=a.T)
    how = TrainSpec(epochs=1, batch=32)
    return train(spec, phase(steps=a.T), data, how, out, device=a.device)


def main() -> None:
    parser = flags(__doc__, runs=3)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rival-images", type=int, default=96, help="of these per round, scaled to --images")
    a = begin(parser)
    if a.smoke:
        a.images, a.rival_images = 32, 16
    a.rival_images = min(a.rival_images, a.images)
    device = torch.device(a.device)
    with tempfile.TemporaryDirectory() as folder:
        model = stand_in(a, Path(folder)) if a.weights is None else load_model(a.weights)
    spec, net, encode = net_spec_from(model.card["net"]), model.net.to(device).eval(), model.encode
    found = load(model.card["data"]["name"], "test")
    found = take(found, min(a.images, len(found)), seed=0)
    x, y, n = pixels(found.images).to(device), found.labels.to(device), len(found)
    origin = "trained for one epoch" if a.weights is None else f"weights {model.sha256[:8]}"
    c = as_case(spec, net, encode, x[:BATCH], y[:BATCH], f"{found.name} test images; {origin}")
    print(c)

    last: dict[str, Run] = {}

    def ours(precision: str) -> Job:
        target = victim(net, encode, precision=precision)  # type: ignore[arg-type]

        def job() -> None:
            last[precision] = attack(pgd, target, THREAT, x, y)

        attack(pgd, target, THREAT, x[:BATCH], y[:BATCH])  # warm
        return job

    kinds = precisions(device)
    jobs: dict[str, Job] = {p: ours(p) for p in kinds}
    held: list[bool] = []
    used: list[int] = []
    if has_rival(spec):
        from rival import published_pgd, reference_net

        theirs, reset = reference_net(spec, net.state_dict(), device)
        theirs.eval()
        g = torch.Generator().manual_seed(0)
        published_pgd(theirs, reset, c.u, c.y, g, steps=1)  # warm

        def rival() -> None:
            start = sum(used) % n
            rows = range(start, min(start + a.rival_images, n))
            for i in range(rows.start, rows.stop, BATCH):
                part = slice(i, min(i + BATCH, rows.stop))
                held.extend(published_pgd(theirs, reset, encode(x[part]), y[part], g).tolist())
            used.append(len(rows))

        jobs = {"rival": rival} | jobs
    times = alternate(jobs, a.runs, lambda: clock(device), warm=0)
    scaled = None
    if "rival" in times:
        scaled = [s * n / count for s, count in zip(times["rival"], used, strict=True)]
        seen = min(sum(used), n)
        print(f"rival measured on {used[0]} images a round in batches of {BATCH}, scaled to {n}")
        published = Rate(sum(held[:seen]), seen)
        clean = last[kinds[0]].clean
        counted = Rate(sum(h and c for h, c in zip(held[:seen], clean[:seen], strict=True)), seen)
        print(
            f"rival  robust {published} counted as published, right after the attack; {counted} if right before it too"
        )
    rows = []
    for p in kinds:
        run = last[p]
        print(f"{p}   robust {run.accuracy}, clean {run.clean_accuracy}; {run.backwards} image gradients of {7 * n}")
        facts = {"precision": p, "images": n} | c.facts() | {"batch": f"{BATCH} (rival), 64 (ours)"}
        facts |= {"ours_clean": str(run.clean_accuracy), "ours_robust": str(run.accuracy)}
        facts |= {"ours_image_gradients": run.backwards, "rival_image_gradients": 7 * n}
        if scaled is not None:
            same = Rate(sum(run.robust[:seen]), seen)
            print(f"       on the rival's images {same}")
            facts |= {"rival_images": seen, "rival_robust_as_published": str(published), "rival_robust": str(counted)}
            facts |= {"ours_robust_same_images": str(same)}
        goal = "ratio >= 12" if device.type == "cpu" else ""
        words = f"PGD-7 robust accuracy of {n} images, {p}"
        rows.append(row(words, scaled, times[p], unit="s", goal=goal, facts=facts))
    save("robust_accuracy", rows, a)


if __name__ == "__main__":
    main()
