"""The bytes of a picture or a video, from whatever a message may give in its place."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import http.client
import io
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, Any

import ernie45
from ernie45.errors import ErnieError

CHUNK_BYTES = 2**16
SHOWN_CHARACTERS = 100
# Any picture takes more characters than this, and a word that happens to be valid base64 is rather a file's name.
SHORTEST_BASE64 = 40
BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
ACCEPTED = "a path, bytes, an open binary file, a file://, data:, http:// or https:// URL, or base64"


@dataclasses.dataclass(frozen=True)
class FetchLimits:
    """How long reading may take and how much may be read.

    Attributes:
        seconds: for a whole transfer from the network, redirects included, from connecting to the last byte. Only the
            look-up of the host's name is outside: the system's resolver has its own limits.
        max_bytes: of the content, wherever it comes from.
    """

    seconds: float = 20.0
    max_bytes: int = 64 * 2**20


PICTURE_FETCH = FetchLimits()
VIDEO_FETCH = FetchLimits(seconds=120.0, max_bytes=512 * 2**20)


def read_bytes(source: Any, limits: FetchLimits = PICTURE_FETCH) -> bytes:
    """The content of `source`: at least 1 and at most `limits.max_bytes` bytes.

    Args:
        source: bytes, bytearray or memoryview; a binary file, read from where it stands; an os.PathLike; or a string:
            a file://, data: (base64 or percent-encoded), http:// or https:// URL, the path of a file, or base64
            (either alphabet, padded or not, line breaks allowed). A string that names a file is taken as its path.
        limits: on the transfer and the size.

    Raises:
        ErnieError: nothing of the above, no such file, unreachable or answering with an error, too slow, too large,
            empty, or not base64.
    """
    content = _read(source, limits)
    _check_size(source, len(content), limits)
    if not content:
        raise ErnieError(f"{describe(source)}: empty. Give a source that has content (rewind a file with seek(0)).")
    return content


def describe(source: Any) -> str:
    """`source` in a few words, for messages: long strings are shortened in the middle, content is not shown."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        if len(text) <= SHOWN_CHARACTERS:
            return repr(text)
        return f"{text[: SHOWN_CHARACTERS - 30]!r}...{text[-20:]!r} ({len(text)} characters)"
    name = getattr(source, "name", None)
    return f"<{type(source).__name__}{f' {name}' if isinstance(name, str) else ''}>"


def _read(source: Any, limits: FetchLimits) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, str):
        return _read_text(source.strip(), limits)
    if isinstance(source, os.PathLike):
        return _read_path(os.fsdecode(source), limits)
    if callable(getattr(source, "read", None)):
        return _read_open_file(source, limits)
    raise ErnieError(f"cannot read a picture or a video from a {type(source).__name__}. Give {ACCEPTED}.")


def _read_text(text: str, limits: FetchLimits) -> bytes:
    if text[:5].lower() == "data:":
        return _read_data_url(text, limits)
    if match := SCHEME.match(text):
        return _read_url(text, match[1].lower(), limits)
    if os.path.exists(os.path.expanduser(text)):
        return _read_path(text, limits)
    body = "".join(text.split())
    if len(body) >= SHORTEST_BASE64 and BASE64.fullmatch(body):
        return _from_base64(body, text, limits)
    raise ErnieError(f"{describe(text)}: no such file, and no base64 either. Give {ACCEPTED}.")


def _read_url(url: str, scheme: str, limits: FetchLimits) -> bytes:
    if scheme in ("http", "https"):
        return _fetch(url, limits)
    if scheme == "file":
        return _read_path(_path_of(url), limits)
    raise ErnieError(f"{describe(url)}: URLs with {scheme}:// are not read. Give {ACCEPTED}.")


