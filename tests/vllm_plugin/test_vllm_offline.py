# SPDX-License-Identifier: Apache-2.0
"""vLLM on a directory of Apple's layout gives Transformers' tokens, refuses prompts that do not fit, and ends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

import psutil
from vllm_running import ENVIRONMENT, MAX_NEW_TOKENS, Peer, asked, exact, images_of, mixed_batch, scene_questions

from schema_cases import SCHEMAS
from transformers_fastvlm.batch import BatchOptions, run_batch
from transformers_fastvlm.checkpoints import tiny_checkpoint
from transformers_fastvlm.engines import Sampling, Schema, TransformersEngine, load_engine

# vLLM's own imports and processes warn.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def peer() -> Peer:
    return Peer(tiny_checkpoint())


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        engine = load_engine(
            "vllm", str(tiny_checkpoint()), dtype="float32", max_images=3, max_model_len=1024, cache_gib=0.25
        )
        try:
            # Python's own resource tracker ends with this process.
            started = [
                child
                for child in psutil.Process().children(recursive=True)
                if child not in before and not any("resource_tracker" in part for part in child.cmdline())
            ]
            assert started, "vLLM runs in a process of its own"
            yield engine
        finally:
            engine.close()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, "close() ends what the engine started"
    engine.close()  # once more does no harm


def tokens(engine: Any, peer: Peer, conversations: list[Any]) -> list[list[int]]:
    """Return vLLM's greedy tokens for texts and images, as a user of `LLM` passes them."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    outputs = engine.llm.generate([peer.prompt(one) for one in conversations], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_each_form_alone(engine: Any, peer: Peer) -> None:
    (first, second), _ = scene_questions(2, "square")
    (wide, tall), _ = scene_questions(2, "oblong")
    one, other = images_of(first)[0], images_of(second)[0]
    cases = {
        "one": first,
        "two": asked("First:", one, "Second:", other, "Describe the picture."),
        "two in the other order": asked("First:", other, "Second:", one, "Describe the picture."),
        "none": asked("What do you see?"),
        "oblong": wide,
        "oblong too": tall,
        "wide": asked(one.resize((700, 90)), "Describe the picture."),
        "tall": asked(one.resize((60, 500)), "Describe the picture."),
        "gray": asked(one.convert("L"), "Describe the picture."),
    }
    expected = {name: peer.tokens(case) for name, case in cases.items()}
    assert {name: tokens(engine, peer, [case])[0] for name, case in cases.items()} == expected
    assert len({tuple(answer) for answer in expected.values()}) > 4, "answers depend on what is asked about"


def test_a_mixed_batch(engine: Any, peer: Peer) -> None:
    batch = mixed_batch(32)
    assert tokens(engine, peer, batch) == [peer.tokens(messages) for messages in batch]


def test_prefixes_are_reused_without_changing_answers(engine: Any, peer: Peer) -> None:
    from vllm import SamplingParams

    scenes, _ = scene_questions(3, "square")
    image, other = images_of(scenes[0])[0], images_of(scenes[1])[0]
    # As long as several of the cache's blocks, so that the second question finds the first one's.
    start = ("Look at this. " * 40, image, "Now look at that. " * 40)
    conversations = [asked(*start, question) for question in ("Describe the picture.", "How many circles are there?")]
    conversations.append(asked(start[0], other, *start[2:], "Describe the picture."))
    params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    cached = []
    for messages in [*conversations, conversations[0]]:
        (output,) = engine.llm.generate([peer.prompt(messages)], params, use_tqdm=False)
        cached.append(output.num_cached_tokens)
        assert list(output.outputs[0].token_ids) == peer.tokens(messages)
    same_start, another_image, again = cached[1:]
    assert again >= same_start > another_image, "another picture must not be taken for the first one"


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> What is it?", 0, "has 1 <image>, but 0 images"),
        ("What is it?", 1, "has 0 <image>, but 1 images"),
        ("<image><image> What is it?", 1, "has 2 <image>, but 1 images"),
        ("<image> What is it?", 2, "has 1 <image>, but 2 images"),
        ("<image>" * 4, 4, "At most 3 image"),
        ("word " * 2000, 0, "maximum context length"),
    ],
)
def test_prompts_that_do_not_fit(engine: Any, peer: Peer, text: str, images: int, message: str) -> None:
    (messages,), _ = scene_questions(1)
    data = {"multi_modal_data": {"image": images_of(messages) * images}} if images else {}
    with pytest.raises(Exception, match=message):
        engine.llm.generate([{"prompt": text, **data}], use_tqdm=False)
    assert tokens(engine, peer, [messages]) == [peer.tokens(messages)], "the engine is alive"


def test_engine(engine: Any, peer: Peer) -> None:
    conversations = mixed_batch(8)
    answers = engine.generate(conversations, Sampling(max_new_tokens=MAX_NEW_TOKENS))
    assert [answer.text for answer in answers] == [peer.text(messages) for messages in conversations]
    for answer, messages in zip(answers, conversations, strict=True):
        new = peer.tokens(messages)
        ended = new[-1] == peer.model.generation_config.eos_token_id
        assert (answer.completion_tokens, answer.finish_reason) == (len(new), "stop" if ended else "length")
    (cut,) = engine.generate(conversations[:1], Sampling(max_new_tokens=1))
    assert (cut.completion_tokens, cut.finish_reason) == (1, "length")
    assert engine.generate([], Sampling()) == []


def test_engine_counts_the_tokens_of_prompts(engine: Any, peer: Peer) -> None:
    conversations = mixed_batch(4)
    answers = engine.generate(conversations, Sampling(max_new_tokens=1))
    inputs = [
        peer.processor.apply_chat_template(one, add_generation_prompt=True, tokenize=True, return_dict=True)
        for one in conversations
    ]
    assert [answer.prompt_tokens for answer in answers] == [len(one["input_ids"][0]) for one in inputs]


