"""The vision tower as an operator: what NaN reaches, and what it refuses.

That it computes what the blocks compute is tested with whole towers in tests/models/test_fused_vision.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import paddle
import pytest

from ernie45.models.vision import rotary_2d
from ernie45.ops import custom
from ernie45.ops.packed import KINDS, PackedWeight
from ernie45.ops.vision import PackedTower, vision
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.tower import packed_tower, pixels, plain_tower, tower_config

pytestmark = pytest.mark.skipif(custom.library() is None, reason="no native library here")


@pytest.fixture(scope="module")
def tower() -> PackedTower:
    fused_tower = packed_tower(plain_tower(tower_config())).fused
    assert fused_tower is not None
    return fused_tower.tower


class Call:
    """Arguments of one call on random pixels, every one of which a test may spoil."""

    def __init__(self, tower: PackedTower, lengths: Sequence[int] = (7, 20, 3)):
        count = sum(lengths)
        self.tower, self.lengths = tower, list(lengths)
        self.x = pixels(tower_config(), [(1, 1, count)])
        places = np.random.default_rng(2).integers(0, 50, (count, 2))
        self.cos, self.sin = (angles.squeeze(1) for angles in rotary_2d(places, 16))

    def run(self) -> np.ndarray:
        return vision(self.x, self.cos, self.sin, self.lengths, self.tower).numpy()


@both_instruction_sets
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_frame(isa: str, value: float, tower: PackedTower) -> None:
    clean, call = Call(tower), Call(tower)
    call.x[11, 5] = value
    with fused(isa, "vision"):
        expected, found = clean.run(), call.run()
    assert np.isnan(found[7:27]).all()
    np.testing.assert_array_equal(found[:7], expected[:7])
    np.testing.assert_array_equal(found[27:], expected[27:])


def test_pixels_in_any_layout(tower: PackedTower) -> None:
    call = Call(tower)
    expected = call.run()
    call.x = call.x.T.contiguous().T
    np.testing.assert_array_equal(call.run(), expected)


def test_frames_without_patches(tower: PackedTower) -> None:
    np.testing.assert_array_equal(Call(tower, [0, 7, 0, 20, 3, 0]).run(), Call(tower).run())


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_do(lengths: list[int], tower: PackedTower) -> None:
    assert Call(tower, lengths).run().shape == (0, 32)


@pytest.mark.parametrize("kind", ["wint8", "wint4"])
def test_other_kinds_of_weights(kind: str, tower: PackedTower) -> None:
    """The last matrix, which holds zeros, in this kind: its bias is all that is left of the product."""
    call, results = Call(tower), []
    for zeros in (PackedWeight.zeros(one, tower.shapes[-3:-1]) for one in ("bfloat16", kind)):
        data = [zeros.data] if zeros.scales is None else [zeros.data, zeros.scales]
        call.tower = replace(
            tower,
            weights=[*tower.weights[:-4], *data, *tower.weights[-3:]],  # then its bias and the final norm
            shapes=[*tower.shapes[:-4], KINDS[zeros.kind], *tower.shapes[-3:]],
        )
        results.append(call.run())
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != Call(tower).run()).any()


def change(**values: object) -> Callable[[Call], None]:
    return lambda call: vars(call).update(values)


def change_tower(**values: Callable[[PackedTower], object]) -> Callable[[Call], None]:
    def spoil(call: Call) -> None:
        call.tower = replace(call.tower, **{name: value(call.tower) for name, value in values.items()})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(x=paddle.zeros([30, 26])), "pixels has shape \\[30, 26\\], expected \\[any, 27\\]"),
        (change(x=paddle.zeros([30, 27], dtype="float64")), "pixels is float64, expected float32"),
        (change(cos=paddle.zeros([30, 9])), "cos has shape \\[30, 9\\], expected \\[30, 8\\]"),
        (change(sin=paddle.zeros([29, 8])), "sin has shape \\[29, 8\\], expected \\[30, 8\\]"),
        (change(lengths=[7, 20]), "lengths add up to 27, but there are 30 patches"),
        (change(lengths=[31, -1]), "a frame has -1 patches"),
        (change_tower(sizes=lambda tower: [2, 16, 40]), "expected 4 sizes, found 3"),
        (change_tower(sizes=lambda tower: [2, 17, 40, 2]), "2 heads of 17 are not supported"),
        (change_tower(sizes=lambda tower: [1, 258, 40, 2]), "1 heads of 258 are not supported"),
        (change_tower(sizes=lambda tower: [4, 16, 40, 2]), "patch embedding is \\[27, 32\\], expected \\[any, 64\\]"),
        (change_tower(sizes=lambda tower: [2, 16, 41, 2]), "fc1 is \\[32, 40\\], expected \\[32, 41\\]"),
        (change_tower(sizes=lambda tower: [2, 16, 40, 1]), "more weights than 1 blocks need"),
        (change_tower(shapes=lambda tower: tower.shapes[:-1]), "the list of shapes is too short"),
        (change_tower(weights=lambda tower: tower.weights[:-1]), "the list of weights is too short"),
        (change_tower(weights=lambda tower: [*tower.weights, tower.weights[-1]]), "more weights than 2 blocks need"),
        (change_tower(shapes=lambda tower: [3, *tower.shapes[1:]]), "kind is 3, expected 0, 1 or 2"),
    ],
)
def test_what_is_refused(spoil: Callable[[Call], None], message: str, tower: PackedTower) -> None:
    call = Call(tower)
    spoil(call)
    with pytest.raises((OSError, RuntimeError, ValueError), match=f"vision: {message}"):
        call.run()
