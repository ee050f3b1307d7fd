# SPDX-License-Identifier: Apache-2.0
"""Peak memory of loading a checkpoint of the 0.5B size, as a ratio to its file.

    python benchmarks/load_memory.py [--out benchmarks/results/load_memory.json]

Writes a checkpoint of random bfloat16 weights laid out as Apple's 0.5B to a temporary directory, then loads it in a
new process and compares the peak resident size (VmHWM) with that of a process that only imported torch and
Transformers: once right after from_pretrained, when pages of the file that nothing has read are not in memory yet,
and once after every weight has been read. Linux only.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import _results

BARE = "import torch, transformers"
LOAD = "\n".join(
    (
        "import transformers_fastvlm",
        "from transformers import AutoModelForImageTextToText",
        "model = AutoModelForImageTextToText.from_pretrained({directory!r})",
        "assert str(model.dtype) == 'torch.bfloat16'",
    )
)
# One value of every 2 KiB, so that each page is read and nothing large is computed.
TOUCH = LOAD + "\nassert sum(float(p.detach().flatten()[::1024].sum()) for p in model.parameters())"
REPORT = "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"


def peak_bytes(code: str) -> int:
    """Run `code` in a new interpreter and return its peak resident size."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def write_checkpoint(directory: Path) -> int:
    """Write random weights of the 0.5B size under Apple's names and return the file's size."""
    import torch

    from transformers_fastvlm import FastVLMConfig
    from transformers_fastvlm.bench.random_weights import random_model

    random_model(FastVLMConfig.from_preset("0.5b"), torch.bfloat16, torch.device("cpu")).save_pretrained(directory)
    return (directory / "model.safetensors").stat().st_size


def main() -> None:
    arguments = _results.parser(__doc__, runs=3).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder))
        cases = {
            "bare": BARE,
            "loaded": LOAD.format(directory=folder),
            "every_weight_read": TOUCH.format(directory=folder),
        }
        peaks = {name: [peak_bytes(code) for _ in range(arguments.runs)] for name, code in cases.items()}
    bare = median(peaks["bare"])
    values = {
        "file_bytes": size,
        "peak_bytes": peaks,
        "ratio_to_file": {name: round((median(peaks[name]) - bare) / size, 3) for name in cases if name != "bare"},
    }
    _results.write(arguments, values)


if __name__ == "__main__":
    main()
