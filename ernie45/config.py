"""The architecture of a model, read from the published config.json.

One frozen dataclass covers dense, mixture-of-experts and vision-language checkpoints: what differs between them is
data (which layers are MoE, which expert banks exist). It hides the two spellings of config.json (-Paddle and -PT),
the renamed keys, and what a missing key means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ernie45.errors import ConfigError
from ernie45.quantization.config import QuantizationConfig

# Other spellings of the keys that this class reads: PaddleFormers >= 1.0 and transformers renamed some of them.
ALIASES = {
    "num_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_k",
    "scoring_func": "moe_gate_act",
    "torch_dtype": "dtype",
}

# What a missing key means. The class that wrote the -Paddle files and the one that reads the -PT files differ.
PADDLE_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "moe_layer_interval": 2,
    "moe_layer_start_index": 0,
    "moe_k": 2,
    "moe_num_shared_experts": 0,
    "max_position_embeddings": 32768,
}
PT_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "max_position_embeddings": 131072,
}

# Keys that change the numbers and for which only one value is implemented (no published checkpoint has another).
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_bias": (False, None),
    "use_rmsnorm": (True, None),
    "rope_reorder": (False, None),
    "moe_group_experts": (False, None),
    "use_qk_norm": (False, None),
    "mm_vocab_size": (0, None),
    "moe_gate": ("top2_fused", "topk", "topk_fused", None),
    "moe_gate_act": ("softmax", "sigmoid", None),
}

# Far beyond every published model. A damaged config.json must not make the library build endless tables of tensors.
UPPER_LIMITS = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**8,
    "max_position_embeddings": 10**12,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 2048,
    "moe_num_shared_experts": 1000,
    "num_nextn_predict_layers": 100,
}
MAX_EXPERTS_OF_ALL_LAYERS = 50_000
# The same for the vision tower, whose keys are in vision_config, and for the adapter, whose keys are at the top level.
VISION_LIMITS = {
    "embed_dim": 10**5,
    "hidden_size": 10**5,
    "depth": 1000,
    "num_heads": 1024,
    "in_channels": 100,
    "in_chans": 100,
    "patch_size": 1000,
    "spatial_patch_size": 1000,
    "spatial_merge_size": 100,
}
ADAPTER_LIMITS = {"pixel_hidden_size": 10**5, "spatial_conv_size": 100, "temporal_conv_size": 100}
VISION_TOKENS = (
    "im_patch_id",
    "image_start_token_id",
    "image_end_token_id",
    "video_start_token_id",
    "video_end_token_id",
)

ARCHITECTURES = {  # model_type -> (-Paddle spelling, -PT spelling)
    "ernie4_5": ("Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM"),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeForCausalLM"),
    "ernie4_5_moe_vl": ("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VLMoeForConditionalGeneration"),
}


@dataclass(frozen=True)
class BankConfig:
    """One bank of routed experts: `num_experts` SwiGLU experts of width `intermediate_size` in layers first..last."""

    num_experts: int
    intermediate_size: int
    first_layer: int
    last_layer: int

    def covers(self, layer: int) -> bool:
        """Whether the bank exists in this layer (both ends inclusive)."""
        return self.first_layer <= layer <= self.last_layer


@dataclass(frozen=True)
class VisionConfig:
    """What a vision-language model sees with: the vision tower, the adapter, and how pictures stand among tokens.

    The published config.json holds the tower in `vision_config` and everything else at its top level.

    Attributes:
        width: of the tower.
        depth: blocks of the tower.
        num_heads: attention heads of the tower.
        intermediate_size: width of the tower's MLP.
        channels, patch_size: a patch is channels * patch_size ** 2 bytes.
        merge_size: the adapter joins merge_size ** 2 neighbouring patches into a token.
        frames_per_token: and so many frames of a video.
        time_pairs: rotary pairs of the decoder, of those that turn slowest, that take the time.
        placeholder_id: token whose embedding a picture's or a video's feature replaces.
        image_start_id, image_end_id, video_start_id, video_end_id: tokens around them.
    """

    width: int
    depth: int
    num_heads: int
    intermediate_size: int
    channels: int
    patch_size: int
    merge_size: int
    frames_per_token: int
    time_pairs: int
    placeholder_id: int
    image_start_id: int
    image_end_id: int
    video_start_id: int
    video_end_id: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the tower."""
        return self.width // self.num_heads

    @property
    def patch_bytes(self) -> int:
        """Values of one patch."""
        return self.channels * self.patch_size**2

    @property
    def factor(self) -> int:
        """Pixels along a side of what becomes one token: pictures are resized to multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def delimiter_ids(self) -> tuple[int, int, int, int]:
        """The tokens that begin and end pictures and videos."""
        return (self.image_start_id, self.image_end_id, self.video_start_id, self.video_end_id)

    @classmethod
    def from_dict(cls, tower: Mapping[str, Any], top: Mapping[str, Any]) -> VisionConfig:
        """Reads `vision_config` and the keys at the top level; absent ones have the published models' values."""
        width = tower.get("embed_dim") or 1280
        return cls(
            width=width,
            depth=tower.get("depth") or 32,
            num_heads=tower.get("num_heads") or 16,
            intermediate_size=int(width * (tower.get("mlp_ratio") or 4)),
            channels=tower.get("in_channels") or tower.get("in_chans") or 3,
            patch_size=tower.get("patch_size") or tower.get("spatial_patch_size") or 14,
            merge_size=top.get("spatial_conv_size") or tower.get("spatial_merge_size") or 2,
            frames_per_token=top.get("temporal_conv_size") or 2,
            time_pairs=_time_pairs(top),
            placeholder_id=_first(top.get("im_patch_id"), 100295),
            image_start_id=_first(top.get("image_start_token_id"), 101304),
            image_end_id=_first(top.get("image_end_token_id"), 101305),
            video_start_id=_first(top.get("video_start_token_id"), 101306),
            video_end_id=_first(top.get("video_end_token_id"), 101307),
        )


