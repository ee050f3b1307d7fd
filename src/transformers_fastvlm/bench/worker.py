# SPDX-License-Identifier: Apache-2.0
"""The process of one case or engine: it loads the model, and runs it on request of its parent.

It reads one JSON object per line from standard input: first what to measure, then {"run": true} for each run. It writes
one JSON object for each to the original standard output. Output of libraries goes to standard error.
"""

import json
import os
import sys
import time
from typing import Any

from .engine_worker import EngineRunner

__all__ = ["Runner", "main"]


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        runner: Runner | EngineRunner | None = None
        for line in sys.stdin:
            request = json.loads(line)
            if runner is None:
                runner = EngineRunner(request) if "engine" in request else Runner(request)
                answer(runner.facts)
            else:
                answer(runner.run())
    except Exception as error:
        # The parent raises it again; a traceback here would be of no use.
        answer({"error": type(error).__name__, "message": str(error)})


class Runner:
    """A model and the means to measure it.

    Args:
        request: "case" (the fields of a `Case`), "options" (`Options.as_dict()`) and "image" (a file's path).

    Attributes:
        facts: numbers of parameters and tokens, and the seconds of importing and building.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        start = time.perf_counter()
        import torch
        import transformers
        from transformers import GenerationConfig

        from .cases import Case
        from .measuring import Clock, Split, peak_bytes
        from .subjects import build

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.case, self.options, self.image_file = Case(**request["case"]), request["options"], request["image"]
        self.device = torch.device(self.options["device"])
        torch.set_num_threads(self.options["threads"])
        self.dtype = getattr(torch, self.case.dtype)
        self._inference = torch.inference_mode
        self._peak_bytes = peak_bytes
        imported = time.perf_counter()
        self._imports_bytes = peak_bytes(torch.device("cpu"))

        self.clock = Clock(self.device)
        self.subject = build(self.case, self.options)
        loaded = self.clock.now()[0]
        model = self.subject.model
        self.split = Split(self.clock)
        self._checked = False
        # Random weights may choose any token, and a checkpoint may end its answer early.
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        for name, module in (("encode", self.subject.encoder), ("project", self.subject.projector)):
            if module is not None:
                if self.options["compile"]:
                    mode = "reduce-overhead" if self.device.type == "cuda" else "default"
                    module.forward = torch.compile(module.forward, mode=mode)
                self.split.watch(module, name)
        self._generate_options = _decoding(self.options["compile"], self.device)
        inputs = self._inputs()
        ids = inputs["input_ids"]
        image_token_id = getattr(model.config, "image_token_id", None)
        images = 0 if image_token_id is None else int((ids[0] == image_token_id).sum())
        encoder = self.subject.encoder
        self.facts = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "encoder_parameters": None if encoder is None else sum(one.numel() for one in encoder.parameters()),
            "weights": self.subject.weights,
            "class": type(model).__name__,
            "prompt_tokens": ids.shape[1],
            "image_tokens": images or None,
            "image_inputs": list(inputs["pixel_values"].shape) if "pixel_values" in inputs else None,
            "import_seconds": imported - start,
            "load_seconds": loaded - imported,
        }

    def run(self) -> dict[str, Any]:
        """Return the wall and CPU seconds of each part of one answer, and the peak memory."""
        from transformers import LogitsProcessorList

        model, clock, split = self.subject.model, self.clock, self.split
        with self._inference():
            begin = clock.now()
            inputs = self._inputs()
            ready = split.begin()
            processors = LogitsProcessorList([split])
            model.generate(**inputs, **self._length(self.options["new_tokens"]), logits_processor=processors)
            end = whole = split.end()
            if self.device.type != "cpu" or not self._checked:
                # A CPU needs no synchronisation, so one unsplit run is enough to check that the parts add up.
                model.generate(**inputs, **self._length(1))
                whole, self._checked = clock.now(), True
        first, second = split.steps
        result: dict[str, Any] = {"peak_bytes": self._peak_bytes(self.device), "imports_bytes": self._imports_bytes}
        for index, name in enumerate(("seconds", "processor_seconds")):
            parts = {part: seconds[index] for part, seconds in split.parts.items()}
            from_pixels = first[index] - ready[index]
            parts["preprocess"] = ready[index] - begin[index]
            parts["prefill"] = from_pixels - sum(seconds[index] for seconds in split.parts.values())
            parts["first_token_from_pixels"] = from_pixels
            parts["first_token"] = first[index] - begin[index]
            parts["first_decode"] = second[index] - first[index]
            parts["decode"] = (end[index] - second[index]) / (self.options["new_tokens"] - 2)
            if whole is not end:
                parts["unsplit_from_pixels"] = whole[index] - end[index]
            result[name] = parts
        return result

    def _inputs(self) -> dict[str, Any]:
        inputs = self.subject.preprocess([self.image_file] * self.case.batch)
        moved = {}
        for name, value in inputs.items():
            value = value.to(self.device)
            moved[name] = value.to(self.dtype) if value.is_floating_point() else value
        return moved

    def _length(self, tokens: int) -> dict[str, Any]:
        return self._generate_options | {"max_new_tokens": tokens}


def _decoding(compiled: bool, device: Any) -> dict[str, Any]:
    """Return generate()'s options: compiled decoding needs a static cache."""
    if not compiled:
        return {}
    from transformers import CompileConfig

    config = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}
