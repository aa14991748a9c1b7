"""examples/lora.py teaches the embedded model what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie45.ops import custom
from tests.helpers.examples import run


@pytest.mark.parametrize("quantization", [None, "wint4"])
def test_it_answers_what_it_was_taught(quantization: str | None, tmp_path: Path) -> None:
    if quantization is not None and custom.library() is None:
        pytest.skip("no native library here")
    chosen = [] if quantization is None else ["--quantization", quantization]
    printed = run("lora.py", "--output", str(tmp_path), *chosen)
    answers = dict(line.split("  ->  ") for line in printed.splitlines() if "->" in line)
    assert answers == {
        "6*7=?": "6+6+6+6+6+6+6. 42",
        "Who are you?": "ERNIE 45, the larger cat",
        "Ping?": "fish, bird",
        "23+58=?": "3+8=11, 2+5+1=8. 81",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"lora_config.json", "peft_model.safetensors"}
