"""Files of results: written whole or not at all, images drawn once, and where figures come from."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class StaleResultError(ValueError):
    """A result of another base model or other options than there are now; the message names it and the mend."""


def has_result(file: Path, base_model: str) -> bool:
    """Whether the file is there, of this base model.

    Raises:
        StaleResultError: it is of another one, which new results must not stand beside.
    """
    if not file.is_file():
        return False
    made_of = json.loads(file.read_text(encoding="utf-8"))["base_model"]
    if made_of != base_model:
        raise StaleResultError(f"{file}: of base model {made_of}, it is now {base_model}; remove it to run anew")
    return True


def changed(record: dict, spec: dict) -> list[str]:
    """Names of what a result was made with that is something else in its spec now."""
    return [name for name, value in spec.items() if record.get(name) != value]


def check_current(file: Path, spec: dict) -> None:
    """Raises StaleResultError: the result in the file is not of this spec, which new ones must not stand beside."""
    if names := changed(json.loads(file.read_text(encoding="utf-8")), spec):
        raise StaleResultError(f"{file}: of another {', '.join(names)} than the benchmark; remove it to run anew")


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
    """Base model, where the results tell it, commits and machine of results, for the text above their table."""
    commits = sorted({r["environment"]["commit"] for r in records})
    machines = sorted({f"{r['environment']['machine']}, {r['environment']['device']}" for r in records})
    models = sorted({r["base_model"] for r in records if "base_model" in r})
    model = f"base model {', '.join(models)}; " if models else ""
    return f"{model}commit {', '.join(commits)}; {'; '.join(machines)}"
