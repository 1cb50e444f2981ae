"""Weights as one self-checking safetensors file: tensors, a card (plain JSON), and a SHA-256 over both."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparsetrail._files import write_atomic


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted or does not fit; the message says what was expected, found and to do."""


def digest(tensors: Mapping[str, Tensor], card: str) -> str:
    """SHA-256 over the card's text and, in order of their names, name, type, shape and bytes of the tensors."""
    sha = hashlib.sha256(card.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        sha.update(f"\n{name} {t.dtype} {tuple(t.shape)}\n".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return sha.hexdigest()


def save_weights(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """Write tensors and card to `path` atomically; returns the SHA-256. The card must be JSON."""
    text = json.dumps(card, sort_keys=True, allow_nan=False)
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sha = digest(held, text)
    write_atomic(path, save(held, metadata={"card": text, "sha256": sha}))
    return sha


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors, card and SHA-256 of a file written by `save_weights`; anything damaged or foreign is refused."""
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
        raise CheckpointError(
            f"{path}: expected a checkpoint, found no file" + (f"; there is {', '.join(near)}" if near else "")
        )
    with open(path, "rb") as f:
        head = f.read(64)
    if not head:
        raise CheckpointError(f"{path}: expected a safetensors file, found an empty one; was the copy interrupted?")
    try:
        with safe_open(str(path), framework="pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:  # guess only now: a good file may begin like these
        if head.lstrip()[:1] == b"<":
            raise CheckpointError(
                f"{path}: expected a safetensors file, found an HTML page; the download saved an error page"
            ) from None
        if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            raise CheckpointError(
                f"{path}: expected a safetensors file, found a pickle (.pth), which can run code when it is read; "
                "take it in with `sparsetrail import`"
            ) from None
        raise CheckpointError(f"{path}: expected a whole safetensors file, found {error}; copy it again") from None
    if "sha256" not in meta or "card" not in meta:
        raise CheckpointError(f"{path}: expected a checkpoint with card and SHA-256, found a plain safetensors file")
    found = digest(tensors, meta["card"])
    if found != meta["sha256"]:
        raise CheckpointError(
            f"{path}: SHA-256 expected {meta['sha256']}, found {found}: damaged; use another snapshot"
        )
    return tensors, json.loads(meta["card"]), found
