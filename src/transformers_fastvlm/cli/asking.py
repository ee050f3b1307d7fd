# SPDX-License-Identifier: Apache-2.0
"""Load an engine and ask it questions, for every verb that answers."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.answer_schema import Schema
from ..engines.base import MIN_TEMPERATURE, Answer, Conversation, Sampling
from .cli_errors import UserError, notice, warn
from .model_sources import check_loadable, licence_notice, read_config
from .options import DtypeName, EngineName

if TYPE_CHECKING:
    from ..engines import Engine, Request

__all__ = ["answer", "check_model", "engine_settings", "load", "remark", "sampling_of", "schema_of"]


def sampling_of(
    max_new_tokens: int,
    temperature: float,
    top_p: float | None = None,
    seed: int | None = None,
    num_beams: int = 1,
    schema: Schema | None = None,
) -> Sampling:
    """Return the `Sampling` for a verb's options.

    Raises:
        UserError: an option would have no effect.
    """
    for name, value in (("--top-p", top_p), ("--seed", seed)):
        if value is not None and temperature < MIN_TEMPERATURE:
            raise UserError(
                f"{name} has no effect at --temperature {temperature:g}, which never samples. Set a higher "
                "temperature, such as 0.2."
            )
    if top_p == 0:
        raise UserError("--top-p is 0, which leaves no token to sample; expected above 0 and up to 1.")
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=seed,
        num_beams=num_beams,
        schema=schema,
    )


def schema_of(file: Path | None, choices: str | None, regex: str | None) -> Schema | None:
    """Return the `Schema` for a verb's options.

    Raises:
        UserError: more than one of them is given, or one has no schema.
        OSError: the file cannot be read.
    """
    given = [
        name for name, value in (("--schema", file), ("--choices", choices), ("--regex", regex)) if value is not None
    ]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} cannot be combined; give one of them.")
    try:
        if file is not None:
            return Schema.json(file.read_text(encoding="utf-8"))
        if choices is not None:
            return Schema.choices([choice.strip() for choice in choices.split(",")])
        return None if regex is None else Schema.regex(regex)
    except ValueError as error:  # UnicodeDecodeError too
        raise UserError(f"{given[0]}{'' if file is None else f' {file}'}: {error}") from error


def engine_settings(
    engine: EngineName, precision: str | None, device: str, dtype: DtypeName, size: int | None
) -> dict[str, Any]:
    """Return the options of the chosen engine.

    Raises:
        UserError: this engine does not have one of the given options.
    """
    chosen: dict[str, Any] = {"dtype": dtype.value, "device": device, "size": size}
    if engine in (EngineName.onnx, EngineName.llamacpp):
        if dtype != DtypeName.auto or size is not None:
            kind = "an ONNX" if engine == EngineName.onnx else "a GGUF"
            raise UserError(f"--dtype and --size are fixed in {kind} export; choose its --precision.")
        return {"precision": precision, "device": device}
    if precision is not None:
        raise UserError(f"--precision is for --engine onnx and llamacpp; use --dtype with --engine {engine.value}.")
    return chosen


def check_model(engine: EngineName, model: str) -> dict[str, Any]:
    """Return a model's config.json.

    Raises:
        UserError: it has none, or the engine cannot load this kind of model.
    """
    config = read_config(model)
    if engine != EngineName.onnx:
        check_loadable(model, config)
    return config


def load(engine: EngineName, model: str, settings: dict[str, Any], batch_size: int | None = None) -> "Engine":
    """Load an engine, and print the restrictions of the model's licence on standard error.

    Args:
        engine: name of the engine.
        model: directory or hub repository; for onnx and llamacpp, an export's directory.
        settings: see `engine_settings`.
        batch_size: maximum number of requests that are answered together; onnx answers one at a time.

    Raises:
        UserError: no such checkpoint, or another kind of model.
        OSError, ValueError: no such device, or a damaged checkpoint.
        ImportError: the engine's package is not installed.
    """
    config = check_model(engine, model)

    from ..engines import load_engine
    from ..engines.model_loading import find_device
    from ..engines.onnx_sessions import session_device

    if engine == EngineName.transformers:
        find_device(settings["device"], "--device")
    elif engine == EngineName.onnx:
        session_device(settings["device"], "--device")
    if batch_size is not None and engine != EngineName.onnx:
        settings = settings | {"batch_size": batch_size}
    loaded = load_engine(engine.value, model, **settings)
    if message := licence_notice(model, config):
        notice(message)
    return loaded


def answer(
    engine: "Engine",
    conversation: Conversation,
    sampling: Sampling,
    say: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Return the answer to a conversation. Ctrl-C stops it and keeps the text so far.

    Args:
        engine, conversation, sampling: see `Engine.stream`.
        say: called with each new part of the answer's text.
    """
    request: Request = engine.stream(conversation, sampling)
    try:
        for piece in request:
            say(piece)
    except KeyboardInterrupt:
        request.cancel()
        for piece in request:
            say(piece)
    return request.result()


def remark(answer: Answer, sampling: Sampling) -> None:
    """Print on standard error that an answer was cut, and why."""
    if answer.finish_reason != "length":
        return
    tokens = answer.completion_tokens
    full = "the model's context is full."
    why = "--max-new-tokens allows longer ones." if tokens == sampling.max_new_tokens else full
    whole = "" if sampling.schema is None else ", before it was complete by its schema"
    warn(f"fastvlm: the answer was cut after {tokens} tokens{whole}; {why}")
