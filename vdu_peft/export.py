"""Merge the posterior mean into the base, or strip an adapter to it, for use without this package."""

import hashlib
import shutil
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from torch import nn

from vdu_peft.adapter import (
    AdapterError,
    atomic_folder,
    check_inputs_stay,
    load_adapter,
    read_adapter_weights,
    variational_layers,
)
from vdu_peft.card import card_facts, model_card
from vdu_peft.config import ConfigError, VDUConfig
from vdu_peft.denoiser import Denoiser
from vdu_peft.onnx_export import check_onnx, write_onnx
from vdu_peft.text_denoiser import TextDenoiser, open_denoiser

FORMATS = ("peft", "diffusers", "kohya")
# Where a pipeline's LoRA file keeps the layers of a network of this class, and what reads such a file.
COMPONENTS = {
    "UNet2DConditionModel": ("unet", StableDiffusionLoraLoaderMixin),
    "SD3Transformer2DModel": ("transformer", SD3LoraLoaderMixin),
    "FluxTransformer2DModel": ("transformer", FluxLoraLoaderMixin),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def merge(
    model: str | Path, adapter: str | Path, output_dir: str | Path, dtype: str | None = None, onnx: bool = False
) -> Denoiser:
    """Write ``output_dir``, a complete diffusers pipeline with the adapter's posterior mean merged in.

    The sum is made in float32, layer by layer, rounded once, written, and read back by stock diffusers to compare;
    beside the model one layer's delta is in memory at a time. The result cannot be toggled back, which is what
    to release; it is still no secure erasure.

    Args:
        dtype: ``float32``, ``float16`` or ``bfloat16`` of the written weights; the base's own when None.
        onnx: write ``unet/model.onnx``, too, of a ``UNet2DModel``.

    Returns:
        the merged denoiser as it was read back, in that dtype.

    Raises:
        ModelError, ConfigError, AdapterError: a part is missing, does not fit or lies in ``output_dir``, before
            anything is written.
        AdapterError: a merged weight is not finite in that dtype, or what was written does not read back as it should;
            ``output_dir`` is then left as it was.
    """
    check_inputs_stay(output_dir, [model, adapter])
    denoiser = open_denoiser(model, whole=True)
    if onnx:
        check_onnx(denoiser)
    kept = DTYPES[dtype] if dtype else denoiser.stored_dtype
    peft_model = load_adapter(denoiser.model, adapter)
    _check_merged_values(peft_model, kept, adapter)
    denoiser.model = nn.Module.to(peft_model.merge_and_unload(), kept)  # diffusers' own warns of nothing
    with atomic_folder(Path(output_dir)) as fresh:
        denoiser.save_pretrained(fresh)
        facts = {"adapter": Path(adapter).resolve().name, "weights": str(kept).removeprefix("torch.")}
        facts |= card_facts(adapter)  # what was forgotten, and how it went
        (fresh / "README.md").write_text(model_card("merged", denoiser.name, facts))
        written = {name: _digest(tensor) for name, tensor in denoiser.model.state_dict().items()}
        kind, component = type(denoiser.model), denoiser.component
        del denoiser.model  # a model that just fits into memory does not fit twice
        if isinstance(denoiser, TextDenoiser):
            delattr(denoiser.pipeline, component)
        denoiser.model = kind.from_pretrained(str(fresh / component), torch_dtype=kept, use_safetensors=True).eval()
        if isinstance(denoiser, TextDenoiser):
            denoiser.pipeline.register_modules(**{component: denoiser.model})
        read = {name: _digest(tensor) for name, tensor in denoiser.model.state_dict().items()}
        for name in sorted(written.keys() | read.keys()):
            if written.get(name) != read.get(name):
                raise AdapterError(f"{output_dir}: {name} does not read back as it was written")
        if onnx:
            write_onnx(denoiser, fresh / "unet" / "model.onnx")
    return denoiser


def _check_merged_values(peft_model: PeftModel, dtype: torch.dtype, adapter: str | Path) -> None:
    """What PEFT's ``safe_merge`` looks for, in the dtype that is written, by one layer at a time and naming it."""
    largest = torch.finfo(dtype).max
    for name, layer in variational_layers(peft_model.get_base_model()):
        low, high = torch.aminmax(layer.merged_weight("default"))
        if not -largest <= low <= high <= largest:  # of a NaN no comparison is true
            raise AdapterError(f"{adapter}: merged into {name} it gives weights beyond {dtype}; choose a wider dtype")


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).digest()


