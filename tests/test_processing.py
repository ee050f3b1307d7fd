# SPDX-License-Identifier: Apache-2.0
"""The processor: the golden ids, loading and saving, inputs and errors, and the methods that servers call."""

import copy
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from helpers import expand, golden_images, image_names
from transformers_fastvlm import FastVLMImageProcessorPil, FastVLMProcessor
from transformers_fastvlm.processing_fastvlm import chat_template_for

ASK = "<image>\nDescribe the image."


@pytest.fixture
def own(checkpoint: Callable[[str], Path]) -> FastVLMProcessor:
    """A processor that a test may change."""
    return FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied"))


def golden_cases(golden: Path, name: str) -> dict[str, dict[str, Any]]:
    return json.loads((golden / name / "expected.json").read_text())


# Goldens


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "llama", "qwen2_anyres"])
def test_golden_ids(golden: Path, processors: Callable[[str], FastVLMProcessor], name: str) -> None:
    processor = processors(name)
    seen = 0
    for case in golden_cases(golden, name).values():
        if "prompt" not in case:
            continue
        inputs = processor(text=case["prompt"], images=golden_images(golden, image_names(case)) or None)
        images = len(image_names(case))
        each = (case["length"] - len(case["input_ids"]) + images) // images if images else 0
        assert inputs["input_ids"][0] == expand(case["input_ids"], [each] * images, processor.image_token_id)
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "llama"])
def test_golden_batch(golden: Path, processors: Callable[[str], FastVLMProcessor], name: str) -> None:
    processor, case = processors(name), golden_cases(golden, name)["batch"]
    inputs = processor(
        text=case["prompts"], images=golden_images(golden, image_names(case)) or None, padding=True, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (3, 3, 256, 256)
    for ids, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], case["input_ids"], strict=True):
        assert mask.tolist() == sorted(mask.tolist()), "padding goes to the left"
        assert ids[mask.bool()].tolist() == expand(expected, [16], processor.image_token_id)


