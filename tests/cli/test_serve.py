# SPDX-License-Identifier: Apache-2.0
"""`fastvlm serve`: what it refuses before it loads a model."""

from collections.abc import Callable

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

# No machine has this address (RFC 5737), so that a server that should not have started does not.
NOWHERE = ("serve", "-m", "tiny", "--host", "192.0.2.1", "--port", "0")


@pytest.mark.parametrize("key", ["", " ", "\n"])
@pytest.mark.parametrize("by_variable", [True, False])
def test_a_key_that_is_empty_is_not_no_key(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, key: str, by_variable: bool
) -> None:
    if by_variable:
        monkeypatch.setenv("FASTVLM_API_KEY", key)
    said = fails(*NOWHERE, *([] if by_variable else ["--api-key", key]))
    assert "FASTVLM_API_KEY is empty; give a key, or unset it" in said


def test_a_key_on_the_command_line_wins_over_an_empty_variable(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTVLM_API_KEY", "")
    assert "cannot listen on 192.0.2.1" in fails(*NOWHERE, "--api-key", "secret")


@pytest.mark.parametrize(
    "host", ["x:", "x:99999", "x:99999x", "x:0", ":80", "http://x", "*.x", "a b", "[::1", "é.fr", ""]
)
def test_a_host_of_images_that_is_none(fails: Callable[..., str], host: str) -> None:
    assert f"an image host is {host!r}; expected a name" in fails(*NOWHERE, "--allow-image-host", host)
