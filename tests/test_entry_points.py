# SPDX-License-Identifier: Apache-2.0
"""Entry points: they never disturb vLLM or lmms-eval with other models, even if this package is broken."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

import transformers_fastvlm_entry
from test_registration_order import run
from transformers_fastvlm import FastVLMConfig, register


@pytest.fixture
def registered_again() -> Iterator[None]:
    """Restores the registrations after a test that replaces them."""
    yield
    register()


class _Registry(SimpleNamespace):
    """The used part of vLLM's registries."""

    def register(self, name: str, *where: str) -> None:
        self.renderers[name] = self.tokenizers[name] = where

    def register_model(self, name: str, where: str) -> None:
        self.models[name] = where


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stubs of vLLM's modules; vLLM needs a separate environment, where tests/vllm_plugin runs it."""
    registry = _Registry(models={}, renderers={}, tokenizers={})
    contents = {
        "vllm": {"ModelRegistry": registry},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": {}},
        "vllm.renderers.registry": {"RENDERER_REGISTRY": registry},
        "vllm.tokenizers.registry": {"TokenizerRegistry": registry},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return registry.models


def test_vllm_plugin(vllm: dict[str, Any]) -> None:
    for _ in range(2):
        transformers_fastvlm_entry.vllm_plugin()
    assert vllm == {
        "FastVLMForConditionalGeneration": "transformers_fastvlm.vllm_plugin.model:FastVLMForConditionalGeneration"
    }


@pytest.mark.usefixtures("registered_again")
def test_a_vllm_that_lacks_something(
    vllm: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    checkpoint: Callable[[str], Path],
) -> None:
    """An error appears only when a FastVLM is requested, with its reason; repaired parts are used by then."""
    directory = checkpoint("qwen2_tied")
    with monkeypatch.context() as context:
        context.delattr(sys.modules["vllm.renderers.registry"], "RENDERER_REGISTRY")
        transformers_fastvlm_entry.vllm_plugin()
        assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
        assert capfd.readouterr() == ("", "")
        with pytest.raises(ImportError, match=r"(?s)this version of vLLM.*RENDERER_REGISTRY.*docs/vllm.md"):
            AutoConfig.from_pretrained(directory)
    assert type(AutoConfig.from_pretrained(directory)) is FastVLMConfig
    assert "FastVLMForConditionalGeneration" in vllm


@pytest.mark.parametrize(
    ("breaks", "error"),
    [
        (
            'Finder(once=False, torchvision=raises(RuntimeError("operator torchvision::nms does not exist")))',
            "torchvision::nms",
        ),
        ("import transformers.conversion_mapping as m; del m.register_checkpoint_conversion_mapping", "ImportError"),
    ],
)
def test_a_broken_torchvision_and_a_transformers_that_lacks_something(
    breaks: str, error: str, checkpoint: Callable[[str], Path]
) -> None:
    code = f"""
        import contextlib, io, logging
        import transformers.models.auto.configuration_auto  # as vLLM has
        {breaks}
        said = io.StringIO()
        logging.basicConfig(stream=said, level=logging.INFO)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            from transformers_fastvlm_entry import vllm_plugin
            vllm_plugin()
        assert [line for line in said.getvalue().splitlines() if "torch/utils/_pytree" not in line] == []
        from transformers import AutoConfig
        try:
            AutoConfig.from_pretrained({str(checkpoint("qwen2_tied"))!r})
        except ImportError as error:
            print(error)
    """
    said = run(code).splitlines()
    assert "FastVLM cannot be registered with Transformers" in said[0] and error in said[0]
    assert f"transformers {transformers.__version__}" in said[1] and "expected: " in said[1]


def test_lmms_eval_manifest_imports_nothing() -> None:
    code = """
        import types
        registry = types.ModuleType("registry_v2")
        registry.ModelManifest = lambda **fields: fields
        sys.modules["lmms_eval.models.registry_v2"] = registry
        for name in ("lmms_eval", "lmms_eval.models"):
            sys.modules[name] = types.ModuleType(name)
        from transformers_fastvlm_entry import lmms_eval_manifest
        print(*lmms_eval_manifest().values())
        assert not {"transformers_fastvlm", "transformers", "torch"} & set(sys.modules)
    """
    assert run(code) == "fastvlm transformers_fastvlm.evaluation.lmms_model.FastVLM"
