"""All measures one after the other, each script in a process of its own, then the table for the README.

    python bench/run.py [--only steps,memory] [--threads 1] [--runs N] [--weights MODEL] [--smoke] [--out DIR]

`sparsetrail bench` runs this. CSVs go to bench/results, named after device and torch version; the table, with the
environment under it, is printed and written beside them as table.md. It holds the measures of this run only.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, csv_path, read_rows, table

SCRIPTS = {  # name: does it go into the table
    "steps": True,
    "robust_accuracy": True,
    "battery": True,
    "memory": True,
    "ideal": True,
    "scaling": False,
    "hotspots": False,
}


FACTS = (  # columns that go under the table
    "device", "flags", "threads", "clock", "torch", "python", "arch", "T", "batch", "image", "firing_rate", "inputs",
    "runs",
)  # fmt: skip


def shared_facts(rows: list[dict[str, str]]) -> str:
    """What all rows have in common, and each value where they differ."""
    values = {k: list(dict.fromkeys(r[k] for r in rows if r[k])) for k in FACTS}
    return "; ".join(f"{k.replace('_', ' ')} {' / '.join(v)}" for k, v in values.items() if v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SCRIPTS), help="names, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    names = [n for n in a.only.split(",") if n]
    if not names or set(names) - set(SCRIPTS):
        parser.error(f"--only: expected some of {', '.join(SCRIPTS)}, got {a.only!r}")
    if a.out is None:
        a.out = Path(tempfile.mkdtemp(prefix="bench-")) if a.smoke else ROOT / "bench" / "results"
    a.out.mkdir(parents=True, exist_ok=True)
    shared = ["--device", a.device, "--threads", str(a.threads), "--out", str(a.out)]
    shared += ["--runs", str(a.runs)] if a.runs else []
    shared += ["--weights", str(a.weights)] if a.weights else []
    shared += ["--smoke"] if a.smoke else []
    rows: list[dict[str, str]] = []
    failed: list[str] = []
    for name in names:
        done = subprocess.run([sys.executable, str(ROOT / "bench" / f"{name}.py"), *shared])
        if done.returncode:
            print(f"{name}: failed, see above; the others go on", file=sys.stderr)
            failed.append(name)
            continue
        print(flush=True)
        if SCRIPTS[name]:
            rows += read_rows(csv_path(name, a))
    if rows:
        if a.smoke:  # a size that proves that it runs reaches no goal, and misses none
            rows = [row | {"goal": "", "reached": ""} for row in rows]
        text = f"{table(rows)}\n\n{shared_facts(rows)}"
        (a.out / "table.md").write_text(text + "\n")
        print(text)
        print(f"written {a.out / 'table.md'}")
    if failed:
        sys.exit(f"{', '.join(failed)}: failed, see above; the CSVs of the others are in {a.out}")


if __name__ == "__main__":
    main()
