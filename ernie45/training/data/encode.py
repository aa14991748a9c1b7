"""From a conversation, a preference or a text to token ids and labels.

The label of a token is the one that follows it. Learned are the answers, and behind each of them, not only behind the
last, the end-of-text token `</s>`, which stops generation: where the template ends an answer with the separator
`<|end_of_sentence|>`, this stays in the input, as prompts have it, while the label there is `</s>`. (So does ERNIEKit;
PaddleFormers learns it behind the last answer only.) A template that ends its answers with another special token, such
as `<|im_end|>`, gets that one learned.

Prompts and answers become tokens apart, as at inference, where a model continues the ids of its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ernie45.chat import Message
from ernie45.errors import ErnieError
from ernie45.losses import IGNORED_LABEL
from ernie45.processing.messages import MARKER, check_places, encode_prompt, read_media
from ernie45.processing.positions import position_ids, token_types
from ernie45.tokenizer import ErnieTokenizer
from ernie45.training.data.answers import Answer, answer_end, find_answer, sequences
from ernie45.training.data.records import Conversation, Preference, Record, Text

if TYPE_CHECKING:
    from ernie45.processing.processor import Encoded, ErnieProcessor

Truncation = Literal["delete", "left", "right", "oral"]


@dataclass(frozen=True, eq=False)
class Example:
    """A sequence to learn from.

    Attributes:
        input_ids: [s] int64.
        labels: [s] int64, shifted: labels[i] follows input_ids[i]; -100 where nothing is learned.
        position_ids: [s] int64, or of a vision-language model [s, 3].
        token_type_ids: [s] int64, 0 text, 1 picture, 2 video; None for a text model.
        images: [patches, patch_bytes] uint8; None for a text model.
        grid_thw: [items, 3] int64, frames, rows and columns of patches; None for a text model.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    token_type_ids: np.ndarray | None = None
    images: np.ndarray | None = None
    grid_thw: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """How many tokens have a label."""
        return int((self.labels != IGNORED_LABEL).sum())

    @property
    def examples(self) -> tuple[Example, ...]:
        """Itself, as `Pair.examples`."""
        return (self,)


@dataclass(frozen=True, eq=False)
class Pair:
    """A preferred and a less preferred sequence, which begin with the same prompt.

    They are two documents of one row. Upstream saves the second copy of the prompt by letting both responses follow
    it, with a mask between them; in its sparse mask the column of the last prompt token then stays visible to the
    rejected response beside the copy of that token which begins it, so that its dense and its sparse mask disagree.
    """

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def examples(self) -> tuple[Example, ...]:
        """The two, chosen first."""
        return self.chosen, self.rejected


