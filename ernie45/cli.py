"""The command line: ernie45 chat | generate | info | convert | quantize | train | verify | bench."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ernie45 import __version__
from ernie45.bench.command import add_options as add_bench_options
from ernie45.errors import ErnieError
from ernie45.training.command import add_options as add_train_options

if TYPE_CHECKING:
    from ernie45.assistant import Assistant

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
    _add_media_options(chat, "the first question")
    _add_model_options(chat)
    _add_generation_options(chat)

    generate = _command(
        commands, "generate", run_generate, "answer or continue one prompt", 'ernie45 generate --prompt "23+58=?"'
    )
    generate.add_argument("--prompt", help="the text; read from standard input if absent")
    _add_media_options(generate, "the prompt")
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

    quantize = _command(
        commands,
        "quantize",
        run_quantize,
        "write a checkpoint with 8-bit or 4-bit weights",
        "ernie45 quantize ERNIE-4.5-21B-A3B-Paddle ERNIE-4.5-21B-A3B-wint4 --to wint4",
    )
    quantize.add_argument("source", help="checkpoint folder or name")
    quantize.add_argument("destination", help="folder to write")
    quantize.add_argument("--to", choices=("wint8", "wint4"), required=True, help="kind of linear weights and experts")
    quantize.add_argument(
        "--embedding",
        choices=("wint8", "wint4", "bfloat16"),
        default="wint8",
        help="kind of embedding and head (%(default)s)",
    )

    train = _command(
        commands,
        "train",
        run_train,
        "fine-tune a model as a recipe says",
        "ernie45 train configs/recipes/ernie-4.5-0.3b-lora.yaml --set max_steps=100",
    )
    add_train_options(train)

    verify = _command(
        commands,
        "verify",
        run_verify,
        "compare a way of running a model with its float32 output, and measure its speed",
        "ernie45 verify baidu/ERNIE-4.5-0.3B-Paddle --dtype bfloat16",
    )
    _add_model_options(verify)
    _add_verify_options(verify)

    bench = _command(
        commands,
        "bench",
        run_bench,
        "measure this machine",
        "ernie45 bench --model ERNIE-4.5-0.3B-Paddle --output docs",
    )
    add_bench_options(bench)
    return parser


def run_train(options: argparse.Namespace) -> None:
    """Trains as a recipe says."""
    from ernie45.training.command import run

    run(options)


def run_bench(options: argparse.Namespace) -> None:
    """Measures tokens per second beside what this machine allows."""
    from ernie45.bench.command import run

    run(options)


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


def run_quantize(options: argparse.Namespace) -> None:
    """Quantises a checkpoint folder."""
    from ernie45.checkpoint.hub import resolve_folder
    from ernie45.memory import format_bytes
    from ernie45.quantization.convert import quantize_checkpoint

    source = resolve_folder(options.source)
    before, after = quantize_checkpoint(source, options.destination, options.to, embedding=options.embedding)
    sizes = f"{format_bytes(before)} before, {format_bytes(after)} after ({after / before:.0%})"
    print(f"wrote {options.destination}: {sizes}", file=sys.stderr)


def run_verify(options: argparse.Namespace) -> None:
    """Prints the tables of errors and speeds; an error if the models agree less than was asked for."""
    from ernie45.verify import verify
    from ernie45.verify.prompts import prompts_from_file

    report = verify(
        options.model,
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
        reference=options.reference,
        prompts=None if options.prompts is None else prompts_from_file(options.prompts),
        max_new_tokens=options.max_new_tokens,
        prompt_lengths=options.prompt_lengths,
        output_lengths=options.output_lengths,
        runs=options.runs,
        revision=options.revision,
    )
    print(report)
    found, minimum = min(report.overall.top1, report.decoding.top1), options.minimum_agreement
    if minimum is not None and found < minimum:
        raise ErnieError(f"top-1 agreement {found:.4f} is below the {minimum:g} of --minimum-agreement")


def run_generate(options: argparse.Namespace) -> None:
    """Answers one prompt, streaming."""
    from ernie45.assistant import user_message

    text = sys.stdin.read() if options.prompt is None else options.prompt
    if not text:
        raise ErnieError("--prompt: the prompt is empty; give some text, or pipe it to standard input")
    if options.raw and (options.image or options.video):
        raise ErnieError("--raw: continues a text alone; leave it out to show pictures")
    assistant = _load(options)
    if options.raw:
        ids, more = assistant.tokenizer.encode(text), _generation_options(options)
        _print_stream(assistant.model.stream(ids, tokenizer=assistant.tokenizer, **more))
        return
    question = user_message(text, options.image, options.video)
    _print_stream(_reply(assistant, [question], options))


def run_chat(options: argparse.Namespace) -> None:
    """A conversation on the terminal; Ctrl-C stops an answer and keeps what was printed, Ctrl-D ends."""
    from ernie45.assistant import user_message
    from ernie45.generation.prompt_cache import PromptCache

    assistant = _load(options)
    system = [{"role": "system", "content": options.system}] if options.system else []
    messages, cache = list(system), PromptCache(assistant.model.config)
    shown = {"/image": list(options.image), "/video": list(options.video)}
    interactive = sys.stdin.isatty()
    if interactive:
        pictures = "" if assistant.processor is None else " /image FILE and /video FILE show something with a question."
        print(f"Ask something. /new starts again, Ctrl-C stops an answer, Ctrl-D ends.{pictures}")
    for question in _questions(interactive):
        command, _, argument = question.partition(" ")
        if question == "/new":
            messages = list(system)
            continue
        if command in shown and assistant.processor is not None:
            shown[command].append(argument.strip())
            continue
        messages.append(user_message(question, shown["/image"], shown["/video"]))
        shown = {"/image": [], "/video": []}
        try:
            answer = _print_stream(_reply(assistant, messages, options, cache=cache))
        except ErnieError as error:
            if not interactive:
                raise
            messages.pop()
            print(f"error: {error}", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": _answer_text(answer)})


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


def _reply(
    assistant: Assistant, messages: list[dict[str, Any]], options: argparse.Namespace, **more: Any
) -> Iterator[str]:
    return assistant.reply(messages, enable_thinking=options.thinking, **_generation_options(options), **more)


def _load(options: argparse.Namespace) -> Assistant:
    from ernie45.assistant import Assistant

    return Assistant.load(
        options.model,
        needs_vision=bool(options.image or options.video),
        revision=options.revision,
        dtype=options.dtype,
        quantization=options.quantization,
    )


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
    parser.add_argument("--quantization", choices=("wint8", "wint4"), help="quantise the weights while loading")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")


def _add_media_options(parser: argparse.ArgumentParser, where: str) -> None:
    for name, kind in (("image", "picture"), ("video", "video")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="FILE",
            help=f"show this {kind} (file or URL) with {where}; for vision-language models (repeatable)",
        )


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


def _add_verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="where the verified model runs: cpu, gpu:0")
    parser.add_argument(
        "--reference",
        choices=("float32", "bfloat16"),
        default="float32",
        help="weights of the reference, which always runs on the CPU (%(default)s)",
    )
    parser.add_argument("--prompts", metavar="FILE", help="UTF-8 text with one prompt per line")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="length of the continuations (%(default)s)")
    for name, lengths in (("prompt", (32, 128, 512)), ("output", (16, 64))):
        parser.add_argument(
            f"--{name}-lengths",
            type=_lengths,
            default=lengths,
            metavar="N,N,...",
            help=f"tokens at which the speed is measured ({','.join(map(str, lengths))})",
        )
    parser.add_argument("--runs", type=int, default=3, help="runs per length; 0: no speed (%(default)s)")
    parser.add_argument(
        "--minimum-agreement", type=float, metavar="SHARE", help="exit with status 1 if top-1 agreement is lower"
    )


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, found {text!r}") from None


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
