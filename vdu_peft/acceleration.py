"""What a run takes of accelerate, and how it comes off the caller's model again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from vdu_peft.config import ConfigError, UnlearnConfig
from vdu_peft.precision import check_precision
from vdu_peft.processes import check_processes


def run_accelerator(config: UnlearnConfig, output_dir: Path | None, dtype: torch.dtype) -> Accelerator:
    """The run's Accelerator, for frozen weights of ``dtype``.

    Raises:
        ConfigError: a precision that the machine has not, a tracker that is not there, or processes that are not
            joined.
    """
    # accelerate keeps one precision per process and refuses another: a second run may well want one.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=config.report_to, project_dir=output_dir
        )
    except ValueError as error:
        name = "report_to" if "logging" in str(error) else "mixed_precision"
        raise ConfigError(f"{name} {getattr(config, name)}: {error}") from error
    check_processes(accelerator)
    check_precision(config, accelerator.device, dtype)
    if config.report_to and not accelerator.log_with:  # accelerate leaves out a tracker that is not installed
        raise ConfigError(f"report_to {config.report_to}: its package is not installed; install it, or leave it out")
    return accelerator


@contextmanager
def checkpointed(model: nn.Module, config: UnlearnConfig) -> Iterator[None]:
    """Gradient checkpointing while the run lasts, where it is asked for.

    Raises:
        ConfigError: the model has none.
    """
    if not config.gradient_checkpointing or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    if not hasattr(model, "enable_gradient_checkpointing"):
        raise ConfigError(f"gradient_checkpointing: a {type(model).__name__} has none; leave it out")
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


@contextmanager
def prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """accelerate's wrapped (model, optimizer); what it puts on the caller's model comes off however the run ends."""
    # Not by unwrap_model, which takes decorators of the class's own forward with it.
    put_on = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: vars(model)[name] for name in put_on if name in vars(model)}
    try:
        yield accelerator.prepare(model, optimizer)
    finally:
        for name in put_on:
            vars(model).pop(name, None)
        vars(model).update(before)
