"""Several processes of one run, which accelerate joins."""

import os

from accelerate import Accelerator, DistributedType

from vdu_peft.config import ConfigError


def check_processes(accelerator: Accelerator) -> None:
    """Whether accelerate joins all the processes that were started together.

    Without a GPU it joins those of ``torchrun`` only when told to use the CPU: each would go through the whole run
    alone, and write over the others' files.

    Raises:
        ConfigError: it does not, or by more than plain data parallelism (DeepSpeed, FSDP and their kin).
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.startswith("MULTI_"):
        raise ConfigError(
            f"accelerate is configured for {kind.value}, which shards or rewrites the model; use plain processes"
        )
    if started > accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, but accelerate joins {accelerator.num_processes}; on a CPU set "
            "ACCELERATE_USE_CPU=true"
        )
