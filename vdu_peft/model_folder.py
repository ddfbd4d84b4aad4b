"""A ``UNet2DModel`` on disk or on the hub: where its parts lie, what it was saved as; safetensors only."""

import json
import logging
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline, PNDMPipeline, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from safetensors import safe_open

from vdu_peft.first_line import first_line
from vdu_peft.schedule import ModelError, plain_scheduler

logger = logging.getLogger(__name__)

# Stock pipelines of a UNet2DModel and a scheduler alone.
PIPELINES = {kind.__name__: kind for kind in (DDPMPipeline, DDIMPipeline, PNDMPipeline)}


def check_folder(folder: Path) -> tuple[Path, Path | None]:
    """(unet folder, scheduler folder or None) of a local model, checked before anything heavy.

    Raises:
        ModelError: no model there, one that is not a UNet2DModel, or one without safetensors weights.
    """
    unet_folder, scheduler_folder = _parts(folder)
    if not list(unet_folder.glob("*.safetensors")):
        pickles = sorted(f.name for f in unet_folder.iterdir() if f.suffix in (".bin", ".ckpt", ".pt", ".pth"))
        found = (
            f"only {', '.join(pickles)}, and pickle is never read; convert it to safetensors"
            if pickles
            else "no weights"
        )
        raise ModelError(f"{unet_folder}: no .safetensors file there, {found}")
    return unet_folder, scheduler_folder


def _parts(folder: Path) -> tuple[Path, Path | None]:
    """As :func:`check_folder`, by the configs alone."""
    pipeline_folder = folder.resolve().parent
    if (folder / "unet").is_dir():
        unet_folder, scheduler_folder = folder / "unet", folder / "scheduler"
    elif not (folder / SCHEDULER_CONFIG_NAME).is_file() and (pipeline_folder / "model_index.json").is_file():
        unet_folder, scheduler_folder = folder, pipeline_folder / "scheduler"
    else:
        unet_folder = scheduler_folder = folder
    if not (unet_folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; expected a diffusers pipeline or UNet2DModel folder")
    try:
        kind = json.loads((unet_folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except json.JSONDecodeError as error:
        raise ModelError(f"{unet_folder / 'config.json'}: not valid JSON ({error})") from error
    if kind != "UNet2DModel":
        raise ModelError(
            f"{folder}: holds a {kind}, expected a UNet2DModel; a text-to-image model is a whole pipeline, and goes "
            "with prompts (in Python a TextDenoiser)"
        )
    has_scheduler = (scheduler_folder / SCHEDULER_CONFIG_NAME).is_file()
    return unet_folder, scheduler_folder if has_scheduler else None


def stored_scheduler(folder: Path | None, name: str | Path) -> SchedulerMixin:
    """The noise schedule that a folder holds, see :func:`~vdu_peft.schedule.plain_scheduler`.

    Args:
        folder: None where the model of this ``name`` has none; DDPM's own is then assumed, and said to be.
    """
    if folder is None:
        logger.warning(
            "%s: no %s there; taken to predict the noise (epsilon) on DDPM's linear schedule of 1000 steps. "
            "If it does not, put its scheduler's config beside it.",
            name,
            SCHEDULER_CONFIG_NAME,
        )
        return DDPMScheduler()
    config = DDPMScheduler.load_config(str(folder))
    try:
        return plain_scheduler(config.get("_class_name"), config)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def stored_sampler(scheduler_folder: Path | None) -> tuple[type[DiffusionPipeline], SchedulerMixin] | None:
    """What a stock pipeline samples with, by its scheduler's folder: its class, and its scheduler as it is."""
    if scheduler_folder is None or not (scheduler_folder.parent / "model_index.json").is_file():
        return None
    kind = PIPELINES.get(DiffusionPipeline.load_config(str(scheduler_folder.parent)).get("_class_name"))
    config = DDPMScheduler.load_config(str(scheduler_folder))
    scheduler = getattr(diffusers, config.get("_class_name", ""), None)
    return kind and scheduler and (kind, scheduler.from_config(config))


def stored_dtype(folder: Path, variant: str | None = None) -> torch.dtype:
    """What the weights are on disk, before they were loaded as something else; of a variant where it is there."""

    def order(file: Path) -> tuple:
        # Beside what is loaded may lie other variants (``model.fp16.safetensors``), and adapters.
        strange = not file.name.startswith(("diffusion_pytorch_model", "model"))
        return strange, bool(variant) and f".{variant}" not in file.name, file.name.count("."), file.name

    with safe_open(min(folder.glob("*.safetensors"), key=order), framework="pt") as stored:
        dtypes = (stored.get_tensor(name).dtype for name in stored.keys())  # noqa: SIM118
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)  # some number places


def from_hub(repo_id: str) -> tuple[Path, Path | None]:
    """As :func:`check_folder`, of a hub model, whose configs and safetensors files alone are fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # What turns out to be another kind of model may have weights of many gigabytes.
        _parts(Path(snapshot_download(repo_id, allow_patterns=["*.json"])))
        folder = snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"])
    except GatedRepoError as error:
        raise ModelError(
            f"{repo_id}: its owner gates it; accept its terms on the hub, then log in (hf auth login)"
        ) from error
    except HFValidationError as error:  # a mistyped path with one slash in it, such as ./base
        raise ModelError(f"{repo_id}: no such folder, and not a hub id of the form owner/name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{repo_id}: neither a local folder nor a hub model that can be reached ({first_line(error)})"
        ) from error
    return check_folder(Path(folder))
