"""Bytes from everything that a message may give, and one clear error from everything else."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import pathlib
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.processing.sources import FetchLimits, describe, read_bytes

CONTENT = bytes(range(256)) * 4
LIMITS = FetchLimits(seconds=0.6, max_bytes=2000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what the path names; the interesting ones misbehave."""

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        getattr(self, urllib.parse.unquote(self.path).strip("/").split("?")[0].replace(" ", "_"))()

    def answer(self, content: bytes, length: int | None = None, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def drip(self, text: bytes) -> None:
        """Send a byte every 50 ms: each arrives in time, all together do not."""
        with contextlib.suppress(OSError):  # the reader gives up, as it should
            for byte in text * 200:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)

    def good(self) -> None:
        self.answer(CONTENT, len(CONTENT))

    def good_图_picture(self) -> None:  # noqa: N802
        self.good()

    def without_length(self) -> None:
        self.answer(CONTENT)

    def agent(self) -> None:
        self.answer(self.headers["User-Agent"].encode())

    def empty(self) -> None:
        self.answer(b"", 0)

    def announces_too_much(self) -> None:
        self.answer(b"x", 10**12)

    def sends_too_much(self) -> None:
        self.answer(b"")
        with contextlib.suppress(OSError):  # the reader gives up, as it should
            while True:
                self.wfile.write(b"x" * 2**16)

    def announces_less_than_it_sends(self) -> None:
        self.answer(CONTENT, 10)

    def announces_more_than_it_sends(self) -> None:
        self.answer(CONTENT, len(CONTENT) + 1)

    def slow_body(self) -> None:
        self.answer(b"", 1000)
        self.drip(b"x")

    def slow_head(self) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\nX-Slow: very\r\n")

    def silent(self) -> None:
        time.sleep(2)

    def nonsense(self) -> None:
        self.wfile.write(b"\x00\x01 not a status line\r\n\r\n")

    def redirect(self) -> None:
        query = urllib.parse.urlsplit(self.path).query
        self.answer(b"", 0, code=302, Location=urllib.parse.unquote(query))

    def redirect_with_endless_body(self) -> None:
        self.answer(b"", code=302, Location="/good")
        self.drip(b"x")

    def gone(self) -> None:
        self.answer(b"a page that explains it", code=404)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.block_on_close = False
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "a picture 图.png"
    path.write_bytes(CONTENT)
    return path


def test_content_in_memory_is_taken_as_it_is() -> None:
    for source in (CONTENT, bytearray(CONTENT), memoryview(CONTENT), io.BytesIO(CONTENT)):
        assert read_bytes(source) == CONTENT


