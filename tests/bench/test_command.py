"""The command, on small models, and what it says when something is missing."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ernie45 import cli
from ernie45.bench import command
from ernie45.bench.contenders import Setting, own_contenders, peer_contenders
from ernie45.errors import ErnieError
from ernie45.processing.processor import SETTINGS_FILE
from tests.helpers.text_part import write_text_folder
from tests.helpers.vision import vision_config, write_processor_folder, write_vision_folder

QUICK = ["--rounds", "1", "--prompts", "16", "--context", "4", "--batch", "1", "--new", "2", "--threads", "1"]


@pytest.mark.slow
def test_a_run_prints_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    model = write_text_folder(tmp_path / "small")
    arguments = ["bench", *QUICK, "--model", str(model), "--variant", "float32", "--output", str(tmp_path / "docs")]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "docs" / "cpu.md").read_text(encoding="utf-8")
    assert written.startswith(printed)
    assert "small, 1 thread of " in printed
    row = next(line for line in printed.splitlines() if line.startswith("| ernie45 float32 |"))
    share_of_prefill, share_of_decode = (float(row.split(" | ")[column]) for column in (2, 5))
    assert 0 < share_of_prefill < 1.5 and 0 < share_of_decode < 1.5
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["cpu.md", "cpu.png"]


MEDIA = ["--picture", "56x56", "--picture", "112x56", "--video", "2x56x28", "--together", "3"]


@pytest.mark.slow
def test_a_run_on_a_vision_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_vision_folder(tmp_path / "model")
    arguments = ["bench", *QUICK, *MEDIA, "--model", str(model), "--variant", "bfloat16", "--peer", "llama.cpp"]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split(" | ")[0] for line in lines if line.startswith("| ") and "---" not in line]
    assert heads[-10:] == [
        *("| one picture of 56x56: 4 tokens", "| ernie45 bfloat16"),
        *("| one picture of 112x56: 8 tokens", "| ernie45 bfloat16"),
        *("| one video of 2 frames of 56x28: 2 tokens", "| ernie45 bfloat16"),
        *("| 3 pictures of 112x56, at once", "| ernie45 bfloat16"),
        *("| prompt of a picture of 56x56 and 16 tokens of text", "| ernie45 bfloat16"),
    ]
    assert lines[-1] == "- llama.cpp: is not measured on vision-language models, only on text models"


def setting(tmp_path: Path, **pythons: str) -> Setting:
    return Setting(tmp_path / "model", ("float32", "bfloat16", "wint4"), 2, tmp_path, pythons)


def test_the_variants_of_this_library(tmp_path: Path) -> None:
    found = list(own_contenders(setting(tmp_path)))
    assert [(one.name, one.storage, one.extended) for one in found] == [
        ("ernie45 float32", "float32", False),
        ("ernie45 bfloat16", "bfloat16", True),
        ("ernie45 wint4", "wint4", False),
    ]
    assert found[2].options["options"] == {"dtype": "bfloat16", "quantization": "wint4"}


def test_who_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (tmp_path / "pt").mkdir()
    (tmp_path / "pt" / "config.json").touch()
    seeing = replace(setting(tmp_path), vision=True)
    assert {one.target for one in own_contenders(seeing)} == {"ernie45.bench.ours:Ernie45Vision"}
    found = {one.target for one in peer_contenders("transformers", seeing)}
    assert found == {"ernie45.bench.peers_vision:TransformersVision"}
    for peer in ("llama.cpp", "paddleformers"):
        with pytest.raises(ErnieError, match=f"{peer}: is not measured on vision-language models"):
            peer_contenders(peer, seeing)


def test_a_peer_that_is_not_installed_says_how_to_name_its_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ErnieError, match=r"has no module paddleformers; .* --peer-python paddleformers=PATH"):
        peer_contenders("paddleformers", setting(tmp_path))


def test_a_peer_in_another_interpreter(tmp_path: Path) -> None:
    with pytest.raises(ErnieError, match="--peer-python: cannot run /nowhere/python"):
        peer_contenders("transformers", setting(tmp_path, transformers="/nowhere/python"))


def test_peers_use_files_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (tmp_path / "pt").mkdir()
    for name in ("pt/config.json", "BF16.gguf", "Q4_0.gguf"):
        (tmp_path / name).touch()
    found = peer_contenders("llama.cpp", setting(tmp_path)) + peer_contenders("transformers", setting(tmp_path))
    assert [(one.name, one.storage) for one in found] == [
        ("llama.cpp BF16", "bfloat16"),
        ("llama.cpp BF16", "bfloat16"),
        ("llama.cpp Q4_0", "Q4_0"),
        ("llama.cpp Q4_0", "Q4_0"),
        ("transformers bfloat16", "bfloat16"),
        ("transformers float32", "float32"),
    ]
    assert [one.options.get("flash") for one in found[:4]] == [True, False, True, False]
    assert {one.python for one in found} == {sys.executable}


def test_a_work_folder_belongs_to_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made-from.txt").write_text("/another/model")
    assert cli.main(["bench", *QUICK, "--work", str(tmp_path)]) == 1
    assert f"{tmp_path} holds weights of /another/model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer-python", "python3"], "--peer-python: expected PEER=PATH"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_options_are_one_clear_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(["bench", *QUICK, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_text_model_sees_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_text_folder(tmp_path / "text")
    assert cli.main(["bench", *QUICK, "--model", str(folder), "--picture", "56x56"]) == 1
    assert "the model is a text model, which sees nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({}, [(1, 448, 448), (1, 1792, 1344), (16, 448, 448)]),
        (
            {"image_max_pixels": 12544, "video_min_pixels": 3136, "video_max_pixels": 6272},
            [(1, 112, 112), (1, 112, 84), (16, 56, 56)],
        ),
    ],
)
def test_the_usual_pictures_are_no_larger_than_the_model_ever_sees(
    tmp_path: Path, limits: dict[str, int], sizes: list[tuple[int, int, int]]
) -> None:
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(limits), encoding="utf-8")
    options = argparse.Namespace(picture=None, video=None)
    media = command._media(options, vision_config().vision, tmp_path)
    assert [(task.frames, task.width, task.height) for task in media] == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", "56x57"], "56x57 pixels; both must be multiples of 28"),
        (["--video", "3x56x56"], "--video: 3 frames; expected a multiple of 2"),
    ],
)
def test_sizes_that_the_model_would_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_processor_folder(tmp_path)
    assert cli.main(["bench", *QUICK, *arguments, "--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", "448"], "expected WIDTHxHEIGHT, for example 448x448, found '448'"),
        (["--picture", "0x28"], "expected WIDTHxHEIGHT"),
        (["--video", "448x448"], "expected FRAMESxWIDTHxHEIGHT"),
        (["--video", "1x448x448"], "expected at least 2 frames"),
    ],
)
def test_sizes_that_are_none(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", *arguments])
    assert message in capsys.readouterr().err
