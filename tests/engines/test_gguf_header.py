# SPDX-License-Identifier: Apache-2.0
"""The reader of GGUF headers: what it reads, and what it refuses, before llama.cpp could abort the process."""

import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from transformers_fastvlm.engines.gguf_checks import check_gguf
from transformers_fastvlm.engines.gguf_header import GgufArray, read_gguf_header
from transformers_fastvlm.storage.digests import file_digest

UINT32, FLOAT32, INT32, STRING, ARRAY = 4, 6, 5, 8, 9
VOCABULARY, WIDTH = 40, 32


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(key: str, value: Any) -> bytes:
    """Return a field: a number, a text, or a list of either."""
    start = text(key)
    if isinstance(value, list):
        kind = STRING if value and isinstance(value[0], str) else INT32
        data = b"".join(text(one) if kind == STRING else struct.pack("<i", one) for one in value)
        return start + struct.pack("<IIQ", ARRAY, kind, len(value)) + data
    if isinstance(value, str):
        return start + struct.pack("<I", STRING) + text(value)
    if isinstance(value, float):
        return start + struct.pack("<If", FLOAT32, value)
    return start + struct.pack("<II", UINT32, value)


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


EMBEDDINGS = ("token_embd.weight", (WIDTH, VOCABULARY), 0, 0)
NORM = ("output_norm.weight", (WIDTH,), 0, WIDTH * VOCABULARY * 4)
FIELDS = {
    "general.architecture": "qwen2",
    "qwen2.context_length": 512,
    "qwen2.embedding_length": WIDTH,
    "qwen2.block_count": 2,
    "qwen2.feed_forward_length": 64,
    "qwen2.attention.head_count": 4,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.rope.freq_base": 1e6,
    "tokenizer.ggml.tokens": [f"t{index}" for index in range(VOCABULARY)],
    "tokenizer.ggml.token_type": [1] * VOCABULARY,
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "fastvlm.image_token_id": 39,
    "fastvlm.hidden_size": WIDTH,
}


