# SPDX-License-Identifier: Apache-2.0
"""Rows become samples: LLaVA's JSON and JSONL, messages and images, and every way in which a row can be wrong."""

import errno
import io
import json
import multiprocessing
import pickle
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from transformers_fastvlm import FastVLMProcessor, data
from transformers_fastvlm.data import FastVLMDataCollator, ImageError, SampleError
from transformers_fastvlm.data import json_rows as json_rows_module
from transformers_fastvlm.data.json_rows import JsonRows
from transformers_fastvlm.data.messages import messages_and_sources

# Python 3.12 and newer; the workers of a data loader are forked by default.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),  # on a machine of one core
]

Row = dict[str, Any]
Write = Callable[..., Path]


def llava(question: str = "<image>\nWhat?", answer: str = "A cat.", **more: Any) -> Row:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def chat(question: Any = "What?", answer: Any = "A cat.", **more: Any) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A folder of images: a.png and b.jpg, sub/c.png, and some that are broken."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    shutil.copy(golden / "images" / "tiny_rgb.png", images / "a.png")
    shutil.copy(golden / "images" / "tall_rgb.jpg", images / "b.jpg")
    shutil.copy(golden / "images" / "gray_l.png", images / "sub" / "c.png")
    for name in ("a.png", "b.jpg"):
        whole = (images / name).read_bytes()
        (images / f"cut_{name}").write_bytes(whole[: len(whole) * 2 // 3])
    (images / "empty.png").touch()
    (images / "text.png").write_text("no picture")
    return images


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as JSON, or as JSONL if the name says so."""

    def call(rows: list[Any], name: str = "train.json", **options: Any) -> Path:
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8")
        else:
            path.write_text(json.dumps(rows, **options), encoding="utf-8")
        return path

    return call


# What is read


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_llava_rows(write: Write, folder: Path, name: str) -> None:
    rows = [
        llava(image="a.png", id=7),
        llava("<image> or <image>?", "The first.", image=["b.jpg", "sub/c.png"], id="two"),
        llava("No picture?", "None."),
        llava("Nor here?", "No.", image=None),
    ]
    rows[2]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    path = write(rows, name)
    dataset = data.load(path, folder)
    assert len(dataset) == 4
    first = dataset[0]
    assert first["messages"] == chat("<image>\nWhat?")["messages"]
    assert [image.size for image in first["images"]] == [(16, 11)] and first["id"] == "7"
    assert [image.mode for image in dataset[1]["images"]] == ["RGB", "L"]
    assert np.array_equal(dataset[1]["images"][0], Image.open(folder / "b.jpg"))
    assert dataset[2]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert dataset[2]["images"] == dataset[3]["images"] == [] and dataset[2]["id"] is None
    assert dataset[-1] == dataset[3]
    place = f"{path}, row 1 ({'line 2, ' if name.endswith('l') else ''}id 'two')"
    assert dataset[1]["place"] == place


def test_images_are_beside_the_file_by_default(write: Write, folder: Path) -> None:
    assert data.load(write([llava(image="images/a.png")]))[0]["images"][0].size == (16, 11)


def test_rows_with_messages(write: Write, folder: Path) -> None:
    image = Image.open(folder / "a.png")
    rows = [
        chat("<image>\nWhat?", images=["a.png"]),
        chat("<image>\nWhat?", images=[image]),
        chat("<image>\nWhat?", images=[{"bytes": encoded(image), "path": "../ignored.png"}]),
        chat(
            [{"type": "image"}, {"type": "text", "text": "What?"}],
            [{"type": "text", "text": "A cat."}],
            images=["a.png"],
        ),
        chat([{"type": "image", "path": "a.png", "text": None}, {"type": "text", "text": "What?"}]),
    ]
    samples = list(data.load(rows, folder))
    for sample in samples:
        assert sample["messages"] == chat("<image>\nWhat?")["messages"]
        assert np.array_equal(sample["images"][0], image)


TEXT, IMAGE = {"type": "text", "text": "Look at"}, {"type": "image"}


@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
@pytest.mark.parametrize(
    "parts",
    [
        [TEXT],
        [IMAGE],
        [IMAGE, TEXT],
        [TEXT, IMAGE],
        [TEXT, IMAGE, TEXT],
        [TEXT, {"type": "text", "text": "\n"}, IMAGE, {"type": "text", "text": "\nand that."}],
        [IMAGE, IMAGE, TEXT],
        [TEXT, IMAGE, TEXT, IMAGE, TEXT, IMAGE],
        [TEXT, TEXT, {"type": "text", "text": ""}, IMAGE, {"type": "text", "text": "  "}],
    ],
)
def test_parts_are_joined_as_the_template_joins_them(
    checkpoint: Callable[[str], Path], name: str, parts: list[dict[str, str]]
) -> None:
    processor = FastVLMProcessor.from_pretrained(checkpoint(name))
    messages, sources = messages_and_sources(chat(parts))
    assert sources == [] and isinstance(messages[0]["content"], str)
    expected = processor.apply_chat_template(chat(parts)["messages"])
    assert processor.apply_chat_template(messages) == expected


def test_files_are_indexed_by_bytes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any layout of the file, read in pieces that end anywhere."""
    generator = random.Random(0)
    words = ["猫", "\N{CAT FACE}", "é", '"', "\\", "{", "]", "\n", "plain ", "\u2028", "\x7f"]
    rows = [llava("".join(generator.choices(words, k=generator.randrange(60))), "Yes.", id=str(n)) for n in range(40)]
    layouts: list[tuple[str, dict[str, Any]]] = [
        ("a.json", {}),
        ("b.json", {"ensure_ascii": False}),
        ("c.json", {"indent": 2, "ensure_ascii": False}),
        ("d.jsonl", {}),
        ("e.jsonl", {"ensure_ascii": False}),
    ]
    for name, options in layouts:
        path = write(rows, name, **options)
        if name[0] in "be":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        for chunk in (7, 64, 2**24):
            monkeypatch.setattr(json_rows_module, "CHUNK", chunk)
            found = JsonRows(path)
            assert found.damage is None
            order = generator.sample(range(40), 40)
            assert [found[row] for row in order] == [rows[row] for row in order], (name, chunk)


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "train.json"  # the content counts, not the name
    rows = [json.dumps(llava("Hi?", id=str(number))) for number in range(3)]
    path.write_bytes(f"{rows[0]}\r\n\n   \n{rows[1]}\n{rows[2]}".encode())
    dataset = data.load(path)
    assert [sample["id"] for sample in dataset] == ["0", "1", "2"]
    assert "row 1 (line 4, id '1')" in dataset[1]["place"]


# Combining, and other processes


def test_limits_repeats_and_several_sources(write: Write, folder: Path) -> None:
    one = write([llava("One?", str(n), id=n) for n in range(5)], "one.json")
    two = write([chat("Two?", str(n), id=10 + n) for n in range(3)], "two.jsonl")

    def ids(dataset: Any) -> list[int]:
        return [int(sample["id"]) for sample in dataset]

    assert ids(data.load(one, limit=2)) == [0, 1]
    assert ids(data.load(one, exclude=[0, 3], limit=2)) == [1, 2]
    assert ids(data.load(two, repeat=2)) == [10, 11, 12] * 2
    mixed = data.load([{"source": one, "limit": 1, "repeat": 2}, two, {"source": one, "exclude": [0, 1, 2]}], folder)
    assert ids(mixed) == [0, 0, 10, 11, 12, 3, 4]
    assert ids(mixed.select([6, 0, 2])) == [4, 0, 10] and mixed.num_excluded == 3
    assert ids(data.load(one) + data.load(two)) == [0, 1, 2, 3, 4, 10, 11, 12]
    assert "two.jsonl, row 1 (line 2, id '11')" in mixed[3]["place"]
    with pytest.raises(IndexError, match="sample 7 is out of range; the data set has 7 samples"):
        mixed[7]
    with pytest.raises(IndexError, match="were selected from 7"):
        mixed.select([7])


def first_of(batch: list[Row]) -> list[tuple[str, float]]:
    return [(sample["id"], float(np.asarray(sample["images"][0]).mean())) for sample in batch]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.soak)])
