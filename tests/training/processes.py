# SPDX-License-Identifier: Apache-2.0
"""Runs on several processes, as a launcher would start them, on the CPU with gloo.

The processes are forked from a server that has imported what they need, which saves their start. A real launcher is
among the soak tests.
"""

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from transformers_fastvlm.training import FastVLMTrainer, launch_config, load_recipe, run

PRELOADED = ["transformers_fastvlm.training.train_run", "transformers_fastvlm.data", "accelerate", "processes"]


def environment_of(name: str) -> dict[str, str]:
    """Return the variables that `accelerate launch --config_file` sets for a configuration of the package."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(launch_config(name)), "--main_process_port", "0", "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        variables = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        variables = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in variables.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def launch(function: Any, *arguments: Any, environment: dict[str, str] | None = None, limit: float = 300) -> None:
    """Call a function on two processes of one group; fail if they do not end, as if they wait for each other."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {**(environment or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    # torchrun's variables keep accelerate from looking for an MPI, and gloo from looking for a network.
    variables |= {"LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": _loopback()}
    group = torch.multiprocessing.start_processes(
        _one, (variables, function, arguments), nprocs=2, join=False, start_method="forkserver"
    )
    end = time.monotonic() + limit
    while not group.join(timeout=1):
        if time.monotonic() > end:
            for process in group.processes:
                process.kill()
            raise TimeoutError(f"the processes did not end within {limit:g} s")


def _loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def _one(rank: int, variables: dict[str, str], function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    if variables.get("ACCELERATE_USE_FSDP") == "true":
        _shard_on_the_cpu()
    if variables.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _take_gloo()
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _shard_on_the_cpu() -> None:
    """Make accelerate, which shards on accelerators alone, take the processes for ones that have them."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plain = PartialState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def _take_gloo() -> None:
    """Make accelerate, which runs DeepSpeed on accelerators alone, take the CPU for one."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """Within, rows are trained on in the order of the file, so that a test says which process has which."""
    plain = FastVLMTrainer._get_train_sampler
    FastVLMTrainer._get_train_sampler = lambda self, dataset=None: torch.utils.data.SequentialSampler(  # type: ignore
        self.train_dataset
    )
    try:
        yield
    finally:
        FastVLMTrainer._get_train_sampler = plain  # type: ignore[method-assign]


def train(recipe: Path, resume: bool = False, ordered: bool = True) -> None:
    """Run a recipe, on this process's part."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with in_order() if ordered else contextlib.nullcontext():
        run(load_recipe(recipe), resume=resume)
