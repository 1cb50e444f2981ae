"""Training: resumable to the bit, honest about its validation, loud about NaN, and refusing what it cannot trust."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from sparsetrail import data
from sparsetrail._files import alone
from sparsetrail.core import Rate
from sparsetrail.data.sets import make_dataset
from sparsetrail.models import load_model
from sparsetrail.snn.encode import phase, poisson
from sparsetrail.snn.net import NetSpec, build
from sparsetrail.snn.weights import CheckpointError, load_weights, save_weights
from sparsetrail.training import (
    Optimizer,
    Seams,
    TrainingFailed,
    TrainingStopped,
    TrainSpec,
    accuracy,
    first_nonfinite,
    kept,
    read_events,
    run,
    train,
)

NET = NetSpec(width=0.125, channels=1, steps=3)
ENCODE = phase(steps=3)
SPEC = TrainSpec(epochs=2, batch=16, validation=0.25)


@pytest.fixture(scope="module")
def images():
    return data.take(data.load("fashion-mnist-slice", "train"), 128, seed=0)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    return train(NET, ENCODE, images, SPEC, tmp_path_factory.mktemp("run") / "whole")


def same_weights(a, b):
    x, card_x, sha_x = load_weights(a)
    y, card_y, sha_y = load_weights(b)
    return sha_x == sha_y and card_x == card_y and all(torch.equal(x[k], y[k]) for k in x)


def test_it_learns_and_writes_what_it_promises(images, finished):
    out = finished.path.parent
    assert {p.name for p in out.iterdir()} - {".lock"} == {
        "model.safetensors", "last.safetensors", "state.safetensors", "state.previous.safetensors", "events.jsonl",
    }  # fmt: skip
    events = list(read_events(out))
    assert [e["event"] for e in events if e["event"] != "step"] == ["started", "epoch", "epoch", "done"]
    assert events[-1]["step"] == events[-1]["of"] == 2 * (96 // 16)
    card = finished.card
    assert card["data"]["sha256"] == images.sha256 and card["train"]["seed"] == 3407 and card["net"]["width"] == 0.125
    assert card["validation"]["n"] == 32 and "held-out" in card["chosen_by"]
    assert not finished.net.training
    assert load_model(out / "last.safetensors").card["chosen_by"] == "last epoch"


def test_the_loss_falls(images, tmp_path):
    losses = []
    train(
        NET,
        ENCODE,
        images,
        replace(SPEC, epochs=12, lr=5e-3),
        tmp_path / "r",
        say=lambda e: e["event"] == "step" and losses.append(e["loss"]),
    )
    assert sum(losses[-6:]) / 6 < 0.75 * sum(losses[:6]) / 6


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("stop_at", [1, 6, 9])
def test_stop_and_resume_is_bit_identical(images, tmp_path, optimizer, stop_at):
    spec = replace(SPEC, optimizer=optimizer, schedule="cosine", crop=2, clip=1.0, weight_decay=1e-4, lr=1e-2)
    losses, means = [], []

    def say(event):
        if event["event"] == "step":
            losses.append(event["loss"])
        elif event["event"] == "epoch":
            means.append(event["loss"])

    whole = train(NET, ENCODE, images, spec, tmp_path / "whole", say=say)
    assert means == pytest.approx([sum(losses[:6]) / 6, sum(losses[6:]) / 6]) and len(losses) == 12
    steps = iter(range(1, 1000))
    with pytest.raises(TrainingStopped, match="the same command continues"):
        train(NET, ENCODE, images, spec, tmp_path / "cut", stop=lambda: next(steps) == stop_at)
    resumed = train(NET, ENCODE, images, spec, tmp_path / "cut")
    events = list(read_events(tmp_path / "cut"))
    assert "resumed" in [e["event"] for e in events]
    assert [e["loss"] for e in events if e["event"] == "epoch"] == means
    for name in ("model.safetensors", "last.safetensors"):
        assert same_weights(whole.path.parent / name, resumed.path.parent / name)


def test_kill_9_and_resume_is_bit_identical(images, finished, tmp_path):
    script = textwrap.dedent(f"""
        import sys, torch, time
        torch.set_num_threads(1)
        from pathlib import Path
        from sparsetrail import data
        from sparsetrail.snn.encode import phase
        from sparsetrail.snn.net import NetSpec
        from sparsetrail.training import TrainSpec, train
        images = data.take(data.load("fashion-mnist-slice", "train"), 128, seed=0)
        def say(event):
            print(event["event"], event.get("step"), flush=True)
            time.sleep(0.05)
        train(NetSpec(width=0.125, channels=1, steps=3), phase(steps=3), images,
              TrainSpec(epochs=2, batch=16, validation=0.25), Path({str(tmp_path / "killed")!r}),
              checkpoint_seconds=0.0, say=say)
        """)  # fmt: skip
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.split() == ["step", "8"]:
            os.kill(child.pid, signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert not (tmp_path / "killed" / "last.safetensors").exists()
    resumed = train(NET, ENCODE, images, SPEC, tmp_path / "killed")
    started = [e for e in read_events(tmp_path / "killed") if e["event"] == "resumed"]
    assert len(started) == 1 and (started[0]["epoch"], started[0]["step"]) >= (1, 1)
    for name in ("model.safetensors", "last.safetensors"):
        assert same_weights(finished.path.parent / name, resumed.path.parent / name)


def test_a_finished_run_is_not_trained_again(images, finished):
    before = (finished.path.parent / "state.safetensors").read_bytes()
    t = time.monotonic()
    again = train(NET, ENCODE, images, SPEC, finished.path.parent)
    assert time.monotonic() - t < 5 and again.sha256 == finished.sha256
    assert (finished.path.parent / "state.safetensors").read_bytes() == before


def test_the_best_epoch_is_chosen_on_held_out_training_images(images, tmp_path):
    seen = []
    model = train(
        NET,
        ENCODE,
        images,
        replace(SPEC, epochs=4),
        tmp_path / "r",
        say=lambda e: e["event"] == "epoch" and seen.append(e["validation"]),
    )
    best = max(seen)
    assert model.card["validation"]["k"] / model.card["validation"]["n"] == best
    assert model.card["epochs_done"] == seen.index(best) + 1
    _, held_out = data.split_validation(images, 0.25, 3407)
    assert accuracy(model.net, model.encode, held_out).value == best
    with torch.no_grad():
        guesses = model.net(model.encode(data.pixels(held_out.images))).argmax(1)
    right = int((guesses == held_out.labels).sum())
    model.net.train()
    for size in (128, 5):
        assert accuracy(model.net, model.encode, held_out, batch=size) == Rate(right, 32) and 0 < right < 32
    assert model.net.training
    last = train(NET, ENCODE, images, replace(SPEC, validation=0.0), tmp_path / "v0")
    assert last.card["chosen_by"] == "last epoch" and last.card["validation"] is None and last.card["epochs_done"] == 2


def test_another_experiment_in_the_folder_is_refused(images, finished):
    with pytest.raises(ValueError, match="different train"):
        train(NET, ENCODE, images, replace(SPEC, lr=2e-3), finished.path.parent)
    with pytest.raises(ValueError, match="different net"):
        train(replace(NET, pool="avg"), ENCODE, images, SPEC, finished.path.parent)
    with pytest.raises(ValueError, match="different data"):
        train(NET, ENCODE, data.take(images, 120, seed=1), SPEC, finished.path.parent)


def test_what_does_not_fit_is_refused_before_anything_is_written(images, tmp_path):
    for net, match in (
        (replace(NET, steps=4), "steps"),
        (replace(NET, channels=3), "channels"),
        (replace(NET, classes=9), "classes"),
    ):
        with pytest.raises(ValueError, match=match):
            train(net, ENCODE, images, SPEC, str(tmp_path / "r"))
    side = images.images.shape[2]
    for name in ("crop", "cutout"):
        with pytest.raises(ValueError, match=f"{name}: expected fewer pixels than the images' {side}"):
            train(NET, ENCODE, images, replace(SPEC, **{name: side}), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    for bad in (
        {"lr": math.nan},
        {"lr": 0.0},
        {"batch": 0},
        {"epochs": 0},
        {"validation": 1.0},
        {"clip": -1.0},
        {"momentum": 5},
        {"momentum": 1.0},
        {"betas": (0.9, 1.0)},
        {"crop": -1},
        {"cutout": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrainSpec(**bad)
    with pytest.raises(ValueError, match="batch"):
        train(NET, ENCODE, images, replace(SPEC, batch=500), tmp_path / "r")


def test_nan_stops_and_keeps_the_last_good_checkpoint(images, tmp_path):
    def poison(net, generator):
        if len(calls) == 7:
            with torch.no_grad():
                net.layer1[0].conv1.weight[0] = math.nan
        calls.append(1)

    calls: list[int] = []
    with pytest.raises(TrainingFailed, match=r"failure\.json"):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", seams=Seams(after_step=poison, name="poison"))
    found = json.loads((tmp_path / "r" / "failure.json").read_text())
    assert found["first_nonfinite"] == "parameter layer1.0.conv1.weight"
    assert (found["epoch"], found["step"]) == (1, 2)
    assert load_model(tmp_path / "r").card["epochs_done"] == 1
    tensors, _, _ = load_weights(tmp_path / "r" / "state.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())


def test_statistics_that_overflow_are_a_failure_though_every_loss_is_finite(images, tmp_path):
    def poison(net, generator):
        net.bn1.running_var[0] = math.inf

    with pytest.raises(TrainingFailed, match=r"statistics not finite at epoch 0.*buffer bn1\.running_var"):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", seams=Seams(after_step=poison, name="poison"))
    assert not list((tmp_path / "r").glob("*.safetensors"))


def test_the_first_broken_layer_is_named(finished):
    class Broken(nn.Module):
        def forward(self, x):
            return x * math.inf

    net = nn.Sequential(nn.Identity(), Broken(), nn.Identity())
    assert first_nonfinite(net, torch.ones(2)) == "1"
    assert first_nonfinite(nn.Identity(), torch.ones(2)) is None


def test_idle_seams_are_bit_equal_to_plain_training(images, finished, tmp_path):
    def inputs(net, encode, x, y, generator):
        return x.clone()

    def penalty(net, encode, x, y, z, generator):
        return x.new_zeros(())

    seams = Seams(inputs=inputs, penalty=penalty, after_step=lambda net, generator: None, name="idle")
    idle = train(NET, ENCODE, images, SPEC, tmp_path / "r", seams=seams)
    assert idle.card.pop("defence") == {"name": "idle", "knobs": {}} and idle.card == finished.card
    assert all(torch.equal(v, finished.net.state_dict()[k]) for k, v in idle.net.state_dict().items())


@pytest.mark.parametrize(
    "seams",
    [
        Seams(inputs=lambda net, encode, x, y, g: x),
        Seams(penalty=lambda net, encode, x, y, z, g: 5 * z.square().mean()),
        Seams(after_step=lambda net, g: None),
        Seams(periods=2),
    ],
)
def test_a_defence_without_a_name_is_refused(images, tmp_path, seams):
    with pytest.raises(ValueError, match="seams: expected a name"):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", seams=seams)
    assert not (tmp_path / "r").exists()


def test_a_resumed_run_tells_what_it_began_with(images, finished, tmp_path, monkeypatch):
    steps, events = iter(range(1, 1000)), []
    with pytest.raises(TrainingStopped):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", stop=lambda: next(steps) == 3)
    monkeypatch.setattr(kept, "__version__", "9.9.9")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(TrainingStopped):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", say=events.append, stop=lambda: next(steps) == 5)
    other = train(NET, ENCODE, images, SPEC, tmp_path / "r")
    version = finished.card["made_with"]["sparsetrail"]
    (resumed,) = (e for e in events if e["event"] == "resumed")
    assert resumed["differs"] == f"threads 1, now 7; sparsetrail {version}, now 9.9.9"
    assert other.card["made_with"]["threads"] == 7
    assert other.card["begun_with"] == [finished.card["made_with"]] and "begun_with" not in finished.card


def test_bf16_trains_too_and_is_not_fp32(images, finished, tmp_path):
    model = train(NET, ENCODE, images, replace(SPEC, precision="bf16"), tmp_path / "r")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.net.parameters())
    ours, theirs = (load_weights(m.path.parent / "last.safetensors")[0] for m in (model, finished))
    assert not torch.equal(ours["conv1.weight"], theirs["conv1.weight"])


def test_a_loaded_model_gives_the_same_scores(images, finished):
    again = load_model(str(finished.path))
    u = finished.encode(data.pixels(images.images[:4]))
    with torch.no_grad():
        assert torch.equal(again.net(u), finished.net(u))
    assert again.encode.knobs == finished.encode.knobs


def test_damaged_and_foreign_checkpoints_each_get_their_own_sentence(finished, tmp_path):
    whole = finished.path.read_bytes()
    cases = {
        "flipped": (whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:], "SHA-256 expected"),
        "truncated": (whole[: len(whole) // 2], "whole safetensors file"),
        "empty": (b"", "empty"),
        "html": (b"<!doctype html><title>404</title>", "HTML"),
        "pickle": (b"PK\x03\x04rest", "pickle"),
    }
    for name, (content, match) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            load_model(path)
    with pytest.raises(CheckpointError, match="found no file"):
        load_model(tmp_path / "none.safetensors")
    tensors, card, _ = load_weights(finished.path)
    tensors.pop("fc.bias")
    save_weights(tmp_path / "short.safetensors", tensors, card)
    with pytest.raises(CheckpointError, match=r"missing \['fc.bias'\]"):
        load_model(tmp_path / "short.safetensors")


def test_a_damaged_snapshot_falls_back_to_the_one_before(images, finished, tmp_path):
    out = tmp_path / "r"
    steps = iter(range(1, 1000))
    with pytest.raises(TrainingStopped):
        train(NET, ENCODE, images, SPEC, out, checkpoint_seconds=0.0, stop=lambda: next(steps) == 8)
    state = bytearray((out / "state.safetensors").read_bytes())
    state[-50] ^= 1
    (out / "state.safetensors").write_bytes(state)
    resumed = train(NET, ENCODE, images, SPEC, out)
    assert same_weights(resumed.path, finished.path)
    for name in ("state.safetensors", "state.previous.safetensors"):
        (out / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no good snapshot"):
        train(NET, ENCODE, images, SPEC, out)


def test_a_damaged_snapshot_never_takes_the_place_of_the_good_one(images, finished, tmp_path, monkeypatch):
    """Killed while it writes its first snapshot after falling back, a run still has one to go on from."""
    out, steps = tmp_path / "r", iter(range(1, 1000))
    with pytest.raises(TrainingStopped):
        train(NET, ENCODE, images, SPEC, out, checkpoint_seconds=0.0, stop=lambda: next(steps) == 8)
    state = bytearray((out / "state.safetensors").read_bytes())
    state[-50] ^= 1
    (out / "state.safetensors").write_bytes(state)

    def killed(path, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kept, "save_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        train(NET, ENCODE, images, SPEC, out, checkpoint_seconds=0.0)
    monkeypatch.undo()
    assert (out / "state.damaged.safetensors").read_bytes() == state
    assert same_weights(train(NET, ENCODE, images, SPEC, out).path, finished.path)


def test_what_a_killed_writer_left_is_swept(images, tmp_path):
    (tmp_path / "r").mkdir()
    left = tmp_path / "r" / ".state.safetensors.1.ab.part"
    left.write_bytes(b"half")
    train(NET, ENCODE, images, replace(SPEC, epochs=1), tmp_path / "r")
    assert not left.exists()


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*w\.safetensors'"):
        save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, {})
    assert not list(tmp_path.iterdir())


def test_a_second_process_in_the_folder_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="another process is training here"):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", stop=lambda: train(NET, ENCODE, images, SPEC, tmp_path / "r"))


def test_a_folder_that_cannot_be_locked_is_told_as_that(images, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match="found No locks available; give an --out on a local disk"):
        train(NET, ENCODE, images, SPEC, tmp_path / "r")


def test_nobody_trains_on_the_test_split(images, tmp_path):
    with pytest.raises(
        ValueError, match=r"expected images to train on, got the test split of .*load\(\.\.\., \"train\"\)"
    ):
        train(NET, ENCODE, replace(images, split="test"), SPEC, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_the_snapshot_itself_is_asked_what_experiment_it_is_of(images, tmp_path, monkeypatch):
    """A folder may change between the look at it and the reading of its snapshot."""
    steps = iter(range(1, 1000))
    with pytest.raises(TrainingStopped):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", stop=lambda: next(steps) == 3)
    monkeypatch.setattr(run, "check_folder", lambda *_: None)
    with pytest.raises(ValueError, match="different train"):
        train(NET, ENCODE, images, replace(SPEC, lr=2e-3), tmp_path / "r")


def test_a_folder_is_looked_into_under_its_lock(images, finished, tmp_path):
    out = tmp_path / "r"
    shutil.copytree(finished.path.parent, out)
    with alone(out), pytest.raises(ValueError, match="another process is training here"):
        train(NET, ENCODE, images, replace(SPEC, lr=2e-3), out)


def test_a_folder_moved_away_before_its_lock_is_had_is_not_held(tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()

    def late(*_):
        os.replace(tmp_path / "r", tmp_path / "r.old1")
        (tmp_path / "r").mkdir()

    monkeypatch.setattr("fcntl.flock", late)
    with pytest.raises(ValueError, match="another process"), alone(tmp_path / "r"):
        pass


def test_a_random_encoder_resumes_to_the_bit_too(images, tmp_path):
    encode = poisson(steps=3)
    whole = train(NET, encode, images, SPEC, tmp_path / "whole")
    steps = iter(range(1, 1000))
    with pytest.raises(TrainingStopped):
        train(NET, encode, images, SPEC, tmp_path / "cut", stop=lambda: next(steps) == 3)
    assert same_weights(whole.path, train(NET, poisson(steps=3), images, SPEC, tmp_path / "cut").path)


def test_a_lone_previous_snapshot_of_another_experiment_is_refused(images, tmp_path):
    steps = iter(range(1, 1000))
    with pytest.raises(TrainingStopped):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", stop=lambda: next(steps) == 3)
    os.replace(tmp_path / "r" / "state.safetensors", tmp_path / "r" / "state.previous.safetensors")
    with pytest.raises(ValueError, match="different net"):
        train(replace(NET, pool="avg"), ENCODE, images, SPEC, tmp_path / "r")


def watched(images, out, spec, **more):
    """The first weights of a run, and of every step the pixels, the labels and the seed of its draws."""
    weights, steps = [], []

    def inputs(net, encode, x, y, generator):
        weights.extend([] if weights else [p.detach().clone() for p in net.parameters()])
        steps.append((x, y, generator.initial_seed()))
        return x

    with contextlib.suppress(TrainingStopped):
        train(NET, ENCODE, images, spec, out, seams=Seams(inputs=inputs, name="watch"), **more)
    return weights, steps


def test_every_epoch_shows_every_image_once_in_another_order_augmented_afresh(images, tmp_path, monkeypatch):
    images, asked = data.take(images, 48, seed=0), []
    monkeypatch.setattr(Optimizer, "set_rate", lambda _, step, total: asked.append((step, total)))
    spec, plain = replace(SPEC, validation=0.0, flip=False), data.pixels(images.images)
    _, steps = watched(images, tmp_path / "plain", spec)
    rows = [(x[:, None] == plain).flatten(2).all(2).nonzero()[:, 1] for x, _, _ in steps]
    first, second = (torch.cat(rows[i : i + 3]) for i in (0, 3))
    assert torch.equal(first.sort().values, torch.arange(48)) and torch.equal(second.sort().values, torch.arange(48))
    assert not torch.equal(first, second) and asked == [(i, 6) for i in range(6)]
    assert all(torch.equal(y, images.labels[r]) for (_, y, _), r in zip(steps, rows, strict=True))
    _, steps = watched(images, tmp_path / "augmented", replace(spec, flip=True, crop=2, cutout=4))
    for (x, _, seed), r in zip(steps, rows, strict=True):
        g = torch.Generator().manual_seed(seed)
        assert torch.equal(x, data.pixels(data.cutout(data.flip(data.crop(images.images[r], 2, g), g), 4, g)))
        assert not torch.equal(x, plain[r])
    assert len({seed for _, _, seed in steps}) == 6


@pytest.mark.parametrize("begun", [False, True])
def test_the_seed_decides_first_weights_order_and_draws(images, finished, tmp_path, begun):
    """Weights only where there is no model to begin from."""
    spec = replace(SPEC, validation=0.0, flip=False)
    more = {"start": finished if begun else None, "stop": lambda: True}
    runs = [watched(images, tmp_path / str(seed), replace(spec, seed=seed), **more) for seed in (1, 2)]
    (weights, [(x, _, seed)]), (others, [(z, _, other)]) = runs
    first = next(finished.net.parameters())
    assert torch.equal(weights[0], others[0]) == torch.equal(weights[0], first) == begun
    assert not torch.equal(x, z) and seed != other


def test_weights_that_are_not_finite_are_refused(finished, tmp_path):
    tensors, card, _ = load_weights(finished.path)
    tensors["fc.bias"][3] = math.nan
    save_weights(tmp_path / "nan.safetensors", tensors, card)
    with pytest.raises(CheckpointError, match=r"fc\.bias"):
        load_model(tmp_path / "nan.safetensors")


def test_a_good_file_is_never_taken_for_a_pickle(tmp_path):
    """The first bytes of safetensors are the length of its header, which may begin like anything."""
    seen = set()
    for pad in range(600, 1500):
        save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, {"pad": "x" * pad})
        head = (tmp_path / "w.safetensors").read_bytes()[:2]
        if head in (b"\x80\x02", b"\x80\x04", b"\x80\x05"):
            seen.add(head)
            assert load_weights(tmp_path / "w.safetensors")[1]["pad"] == "x" * pad
    assert seen


def test_a_cut_off_last_event_costs_itself_only(images, tmp_path):
    steps = iter(range(1, 1000))
    with pytest.raises(TrainingStopped):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", stop=lambda: next(steps) == 3)
    with open(tmp_path / "r" / "events.jsonl", "a") as f:
        f.write('{"event": "ste')
    train(NET, ENCODE, images, SPEC, tmp_path / "r")
    assert [e["event"] for e in read_events(tmp_path / "r") if e["event"] != "step"][:3] == [
        "started",
        "stopped",
        "resumed",
    ]


def test_weights_round_trip_and_card_is_guarded(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(7), "c": torch.zeros(0)}
    sha = save_weights(tmp_path / "w.safetensors", tensors, {"kind": "x"})
    held, card, found = load_weights(tmp_path / "w.safetensors")
    assert sha == found and card == {"kind": "x"} and all(torch.equal(tensors[k], held[k]) for k in tensors)
    raw = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(raw.replace(b'kind\\": \\"x', b'kind\\": \\"y'))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_weights(tmp_path / "w.safetensors")
    with pytest.raises(ValueError):
        save_weights(tmp_path / "n.safetensors", tensors, {"nan": math.nan})
    assert not (tmp_path / "n.safetensors").exists()
    assert not list(tmp_path.glob("*.part"))


def test_the_optimiser_follows_parameters_to_other_memory():
    """`p.data = ...`, gradients in another memory order, and none at all, as torch.optim takes them."""
    for name in ("adam", "sgd"):
        net, twin = (build(NetSpec(width=0.25, steps=2), seed=0) for _ in range(2))
        spec = TrainSpec(optimizer=name, lr=0.01, betas=(0.8, 0.99), momentum=0.7, weight_decay=0.3)
        ours = Optimizer(net, spec)
        if name == "adam":
            theirs = torch.optim.Adam(twin.parameters(), 0.01, betas=(0.8, 0.99), weight_decay=0.3)
        else:
            theirs = torch.optim.SGD(twin.parameters(), 0.01, momentum=0.7, weight_decay=0.3)
        g = torch.Generator().manual_seed(0)
        for step in range(3):
            for i, (p, q) in enumerate(zip(net.parameters(), twin.parameters(), strict=True)):
                grad = torch.randn(p.shape, generator=g)
                grad = grad if step else grad.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else grad
                p.grad, q.grad = (None, None) if i == 3 else (grad, grad.clone())
            ours.step(), theirs.step()
            with torch.no_grad():
                for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                    p.data, q.data = p.data.clamp(-0.3, 0.3), q.data.clamp(-0.3, 0.3)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("none", (1, 1, 1, 1, 1)), ("cosine", (1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0))],
)  # fmt: skip
def test_the_learning_rate_is_constant_or_falls_by_half_a_cosine(schedule, shares):
    optimizer = Optimizer(nn.Linear(2, 1), TrainSpec(lr=0.2, schedule=schedule))
    for step, share in zip((0, 2, 4, 6, 8), shares, strict=True):
        optimizer.set_rate(step, 8)
        assert optimizer.inner.param_groups[0]["lr"] == optimizer.rate == pytest.approx(0.2 * share, abs=1e-12)


def test_ties_and_no_numbers_are_not_correct():
    """As every attack counts: a network that scores NaN, or all classes alike, knows nothing."""
    net = build(NET, seed=0).eval()
    images, labels = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8).numpy(), torch.full((20,), 3).numpy()
    some = make_dataset("toy", "test", images, labels, tuple("0123456789"))
    for bias in (float("nan"), 0.0):
        with torch.no_grad():
            net.fc.weight.zero_(), net.fc.bias.zero_()
            net.fc.bias[3] = bias
        assert accuracy(net, ENCODE, some).k == 0
    with torch.no_grad():
        net.fc.bias[3] = 1.0
    assert accuracy(net, ENCODE, some).k == 20


@pytest.mark.parametrize("wrong", [
    {"cutout": 2.5}, {"flip": "no"}, {"epochs": True}, {"batch": 4.0}, {"crop": 1.5}, {"seed": 1.5}, {"lr": "0.1"},
    {"betas": (0.9,)}, {"betas": 0.9}, {"optimizer": 3},
])  # fmt: skip
def test_settings_of_another_kind_are_refused(wrong):
    with pytest.raises((ValueError, TypeCheckError), match=rf"{next(iter(wrong))}: expected|type"):
        TrainSpec(**wrong)


def test_a_start_is_the_file_that_the_card_names(images, finished, tmp_path):
    other = load_model(finished.path)
    with torch.no_grad():
        other.net.fc.weight.mul_(0.5)
    with pytest.raises(ValueError, match="start: expected the weights of"):
        train(NET, ENCODE, images, SPEC, tmp_path / "r", start=other)
    assert not (tmp_path / "r").exists()


def test_cards_that_make_no_network_are_told(finished, tmp_path):
    tensors, card, _ = load_weights(finished.path)
    net, encoder = card["net"], card["encoder"]
    for changed, words in (
        ({k: v for k, v in card.items() if k != "net"}, "a card of a network"),
        (card | {"net": net | {"newer": 1}}, "a card of a network"),
        (card | {"encoder": encoder | {"name": "morse"}}, "a card of a network"),
        (card | {"net": net | {"width": 0.25}}, "other shape"),
        (card | {"encoder": encoder | {"knobs": encoder["knobs"] | {"steps": 5}}}, "an encoder of 3 steps"),
    ):
        save_weights(tmp_path / "model.safetensors", tensors, changed)
        with pytest.raises(CheckpointError, match=words):
            load_model(tmp_path)