def _time_pairs(top: Mapping[str, Any]) -> int:
    """`freq_allocation`, or the last of `rope_scaling.mrope_section` = [rows, columns, time]."""
    scaling = top.get("rope_scaling") or top.get("rope_parameters")
    section = scaling.get("mrope_section") if isinstance(scaling, Mapping) else None
    return _first(top.get("freq_allocation"), section[2] if section else None, 20)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


# Keys of the published config.json that say nothing about a text model.
_VISION_KEYS = {
    *VISION_TOKENS,
    *ADAPTER_LIMITS,
    "architectures",
    "model_type",
    "max_text_id",
    "mm_vocab_size",
    "use_temporal_conv",
    "rope_3d",
    "freq_allocation",
    "rope_scaling",
}


@dataclass(frozen=True)
class ErnieConfig:
    """Architecture of one ERNIE 4.5 model. Field names are the keys of the published config.json.

    `tie_word_embeddings`, `moe_use_aux_free` and `num_nextn_predict_layers` are None where the file is silent:
    the tensors of the checkpoint then decide. `extra` holds every key that the library does not read; it is written
    back by `to_dict`.

    Raises:
        ConfigError: the values contradict each other or ask for something that is not implemented.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: as many as num_attention_heads
    head_dim: int = 0  # 0: hidden_size // num_attention_heads
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    compression_ratio: float = 1.0
    scale_qk_coeff: float = 1.0
    tie_word_embeddings: bool | None = None
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int | list[int] = 2
    dtype: str = "bfloat16"
    moe_num_experts: int | list[int] | None = None
    moe_k: int = 6
    moe_intermediate_size: int | list[int] = 0
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int | list[int] = 1
    moe_layer_end_index: int | list[int] = -1
    moe_layer_interval: int = 1
    moe_gate_act: str = "softmax"
    moe_use_aux_free: bool | None = None
    moe_norm_gate_logits: bool = True
    moe_norm_min: float = 1e-12
    num_nextn_predict_layers: int | None = None
    vision_config: dict[str, Any] | None = None
    quantization_config: QuantizationConfig | None = None  # None: the weights are not quantised
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_key_value_heads == 0:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim == 0 and _is_positive(self.num_attention_heads) and _is_positive(self.hidden_size):
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        problems = list(_problems(self))
        if problems:
            raise ConfigError("config: " + "; ".join(problems))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ErnieConfig:
        """Reads the content of a config.json in either layout, with old or new key names.

        Raises:
            ConfigError: a key is missing, has the wrong type, or its value is not supported.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config: expected a JSON object, found {type(raw).__name__}")
        known = {f.name for f in fields(cls)} - {"extra"}
        values = dict(PT_DEFAULTS if is_pt_config(raw) else PADDLE_DEFAULTS)
        extra: dict[str, Any] = {}
        for key, value in _flatten(raw).items():
            name = ALIASES.get(key, key)
            if name in known:
                if value is not None:
                    values[name] = QuantizationConfig.from_dict(value) if name == "quantization_config" else value
            elif key != "is_quantized":  # written again where there is a quantization_config
                extra[key] = value
        missing = [f.name for f in fields(cls) if f.name in _REQUIRED and f.name not in values]
        if missing:
            raise ConfigError(
                f"config: missing {', '.join(missing)}; is this the config.json of an ERNIE 4.5 model "
                f"(architectures {raw.get('architectures')})?"
            )
        return cls(**values, extra=extra)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, cache_dir: str | None = None
    ) -> ErnieConfig:
        """Reads config.json of a folder, of a config file, or of a model on a hub."""
        from ernie45.checkpoint.hub import resolve_folder

        path = Path(name)
        if path.suffix != ".json" or not path.is_file():
            folder = resolve_folder(name, revision=revision, cache_dir=cache_dir, allow_patterns=["config.json"])
            path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a checkpoint folder needs the published config.json") from None
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number too long
            raise ConfigError(f"{path}: cannot be read as JSON ({error}); download it again") from error
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self, layout: str = "paddle") -> dict[str, Any]:
        """The content of config.json for the layout "paddle" or "pt", unknown keys included."""
        model_type = self.extra.get("model_type", self.model_type)
        spellings = ARCHITECTURES.get(str(model_type), ARCHITECTURES[self.model_type])
        content: dict[str, Any] = {
            **self.extra,
            "architectures": [spellings[0 if layout == "paddle" else 1]],
            "model_type": model_type,
        }
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "extra" or value is None or (f.name.startswith("moe_") and not self.banks):
                continue
            if isinstance(value, QuantizationConfig):
                content["is_quantized"], value = True, value.to_dict()
            content["torch_dtype" if f.name == "dtype" and layout == "pt" else f.name] = value
        return content

    @property
    def model_type(self) -> str:
        """The published `model_type` of this kind of model."""
        if self.vision_config is not None:
            return "ernie4_5_moe_vl"
        return "ernie4_5_moe" if self.banks else "ernie4_5"

    @property
    def banks(self) -> tuple[BankConfig, ...]:
        """The expert banks: none for a dense model, one for text, two (text, vision) for vision-language."""
        counts = _as_list(self.moe_num_experts or 0)
        return tuple(
            BankConfig(
                num_experts=count,
                intermediate_size=_entry(self.moe_intermediate_size, i) or self.intermediate_size,
                first_layer=_entry(self.moe_layer_start_index, i),
                last_layer=self._last_layer(_entry(self.moe_layer_end_index, i)),
            )
            for i, count in enumerate(counts)
            if count
        )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether this decoder layer has routed experts (of any bank)."""
        if not self.banks or (layer + 1) % self.moe_layer_interval:
            return False
        return min(b.first_layer for b in self.banks) <= layer <= max(b.last_layer for b in self.banks)

    @property
    def vision(self) -> VisionConfig | None:
        """What the model sees with; None for a text model."""
        if self.vision_config is None:
            return None
        return VisionConfig.from_dict(self.vision_config, self.extra)

    def text_part(self) -> ErnieConfig:
        """The architecture of the text model inside: one bank and no vision. Itself for a text model.

        Raises:
            ConfigError: a layer has experts for pictures alone, which no text model has.
        """
        if self.vision_config is None:
            return self
        for layer in range(self.num_hidden_layers):
            if self.is_moe_layer(layer) and not self.banks[0].covers(layer):
                raise ConfigError(
                    f"config: layer {layer} has experts of the vision bank alone, which no text model has; load the "
                    "checkpoint with ErnieForConditionalGeneration"
                )
        lists = ("moe_num_experts", "moe_intermediate_size", "moe_layer_start_index", "moe_layer_end_index")
        first = {key: _entry(getattr(self, key), 0) for key in lists if getattr(self, key) is not None}
        extra = {key: value for key, value in self.extra.items() if key not in _VISION_KEYS}
        return self.replace(**first, vision_config=None, extra=extra)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that all shared experts form (0: none). It uses the width of the first bank."""
        return self.banks[0].intermediate_size * self.moe_num_shared_experts if self.banks else 0

    def replace(self, **changes: Any) -> ErnieConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def _last_layer(self, end: int) -> int:
        return self.num_hidden_layers - 1 if end < 0 else min(end, self.num_hidden_layers - 1)


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def is_pt_config(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is in the -PT spelling (it says which defaults hold for missing keys)."""
    marks = ("torch_dtype", "transformers_version", "rope_parameters")
    architectures = raw.get("architectures")
    named = isinstance(architectures, list | tuple | str) and "Ernie4_5ForCausalLM" in architectures
    return named or any(key in raw for key in marks)


def _flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 nests `rope_theta` under `rope_parameters`."""
    parameters = raw.get("rope_parameters")
    if isinstance(parameters, Mapping) and "rope_theta" in parameters:
        return {"rope_theta": parameters["rope_theta"], **raw}
    return dict(raw)


def _as_list(value: int | list[int]) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _entry(value: int | list[int], bank: int) -> int:
    """The value for one bank: published files give one number for all banks or one number each."""
    values = _as_list(value)
    return values[min(bank, len(values) - 1)]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _problems(config: ErnieConfig) -> Iterator[str]:
    """Everything that is wrong with the values, in words."""
    wrong_types = list(_type_problems(config))
    if wrong_types:
        yield from wrong_types
        return
    yield from _limit_problems(config)
    yield from _bank_problems(config)
    if config.vision_config is not None:
        yield from _vision_problems(config.vision_config, config.extra, config.head_dim // 2)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
    if config.head_dim % 2:
        yield f"head_dim {config.head_dim} is odd, but RoPE rotates pairs"
    for number, bank in enumerate(config.banks):
        if config.moe_k > bank.num_experts:
            yield f"moe_k {config.moe_k} exceeds the {bank.num_experts} experts of bank {number}"
    for key, allowed in SUPPORTED_VALUES.items():
        value = getattr(config, key, config.extra.get(key, allowed[0]))
        if value not in allowed:
            yield f"{key}={value!r} is not supported (supported: {', '.join(map(repr, allowed))})"
    scaling = config.extra.get("rope_scaling") or config.extra.get("rope_parameters")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type", "default")) != "default":
        yield f"rope scaling {dict(scaling)} is not supported: ERNIE 4.5 computes RoPE without scaling"


def _type_problems(config: ErnieConfig) -> Iterator[str]:
    positive = (*_REQUIRED, "num_key_value_heads", "head_dim", "moe_layer_interval", "moe_k", "max_position_embeddings")
    for key in positive:
        if not _is_positive(getattr(config, key)):
            yield f"{key} must be a positive integer, found {getattr(config, key)!r}"
    for key in ("rms_norm_eps", "rope_theta", "compression_ratio", "scale_qk_coeff", "moe_norm_min"):
        value = getattr(config, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            yield f"{key} must be a positive number, found {value!r}"
    for key in ("tie_word_embeddings", "moe_use_aux_free", "moe_norm_gate_logits"):
        if getattr(config, key) not in (True, False, None):
            yield f"{key} must be true or false, found {getattr(config, key)!r}"
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = _as_list(getattr(config, key)) if key == "eos_token_id" else [getattr(config, key)]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            yield f"{key} must be an integer, found {getattr(config, key)!r}"
    lists = ("moe_num_experts", "moe_intermediate_size", "moe_layer_start_index", "moe_layer_end_index")
    for key in lists:
        value = getattr(config, key)
        entries = _as_list(0 if value is None else value)
        if not entries or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
            yield f"{key} must be an integer or a list of integers, one per expert bank, found {value!r}"
    for key in ("moe_num_experts", "moe_intermediate_size"):
        entries = _as_list(getattr(config, key) or 0)
        if any(isinstance(entry, int) and entry < 0 for entry in entries):
            yield f"{key} must not be negative, found {getattr(config, key)!r}"
    for key in ("moe_num_shared_experts", "num_nextn_predict_layers"):
        value = getattr(config, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            yield f"{key} must be a non-negative integer, found {value!r}"
    if config.dtype not in ("float32", "float16", "bfloat16"):
        yield f"dtype must be float32, float16 or bfloat16, found {config.dtype!r}"
    if config.vision_config is not None and not isinstance(config.vision_config, Mapping):
        yield f"vision_config must be an object, found {type(config.vision_config).__name__}"


def _limit_problems(config: ErnieConfig) -> Iterator[str]:
    for key, limit in UPPER_LIMITS.items():
        if (getattr(config, key) or 0) > limit:
            yield f"{key} {getattr(config, key)} exceeds {limit}, far more than any ERNIE 4.5 model has"
    for bank in config.banks:
        if bank.intermediate_size > UPPER_LIMITS["intermediate_size"]:
            yield f"moe_intermediate_size {bank.intermediate_size} exceeds {UPPER_LIMITS['intermediate_size']}"
    experts = config.num_hidden_layers * sum(bank.num_experts for bank in config.banks)
    if experts > MAX_EXPERTS_OF_ALL_LAYERS:
        yield f"{experts} experts in all layers exceed {MAX_EXPERTS_OF_ALL_LAYERS}, more than any ERNIE 4.5 model has"


def _bank_problems(config: ErnieConfig) -> Iterator[str]:
    counts = _as_list(config.moe_num_experts or 0)
    wanted = 1 if config.vision_config is None else 2
    if any(counts) and len(counts) != wanted:
        kind = "text model has one bank" if wanted == 1 else "vision-language model has two banks"
        yield f"moe_num_experts {config.moe_num_experts!r}: a {kind} of experts"
    elif len(set(counts)) > 1:
        yield f"moe_num_experts {counts}: both banks must have equally many experts"


def _vision_problems(vision: Mapping[str, Any], extra: Mapping[str, Any], pairs: int) -> Iterator[str]:
    for where, keys, limits in (("vision_config.", vision, VISION_LIMITS), ("", extra, ADAPTER_LIMITS)):
        for key, limit in limits.items():
            value = keys.get(key)
            if value is not None and not (_is_positive(value) and value <= limit):
                yield f"{where}{key} must be a positive integer up to {limit}, found {value!r}"
    ratio = vision.get("mlp_ratio")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 100):
        yield f"vision_config.mlp_ratio must be a positive number up to 100, found {ratio!r}"
    yield from _tower_problems(vision, extra)
    yield from _position_problems(extra, pairs)
    for key in VISION_TOKENS:
        value = extra.get(key, 0)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            yield f"{key} must be a token id, found {value!r}"


def _tower_problems(vision: Mapping[str, Any], extra: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with widths that fit the limits one by one."""
    width, heads = vision.get("embed_dim") or 1280, vision.get("num_heads") or 16
    if _is_positive(width) and _is_positive(heads) and width % (4 * heads):
        yield f"vision_config.embed_dim {width}: each of {heads} heads must get a multiple of 4, for rows and columns"
    pixels = extra.get("pixel_hidden_size") or width
    if pixels != width:
        yield f"pixel_hidden_size {pixels} differs from the width of the vision tower, vision_config.embed_dim {width}"


def _position_problems(extra: Mapping[str, Any], pairs: int) -> Iterator[str]:
    """What is wrong with the rotary pairs that take the time."""
    scaling = extra.get("rope_scaling") or extra.get("rope_parameters")
    section = scaling.get("mrope_section") if isinstance(scaling, Mapping) else None
    if section is not None and not (isinstance(section, list | tuple) and len(section) == 3):
        yield f"mrope_section must be [rows, columns, time], found {section!r}"
        return
    for key, value in (("freq_allocation", extra.get("freq_allocation")), ("mrope_section", section and section[2])):
        known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= pairs
        if value is not None and not known:
            yield f"{key}: the time takes {value!r} rotary pairs, expected an integer up to {pairs}"
