# SPDX-License-Identifier: Apache-2.0
"""The converter: every tensor bit for bit, there and back, and nothing half done."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from transformers_fastvlm.checkpoints import convert, detect_layout
from transformers_fastvlm.checkpoints.layouts import to_our_name

MODELS = ("qwen2_tied", "qwen2_untied", "llama", "qwen2_anyres")
ENCODER = "model.vision_tower.vision_tower.model."
NORM = "model.norm.weight"
Tensors = dict[str, torch.Tensor]


def tensors_in(directory: Path) -> Tensors:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def bits(tensors: Tensors) -> dict[str, tuple]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(read(path) | changes))


@pytest.fixture
def variant(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Copy a tiny checkpoint, with other tensors, in as many shards as asked for."""

    def make(name: str, change: Callable[[Tensors], Tensors] = lambda t: t, shards: int = 1) -> Path:
        out = tmp_path / f"variant-{name}"
        shutil.copytree(checkpoint(name), out)
        tensors = change(load_file(out / "model.safetensors"))
        if shards == 1:
            save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
            return out
        (out / "model.safetensors").unlink()
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
            save_file(part, out / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return out

    return make


@pytest.mark.parametrize("layout", ["transformers", "native", "apple"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_for_bit(checkpoint, tmp_path: Path, name: str, layout: str):
    source = checkpoint(name)
    before = hashes(source)
    there = convert(source, tmp_path / "there", layout)
    assert (there.source_layout, there.layout, detect_layout(tmp_path / "there")) == ("apple", layout, layout)
    convert(tmp_path / "there", tmp_path / "back", "apple")

    assert bits(tensors_in(tmp_path / "back")) == bits(tensors_in(source))
    assert hashes(source) == before
    old, new = read(source / "config.json"), read(tmp_path / "back" / "config.json")
    assert {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} <= {
        "auto_map",
        "transformers_version",
    }
    same = ("generation_config.json", "vocab.json", "merges.txt")
    assert all((tmp_path / "back" / file).read_bytes() == (source / file).read_bytes() for file in same)


@pytest.mark.parametrize("layout", ["transformers", "native"])
def test_shards_and_dtype_are_kept(variant, tmp_path: Path, layout: str):
    source = variant("qwen2_tied", lambda t: {n: x.bfloat16() if x.is_floating_point() else x for n, x in t.items()}, 3)
    convert(source, tmp_path / "there", layout)
    index = read(tmp_path / "there" / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "there" / file)
    convert(tmp_path / "there", tmp_path / "back")
    assert bits(tensors_in(tmp_path / "back")) == bits(tensors_in(source))


@pytest.mark.parametrize("layout", ["transformers", "native", "apple"])
def test_twice_changes_nothing(checkpoint, tmp_path: Path, layout: str):
    convert(checkpoint("qwen2_anyres"), tmp_path / "once", layout)
    convert(tmp_path / "once", tmp_path / "twice", layout)
    assert hashes(tmp_path / "twice") == hashes(tmp_path / "once")


@pytest.mark.parametrize("layout", ["transformers", "apple"])
def test_result_loads(checkpoint, tmp_path: Path, layout: str):
    convert(checkpoint("llama"), tmp_path / "out", layout)
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("original_names", [True, False])
def test_saved_models_convert(checkpoint, tmp_path: Path, original_names: bool):
    source = checkpoint("qwen2_untied")
    model = AutoModelForImageTextToText.from_pretrained(source)
    model.save_pretrained(tmp_path / "saved", save_original_format=original_names)
    assert (NORM in load_file(tmp_path / "saved" / "model.safetensors")) == original_names
    convert(tmp_path / "saved", tmp_path / "out", "apple")
    assert bits(tensors_in(tmp_path / "out")) == bits(tensors_in(source))


@pytest.mark.parametrize("layout", ["transformers", "native"])
def test_train_time_encoder_passes_and_is_declared(variant, golden, golden_fill, tmp_path: Path, layout: str):
    index = read(golden / "train_form_weights.json")

    def train_time(tensors: Tensors) -> Tensors:
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(ENCODER)}
        return rest | {
            name: torch.zeros((), dtype=torch.int64)
            if spec["dtype"] == "I64"
            else torch.from_numpy(golden_fill.fill(name, tuple(spec["shape"])))
            for name, spec in index.items()
        }

    source = variant("qwen2_tied", train_time)
    convert(source, tmp_path / "there", layout)
    convert(tmp_path / "there", tmp_path / "back", "apple")
    assert bits(tensors_in(tmp_path / "back")) == bits(tensors_in(source))
    vision = read(tmp_path / "back" / "config.json")["vision_config"]
    assert vision["reparameterized"] is False
    assert vision["projection_dim"] == 0


def test_tensors_decide_whether_the_head_is_tied(variant, tmp_path: Path):
    source = variant("qwen2_tied", lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    done = convert(source, tmp_path / "out", "transformers")
    assert read(tmp_path / "out" / "config.json").get("tie_word_embeddings", False) is False
    assert "tie_word_embeddings" in done.notes[0]


def test_a_missing_head_means_tied(variant, tmp_path: Path):
    source = variant("qwen2_tied", lambda t: {name: x for name, x in t.items() if name != "lm_head.weight"})
    edit(source / "config.json", tie_word_embeddings=False)
    convert(source, tmp_path / "out", "apple")
    assert read(tmp_path / "out" / "config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors_in(tmp_path / "out")


def test_rotary_frequencies_of_old_checkpoints_are_dropped(variant, tmp_path: Path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    done = convert(variant("llama", lambda t: t | {name: torch.ones(8)}), tmp_path / "out", "apple")
    assert done.dropped == (name,)
    assert name not in tensors_in(tmp_path / "out")


def test_other_files(variant, tmp_path: Path):
    source = variant("qwen2_tied")
    for name in ("LICENSE", "README.md", "llava_qwen.py", "training_args.bin", ".gitattributes"):
        (source / name).write_text(name)
    (source / "folder").mkdir()
    done = convert(source, tmp_path / "out", "transformers")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "README.md"} <= names
    assert not {"llava_qwen.py", "training_args.bin", ".gitattributes", "folder"} & names
    assert [entry.split(" ")[0] for entry in done.not_copied] == [
        ".gitattributes",
        "folder",
        "llava_qwen.py",
        "training_args.bin",
    ]
    convert(source, tmp_path / "same", "apple")
    assert (tmp_path / "same" / "llava_qwen.py").exists()


def test_progress_counts_every_byte(checkpoint, tmp_path: Path):
    calls: list[tuple[int, int, str]] = []
    done = convert(checkpoint("llama"), tmp_path / "out", "native", progress=lambda *call: calls.append(call))
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1][0] == calls[-1][1] == done.num_bytes


def test_failure_leaves_nothing(checkpoint, tmp_path: Path):
    def fail(done: int, total: int, name: str) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        convert(checkpoint("llama"), tmp_path / "out", "native", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_kill_leaves_nothing_that_looks_finished(checkpoint, tmp_path: Path):
    script = (
        "import os, signal, sys\n"
        "from transformers_fastvlm.checkpoints import convert\n"
        "stop = lambda done, total, name: done > total / 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(sys.argv[1], sys.argv[2], 'transformers', progress=stop)\n"
    )
    source = checkpoint("llama")
    before = hashes(source)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script, source, tmp_path / "out"], env=environment, check=False)
    assert run.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".out.incomplete-") for path in left] == [True]
    assert not (left[0] / "config.json").exists()
    assert hashes(source) == before


