# SPDX-License-Identifier: Apache-2.0
"""OpenAI's chat completions: the validation of requests.

An unsupported field that would change the answer is refused. Null, and values without effect, count as not given.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engines import Schema
from ..engines.base import MAX_BIASES, MAX_LOGPROBS, MIN_TEMPERATURE
from ..engines.prompts import is_utf8
from .api_errors import ApiError
from .field_checks import (
    IGNORED,
    TAKEN,
    Refused,
    missing,
    number,
    refuse_others,
    shown,
    take,
    whole,
    wrong,
)
from .settings import Settings

__all__ = [
    "FIELDS",
    "ChatRequest",
    "ImageUrl",
    "check_model",
    "parse_chat",
    "parse_messages",
    "schema_of",
    "temperature_of",
    "top_p_of",
    "unknown_model",
]

MAX_MESSAGES = 1000
MAX_PARTS = 1000
"""Maximum number of parts in all messages of a request together."""

MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_SEED = 2**63 - 1
MAX_TOKEN_DIGITS = 9

_TOOLS = "calls no tools"
_TEXT = "answers with text only"

FIELDS: dict[str, str | Refused] = {
    "model": TAKEN,
    "messages": TAKEN,
    "stream": TAKEN,
    "stream_options": TAKEN,
    "max_completion_tokens": TAKEN,
    "max_tokens": TAKEN,
    "temperature": TAKEN,
    "top_p": TAKEN,
    "seed": TAKEN,
    "n": TAKEN,
    "stop": TAKEN,
    "frequency_penalty": TAKEN,
    "presence_penalty": TAKEN,
    "logit_bias": TAKEN,
    "logprobs": TAKEN,
    "top_logprobs": TAKEN,
    "response_format": TAKEN,
    # Names of vLLM and Transformers, for a last message of the assistant.
    "add_generation_prompt": TAKEN,
    "continue_final_message": TAKEN,
    # About the client, and about how OpenAI keeps, bills and speeds up a request.
    "user": IGNORED,
    "safety_identifier": IGNORED,
    "metadata": IGNORED,
    "store": IGNORED,
    "service_tier": IGNORED,
    "prompt_cache_key": IGNORED,
    "prompt_cache_options": IGNORED,
    "prompt_cache_retention": IGNORED,
    "prediction": IGNORED,
    # Hints for models that reason.
    "reasoning_effort": IGNORED,
    "verbosity": IGNORED,
    "audio": Refused(_TEXT),
    "modalities": Refused(_TEXT, (["text"],)),
    "moderation": Refused("checks no contents"),
    "tools": Refused(_TOOLS, ([],)),
    "tool_choice": Refused(_TOOLS, ("auto", "none")),
    "parallel_tool_calls": Refused(_TOOLS, (True, False)),
    "functions": Refused(_TOOLS, ([],)),
    "function_call": Refused(_TOOLS, ("auto", "none")),
    "web_search_options": Refused(_TOOLS),
}
"""Every field of OpenAI's chat completions, and the two that others add: taken, ignored, or refused with a reason."""

_STREAM_OPTIONS: dict[str, str | Refused] = {
    "include_usage": TAKEN,
    "include_obfuscation": Refused("sends no padding", (False,)),
}