def _path_of(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ErnieError(f"{describe(url)}: names the host {parts.netloc!r}. Write file:///path for a file here.")
    return urllib.request.url2pathname(parts.path)


def _read_path(path: str, limits: FetchLimits) -> bytes:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return file.read(limits.max_bytes + 1)
    except FileNotFoundError as error:
        raise ErnieError(f"{describe(path)}: no such file. Check the path (here is {os.getcwd()}).") from error
    except IsADirectoryError as error:
        raise ErnieError(f"{describe(path)}: a folder. Give the path of one file.") from error
    except (OSError, ValueError) as error:
        raise ErnieError(f"{describe(path)}: cannot be read ({error}).") from error


def _read_open_file(file: IO[bytes], limits: FetchLimits) -> bytes:
    try:
        content = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        raise ErnieError(f"{describe(file)}: cannot be read ({error}). Open it for reading, in binary mode.") from error
    if not isinstance(content, bytes):
        raise ErnieError(f"{describe(file)}: gives {type(content).__name__}, not bytes. Open it in binary mode, 'rb'.")
    return content


def _read_data_url(url: str, limits: FetchLimits) -> bytes:
    header, comma, body = url[len("data:") :].partition(",")
    if not comma:
        raise ErnieError(f"{describe(url)}: a data: URL without a comma. Write data:image/png;base64,<content>.")
    if header.lower().replace(" ", "").endswith(";base64"):
        return _from_base64("".join(urllib.parse.unquote(body).split()), url, limits)
    return urllib.parse.unquote_to_bytes(body)


def _from_base64(body: str, source: str, limits: FetchLimits) -> bytes:
    """Decode `body`, which has no white space, in the standard or in the URL-safe alphabet."""
    body = body.rstrip("=").replace("-", "+").replace("_", "/")
    _check_size(source, len(body) * 3 // 4, limits)
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ErnieError(
            f"{describe(source)}: not base64 ({error}). Encode the whole file with base64.b64encode."
        ) from error


def _check_size(source: Any, found: int, limits: FetchLimits) -> None:
    if found > limits.max_bytes:
        raise ErnieError(
            f"{describe(source)}: larger than the {limits.max_bytes} bytes that are read at most. "
            "Give a smaller file, or raise max_bytes in FetchLimits."
        )


def _fetch(url: str, limits: FetchLimits) -> bytes:
    """Read over http or https; `limits.seconds` holds for the whole of it."""
    deadline = _Deadline(limits.seconds)
    try:
        with _opener(deadline).open(_request(url), timeout=limits.seconds) as response:
            return _receive(url, response, limits)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"{error.code} ({error.reason})"
        raise ErnieError(f"{describe(url)}: the server answered {answer}. Check the URL.") from error
    except ErnieError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: URLs that cannot be parsed
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            raise ErnieError(
                f"{describe(url)}: not read within {limits.seconds:g} seconds. "
                "Download the file and give its path, or raise seconds in FetchLimits."
            ) from error
        raise ErnieError(f"{describe(url)}: cannot be fetched ({cause}). Check the URL and the network.") from error


def _request(url: str) -> urllib.request.Request:
    """A request for `url`; what a browser's address line would also accept, such as spaces, is percent-encoded."""
    quoted = urllib.parse.quote(url, safe="%/:?#[]@!$&'()*+,;=~")
    return urllib.request.Request(quoted, headers={"User-Agent": f"ernie45/{ernie45.__version__}", "Accept": "*/*"})


def _receive(url: str, response: http.client.HTTPResponse, limits: FetchLimits) -> bytes:
    announced = response.length
    _check_size(url, announced or 0, limits)
    content = bytearray()
    while len(content) <= limits.max_bytes and (chunk := response.read(CHUNK_BYTES)):
        content += chunk
    if announced is not None and len(content) < announced:
        raise http.client.IncompleteRead(bytes(content), announced - len(content))
    return bytes(content)


class _Deadline:
    """A moment after which nothing may wait any more."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left; raises TimeoutError when there are none."""
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the deadline has passed")
        return seconds


class _TimedReader(io.RawIOBase):
    """Reads a socket so that no wait lasts past the deadline: a time-out of the socket begins again at every byte."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket, deadline: _Deadline) -> None:
        self._raw, self._connection, self._deadline = raw, connection, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._connection.settimeout(self._deadline.remaining())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """A response whose head and body are read before the deadline."""

    def __init__(self, connection: socket.socket, *arguments: Any, deadline: _Deadline, **options: Any) -> None:
        super().__init__(connection, *arguments, **options)
        self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), connection, deadline))


def _connection(kind: type[http.client.HTTPConnection], deadline: _Deadline, host: str, **options: Any) -> Any:
    connection: Any = kind(host, **{**options, "timeout": deadline.remaining()})
    connection.response_class = functools.partial(_TimedResponse, deadline=deadline)
    return connection


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_connection, http.client.HTTPConnection, self._deadline), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, request: urllib.request.Request) -> Any:
        kind = functools.partial(_connection, http.client.HTTPSConnection, self._deadline)
        return self.do_open(kind, request, context=ssl.create_default_context())


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only; the base class has already refused file: and all else but ftp:."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(newurl, code, f"{msg} - redirection to {newurl} is not allowed", headers, fp)
        fp.close()  # the base class would read the body, however long it is
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    """Knows http and https and nothing else, so that no URL or redirect leads to a local file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(deadline),
        _Https(deadline),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
