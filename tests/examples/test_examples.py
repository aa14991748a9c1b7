"""Every example runs as its docstring says, with the embedded model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: str) -> str:
    """Runs an example in a process of its own and returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo_answers_three_questions_and_says_how_fast() -> None:
    printed = run("demo.py")
    assert "User: 23+58=?\nAssistant: 3+8=11, 2+5+1=8. 81\n" in printed
    assert printed.count("Assistant: ") == 3
    assert "tokens/s" in printed


def test_generate() -> None:
    assert run("generate.py", "81-23=?").startswith("1+10-3=8, 8-1-2=5. 58\n")


def test_chat_answers_each_turn() -> None:
    printed = run("chat.py", "23+58=?", "81-23=?")
    assert re.findall(r"Assistant: .*\. (\d+)\n", printed) == ["81", "58"]


def test_batch_answers_like_single_questions() -> None:
    assert "12+30=?  ->  2+0=2, 1+3=4. 42\n" in run("batch.py")


def test_convert_there_and_back_changes_nothing() -> None:
    assert run("convert.py").endswith("back: identical\n")


def test_quickstart_notebook() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = [  # text may come in several pieces
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    answered = [text for text in printed if text]
    assert answered[0].endswith(". 81")
    assert any("tokens per expert" in text for text in answered)