def whole(
    fields: dict[str, Any] | None = None, tensors: tuple[Any, ...] = (EMBEDDINGS, NORM), data: int = 4 * WIDTH * 41
) -> bytes:
    fields = FIELDS if fields is None else fields
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))
    header += b"".join(field(key, value) for key, value in fields.items())
    header += b"".join(tensor(*one) for one in tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


def start(tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, fields)


def test_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(whole())
    header = read_gguf_header(tmp_path / "a.gguf")
    assert header.metadata["qwen2.rope.freq_base"] == 1e6 and header.metadata["general.architecture"] == "qwen2"
    assert header.metadata["tokenizer.ggml.tokens"] == GgufArray(STRING, VOCABULARY)
    found = [(name, one.shape, one.kind, one.nbytes) for name, one in header.tensors.items()]
    assert found == [("token_embd.weight", (32, 40), 0, 5120), ("output_norm.weight", (32,), 0, 128)]


def test_a_large_vocabulary_takes_a_moment(tmp_path: Path) -> None:
    tokens = [f"token{index}" for index in range(152_000)]
    (tmp_path / "a.gguf").write_bytes(whole({"tokens": tokens, "merges": tokens}))
    begun = time.process_time()
    assert read_gguf_header(tmp_path / "a.gguf").metadata["merges"].length == 152_000
    assert time.process_time() - begun < 2


HUGE = 2**63
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file: it begins with b''"),
    "another kind": (b"PK\3\4" + bytes(100), "is not a GGUF file"),
    "safetensors": (b"\x10\0\0\0\0\0\0\0{}", "is not a GGUF file"),
    "only its mark": (b"GGUF", "ends after 4 bytes"),
    "another byte order": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "has version 50331648"),
    "a newer version": (start(version=4), "has version 4 of GGUF; expected 2 or 3"),
    "too many tensors": (start(tensors=HUGE), "tensors; expected at most 65,536"),
    "too many fields": (start(fields=2**32), "fields; expected at most 65,536"),
    "fields that are not there": (start(fields=3), "header is longer than"),
    "tensors that are not there": (start(tensors=3), "header is longer than"),
    "a long name": (start(fields=1) + struct.pack("<Q", HUGE), "expected at most 1,024"),
    "a long text": (start(fields=1) + text("a") + struct.pack("<IQ", STRING, HUGE), "expected at most 4,194,304"),
    "a text behind the end": (start(fields=1) + text("a") + struct.pack("<IQ", STRING, 99), "header is longer than"),
    "no name": (start(fields=1) + text(""), "the field '' has no name"),
    "a field twice": (start(fields=2) + field("a", 1) * 2, "the field 'a' occurs twice"),
    "an unknown type": (start(fields=1) + text("a") + struct.pack("<I", 77), "has the unknown type 77"),
    "an array of arrays": (start(fields=1) + text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "unknown type 9"),
    "a long array": (start(fields=1) + text("a") + struct.pack("<IIQ", ARRAY, INT32, HUGE), "header is longer than"),
    "many texts": (
        start(fields=1) + text("a") + struct.pack("<IIQ", ARRAY, STRING, HUGE // 8),
        "header is longer than",
    ),
    "texts behind the end": (
        start(fields=1) + text("a") + struct.pack("<IIQQQ", ARRAY, STRING, 2, HUGE, 5),
        "header is longer than",
    ),
    "no dimensions": (whole(tensors=(("a", (), 0, 0),)), "has 0 dimensions"),
    "five dimensions": (whole(tensors=(("a", (1,) * 5, 0, 0),)), "has 5 dimensions"),
    "an empty tensor": (whole(tensors=(("a", (32, 0), 0, 0),)), "does not allow"),
    "a type of tensors": (whole(tensors=(("a", (32,), 99, 0),)), "has the unknown type 99"),
    "rows that are no blocks": (whole(tensors=(("a", (33, 2), 8, 0),)), "which its type 8 does not allow"),
    "a tensor twice": (whole(tensors=(EMBEDDINGS, EMBEDDINGS[:3] + NORM[3:])), "occurs twice"),
    "an overlap": (whole(tensors=(EMBEDDINGS, (*NORM[:3], 64))), "has the offset 64"),
    "a gap": (whole(tensors=((*NORM[:3], 64),)), "has the offset 64"),
    "an alignment": (whole(FIELDS | {"general.alignment": 48}), "general.alignment is 48"),
    "an alignment of text": (whole(FIELDS | {"general.alignment": "x"}), "general.alignment is 'x'"),
    "an enormous tensor": (whole(tensors=(("a", (2**40, 2**40), 0, 0),)), "its tensors end at byte"),
    "cut in its tensors": (whole()[:-1], "but its tensors end at byte"),
    "cut in its header": (whole()[:300], "header is longer than its 300 bytes"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file(case: str, tmp_path: Path) -> None:
    data, message = DAMAGED[case]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(OSError, match=r"a\.gguf ") as error:
        read_gguf_header(tmp_path / "a.gguf")
    assert message in str(error.value) and "again" in str(error.value)


def test_cut_at_each_byte(tmp_path: Path) -> None:
    data = whole()
    for length in range(0, len(data), 37):
        (tmp_path / "a.gguf").write_bytes(data[:length])
        with pytest.raises(OSError, match=r"a\.gguf "):
            read_gguf_header(tmp_path / "a.gguf")


# A file that is whole, but of another model


def configuration(**changes: Any) -> Any:
    sizes = {
        "model_type": "qwen2",
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": VOCABULARY,
    }
    of_text = SimpleNamespace(**sizes | changes)
    return SimpleNamespace(image_token_id=39, get_text_config=lambda: of_text)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "gemma"}, "general.architecture is 'gemma'; expected 'qwen2'"),
    "digest": ({"fastvlm.config_sha256": "0" * 64}, "belongs to another config.json"),
    "no digest": ({"fastvlm.config_sha256": None}, "has no fastvlm.config_sha256"),
    "placeholder": ({"fastvlm.image_token_id": 3}, "fastvlm.image_token_id is 3; expected 39"),
    "encoder's width": ({"fastvlm.hidden_size": 64}, "fastvlm.hidden_size is 64; expected 32"),
    "width": ({"qwen2.embedding_length": 64}, "qwen2.embedding_length is 64; expected 32"),
    "width of text": ({"qwen2.embedding_length": "32"}, "qwen2.embedding_length is '32'; expected 32"),
    "layers": ({"qwen2.block_count": 0}, "qwen2.block_count is 0; expected 2"),
    "no layers": ({"qwen2.block_count": None}, "qwen2.block_count is None; expected 2"),
    "heads": ({"qwen2.attention.head_count": 0}, "qwen2.attention.head_count is 0; expected 4"),
    "heads by layer": ({"qwen2.attention.head_count": [4, 4]}, "qwen2.attention.head_count is GgufArray"),
    "heads of keys": ({"qwen2.attention.head_count_kv": 3}, "qwen2.attention.head_count_kv is 3; expected 2"),
    "head size": ({"qwen2.attention.key_length": 7}, "qwen2.attention.key_length is 7; expected 8"),
    "context": ({"qwen2.context_length": 2**31}, "qwen2.context_length is 2147483648; expected 512"),
    "experts": ({"qwen2.expert_count": 300}, "has the field qwen2.expert_count"),
    "several files": ({"split.count": 3}, "is one of 3 parts"),
    "tokens": ({"tokenizer.ggml.tokens": ["a"]}, "tokenizer.ggml.tokens has 1 entries; expected 40"),
    "kinds of tokens": ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type has 1 entries; expected 40"),
    "tokens that are numbers": ({"tokenizer.ggml.tokens": [1] * VOCABULARY}, "tokenizer.ggml.tokens has"),
}


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., None]:
    """Write a file with changed fields beside a configuration, and check it."""

    def run(changes: dict[str, Any], tensors: tuple[Any, ...] = (EMBEDDINGS, NORM), **config: Any) -> None:
        (tmp_path / "config.json").write_text("{}")
        fields = FIELDS | {"fastvlm.config_sha256": file_digest(tmp_path / "config.json")} | changes
        fields = {key: value for key, value in fields.items() if value is not None}
        (tmp_path / "a.gguf").write_bytes(whole(fields, tensors))
        check_gguf(read_gguf_header(tmp_path / "a.gguf"), configuration(**config), tmp_path / "config.json")

    return run


def test_a_file_that_fits(check: Callable[..., None]) -> None:
    check({})
    check({"tokenizer.ggml.tokens": None, "tokenizer.ggml.token_type": None, "qwen2.vocab_size": VOCABULARY})


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_of_another_model(case: str, check: Callable[..., None]) -> None:
    changes, message = OTHERS[case]
    with pytest.raises(ValueError, match=r"a\.gguf") as error:
        check(changes)
    assert message in str(error.value) and str(error.value).count("\n") < 3


def test_embeddings_of_another_vocabulary(check: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match=r"token_embd\.weight is \(32, 40\); expected \(32, 50\)"):
        check({"tokenizer.ggml.tokens": None, "tokenizer.ggml.token_type": None}, vocab_size=50)
    with pytest.raises(ValueError, match=r"token_embd\.weight is None"):
        check({}, tensors=())