def test_workers_of_a_data_loader(write: Write, folder: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    rows = [llava(image=random.Random(n).choice(["a.png", "b.jpg", "sub/c.png"]), id=n) for n in range(24)]
    dataset = data.load(write(rows, "train.jsonl"), folder)
    expected = [first_of([dataset[n]])[0] for n in range(24)]  # leaves a file open, which a fork inherits
    loader = DataLoader(dataset, 4, num_workers=2, collate_fn=first_of, multiprocessing_context=method)
    assert [entry for batch in loader for entry in batch] == expected
    copy = pickle.loads(pickle.dumps(dataset))
    assert first_of([copy[3]]) == [expected[3]]


def test_the_order_of_a_data_loader_can_be_resumed(write: Write) -> None:
    dataset = data.load(write([llava("Hi?", id=str(n)) for n in range(20)]))

    def order() -> list[str]:
        loader = DataLoader(dataset, 4, shuffle=True, collate_fn=list, generator=torch.Generator().manual_seed(5))
        return [sample["id"] for batch in loader for sample in batch]

    assert order() == order() != [str(n) for n in range(20)]


# What is refused


def rejected(rows: list[Any], row: int, folder: Path | None = None, kind: type[SampleError] = SampleError) -> str:
    dataset = data.load(rows, folder)
    with pytest.raises(SampleError) as caught:
        dataset[row]
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(f"the list of rows, row {row}")
    return message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [{"from": "gpt", "value": "Hi."}]}, "the conversation starts with the assistant. Remove"),
        ({"conversations": [{"from": "robot", "value": "Hi."}]}, "unknown role 'robot'; expected 'human', 'gpt'"),
        ({"messages": [{"role": "tool", "content": "Hi."}]}, "unknown role 'tool'; expected 'user', 'assistant'"),
        ({"messages": [{"role": "system", "content": "Hi."}]}, "no turns; expected at least one question"),
        (llava("Hi?", ""), "answer 0 (counting from 0) is empty, so there is nothing to train on"),
        (llava("Hi?", " \n"), "answer 0 (counting from 0) is empty"),
        (chat("Hi?", [{"type": "text", "text": ""}]), "answer 0 (counting from 0) is empty"),
        (llava("<image><image>", image="a.png"), "the text has 2 <image>, but the row has 1 images. Write one"),
        (llava("What?", image="a.png"), "the text has 0 <image>, but the row has 1 images"),
        (llava("<image>\nWhat?"), "the text has 1 <image>, but the row has 0 images"),
        (llava("<image>", "<image>", image=["a.png", "a.png"]), "role 'assistant' has <image>, but only user"),
        ({"conversations": []}, "'conversations' is []; expected a list with at least one question"),
        ({"conversations": "Hi?"}, "'conversations' is 'Hi?'; expected a list"),
        ({"conversations": [{"role": "user"}]}, "turn 0 of 'conversations' is {'role': 'user'}; expected an object"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 0 has the content None; expected a string"),
        (
            {"text": "Hi."},
            "expected 'messages' or LLaVA's 'conversations', but the row has neither; its keys are 'text'",
        ),
        ({**llava(), **chat()}, "but the row has both"),
        ({"messages": chat()["messages"] + chat()["messages"][1:]}, "turn 2 has role 'assistant' where 'user' was exp"),
        ({"messages": chat()["messages"][:1]}, "ends with a question. Add its answer"),
        ({"messages": [*chat()["messages"], {"role": "system", "content": "x"}]}, "system message is not the first"),
        ({**chat("<image>"), "image": "a.png", "images": ["a.png"]}, "images in more than one place"),
        ({**chat(), "video": "a.mp4"}, "the row has 'video', but FastVLM takes text and images"),
        (chat([{"type": "video", "path": "/etc/hostname"}]), "turn 0 has a video"),
        (chat([{"type": "image", "index": 1}, {"type": "image", "index": 0}]), "numbers its images [1, 0]"),
        (chat([{"type": "audio"}]), "expected type text with text, type image"),
        (chat([{"type": "text", "text": 7}]), "has the text 7; expected a string"),
        (llava("Hi \udc80?"), r"character 3 of a turn is a lone surrogate, '\udc80', which cannot be tokenized"),
        ("a string", "the row is a str; expected a dictionary"),
    ],
)
def test_rows_whose_words_are_wrong(folder: Path, row: Any, expected: str) -> None:
    message = rejected([chat(), row], 1, folder)
    assert expected in message


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("missing.png", "the image 'missing.png' does not exist: expected a file at"),
        ("sub", "the image 'sub' is a folder"),
        ("empty.png", "the image 'empty.png' is empty (0 bytes)"),
        ("text.png", "the image 'text.png' is not an image of a supported format"),
        ("cut_a.png", "the image 'cut_a.png' is truncated or damaged"),
        ("cut_b.jpg", "the image 'cut_b.jpg' is truncated or damaged"),
        ({"bytes": b"", "path": "x.png"}, "the image 'x.png' is empty (0 bytes)"),
        ({"bytes": b"no", "path": None}, "the image is not an image of a supported format"),
        (Image.fromarray(np.full((8, 8), 2.0, np.float32)), "the image: a floating-point image has values from 2.0"),
    ],
)
def test_images_that_cannot_be_read(folder: Path, image: Any, expected: str) -> None:
    assert expected in rejected([llava(image=image)], 0, folder, ImageError)
    with pytest.raises(ImageError) as caught:
        data.load([llava(image=image)], folder).image_folder(0).size_of(image)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("../secret.png", "leaves the image folder"),
        ("sub/../../secret.png", "leaves the image folder"),
        ("/etc/hostname", "leaves the image folder"),
        ("../images_of_others/a.png", "leaves the image folder"),
        ("link.png", "leaves the image folder"),
        ("linked/secret.png", "by a symbolic link"),
        ("http://localhost:1/a.png", "is a URL; URLs are not fetched"),
        ("https://example.com/a.png", "is a URL"),
        ("file:///etc/hostname", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
        ("a\0.png", "is not valid"),
        ("a\ud800.png", "is not valid"),
        ("", "is empty"),
        ({"path": "../secret.png", "bytes": None}, "leaves the image folder"),
        (7, "an image is 7 (int); expected a path, a Pillow image"),
        (["a.png"], "an image is ['a.png'] (list); expected a path"),
    ],
)
def test_names_that_are_refused(folder: Path, image: Any, expected: str) -> None:
    shutil.copy(folder / "a.png", folder.parent / "secret.png")
    (folder / "link.png").symlink_to("../secret.png")
    (folder / "linked").symlink_to(folder.parent)
    # Not an ImageError, so never skipped.
    assert expected in rejected([llava(image=[image])], 0, folder)
    if isinstance(image, str) and "link" in image:
        assert data.load([llava(image=image)], folder, follow_symlinks=True)[0]["images"][0].size == (16, 11)
        assert "leaves" in rejected([llava(image="../secret.png")], 0, folder)


