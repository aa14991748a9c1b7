"""Stop strings, streamers and the iterator `stream`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.generation import text as text_module
from ernie45.generation.prompt_cache import PromptCache
from ernie45.generation.streaming import TextStreamer
from ernie45.generation.text import RowText
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.tokenizer import ErnieTokenizer

OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "do_sample": True, "temperature": 3.0, "eos_token_id": []}
seeds = pytest.mark.parametrize("seed", range(4))


class Pieces:
    """Stands in for StreamDecoder: token i is the i-th of the pieces given as tokenizer."""

    def __init__(self, pieces: list[str], skip_special_tokens: bool):
        self._pieces = pieces

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""


@given(st.lists(st.text("ab<", max_size=4)), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_and_is_never_retracted(pieces: list[str], stops: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "StreamDecoder", Pieces)
        row = RowText(pieces, stops)  # type: ignore[arg-type]
        released, so_far = "", ""
        for index, piece in enumerate(pieces):
            released += row.push(index)
            so_far += piece
            hits = [so_far.find(stop) for stop in stops if stop in so_far]
            assert row.stopped == bool(hits)
            if hits:
                assert released == so_far[: min(hits)]
                break
            held = so_far[len(released) :]
            assert so_far.startswith(released)
            assert not held or any(stop.startswith(held) for stop in stops)
            assert not any(so_far.endswith(stop[:n]) and n > len(held) for stop in stops for n in range(len(stop)))
        else:
            assert released + row.flush() == so_far
        assert row.flush() == ""


def reply_text(model: ErnieForCausalLM, tokenizer: ErnieTokenizer, **options: Any) -> tuple[list[int], str]:
    ids = model.generate([5, 6], tokenizer=tokenizer, **{**OPTIONS, **options}).ids.numpy()[0].tolist()
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


@seeds
def test_streamed_text_is_the_decoded_text(speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer, seed: int) -> None:
    ids, text = reply_text(speaker, tokenizer, seed=seed)
    pieces = list(speaker.stream([5, 6], tokenizer=tokenizer, seed=seed, **OPTIONS))
    assert len(pieces) > 5 and "" not in pieces
    assert "".join(pieces) == text
    raw = speaker.stream([5, 6], tokenizer=tokenizer, seed=seed, skip_special_tokens=False, **OPTIONS)
    assert "".join(raw) == tokenizer.decode(ids)


@seeds
def test_stop_strings(speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer, seed: int) -> None:
    ids, text = reply_text(speaker, tokenizer, seed=seed)
    middle = len(text) // 2
    for stop in (text[middle], text[middle : middle + 4], text[-3:]):
        stopped, _ = reply_text(speaker, tokenizer, seed=seed, stop_strings=["never in there", stop])
        assert stopped == ids[: len(stopped)]
        assert stop in tokenizer.decode(stopped, skip_special_tokens=True) or stop[-1] == "\ufffd"
        assert stop not in tokenizer.decode(stopped[:-1], skip_special_tokens=True).rstrip("\ufffd")
        streamed = speaker.stream(
            [5, 6], tokenizer=tokenizer, seed=seed, stop_strings=["never in there", stop], **OPTIONS
        )
        assert "".join(streamed) == text[: text.index(stop)]


def test_stop_strings_end_rows_one_by_one(speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer) -> None:
    options = {**OPTIONS, "tokenizer": tokenizer, "seed": 1, "stop_strings": "e", "pad_token_id": 0}
    batch = speaker.generate([[5, 6], [7], [8, 9, 10]], **options)
    lengths = (batch.log_probs.numpy() != 0).sum(axis=1)
    assert len(set(lengths.tolist())) > 1
    for prompt, row, length in zip([[5, 6], [7], [8, 9, 10]], batch.ids.numpy(), lengths, strict=True):
        assert speaker.generate(prompt, **options).ids.numpy()[0].tolist() == row[:length].tolist()
        assert not row[length:].any()


def test_a_special_token_as_stop_string_works_like_an_eos_id(
    speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer
) -> None:
    eos = tokenizer.eos_token_id

    def force(context: Any, logits: np.ndarray) -> np.ndarray:
        logits = logits.copy()
        logits[:, eos] = 1e4 if context.replies.shape[1] == 4 else -np.inf
        return logits

    options = {"tokenizer": tokenizer, "stop_strings": ["</s>"], "logits_processors": [force], "max_new_tokens": 9}
    ids = speaker.generate([5, 6], eos_token_id=[], **options).ids.numpy()[0].tolist()
    assert len(ids) == 5 and ids[-1] == eos
    shown = speaker.stream([5, 6], eos_token_id=[], skip_special_tokens=False, **options)
    assert "".join(shown) == tokenizer.decode(ids[:-1])


@seeds
def test_text_streamer(
    speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    _, text = reply_text(speaker, tokenizer, seed=seed)
    reply_text(speaker, tokenizer, seed=seed, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == text + "\n"
    stop, file = text[9:12], io.StringIO()
    reply_text(
        speaker,
        tokenizer,
        seed=seed,
        stop_strings=stop,
        streamer=TextStreamer(tokenizer, stop_strings=[stop], file=file),
    )
    assert file.getvalue() == text[: text.index(stop)] + "\n"


def test_a_streamer_gets_every_step_and_the_end_even_after_ctrl_c(speaker: ErnieForCausalLM) -> None:
    class Recorder:
        def __init__(self, patience: int):
            self.steps: list[list[int]] = []
            self.ended, self._patience = 0, patience

        def put(self, ids: np.ndarray) -> None:
            self.steps.append(ids.tolist())
            if len(self.steps) == self._patience:
                raise KeyboardInterrupt

        def end(self) -> None:
            self.ended += 1

    patient, hasty = Recorder(1000), Recorder(3)
    ids = speaker.generate([[5], [6, 7]], streamer=patient, **{**OPTIONS, "seed": 0}).ids.numpy()
    assert np.array(patient.steps).T.tolist() == ids.tolist() and patient.ended == 1
    with pytest.raises(KeyboardInterrupt):
        speaker.generate([[5], [6, 7]], streamer=hasty, **{**OPTIONS, "seed": 0})
    assert hasty.steps == patient.steps[:3] and hasty.ended == 1


def test_stream_takes_text_messages_and_ids(speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer) -> None:
    def reply(prompt: Any) -> str:
        return "".join(speaker.stream(prompt, tokenizer=tokenizer, seed=0, **OPTIONS))

    messages = [{"role": "user", "content": "one two"}]
    template = "{{ messages[0].content }} three"
    tokenizer.chat_templates["default"] = template
    try:
        assert reply("one two three") == reply(tokenizer.encode("one two three")) == reply(messages)
    finally:
        del tokenizer.chat_templates["default"]
    assert reply("one two three") != reply("four")


def test_a_conversation_computes_only_what_is_new(speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer) -> None:
    cache, prompt = PromptCache(speaker.config), tokenizer.encode("one two three")
    for turn in range(3):
        stream = speaker.stream(prompt, tokenizer=tokenizer, cache=cache, seed=turn, **OPTIONS)
        text = next(stream) + next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert cache.ids.tolist()[0][: len(prompt)] == prompt
        whole = "".join(speaker.stream(prompt, tokenizer=tokenizer, seed=turn, **OPTIONS))
        again = "".join(speaker.stream(prompt, tokenizer=tokenizer, seed=turn, cache=cache, **OPTIONS))
        assert whole == again and whole.startswith(text)
        prompt = prompt + tokenizer.encode(text) + tokenizer.encode("four")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "input_ids"),
        ([[5], [6]], {}, "stream: one prompt.*found 2 prompts"),
        ("one", {"num_beams": 2}, "num_beams=2"),
        ("one", {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ("one", {"stop_strings": [3]}, "stop_strings: expected texts"),
        ([{"role": "user"}], {}, "content"),
    ],
)
def test_errors_come_before_the_first_piece(
    speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ErnieError, match=message):
        speaker.stream(prompt, tokenizer=tokenizer, **options)


def test_text_streamer_prints_one_row(speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer) -> None:
    with pytest.raises(ErnieError, match="TextStreamer: prints one row, found 2"):
        speaker.generate([[5], [6]], streamer=TextStreamer(tokenizer, file=io.StringIO()))
