# SPDX-License-Identifier: Apache-2.0
"""The target mlx, in mlx-vlm itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_scenes import NEW_TOKENS, SceneCase, scene_cases

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.export import Export, Source, export
from transformers_fastvlm.export.mlx import encoder_of, greedy_answer

pytestmark = pytest.mark.filterwarnings("ignore")  # of mlx-vlm and what it imports
mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

SENTINEL = -200


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """Export the tiny model in a precision, once."""
    root = tmp_path_factory.mktemp("mlx")
    done: dict[str, Export] = {}

    def get(precision: str) -> Export:
        if precision not in done:
            done[precision] = export("mlx", tiny_checkpoint(), root / precision, precision=precision)
        return done[precision]

    return get


def load(directory: Path, source: Path) -> tuple[Any, Any]:
    from mlx_vlm import load as load_with_mlx_vlm

    with encoder_of(Source(source)):
        return load_with_mlx_vlm(str(directory))


def answer(model: Any, case: SceneCase) -> list[int]:
    """Return mlx-vlm's greedy answer to our pixel values."""
    pixel_values = mx.array(case.pixel_values.numpy())
    return greedy_answer(model, case.prompt_with(SENTINEL), pixel_values, NEW_TOKENS, [model.config.eos_token_id])


def answers_are_identical(directory: Path, count: int) -> None:
    model, _ = load(directory, tiny_checkpoint())
    cases = scene_cases(count)
    assert any(len(case.tokens) > 1 for case in cases)
    assert [answer(model, case) for case in cases] == [case.tokens for case in cases]


def test_float32_answers_as_pytorch_does(exported) -> None:
    done = exported("float32")
    assert max(done.report.errors.values()) < 1e-5
    answers_are_identical(done.directory, 6)


@pytest.mark.soak
def test_float32_answers_200_scenes_as_pytorch_does(exported) -> None:
    answers_are_identical(exported("float32").directory, 200)


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 0.1), ("float16", 0.01), ("q8", 0.1), ("q4", 0.5)])
def test_smaller_precisions(exported, precision: str, bound: float) -> None:
    done = exported(precision)
    assert 1e-6 < max(done.report.errors.values()) < bound
    config = json.loads((done.directory / "config.json").read_text())
    arrays = mx.load(str(done.directory / "model.safetensors"))
    weight = arrays["language_model.model.layers.0.mlp.up_proj.weight"]
    kernel = arrays["vision_tower.vision_model.conv_exp.reparam_conv.weight"]
    if precision.startswith("q"):
        assert config["quantization"] == {"group_size": 64, "bits": int(precision[1]), "mode": "affine"}
        assert (weight.dtype, kernel.dtype) == (mx.uint32, mx.bfloat16)
    else:
        assert "quantization" not in config
        assert weight.dtype == kernel.dtype == getattr(mx, precision)


@pytest.mark.parametrize("name", ["qwen2_untied", "llama"])
def test_other_language_models(checkpoint, tmp_path: Path, name: str) -> None:
    done = export("mlx", checkpoint(name), tmp_path / "out", precision="float32")
    assert max(done.report.errors.values()) < 1e-5


def test_its_own_preprocessing(exported) -> None:
    """mlx-vlm's processor, from the files written: the same prompt, and pixels that are off by one of 255 at most."""
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = load(exported("float32").directory, tiny_checkpoint())
    for case in scene_cases(3):
        prompt = apply_chat_template(processor, model.config, case.question, num_images=1)
        inputs = processor(images=[case.image], text=[prompt])
        assert inputs["input_ids"][0].tolist() == case.prompt_with(SENTINEL)
        difference = np.abs(np.asarray(inputs["pixel_values"]) - case.pixel_values.numpy())
        assert difference.max() < 2.01 / 255


def test_what_the_card_says(exported) -> None:
    card = (exported("float32").directory / "README.md").read_text()
    assert "VisionConfig.layers = [1, 1, 2, 3, 1]" in card
    assert "mlx-vlm puts the text at the wrong places" in card
    assert json.loads((exported("float32").directory / "config.json").read_text())["image_token_index"] == SENTINEL


def test_damaged_files_are_noticed(exported, tmp_path: Path) -> None:
    """The check after writing can fail: another's weights give another answer."""
    from transformers_fastvlm.export.mlx import _errors
    from transformers_fastvlm.export.reference import reference

    shutil.copytree(exported("float32").directory, tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    arrays = mx.load(str(path))
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    mx.save_safetensors(str(path), {**arrays, name: -arrays[name]}, metadata={"format": "mlx"})
    source = Source(tiny_checkpoint())
    with pytest.raises(ValueError, match="outputs differ"):
        _errors(source, tmp_path / "changed", "float32", reference(source))


def test_models_that_mlx_vlm_cannot_be(checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    config = json.loads((source / "config.json").read_text())
    for change, message in (
        ({"attention_bias": True}, "attention_bias True; mlx-vlm expects"),
        ({"vision_config": config["vision_config"] | {"attention_head_dim": 16}}, "attention_head_dim 16; mlx-vlm"),
    ):
        (source / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            export("mlx", source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
