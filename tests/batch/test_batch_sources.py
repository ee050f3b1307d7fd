# SPDX-License-Identifier: Apache-2.0
"""What `fastvlm batch` makes of files, folders, patterns, CSV and JSON: requests, and errors that name their row."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from transformers_fastvlm.batch import SourceOptions
from transformers_fastvlm.batch.planning import plan
from transformers_fastvlm.batch.requests import PromptTemplate, Request
from transformers_fastvlm.batch.sources import find_sources
from transformers_fastvlm.images.formats import image_formats

PROMPT = "What is it?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of different widths, in a folder and below it, among other files."""
    for width, name in ((11, "b.png"), (12, "a.JPG"), (13, "sub/c.webp"), (14, "sub/deep/d e.bmp")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, 9), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "sub" / "x.pdf").write_text("no picture")
    return tmp_path


def requests_of(*inputs: Path | str, prompt: str = PROMPT, **options: Any) -> list[Request]:
    return list(find_sources([str(name) for name in inputs], SourceOptions(prompt=prompt, **options)))


def widths(requests: list[Request]) -> list[Any]:
    """Return the width of each request's image, or why there is none."""
    found: list[Any] = []
    for request in requests:
        try:
            found.append(request.error or (request.open_image and request.open_image().width))
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


def table(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


# Files


def test_folders_files_and_patterns_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [request.source for request in requests_of(".")] == [
        "./a.JPG",
        "./b.png",
        "./sub/c.webp",
        "./sub/deep/d e.bmp",
    ]
    assert widths(requests_of(".")) == [12, 11, 13, 14]
    assert widths(requests_of("b.png", "sub", "a.JPG")) == [11, 13, 14, 12]
    assert [request.source for request in requests_of("**/*.*p")] == ["sub/c.webp", "sub/deep/d e.bmp"]
    assert {request.question for request in requests_of(".")} == {PROMPT}
    found = find_sources([".", "sub"], SourceOptions(prompt=PROMPT))
    assert sum(found.left_out.values()) == 3
    assert (found.rows(), found.only_videos(), found.videos()) == (6, False, [])


def test_what_macos_keeps_beside_files_is_passed_over(folder: Path) -> None:
    before = [request.source for request in requests_of(folder)]
    (folder / "__MACOSX" / "sub").mkdir(parents=True)
    for name in ("._b.png", "__MACOSX/b.png", "__MACOSX/sub/._b.png", "sub/._c.webp"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07" + bytes(100))
    assert [request.source for request in requests_of(folder)] == before


@pytest.mark.skipif("HEIF" in image_formats(), reason="pillow-heif is installed")
def test_left_out_files_are_counted_by_suffix_with_what_to_install(folder: Path, tmp_path: Path) -> None:
    for name in ("IMG_1.HEIC", "IMG_2.heic", "sub/a.heif", "weights.h5"):
        (folder / name).write_bytes(bytes(9))
    found = find_sources([str(folder)], SourceOptions(prompt=PROMPT))
    assert {".heic": 2, ".heif": 1, ".h5": 1}.items() <= found.left_out.items()
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.HEIC").write_bytes(bytes(9))
    with pytest.raises(ValueError, match=r"no image and no video \(1 \.heic: pip install pillow-heif reads HEIC\)"):
        find_sources([str(tmp_path / "phone")], SourceOptions(prompt=PROMPT))


def test_a_file_goes_before_a_pattern(folder: Path) -> None:
    Image.new("RGB", (21, 9)).save(folder / "[ab].png")
    assert widths(requests_of(folder / "[ab].png")) == [21]
    (folder / "[ab].png").unlink()
    assert widths(requests_of(folder / "[ab].png")) == [11]


def test_unreadable_images_are_found_when_they_are_opened(folder: Path) -> None:
    Image.effect_noise((64, 64), 50).save(folder / "b.png")
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    (folder / "a.JPG").write_text("text")
    (folder / "sub" / "c.webp").write_bytes(b"")
    os.symlink(folder / "gone", folder / "sub" / "deep" / "link.png")
    damaged, cut, empty, fine, link = widths(requests_of(folder))[:5]
    assert "not an image" in damaged and "truncated" in cut and "empty" in empty and fine == 14
    assert "no longer exists" in link


def test_turned_only_if_asked(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (31, 9)).save(folder / "turned.png", exif=exif)
    rows = table(folder / "rows.jsonl", {"image": "turned.png"})
    for source in (folder / "turned.png", rows):
        assert widths(requests_of(source)) == [9]
        assert widths(requests_of(source, do_exif_transpose=False)) == [31]


def test_a_changed_input_has_another_identity(folder: Path) -> None:
    def identity() -> Any:
        return find_sources([str(folder)], SourceOptions(prompt=PROMPT)).identity()

    before = identity()
    assert identity() == before and before[0]["count"] == 4
    (folder / "notes.txt").write_text("changed")
    assert identity() == before
    with open(folder / "b.png", "ab") as file:
        file.write(b"more")
    assert identity() != before


@pytest.mark.parametrize(
    ("inputs", "prompt", "message"),
    [
        ([], PROMPT, "no input is given"),
        (["gone.png"], PROMPT, r"no such file or folder: '.*gone\.png'"),
        (["*.gif"], PROMPT, r"no file matches '.*\*\.gif'"),
        (["empty"], PROMPT, r"the folder '.*empty' has no image and no video \(no other files\)"),
        (["b.png"], "What is {thing}?", r"has \{thing\}, but '.*b\.png' is not a table.*Write \{\{thing\}\}"),
        (["rows.csv"], "What is {thing}?", r"rows\.csv has no column 'thing'; it has 'image', 'name'"),
        (["twice.csv"], PROMPT, r"twice\.csv has several columns 'image'"),
        (["nothing.csv"], PROMPT, r"nothing\.csv is empty"),
        (["nothing.jsonl"], PROMPT, r"nothing\.jsonl is empty"),
        (["text.jsonl"], PROMPT, "expected a JSON list of rows"),
        (["*.csv"], PROMPT, "has tables; list them one by one"),
    ],
)
def test_refuses_inputs(folder: Path, inputs: list[str], prompt: str, message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "rows.csv").write_text("image,name\nb.png,x\n")
    (folder / "twice.csv").write_text("image,image\nb.png,x\n")
    (folder / "nothing.csv").touch()
    (folder / "nothing.jsonl").touch()
    (folder / "text.jsonl").write_text("image\n")
    with pytest.raises((ValueError, OSError), match=message):
        requests_of(*(folder / name for name in inputs), prompt=prompt)


def test_refuses_options(folder: Path) -> None:
    with pytest.raises(ValueError, match="every is 0; expected seconds above 0"):
        requests_of(folder, every=0)
    (folder / "rows.csv").write_text("image\nb.png\n")
    with pytest.raises(NotADirectoryError, match="gone"):
        requests_of(folder / "rows.csv", image_folder=str(folder / "gone"))


# Tables


def test_csv(folder: Path) -> None:
    (folder / "rows.csv").write_bytes(
        b"\xef\xbb\xbfimage,thing,n\r\n"
        b'b.png,"a ""big"", red\r\none",1\r\n'
        b"\r\n"
        b"sub/deep/d e.bmp,dog,2\r\n"
        b"b.png,too,many,fields\r\n"
        b"b.png,\xff\xfe,3\r\n"
        b",cat,4\r\n"
        b"b.png,,5\r\n"
        b"gone.png,caf\xc3\xa9,6\r\n"
    )
    requests = requests_of(folder / "rows.csv", prompt="Is it {thing}? ({n})")
    assert [request.row for request in requests] == list(range(7))
    assert [request.question for request in requests[:2]] == ['Is it a "big", red\r\none? (1)', "Is it dog? (2)"]
    assert requests[6].question == "Is it café? (6)" and requests[1].image == "sub/deep/d e.bmp"
    assert {request.source for request in requests} == {str(folder / "rows.csv")}
    found = widths(requests)
    assert found[:2] == [11, 14]
    messages = ("has 4 fields; expected 3", "not UTF-8 (line 7)", "'image' is empty", "'thing' of the prompt is empty")
    assert all(message in error for message, error in zip(messages, found[2:], strict=False)), found
    assert "does not exist" in found[6]


def test_csv_of_another_column_and_tsv(folder: Path) -> None:
    (folder / "rows.csv").write_text("file,image\nb.png,a.JPG\n")
    assert widths(requests_of(folder / "rows.csv", image_column="file")) == [11]
    (folder / "rows.tsv").write_text("image\tq\na.JPG\tone, two\n")
    assert requests_of(folder / "rows.tsv", prompt="{q}")[0].question == "one, two"


def test_csv_that_ends_in_a_quote(folder: Path) -> None:
    (folder / "rows.csv").write_text('image,q\nb.png,x\nb.png,"y\n')
    good, bad = requests_of(folder / "rows.csv", prompt="{q}")
    assert good.question == "x" and bad.error is not None and "not valid CSV" in bad.error


def test_jsonl_and_json(folder: Path) -> None:
    rows = [
        {"image": "b.png", "q": "one", "n": 3},
        {"image": "a.JPG", "q": None, "n": 3},
        {"image": 7, "q": "two", "n": 3.5},
        {"image": "a.JPG", "q": ["x"], "n": 1},
        {"q": "three", "n": 1},
        {"image": "sub/c.webp", "q": "\ud800", "n": 1},
        {"image": "c\ud800.webp", "q": "Why?", "n": 1},
    ]
    for name, content in (
        ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows) + "[1]\n" + '{"image": "b.p'),
        ("rows.json", json.dumps([*rows, [1]])),
    ):
        (folder / name).write_text(content)
        requests = requests_of(folder / name, prompt="{q} {n}")
        found = widths(requests)
        assert found[0] == 11 and requests[0].question == "one 3"
        messages = (
            "'q' of the prompt is empty",
            "an image is 7",
            "of the prompt is a list",
            "'image' is empty",
            "surrogate",
        )
        messages += ("is not valid",)
        assert all(message in error for message, error in zip(messages, found[1:], strict=False)), found
        assert "expected an object" in found[7]
        assert len(requests) == (9 if name == "rows.jsonl" else 8)
    assert "cut off" in widths(requests_of(folder / "rows.jsonl", prompt="{q} {n}"))[-1]


