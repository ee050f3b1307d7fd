# SPDX-License-Identifier: Apache-2.0
"""The plugin: harmless without vLLM and where vLLM differs, the same however often it is called."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from transformers_fastvlm import vllm_plugin


def test_nothing_of_it_is_imported_without_vllm() -> None:
    code = (
        "import sys, transformers_fastvlm, transformers_fastvlm.engines\n"
        "assert not [name for name in sys.modules if 'vllm' in name], sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_register_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"could not be registered with this version of vLLM"):
        vllm_plugin.register()


@pytest.mark.filterwarnings("ignore")  # vLLM's own imports warn
def test_register_twice() -> None:
    vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")
    vllm_plugin.register()
    registered = dict(vllm.ModelRegistry.models)
    vllm_plugin.register()
    assert dict(vllm.ModelRegistry.models) == registered
    assert vllm_plugin.ARCHITECTURE in registered


def test_entry_point() -> None:
    pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")
    found = [entry.value for entry in entry_points(group="vllm.general_plugins", name="fastvlm")]
    assert found == ["transformers_fastvlm_entry:vllm_plugin"], "install the package again"
