"""Training step and attack step against SpikingJelly 2.0.0: the same network, weights and batch, in one process.

    python bench/steps.py [--threads 1] [--runs 9] [--weights MODEL] [--device cuda]

Needs `pip install --no-deps -r tests/references.txt` for the rival's column. The rival runs in fp32, as the paper's
code drives it: Adam for the training step, `loss.backward()` with parameter gradients included for the attack step;
further rows freeze its parameters, which the published code does not. Ours runs in fp32 and in bf16 where the device
has it (of an attack the input gradients only). On a GPU the rival's convolutions run in TF32, PyTorch's default there;
our fp32 is fp32, and a training row takes TF32 too. Training steps start from pixels on both sides, encoding included;
attack steps from the encoded tensor, or from pixels through the phase encoder with the identity rule. Jobs take turns;
figures are medians.
"""

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
    our_attack,
    our_training,
    precisions,
    row,
    save,
)

GOALS = {  # device, step, precision
    ("cpu", "attack", "fp32"): "ratio >= 3",
    ("cpu", "attack", "bf16"): "ratio >= 10",
    ("cpu", "training", "fp32"): "ratio >= 2",
    ("cpu", "training", "bf16"): "ratio >= 5",
    ("cuda", "attack", "fp32"): "ratio >= 6",
    ("cuda", "attack", "bf16"): "ratio >= 6",
    ("cuda", "training", "fp32"): "ratio >= 5",
    ("cuda", "training", "tf32"): "ratio >= 5",
    ("cuda", "training", "bf16"): "ratio >= 5",
}


def main() -> None:
    a = begin(flags(__doc__, runs=9))
    c = case(a)
    print(c)
    device, kinds = c.x.device, precisions(c.x.device)
    trained = (*kinds, "tf32") if device.type == "cuda" else kinds
    jobs: dict[str, dict[str, Job]] = {
        "training": {p: our_training(c, p) for p in trained},
        "attack": {p: our_attack(c, p) for p in kinds},
        "pixel": {p: our_attack(c, p, "pixel") for p in kinds},
    }
    if has_rival(c.spec):
        from rival import rival_attack, rival_training

        jobs["training"] = {"rival": rival_training(c, LR)} | jobs["training"]
        for step, space in (("attack", "encoded"), ("pixel", "pixel")):
            theirs = {"rival": rival_attack(c, space), "frozen": rival_attack(c, space, frozen=True)}
            jobs[step] = theirs | jobs[step]
    words = {"training": "training step", "attack": "attack step, encoded space", "pixel": "attack step, pixel space"}
    rows: list[Row] = []
    for step, sides in jobs.items():
        times = alternate(sides, a.runs, lambda: clock(device))
        for which in ("rival", "frozen") if "frozen" in sides else ("rival",):
            for p in trained if step == "training" else kinds:
                goal = GOALS.get((device.type, step, p), "") if which == "rival" else ""
                rows.append(
                    row(
                        f"{words[step]}, {p}" + (" (rival frozen)" if which == "frozen" else ""),
                        ms(times.get(which)),
                        ms(times[p]),
                        goal=goal,
                        remark="with AMX" if goal and (device.type, p) == ("cpu", "bf16") else "",
                        facts={"precision": p} | c.facts(),
                    )
                )
    save("steps", rows, a)


if __name__ == "__main__":
    main()
