"""Names of models: folders, shipped models, hubs, and an error that helps for everything else."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ernie45
from ernie45.checkpoint import hub
from ernie45.checkpoint.hub import DEFAULT_PATTERNS, PUBLISHED_NAMES, resolve_folder
from ernie45.errors import CheckpointError

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"0123456789" * 100,
    "tokenizer.model": b"pieces",
    "README.md": b"not wanted",
    "model_state.pdparams": b"not wanted",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def error_of(name: str | Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_folder(name, **options)
    return str(caught.value)


# ---- names that need no hub


def test_existing_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_folder(tmp_path) == tmp_path
    (tmp_path / "baidu" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("baidu/model") == Path("baidu/model"), "a folder goes before a hub name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("~/baidu") == tmp_path / "baidu"


def test_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    assert "is a file, expected the folder" in error_of(tmp_path / "model.safetensors")


def test_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_SHIPPED_MODELS", tmp_path / "data")
    assert "such as baidu/ERNIE-4.5-0.3B-Paddle" in error_of("ernie45-tiny")
    (tmp_path / "data" / "ernie45-tiny").mkdir(parents=True)
    assert resolve_folder("ernie45-tiny") == tmp_path / "data" / "ernie45-tiny"
    assert "Give a folder, ernie45-tiny or a published name" in error_of("unknown")


def test_published_names() -> None:
    assert len(PUBLISHED_NAMES) == len(set(PUBLISHED_NAMES)) == 22
    assert "baidu/ERNIE-4.5-21B-A3B-Base-PT" in PUBLISHED_NAMES
    assert "baidu/ERNIE-4.5-VL-28B-A3B-Thinking" in PUBLISHED_NAMES


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ERNIE-4.5-0.3B", "Did you mean baidu/ERNIE-4.5-0.3B-Paddle or baidu/ERNIE-4.5-0.3B-PT?"),
        ("ernie-4.5-vl-28b-a3b", "baidu/ERNIE-4.5-VL-28B-A3B-Paddle or baidu/ERNIE-4.5-VL-28B-A3B-PT?"),
        ("ERNIE-4.5-21B-A3B-Thinkng", "Did you mean baidu/ERNIE-4.5-21B-A3B-Thinking"),
        ("ERNIE-4.5-0.3B-Padle", "Did you mean baidu/ERNIE-4.5-0.3B-Paddle"),
        ("./out/step_100", "no such folder"),
        ("/absent/model", "no such folder"),
        ("a/b/c", "not a hub name"),
        ("s3:owner/name", "not a hub name"),
        ("hf:../name", "not a hub name"),
        ("", "Give a folder"),
        ("x\0y", "no such folder"),
    ],
)
def test_names_that_mean_nothing(name: str, words: str) -> None:
    assert words in error_of(name)


# ---- each hub's own function, replaced


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
    recorded: list[tuple[tuple, dict]] = []

    def snapshot_download(*arguments: Any, **options: Any) -> str:
        recorded.append((arguments, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fake_module(monkeypatch, "aistudio_sdk")
    fake_module(monkeypatch, "aistudio_sdk.snapshot_download", snapshot_download=snapshot_download)
    fake_module(monkeypatch, "modelscope", snapshot_download=snapshot_download)
    return recorded


@pytest.mark.parametrize("name", ["baidu/ERNIE-4.5-0.3B-PT", "hf:baidu/ERNIE-4.5-0.3B-PT"])
def test_hugging_face(name: str, calls: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_folder(name, revision="v1", cache_dir=tmp_path / "cache") == tmp_path
    options = {"revision": "v1", "cache_dir": tmp_path / "cache", "allow_patterns": list(DEFAULT_PATTERNS)}
    assert calls == [(("baidu/ERNIE-4.5-0.3B-PT",), options)]
    announced = capsys.readouterr().err
    assert "baidu/ERNIE-4.5-0.3B-PT from http" in announced and str(tmp_path / "cache") in announced


def test_aistudio(calls: list, tmp_path: Path) -> None:
    assert resolve_folder("aistudio:PaddlePaddle/M", cache_dir=tmp_path, allow_patterns=["*.json"]) == tmp_path
    expected = {"repo_id": "PaddlePaddle/M", "revision": None, "allow_patterns": ["*.json"]}
    assert calls == [((), expected | {"local_dir": str(tmp_path / "PaddlePaddle" / "M")})]


def test_modelscope(calls: list, tmp_path: Path) -> None:
    assert resolve_folder("modelscope:PaddlePaddle/M", revision="master") == tmp_path
    options = {"revision": "master", "cache_dir": None, "allow_patterns": list(DEFAULT_PATTERNS)}
    assert calls == [(("PaddlePaddle/M",), options)]


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("aistudio:a/b", "aistudio_sdk.snapshot_download", "aistudio-sdk"),
        ("modelscope:a/b", "modelscope", "modelscope"),
        ("hf:a/b", "huggingface_hub", "huggingface_hub"),
    ],
)
def test_missing_sdk(name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install {package}" in error_of(name)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("broken\npipe"), "the download failed; .*RuntimeError: broken]"),
        (ConnectionError(), "the download failed; .*ConnectionError: no details]"),
        (OSError(28, "No space left on device", "/cache/x"), "cannot be stored at /cache/x: No space left on device"),
    ],
)
def test_any_error_of_an_sdk_is_explained(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> str:
        raise error

    fake_module(monkeypatch, "modelscope", snapshot_download=fail)
    with pytest.raises(CheckpointError, match=words) as caught:
        resolve_folder("modelscope:a/b")
    assert caught.value.__cause__ is error


def test_repository_without_any_wanted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, "modelscope", snapshot_download=lambda *arguments, **options: str(tmp_path / "absent"))
    assert "a/b on ModelScope: holds no file that matches *.npz" in error_of("modelscope:a/b", allow_patterns=["*.npz"])


# ---- the real huggingface_hub against an imitation of the hub


class ImitatedHub(http.server.BaseHTTPRequestHandler):
    """Serves baidu/ERNIE-4.5-0.3B-Paddle; refuses baidu/gated; knows nothing else."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        api, files = "/api/models/baidu/ERNIE-4.5-0.3B-Paddle", f"/baidu/ERNIE-4.5-0.3B-Paddle/resolve/{COMMIT}/"
        if path == f"{api}/revision/main":
            self.send(json.dumps({"id": "baidu/ERNIE-4.5-0.3B-Paddle", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            entries = [{"type": "file", "path": k, "size": len(v), "oid": oid(v)} for k, v in FILES.items()]
            self.send(json.dumps(entries).encode())
        elif path.startswith(files):
            content = FILES[path.removeprefix(files)]
            self.send(content, {"ETag": f'"{oid(content)}"', "X-Repo-Commit": COMMIT})
        elif path.startswith(f"{api}/revision/"):
            self.send(b"", {"X-Error-Code": "RevisionNotFound"}, status=404)
        elif "baidu/gated" in path:
            self.send(b"", {"X-Error-Code": "GatedRepo"}, status=403)
        else:
            self.send(b"", {"X-Error-Code": "RepoNotFound"}, status=404)

    def send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ImitatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


RESOLVE_EACH = """
import sys
from ernie45.checkpoint.hub import resolve_folder
from ernie45.errors import CheckpointError
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    try:
        print(resolve_folder(name, revision=revision or None))
    except CheckpointError as error:
        print("error:", str(error).replace("\\n", " "))
"""


def resolve_in_subprocess(*names: str, home: Path, **environment: str) -> list[str]:
    """One line of output per name. huggingface_hub reads its environment when imported, hence the process."""
    package_root = str(Path(ernie45.__path__[0]).parent)
    settings = {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONPATH": package_root}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    finished = subprocess.run(
        [sys.executable, "-c", RESOLVE_EACH, *names],
        env=inherited | settings | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return finished.stdout.splitlines()


def test_download_then_offline_then_errors(endpoint: str, tmp_path: Path) -> None:
    name = "baidu/ERNIE-4.5-0.3B-Paddle"
    folder, mistyped, gated, revision = resolve_in_subprocess(
        name, "baidu/ERNIE-4.5-0.3B", "baidu/gated", f"{name}@v9", home=tmp_path, HF_ENDPOINT=endpoint
    )
    downloaded = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert downloaded == {name: FILES[name] for name in ("config.json", "model.safetensors", "tokenizer.model")}
    assert Path(folder).is_relative_to(tmp_path)
    assert "no such repository" in mistyped and "Did you mean baidu/ERNIE-4.5-0.3B-Paddle or" in mistyped
    assert "access must be granted" in gated
    assert "has no revision 'v9'" in revision

    offline, absent, invalid = resolve_in_subprocess(
        name, "baidu/ERNIE-4.5-0.3B-PT", "hf:a/b--c", home=tmp_path, HF_HUB_OFFLINE="1"
    )
    assert offline == folder
    assert "not (completely) in the cache, and HF_HUB_OFFLINE forbids to download" in absent
    assert "not a valid name" in invalid


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    (line,) = resolve_in_subprocess("baidu/any", home=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in line and "HF_ENDPOINT" in line
