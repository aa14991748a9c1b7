"""The limits of this machine: that they are measured at all, and by what."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie45.bench import machine
from ernie45.bench.onednn import Product
from ernie45.ops import custom
from ernie45.runtime import num_threads


def onednn() -> ctypes.CDLL:
    """The library that comes with Paddle."""
    try:
        return ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libdnnl.so.3"))
    except OSError:
        pytest.skip("this Paddle carries no oneDNN")


def test_a_product_of_onednn_has_a_rate() -> None:
    product = Product(onednn(), "float32", 4, 32, 16)
    assert product.operations == 2 * 4 * 32 * 16
    assert 1e3 < product.rate(0.01) < 1e15


def test_onednn_says_no_to_what_it_cannot_do() -> None:
    with pytest.raises(OSError, match="dnnl_memory_desc_create_with_tag failed with status"):
        Product(onednn(), "float32", 4, -5, 16)


def test_the_library_reads_all_of_the_memory() -> None:
    library = custom.library()
    if library is None:
        pytest.skip("no native library here")
    read = library.ernie45_read_bandwidth
    read.restype, read.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_int64]
    data = np.ones(2**22, np.float32)
    rate = read(data.ctypes.data, data.nbytes)
    assert 1e8 < rate < 1e13


def test_all_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 2**24)
    monkeypatch.setattr(machine, "SECONDS", 0.002)
    found = machine.Machine(num_threads())
    limits = found.measure()
    assert set(limits) == {"bandwidth", "float32", "bfloat16"}
    assert limits["bandwidth"] > 1e8 and limits["float32"] > 1e8
    assert found.describe()["threads"] == num_threads()
