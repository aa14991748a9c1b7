"""Checkpoints in the background: whole, exact, and never in the way."""

import csv
import json
import multiprocessing
import random
import threading

import numpy as np
import paddle
import pytest

from ernie45.checkpoint.writer import write_checkpoint
from ernie45.errors import CheckpointError
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.training import checkpoints
from ernie45.training.checkpoints import (
    BEST,
    OPTIMIZER_FILE,
    CheckpointWriter,
    Snapshot,
    fill,
    pointed,
    read_state,
)
from tests.helpers.tiny import DENSE, MOE, read_folder, same_bits
from tests.helpers.training import tiny_trainer, train_with_everything


def snapshot(step=1, value=1.0, best=False, **more):
    tensors = {"model.safetensors": {"a": paddle.full([3], value)}, OPTIMIZER_FILE: {"m": paddle.full([2], value)}}
    return Snapshot(step, tensors, {"trainer_state.json": {"step": step}}, best=best, **more)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def losses(folder):
    with (folder / "training.csv").open(encoding="utf-8") as file:
        return [(int(row["step"]), float(row["loss"]), float(row["gradient_norm"])) for row in csv.DictReader(file)]


def test_keeps_the_newest_and_the_best(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in range(1, 7):
        writer.save(snapshot(step, best=step == 2))
    writer.close()
    assert names(tmp_path) == ["best", "checkpoint-2", "checkpoint-5", "checkpoint-6", "latest"]
    assert pointed(tmp_path).name == "checkpoint-6"
    assert pointed(tmp_path, BEST).name == "checkpoint-2"


def test_tensors_may_change_once_they_are_copied(tmp_path):
    taken = snapshot(value=1.0)
    writer = CheckpointWriter(tmp_path)
    writer.save(taken)
    writer.wait_until_copied()
    taken.tensors["model.safetensors"]["a"].fill_(7.0)
    writer.close()
    found = {"a": paddle.zeros([3])}
    fill(found, tmp_path / "checkpoint-1", "model.safetensors")
    assert found["a"].tolist() == [1.0] * 3


def test_the_disk_is_not_waited_for(tmp_path, monkeypatch):
    go = threading.Event()

    def slow(*args, **kwargs):
        assert go.wait(30)
        return write_checkpoint(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "write_checkpoint", slow)
    writer = CheckpointWriter(tmp_path)
    writer.save(snapshot())
    writer.wait_until_copied()  # returns though nothing can be written yet
    assert pointed(tmp_path) is None
    go.set()
    writer.close()
    assert pointed(tmp_path).name == "checkpoint-1"


def test_a_failed_write_is_reported_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = tiny_trainer(tmp_path, DENSE, max_steps=10, save_steps=2)
    writes = iter([checkpoints.write_tensors_atomic, broken])
    monkeypatch.setattr(checkpoints, "write_tensors_atomic", lambda *args, **kwargs: next(writes)(*args, **kwargs))
    with pytest.raises(CheckpointError, match="checkpoint-4: could not be written.*No space left"):
        trainer.run()
    assert trainer.step < 10
    assert pointed(tmp_path).name == "checkpoint-2"
    CheckpointWriter(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "latest", "training.csv"]  # the unfinished one was removed


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.save(snapshot(3, 1.0))
    writer.save(snapshot(3, 2.0))
    writer.close()
    found = {"m": paddle.zeros([2])}
    fill(found, tmp_path / "checkpoint-3", OPTIMIZER_FILE)
    assert found["m"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("content", "message"), [("checkpoint-9", "names 'checkpoint-9'.*there: checkpoint-1"), ("../x", "no checkpoint")]
)
def test_a_pointer_to_nothing_is_an_error(tmp_path, content, message):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "latest").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        pointed(tmp_path)


def test_fill_refuses_other_tensors_and_copies_nothing(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.save(snapshot())
    writer.close()
    folder = tmp_path / "checkpoint-1"
    for wrong in ({"a": paddle.zeros([4])}, {"b": paddle.zeros([3])}, {"a": paddle.zeros([3], dtype="bfloat16")}):
        with pytest.raises(CheckpointError, match="not those of this run"):
            fill(wrong, folder, "model.safetensors")
        assert all(float(tensor.astype("float32").abs().sum()) == 0 for tensor in wrong.values())


def test_broken_state_is_an_error(tmp_path):
    (tmp_path / "trainer_state.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no state"):
        read_state(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_a_published_checkpoint(tmp_path, dtype):
    trainer = tiny_trainer(tmp_path / "run", MOE, dtype, max_steps=2)
    trainer.run()
    checkpoint = pointed(tmp_path / "run")
    trainer.model.save_pretrained(tmp_path / "saved", progress=False)
    (checkpoint / OPTIMIZER_FILE).unlink()
    assert same_bits(read_folder(checkpoint), read_folder(tmp_path / "saved"))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((checkpoint / name).read_text()) == json.loads((tmp_path / "saved" / name).read_text())
    loaded = ErnieForCausalLM.from_pretrained(checkpoint, dtype="float32", progress=False)
    np.testing.assert_array_equal(
        loaded.ernie.norm.weight.numpy(), trainer.model.ernie.norm.weight.astype("float32").numpy()
    )


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_with_the_same_losses(tmp_path):
    """SIGKILL at 20 random moments; what is left is whole, and the losses are those of a run in one piece."""
    steps, kills, chance = 250, 20, random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.training"])

    def start(folder, resume):
        process = context.Process(target=train_with_everything, args=(folder, steps, resume))
        process.start()
        return process

    whole = start(tmp_path / "whole", False)
    whole.join()
    assert whole.exitcode == 0
    killed, torn = 0, tmp_path / "torn"
    for _ in range(kills):
        process = start(torn, True)
        process.join(timeout=chance.uniform(0.0, 1.2))
        killed += process.is_alive()
        process.kill()
        process.join()
        checkpoint = pointed(torn) if torn.exists() else None
        if checkpoint is not None:
            assert f"checkpoint-{read_state(checkpoint)['step']}" == checkpoint.name
    assert killed >= kills // 2
    last = start(torn, True)
    last.join()
    assert last.exitcode == 0
    assert losses(torn) == losses(tmp_path / "whole")
    assert same_bits(read_folder(pointed(torn)), read_folder(pointed(tmp_path / "whole")))