def test_engine_samples_repeatably_and_stops(engine: Any) -> None:
    conversations, _ = scene_questions(4)
    conversations = [asked(images_of(messages)[0], "Describe the picture.") for messages in conversations]
    hot = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=1.5, seed=7)
    first, second = (engine.generate(conversations, hot) for _ in range(2))
    other = engine.generate(conversations, Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=1.5, seed=8))
    assert first == second != other
    (plain,) = engine.generate(conversations[:1], Sampling(max_new_tokens=MAX_NEW_TOKENS))
    words = plain.text.split()
    (stopped,) = engine.generate(conversations[:1], Sampling(max_new_tokens=MAX_NEW_TOKENS, stop=(words[2],)))
    assert stopped.finish_reason == "stop" and stopped.text == plain.text.split(words[2])[0].strip()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda image: asked("<image>", "What is it?"), "1 placeholders"),
        (lambda image: asked(*[image] * 4), "has 4 images, but this engine takes at most 3"),
        (lambda image: asked("word " * 2000), "which leaves none for the answer"),
        (lambda image: [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}], "Pillow image"),
    ],
)
def test_engine_refuses(engine: Any, make: Any, message: str) -> None:
    (good,), _ = scene_questions(1)
    with pytest.raises(ValueError, match=f"Conversation 1: .*{message}"):
        engine.generate([good, make(images_of(good)[0])], Sampling(max_new_tokens=1))
    with pytest.raises(ValueError, match="top_p is 2"):
        engine.generate([good], Sampling(top_p=2.0))
    assert engine.generate([good], Sampling(max_new_tokens=1))


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_follow_a_schema(engine: Any, name: str) -> None:
    conversations, _ = scene_questions(6)
    schema, fits = SCHEMAS[name]
    samplings = [Sampling(max_new_tokens=160, temperature=1.5 * (row % 2), schema=schema) for row in range(6)]
    for answer in engine.generate(conversations, samplings):
        assert answer.finish_reason == "stop"
        assert fits(answer.text), answer.text


def test_a_schema_that_is_cut_or_cannot_be_held(engine: Any) -> None:
    (answer,) = engine.generate([asked("Hi")], Sampling(max_new_tokens=3, schema=Schema.regex("[0-9]{9}")))
    assert answer.finish_reason == "length"
    with pytest.raises(ValueError, match="JSON schema is not supported: Unimplemented keys"):
        engine.generate([asked("Hi")], Sampling(schema=Schema.json({"not": {}})))


def test_options_of_a_row_are_those_of_transformers(engine: Any) -> None:
    """Biases, penalties and logprobs, greedily."""
    conversations, _ = scene_questions(3)
    samplings = [
        Sampling(max_new_tokens=8, logprobs=3),
        Sampling(max_new_tokens=8, logit_bias=((40, 5.0), (41, -100.0)), presence_penalty=1.0, logprobs=0),
        Sampling(max_new_tokens=8, frequency_penalty=1.5, logprobs=1),
    ]
    answers = engine.generate(conversations, samplings)
    other = TransformersEngine(str(tiny_checkpoint()), dtype="float32", device="cpu")
    expected = other.generate(conversations, samplings)
    other.close()
    assert answers == expected
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.logprobs is not None and wanted.logprobs is not None
        for noted, right in zip(answer.logprobs, wanted.logprobs, strict=True):
            assert (noted.token, noted.text) == (right.token, right.text)
            assert noted.logprob == pytest.approx(right.logprob, abs=1e-3)
            assert [one.token for one in noted.top] == [one.token for one in right.top]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "cuda"}, "device is 'cuda'"),
        ({"max_images": 0}, "max_images is 0"),
        ({"cache_gib": 0}, "cache_gib is 0"),
        ({"size": 100}, "multiple"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_engine("vllm", str(tiny_checkpoint()), **options)


def test_rows_of_a_batch_are_those_of_transformers(engine: Any, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, scene in enumerate(scene_questions(7)[0]):
        images_of(scene)[0].save(folder / f"{index}.png")
    (folder / "3.png").write_text("no picture")
    options = BatchOptions(prompt="Describe the picture.", sampling=Sampling(max_new_tokens=24), batch_size=3)
    plain = TransformersEngine(str(tiny_checkpoint()), dtype="float32", device="cpu", batch_size=3)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("vllm", "transformers")}
    reports = [
        run_batch([str(folder)], files[name], lambda one=one: Kept(one), options, about={})
        for name, one in (("vllm", engine), ("transformers", plain))
    ]
    assert [(report.rows, report.errors) for report in reports] == [(7, 1)] * 2
    assert files["vllm"].read_bytes() == files["transformers"].read_bytes()


class Kept:
    """An engine that outlives a run."""

    def __init__(self, engine: Any) -> None:
        self.stream, self.check, self.batch_size = engine.stream, engine.check, engine.batch_size

    def close(self) -> None:
        pass


def check_accuracy(engine: Any, peer: Peer, count: int) -> None:
    conversations, right = scene_questions(count)
    answers = engine.generate(conversations, Sampling(max_new_tokens=MAX_NEW_TOKENS))
    ours = exact([answer.text for answer in answers], right)
    theirs = exact([peer.text(messages) for messages in conversations], right)
    assert abs(ours - theirs) <= 0.5, (ours, theirs)
    assert theirs > 10, "a model that answers nothing right shows nothing"


def test_accuracy(engine: Any, peer: Peer) -> None:
    check_accuracy(engine, peer, 40)


@pytest.mark.soak
def test_accuracy_of_many(engine: Any, peer: Peer) -> None:
    check_accuracy(engine, peer, 500)
