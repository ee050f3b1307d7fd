# SPDX-License-Identifier: Apache-2.0
"""Exported attention gives what PyTorch's gives, and onnxruntime finds the norms of exported graphs."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import relative_error
from transformers_fastvlm import FastVLMForConditionalGeneration
from transformers_fastvlm.export import grouped_attention


@pytest.mark.parametrize(("heads", "shared"), [(6, 6), (6, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 5])
def test_heads_that_share_keys_give_what_repeated_keys_give(heads: int, shared: int, length: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn((2, heads, length, 16), generator=generator)
    key, value = torch.randn((2, 2, shared, 7, 16), generator=generator)
    visible = torch.rand((2, 1, length, 7), generator=generator) < 0.7
    visible[..., 0] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    found, _ = grouped_attention._attend(nn.Identity(), query, key, value, mask, 0.3)
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=0.3, enable_gqa=True
    )
    assert relative_error(found, expected.transpose(1, 2)) < 1e-6


def test_a_row_of_padding_stays_finite_in_half_precision() -> None:
    query, key = torch.full((1, 2, 1, 8), -8.0).half(), torch.full((1, 2, 3, 8), 8.0).half()
    mask = torch.full((1, 1, 1, 3), torch.finfo(torch.float16).min).half()
    found, _ = grouped_attention._attend(nn.Identity(), query, key, key, mask, 1.0)
    assert torch.equal(found, torch.full((1, 1, 2, 8), 8.0).half())


def test_the_model_gets_its_attention_back(checkpoint: Callable[[str], Path]) -> None:
    decoder = FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_tied")).get_decoder()
    before = decoder.config._attn_implementation
    with grouped_attention.grouped_attention(decoder):
        assert decoder.config._attn_implementation != before
    assert decoder.config._attn_implementation == before


def test_onnxruntime_fuses_all_norms_and_repeats_no_keys(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the export to ONNX is an extra")
    import onnx
    import onnxruntime

    from transformers_fastvlm.export.onnx_graphs import decoder_graph, save_graph

    model = FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_untied")).eval()
    for dtype in (torch.float32, torch.float16):
        save_graph(decoder_graph(model, dtype), tmp_path / "decoder.onnx", None)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3  # it warns that the optimized file is for this machine only
        onnxruntime.InferenceSession(tmp_path / "decoder.onnx", options, providers=["CPUExecutionProvider"])
        kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
        layers = model.config.text_config.num_hidden_layers
        assert kinds["SimplifiedLayerNormalization"] == 2 * layers + 1, dtype
        assert kinds["Expand"] < 2 * layers  # of keys and of values
        assert not kinds["Reciprocal"]
