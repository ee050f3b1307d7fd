# SPDX-License-Identifier: Apache-2.0
"""Registrations made by importing the package; test_registration_order tests order and failures."""

import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
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
from transformers.utils import is_torchvision_available

import transformers_fastvlm
from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration, FastVLMModel, FastVLMProcessor


@pytest.fixture
def apple_directory(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A directory with every file of Apple's repositories, whose code must not run."""
    directory = tmp_path / "FastVLM-0.5B"
    shutil.copytree(checkpoint("qwen2_tied"), directory)
    config = (directory / "config.json").read_text(encoding="utf-8")
    assert '"AutoModelForCausalLM": "llava_qwen.LlavaQwen2ForCausalLM"' in config
    (directory / "llava_qwen.py").write_text("raise RuntimeError('the code of the repository was run')\n")
    return directory


# Warning of the text-generation pipelines of Transformers < 5.20 for every model.
OF_OLD_PIPELINES = ("Both `max_new_tokens`", "Passing `generation_config` together", "Ignoring clean_up_tokenization")


@pytest.fixture
def no_remark() -> Iterator[None]:
    """Fails a test in which Transformers logs a warning or more."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger("transformers").addHandler(listener)
    yield
    logging.getLogger("transformers").removeHandler(listener)
    if Version(transformers.__version__) < Version("5.20"):
        heard = [message for message in heard if not message.startswith(OF_OLD_PIPELINES)]
    assert heard == []


def test_registering_twice_changes_nothing() -> None:
    for _ in range(2):
        transformers_fastvlm.register()
    assert transformers.CONFIG_MAPPING["fastvlm"] is FastVLMConfig


def test_classes_are_attributes_of_transformers() -> None:
    """TRL and vLLM look for a checkpoint's class by `getattr(transformers, name)`."""
    names = set(transformers_fastvlm.__all__) - {"__version__", "register"}
    if not is_torchvision_available():
        names.remove("FastVLMImageProcessor")
    for name in names:
        assert getattr(transformers, name) is getattr(transformers_fastvlm, name)
    vision2seq = transformers.AutoModelForVision2Seq
    assert pickle.loads(pickle.dumps(vision2seq)) is vision2seq


@pytest.mark.parametrize("trust_remote_code", [None, True])
@pytest.mark.usefixtures("no_remark")
def test_text_generation_as_the_hub_page_has_it(trust_remote_code: bool | None, apple_directory: Path) -> None:
    options = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    pipe = pipeline("text-generation", model=str(apple_directory), **options)
    assert type(pipe.model) is FastVLMForConditionalGeneration
    model = AutoModelForCausalLM.from_pretrained(apple_directory, **options)
    tokenizer = AutoTokenizer.from_pretrained(apple_directory, **options)
    greedy = {"max_new_tokens": 5, "do_sample": False}

    def answer(inputs: Any) -> str:
        output = model.generate(**inputs, **greedy)
        return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    expected = answer(tokenizer("What is", return_tensors="pt"))
    assert pipe("What is", return_full_text=False, **greedy)[0]["generated_text"] == expected
    messages = [{"role": "user", "content": "Who are you?"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert pipe(messages, **greedy)[0]["generated_text"][-1] == {"role": "assistant", "content": answer(chat)}
    assert pipe(messages)[0]["generated_text"][-1]["role"] == "assistant"


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
    """Added tokens of a tokenizer, such as Qwen2.5's 22, shift the placeholder's id in processor and model alike."""
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
        # With peft the Auto classes of models look for an adapter, and would ask the network for it.
        adapter = {"adapter_kwargs": options} if auto_class in (AutoModelForImageTextToText, AutoModel) else {}
        loaded = auto_class.from_pretrained("fastvlm/tiny", **options, **adapter)
        config = loaded if isinstance(loaded, FastVLMConfig) else loaded.config
        assert config.image_token_id == 483, auto_class


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
