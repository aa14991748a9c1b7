"""`verify`: one model run in two ways, one after the other, so that only one of them is in memory at a time."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from tqdm import tqdm

from ernie45.checkpoint.names import checkpoint_tensors
from ernie45.checkpoint.reader import memory_problem
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError
from ernie45.info import DTYPE_CHOICES, find_config
from ernie45.memory import available_bytes, format_bytes
from ernie45.models.cache import KVCache
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops.custom import reference_only
from ernie45.tokenizer import ErnieTokenizer
from ernie45.verify.agreement import Agreement, combine, compare
from ernie45.verify.prompts import PROMPTS, encode_prompts
from ernie45.verify.report import PromptRow, Report
from ernie45.verify.speed import GREEDY, check_lengths, measure_speed


@dataclass(frozen=True)
class Expected:
    """What the reference made of one prompt.

    Attributes:
        text: the prompt.
        prompt_ids, new_ids: its tokens, and those of the reference's greedy continuation.
        logits: [prompt + new, vocab] float32 of one forward pass over both.
    """

    text: str
    prompt_ids: list[int]
    new_ids: list[int]
    logits: np.ndarray


def verify(
    model_name: str,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    device: str = "cpu",
    reference: str = "float32",
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    prompt_lengths: Sequence[int] = (32, 128, 512),
    output_lengths: Sequence[int] = (16, 64),
    runs: int = 3,
    revision: str | None = None,
    progress: bool = True,
) -> Report:
    """Compares a way of running a model with its output in plain Paddle on the CPU, and measures its speed.

    The reference continues every prompt greedily. Both models then compute the logits over prompt and continuation,
    so that every position is compared after the same tokens. The verified model does so twice: in one forward pass,
    and for the continuation token by token from a cache, which runs other operators.

    Args:
        model_name: as for `ErnieForCausalLM.from_pretrained`.
        dtype, quantization: of the verified model, as for `from_pretrained`.
        device: where the verified model runs, as for `paddle.device.set_device`: "cpu", "gpu:0".
        reference: dtype of the reference's weights; "bfloat16" where float32 does not fit into memory.
        prompts: texts to compare on; by default four in Chinese and four in English.
        max_new_tokens: tokens by which the reference continues each prompt at most.
        prompt_lengths, output_lengths: tokens for which the speed is measured.
        runs: of each pair of lengths; 0 leaves the speed out.
        revision: branch, tag or commit on the hub.
        progress: show progress bars when a step takes longer than a second.

    Raises:
        ErnieError: bad arguments, too little memory, or logits that are not finite (names the prompt).
    """
    _check_dtypes(dtype, reference)
    quantized: dict[str, Any] = {} if quantization is None else {"quantization": quantization}
    load = functools.partial(ErnieForCausalLM.from_pretrained, model_name, revision=revision, progress=progress)
    with _device(device), _device("cpu"):  # entering the first shows, before any long work, whether it exists
        config = find_config(model_name)[0]
        check_lengths(config, prompt_lengths, output_lengths, runs)
        _check_weights(model_name, config, reference)
        tokenizer = ErnieTokenizer.from_pretrained(model_name, revision=revision)
        texts = PROMPTS if prompts is None else prompts
        rows = encode_prompts(tokenizer, texts)
        _check_logits(config, sum(len(row) + max_new_tokens for row in rows))
        with reference_only():
            expected = _run_reference(load(dtype=reference), tokenizer, texts, rows, max_new_tokens, progress)
    gc.collect()  # the reference must be gone before the next model comes
    with _device(device):
        model = load(dtype=dtype, **quantized)
        in_one_pass, token_by_token = _compare_all(model, expected, progress)
        speeds = measure_speed(model, prompt_lengths, output_lengths, runs, progress)
        variant = f"{quantization or model.dtype} on {paddle.device.get_device()}"
    return Report(
        model=model_name,
        reference=f"{reference} on cpu",
        variant=variant,
        rows=tuple(
            PromptRow(row.text, tokenizer.decode(row.new_ids), agreement)
            for row, agreement in zip(expected, in_one_pass, strict=True)
        ),
        overall=combine(in_one_pass),
        decoding=combine(token_by_token),
        speeds=tuple(speeds),
    )


def _run_reference(
    model: ErnieForCausalLM,
    tokenizer: ErnieTokenizer,
    texts: Sequence[str],
    rows: list[list[int]],
    max_new_tokens: int,
    progress: bool,
) -> list[Expected]:
    """Lets the reference continue every prompt."""
    expected = []
    total = sum(len(row) + max_new_tokens for row in rows)
    with tqdm(total=total, unit="token", desc="Reference", delay=1, disable=not progress) as bar:
        for number, (text, prompt_ids) in enumerate(zip(texts, rows, strict=True), start=1):
            where = f"reference, prompt {number} ({text!r})"
            new_ids = _continue(model, tokenizer, prompt_ids, max_new_tokens, where)
            logits = _finite(_logits(model, prompt_ids + new_ids), where)
            expected.append(Expected(text, prompt_ids, new_ids, logits))
            bar.update(len(prompt_ids) + max_new_tokens)  # what an early end leaves out counts as done
    return expected


def _continue(
    model: ErnieForCausalLM, tokenizer: ErnieTokenizer, prompt_ids: list[int], max_new_tokens: int, where: str
) -> list[int]:
    try:
        ids, _ = model.generate([prompt_ids], tokenizer=tokenizer, max_new_tokens=max_new_tokens, **GREEDY)
    except ErnieError as error:
        raise ErnieError(f"{where}: {error}") from error
    return ids[0].tolist()


def _compare_all(
    model: ErnieForCausalLM, expected: list[Expected], progress: bool
) -> tuple[list[Agreement], list[Agreement]]:
    """Agreement per prompt: over all positions in one pass, and over the continuation token by token."""
    in_one_pass, token_by_token = [], []
    total = sum(2 * len(row.logits) for row in expected)
    with tqdm(total=total, unit="token", desc="Comparing", delay=1, disable=not progress) as bar:
        for number, row in enumerate(expected, start=1):
            where = f"prompt {number} ({row.text!r})"
            logits = _finite(_logits(model, row.prompt_ids + row.new_ids), where)
            in_one_pass.append(compare(row.logits, logits))
            logits = _finite(_decoded_logits(model, row.prompt_ids, row.new_ids), f"{where}, token by token")
            token_by_token.append(compare(row.logits[len(row.prompt_ids) :], logits))
            bar.update(2 * len(row.logits))
    return in_one_pass, token_by_token


@paddle.no_grad()
def _logits(model: ErnieForCausalLM, ids: list[int]) -> np.ndarray:
    """[len(ids), vocab] float32, in one forward pass."""
    return model(paddle.to_tensor([ids]))[0].astype("float32").numpy()


@paddle.no_grad()
def _decoded_logits(model: ErnieForCausalLM, prompt_ids: list[int], new_ids: list[int]) -> np.ndarray:
    """[len(new_ids), vocab] float32: after the prompt, one token at a time."""
    cache = KVCache(model.config, len(prompt_ids) + len(new_ids))
    model.ernie(paddle.to_tensor([prompt_ids]), cache=cache)
    steps = [model(paddle.to_tensor([[token]]), cache=cache)[0].astype("float32").numpy() for token in new_ids]
    return np.concatenate(steps)


def _finite(logits: np.ndarray, where: str) -> np.ndarray:
    wrong = ~np.isfinite(logits).all(axis=1)
    if wrong.any():
        raise ErnieError(
            f"{where}: the logits at {int(wrong.sum())} of {len(wrong)} positions are not finite (first: position "
            f"{int(wrong.argmax())}); weights or activations overflow in this dtype, or the checkpoint holds NaN"
        )
    return logits


def _check_dtypes(dtype: str | None, reference: str) -> None:
    for argument, value in (("dtype", dtype), ("reference", reference)):
        if value not in (*DTYPE_CHOICES, None):
            raise ErnieError(f"{argument}: expected one of {', '.join(DTYPE_CHOICES)}, found {value!r}")


def _check_weights(name: str, config: ErnieConfig, dtype: str) -> None:
    """Refuses, before anything is read, a reference that does not fit into memory."""
    specs = checkpoint_tensors(config.replace(num_nextn_predict_layers=0), vision=False)
    shortage = memory_problem(specs, dtype)
    if shortage is not None:
        advice = '; or compare with --reference bfloat16 (in Python reference="bfloat16")'
        raise ErnieError(
            f"{name}: the {dtype} reference does not fit: {shortage}{advice if dtype == 'float32' else ''}"
        )


def _check_logits(config: ErnieConfig, positions: int) -> None:
    """Refuses prompts whose logits, which outlive the reference, do not fit into memory."""
    needed, free = positions * config.vocab_size * np.dtype("float32").itemsize, available_bytes()
    if free is not None and needed > free:
        raise ErnieError(
            f"prompts: the reference's logits at up to {positions} positions need {format_bytes(needed)}, "
            f"{format_bytes(free)} are free; give fewer or shorter prompts, or fewer new tokens"
        )


@contextlib.contextmanager
def _device(name: str) -> Iterator[None]:
    """Makes a device Paddle's current one for a while."""
    before = paddle.device.get_device()
    try:
        paddle.device.set_device(name)
    except ValueError as error:
        raise ErnieError(f"device: {name!r} cannot be used here: {error}") from error
    try:
        yield
    finally:
        paddle.device.set_device(before)
