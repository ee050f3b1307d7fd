# SPDX-License-Identifier: Apache-2.0
"""Private names of PyTorch: this build has them, and results are the same without them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import relative_error
from transformers_fastvlm import kernels
from transformers_fastvlm.kernels import dispatch, private_torch, quantized


def test_they_are_there() -> None:
    assert private_torch._TRANSFORMS is not None and private_torch._GRAPH_TASK is not None
    assert private_torch.HAS_INT8_GEMM and private_torch.HAS_INT4_GEMM
    assert private_torch.HAS_POINTWISE_CONVOLUTIONS == torch.backends.mkldnn.is_available()
    assert callable(torch.ops.aten.gelu_) and callable(torch.ops.aten.convolution_backward)


def test_what_they_say() -> None:
    x = torch.ones(2, requires_grad=True)
    seen: list[bool] = []
    x.register_hook(lambda gradient: seen.append(private_torch.in_backward()))
    assert not private_torch.in_backward() and not private_torch.transforms_are_active()
    torch.func.vmap(lambda row: seen.append(private_torch.transforms_are_active()) or row)(x)
    (x * 2).sum().backward()
    assert seen == [True, True]


@pytest.mark.parametrize("width", [0, 256, 512])
def test_the_same_without_them(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "vector_width", lambda: width)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 8, 6, 6, generator=generator).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(16, 8, 1, 1, generator=generator), torch.randn(8, 16, 1, 1, generator=generator)]
    biases = [torch.randn(16, generator=generator), torch.randn(8, generator=generator)]

    @torch.no_grad()
    def outputs() -> list[torch.Tensor]:
        both = kernels.feed_forward(image, image, None, weights[0], biases[0], weights[1], biases[1])
        return [both, kernels.conv2d_gelu(image, weights[0], biases[0])]

    expected = outputs()
    monkeypatch.setattr(dispatch, "HAS_POINTWISE_CONVOLUTIONS", False)
    monkeypatch.setattr(private_torch, "_TRANSFORMS", None)
    monkeypatch.setattr(private_torch, "_GRAPH_TASK", None)
    for ours, theirs in zip(outputs(), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-6
    assert relative_error(expected[1], F.gelu(F.conv2d(image, weights[0], biases[0]))) < 1e-6


def test_no_quantized_products_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torchao = pytest.importorskip("torchao", reason="weights of few bits need torchao")
    layers = nn.Sequential(nn.Linear(64, 32)).to(torch.bfloat16)
    torchao.quantization.quantize_(layers, torchao.quantization.Int8WeightOnlyConfig())
    monkeypatch.setattr(private_torch, "HAS_INT8_GEMM", False)
    quantized.speed_up_quantized_layers(layers)
    assert type(layers[0]) is nn.Linear
