# SPDX-License-Identifier: Apache-2.0
"""The targets apple and native: whole checkpoints for the code of others."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_scenes import NEW_TOKENS, scene_cases, until_end
from safetensors.torch import load_file

from transformers_fastvlm import FastVLMForConditionalGeneration
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.export import export

pytest.importorskip("timm", reason="timm is not installed, which fast_vlm needs")
pytest.importorskip("torchvision", reason="torchvision is not installed")

# Run by itself, so that this package is not there: files in, answers out.
WITHOUT_THIS_PACKAGE = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

directory, folder, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained(directory).eval()
exact, usual = (AutoProcessor.from_pretrained(directory, **options) for options in ({"backend": "pil"}, {}))
asked = json.load(open(f"{folder}/asked.json"))
answers = []
for index, case in enumerate(asked):
    pixels = np.load(f"{folder}/{index}.npy")
    inputs = {"input_ids": torch.tensor([case["input_ids"]]), "pixel_values": torch.from_numpy(pixels)}
    options = {"do_sample": False, "temperature": None, "max_new_tokens": new_tokens}
    answer = model.generate(**inputs, **options)[0, len(case["input_ids"]) :].tolist()
    part = {"type": "image", "image": Image.open(f"{folder}/{index}.png")}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": case["question"]}]}]
    found = []
    for processor in (exact, usual):
        theirs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        found.append((theirs["input_ids"][0].tolist(), np.abs(theirs["pixel_values"].numpy() - pixels).max().item()))
    answers.append({"tokens": answer, "prompts": [f[0] for f in found], "differences": [f[1] for f in found]})
assert "transformers_fastvlm" not in sys.modules
eos = model.generation_config.eos_token_id
json.dump({"class": type(model).__name__, "eos": eos, "answers": answers}, open(f"{folder}/answers.json", "w"))
"""


def run_without_this_package(directory: Path, folder: Path, count: int) -> None:
    cases = scene_cases(count)
    for index, case in enumerate(cases):
        np.save(folder / f"{index}.npy", case.pixel_values.numpy())
        case.image.save(folder / f"{index}.png")
    asked = [{"input_ids": case.input_ids, "question": case.question} for case in cases]
    (folder / "asked.json").write_text(json.dumps(asked))
    script = folder / "run.py"
    script.write_text(WITHOUT_THIS_PACKAGE)
    command = [sys.executable, str(script), str(directory), str(folder), str(NEW_TOKENS)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "answers.json").read_text())
    assert found["class"] == "FastVlmForConditionalGeneration"
    for case, answer in zip(cases, found["answers"], strict=True):
        assert until_end(answer["tokens"], found["eos"]) == case.tokens
        assert answer["prompts"] == [case.input_ids, case.input_ids]
        exact, usual = answer["differences"]
        assert exact < 1e-6 and usual < 3.01 / 255


def test_native_answers_as_this_package_without_it(tmp_path: Path) -> None:
    done = export("native", tiny_checkpoint(), tmp_path / "native")
    assert max(done.report.errors.values()) < 1e-5
    assert done.report.checked_in is not None and "timm" in done.report.checked_in
    run_without_this_package(done.directory, tmp_path, 6)


@pytest.mark.soak
def test_native_answers_200_scenes_as_this_package(tmp_path: Path) -> None:
    run_without_this_package(export("native", tiny_checkpoint(), tmp_path / "native").directory, tmp_path, 200)


def test_native_of_a_llama(checkpoint, tmp_path: Path) -> None:
    done = export("native", checkpoint("llama"), tmp_path / "native")
    assert max(done.report.errors.values()) < 1e-5
    assert "USER:" in (done.directory / "chat_template.jinja").read_text()


def test_native_says_what_it_cannot_do(checkpoint, tmp_path: Path) -> None:
    done = export("native", checkpoint("qwen2_anyres"), tmp_path / "native")
    assert any(limit.startswith("There is no AnyRes") for limit in done.report.limits)
    assert "There is no AnyRes" in (done.directory / "README.md").read_text()


def test_apple_layout_is_merged_and_whole(tmp_path: Path) -> None:
    done = export("apple", tiny_checkpoint(), tmp_path / "apple")
    assert done.report.checked_in is None
    assert "Apple's code always builds the published encoder" in (done.directory / "README.md").read_text()
    tensors = load_file(done.directory / "model.safetensors")
    assert not any(".rbr_" in name or ".lkb_origin." in name for name in tensors)
    ours, theirs = (
        FastVLMForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        for path in (tiny_checkpoint(), done.directory)
    )
    pixels = scene_cases(1)[0].pixel_values
    with torch.no_grad():
        expected, found = (model.get_image_features(pixels).pooler_output for model in (ours, theirs))
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
def test_apple_layout_of_a_merged_checkpoint_is_copied_bit_for_bit(checkpoint, tmp_path: Path, name: str) -> None:
    source = checkpoint(name)
    done = export("apple", source, tmp_path / "apple")
    before, after = (load_file(path / "model.safetensors") for path in (source, done.directory))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    old, new = (json.loads((path / "config.json").read_text()) for path in (source, done.directory))
    assert old == new
    assert {path.name for path in tmp_path.iterdir()} == {"apple"}, "nothing is left beside it"
