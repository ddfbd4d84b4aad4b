"""Every method by its name in an experiment file: ours and the baselines."""

import time
from collections.abc import Callable

from benchmarks.baselines import (
    erasediff,
    gradient_ascent,
    noise_target,
    salun,
    selective_amnesia,
    siss,
    vdu,
)
from benchmarks.task import Outcome, Task
from vdu_peft.config import UnlearnConfig, VDUConfig
from vdu_peft.trainer import UnlearnError, unlearn


def vdu_peft(task: Task, adapter: dict | None = None, **options) -> Outcome:
    """This package, from the forget images alone; options of UnlearnConfig, ``adapter`` those of VDUConfig."""
    config = UnlearnConfig(
        max_train_steps=task.max_train_steps, train_batch_size=task.train_batch_size, seed=task.seed, **options
    )
    times: list[float] = []
    try:
        result = unlearn(
            task.denoiser,
            task.forget,
            config,
            VDUConfig.for_model(task.denoiser.model, **(adapter or {})),
            callback=lambda step, terms: times.append(time.process_time()),
        )
    except UnlearnError:  # as a baseline that is not finite: a result like any other
        trained = sum(p.numel() for p in task.denoiser.model.parameters() if p.requires_grad)
        return Outcome("not finite", len(times), trained, float("nan"))
    # Merged, as it would be released, and as a full-parameter method leaves it.
    task.denoiser.model = result.model.merge_and_unload()
    # From the end of the first step: what comes before it is not the steps' time.
    seconds = (times[-1] - times[0]) / max(len(times) - 1, 1)
    return Outcome(result.status, len(times), result.trained_parameters, seconds)


METHODS: dict[str, Callable[..., Outcome]] = {
    "erasediff": erasediff.erasediff,
    "gradient_ascent": gradient_ascent.gradient_ascent,
    "noise_target": noise_target.noise_target,
    "salun": salun.salun,
    "selective_amnesia": selective_amnesia.selective_amnesia,
    "siss": siss.siss,
    "vdu_checkpoints": vdu.checkpoints,
    "vdu_isotropic": vdu.isotropic,
    "vdu_peft": vdu_peft,
}
