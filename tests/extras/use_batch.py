# SPDX-License-Identifier: Apache-2.0
"""The extra batch: a Parquet file and a video, in and out."""

import json
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from using import ANSWER, IMAGE, QUESTION, fastvlm

image = Image.open(IMAGE).convert("RGB")
image.save("sign.png")
pq.write_table(pa.table({"image": ["sign.png"]}), "rows.parquet")
with av.open("film.mp4", "w") as film:
    stream = film.add_stream("mpeg4", rate=1)
    stream.width, stream.height, stream.pix_fmt = 256, 256, "yuv420p"
    for _ in range(2):
        film.mux(stream.encode(av.VideoFrame.from_image(image.resize((256, 256)))))
    film.mux(stream.encode())

fastvlm("batch", "rows.parquet", "-o", "answers.parquet", "-p", QUESTION, "-m", "tiny")
fastvlm("batch", "film.mp4", "-o", "answers.jsonl", "-p", QUESTION, "-m", "tiny")
(answer,) = pq.read_table("answers.parquet")["answer"].to_pylist()
assert ANSWER in answer, answer
rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
assert rows and all(row["answer"] for row in rows), rows