class Encoder:
    """Makes sequences from what data files hold.

    Args:
        tokenizer: of the model.
        processor: of a vision-language model; without it, lines with pictures or videos are errors.
        max_length: tokens of the longest sequence.
        truncation: what becomes of conversations that are longer. "delete": they are dropped; "left" and "right": they
            lose tokens at that end; "oral": they lose their oldest turns, and a last turn that is too long by itself
            the end of its answer, or everything if its question alone is too long. Those with pictures and pairs are
            dropped in any case: a cut could go through a picture, or leave a pair two prompts.
        chat_template: the name or source of one; None: that of the checkpoint.
        template_kwargs: further variables of the template.

    Attributes:
        dropped: how many sequences were too long so far.

    Raises:
        ErnieError: an impossible setting, or a tokenizer without an end-of-text token.
    """

    def __init__(
        self,
        tokenizer: ErnieTokenizer,
        processor: ErnieProcessor | None = None,
        *,
        max_length: int = 4096,
        truncation: Truncation = "delete",
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if truncation not in get_args(Truncation):
            raise ErnieError(f"truncation is {truncation!r}, expected one of {', '.join(get_args(Truncation))}")
        if max_length < 1:
            raise ErnieError(f"max_length is {max_length}, expected a positive number of tokens")
        if tokenizer.eos_token_id is None:
            raise ErnieError("this tokenizer has no eos_token, which answers have to end with")
        self.tokenizer, self.processor = tokenizer, processor
        self.max_length, self.truncation = max_length, truncation
        self._chat_template, self._variables = chat_template, dict(template_kwargs or {})
        self._end: str | None = None
        self.dropped = 0

    def __call__(self, record: Record) -> list[Example] | list[Pair]:
        """The sequences of a record: usually one, none if it is too long.

        A conversation has several where its template rewrites earlier turns (see `answers`), a text where it is longer
        than `max_length`.

        Raises:
            ErnieError: a conversation that the template cannot show, or pictures that cannot be read.
        """
        if isinstance(record, Text):
            return self._encode_text(record)
        if isinstance(record, Preference):
            return self._encode_pair(record)
        return self._encode_conversation(record)

    @property
    def settings(self) -> dict[str, Any]:
        """What sequences depend on beside the tokenizer."""
        template = {"chat_template": self._chat_template, "template_kwargs": self._variables}
        return {"max_length": self.max_length, "truncation": self.truncation, **template}

    def empty(self) -> Example:
        """A sequence without tokens, for rows that are padding only."""
        return self._example(np.zeros(0, "int64"), np.zeros(0, "int64"), [])

    def _encode_text(self, record: Text) -> list[Example]:
        ids = np.array([*self.tokenizer.encode(record.text), self.tokenizer.eos_token_id], "int64")
        starts = range(0, len(ids) - 1, self.max_length)
        pieces = [ids[start : start + self.max_length + 1] for start in starts]
        return [self._example(piece[:-1], piece[1:], []) for piece in pieces]

    def _encode_pair(self, record: Preference) -> list[Pair]:
        chosen, rejected = (self._encode_side(record, side) for side in (record.chosen, record.rejected))
        return self._kept(Pair(chosen, rejected))

    def _encode_side(self, record: Preference, side: Sequence[Message]) -> Example:
        learned = [False] * len(record.prompt) + [message["role"] == "assistant" for message in side]
        conversation = Conversation((*record.prompt, *side), tuple(learned), record.tools)
        chains = self._chains(conversation)
        if len(chains) > 1:
            raise ErnieError("the chat template rewrites earlier turns: compare responses of one answer each")
        return self._join(conversation, chains[0], self._media(conversation))

    def _encode_conversation(self, record: Conversation) -> list[Example]:
        media = self._media(record)
        found: list[Example] = []
        for chain in self._chains(record):
            example = self._join(record, chain, media)
            if len(example) <= self.max_length or self.truncation == "delete" or media:
                found += self._kept(example)
            elif self.truncation == "oral":
                found += self._newest_turns(record, chain, example)
            else:
                found += self._cut(example, self.truncation)
        return found

    def _kept(self, sequence: Any) -> list[Any]:
        self.dropped += len(sequence) > self.max_length
        return [sequence] if len(sequence) <= self.max_length else []

    def _cut(self, example: Example, side: str) -> list[Example]:
        part = slice(-self.max_length, None) if side == "left" else slice(self.max_length)
        cut = self._example(example.input_ids[part], example.labels[part], [])
        self.dropped += not cut.learned
        return [cut] if cut.learned else []

    def _newest_turns(self, record: Conversation, chain: Sequence[Answer], example: Example) -> list[Example]:
        """The sequence without as many of the oldest turns as it takes; of the last one, the answer is cut."""
        last = chain[-1].index
        system = sum(message["role"] == "system" for message in record.messages[:1])
        turns = [i for i in range(system, last) if record.messages[i]["role"] == "user"]
        if len(turns) < 2:
            return self._cut(example, "right")
        kept = [*range(system), *range(turns[1], last + 1)]
        learned = {answer.index for answer in chain}
        shorter = Conversation(tuple(record.messages[i] for i in kept), tuple(i in learned for i in kept), record.tools)
        return self._encode_conversation(shorter)

    # ---- text to ids

    def _render(self, record: Conversation, messages: Sequence[Message], prompt: bool, thinks: bool) -> str:
        options: dict[str, Any] = {
            "add_generation_prompt": prompt,
            "enable_thinking": thinks,
            "tools": list(record.tools) or None,
            "chat_template": self._chat_template,
        }
        if self.processor is not None:
            return self.processor.apply_chat_template(messages, template_kwargs=self._variables, **options)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **self._variables)
        assert isinstance(text, str)
        return text

    def _chains(self, record: Conversation) -> list[list[Answer]]:
        def render(messages: Sequence[Message], prompt: bool, thinks: bool) -> str:
            return self._render(record, messages, prompt, thinks)

        if self._end is None:
            self._end = answer_end(render, sorted(self.tokenizer.vocabulary.atomic))
        indices = [index for index, learned in enumerate(record.learned) if learned]
        return sequences([find_answer(record, index, render, self._end) for index in indices])

    def _media(self, record: Conversation) -> list[Encoded]:
        """Patches and grids of everything that the messages show, in order."""
        _, media = read_media(record.messages)
        if media and self.processor is None:
            raise ErnieError(f"{media[0].where}: a picture or video, for which the encoder has no processor")
        return self.processor.encode_media(media) if self.processor is not None else []

    def _join(self, record: Conversation, chain: Sequence[Answer], media: Sequence[Encoded]) -> Example:
        """The sequence of a chain: prompt, answer, what the template writes between, answer, ..., without the end."""
        _, shown = read_media(record.messages[: chain[-1].index + 1])
        check_places(chain[-1].history, shown)
        grids = np.array([grid for _, grid in media[: len(shown)]], "int64").reshape(-1, 3)
        end = self._end_id()
        ids: list[int] = []
        labels: list[int] = []
        seen, between, history = 0, "", ""
        for answer in chain:
            asked = between + answer.prompt[len(history) :]
            count = len(MARKER.findall(asked))
            prompt = self._encode(asked, grids[seen : seen + count])
            body = self._encode(answer.body, grids[:0])
            ids += prompt + body
            labels += [IGNORED_LABEL] * (len(prompt) - 1) + body + [end]
            seen, between, history = seen + count, answer.rest, answer.history
        return self._example(np.array(ids, "int64"), np.array(labels, "int64"), media[: len(shown)])

    def _encode(self, text: str, grids: np.ndarray) -> list[int]:
        if self.processor is None:
            return self.tokenizer.encode(text)
        return encode_prompt(text, grids, self.tokenizer, self.processor.vision).tolist()

    def _end_id(self) -> int:
        """What is learned behind an answer."""
        plain = self._end in ("", self.tokenizer.sep_token)
        end = self.tokenizer.eos_token_id if plain else self.tokenizer.convert_tokens_to_ids(self._end or "")
        assert end is not None
        return end

    def _example(self, ids: np.ndarray, labels: np.ndarray, media: Sequence[Encoded]) -> Example:
        example = Example(ids, labels, np.arange(len(ids)))
        if self.processor is None:
            return example
        vision = self.processor.vision
        grid = np.array([grid for _, grid in media], "int64").reshape(-1, 3)
        return replace(
            example,
            position_ids=position_ids(ids, grid, vision),
            token_type_ids=token_types(ids, grid, vision),
            images=np.concatenate([np.zeros([0, vision.patch_bytes], "uint8"), *(patches for patches, _ in media)]),
            grid_thw=grid,
        )
