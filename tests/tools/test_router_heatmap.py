"""The tool that draws which experts text and vision tokens choose: what it counts, prints and writes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from ernie45.checkpoint.writer import write_json_atomic
from ernie45.models.moe import Routing
from ernie45.models.vision_language import ErnieForConditionalGeneration
from tests.helpers.tiny import DENSE, MOE, tiny_config
from tests.helpers.vision import vision_config, write_vision_folder

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tools")]

from router_heatmap import Choices, count_choices, draw, main, table  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"


def routed(layer: int, bank: int, indices: list[list[int]], experts: int = 4) -> Routing:
    nothing = paddle.zeros([len(indices), experts])
    return Routing(layer, bank, nothing, nothing, paddle.to_tensor(indices), paddle.ones([len(indices), 2]))


@pytest.fixture
def choices() -> list[Choices]:
    """Two text tokens and one of a picture in layers 1 and 2."""
    routing = [
        routed(1, 0, [[0, 1], [0, 2]]),
        routed(1, 1, [[3, 2]]),
        routed(2, 0, [[0, 1], [3, 2]]),
        routed(2, 1, [[0, 2]]),
    ]
    return count_choices(routing, vision_config())


def test_choices_by_hand(choices: list[Choices]) -> None:
    text, vision = choices
    assert (text.kind, vision.kind) == ("text", "vision") and text.layers == vision.layers == (1, 2)
    assert text.counts.tolist() == [[[2, 1, 1, 0], [0] * 4], [[1, 1, 1, 1], [0] * 4]]
    assert vision.counts.tolist() == [[[0] * 4, [0, 0, 1, 1]], [[0] * 4, [1, 0, 1, 0]]]
    assert text.shares.tolist() == [[0.5, 0.25, 0.25, 0, 0, 0, 0, 0], [0.25] * 4 + [0] * 4]


def test_the_table(choices: list[Choices]) -> None:
    assert table(choices, 2).splitlines()[2:] == [
        "| 1 | 2 text | 3 of 4 | 2.00 |",
        "| 1 | 1 vision | 2 of 4 | 2.00 |",
        "| 2 | 2 text | 4 of 4 | 1.00 |",
        "| 2 | 1 vision | 2 of 4 | 2.00 |",
    ]


@pytest.mark.parametrize("case", ["mixed", "text"])
@paddle.no_grad()
def test_choices_of_a_model(reference: Path, case: str) -> None:
    model = ErnieForConditionalGeneration.from_pretrained(reference / "vl" / "paddle", dtype="float32", progress=False)
    with np.load(reference / "vl" / "reference.npz") as data:
        names = ("input_ids", "images", "grid_thw", "token_type_ids", "position_ids")
        arrays = {name: data[f"{case}.{name}"] for name in names}
    routing: list[Routing] = []
    model(**{name: paddle.to_tensor(array) for name, array in arrays.items()}, routing=routing)
    tokens = {"text": int((arrays["token_type_ids"] == 0).sum()), "vision": int((arrays["token_type_ids"] != 0).sum())}
    found = count_choices(routing, model.config)
    assert [one.kind for one in found] == [kind for kind, count in tokens.items() if count]
    for one in found:
        assert one.counts.shape == (2, 2, 8) and not one.counts[:, 1 - one.bank].any()
        for row, layer in enumerate(one.layers):
            chosen = [step.indices.numpy() for step in routing if (step.layer, step.bank) == (layer, one.bank)]
            assert len(chosen) == 1 and len(chosen[0]) == tokens[one.kind]
            for expert in range(8):
                assert one.counts[row, one.bank, expert] == sum(expert in token for token in chosen[0])
        np.testing.assert_allclose(one.shares.sum(axis=1), 1)


def test_each_kind_has_a_panel_with_a_column_per_expert(
    choices: list[Choices], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    draw(choices, 2, "Title", tmp_path / "router.png")
    panels = drawn[0].axes[:2]
    assert [panel.get_title() for panel in panels] == ["2 text tokens", "1 vision tokens"]
    for panel, one in zip(panels, choices, strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array().filled(0), one.shares)
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["1", "2"]
    monkeypatch.undo()
    pyplot.close(drawn[0])


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(
    choices: list[Choices], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def fail(figure: Figure, file: Path, **options: object) -> None:
        file.write_bytes(PNG)
        raise OSError("disk full")

    output = tmp_path / "router.png"
    output.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(choices, 2, "Title", output)
    assert output.read_bytes() == b"old" and list(tmp_path.iterdir()) == [output]


def test_a_text_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "router.png"
    assert main(["--prompt", "23+58=?", "--dtype", "float32", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(PNG) and list(tmp_path.iterdir()) == [output]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 3 and all(" text |" in row and " of 16 |" in row for row in rows)


def test_a_vision_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder, photo, output = write_vision_folder(tmp_path / "model"), tmp_path / "photo.png", tmp_path / "router.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype="uint8")).save(photo)
    options = ["--model", str(folder), "--dtype", "float32", "--output", str(output), "--prompt", "23+58=?"]
    assert main([*options, "--image", str(photo), "--image", str(photo)]) == 0
    assert output.read_bytes().startswith(PNG)
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 1", "| 1", "| 2", "| 2"]
    text, vision = (int(row[1].split()[0]) for row in rows[:2])
    assert vision > 2 * 2 and vision % 2 == 0 and 10 < text < 100  # the same picture twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "text", "--image", "photo.jpg"],
            "text: a text model, which sees no pictures; leave --image and --video out",
        ),
        (
            ["--output", "nowhere/router.png"],
            "--output nowhere/router.png: there is no folder nowhere; create it first",
        ),
        (["--model", "dense"], "dense: a dense model, which has no experts to choose from"),
    ],
    ids=["picture for a text model", "no folder", "dense"],
)
def test_bad_arguments_get_one_clear_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for name, kind in (("dense", DENSE), ("text", MOE)):
        (tmp_path / name).mkdir()
        write_json_atomic(tmp_path / name / "config.json", tiny_config(kind).to_dict())
    assert main(["--prompt", "Hi", *arguments]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def test_missing_matplotlib_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--prompt", "Hi", "--model", "no such model"]) == 1
    assert capsys.readouterr().err == 'error: drawing takes matplotlib: pip install "ernie45[bench]"\n'
