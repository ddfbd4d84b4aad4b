"""Variational Diffusion Unlearning as a PEFT adapter."""

from vdu_peft import peft_range  # noqa: F401, first: names that the others import may be missing in another PEFT
from vdu_peft.adapter import attach, load_adapter, save_adapter
from vdu_peft.compose import compose
from vdu_peft.config import UnlearnConfig, VDUConfig
from vdu_peft.contexts import adapter_scale, posterior_sample
from vdu_peft.data import ImageSource
from vdu_peft.denoiser import Denoiser
from vdu_peft.export import export_lora, merge
from vdu_peft.hotswap import hotswap, prepare_hotswap
from vdu_peft.text_denoiser import TextDenoiser
from vdu_peft.trainer import UnlearnResult, unlearn
from vdu_peft.version import __version__

__all__ = [
    "Denoiser",
    "ImageSource",
    "TextDenoiser",
    "UnlearnConfig",
    "UnlearnResult",
    "VDUConfig",
    "__version__",
    "adapter_scale",
    "attach",
    "compose",
    "export_lora",
    "hotswap",
    "load_adapter",
    "merge",
    "posterior_sample",
    "prepare_hotswap",
    "save_adapter",
    "unlearn",
]
