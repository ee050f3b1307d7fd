# SPDX-License-Identifier: Apache-2.0
"""CPU time of importing the package: in a new process, and with Transformers loaded already.

    python benchmarks/import_cost.py [--runs 5] [--out benchmarks/results/import_cost.json]

`plain` is `import transformers_fastvlm` in a new process. `transformers` is what any program that loads a comparable
model imports: torch and Transformers' own LLaVA. `after_transformers` is the package's import after that one, and
`entry_point` that of the module that vLLM and lmms-eval import. Each run is a new process, in turns; files are in the
system's cache after the first turn, which does not count.
"""

import subprocess
import sys

import _results

TRANSFORMERS = "import torch; from transformers import AutoProcessor, CLIPImageProcessor, LlavaForConditionalGeneration"
PACKAGE = "import transformers_fastvlm"
# What runs before, and what is measured.
CASES = {
    "plain": ("", PACKAGE),
    "transformers": ("", TRANSFORMERS),
    "after_transformers": (TRANSFORMERS, PACKAGE),
    "entry_point": ("", "import transformers_fastvlm_entry"),
}


def seconds(before: str, measured: str) -> float:
    """Return the CPU time, of all threads, that a new process takes for `measured`."""
    code = f"{before}\nimport time\nstart = time.process_time()\n{measured}\nprint(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    options = _results.parser(__doc__, runs=5).parse_args()
    turns = [{name: seconds(*case) for name, case in CASES.items()} for _ in range(1 + options.runs)]

    from transformers_fastvlm.bench.measuring import spread

    values = {name: spread([turn[name] for turn in turns[1:]]) for name in CASES}
    _results.write(options, {"runs": options.runs, "processor_seconds": values})


if __name__ == "__main__":
    main()
