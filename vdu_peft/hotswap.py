"""Swap one adapter for another in a live, compiled model, on PEFT's hot-swapping.

PEFT swaps ``lora_A`` and ``lora_B`` in place, padded to a common rank. A model prepared for it serves posterior
means: the deviations, which only training and sampling need, are dropped.
"""

from pathlib import Path

from peft import PeftModel
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from torch import nn

from vdu_peft.adapter import AdapterError, read_adapter_weights, variational_layers
from vdu_peft.config import VDUConfig


def prepare_hotswap(peft_model: PeftModel, max_rank: int) -> None:
    """Make room for adapters of up to ``max_rank``; after loading the first one, before ``torch.compile``.

    Raises:
        AdapterError: the first adapter's own rank is larger, or the model is compiled already.
    """
    for name, config in peft_model.peft_config.items():
        largest = max([config.r, *config.rank_pattern.values()])
        if largest > max_rank:
            raise AdapterError(f"max_rank {max_rank}: the adapter {name!r} has rank {largest}; raise it")
        for _, layer in variational_layers(peft_model, name):
            if name in layer.lora_log_std:
                del layer.lora_log_std[name]
    try:
        prepare_model_for_compiled_hotswap(peft_model, target_rank=max_rank)
    except ValueError as error:
        raise AdapterError(f"prepare_hotswap: {error}") from error


def hotswap(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Put a saved adapter in the place of ``adapter_name``, without a new module and without recompiling.

    Args:
        model: a PeftModel, or ``torch.compile`` of one, through :func:`prepare_hotswap`.
        folder: a saved adapter of the same base model, of any alpha and any rank up to the prepared one.

    Raises:
        ConfigError, AdapterError: the adapter cannot be read or does not fit; nothing is changed.
    """
    peft_model = getattr(model, "_orig_mod", model)
    config = VDUConfig.from_pretrained(folder)
    means = {
        key.replace(".weight", f".{adapter_name}.weight"): tensor
        for key, tensor in read_adapter_weights(folder).items()
        if "lora_log_std" not in key
    }
    try:
        check_hotswap_configs_compatible(peft_model.peft_config[adapter_name], config)
    except (KeyError, ValueError) as error:
        raise AdapterError(f"{folder}: cannot take the place of {adapter_name!r}: {error}") from error
    there = {key: p for key, p in peft_model.named_parameters() if "lora_" in key and f".{adapter_name}." in key}
    if any(adapter_name in layer.lora_log_std for _, layer in variational_layers(peft_model, adapter_name)):
        raise AdapterError("the model is not prepared for hot-swapping; call prepare_hotswap before compiling")
    for key in sorted(means.keys() | there.keys()):
        new, old = means.get(key), there.get(key)
        # Ranks may differ, up to the room there is; what surrounds them may not.
        axis = 0 if ".lora_A." in key else 1
        fits = (
            new is not None
            and old is not None
            and new.shape[axis] <= old.shape[axis]
            and [n for i, n in enumerate(new.shape) if i != axis] == [n for i, n in enumerate(old.shape) if i != axis]
        )
        if not fits:
            found = "is missing" if new is None else f"has shape {list(new.shape)}"
            need = "has no such layer" if old is None else f"has room for {list(old.shape)}"
            raise AdapterError(f"{folder}: does not fit: {key} {found}, the model {need}")
    hotswap_adapter_from_state_dict(peft_model, means, adapter_name, config)
