"""Several processes of one run, which accelerate joins."""

import os

from accelerate import Accelerator

from vdu_peft.config import ConfigError


def check_processes(accelerator: Accelerator) -> None:
    """Whether accelerate joins all the processes that were started together.

    Without a GPU it joins those of ``torchrun`` only when told to use the CPU: each would go through the whole run
    alone, and write over the others' files.

    Raises:
        ConfigError: it does not.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, but accelerate joins {accelerator.num_processes}; on a CPU set "
            "ACCELERATE_USE_CPU=true"
        )