def export_lora(adapter: str | Path, output_dir: str | Path, file_format: str = "peft") -> None:
    """Write the posterior mean alone as a plain LoRA, and read it back by the stock library to compare.

    Args:
        file_format: ``peft``, a folder for ``PeftModel.from_pretrained``: stock PEFT loads our own folders, too, with
            a warning about our options, but its hot-swapping refuses the deviations. ``diffusers``, a file for
            ``load_lora_weights``, of text-to-image models; ``kohya``, one for ComfyUI and WebUI, of Stable Diffusion
            1, 2 and XL (ComfyUI reads the diffusers file of the later ones).

    Raises:
        ConfigError, AdapterError: the adapter is missing, unreadable, in ``output_dir``, or of a model that no
            pipeline loads LoRA files for; before anything is written.
        AdapterError: what was written does not read back as it should; ``output_dir`` is then left as it was.
    """
    if file_format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {file_format!r}")
    check_inputs_stay(output_dir, [adapter])
    config = VDUConfig.from_pretrained(adapter)
    tensors = {name: t for name, t in read_adapter_weights(adapter).items() if "lora_log_std" not in name}
    base_class = (config.auto_mapping or {}).get("base_model_class")
    component, loader = COMPONENTS.get(base_class, (None, None))
    if file_format != "peft" and component is None:
        raise ConfigError(
            f"{adapter}: made for a {base_class}, which no pipeline loads LoRA files for; use format peft"
        )
    if file_format == "kohya" and component != "unet":
        raise ConfigError(
            f"{adapter}: made for a {base_class}, whose layers have other names there; use format diffusers"
        )
    with atomic_folder(Path(output_dir)) as fresh:
        if file_format == "peft":
            ours = VDUConfig.__dataclass_fields__.keys() - LoraConfig.__dataclass_fields__.keys()
            left_out = ours | {"peft_type", "auto_mapping"}
            plain = LoraConfig(**{n: v for n, v in config.to_dict().items() if n not in left_out})
            plain.inference_mode = True
            plain.save_pretrained(fresh)
            save_file(tensors, fresh / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            PeftConfig.from_pretrained(str(fresh))
            read = load_peft_weights(str(fresh), device="cpu")
        else:
            tensors = _unscaled(tensors, config, component)
            metadata = {"format": "pt"}
            if file_format == "kohya":
                tensors = convert_state_dict_to_kohya(tensors)
                tensors = {name: t.float().contiguous() for name, t in tensors.items()}
                dim = str(config.r)
                metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": dim}
            save_file(tensors, fresh / LORA_WEIGHT_NAME_SAFE, metadata=metadata)
            read = loader.lora_state_dict(str(fresh), weight_name=LORA_WEIGHT_NAME_SAFE, use_safetensors=True)
            if isinstance(read, tuple):  # with the alphas, of which kohya's file has one for each layer
                read, alphas = read
                read |= {f"{name}.alpha": torch.tensor(float(alpha)) for name, alpha in (alphas or {}).items()}
        # kohya's names are its own: there the values alone are compared.
        if sorted(map(_digest, read.values())) != sorted(map(_digest, tensors.values())):
            raise AdapterError(f"{output_dir}: does not read back as it was written")
        if (Path(adapter) / "README.md").is_file():
            shutil.copy(Path(adapter) / "README.md", fresh)


def _unscaled(tensors: dict[str, torch.Tensor], config: VDUConfig, component: str) -> dict[str, torch.Tensor]:
    """diffusers' names, with s = alpha / r inside ``lora_B``: without an alpha every loader takes it to be r."""
    result = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("base_model.model.")
        layer = name.rsplit(".lora_", 1)[0]
        result[f"{component}.{name}"] = tensor * config.layer_scaling(layer) if ".lora_B." in name else tensor
    return result
