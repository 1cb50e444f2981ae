"""One thread, repeatable draws, shape annotations checked at run time, SpikingJelly without torchvision."""

import importlib.util
import sys
import types
import warnings

import jaxtyping
import shapecheck

assert "sparsetrail" not in sys.modules, "the hook must be in place before sparsetrail is imported"
jaxtyping.jaxtyped = shapecheck.jaxtyped  # the hook asks for it by name
jaxtyping.install_import_hook("sparsetrail", "shapecheck.check")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_configure(config):
    # torch 2.13 warns of its own use of torch.jit when it first compiles or takes a forward-mode derivative
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")


MISSING = "not installed; pip install --no-deps -r tests/references.txt"


def _stand_in_for_torchvision() -> None:
    """The one name that SpikingJelly's networks import from torchvision; nothing here may download."""

    def load_state_dict_from_url(*_, **__):
        raise RuntimeError("tests download nothing")

    package = types.ModuleType("torchvision")
    package.__path__ = []  # a package without modules, so that other imports from it fail as absent
    inner = types.ModuleType("torchvision._internally_replaced_utils")
    inner.load_state_dict_from_url = load_state_dict_from_url
    sys.modules |= {package.__name__: package, inner.__name__: inner}


@pytest.fixture(scope="session")
def spikingjelly() -> types.SimpleNamespace:
    """SpikingJelly's modules by short name; the test is skipped where the references are not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("loguru", "h5py", "spikingjelly"):
            pytest.importorskip(name, reason=f"{name}: {MISSING}")
        if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
            _stand_in_for_torchvision()
        names = ("neuron", "surrogate", "encoding", "functional", "layer", "model.sew_resnet", "model.spiking_resnet")
        found = {n: importlib.import_module(f"spikingjelly.activation_based.{n}") for n in names}
    return types.SimpleNamespace(**{n.removeprefix("model."): m for n, m in found.items()})
