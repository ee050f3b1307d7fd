# SPDX-License-Identifier: Apache-2.0
"""Train the tiny model to find scenes by their descriptions, and measure recall on scenes that it never saw.

    python benchmarks/train_retrieval.py [--out RESULTS.json] [--save DIRECTORY]

The loss is CLIP's (Radford et al. 2021, arXiv 2103.00020, section 2.3): each description of a batch has to find its
image among all images of the batch, and each image its description, with a temperature that is trained. The vectors
are those of `Embedder`: the last token of the language model. Projector and language model are trained; the encoder is
frozen, so the features of each image are computed once. In the first epoch, batches mix all scenes. Later, the scenes
of a batch have the same kind of description (objects, a text or a chart), since other kinds are easy to tell apart.

Descriptions are unambiguous: among the held-out scenes no two have the same one, since a scene whose description was
there before is left out. In training, scenes with the same description are not negatives of each other.

--save writes the trained checkpoint, for `Embedder` and for sentence-transformers.
"""

import itertools
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import _results
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutputWithPooling

from transformers_fastvlm.data.scenes import Scene, make_scene
from transformers_fastvlm.embedding import Embedder, contrastive_loss, recall, save_for_sentence_transformers
from transformers_fastvlm.engines.model_loading import load_model

TRAINING_SERIES = 4
TRAINING_KINDS = ("attribute", "count", "chart", "word", "word", "number")


def unlike(series: int, count: int) -> list[Scene]:
    """Return the first scenes of a series that have different descriptions."""
    found: dict[str, Scene] = {}
    for index in itertools.count():
        if len(found) == count:
            return list(found.values())
        scene = make_scene(series, index)
        found.setdefault(scene.caption, scene)
    raise AssertionError


def kind(caption: str) -> str:
    """Return the kind of a description, such as "Chart"."""
    return caption.partition(":")[0]


class Pairs(Dataset):
    """Batches of descriptions, and of the encoder's features of their images.

    Args:
        embedder: encodes the images, all of them now.
        scenes: number of scenes.
        batch_size: scenes of a batch.
        epochs: how often each scene is seen; what does not fill a batch is left out of an epoch.
    """

    def __init__(self, embedder: Embedder, scenes: int, batch_size: int, epochs: int) -> None:
        self.embedder = embedder
        self.captions: list[str] = []
        features = []
        for first in range(0, scenes, 32):
            some = range(first, min(first + 32, scenes))
            drawn = [make_scene(TRAINING_SERIES, index, TRAINING_KINDS) for index in some]
            features.append(encode(embedder, [scene.image for scene in drawn]))
            self.captions += [scene.caption for scene in drawn]
        self.features = torch.cat(features)
        rng = random.Random(0)
        self.batches = []
        for epoch in range(epochs):
            order = list(range(scenes))
            rng.shuffle(order)
            first = 0
            if epoch:
                order.sort(key=lambda row: kind(self.captions[row]))
                first = rng.randrange(batch_size)
            batches = [order[start : start + batch_size] for start in range(first, scenes - batch_size + 1, batch_size)]
            rng.shuffle(batches)
            self.batches += batches
        numbers: dict[str, int] = {}
        self.groups = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in self.captions])

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self.batches[index]
        texts = self.embedder.prepare([self.captions[row] for row in rows])
        return {"texts": texts, "features": self.features[rows], "groups": self.groups[rows]}


@torch.no_grad()
def encode(embedder: Embedder, images: list[Any]) -> Tensor:
    """Return the encoder's features of images, (images, tokens, channels), before the projector."""
    pixels = embedder.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return embedder.model.model.vision_tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)


