# SPDX-License-Identifier: Apache-2.0
"""The id of the image placeholder, read from a checkpoint's tokenizer files without loading the tokenizer.

Apple's tokenizers have no "<image>". The processor adds it, and the model's configuration, which has no access to the
tokenizer, must contain the same id. The id depends on the vocabulary and on all other added tokens, so it differs
between checkpoints (151646 after Qwen2's three added tokens, 151665 after Qwen2.5's twenty-two). This module is pure
Python, since a configuration is often read where no model is needed.
"""

import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["HUB_KEYS", "IMAGE_TOKEN", "TOKENIZER_FILES", "image_token_id_of"]

HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that select files of the hub and control their download."""

IMAGE_TOKEN = "<image>"
"""Text of the placeholder in prompts and in the tokenizer."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "tokenizer_config.json")
"""Files that may define a tokenizer; a directory with none of them has no tokenizer."""

logger = logging.getLogger(__name__)

_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT_TOKENS: dict[str, dict[str, str]] = {
    # Defaults of the tokenizer classes for tokens missing in tokenizer_config.json (null there means none).
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "TokenizersBackend": {},
    "PreTrainedTokenizer": {},
}
_KEEP_SERIALIZED = ("TokenizersBackend", "PreTrainedTokenizer")  # use tokenizer.json unchanged, then add tokens


