# SPDX-License-Identifier: Apache-2.0
"""Videos of `fastvlm batch`: which frames are taken, damage, and captions as subtitles."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="videos need PyAV, of the extra batch")

from transformers_fastvlm.batch import BatchOptions, SourceOptions, run_batch  # noqa: E402
from transformers_fastvlm.batch.sources import find_sources  # noqa: E402
from transformers_fastvlm.batch.video_frames import count_frames  # noqa: E402
from transformers_fastvlm.engines import Answer  # noqa: E402
from transformers_fastvlm.images.videos import VideoFrames  # noqa: E402


def film(path: Path, frames: int = 60, rate: int = 10, codec: str = "mpeg4", keys: int = 12, **options: str) -> Path:
    """Write a video whose frame n is gray 4 n: its number shows in its pixels."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = keys
        stream.codec_context.bit_rate = 4_000_000
        for number in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (4 * number,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def number_of(image: Image.Image) -> int:
    """Return which frame an image is, by its gray."""
    return round(sum(image.getpixel((32, 24))) / 12)


def frames_of(path: Path, every: float) -> list[tuple[float, int]]:
    found = VideoFrames(str(path), every)
    assert found.damage is None
    return [(time, number_of(found.frame(index))) for index, time in enumerate(found.times)]


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mpeg4"), ("webm", "libvpx")]
)
def test_a_frame_every_so_many_seconds(tmp_path: Path, suffix: str, codec: str) -> None:
    path = film(tmp_path / f"film.{suffix}", codec=codec)
    assert frames_of(path, 1) == [(float(second), 10 * second) for second in range(6)]
    assert frames_of(path, 2.5) == [(0.0, 0), (2.5, 25), (5.0, 50)]
    assert frames_of(path, 0.1) == frames_of(path, 0.01) == [(n / 10, n) for n in range(60)]
    assert frames_of(path, 100) == [(0.0, 0)]
    assert [count_frames(str(path), every) for every in (1, 2.5, 100)] == [6, 3, 1]


def test_frames_in_any_order(tmp_path: Path) -> None:
    found = VideoFrames(str(film(tmp_path / "film.mp4", keys=25)), 0.5)
    order = [7, 3, 3, 11, 0, 4, 5, 1]
    assert [number_of(found.frame(index)) for index in order] == [5 * index for index in order]


def test_a_film_of_b_frames(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.max_b_frames, stream.codec_context.bit_rate = 2, 4_000_000
        for number in range(40):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (4 * number,) * 3))))
        container.mux(stream.encode())
    assert frames_of(path, 1) == [(0.0, 0), (1.0, 10), (2.0, 20), (3.0, 30)]


def requests_of(path: Path) -> list[Any]:
    return list(find_sources([str(path)], SourceOptions(prompt="What?", every=1)))


