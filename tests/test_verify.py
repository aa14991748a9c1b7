"""ernie45 verify: the metrics against slow definitions, and whole comparisons of the model that comes with it."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ernie45 import ErnieForCausalLM, ErnieTokenizer, cli
from ernie45.checkpoint import reader
from ernie45.errors import ErnieError
from ernie45.ops.custom import reference_only
from ernie45.verify import Agreement, PromptRow, Report, Speed, agreement, verification, verify
from ernie45.verify.agreement import combine, compare
from ernie45.verify.prompts import PROMPTS, prompts_from_file
from ernie45.verify.report import markdown_table
from tests.helpers.tiny import greedy

TINY = "ernie45-tiny"
TEXTS = ["23+58=?", "从小到大排列：42、7、19"]


@pytest.fixture(scope="module")
def save_variation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Writes the small model in float32 after a change of its parameters; returns the folder."""

    def save(change: Callable[[str, np.ndarray], np.ndarray]) -> str:
        folder = tmp_path_factory.mktemp("model")
        model = ErnieForCausalLM.from_pretrained(TINY, dtype="float32")
        changed = {name: change(name, value.numpy()) for name, value in model.state_dict().items()}
        model.set_state_dict(changed)
        model.save_pretrained(folder, dtype="float32", progress=False)
        ErnieTokenizer.from_pretrained(TINY).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def float32_folder(save_variation: Callable[..., str]) -> str:
    """The small model with weights that bfloat16 cannot hold: the shipped file is bfloat16 already."""
    random = np.random.default_rng(0)
    return save_variation(lambda _, value: value * random.uniform(0.99, 1.01, value.shape).astype("float32"))


