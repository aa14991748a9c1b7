"""Who is measured: the ways this library can run a model, and the peers, each with the files that it reads."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie45.bench.worker import Worker
from ernie45.errors import ErnieError

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "wint8": {"dtype": "bfloat16", "quantization": "wint8"},
    "wint4": {"dtype": "bfloat16", "quantization": "wint4"},
}
# llama.cpp's type that is measured beside each variant.
GGUF_TYPES = {"float32": "BF16", "bfloat16": "BF16", "wint8": "Q8_0", "wint4": "Q4_0"}


@dataclass(frozen=True)
class Contender:
    """One implementation to measure.

    Attributes:
        name: what the report calls it; two of the same name are one implementation with different settings, of which
            the better counts.
        storage: how its weights lie in memory, a key of `limits.STORAGES`.
        target: "module:Class" of its `Implementation`.
        options: arguments of that class.
        python: interpreter of its worker.
        extended: also measured on long prompts, long contexts and batches.
        peer: not of this library.
    """

    name: str
    storage: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    extended: bool = False
    peer: bool = True


@dataclass(frozen=True)
class Setting:
    """What contenders are made from.

    Attributes:
        model: checkpoint folder.
        variants: keys of `VARIANTS`.
        threads: CPU threads of each.
        folder: where converted weights are written, and found again.
        pythons: interpreter of each peer that does not run on this one.
        vision: whether it is a vision-language model.
    """

    model: Path
    variants: tuple[str, ...]
    threads: int
    folder: Path
    pythons: dict[str, str] = field(default_factory=dict)
    vision: bool = False

    def python(self, peer: str) -> str:
        """The interpreter that has this peer."""
        return self.pythons.get(peer, sys.executable)


def own_contenders(setting: Setting) -> Iterator[Contender]:
    """This library's variants; "bfloat16", or the first, is the extended one."""
    extended = "bfloat16" if "bfloat16" in setting.variants else setting.variants[0]
    for variant in setting.variants:
        options = {"model": str(setting.model), "threads": setting.threads, "options": VARIANTS[variant]}
        yield Contender(
            f"ernie45 {variant}",
            variant,
            f"ernie45.bench.ours:Ernie45{'Vision' if setting.vision else ''}",
            options,
            extended=variant == extended,
            peer=False,
        )


def peer_contenders(peer: str, setting: Setting) -> list[Contender]:
    """One peer, after its files have been written.

    Raises:
        ErnieError: the peer is not installed, its files cannot be written, or it is not measured on such a model.
    """
    if setting.vision and peer not in VISION_PEERS:
        raise ErnieError(f"{peer}: is not measured on vision-language models, only on text models")
    module, make = PEERS[peer]
    if not _has_module(setting.python(peer), module):
        raise ErnieError(
            f"{peer}: {setting.python(peer)} has no module {module}; install it there, or name the interpreter that "
            f"has it: --peer-python {peer}=PATH"
        )
    return list(make(setting))


def _transformers(setting: Setting) -> Iterator[Contender]:
    folder = _pt_folder(setting)
    dtypes = {"float32" if variant == "float32" else "bfloat16" for variant in setting.variants}
    for dtype in sorted(dtypes):
        yield Contender(
            f"transformers {dtype}",
            dtype,
            "ernie45.bench.peers_vision:TransformersVision" if setting.vision else "ernie45.bench.peers:Transformers",
            {"model": str(folder), "threads": setting.threads, "dtype": dtype},
            setting.python("transformers"),
        )


def _paddleformers(setting: Setting) -> Iterator[Contender]:
    options = {"model": str(_pt_folder(setting)), "threads": setting.threads}
    python = setting.python("paddleformers")
    yield Contender("PaddleFormers float32", "float32", "ernie45.bench.peers:PaddleFormers", options, python)


def _llama_cpp(setting: Setting) -> Iterator[Contender]:
    for kind in dict.fromkeys(GGUF_TYPES[variant] for variant in setting.variants):
        file = _gguf(setting, kind)
        for flash in (True, False):
            yield Contender(
                f"llama.cpp {kind}",
                "bfloat16" if kind == "BF16" else kind,
                "ernie45.bench.llama:LlamaCpp",
                {"model": str(file), "threads": setting.threads, "flash": flash},
                setting.python("llama.cpp"),
            )


PEERS: dict[str, tuple[str, Callable[[Setting], Iterator[Contender]]]] = {
    "transformers": ("transformers", _transformers),
    "llama.cpp": ("llama_cpp", _llama_cpp),
    "paddleformers": ("paddleformers", _paddleformers),
}
VISION_PEERS = ("transformers",)


def _has_module(python: str, module: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", look], check=False).returncode == 0
    except OSError as error:
        raise ErnieError(f"--peer-python: cannot run {python}: {error}") from None


def _pt_folder(setting: Setting) -> Path:
    """The weights in the -PT layout and bfloat16."""
    from ernie45.checkpoint.convert import convert_checkpoint

    folder = setting.folder / "pt"
    if not (folder / "config.json").is_file():
        convert_checkpoint(setting.model, folder, layout="pt", dtype="bfloat16")
    return folder


def _gguf(setting: Setting, kind: str) -> Path:
    """The weights in a GGUF file of this type."""
    from ernie45.bench.gguf_file import write_gguf

    file = setting.folder / f"{kind}.gguf"
    if file.is_file():
        return file
    if kind == "BF16":
        write_gguf(setting.model, file)
        return file
    source = _gguf(setting, "BF16")
    with Worker("llama.cpp", "ernie45.bench.llama:Quantizer", {}, python=setting.python("llama.cpp")) as worker:
        worker.call("quantize", source=str(source), destination=str(file), kind=kind, threads=setting.threads)
    return file