# Loading and saving


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "llama", "qwen2_anyres"])
def test_apple_directory(checkpoint: Callable[[str], Path], name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = AutoProcessor.from_pretrained(checkpoint(name))
    assert capfd.readouterr().err == ""
    config = AutoConfig.from_pretrained(checkpoint(name))
    assert type(processor) is FastVLMProcessor
    assert type(processor.image_processor) is FastVLMImageProcessorPil
    assert processor.image_token_id == config.image_token_id == 483
    assert processor.image_token == "<image>"
    assert processor.mm_patch_merge_type == config.mm_patch_merge_type
    assert processor.context_length == 4096
    assert processor.tokenizer.padding_side == "left"
    assert processor.chat_template == chat_template_for(config.text_config.model_type)
    assert processor.tokenizer.chat_template == processor.chat_template
    tiled = ["image_sizes", "num_tiles"] if name == "qwen2_anyres" else []
    assert processor.model_input_names == ["pixel_values", *tiled, "input_ids", "attention_mask"]


@pytest.mark.parametrize("name", ["qwen2_tied", "llama", "qwen2_anyres"])
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_save_and_reload(
    checkpoint: Callable[[str], Path], tmp_path: Path, golden: Path, name: str, backend: str
) -> None:
    if backend == "torchvision":
        pytest.importorskip("torchvision")
    first = AutoProcessor.from_pretrained(checkpoint(name), backend=backend)
    assert (type(first.image_processor) is FastVLMImageProcessorPil) == (backend == "pil")
    first.save_pretrained(tmp_path)
    saved = {path.name for path in tmp_path.iterdir()}
    assert {"processor_config.json", "tokenizer_config.json", "chat_template.jinja"} <= saved
    for cls in (AutoProcessor, FastVLMProcessor):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is FastVLMProcessor
        assert type(again.image_processor) is FastVLMImageProcessorPil
        assert again.to_dict() == first.to_dict()
        assert again.chat_template == first.chat_template == again.tokenizer.chat_template
        assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
        assert (again.tokenizer.padding_side, again.image_token_id) == ("left", 483)
    case = golden_cases(golden, name)["single0"]
    old = AutoProcessor.from_pretrained(checkpoint(name))(
        text=case["prompt"], images=golden_images(golden, image_names(case)) or None
    )
    new = again(text=case["prompt"], images=golden_images(golden, image_names(case)) or None)
    assert old["input_ids"] == new["input_ids"]
    assert np.array_equal(old["pixel_values"], new["pixel_values"])


def test_saved_settings_win(own: FastVLMProcessor, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A directory that was saved keeps its own template, padding and limit, also beside a model."""
    own.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    own.context_length = 77
    own.mm_patch_merge_type = "spatial"
    own.tokenizer.padding_side = "right"
    shutil.copy(checkpoint("qwen2_tied") / "config.json", tmp_path)
    own.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == own.chat_template
    assert (again.context_length, again.mm_patch_merge_type, again.tokenizer.padding_side) == (77, "spatial", "right")


def test_template_saved_with_the_tokenizer(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Saving only the tokenizer writes its template to chat_template.jinja; one that has no images is replaced."""
    folder = shutil.copytree(checkpoint("qwen2_tied"), tmp_path / "model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "chat_template.jinja").is_file()
    assert AutoProcessor.from_pretrained(folder).chat_template == chat_template_for("qwen2")
    own = "{% for message in messages %}{{ '<image>' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(own)
    assert AutoProcessor.from_pretrained(folder).chat_template == own


def test_arguments_of_from_pretrained(checkpoint: Callable[[str], Path]) -> None:
    processor = AutoProcessor.from_pretrained(
        checkpoint("qwen2_tied"),
        size=128,
        image_aspect_ratio="square",
        padding_side="right",
        model_max_length=99,
        context_length=50,
        chat_template="{{ 'image' }}",
    )
    assert dict(processor.image_processor.size) == {"height": 128, "width": 128}
    assert processor.image_processor.image_aspect_ratio == "square"
    assert (processor.tokenizer.padding_side, processor.tokenizer.model_max_length) == ("right", 99)
    assert processor.context_length == 50
    assert processor.chat_template == "{{ 'image' }}"
    assert "size" not in processor.tokenizer.init_kwargs


def test_parts_handed_in(checkpoint: Callable[[str], Path]) -> None:
    """A server passes its own tokenizer: the same object is used, and gets <image> once."""
    folder = checkpoint("qwen2_tied")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = tokenizer.chat_template
    processor = AutoProcessor.from_pretrained(folder, tokenizer=tokenizer)
    assert processor.tokenizer is tokenizer
    assert (tokenizer.padding_side, tokenizer.chat_template) == ("right", template)
    assert tokenizer.convert_tokens_to_ids("<image>") == 483 == processor.image_token_id
    size = len(tokenizer)
    again = FastVLMProcessor(processor.image_processor, tokenizer)
    assert (len(tokenizer), again.image_token_id) == (size, 483)
    images = FastVLMImageProcessorPil(size=64)
    assert AutoProcessor.from_pretrained(folder, image_processor=images).image_processor is images


def test_repository_in_the_cache(hub_cache: Path) -> None:
    processor = FastVLMProcessor.from_pretrained("fastvlm/tiny", cache_dir=hub_cache / "hub", local_files_only=True)
    assert (processor.image_token_id, processor.tokenizer.padding_side) == (483, "left")
    assert dict(processor.image_processor.size) == {"height": 256, "width": 256}


def test_no_network(hub_cache: Path) -> None:
    with pytest.raises(OSError, match="connect"):
        FastVLMProcessor.from_pretrained("fastvlm/other", cache_dir=hub_cache / "hub", local_files_only=True)


def test_unknown_backend(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="backend is 'cv2'; expected 'pil'"):
        FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied"), backend="cv2")


def test_constructor(own: FastVLMProcessor) -> None:
    tokenizer, images = own.tokenizer, own.image_processor
    built = FastVLMProcessor(images, tokenizer)
    assert built.chat_template == chat_template_for("qwen2")
    assert built.context_length is None
    with pytest.raises(ValueError, match="got no tokenizer"):
        FastVLMProcessor(images)
    with pytest.raises(ValueError, match="got no image_processor"):
        FastVLMProcessor(tokenizer=tokenizer)
    with pytest.raises(ValueError, match="mm_patch_merge_type is 'round'"):
        FastVLMProcessor(images, tokenizer, mm_patch_merge_type="round")


def test_foreign_directory(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    folder = shutil.copytree(checkpoint("qwen2_tied"), tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "openai/clip-vit-large-patch14"}))
    with pytest.raises(ValueError, match="clip-vit"):
        FastVLMProcessor.from_pretrained(folder)


# Calling


def test_forms_of_images(processor: FastVLMProcessor, golden: Path, image: Image.Image) -> None:
    """A single image, lists, lists per row, paths, arrays and tensors give the same result."""
    array = np.asarray(image.convert("RGB"))
    forms: list[Any] = [
        image,
        [image],
        [[image]],
        (image,),
        str(golden / "images" / "wide_rgb.png"),
        array,
        array[None],
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    first = processor(text=ASK, images=image, return_tensors="pt")
    for form in forms:
        inputs = processor(text=ASK, images=form, return_tensors="pt")
        assert torch.equal(inputs["input_ids"], first["input_ids"])
        assert torch.equal(inputs["pixel_values"], first["pixel_values"])


def test_rows_of_images(processor: FastVLMProcessor, image: Image.Image) -> None:
    rows = ["<image> a", "none", "<image> and <image>"]
    nested = processor(text=rows, images=[[image], [], [image, image]])
    flat = processor(text=rows, images=[image] * 3)
    assert nested["input_ids"] == flat["input_ids"]
    assert [ids.count(processor.image_token_id) for ids in nested["input_ids"]] == [16, 0, 32]
    assert len(nested["pixel_values"]) == 3


@pytest.mark.parametrize("images", [None, [], [[]], [[], []]])
def test_text_only(processor: FastVLMProcessor, images: Any) -> None:
    inputs = processor(text=["Hello", "You"], images=images)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert len(inputs["input_ids"]) == 2


def test_images_only(processor: FastVLMProcessor, image: Image.Image) -> None:
    assert set(processor(images=image, return_tensors="pt")) == {"pixel_values"}


def test_text_is_not_changed(processor: FastVLMProcessor, image: Image.Image) -> None:
    rows = [ASK]
    processor(text=rows, images=image)
    assert rows == [ASK]


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        (ASK, 0, r"The text has 1 <image>, but 0 images.*meant literally"),
        ("Describe it.", 1, r"The text has 0 <image>, but 1 images.*one placeholder for each image"),
        (ASK, 2, "The text has 1 <image>, but 2 images"),
        (["<image>", "<image>"], [2, 0], "Text 0 has 1 <image>, but 2 images"),
        (["<image>", "a <image>"], [1, 0], "Text 1 has 1 <image>, but 0 images"),
        (["<image>", "b"], [1], "There are 2 texts, but images has 1 rows"),
        ("<image><image>", [1, 1], "There are 1 texts, but images has 2 rows"),
    ],
)
def test_counts_that_differ(
    processor: FastVLMProcessor, image: Image.Image, rows: Any, images: Any, message: str
) -> None:
    given: Any = [[image] * n for n in images] if isinstance(images, list) else [image] * images
    with pytest.raises(ValueError, match=message):
        processor(text=rows, images=given)


def test_image_part_without_source(processor: FastVLMProcessor) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(ValueError, match="needs url, path, base64 or image"):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)


