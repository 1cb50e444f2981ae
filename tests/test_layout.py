"""Who may import whom, what is public, and that the light rooms run on a bare machine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparsetrail

SRC = Path(sparsetrail.__file__).parent
LEVELS = [  # a room may import rooms of earlier levels, never of its own or later ones
    {"_shapes", "_files"},
    {"core"},
    {"snn", "data", "attacks", "trails"},
    {"models", "report", "checks", "adapt", "theory"},
    {"training", "auditing", "convert"},
    {"defend"},
    {"recipes"},
    {"cli"},
]
ONLY = {  # narrower
    "snn": {"core"},
    "data": {"core"},
    "attacks": {"core"},
    "trails": {"core"},
    "models": {"core", "snn"},
    "report": {"core"},
    "checks": {"core", "attacks"},
    "adapt": {"core", "snn"},
    "convert": {"core", "data", "models", "snn"},
    "defend": {"core", "snn", "training"},
    "theory": {"core", "snn", "attacks", "trails"},
    "auditing": {"core", "attacks", "checks", "snn"},
}


def rooms():
    found = {}
    for path in SRC.rglob("*.py"):
        room = path.relative_to(SRC).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path}: relative import"
                names = [node.module]
                if node.module == "sparsetrail":
                    names = [f"sparsetrail.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            for name in names:
                if name.startswith("sparsetrail."):
                    found.setdefault(room, set()).add(name.split(".")[1])
    return found


def level(room):
    return next((i for i, names in enumerate(LEVELS) if room in names), None)


def test_imports_go_one_way():
    found = rooms()
    assert {"core", "snn", "attacks", "training", "recipes", "cli", "report"} <= set(found)
    for room, used in found.items():
        if room in ("__init__", "__main__"):
            continue
        for other in used - {room, "__version__"}:
            assert level(other) is not None and level(room) is not None, (room, other)
            assert level(other) < level(room), f"{room} must not import {other}"
            if room in ONLY and level(other) > 0:
                assert other in ONLY[room], f"{room} may import {ONLY[room]} only, not {other}"


def test_every_public_name_is_there_and_documented():
    for name in sparsetrail.__all__:
        assert getattr(sparsetrail, name).__doc__, name
    with pytest.raises(AttributeError, match="no public name"):
        sparsetrail.nothing  # noqa: B018


def test_importing_the_package_does_not_load_torch():
    code = "import sys, sparsetrail, sparsetrail.cli; sparsetrail.cli.app(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_light_rooms_need_torch_numpy_and_safetensors_only():
    """On a bare machine: every other package is made unimportable."""
    code = """
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BANNED:
            raise ImportError(f"{name} is not on a bare machine")
BANNED = {"jaxtyping", "beartype", "cyclopts", "rich", "msgspec", "altair", "vl_convert", "tabulate", "scipy", "PIL",
          "jinja2", "filelock", "pandas"}
sys.meta_path.insert(0, Bare())
import sparsetrail.core, sparsetrail.training, sparsetrail.attacks, sparsetrail.trails, sparsetrail.data
import sparsetrail.snn.net as net, sparsetrail.snn.encode as encode, torch
n = net.build(net.NetSpec(width=0.125, steps=2)).eval()
v = net.victim(n, encode.phase(steps=2))
x = torch.rand(2, 3, 32, 32)
from sparsetrail.attacks import attack, fgsm
from sparsetrail.core import Linf
print(attack(fgsm, v, Linf(8/255, space="pixel"), x, torch.tensor([0, 1])).n)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "2", out.stderr


def test_public_names_are_listed_before_they_are_used():
    done = subprocess.run(
        [sys.executable, "-c", "import sparsetrail as st; print(*dir(st))"], capture_output=True, text=True
    )
    assert set(sparsetrail.__all__) <= set(done.stdout.split())
    assert (Path(sparsetrail.__file__).parent / "py.typed").exists()


def test_public_names_stay_functions_whatever_is_imported_first():
    code = """
import sparsetrail.cli.verbs, sparsetrail.training, sparsetrail.trails, sparsetrail as st
for name in st.__all__:
    first, second = getattr(st, name), getattr(st, name)
    assert first is second and type(first).__name__ != "module", name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_and_docs_code_runs(tmp_path, monkeypatch):
    """Every python block of the README and of docs/start.md, in order; pages are the user's first programs."""
    monkeypatch.chdir(tmp_path)
    root = SRC.parents[1]
    count = 0
    for page in (
        root / "README.md",
        root / "docs" / "start.md",
        root / "docs" / "adding.md",
        root / "docs" / "victims.md",
        root / "docs" / "theory.md",
    ):
        names: dict = {}
        for block in page.read_text().split("```python")[1:]:
            exec(compile(block.split("```")[0], str(page), "exec"), names)
            count += 1
    assert count >= 3
