"""Measures a checkpoint on this machine, beside what the machine allows: the same as `ernie45 bench`.

python tools/bench.py                                    the small model that comes with the package
python tools/bench.py --model random-0.3b --peer transformers --output docs
"""

from __future__ import annotations

import sys

from ernie45.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
