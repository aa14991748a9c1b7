"""A tokenizer small enough for the tiny models: 320 byte and word pieces, trained on the spot."""

from __future__ import annotations

import io
import json

import pytest

from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.tokenizer import ErnieTokenizer
from ernie45.tokenizer_files import TokenizerFiles
from tests.helpers.tiny import tiny_config, tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> ErnieTokenizer:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four five", "文心 问题 六 七"] * 20),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return ErnieTokenizer(
        TokenizerFiles(
            "folder", {"tokenizer.model": model.getvalue(), "tokenizer_config.json": json.dumps(roles).encode()}
        )
    )


@pytest.fixture(scope="session")
def speaker(tokenizer: ErnieTokenizer) -> ErnieForCausalLM:
    """A model with more ids than the tokenizer."""
    return tiny_model(tiny_config(vocab_size=len(tokenizer) + 20))
