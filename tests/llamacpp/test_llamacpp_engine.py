# SPDX-License-Identifier: Apache-2.0
"""`LlamaCppEngine`: its answers are PyTorch's, whatever runs beside them, and what it refuses."""

import gc
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("llama_cpp", reason="the engine llamacpp is an extra")
pytest.importorskip("gguf", reason="the export to GGUF is an extra")

from llamacpp_cases import TEXTS, alone, exported, pytorch, scenes, several_images, shuffled, together

from helpers import WARNINGS_ARE_ERRORS, own_words
from schema_cases import SCHEMAS
from transformers_fastvlm.engines import (
    LlamaCppEngine,
    Sampling,
    TransformersEngine,
    llama_rows,
    llamacpp_engine,
    load_engine,
)
from transformers_fastvlm.engines.llama_library import LlamaContext, LlamaError, LlamaModel
from transformers_fastvlm.engines.llama_rows import LlamaRows

SHORT = Sampling(max_new_tokens=12)
WARM = {"max_new_tokens": 16, "temperature": 2.0, "top_p": 0.99}


@pytest.fixture(scope="module")
def loaded() -> Iterator[LlamaCppEngine]:
    engine = load_engine("llamacpp", str(exported()), precision="float32", device="cpu", threads=1)
    assert isinstance(engine, LlamaCppEngine)
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: LlamaCppEngine) -> LlamaCppEngine:
    """An engine that knows no prompt."""
    if loaded._rows is not None:
        loaded._rows.clear()
    return loaded


