"""Build script: what pyproject.toml cannot say. Everything else about the package is declared there.

The operators are compiled here if PaddlePaddle can be imported, which takes ``pip install --no-build-isolation .``:
those for the CPU and, if Paddle was compiled with CUDA, those for GPUs. Everyone else compiles them at first use: an
installation never fails for want of a compiler.

``ERNIE45_NO_PADDLE=1 pip install .`` leaves PaddlePaddle out of the requirements, for those who have installed
``paddlepaddle-gpu`` from Paddle's own index: pip would otherwise put the CPU wheel over the same ``paddle`` folder.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

PADDLE = "paddlepaddle>=3.3,<3.4"
REQUIREMENTS = [
    "huggingface_hub>=0.25",
    "jinja2>=3.1",
    "numpy>=1.24",
    "pillow>=10",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2",
    "tqdm>=4.64",
]


def install_requires() -> list[str]:
    """The core requirements, with PaddlePaddle unless the environment says that it is already there."""
    if os.environ.get("ERNIE45_NO_PADDLE") == "1":
        return REQUIREMENTS
    return [PADDLE, *REQUIREMENTS]


def builds_operators() -> bool:
    """Whether the operators are compiled now. The package is then one for this kind of machine only."""
    return os.environ.get("ERNIE45_BUILD") != "0" and importlib.util.find_spec("paddle") is not None


class BuildOperators(build_ext):
    """Compiles the operators into the package, in processes of their own that may fail."""

    def run(self) -> None:
        """Compile them, unless the package stays where it is: its sources are then likely to change."""
        if self.editable_mode or self.inplace:
            return
        folder = Path(self.build_lib).absolute() / "ernie45" / "ops" / "_native"
        for module in ("build", "build_cuda"):
            script = f"import sys; from ernie45.ops import {module}; {module}.build_for_package(sys.argv[1])"
            command = [sys.executable, "-W", "ignore", "-c", script, str(folder)]
            result = subprocess.run(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)
            if result.returncode:
                reason = (result.stderr.strip().splitlines() or ["unknown"])[-1]
                print(f"ernie45: {module}: operators are not compiled now: {reason}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """What was compiled."""
        return [str(path) for path in (Path(self.build_lib) / "ernie45" / "ops" / "_native").glob("*")]


setup(
    install_requires=install_requires(),
    cmdclass={"build_ext": BuildOperators},
    ext_modules=[Extension("ernie45.ops._native", sources=[])] if builds_operators() else [],
    packages=[*find_packages(include=["ernie45", "ernie45.*"]), "ernie45.configs"],
    # configs/ stays at the top of the repository, where readers look for it, and is installed inside the package.
    package_dir={"ernie45.configs": "configs"},
    package_data={
        "ernie45": ["py.typed", "data/**", "ops/csrc/**", "processing/fonts/**"],
        "ernie45.configs": ["*.json", "recipes/*.yaml"],
    },
    include_package_data=False,
)
