"""Writes a -Paddle checkpoint in the -PT layout and back, and shows that no bit changes.

python examples/convert.py                 the small model that comes with the package
python examples/convert.py FOLDER          a checkpoint of yours
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from ernie45.checkpoint.convert import convert_checkpoint
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.hub import resolve_folder


def main() -> None:
    """Converts there and back in a temporary folder."""
    source = resolve_folder(sys.argv[1] if len(sys.argv) > 1 else "ernie45-tiny")
    with tempfile.TemporaryDirectory() as scratch:
        there, back = Path(scratch, "pt"), Path(scratch, "paddle")
        convert_checkpoint(source, there, layout="pt")
        convert_checkpoint(there, back, layout="paddle")
        before, after = CheckpointFolder(source), CheckpointFolder(back)
        same = all(np.array_equal(before.read(name), after.read(name)) for name in before.tensors)
        pt_tensors = len(CheckpointFolder(there).tensors)
    print(
        f"{len(before.tensors)} tensors -> {pt_tensors} in the -PT layout -> back: {'identical' if same else 'CHANGED'}"
    )


if __name__ == "__main__":
    main()
