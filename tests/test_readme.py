"""What the README says works: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ernie45.checkpoint.hub import PUBLISHED_NAMES
from ernie45.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert ". 81" in capsys.readouterr().out
    assert namespace["ids"].shape[0] == 1  # type: ignore[attr-defined]


def test_commands_parse() -> None:
    lines = [line.partition("#")[0] for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("ernie45 ")]
    assert len(commands) >= 5
    for command in commands:
        build_parser().parse_args(command)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)", README)) <= set(targets)


def test_links_to_files_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_every_published_name_is_in_the_table(name: str) -> None:
    assert re.search(rf"-{re.escape(name.split('ERNIE-4.5-')[1])}[,\s|]", README.replace("ERNIE-4.5-", "-"))