def cells(line: str) -> list[str]:
    """The cells of one line of a Markdown table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def slow_agreement(reference: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """The metrics one position and one number at a time."""
    errors, cosines, same = [], [], []
    for left, right in zip(reference.astype("float64"), logits.astype("float64"), strict=True):
        chances = [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (left, right)]
        errors += [abs(p - q) for p, q in zip(*chances, strict=True)]
        lengths = [sum(x * x for x in row) ** 0.5 for row in (left, right)]
        dot = sum(x * y for x, y in zip(left, right, strict=True))
        cosines.append(dot / (lengths[0] * lengths[1]) if all(lengths) else float(lengths[0] == lengths[1]))
        same.append(list(left).index(max(left)) == list(right).index(max(right)))
    return {
        "mean_error": sum(errors) / len(errors),
        "max_error": max(errors),
        "mean_cosine": sum(cosines) / len(cosines),
        "min_cosine": min(cosines),
        "top1": sum(same) / len(same),
    }


@st.composite
def two_logits(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 9)))
    numbers = st.floats(-50, 50, width=32, allow_subnormal=False)
    return draw(arrays("float32", shape, elements=numbers)), draw(arrays("float32", shape, elements=numbers))


@settings(max_examples=60)
@example((np.array([[0, 3e38]], "float32"), np.array([[3e38, 0]], "float32")), 1)
@example((np.zeros((2, 3), "float32"), np.array([[0, 0, 0], [1, 0, 0]], "float32")), 4)
@given(two_logits(), st.integers(1, 40))
def test_metrics_are_what_they_say(logits: tuple[np.ndarray, np.ndarray], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "BLOCK", block)  # so that blocks of every size are put together
        found = compare(*logits)
    assert found.positions == len(logits[0])
    for name, expected in slow_agreement(*logits).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-9, abs=1e-12), name


@given(two_logits())
def test_equal_logits_agree_exactly(logits: tuple[np.ndarray, np.ndarray]) -> None:
    assert compare(logits[0], logits[0].copy()) == Agreement(len(logits[0]), 0.0, 0.0, 1.0, 1.0, 1.0)


def test_parts_count_by_their_positions() -> None:
    total = combine([Agreement(1, 0.4, 0.5, 0.2, 0.2, 0.0), Agreement(3, 0.0, 0.1, 1.0, 0.9, 1.0)])
    assert (total.positions, total.max_error, total.min_cosine) == (4, 0.5, 0.2)
    assert (total.mean_error, total.mean_cosine, total.top1) == pytest.approx((0.1, 0.8, 0.75))


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((0, 3), (0, 3)), ((3,), (3,))])
def test_logits_that_cannot_be_compared(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ErnieError, match=re.escape(str(shapes[1]))):
        compare(np.zeros(shapes[0], "float32"), np.zeros(shapes[1], "float32"))


def test_float32_agrees_with_itself() -> None:
    with reference_only():
        report = verify(TINY, dtype="float32", prompts=TEXTS, runs=0, progress=False)
    positions = sum(row.agreement.positions for row in report.rows)
    assert report.overall == Agreement(positions, 0.0, 0.0, 1.0, 1.0, 1.0)
    assert report.decoding.max_error < 1e-4  # products of one row may be rounded in another order
    assert report.decoding.min_cosine == pytest.approx(1)
    assert report.decoding.top1 == 1
    assert report.speeds == ()


def test_float32_as_it_runs_here_agrees_with_the_definitions() -> None:
    report = verify(TINY, dtype="float32", max_new_tokens=8, runs=0, progress=False)
    assert [row.prompt for row in report.rows] == list(PROMPTS)
    for found in (report.overall, report.decoding):
        assert found.max_error < 1e-3
        assert found.min_cosine > 1 - 1e-6
        assert found.top1 > 0.99


def test_bfloat16_differs_a_little(float32_folder: str) -> None:
    report = verify(float32_folder, dtype="bfloat16", prompts=TEXTS, runs=0, progress=False)
    assert report.variant == "bfloat16 on cpu"
    for found in (report.overall, report.decoding):
        assert 0 < found.mean_error <= found.max_error < 0.5
        assert 0.99 < found.min_cosine <= found.mean_cosine < 1
        assert found.top1 > 0.9


def test_weights_rounded_on_both_sides_are_closer(float32_folder: str) -> None:
    """By the logits: a model that is sure has probabilities near 0 and 1, whatever is rounded."""
    texts = ["81-23=?", "Reverse a b c d", "How many sheep are in cat horse horse?"]
    exact, rounded = (
        verify(float32_folder, dtype="bfloat16", reference=reference, prompts=texts, runs=0, progress=False).overall
        for reference in ("float32", "bfloat16")
    )
    assert rounded.positions == exact.positions
    assert 1 - rounded.mean_cosine < 0.7 * (1 - exact.mean_cosine)


def test_the_reference_is_followed_greedily() -> None:
    model, tokenizer = ErnieForCausalLM.from_pretrained(TINY), ErnieTokenizer.from_pretrained(TINY)
    prompt = tokenizer.encode(TEXTS[0])
    continuation = greedy(model, np.array([prompt]), 4)[0].tolist()
    assert tokenizer.eos_token_id not in continuation
    report = verify(TINY, prompts=TEXTS[:1], max_new_tokens=4, runs=0, progress=False)
    assert report.rows[0].continuation == tokenizer.decode(continuation)
    assert (report.overall.positions, report.decoding.positions) == (len(prompt) + 4, 4)


def test_only_one_model_is_in_memory_and_quantization_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    load, calls, alive = ErnieForCausalLM.from_pretrained, [], []

    def watched(name: str, *, quantization: str | None = None, **options: Any) -> ErnieForCausalLM:
        calls.append((options["dtype"], quantization, [model() is not None for model in alive]))
        model = load(name, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ErnieForCausalLM, "from_pretrained", watched)
    report = verify(TINY, quantization="wint4", prompts=TEXTS[:1], max_new_tokens=2, runs=0, progress=False)
    assert calls == [("float32", None, []), (None, "wint4", [False])]
    assert report.variant == "wint4 on cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "at least one text"),
        ({"prompts": "a text"}, "expected a list"),
        ({"prompts": ["a", ""]}, "prompt 2 is empty"),
        ({"dtype": "int3"}, "dtype: expected one of .* found 'int3'"),
        ({"reference": "wint8"}, "reference: expected one of .* found 'wint8'"),
        ({"device": "abacus"}, "device: "),
        ({"max_new_tokens": 0, "prompts": TEXTS}, "max_new_tokens"),
        ({"prompts": ["1 " * 2100]}, "prompt 1 .*2048 positions"),
        ({"prompt_lengths": [2040], "output_lengths": [9]}, "2040 tokens of prompt and 9 new ones exceed .* 2048"),
        ({"prompt_lengths": [0]}, "lengths of at least 1"),
        ({"runs": -1}, "-1 runs"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        verify(TINY, progress=False, **options)
    assert paddle.device.get_device() == "cpu"


def test_logits_that_are_not_finite_name_the_prompt(save_variation: Callable[..., str]) -> None:
    # A norm of this size is infinite in float16, and only large in float32.
    large = save_variation(lambda name, value: value * 1e6 if name == "ernie.norm.weight" else value)
    with pytest.raises(ErnieError, match=r"^prompt 1 \('23\+58=\?'\): the logits at \d+ of \d+ positions"):
        verify(large, dtype="float16", prompts=TEXTS, max_new_tokens=4, runs=0, progress=False)
    broken = save_variation(lambda name, value: value * np.nan if name == "ernie.norm.weight" else value)
    with pytest.raises(ErnieError, match=r"^reference, prompt 1 \('23\+58=\?'\): "):
        verify(broken, prompts=TEXTS, runs=0, progress=False)


def test_a_reference_that_does_not_fit_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "available_bytes", lambda: 1_000_000)
    name = "baidu/ERNIE-4.5-21B-A3B-Paddle"
    with pytest.raises(ErnieError, match=r"21B.*the float32 reference does not fit.*--reference bfloat16"):
        verify(name)
    with pytest.raises(ErnieError, match=r"the bfloat16 reference does not fit") as raised:
        verify(name, reference="bfloat16")
    assert "--reference" not in str(raised.value)


def test_too_many_prompts_for_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "available_bytes", lambda: 1_000_000)
    with pytest.raises(ErnieError, match=r"^prompts: .* 1 MB are free; give fewer"):
        verify(TINY)


def test_speed_is_measured_for_every_pair_of_lengths() -> None:
    report = verify(
        TINY,
        prompts=TEXTS[:1],
        max_new_tokens=1,
        prompt_lengths=(3, 40),
        output_lengths=(1, 5),
        runs=2,
        progress=False,
    )
    assert [(speed.prompt, speed.output) for speed in report.speeds] == [(3, 1), (3, 5), (40, 1), (40, 5)]
    for speed in report.speeds:
        assert speed.first_token > 0
        assert (speed.others > 0) == (speed.output > 1)


def test_speed_from_times() -> None:
    speed = Speed(prompt=32, output=5, first_token=0.5, others=2.0)
    assert (speed.per_token, speed.tokens_per_second) == (0.5, 2.0)
    assert Speed(prompt=32, output=1, first_token=0.5, others=0.0).per_token is None


def test_tables_line_up_with_chinese_in_them() -> None:
    found = Agreement(3, 1.25e-5, 0.5, 0.75, 0.25, 1.0)
    rows = (PromptRow("春眠不觉晓，" * 9, "", found), PromptRow("a|b\nc", "", found))
    report = Report("m", "float32 on cpu", "wint4 on cpu", rows, found, found, (Speed(8, 1, 0.5, 0.0),))
    title, errors, speeds = str(report).split("\n\n")
    assert title == "m: wint4 on cpu, compared with float32 on cpu in plain Paddle"
    assert "a\\|b c" in errors
    assert cells(errors.splitlines()[2])[0] == "春眠不觉晓，" * 3 + "..."
    last = ["all, token by token", "3", "1.25e-05", "5.00e-01", "0.750000", "0.250000", "1.0000"]
    assert cells(errors.splitlines()[-1]) == last
    assert cells(speeds.splitlines()[-1]) == ["8", "1", "500.0 ms", "2.0", ""]
    assert markdown_table(["x", "y"], [["中", "1"], ["abc", "10"]]) == (
        "| x   |  y |\n| --- | -: |\n| 中  |  1 |\n| abc | 10 |"
    )


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("23+58=?\n\n  \n你好\n", encoding="utf-8")
    assert prompts_from_file(path) == ["23+58=?", "你好"]


@pytest.mark.parametrize("content", [None, b"", b"\n  \n", "你好".encode("gbk")])
def test_bad_prompts_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["verify", "--prompts", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: prompts file {path}: ")
    assert err.count("\n") == 1


def test_command_prints_both_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    arguments = ["verify", TINY, "--dtype", "float32", "--prompts", str(path), "--max-new-tokens", "4"]
    arguments += ["--prompt-lengths", "5,9", "--output-lengths", "2", "--runs", "1"]
    assert cli.main(arguments) == 0
    _, errors, speeds = capsys.readouterr().out.strip().split("\n\n")
    rows = [cells(line) for line in errors.splitlines()[2:]]
    assert [row[0] for row in rows] == [*TEXTS, "all, in one pass", "all, token by token"]
    assert int(rows[0][1]) + int(rows[1][1]) == int(rows[2][1])
    for row in rows:
        mean_error, max_error, mean_cosine, min_cosine, top1 = map(float, row[2:])
        assert 0 <= mean_error <= max_error < 1e-3
        assert 0.999 < min_cosine <= mean_cosine <= 1
        assert top1 > 0.9
    assert [cells(line)[0] for line in speeds.splitlines()[2:]] == ["5", "9"]


@pytest.mark.parametrize(("minimum", "status"), [("0.5", 0), ("1.01", 1)])
def test_status_says_whether_the_agreement_is_high_enough(
    capsys: pytest.CaptureFixture[str], minimum: str, status: int
) -> None:
    arguments = [
        "verify",
        TINY,
        "--dtype",
        "float32",
        "--max-new-tokens",
        "2",
        "--runs",
        "0",
        "--minimum-agreement",
        minimum,
    ]
    assert cli.main(arguments) == status
    out, err = capsys.readouterr()
    assert "all, in one pass" in out
    said = [line for line in err.splitlines() if line.startswith("error")]  # beside progress, on a slow machine
    assert said == (["error: top-1 agreement 1.0000 is below the 1.01 of --minimum-agreement"] if status else [])


@pytest.mark.parametrize("lengths", ["", "a", "1,,2"])
def test_lengths_that_are_no_numbers(capsys: pytest.CaptureFixture[str], lengths: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["verify", "--prompt-lengths", lengths])
    assert "expected numbers separated by commas" in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", "--help"])
    assert ended.value.code == 0
    assert "Example: ernie45 verify" in capsys.readouterr().out