@pytest.mark.parametrize("rows", [5, [], [1, 2], [["a", "b"]], b"abc"])
def test_text_of_another_type(processor: FastVLMProcessor, rows: Any) -> None:
    with pytest.raises(ValueError, match="expected a string or a non-empty list of strings"):
        processor(text=rows)


def test_nothing_given(processor: FastVLMProcessor, image: Image.Image) -> None:
    with pytest.raises(ValueError, match="Neither text nor images"):
        processor()
    with pytest.raises(ValueError, match="Image 1 is None"):
        processor(text=[ASK, ASK], images=[image, None])


@pytest.mark.parametrize("name", ["videos", "audio"])
def test_what_the_model_does_not_take(processor: FastVLMProcessor, name: str) -> None:
    with pytest.raises(ValueError, match=f"but {name} was given"):
        processor(text="Hello", **{name: [np.zeros((2, 8, 8, 3), np.uint8)]})


def test_truncation(processor: FastVLMProcessor, image: Image.Image) -> None:
    long = "<image>\n" + "You are a user? " * 20
    inputs = processor(text=long, images=image, truncation=True, max_length=24)
    assert len(inputs["input_ids"][0]) == 24
    with pytest.raises(ValueError, match="Truncation would leave 10 of the 16 image tokens of text 0"):
        processor(text=long, images=image, truncation=True, max_length=10)


