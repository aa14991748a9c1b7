"""The tokenizer over small sentencepiece models that are trained here, with the published special tokens."""

from __future__ import annotations

import functools
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError, TokenizerError
from ernie45.tokenizer import ErnieTokenizer, StreamDecoder
from ernie45.tokenizer_files import TokenizerFiles

MODEL_TYPES = ("bpe", "unigram")
BEGIN, END = "<|begin_of_sentence|>", "<|end_of_sentence|>"
PLACEHOLDER, AUDIO, LOCATION = "<|IMAGE_PLACEHOLDER|>", "<|AUDIO_PLACEHOLDER|>", "<|LOC_1|>"
LONG_LOCATION = "<|LOC_1|>0|>"  # has LOCATION as a prefix
ROLES = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
    "sep_token": END, "cls_token": BEGIN, "mask_token": "<mask:1>",
}  # fmt: skip


@functools.cache
def train(model_type: str, **options) -> bytes:
    import sentencepiece

    lines = [
        f"Model number {i}: ERNIE 文心 answers question 问题{i}, {i * 7} words and Größe.\tname: Ωmega"
        for i in range(300)
    ]
    settings_ = dict(
        vocab_size=420,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["<mask:1>", "<mask:7>", END, "fixed"],
        control_symbols=[BEGIN],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**settings_, **options}
    )
    return model.getvalue()


def pieces_in(model: bytes) -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


def published_files(model: bytes) -> dict[str, bytes]:
    first = pieces_in(model)
    added = {token: first + i for i, token in enumerate((PLACEHOLDER, AUDIO, LOCATION, LONG_LOCATION, "<think>"))}
    tables = {
        "tokenizer_config.json": {**ROLES, "add_bos_token": False, "padding_side": "right", "chat_template": "{{ 1 }}"},
        "added_tokens.json": added,
        "special_tokens_map.json": {**ROLES, "additional_special_tokens": [PLACEHOLDER, LOCATION, LONG_LOCATION]},
    }
    return {"tokenizer.model": model} | {name: json.dumps(table).encode() for name, table in tables.items()}


def with_table(files: dict[str, bytes], name: str, **changes) -> dict[str, bytes]:
    return {**files, name: json.dumps({**json.loads(files[name]), **changes}).encode()}


def write(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def build(files: dict[str, bytes]) -> ErnieTokenizer:
    return ErnieTokenizer(TokenizerFiles("folder", files))


@functools.cache
def published(model_type: str = "bpe") -> ErnieTokenizer:
    return build(published_files(train(model_type)))


FRAGMENTS = st.sampled_from(
    [*ROLES.values(), PLACEHOLDER, LOCATION, LONG_LOCATION, "<think>", "<mask:7>", "<|LOC_", "|>", "<0xE2>", "fixed"]
    + [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "\u2581",
        "\u2585",
        "\ufffd",
        "e\u0301",
        "文心",
        "👩‍👧",
        "12",
        "Model number",
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=6), max_size=12).map("".join)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@settings(deadline=None, max_examples=150)
@given(text=TEXTS, allow_special=st.booleans())
def test_round_trip_of_any_text(model_type, text, allow_special):
    tokenizer = published(model_type)
    assert tokenizer.decode(tokenizer.encode(text, allow_special=allow_special)) == text


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_disallowed_special_strings_give_no_special_token(model_type, text):
    tokenizer = published(model_type)
    atomic = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.vocabulary.atomic}
    ids = set(tokenizer.encode(text, allow_special=False))
    assert not ids & (atomic | set(tokenizer.all_special_ids))


@settings(deadline=None, max_examples=100)
@given(
    texts=st.lists(st.text(st.characters(exclude_characters="<", codec="utf-8"), max_size=5), min_size=2, max_size=5)
)
def test_special_tokens_are_split_off_first(texts):
    tokenizer = published()
    expected = tokenizer.encode(texts[0])
    for text in texts[1:]:
        expected += [tokenizer.cls_token_id, *tokenizer.encode(text)]
    assert tokenizer.encode(BEGIN.join(texts)) == expected