def test_files_by_path_by_url_and_open(file: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_bytes(file) == read_bytes(str(file)) == CONTENT
    assert read_bytes(file.as_uri()) == read_bytes(f"file://localhost{file}") == CONTENT
    with open(file, "rb") as opened:
        opened.seek(100)
        assert read_bytes(opened) == CONTENT[100:]
    monkeypatch.setenv("HOME", str(file.parent))
    assert read_bytes(f"~/{file.name}") == CONTENT


def test_a_file_whose_name_is_valid_base64_is_a_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "a" * 64
    assert read_bytes(name) == base64.b64decode(name)
    (tmp_path / name).write_bytes(CONTENT)
    assert read_bytes(name) == CONTENT


@given(st.binary(min_size=40, max_size=300), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_base64_in_every_spelling(content: bytes, url_safe: bool, padded: bool, broken: bool) -> None:
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(content).decode()
    text = text if padded else text.rstrip("=")
    text = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) if broken else text
    assert read_bytes(text) == content
    assert read_bytes(f"data:image/png;base64,{text}") == content
    assert read_bytes(f"DATA:image/png;charset=utf-8;BASE64,{urllib.parse.quote(text)}") == content


def test_percent_encoded_data_urls() -> None:
    assert read_bytes(f"data:image/png,{urllib.parse.quote(CONTENT)}") == CONTENT
    assert read_bytes("data:,a+b%20c") == b"a+b c"


def test_http(server: str) -> None:
    assert read_bytes(f"{server}/good", LIMITS) == CONTENT
    assert read_bytes(f"  {server}/good\n", LIMITS) == CONTENT
    assert read_bytes(f"HTTP{server[4:]}/good", LIMITS) == CONTENT
    assert read_bytes(f"{server}/without_length", LIMITS) == CONTENT
    assert read_bytes(f"{server}/good 图 picture", LIMITS) == CONTENT
    assert read_bytes(f"{server}/good%20%E5%9B%BE%20picture", LIMITS) == CONTENT
    assert read_bytes(f"{server}/agent", LIMITS).startswith(b"ernie45/")


def test_redirects_are_followed_to_the_web(server: str) -> None:
    assert read_bytes(f"{server}/redirect?{urllib.parse.quote('/good')}", LIMITS) == CONTENT
    assert read_bytes(f"{server}/redirect?{urllib.parse.quote(f'{server}/good')}", LIMITS) == CONTENT
    assert read_bytes(f"{server}/redirect_with_endless_body", LIMITS) == CONTENT


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_redirects_elsewhere_are_refused(server: str, file: pathlib.Path, scheme: str) -> None:
    target = {"file": file.as_uri(), "ftp": "ftp://127.0.0.1/x", "data": "data:,secret"}[scheme]
    with pytest.raises(ErnieError, match="302.*not allowed"):
        read_bytes(f"{server}/redirect?{urllib.parse.quote(target)}", LIMITS)


def test_a_redirect_to_itself_ends(server: str) -> None:
    with pytest.raises(ErnieError, match="302.*loop"):
        read_bytes(f"{server}/redirect?%2Fredirect%3F%252Fredirect", LIMITS)


@pytest.mark.parametrize("path", ["slow_head", "slow_body", "silent"])
def test_the_time_limit_is_on_the_whole_transfer(server: str, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(ErnieError, match=rf"{path}.*not read within 0.6 seconds"):
        read_bytes(f"{server}/{path}", LIMITS)
    assert 0.5 < time.monotonic() - start < 1.5


def test_the_size_limit_does_not_trust_the_server(server: str) -> None:
    for path in ("announces_too_much", "sends_too_much"):
        with pytest.raises(ErnieError, match=rf"{path}.*larger than the 2000 bytes"):
            read_bytes(f"{server}/{path}", LIMITS)


def test_a_wrong_content_length(server: str) -> None:
    assert read_bytes(f"{server}/announces_less_than_it_sends", LIMITS) == CONTENT[:10]
    with pytest.raises(ErnieError, match=r"cannot be fetched.*1024 bytes read, 1 more expected"):
        read_bytes(f"{server}/announces_more_than_it_sends", LIMITS)


def test_http_errors(server: str) -> None:
    with pytest.raises(ErnieError, match=r"gone.*the server answered 404 \(Not Found\)"):
        read_bytes(f"{server}/gone", LIMITS)
    with pytest.raises(ErnieError, match="nonsense.*cannot be fetched"):
        read_bytes(f"{server}/nonsense", LIMITS)
    with pytest.raises(ErnieError, match="empty"):
        read_bytes(f"{server}/empty", LIMITS)


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://127.0.0.1:port/", "http://a..b/", "http://127.0.0.1:99999/", "https:///x"]
)
def test_urls_that_lead_nowhere(url: str) -> None:
    with pytest.raises(ErnieError, match="cannot be fetched"):
        read_bytes(url, LIMITS)


def test_unreachable_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ErnieError, match="cannot be fetched.*Check the URL and the network"):
        read_bytes(f"http://127.0.0.1:{port}/picture.png", LIMITS)

    def unknown(*arguments: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ErnieError, match="cannot be fetched.*Name or service not known"):
        read_bytes("https://nowhere.invalid/picture.png", LIMITS)


