# SPDX-License-Identifier: Apache-2.0
"""`fastvlm bench`: its table, its record, and options that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_fastvlm.bench.photo import make_photo

Run = Callable[..., Any]


def test_a_table_and_a_record(run: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory, image, out = checkpoint("qwen2_tied"), tmp_path / "photo.jpg", tmp_path / "bench.json"
    make_photo(300, 200).save(image)
    words = ["bench", directory, "--against", directory, "--size", "256", "--image", image, "--threads", "1"]
    words += ["--repetitions", "2", "--new-tokens", "4", "--device", "cpu", "--note", "tiny", "--out", out]
    result = run(*words)
    lines = result.stdout.splitlines()
    header = next(line for line in lines if "preprocess" in line).split()
    rows = [line.split() for line in lines if line.split()[:1] == ["qwen2_tied"] and "takes" not in line]
    assert header[:5] == ["model", "px", "dtype", "batch", "tokens"] and header[-1] == "GiB"
    assert [row[1:4] for row in rows] == [["256", "float32", "1"], ["-", "float32", "1"]]
    assert rows[0][4] == "36" and all(float(number) > 0 for row in rows for number in row[5:9])
    assert "qwen2_tied takes" in lines[-2] and lines[-2].endswith("of qwen2_tied at 256 px (float32, batch 1)")
    assert lines[-1].endswith("2 runs in turns after 1 to warm up")
    assert result.stderr.splitlines()[-1] == f"wrote {out}"
    record = json.loads(out.read_text())
    encode = record["results"][0]["seconds"]["encode"]["median"]
    assert header[6] == "encode" and float(rows[0][6]) == pytest.approx(1000 * encode, rel=0.01)
    _check(record)


def test_the_packages_own_model(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "photo.jpg"
    make_photo(300, 200).save(image)
    words = ["--image", image, "--threads", "1", "--repetitions", "1", "--warmup", "0", "--new-tokens", "4"]
    record = json.loads(run("bench", "tiny", *words, "--device", "cpu", "--json").stdout)
    (result,) = record["results"]
    assert (result["model"], result["resolution"], result["image_tokens"]) == ("tiny", 256, 16)
    assert result["weights"] == "checkpoint" and result["seconds"]["first_token"]["median"] > 0
    assert capfd.readouterr().err == "", "the processes that measure have nothing to say"


def test_engines_are_compared_and_one_is_recommended(
    run: Run, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    picture, other, out = tmp_path / "photo.jpg", checkpoint("qwen2_tied"), tmp_path / "bench.json"
    make_photo(300, 200).save(picture)
    words = ["--image", picture, "--threads", "1", "--repetitions", "2", "--new-tokens", "4", "--device", "cpu"]
    named = f"transformers:float32,transformers:bfloat16={other}"
    lines = run("bench", "tiny", "--engine", named, *words, "-o", out).stdout.splitlines()
    header = next(line for line in lines if "first token" in line).split()
    rows = [line.split() for line in lines if line.split()[:1] == ["transformers"]]
    assert header[:5] == ["engine", "precision", "device", "px", "load"] and header[-1] == "GiB"
    assert [row[1:4] for row in rows] == [["float32", "cpu", "256"], ["bfloat16", "cpu", "256"]]
    assert all(float(number) > 0 for row in rows for number in (*row[4:7], *row[8:10]))
    record = json.loads(out.read_text())
    assert record["kind"] == "engines" and record["machine"]["cpu"] and record["options"]["repetitions"] == 2
    for result in record["results"]:
        seconds = result["seconds"]
        assert 0 < seconds["preprocess"]["median"] < seconds["first_token"]["median"] < result["answer_seconds"]
        assert seconds["first_token"]["runs"] == 2 and result["tokens_per_second"]["median"] > 0
        assert result["image_tokens"] == 16 < result["prompt_tokens"] and result["tokens"] == [4, 4]
        assert result["peak_bytes"] is None or result["peak_bytes"] >= result["imports_bytes"] > 0
    best = record["fastest"]["result"]
    assert record["results"][best]["answer_seconds"] == min(one["answer_seconds"] for one in record["results"])
    model, dtype = (("tiny", "float32"), (other, "bfloat16"))[best]
    command = f"fastvlm generate IMAGE -p QUESTION -m {model} --engine transformers --dtype {dtype} --device cpu"
    assert record["fastest"]["command"] == command
    assert lines[-1].startswith(f"fastest here: transformers in {dtype}, first token after ")
    assert lines[-1].endswith(f" tokens/s: {command}")


def _check(record: dict[str, Any]) -> None:
    parts = ("kind", "machine", "versions", "options", "picture", "results", "ratios")
    assert list(record) == ["format", *parts]
    assert record["kind"] == "models" and record["picture"] == {"drawn": False, "width": 300, "height": 200}
    assert torch.__version__.startswith(record["versions"]["torch"].split("+")[0])
    options = record["options"]
    assert record["machine"]["cpu"] and (options["repetitions"], options["note"]) == (2, "tiny")
    ours, other = record["results"]
    assert ours["reference"] is None and other["reference"] == {"model": "qwen2_tied", "resolution": 256}
    assert (ours["resolution"], other["resolution"], ours["weights"]) == (256, None, "checkpoint")
    for result in (ours, other):
        seconds = result["seconds"]
        assert list(seconds)[:4] == ["preprocess", "encode", "project", "prefill"]
        assert all(set(value) == {"median", "q1", "q3", "min", "max", "runs"} for value in seconds.values())
        assert {value["runs"] for name, value in seconds.items() if name != "unsplit_from_pixels"} == {2}
        assert all(0 < value["min"] <= value["median"] <= value["max"] for value in seconds.values())
        assert set(result["processor_seconds"]) == set(seconds) - {"unsplit_from_pixels"}
        assert result["tokens_per_second"]["median"] > 0 and result["load_seconds"]["model"] > 0
    wall, processor = record["ratios"]
    assert (wall["of"], processor["of"]) == ("seconds", "processor_seconds")
    assert (wall["over"], wall["over_resolution"], wall["resolution"]) == ("qwen2_tied", 256, None)
    expected = other["seconds"]["first_token"]["median"] / ours["seconds"]["first_token"]["median"]
    assert wall["ratios"]["first_token"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("3B",), "'3B' is neither a size (0.5B, 1.5B, 7B)"),
        (("--size", "500"), "size is 500; expected a multiple of 64 from 256 to 2048"),
        (("--size", "big"), "--size is 'big'; expected whole numbers separated by commas"),
        (("--batch", "0"), "batch is 0; expected at least 1"),
        (("--dtype", "int8"), "dtype is 'int8'; expected float32, bfloat16, float16"),
        (("--against", "native,,x"), "--against is 'native,,x'; expected names separated by single commas"),
        (("--against", "nonsense"), "'nonsense' is neither a size"),
        (("--device", "abacus"), "device is 'abacus', which is not available"),
        (("--image", "gone.jpg"), "no image at 'gone.jpg'"),
        (("--out", "gone/bench.json"), "there is no directory gone"),
        (("--encoders", "7B"), "leave out MODEL"),
        (("--encoders", "--size", "512"), "leave out --size"),
        (("tiny", "--engine", "abacus"), "--engine has 'abacus'; expected ENGINE, ENGINE:PRECISION or"),
        (("--engine", "transformers:float32"), "but no MODEL is given; add one, or write transformers:float32="),
        (("tiny", "--engine", "onnx:q8"), "onnx needs the directory of an export, and 'tiny' is not one."),
        (("tiny", "7B", "--engine", "transformers"), "--engine takes one MODEL, but tiny and 7B are given"),
        (("tiny", "--engine", "transformers,transformers"), "the engine transformers tiny is named twice"),
        (("tiny", "--engine", "transformers,"), "--engine is 'transformers,'; expected names separated by single"),
        (("tiny", "--engine", "transformers", "--fuse"), "leave out --fuse"),
        (("tiny", "--engine", "transformers", "--dtype", "bfloat16"), "leave out --dtype"),
        (("tiny", "--engine", "transformers", "--new-tokens", "1"), "new_tokens is 1; expected at least 2"),
        (("tiny", "--engine", "transformers:int3"), "dtype is 'int3'; expected one of auto, float32"),
    ],
)
def test_options_that_cannot_be_used(fails: Callable[..., str], words: tuple[str, ...], message: str) -> None:
    assert message in fails("bench", *words)
