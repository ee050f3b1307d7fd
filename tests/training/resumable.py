# SPDX-License-Identifier: Apache-2.0
"""A run in a process of its own, to be killed: `python resumable.py RECIPE KILL_AT`.

KILL_AT is a step after which the process kills itself, or "save N", for in the middle of writing the N-th checkpoint,
or "never".
"""

import os
import signal
import sys

import torch
from transformers import Trainer, TrainerCallback

from transformers_fastvlm.training import load_recipe, run


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    when = sys.argv[2].split()
    if when[0] == "save":
        kill_in_save(int(when[1]))
    elif when[0] != "never":
        kill_at_step(int(when[0]))
    run(load_recipe(sys.argv[1]), resume=True)
