# SPDX-License-Identifier: Apache-2.0
"""The extra serving: a request with an image is answered."""

import base64
import json

from using import ANSWER, IMAGE, QUESTION, fetch, server

url = "data:image/png;base64," + base64.b64encode(IMAGE.read_bytes()).decode()
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
with server("serve", "--model", "tiny", "--port", "0") as address:
    answer = json.loads(fetch(f"{address}/chat/completions", json.dumps(body).encode()))
assert ANSWER in answer["choices"][0]["message"]["content"], answer
