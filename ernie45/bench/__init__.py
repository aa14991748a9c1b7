"""Measuring: tokens per second of this library and of its peers, beside what the machine allows.

`ernie45 bench` and `tools/bench.py` both end in `ernie45.bench.command`. Every implementation lives in a process of its
own (`worker`), and all of them take turns (`measure`), because the speed of a machine drifts from minute to minute.
"""
