# SPDX-License-Identifier: Apache-2.0
"""Seeds and mutations of what strangers send: images, data set rows, tables, videos, requests.

Everything follows from a kind and a number, so that a finding can be made again alone.
"""

import base64
import csv
import io
import json
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, PngImagePlugin

KINDS = ("image", "rows", "table", "video", "request")
_WORDS = (
    b"\0" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\0\0\0\x01",
    b"\xff\xd8",
    b"\xff\xda",
    b"\xff\xd9",
)
_TOKENS = (
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"null",
    b"true",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 60,
    b"\\u0000",
    b"\\ud800",
    b"<image>",
    b"../",
    b"/etc/passwd",
    b"http://127.0.0.1:9/x.png",
    b"file:///etc/passwd",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\x1b[2J",
    b"<|im_end|>",
)


def source_of(kind: str, number: int) -> random.Random:
    """Return the random numbers of one input."""
    return random.Random(f"{kind} {number}")


def drawn_image(seed: int = 0, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Image.Image:
    """Return a small image with edges and a gradient."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.rectangle((5, 5, 20 + seed % 9, 25), fill=(200, 30, (40 * seed) % 256))
    draw.ellipse((22, 8, 44, 34), fill=(20, 160, 60))
    return image.convert(mode)


@cache
def image_seeds() -> dict[str, bytes]:
    """Return valid files of every format that is read, and of some that are not, by name."""
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 200, zip=True)
    frames = [drawn_image(seed) for seed in range(3)]
    moving: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 50}
    wide = Image.frombytes("I;16", (16, 12), struct.pack("<192H", *range(0, 192 * 300, 300)))
    saved: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("plain.jpg", frames[0], {"quality": 80, "exif": exif}),
        ("progressive.jpg", frames[0], {"progressive": True}),
        ("gray.jpg", drawn_image(mode="L"), {}),
        ("cmyk.jpg", drawn_image(mode="CMYK"), {}),
        ("plain.png", frames[0], {"pnginfo": text, "exif": exif}),
        ("palette.png", drawn_image(mode="P"), {"transparency": 3}),
        ("alpha.png", drawn_image(mode="RGBA"), {}),
        ("wide.png", wide, {}),
        ("bit.png", drawn_image(mode="1"), {}),
        ("moving.png", frames[0], moving),
        ("plain.webp", frames[0], {"exif": exif}),
        ("lossless.webp", drawn_image(mode="RGBA"), {"lossless": True}),
        ("moving.webp", frames[0], moving),
        ("plain.gif", drawn_image(mode="P"), {}),
        ("moving.gif", frames[0], moving),
        ("plain.bmp", frames[0], {}),
        ("plain.tif", frames[0], {"exif": exif}),
        ("packed.tif", frames[0], {"compression": "tiff_lzw"}),
        ("deflate.tif", frames[0], {"compression": "tiff_adobe_deflate"}),
        ("jpeg.tif", frames[0], {"compression": "jpeg"}),
        ("fax.tif", drawn_image(mode="1"), {"compression": "group4"}),
        ("pages.tif", frames[0], {"save_all": True, "append_images": frames[1:]}),
        ("plain.avif", frames[0], {}),
        ("plain.ppm", frames[0], {}),
        ("plain.pgm", drawn_image(mode="L"), {}),
        ("plain.pbm", drawn_image(mode="1"), {}),
        ("plain.jp2", frames[0], {}),
        ("plain.ico", frames[0], {}),
        ("plain.eps", frames[0], {}),
        ("plain.tga", frames[0], {}),
        ("plain.pcx", frames[0], {}),
    ]
    found = {}
    for name, image, options in saved:
        file = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM", "pbm": "PPM", "jp2": "JPEG2000"}
        suffix = name.rpartition(".")[2]
        image.save(file, kind.get(suffix, suffix.upper()), **options)
        found[name] = file.getvalue()
    found["text.ppm"] = b"P3\n4 3\n255\n" + b" ".join(str(value % 256).encode() for value in range(36))
    found["page.html.png"] = b"<!DOCTYPE html><html><body>404</body></html>"
    return found


def _flip(data: bytearray, random_: random.Random) -> None:
    for _ in range(random_.choice((1, 1, 2, 8, 64))):
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)


def _overwrite(data: bytearray, random_: random.Random) -> None:
    at = random_.randrange(len(data))
    word = random_.choice(_WORDS)
    data[at : at + len(word)] = word


def _early(data: bytearray, random_: random.Random) -> None:
    data[random_.randrange(min(len(data), 96))] = random_.randrange(256)


def _cut(data: bytearray, random_: random.Random) -> None:
    del data[random_.randrange(len(data)) :]


def _drop(data: bytearray, random_: random.Random) -> None:
    at = random_.randrange(len(data))
    del data[at : at + random_.choice((1, 2, 16, 200))]


def _repeat(data: bytearray, random_: random.Random) -> None:
    at = random_.randrange(len(data))
    part = data[at : at + random_.choice((1, 8, 64, 400))]
    data[at:at] = part * random_.choice((1, 2, 50, 1000))


def _join(data: bytearray, random_: random.Random) -> None:
    other = random_.choice(list(image_seeds().values()))
    at = random_.randrange(len(data))
    data[at:] = other[random_.randrange(len(other)) :]


def _scans(data: bytearray, random_: random.Random) -> None:
    """Repeat the last scan of a JPEG, whose decoding costs more than its bytes."""
    at = data.rfind(b"\xff\xda")
    if at >= 0:
        data[-2:-2] = data[at:-2] * random_.choice((3, 150, 3000))


_BINARY: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _overwrite,
    _early,
    _early,
    _cut,
    _drop,
    _repeat,
    _join,
    _scans,
)


def _insert_token(data: bytearray, random_: random.Random) -> None:
    at = random_.randrange(len(data) + 1)
    data[at:at] = random_.choice(_TOKENS) * random_.choice((1, 1, 1, 2, 2000))


def _replace_value(data: bytearray, random_: random.Random) -> None:
    """Put something else in the place of one JSON string or number."""
    ends = [at for at, byte in enumerate(data) if byte in b'",:']
    if len(ends) > 2:
        first = random_.randrange(len(ends) - 1)
        data[ends[first] + 1 : ends[first + 1]] = random_.choice((*_TOKENS, b"[]", b"{}", b'""', b"0", b"[[[[{}]]]]"))


_TEXT = (_insert_token, _insert_token, _replace_value, _replace_value, _flip, _drop, _repeat, _cut)


def _mutated(
    seed: bytes, kinds: tuple[Callable[[bytearray, random.Random], None], ...], numbers: random.Random
) -> bytes:
    data = bytearray(seed)
    for _ in range(numbers.choice((0, 1, 1, 1, 2, 4))):
        if data:
            numbers.choice(kinds)(data, numbers)
    return bytes(data[: 2**24])


def image(number: int) -> tuple[str, bytes]:
    """Return the name and the bytes of an image file."""
    numbers = source_of("image", number)
    name = numbers.choice(list(image_seeds()))
    return name, _mutated(image_seeds()[name], _BINARY, numbers)


def _values(numbers: random.Random) -> Any:
    inside = [None, True, 0, -1, 2**70, 1.5, float("nan"), "", "a.png", "<image>", "../secret.png", [], {}, "x" * 5000]
    return numbers.choice([*inside, [numbers.choice(inside)], {numbers.choice(["bytes", "path", "url"]): "a.png"}])


def _row(numbers: random.Random) -> dict[str, Any]:
    """Return a row of a data set, most often a good one with one thing changed."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A box."}]
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A box."}]
    row: dict[str, Any] = numbers.choice(
        [
            {"id": 1, "image": "a.png", "conversations": turns},
            {"image": {"bytes": base64.b64encode(image(numbers.randrange(10**6))[1]).decode()}, "conversations": turns},
            {"messages": messages, "images": ["a.png"]},
            {"image": "a.png", "question": "What is it?", "answer": "A box."},
            {"system": "Be brief.", "conversations": turns[1:], "image": "b.png"},
        ]
    )
    row = json.loads(json.dumps(row))
    for _ in range(numbers.choice((0, 1, 1, 2))):
        place: Any = row
        while isinstance(place, dict | list) and place:
            key = numbers.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if numbers.random() < 0.5 or not isinstance(place[key], dict | list):
                place[key] = _values(numbers)
                break
            place = place[key]
        if numbers.random() < 0.2:
            row[numbers.choice(["img", "image_path", "system", "images", "videos", "x\0", "id"])] = _values(numbers)
    return row


