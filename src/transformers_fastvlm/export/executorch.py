# SPDX-License-Identifier: Apache-2.0
"""The target `executorch`: three programs for ExecuTorch, with XNNPACK's kernels, in float32.

    pixel_values ─ vision_encoder.pte ──► image features ─┐
    input_ids ─── token_embedding.pte ──► inputs_embeds ──┴► text_decoder.pte, keys and values inside ─► logits

The decoder takes any number of new tokens with their positions, so that one program does the prompt and what follows.
Keys and values lie in the program, at the places that the positions say; positions that start at 0 again start a new
conversation.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.cache_utils import Cache, StaticLayer

from .. import compat
from ..checkpoints.files import write_json
from ..inference import fuse
from .export_source import Source
from .mlx import save_tokenizer
from .programs import TokenEmbedding, VisionEncoder
from .reference import Reference, reference, relative_error
from .targets import ExportOptions, Report, how_to_run

__all__ = ["SETTINGS", "StaticDecoder", "write"]

SETTINGS = "fastvlm.json"
_TEXT_TOKENS = 1024
_TOLERANCE = 1e-3
_BUFFERS = ("cached_keys_", "cached_values_")


class _Slots(StaticLayer):
    """Keys and values of one layer, written at positions that the caller names."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.positions = keys, values, positions
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put new keys and values at their positions and return all."""
        self.keys.index_copy_(2, self.positions, key_states)
        self.values.index_copy_(2, self.positions, value_states)
        return self.keys, self.values


class StaticDecoder(nn.Module):
    """Language model and head, with room for the keys and values of `context` tokens inside.

    Args:
        model: a `FastVLMForConditionalGeneration` in evaluation mode.
        context: most tokens of a conversation, those of the picture included.
    """

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        text = model.config.text_config
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.cache_argument = compat.cache_argument(self.language_model)
        self.context, self.layers = context, text.num_hidden_layers
        for layer in range(self.layers):
            for name in _BUFFERS:
                self.register_buffer(
                    f"{name}{layer}", torch.zeros((1, text.num_key_value_heads, context, head_size)), persistent=False
                )

    def forward(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        """Run new tokens.

        Args:
            inputs_embeds: (1, length, hidden).
            positions: int64 (length,), of these tokens in the conversation, from 0.

        Returns:
            logits of the last token, (1, 1, vocabulary).
        """
        slots = []
        for layer in range(self.layers):
            keys, values = (getattr(self, f"{name}{layer}") for name in _BUFFERS)
            slots.append(_Slots(keys, values, positions))
        hidden_ones = torch.arange(self.context)[None, :] > positions[:, None]
        mask = torch.zeros(hidden_ones.shape).masked_fill(hidden_ones, torch.finfo(torch.float32).min)
        states = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask[None, None],
            position_ids=positions[None],
            use_cache=True,
            **{self.cache_argument: Cache(layers=slots)},
        ).last_hidden_state
        logits: Tensor = self.lm_head(states[:, -1:])
        return logits


def write(source: Source, out: Path, options: ExportOptions) -> Report:
    """Write the programs. See `targets`."""
    size = options.sizes[0] if options.sizes else source.image_size
    expected = reference(source, size)
    model = fuse(source.model(torch.float32))
    text = source.config.text_config
    tokens = expected.features.shape[1]
    context = min(tokens + _TEXT_TOKENS, text.max_position_embeddings)
    if context < len(expected.input_ids) + len(expected.answer):
        raise ValueError(
            f"A picture of {size} x {size} has {tokens} tokens, but the language model has room for {context}. Choose "
            "a smaller size."
        )
    for name, program in _programs(model, size, context).items():
        options.say(f"writing {name}.pte")
        _lower(program, out / f"{name}.pte")
    generation = model.generation_config
    del model
    save_tokenizer(source, out)
    eos = generation.eos_token_id
    settings = {
        "context_length": context,
        "eos_token_ids": eos if isinstance(eos, list) else [eos],
        "image_size": size,
        "image_token_id": expected.image_token_id,
        "image_tokens": tokens,
    }
    options.say("running the programs in ExecuTorch")
    errors = _errors(out, expected)
    write_json(out / SETTINGS, settings)
    return Report(
        checked_in=f"ExecuTorch {importlib.metadata.version('executorch')} with XNNPACK, in its Python runtime",
        errors=errors,
        how_to_run=how_to_run("executorch"),
        limits=(
            f"Pictures of {size} x {size} pixels, one or several a conversation; conversations of at most {context} "
            f"tokens, of which a picture takes {tokens}.",
            "One conversation at a time: keys and values lie in the decoder. It starts anew where positions start at "
            "0 again.",
            "Tensors have to be contiguous: ExecuTorch reads a transposed view, such as a picture whose channels were "
            "moved to the front, as another picture, without a word. `.contiguous()` makes it right.",
            "The program above resizes a picture before it pads it, which this package does in the other order; that "
            "moves some values a little.",
        ),
        library_name="executorch",
    )


def _programs(model: Any, size: int, context: int) -> dict[str, ExportedProgram]:
    text: Any = model.config.text_config
    # ExecuTorch runs a length of 1 too; torch.export would make a program for that length alone of it.
    length = Dim("length", min=2, max=context)
    ids = torch.zeros((1, 3), dtype=torch.long)
    embeds, positions = torch.zeros((1, 3, text.hidden_size)), torch.arange(3)
    pixels = torch.zeros((1, 3, size, size))
    with torch.no_grad():
        return {
            "vision_encoder": torch.export.export(VisionEncoder(model).eval(), (pixels,), strict=False),
            "token_embedding": torch.export.export(
                TokenEmbedding(model).eval(), (ids,), dynamic_shapes=({1: length},), strict=False
            ),
            "text_decoder": torch.export.export(
                StaticDecoder(model, context).eval(),
                (embeds, positions),
                dynamic_shapes=({1: length}, {0: length}),
                strict=False,
            ),
        }


def _lower(program: ExportedProgram, file: Path) -> None:
    """Give what XNNPACK can compute to it, and write the program."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

    # Without the pass keys and values begin as whatever lies in memory, and not-a-number there passes the mask.
    config = ExecutorchBackendConfig(passes=[InitializedMutableBufferPass(list(_BUFFERS))])
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch(config)
    with file.open("wb") as stream:
        lowered.write_to_file(stream)


