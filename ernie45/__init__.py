"""Baidu's ERNIE 4.5 models in plain PaddlePaddle.

The public names are imported when they are first used, so that ``import ernie45`` costs nothing: neither Paddle nor
any other third-party package is loaded before a name that needs it is asked for.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import parse_response
    from .config import ErnieConfig
    from .generation.prompt_cache import PromptCache
    from .models.cache import KVCache
    from .models.causal_lm import ErnieForCausalLM
    from .models.sequence_classification import ErnieForSequenceClassification
    from .models.vision_language import ErnieForConditionalGeneration
    from .processing.processor import ErnieProcessor
    from .runtime import set_num_threads
    from .tokenizer import ErnieTokenizer

__version__ = "0.1.0"

# Paddle says this at every import; a compiler cache concerns nobody who runs a model.
warnings.filterwarnings("ignore", "No ccache found", UserWarning)

__all__ = [
    "ErnieConfig",
    "ErnieForCausalLM",
    "ErnieForConditionalGeneration",
    "ErnieForSequenceClassification",
    "ErnieProcessor",
    "ErnieTokenizer",
    "KVCache",
    "PromptCache",
    "__version__",
    "parse_response",
    "set_num_threads",
]

_HOMES = {
    "ErnieConfig": ".config",
    "ErnieForCausalLM": ".models.causal_lm",
    "ErnieForConditionalGeneration": ".models.vision_language",
    "ErnieForSequenceClassification": ".models.sequence_classification",
    "ErnieProcessor": ".processing.processor",
    "ErnieTokenizer": ".tokenizer",
    "KVCache": ".models.cache",
    "PromptCache": ".generation.prompt_cache",
    "parse_response": ".chat",
    "set_num_threads": ".runtime",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at first use, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The names already here and the public ones not yet imported."""
    return sorted({*globals(), *__all__})