def rows(number: int) -> tuple[str, bytes]:
    """Return the name and the bytes of a file of training rows: JSON or JSONL."""
    numbers = source_of("rows", number)
    made = [_row(numbers) for _ in range(numbers.randrange(1, 5))]
    as_lines = numbers.random() < 0.5
    text = "\n".join(map(json.dumps, made)) if as_lines else json.dumps(made)
    data = _mutated(text.encode(), _TEXT, numbers) if numbers.random() < 0.6 else text.encode()
    return ("rows.jsonl" if as_lines else "rows.json"), data


def table(number: int) -> tuple[str, bytes]:
    """Return the name and the bytes of a table of `fastvlm batch`: CSV, JSONL or Parquet."""
    numbers = source_of("table", number)
    suffix = numbers.choice(["csv", "jsonl", "parquet"])
    made = [
        {"image": numbers.choice(["a.png"] * 40 + ["b.png", "missing.png", "", "a.png\0"]), "n": i} for i in range(4)
    ]
    if suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        file = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(made), file)
        return "table.parquet", _mutated(file.getvalue(), _BINARY[:7], numbers)
    if suffix == "csv":
        lines = io.StringIO()
        writer = csv.DictWriter(lines, ["image", "n"])
        writer.writeheader()
        writer.writerows(made)
        return "table.csv", _mutated(lines.getvalue().encode(), _TEXT, numbers)
    return "table.jsonl", _mutated("\n".join(map(json.dumps, made)).encode(), _TEXT, numbers)