def test_longer_than_the_context(own: FastVLMProcessor, image: Image.Image) -> None:
    own.context_length = 40
    own(text=ASK, images=image, padding="max_length", max_length=60)
    with pytest.raises(ValueError, match=r"Text 1 has \d+ tokens, 16 of them for images, .* holds 40"):
        own(text=["Hi", "<image>\n" + "You are a user? " * 20], images=image)
    long = own(text="You are a user? " * 50, truncation=True, max_length=40)
    assert len(long["input_ids"][0]) == 40
    own.context_length = None
    own(text="You are a user? " * 50)


def test_decoding(processor: FastVLMProcessor) -> None:
    ids = processor(text="Hello<|im_end|>")["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["Hello"]
    assert processor.decode(ids[0]) == "Hello<|im_end|>"
    assert processor.post_process_image_text_to_text(torch.tensor(ids)) == ["Hello"]


# What servers ask for


def test_replacements_and_types(processor: FastVLMProcessor, image: Image.Image) -> None:
    inputs = processor(
        text=f"a {ASK}", images=image, return_mm_token_type_ids=True, return_text_replacement_offsets=True
    )
    ids = inputs["input_ids"][0]
    assert inputs["mm_token_type_ids"][0] == [int(token == processor.image_token_id) for token in ids]
    (replaced,) = inputs["text_replacement_offsets"][0]
    assert (replaced["span"], replaced["new_span"]) == ((2, 9), (2, 2 + 16 * len("<image>")))


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_anyres"])
@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
def test_planned_tokens_are_the_real_ones(checkpoint: Callable[[str], Path], name: str, merge_type: str) -> None:
    processor = FastVLMProcessor.from_pretrained(checkpoint(name), mm_patch_merge_type=merge_type)
    sizes = [(300, 500), (500, 300), (10_000, 20), (64, 64)]
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    planned = processor._get_num_multimodal_tokens(image_sizes=sizes)
    inputs = processor(text=["<image>"] * len(sizes), images=images)
    assert planned["num_image_tokens"] == [ids.count(processor.image_token_id) for ids in inputs["input_ids"]]
    tiles = inputs["num_tiles"].tolist() if "num_tiles" in inputs else [1] * len(sizes)
    assert planned["num_image_patches"] == tiles
    assert sum(tiles) == len(inputs["pixel_values"])
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


def test_planned_tokens_with_options(processor: FastVLMProcessor, image: Image.Image) -> None:
    grid = [[128, 256], [256, 128]]
    options: list[dict[str, Any]] = [
        {"size": 512},
        {"size": {"height": 128, "width": 128}},
        {"size": 128, "image_aspect_ratio": "anyres", "image_grid_pinpoints": grid},
    ]
    for option in options:
        ids = processor(text="<image>", images=image, **option)["input_ids"][0]
        size = [(image.height, image.width)]
        for kwargs in (option, {"images_kwargs": option}):
            assert processor._get_num_multimodal_tokens(size, **kwargs).num_image_tokens == [ids.count(483)]


def test_unresized_images(processor: FastVLMProcessor) -> None:
    inputs = processor(text="<image>", images=Image.new("RGB", (192, 64)), do_resize=False)
    assert inputs["input_ids"][0].count(processor.image_token_id) == 3
    assert processor._get_num_multimodal_tokens([(64, 192)], do_resize=False).num_image_tokens == [3]


def test_is_exported() -> None:
    import transformers_fastvlm

    assert transformers_fastvlm.FastVLMProcessor is FastVLMProcessor


def test_copies_and_pickles(processor: FastVLMProcessor) -> None:
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.to_dict() == processor.to_dict()
        assert (twin.chat_template, twin.image_token_id) == (processor.chat_template, 483)
        assert twin(text="Hello")["input_ids"] == processor(text="Hello")["input_ids"]
