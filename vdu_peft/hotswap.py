"""Swap one adapter for another in a live, compiled model.

PEFT pads the factors to a common rank and turns the scalings into tensors, so that both can be written in place. A
model prepared for it serves posterior means: the deviations, which only training and sampling need, are dropped.
"""

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from vdu_peft.adapter import AdapterError, another_class, check_base, read_adapter_weights, variational_layers
from vdu_peft.config import VDUConfig
from vdu_peft.contexts import refuse_merged


def prepare_hotswap(peft_model: PeftModel, max_rank: int) -> None:
    """Make room for adapters of up to ``max_rank``; after loading the first one, before ``torch.compile``.

    Raises:
        AdapterError: an adapter's own rank is larger, or the model is merged or compiled already; nothing is changed.
    """
    for name, config in peft_model.peft_config.items():
        largest = max([config.r, *config.rank_pattern.values()])
        if largest > max_rank:
            raise AdapterError(f"max_rank {max_rank}: the adapter {name!r} has rank {largest}; raise it")
    refuse_merged(peft_model, "prepare_hotswap")
    try:
        prepare_model_for_compiled_hotswap(peft_model, target_rank=max_rank)
    except ValueError as error:
        raise AdapterError(f"prepare_hotswap: {error}") from error
    for name in peft_model.peft_config:
        for _, layer in variational_layers(peft_model, name):
            if name in layer.lora_log_std:
                del layer.lora_log_std[name]


@torch.no_grad()
def hotswap(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Put a saved adapter in the place of ``adapter_name``, without a new module and without recompiling.

    PEFT's own ``hotswap_adapter`` knows no deviations, takes ``rank_pattern`` for the ends of other names, and clears
    every adapter whose name contains this one's.

    Args:
        model: a PeftModel, or ``torch.compile`` of one, through :func:`prepare_hotswap`.
        folder: a saved adapter of the same base model, of any alpha and any rank up to the prepared one.

    Raises:
        ConfigError, AdapterError: the adapter cannot be read or does not fit; nothing is changed.
    """
    peft_model = getattr(model, "_orig_mod", model)
    config = VDUConfig.from_pretrained(folder)
    factors = {k: t for k, t in read_adapter_weights(folder).items() if "lora_log_std" not in k}
    layers = {
        name: module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    if not layers:
        raise AdapterError(f"the model has no adapter {adapter_name!r} to take the place of")
    if not all(isinstance(layer.scaling[adapter_name], torch.Tensor) for layer in layers.values()):
        raise AdapterError("the model is not prepared for hot-swapping; call prepare_hotswap before compiling")
    refuse_merged(peft_model, "hotswap")
    other = another_class(peft_model.get_base_model(), config) or "does not fit"
    wanted = {f"{name}.{factor}.weight" for name in layers for factor in ("lora_A", "lora_B")}
    for key in sorted(factors.keys() ^ wanted):
        raise AdapterError(f"{folder}: {other}: {key} is {'missing' if key in wanted else 'not in the model'}")
    check_base(variational_layers(peft_model.get_base_model(), adapter_name), adapter_name, config, folder)

    writes = []
    for name, layer in layers.items():
        groups = getattr(layer.get_base_layer(), "groups", 1)
        new_A, new_B = factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]
        # Rank sits in A's rows, group by group, and in B's columns.
        old_A = layer.lora_A[adapter_name].weight.data.unflatten(0, (groups, -1))
        old_B = layer.lora_B[adapter_name].weight.data
        new_A = new_A.unflatten(0, (groups, -1)) if len(new_A) % groups == 0 else new_A
        for old, new, factor in ((old_A, new_A, "lora_A"), (old_B, new_B, "lora_B")):
            same = old.ndim == new.ndim and all(o == n for i, (o, n) in enumerate(zip(old.shape, new.shape)) if i != 1)  # noqa: B905
            if not same or new.shape[1] > old.shape[1]:
                raise AdapterError(
                    f"{folder}: {other}: {name}.{factor} has shape {list(new.shape)}, there is room for "
                    f"{list(old.shape)}"
                )
            writes.append((old, new))
        scaling = config.layer_scaling(name.removeprefix("base_model.model."))
        writes.append((layer.scaling[adapter_name], torch.tensor(scaling)))
    for old, new in writes:
        old.zero_()
        (old.narrow(1, 0, new.shape[1]) if new.ndim > 0 else old).copy_(new)
