# SPDX-License-Identifier: Apache-2.0
"""`fastvlm generate`, `chat` and `batch` with --schema, --choices and --regex."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="answers that follow a schema need llguidance, of the extra schema")

FORM = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 999}, "sure": {"type": "boolean"}},
    "required": ["number", "sure"],
    "additionalProperties": False,
}
QUESTION = ("-p", "What number is written?", "-m", "tiny")
IMAGES = Path(__file__).parents[2] / "examples" / "images"
SIGN = IMAGES / "sign.png"


@pytest.fixture
def form(tmp_path: Path) -> Path:
    (tmp_path / "form.json").write_text(json.dumps(FORM))
    return tmp_path / "form.json"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate(run, form: Path) -> None:
    answer = json.loads(run("generate", SIGN, *QUESTION, "--schema", form).stdout)
    assert list(answer) == ["number", "sure"]
    assert run("generate", SIGN, *QUESTION, "--choices", "cat, dog").stdout.strip() in ("cat", "dog")
    assert run("generate", SIGN, *QUESTION, "--regex", "[0-9]{3}").stdout == "628\n"
    result = json.loads(run("generate", SIGN, *QUESTION, "--choices", "a,b", "--json").stdout)
    assert result["answer"] in ("a", "b") and result["sampling"]["schema"] == {"choices": ["a", "b"]}


def test_chat(run, form: Path) -> None:
    words, lines = ("chat", SIGN, "-m", "tiny"), "What number is written?\nAnd what else?\n"
    answers = [json.loads(line) for line in run(*words, "--schema", form, stdin=lines).stdout.splitlines()]
    assert [list(answer) for answer in answers] == [["number", "sure"]] * 2
    assert set(run(*words, "--choices", "cat, dog", stdin=lines).stdout.split()) <= {"cat", "dog"}
    assert run(*words, "--regex", "[0-9]{3}", stdin="What number is written?").stdout == "628\n"


def test_a_cut_answer_is_a_failure(run, form: Path) -> None:
    result = run("generate", SIGN, *QUESTION, "--schema", form, "--max-new-tokens", 3, code=1)
    assert "the answer was cut after 3 tokens, before it was complete by its schema" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--choices", "a,b", "--regex", "a"), "--choices and --regex cannot be combined"),
        (("--choices", "a,,b"), "--choices: a choice is ''"),
        (("--regex", ""), "--regex: the regular expression is empty"),
        (("--regex", "("), "the regular expression is not supported"),
        (("--regex", "a", "--num-beams", "2"), "beam search does not support schema"),
    ],
)
def test_refuses(fails, words: tuple[str, ...], said: str) -> None:
    assert said in fails("generate", SIGN, *QUESTION, *words)
    assert said in fails("chat", SIGN, "-m", "tiny", *words)  # before the first question


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"{", "form.json: the JSON schema is not JSON"),
        (b"\xff", "form.json: 'utf-8' codec"),
        (b"[]", "expected an object"),
        (b'{"type": "nope"}', "Invalid type: nope"),
    ],
)
def test_a_file_that_is_no_schema(fails, tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "form.json"
    if content is not None:
        file.write_bytes(content)
    assert said in fails("generate", SIGN, *QUESTION, "--schema", file)
    output = tmp_path / "out.jsonl"
    assert said in fails("batch", SIGN, *QUESTION, "--schema", file, "-o", output)
    assert not output.exists() and not list(tmp_path.glob("*.journal"))


def test_batch(run, form: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run("batch", IMAGES, *QUESTION, "--schema", form, "-o", output)
    rows = rows_of(output)
    assert len(rows) > 3
    for row in rows:
        assert row["fields"] == json.loads(row["answer"]) and type(row["fields"]["number"]) is int


def test_batch_marks_cut_answers(run, form: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    result = run("batch", IMAGES, *QUESTION, "--schema", form, "-o", output, "--max-new-tokens", 3, code=1)
    assert "the answer was cut after 3 tokens, before it was complete." in result.stderr
    assert {(row["answer"], row["fields"], row["finish_reason"]) for row in rows_of(output)} == {(None, None, "length")}


def test_a_run_is_resumed_with_its_own_schema_only(run, fails, form: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers_fastvlm.engines import TransformersEngine

    output = tmp_path / "out.jsonl"
    words = ("batch", IMAGES, *QUESTION, "-o", output, "--batch-size", 1)
    plain = TransformersEngine.prepare
    calls = []

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "prepare", interrupted)
        run(*words, "--schema", form, code=130)
    assert "belongs to a run with an answer schema" in fails(*words)
    assert "belongs to a run with a different answer schema" in fails(*words, "--choices", "a,b")
    run(*words, "--schema", form)
    assert all(row["fields"] is not None for row in rows_of(output))
