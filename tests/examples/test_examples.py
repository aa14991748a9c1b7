"""Every example runs as its docstring says, with the embedded model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.examples import EXAMPLES, ROOT, run
from tests.helpers.vision import write_vision_folder


def test_demo_answers_questions_about_text_and_pictures_and_says_how_fast() -> None:
    printed = run("demo.py")
    assert "User: 23+58=?\nAssistant: 3+8=11, 2+5+1=8. 81\n" in printed
    assert "User: What do the digits add up to?\nAssistant: 7+3=10. 10\n" in printed
    assert "User: When did 9 appear?\nAssistant: 0 s 4, 1 s 9. 1 s\n" in printed
    assert printed.count("Assistant: ") == 7
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


def run_notebook(name: str, **environment: str) -> list[str]:
    """Executes a notebook and returns what each code cell printed."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    return [  # text may come in several pieces
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_quickstart_notebook() -> None:
    answered = [text for text in run_notebook("quickstart.ipynb") if text]
    assert answered[0].endswith(". 81")
    assert any("tokens per expert" in text for text in answered)


# Pictures


def test_the_small_model_reads_a_picture_and_a_clip() -> None:
    assert run("describe_image.py", "examples/media/seven.png").startswith("7\n[")
    assert "Assistant: 4, 9. 9\n" in run("ask_video.py", "examples/media/clip.gif", "What came after 4?")


# With a random model, so that only the way through is tested, not what it says.


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_folder(tmp_path_factory.mktemp("vision"))


def test_describe_image(vision_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "photo.png"
    Image.new("RGB", (90, 60), "teal").save(picture)
    options = ("--model", str(vision_folder), "--max-new-tokens", "4", "--no-thinking")
    printed = run("describe_image.py", str(picture), str(picture), "--question", "Same?", *options)
    assert re.search(r"\[\d+ tokens of prompt, [1-4] of answer\]\n$", printed)


def test_ask_video_encodes_it_once_and_answers_each_question(vision_folder: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.gif"
    colours = ("red", "green", "blue", "white")
    frames = [Image.new("RGB", (64, 48), colour) for colour in colours]
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=500)
    options = ("--model", str(vision_folder), "--max-new-tokens", "3", "--max-frames", "16")
    printed = run("ask_video.py", str(clip), "First?", "Then?", *options)
    assert printed.startswith("4 frames of ")
    assert [line for line in printed.splitlines() if line.startswith("User")] == ["User: First?", "User: Then?"]


def test_pictures_notebook(vision_folder: Path) -> None:
    printed = run_notebook("pictures.ipynb", ERNIE45_VISION_MODEL=str(vision_folder))
    assert any("vision" in text and "[" in text for text in printed)
    assert any("frames, rows and columns" in text for text in printed)
    assert printed[-1].count("layer 1") == 2
