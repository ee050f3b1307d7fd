# SPDX-License-Identifier: Apache-2.0
"""Images with a URL: from allowed hosts of the public internet, and from nowhere else."""

import contextlib
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformers_fastvlm.images.fetching import Budget
from transformers_fastvlm.server.api_errors import ApiError
from transformers_fastvlm.server.protocol import ImageUrl
from transformers_fastvlm.server.remote_images import Fetcher, is_public

CONTENT = b"picture" * 1000
LIMIT = 2 * len(CONTENT)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as its path says."""

    seen: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        kind = self.path.partition("?")[0]
        if kind == "/redirect":
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2] or "/good")
            self.end_headers()
            return
        if kind == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if kind == "/good":
            self.wfile.write(CONTENT)
        while kind in ("/endless", "/slow"):
            try:
                self.wfile.write(bytes(65536 if kind == "/endless" else 1))
            except OSError:
                return
            time.sleep(0 if kind == "/endless" else 0.05)

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def answering(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Answer on a free port until the end of the block, with TLS where there is a context for it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with answering() as number:
        yield number


def fetcher(port: int, timeout: float = 60.0) -> Fetcher:
    """Return one that may also connect to this machine."""
    return Fetcher((f"localhost:{port}",), timeout, is_allowed=lambda address: True)


def image_at(port: int, path: str) -> ImageUrl:
    return ImageUrl(f"http://localhost:{port}{path}", "messages[0].content[0].image_url.url")


def test_an_image_of_an_allowed_host(port: int) -> None:
    assert fetcher(port).fetch(image_at(port, "/good?size=1#part"), Budget(LIMIT)) == CONTENT
    assert Handler.seen[-1] == ("/good?size=1", f"localhost:{port}")


def test_the_images_of_a_request_share_their_bytes(port: int) -> None:
    budget, some = Budget(LIMIT), fetcher(port)
    for _ in range(2):
        assert some.fetch(image_at(port, "/good"), budget) == CONTENT
    with pytest.raises(ApiError, match="more than 14000 bytes together"):
        some.fetch(image_at(port, "/good"), budget)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/redirect", "localhost: the server answered 302, and redirects are not followed"),
        ("/missing", "answered 404"),
        ("/endless", "more than 14000 bytes together"),
        ("/empty", "empty"),
    ],
)
def test_an_answer_that_is_no_image(port: int, path: str, part: str) -> None:
    with pytest.raises(ApiError, match=part) as error:
        fetcher(port).fetch(image_at(port, path), Budget(LIMIT))
    assert error.value.status == 400 and error.value.param == "messages[0].content[0].image_url.url"
    assert Handler.seen[-1][0] == path


def test_a_slow_host_is_given_up(port: int) -> None:
    with pytest.raises(ApiError, match=r"no answer within 0\.5 seconds"):
        fetcher(port, timeout=0.5).fetch(image_at(port, "/slow"), Budget(LIMIT))


def test_an_allowed_host_that_is_not_public_is_not_connected_to(port: int) -> None:
    before = len(Handler.seen)
    careful = Fetcher((f"localhost:{port}",), 60.0)
    with pytest.raises(ApiError, match="from localhost: it has an address that is not public"):
        careful.fetch(image_at(port, "/good"), Budget(LIMIT))
    assert len(Handler.seen) == before


def test_the_address_that_is_connected_to_is_checked(port: int) -> None:
    """Once before and once after connecting, each time as an address and not as a name."""
    looks: list[str] = []

    def once(address: str) -> bool:
        looks.append(address)
        return len(looks) == 1

    careful = Fetcher((f"127.0.0.1:{port}",), 60.0, is_allowed=once)
    with pytest.raises(ApiError, match="not public"):
        careful.fetch(ImageUrl(f"http://127.0.0.1:{port}/good", "url"), Budget(LIMIT))
    assert looks == ["127.0.0.1", "127.0.0.1"]


# https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of `localhost`, signed by itself, with its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl is not installed")
    file = tmp_path_factory.mktemp("tls") / "localhost.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(file), "-out", str(file.with_suffix(".crt"))]
    subprocess.run(words, check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + file.with_suffix(".crt").read_bytes())
    return file


@pytest.fixture(scope="module")
def secure_port(certificate: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with answering(context) as number:
        yield number


@pytest.fixture
def _trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


def secure_image(port: int, path: str, host: str = "localhost") -> ImageUrl:
    return ImageUrl(f"https://{host}:{port}{path}", "url")


@pytest.mark.usefixtures("_trusted")
def test_an_image_by_https(secure_port: int) -> None:
    assert fetcher(secure_port).fetch(secure_image(secure_port, "/good"), Budget(LIMIT)) == CONTENT
    assert Handler.seen[-1] == ("/good", f"localhost:{secure_port}")


def test_a_certificate_that_nobody_vouches_for(secure_port: int) -> None:
    before = len(Handler.seen)
    with pytest.raises(ApiError, match=r"its certificate is not accepted .*self-signed"):
        fetcher(secure_port).fetch(secure_image(secure_port, "/good"), Budget(LIMIT))
    assert len(Handler.seen) == before


@pytest.mark.usefixtures("_trusted")
def test_a_certificate_of_another_host(secure_port: int) -> None:
    before = len(Handler.seen)
    some = Fetcher((f"127.0.0.1:{secure_port}",), 60.0, is_allowed=lambda address: True)
    with pytest.raises(ApiError, match=r"its certificate is not accepted .*127\.0\.0\.1"):
        some.fetch(secure_image(secure_port, "/good", "127.0.0.1"), Budget(LIMIT))
    assert len(Handler.seen) == before


@pytest.mark.usefixtures("_trusted")
def test_https_does_not_lead_inside(secure_port: int, port: int) -> None:
    """Neither by a redirect, to any address, nor by the name of an allowed host."""
    for target in (f"http://127.0.0.1:{port}/good", f"http://localhost:{port}/good", "http://169.254.169.254/"):
        path = f"/redirect?{target}"
        some = Fetcher((f"localhost:{secure_port}", f"localhost:{port}"), 60.0, is_allowed=lambda address: True)
        with pytest.raises(ApiError, match="answered 302, and redirects are not followed"):
            some.fetch(secure_image(secure_port, path), Budget(LIMIT))
        assert Handler.seen[-1] == (path, f"localhost:{secure_port}")
    before = len(Handler.seen)
    with pytest.raises(ApiError, match="from localhost: it has an address that is not public"):
        Fetcher((f"localhost:{secure_port}",), 60.0).fetch(secure_image(secure_port, "/good"), Budget(LIMIT))
    assert len(Handler.seen) == before


def test_a_host_that_never_begins_to_encrypt_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        number = silent.getsockname()[1]
        with pytest.raises(ApiError, match=r"no answer within 0\.5 seconds"):
            fetcher(number, timeout=0.5).fetch(secure_image(number, "/good"), Budget(LIMIT))


# Which hosts, which addresses


def test_hosts_are_allowed_by_name_and_port() -> None:
    some = Fetcher(("Example.com", "cdn.example.com:8080", "[2001:db8::1]:81", "2001:db8::2"), 1.0)
    for url in (
        "http://example.com/a",
        "https://EXAMPLE.com./a",
        "http://cdn.example.com:8080/",
        "http://[2001:db8::1]:81/",
        "http://[2001:DB8::2]/",
    ):
        some.check(ImageUrl(url, "url"))
    for url in (
        "http://example.com:8080/a",
        "http://www.example.com/",
        "http://cdn.example.com/",
        "http://[2001:db8::1]/",
        "http://[2001:db8::2]:81/",
        "http://example.com@evil.com/",
        "http://evil.com#example.com",
        "http://evil.com\\example.com/",
        "http:///a",
        "http://" + "a" * 3000,
    ):
        with pytest.raises(ApiError):
            some.check(ImageUrl(url, "url"))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("2002:a00:1::", False),
        ("168.63.129.16", False),
        ("::ffff:168.63.129.16", False),
        ("192.88.99.1", False),
        ("3fff::1", False),
        ("3fff:fff::1", False),
        ("2001::7f00:1", False),
        ("2001:0:7f00:1::", False),
        ("5f00::1", False),
        ("64:ff9b:1::a00:1", False),
        ("168.63.129.17", True),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public