def test_what_stays_in_the_folder_is_read(folder: Path) -> None:
    (folder / "inside.png").symlink_to("sub/c.png")
    (folder.parent / "entry").symlink_to(folder)
    names = ["inside.png", str(folder / "a.png"), "sub/../a.png", "./b.jpg"]
    for root in (folder, folder.parent / "entry"):
        for name in names:
            absolute = name.replace(str(folder), str(root))
            assert data.load([llava(image=absolute)], root)[0]["images"]


def test_a_path_needs_a_folder(folder: Path) -> None:
    assert "no image folder was given" in rejected([llava(image="a.png")], 0)
    with pytest.raises(NotADirectoryError, match=r"the image folder .* is not a folder"):
        data.load([llava()], folder / "a.png")


def test_decompression_bombs_and_thin_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (10_000, 1)).save(folder / "thin.png")
    Image.new("L", (300, 300)).save(folder / "bomb.png")
    rows = [llava(image="thin.png"), llava(image="bomb.png")]
    assert data.load(rows, folder)[0]["images"][0].size == (10_000, 1)
    for limit in (80_000, 40_000):  # Pillow warns of the first and refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        message = rejected(rows, 1, folder, ImageError)
        assert "'bomb.png' is 300x300 = 90000 pixels, more than the limit" in message and "MAX_IMAGE_PIXELS" in message