@pytest.fixture
def endless(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> LlamaCppEngine:
    """An engine whose answers end by their length only."""
    monkeypatch.setattr(engine, "_end_tokens", set())
    return engine


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows in each step of the model."""
    seen: list[int] = []
    step = LlamaRows.step
    monkeypatch.setattr(LlamaRows, "step", lambda self: (seen.append(len(self.running)), step(self))[1])
    return seen


# Answers


def test_float32_is_pytorch(engine: LlamaCppEngine) -> None:
    """Questions, captions, several images and none, together: texts and counts of tokens."""
    asked = [*scenes(24), *scenes(6, "captions", seed=78), *several_images(6), *TEXTS]
    sampling = Sampling(max_new_tokens=48)
    assert engine.generate(asked, sampling) == pytorch().generate(asked, sampling)
    assert (engine.device, engine.dtype) == ("cpu", "float32")


def test_the_first_precision_that_is_there(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    for expected in llamacpp_engine.PRECISIONS:
        assert llamacpp_engine._precision(folder, None) == expected
        (folder / f"language_model-{expected}.gguf").unlink()


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "llama"])
def test_float32_of_other_checkpoints_is_pytorch(checkpoint: Callable[[str], Path], golden: Path, name: str) -> None:
    images = [Image.open(golden / "images" / file).convert("RGB") for file in ("wide_rgb.png", "tall_rgb.jpg")]
    asked = [*TEXTS]
    for shown in ([images[0]], [images[1]], images):
        parts = [{"type": "image", "image": image} for image in shown]
        asked.append([{"role": "user", "content": [*parts, {"type": "text", "text": "Describe the image."}]}])
    directory = exported(checkpoint(name))
    ours = LlamaCppEngine(directory, threads=1)
    other = TransformersEngine(str(checkpoint(name)), dtype="float32", device="cpu")
    assert ours.generate(asked, Sampling(max_new_tokens=24)) == other.generate(asked, Sampling(max_new_tokens=24))
    ours.close()
    other.close()


@pytest.mark.parametrize("precision", ["float16", "q8_0", "q4_0", "q4_k_m"])
def test_other_precisions_answer_nearly_the_same(precision: str) -> None:
    asked = scenes(12)
    engine = LlamaCppEngine(exported(), precision, threads=1)
    found, expected = (one.generate(asked, SHORT) for one in (engine, pytorch()))
    assert engine.dtype == precision
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 11
    engine.close()


def test_text_comes_as_it_is_made(endless: LlamaCppEngine) -> None:
    request = endless.stream(scenes(1)[0], Sampling(max_new_tokens=40))
    pieces = list(request)
    answer = request.result()
    assert len(pieces) > 10 and "".join(pieces) == answer.text
    assert answer.seconds.first_token is not None
    assert 0 < answer.seconds.first_token < answer.seconds.generate


def test_ends_where_a_text_says(engine: LlamaCppEngine) -> None:
    asked = scenes(3, "captions")
    whole = engine.generate(asked, Sampling(max_new_tokens=32))
    stop = whole[0].text[6:9]
    for before, after in zip(whole, engine.generate(asked, Sampling(max_new_tokens=32, stop=(stop,))), strict=True):
        at = before.text.find(stop)
        assert after.text == (before.text if at < 0 else before.text[:at]).strip()


def test_biases_penalties_and_logprobs_are_those_of_pytorch(engine: LlamaCppEngine) -> None:
    asked = scenes(2)
    for sampling in (
        Sampling(max_new_tokens=8, logprobs=2),
        Sampling(max_new_tokens=8, logit_bias=((40, 5.0),), frequency_penalty=1.5, presence_penalty=1.0),
    ):
        found, expected = (one.generate(asked, sampling) for one in (engine, pytorch()))
        assert found == expected
        for ours, theirs in zip(found, expected, strict=True):
            for noted, right in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
                assert (noted.token, noted.text) == (right.token, right.text)
                assert noted.logprob == pytest.approx(right.logprob, abs=1e-3)


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_follow_a_schema(engine: LlamaCppEngine, name: str) -> None:
    schema, fits = SCHEMAS[name]
    sampling = Sampling(max_new_tokens=160, temperature=1.5, seed=1, schema=schema)
    for answer in [
        *engine.generate(scenes(3), sampling),
        *engine.generate(scenes(3), replace(sampling, temperature=0)),
    ]:
        assert answer.finish_reason == "stop" and fits(answer.text), answer.text


def test_the_placeholder_is_never_chosen(engine: LlamaCppEngine) -> None:
    placeholder = engine.processor.image_token_id
    if placeholder >= engine._vocabulary():
        pytest.skip("the model has no score for the placeholder")
    sampling = Sampling(max_new_tokens=3, logit_bias=((placeholder, 100.0),), logprobs=0)
    answer = engine.stream(scenes(1)[0], sampling).result()
    assert all(one.token != placeholder for one in answer.logprobs or ())


# Rows beside others


def test_rows_come_and_go(engine: LlamaCppEngine, steps: list[int]) -> None:
    """60 rows at random moments, a tenth of them cancelled: each answer is that of its row alone."""
    draw = random.Random(5)
    asked = shuffled([*scenes(48), *several_images(6), *scenes(4, "captions"), *TEXTS[:2]], 1)
    samplings = [Sampling(seed=index, **WARM) if index % 2 else Sampling(max_new_tokens=24) for index in range(60)]
    cancelled = set(draw.sample(range(60), 6))
    requests = []
    for index, (conversation, sampling) in enumerate(zip(asked, samplings, strict=True)):
        requests.append(engine.stream(conversation, sampling))
        if index in cancelled:
            threading.Timer(draw.random() / 10, requests[-1].cancel).start()
        time.sleep(draw.random() / 50)
    answers = [request.result() for request in requests]
    assert max(steps) == engine.batch_size
    for index, (conversation, sampling) in enumerate(zip(asked, samplings, strict=True)):
        whole = engine.stream(conversation, sampling).result()
        if answers[index].finish_reason == "cancelled":
            assert index in cancelled and whole.text.startswith(answers[index].text)
        else:
            assert answers[index] == whole


def test_each_row_samples_by_its_own_seed(engine: LlamaCppEngine, steps: list[int]) -> None:
    asked = scenes(3, "captions")
    rows = [(asked[0], Sampling(seed=seed, **WARM)) for seed in (1, 2, 1)] + [(asked[1], SHORT), (asked[2], SHORT)]
    first = [request.result() for request in together(engine, *rows)]
    again = [request.result() for request in together(engine, *reversed(rows))][::-1]
    assert max(steps) == 5 and first == again == [engine.stream(*row).result() for row in rows]
    assert first[0] == first[2] != first[1]


def test_seeds_are_those_of_pytorch(engine: LlamaCppEngine) -> None:
    """The same random numbers over the same probabilities, up to rounding."""
    asked = scenes(8)
    found, expected = (one.generate(asked, Sampling(seed=3, **WARM)) for one in (engine, pytorch()))
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 7


def test_a_long_prompt_comes_in_pieces(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And other rows get their tokens between the pieces."""
    counts: list[int] = []
    decode = LlamaContext.decode
    monkeypatch.setattr(
        LlamaContext,
        "decode",
        lambda self, *args, **more: (counts.append(len(args[0])), decode(self, *args, **more))[1],
    )
    monkeypatch.setattr(llama_rows, "STEP_TOKENS", 64)
    long = [{"role": "user", "content": "What is the colour of the circle? " * 14}]
    asked = [long, *scenes(2), *several_images(1)]
    before = pytorch().generate(asked, SHORT)
    running = engine.stream(asked[1], Sampling(max_new_tokens=40))
    next(iter(running))
    assert engine.generate(asked, SHORT) == before
    assert max(counts) <= 64 and len(counts) > before[0].prompt_tokens / 64


# The cache


def test_a_second_question_computes_only_what_is_new(engine: LlamaCppEngine) -> None:
    (asked,) = scenes(1, seed=301)
    first = engine.stream(asked, SHORT).result()
    talk = [*asked, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And now?"}]
    second = engine.stream(talk, SHORT).result()
    assert second == pytorch().stream(talk, SHORT).result()
    assert (first.cached_tokens, first.encoded_images, second.encoded_images) == (0, 1, 0)
    assert first.prompt_tokens - 5 < second.cached_tokens < second.prompt_tokens
    (other,) = scenes(1, seed=302)  # the same words before another image
    answer = engine.stream(other, SHORT).result()
    assert answer.cached_tokens < 30 and answer == pytorch().stream(other, SHORT).result()


def test_several_answers_to_one_prompt_compute_it_once(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    decode = LlamaContext.decode
    monkeypatch.setattr(
        LlamaContext,
        "decode",
        lambda self, *args, **more: (counts.append(len(args[0])), decode(self, *args, **more))[1],
    )
    prompt = engine.prepare(scenes(1, seed=303)[0])
    answers = [one.result() for one in engine.submit(prompt, *(Sampling(seed=seed, **WARM) for seed in range(3)))]
    assert sum(counts) <= prompt.tokens + 3 * 16 + 3
    assert [answer.encoded_images for answer in answers] == [1, 0, 0]
    assert answers == [engine.stream(scenes(1, seed=303)[0], Sampling(seed=seed, **WARM)).result() for seed in range(3)]


def test_what_is_kept_is_bounded(engine: LlamaCppEngine) -> None:
    engine.generate(scenes(40), SHORT)
    rows = engine._rows
    assert 0 < len(rows._kept) <= llama_rows.KEPT_SEQUENCES
    assert sum(map(len, rows._kept.values())) <= llama_rows.KEPT_TOKENS
    assert len(rows._free) + len(rows._kept) == engine.batch_size + llama_rows.KEPT_SEQUENCES


def small(engine: LlamaCppEngine, tokens: int) -> None:
    engine._open_rows().grow(tokens)
    assert engine._rows.tokens == tokens


def test_a_full_cache_takes_no_other_with_it(endless: LlamaCppEngine) -> None:
    """Rows give their places up and are computed again; text that was passed on is not said twice."""
    asked = [*scenes(6), *several_images(2)]
    sampling = Sampling(max_new_tokens=150)
    expected = alone(endless, asked, sampling)
    small(endless, 512)
    requests = together(endless, *((one, sampling) for one in asked))
    texts = ["".join(request) for request in requests]
    assert texts == [one.text for one in expected] and [one.result() for one in requests] == expected
    small(endless, 8192)


def test_a_conversation_that_is_longer_than_the_cache(engine: LlamaCppEngine) -> None:
    small(engine, 256)
    long = [{"role": "user", "content": "What is the colour of the circle? " * 30}]
    asked = [*scenes(2), long, *scenes(2, seed=78)]
    assert engine.generate(asked, SHORT) == pytorch().generate(asked, SHORT)
    assert engine._rows.tokens > 256


# Ends that nobody wished for


def test_cancelled_work_ends(endless: LlamaCppEngine) -> None:
    asked = scenes(3)
    running, waiting, beside = together(
        endless, (asked[0], Sampling(max_new_tokens=400)), *((one, SHORT) for one in asked[1:])
    )
    next(iter(running))
    waiting.cancel()
    running.cancel()
    made = running.tokens
    answer = running.result()
    assert answer.finish_reason == "cancelled" and answer.completion_tokens <= made + 1
    assert waiting.result().finish_reason in ("cancelled", "length")
    assert beside.result() == alone(endless, asked[2:], SHORT)[0]
    assert len(endless._rows._free) + len(endless._rows._kept) == endless.batch_size + llama_rows.KEPT_SEQUENCES


def test_a_step_that_fails_is_tried_again_row_by_row(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scenes(3, "captions")
    expected = alone(engine, asked, SHORT)
    engine._rows.clear()
    requests = together(engine, *((one, SHORT) for one in asked))
    decode = LlamaContext.decode

    def fails(self: LlamaContext, *args: Any, **more: Any) -> bool:
        rows = engine._rows.running
        if (len(rows) == 3 and requests[0].tokens == 5) or rows == [requests[2]]:
            raise LlamaError("in the middle")
        return decode(self, *args, **more)

    monkeypatch.setattr(LlamaContext, "decode", fails)
    assert ["".join(one) for one in requests[:2]] == [one.text for one in expected[:2]]
    with pytest.raises(LlamaError):
        requests[2].result()
    monkeypatch.setattr(LlamaContext, "decode", decode)
    assert engine.stream(asked[2], SHORT).result() == expected[2]


@pytest.mark.parametrize("broken", ["shape", "nan"])
def test_an_image_that_cannot_be_encoded_fails_its_request_only(engine: LlamaCppEngine, broken: str) -> None:
    asked = scenes(3, seed=79)
    bad = engine.prepare(asked[0])
    (image,) = bad.inputs["images"]
    value = image.inputs["pixel_values"]
    image.inputs = {"pixel_values": value[..., :64] if broken == "shape" else value * float("nan")}
    first, *others = [*engine.submit(bad, SHORT), *together(engine, *((one, SHORT) for one in asked[1:]))]
    with pytest.raises(Exception, match=r"not finite|features; expected|pixel_values"):
        first.result()
    assert [one.result() for one in others] == pytorch().generate(asked[1:], SHORT)


def test_closing_answers_what_is_queued_and_frees_the_memory() -> None:
    engine = LlamaCppEngine(exported(), "float32", threads=1)
    requests = together(engine, *((one, SHORT) for one in scenes(3)))
    engine.close()
    assert all(request.done and request.answer is not None for request in requests)
    engine.close()
    assert not engine._model._free.alive
    with pytest.raises(RuntimeError, match="thread has ended"):
        engine.submit(requests[0].prompt, SHORT)[0].result()


def test_an_engine_that_is_let_go_frees_the_memory() -> None:
    engine = LlamaCppEngine(exported(), "float32", threads=1)
    engine._open_rows()
    freed = [engine._model._free, engine._rows._context._free]
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None and not any(one.alive for one in freed)


# What is refused


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported(), tmp_path / "copy"))


def swap(name: str, other: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(folder / other, folder / name)


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def change(name: str, before: bytes, after: bytes) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        data = (folder / name).read_bytes()
        assert before in data
        (folder / name).write_bytes(data.replace(before, after, 1))

    return run


LANGUAGE = "language_model-float32.gguf"
WRONG: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no language model": (
        lambda folder: [one.unlink() for one in folder.glob("*.gguf")],
        FileNotFoundError,
        "or none|precisions none",
    ),
    "no encoder": (
        lambda folder: (folder / "vision_encoder.onnx").unlink(),
        FileNotFoundError,
        "vision_encoder.onnx is missing",
    ),
    "an encoder as language model": (swap(LANGUAGE, "vision_encoder.onnx"), OSError, "is not a GGUF file"),
    "a cut language model": (cut(LANGUAGE), OSError, "is damaged"),
    "another config.json": (change("config.json", b"{", b"{ "), ValueError, "belongs to another config.json"),
    "another architecture": (change(LANGUAGE, b"qwen2", b"qwen9"), ValueError, "general.architecture is 'qwen9'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_before_llama_cpp_sees_them(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("llama.cpp saw the file")

    folder = copied(tmp_path)
    spoil, kind, message = WRONG[case]
    spoil(folder)
    monkeypatch.setattr(LlamaModel, "__init__", never)
    with pytest.raises(kind, match=message):
        LlamaCppEngine(folder, "float32" if list(folder.glob("*.gguf")) else None)


def test_an_encoder_of_another_model(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    folder = copied(tmp_path)
    other = exported(checkpoint("qwen2_tied"))
    shutil.copy(other / "vision_encoder.onnx", folder)
    with pytest.raises(ValueError, match=r"vision_encoder\.onnx has .*expected"):
        LlamaCppEngine(folder)


def test_weights_that_llama_cpp_refuses(tmp_path: Path) -> None:
    """A tensor has another name: an error with what llama.cpp says, and nothing is printed."""
    folder = copied(tmp_path)
    change(LANGUAGE, b"blk.1.attn_q.weight", b"blk.1.attn_X.weight")(folder)
    with pytest.raises(LlamaError, match=r"cannot load .*blk\.1\.attn_q\.weight"):
        LlamaCppEngine(folder, "float32")


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "precision": (
        {"precision": "q2_k"},
        FileNotFoundError,
        "language_model-q2_k.gguf; it has the precisions float16, float32, q4_0",
    ),
    "device": ({"device": "abacus"}, ValueError, "device is 'abacus'; expected one of auto, cpu, gpu"),
    "threads": ({"threads": 0}, ValueError, "threads is 0; expected 1 to"),
    "rows": ({"batch_size": 0}, ValueError, "batch_size is 0; expected 1 to 248"),
    "too many rows": ({"batch_size": 249}, ValueError, "batch_size is 249; expected 1 to 248"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options(case: str) -> None:
    options, kind, message = OPTIONS[case]
    with pytest.raises(kind, match=message):
        LlamaCppEngine(exported(), **options)


@pytest.mark.skipif(LlamaModel.can_offload(), reason="this llama-cpp-python was built for a GPU")
@pytest.mark.parametrize("device", ["gpu", "cuda", "metal", "vulkan"])
def test_a_gpu_that_llama_cpp_was_not_built_for(device: str) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}', but .* for the CPU only"):
        LlamaCppEngine(exported(), device=device)


def test_sampling_that_is_refused(engine: LlamaCppEngine) -> None:
    (asked,) = scenes(1)
    with pytest.raises(ValueError, match="the engine llamacpp has no beam search"):
        engine.generate([asked], Sampling(num_beams=2))
    with pytest.raises(ValueError, match="fills the model's context"):
        engine.generate([[{"role": "user", "content": "What? " * 4000}]], SHORT)
    with pytest.raises(ValueError, match="logit_bias has token"):
        engine.generate([asked], Sampling(logit_bias=((10**6, 1.0),)))


# The library's calls


@pytest.fixture(scope="module")
def context() -> Iterator[LlamaContext]:
    model = LlamaModel(exported() / LANGUAGE)
    context = LlamaContext(model, tokens=256, sequences=3, rows=32, threads=1)
    yield context
    context.close()
    model.close()


def rows(count: int = 4, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"sequences": np.zeros(count, int), "positions": np.arange(count)}
    arguments |= {"outputs": np.arange(count) == count - 1, "ids": np.arange(count) + 3}
    return {name: value for name, value in (arguments | changes).items() if value is not None}


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": (rows(0), "there are 0 rows; expected 1 to 32"),
    "too many rows": (rows(33), "there are 33 rows"),
    "neither ids nor embeddings": (rows(ids=None), "either ids or embeddings"),
    "both": (rows(embeddings=np.zeros((4, 8))), "either ids or embeddings"),
    "a negative id": (rows(ids=np.full(4, -1)), "the token ids go from -1 to -1; expected 0 to"),
    "an id above the vocabulary": (
        rows(ids=np.full(4, 10**6)),
        "the token ids go from 1000000 to 1000000; expected 0 to",
    ),
    "another width": (rows(ids=None, embeddings=np.zeros((4, 7), np.float32)), "embeddings has the shape"),
    "another length": (rows(positions=np.arange(5)), "positions has the shape"),
    "a sequence": (rows(sequences=np.full(4, 3)), "the sequences go from 3 to 3; expected 0 to 2"),
    "a negative sequence": (rows(sequences=np.full(4, -1)), "the sequences go from -1 to -1; expected 0 to 2"),
    "a position": (rows(positions=np.arange(4) + 254), "the positions go from 254 to 257; expected 0 to 255"),
    "logits of every row": (rows(outputs=np.ones(4, bool)), "logits are requested for 4 rows"),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls_do_not_reach_the_library(context: LlamaContext, case: str) -> None:
    arguments, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        context.decode(**arguments)


def test_what_the_library_itself_refuses(context: LlamaContext) -> None:
    context.clear()
    with pytest.raises(LlamaError, match=r"cannot compute 4 rows \(code -1\): .*position"):
        context.decode(**rows(positions=np.array([0, 1, 2, 9])))
    with pytest.raises(ValueError, match="row 3 has no logits"):
        context.logits(3)
    assert context.decode(**rows()) and np.isfinite(context.logits(3)).all()
    for call in (lambda: context.remove(3), lambda: context.copy(0, -1, 2)):
        with pytest.raises(ValueError, match=r"the sequences go from .*; expected 0 to 2"):
            call()


def test_a_full_cache_is_no_error(context: LlamaContext) -> None:
    context.clear()
    for start in range(0, 256, 32):
        assert context.decode(**rows(32, positions=np.arange(32) + start, outputs=np.zeros(32, bool)))
    assert not context.decode(**rows(1, sequences=np.ones(1, int)))
    context.remove(0)
    assert context.decode(**rows(1, sequences=np.ones(1, int)))


# The process


def test_nothing_is_printed_and_nothing_is_left(tmp_path: Path) -> None:
    """In a process of its own, in which llama.cpp is new: threads, environment, random state, standard streams."""
    script = tmp_path / "script.py"
    script.write_text(
        "import gc, os, sys, threading, torch\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from llamacpp_cases import scenes\n"
        "from transformers_fastvlm.engines import LlamaCppEngine, Sampling\n"
        "asked, before = scenes(3), (dict(os.environ), torch.get_rng_state(), torch.get_num_threads())\n"
        "engine = LlamaCppEngine(sys.argv[1], 'q4_0', threads=1)\n"
        "engine.generate(asked, Sampling(max_new_tokens=4, temperature=1.0))\n"
        "try:\n"
        "    LlamaCppEngine(sys.argv[1], 'q9')\n"
        "except FileNotFoundError:\n"
        "    pass\n"
        "engine.close()\n"
        "assert dict(os.environ) == before[0] and torch.equal(torch.get_rng_state(), before[1])\n"
        "assert torch.get_num_threads() == before[2] and threading.active_count() == 1\n"
    )
    # llama-cpp-python leaves two files open, /dev/null.
    warnings = [*WARNINGS_ARE_ERRORS, "-W", "ignore::ResourceWarning"]
    command = [sys.executable, *warnings, script, exported(), Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout, own_words(done.stderr)) == (0, "", "")


@pytest.mark.gpu
def test_a_gpu_answers_as_the_cpu() -> None:
    if not LlamaModel.can_offload():
        pytest.skip("this llama-cpp-python was built for the CPU only")
    asked = [*scenes(12), *several_images(2)]
    engine = LlamaCppEngine(exported(), "float32", device="gpu")
    assert engine.generate(asked, SHORT) == pytorch().generate(asked, SHORT)
    engine.close()
