# SPDX-License-Identifier: Apache-2.0
"""`fastvlm merge`: it calls `merge_adapter` and says what was done. What that does is tested in tests/training."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from transformers_fastvlm import FastVLMForConditionalGeneration
from transformers_fastvlm.training import add_lora

pytest.importorskip("peft", reason="adapters need peft")


def test_merge(checkpoint, copy_of, tmp_path: Path, run, fails) -> None:
    base = copy_of("qwen2_tied")
    (base / "LICENSE").write_text("Apple Machine Learning Research Model ...")
    model = add_lora(FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_tied")), r=4)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.1)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    model.save_pretrained(adapter)
    done = run("merge", adapter, out, "--base", base, "--dtype", "bfloat16")
    assert done.stdout.startswith(f"{out}: ") and "in apple layout" in done.stdout
    assert "for research only" in done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    moved = {name for name in after if not after[name].equal(before[name].bfloat16())}
    assert moved == {name for name in before if ".layers." in name and name.endswith("_proj.weight")}

    assert "not an empty directory" in fails("merge", adapter, out)
    assert "expected the directory of an adapter" in fails("merge", base, tmp_path / "more")
    assert "expected one with adapter_config.json" in fails("merge", tmp_path / "gone", tmp_path / "more")
    assert not (tmp_path / "more").exists()
