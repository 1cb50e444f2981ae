"""The parts of `bench/` that could lie: what is counted, how rounds are paired, what the table says; nothing timed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsetrail import cli
from sparsetrail.cli import verbs
from sparsetrail.core import correct

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(BENCH))

import common  # noqa: E402
import ideal  # noqa: E402
import rival  # noqa: E402


def arguments(*argv):
    return common.flags("x", runs=1).parse_args(["--T", "2", "--batch", "2", *argv])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(7, 2, 3), (3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (2, 2, 0)]
)
def test_taps_are_counted_exactly(kernel, stride, padding):
    """Against a convolution of ones with ones, which adds up exactly the pairs that meet."""
    for size in range(2, 9):
        layer = ideal.Layer("x", 3, size, size + 1, 2, 5, kernel, stride, padding)
        image, weight = torch.ones(3, 2, size, size + 1), torch.ones(5, 2, kernel, kernel)
        met = F.conv2d(image.double(), weight.double(), stride=stride, padding=padding).sum()
        assert layer.flops == 2 * int(met), size


def test_taps_of_a_whole_network():
    """Every convolution is counted, with the map it sees; far fewer taps than its kernels have on tiny maps."""
    c = common.case(arguments())
    found = {layer.name: layer for layer in ideal.layers(c.net, c.u)}
    assert found.keys() == {n for n, m in c.net.named_modules() if isinstance(m, nn.Conv2d)} and len(found) == 20
    assert found["conv1"].frames == 4 and (found["conv1"].height, found["layer4.1.conv2"].height) == (32, 1)
    assert found["layer4.1.conv2"].flops == 2 * 4 * 512 * 512  # one tap of nine
    assert found["layer3.1.conv2"].flops == 2 * 4 * 256 * 256 * 16  # four cells see four taps each


def test_the_deepest_layers_of_the_measured_network_fire():
    c = common.case(arguments("--T", "4"))
    assert 0.2 < c.firing < 0.6 and c.lowest > 0.05
    fresh = common.build(c.spec).eval()
    quiet = common.firing_rates(fresh, c.u)["layer4.1.conv2"]
    assert quiet[0] / quiet[1] < 0.01  # what would have been measured otherwise
    assert all(m.momentum == 0.1 for m in c.net.modules() if isinstance(m, nn.BatchNorm2d)) and not c.net.training


def test_rounds_alternate_and_are_paired():
    calls, now = [], [0.0]

    def job(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds[(len(calls) - 1) // 2]

        return run

    jobs = {"a": job("a", [99, 4, 6, 9]), "b": job("b", [99, 2, 1, 3])}
    times = common.alternate(jobs, 3, lambda: now[0], warm=1)
    assert calls == ["a", "b"] * 4
    assert times == {"a": [4, 6, 9], "b": [2, 1, 3]}
    r = common.row("x", times["a"], times["b"])
    assert (r.rival, r.ours, r.ratio, r.low, r.high) == (6, 2, 3, 2, 6)
    alone = common.row("x", None, times["b"], goal="ratio >= 3")
    assert (alone.rival, alone.ratio, alone.low, alone.reached) == (None, None, None, "")


@pytest.mark.parametrize(
    ("goal", "rival_", "ours", "reached"),
    [
        ("ratio >= 3", 6.0, 2.0, "yes"),
        ("ratio >= 3", 5.9, 2.0, "no"),
        ("ratio >= 3", None, 2.0, ""),
        ("ours <= 4", 1.0, 4.0, "yes"),
        ("ours <= 4", None, 4.1, "no"),
        ("", 6.0, 2.0, ""),
    ],
)
def test_goal_and_table(goal, rival_, ours, reached, tmp_path):
    r = common.Row(measure="step", unit="ms", rival=rival_, ours=ours, goal=goal, remark="with AMX" if goal else "")
    assert r.reached == reached
    a = arguments("--out", str(tmp_path))
    rows = common.read_rows(common.save("steps", [r], a))
    assert rows[0]["reached"] == reached and rows[0]["torch"] == torch.__version__ and rows[0]["goal"] == goal
    assert rows[0]["rival"] == ("" if rival_ is None else f"{rival_:.4g}")  # no other column of that name
    cells = [c.strip() for c in common.table(rows).splitlines()[2].split("|")[1:-1]]
    shown = {"ratio >= 3": "≥ 3x (with AMX)", "ours <= 4": "≤ 4x (with AMX)", "": "-"}[goal]
    assert cells[0] == "step" and cells[4:] == [shown, reached or "-"]


@pytest.mark.parametrize("arch", ["sew_resnet18", "spiking_resnet18"])
def test_both_sides_do_the_same_work(spikingjelly, arch):
    """Same weights, same batch: equal scores and equal gradients in both spaces, in float64, where no spike flips."""
    c = common.case(arguments("--arch", arch))
    net = c.net.double()
    c = common.as_case(c.spec, net, c.encode, c.x.double(), c.y, c.inputs)
    theirs, reset = rival.reference_net(c.spec, net.state_dict())
    with torch.no_grad():
        want, got = theirs.eval()(c.u), net(c.u)
    reset()
    assert (want - got).abs().max() < 1e-12 and want.std() > 0
    for space in ("encoded", "pixel"):
        ours = common.our_attack(c, "fp32", space)()
        for frozen in (False, True):
            mean = rival.rival_attack(c, space, frozen=frozen)()  # of the mean loss, ours of the sum
            assert (mean * len(c.y) - ours).abs().max() <= 1e-10 * ours.abs().max() and ours.abs().max() > 0


def test_the_published_loop_scores_clean_images_at_radius_zero(spikingjelly):
    c = common.case(arguments("--batch", "4"))
    theirs, reset = rival.reference_net(c.spec, c.net.state_dict())
    theirs.eval()
    with torch.no_grad():
        z = theirs(c.u)
    reset()
    y = torch.where(torch.arange(4) < 2, z.argmax(1), (z.argmax(1) + 1) % 10)
    right = rival.published_pgd(theirs, reset, c.u, y, torch.Generator().manual_seed(0), eps=0.0, steps=1)
    assert right.tolist() == correct(z, y).tolist() == [True, True, False, False]


def test_bench_from_the_command_line(spikingjelly, tmp_path):
    command = "from sparsetrail.cli import main; main()"
    argv = ["bench", "--only", "ideal", "--smoke", "--out", str(tmp_path), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", command, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob(f"ideal_*-1thread_torch{torch.__version__}.csv")
    row = common.read_rows(found)[0]
    assert float(row["rival"]) > 0 and float(row["gflop"]) > 0 and row["runs"] == "1" and float(row["firing_rate"]) > 0
    table = (tmp_path / "table.md").read_text()
    assert "| attack step over the ideal, fp32 |" in table and table in done.stdout
    done = subprocess.run([sys.executable, str(BENCH / "run.py"), "--only", "speed"], capture_output=True, text=True)
    assert done.returncode == 2 and "robust_accuracy" in done.stderr


def test_a_bare_machine_measures_ours_alone(tmp_path):
    """Torch, numpy and safetensors only, no rival: its column stays empty."""
    code = f"""
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BANNED:
            raise ModuleNotFoundError(name)
