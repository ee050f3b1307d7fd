# SPDX-License-Identifier: Apache-2.0
"""Expectations of Transformers and related libraries about every model, on every supported version."""

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.models.qwen2 import modeling_qwen2

from helpers import random_pixels, relative_error
from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration, FastVLMProcessor, compat
from transformers_fastvlm.inference import PromptCache
from transformers_fastvlm.modeling_fastvlm import FastVLMCausalLMOutputWithPast, FastVLMModelOutputWithPast

IMAGE = 483
TOKENS = 16  # of an image of 256 x 256 pixels
IDS = torch.tensor([[5, *[IMAGE] * TOKENS, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def model(checkpoint) -> Any:
    return FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_tied")).eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return random_pixels(1, 256, 256)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_cache_under_both_names(name: str, model: Any, pixels: Tensor) -> None:
    whole = model(IDS, pixel_values=pixels).logits[:, -1]
    cache = DynamicCache(config=model.config.text_config)
    start = model(IDS[:, :-2], pixel_values=pixels, use_cache=True, **{name: cache})
    assert start[compat.CACHE] is cache and cache.get_seq_length() == IDS.shape[1] - 2
    step = model(IDS[:, -2:], **{name: cache})
    assert relative_error(step.logits[:, -1], whole) < 1e-5
    for part in (model, model.model):
        with pytest.raises(ValueError, match="only one of cache and past_key_values"):
            part(IDS[:, -1:], cache=cache, past_key_values=cache)


@pytest.mark.skipif(compat.CACHE == "past_key_values", reason="this version knows no other name")
@torch.no_grad()
def test_the_old_name_of_the_cache_is_deprecated(model: Any) -> None:
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        model(IDS[:, :1], past_key_values=DynamicCache(config=model.config.text_config))


def test_outputs_declare_no_cache_of_their_own() -> None:
    for kind in (FastVLMModelOutputWithPast, FastVLMCausalLMOutputWithPast):
        assert set(vars(kind)["__annotations__"]) == {"image_outputs"}
        assert compat.CACHE in {field.name for field in fields(kind)}


@torch.no_grad()
def test_outputs_hold_what_the_encoder_returned(model: Any, pixels: Tensor) -> None:
    features = model.get_image_features(pixels).pooler_output
    for part in (model, model.model):
        outputs = part(IDS, pixel_values=pixels, output_hidden_states=True)
        assert outputs.image_hidden_states is outputs.image_outputs.pooler_output
        assert outputs.image_hidden_states.equal(features)
        assert len(outputs.image_outputs.hidden_states) == 5  # stages of the encoder; the language model has 3
        values = part(IDS, pixel_values=pixels, return_dict=False)
        assert isinstance(values[-1], tuple) and values[-1][-1].equal(features)
        assert part(IDS[:, :1]).image_outputs is part(IDS[:, :1]).image_hidden_states is None
    assert relative_error(model(IDS, pixel_values=pixels).logits, outputs_logits(model, pixels)) < 1e-6


def outputs_logits(model: Any, pixels: Tensor) -> Tensor:
    """Compute the logits of `IDS` from the parts of the model."""
    return model.lm_head(model.model(IDS, pixel_values=pixels).last_hidden_state)


@pytest.mark.parametrize(
    "kept",
    [
        torch.tensor([[0, 20], [3, 4]]),
        torch.arange(42).view(2, 21) % 5 == 0,
        torch.tensor([3, 19]),
        3,
        0,
    ],
    ids=["positions by row", "mask", "positions", "last", "all"],
)
@torch.no_grad()
def test_logits_to_keep(kept: Any, model: Any) -> None:
    ids = torch.arange(2, 44).view(2, 21)
    whole = model(ids).logits
    if isinstance(kept, int):
        expected = whole[:, -kept:] if kept else whole
    elif kept.dtype == torch.bool:
        expected = whole[kept]
    else:
        rows = kept if kept.ndim == 2 else kept.expand(2, -1)
        expected = torch.stack([row[positions] for row, positions in zip(whole, rows, strict=True)])
    assert relative_error(model(ids, logits_to_keep=kept).logits, expected) < 1e-6


def test_wrong_number_of_placeholders_is_told_as_trl_expects(model: Any, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Image features and image tokens do not match.*15 <image>.*16 features"):
        model(IDS[:, 2:], pixel_values=pixels)


def test_config_has_llavas_name_of_the_placeholder(model: Any, tmp_path: Path) -> None:
    config = FastVLMConfig(image_token_index=7)
    assert config.image_token_id == config.image_token_index == 7
    assert model.config.image_token_index == IMAGE
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert "image_token_index" not in text and FastVLMConfig.from_pretrained(tmp_path).image_token_id == 7


class Favourite(LogitsProcessor):
    """Makes one token much likelier than all others."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token] += 1000
        return scores


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_the_placeholder_is_never_generated(options: dict[str, Any], model: Any, pixels: Tensor) -> None:
    options = options | {"max_new_tokens": 3, "eos_token_id": None}
    for token in (IMAGE, 11):
        favourite = LogitsProcessorList([Favourite(token)])
        out = model.generate(IDS, pixel_values=pixels, logits_processor=favourite, **options)
        assert (out[0, IDS.shape[1] :] == token).all() == (token != IMAGE)
        assert IMAGE not in out[0, IDS.shape[1] :]


class Pydantic(SimpleNamespace):
    """A message object like Pydantic's and the OpenAI client's."""

    def model_dump(self, exclude_none: bool) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None or not exclude_none}


@dataclass
class Turn:
    """A message object of a user-defined class."""

    role: str
    content: Any
    name: str | None = None


@pytest.mark.parametrize("kind", [Pydantic, Turn])
def test_messages_may_be_objects(kind: Any, processor: FastVLMProcessor, image: Any) -> None:
    plain = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(plain, **options)
    for objects in ([kind(**plain[0], name=None)], [[kind(**plain[0])]]):
        got = processor.apply_chat_template(objects, **options)
        assert list(got) == list(expected) and all(got[key].equal(expected[key]) for key in expected)
    with pytest.raises(ValueError, match="A message is 'hello'"):
        processor.apply_chat_template([*plain, "hello"], **options)


def test_nothing_is_logged_or_warned_about(model: Any, processor: FastVLMProcessor, image: Any) -> None:
    """Transformers first announces renamed arguments in its log. Warnings are errors anyway."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        cache = PromptCache(model, processor)
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
        options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
        cache.answer([{"role": "user", "content": content}], **options)
        inputs = cache.prepare([{"role": "user", "content": content}])
        for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            model.generate(**inputs, **options, **more)
        with torch.no_grad():
            model(**inputs)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


@pytest.mark.parametrize("renamed", ["attention_mask", "position_ids", "inputs_embeds", "cache"])
def test_a_version_that_renames_arguments_again_is_refused(
    renamed: str, checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patched copy of Qwen2's forward, which ignores unknown keywords like the real one."""
    taken = ["attention_mask", "position_ids", "inputs_embeds", compat.CACHE]
    taken[taken.index(compat.CACHE if renamed == "cache" else renamed)] = "another_name"
    code = f"def forward(self, input_ids=None, {', '.join(f'{name}=None' for name in taken)}, **kwargs): ..."
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    monkeypatch.setattr(modeling_qwen2.Qwen2Model, "forward", namespace["forward"])
    message = rf"Qwen2Model.forward of Transformers .* has no argument '{renamed}'; .* tested with Transformers 5\."
    with pytest.raises(RuntimeError, match=message):
        FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_tied"))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="its scheduler does not know nested configurations"
)
def test_continuous_batching_of_text(model: Any) -> None:
    """Transformers' scheduler runs the class; it takes token ids only, so these prompts have no images.

    The size of its cache is set, since by default it allocates and clears most of the free memory.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [40, 41]]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    config = model.generation_config.__class__(**options, pad_token_id=0)
    found = model.generate_batch(prompts, config, continuous_batching_config=small, progress_bar=False)
    assert [found[name].generated_tokens for name in sorted(found)] == expected
