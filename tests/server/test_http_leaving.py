# SPDX-License-Identifier: Apache-2.0
"""`fastvlm serve`: a client that leaves while another one's answer is generated beside its own."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from http_running import asks, load_tiny, never_ending, request_bytes, running, until

KEPT = 600
"""Tokens of the answer that goes on; enough for all else to happen meanwhile."""


@pytest.fixture(scope="module")
def endless() -> tuple[Any, Any]:
    model, processor = load_tiny()
    return never_ending(model), processor


def text_of(reply: tuple[int, dict[str, Any], dict[str, str]]) -> str:
    status, answer, _ = reply
    assert status == 200, answer
    text: str = answer["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize("stream", [True, False])
def test_a_row_is_free_within_a_token_and_the_one_beside_it_goes_on(endless: tuple[Any, Any], stream: bool) -> None:
    settings = {"max_answer_tokens": 2 * KEPT, "batch_size": 2, "queue": 2}
    with running(*endless, **settings) as server, ThreadPoolExecutor(2) as pool:
        question = asks(max_tokens=KEPT)
        alone = text_of(server.post(question))
        until(lambda: not list(server.service._rows))
        leaving = server.connect()
        leaving.sendall(request_bytes(server.port, asks("Tell a story.", stream=stream)))
        until(lambda: any(row.tokens > 3 for row in list(server.service._rows)))
        (row,) = server.service._rows
        beside = pool.submit(server.post, question)
        until(lambda: [one.tokens > 3 for one in list(server.service._rows)] == [True, True])
        (other,) = (one for one in list(server.service._rows) if one is not row)
        after = pool.submit(server.post, asks("And now?", max_tokens=2))
        until(lambda: server.service.waiting == 1)
        seen: list[int] = []
        cancel = row.cancel
        row.cancel = lambda: (seen.append(row.tokens), cancel())[1]
        leaving.close()
        until(lambda: row.done)
        assert len(seen) == 1 and row.tokens - seen[0] <= 1
        text_of(after.result())
        assert not other.done, "the place is the next one's at once"
        assert text_of(beside.result()) == alone
