# SPDX-License-Identifier: Apache-2.0
"""`fastvlm demo` as a process: it says where the page is, serves it, and ends when asked to."""

import importlib.util
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

if importlib.util.find_spec("gradio") is None:  # imported by the process only
    pytest.skip("gradio is not installed", allow_module_level=True)

SOURCE = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_serves_the_tiny_model_offline(end: signal.Signals, tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers_fastvlm", "demo", "--model", "tiny"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("The page is at "):
                break
        address = lines[-1].split()[4]
        assert address.startswith("http://127.0.0.1:"), lines
        with urllib.request.urlopen(address, timeout=240) as answer:
            assert b"FastVLM" in answer.read()
        assert list(tmp_path.glob("fastvlm-page-*"))
        process.send_signal(end)
        assert process.wait(240) == 0
        assert not list(tmp_path.glob("fastvlm-page-*"))
    finally:
        process.kill()
        process.communicate()
