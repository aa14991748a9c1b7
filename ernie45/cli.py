"""The command line: ernie45 chat | generate | info | convert."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ernie45 import __version__
from ernie45.errors import ErnieError

if TYPE_CHECKING:
    from ernie45.models.causal_lm import ErnieForCausalLM
    from ernie45.tokenizer import ErnieTokenizer

DEFAULT_MODEL = "ernie45-tiny"
INTERRUPTED = 130  # exit status of a process that Ctrl-C ended, as in shells


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 after a clear error, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except ErnieError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` for example, has seen enough
        sys.stderr.close()
        return 0
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="ernie45", description="Baidu's ERNIE 4.5 models in PaddlePaddle.")
    parser.add_argument("--version", action="version", version=f"ernie45 {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    chat = _command(commands, "chat", run_chat, "talk with a model", "ernie45 chat baidu/ERNIE-4.5-0.3B-Paddle")
    chat.add_argument("--system", help="system message")
    _add_model_options(chat)
    _add_generation_options(chat)

    generate = _command(
        commands, "generate", run_generate, "answer or continue one prompt", 'ernie45 generate --prompt "23+58=?"'
    )
    generate.add_argument("--prompt", help="the text; read from standard input if absent")
    generate.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    _add_model_options(generate)
    _add_generation_options(generate)

    info = _command(
        commands,
        "info",
        run_info,
        "print an architecture, its size, and whether this machine can hold it",
        "ernie45 info baidu/ERNIE-4.5-21B-A3B-Paddle",
    )
    info.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="folder, config.json or published name")

    convert = _command(
        commands,
        "convert",
        run_convert,
        "rewrite a checkpoint in another layout or dtype",
        "ernie45 convert ERNIE-4.5-0.3B-Paddle ERNIE-4.5-0.3B-PT --layout pt",
    )
    convert.add_argument("source", help="checkpoint folder or name")
    convert.add_argument("destination", help="folder to write")
    convert.add_argument("--layout", choices=("paddle", "pt"), help="the source's by default")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="the source's by default")
    return parser


def run_info(options: argparse.Namespace) -> None:
    """Prints the architecture table."""
    from ernie45.info import describe

    print(describe(options.model))


def run_convert(options: argparse.Namespace) -> None:
    """Converts a checkpoint folder."""
    from ernie45.checkpoint.convert import convert_checkpoint
    from ernie45.checkpoint.hub import resolve_folder

    convert_checkpoint(resolve_folder(options.source), options.destination, layout=options.layout, dtype=options.dtype)
    print(f"wrote {options.destination}", file=sys.stderr)


def run_generate(options: argparse.Namespace) -> None:
    """Answers one prompt, streaming."""
    text = sys.stdin.read() if options.prompt is None else options.prompt
    if not text:
        raise ErnieError("--prompt: the prompt is empty; give some text, or pipe it to standard input")
    model, tokenizer = _load(options)
    if options.raw:
        prompt = tokenizer.encode(text)
    else:
        prompt = _chat_prompt(tokenizer, [{"role": "user", "content": text}], options)
    _print_stream(model.stream(prompt, tokenizer=tokenizer, **_generation_options(options)))


def run_chat(options: argparse.Namespace) -> None:
    """A conversation on the terminal; Ctrl-C stops an answer and keeps what was printed, Ctrl-D ends."""
    from ernie45.generation.prompt_cache import PromptCache

    model, tokenizer = _load(options)
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages, cache = list(system), PromptCache(model.config)
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ask something. /new starts again, Ctrl-C stops an answer, Ctrl-D ends.")
    for question in _questions(interactive):
        if question == "/new":
            messages = list(system)
            continue
        messages.append({"role": "user", "content": question})
        prompt = _chat_prompt(tokenizer, messages, options)
        pieces = model.stream(prompt, tokenizer=tokenizer, cache=cache, **_generation_options(options))
        messages.append({"role": "assistant", "content": _answer_text(_print_stream(pieces))})


def _questions(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("User: " if interactive else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _print_stream(pieces: Iterator[str]) -> str:
    """Prints pieces as they come and returns them joined; Ctrl-C ends the answer but keeps it. Speed goes to stderr."""
    printed, start = [], time.perf_counter()
    with contextlib.closing(pieces), contextlib.suppress(KeyboardInterrupt):  # type: ignore[type-var]
        for piece in pieces:
            printed.append(piece)
            print(piece, end="", flush=True)
    print()
    if sys.stderr.isatty():
        print(f"[{time.perf_counter() - start:.1f} s]", file=sys.stderr)
    return "".join(printed)


def _answer_text(reply: str) -> str:
    """What of a reply goes back into the conversation: its answer, or all of it where parsing leaves nothing."""
    from ernie45.chat import parse_response

    return parse_response(reply).content or reply or "..."


def _chat_prompt(tokenizer: ErnieTokenizer, messages: list[dict[str, Any]], options: argparse.Namespace) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, enable_thinking=options.thinking)
    assert isinstance(ids, list)
    return ids


def _load(options: argparse.Namespace) -> tuple[ErnieForCausalLM, ErnieTokenizer]:
    from ernie45 import ErnieForCausalLM, ErnieTokenizer

    tokenizer = ErnieTokenizer.from_pretrained(options.model, revision=options.revision)
    model = ErnieForCausalLM.from_pretrained(options.model, dtype=options.dtype, revision=options.revision)
    return model, tokenizer


def _command(commands: Any, name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"Example: {example}",
    )
    parser.set_defaults(run=run)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"folder or hub name ({DEFAULT_MODEL})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights in memory")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=1024)
    group.add_argument("--sample", action="store_true", help="sample instead of taking the most likely token")
    for name, kind in (("temperature", float), ("top-k", int), ("top-p", float), ("repetition-penalty", float)):
        group.add_argument(f"--{name}", type=kind, help="the checkpoint's value by default")
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer at this text (repeatable)")
    group.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="for models that can think before they answer"
    )


def _generation_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_new_tokens": options.max_new_tokens,
        "do_sample": options.sample,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": options.seed,
        "stop_strings": options.stop,
    }


if __name__ == "__main__":
    sys.exit(main())
