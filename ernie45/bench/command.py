"""The command `ernie45 bench`, also `tools/bench.py`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ernie45.bench.contenders import PEERS, VARIANTS, Contender, Setting, own_contenders, peer_contenders
from ernie45.bench.plan import EncodeTask
from ernie45.errors import ErnieError

if TYPE_CHECKING:
    from ernie45.bench.report import Report
    from ernie45.config import VisionConfig

PICTURES = ("448x448", "1792x1344")
VIDEOS = ("16x448x448",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--model", default="ernie45-tiny", help="checkpoint folder or name (%(default)s)")
    parser.add_argument(
        "--variant",
        action="append",
        choices=VARIANTS,
        help="how this library holds the weights (repeatable; all four by default)",
    )
    parser.add_argument("--peer", action="append", choices=PEERS, help="also measure a peer (repeatable)")
    parser.add_argument(
        "--peer-python",
        action="append",
        metavar="PEER=PATH",
        help="interpreter in which a peer is installed, if it is another one (repeatable)",
    )
    parser.add_argument("--prompts", type=_positive, nargs="+", default=[512, 8192], help="tokens of the prompts")
    parser.add_argument("--context", type=_positive, nargs="+", default=[32, 8192], help="tokens before decoding")
    parser.add_argument("--batch", type=_positive, nargs="+", default=[1, 8], help="rows")
    parser.add_argument("--new", type=_positive, default=64, help="tokens to decode")
    parser.add_argument(
        "--picture",
        action="append",
        type=_picture,
        metavar="WIDTHxHEIGHT",
        help="a picture's size for a vision-language model; the first one also begins a prompt (repeatable; "
        "448x448 and 1792x1344 by default, or as large as the model ever sees)",
    )
    parser.add_argument(
        "--video",
        action="append",
        type=_video,
        metavar="FRAMESxWIDTHxHEIGHT",
        help="a video's size for a vision-language model (repeatable; 16x448x448 by default)",
    )
    parser.add_argument("--together", type=_positive, default=8, help="so many of the largest picture at once")
    parser.add_argument("--rounds", type=_positive, default=5, help="runs of everything; medians are reported")
    parser.add_argument("--threads", type=_positive, help="CPU threads of each; OMP_NUM_THREADS or all cores if absent")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write FOLDER/cpu.md and the chart FOLDER/cpu.png"
    )
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep the converted weights of peers here")


def run(options: argparse.Namespace) -> None:
    """Measures, prints the report, and writes it if asked.

    Raises:
        ErnieError: the model cannot be read, or nothing could be measured.
    """
    from ernie45.checkpoint.hub import resolve_folder

    if options.output is not None:
        _check_chart()
    model = resolve_folder(options.model)
    with _work_folder(options.work, model) as folder:
        report = _measure(options, model, folder)
    if options.output is not None:
        _write(report, options.output)
    print(report.markdown(), end="")


def _measure(options: argparse.Namespace, model: Path, folder: Path) -> Report:
    """Everything that was asked for."""
    from ernie45.bench.measure import Plan, measure
    from ernie45.bench.report import Report
    from ernie45.info import find_config
    from ernie45.runtime import num_threads

    threads = options.threads or num_threads()
    variants = tuple(options.variant or VARIANTS)
    config = find_config(str(model))[0]
    seeing = config.vision is not None
    setting = Setting(model, variants, threads, folder, _pythons(options.peer_python), seeing)
    contenders, problems = _contenders(setting, options.peer or [])
    plan = Plan(
        tuple(options.prompts),
        tuple(options.context),
        tuple(options.batch),
        options.new,
        options.rounds,
        threads,
        media=_media(options, config.vision, model),
        together=options.together,
    )
    found = measure(contenders, plan)
    found.problems[:0] = problems
    return Report(Path(options.model).name, config, plan, found)


def _media(options: argparse.Namespace, vision: VisionConfig | None, model: Path) -> tuple[EncodeTask, ...]:
    """The pictures and videos to measure, each once; none for a text model."""
    if vision is None:
        if options.picture or options.video:
            raise ErnieError("--picture, --video: the model is a text model, which sees nothing; leave them out")
        return ()
    pictures, videos = _usual_media(vision, model)
    media = [*(options.picture or pictures), *(options.video or videos)]
    for task in media:
        if task.width % vision.factor or task.height % vision.factor:
            raise ErnieError(
                f"--picture, --video: {task.width}x{task.height} pixels; both must be multiples of {vision.factor}"
            )
        if task.frames > 1 and task.frames % vision.frames_per_token:
            raise ErnieError(f"--video: {task.frames} frames; expected a multiple of {vision.frames_per_token}")
    return tuple(dict.fromkeys(media))


def _usual_media(vision: VisionConfig, model: Path) -> tuple[list[EncodeTask], list[EncodeTask]]:
    """The pictures and videos that are measured unless others are asked for, no larger than the model ever sees."""
    from ernie45.processing.image import ImageLimits, smart_resize
    from ernie45.processing.limits import MediaLimits
    from ernie45.processing.processor import own_limits

    def shrunk(task: EncodeTask, limit: ImageLimits) -> EncodeTask:
        if task.width * task.height <= limit.max_pixels:
            return task
        height, width = smart_resize(task.height, task.width, limit, vision.factor)
        return replace(task, height=height, width=width)

    limits = MediaLimits().replace(**own_limits(model))
    return [shrunk(_picture(size), limits.image) for size in PICTURES], [
        shrunk(_video(size), limits.video) for size in VIDEOS
    ]


def _contenders(setting: Setting, peers: list[str]) -> tuple[list[Contender], list[str]]:
    """Everyone to measure, and why peers cannot be."""
    contenders, problems = list(own_contenders(setting)), []
    for peer in peers:
        try:
            contenders += peer_contenders(peer, setting)
        except ErnieError as error:
            print(f"warning: {error}", file=sys.stderr)
            problems.append(str(error))
    return contenders, problems


def _write(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "cpu.md.partial"
    partial.write_text(report.markdown() + "\n![Tokens per second of each implementation](cpu.png)\n", encoding="utf-8")
    report.chart(folder / "cpu.png")
    os.replace(partial, folder / "cpu.md")


def _check_chart() -> None:
    """Says before the long work, not after it, that the chart cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ErnieError("--output draws a chart with matplotlib: pip install matplotlib") from None


