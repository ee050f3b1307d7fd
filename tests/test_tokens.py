# SPDX-License-Identifier: Apache-2.0
"""The id of <image> read from files is the one that the tokenizer itself gives it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from transformers_fastvlm.tokens import IMAGE_TOKEN, image_token_id_of

QWEN2_5_ADDED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip


def load(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer without reading config.json."""
    return AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig())


def id_after_adding(folder: Path) -> int:
    tokenizer = load(folder)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A copy of the golden tokenizer's files, to be changed."""
    return shutil.copytree(golden / "tokenizer", tmp_path / "tokenizer")


@pytest.fixture
def change(folder: Path) -> Callable[..., None]:
    """Rewrite keys of tokenizer_config.json; None as the value of `drop` names keys to leave out."""

    def apply(drop: tuple[str, ...] = (), **changes: Any) -> None:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))

    return apply


def decoder(tokens: dict[int, str]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(index): {"content": token, **flags} for index, token in tokens.items()}


def test_golden_tokenizer(golden: Path) -> None:
    assert image_token_id_of(golden / "tokenizer") == 483 == id_after_adding(golden / "tokenizer")


def test_twenty_two_added_tokens(folder: Path, change: Callable[..., None]) -> None:
    change(added_tokens_decoder=decoder({480 + index: token for index, token in enumerate(QWEN2_5_ADDED)}))
    assert image_token_id_of(folder) == 502 == id_after_adding(folder)


def test_gaps_are_closed_as_the_tokenizer_closes_them(folder: Path, change: Callable[..., None]) -> None:
    tokens = {480: "<|endoftext|>", 481: "<|im_start|>", 482: "<|im_end|>", 490: "<a>", 600: "<b>"}
    change(added_tokens_decoder=decoder(tokens))
    assert image_token_id_of(folder) == id_after_adding(folder) == 485


@pytest.mark.parametrize("position", [482, 483, 490])
def test_existing_image_token(folder: Path, change: Callable[..., None], position: int) -> None:
    tokens = {480: "<|endoftext|>", 481: "<|im_start|>", position: IMAGE_TOKEN, 484: "<|im_end|>", 700: "<a>"}
    change(added_tokens_decoder=decoder(tokens))
    assert image_token_id_of(folder) == id_after_adding(folder) == load(folder).convert_tokens_to_ids(IMAGE_TOKEN)


def test_image_token_in_the_vocabulary(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {IMAGE_TOKEN: len(vocabulary)}))
    assert image_token_id_of(folder) == id_after_adding(folder) == 480


@pytest.mark.parametrize("drop", [(), ("additional_special_tokens",)])
@pytest.mark.parametrize(
    "special",
    [
        None,
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<c>", "<d>"]},
        {"eos_token": {"content": "<e>"}, "extra_special_tokens": ["<c>", {"content": "<|im_start|>"}]},
        {"extra_special_tokens": {"image_token": IMAGE_TOKEN, "cat_token": "<c>"}},
    ],
)
def test_legacy_files(
    folder: Path, change: Callable[..., None], special: dict[str, Any] | None, drop: tuple[str, ...]
) -> None:
    """added_tokens.json and special_tokens_map.json, without added_tokens_decoder."""
    change(drop=("added_tokens_decoder", *drop))
    added = {"<|endoftext|>": 480, "<|im_start|>": 481, "<|im_end|>": 482, "<z>": 495}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    if special:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    assert image_token_id_of(folder) == id_after_adding(folder)


@pytest.mark.parametrize(
    ("drop", "changes"),
    [
        (("added_tokens_decoder",), {}),
        (("added_tokens_decoder", "additional_special_tokens", "eos_token", "pad_token", "unk_token"), {}),
        ((), {"additional_special_tokens": ["<e>", "<f>"], "pad_token": {"content": "<pad>", "__type": "AddedToken"}}),
        ((), {"extra_special_tokens": {"video_token": "<video>"}}),
        ((), {"video_token": "<video>", "cls_token": "<cls>"}),
        ((), {"image_token": IMAGE_TOKEN, "audio_token": "<audio>"}),
    ],
)
def test_special_tokens(folder: Path, change: Callable[..., None], drop: tuple[str, ...], changes: Any) -> None:
    change(drop=drop, **changes)
    assert image_token_id_of(folder) == id_after_adding(folder)


@pytest.mark.parametrize("with_image", [False, True])
def test_saved_tokenizer(folder: Path, tmp_path: Path, with_image: bool) -> None:
    """What Transformers 5 writes: tokenizer.json, and no list of added tokens in tokenizer_config.json."""
    tokenizer = load(folder)
    if with_image:
        tokenizer.add_tokens([IMAGE_TOKEN, "<more>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert image_token_id_of(tmp_path / "saved") == 483 == id_after_adding(tmp_path / "saved")


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2TokenizerFast"])
def test_other_classes_on_tokenizer_json(folder: Path, tmp_path: Path, tokenizer_class: str) -> None:
    load(folder).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    path.write_text(json.dumps(config))
    assert image_token_id_of(tmp_path / "saved") == id_after_adding(tmp_path / "saved")


def test_class_known_to_transformers_only(tmp_path: Path) -> None:
    """A tokenizer with unsupported files is loaded to find the id."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert image_token_id_of(tmp_path) == id_after_adding(tmp_path) == len(words)


def sentencepiece_model(pieces: list[str]) -> bytes:
    """A SentencePiece model's protocol buffer with these pieces, scores, types and a trainer section."""
    message = b""
    for index, piece in enumerate(pieces):
        text = piece.encode()
        entry = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x80\x3f" + b"\x18" + bytes([1 + index % 3])
        message += b"\x0a" + bytes([len(entry)]) + entry
    return message + b"\x12\x03\x18\xc8\x01"


def test_sentencepiece_model(tmp_path: Path) -> None:
    """Vicuna has only tokenizer.model; its id is found without the sentencepiece package."""
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    pieces = ["<unk>", "<s>", "</s>", *(f"▁piece{index}" for index in range(297))]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    assert image_token_id_of(tmp_path) == 300
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 300}))
    assert image_token_id_of(tmp_path) == 301


@pytest.mark.parametrize("content", [b"", b"not a model", sentencepiece_model(["<unk>", "cat"])[:-9]])
def test_damaged_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        image_token_id_of(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("vocab.json", "{"), ("vocab.json", "[]"), ("vocab.json", "{}")])
def test_damaged_vocabulary(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=r"vocab\.json"):
        image_token_id_of(folder)


def test_rewritten_files_are_read_again(folder: Path, change: Callable[..., None]) -> None:
    assert image_token_id_of(folder) == 483
    change(cls_token="<cls>")
    assert image_token_id_of(folder) == 484


def test_no_tokenizer(tmp_path: Path) -> None:
    assert image_token_id_of(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert image_token_id_of(tmp_path) is None


def test_subfolder_and_ignored_arguments(golden: Path) -> None:
    assert image_token_id_of(golden, subfolder="tokenizer", trust_remote_code=True) == 483


def test_unreachable_repository(tmp_path: Path) -> None:
    """Without network and cache the id is None and no error is raised: reading a configuration must work."""
    assert image_token_id_of("nobody/nothing", cache_dir=tmp_path, local_files_only=True) is None
