# SPDX-License-Identifier: Apache-2.0
"""Models that several threads load at once are whole, and so is what the process loads later."""

from test_registration_order import run

PROGRAM = """
    import sys, threading
    import torch
    import transformers_fastvlm
    from transformers import AutoModelForImageTextToText
    from transformers_fastvlm import FastViTHDModel
    from transformers_fastvlm.checkpoints import tiny_checkpoint

    def load(cls):
        model, info = cls.from_pretrained(tiny_checkpoint(), dtype="float32", output_loading_info=True)
        found[cls].append((model.state_dict(), set(info["missing_keys"])))

    found = {AutoModelForImageTextToText: [], FastViTHDModel: []}
    for cls in found:
        load(cls)
    sys.setswitchinterval(1e-4)
    threads = [threading.Thread(target=load, args=(cls,)) for cls in found for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cls, loaded in found.items():
        load(cls)
        (first, _), *others = loaded
        same = [all(torch.equal(first[name], state[name]) for name in first) for state, _ in others]
        print(len(others), all(same), set().union(*(missing for _, missing in loaded)))
"""


def test_threads_that_load_at_once() -> None:
    """In a process of its own, since what goes wrong stays wrong."""
    assert run(PROGRAM).splitlines() == ["4 True set()"] * 2
