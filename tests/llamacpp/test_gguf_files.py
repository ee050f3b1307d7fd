# SPDX-License-Identifier: Apache-2.0
"""The GGUF export: its files, every tensor and field of them, and what llama.cpp computes from them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the export to GGUF is an extra")
pytest.importorskip("onnx", reason="the export to GGUF is an extra")
pytest.importorskip("onnxscript", reason="the export to GGUF is an extra")
pytest.importorskip("llama_cpp", reason="llama.cpp is an extra")

import onnxruntime  # noqa: E402
from gguf_cases import PRECISIONS, saved_model, tiny_export, tokenize  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import AutoConfig, LlamaTokenizer  # noqa: E402

from transformers_fastvlm import FastVLMConfig, FastVLMForConditionalGeneration, FastVLMProcessor  # noqa: E402
from transformers_fastvlm.checkpoints import tiny_checkpoint  # noqa: E402
from transformers_fastvlm.data.scenes import SceneDataset  # noqa: E402
from transformers_fastvlm.engines.llama_library import quantize_file  # noqa: E402
from transformers_fastvlm.export import Export, Source, export, gguf_export  # noqa: E402
from transformers_fastvlm.export.gguf_vocabulary import plain_template, read_vocabulary  # noqa: E402
from transformers_fastvlm.export.llamacpp_check import greedy  # noqa: E402
from transformers_fastvlm.storage.digests import file_digest  # noqa: E402


@pytest.fixture(scope="module")
def tiny_gguf() -> Export:
    """The tiny model in every precision, read-only."""
    return tiny_export()


CHECKPOINTS = ("qwen2_tied", "qwen2_untied", "llama")
"""Grouped queries with a tied head and without, and a Llama."""

# The largest error of a value by the largest magnitude in its block: half a step, or a whole one where the scale fits
# one sign only, and the rounding of the scale. Blocks of k-quants have 256 values.
LARGEST_ERROR = {"F32": 0.0, "F16": 2**-11, "Q8_0": 0.6 / 127, "Q5_0": 1.02 / 16, "Q4_0": 1.02 / 8}
LARGEST_ERROR |= {"Q4_K": 0.12, "Q6_K": 0.035}


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return (type, float32 values) of each tensor of a file by name."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (tensor.tensor_type.name, values.reshape(tuple(tensor.shape.tolist())[::-1]))
    return found


def expected_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Return what a file must hold, from the names of llama.cpp and the model's own rotation."""
    model = FastVLMForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    text = model.config.text_config
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    language = model.model.language_model
    found = {"token_embd.weight": language.embed_tokens.weight, "output_norm.weight": language.norm.weight}
    if not model.config.tie_word_embeddings:
        found["output.weight"] = model.lm_head.weight
    for number, layer in enumerate(language.layers):
        for name, weight in layer.named_parameters():
            part, _, kind = name.rpartition(".")
            if text.model_type == "llama" and parts[part] in ("attn_q", "attn_k"):
                heads = text.num_attention_heads if parts[part] == "attn_q" else text.num_key_value_heads
                # Channel i of a head and channel i + half of it are neighbours in llama.cpp.
                half = weight.shape[0] // heads // 2
                order = [
                    h * 2 * half + i + second * half for h in range(heads) for i in range(half) for second in (0, 1)
                ]
                weight = weight[order]
            found[f"blk.{number}.{parts[part]}.{kind}"] = weight
    return {name: weight.detach().float().numpy() for name, weight in found.items()}


def blockwise_error(values: np.ndarray, wanted: np.ndarray, block: int) -> float:
    """Return the largest error of a value divided by the largest magnitude in its block."""
    shape = (-1, block if wanted.shape[-1] % block == 0 else wanted.shape[-1])
    error, size = np.abs(values - wanted).reshape(shape).max(1), np.abs(wanted).reshape(shape).max(1)
    return float((error / np.maximum(size, 1e-20)).max())


def check_tensors(path: Path, directory: Path) -> set[str]:
    """Compare every tensor of a file with the checkpoint, and return the types of its matrices."""
    found, wanted = tensors(path), expected_tensors(directory)
    assert found.keys() == wanted.keys()
    for name, (kind, values) in found.items():
        assert values.shape == wanted[name].shape, name
        block = {"F32": 1, "Q4_K": 256, "Q6_K": 256}.get(kind, 32)
        assert blockwise_error(values, wanted[name], block) <= LARGEST_ERROR[kind], (name, kind)
        assert kind == "F32" or wanted[name].ndim == 2, name
    return {kind for name, (kind, _) in found.items() if wanted[name].ndim == 2}


