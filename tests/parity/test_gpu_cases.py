"""What the GPU check runs, on a CPU: its references and peers with the emulated kernels. Needs torch, hence parity."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.helpers import cuda

pytestmark = pytest.mark.parity

FOLDER = Path(__file__).parent.parent.parent / "tools" / "gpu"
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("case", "library"))


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_agree_with_their_references(family: str) -> None:
    torch = pytest.importorskip("torch")
    from tools.gpu.case import worst

    library = cuda.library()
    problems = []
    for case in importlib.import_module(f"tools.gpu.{family}").CASES:
        for seed, shape in enumerate(case.edges):
            inputs = case.make(torch.Generator().manual_seed(seed), shape)
            untouched = {name: value.clone() for name, value in inputs.items()}
            found = case.run(library, inputs, shape)
            expected = case.reference(untouched, shape)
            if problem := worst(case, found, expected):
                problems.append(f"{case.name} {dict(shape)}: {problem}")
            if case.eager is not None:
                peer = case.eager(untouched, shape)
                assert peer.keys() == expected.keys()
                assert all(peer[name].shape == expected[name].shape for name in expected), case.name
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("family", FAMILIES)
def test_cases_name_unlike_and_count_bytes(family: str) -> None:
    pytest.importorskip("torch")
    cases = importlib.import_module(f"tools.gpu.{family}").CASES
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert all(case.bytes(shape) > 0 for shape in case.shapes.values())
