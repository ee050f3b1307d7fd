# SPDX-License-Identifier: Apache-2.0
"""The registration survives interrupted and failing imports; each test runs in a new process, since order matters."""

import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import transformers_fastvlm

PROLOGUE = """
import importlib, importlib.machinery, os, sys, threading, warnings
warnings.filterwarnings("error", module="transformers_fastvlm")

class Finder:
    '''Comes before all others and calls the function that is set for a module's name, if any, before it is found.'''

    def __init__(self, once=True, **calls):
        self.once, self.calls = once, calls
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path, target=None):
        call = self.calls.get(name)
        if self.once:
            self.calls.pop(name, None)
        return call and call()

def raises(error):
    def call():
        raise error
    return call

def check(directory):
    '''The checkpoint in `directory` is found by all Auto classes and loads with every weight renamed.'''
    from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
    assert type(AutoConfig.from_pretrained(directory)).__name__ == "FastVLMConfig"
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert type(model).__module__ == "transformers_fastvlm.modeling_fastvlm"
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(AutoProcessor.from_pretrained(directory)).__name__ == "FastVLMProcessor"
"""


def run(code: str, **environment: str) -> str:
    """Run `code` in a new interpreter, where our warnings are errors, and return its output."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-c", PROLOGUE + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.fixture
def directory(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("qwen2_tied"))


def test_interrupted_and_failed_imports(directory: str) -> None:
    """After Ctrl-C during the import of torch, Transformers or the model, or after a failure, the next import works."""
    code = f"""
        Finder(**{{
            "torch": raises(KeyboardInterrupt()),
            "transformers.modeling_utils": raises(KeyboardInterrupt()),
            "transformers.models.auto.processing_auto": raises(KeyboardInterrupt()),
            "transformers_fastvlm.modeling_fastvlm": raises(MemoryError("no room")),
            "transformers_fastvlm.checkpoints.layouts": raises(OSError("the disk was away")),
        }})
        for attempt in range(6):
            try:
                import transformers_fastvlm
            except BaseException as error:
                print(type(error).__name__, str(error).splitlines()[:1])
        check({directory!r})
    """
    assert run(code).splitlines() == [
        *["KeyboardInterrupt []"] * 2,
        "ImportError ['FastVLM cannot be registered with Transformers: MemoryError: no room']",
        "ImportError ['FastVLM cannot be registered with Transformers: OSError: the disk was away']",
        "KeyboardInterrupt []",
    ]


def test_other_finders_threads_reload_and_fork(directory: str) -> None:
    code = f"""
        from importlib.machinery import PathFinder

        class Greedy:
            '''As the finder of an editable install, or a post-import hook: nobody else is asked for these modules.'''
            @staticmethod
            def find_spec(name, path, target=None):
                ours = name.startswith(("transformers.", "transformers_fastvlm"))
                return PathFinder.find_spec(name, path, target) if ours else None

        sys.meta_path.insert(0, Greedy)
        import transformers  # as every program has, before it starts threads that need its models
        wrong, start = [], threading.Barrier(2)

        def use():
            start.wait()
            try:
                import transformers_fastvlm
                sys.meta_path.insert(0, Greedy)  # a finder of this package would no longer be called
                check({directory!r})
            except BaseException as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=use) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert wrong == [], wrong

        import transformers_fastvlm
        model_class = transformers_fastvlm.FastVLMForConditionalGeneration
        assert importlib.reload(transformers_fastvlm).FastVLMForConditionalGeneration is model_class
        check({directory!r})
        if hasattr(os, "fork"):
            child = os.fork()
            if not child:
                check({directory!r})
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    run(code)


def test_half_imported_transformers(directory: str) -> None:
    """If Transformers is only partly imported, importing the package gives a clear error, and works later."""
    code = f"""
        import importlib.util

        class Circular(importlib.machinery.SourceFileLoader):
            '''Imports the package before the module itself has any content.'''
            def exec_module(self, module):
                try:
                    import transformers_fastvlm
                except ImportError as error:
                    print(self.name, str(error).splitlines()[0])
                super().exec_module(module)

        def circular(name):
            def call():
                spec = importlib.util.find_spec(name)
                spec.loader = Circular(name, spec.origin)
                return spec
            return call

        names = ("transformers.models.auto.modeling_auto", "transformers.processing_utils", "transformers.models.auto")
        Finder(**{{name: circular(name) for name in names}})
        from transformers import AutoConfig, AutoProcessor
        import transformers_fastvlm
        check({directory!r})
    """
    said = run(code).splitlines()
    assert said, "no module was half imported"
    assert all("FastVLM cannot be registered with Transformers" in line for line in said), said


def test_hook_of_a_ray_worker_and_holders_of_an_older_transformers(directory: str) -> None:
    """Ray calls a function, pickled or by name, in a new process.

    There Transformers is already imported, and importing one of its modules has replaced the module object.
    """
    hook = pickle.dumps(transformers_fastvlm.register)
    code = f"""
        import pickle, transformers
        importlib.import_module("transformers.processing_utils")
        assert transformers is not sys.modules["transformers"]
        pickle.loads({hook!r})()
        module, name = "transformers_fastvlm.register".rsplit(".", 1)
        getattr(importlib.import_module(module), name)()
        check({directory!r})
        for module in (transformers, sys.modules["transformers"]):
            assert module.FastVLMForConditionalGeneration.__module__ == "transformers_fastvlm.modeling_fastvlm"
            assert module.AutoModelForVision2Seq is transformers.AutoModelForVision2Seq
    """
    run(code)


def test_old_name_can_be_left_out_and_any_module_may_come_first(hub_cache: Path) -> None:
    code = """
        from transformers_fastvlm.checkpoints import convert
        import transformers
        assert not hasattr(transformers, "AutoModelForVision2Seq")
        check("fastvlm/tiny")
        from transformers import pipeline
        print(pipeline("image-text-to-text", model="fastvlm/tiny").model.config.image_token_id)
    """
    assert run(code, TRANSFORMERS_FASTVLM_NO_VISION2SEQ="1", HF_HOME=str(hub_cache)) == "483"
