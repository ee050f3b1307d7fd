# SPDX-License-Identifier: Apache-2.0
"""The engine over onnxruntime: runs the files of `fastvlm export onnx`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedConfig

from .. import FastVLMImageProcessorPil, FastVLMProcessor
from ..processing_fastvlm import chat_template_for
from .base import end_tokens
from .engine import Engine
from .onnx_sessions import open_session, run_and_keep, session_device
from .prompts import Prompt
from .request import Request
from .row_sampling import choose_tokens

__all__ = ["FILE_SUFFIX", "OnnxEngine", "OnnxModel"]

FILE_SUFFIX = {"float32": "", "float16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
"""Suffix of the file names of each precision, as in transformers.js."""


class OnnxModel:
    """The three graphs of an export in one precision.

    Args:
        directory: directory of `fastvlm export onnx`.
        precision: one of the export's precisions; by default float32, or the only one.
        device, threads, prepack: see `open_session`.

    Attributes:
        precision: the loaded precision.
        device: the device; never "auto".
        config: the directory's config.json.

    Raises:
        FileNotFoundError: no such directory or precision.
        ImportError: onnxruntime is not installed.
        ValueError: unknown device, or one that onnxruntime cannot use here.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        precision: str | None = None,
        *,
        device: str = "cpu",
        threads: int | None = None,
        prepack: bool = True,
    ) -> None:
        self.device = session_device(device)
        self.directory = Path(directory)
        found = [name for name, suffix in FILE_SUFFIX.items() if self._file("decoder_model_merged", suffix).is_file()]
        if precision is None:
            precision = "float32" if "float32" in found or len(found) != 1 else found[0]
        if precision not in found:
            raise FileNotFoundError(
                f"{directory} has no ONNX files of precision {precision!r}; it has {', '.join(found) or 'none'}."
            )
        self.precision = precision
        self.config = _json(self.directory / "config.json")
        self._options: dict[str, Any] = {"threads": threads, "prepack": prepack}
        self._sessions: dict[str, Any] = {}

    def _file(self, part: str, suffix: str) -> Path:
        return self.directory / "onnx" / f"{part}{suffix}.onnx"

    def session(self, part: str) -> Any:
        """Return the session of `vision_encoder`, `embed_tokens` or `decoder_model_merged`, loaded on first use."""
        if part not in self._sessions:
            path = self._file(part, FILE_SUFFIX[self.precision])
            self._sessions[part] = open_session(path, device=self.device, **self._options)
        return self._sessions[part]

    def close(self) -> None:
        """Free the sessions' memory; the next use loads them again."""
        self._sessions.clear()

    def image_features(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return (images, tokens, hidden) of pixel values (images, 3, height, width)."""
        (features,) = self.session("vision_encoder").run(None, {"pixel_values": pixel_values.astype(np.float32)})
        return features

    def embeddings(self, input_ids: np.ndarray) -> np.ndarray:
        """Return (batch, length, hidden) of token ids (batch, length)."""
        (embeds,) = self.session("embed_tokens").run(None, {"input_ids": input_ids.astype(np.int64)})
        return embeds

    def decode(
        self,
        inputs_embeds: np.ndarray,
        attention_mask: np.ndarray,
        past: dict[str, Any] | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Run new tokens.

        Args:
            inputs_embeds: (batch, length, hidden).
            attention_mask: (batch, past + length), 1 for tokens and 0 for padding.
            past: keys and values that the last call returned; None at the start.
            logits_to_keep: number of last positions whose logits are returned; 0 for all.

        Returns:
            Logits (batch, positions, vocabulary), and keys and values of all tokens by the names of the graph's inputs:
            arrays, or on a GPU the runtime's own values, which stay there.
        """
        session = self.session("decoder_model_merged")
        batch, length = inputs_embeds.shape[:2]
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -length:]
        feeds = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask.astype(np.int64),
            "position_ids": positions.astype(np.int64),
        }
        inputs = session.get_inputs()
        caches = [entry for entry in inputs if entry.name.startswith("past_key_values.")]
        if any(entry.name == "num_logits_to_keep" for entry in inputs):  # older exports have no such input
            feeds["num_logits_to_keep"] = np.array(logits_to_keep, dtype=np.int64)
        if past is None:
            past = {e.name: np.zeros((batch, e.shape[1], 0, e.shape[3]), dtype=np.float32) for e in caches}
        logits, *present = run_and_keep(session, feeds | past)
        return logits[:, -logits_to_keep:], {entry.name: kept for entry, kept in zip(caches, present, strict=True)}

    def merge(self, input_ids: np.ndarray, features: np.ndarray | None) -> np.ndarray:
        """Return the embeddings of `input_ids` with image features, in order, at the placeholders.

        Raises:
            ValueError: their numbers differ.
        """
        embeds = self.embeddings(input_ids)
        places = input_ids == self.config.get("image_token_index")
        flat = np.zeros((0, embeds.shape[-1]), embeds.dtype) if features is None else np.concatenate([*features])
        if places.sum() != len(flat):
            raise ValueError(f"The prompt has {places.sum()} image tokens, but the images have {len(flat)} features.")
        embeds[places] = flat
        return embeds


