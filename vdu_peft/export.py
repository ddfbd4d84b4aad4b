"""Merge the posterior mean into the base, or strip an adapter to it, for use without this package."""

import hashlib
import json
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from torch import nn

from vdu_peft.adapter import AdapterError, load_adapter, read_adapter_weights, variational_layers
from vdu_peft.atomic_folder import atomic_folder, check_output
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
    model: str | Path,
    adapter: str | Path,
    output_dir: str | Path,
    dtype: str | None = None,
    onnx: bool = False,
    overwrite: bool = False,
) -> Denoiser:
    """Write ``output_dir``, a complete diffusers pipeline with the adapter's posterior mean merged in.

    The sum is made in float32, layer by layer, rounded once, written, and read back by stock diffusers to compare;
    beside the model one layer's delta is in memory at a time. The result cannot be toggled back, which is what
    to release; it is still no secure erasure.

    Args:
        dtype: ``float32``, ``float16`` or ``bfloat16`` of all written weights; the base's own of each part when None.
        onnx: write ``unet/model.onnx``, too, of a ``UNet2DModel``.
        overwrite: replace an ``output_dir`` that is not empty, with all that it holds.

    Returns:
        the merged denoiser as it was read back, in that dtype.

    Raises:
        ModelError, ConfigError, AdapterError, FolderError: a part is missing, does not fit or lies in ``output_dir``,
            or this is not empty; before anything is written.
        AdapterError, FolderError: a merged weight is not finite in that dtype, or what was written does not read back
            as it should; ``output_dir`` is then left as it was.
    """
    check_output(output_dir, [model, adapter], overwrite)
    denoiser = open_denoiser(model, whole=True)
    if onnx:
        check_onnx(denoiser)
    kept = DTYPES[dtype] if dtype else denoiser.stored_dtype
    peft_model = load_adapter(denoiser.model, adapter)
    _check_merged_values(peft_model, kept, adapter)
    denoiser.model = nn.Module.to(peft_model.merge_and_unload(), kept)  # diffusers' own warns of nothing
    if dtype and isinstance(denoiser, TextDenoiser):
        for part in denoiser.pipeline.components.values():
            if isinstance(part, nn.Module):
                nn.Module.to(part, kept)
    with atomic_folder(Path(output_dir)) as fresh:
        denoiser.save_pretrained(fresh)
        _forget_paths(fresh)
        facts = {"adapter": Path(adapter).resolve().name, "weights": str(kept).removeprefix("torch.")}
        facts |= card_facts(adapter)  # what was forgotten, and how it went
        (fresh / "README.md").write_text(model_card("merged", denoiser.name, facts), encoding="utf-8")
        written = {name: _digest(tensor) for name, tensor in denoiser.model.state_dict().items()}
        kind, component = type(denoiser.model), denoiser.component
        del denoiser.model  # a model that just fits into memory does not fit twice
        if isinstance(denoiser, TextDenoiser):
            delattr(denoiser.pipeline, component)
        denoiser.model = kind.from_pretrained(str(fresh / component), dtype=kept, use_safetensors=True).eval()
        if isinstance(denoiser, TextDenoiser):
            denoiser.pipeline.register_modules(**{component: denoiser.model})
        read = {name: _digest(tensor) for name, tensor in denoiser.model.state_dict().items()}
        for name in sorted(written.keys() | read.keys()):
            if written.get(name) != read.get(name):
                raise AdapterError(f"{output_dir}: {name} does not read back as it was written")
        if onnx:
            write_onnx(denoiser, fresh / "unet" / "model.onnx")
    return denoiser


def _forget_paths(folder: Path) -> None:
    """Take out of the configs from where the base was loaded, which names the machine and its user."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_merged_values(peft_model: PeftModel, dtype: torch.dtype, adapter: str | Path) -> None:
    """What PEFT's ``safe_merge`` looks for, in the dtype that is written, by one layer at a time and naming it."""
    largest = torch.finfo(dtype).max
    for name, layer in variational_layers(peft_model.get_base_model()):
        low, high = torch.aminmax(layer.merged_weight("default"))
        if not -largest <= low <= high <= largest:  # of a NaN no comparison is true
            raise AdapterError(f"{adapter}: merged into {name} it gives weights beyond {dtype}; choose a wider dtype")


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).digest()


def export_lora(
    adapter: str | Path, output_dir: str | Path, file_format: str = "peft", overwrite: bool = False
) -> None:
    """Write the posterior mean alone as a plain LoRA, and read it back by the stock library to compare.

    Args:
        file_format: ``peft``, a folder for ``PeftModel.from_pretrained``: stock PEFT loads our own folders, too, with
            a warning about our options, but its hot-swapping refuses the deviations. ``diffusers``, a file for
            ``load_lora_weights``, of text-to-image models; ``kohya``, one for ComfyUI and WebUI, of Stable Diffusion
            1, 2 and XL (ComfyUI reads the diffusers file of the later ones).
        overwrite: replace an ``output_dir`` that is not empty, with all that it holds.

    Raises:
        ConfigError, AdapterError, FolderError: the adapter is missing, unreadable, in ``output_dir``, or of a model
            that no pipeline loads LoRA files for, or ``output_dir`` is not empty; before anything is written.
        AdapterError, FolderError: what was written does not read back as it should; ``output_dir`` is then left as it
            was.
    """
    if file_format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {file_format!r}")
    check_output(output_dir, [adapter], overwrite)
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
                dim = str(max(len(t) for name, t in tensors.items() if name.endswith("lora_down.weight")))
                metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": dim}
            save_file(tensors, fresh / LORA_WEIGHT_NAME_SAFE, metadata=metadata)
            read = loader.lora_state_dict(str(fresh), weight_name=LORA_WEIGHT_NAME_SAFE, use_safetensors=True)
            if isinstance(read, tuple):  # with the alphas, of which kohya's file has one for each layer
                read, alphas = read
                read |= {f"{name}.alpha": torch.tensor(float(alpha)) for name, alpha in (alphas or {}).items()}
        # kohya's names are its own: there the values alone are compared.
        if sorted(map(_digest, read.values())) != sorted(map(_digest, tensors.values())):
            raise AdapterError(f"{output_dir}: does not read back as it was written")
        if (card := Path(adapter) / "README.md").is_file():
            text = card.read_text(encoding="utf-8")
            if file_format != "peft":  # what loads it
                text = text.replace("library_name: peft", "library_name: diffusers", 1)
            (fresh / "README.md").write_text(text, encoding="utf-8")


def _unscaled(tensors: dict[str, torch.Tensor], config: VDUConfig, component: str) -> dict[str, torch.Tensor]:
    """diffusers' names, with s = alpha / r inside ``lora_B``: without an alpha every loader takes it to be r.

    All of one rank, with zeros: by their patterns of names loaders take that of one layer for another's.
    """
    rank, result = max(len(tensor) for name, tensor in tensors.items() if ".lora_A." in name), {}
    for name, tensor in tensors.items():
        name = name.removeprefix("base_model.model.")
        missing = [0, 0] * (tensor.ndim - 2)
        if ".lora_B." in name:
            tensor = tensor * config.layer_scaling(name.rsplit(".lora_", 1)[0])
            missing += [0, rank - tensor.shape[1]]
        else:
            missing += [0, 0, 0, rank - len(tensor)]
        result[f"{component}.{name}"] = nn.functional.pad(tensor, missing)
    return result