def test_longest_special_token_wins():
    tokenizer = published()
    names = tokenizer.convert_ids_to_tokens(tokenizer.encode(f"{LONG_LOCATION}{LOCATION}<think>"))
    assert names == [LONG_LOCATION, LOCATION, "<think>"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_plain_text_gets_the_ids_of_sentencepiece_and_nothing_more(model_type):
    import sentencepiece

    text = " ERNIE 文心 answers 123 questions,  fixed\n"
    expected = sentencepiece.SentencePieceProcessor(model_proto=train(model_type)).encode(text)
    assert published(model_type).encode(text) == expected
    assert published(model_type).encode("") == []


def test_user_defined_pieces_that_are_not_markup_stay_with_sentencepiece():
    tokenizer = published()
    fixed = tokenizer.convert_tokens_to_ids("fixed")
    assert fixed in tokenizer.encode("a fixed b", allow_special=False)
    assert tokenizer.decode([fixed], skip_special_tokens=True) == "fixed"


def test_digits_are_single_tokens():
    tokenizer = published()
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")] == list("2024")


def test_space_symbol_in_text_is_not_a_space():
    tokenizer = published()
    assert tokenizer.encode("a\u2581b") != tokenizer.encode("a b")
    assert tokenizer.decode(tokenizer.encode("a\u2581 b")) == "a\u2581 b"


def any_ids(tokenizer: ErnieTokenizer):
    byte_pieces = st.integers(0, 255).map(lambda byte: tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>"))
    characters = st.characters(codec="utf-8").map(lambda c: [byte_id(tokenizer, byte) for byte in c.encode()])
    single = (st.integers(0, len(tokenizer) + 20) | byte_pieces).map(lambda index: [index])
    return st.lists(single | characters, max_size=20).map(lambda lists: sum(lists, []))


def byte_id(tokenizer: ErnieTokenizer, byte: int) -> int:
    return tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")


@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_stream_decode_is_decode_and_gives_whole_characters(data, skip):
    tokenizer = published()
    ids = data.draw(any_ids(tokenizer))
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    parts = [stream.push(index) for index in ids] + [stream.flush()]
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)
    for part in parts:
        part.encode("utf-8")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    "options", [{}, {"add_dummy_prefix": True}, {"add_dummy_prefix": True, "remove_extra_whitespaces": True}]
)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_runs_decode_as_sentencepiece_does(model_type, options, data):
    import sentencepiece

    model = train(model_type, **options)
    tokenizer = build({"tokenizer.model": model})
    space = tokenizer.convert_tokens_to_ids("\u2581")
    ids = data.draw(st.lists(st.just([space]) | any_ids(tokenizer), max_size=6).map(lambda lists: sum(lists, [])))
    ids = [i for i in ids if i < tokenizer.vocab_size and i not in tokenizer.all_special_ids]
    ids = [i for i in ids if tokenizer.convert_ids_to_tokens(i) not in tokenizer.vocabulary.atomic]
    assert tokenizer.decode(ids) == sentencepiece.SentencePieceProcessor(model_proto=model).decode(ids)


