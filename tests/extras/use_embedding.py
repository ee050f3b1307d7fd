# SPDX-License-Identifier: Apache-2.0
"""The extra embedding: SentenceTransformer loads what `save_for_sentence_transformers` writes; its vectors are ours."""

import itertools

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
from using import IMAGE

from transformers_fastvlm.embedding import Embedder, save_for_sentence_transformers

image = Image.open(IMAGE).convert("RGB")
inputs = [image, "the number 628", image.resize((90, 200)), "a longer text, so that the batch has padding"]
for number, (pooling, normalize, system) in enumerate(
    itertools.product(("last", "mean"), (True, False), (None, "Represent the input for search."))
):
    embedder = Embedder("tiny", pooling=pooling, normalize=normalize, system=system, dtype="float32", device="cpu")
    out = save_for_sentence_transformers(embedder, f"saved-{number}")
    loaded = SentenceTransformer(str(out), device="cpu")
    expected = embedder.embed(inputs)
    for found in (loaded.encode(inputs), np.stack([loaded.encode(one) for one in inputs])):
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        assert difference < 1e-5, (pooling, normalize, system, difference)
assert loaded.get_embedding_dimension() == embedder.dimension

# It trains with their losses, and what they save is loaded again.
loaded.save("again")
again = SentenceTransformer("again", device="cpu")
assert np.allclose(again.encode(inputs), expected, atol=1e-4 * np.abs(expected).max())