@pytest.mark.parametrize("filled", [True, False])
def test_target_is_never_overwritten(checkpoint, tmp_path: Path, filled: bool):
    out = tmp_path / "out"
    out.mkdir()
    if not filled:
        convert(checkpoint("llama"), out, "apple")
        assert detect_layout(out) == "apple"
        return
    (out / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        convert(checkpoint("llama"), out, "apple")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_target_inside_the_source_and_unknown_layout(checkpoint, tmp_path: Path):
    with pytest.raises(ValueError, match="lies inside the source"):
        convert(checkpoint("llama"), checkpoint("llama") / "out", "apple")
    with pytest.raises(ValueError, match="'mlx'; expected one of"):
        convert(checkpoint("llama"), tmp_path / "out", "mlx")
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        convert(tmp_path / "nowhere", tmp_path / "out", "apple")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"model.lora.weight": torch.zeros(1)},
            r"1 tensors that FastVLM does not have: model\.lora\.weight",
        ),
        (
            lambda t: t | {"model.layers.7.mlp.up_proj.weight": torch.zeros(1)},
            r"does not have: model\.language_model\.lay",
        ),
        (lambda t: t | {f"{ENCODER}network.4.0.extra": torch.zeros(1)}, r"network\.4\.0\.extra"),
        (lambda t: {name: x for name, x in t.items() if name != NORM}, r"lacks 1 tensors .*norm\.weight"),
        (lambda t: t | {NORM: torch.zeros(65)}, r"contradict config\.json: .*norm\.weight \(65,\), expected \(64,\)"),
        (lambda t: t | {to_our_name(NORM): t[NORM].clone()}, "Apple's names and under ours"),
    ],
)
def test_wrong_tensors(variant, tmp_path: Path, change, message: str):
    with pytest.raises(ValueError, match=message):
        convert(variant("llama", change), tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_damaged_weights(variant, tmp_path: Path):
    source = variant("llama", shards=2)
    first = source / "model-00001-of-00002.safetensors"
    whole = first.read_bytes()
    for kept in (0, 4, 100, len(whole) - 1):
        first.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="truncated or"):
            convert(source, tmp_path / "out")
    first.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        convert(source, tmp_path / "out")
    shutil.copy(source / "model-00002-of-00002.safetensors", first)
    with pytest.raises(ValueError, match="contradicts model"):
        convert(source, tmp_path / "out")
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 2 shards .*00001"):
        convert(source, tmp_path / "out")
    (source / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert(source, tmp_path / "out")
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        convert(source, tmp_path / "out")
    (source / "model.safetensors.index.json").unlink()
    (source / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"It has pytorch_model\.bin"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "..\\secret", ""])
def test_index_cannot_leave_its_folder(variant, tmp_path: Path, shard: str):
    source = variant("llama", shards=2)
    shutil.copy(source / "model-00001-of-00002.safetensors", tmp_path / "secret.safetensors")
    index = read(source / "model.safetensors.index.json")
    edit(source / "model.safetensors.index.json", weight_map=index["weight_map"] | {NORM: shard})
    with pytest.raises(ValueError, match="Do not trust"):
        convert(source, tmp_path / "out")


def test_other_models(variant, tmp_path: Path):
    source = variant("llama")
    edit(source / "config.json", model_type="llava")
    with pytest.raises(ValueError, match="model_type 'llava'; expected llava_qwen2"):
        convert(source, tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        convert(source, tmp_path / "out")
