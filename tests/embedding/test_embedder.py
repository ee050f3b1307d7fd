# SPDX-License-Identifier: Apache-2.0
"""Vectors do not depend on batches, padding or the way that a model was loaded, and errors name the input."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.data.scenes import make_scene
from transformers_fastvlm.embedding import POOLINGS, Embedder, pool
from transformers_fastvlm.engines.model_loading import load_model

SCENES = [make_scene(3, index) for index in range(3)]
IMAGES = [scene.image for scene in SCENES]
MIXED = [IMAGES[0], "Shapes: top", (IMAGES[1], "the number"), SCENES[1].caption, IMAGES[2], "x"]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny", torch.device("cpu"), "float32")


def near(ours: Any, theirs: Any) -> bool:
    return bool(np.abs(np.asarray(ours) - np.asarray(theirs)).max() < 1e-5 * np.abs(np.asarray(theirs)).max())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_padding_change_nothing(tiny: Any, pooling: str, normalize: bool, side: str) -> None:
    model, processor = tiny
    embedder = Embedder(model, processor, pooling=pooling, normalize=normalize)
    inputs: list[Any] = IMAGES if pooling == "encoder" else MIXED
    before = processor.tokenizer.padding_side
    processor.tokenizer.padding_side = side
    try:
        together = embedder.embed(inputs, batch_size=4)
    finally:
        processor.tokenizer.padding_side = before
    assert together.shape == (len(inputs), embedder.dimension) and together.dtype == np.float32
    assert near(together, np.concatenate([embedder.embed([one]) for one in inputs]))
    lengths = np.linalg.norm(together, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == normalize


def test_vectors_are_the_states_of_the_language_model(tiny: Any) -> None:
    """Against the public calls of Transformers, and without a run of the head."""
    model, processor = tiny
    content = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "the number"}]
    messages = [{"role": "system", "content": "Find it."}, {"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    expected = {"last": states[-1], "mean": states.mean(0)}
    calls: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    for pooling, vector in expected.items():
        embedder = Embedder(model, processor, pooling=pooling, normalize=False, system="Find it.")
        assert near(embedder.embed([(IMAGES[0], "the number")])[0], vector)
    assert near(Embedder(model, processor, pooling="mean", normalize=False).embed([messages])[0], expected["mean"])
    hook.remove()
    assert calls == []
    pixels = processor.image_processor(IMAGES, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        pooled = model.model.vision_tower(pixels).pooler_output
    assert near(Embedder(model, processor, pooling="encoder", normalize=False).embed(IMAGES), pooled)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_anyres", "llama"])
def test_other_checkpoints(checkpoint: Callable[[str], Path], golden: Path, name: str) -> None:
    """CLIP's head, tiles of AnyRes, which the encoder's vector has not, and Vicuna's template."""
    photo = Image.open(next(iter(sorted((golden / "images").glob("*.png"))))).convert("RGB")
    inputs: list[Any] = [photo, photo.resize((300, 80)), "a photo", (photo.resize((90, 200)), "what")]
    last = Embedder(str(checkpoint(name)), dtype="float32")
    assert near(last.embed(inputs), np.concatenate([last.embed([one]) for one in inputs]))
    encoder = Embedder(last.model, last.processor, pooling="encoder")
    vectors = encoder.embed(inputs[:2])
    assert vectors.shape == (2, encoder.dimension)
    assert near(vectors, np.concatenate([encoder.embed([one]) for one in inputs[:2]]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_of_padded_rows(side: str) -> None:
    states = torch.tensor([[[1.0], [2.0], [6.0]], [[4.0], [8.0], [float("inf")]]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    if side == "left":
        states, mask = states.flip(1), mask.flip(1)
    assert pool(states.bfloat16(), mask, "mean").tolist() == [[3.0], [6.0]]
    assert pool(states, mask, "last").tolist() == ([[1.0], [4.0]] if side == "left" else [[6.0], [8.0]])
    assert pool(states, mask, "last").dtype == torch.float32


def test_only_one_batch_is_read_ahead(tiny: Any) -> None:
    taken: list[int] = []

    def endless() -> Any:
        for index in itertools.count():
            taken.append(index)
            yield f"the number {index}"

    embedder = Embedder(*tiny)
    stream = embedder.stream(endless(), batch_size=3)
    found = [next(stream) for _ in range(4)]
    assert taken == list(range(6))
    assert near(found, embedder.embed([f"the number {index}" for index in range(4)]))


def test_dtype_device_and_form_of_the_result(tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "scene.png")
    embedder = Embedder(tiny_checkpoint(), dtype="bfloat16", device="cpu", size=320)
    assert embedder.model.dtype == torch.bfloat16
    seen: list[tuple[int, int]] = []
    inputs = [tmp_path / "scene.png", IMAGES[0], "x"]
    found = embedder.embed(inputs, batch_size=2, as_tensor=True, progress=lambda *state: seen.append(state))
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32 and found.device == embedder.model.device
    assert not found.requires_grad and torch.equal(found[0], found[1]) and seen == [(2, 3), (3, 3)]
    assert embedder.embed([]).shape == (0, embedder.dimension)


def test_gradients_reach_encoder_and_language_model() -> None:
    model, processor = load_model("tiny", torch.device("cpu"), "float32")
    embedder = Embedder(model, processor)
    embedder.vectors(**embedder.prepare(MIXED[:3])).sum().backward()
    assert model.model.language_model.embed_tokens.weight.grad is not None
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


DAMAGED = {
    "a file that is missing": ([Path("missing.png")], "Input 0: no image at 'missing.png'"),
    "a placeholder as text": (["a", "see <image>"], "Input 1: the text has 1 placeholders"),
    "a number": (["a", 3], "Input 1: it is a int; expected a text"),
    "a tuple of three": ([("a", "b", "c")], "Input 0: it is a tuple"),
    "a long text": (["a", "word " * 3000], r"Input 1: it has \d+ tokens, but the model's context holds 2048"),
    "one text": ("a text", "inputs is one str; expected a list"),
}


@pytest.mark.parametrize("case", DAMAGED, ids=str)
def test_an_error_names_the_input(tiny: Any, case: str) -> None:
    inputs, expected = DAMAGED[case]
    with pytest.raises(ValueError, match=expected):
        Embedder(*tiny).embed(inputs, batch_size=1)


@pytest.mark.parametrize("one", ["a text", (IMAGES[0], "a text")])
def test_texts_have_no_vector_of_the_encoder(tiny: Any, one: Any) -> None:
    with pytest.raises(ValueError, match="Input 1: expected an image alone"):
        Embedder(*tiny, pooling="encoder").embed([IMAGES[0], one])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pooling": "max"}, "pooling is 'max'; expected one of last, mean, encoder"),
        ({"pooling": "encoder", "system": "x"}, "system is given"),
        ({"processor": None}, "processor is missing"),
    ],
)
def test_wrong_options(tiny: Any, options: dict[str, Any], expected: str) -> None:
    model, processor = tiny
    with pytest.raises(ValueError, match=expected):
        Embedder(model, **{"processor": processor, **options})


def test_a_model_in_training_mode_is_refused(tiny: Any) -> None:
    model, processor = tiny
    model.train()
    try:
        with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
            Embedder(model, processor).embed(["x"])
    finally:
        model.eval()


def test_vectors_that_are_not_finite_are_an_error(checkpoint: Callable[[str], Path]) -> None:
    embedder = Embedder(str(checkpoint("qwen2_tied")), dtype="float32")
    with torch.no_grad():
        embedder.model.model.language_model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite in float32"):
        embedder.embed(["x"])