def test_paths_stay_in_the_folder(folder: Path) -> None:
    inner = folder / "sub"
    os.symlink(folder / "b.png", inner / "link.png")
    names = [
        "c.webp",
        "../b.png",
        str(folder / "b.png"),
        "link.png",
        "https://example.org/a.png",
        str(inner / "c.webp"),
    ]
    rows = table(inner / "rows.jsonl", *({"image": name} for name in names))
    fine, above, absolute, link, address, inside = widths(requests_of(rows))
    assert (fine, inside) == (13, 13)
    assert "leaves the image folder" in above and "leaves the image folder" in absolute
    assert "symbolic link" in link and "is a URL" in address
    assert widths(requests_of(rows, image_folder=str(folder)))[1:3] == [
        "the image '../b.png' leaves the image folder "
        f"{str(folder)!r}. Paths are relative to it and stay in it; put the image there, or name a folder further up.",
        11,
    ]


# Prompts


def test_prompt_template() -> None:
    template = PromptTemplate('Say {{name}} or {name} as {"a": {"b": 1}}, {} and {the answer} {name}')
    assert template.columns == ("name", "the answer")
    row = {"name": "{the answer}", "the answer": 42}
    assert template.fill(row) == 'Say {name} or {the answer} as {"a": {"b": 1}}, {} and 42 {the answer}'
    assert PromptTemplate("{__class__}").columns == ("__class__",)
    with pytest.raises(ValueError, match="'__class__' of the prompt is empty"):
        PromptTemplate("{__class__}").fill(row)


