# SPDX-License-Identifier: Apache-2.0
"""`fastvlm info`: what it reads, for each layout and from afar."""

import json
from types import SimpleNamespace

import pytest
import torch

from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration
from transformers_fastvlm.checkpoints import convert
from transformers_fastvlm.cli import info
from transformers_fastvlm.cli.cli_errors import UserError
from transformers_fastvlm.cli.model_sources import licence_of


def test_json(checkpoint, run) -> None:
    facts = json.loads(run("info", checkpoint("qwen2_tied"), "--json").stdout)
    model = FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_tied"))
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["parameters"]["buffers"] == sum(b.numel() for n, b in model.named_buffers() if "vision_tower" in n)
    assert facts["parameters"]["head"] == 0 and facts["language_model"]["tied_head"]
    assert (facts["layout"], facts["model_type"], facts["dtype"]) == ("apple", "llava_qwen2", "float32")
    assert facts["image_token_id"] == model.config.image_token_id == 483
    assert facts["tokens_per_image"] == {"256": 16, "512": 64, "768": 144, "1024": 256, "1536": 576, "2048": 1024}
    assert facts["image_processing"]["aspect_ratio"] == "pad"
    assert facts["licence"] is None


def test_text(checkpoint, run) -> None:
    result = run("info", checkpoint("qwen2_untied"))
    assert result.stderr == ""
    for words in ("qwen2: 3 layers", "merged", "projector", "padded to a black square", "256: 16, 512: 64", "483"):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1] == "licence           not stated"


@pytest.mark.parametrize(
    ("licence", "widths", "expected"),
    [
        ("apple-amlr", [16, 32], "Apple's weights are for research only"),
        (None, [96, 192, 384, 768, 1536], "not stated; Apple's weights are for research only"),
        (None, [16, 32], "not stated"),
        ("apache-2.0", [96, 192, 384, 768, 1536], "apache-2.0"),
    ],
)
def test_line_of_the_licence(checkpoint, licence: str | None, widths: list[int], expected: str) -> None:
    facts = info._facts(str(checkpoint("qwen2_tied")))
    facts["licence"], facts["encoder"]["widths"] = licence, widths
    (line,) = [line for line in info._lines(facts) if line.startswith("licence")]
    assert line.startswith(f"licence           {expected}") and ("research only" in line) == ("research" in expected)


def test_lines_are_broken_between_words() -> None:
    lines = [
        f"{'encoder':<18}merged: depths 1 1 2 3 1, widths 16 32 64",
        "  total                 3,828,096",
        "model             a/b",
    ]
    assert info._wrapped(lines, 45) == [
        "encoder           merged: depths 1 1 2 3 1,",
        "                  widths 16 32 64",
        *lines[1:],
    ]
    assert info._wrapped(lines, 100) == lines


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", '"text"', "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]
)
@pytest.mark.parametrize("verb", ["info", "generate", "convert"])
def test_a_config_that_is_no_object(copy_of, fails, tmp_path, verb: str, content: str) -> None:
    model = copy_of("qwen2_tied")
    (model / "config.json").write_text(content)
    words = {
        "info": (model,),
        "generate": ("-p", "?", "-m", model),
        "convert": (model, tmp_path / "out", "--to", "apple"),
    }
    assert f"config.json of '{model}' is not a JSON object" in fails(verb, *words[verb])


def test_untied_head(checkpoint, run) -> None:
    facts = json.loads(run("info", checkpoint("qwen2_untied"), "--json").stdout)
    model = FastVLMForConditionalGeneration.from_pretrained(checkpoint("qwen2_untied"))
    assert facts["parameters"]["head"] == model.lm_head.weight.numel()
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())


def test_anyres(checkpoint, run) -> None:
    facts = json.loads(run("info", checkpoint("qwen2_anyres"), "--json").stdout)
    assert facts["image_processing"]["merge"] == "spatial_unpad"
    assert facts["tokens_per_image"]["512x512"] == 16 + 8 * 9
    assert "tiles" in run("info", checkpoint("qwen2_anyres")).stdout


