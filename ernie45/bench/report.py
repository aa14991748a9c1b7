"""What a run of the benchmark found, as a table in Markdown and as a chart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ernie45.bench.limits import STORAGES
from ernie45.bench.measure import Measurements, Result
from ernie45.bench.picture_tables import PictureTables
from ernie45.bench.plan import Plan, Task
from ernie45.bench.speeds import DECODE, PREFILL, Figure, Speed, number, speed, table
from ernie45.config import ErnieConfig
from ernie45.memory import format_bytes


class Report:
    """Texts and pictures of one run.

    Args:
        title: the model, for people.
        config: its architecture.
        plan: what was measured.
        found: the measurements.
    """

    def __init__(self, title: str, config: ErnieConfig, plan: Plan, found: Measurements):
        self.title = title
        self.config = config
        self.plan = plan
        self.found = found
        self.groups: dict[str, list[Result]] = {}
        for result in found.results:
            self.groups.setdefault(result.contender.name, []).append(result)

    def markdown(self) -> str:
        """The whole report."""
        machine, plan = self.found.machine, self.plan
        versions = ", ".join(dict.fromkeys(result.version for result in self.found.results))
        sections = [
            f"# Speed on a CPU\n\n{self.title}, {_threads(machine)} of {machine['processor']}, "
            f"Paddle {machine['paddle']}. {versions}. Medians (and lowest to highest) of {plan.rounds} rounds, in each "
            "of which every implementation took a turn.",
            self._limits_table(),
            self._main_table(),
            *self._extended_tables(),
            "Limits: decoding reads every used weight once per token; a prompt needs two operations per weight and "
            "token, without attention and the head. They were measured again just before each run, because the speed "
            "of a machine drifts; shares are medians of each run's own share. Of llama.cpp the better of flash "
            "attention on and off is shown. Peak memory is that of the whole process.",
        ]
        if plan.media:
            results = {name: results[0] for name, results in self.groups.items()}
            sections += PictureTables(self.config, plan, results)
        if self.found.problems:
            sections.append("Not measured:\n\n" + "\n".join(f"- {problem}" for problem in self.found.problems))
        return "\n\n".join(sections) + "\n"

    def chart(self, file: Path) -> None:
        """Bars of tokens per second per implementation, each with a line at its limit; a PNG file."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = list(self.groups)
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 1.2 + 0.42 * len(names)), sharey=True)
        for panel, kind in zip(panels, (DECODE, PREFILL), strict=True):
            speeds = [self._speed(name, kind, self._main_task(kind)) for name in names]
            self._draw(panel, names, speeds)
            panel.set_xlabel("tokens per second")
        panels[0].set_title(f"decode {self.plan.new} tokens after {self.plan.contexts[0]}")
        panels[1].set_title(f"prompt of {self.plan.prompts[0]} tokens")
        panels[0].invert_yaxis()
        figure.suptitle(f"{self.title}, {_threads(self.found.machine)}; lines: what the machine allows")
        figure.tight_layout()
        partial = file.with_suffix(".partial")
        figure.savefig(partial, format="png", dpi=120)
        pyplot.close(figure)
        os.replace(partial, file)

    def _draw(self, panel: Any, names: list[str], speeds: list[Speed]) -> None:
        colors = ["tab:gray" if self.groups[name][0].contender.peer else "tab:blue" for name in names]
        panel.barh(names, [one.rate.median for one in speeds], color=colors)
        for row, one in enumerate(speeds):
            panel.plot([one.limit.median] * 2, [row - 0.4, row + 0.4], color="tab:red")
            panel.text(one.rate.median, row, f" {number(one.rate.median)}", va="center", fontsize=8)

    def _limits_table(self) -> str:
        rows = [
            [what, Figure.of([limits[key] for limits in self.found.limits]).text(1e-9) + unit]
            for key, what, unit in (
                ("bandwidth", "reading memory", " GB/s"),
                ("float32", "products of matrices in float32", " GFLOP/s"),
                ("bfloat16", "products of matrices in bfloat16", " GFLOP/s"),
            )
        ]
        return table(["what this machine can do", "measured"], rows)

    def _main_table(self) -> str:
        head = [
            "",
            f"prompt of {self.plan.prompts[0]}: tokens/s",
            "of its limit",
            "first token after",
            f"decode {self.plan.new} after {self.plan.contexts[0]}: tokens/s",
            "of its limit",
            "peak memory",
            "load",
        ]
        return table(head, [self._main_row(name) for name in self.groups])

    def _main_row(self, name: str) -> list[str]:
        prefill, decode = (self._speed(name, kind, self._main_task(kind)) for kind in (PREFILL, DECODE))
        result = self.groups[name][0]
        tokens = self.plan.batches[0] * self.plan.prompts[0]
        return [
            name,
            prefill.rate.text(),
            f"{prefill.share.median:.2f}",
            f"{number(tokens / prefill.rate.median)} s",
            decode.rate.text(),
            f"{decode.share.median:.2f}",
            format_bytes(result.peak_bytes),
            f"{result.load_seconds:.1f} s",
        ]

    def _extended_tables(self) -> Iterable[str]:
        for name, results in self.groups.items():
            rows = list(self._extended_rows(name)) if results[0].contender.extended else []
            if rows:
                yield table([name, "tokens/s", "of its limit", "compared with above"], rows)

    def _extended_rows(self, name: str) -> Iterable[list[str]]:
        plan = self.plan
        usual = {kind: self._speed(name, kind, self._main_task(kind)) for kind in (PREFILL, DECODE)}

        def row(what: str, kind: str, task: Task, compare: Callable[[float], str]) -> list[str]:
            speed = self._speed(name, kind, task)
            ratio = speed.rate.median / usual[kind].rate.median
            return [what, speed.rate.text(), f"{speed.share.median:.2f}", compare(ratio)]

        for prompt in plan.prompts[1:]:
            yield row(f"prompt of {prompt}", PREFILL, plan.prefill_task(prompt), _time_ratio)
        for context in plan.contexts[1:]:
            yield row(f"decode {plan.new} after {context}", DECODE, plan.decode_task(context), _time_ratio)
        for batch in plan.batches[1:]:
            what = f"decode {plan.new} after {plan.contexts[0]}, {batch} rows"
            yield row(what, DECODE, plan.decode_task(plan.contexts[0], batch), lambda ratio: f"{ratio:.2f} x tokens/s")

    def _main_task(self, kind: str) -> Task:
        plan = self.plan
        return plan.prefill_task(plan.prompts[0]) if kind == PREFILL else plan.decode_task(plan.contexts[0])

    def _speed(self, name: str, kind: str, task: Task) -> Speed:
        """Of results with the same name the fastest."""
        found = [
            speed(self.config, STORAGES[result.contender.storage], kind, task, result.samples[task])
            for result in self.groups[name]
        ]
        return max(found, key=lambda one: one.rate.median)


def _threads(machine: dict[str, Any]) -> str:
    return f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"


def _time_ratio(ratio: float) -> str:
    return f"{1 / ratio:.2f} x time per token"
