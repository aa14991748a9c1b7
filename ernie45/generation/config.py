"""The options of `generate`, with defaults from a checkpoint's generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ernie45.config import ErnieConfig
from ernie45.errors import ConfigError


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. Neutral values switch an option off.

    Attributes:
        max_new_tokens: at most this many new tokens per row.
        min_new_tokens: end-of-sequence ids are impossible before this many.
        do_sample: draw from the distribution; otherwise take the most likely token.
        temperature: divides the logits before sampling; at least 1e-6.
        top_k: sample among the k most likely tokens; 0: all.
        top_p: of these, sample among the smallest set whose probability reaches p; 1: all.
        min_p: of these, sample among tokens at least this fraction as likely as the best; 0: all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or reply; 1: off.
        presence_penalty: subtracted from the logits of tokens that occur in the reply.
        frequency_penalty: subtracted once for every occurrence in the reply.
        num_beams: width of the beam search; 1: no beams.
        length_penalty: beam scores (sums of log-probabilities) are divided by length ** length_penalty.
        num_return_sequences: replies per prompt row.
        eos_token_id: ids that end a row.
        pad_token_id: id that fills rows which ended early.
        seed: of the sampler, which is independent of Paddle's and NumPy's global generators; rows with the same
            prompt and seed get the same reply. None: different at every call.
        extra: keys of generation_config.json that are not used, kept for writing it back.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_return_sequences: int = 1
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int = 0
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {rule}, found {getattr(self, name)!r}"
            for name, (rule, holds) in _RULES.items()
            if not _holds(holds, getattr(self, name))
        ]
        if self.min_new_tokens > self.max_new_tokens:
            problems.append(f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}")
        if self.num_beams > 1 and self.do_sample:
            problems.append("beam search does not sample: set do_sample=False or num_beams=1")
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            problems.append(
                f"num_return_sequences {self.num_return_sequences} needs do_sample=True or as many num_beams: "
                "greedy search has one answer"
            )
        if problems:
            raise ConfigError("generation: " + "; ".join(problems))

    @classmethod
    def from_model_config(cls, config: ErnieConfig) -> GenerationConfig:
        """Defaults for a model without generation_config.json: greedy, the eos and pad ids of config.json."""
        return cls(eos_token_id=_ids(config.eos_token_id), pad_token_id=config.pad_token_id)

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: ErnieConfig) -> GenerationConfig:
        """Reads generation_config.json of a checkpoint folder; without one, see `from_model_config`.

        Decoding stays greedy unless a call asks for `do_sample=True`, which then uses the file's temperature, top_p...

        Raises:
            ConfigError: the file is not valid.
        """
        path = Path(folder) / "generation_config.json"
        if not path.is_file():
            return cls.from_model_config(config)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, Mapping):
                raise ConfigError(f"expected a JSON object, found {type(raw).__name__}")
            known = {f.name for f in fields(cls)} - {"extra", "eos_token_id", "do_sample"}
            values = {key: raw[key] for key in known & raw.keys() if raw[key] is not None}
            eos = raw.get("eos_token_id")
            extra = {key: value for key, value in raw.items() if key not in known and key != "eos_token_id"}
            return cls(
                **{"pad_token_id": config.pad_token_id, **values},
                eos_token_id=_ids(config.eos_token_id if eos is None else eos),
                extra=extra,
            )
        except (OSError, ValueError, RecursionError, TypeError) as error:  # ValueError: bad JSON, UTF-8 or option
            raise ConfigError(f"{path}: {error}; download it again or correct it") from error

    def override(self, **options: Any) -> GenerationConfig:
        """A copy with the options of one call.

        Raises:
            ConfigError: unknown option or impossible value.
        """
        known = {f.name for f in fields(self)} - {"extra"}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ConfigError(f"generation: unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if options.get("eos_token_id") is not None:
            options["eos_token_id"] = _ids(options["eos_token_id"])
        return replace(self, **{key: value for key, value in options.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The content of generation_config.json."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "seed")}
        eos = list(self.eos_token_id)
        return {**content, "eos_token_id": eos[0] if len(eos) == 1 else eos, **self.extra}


_RULES: dict[str, tuple[str, Any]] = {
    "max_new_tokens": ("an integer of at least 1", lambda v: isinstance(v, int) and v >= 1),
    "min_new_tokens": ("an integer of at least 0", lambda v: isinstance(v, int) and v >= 0),
    "temperature": ("at least 1e-6 (use do_sample=False for greedy decoding)", lambda v: v >= 1e-6),
    "top_k": ("an integer of at least 0", lambda v: isinstance(v, int) and v >= 0),
    "top_p": ("in (0, 1]", lambda v: 0 < v <= 1),
    "min_p": ("in [0, 1)", lambda v: 0 <= v < 1),
    "repetition_penalty": ("above 0", lambda v: v > 0),
    "presence_penalty": ("a number", lambda v: v == v),
    "frequency_penalty": ("a number", lambda v: v == v),
    "num_beams": ("an integer of at least 1", lambda v: isinstance(v, int) and v >= 1),
    "length_penalty": ("a number", lambda v: v == v),
    "num_return_sequences": ("an integer of at least 1", lambda v: isinstance(v, int) and v >= 1),
    "eos_token_id": ("a non-negative id or several", lambda v: all(isinstance(i, int) and i >= 0 for i in v)),
    "pad_token_id": ("a non-negative id", lambda v: isinstance(v, int) and v >= 0),
    "seed": ("a non-negative integer or None", lambda v: v is None or (isinstance(v, int) and v >= 0)),
}


def _holds(rule: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return bool(rule(value))
    except TypeError:
        return False


def _ids(value: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """One id, several, or several nested ones (PaddleNLP) as a flat tuple."""
    if not isinstance(value, list | tuple):
        return (value,)
    return tuple(i for entry in value for i in _ids(entry))