# Batches


def test_batches_are_of_similar_length_and_always_the_same() -> None:
    requests = [Request(source=str(n), question="x" * (n * 37 % 101)) for n in range(1100)]
    batches = list(plan(requests, 7))
    assert batches == list(plan(iter(requests), 7))
    assert sorted(index for batch in batches for index, _ in batch) == list(range(1100))
    assert max(index for batch in batches[:73] for index, _ in batch) == 510  # 73 batches of 7 make a window
    spreads = [len(batch[0][1].question or "") - len(batch[-1][1].question or "") for batch in batches[:73]]
    assert min(spreads) >= 0 and max(spreads) <= 4
    same = [Request(source=str(n), question="x") for n in range(20)]
    assert [index for batch in plan(same, 6) for index, _ in batch] == list(range(20))
    assert [len(batch) for batch in plan(requests, 600)] == [600, 500]


# Folders that are linked


def test_linked_folders_are_entered_once(folder: Path) -> None:
    disk = folder.parent / f"{folder.name} disk"
    disk.mkdir()
    Image.new("RGB", (17, 9)).save(disk / "far.png")
    (folder / "disk").symlink_to(disk)
    (folder / "again").symlink_to(folder / "sub")
    (disk / "back").symlink_to(folder)
    assert sorted(widths(requests_of(folder))) == [11, 12, 13, 14, 17]