def _errors(directory: Path, expected: Reference) -> dict[str, float]:
    """Run the programs and compare."""
    from executorch.runtime import Runtime

    runtime = Runtime.get()
    programs = {path.stem: runtime.load_program(str(path)) for path in directory.glob("*.pte")}
    methods = {name: program.load_method("forward") for name, program in programs.items()}

    def run(name: str, *inputs: Tensor) -> Tensor:
        return methods[name].execute(list(inputs))[0].clone()  # the runtime uses its memory again

    def embedded(ids: list[int]) -> Tensor:
        return run("token_embedding", torch.tensor([ids]))

    features = run("vision_encoder", expected.pixel_values)
    place = expected.prompt.index(expected.image_token_id)
    before, after = list(expected.prompt[:place]), list(expected.prompt[place + 1 :])
    embeds = torch.cat([embedded(before), features, embedded(after)], dim=1)
    answer: list[int] = []
    position, first = 0, torch.empty(0)
    while len(answer) < len(expected.answer):
        logits = run("text_decoder", embeds, torch.arange(position, position + embeds.shape[1]))[0, -1]
        first = first if answer else logits
        position += embeds.shape[1]
        answer.append(int(logits.argmax()))
        embeds = embedded(answer[-1:])
    errors = {
        "float32: image features": relative_error(features, expected.features),
        "float32: logits": relative_error(first, expected.logits[-1]),
    }
    if not max(errors.values()) <= _TOLERANCE or tuple(answer) != expected.answer:
        raise ValueError(f"The programs compute another function than the model: {errors}. Please report it.")
    return errors