# An answer that is sent back as a message has fields without effect.
_MESSAGE: dict[str, str | Refused] = {
    "role": TAKEN,
    "content": TAKEN,
    "name": IGNORED,
    "cache_control": IGNORED,
    "annotations": Refused(_TEXT, ([],)),
    "audio": Refused(_TEXT),
    "refusal": Refused(_TEXT),
    "function_call": Refused(_TOOLS),
    "tool_calls": Refused(_TOOLS, ([],)),
}
_PART: dict[str, str | Refused] = {"type": TAKEN, "cache_control": IGNORED, "prompt_cache_breakpoint": IGNORED}
_IMAGE_URL = {"url": TAKEN, "detail": TAKEN}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ImageUrl:
    """An image of a request: its URL, and the field that has it."""

    url: str
    param: str


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A valid request.

    Attributes:
        messages: each a role ("system", "user" or "assistant") and a list of parts: {"type": "text", "text": …}, or
            {"type": "image"} for the next of `image_urls`.
        continues: whether the answer continues the last message, which is the assistant's and has one text.
        max_tokens: None if the request has no limit.
        temperature: 0 means greedy decoding.
        logprobs: number of the most probable tokens to report at each place; None for no probabilities.
        schema: the form of the answer; None for free text.
    """

    messages: list[dict[str, Any]]
    image_urls: tuple[ImageUrl, ...]
    continues: bool
    stream: bool
    include_usage: bool = False
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    schema: Schema | None = None


def parse_chat(body: Any, settings: Settings) -> ChatRequest:
    """Check a request for a chat completion.

    Raises:
        ApiError: 404 for another model, else 400.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"The body is {shown(body)}; expected an object with model and messages.")
    refuse_others(body, FIELDS)
    check_model(body, settings)
    messages, image_urls = parse_messages(take(body, "messages", list), settings)
    stream = bool(take(body, "stream", bool))
    options = take(body, "stream_options", dict)
    if options is not None and not stream:
        raise ApiError(400, "stream_options needs stream: true; leave it out.", param="stream_options")
    refuse_others(options or {}, _STREAM_OPTIONS, "stream_options.")
    return ChatRequest(
        messages=messages,
        image_urls=image_urls,
        continues=_continues(body, messages),
        stream=stream,
        include_usage=bool(take(options or {}, "include_usage", bool, "stream_options.")),
        max_tokens=_max_tokens(body, settings),
        temperature=temperature_of(body),
        top_p=top_p_of(body),
        seed=whole(body, "seed", -MAX_SEED - 1, MAX_SEED),
        n=whole(body, "n", 1, settings.batch_size) or 1,
        stop=_stops(body),
        presence_penalty=number(body, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number(body, "frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_biases(body),
        logprobs=_logprobs(body),
        schema=_schema(body),
    )


def unknown_model(name: str, settings: Settings) -> ApiError:
    """Return the error for an unknown model."""
    return ApiError(
        404,
        f"The model {shown(name)} is not served here; expected {settings.name!r}.",
        param="model",
        code="model_not_found",
    )


def check_model(body: Mapping[str, Any], settings: Settings) -> None:
    """Raise ApiError unless the request names the model that is served."""
    model = take(body, "model", str)
    if model is None:
        raise missing("model")
    if model != settings.name:
        raise unknown_model(model, settings)


def _continues(body: Mapping[str, Any], messages: list[dict[str, Any]]) -> bool:
    """Return whether the answer continues the last message; that is so if, and only if, it is the assistant's."""
    continues = bool(messages[-1]["role"] == "assistant")
    for key, needed in (("continue_final_message", continues), ("add_generation_prompt", not continues)):
        if take(body, key, bool) not in (None, needed):
            role, expected = messages[-1]["role"], str(needed).lower()
            raise wrong(key, body[key], f"{expected}, because the last message has role {role}. Leave it out")
    return continues


def temperature_of(body: Mapping[str, Any]) -> float:
    """Return the temperature; 0 for greedy decoding."""
    value = number(body, "temperature", 0.0, 0.0, 2.0)
    return value if value >= MIN_TEMPERATURE else 0.0


def top_p_of(body: Mapping[str, Any]) -> float:
    """Return top_p, above 0."""
    value = number(body, "top_p", 1.0, 0.0, 1.0)
    if value == 0:
        raise wrong("top_p", 0, "a number above 0, up to 1. For greedy decoding set temperature to 0")
    return value


def _max_tokens(body: Mapping[str, Any], settings: Settings) -> int | None:
    given = {key: take(body, key, int) for key in ("max_completion_tokens", "max_tokens") if body.get(key) is not None}
    if len(set(given.values())) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens")
    for key, value in given.items():
        if not 1 <= value <= settings.max_answer_tokens:
            raise wrong(key, value, f"1 to {settings.max_answer_tokens}, this server's limit for an answer")
        return int(value)
    return None


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise wrong(
            "stop", value, f"a string of 1 to {MAX_STOP_LENGTH} characters, or a list of up to {MAX_STOPS} of them"
        )
    return tuple(stops)


def _biases(body: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    biases = take(body, "logit_bias", dict) or {}
    if len(biases) > MAX_BIASES:
        raise ApiError(
            400, f"logit_bias has {len(biases)} tokens; this server accepts {MAX_BIASES}.", param="logit_bias"
        )
    for token in biases:
        if not (token.isascii() and token.isdigit() and len(token) <= MAX_TOKEN_DIGITS):
            raise wrong("logit_bias", token, 'ids of tokens, such as {"50": -100}')
    return tuple((int(token), number(biases, token, 0.0, -100.0, 100.0, "logit_bias.")) for token in biases)


def _logprobs(body: Mapping[str, Any]) -> int | None:
    top = whole(body, "top_logprobs", 0, MAX_LOGPROBS)
    if take(body, "logprobs", bool):
        return top or 0
    if top:
        raise ApiError(400, "top_logprobs needs logprobs: true; leave it out.", param="top_logprobs")
    return None


def _schema(body: Mapping[str, Any]) -> Schema | None:
    given = take(body, "response_format", dict) or {}
    if given.get("type") == "json_schema":
        refuse_others(given, {"type": TAKEN, "json_schema": TAKEN}, "response_format.")
        if (named := take(given, "json_schema", dict, "response_format.")) is None:
            raise missing("response_format.json_schema")
        return schema_of({"type": "json_schema", **named}, "response_format.json_schema.", body)
    return schema_of(given, "response_format.", body)


def schema_of(given: Mapping[str, Any], prefix: str, body: Mapping[str, Any]) -> Schema | None:
    """Return the form that an answer must have, or None for free text.

    Args:
        given: its type, and for "json_schema" a name, which has no effect, and the schema.
        prefix: of the fields of `given` in errors.
        body: the request.
    """
    kind = given.get("type", "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise wrong(f"{prefix}type", kind, "text, json_object or json_schema")
    names = {"name": IGNORED, "description": IGNORED, "strict": IGNORED, "schema": TAKEN}
    refuse_others(given, {"type": TAKEN} | (names if kind == "json_schema" else {}), prefix)
    if kind == "text":
        return None
    if _stops(body):
        message = "stop and a form of the answer are both given, and a stop string could cut the JSON; leave stop out."
        raise ApiError(400, message, param="stop")
    if kind == "json_object":
        return Schema.json_object()
    if (schema := take(given, "schema", dict, prefix)) is None:
        raise missing(f"{prefix}schema")
    try:
        return Schema.json(schema)
    except ValueError as error:
        raise ApiError(400, f"{prefix}schema: {error}", param=f"{prefix}schema", code="invalid_schema") from error


def parse_messages(
    messages: list[Any] | None, settings: Settings, name: str = "messages"
) -> tuple[list[dict[str, Any]], tuple[ImageUrl, ...]]:
    """Check the messages of a request; `name` is the field that has them.

    Returns:
        `ChatRequest.messages` and `ChatRequest.image_urls`.
    """
    if not messages:
        raise missing(name)
    if len(messages) > MAX_MESSAGES:
        raise _too_many(len(messages), "messages", MAX_MESSAGES)
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = sum(len(content) for content in contents if isinstance(content, list))
    if parts > MAX_PARTS:
        raise _too_many(parts, "parts", MAX_PARTS)
    image_urls: list[ImageUrl] = []
    checked = [_message(message, f"{name}[{index}]", image_urls) for index, message in enumerate(messages)]
    if checked[-1]["role"] == "system":
        message = "The last message has role system; expected a user's to answer, or an assistant's to continue."
        raise ApiError(400, message, param=f"{name}[{len(checked) - 1}]")
    if checked[-1]["role"] == "assistant":
        text = "".join(part["text"] for part in checked[-1]["content"])
        checked[-1]["content"] = [{"type": "text", "text": text}]
    if len(image_urls) > settings.max_images:
        raise ApiError(
            400,
            f"The messages have {len(image_urls)} images; this server accepts {settings.max_images} per request.",
            param="messages",
            code="too_many_images",
        )
    return checked, tuple(image_urls)


def _too_many(number: int, what: str, limit: int) -> ApiError:
    message = f"The request has {number} {what}; this server accepts {limit}. Join or leave out some of them."
    return ApiError(400, message, param="messages", code=f"too_many_{what}")


def _message(message: Any, where: str, image_urls: list[ImageUrl]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise wrong(where, message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", role, "system, developer, user or assistant")
    refuse_others(message, _MESSAGE, f"{where}.")
    content = message.get("content")
    if content is None:
        raise missing(f"{where}.content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise wrong(f"{where}.content", content, "a string, or a list of parts")
    before = len(image_urls)
    checked = [_part(part, f"{where}.content[{index}]", image_urls) for index, part in enumerate(parts)]
    if len(image_urls) > before and role != "user":
        raise ApiError(400, f"{where} has role {role} and an image; put images into user messages.", param=where)
    return {"role": _ROLES[role], "content": checked}


def _part(part: Any, where: str, image_urls: list[ImageUrl]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image_url"):
        found = part if kind is None else kind
        raise wrong(where if kind is None else f"{where}.type", found, "a part of type text or image_url")
    refuse_others(part, _PART | {kind: TAKEN}, f"{where}.")
    if part.get(kind) is None:
        raise missing(f"{where}.{kind}")
    if kind == "text":
        text = take(part, "text", str, f"{where}.")
        if not is_utf8(text):
            raise wrong(f"{where}.text", text, "valid Unicode, without halves of surrogate pairs")
        return {"type": "text", "text": text}
    if not isinstance(image := part["image_url"], dict):
        raise wrong(f"{where}.image_url", image, 'an object {"url": "data:image/...;base64,..."}')
    refuse_others(image, _IMAGE_URL, f"{where}.image_url.")
    # The model determines the image size of the encoder, so the hint has no effect.
    if image.get("detail") not in (None, "auto", "low", "high", "original"):
        raise wrong(f"{where}.image_url.detail", image["detail"], "auto, low or high")
    url = take(image, "url", str, f"{where}.image_url.")
    if url is None:
        raise missing(f"{where}.image_url.url")
    image_urls.append(ImageUrl(url, f"{where}.image_url.url"))
    return {"type": "image"}
