"""sparsetrail: train, attack, trace and judge spiking neural networks. The names below are the public ones."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name: module; loaded at first use, so that `import sparsetrail` does not pay for torch
    "Audit": "core",
    "Claim": "core",
    "Finding": "core",
    "L0": "core",
    "L2": "core",
    "Linf": "core",
    "Problem": "core",
    "Rate": "core",
    "Report": "core",
    "Route": "core",
    "Run": "core",
    "Streams": "core",
    "Threat": "core",
    "Trail": "core",
    "Victim": "core",
    "NetSpec": "snn.net",
    "NeuronSpec": "snn.neuron",
    "Surrogate": "snn.surrogate",
    "atan": "snn.surrogate",
    "build": "snn.net",
    "victim": "snn.net",
    "bit_plane": "snn.encode",
    "direct": "snn.encode",
    "from_codebook": "snn.encode",
    "latency": "snn.encode",
    "phase": "snn.encode",
    "poisson": "snn.encode",
    "Dataset": "data",
    "load": "data",
    "pixels": "data",
    "Seams": "training",
    "TrainSpec": "training",
    "hire_snn": "defend",
    "mppd": "defend",
    "pgd_at": "defend",
    "snn_rat": "defend",
    "sr": "defend",
    "tg_reg": "defend",
    "trades": "defend",
    "load_model": "models",
    "train": "training",
    "attack": "attacks",
    "audit": "auditing",
    "authors": "attacks",
    "fgsm": "attacks",
    "noise": "attacks",
    "pgd": "attacks",
    "square": "attacks",
    "spsa": "attacks",
    "rays": "attacks",
    "sda": "attacks",
    "sparse_rs": "attacks",
    "sapgd": "attacks",
    "rfgsm": "attacks",
    "mifgsm": "attacks",
    "codebook": "attacks",
    "bim": "attacks",
    "fab": "attacks",
    "autoattack": "attacks",
    "apgd": "attacks",
    "stateful": "adapt",
    "spikingjelly": "adapt",
    "trail": "trails",
    "first_switch_radius": "theory",
    "gradient_fidelity": "theory",
    "participation_ratio": "theory",
    "temperature_probe": "theory",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsetrail' has no public name {name!r}")
    return getattr(import_module(f"sparsetrail.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
