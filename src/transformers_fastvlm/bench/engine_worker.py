# SPDX-License-Identifier: Apache-2.0
"""An engine in the process that measures it, through the interface that all tools use."""

import atexit
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["QUESTION", "EngineRunner"]

QUESTION = "Describe the picture."

_REST = 0.25
"""Idle seconds before a run, until the threads of the other processes no longer spin."""

_CORNER = 16
"""This part of height and width is painted over in each image."""


class EngineRunner:
    """An engine and the means to measure it.

    Args:
        request: "engine" (the fields of an `EngineCase`), "threads", "new_tokens" and "image" (a file's path).

    Attributes:
        facts: device, precision and image size of the engine, and the seconds of importing and loading.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        start = time.perf_counter()
        import torch
        import transformers

        from ..engines import Sampling, load_engine
        from .engine_cases import EngineCase
        from .measuring import peak_bytes

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(request["threads"])  # the default of engines that set no number of threads
        imported = time.perf_counter()
        self._imports_bytes = peak_bytes(torch.device("cpu"))
        case = EngineCase(**request["engine"])
        self.engine = load_engine(case.engine, case.model, **case.load_options())
        loaded = time.perf_counter()
        self._folder = tempfile.TemporaryDirectory()
        atexit.register(self.close)
        self._image_file, self._runs = request["image"], 0
        self._peak_bytes = peak_bytes
        on_gpu = self.engine.device.startswith(("cuda", "mps"))  # other devices have names of the runtime
        self._device = torch.device(self.engine.device if on_gpu else "cpu")
        self._sampling = Sampling(max_new_tokens=1)
        first = self.run()  # for engines that read their files at the first request
        self._sampling = Sampling(max_new_tokens=request["new_tokens"])
        self.facts: dict[str, Any] = {
            "device": self.engine.device,
            "precision": self.engine.dtype,
            "size": self.engine.size,
            "prompt_tokens": first["prompt_tokens"],
            "image_tokens": first["image_tokens"],
            "load_seconds": {
                "import": imported - start,
                "engine": loaded - imported,
                "first_answer": first["seconds"]["first_token"],
            },
        }

    def run(self) -> dict[str, Any]:
        """Ask about an image that no earlier run had; return the wall seconds of its parts, and the peak memory.

        "decode" is the time of one token after the first; it is missing if the answer has no second token.
        """
        from ..images.reading import read_file

        path = self._new_image()
        time.sleep(_REST)
        begin = time.perf_counter()
        content = [
            {"type": "image", "image": read_file(path, f"the image file {path!r}")},
            {"type": "text", "text": QUESTION},
        ]
        read = time.perf_counter()
        request = self.engine.stream([{"role": "user", "content": content}], self._sampling)
        answer = request.result()
        assert request.first_at is not None and request.ended_at is not None
        seconds = {"preprocess": read - begin + answer.seconds.prepare, "first_token": request.first_at - begin}
        if answer.completion_tokens > 1:
            seconds["decode"] = (request.ended_at - request.first_at) / (answer.completion_tokens - 1)
        return {
            "seconds": seconds,
            "tokens": answer.completion_tokens,
            "prompt_tokens": answer.prompt_tokens,
            "image_tokens": answer.image_tokens,
            "peak_bytes": self._peak_bytes(self._device) or None,  # 0 if PyTorch does not hold the device's memory
            "imports_bytes": self._imports_bytes,
        }

    def close(self) -> None:
        """Close the engine, and remove the image."""
        atexit.unregister(self.close)
        self.engine.close()
        self._folder.cleanup()

    def _new_image(self) -> str:
        """Write the image with a corner of another colour, so that no features of an earlier run can be used."""
        from PIL import ImageDraw

        from ..images.reading import read_file

        self._runs += 1
        image = read_file(self._image_file, f"the image file {self._image_file!r}").convert("RGB")
        colour = tuple(self._runs * step % 256 for step in (37, 91, 151))
        ImageDraw.Draw(image).rectangle((0, 0, image.width // _CORNER, image.height // _CORNER), fill=colour)
        path = Path(self._folder.name) / "image.jpg"
        image.save(path, "JPEG", quality=92)
        return str(path)
