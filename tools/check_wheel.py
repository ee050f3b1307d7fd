# SPDX-License-Identifier: Apache-2.0
"""Use the installed package as its users will, and check that its wheel declares and holds what it must.

    python -I tools/check_wheel.py DIST     in an environment with nothing but the wheel and its dependencies

DIST is the folder with the one wheel and the one source distribution that were built. The answers come from a tiny
checkpoint rebuilt from tests/golden, so the greedy tokens must be the recorded ones. Exits 1 at the first thing wrong.
"""

import argparse
import email
import importlib.util
import json
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"
NAME = "transformers_fastvlm"

REQUIREMENTS = {"transformers", "torch", "safetensors", "tokenizers", "huggingface_hub", "pillow"}
EXTRAS = {
    "torchvision",
    "training",
    "quantization",
    "embedding",
    "schema",
    "serving",
    "demo",
    "batch",
    "onnx",
    "gguf",
    "llamacpp",
    "coreml",
    "mlx",
    "apple-app",
    "executorch",
    "bench",
    "eval",
    "test",
    "dev",
    "docs",
}
ENTRY_POINTS = """[console_scripts]
fastvlm = transformers_fastvlm_entry:command

[lmms_eval.models]
fastvlm = transformers_fastvlm_entry:lmms_eval_manifest

[vllm.general_plugins]
fastvlm = transformers_fastvlm_entry:vllm_plugin"""
IN_SDIST = ("Makefile", "CHANGELOG.md", "tests/conftest.py", "tests/golden/build.py", "examples/demo.py", "mkdocs.yml")

USE = """
import sys
import transformers_fastvlm
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert type(model).__module__.startswith("transformers_fastvlm."), type(model)
inputs = processor(text=[sys.argv[2]], images=[Image.open(sys.argv[3]).convert("RGB")], return_tensors="pt")
tokens = int(sys.argv[4])
output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
print("greedy", *output[0, inputs["input_ids"].shape[1]:].tolist())
"""


def only(folder: Path, pattern: str) -> Path:
    """Return the one file that `pattern` matches in `folder`."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(
            f"{folder} holds {[file.name for file in found]}; expected one {pattern}. Run make test-wheel."
        )
    return found[0]


def expect(what: str, found: object, expected: object) -> None:
    """Print `what`, or stop if the two differ."""
    if found != expected:
        raise SystemExit(f"wheel: {what}\n  found    {found!r}\n  expected {expected!r}")
    print(f"ok  {what}")


def check_wheel(wheel: Path) -> None:
    """Compare the wheel's metadata and files with what the package promises."""
    sources = REPOSITORY / "src" / NAME
    kept = {".py", ".css", ".jinja", ".typed", ".json", ".yaml", ".txt", ".md", ".mplstyle", ".safetensors"}
    expected = {
        f"{NAME}/{file.relative_to(sources).as_posix()}" for file in sources.rglob("*") if file.suffix in kept
    } | {f"{NAME}/py.typed", f"{NAME}_entry.py"}
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        info = only_in(files, ".dist-info/METADATA").removesuffix("METADATA")
        metadata = email.message_from_bytes(archive.read(f"{info}METADATA"))
        entry_points = archive.read(f"{info}entry_points.txt").decode().strip()
        licenses = {name: archive.read(f"{info}licenses/{name}") for name in ("LICENSE", "NOTICE")}
    expect(
        "files: every source and data file, and nothing else", {f for f in files if not f.startswith(info)}, expected
    )
    requirements = [value for value in metadata.get_all("Requires-Dist", []) if "extra ==" not in value]
    expect("dependencies", {bare_name(value) for value in requirements}, REQUIREMENTS)
    ranges = [set(value[12:].split(",")) for value in requirements if bare_name(value) == "transformers"]
    expect("range of transformers", ranges, [{">=5.16.1", "<5.25"}])
    expect("extras", set(metadata.get_all("Provides-Extra", [])), EXTRAS)
    expect("entry points", entry_points, ENTRY_POINTS)
    expect("Python", metadata["Requires-Python"], ">=3.11")
    expect("licence", metadata["License-Expression"], "Apache-2.0")
    expect("licence files", licenses, {name: (REPOSITORY / name).read_bytes() for name in licenses})


def bare_name(requirement: str) -> str:
    """Return the name that a requirement such as `huggingface_hub>=1,<2` begins with, as it is written in setup.cfg."""
    name = requirement
    for end in "<>=!~;[ ":
        name = name.split(end)[0]
    return name.replace("-", "_")


def only_in(names: set[str], suffix: str) -> str:
    """Return the one of `names` that ends in `suffix`."""
    found = [name for name in names if name.endswith(suffix)]
    if len(found) != 1:
        raise SystemExit(f"wheel: expected one file that ends in {suffix}, found {found}")
    return found[0]


def check_sdist(sdist: Path) -> None:
    """The source distribution must hold the suite and its data."""
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    expect("source distribution: tests, golden data, Makefile", [file for file in IN_SDIST if file not in files], [])


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """Run `command` in `cwd` and return what it printed; stop if it failed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_use(work: Path) -> None:
    """Import, load Apple's layout, answer, and call the command line; from `work`, so that no checkout is in reach."""
    spec = importlib.util.find_spec(NAME)
    place = Path(sysconfig.get_path("purelib")) / NAME / "__init__.py"
    expect("imported from the environment, not from a checkout", spec and spec.origin, str(place))
    checkpoint = work / "qwen2_tied"
    run([sys.executable, GOLDEN / "build.py", "qwen2_tied", checkpoint], work)
    case = json.loads((GOLDEN / "qwen2_tied" / "expected.json").read_text(encoding="utf-8"))["single0"]
    with safe_open(GOLDEN / "qwen2_tied" / "expected.safetensors", "numpy") as expected:
        greedy = expected.get_tensor("single0.greedy").tolist()
    image = GOLDEN / "images" / case["image"]
    use = [sys.executable, "-I", "-W", "error", "-c", USE, checkpoint, case["prompt"], image, str(len(greedy))]
    answer = [line for line in run(use, work).splitlines() if line.startswith("greedy ")]
    expect("greedy tokens of a golden checkpoint", answer, ["greedy " + " ".join(map(str, greedy))])
    command = Path(sysconfig.get_path("scripts")) / "fastvlm"
    usage = run([command, "--help"], work)
    sign = REPOSITORY / "examples" / "images" / "sign.png"
    said = run([command, "generate", sign, "--model", "tiny", "-p", "What number is written?"], work).strip()
    expect("fastvlm generate --model tiny", said, "628")
    expect("fastvlm --help", [verb for verb in ("generate", "chat", "info", "convert") if verb not in usage], [])


def main() -> None:
    """Parse the arguments and run all checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("dist", type=Path, help="folder with the wheel and the source distribution")
    dist = parser.parse_args().dist.resolve()
    check_wheel(only(dist, "*.whl"))
    check_sdist(only(dist, "*.tar.gz"))
    with tempfile.TemporaryDirectory() as work:
        check_use(Path(work))


if __name__ == "__main__":
    main()