@contextlib.contextmanager
def _work_folder(folder: Path | None, model: Path) -> Iterator[Path]:
    """A place for converted weights: one that lasts, made for this model alone, or a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="ernie45-bench-") as temporary:
            yield Path(temporary)
        return
    folder.mkdir(parents=True, exist_ok=True)
    made_from = folder / "made-from.txt"
    if made_from.is_file() and made_from.read_text(encoding="utf-8") != str(model.resolve()):
        raise ErnieError(f"--work: {folder} holds weights of {made_from.read_text(encoding='utf-8')}; choose another")
    made_from.write_text(str(model.resolve()), encoding="utf-8")
    yield folder


def _pythons(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or []:
        peer, separator, path = pair.partition("=")
        if not separator or peer not in PEERS:
            raise ErnieError(f"--peer-python: expected PEER=PATH with a PEER of {', '.join(PEERS)}, found {pair!r}")
        found[peer] = path
    return found


def _picture(text: str) -> EncodeTask:
    return EncodeTask(*_sides(text, 2, "WIDTHxHEIGHT"))


def _video(text: str) -> EncodeTask:
    frames, width, height = _sides(text, 3, "FRAMESxWIDTHxHEIGHT")
    if frames < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2 frames, found {text!r}")
    return EncodeTask(width, height, frames)


def _sides(text: str, count: int, form: str) -> list[int]:
    """Numbers of at least 1 with x between them."""
    parts = text.split("x")
    if len(parts) != count or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected {form}, for example {'x'.join(['448'] * count)}, found {text!r}")
    return [int(part) for part in parts]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text}")
    return value
