# SPDX-License-Identifier: Apache-2.0
"""Encoders alone: the record, tokens and parameters of each."""

import pytest
import torch

from transformers_fastvlm.bench import Options, encoders, run_encoders


def test_fastvithd_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.ENCODERS, "FastViTHD", encoders._Encoder(None, (64, 128)))
    monkeypatch.setitem(encoders._GEMM_SIDE, "cpu", 128)
    options = Options(threads=1, repetitions=2, warmup=0, batches=(1, 2))
    record = run_encoders(options, only=("FastViTHD",))
    assert record["kind"] == "encoders" and record["gemm_flops_per_second"]["float32"] > 0
    found = {(result["resolution"], result["batch"]): result for result in record["results"]}
    assert set(found) == {(64, 1), (128, 1), (64, 2), (128, 2)}
    assert {side: found[side, 1]["tokens"] for side in (64, 128)} == {64: 1, 128: 4}
    assert found[64, 1]["parameters"] == 122_714_208
    assert found[128, 2]["seconds"]["runs"] == 2 and found[128, 2]["share_of_gemm_rate"] > 0
    # 487 GFLOP at 1024 px, of which attention is a small part that shrinks faster than the picture.
    assert found[128, 1]["gigaflop"] == pytest.approx(487 / 64, rel=0.05)
    assert found[128, 2]["gigaflop"] == pytest.approx(2 * found[128, 1]["gigaflop"], rel=0.01)


def test_an_unknown_encoder_is_named() -> None:
    with pytest.raises(ValueError, match="there is no encoder 'ResNet'; expected FastViTHD, ViT-L/14"):
        run_encoders(Options(threads=1), only=("ResNet",))


def test_tokens_of_a_map_and_of_a_row_with_a_class_token() -> None:
    assert encoders._tokens(torch.zeros(1, 1536, 10, 10)) == 100
    assert encoders._tokens(torch.zeros(1, 257, 1024)) == 256