def test_a_file_that_cannot_be_opened(folder: Path) -> None:
    """No more open files are the machine's fault, not the image's: that ends a run, and is not skipped."""
    rows = data.load([llava(image="a.png")], folder)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as error:
            rows[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert error.value.errno == errno.EMFILE


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty; expected a JSON list of rows"),
        ("  \n", "is empty"),
        ("nonsense", r"starts with b'nonsense'; expected"),
        (
            '[{"messages": []}, {"messages": [{"role": "us',
            r"row 1: the file ends inside this row, or before the list",
        ),
        ('[{"messages": []}, ', r"row 1: the file ends inside this row"),
        (
            '[{"messages": []}',
            r"row 1: the file ends inside this row, or before the list's closing \] \(at byte 17\)",
        ),
        ('[{"messages": []} {}]', r"row 1: the JSON is not valid from byte 18 on \(expected ',', found '\{'\)"),
        ('[{"messages": []}, {"messages": nope}]', r"row 1: the JSON is not valid from byte 32 on \(Expecting value"),
        ('[{"messages": []}, ]', r"row 1: the JSON is not valid from byte 19 on"),
        ('[{"messages": []}] x', r"the JSON is not valid from byte 19 on \(something follows"),
        ('{"messages": []}\n{"messages": [{"role": "user", "con', r"row 1 \(line 2\): the row is cut off"),
        ('{\n  "messages": []\n}', r"has an object that spans several lines"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("chunk", [5, 2**24])
def test_damaged_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, expected: str, chunk: int
) -> None:
    monkeypatch.setattr(json_rows_module, "CHUNK", chunk)
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(SampleError, match=expected) as caught:
        data.load(path)[0]
    assert str(path) in str(caught.value)


def test_damaged_lines(tmp_path: Path) -> None:
    good = json.dumps(chat()).encode()
    path = tmp_path / "train.jsonl"
    path.write_bytes(
        b"\n".join([good, b'{"messages": nope!}', b'["a", "list", 3]', b'{"id": "\xff\xfe, or so"}', good])
    )
    dataset = data.load(path)
    for row, expected in (
        (1, "not valid JSON (Expecting value"),
        (2, "is a JSON list; expected an obj"),
        (3, "not UTF-8"),
    ):
        with pytest.raises(SampleError) as caught:
            dataset[row]
        assert f"row {row} (line {row + 1}): the row is" in str(caught.value) and expected in str(caught.value)
    assert dataset[4]["messages"]
    path.write_bytes(good.decode().encode("utf-16"))
    with pytest.raises(SampleError, match="is UTF-16; expected JSON in UTF-8"):
        data.load(path)


# Skipping and excluding


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_skipped_and_counted(folder: Path, caplog: pytest.LogCaptureFixture, num_workers: int) -> None:
    names = ["a.png", "missing.png", "b.jpg", "cut_b.jpg", "text.png"]
    rows = [llava(image=name, id=name) for name in names] + [chat(id="words")]
    state = torch.get_rng_state()
    dataset = data.load(rows, folder, on_bad_image="skip", num_workers=num_workers)
    assert torch.equal(state, torch.get_rng_state())
    assert [sample["id"] for sample in dataset] == ["a.png", "b.jpg", "words"]
    assert [error.place.id for error in dataset.skipped] == ["missing.png", "cut_b.jpg", "text.png"]
    assert "3 of 6 rows are skipped because of their images" in caplog.text
    assert "row 1 (id 'missing.png'): the image 'missing.png' does not exist" in caplog.text
    (folder / "a.png").unlink()
    with pytest.raises(ImageError, match="does not exist"):
        dataset[0]  # gone since


def test_only_images_are_skipped(folder: Path) -> None:
    rows = [llava(image="../secret.png"), llava(answer="", image="a.png"), llava(image="missing.png")]
    dataset = data.load(rows, folder, on_bad_image="skip")
    assert len(dataset) == 2
    for row, expected in ((0, "leaves the image folder"), (1, "is empty")):
        with pytest.raises(SampleError, match=expected):
            dataset[row]
    with pytest.raises(ValueError, match="no rows left; all are excluded or have unreadable images"):
        data.load(rows[2:], folder, on_bad_image="skip")


def test_the_report_of_a_check_excludes_rows(write: Write, folder: Path, tmp_path: Path) -> None:
    path = write([llava(image="a.png", id=0), llava(image="missing.png", id=1), llava("Hi?", "", id=2), chat(id=3)])
    report = tmp_path / "report.json"
    report.write_text(json.dumps(data.check_dataset(path, folder).to_dict()))
    dataset = data.load(path, folder, exclude=report)
    assert [sample["id"] for sample in dataset] == ["0", "3"] and dataset.num_excluded == 2
    write([chat()])
    with pytest.raises(ValueError, match="reports on 4 rows, but the data has 1: it changed"):
        data.load(path, exclude=report)
    with pytest.raises(ValueError, match="is not a report"):
        data.load(path, exclude=path)
    with pytest.raises(ValueError, match="exclude has row 5; expected rows 0 to 0"):
        data.load(path, exclude=[5])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"on_bad_image": "replace"}, "on_bad_image is 'replace'; expected 'error' or 'skip'"),
        ({"limit": 0}, "expected at least 1"),
        ({"repeat": 0}, "expected at least 1"),
        ({"source": []}, "has no rows; expected at least one"),
        ({"source": [{"source": []}], "limit": 1}, "apply to a single source"),
        ({"streaming": True, "repeat": 2}, "need all rows at once"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        data.load(**{"source": [chat()], **options})


def test_a_batch_names_the_row(checkpoint: Callable[[str], Path], write: Write) -> None:
    """The collator's errors say where a row of a data set stands."""
    dataset = data.load(write([chat("Hi?", "Words. " * 40, id="long")], "train.jsonl"))
    collator = FastVLMDataCollator(FastVLMProcessor.from_pretrained(checkpoint("qwen2_tied")), max_length=8)
    with pytest.raises(SampleError, match=r"train.jsonl, row 0 \(line 1, id 'long'\): max_length=8 cuts off"):
        collator([dataset[0]])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.json", b"\x1f\x8b\x08\x00", "is compressed with gzip; unpack it first"),
        ("rows.json", b"BZh91AY", "is compressed with bzip2"),
        ("rows.jsonl", b"\x28\xb5\x2f\xfd\x04", "is compressed with zstd"),
        ("rows.zip", b"PK\x03\x04", "is a zip archive"),
        ("rows.json", b"PAR1\x15", "is a Parquet file; rename it to end in .parquet"),
        ("rows.json", b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        ("rows.csv", b"image,q\na.png,x", "is a table; expected JSON or JSONL"),
        ("rows.json", b'{\n  "data": [\n {"id": 1}\n ]\n}', "an object that spans several lines; expected a JSON list"),
        ("rows.json", b'{"data": [\n{"id": 1},\n{"id": 2}\n]}', "has an object that spans several lines"),
    ],
)
def test_files_of_other_formats(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=expected):
        data.load(tmp_path / name)
