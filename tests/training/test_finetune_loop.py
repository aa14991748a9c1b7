"""The example of a plain loop runs as its docstring says, and learns."""

import re

from ernie45.checkpoint.folder import CheckpointFolder
from tests.helpers.examples import run


def test_learns_the_capitals(tmp_path):
    printed = run("finetune_loop.py", "--output", str(tmp_path / "capitals"))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.1 * losses[0]
    assert printed.splitlines()[-1] == "Tokyo."
    with CheckpointFolder(tmp_path / "capitals") as folder:
        assert folder.tensors
