# SPDX-License-Identifier: Apache-2.0
"""OpenAI's chat completions: the validation of requests and the format of answers.

An unsupported field that would change the answer is refused. Null, and values without effect, count as not given.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engines.base import MIN_TEMPERATURE
from ..engines.prompts import is_utf8
from .api_errors import ApiError
from .settings import Settings

__all__ = ["ChatRequest", "Picture", "chunk", "completion", "parse_chat", "parse_json", "usage"]

MAX_MARKS = 20_000
"""Maximum number of the characters `[`, `{`, `,` and `:` in a body: one per JSON value; base64 has none of them."""

MAX_DEPTH = 32
"""Maximum nesting of lists and objects in a body; a request needs six levels."""

MAX_DIGITS = 100
"""Maximum characters of a number in a body."""

MAX_MESSAGES = 1000
MAX_PARTS = 1000
"""Maximum number of parts in all messages of a request together."""

MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_SEED = 2**63 - 1

_SUPPORTED = {
    "model", "messages", "stream", "stream_options", "stop", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "seed", "n",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort",
}  # fmt: skip
_WITHOUT_EFFECT_IN_MESSAGES = {"name", "cache_control"}
_NEUTRAL: dict[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_KINDS = {str: "a text", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}


@dataclass(frozen=True)
class Picture:
    """An image of a request: its URL, and the field that has it."""

    url: str
    param: str


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A valid request.

    Attributes:
        messages: each a role ("system", "user" or "assistant") and a list of parts: {"type": "text", "text": …}, or
            {"type": "image"} for the next of `pictures`.
        max_tokens: None if the request has no limit.
        temperature: 0 means greedy decoding.
    """

    messages: list[dict[str, Any]]
    pictures: tuple[Picture, ...]
    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    n: int
    stop: tuple[str, ...]