def test_a_server_that_never_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(self: socket.socket, address: object) -> None:
        time.sleep(self.gettimeout() or 5)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket.socket, "connect", hang)
    with pytest.raises(ErnieError, match="not read within 0.6 seconds"):
        read_bytes("http://127.0.0.1:9/picture.png", LIMITS)


def test_files_that_cannot_be_read(tmp_path: pathlib.Path, file: pathlib.Path) -> None:
    missing = tmp_path / "missing.png"
    for source in (missing, str(missing), missing.as_uri()):
        with pytest.raises(ErnieError, match=r"missing\.png'.*no such file"):
            read_bytes(source)
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(ErnieError, match="a folder"):
            read_bytes(folder)
    with pytest.raises(ErnieError, match="cannot be read"):
        read_bytes(pathlib.Path("a\0b"))
    with pytest.raises(ErnieError, match="names the host 'server'"):
        read_bytes("file://server/share/picture.png")
    with pytest.raises(ErnieError, match="larger than the 1000 bytes"):
        read_bytes(file, FetchLimits(max_bytes=1000))


def test_open_files_that_cannot_be_read(file: pathlib.Path) -> None:
    with pytest.raises(ErnieError, match=r"gives str, not bytes.*'rb'"):
        read_bytes(io.StringIO("text"))
    with open(file, "rb") as closed:
        pass
    with pytest.raises(ErnieError, match="closed file"):
        read_bytes(closed)
    written = io.BytesIO()
    written.write(CONTENT)
    with pytest.raises(ErnieError, match=r"empty.*seek\(0\)"):
        read_bytes(written)


@pytest.mark.parametrize("limit", [len(CONTENT), len(CONTENT) - 1])
def test_the_size_limit_is_exact_everywhere(server: str, file: pathlib.Path, limit: int) -> None:
    limits = FetchLimits(max_bytes=limit)
    text = base64.b64encode(CONTENT).decode()
    data_urls = (f"data:;base64,{text}", f"data:,{urllib.parse.quote(CONTENT)}")
    for source in (CONTENT, io.BytesIO(CONTENT), file, text, *data_urls, f"{server}/good", f"{server}/without_length"):
        if limit == len(CONTENT):
            assert read_bytes(source, limits) == CONTENT
        else:
            with pytest.raises(ErnieError, match=f"larger than the {limit} bytes"):
                read_bytes(source, limits)


def test_text_that_is_neither() -> None:
    for text in ("cats", "cat.png", "", "not base64! " * 10, "=" * 60):
        with pytest.raises(ErnieError, match="no such file, and no base64"):
            read_bytes(text)
    for url in ("data:image/png;base64,****", "data:;base64,abcde"):
        with pytest.raises(ErnieError, match="not base64"):
            read_bytes(url)
    with pytest.raises(ErnieError, match="without a comma"):
        read_bytes("data:image/png;base64")
    with pytest.raises(ErnieError, match="s3:// are not read"):
        read_bytes("s3://bucket/picture.png")


@pytest.mark.parametrize("source", [b"", bytearray(), "data:,", "data:image/png;base64,"])
def test_nothing_at_all(source: object) -> None:
    with pytest.raises(ErnieError, match="empty"):
        read_bytes(source)


@pytest.mark.parametrize("source", [None, 7, ["a.png"], {"url": "a.png"}])
def test_other_types(source: object) -> None:
    with pytest.raises(ErnieError, match=f"from a {type(source).__name__}.*a path, bytes"):
        read_bytes(source)


def test_messages_stay_short() -> None:
    text = "data:image/png;base64," + "A" * 10**6
    assert "A" * 200 not in describe(text) and len(describe(text)) < 150
    assert "1000022 characters" in describe(text)
    assert describe(b"\xff" * 1000) == "<1000 bytes>"
    assert describe("a.png") == describe(pathlib.Path("a.png")) == "'a.png'"
    with pytest.raises(ErnieError) as error:
        read_bytes("*" * 10**5)
    assert len(str(error.value)) < 350
