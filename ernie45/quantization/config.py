"""What config.json says about a quantised checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ernie45.errors import ConfigError

WINT8, WINT4 = "wint8", "wint4"
KINDS = (WINT8, WINT4)
NOT_QUANTISED = "bfloat16"
EMBEDDING_CHOICES = (*KINDS, NOT_QUANTISED)
GROUP_SIZE = 64  # inputs that share one scale of a 4-bit weight


@dataclass(frozen=True)
class QuantizationConfig:
    """How the weights of a checkpoint are quantised. Field names are the keys of config.json's `quantization_config`.

    Attributes:
        dense_quant_type: "wint8" or "wint4": every linear weight but those of routed experts.
        moe_quant_type: "wint8" or "wint4": routed experts.
        embedding_quant_type: "wint8", "wint4" or "bfloat16": embedding and head.
        group_size: inputs that share one scale of a 4-bit weight; None where the file does not say.

    Raises:
        ConfigError: another scheme or group size.
    """

    dense_quant_type: str
    moe_quant_type: str
    embedding_quant_type: str = WINT8
    group_size: int | None = GROUP_SIZE

    def __post_init__(self) -> None:
        for key, choices in (
            ("dense_quant_type", KINDS),
            ("moe_quant_type", KINDS),
            ("embedding_quant_type", EMBEDDING_CHOICES),
        ):
            if getattr(self, key) not in choices:
                raise ConfigError(
                    f"quantization_config: {key} {getattr(self, key)!r} is not supported (supported: "
                    f"{', '.join(choices)}); take the checkpoint that is not quantised and use `ernie45 quantize`"
                )
        kinds = (self.dense_quant_type, self.moe_quant_type, self.embedding_quant_type)
        if WINT4 in kinds and self.group_size != GROUP_SIZE:
            raise ConfigError(
                f"quantization_config: group_size {self.group_size!r} is not supported, expected {GROUP_SIZE} for wint4"
            )

    @classmethod
    def uniform(cls, kind: str, embedding: str = WINT8) -> QuantizationConfig:
        """All linear weights in one kind."""
        return cls(kind, kind, embedding)

    @classmethod
    def from_dict(cls, raw: Any) -> QuantizationConfig:
        """Reads the object; a published one that says nothing about the embedding keeps it in bfloat16.

        Raises:
            ConfigError: not an object, or a scheme that is not supported.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"quantization_config must be an object, found {type(raw).__name__}")
        common = raw.get("quantization")
        return cls(
            raw.get("dense_quant_type", common),
            raw.get("moe_quant_type", common),
            raw.get("embedding_quant_type", NOT_QUANTISED),
            raw.get("group_size"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The object as it is written, with the keys by which other readers know a quantised checkpoint."""
        content = {
            "quantization": self.dense_quant_type if self.dense_quant_type == self.moe_quant_type else "mix_quant",
            "dense_quant_type": self.dense_quant_type,
            "moe_quant_type": self.moe_quant_type,
            "embedding_quant_type": self.embedding_quant_type,
            "group_size": self.group_size,
            "is_quantized": True,
        }
        return {key: value for key, value in content.items() if value is not None}
