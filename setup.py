"""Build script: what pyproject.toml cannot say. Everything else about the package is declared there.

``ERNIE45_NO_PADDLE=1 pip install .`` leaves PaddlePaddle out of the requirements, for those who have installed
``paddlepaddle-gpu`` from Paddle's own index: pip would otherwise put the CPU wheel over the same ``paddle`` folder.
"""

from __future__ import annotations

import os

from setuptools import find_packages, setup

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


setup(
    install_requires=install_requires(),
    packages=[*find_packages(include=["ernie45", "ernie45.*"]), "ernie45.configs"],
    # configs/ stays at the top of the repository, where readers look for it, and is installed inside the package.
    package_dir={"ernie45.configs": "configs"},
    package_data={"ernie45": ["py.typed", "data/**"], "ernie45.configs": ["*.json"]},
    include_package_data=False,
)
