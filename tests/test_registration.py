# SPDX-License-Identifier: Apache-2.0
"""What importing the package makes Transformers know, checked in processes of their own where order matters."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import transformers_fastvlm
from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration, FastVLMModel, FastVLMProcessor


def run(code: str, **environment: str) -> str:
    """Run `code` in a new interpreter that turns warnings into errors, and return what it prints."""
    import os

    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_importing_imports_no_torch() -> None:
    code = """
        import sys
        import transformers_fastvlm
        print([m for m in ("torch", "torchvision", "transformers.configuration_utils") if m in sys.modules])
    """
    assert run(code) == "[]"


@pytest.mark.parametrize("first", ["", "import transformers.models.auto.modeling_auto, transformers.processing_utils"])
def test_importing_before_or_after_transformers(first: str, checkpoint) -> None:
    code = f"""
        import transformers
        {first}
        import transformers_fastvlm
        transformers_fastvlm.register()
        from transformers import AutoConfig, AutoModelForVision2Seq, AutoProcessor
        config = AutoConfig.from_pretrained({str(checkpoint("qwen2_tied"))!r})
        from transformers import AutoModelForVision2Seq as again
        model = AutoModelForVision2Seq.from_pretrained({str(checkpoint("qwen2_tied"))!r})
        processor = AutoProcessor.from_pretrained({str(checkpoint("qwen2_tied"))!r})
        import pickle
        assert pickle.loads(pickle.dumps(AutoModelForVision2Seq)) is AutoModelForVision2Seq is again
        print(type(config).__name__, type(model).__name__, type(processor).__name__)
    """
    assert run(code) == "FastVLMConfig FastVLMForConditionalGeneration FastVLMProcessor"


@pytest.mark.parametrize(
    "first",
    [
        "from transformers_fastvlm import FastVLMForConditionalGeneration",
        "from transformers_fastvlm import FastVLMProcessor",
        "from transformers_fastvlm.checkpoints import convert",
    ],
)
def test_any_module_may_be_imported_first(first: str) -> None:
    code = f"""
        {first}
        from transformers import AutoConfig, AutoModelForVision2Seq, AutoProcessor, CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_MAPPING
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        config = CONFIG_MAPPING["fastvlm"]
        print(*(config in m for m in (MODEL_MAPPING, IMAGE_PROCESSOR_MAPPING, PROCESSOR_MAPPING)), end=" ")
        print(get_checkpoint_conversion_mapping("fastvlm") is not None)
    """
    assert run(code) == "True True True True"


def test_old_name_can_be_left_out() -> None:
    code = """
        import transformers_fastvlm, transformers
        from transformers import AutoModel
        print(hasattr(transformers, "AutoModelForVision2Seq"))
    """
    assert run(code, TRANSFORMERS_FASTVLM_NO_VISION2SEQ="1") == "False"


def test_registering_twice_changes_nothing() -> None:
    for _ in range(2):
        transformers_fastvlm.register()
    assert transformers.CONFIG_MAPPING["fastvlm"] is FastVLMConfig


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM])
def test_model_auto_classes(auto_class, trust_remote_code, checkpoint) -> None:
    model = auto_class.from_pretrained(checkpoint("llama"), trust_remote_code=trust_remote_code)
    assert type(model) is FastVLMForConditionalGeneration
    assert model.config.image_token_id == 483


def test_other_auto_classes(checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("qwen2_tied")
    assert type(AutoModel.from_pretrained(directory)) is FastVLMModel
    processor = AutoProcessor.from_pretrained(directory)
    assert type(processor) is FastVLMProcessor
    assert len(AutoTokenizer.from_pretrained(directory)) == 483
    processor.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(directory).save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again.image_processor).__name__ == "FastVLMImageProcessorPil"
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")).__name__ == "FastVLMImageProcessorPil"


@pytest.mark.parametrize("tokens", [0, 22])
def test_model_and_processor_agree_on_the_placeholder(tokens: int, checkpoint, tmp_path: Path) -> None:
    """A tokenizer with added tokens of its own, as Qwen2.5's has 22, moves the placeholder for both."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen2_untied"))
    tokenizer.add_tokens([f"<|added_{index}|>" for index in range(tokens)], special_tokens=True)
    for file in checkpoint("qwen2_untied").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert processor.image_token_id == model.config.image_token_id == 483 + tokens
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert AutoProcessor.from_pretrained(tmp_path / "saved").image_token_id == 483 + tokens
    assert AutoConfig.from_pretrained(tmp_path / "saved").image_token_id == 483 + tokens


@pytest.mark.parametrize("name", ["qwen2_tied", "llama", "qwen2_anyres"])
def test_pipeline(name: str, checkpoint, golden: Path, capsys: pytest.CaptureFixture) -> None:
    pipe = pipeline("image-text-to-text", model=str(checkpoint(name)))
    image = Image.open(golden / "images" / "wide_rgb.png")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe the image."}]
    options = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 5}}
    answer = pipe(text=[{"role": "user", "content": content}], **options)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    rows = [
        [{"role": "user", "content": [content[0], {"type": "text", "text": q}]}] for q in ("What?", "Read the text.")
    ]
    batched = pipe(text=rows, batch_size=2, **options)
    alone = [pipe(text=row, **options)[0]["generated_text"][-1]["content"] for row in rows]
    assert [row[0]["generated_text"][-1]["content"] for row in batched] == alone
    assert pipe(text=rows[0], return_full_text=False, **options)[0]["generated_text"] == alone[0]


def test_repository_in_a_cache_of_ones_own(hub_cache: Path) -> None:
    options = {"cache_dir": hub_cache / "hub", "local_files_only": True}
    for auto_class in (AutoModelForImageTextToText, AutoModel, FastVLMForConditionalGeneration, FastVLMConfig):
        loaded = auto_class.from_pretrained("fastvlm/tiny", **options)
        config = loaded if isinstance(loaded, FastVLMConfig) else loaded.config
        assert config.image_token_id == 483, auto_class


def test_repository_in_the_default_cache(hub_cache: Path) -> None:
    code = """
        import transformers_fastvlm
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
        name = "fastvlm/tiny"
        print(AutoConfig.from_pretrained(name).image_token_id, AutoProcessor.from_pretrained(name).image_token_id)
        print(AutoModelForImageTextToText.from_pretrained(name).config.image_token_id)
        print(pipeline("image-text-to-text", model=name).model.config.image_token_id)
    """
    assert run(code, HF_HOME=str(hub_cache)).split() == ["483"] * 4


def test_public_names() -> None:
    assert transformers_fastvlm.__all__ == [
        "FastViTHDBackbone",
        "FastViTHDConfig",
        "FastViTHDModel",
        "FastVLMConfig",
        "FastVLMForConditionalGeneration",
        "FastVLMImageProcessor",
        "FastVLMImageProcessorPil",
        "FastVLMModel",
        "FastVLMProcessor",
        "__version__",
        "register",
    ]
    for name in transformers_fastvlm.__all__:
        assert name in dir(transformers_fastvlm)
        if name != "FastVLMImageProcessor":  # needs torchvision
            assert getattr(transformers_fastvlm, name)
    with pytest.raises(AttributeError, match="FastVLMNothing"):
        _ = transformers_fastvlm.FastVLMNothing
