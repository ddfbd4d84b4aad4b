"""Merge the posterior mean into the base and write a pipeline that loads without this package."""

from pathlib import Path

from vdu_peft.adapter import atomic_folder, load_adapter
from vdu_peft.denoiser import Denoiser


def merge(model: str | Path, adapter: str | Path, output_dir: str | Path) -> Denoiser:
    """Write ``output_dir``, a complete diffusers pipeline with the adapter's posterior mean merged in.

    The result cannot be toggled back, which is what to release; it is still no secure erasure.

    Raises:
        ModelError, ConfigError, AdapterError: a part is missing or does not fit, before anything is written.
    """
    denoiser = Denoiser.from_pretrained(model)
    denoiser.model = load_adapter(denoiser.model, adapter).merge_and_unload(safe_merge=True)
    with atomic_folder(Path(output_dir)) as fresh:
        denoiser.save_pretrained(fresh)
    return denoiser
