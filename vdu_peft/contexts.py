"""What an adapter does while a context lasts: draw its posterior, or act at another scale."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from vdu_peft import posterior
from vdu_peft.adapter import AdapterError, variational_layers
from vdu_peft.layer import VariationalLayer


@contextmanager
def posterior_noise(model: nn.Module) -> Iterator[None]:
    """Inside, every forward draws the posterior anew for every example of its batch: for training."""
    layers = [module for module in model.modules() if isinstance(module, VariationalLayer)]
    for layer in layers:
        layer.posterior_noise = True
    try:
        yield
    finally:
        for layer in layers:
            layer.posterior_noise = False


@contextmanager
def dropping(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters' dropout is on, whatever the model's mode: for training, in which the base has none."""
    dropouts = [module.lora_dropout for module in model.modules() if isinstance(module, LoraLayer)]
    for dropout in dropouts:
        dropout.train()
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, dropout and the like are off in all modules; outside, where they were on: to draw what it draws."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def posterior_sample(
    model: nn.Module, adapter_name: str = "default", generator: torch.Generator | None = None
) -> Iterator[None]:
    """Inside, the adapter is one draw of the posterior, held for all forwards; outside, its mean again.

    Raises:
        AdapterError: the adapter is merged, not there, or has lost its deviations to ``prepare_hotswap``.
    """
    refuse_merged(model, "posterior_sample")
    layers = [layer for _, layer in variational_layers(model, adapter_name)]
    if not layers:
        raise AdapterError(f"posterior_sample: the model has no variational adapter named {adapter_name!r}")
    if any(adapter_name in layer.lora_variant and adapter_name not in layer.lora_log_std for layer in layers):
        raise AdapterError("posterior_sample: a model prepared for hot-swapping serves posterior means alone")
    means = []
    for layer in layers:
        if adapter_name in layer.lora_log_std:
            weight = layer.lora_B[adapter_name].weight
            means.append((weight, weight.data))
            weight.data = posterior.sample_weight(weight.data, layer.lora_log_std[adapter_name].data, generator)
    try:
        yield
    finally:
        for weight, mean in means:
            weight.data = mean


@contextmanager
def adapter_scale(model: nn.Module, scale: float | Mapping[str, float]) -> Iterator[None]:
    """Inside, every active adapter's delta is multiplied by ``scale``; 0 is the base model, bit for bit.

    Args:
        scale: one for all layers, or one per block of the base model, as ``{"down_blocks": 0.5, "up_blocks.1": 0}``:
            a layer takes that of the longest name that it lies under, and 1 where there is none.

    Raises:
        AdapterError: an adapter is merged, a block has no adapted layer, or a scale is not finite.
    """
    refuse_merged(model, "adapter_scale")
    base = getattr(model, "_orig_mod", model)  # of torch.compile
    base = base.get_base_model() if isinstance(base, PeftModel) else base
    named = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    blocks = scale if isinstance(scale, Mapping) else {"": scale}
    for factor in blocks.values():
        if not math.isfinite(factor):
            raise AdapterError(f"adapter_scale: {factor} is no scale; 0 is the base model, 1 the adapter")
    scales = dict.fromkeys(named, 1.0)
    for block in sorted(blocks, key=len):
        within = [name for name in named if not block or f"{name}.".startswith(f"{block}.")]
        if block and not within:
            raise AdapterError(f"adapter_scale: no adapted layer lies under {block!r}; name a block of the base model")
        scales.update(dict.fromkeys(within, blocks[block]))
    # After prepare_hotswap the scalings are tensors, which PEFT scales in place and a compiled model holds on to.
    before = [(layer.disable_adapters, copy.deepcopy(dict(layer.scaling))) for layer in named.values()]
    try:
        for name, layer in named.items():
            if scales[name] == 0:
                # Not enable_adapters(False): that also flips requires_grad, which drops the gradient hooks of
                # DistributedDataParallel, and processes would go on without each other's gradients.
                layer._disable_adapters = True
            else:
                layer.scale_layer(scales[name])
        yield
    finally:
        for layer, (disabled, scaling) in zip(named.values(), before, strict=True):
            layer._disable_adapters = disabled
            for name, value in scaling.items():  # unscale_layer divides, which rounds
                if isinstance(value, torch.Tensor):
                    layer.scaling[name].copy_(value)
                else:
                    layer.scaling[name] = value


def refuse_merged(model: nn.Module, context: str) -> None:
    """A merged layer computes with its base weight alone: the context would silently do nothing, a swap lose it.

    Raises:
        AdapterError: an adapter is merged.
    """
    if any(isinstance(module, LoraLayer) and module.merged for module in model.modules()):
        raise AdapterError(f"{context}: the adapter is merged into the base; unmerge_adapter() first")