@pytest.fixture(scope="module")
def exported(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """Export a golden checkpoint by name in every precision, once."""
    done: dict[str, Export] = {}

    def get(name: str) -> Export:
        if name not in done:
            out = tmp_path_factory.mktemp("golden") / name
            done[name] = export("gguf", checkpoint(name), out, precision=PRECISIONS)
        return done[name]

    return get


def test_files(tiny_gguf: Export) -> None:
    files = tiny_gguf.files
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        "vision_encoder.onnx",
    } <= files.keys()
    sizes = {name: files[f"language_model-{name}.gguf"] for name in PRECISIONS}
    assert sizes["q4_0"] < sizes["q4_k_m"] < sizes["q8_0"] < sizes["float16"] < sizes["float32"]
    assert [name for name in files if name.endswith(".gguf")] == sorted(f"language_model-{n}.gguf" for n in PRECISIONS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor(name: str, precision: str, exported: Any, checkpoint: Callable[[str], Path]) -> None:
    path = exported(name).directory / f"language_model-{precision}.gguf"
    types = check_tensors(path, checkpoint(name))
    expected = {"float32": {"F32"}, "float16": {"F16"}, "q8_0": {"Q8_0"}, "q4_0": {"Q4_0", "Q8_0"}}
    # Rows of 64 and 160 do not divide into the blocks of 256 of k-quants.
    assert types == expected.get(precision, {"Q5_0", "Q8_0"})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_embeddings_keep_eight_bits(precision: str, exported: Any) -> None:
    found = tensors(exported("qwen2_untied").directory / f"language_model-{precision}.gguf")
    expected = {"float32": "F32", "float16": "F16", "q4_k_m": "Q8_0", "q4_0": "Q8_0", "q8_0": "Q8_0"}[precision]
    assert found["output.weight"][0] == expected
    if precision != "q4_k_m":
        assert found["token_embd.weight"][0] == expected


def test_k_quants_where_rows_divide(tmp_path: Path) -> None:
    directory = saved_model(tmp_path / "wide", hidden_size=256, intermediate_size=512)
    done = export("gguf", directory, tmp_path / "out", precision=("q4_k_m", "float32"))
    types = check_tensors(done.directory / "language_model-q4_k_m.gguf", directory)
    assert types == {"Q4_K", "Q6_K"}
    assert done.report.errors["q4_k_m: logits"] > 1e-3
    assert "language_model-q4_k_m.original" not in done.files


def test_rows_that_do_not_divide_become_float16(tmp_path: Path) -> None:
    """As libllama does."""
    directory = saved_model(tmp_path / "odd", hidden_size=80, intermediate_size=128, num_attention_heads=2)
    done = export("gguf", directory, tmp_path / "out", precision=("q8_0", "q4_0", "q4_k_m"))
    for precision, whole in (("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("q4_k_m", "Q5_0")):
        found = tensors(done.directory / f"language_model-{precision}.gguf")
        assert found["blk.0.attn_q.weight"][0] == found["token_embd.weight"][0] == "F16"
        assert found["blk.0.ffn_down.weight"][0] in (whole, "Q8_0")
        check_tensors(done.directory / f"language_model-{precision}.gguf", directory)


def test_fields(tiny_gguf: Export, exported: Any) -> None:
    for name in PRECISIONS:
        found = fields(tiny_gguf.directory / f"language_model-{name}.gguf")
        config = AutoConfig.from_pretrained(tiny_gguf.directory)
        assert found["general.architecture"] == "qwen2"
        assert found["general.license"] == "apache-2.0"
        assert found["fastvlm.image_token_id"] == config.image_token_id
        assert found["fastvlm.image_tokens"] == (config.vision_config.image_size // 64) ** 2
        assert found["fastvlm.hidden_size"] == config.text_config.hidden_size == found["qwen2.embedding_length"]
        assert found["fastvlm.config_sha256"] == file_digest(tiny_gguf.directory / "config.json")
        types = {"float32": 0, "float16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15}
        assert found["general.file_type"] == types[name]
        assert found["qwen2.rope.freq_base"] == 10000.0
        assert found["tokenizer.ggml.eos_token_id"] == 482
        assert found["tokenizer.ggml.add_bos_token"] is False
        assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    found = fields(exported("qwen2_untied").directory / "language_model-q8_0.gguf")
    assert found["qwen2.rope.freq_base"] == 1000000.0
    assert "general.license" not in found and "general.base_model.count" not in found


def test_origin_and_licence_of_apples_weights(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    done = export("gguf", checkpoint("qwen2_tied"), tmp_path / "out", name="apple/FastVLM-0.5B")
    found = fields(done.directory / "language_model-q8_0.gguf")
    assert found["general.name"] == "apple/FastVLM-0.5B"
    assert found["general.license"] == "apple-amlr"
    assert found["general.base_model.0.name"] == "FastVLM-0.5B"
    assert found["general.base_model.0.organization"] == "apple"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/apple/FastVLM-0.5B"


TEXTS = (
    "What number is written?",
    "<|im_start|>user\nDescribe  the   image.<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing ",
    "Größe, naïve, 図, 🙂 and ▁",
    "tabs\tand\r\nlines\n\n\n",
    "x = {'a': [1, 22, 333]}; I'll, WE'RE",
)


def test_llamacpp_reads_text_as_the_tokenizer_does(tiny_gguf: Export) -> None:
    tokenizer = FastVLMProcessor.from_pretrained(tiny_gguf.directory).tokenizer
    rows = SceneDataset(20, seed=5)
    texts = [*TEXTS, *(row["messages"][0]["content"] for row in (rows[index] for index in range(20)))]
    found = tokenize(tiny_gguf.directory / "language_model-q8_0.gguf", texts)
    assert found == [tokenizer(text)["input_ids"] for text in texts]


def test_the_template_in_the_file_renders_what_the_processor_does(tiny_gguf: Export) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = fields(tiny_gguf.directory / "language_model-q8_0.gguf")["tokenizer.chat_template"]
    assert template == plain_template("qwen2")
    processor = FastVLMProcessor.from_pretrained(tiny_gguf.directory)
    for messages in (
        [{"role": "user", "content": "Who are you?"}],
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "And <image> now?"},
        ],
    ):
        render = Jinja2ChatFormatter(template, eos_token="<|im_end|>", bos_token="", add_generation_prompt=True)
        assert render(messages=messages).prompt == processor.apply_chat_template(messages, add_generation_prompt=True)


@pytest.fixture(scope="module")
def sentencepiece() -> LlamaTokenizer:
    """A small tokenizer of Vicuna's kind."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    )
    rows = SceneDataset(300, seed=3)
    texts = (m["content"].removeprefix("<image>\n") for index in range(300) for m in rows[index]["messages"])
    trained.train_from_iterator(texts, trainer)
    content = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    return LlamaTokenizer(vocab=content["vocab"], merges=merges, add_bos_token=False)


def test_a_vocabulary_of_vicunas_kind(
    sentencepiece: LlamaTokenizer, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    rows = len(sentencepiece)
    directory = tmp_path / "vicuna"
    directory.mkdir()
    content = json.loads((checkpoint("llama") / "config.json").read_text())
    content |= {"vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "config.json").write_text(json.dumps(content))
    sentencepiece.save_pretrained(directory)
    torch.manual_seed(0)
    config = FastVLMConfig.from_pretrained(directory)
    model = FastVLMForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory)
    done = export("gguf", directory, tmp_path / "out", precision="float32")
    found = fields(done.directory / "language_model-float32.gguf")
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["general.architecture"] == "llama"
    assert found["fastvlm.image_token_id"] == rows == len(found["tokenizer.ggml.tokens"])  # beyond the embeddings
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256 and types[259] == 1
    assert done.report.errors["float32: logits"] < 1e-4
    scenes = SceneDataset(30, seed=9)
    texts = [scenes[index]["messages"][0]["content"].removeprefix("<image>\n") for index in range(30)]
    texts += ["Größe, 図 and 🙂", "a\nb  c"]
    assert tokenize(done.directory / "language_model-float32.gguf", texts) == [
        sentencepiece(text)["input_ids"] for text in texts
    ]


def test_another_tokenizer_gives_ids_only() -> None:
    class Other:
        backend_tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))

    assert read_vocabulary(Other(), 4).model == "none"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_answer_are_pytorchs(name: str, exported: Any) -> None:
    errors = exported(name).report.errors
    assert errors["float32: image features"] < 1e-5
    assert errors["float32: logits"] < 1e-4
    assert errors["float16: logits"] < 1e-2
    # Far from exact: these files do hold quantized weights.
    assert 1e-4 < errors["q8_0: logits"] < errors["q4_0: logits"] < 0.5
    assert 1e-4 < errors["q4_k_m: logits"] < 0.5


@torch.no_grad()
def test_answers_about_scenes(tiny_gguf: Export) -> None:
    processor = FastVLMProcessor.from_pretrained(tiny_gguf.directory)
    model = FastVLMForConditionalGeneration.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    session = onnxruntime.InferenceSession(str(tiny_gguf.directory / gguf_export.VISION_ENCODER))
    rows = SceneDataset(6, seed=77)
    for row in (rows[index] for index in range(6)):
        question = row["messages"][0]["content"].removeprefix("<image>\n")
        content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = inputs["input_ids"][0].tolist()
        start, count = ids.index(processor.image_token_id), ids.count(processor.image_token_id)
        (features,) = session.run(None, {"pixel_values": inputs["pixel_values"].numpy()})
        output = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, len(ids) :].tolist()
        logits = model(**inputs).logits[0, -1].numpy()
        path = tiny_gguf.directory / "language_model-float32.gguf"
        found, answer = greedy(path, [ids[:start], features[0], ids[start + count :]], len(output))
        assert np.abs(found - logits).max() < 1e-4 * np.abs(logits).max()
        assert list(answer) == output


def test_the_directory_has_a_processor_and_a_configuration(tiny_gguf: Export) -> None:
    theirs, ours = (FastVLMProcessor.from_pretrained(place) for place in (tiny_gguf.directory, tiny_checkpoint()))
    row = SceneDataset(1, seed=1)[0]
    call = {"text": "<image>\nWhat is it?", "images": row["images"], "return_tensors": "pt"}
    for name, values in ours(**call).items():
        assert torch.equal(theirs(**call)[name], values), name
    assert theirs.chat_template == ours.chat_template
    config, original = (AutoConfig.from_pretrained(place) for place in (tiny_gguf.directory, tiny_checkpoint()))
    assert config.text_config.to_dict() == original.text_config.to_dict()
    assert config.image_token_id == original.image_token_id
    text = "".join(path.read_text() for path in tiny_gguf.directory.glob("*.json"))
    assert str(tiny_checkpoint()) not in text


def test_size_and_anyres(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    done = export("gguf", checkpoint("qwen2_anyres"), tmp_path / "out", precision="float32", sizes=(192,))
    assert fields(done.directory / "language_model-float32.gguf")["fastvlm.image_tokens"] == 9
    assert any("AnyRes" in limit for limit in done.report.limits)
    processor = FastVLMProcessor.from_pretrained(done.directory)
    row = SceneDataset(1, seed=1)[0]
    inputs = processor(text="<image>\nWhat?", images=row["images"], return_tensors="pt")
    assert tuple(inputs["pixel_values"].shape) == (1, 3, 192, 192)
    assert inputs["input_ids"][0].tolist().count(processor.image_token_id) == 9
    config = AutoConfig.from_pretrained(done.directory)
    assert (config.image_aspect_ratio, config.vision_config.image_size) == ("pad", 192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, "use_sliding_window True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_llamacpp_would_compute_otherwise_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen2_tied"), source)
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=message):
        export("gguf", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_llamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
    with pytest.raises(
        ImportError, match=r'q4_k_m needs llama-cpp-python: pip install "transformers-fastvlm\[llamacpp\]"'
    ):
        export("gguf", "tiny", tmp_path / "out", precision=("q8_0", "q4_k_m"))
    assert list(tmp_path.iterdir()) == []
    done = export("gguf", "tiny", tmp_path / "out")
    assert done.report.errors.keys() == {"float32: image features"}
    assert "the encoder only" in (done.report.checked_in or "")
    assert any("was not run" in note for note in done.report.notes)


@pytest.mark.parametrize("moment", ["write_gguf", "_write_encoder", "_logits_error"])
def test_an_interrupted_export_leaves_nothing(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(gguf_export, moment)

    def interrupted(*args: Any) -> None:
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_export, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export("gguf", "tiny", tmp_path / "out", precision=("q4_0", "q4_k_m"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_an_error(tiny_gguf: Export, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes((tiny_gguf.directory / "language_model-q8_0.gguf").read_bytes()[:-100_000])
    with pytest.raises(RuntimeError, match=r"llama.cpp cannot load .*cut.gguf: .*"):
        greedy(path, [[1, 2, 3]], 1)
    with pytest.raises(RuntimeError, match=r"llama.cpp cannot write .*out.gguf: .*"):
        quantize_file(path, tmp_path / "out.gguf", 15, 1)
    whole = tiny_gguf.directory / "language_model-q8_0.gguf"
    with pytest.raises(ValueError, match=r"shape \(2, 64\); expected \(2, 192\)"):
        greedy(whole, [[1], np.zeros((2, 64), np.float32)], 1)


def test_long_prompts_take_several_calls(tiny_gguf: Export) -> None:
    """More rows than a batch holds would end the process."""
    path = tiny_gguf.directory / "language_model-float32.gguf"
    ids = [index % 400 for index in range(700)]
    model = FastVLMForConditionalGeneration.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    found, _ = greedy(path, [ids], 1)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_nothing_of_llamacpps_log_is_printed(tiny_gguf: Export, capfd: pytest.CaptureFixture[str]) -> None:
    tokenize(tiny_gguf.directory / "language_model-q8_0.gguf", ["a"])
    assert capfd.readouterr() == ("", "")


def test_the_card(tiny_gguf: Export) -> None:
    text = (tiny_gguf.directory / "README.md").read_text()
    assert "Checked in llama-cpp-python" in text
    assert "| float32: logits |" in text
    assert "Ollama" in text
    assert "--engine llamacpp" in text
    assert Source("tiny").licence == "apache-2.0"
