"""The record of a run."""

import sys
import types

import pytest

from ernie45.errors import ErnieError
from ernie45.training.log import Board, CsvLog

COLUMNS = ("step", "loss", "eval_loss")


def test_rows_are_on_the_disk_at_once_and_exact(tmp_path):
    log = CsvLog(tmp_path / "log.csv", COLUMNS)
    log.write({"step": 1, "loss": 1 / 3})
    assert (tmp_path / "log.csv").read_text() == f"step,loss,eval_loss\n1,{1 / 3!r},\n"
    log.close()


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, COLUMNS)
    for step in range(1, 6):
        log.write({"step": step, "loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write("6,")  # killed in the middle of a row
    log = CsvLog(path, COLUMNS, after=3)
    log.write({"step": 4, "loss": 0.5, "eval_loss": 2.0})
    log.close()
    assert path.read_text().splitlines() == ["step,loss,eval_loss", "1,1.0,", "2,2.0,", "3,3.0,", "4,0.5,2.0"]


def test_a_new_run_begins_a_new_file(tmp_path):
    for _ in range(2):
        log = CsvLog(tmp_path / "log.csv", COLUMNS)
        log.write({"step": 1})
        log.close()
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,loss,eval_loss", "1,,"]


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "log.csv").write_text("step,other\n1,2\n")
    with pytest.raises(ErnieError, match="other columns"):
        CsvLog(tmp_path / "log.csv", COLUMNS, after=1)


@pytest.mark.parametrize(
    ("kind", "module", "writer"),
    [("visualdl", "visualdl", "LogWriter"), ("tensorboard", "tensorboardX", "SummaryWriter")],
)
def test_boards_get_every_number(tmp_path, monkeypatch, kind, module, writer):
    calls = []

    class Writer:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, *arguments):
            calls.append(arguments)

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{writer: Writer}))
    board = Board(kind, tmp_path)
    board.write({"step": 3, "loss": 0.5})
    board.close()
    assert calls == [str(tmp_path), ("loss", 0.5, 3), "closed"]


def test_a_board_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "visualdl", None)
    with pytest.raises(ErnieError, match="visualdl is not installed; pip install visualdl"):
        Board("visualdl", tmp_path)
    with pytest.raises(ErnieError, match="report_to: expected none, visualdl or tensorboard, found 'wandb'"):
        Board("wandb", tmp_path)