@pytest.mark.parametrize("layout", ["transformers", "native"])
def test_other_layouts(checkpoint, tmp_path, run, layout: str) -> None:
    apple = json.loads(run("info", checkpoint("qwen2_tied"), "--json").stdout)
    convert(checkpoint("qwen2_tied"), tmp_path / "out", layout)
    facts = json.loads(run("info", tmp_path / "out", "--json").stdout)
    assert facts["layout"] == layout
    for key in ("tokens_per_image", "image_token_id", "dtype", "image_processing"):
        assert facts[key] == apple[key]
    for part in ("encoder", "projector", "embeddings", "language_model"):
        assert facts["parameters"][part] == apple["parameters"][part]


def test_the_published_size(tmp_path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FastVLMConfig.from_preset("0.5b")
    with torch.device("meta"):
        tensors = FastVLMForConditionalGeneration(config).state_dict()
    shapes = {name: ("BF16", tuple(tensor.shape)) for name, tensor in tensors.items()}
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(info, "_tensors", lambda model, directory, native: shapes)
    facts = json.loads(run("info", tmp_path, "--json").stdout)
    parameters = facts["parameters"]
    # The encoder has 125.07 million with the CLIP head and 122.71 million without.
    assert round(parameters["encoder"] / 1e6, 2) == 122.71
    assert round((parameters["encoder"] + parameters["clip_head"]) / 1e6, 2) == 125.07
    assert parameters["embeddings"] == 151936 * 896 and parameters["head"] == 0
    assert facts["memory_bytes"]["as_stored"] == 2 * (parameters["total"] + parameters["buffers"])
    assert facts["dtype"] == facts["dtype_on_cpu"] == "bfloat16"


def test_weights_that_are_not_here(checkpoint, tmp_path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub repository only the headers are fetched."""
    local = json.loads(run("info", checkpoint("qwen2_tied"), "--json").stdout)
    found = info.__dict__["_tensors"](str(checkpoint("qwen2_tied")), checkpoint("qwen2_tied"), False)
    file = SimpleNamespace(tensors={name: SimpleNamespace(dtype=dt, shape=list(s)) for name, (dt, s) in found.items()})
    metadata = SimpleNamespace(files_metadata={"model.safetensors": file})
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda model: metadata)
    assert info._tensors("someone/model", tmp_path, native=False) == found
    assert local["parameters"]["total"] > 0

    def unreachable(model: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", unreachable)
    with pytest.raises(UserError, match="headers cannot be downloaded"):
        info._tensors("someone/model", tmp_path, native=False)


def test_refuses(copy_of, tmp_path, fails, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy_of("qwen2_tied")
    monkeypatch.setattr(info, "_tensors", lambda *_, **__: {"score.weight": ("F32", (2, 64))})
    assert "'score.weight', which is not part of FastVLM" in fails("info", model)
    monkeypatch.undo()
    (model / "model.safetensors").write_bytes(b"cut")
    assert "cannot be read as safetensors" in fails("info", model)
    assert "has no config.json" in fails("info", tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", "---\nlicense: other\nlicense_name: apple-amlr\n---\n", "apple-amlr"),
        ("README.md", "---\ntags: [a]\nlicense: 'mit'\n---\nlicense: no\n", "mit"),
        ("README.md", "# No front matter\nlicense: mit\n", None),
        ("LICENSE", "Apple Machine Learning Research Model is licensed ...", "apple-amlr"),
        ("LICENSE", "MIT License", None),
    ],
)
def test_licence(tmp_path, file: str, text: str, expected: str | None) -> None:
    (tmp_path / file).write_text(text)
    assert licence_of(str(tmp_path)) == expected


def test_licence_of_apples_repositories() -> None:
    assert licence_of("apple/FastVLM-0.5B") == "apple-amlr"
