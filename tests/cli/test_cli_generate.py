# SPDX-License-Identifier: Apache-2.0
"""`fastvlm generate`: the golden answers, its input and output, and what it refuses."""

import _thread
import http.server
import json
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer

from transformers_fastvlm.cli.cli_images import question
from transformers_fastvlm.engines import Request
from transformers_fastvlm.engines.continuous_rows import ContinuousRows
from transformers_fastvlm.images.read_options import ReadOptions

QUESTION = "Describe the image."


@pytest.fixture
def model(checkpoint) -> Path:
    return checkpoint("qwen2_untied")


@pytest.fixture
def wide(golden) -> Path:
    return golden / "images" / "wide_rgb.png"


@pytest.fixture
def ask(run):
    """Run `fastvlm generate --json` for a few tokens and return the object."""

    def call(*words: Any, stdin: str | bytes = "") -> dict[str, Any]:
        result: dict[str, Any] = json.loads(
            run("generate", *words, "--max-new-tokens", 6, "--json", stdin=stdin).stdout
        )
        return result

    return call


def golden_answer(golden: Path, model: Path, case: str, tokens: int) -> str:
    """Return the reference's greedy answer as text, cut after `tokens` tokens or where the model ends it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with safe_open(golden / model.name / "expected.safetensors", "np") as expected:
        ids = expected.get_tensor(f"{case}.greedy").tolist()[:tokens]
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "qwen2_anyres"])
def test_answers_as_the_reference(checkpoint, golden, run, name: str) -> None:
    case = json.loads((golden / name / "expected.json").read_text())["single0"]
    image = golden / "images" / case["image"]
    result = run("generate", image, "-p", QUESTION, "--model", checkpoint(name), "--max-new-tokens", 8)
    assert result.stdout == golden_answer(golden, checkpoint(name), "single0", 8) + "\n"


def test_two_images_as_the_reference(model, golden, ask) -> None:
    case = json.loads((golden / model.name / "expected.json").read_text())["two_images"]
    images = [golden / "images" / name for name in case["images"]]
    text = "How many dogs are there, and what colour is the sign?"
    first = ask(*images, "-p", text, "-m", model)
    assert first["answer"] == golden_answer(golden, model, "two_images", 6)
    assert (first["tokens"]["prompt"], first["tokens"]["image"]) == (case["length"], 32)
    assert ask(*images, "-p", f"<image>\n<image>\n{text}", "-m", model)["tokens"] == first["tokens"]


def test_json(model, wide, ask) -> None:
    result = ask(wide, "-p", QUESTION, "-m", model, "--system", "Be brief.")
    assert result["model"] == str(model) and result["images"] == [str(wide)]
    assert (result["prompt"], result["system"]) == (QUESTION, "Be brief.")
    assert result["tokens"]["image"] == 16 and 0 < result["tokens"]["answer"] <= 6
    assert result["finish_reason"] in ("stop", "length") and result["engine"] == "transformers"
    assert (result["device"].split(":")[0], result["dtype"], result["size"]) == (auto_device(), "float32", 256)
    assert list(result["seconds"]) == ["load", "preprocess", "first_token", "generate"]
    assert 0 < result["seconds"]["first_token"] <= result["seconds"]["generate"]


def auto_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def test_text_only(checkpoint, ask) -> None:
    result = ask("-p", "Read the text.", "-m", checkpoint("llama"))
    assert result["images"] == [] and result["tokens"]["image"] == 0 and result["answer"]


def test_reads_standard_input(model, wide, ask) -> None:
    result = ask("-", "-p", QUESTION, "-m", model, stdin=wide.read_bytes())
    assert result["images"] == ["-"]
    assert result["answer"] == ask(wide, "-p", QUESTION, "-m", model)["answer"]


@pytest.fixture
def server(golden) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(golden / "images"))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_downloads_an_image(model, wide, ask, fails, server: str) -> None:
    result = ask(f"{server}/wide_rgb.png", "-p", QUESTION, "-m", model)
    assert result["answer"] == ask(wide, "-p", QUESTION, "-m", model)["answer"]
    assert "could not download" in fails("generate", "http://127.0.0.1:1/none.png", "-p", QUESTION, "-m", model)


def test_images_are_turned_by_exif(model, tmp_path, ask) -> None:
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 0, 20, 32))
    image.save(tmp_path / "turned.png", exif=exif_orientation(6))
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "plain.png")
    seen = []
    processor = AutoProcessor.from_pretrained(model)

    def pixels(conversation: Any) -> torch.Tensor:
        return processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt"
        ).pixel_values

    from transformers_fastvlm.cli.cli_images import read_images

    for name, turns in (("turned", True), ("turned", False), ("plain", True)):
        images = read_images([str(tmp_path / f"{name}.png")], ReadOptions(do_exif_transpose=turns))
        seen.append(pixels([{"role": "user", "content": question("?", images)}]))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[2])
    assert ask(tmp_path / "turned.png", "-p", "?", "-m", model, "--no-exif-transpose")["tokens"]["image"] == 16


def exif_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize(("name", "tokens"), [("qwen2_tied", 64), ("qwen2_anyres", None)])
def test_size(checkpoint, wide, ask, name: str, tokens: int | None) -> None:
    small = ask(wide, "-p", QUESTION, "-m", checkpoint(name))
    large = ask(wide, "-p", QUESTION, "-m", checkpoint(name), "--size", 512)
    assert large["size"] == 512 and large["tokens"]["image"] > small["tokens"]["image"]
    assert tokens in (None, large["tokens"]["image"])


def test_dtype(model, copy_of, ask) -> None:
    assert ask("-p", "?", "-m", model, "--dtype", "bfloat16", "--device", "cpu")["dtype"] == "bfloat16"
    half = copy_of("qwen2_untied")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    assert ask("-p", "?", "-m", half, "--device", "cpu")["dtype"] == "float32"
    assert ask("-p", "?", "-m", half, "--device", "cpu", "--dtype", "float16")["dtype"] == "float16"


def test_sampling_by_seed(checkpoint, wide, ask) -> None:
    options = (wide, "-p", QUESTION, "-m", checkpoint("qwen2_untied"), "--temperature", 2, "--top-p", 0.99)
    answers = [ask(*options, "--seed", seed)["answer"] for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1] and len(set(answers)) > 1


def test_greedy_although_the_checkpoint_samples(copy_of, wide, ask) -> None:
    model = copy_of("qwen2_untied")
    config = json.loads((model / "generation_config.json").read_text())
    assert config["do_sample"]
    answers = {ask(wide, "-p", QUESTION, "-m", model)["answer"] for _ in range(3)}
    config |= {"num_beams": 2, "num_return_sequences": 2, "return_dict_in_generate": True}
    (model / "generation_config.json").write_text(json.dumps(config))
    assert {ask(wide, "-p", QUESTION, "-m", model)["answer"]} == answers and len(answers) == 1


def test_beams(model, wide, ask) -> None:
    result = ask(wide, wide, "-p", QUESTION, "-m", model, "--num-beams", 2)
    assert result["seconds"]["first_token"] is None and result["tokens"]["answer"] > 0


def test_says_by_what_an_answer_was_cut(checkpoint, copy_of, run, ask) -> None:
    words = ("generate", "-p", "Read the text.")
    assert (
        "cut after 2 tokens; --max-new-tokens allows"
        in run(*words, "-m", checkpoint("llama"), "--max-new-tokens", 2).stderr
    )
    model = copy_of("llama")
    config = json.loads((model / "config.json").read_text())
    prompt = ask("-p", "Read the text.", "-m", model)["tokens"]["prompt"]
    for room, expected in ((3, "cut after 3 tokens; the model's context is full"), (0, "leaves none for the answer")):
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": prompt + room}))
        assert expected in run(*words, "-m", model, code=0 if room else 2).stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Which?", ["image", "image", "Which?"]),
        ("<image> or <image>?", ["image", " or ", "image", "?"]),
        ("First <image>, then <image>", ["First ", "image", ", then ", "image"]),
    ],
)
def test_places_of_images(text: str, expected: list[str]) -> None:
    images = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))]
    parts = question(text, images)
    assert [part.get("text", part["type"]) for part in parts] == expected
    assert [part["image"] for part in parts if "image" in part] == images


# What it refuses


def test_refuses_images(model, wide, tmp_path, fails) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(wide.read_bytes()[:2000])
    (tmp_path / "empty.png").touch()
    options = ("-p", QUESTION, "-m", model)
    assert "no such file: 'gone.png'" in fails("generate", "gone.png", *options)
    assert "not an image" in fails("generate", tmp_path / "text.png", *options)
    assert "truncated" in fails("generate", tmp_path / "cut.png", *options)
    assert "is empty" in fails("generate", tmp_path / "empty.png", *options)
    assert "folder" in fails("generate", tmp_path, *options)
    assert "standard input is empty" in fails("generate", "-", *options)
    assert "not an image" in fails("generate", "-", *options, stdin="no picture")
    assert "truncated" in fails("generate", "-", *options, stdin=wide.read_bytes()[:2000])
    assert "more than once" in fails("generate", "-", "-", *options)
    assert "2 <image>, but there is 1 image" in fails("generate", wide, "-p", "<image> <image>", "-m", model)
    assert "1 <image>, but there are 0 images" in fails("generate", "-p", "What is <image>?", "-m", model)


def test_refuses_models(tmp_path, copy_of, fails) -> None:
    def answer(model: Path | str) -> str:
        return fails("generate", "-p", "?", "-m", model)

    assert "no such directory: './gone'" in answer("./gone")
    assert "has no config.json" in answer(tmp_path)
    (tmp_path / "file").touch()
    assert "is a file" in answer(tmp_path / "file")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert "model_type 'bert'" in answer(other)
    (other / "config.json").write_text('{"model_type": "fast_vlm"}')
    assert "fastvlm convert" in answer(other)
    (other / "config.json").write_text('{"model_type": "llava_qwen2", "mm_vision_tower": "openai/clip"}')
    assert "mm_vision_tower 'openai/clip'" in answer(other)
    (other / "config.json").write_text("{")
    assert "config.json" in answer(other)
    cut = copy_of("qwen2_tied")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "truncated" in answer(cut)
    (cut / "model.safetensors").unlink()
    assert "model.safetensors" in answer(cut)


def test_without_a_network(fails, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.delenv("https_proxy", raising=False)
    line = fails("generate", "-p", "?", "-m", "someone/no-such-model")
    assert "no network or unknown repository 'someone/no-such-model': use a local directory" in line
    assert constants.HF_HUB_OFFLINE  # so that nothing is tried again and again


def test_refuses_options(model, run, fails) -> None:
    options = ("generate", "-p", "?", "-m", model)
    assert "--precision is for --engine onnx" in fails(*options, "--precision", "q4")
    for fixed in (("--dtype", "float32"), ("--size", 512)):
        assert "--dtype and --size are fixed in an ONNX export" in fails(*options, "--engine", "onnx", *fixed)
        assert "--dtype and --size are fixed in a GGUF export" in fails(*options, "--engine", "llamacpp", *fixed)
    assert "--top-p has no effect" in fails(*options, "--top-p", 0.5)
    assert "--seed has no effect" in fails(*options, "--seed", 1)
    assert "--top-p is 0" in fails(*options, "--top-p", 0, "--temperature", 1)
    assert "--device is 'abacus'" in fails(*options, "--device", "abacus")
    assert "not available here" in fails(*options, "--device", "meta" if torch.cuda.is_available() else "cuda:0")
    assert "not a multiple of 64" in run(*options, "--size", 1000, code=2).stderr
    for option, value in (("--size", 192), ("--temperature", -1), ("--num-beams", 0), ("--dtype", "int8")):
        assert option in run(*options, option, value, code=2).stderr
    assert "--prompt" in run("generate", "-m", model, code=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", "inf"), "inf is not a number from 0 (greedy) to 2."),
        (("--temperature", "nan"), "nan is not a number from 0 (greedy) to 2."),
        (("--temperature", "2.5"), "2.5 is not a number from 0 (greedy) to 2."),
        (("--temperature", "-0.1"), "-0.1 is not a number from 0 (greedy) to 2."),
        (("--temperature", "1", "--seed", "99999999999999999999"), "'--seed'"),
        (("--temperature", "1", "--seed", "-1"), "'--seed'"),
        (("--temperature", "1e-45", "--seed", "1"), "--seed has no effect at --temperature 1e-45"),
        (("--system", "\udcff"), "the text is not UTF-8"),
        (("-p", "a\udcff"), "the text is not UTF-8"),
    ],
)
def test_refuses_values(model, run, words: tuple[str, ...], message: str) -> None:
    shown = run("generate", "-p", "?", "-m", model, *words, code=2)
    assert message in " ".join(shown.stderr.replace("│", " ").split()) and shown.stdout == ""


@pytest.mark.parametrize("temperature", ["5e-324", "1e-45", "1e-5"])
def test_a_temperature_near_0_is_greedy(model, run, temperature: str) -> None:
    words = ("generate", "-p", QUESTION, "-m", model, "--max-new-tokens", 8)
    assert run(*words, "--temperature", temperature).stdout == run(*words).stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupting_an_answer_ends_with_130(model, run, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    hi = AutoTokenizer.from_pretrained(model)("hi").input_ids

    def step(self: ContinuousRows) -> list[Request]:
        (request,) = self.running
        for token in hi:
            request.take(token)
        time.sleep(0.1)  # the main thread waits for more
        _thread.interrupt_main()
        while not request.take(hi[0]):
            time.sleep(0.01)
        self.remove(request)
        return [request]

    def take(self: Request, token: int) -> bool:
        return plain(self, token) if self.tokens < len(hi) else self.cancelled

    plain = Request.take
    monkeypatch.setattr(Request, "take", take)
    monkeypatch.setattr(ContinuousRows, "step", step)
    # Programs that a shell starts in the background ignore Ctrl-C, and the suite may be one of them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        shown = run("generate", "-p", "?", "-m", model, *(["--json"] if as_json else []), code=130).stdout
    finally:
        signal.signal(signal.SIGINT, before)
    found = json.loads(shown) if as_json else {"answer": shown[:-1], "finish_reason": "cancelled"}
    assert (found["answer"], found["finish_reason"]) == ("hi", "cancelled")


@pytest.mark.parametrize("name", ["LICENSE", "README.md"])
def test_says_that_apples_weights_are_for_research(copy_of, run, name: str) -> None:
    model = copy_of("qwen2_tied")
    text = (
        "Apple Machine Learning Research Model\n..."
        if name == "LICENSE"
        else "---\nlicense: apple-amlr\n---\n# FastVLM\n"
    )
    (model / name).write_text(text)
    result = run("generate", "-p", "?", "-m", model, "--max-new-tokens", 2)
    assert "Apple's weights are for research only" in result.stderr
    assert result.stderr.count("\n") == 2
