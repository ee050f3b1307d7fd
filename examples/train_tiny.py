# SPDX-License-Identifier: Apache-2.0
"""Train a tiny FastVLM on synthetic scenes, from nothing: tokenizer, encoder, new model, stages 1 to 3, Apple's layout.

    python examples/train_tiny.py WORK [--out DIRECTORY]

WORK gets everything on the way, each stage in a directory of its own, so that a run that was interrupted goes on where
it was when it is started again. The result goes to WORK/tiny unless --out says otherwise.
benchmarks/tiny_accuracy.py counts its right answers; `make train-tiny` runs both.

The encoder comes first, alone, as FastVLM's comes from CLIP: together, an encoder and a language model that both know
nothing learn where things are and then nothing more for a long time.
"""

import argparse
import collections
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from transformers_fastvlm import FastViTHDConfig, FastViTHDModel, FastVLMImageProcessorPil
from transformers_fastvlm.checkpoints import convert
from transformers_fastvlm.data.scenes import SceneDataset
from transformers_fastvlm.data.scenes.tokenizer import write_tokenizer
from transformers_fastvlm.training import load_recipe, new_model, run, save_model

MODEL_FILES = ("model.safetensors", "config.json", "generation_config.json")
STAGES = ("tiny-stage1", "tiny-stage2", "tiny-stage3")

# 16 tokens a picture. The early stages, whose maps are large, are narrow: they are where the time would go.
VISION = {
    "image_size": 256,
    "depths": [1, 1, 2, 3, 1],
    "hidden_sizes": [16, 32, 64, 128, 256],
    "projection_dim": 0,
    "reparameterized": False,
    "layer_scale_init_value": 0.1,
}
# Heads of 32, the smallest that every engine takes. Rows to spare, as in Apple's checkpoints.
LANGUAGE_MODEL = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
}


ENCODER_SCENES = 64_000
ENCODER_BATCH = 16


class Tagger(nn.Module):
    """An encoder that is asked which words, and which pairs of neighbouring words, the caption of a picture has.

    Pre-training by classification is that of CatLIP, arXiv 2404.15653, section 3.

    Args:
        encoder: what is trained.
        shares: share of the captions that has each of the terms, in (0, 1); the answers begin with these.
    """

    def __init__(self, encoder: FastViTHDModel, shares: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(2 * encoder.config.hidden_sizes[-1], len(shares))
        nn.init.zeros_(self.head.weight)
        self.head.bias.data = torch.logit(shares)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encoder(pixel_values).last_hidden_state.mean((2, 3)))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
        return {"loss": loss, "logits": logits}


class Tags:
    """The terms of captions: a collator of rows of scenes for `Tagger`.

    Args:
        tokenizer: cuts a caption into words, letters and digits.
        image_processor: makes pixel values.
        captions: examples, to take the terms from: those that five in a thousand have.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_processor: FastVLMImageProcessorPil, captions: list[str]
    ) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor
        counts = collections.Counter(term for caption in captions for term in self.terms(caption))
        shares = {term: count / len(captions) for term, count in counts.items() if count >= len(captions) / 200}
        self.index = {term: number for number, term in enumerate(shares)}
        self.shares = torch.tensor(list(shares.values())).clamp(0.002, 0.998)

    def terms(self, caption: str) -> dict[tuple[int, ...], None]:
        """Return the tokens of a caption and the pairs of neighbours, each once, in order."""
        ids = self.tokenizer(caption)["input_ids"]
        return dict.fromkeys([(token,) for token in ids] + list(itertools.pairwise(ids)))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = torch.zeros(len(rows), len(self.index))
        for row, hot in zip(rows, labels, strict=True):
            terms = self.terms(row["messages"][-1]["content"])
            hot[[self.index[term] for term in terms if term in self.index]] = 1
        pixel_values = self.image_processor([row["images"][0] for row in rows], return_tensors="pt").pixel_values
        return {"pixel_values": pixel_values, "labels": labels}


def pretrain_encoder(work: Path) -> Path:
    """Train an encoder to tell the terms of captions and return its directory."""
    out = work / "encoder"
    if (out / "config.json").exists():
        return out
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    image_processor = FastVLMImageProcessorPil(size=VISION["image_size"])
    examples = SceneDataset(2000, seed=0, task="captions", ramp=2000)
    tags = Tags(tokenizer, image_processor, [examples[i]["messages"][-1]["content"] for i in range(len(examples))])
    torch.manual_seed(0)
    model = Tagger(FastViTHDModel(FastViTHDConfig(**VISION)), tags.shares)
    steps = ENCODER_SCENES // ENCODER_BATCH
    arguments = TrainingArguments(
        output_dir=str(work / "encoder-checkpoints"),
        per_device_train_batch_size=ENCODER_BATCH,
        max_steps=steps,
        learning_rate=4e-3,
        adam_beta2=0.98,
        weight_decay=0.05,
        max_grad_norm=5.0,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(0.3 * steps), "min_lr_ratio": 0.05},
        warmup_steps=50,
        train_sampling_strategy="sequential",  # scenes fill along the ramp
        logging_steps=100,
        save_steps=500,
        save_total_limit=1,
        dataloader_num_workers=1,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
    )
    scenes = SceneDataset(ENCODER_SCENES, seed=4, task="captions", ramp=8000)
    trainer = Trainer(model, arguments, train_dataset=scenes, data_collator=tags)
    begun = Path(arguments.output_dir).is_dir() and get_last_checkpoint(arguments.output_dir) is not None
    trainer.train(resume_from_checkpoint=begun)
    model.encoder.save_pretrained(out)
    return out


def train(work: Path) -> Path:
    """Run what is not there yet and return the directory of the last stage."""
    previous = work / "new"
    if not previous.exists():
        write_tokenizer(work / "tokenizer")
        encoder = pretrain_encoder(work)
        save_model(*new_model(encoder, LANGUAGE_MODEL, work / "tokenizer"), previous)
    for stage in STAGES:
        out = work / stage
        if not (out / "config.json").exists():
            recipe = load_recipe(stage, [f"model.path={previous}", f"output_dir={out}"])
            run(recipe, resume=True, report=print)
        previous = out
    return previous


def export(trained: Path, tokenizer: Path, out: Path) -> None:
    """Write the files of a checkpoint laid out as Apple's: the weights, two configurations, Qwen2's tokenizer files."""
    with tempfile.TemporaryDirectory() as folder:
        made = convert(trained, Path(folder) / "apple", "apple").directory
        out.mkdir(parents=True, exist_ok=True)
        for file in (*(made / name for name in MODEL_FILES), *tokenizer.iterdir()):
            shutil.copyfile(file, out / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="directory for what comes on the way")
    parser.add_argument("--out", type=Path, help="directory of the result")
    options = parser.parse_args()
    torch.manual_seed(0)
    trained = train(options.work)
    out = options.out or options.work / "tiny"
    export(trained, options.work / "tokenizer", out)
    print(f"the tiny model: {out}")


if __name__ == "__main__":
    main()