def test_stream_holds_back_a_split_character():
    tokenizer = published()
    stream = StreamDecoder(tokenizer)
    *first, last = (byte_id(tokenizer, byte) for byte in "👧".encode())
    assert [stream.push(index) for index in first] == ["", "", ""]
    assert stream.push(last) == "👧"
    assert stream.push(first[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_skip_special_tokens_keeps_added_tokens_that_no_file_calls_special():
    tokenizer = published()
    ids = tokenizer.encode(f"{BEGIN}<think>\n1</think>{PLACEHOLDER}{END}<mask:7></s>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\n1</think><mask:7>"
    assert tokenizer.decode(ids) == f"{BEGIN}<think>\n1</think>{PLACEHOLDER}{END}<mask:7></s>"


def test_ids_that_no_token_has():
    tokenizer = published()
    unused = len(tokenizer) + 5
    ids = [*tokenizer.encode("a"), unused, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == f"a<|unused_{unused}|>b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    with pytest.raises(ErnieError, match="-100 is not a token id"):
        tokenizer.decode([5, -100])
    with pytest.raises(ErnieError, match="one sequence of integers"):
        tokenizer.decode(np.array([[1, 2]]))
    with pytest.raises(ErnieError, match="one sequence of integers"):
        tokenizer.decode([1.0])  # type: ignore[list-item]


def test_decode_takes_arrays_and_single_ids():
    tokenizer = published()
    ids = tokenizer.encode("ERNIE 文心")
    assert tokenizer.decode(np.array(ids)) == "ERNIE 文心"
    assert tokenizer.decode(ids[0]) + tokenizer.decode(iter(ids[1:])) == "ERNIE 文心"
    assert "".join(map(StreamDecoder(tokenizer).push, np.array(ids))) == "ERNIE 文心"


def test_text_that_cannot_be_encoded():
    with pytest.raises(ErnieError, match=r"lone surrogate '\\ud83d' at position 2"):
        published().encode("ab\ud83dc")
    with pytest.raises(ErnieError, match="expected a str"):
        published().encode(b"ab")  # type: ignore[arg-type]


def test_vocabulary_and_roles():
    tokenizer = published()
    assert tokenizer.vocab_size == pieces_in(train("bpe"))
    assert len(tokenizer) == tokenizer.vocab_size + 5
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.sep_token, tokenizer.cls_token, tokenizer.mask_token) == (END, BEGIN, "<mask:1>")
    assert tokenizer.convert_ids_to_tokens(tokenizer.sep_token_id) == END
    assert tokenizer.convert_tokens_to_ids([PLACEHOLDER, "no such token"]) == [tokenizer.vocab_size, 0]
    assert tokenizer.special_tokens == ROLES
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert (
        think not in tokenizer.all_special_ids
        and tokenizer.convert_tokens_to_ids(LOCATION) in tokenizer.all_special_ids
    )


def test_model_file_alone_has_the_published_roles():
    tokenizer = build({"tokenizer.model": train("bpe")})
    assert tokenizer.special_tokens == ROLES
    assert tokenizer.chat_templates == {}
    assert tokenizer.encode(f"{BEGIN}</s>") == [tokenizer.cls_token_id, 2]


def test_role_switched_off_and_added_tokens_decoder():
    files = published_files(train("bpe"))
    first = pieces_in(train("bpe"))
    del files["special_tokens_map.json"]
    entry = {"content": "<|im_start|>", "special": True}
    files = with_table(
        files, "tokenizer_config.json", mask_token=None, added_tokens_decoder={str(first + 9): entry}, eos_token=entry
    )
    tokenizer = build(files)
    assert tokenizer.mask_token is None and tokenizer.mask_token_id is None
    assert tokenizer.eos_token_id == first + 9 and len(tokenizer) == first + 10
    assert tokenizer.decode([first + 9], skip_special_tokens=True) == ""


def test_batch_is_padded_on_either_side():
    tokenizer = published()
    short, long = tokenizer.encode("ab"), tokenizer.encode("ab cd 文心")
    gap = len(long) - len(short)
    batch = tokenizer(["ab", "ab cd 文心"], padding=True, return_tensors="np")
    assert batch["input_ids"].tolist() == [short + [0] * gap, long]
    assert batch["attention_mask"].tolist() == [[1] * len(short) + [0] * gap, [1] * len(long)]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == np.int64
    left = tokenizer(["ab", "ab cd 文心"], padding=True, padding_side="left")
    assert left["input_ids"][0] == [0] * gap + short
    assert left["attention_mask"][0] == [0] * gap + [1] * len(short)
    assert tokenizer("ab")["input_ids"] == [short]


def test_batch_as_paddle_tensors():
    paddle = pytest.importorskip("paddle")
    batch = published()("ab", return_tensors="pd")
    assert batch["input_ids"].dtype == paddle.int64 and batch["input_ids"].shape == [1, len(published().encode("ab"))]


def test_batch_errors():
    with pytest.raises(ErnieError, match="padding=True"):
        published()(["a", "a b c d"], return_tensors="np")
    with pytest.raises(ErnieError, match="padding_side is 'middle'"):
        published()(["a"], padding=True, padding_side="middle")  # type: ignore[arg-type]
    with pytest.raises(ErnieError, match="return_tensors is 'pt'"):
        published()(["a"], return_tensors="pt")  # type: ignore[arg-type]


def test_save_and_reload_are_identical(tmp_path):
    files = {**published_files(train("bpe")), "chat_template.jinja": "{{ '问' }}".encode()}
    tokenizer = ErnieTokenizer.from_pretrained(write(tmp_path / "source", files))
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "chat_template.json").write_text("{}")  # a stale one
    tokenizer.save_pretrained(tmp_path / "target")
    assert {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()} == files
    again = ErnieTokenizer.from_pretrained(str(tmp_path / "target"))
    assert again.vocabulary == tokenizer.vocabulary
    assert again.chat_templates == tokenizer.chat_templates == {"default": "{{ '问' }}"}


def test_save_to_an_impossible_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match="cannot write"):
        published().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("table", "templates"),
    [
        ({"chat_template": "a"}, {"default": "a"}),
        (
            {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]},
            {"default": "a", "tool_use": "b"},
        ),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_places_of_chat_templates(table, templates, file):
    files = {"tokenizer.model": train("bpe"), file: json.dumps(table).encode()}
    assert build(files).chat_templates == templates


def broken_files() -> dict[str, tuple[dict[str, bytes], str]]:
    files = published_files(train("bpe"))
    model, first = files["tokenizer.model"], pieces_in(files["tokenizer.model"])
    config, added = "tokenizer_config.json", "added_tokens.json"
    return {
        "no model": ({config: files[config]}, "no tokenizer.model"),
        "empty model": ({**files, "tokenizer.model": b""}, "tokenizer.model: truncated"),
        "truncated model": ({**files, "tokenizer.model": model[:-9]}, "tokenizer.model: truncated"),
        "cut between pieces": ({**files, "tokenizer.model": model[: model.index(b"\n", 60)]}, "tokenizer.model: trunc"),
        "not a model": ({**files, "tokenizer.model": b"<html>404</html>"}, "tokenizer.model: truncated, or not"),
        "pointer": ({**files, "tokenizer.model": b"version https://git-lfs.github.com/spec/v1\n"}, "Git LFS pointer"),
        "invalid JSON": ({**files, config: b"{"}, f"{config}: invalid JSON"),
        "deep JSON": ({**files, config: b"[" * 100_000}, f"{config}: invalid JSON"),
        "not UTF-8": ({**files, added: b"\xff\xfe{}"}, f"{added}: not UTF-8"),
        "not an object": ({**files, added: b"[]"}, f"{added}: expected a JSON object"),
        "id of a piece": (with_table(files, added, new=5), f"{added}: token 'new' has the id 5, which is already"),
        "id twice": (with_table(files, added, new=first), f"{added}: token 'new' has the id {first}, which is already"),
        "another id": (with_table(files, added, **{"<s>": first + 9}), f"'<s>' has the id {first + 9}, but 1"),
        "not an id": (with_table(files, added, new="x"), f"{added}: token 'new' has the id 'x'"),
        "negative id": (with_table(files, added, new=-1), f"{added}: token 'new' has the id -1"),
        "unknown role": (with_table(files, config, eos_token="<no>"), f"{config}: eos_token names the token '<no>'"),
        "role of a wrong type": (with_table(files, config, eos_token=3), f"{config}: eos_token is 3"),
        "unknown extra": (with_table(files, config, additional_special_tokens=["<no>"]), "additional_special_tokens"),
        "extras of a wrong type": (with_table(files, config, additional_special_tokens=3), "expected a list"),
        "decoder of a wrong type": (with_table(files, config, added_tokens_decoder=[1]), "added_tokens_decoder"),
        "decoder without content": (with_table(files, config, added_tokens_decoder={"9": {}}), "added_tokens_decoder"),
        "decoder with a text key": (with_table(files, config, added_tokens_decoder={"x": "new"}), "has the id 'x'"),
        "template of a wrong type": (with_table(files, config, chat_template=[{"name": 1}]), "chat_template must be"),
        "padding side": (with_table(files, config, padding_side="up"), f"{config}: padding_side is 'up'"),
    }


@pytest.mark.parametrize("case", broken_files())
def test_broken_files(case, tmp_path):
    files, message = broken_files()[case]
    with pytest.raises(ErnieError) as error:
        ErnieTokenizer.from_pretrained(write(tmp_path / "folder", files))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_mutated_model_files_give_a_tokenizer_or_a_clear_error(data):
    model = bytearray(train("unigram"))
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    model = model[: data.draw(st.sampled_from([len(model), len(model) // 2]))]
    try:
        tokenizer = build({"tokenizer.model": bytes(model)})
    except TokenizerError:
        return
    assert isinstance(tokenizer.decode(tokenizer.encode("ERNIE 文心\n12")), str)


def test_import_is_lazy():
    code = (
        "import sys, ernie45.tokenizer, ernie45.chat; "
        "print([m for m in ('paddle', 'sentencepiece', 'jinja2', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parity
def test_same_ids_as_transformers(tmp_path):
    """transformers' BPE is the tokenizers library's: merges, byte fallback and splitting are all written anew there."""
    transformers = pytest.importorskip("transformers")
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    write(tmp_path, published_files(train("bpe", user_defined_symbols=f"<mask:1>,<mask:7>,{END}")))
    vocabulary, _, merges = SentencePieceExtractor(str(tmp_path / "tokenizer.model")).extract()
    other = transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=False, add_prefix_space=False)
    tokenizer = ErnieTokenizer.from_pretrained(tmp_path)
    other.add_tokens(sorted(tokenizer.vocabulary.atomic, key=tokenizer.convert_tokens_to_ids), special_tokens=True)
    for text in (
        "Model number 17: ERNIE 文心 answers",
        f"{BEGIN}User: 问题12 👧\nAssistant: <think> {LONG_LOCATION}{END}",
        "  two  spaces\t\n\n",
        "Größe Ω",
    ):
        assert tokenizer.encode(text) == other.encode(text, add_special_tokens=False), text