class OnnxEngine(Engine):
    """An `Engine` on onnxruntime, with this package's processor. It answers one request at a time.

    Args:
        directory: directory of `fastvlm export onnx`.
        precision: see `OnnxModel`.
        device: "auto" (CUDA, else DirectML, else the CPU), "cpu", "cuda", "cuda:1", "directml" or "coreml", as far as
            the installed package of onnxruntime has it.
        threads: threads on the CPU; by default as many as PyTorch uses.

    Attributes:
        model: the `OnnxModel`.
        processor: the `FastVLMProcessor`.

    Raises:
        FileNotFoundError: no such directory or precision.
        ImportError: onnxruntime is not installed.
        ValueError: the directory's config.json is not from such an export, or onnxruntime cannot use the device here.

    Example:
        >>> engine = OnnxEngine("fastvlm-onnx", "q4f16")  # doctest: +SKIP
        >>> question = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]  # doctest: +SKIP
        >>> engine.generate([[{"role": "user", "content": question}]])[0].text  # doctest: +SKIP
    """

    _NAME = "onnx"

    def __init__(
        self,
        directory: str | os.PathLike[str],
        precision: str | None = None,
        *,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.model = OnnxModel(directory, precision, device=device, threads=threads)
        if self.model.device != "cpu":
            self.model.session("embed_tokens")  # a device that does not start is an error here, not of a request
        super().__init__(_processor(self.model), batch_size=1)
        ends = _json(self.model.directory / "generation_config.json").get("eos_token_id")
        self._end_tokens = end_tokens(self.model.config.get("eos_token_id") if ends is None else ends)

    @property
    def device(self) -> str:
        """Device of the graphs."""
        return self.model.device

    @property
    def dtype(self) -> str:
        """Precision of the export."""
        return self.model.precision

    def close(self) -> None:
        """Answer the queued requests, end the thread and free the memory."""
        super().close()
        self.model.close()

    def _ends(self) -> set[int]:
        return self._end_tokens

    def _vocabulary(self) -> int:
        return int(self.model.config.get("text_config", self.model.config)["vocab_size"])

    def _encoded(self, prompt: Prompt) -> Prompt:
        if prompt.images:
            prompt.inputs = dict(self.processor.image_processor(prompt.images, return_tensors="np"))
            prompt.images = []
        return prompt

    def _answer(self, request: Request) -> None:
        ids = np.array([request.prompt.expanded()])
        pixels = request.prompt.inputs.get("pixel_values")
        embeds = self.model.merge(ids, None if pixels is None else self.model.image_features(np.asarray(pixels)))
        mask, choosers = np.ones_like(ids), [self._chooser(request)]
        logits, past = self.model.decode(embeds, mask, logits_to_keep=1)
        while not request.take(token := choose_tokens(choosers, torch.from_numpy(logits[:, -1]))[0]):
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            logits, past = self.model.decode(self.model.embeddings(np.array([[token]])), mask, past, logits_to_keep=1)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _processor(model: OnnxModel) -> FastVLMProcessor:
    """Build this package's processor for a directory whose processor files are for transformers.js."""
    directory, config = model.directory, model.config
    crop = _json(directory / "preprocessor_config.json").get("crop_size") or {}
    if "image_token_index" not in config or not crop:
        raise ValueError(
            f"{directory} lacks the config.json and preprocessor_config.json that `fastvlm export onnx` writes; export "
            "it again."
        )
    text = config.get("text_config", config)
    images = FastVLMImageProcessorPil(size=crop, image_aspect_ratio=config["image_aspect_ratio"])
    # With an empty configuration, the tokenizer's files determine its class.
    tokenizer = AutoTokenizer.from_pretrained(directory, config=PreTrainedConfig(), padding_side="left")
    kind = "llama" if text["model_type"] in ("llama", "llava_llama") else "qwen2"
    return FastVLMProcessor(
        images,
        tokenizer,
        chat_template=chat_template_for(kind),
        context_length=text.get("max_position_embeddings"),
    )
