# SPDX-License-Identifier: Apache-2.0
"""The engine over llama.cpp: answers from a directory of `fastvlm export gguf`."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from .. import FastVLMProcessor
from .base import end_tokens
from .batching_engine import BatchingEngine, Rows
from .gguf_checks import check_gguf
from .gguf_header import read_gguf_header
from .llama_library import MAX_SEQUENCES, LlamaContext, LlamaError, LlamaModel
from .llama_rows import KEPT_SEQUENCES, STEP_TOKENS, LlamaRows
from .model_loading import check_tokenizer
from .onnx_sessions import open_session
from .openmp import OpenMPThreads

__all__ = ["DEVICES", "PRECISIONS", "LlamaCppEngine"]

DEVICES = ("auto", "cpu", "gpu", "cuda", "metal", "vulkan")
"""Names of devices. llama-cpp-python is built for one kind of GPU, which all but "cpu" mean."""

PRECISIONS = ("q8_0", "float32", "float16", "q4_0", "q4_k_m")
"""Precisions of an export; the first is the default."""

ROW_TOKENS = 1024
"""Capacity of the cache in tokens per row, on average; a longer conversation gets a larger cache."""

MAX_THREADS = 512

_FILE = "language_model-{}.gguf"
_ENCODER = "vision_encoder.onnx"


class LlamaCppEngine(BatchingEngine):
    """An `Engine` on llama.cpp, with continuous batching; images are encoded by onnxruntime.

    Each request gets a sequence: it joins the others as soon as one is free, gets one token in each step of
    the model, and leaves when its answer ends. Prompts that begin with the same tokens and images compute this
    beginning only once. With precision float32, the tokens of greedy decoding are PyTorch's.

    Args:
        directory: directory of `fastvlm export gguf`.
        precision: one of the export's precisions; by default the first one present of q8_0, float32, float16, q4_0
            and q4_k_m.
        device: "cpu"; or "gpu", "cuda", "metal" or "vulkan" for the GPU that the installed llama-cpp-python was built
            for; or "auto", the GPU if there is one. Images are always encoded on the CPU.
        threads: threads on the CPU; by default as many as PyTorch uses. More threads than free cores are much slower.
        batch_size: maximum number of rows, and of images that are encoded together; at most 248.

    Attributes:
        processor: the `FastVLMProcessor`.

    Raises:
        FileNotFoundError: no such directory or precision.
        ImportError: llama-cpp-python or onnxruntime is not installed.
        LlamaError: llama.cpp cannot load the file, or there is not enough memory.
        OSError: a file is damaged.
        ValueError: an invalid option, a device that llama.cpp was not built for, or files of different exports.

    Example:
        >>> engine = LlamaCppEngine("fastvlm-gguf", "q8_0")  # doctest: +SKIP
        >>> question = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]  # doctest: +SKIP
        >>> engine.generate([[{"role": "user", "content": question}]])[0].text  # doctest: +SKIP
    """

    _NAME = "llamacpp"

    def __init__(
        self,
        directory: str | os.PathLike[str],
        precision: str | None = None,
        *,
        device: str = "auto",
        threads: int | None = None,
        batch_size: int = 8,
    ) -> None:
        directory = Path(directory)
        offload = _offloads(device)
        limits = {"threads": (threads, MAX_THREADS), "batch_size": (batch_size, MAX_SEQUENCES - KEPT_SEQUENCES)}
        for name, (value, most) in limits.items():
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} is {value}; expected 1 to {most}.")
        self._precision = _precision(directory, precision)
        config: Any = AutoConfig.from_pretrained(directory)
        processor = FastVLMProcessor.from_pretrained(directory)
        check_tokenizer(str(directory), config, processor)
        path = directory / _FILE.format(self._precision)
        check_gguf(read_gguf_header(path), config, directory / "config.json")
        super().__init__(processor, batch_size)
        self._config, self._device = config, device if device not in ("auto", "gpu") else "gpu" if offload else "cpu"
        ends = GenerationConfig.from_pretrained(directory).eos_token_id
        self._end_tokens = end_tokens(config.get_text_config().eos_token_id if ends is None else ends)
        self._threads = threads or torch.get_num_threads()
        self._vision = _VisionEncoder(
            directory / _ENCODER, self.size, config.get_text_config().hidden_size, self._threads
        )
        self._model = LlamaModel(path, offload=offload)
        self._openmp = OpenMPThreads()  # the library may have brought another OpenMP

    @property
    def device(self) -> str:
        """Device of the language model: "cpu", or the name of the GPU as it was given."""
        return self._device

    @property
    def dtype(self) -> str:
        """Precision of the language model."""
        return self._precision

    def close(self) -> None:
        """Answer the queued requests, end the thread and free the memory; the engine cannot be used afterwards."""
        super().close()
        self._model.close()
        self._vision.close()

    def _ends(self) -> set[int]:
        return self._end_tokens

    def _vocabulary(self) -> int:
        return int(self._config.get_text_config().vocab_size)

    @property
    def _encoder(self) -> Any:
        return self._vision

    # In the model's thread

    def _open_rows(self) -> Rows:
        if self._rows is None:
            self._rows = LlamaRows(
                self._open_context,
                self._images,
                rows=self.batch_size,
                tokens=ROW_TOKENS * self.batch_size,
                placeholder=self._config.image_token_id,
            )
        rows: LlamaRows = self._rows
        return rows

    def _open_context(self, tokens: int) -> LlamaContext:
        return LlamaContext(
            self._model,
            tokens=tokens,
            sequences=self.batch_size + KEPT_SEQUENCES,
            rows=STEP_TOKENS,
            threads=self._threads,
            exact=self._precision == "float32",
        )

    def _next_unfit(self, rows: Any) -> None:
        """Open a cache in which the first waiting request fits."""
        request = self._first()
        if request is None:
            return
        try:
            rows.grow(request.prompt.tokens + request.max_tokens)
        except LlamaError as error:
            if self._leave_queue(request):
                request.end(error)


class _VisionEncoder:
    """The graph of encoder and projector, in the form of the model that `ImageTable.encode` takes.

    Args:
        path: the ONNX file.
        size: height and width of images.
        hidden_size: width of the features.
        threads: number of threads.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path, size: int, hidden_size: int, threads: int) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. Export the model again with `fastvlm export gguf`.")
        self._session = open_session(path, threads=threads)
        sides, width = self._session.get_inputs()[0].shape[-2:], self._session.get_outputs()[0].shape[-1]
        for what, found, expected in (
            ("height", sides[0], size),
            ("width", sides[1], size),
            ("hidden_size", width, hidden_size),
        ):
            if isinstance(found, int) and found != expected:
                raise ValueError(
                    f"{path} has {what} {found}; expected {expected}, as in the configuration files beside it. The "
                    "files belong to different exports."
                )
        self._hidden_size = hidden_size

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Any:
        """Return an object whose `pooler_output` has the features (images, tokens, hidden_size) of images.

        Args:
            pixel_values: (images, 3, height, width).

        Raises:
            ValueError: the features are not finite, or have another width.
        """
        (features,) = self._session.run(None, {"pixel_values": np.asarray(pixel_values, np.float32)})
        if features.shape[-1] != self._hidden_size or not np.isfinite(features).all():
            raise ValueError(
                f"the encoder's features have the width {features.shape[-1]} (expected {self._hidden_size}) or are not "
                "finite. Its weights hold NaN or infinity: export the model again."
            )
        return SimpleNamespace(pooler_output=torch.from_numpy(features))

    def close(self) -> None:
        """Free the memory."""
        self._session = None


def _offloads(device: str) -> bool:
    """Return whether a device is a GPU, after a check that llama.cpp was built for one."""
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; expected one of {', '.join(DEVICES)}.")
    can = LlamaModel.can_offload()
    if device not in ("auto", "cpu") and not can:
        raise ValueError(
            f"device is {device!r}, but the installed llama-cpp-python was built for the CPU only. Install it with "
            "this GPU's support (CMAKE_ARGS, such as -DGGML_CUDA=on; see its documentation), or choose device 'cpu'."
        )
    return can and device != "cpu"


def _precision(directory: Path, precision: str | None) -> str:
    """Return the precision to load, which the directory has."""
    start, end = _FILE.split("{}")
    found = sorted(path.name[len(start) : -len(end)] for path in directory.glob(_FILE.format("*")))
    if precision is None:
        precision = next((name for name in PRECISIONS if name in found), None)
    if precision not in found:
        raise FileNotFoundError(
            f"{directory} has no {_FILE.format(precision or '*')}; it has the precisions {', '.join(found) or 'none'}. "
            "Expected a directory of `fastvlm export gguf`."
        )
    return precision