def test_what_is_no_regular_file_is_refused(folder: Path) -> None:
    for name in ("rows.jsonl", "a.png", "a.mp4"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match="is not a regular file"):
            requests_of(folder / name)


# Columns


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "img,q\nb.png,x\n"),
        ("rows.jsonl", '{"img": "b.png", "q": "x"}\n{"img": "b.png", "q": "y"}\n'),
        ("rows.json", '[{"img": "b.png", "q": "x"}, 5]'),
    ],
)
def test_a_misspelt_column_stops_at_once(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(
        ValueError, match=r"has no column 'image'; it has 'img', 'q'\. Set the images' column with --image-column"
    ):
        requests_of(folder / name, prompt="{q}")
    with pytest.raises(ValueError, match=r"has no column 'question'; it has 'img', 'q'\.$"):
        requests_of(folder / name, prompt="{question}", image_column="img")
    found = requests_of(folder / name, prompt="{q}", image_column="img")
    assert found[0].question == "x" and found[0].open_image().width == 11


def test_columns_that_a_later_row_has(folder: Path) -> None:
    path = table(folder / "rows.jsonl", {"image": "b.png"}, "{", {"image": "b.png", "q": "x"})
    first, second, third = requests_of(path, prompt="{q}")
    assert "'q' of the prompt is empty" in first.error and "cut off" in second.error and third.error is None


# Values


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"q": float("nan")}, "'q' of the prompt is empty"),
        ({"q": 7}, None),
        ({"image": float("nan")}, "'image' is empty"),
        ({"image": ["b.png"]}, None),
        ({"image": ["b.png", "a.JPG"]}, r"an image is ['b.png', 'a.JPG'] (list)"),
        ({"image": []}, "'image' is empty"),
        ('{"image": "b.png", "image": "a.JPG", "q": "x"}', "has the key 'image' twice"),
        ('{"image": "b.png", "q": ' + "1" * 5000 + "}", "a number with more digits"),
        ({"image": "A" * 700_000}, "does not exist"),
        ({"image": "sub\\c.webp"}, "It exists under the same name written with / for \\."),
        ({"image": "cafe\u0301.png"}, "It exists under the same name written with composed accents."),
    ],
)
def test_values_that_are_none(folder: Path, row: Any, error: str | None) -> None:
    Image.new("RGB", (11, 9)).save(folder / "caf\u00e9.png")
    row = row if isinstance(row, str) else {"image": "b.png", "q": "x", **row}
    good = {"image": "b.png", "q": "x"}
    requests = requests_of(table(folder / "rows.jsonl", good, row, good), prompt="{q}")
    found = widths(requests)
    assert found[0] == found[2] == 11
    if error is None:
        assert found[1] == 11
    else:
        assert error in found[1] and len(found[1]) < 600
    assert all(len(request.image or "") < 100 for request in requests)


def test_a_quote_that_is_not_closed_costs_its_row(folder: Path) -> None:
    """The rows after it are as many and as whole as without it."""
    (folder / "rows.csv").write_text("image,q\n" + "b.png,x\n" * 3 + 'b.png,"y\n' + "b.png,z\n" * 20_000)
    found = find_sources([str(folder / "rows.csv")], SourceOptions(prompt="{q}"))
    requests = list(found)
    assert found.rows() == len(requests) == 20_004
    assert [request.row for request in requests if request.error] == [3]
    assert "not valid CSV" in requests[3].error and "line 5" in requests[3].error
    (folder / "two.csv").write_text('image,q\nb.png,"y\nb.png,"two\nlines"\nb.png,z\n')
    assert [request.question for request in requests_of(folder / "two.csv", prompt="{q}")] == [None, "two\nlines", "z"]
