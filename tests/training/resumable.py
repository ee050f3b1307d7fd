# SPDX-License-Identifier: Apache-2.0
"""A run in a process of its own, which kills itself."""

import os
import signal

import torch
import yaml
from transformers import Trainer, TrainerCallback

from transformers_fastvlm.training import Recipe, run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(step: int) -> None:
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == step:
                die()

    plain = Trainer.__init__

    def init(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        plain(self, *args, **kwargs)
        self.add_callback(Kill())

    Trainer.__init__ = init  # type: ignore[method-assign]


def kill_in_save(number: int) -> None:
    plain, saves = Trainer._save_optimizer_and_scheduler, [0]

    def save(self, output_dir):  # type: ignore[no-untyped-def]
        saves[0] += 1
        if saves[0] == number:
            with open(os.path.join(output_dir, "optimizer.pt"), "wb") as stream:
                stream.write(b"half")
            die()
        plain(self, output_dir)

    Trainer._save_optimizer_and_scheduler = save  # type: ignore[method-assign]


def run_until(recipe: str, when: str) -> None:
    """Run a recipe, given as YAML, until after a step, or with "save N" until in the middle of the N-th checkpoint."""
    torch.set_num_threads(1)
    kind, _, number = when.rpartition(" ")
    (kill_in_save if kind == "save" else kill_at_step)(int(number))
    run(Recipe.from_dict(yaml.safe_load(recipe)), resume=True)
