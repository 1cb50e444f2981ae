"""Cost of our attack and training step against T (4..64), batch (1..256) and width (0.25..2).

    python bench/scaling.py [--threads 1] [--runs 3] [--weights MODEL]

One setting varies, the others stay at the flags'. Printed and written: time, time of one image for one time step, and
per curve the exponent p of time ~ setting^p between its two largest settings: 1 is linear in T and batch, 2 is
proportional to the number of weights in width. The rival runs at a few
settings, width 1 only. Ours in fp32. With `--weights` T and batch are those of its model and width is left out; T other
than the model's was not trained for.
"""

import math
from dataclasses import replace

from common import (
    LR,
    Job,
    Row,
    alternate,
    begin,
    case,
    clock,
    flags,
    has_rival,
    ms,
    number,
    our_attack,
    our_training,
    row,
    save,
)

AXES: dict[str, tuple[float, ...]] = {
    "T": (4, 8, 16, 32, 64),
    "batch": (1, 4, 16, 64, 256),
    "width": (0.25, 0.5, 1, 2),
}
RIVAL_AT = {("T", 4), ("T", 16), ("batch", 4), ("batch", 16), ("width", 1)}


def main() -> None:
    parser = flags(__doc__, runs=3)
    parser.add_argument("--axis", choices=(*AXES, "all"), default="all")
    a = begin(parser)
    axes = {k: v for k, v in AXES.items() if a.axis in (k, "all") and not (k == "width" and a.weights)}
    if a.smoke:
        axes = {k: v[:2] for k, v in axes.items()}
    rows: list[Row] = []
    for axis, settings in axes.items():
        found: dict[str, list[Row]] = {"training step": [], "attack step": []}
        for value in settings:
            c = case(a, **{axis: value if axis == "width" else int(value)})
            jobs: dict[str, dict[str, Job]] = {
                "training step": {"ours": our_training(c, "fp32")},
                "attack step": {"ours": our_attack(c, "fp32")},
            }
            if (axis, value) in RIVAL_AT and has_rival(c.spec):
                from rival import rival_attack, rival_training

                jobs["training step"] = {"rival": rival_training(c, LR)} | jobs["training step"]
                jobs["attack step"] = {"rival": rival_attack(c)} | jobs["attack step"]
            for step, sides in jobs.items():
                warm = 1 + c.x.is_cuda  # a GPU records the second
                times = alternate(sides, a.runs, lambda c=c: clock(c.x.device), warm=warm)
                r = row(f"{step}, {axis} {value:g}", ms(times.get("rival")), ms(times["ours"]))
                each = r.ours * 1e3 / (c.spec.steps * len(c.y))
                facts = {"axis": axis, "value": f"{value:g}", "us_per_image_step": f"{each:.1f}"} | c.facts()
                found[step].append(replace(r, facts=facts))
        for step, seen in found.items():
            one, two = seen[-2:]
            p = math.log(two.ours / one.ours) / math.log(settings[-1] / settings[-2])
            print(f"{step} over {axis}: time ~ {axis}^{p:.2f} from {settings[-2]:g} to {settings[-1]:g}")
            for r in seen:
                rival = "" if r.rival is None else f"   rival {number(r.rival)} ms, {r.ratio:.2f}x"
                each = r.facts["us_per_image_step"]
                print(f"  {axis:<6}{r.facts['value']:>5}{number(r.ours):>10} ms{each:>9} us an image-step{rival}")
            rows += seen
    save("scaling", rows, a, show=False)


if __name__ == "__main__":
    main()
