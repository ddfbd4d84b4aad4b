"""What a device computes in: whether it can, and whether it is quicker for it."""

from typing import Literal

import torch

from vdu_peft.config import ConfigError, UnlearnConfig


def quick_precision(device: torch.device) -> Literal["no", "bf16"]:
    """``bf16`` on a CPU that computes in it: the demo's model draws 1.6 times and learns 1.5 times as quickly there."""
    told = getattr(torch.cpu, "get_capabilities", dict)()  # not in the oldest torch that we run on
    return "bf16" if device.type == "cpu" and (told.get("avx512_bf16") or told.get("amx_bf16")) else "no"


def check_precision(config: UnlearnConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Whether a device learns in the run's precision, on frozen weights of ``dtype``.

    Raises:
        ConfigError: float16 on a CPU, where there is no gradient scaler and accelerate would use float32; or float16
            weights without one, of whose gradients many would be rounded to zero.
    """
    if device.type == "cpu" and config.mixed_precision == "fp16":
        raise ConfigError("mixed_precision fp16: needs a GPU; use bf16 or no")
    if device.type == "cpu" and dtype == torch.float16:
        raise ConfigError("model: its weights are float16, which needs a GPU; load it in bfloat16 or float32")
    if dtype == torch.float16 and config.mixed_precision == "no":
        raise ConfigError(
            "mixed_precision no: the model's weights are float16, whose gradients vanish; use fp16 or bf16"
        )
