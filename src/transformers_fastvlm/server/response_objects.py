# SPDX-License-Identifier: Apache-2.0
"""OpenAI's responses API with texts and images: requests become a `ChatRequest`, answers are response objects.

Nothing is stored, so a response cannot be continued by its id.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ..engines import Answer, TokenLogprob
from .api_errors import ApiError
from .field_checks import IGNORED, TAKEN, Refused, missing, refuse_others, shown, take, whole, wrong
from .protocol import ChatRequest, check_model, parse_messages, schema_of, temperature_of, top_p_of
from .settings import Settings

__all__ = ["RESPONSE_FIELDS", "ResponseForm", "parse_response"]

_STORES = "stores nothing"
_TOOLS = "calls no tools"
_WAITS = "answers while the client waits"

RESPONSE_FIELDS: dict[str, str | Refused] = {
    "model": TAKEN,
    "input": TAKEN,
    "instructions": TAKEN,
    "max_output_tokens": TAKEN,
    "temperature": TAKEN,
    "top_p": TAKEN,
    "text": TAKEN,
    "stream": TAKEN,
    "user": IGNORED,
    "safety_identifier": IGNORED,
    "metadata": IGNORED,
    "store": IGNORED,
    "service_tier": IGNORED,
    "prompt_cache_key": IGNORED,
    "prompt_cache_options": IGNORED,
    "prompt_cache_retention": IGNORED,
    "reasoning": IGNORED,
    "stream_options": Refused("has no such options", ({}, {"include_obfuscation": False})),
    "previous_response_id": Refused(_STORES),
    "conversation": Refused(_STORES),
    "prompt": Refused(_STORES),
    "background": Refused(_WAITS, (False,)),
    "background_options": Refused(_WAITS),
    "truncation": Refused("shortens no conversation", ("disabled",)),
    "context_management": Refused("shortens no conversation", ([],)),
    "include": Refused("has nothing more to return", ([],)),
    "top_logprobs": Refused("returns probabilities in chat completions only", (0,)),
    "tools": Refused(_TOOLS, ([],)),
    "tool_choice": Refused(_TOOLS, ("auto", "none")),
    "max_tool_calls": Refused(_TOOLS),
    "parallel_tool_calls": Refused(_TOOLS, (True, False)),
    "image": Refused("answers with text only"),
    "moderation": Refused("checks no contents"),
    "access_programs": Refused("has no programs"),
}
"""Every field of OpenAI's responses: taken, ignored, or refused with a reason."""

_ITEM = {"type": TAKEN, "role": TAKEN, "content": TAKEN, "id": IGNORED, "status": IGNORED, "phase": IGNORED}
_PARTS: dict[str, dict[str, str | Refused]] = {
    "input_text": {"text": TAKEN},
    "output_text": {"text": TAKEN, "annotations": IGNORED, "logprobs": IGNORED},
    "input_image": {"image_url": TAKEN, "detail": TAKEN, "file_id": Refused("keeps no files")},
}


def parse_response(body: Any, settings: Settings) -> ChatRequest:
    """Check a request for a response.

    Raises:
        ApiError: 404 for another model, else 400.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"The body is {shown(body)}; expected an object with model and input.")
    refuse_others(body, RESPONSE_FIELDS)
    check_model(body, settings)
    given = body.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    items = take({"input": given}, "input", list) or []
    messages, image_urls = parse_messages([_message(*pair) for pair in enumerate(items)], settings, "input")
    if (instructions := take(body, "instructions", str)) is not None:
        first = parse_messages([{"role": "system", "content": instructions}, *_QUESTION], settings, "instructions")
        messages = [first[0][0], *messages]
    text = take(body, "text", dict) or {}
    refuse_others(text, {"format": TAKEN, "verbosity": IGNORED}, "text.")
    return ChatRequest(
        messages=messages,
        image_urls=image_urls,
        continues=messages[-1]["role"] == "assistant",
        stream=bool(take(body, "stream", bool)),
        max_tokens=whole(body, "max_output_tokens", 1, settings.max_answer_tokens),
        temperature=temperature_of(body),
        top_p=top_p_of(body),
        schema=schema_of(take(text, "format", dict, "text.") or {}, "text.format.", {}),
    )


_QUESTION = ({"role": "user", "content": ""},)


def _message(index: int, item: Any) -> Any:
    """Return an item of the input as a message of a chat; what is wrong with its role or content is found there."""
    where = f"input[{index}]"
    if not isinstance(item, dict):
        raise wrong(where, item, "an object with role and content")
    if item.get("type") not in (None, "message"):
        raise wrong(f"{where}.type", item["type"], "message: this server calls no tools")
    refuse_others(item, _ITEM, f"{where}.")
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{number}]") for number, part in enumerate(content)]
    return {"role": item.get("role"), "content": content}


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _PARTS:
        raise wrong(where if kind is None else f"{where}.type", kind or part, "input_text, input_image or output_text")
    refuse_others(part, {"type": TAKEN, "prompt_cache_breakpoint": IGNORED, **_PARTS[kind]}, f"{where}.")
    if kind != "input_image":
        return {"type": "text", "text": part.get("text")}
    if (url := take(part, "image_url", str, f"{where}.")) is None:
        raise missing(f"{where}.image_url")
    return {"type": "image_url", "image_url": {"url": url, "detail": part.get("detail")}}


class ResponseForm:
    """Writes the answer to one request; see `Form`.

    Args:
        chat: the request.
        model: name of the model.

    Attributes:
        id: of the response.
    """

    def __init__(self, chat: ChatRequest, model: str) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._item = f"msg_{uuid.uuid4().hex}"
        self._text, self._number = "", 0
        form = {"type": "text"} if chat.schema is None else {"type": "json_object"}
        if chat.schema is not None and chat.schema.value != {"type": "object"}:
            form = {"type": "json_schema", "name": "answer", "schema": chat.schema.value}
        self._response: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": chat.max_tokens,
            "metadata": {},
            "model": model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": chat.temperature,
            "text": {"format": form},
            "tool_choice": "none",
            "tools": [],
            "top_p": chat.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        (answer,) = answers
        is_whole = answer.finish_reason == "stop"
        prompt, completion = answer.prompt_tokens, answer.completion_tokens
        return self._response | {
            "status": "completed" if is_whole else "incomplete",
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self._message(answer.text, "completed" if is_whole else "incomplete")],
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            },
        }

    def first(self) -> list[Any]:
        """Return the events that begin a stream."""
        return [
            self._event("response.created", response=self._response),
            self._event("response.in_progress", response=self._response),
            self._event(
                "response.output_item.added", output_index=0, item=self._message("", "in_progress") | {"content": []}
            ),
            self._event("response.content_part.added", **self._place(), part=_text_part("")),
        ]

    def piece(self, index: int, text: str, tokens: Sequence[TokenLogprob]) -> list[Any]:
        """Return the events for new text."""
        self._text += text
        return [self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])]

    def last(self, answers: Sequence[Answer]) -> list[Any]:
        """Return the events that end a stream."""
        response = self.whole(answers)
        return [
            self._event("response.output_text.done", **self._place(), text=self._text, logprobs=[]),
            self._event("response.content_part.done", **self._place(), part=_text_part(self._text)),
            self._event("response.output_item.done", output_index=0, item=response["output"][0]),
            self._event(f"response.{response['status']}", response=response),
        ]

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _message(self, text: str, status: str) -> dict[str, Any]:
        content = [_text_part(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}


def _text_part(text: str) -> Mapping[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
