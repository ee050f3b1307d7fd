# SPDX-License-Identifier: Apache-2.0
"""Checkpoints named on the command line: resolve names, and find the licence of the weights."""

import os
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from ..checkpoints.adapters import base_of_adapter
from ..checkpoints.embedded import resolve_model
from ..checkpoints.licences import APPLES, RESEARCH_ONLY, stated_licence
from ..configuration_checks import check_fields
from .cli_errors import UserError

__all__ = [
    "RESEARCH_ONLY",
    "check_loadable",
    "licence_notice",
    "licence_of",
    "local_files",
    "read_config",
    "refuse_adapter",
]

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_OURS = ("fastvlm", "llava_qwen2", "llava_llama")


def read_config(model: str) -> dict[str, Any]:
    """Return the raw config.json of a directory or hub repository; for an adapter, of its base model.

    Raises:
        UserError: there is no such directory or repository, it cannot be reached, or it has no config.json.
        ValueError: a field has an invalid value.
    """
    from transformers import PreTrainedConfig

    model = resolve_model(model)
    model = base_of_adapter(model) or model
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise UserError(f"{model!r} has no config.json; expected the directory of a FastVLM checkpoint.")
    elif os.path.exists(model):
        raise UserError(f"{model!r} is a file; expected the directory of a FastVLM checkpoint.")
    elif not _REPOSITORY.fullmatch(model):
        raise UserError(
            f"no such directory: {model!r}. Expected the directory of a FastVLM checkpoint, or the name of a hub "
            "repository, such as apple/FastVLM-0.5B."
        )
    else:
        _skip_an_unreachable_hub()
    try:
        config: Any = PreTrainedConfig.get_config_dict(model)[0]
    except OSError as error:
        if os.path.isdir(model):
            raise
        raise _unreachable(model) from error
    except (AttributeError, TypeError, RecursionError):  # Transformers assumes that the JSON is an object
        config = None
    if not isinstance(config, dict):
        raise UserError(
            f"config.json of {model!r} is not a JSON object, or is nested too deeply; expected the configuration of a "
            "FastVLM checkpoint. Copy the checkpoint again."
        )
    check_fields(config, model)
    return config


def _skip_an_unreachable_hub() -> None:
    """If the hub's host name does not resolve, use the cache at once instead of after minutes of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def _unreachable(model: str) -> UserError:
    return UserError(
        f"no network or unknown repository {model!r}: use a local directory, or check the name and the connection. "
        "tiny, the test model, needs no network."
    )


def check_loadable(model: str, config: dict[str, Any]) -> None:
    """Raise UserError unless a config.json is of a model that this package loads."""
    kind = config.get("model_type")
    if kind == "fast_vlm":
        raise UserError(
            f"{model!r} has the layout of Transformers' native fast_vlm. Convert it once: fastvlm convert {model} OUT "
            "--to apple."
        )
    if kind not in _OURS:
        raise UserError(f"{model!r} has model_type {kind!r}; expected a FastVLM ({', '.join(_OURS)}).")


def refuse_adapter(model: str) -> None:
    """Raise UserError for the directory of an adapter, which is not a complete checkpoint."""
    if base := base_of_adapter(resolve_model(model)):
        raise UserError(f"{model!r} is an adapter for {base}. Merge it first: fastvlm merge {model} OUT.")


def local_files(source: str) -> Path:
    """Return the directory of a checkpoint, downloaded from the hub if it is not local.

    Raises:
        UserError: no directory and no reachable repository has that name, or it is an adapter.
    """
    refuse_adapter(source)
    read_config(source)
    source = resolve_model(source)
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, ignore_patterns=["*.bin", "*.py", "*.pt", "*.pth", "*.gguf"]))
    except OSError as error:
        raise _unreachable(source) from error


def licence_of(model: str) -> str | None:
    """Return the licence that a checkpoint states, "apple-amlr" for Apple's; None if it states none."""
    model = base_of_adapter(resolve_model(model)) or model
    if model.startswith("apple/"):
        return APPLES
    return stated_licence(model, [_text(model, "LICENSE") or ""], _text(model, "README.md"))


def licence_notice(model: str, config: dict[str, Any]) -> str | None:
    """Return the notice about the licence to print when weights are loaded; None if they are certainly not Apple's.

    The encoder of the published models is recognized by its widths, which config.json of Apple's layout omits.
    """
    name = licence_of(model)
    if name == APPLES:
        return f"Apple's weights are {RESEARCH_ONLY}."
    vision = config.get("vision_config") or {}
    if name is None and not vision.get("hidden_sizes") and config.get("model_type") in _OURS:
        return f"{model} states no licence. Apple's weights are {RESEARCH_ONLY}."
    return None


def _text(model: str, file: str) -> str | None:
    """Return the text of a checkpoint's file, or None if it has none or cannot be reached."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            resolve_model(model),
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None
    return Path(path).read_text(encoding="utf-8", errors="replace") if path else None
