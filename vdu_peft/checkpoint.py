"""A run's state in one safetensors file: parameters, Adam's moments, the history, and what a resumed run must match."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vdu_peft.adapter import AdapterError
from vdu_peft.config import UnlearnConfig, VDUConfig

CHECKPOINT_NAME = "checkpoint.safetensors"

# What may differ between the interrupted run and its resumption.
_RESUMABLE = ("checkpointing_steps", "report_to", "forget_tolerance")


def run_options(
    config: UnlearnConfig,
    adapter: VDUConfig,
    forget: torch.Tensor,
    forget_labels: torch.Tensor | None,
    replay: torch.Tensor | None,
    replay_labels: torch.Tensor | None,
    prompts: Sequence[str] | None,
    guidance_scale: float,
    shares: dict[str, float],
    num_processes: int,
    base: Iterable[torch.Tensor],
) -> dict:
    """What must be the same for a resumed run to give the same result.

    Args:
        replay, replay_labels: the caller's own, if any.
        shares: what else a batch is drawn by, by name, that is no option: checkpoints of other ones are not resumed.
        base: the frozen weights, of which a part is told apart: of billions all would take minutes.
    """
    names = ("r", "lora_alpha", "lora_dropout", "prior_scale", "init_scale", "variational", "use_rslora")
    return {
        **{name: value for name, value in asdict(config).items() if name not in _RESUMABLE},
        **{name: getattr(adapter, name) for name in (*names, "alpha_pattern", "rank_pattern")},
        "prompts": prompts,
        "guidance_scale": guidance_scale,
        "forget_images": _digest(forget),
        "forget_labels": None if forget_labels is None else _digest(forget_labels),
        "replay_images": None if replay is None else _digest(replay),
        "replay_labels": None if replay_labels is None else _digest(replay_labels),
        **shares,
        "num_processes": num_processes,
        "base_model": _digest(
            torch.cat([torch.zeros(0), *(p.detach().flatten()[:256].float().cpu() for p in base if _is_plain(p))])
        ),
    }


def _is_plain(parameter: torch.Tensor) -> bool:
    """Whether a parameter's own values can be read; those of quantised layers are their library's affair."""
    return type(parameter.data) is torch.Tensor and parameter.is_floating_point()


def _digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:16]


def save_checkpoint(output_dir: Path, parameters: dict, optimizer, history: list[dict], options: dict) -> None:
    """Parameters and Adam's moments as tensors, history and options in the file's header.

    One file, replaced by one rename: a kill or a full disk at any moment leaves the earlier checkpoint loadable.

    Raises:
        AdapterError: the file cannot be written.
    """
    tensors = {f"parameter.{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"{key}.{name}": value.cpu().contiguous() for key, value in optimizer.state[p].items()}
    fresh = output_dir / f".{CHECKPOINT_NAME}.tmp"
    try:
        save_file(tensors, fresh, metadata={"history": json.dumps(history), "run": json.dumps(options)})
        fresh.replace(output_dir / CHECKPOINT_NAME)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{output_dir}: no checkpoint could be written ({error}); the earlier one is kept"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def check_resumable(output_dir: Path | None, config: UnlearnConfig) -> None:
    """Whether there is something to resume, before any work.

    Raises:
        AdapterError: no checkpoint, or a precision that cannot be resumed.
    """
    if config.mixed_precision == "fp16":
        raise AdapterError("resume: fp16's gradient scale is not kept in a checkpoint; use mixed_precision bf16 or no")
    if output_dir is None or not (output_dir / CHECKPOINT_NAME).is_file():
        raise AdapterError(f"{output_dir}: no checkpoint to resume from; run without resume, with checkpointing_steps")


def load_checkpoint(output_dir: Path, parameters: dict, optimizer, options: dict) -> list[dict[str, float]]:
    """Put a checkpoint's state into ``parameters`` and ``optimizer``; returns its history.

    Raises:
        AdapterError: an unreadable checkpoint, one of another model, or one written with other options.
    """
    file = output_dir / CHECKPOINT_NAME
    try:
        stored = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise AdapterError(f"{file}: not a readable checkpoint ({error}); start again in a new output_dir") from error
    with stored:
        metadata = stored.metadata() or {}
        if "run" not in metadata:
            raise AdapterError(f"{file}: not a checkpoint of this package; start again in a new output_dir")
        old = json.loads(metadata["run"])
        for name, value in options.items():
            if old.get(name) != value:
                raise AdapterError(f"{file}: written with {name}={old.get(name)}, not {value}; resume with the same")
        names = {key.removeprefix("parameter.") for key in stored.keys() if key.startswith("parameter.")}  # noqa: SIM118
        if names != set(parameters):
            raise AdapterError(f"{file}: a checkpoint of another model or adapter; start again in a new output_dir")
        for name, p in parameters.items():
            value = stored.get_tensor(f"parameter.{name}")
            if value.shape != p.shape:
                raise AdapterError(f"{file}: a checkpoint of another model: {name} has shape {list(value.shape)}")
            p.data.copy_(value)
            optimizer.state[p] = {
                key: stored.get_tensor(f"{key}.{name}").to(p.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return json.loads(metadata["history"])
