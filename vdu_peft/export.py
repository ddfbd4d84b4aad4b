"""Merge the posterior mean into the base, or strip an adapter to it, for use without this package."""

import shutil
from pathlib import Path

import torch
from diffusers import DDPMPipeline
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from vdu_peft.adapter import AdapterError, atomic_folder, load_adapter, read_adapter_weights
from vdu_peft.card import model_card
from vdu_peft.config import VDUConfig
from vdu_peft.denoiser import Denoiser

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def merge(model: str | Path, adapter: str | Path, output_dir: str | Path, dtype: str | None = None) -> Denoiser:
    """Write ``output_dir``, a complete diffusers pipeline with the adapter's posterior mean merged in.

    The sum is made in float32, rounded once, written, and read back by stock diffusers to compare. The result
    cannot be toggled back, which is what to release; it is still no secure erasure.

    Args:
        dtype: ``float32``, ``float16`` or ``bfloat16`` of the written weights; the base's own when None.

    Returns:
        the merged denoiser, in that dtype.

    Raises:
        ModelError, ConfigError, AdapterError: a part is missing or does not fit, before anything is written.
        AdapterError: what was written does not read back as it should; ``output_dir`` is then left as it was.
    """
    denoiser = Denoiser.from_pretrained(model)
    kept = DTYPES[dtype] if dtype else denoiser.stored_dtype
    denoiser.model = load_adapter(denoiser.model, adapter).merge_and_unload(safe_merge=True).to(kept)
    with atomic_folder(Path(output_dir)) as fresh:
        denoiser.save_pretrained(fresh)
        facts = {"adapter": Path(adapter).resolve().name, "weights": str(kept).removeprefix("torch.")}
        (fresh / "README.md").write_text(model_card("merged", denoiser.name, facts))
        written = DDPMPipeline.from_pretrained(fresh, use_safetensors=True).unet.state_dict()  # widened to float32
        for name, value in denoiser.model.state_dict().items():
            if name not in written or not torch.equal(written[name], value.float()):
                raise AdapterError(f"{output_dir}: {name} does not read back as it was written")
    return denoiser


def export_lora(adapter: str | Path, output_dir: str | Path) -> None:
    """Write the posterior mean alone as a plain LoRA in PEFT's format.

    Stock PEFT loads our own folders, too, with a warning about our options; its hot-swapping refuses them, because
    it does not know the deviations. This folder it takes as any other.

    Raises:
        ConfigError, AdapterError: the adapter is missing or unreadable, before anything is written.
    """
    config = VDUConfig.from_pretrained(adapter)
    tensors = {name: t for name, t in read_adapter_weights(adapter).items() if "lora_log_std" not in name}
    ours = VDUConfig.__dataclass_fields__.keys() - LoraConfig.__dataclass_fields__.keys()
    plain = LoraConfig(**{n: v for n, v in config.to_dict().items() if n not in ours | {"peft_type", "auto_mapping"}})
    plain.inference_mode = True
    with atomic_folder(Path(output_dir)) as fresh:
        plain.save_pretrained(fresh)
        save_file(tensors, fresh / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if (Path(adapter) / "README.md").is_file():
            shutil.copy(Path(adapter) / "README.md", fresh)
