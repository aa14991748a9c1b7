"""One implementation in a process of its own, which answers calls one by one and sleeps in between.

The parent writes one JSON object per call to the worker's standard input and reads one per answer. A worker that is not
being called is stopped (SIGSTOP), so that no spinning thread of it disturbs what is measured in another. The worker's
interpreter may be another one than the parent's: a worker needs nothing of this package beyond the standard library
until it builds what it was asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ernie45.errors import ErnieError

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1  # of Linux's prctl
FORGET_PEAK = "5"  # for clear_refs of Linux: the peak is the present size from now on
LOG_TAIL = 600  # characters of a worker's own output that an error message shows


class WorkerError(ErnieError):
    """A worker that could not start, failed in a call, or ended."""


class Worker:
    """A handle on the object `target(**options)` in a new process.

    Args:
        name: what error messages call it.
        target: "module:Class".
        options: arguments of the class, of types that JSON knows.
        python: interpreter that runs it.
        environment: variables to set in it.

    Raises:
        WorkerError: the process or the object could not be made.
    """

    def __init__(
        self,
        name: str,
        target: str,
        options: Mapping[str, Any],
        *,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ):
        self.name = name
        self._forgotten_peak = 0
        paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        try:
            self._process = subprocess.Popen(
                [python, "-m", "ernie45.bench.worker", target, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)},
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise WorkerError(f"{name}: cannot run {python}: {error}") from None
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def call(self, method: str, **arguments: Any) -> Any:
        """The result of one method of the object, which runs alone meanwhile.

        Raises:
            WorkerError: the method raised, or the process ended.
        """
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            print(json.dumps({"method": method, "arguments": arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise WorkerError(f"{self.name}: the process has ended{self._log_tail()}") from None
        return self._answer()

    def call_measured(self, method: str, **arguments: Any) -> tuple[Any, int | None]:
        """As `call`, with the bytes of resident memory that it needed at most on top of what was held before.

        They are None where the system does not tell.
        """
        self._forgotten_peak, before = self.peak_bytes, self._memory("VmRSS")
        try:
            Path(f"/proc/{self._process.pid}/clear_refs").write_text(FORGET_PEAK, encoding="ascii")
        except OSError:
            return self.call(method, **arguments), None
        result = self.call(method, **arguments)
        return result, self._memory("VmHWM") - before

    @property
    def peak_bytes(self) -> int:
        """Largest resident memory that the process has had (0 where the system does not tell)."""
        return max(self._forgotten_peak, self._memory("VmHWM"))

    def _memory(self, key: str) -> int:
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(key)), 0)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()  # a stopped process does not hear anything gentler
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that was never read
                    stream.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerError(f"{self.name}: the process ended with status {status}{self._log_tail()}")
        self._process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def _log_tail(self) -> str:
        self._log.seek(0)
        text = self._log.read().decode(errors="replace").strip()
        return f"; it said: ...{text[-LOG_TAIL:]}" if text else ""


def serve(target: str, options: Mapping[str, Any], requests: IO[str], answers: IO[str]) -> int:
    """What the process does: build the object, then answer requests until there are no more.

    Returns:
        the exit status, 1 if the object could not be built.
    """

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        module, _, name = target.partition(":")
        subject = getattr(importlib.import_module(module), name)(**options)
    except Exception as error:
        answer(error=_describe(error))
        return 1
    answer(result=None)
    for line in requests:
        request = json.loads(line)
        try:
            answer(result=getattr(subject, request["method"])(**request["arguments"]))
        except Exception as error:
            answer(error=_describe(error))
    return 0


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, ErnieError) else f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """Asks the system for that, where it can: a stopped process would outlive a killed parent and keep its memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Entry of the process. What libraries print goes to the log: standard output carries the answers."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return serve(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, answers)


if __name__ == "__main__":
    sys.exit(main())