class Retriever(nn.Module):
    """An embedder whose forward is the loss of a batch.

    Args:
        embedder: what is trained, but for its encoder.
        image: an image, of which only the placeholders count.
        scale: inverse of the temperature at the start.
    """

    def __init__(self, embedder: Embedder, image: Any, scale: float) -> None:
        super().__init__()
        self.embedder, self.model = embedder, embedder.model
        self.model.model.vision_tower.requires_grad_(False)
        prompt = embedder.prepare([image])
        self.prompt = {name: prompt[name] for name in ("input_ids", "attention_mask")}
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def images(self, features: Tensor) -> Tensor:
        """Return the vectors of images from the encoder's features."""
        projected = self.model.model.multi_modal_projector(features)
        prompt = {name: value.expand(len(features), -1) for name, value in self.prompt.items()}
        return self.embedder.vectors(
            **prompt, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=projected)}
        )

    def forward(self, texts: dict[str, Tensor], features: Tensor, groups: Tensor) -> dict[str, Tensor]:
        scale = self.log_scale.exp().clamp(max=100.0)  # CLIP's limit
        return {"loss": contrastive_loss(self.embedder.vectors(**texts), self.images(features), scale, groups)}


def measured(embedder: Embedder, scenes: list[Scene]) -> dict[str, Any]:
    """Return the recall of finding each scene by its description among all, in percent, by rank and kind."""
    texts, images = (
        torch.from_numpy(embedder.embed(inputs, batch_size=32))
        for inputs in ([scene.caption for scene in scenes], [scene.image for scene in scenes])
    )
    found: dict[str, Any] = {
        f"recall_at_{rank}": round(100 * share, 1) for rank, share in recall(texts, images).items()
    }
    best = (texts @ images.T).argmax(1)
    right: dict[str, list[bool]] = {}
    for row, scene in enumerate(scenes):
        right.setdefault(kind(scene.caption), []).append(int(best[row]) == row)
    found["recall_at_1_by_kind"] = {name: round(100 * sum(rows) / len(rows), 1) for name, rows in right.items()}
    return found


def train(
    scenes: int, batch_size: int, epochs: int, learning_rate: float, scale: float = 20.0
) -> tuple[Embedder, list[float]]:
    """Train the tiny model.

    Returns:
        The embedder, and the mean loss of each tenth of the training.
    """
    torch.manual_seed(0)
    embedder = Embedder(*load_model("tiny", torch.device("cpu"), "float32"))
    pairs = Pairs(embedder, scenes, batch_size, epochs)
    model = Retriever(embedder, make_scene(TRAINING_SERIES, 0).image, scale)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,  # a whole batch of pairs
            num_train_epochs=1,
            learning_rate=learning_rate,
            adam_beta2=0.98,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, len(pairs) // 10),
            logging_steps=max(1, len(pairs) // 10),
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=pairs, data_collator=lambda batches: batches[0])
        trainer.train()
    embedder.model.eval()
    return embedder, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = _results.parser(
        __doc__, scenes=12_000, batch_size=96, epochs=3, learning_rate=1e-3, held_out=500, threads=None
    )
    parser.add_argument("--save", type=Path, help="directory for the trained checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    held_out = unlike(_results.HELD_OUT_SERIES, options.held_out)
    before = measured(Embedder("tiny", dtype="float32"), held_out)
    start, spent = time.perf_counter(), time.process_time()
    embedder, losses = train(options.scenes, options.batch_size, options.epochs, options.learning_rate)
    values = {
        "model": "tiny",
        **_results.settings(options, "save"),
        "training_series": TRAINING_SERIES,
        "training_kinds": TRAINING_KINDS,
        "held_out_series": _results.HELD_OUT_SERIES,
        "chance": {f"recall_at_{rank}": round(100 * rank / options.held_out, 1) for rank in (1, 10)},
        "before": before,
        "after": measured(embedder, held_out),
        "losses": [round(loss, 3) for loss in losses],
        "training_seconds": round(time.perf_counter() - start),
        "training_processor_seconds": round(time.process_time() - spent),
    }
    if options.save:
        save_for_sentence_transformers(embedder, options.save)
    _results.write(options, values, packages=("accelerate",))


if __name__ == "__main__":
    main()