def parse_json(body: bytes) -> Any:
    """Return the JSON value of a body.

    Python's parser holds the interpreter lock for the whole body, so slow input is refused first.

    Raises:
        ApiError: 413, more values than a request needs; 400, invalid or unaccepted JSON.
    """
    marks = sum(body.count(mark) for mark in (b"[", b"{", b",", b":"))
    if marks > MAX_MARKS:
        raise ApiError(
            413,
            f"The body has {marks} of the characters [ {{ , and : together; this server accepts {MAX_MARKS}. "
            "Send fewer messages, parts and fields.",
            code="request_too_large",
        )
    try:
        # Some editors write a byte order mark, which is not part of the text.
        found = json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_int=_number_of(int),
            parse_float=_number_of(float),
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        raise ApiError(400, "The body is not UTF-8; expected JSON in UTF-8.", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    except json.JSONDecodeError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from error
    except ValueError as error:
        raise ApiError(400, f"The body is not a request: {error}", code="invalid_json") from error
    if _depth(found) > MAX_DEPTH:
        raise _too_deep()
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {_shown(twice)} twice; give it once.")
    return found


def _number_of(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser for numbers of a kind."""

    def read(text: str) -> Any:
        if len(text) > MAX_DIGITS:
            message = f"it has a number of {len(text)} characters; this server accepts up to {MAX_DIGITS}."
            raise ValueError(message)
        number = kind(text)
        if not math.isfinite(number):
            raise ValueError(f"{text} is too large for a number; expected one below 1.8e308.")
        return number

    return read


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON.")


def _depth(value: Any) -> int:
    """Return the nesting depth of a value: 0 for one that is neither a list nor an object."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _too_deep() -> ApiError:
    message = f"The body's JSON is nested too deeply; this server accepts {MAX_DEPTH} levels of lists and objects."
    return ApiError(400, message, code="invalid_json")


def parse_chat(body: Any, settings: Settings) -> ChatRequest:
    """Check a request for a chat completion.

    Raises:
        ApiError: 404 for another model, else 400.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"The body is {_shown(body)}; expected an object with model and messages.")
    _refuse_unknown(body)
    model = _take(body, "model", str)
    if model is None:
        raise _missing("model")
    if model != settings.name:
        raise unknown_model(model, settings)
    messages, pictures = _messages(_take(body, "messages", list), settings)
    stream = bool(_take(body, "stream", bool))
    options = _take(body, "stream_options", dict)
    if options is not None and not stream:
        raise ApiError(400, "stream_options needs stream: true; leave it out.", param="stream_options")
    for key, value in (options or {}).items():
        if key not in ("include_usage", "include_obfuscation") and value is not None:
            raise _unsupported(f"stream_options.{key}")
    if _take(options or {}, "include_obfuscation", bool, "stream_options."):
        raise _unsupported("stream_options.include_obfuscation")
    return ChatRequest(
        messages=messages,
        pictures=pictures,
        stream=stream,
        include_usage=bool(_take(options or {}, "include_usage", bool, "stream_options.")),
        max_tokens=_max_tokens(body, settings),
        temperature=_temperature(body),
        top_p=_top_p(body),
        seed=_whole(body, "seed", -MAX_SEED - 1, MAX_SEED),
        n=_whole(body, "n", 1, settings.batch_size) or 1,
        stop=_stops(body),
    )


def unknown_model(name: str, settings: Settings) -> ApiError:
    """Return the error for an unknown model."""
    return ApiError(
        404,
        f"The model {_shown(name)} is not served here; expected {settings.name!r}.",
        param="model",
        code="model_not_found",
    )


def _refuse_unknown(body: Mapping[str, Any]) -> None:
    for key, value in body.items():
        if value is None or key in _SUPPORTED or key in _WITHOUT_EFFECT:
            continue
        if key not in _NEUTRAL or not any(value == neutral for neutral in _NEUTRAL[key]):
            raise _unsupported(key)


def _unsupported(param: str) -> ApiError:
    shown = param[:100]
    return ApiError(
        400, f"{shown} is not supported by this server; leave it out.", param=shown, code="unsupported_parameter"
    )


def _missing(param: str) -> ApiError:
    return ApiError(400, f"{param} is missing.", param=param, code="missing_required_parameter")


def _wrong(param: str, value: Any, expected: str) -> ApiError:
    return ApiError(400, f"{param} is {_shown(value)}; expected {expected}.", param=param, code="invalid_value")


def _take(body: Mapping[str, Any], key: str, kind: type, prefix: str = "") -> Any:
    """Return a field, or None if it is null or missing."""
    value = body.get(key)
    # bool is a kind of int in Python.
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise _wrong(prefix + key, value, _KINDS[kind])
    return value


def _whole(body: Mapping[str, Any], key: str, low: int, high: int) -> int | None:
    value: int | None = _take(body, key, int)
    if value is not None and not low <= value <= high:
        raise _wrong(key, value, f"{low} to {high}")
    return value


def _number(body: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _wrong(key, value, f"a number from {low:g} to {high:g}")
    return float(value)


def _temperature(body: Mapping[str, Any]) -> float:
    value = _number(body, "temperature", 0.0, 0.0, 2.0)
    return value if value >= MIN_TEMPERATURE else 0.0


def _top_p(body: Mapping[str, Any]) -> float:
    value = _number(body, "top_p", 1.0, 0.0, 1.0)
    if value == 0:
        raise _wrong("top_p", 0, "a number above 0, up to 1. For greedy decoding set temperature to 0")
    return value


def _max_tokens(body: Mapping[str, Any], settings: Settings) -> int | None:
    given = {key: _take(body, key, int) for key in ("max_completion_tokens", "max_tokens") if body.get(key) is not None}
    if len(set(given.values())) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens")
    for key, value in given.items():
        if not 1 <= value <= settings.max_answer_tokens:
            raise _wrong(key, value, f"1 to {settings.max_answer_tokens}, this server's limit for an answer")
        return int(value)
    return None


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise _wrong("stop", value, f"a text, or a list of up to {MAX_STOPS}, of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _messages(messages: list[Any] | None, settings: Settings) -> tuple[list[dict[str, Any]], tuple[Picture, ...]]:
    if not messages:
        raise _missing("messages")
    if len(messages) > MAX_MESSAGES:
        raise _too_many(len(messages), "messages", MAX_MESSAGES)
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = sum(len(content) for content in contents if isinstance(content, list))
    if parts > MAX_PARTS:
        raise _too_many(parts, "parts", MAX_PARTS)
    pictures: list[Picture] = []
    checked = [_message(message, f"messages[{index}]", pictures) for index, message in enumerate(messages)]
    if checked[-1]["role"] != "user":
        where = f"messages[{len(checked) - 1}]"
        raise ApiError(400, "The last message is not the user's; expected a question to answer.", param=where)
    if len(pictures) > settings.max_images:
        raise ApiError(
            400,
            f"The messages have {len(pictures)} images; this server accepts {settings.max_images} per request.",
            param="messages",
            code="too_many_images",
        )
    return checked, tuple(pictures)


def _too_many(number: int, what: str, limit: int) -> ApiError:
    message = f"The request has {number} {what}; this server accepts {limit}. Join or leave out some of them."
    return ApiError(400, message, param="messages", code=f"too_many_{what}")


def _message(message: Any, where: str, pictures: list[Picture]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(where, message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{where}.role", role, "system, developer, user or assistant")
    for key, value in message.items():
        # An answer that is sent back as a message has fields without effect.
        if key not in {"role", "content"} | _WITHOUT_EFFECT_IN_MESSAGES and value is not None and value != []:
            raise _unsupported(f"{where}.{key}")
    content = message.get("content")
    if content is None:
        raise _missing(f"{where}.content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise _wrong(f"{where}.content", content, "a text, or a list of parts")
    before = len(pictures)
    checked = [_part(part, f"{where}.content[{index}]", pictures) for index, part in enumerate(parts)]
    if len(pictures) > before and role != "user":
        raise ApiError(400, f"{where} has role {role} and an image; put images into user messages.", param=where)
    return {"role": _ROLES[role], "content": checked}


def _part(part: Any, where: str, pictures: list[Picture]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image_url"):
        shown = part if kind is None else kind
        raise _wrong(where if kind is None else f"{where}.type", shown, "a part of type text or image_url")
    for key, value in part.items():
        if key not in ("type", "cache_control", kind) and value is not None:
            raise _unsupported(f"{where}.{key}")
    if part.get(kind) is None:
        raise _missing(f"{where}.{kind}")
    if kind == "text":
        text = _take(part, "text", str, f"{where}.")
        if not is_utf8(text):
            raise _wrong(f"{where}.text", text, "valid Unicode, without halves of surrogate pairs")
        return {"type": "text", "text": text}
    if not isinstance(image := part["image_url"], dict):
        raise _wrong(f"{where}.image_url", image, 'an object {"url": "data:image/...;base64,..."}')
    for key, value in image.items():
        if key not in ("url", "detail") and value is not None:
            raise _unsupported(f"{where}.image_url.{key}")
    # The model determines the image size of the encoder, so the hint has no effect.
    if image.get("detail") not in (None, "auto", "low", "high", "original"):
        raise _wrong(f"{where}.image_url.detail", image["detail"], "auto, low or high")
    url = _take(image, "url", str, f"{where}.image_url.")
    if url is None:
        raise _missing(f"{where}.image_url.url")
    pictures.append(Picture(url, f"{where}.image_url.url"))
    return {"type": "image"}


def _shown(value: Any) -> str:
    """Return the beginning of a value, short enough for a message."""
    if isinstance(value, str):
        text = repr(value[:80])
    else:
        text = ""
        for piece in json.JSONEncoder(default=str).iterencode(value):
            text += piece[:81]
            if len(text) > 80:
                break
    return text if len(text) <= 80 else f"{text[:77]}..."


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the token counts; the prompt's count includes images."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def completion(head: Mapping[str, Any], answers: Sequence[tuple[str, str]], tokens: dict[str, int]) -> dict[str, Any]:
    """Return a complete answer.

    Args:
        head: `id`, `created` and `model`.
        answers: text and finish_reason of each choice.
        tokens: see `usage`.
    """
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (text, reason) in enumerate(answers)
    ]
    return {**head, "object": "chat.completion", "choices": choices, "usage": tokens}


def chunk(head: Mapping[str, Any], index: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    """Return a piece of a streamed answer, for the choice of this index."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}
