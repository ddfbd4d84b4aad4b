"""Every method by its name in an experiment file: ours and the baselines."""

import dataclasses
import inspect
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import nn

from benchmarks.baselines import (
    erasediff,
    gradient_ascent,
    noise_target,
    retrained,
    salun,
    selective_amnesia,
    siss,
    vdu,
)
from benchmarks.task import Outcome, Task
from vdu_peft import trainer
from vdu_peft.adapter import attach
from vdu_peft.config import UnlearnConfig, VDUConfig
from vdu_peft.replay import replay_seeds
from vdu_peft.trainer import UnlearnError, unlearn


def vdu_peft(
    task: Task, adapter: dict | None = None, oracle_filter: bool = False, frozen_a: bool = False, **options
) -> Outcome:
    """This package, from the forget images alone; options of UnlearnConfig, ``adapter`` those of VDUConfig.

    With ``oracle_filter`` the task's judge takes the forget images' class out of the replay; with ``frozen_a`` the
    random ``lora_A`` stays as it begins, and the posterior of the delta is Gaussian in a subspace that is given.
    """
    config = UnlearnConfig(
        max_train_steps=task.max_train_steps, train_batch_size=task.train_batch_size, seed=task.seed, **options
    ).filled(None)
    times: list[float] = []
    try:
        # No option of the package's: as an ablation it says what training A is for.
        with patch.object(trainer, "attach", attach_frozen) if frozen_a else nullcontext():
            result = unlearn(
                task.denoiser,
                task.forget,
                config,
                VDUConfig.for_model(task.denoiser.model, **(adapter or {})),
                replay=oracle_replay(task, config) if oracle_filter else None,
                callback=lambda step, terms: times.append(time.process_time()),
            )
    except UnlearnError:  # as a baseline that is not finite: a result like any other
        trained = sum(p.numel() for p in task.denoiser.model.parameters() if p.requires_grad)
        return Outcome("not finite", len(times), trained, float("nan"))
    # Merged, as it would be released, and as a full-parameter method leaves it.
    task.denoiser.model = result.model.merge_and_unload()
    # From the end of the first step: what comes before it is not the steps' time.
    seconds = (times[-1] - times[0]) / max(len(times) - 1, 1)
    scale = result.strength.scale if result.strength else 1.0
    return Outcome(result.status, len(times), result.trained_parameters, seconds, scale)


def attach_frozen(model: nn.Module, config: VDUConfig) -> PeftModel:
    """As the trainer attaches an adapter, but for ``lora_A``, which does not learn."""
    peft_model = attach(model, config)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return peft_model


def oracle_replay(task: Task, config: UnlearnConfig) -> torch.Tensor:
    """The model's own samples, less those that the judge takes for the forget images' class."""
    seeds = replay_seeds(config.seed, config.replay_size)
    images = task.denoiser.sample(len(seeds), seed=seeds, num_inference_steps=config.replay_inference_steps)
    forget_class = task.classify(task.forget).mode().values
    return images[task.classify(images) != forget_class]


METHODS: dict[str, Callable[..., Outcome]] = {
    "erasediff": erasediff.erasediff,
    "gradient_ascent": gradient_ascent.gradient_ascent,
    "noise_target": noise_target.noise_target,
    "retrained": retrained.retrained,
    "salun": salun.salun,
    "selective_amnesia": selective_amnesia.selective_amnesia,
    "siss": siss.siss,
    "vdu_checkpoints": vdu.checkpoints,
    "vdu_isotropic": vdu.isotropic,
    "vdu_peft": vdu_peft,
}


def method_options(method: str) -> set[str]:
    """Names of the options that a method takes in an experiment file."""
    names = {name for name, p in inspect.signature(METHODS[method]).parameters.items() if p.kind is not p.VAR_KEYWORD}
    of_run = {field.name for field in dataclasses.fields(UnlearnConfig)} if method == "vdu_peft" else set()
    return names - {"task"} | of_run
