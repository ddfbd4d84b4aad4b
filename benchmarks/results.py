"""Files of results: written whole or not at all, images drawn once, and where figures come from."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


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
    """Commits and machine of results, for the text above their table."""
    environments = sorted({(r["environment"]["commit"], r["environment"]["machine"]) for r in records})
    return f"commit {', '.join(commit for commit, _ in environments)}; {environments[0][1]}"