@cache
def video_seeds() -> dict[str, bytes]:
    """Return short valid videos, by name."""
    import tempfile

    import av

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, codec in (
            ("mp4", "mpeg4"),
            ("mkv", "mpeg4"),
            ("avi", "mjpeg"),
            ("webm", "libvpx"),
            ("mov", "mjpeg"),
        ):
            path = Path(folder) / f"film.{suffix}"
            with av.open(str(path), "w") as container:
                stream = container.add_stream(codec, rate=5)
                stream.width, stream.height = 48, 40
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                for seed in range(8):
                    container.mux(stream.encode(av.VideoFrame.from_image(drawn_image(seed))))
                container.mux(stream.encode())
            found[path.name] = path.read_bytes()
    return found


def video(number: int) -> tuple[str, bytes]:
    """Return the name and the bytes of a video file."""
    numbers = source_of("video", number)
    name = numbers.choice(list(video_seeds()))
    return name, _mutated(video_seeds()[name], _BINARY[:7], numbers)


def request(number: int) -> tuple[str, bytes]:
    """Return the name and the body of a chat completion request."""
    numbers = source_of("request", number)
    number_of_image = numbers.randrange(10**6)
    content = image(number_of_image)[1] if numbers.random() < 0.5 else numbers.choice(list(image_seeds().values()))
    data = base64.b64encode(content).decode()
    parts = [
        {"type": "text", "text": "What number is written?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]
    body: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": numbers.choice([1, 2, 3] * 5 + [-1, 10**9, None]),
        "messages": [
            {"role": "user", "content": numbers.choice([parts, parts, parts[:1], "Hi", "<image>", "Hi", None, []])}
        ],
    }
    good = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["."], "stream": True, "n": 1, "user": "x"}
    for _ in range(numbers.choice((0, 1, 1, 2))):
        name = numbers.choice([*good, "logprobs", "tools", "messages", "model"])
        body[name] = good[name] if name in good and numbers.random() < 0.6 else _values(numbers)
    if numbers.random() < 0.1:
        body["messages"] = body["messages"] * numbers.choice((2, 50, 5000)) if isinstance(body["messages"], list) else 0
    text = json.dumps(body).encode()
    return "request.json", _mutated(text, _TEXT, numbers) if numbers.random() < 0.3 else text
