"""Builds the tokenizer of the small model: a sentencepiece vocabulary and the files that ERNIE 4.5 publishes with it.

    python examples/tiny_tokenizer.py build/tiny-tokenizer

The vocabulary is trained on text that `tiny_tasks.py` writes. As in the published one, text is not normalised, every
digit is a token of its own, unknown characters fall back to bytes, `<unk>`, `<s>`, `</s>` are 0, 1, 2, the special
tokens of the chat are pieces of the model, and those for pictures, sound, thinking and tools follow after it, with
consecutive ids, in added_tokens.json. Only the count of ordinary pieces is smaller.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tiny_tasks import WEEKDAYS, sample

from ernie45 import ErnieTokenizer
from ernie45.chat import VISION_TEMPLATE

VOCABULARY_SIZE = 1536
END_OF_SENTENCE, BEGIN_OF_SENTENCE = "<|end_of_sentence|>", "<|begin_of_sentence|>"
SPECIAL_PIECES = ("<cls>", "<sep>", "<pad>", *(f"<mask:{n}>" for n in range(8)), END_OF_SENTENCE, BEGIN_OF_SENTENCE)
# What every turn of a chat contains is one token each: the questions are short, and so these are a third of the text.
# Weekdays are one token each too, which BPE would otherwise glue to the words around them.
WHOLE_PIECES = ("User:▁", "Assistant:▁", "\n", *WEEKDAYS["zh"])
ADDED_TOKENS = (
    "<|IMAGE_PLACEHOLDER|>", "<|AUDIO_PLACEHOLDER|>",
    *(f"<|LOC_{n}|>" for n in range(1001)), "<|LOC_BEGIN|>", "<|LOC_END|>", "<|LOC_SEP|>",
    "<|CROP_COL_SEP|>", "<|CROP_ROW_SEP|>", "<|IMAGE_SEP|>",
    "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>", "<|ASR_START|>", "<|ASR_END|>",
    "<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip
ASCII = "".join(map(chr, range(33, 127)))
# Frequent characters beyond those of the questions, so that ordinary Chinese is one token a character.
COMMON_CHINESE = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所"
    "民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政四"
    "日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解问意建月公无系军很情者最立"
    "代想已通并提直题党程展五果料象员革位入常文总次品式活设及管特件长求老头基资边流路级少图山统接知较将组见计别她手角期根论"
    "运农指几九区强放决西被干做必战先回则任取据处队南给色光门即保治北造百规热领七海口东导器压志世金增争济阶油思术极交受联什"
    "认六共权收证改清己美再采转更单风切打白教速花带安场身车例真务具万每目至达走积示议声报斗完类八离华名确才科张信马节话米整"
    "空元况今集温传土许步群广石记需段研界拉林律叫且究观越织装影算低持音众书布复容儿须际商非验连断深难近矿千周委素技备半办青"
    "红黄蓝绿黑紫橙圆方三左右上下图片视频声音跳跑猫狗鸟鱼马牛羊您请谢吗呢吧啊哪谁怎好，。！？、；：“”‘’（）《》—…·"
)
SPECIAL_TOKENS_MAP = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "cls_token": BEGIN_OF_SENTENCE,
    "sep_token": END_OF_SENTENCE,
    "mask_token": "<mask:1>",
    "sys_start_token": "<mask:4>",
    "sys_end_token": "<mask:5>",
    "header_start_token": "<mask:6>",
    "header_end_token": "<mask:7>",
    "additional_special_tokens": [f"<mask:{n}>" for n in range(4, 8)],
}


def training_sentences(count: int, seed: int) -> Iterator[str]:
    """Prompts and answers in turn, from training questions only."""
    rng = random.Random(seed)
    for _ in range(count):
        question = sample(rng)
        yield question.prompt
        yield question.answer


def train_sentencepiece(sentences: Iterator[str], vocabulary_size: int) -> bytes:
    """Trains the BPE model and returns it serialised.

    Raises:
        RuntimeError: from sentencepiece, if `vocabulary_size` does not even hold the characters and special pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary_size,
        hard_vocab_limit=True,
        character_coverage=1.0,
        required_chars=ASCII + "".join(dict.fromkeys(COMMON_CHINESE)),
        control_symbols=list(SPECIAL_PIECES),
        user_defined_symbols=list(WHOLE_PIECES),
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def build_tokenizer(
    folder: str | Path, vocabulary_size: int = VOCABULARY_SIZE, questions: int = 20_000, seed: int = 0
) -> int:
    """Writes tokenizer.model and the JSON files around it into `folder`; returns the count of all tokens.

    The folder appears whole or not at all: it is filled under a temporary name first.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        (unfinished / "tokenizer.model").write_bytes(
            train_sentencepiece(training_sentences(questions, seed), vocabulary_size)
        )
        added = {token: vocabulary_size + place for place, token in enumerate(ADDED_TOKENS)}
        config = {
            "tokenizer_class": "Ernie4_5_Tokenizer",
            **SPECIAL_TOKENS_MAP,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
            "model_max_length": 131072,
            "chat_template": VISION_TEMPLATE,
        }
        generation = {"do_sample": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        for name, content in (
            ("added_tokens.json", added),
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", SPECIAL_TOKENS_MAP),
            ("generation_config.json", generation),
        ):
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (unfinished / name).write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for path in unfinished.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(unfinished)
    return vocabulary_size + len(ADDED_TOKENS)


def copy_tokenizer(source: str | Path, folder: Path, template: str = VISION_TEMPLATE) -> None:
    """Writes the tokenizer of the checkpoint `source` into `folder`, with another chat template."""
    ErnieTokenizer.from_pretrained(source).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the tokenizer of the small model.")
    parser.add_argument("folder", help="where the files go, for example build/tiny-tokenizer")
    parser.add_argument("--vocabulary-size", type=int, default=VOCABULARY_SIZE, help="pieces before the added tokens")
    arguments = parser.parse_args()
    total = build_tokenizer(arguments.folder, arguments.vocabulary_size)
    print(f"{arguments.folder}: {total} tokens, {len(ADDED_TOKENS)} of them after the sentencepiece model")
