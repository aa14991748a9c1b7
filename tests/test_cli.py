"""The command line, run in this process with the embedded model."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ernie45 import cli
from tests.helpers.text_part import write_text_folder
from tests.helpers.vision import write_vision_folder

SUM = "3+8=11, 2+5+1=8. 81\n"  # what the embedded model says to 23+58=?
DIFFERENCE = "1+10-3=8, 8-1-2=5. 58\n"  # and to 81-23=?


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command."""
    status = cli.main(list(arguments))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_generate_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate", "--prompt", "23+58=?") == (0, SUM, "")


def test_generate_reads_the_prompt_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("81-23=?"))
    assert run(capsys, "generate")[1] == DIFFERENCE


def test_generate_raw_continues_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    raw = "<|begin_of_sentence|>User: 23+58=?\nAssistant: <think>\n\n</think>\n\n"
    assert run(capsys, "generate", "--raw", "--prompt", raw)[1] == SUM


def test_chat_answers_every_line_and_starts_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("23+58=?\n\n81-23=?\n/new\n23+58=?\n"))
    assert run(capsys, "chat") == (0, SUM + DIFFERENCE + SUM, "")


def test_ctrl_c_keeps_what_was_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[str]:
        yield "half an "
        yield "answer"
        raise KeyboardInterrupt

    assert cli._print_stream(pieces()) == "half an answer"
    assert capsys.readouterr().out == "half an answer\n"


def test_ctrl_c_while_loading_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupted)
    assert run(capsys, "generate", "--prompt", "a") == (130, "", "\n")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info", "baidu/ERNIE-4.5-0.3B-Paddle")
    assert status == 0
    assert "360,748,032" in out


def test_quantize_tells_the_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path, reference: Path) -> None:
    source, there = reference / "moe" / "paddle", tmp_path / "wint4"
    status, _, printed = run(capsys, "quantize", str(source), str(there), "--to", "wint4", "--embedding", "wint4")
    assert status == 0
    assert re.search(rf"wrote {there}: [\d.]+ MB before, [\d.]+ kB after \(\d+%\)\n$", printed)
    assert "linear wint4, experts wint4, embedding and head wint4" in run(capsys, "info", str(there))[1]
    assert run(capsys, "convert", str(there), str(tmp_path / "back"))[0] == 1
    assert run(capsys, "convert", str(there), str(tmp_path / "back"), "--dtype", "float32")[0] == 0
    assert run(capsys, "quantize", str(there), str(tmp_path / "again"), "--to", "wint8")[2].startswith("error: ")


def test_convert_there_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path, reference: Path) -> None:
    source, there, back = reference / "moe" / "paddle", tmp_path / "pt", tmp_path / "paddle"
    assert run(capsys, "convert", str(source), str(there), "--layout", "pt")[0] == 0
    assert (there / "model.safetensors").read_bytes() != (source / "model.safetensors").read_bytes()
    assert run(capsys, "convert", str(there), str(back), "--layout", "paddle")[0] == 0
    report = run(capsys, "info", str(back))[1]
    assert report.replace(str(back), "X") == run(capsys, "info", str(source))[1].replace(str(source), "X")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--prompt", ""), "the prompt is empty"),
        (("generate", "no-such-folder", "--prompt", "a"), "no-such-folder"),
        (("info", "no-such-model"), "no-such-model"),
        (("convert", "no-such-folder", "somewhere"), "no-such-folder"),
        (("generate", "--prompt", "a", "--temperature", "0", "--sample"), "temperature"),
    ],
)
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["chat", "generate", "info", "convert", "quantize"])
def test_help_shows_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"Example: ernie45 {command}" in capsys.readouterr().out


# Pictures. The model is random, so only the way through is tested here.


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_folder(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.new("RGB", (90, 60), "teal").save(path)
    return str(path)


FEW = ("--max-new-tokens", "3")


def test_generate_with_a_picture_depends_on_it(
    capsys: pytest.CaptureFixture[str], vision_folder: Path, photo: str
) -> None:
    asked = ("generate", str(vision_folder), "--prompt", "What?", *FEW)
    status, seen, _ = run(capsys, *asked, "--image", photo)
    assert status == 0 and seen != run(capsys, *asked)[1]


def test_chat_shows_pictures_with_questions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, vision_folder: Path, photo: str
) -> None:
    def chat(lines: str, *options: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status, out, _ = run(capsys, "chat", str(vision_folder), *FEW, *options)
        assert status == 0
        return out.splitlines()

    first = chat("What?\n", "--image", photo)
    assert chat(f"/image {photo}\nWhat?\n") == first  # said on the command line or in the conversation
    assert chat(f"What?\n/new\n/image {photo}\nWhat?\n")[-1:] == first[-1:]


def test_a_text_model_sees_no_pictures(capsys: pytest.CaptureFixture[str], photo: str, tmp_path: Path) -> None:
    folder = write_text_folder(tmp_path / "text")
    status, _, errors = run(capsys, "generate", str(folder), "--prompt", "What?", "--image", photo)
    assert status == 1 and "is a text model and sees no pictures" in errors


def test_a_picture_that_is_not_there(capsys: pytest.CaptureFixture[str], vision_folder: Path) -> None:
    status, _, errors = run(capsys, "generate", str(vision_folder), "--prompt", "What?", "--image", "nowhere.png")
    assert status == 1 and "nowhere.png" in errors and "Traceback" not in errors


def test_raw_goes_without_pictures(capsys: pytest.CaptureFixture[str], vision_folder: Path, photo: str) -> None:
    arguments = ("generate", str(vision_folder), "--raw", "--prompt", "x", "--image", photo)
    status, _, errors = run(capsys, *arguments)
    assert status == 1 and "--raw" in errors
