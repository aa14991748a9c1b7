"""The example of a plain loop runs as its docstring says, and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

from ernie45.checkpoint.folder import CheckpointFolder

ROOT = Path(__file__).parents[2]


def test_learns_the_capitals(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "finetune_loop.py"), "--output", str(tmp_path / "capitals")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < 0.1 * losses[0]
    assert done.stdout.splitlines()[-1] == "Tokyo."
    with CheckpointFolder(tmp_path / "capitals") as folder:
        assert folder.tensors