def test_damaged_videos(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (request,) = requests_of(tmp_path / "text.mp4")
    assert "cannot be read" in request.error and request.source == str(tmp_path / "text.mp4")
    path = film(tmp_path / "cut.mp4", movflags="faststart")
    whole = requests_of(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    cut = requests_of(path)
    assert 1 < len(cut) <= len(whole) and cut[-1].error is not None
    assert number_of(cut[1].open_image()) == 10
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (request,) = requests_of(tmp_path / "sound.mp4")
    assert "no video stream, only audio" in request.error


def test_a_folder_with_films_and_images(tmp_path: Path) -> None:
    film(tmp_path / "b.mp4", frames=20)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    found = find_sources([str(tmp_path)], SourceOptions(prompt="What?", every=1))
    assert [(Path(request.source).name, request.time) for request in found] == [
        ("a.png", None),
        ("b.mp4", 0.0),
        ("b.mp4", 1.0),
        ("c.png", None),
    ]
    assert found.rows() == 4 and found.videos() == [str(tmp_path / "b.mp4")]


class Reader:
    """Answers with the number of the frame that it is shown, which the pixels say."""

    batch_size = None

    def stream(self, conversation: Any, sampling: Any) -> Any:
        (image,) = (part["image"] for part in conversation[-1]["content"] if part["type"] == "image")
        answer = Answer(text=f"frame {number_of(image)}", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
        return SimpleNamespace(result=lambda: answer, when_done=lambda call: call())

    def check(self, sampling: Any) -> None:
        pass

    def close(self) -> None:
        pass


def run(inputs: list[Path], output: Path, batch_size: int = 4, **options: Any) -> Any:
    chosen = BatchOptions(prompt="What?", every=1, batch_size=batch_size)
    return run_batch([str(name) for name in inputs], output, Reader, chosen, about={}, **options)


def test_captions(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", frames=25)
    expected = "".join(f"{n + 1}\n00:00:0{n},000 --> 00:00:0{n + 1},000\nframe {10 * n}\n\n" for n in range(3))
    run([path], tmp_path / "film.srt", batch_size=2)
    assert (tmp_path / "film.srt").read_text() == expected
    other = film(tmp_path / "other.mkv", frames=5)
    report = run([path, other], tmp_path / "out.jsonl", subtitles=tmp_path / "captions")
    assert [file.name for file in report.subtitles] == ["film.srt", "other.srt"]
    assert (tmp_path / "captions" / "film.srt").read_text() == expected
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["time"], row["answer"]) for row in rows] == [
        (0.0, "frame 0"),
        (1.0, "frame 10"),
        (2.0, "frame 20"),
        (0.0, "frame 0"),
    ]
    with pytest.raises(ValueError, match="there are 2 videos"):
        run([path, other], tmp_path / "two.srt")
    (tmp_path / "sub").mkdir()
    path.rename(tmp_path / "sub" / "other.mp4")
    with pytest.raises(ValueError, match="two videos have the same name"):
        run([other, tmp_path / "sub"], tmp_path / "same.jsonl", subtitles=tmp_path)


def mutants(folder: Path) -> dict[str, bytes]:
    """Return videos that ffmpeg refuses in other ways than by OSError, by what PyAV says of them."""
    whole = film(folder / "whole.mkv", frames=4).read_bytes()
    codec = whole.index(b"V_MPEG4")
    other = film(folder / "whole.mp4", frames=4).read_bytes()
    return {
        "codec.mkv": whole[:codec] + b"V_NOPE4" + whole[codec + 7 :],
        "head.mp4": other[: len(other) // 3],
        "head.mkv": whole[:60],
        "empty.mp4": b"",
        "text.mp4": b"no video",
    }


def test_a_damaged_video_costs_its_row(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, content in mutants(tmp_path).items():
        (folder / name).write_bytes(content)
    film(folder / "good.mp4", frames=4)
    found = find_sources([str(folder)], SourceOptions(prompt="What?"))
    assert found.rows() is None or found.rows() >= 6
    requests = list(found)
    good = [request for request in requests if request.source.endswith("good.mp4")]
    assert [request.error for request in good] == [None] and number_of(good[0].open_image()) == 0
    wrong = {Path(request.source).name: request.error for request in requests if request.error}
    assert wrong.keys() == mutants(tmp_path).keys()
    assert all("cannot be read" in error for error in wrong.values())


@pytest.mark.parametrize("failure", [EOFError, MemoryError, AttributeError, RuntimeError, OSError, ValueError])
def test_whatever_a_decoder_raises_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    path = str(film(tmp_path / "film.mp4", frames=4))

    def fails(*args: Any, **options: Any) -> Any:
        raise failure("of ffmpeg")

    monkeypatch.setattr(av, "open", fails)
    assert count_frames(path, 1) == 1
    (request,) = find_sources([path], SourceOptions(prompt="What?"))
    assert "cannot be read" in request.error and "of ffmpeg" in request.error


@pytest.mark.parametrize(
    "name", ["10:30.mp4", "concat:a.mp4", "data:x.mp4", "pipe:0.mp4", "subfile,,start,0,end,9,,:x.mp4", "a%20b?c#d.mp4"]
)
def test_a_name_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    film(tmp_path / "film.mp4", frames=4).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for given in (name, str(tmp_path / name)):
        (request,) = find_sources([given], SourceOptions(prompt="What?"))
        assert request.error is None and number_of(request.open_image()) == 0


def test_a_video_reads_no_other_file(tmp_path: Path) -> None:
    """A playlist, and a list of files, under the name of a video."""
    film(tmp_path / "secret.mp4", frames=4)
    for number, content in enumerate(
        [
            "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
            "ffconcat version 1.0\nfile secret.mp4\n",
        ]
    ):
        (tmp_path / f"{number}.mp4").write_text(content)
        (request,) = find_sources([str(tmp_path / f"{number}.mp4")], SourceOptions(prompt="What?"))
        assert "cannot be read" in request.error