BANNED = {{"jaxtyping", "cyclopts", "rich", "msgspec", "altair", "tabulate", "scipy", "PIL", "jinja2", "filelock"}}
sys.meta_path.insert(0, Bare())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "spikingjelly" else found(name, *a)
sys.path.insert(0, {str(BENCH)!r})
sys.argv = ["ideal.py", "--smoke", "--out", {str(tmp_path)!r}]
import common
import hotspots, memory, robust_accuracy, run, scaling, steps, ideal
assert not common.SPIKINGJELLY
ideal.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = common.read_rows(next(tmp_path.glob("*.csv")))[0]
    assert row["rival"] == row["ratio"] == "" and float(row["ours"]) > 0


def test_what_bench_needs_is_said(tmp_path, monkeypatch, capsys):
    def refused():
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "--smoke"])
        assert stop.value.code == 4
        return capsys.readouterr().err

    monkeypatch.setattr(verbs.importlib.util, "find_spec", lambda _name: None)
    assert "pip install --no-deps -r tests/references.txt" in refused()
    monkeypatch.setattr(verbs, "__file__", str(tmp_path / "src" / "sparsetrail" / "cli" / "verbs.py"))
    assert "clone" in refused()


def test_a_script_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    import run

    ran = []

    def script(command):
        ran.append(Path(command[1]).stem)
        return subprocess.CompletedProcess(command, int(ran[-1] == "memory"))

    monkeypatch.setattr(run.subprocess, "run", script)
    monkeypatch.setattr(run, "read_rows", lambda path: [])
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^memory: failed, see above"):
        run.main()
    assert ran == list(run.SCRIPTS)
