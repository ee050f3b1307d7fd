# SPDX-License-Identifier: Apache-2.0
"""Images and videos by http(s): within a time and a size for all, wherever and however slowly a server leads."""

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from transformers_fastvlm.conversations import plain_message
from transformers_fastvlm.data.image_files import image_bytes
from transformers_fastvlm.images import fetching, reading
from transformers_fastvlm.images.base64_images import from_base64
from transformers_fastvlm.images.fetching import Budget, FetchError, fetch
from transformers_fastvlm.images.videos import spread_frames

SOON = 20.0
"""Seconds within which something of half a second ends on a busy machine."""


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(file, "PNG")
    return file.getvalue()


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def trickle(client: socket.socket, start: bytes = b"", piece: bytes = b"a") -> None:
    """Send a beginning, and then a little ten times a second for ever."""
    client.sendall(start)
    while True:
        client.sendall(piece)
        time.sleep(0.1)


def flood(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        client.sendall(bytes(65536))


def to(address: str) -> Callable[[socket.socket], None]:
    return lambda client: client.sendall(answer("302 Found", b"", f"Location: {address}"))


PATHS: dict[str, Callable[[socket.socket], None]] = {
    "/good.png": lambda client: client.sendall(answer("200 OK", png())),
    "/a%20b%C3%A9": lambda client: client.sendall(answer("200 OK", png())),
    "/missing": lambda client: client.sendall(answer("404 Not Found", b"no")),
    "/cut": lambda client: client.sendall(answer("200 OK", png())[:-5]),
    "/no-http": lambda client: client.sendall(b"\0\1\2\3\r\n\r\n"),
    "/silent": lambda client: time.sleep(SOON),
    "/slow-body": lambda client: trickle(client, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
    "/slow-body-to-the-end": lambda client: trickle(client, b"HTTP/1.1 200 OK\r\n\r\n"),
    "/slow-line": trickle,
    "/slow-head": lambda client: trickle(client, b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "/endless": flood,
    "/no-video": lambda client: client.sendall(answer("200 OK", b"#EXTM3U\n/etc/passwd")),
    "/once": to("/good.png"),
    "/relative-text": to("a b\u00e9"),
    "/loop": to("/loop"),
    "/ftp": to("ftp://127.0.0.1/good.png"),
    "/file": to("file:///etc/passwd"),
    "/with-user": to("http://me:secret@127.0.0.1/"),
}


@contextlib.contextmanager
def answering(paths: dict[str, Callable[[socket.socket], None]], seen: list[str]) -> Iterator[int]:
    """Answer on a free port by what a path says, until the end of the block."""

    def one(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            line = client.makefile("rb").readline().decode("latin-1")
            seen.append(line.strip())
            paths[line.split()[1].partition("?")[0]](client)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(scope="module")
def seen() -> list[str]:
    return []


@pytest.fixture(scope="module")
def port(seen: list[str]) -> Iterator[int]:
    with answering(PATHS, seen) as number:
        yield number


@pytest.fixture(autouse=True)
def _directly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("path", ["/good.png", "/once", "/relative-text", "/a b\u00e9"])
def test_the_processor_reads_an_address(port: int, path: str) -> None:
    image = reading.read_image(f"http://127.0.0.1:{port}{path}")
    assert image.size == (9, 7)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "the server answered 404"),
        ("/cut", "the connection ended 5 bytes before the end"),
        ("/no-http", "its answer is not HTTP"),
        ("/silent", "no answer within 0.5 seconds"),
        ("/slow-body", "no answer within 0.5 seconds"),
        ("/slow-body-to-the-end", "no answer within 0.5 seconds"),
        ("/slow-line", "no answer within 0.5 seconds"),
        ("/slow-head", "no answer within 0.5 seconds"),
        ("/loop", "more than 5 redirects"),
        ("/ftp", "'ftp' is not http or https"),
        ("/file", "'file' is not http or https"),
        ("/with-user", "contains a user name"),
    ],
)
def test_an_address_that_cannot_be_downloaded(
    port: int, path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "within" in reason:
        monkeypatch.setattr(fetching, "DOWNLOAD_SECONDS", 0.5)
    before, start = set(threading.enumerate()), time.monotonic()
    with pytest.raises(ConnectionError, match=reason) as error:
        reading.read_image(f"http://127.0.0.1:{port}{path}")
    assert time.monotonic() - start < SOON
    assert str(error.value).startswith(f"could not download the image http://127.0.0.1:{port}{path}: ")
    left = [one.name for one in set(threading.enumerate()) - before]
    assert not [name for name in left if name == "look-up" or name.endswith("(_bite)")]


def test_an_endless_body_has_a_limit(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_DOWNLOAD_BYTES", 2**20)
    with pytest.raises(ValueError, match="larger than 1048576 bytes"):
        reading.read_image(f"http://127.0.0.1:{port}/endless")


VIDEOS: list[tuple[str, type[Exception], str]] = [
    ("/missing", ConnectionError, "could not download the video .*the server answered 404"),
    ("/slow-body", ConnectionError, "no answer within 0.5 seconds"),
    ("/file", ConnectionError, "'file' is not http or https"),
    ("/endless", ValueError, "the video at .* is larger than 1048576 bytes"),
    ("/no-video", ValueError, "the video 'http.* cannot be read"),
]


@pytest.mark.parametrize(("path", "kind", "reason"), VIDEOS)
def test_a_video_comes_within_the_same_bounds(
    port: int, path: str, kind: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    if path == "/slow-body":
        monkeypatch.setattr(fetching, "DOWNLOAD_SECONDS", 0.5)
    monkeypatch.setattr(fetching, "MAX_DOWNLOAD_BYTES", 2**20)
    start = time.monotonic()
    with pytest.raises(kind, match=reason):
        plain_message({"role": "user", "content": [{"type": "video", "url": f"http://127.0.0.1:{port}{path}"}]})
    assert time.monotonic() - start < SOON


def test_a_video_at_an_address_is_that_of_the_file(tmp_path: Path, seen: list[str]) -> None:
    av = pytest.importorskip("av")
    file = tmp_path / "film.mkv"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for level in range(0, 200, 20):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), (level,) * 3))))
        container.mux(stream.encode())
    content = file.read_bytes()
    with answering({"/film": lambda client: client.sendall(answer("200 OK", content))}, seen) as port:
        frames = spread_frames(f"HTTP://127.0.0.1:{port}/film", 3)
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in spread_frames(file, 3)]


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    with pytest.raises(ConnectionError, match="refused"):
        reading.read_image(f"http://127.0.0.1:{free}/a.png")


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(ConnectionError, match="its name cannot be looked up"):
        reading.read_image("http://nothing.invalid/a.png")


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be interrupted, so it is not waited for."""
    gate = threading.Event()
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *_, **__: gate.wait(SOON) and [])
    try:
        with pytest.raises(FetchError, match=r"no answer within 0\.3 seconds"):
            fetch("http://localhost/", 0.3, Budget(10))
    finally:
        gate.set()


def test_redirects_are_checked_like_the_first_address(port: int, seen: list[str]) -> None:
    """The address behind a redirect is asked for too, and not connected to where it is not allowed."""
    asked: list[str] = []
    with answering({"/away": to(f"http://127.0.0.1:{port}/good.png")}, seen) as other:

        def is_allowed(address: str) -> bool:
            asked.append(address)
            return len(asked) <= 2  # before and after the first connection

        del seen[:]
        with pytest.raises(FetchError, match="not public"):
            fetch(f"http://127.0.0.1:{other}/away", SOON, Budget(10**6), is_allowed, redirects=1)
    assert asked == ["127.0.0.1"] * 3 and seen == ["GET /away HTTP/1.1"]


# Proxies


def test_a_proxy_of_the_environment(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://images.invalid/good.png"
    with answering({url.replace("invalid/", "invalid:80/"): PATHS["/good.png"]}, seen) as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{proxy}")
        assert reading.read_image(url).size == (9, 7)
        assert seen[-1] == "GET http://images.invalid:80/good.png HTTP/1.1"
        with pytest.raises(FetchError, match="its name cannot be looked up"):  # who checks addresses uses none
            fetch(url, SOON, Budget(10**6), lambda address: True)


def test_https_goes_through_a_proxy_as_a_tunnel(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"images.invalid:443": lambda client: client.sendall(answer("403 Forbidden"))}
    with answering(refused, seen) as proxy:
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy}")
        with pytest.raises(ConnectionError, match="Tunnel connection failed: 403 Forbidden"):
            reading.read_image("https://images.invalid/good.png")
    assert seen[-1].startswith("CONNECT images.invalid:443 HTTP/1.")


def test_a_proxy_of_another_kind_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://user:secret@127.0.0.1:1")
    with pytest.raises(ConnectionError, match="the environment's proxy for http is not an http proxy") as error:
        reading.read_image("http://images.invalid/good.png")
    assert "secret" not in str(error.value)


# Base64

CODE = base64.b64encode(png()).decode()
FORMS = {
    "as it is": CODE,
    "without padding": CODE.rstrip("="),
    "for URLs": CODE.replace("+", "-").replace("/", "_"),
    "percent-encoded": CODE.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
    "in lines": "\r\n\t ".join(CODE[start : start + 60] for start in range(0, len(CODE), 60)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:;charset=x;BASE64,"])
def test_base64_in_other_forms_is_the_same_image(form: str, prefix: str) -> None:
    text = prefix + FORMS[form]
    assert from_base64(text) == image_bytes(text, "the image") == png()
    assert reading.read_image(text).tobytes() == Image.open(io.BytesIO(png())).tobytes()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("data:image/png;base64,iVBORw0KGgoAA", "it has 13 characters, an impossible length for base64"),
        ("data:image/png;base64,iVBO.w0KGgoA", "it has '.' at character 4, which is not base64"),
        ("data:image/png;base64,iVB=Rw0KGgoA", "it has '=' at character 3, before its end"),
        ("data:image/png;base64,iVB%2", "it has '%' at character 3"),
        (CODE[: len(CODE) // 4 * 4 - 3], "it may have been cut off"),
        (CODE + "?", "which is not base64"),
    ],
)
def test_base64_that_is_none_says_why(text: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        reading.read_image(text)
    with pytest.raises(ValueError, match=cause):
        image_bytes(text, "the image")
