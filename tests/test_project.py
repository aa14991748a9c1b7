"""The package as a whole: what importing it costs, what it exports, what an installation contains."""

from __future__ import annotations

import os
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest

import ernie45

ROOT = Path(__file__).parent.parent


def run_python(*arguments: str, **environment: str) -> str:
    """Run this interpreter in the repository's root and return what it printed."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_loads_nothing_else() -> None:
    script = (
        "import sys; before = set(sys.modules); import ernie45; "
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(*sorted(loaded - sys.stdlib_module_names), 'socket' in sys.modules)"
    )
    assert run_python("-c", script).split() == ["ernie45", "False"]


@pytest.mark.parametrize("name", ernie45.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ernie45, name) is not None
    assert name in dir(ernie45)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ernie45' has no attribute 'ErnieForEverything'"):
        _ = ernie45.ErnieForEverything


def files_under(folder: Path, pattern: str = "*") -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}


def test_an_installation_contains_the_configs_and_the_data(tmp_path: Path) -> None:
    built = tmp_path / "lib"
    build = ["build", "--build-base", str(tmp_path / "base"), "--build-lib", str(built)]
    run_python("setup.py", "--quiet", *build, ERNIE45_BUILD="0")
    package = ROOT / "ernie45"
    wanted = files_under(package, "*.py") | {Path("py.typed")}
    wanted |= {Path("ops/csrc") / path for path in files_under(package / "ops/csrc")}
    wanted |= {Path("data") / path for path in files_under(package / "data")}
    wanted |= {Path("processing/fonts") / path for path in files_under(package / "processing/fonts")}
    wanted |= {Path("configs") / path for path in files_under(ROOT / "configs")}
    assert files_under(built / "ernie45") == wanted


@pytest.mark.parametrize(("no_paddle", "expected"), [("0", True), ("1", False)])
def test_paddle_can_be_left_out_of_the_requirements(tmp_path: Path, no_paddle: str, expected: bool) -> None:
    run_python("setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), ERNIE45_NO_PADDLE=no_paddle)
    metadata = Parser().parsestr((tmp_path / "ernie45.egg-info" / "PKG-INFO").read_text(encoding="utf-8"))
    requirements = metadata.get_all("Requires-Dist", [])
    assert any(line.startswith("paddlepaddle") for line in requirements) == expected
    assert any(line.startswith("numpy") for line in requirements)
    assert metadata["Version"] == ernie45.__version__
