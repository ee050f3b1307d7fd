# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for a language model trained on scenes only, in the file format of Apple's checkpoints."""

import json
import os
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .content import WORDS
from .dataset import SceneDataset

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Words with a leading space, single digits, punctuation, line ends, other space: how Qwen2 cuts text before merging.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n"
    "<|im_end|>\n<|im_start|>assistant\n"
)


def write_tokenizer(directory: str | os.PathLike[str], vocab_size: int = 480, seed: int = 0) -> int:
    """Train a byte-level BPE tokenizer on the text of scenes and write it in the files of a Qwen2 tokenizer.

    Words printed in scenes are split into single letters, so that the model must read letter by letter.

    Args:
        directory: output directory for vocab.json, merges.txt, tokenizer_config.json, added_tokens.json and
            special_tokens_map.json; it is created if needed.
        vocab_size: tokens before the three special ones; at least 256.
        seed: series of the scenes to train on.

    Returns:
        The number of tokens, special ones included.
    """
    printed = re.compile(r"\b(" + "|".join(WORDS) + r")\b")
    texts = [_CHAT] * 50
    for scenes in (SceneDataset(150, seed, "captions"), SceneDataset(150, seed, "conversations")):
        rows = [scenes[index] for index in range(len(scenes))]
        texts += [printed.sub("", message["content"]) for row in rows for message in row["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text.replace("<image>", "") for text in texts), trainer)

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(directory))
    size = tokenizer.get_vocab_size()
    ids = {token: size + number for number, token in enumerate(SPECIAL_TOKENS)}
    added = {str(number): {**_flags(token), "content": token} for token, number in ids.items()}
    special = {
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        **special,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 2048,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    files = {"tokenizer_config.json": config, "added_tokens.json": ids, "special_tokens_map.json": special}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return size + len(SPECIAL_TOKENS)


def _flags(token: str) -> dict[str, bool]:
    flags = AddedToken(token, special=True, normalized=False).__getstate__()
    return {key: bool(flags[key]) for key in ("lstrip", "normalized", "rstrip", "single_word", "special")}
