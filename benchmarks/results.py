"""Files of results: written whole or not at all, images drawn once, and where figures come from."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from vdu_peft.demo import assets


class StaleResultError(ValueError):
    """A result of another base model than the demo has now; the message names it and the mend."""


def base_model() -> str:
    """Which base model the demo has: the first digits of its weights' SHA-256."""
    weights = (assets() / "ddpm" / "unet" / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    return hashlib.sha256(weights).hexdigest()[:8]


def has_result(file: Path) -> bool:
    """Whether the file is there, of the demo's base model as it is now.

    Raises:
        StaleResultError: it is of another one, which new results must not stand beside.
    """
    if not file.is_file():
        return False
    made_of, now = json.loads(file.read_text())["base_model"], base_model()
    if made_of != now:
        raise StaleResultError(f"{file}: of base model {made_of}, the demo's is {now}; remove it to run anew")
    return True


def write_result(file: Path, record: dict) -> None:
    """Whole or not at all: a result that is there counts as run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(file)


def kept_images(file: Path, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The images in ``file``; the first to ask draws them."""
    if not file.is_file():
        images = draw()
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")  # another process may be drawing the same
        save_file({"images": images}, unfinished)
        unfinished.replace(file)
    return load_file(file)["images"]


def provenance(records: list[dict]) -> str:
    """Base model, where it is the demo's, commits and machine of results, for the text above their table."""
    environments = sorted({(r["environment"]["commit"], r["environment"]["machine"]) for r in records})
    of_demo = sorted({r["base_model"] for r in records if "base_model" in r})
    model = f"base model {', '.join(of_demo)}; " if of_demo else ""
    return f"{model}commit {', '.join(commit for commit, _ in environments)}; {environments[0][1]}"
