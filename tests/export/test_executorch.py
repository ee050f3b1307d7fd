# SPDX-License-Identifier: Apache-2.0
"""The target executorch, in ExecuTorch's own Python runtime."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_scenes import scene_cases
from PIL import Image

from transformers_fastvlm import FastVLMForConditionalGeneration, FastVLMProcessor
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.export import Export, export

pytestmark = pytest.mark.filterwarnings("ignore")  # of ExecuTorch and what it imports
pytest.importorskip("executorch.runtime", reason="executorch is not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export("executorch", tiny_checkpoint(), tmp_path_factory.mktemp("executorch") / "out")


def test_programs_compute_what_the_model_does(exported: Export) -> None:
    assert max(exported.report.errors.values()) < 1e-5
    assert {"vision_encoder.pte", "token_embedding.pte", "text_decoder.pte", "tokenizer.json"} <= exported.files.keys()
    settings = json.loads((exported.directory / "fastvlm.json").read_text())
    assert (settings["image_size"], settings["image_tokens"], settings["context_length"]) == (256, 16, 1040)


def test_answers_of_several_conversations(exported: Export) -> None:
    from executorch.runtime import Runtime

    folder = exported.directory
    settings = json.loads((folder / "fastvlm.json").read_text())
    programs = {path.stem: Runtime.get().load_program(str(path)) for path in folder.glob("*.pte")}
    methods = {name: program.load_method("forward") for name, program in programs.items()}

    def run(name: str, *inputs: torch.Tensor) -> torch.Tensor:
        return methods[name].execute(list(inputs))[0].clone()

    for case in scene_cases(4):
        before, after = (torch.tensor([ids]) for ids in (case.prompt[: case.place], case.prompt[case.place + 1 :]))
        features = run("vision_encoder", case.pixel_values)
        embeds = torch.cat([run("token_embedding", before), features, run("token_embedding", after)], dim=1)
        position, answer = 0, []
        while len(answer) < len(case.tokens) + 1:
            logits = run("text_decoder", embeds, torch.arange(position, position + embeds.shape[1]))
            position += embeds.shape[1]
            answer.append(int(logits[0, -1].argmax()))
            embeds = run("token_embedding", torch.tensor([answer[-1:]]))
        assert answer[:-1] == case.tokens
        assert answer[-1] in settings["eos_token_ids"]


def test_the_cards_program(exported: Export, tmp_path: Path) -> None:
    """The program of README.md, as it is, on a picture that needs no resizing: the words that this package gives."""
    card = (exported.directory / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    picture = scene_cases(1)[0].image.convert("RGB").resize((256, 256), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "image.png")
    (tmp_path / "run.py").write_text(program.replace('"DIRECTORY"', repr(str(exported.directory))))
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    model = FastVLMForConditionalGeneration.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    processor = FastVLMProcessor.from_pretrained(tiny_checkpoint())
    messages = [{"role": "user", "content": "<image>\nDescribe the image."}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, images=[picture], return_tensors="pt")
    answer = model.generate(**inputs, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=200)
    words = processor.tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert done.stdout.strip().splitlines()[-1] == words.strip()


@pytest.mark.soak
def test_other_sizes_and_language_models(checkpoint, tmp_path: Path) -> None:
    done = export("executorch", checkpoint("llama"), tmp_path / "out", sizes=(128,))
    assert max(done.report.errors.values()) < 1e-5
    assert json.loads((done.directory / "fastvlm.json").read_text())["image_tokens"] == 4