def image_token_id_of(directory_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> int | None:
    """Return the id that "<image>" has in a checkpoint's tokenizer, or will get when it is added.

    Args:
        directory_or_repo: directory or hub repository with the tokenizer's files.
        **hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only` and so on; others are ignored.

    Returns:
        The id, or None if there are no tokenizer files (or they are neither cached nor reachable).

    Raises:
        ValueError: a tokenizer file has another format than its name says.
        OSError: the repository or its revision does not exist.
    """
    hub_kwargs = {key: value for key, value in hub_kwargs.items() if key in HUB_KEYS}
    files: dict[str, Path] = {}
    for name in _FILES:
        if name in ("vocab.json", "tokenizer.model") and "tokenizer.json" in files:
            continue
        if name == "tokenizer.model" and "vocab.json" in files:
            continue
        if path := _find(directory_or_repo, name, hub_kwargs):
            files[name] = path
    if not files.keys() & {"tokenizer.json", "vocab.json", "tokenizer.model"}:
        return None
    stamps = tuple((name, str(path), path.stat().st_mtime_ns, path.stat().st_size) for name, path in files.items())
    known, token_id = _id_in_files(stamps)
    return token_id if known else _id_by_loading(str(directory_or_repo), hub_kwargs)


def _find(directory_or_repo: str | os.PathLike[str], name: str, hub_kwargs: dict[str, Any]) -> Path | None:
    if os.path.isdir(directory_or_repo):
        path = Path(directory_or_repo, hub_kwargs.get("subfolder") or "", name)
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(directory_or_repo, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    return Path(found) if found else None


@functools.lru_cache(maxsize=16)
def _id_in_files(stamps: tuple[tuple[str, str, int, int], ...]) -> tuple[bool, int | None]:
    """Return (True, id), or (False, None) if the tokenizer must be loaded to find the id.

    Times and sizes in `stamps` invalidate the cache when files are rewritten.
    """
    files = {name: Path(path) for name, path, _, _ in stamps}
    config = _read_json(files.get("tokenizer_config.json"))
    serialized = _read_json(files.get("tokenizer.json"))
    tokenizer_class = str(config.get("tokenizer_class") or ("TokenizersBackend" if serialized else "")).removesuffix(
        "Fast"
    )
    if tokenizer_class not in _DEFAULT_TOKENS or (tokenizer_class in _KEEP_SERIALIZED and not serialized):
        return False, None
    vocabulary = _vocabulary(files, serialized)
    added = _added_tokens(files, config, serialized, tokenizer_class)

    # The tokenizer numbers added tokens in order and without gaps, regardless of the ids in the files.
    ids: dict[str, int] = {}
    for token in added:
        if token and token not in ids:
            ids[token] = vocabulary[token] if token in vocabulary else _next_id(vocabulary, ids)
    if IMAGE_TOKEN in ids:
        return True, ids[IMAGE_TOKEN]
    return True, vocabulary.get(IMAGE_TOKEN, _next_id(vocabulary, ids))


def _next_id(vocabulary: dict[str, int], added: dict[str, int]) -> int:
    return max(len(vocabulary), max(added.values(), default=-1) + 1)


def _vocabulary(files: dict[str, Path], serialized: dict[str, Any]) -> dict[str, int]:
    if serialized:
        vocabulary = serialized.get("model", {}).get("vocab")
    elif "vocab.json" in files:
        vocabulary = _read_json(files["vocab.json"])
    else:
        vocabulary = list(_sentencepiece_tokens(files["tokenizer.model"]))
    if isinstance(vocabulary, list):
        vocabulary = {entry if isinstance(entry, str) else entry[0]: index for index, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict) or not vocabulary:
        where = next(files[name] for name in ("tokenizer.json", "vocab.json", "tokenizer.model") if name in files)
        raise ValueError(f"{where} holds no vocabulary; the file is damaged or not a tokenizer's. Fetch it again.")
    return vocabulary


def _added_tokens(
    files: dict[str, Path], config: dict[str, Any], serialized: dict[str, Any], tokenizer_class: str
) -> list[str]:
    """Return the added tokens in the tokenizer's order."""
    config = dict(config)
    if not config.get("extra_special_tokens") and "additional_special_tokens" in config:
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
    in_json = {int(entry["id"]): entry["content"] for entry in serialized.get("added_tokens") or ()}
    if "added_tokens_decoder" in config:
        by_id = {int(index): _text(token) for index, token in config["added_tokens_decoder"].items()}
    else:
        named_later = _read_json(files.get("special_tokens_map.json"))
        if isinstance(named_later.get("extra_special_tokens"), list):
            named_later["extra_special_tokens"] = [
                *(config.get("extra_special_tokens") or ()), *named_later["extra_special_tokens"]
            ]  # fmt: skip
        config.update(named_later)
        by_id = {index: token for token, index in _read_json(files.get("added_tokens.json")).items()}
        by_id.update(in_json)
    ordered = [by_id[index] for index in sorted(by_id)]
    if tokenizer_class in _KEEP_SERIALIZED:
        ordered = [*in_json.values(), *ordered]

    extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
    named = {**_DEFAULT_TOKENS[tokenizer_class], **{name: config[name] for name in _NAMED_TOKENS if name in config}}
    ordered += [_text(named[name]) for name in _NAMED_TOKENS if named.get(name)]
    # Tokens with custom names, such as "image_token", follow the usual ones.
    ordered += [
        _text(value)
        for name, value in config.items()
        if name.endswith("_token") and name not in _NAMED_TOKENS and isinstance(value, str | dict)
    ]
    return ordered + [_text(token) for token in (extra.values() if isinstance(extra, dict) else extra)]


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content", ""))


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged. Fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object. Fetch it again.")
    return content


def _sentencepiece_tokens(path: Path) -> Iterator[str]:
    """Yield the vocabulary of a SentencePiece model: field 1 of each field 1 of its protocol buffer."""
    try:
        for number, piece in _fields(path.read_bytes()):
            if number == 1:
                yield next(value for inner, value in _fields(piece) if inner == 1).decode()
    except (IndexError, StopIteration, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is not a SentencePiece model; the file is damaged. Fetch it again.") from error


def _fields(message: bytes) -> Iterable[tuple[int, bytes]]:
    """Yield (field number, payload) of the length-delimited fields of a protocol buffer; skip other fields."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(message, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        elif kind == 2:
            length, position = _varint(message, position)
            if position + length > len(message):
                raise ValueError("truncated")
            yield tag >> 3, message[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {kind}")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _id_by_loading(directory_or_repo: str, hub_kwargs: dict[str, Any]) -> int | None:
    """Return the id by loading the tokenizer, for classes whose files this module does not support."""
    from transformers import AutoTokenizer, PreTrainedConfig

    try:
        # With a bare configuration AutoTokenizer does not read config.json, which would ask for this id again.
        tokenizer = AutoTokenizer.from_pretrained(directory_or_repo, config=PreTrainedConfig(), **hub_kwargs)
    except (OSError, ValueError, ImportError) as error:
        logger.warning(
            "Could not load the tokenizer of %s to find the id of %s: %s", directory_or_repo, IMAGE_TOKEN, error
        )
        return None
    tokenizer.add_tokens(IMAGE_TOKEN, special_tokens=True)
    token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return token_id
