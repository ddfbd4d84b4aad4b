"""Variational LoRA layers: the only file that subclasses PEFT's layers.

A VDU adapter *is* a LoRA: ``lora_B`` holds the posterior mean, so merging, disabling, mixed batches,
deletion, devices and saving stay PEFT's own. What is added is one parameter, ``lora_log_std``, a noisy
forward that :func:`vdu_peft.contexts.posterior_noise` switches on, and a quicker one for inference on a CPU.
"""

import math

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn.modules import module

from vdu_peft import posterior

# How many of a layer's weights are kept in an adapter's config.
BASE_SAMPLE = 2


class GaussianVariant(LoraVariant):
    """PEFT's hook for what a LoRA layer does with its factors, with a Gaussian in place of ``lora_B``."""

    @staticmethod
    def init(module: "VariationalLayer", adapter_name: str, config, **kwargs) -> None:
        mean = module.lora_B[adapter_name].weight
        # S starts where every rank component alone spreads each row of the delta by init_scale x RMS(W):
        # dividing by its length in G makes the start independent of how A is scaled.
        lengths = module.gram(adapter_name).diagonal(dim1=-2, dim2=-1).sqrt()  # (groups, r / groups)
        unit = module.prior_std[adapter_name] / config.prior_scale
        log_std = torch.log(config.init_scale * unit / lengths)
        rows = torch.repeat_interleave(log_std, module.out_features // log_std.shape[0], dim=0)
        module.lora_log_std[adapter_name] = nn.Parameter(rows.reshape(mean.shape).to(mean).detach().clone())

    @staticmethod
    def merge_safe(module: "VariationalLayer", active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: "VariationalLayer", active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: "VariationalLayer", active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def forward(module: "VariationalLayer", active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        hidden = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        if module.posterior_noise:
            groups = getattr(module.get_base_layer(), "groups", 1)
            mean, log_std = module.lora_B[active_adapter].weight, module.lora_log_std[active_adapter]
            # Scaled before B, which has fewer inputs than outputs.
            return result + posterior.sampled_output(hidden * module.scaling[active_adapter], mean, log_std, groups)
        return result + module.lora_B[active_adapter](hidden) * module.scaling[active_adapter]


def base_weight(base: nn.Module) -> torch.Tensor:
    """The weights that a base layer computes with, float32: of bitsandbytes and torchao layers not their codes."""
    kept = base.weight
    weight = dequantize_module_weight(base).detach().float()
    if base.weight is not kept:
        # On a CPU PEFT puts a copy in its place, which an 8-bit layer that has run before cannot compute with. Not by
        # assignment: with low_cpu_mem_usage that goes to the meta device.
        base._parameters["weight"] = kept
    return weight


def is_quantised(base: nn.Module) -> bool:
    """Whether a base layer holds codes in place of its weights."""
    return type(base.weight).__module__.startswith(("torchao.", "bitsandbytes."))


def _is_ours(config: LoraConfig) -> bool:
    """Whether a config is a VDUConfig, which this module, being below it, does not know: by the options it reads."""
    return hasattr(config, "prior_scale")


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is its plain class's forward and nothing else: no hooks, no offloading."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in (nn.Linear, nn.Conv2d, nn.Identity, nn.Dropout) and not hooks


class VariationalLayer:
    """What Linear and Conv2d share: the posterior's parameters and their closed forms."""

    # PEFT moves, freezes, deletes and saves by these names.
    adapter_layer_names = lora.LoraLayer.adapter_layer_names + ("lora_log_std",)
    other_param_names = lora.LoraLayer.other_param_names + ("prior_std", "base_sample")

    # Off: the forward uses the posterior mean, exactly PEFT's LoRA.
    posterior_noise = False

    def update_layer(self, adapter_name: str, *args, config, **kwargs) -> None:
        if not hasattr(self, "lora_log_std"):
            self.lora_log_std = nn.ParameterDict()
            self.prior_std: dict[str, float] = {}
            # Some of the base's weights, by which an adapter's base is known again.
            self.base_sample: dict[str, list[float]] = {}
        if _is_ours(config):
            base = self.get_base_layer()
            weight = None if base.weight.is_meta else base_weight(base)
            rms = 1.0 if weight is None else weight.square().mean().sqrt().item()
            if not math.isfinite(rms):
                raise ValueError("the base weights of a target layer hold NaN or infinite values")
            # A layer of zeros (diffusers initialises some output layers so) has no scale of its own.
            self.prior_std[adapter_name] = config.prior_scale * (rms or 1.0 / math.sqrt(weight[0].numel()))
            sample = [] if weight is None else weight.flatten()[:BASE_SAMPLE].tolist()
            self.base_sample[adapter_name] = [float(f"{value:.4g}") for value in sample]
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def resolve_lora_variant(self, *, config, **kwargs) -> LoraVariant | None:
        """Ours for ours; a style's plain LoRA on the same layer stays what PEFT makes of it."""
        if _is_ours(config) and config.variational:
            return GaussianVariant()
        return super().resolve_lora_variant(config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """PEFT's forward; on a CPU inference in float32 is one pass with W + ΔW in place of two, which is faster."""
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or not adapters or not self._takes_one_pass(x, adapters):
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        weight = base.weight + sum(self.get_delta_weight(name) for name in adapters)
        return F.linear(x, weight, base.bias) if type(base) is nn.Linear else base._conv_forward(x, weight, base.bias)

    def _takes_one_pass(self, x: torch.Tensor, adapters: list[str]) -> bool:
        """Whether the base layer with W + ΔW gives what PEFT's two passes give, sooner."""
        if torch.is_grad_enabled() or self.posterior_noise or self.disable_adapters or self.merged:
            return False
        # Compiled code would be guarded by the number of rows, and does better by itself.
        if torch.compiler.is_compiling() or module._global_forward_hooks or module._global_forward_pre_hooks:
            return False
        base = self.get_base_layer()
        # A weight that is no plain parameter (quantised, sharded) may compute something else.
        if not _is_plain(base) or type(base.weight) is not nn.Parameter:
            return False
        # In half precision, as in a GPU's TF32, the sum rounds the delta away. Of grouped layers PEFT has no deltas.
        if x.device.type != "cpu" or not x.dtype == base.weight.dtype == torch.float32:
            return False
        if torch.is_autocast_enabled("cpu") or getattr(base, "groups", 1) > 1:
            return False
        # ΔW costs more than the delta's outputs where there are few of them, of a larger kernel several times as much.
        if type(base) is nn.Linear:
            rows, least = x.numel() // x.shape[-1], base.weight.shape[0]
        else:
            rows = x.numel() // x.shape[-3] // math.prod(base.stride)
            least = base.weight.shape[0] * (8 if math.prod(base.kernel_size) > 1 else 1)
        if rows < least:
            return False
        # Dropout falls on the input of the delta alone.
        dropouts = [self.lora_dropout[name] for name in adapters]
        if any(dropout.training and not isinstance(dropout, nn.Identity) for dropout in dropouts):
            return False
        # A plain LoRA beside ours may be more than W + ΔW: DoRA and its like, or a bias.
        variants = [self.lora_variant.get(name) for name in adapters]
        if any(variant is not None and type(variant) is not GaussianVariant for variant in variants):
            return False
        parts = [part[name] for part in (self.lora_A, self.lora_B) for name in adapters]
        if any(part.weight.dtype != torch.float32 or part.bias is not None for part in parts):
            return False
        return all(map(_is_plain, (*dropouts, *parts)))

    def merge(self, *args, **kwargs) -> None:
        """PEFT's merge, of a base that can take it.

        Raises:
            ValueError: the base weights are quantised: the sum would be written into their codes.
        """
        base = self.get_base_layer()
        if is_quantised(base):
            raise ValueError(f"a quantised {type(base).__name__} cannot be merged into; load the base unquantised")
        super().merge(*args, **kwargs)

    def merged_weight(self, adapter_name: str) -> torch.Tensor:
        """W + ΔW of the posterior mean, a tensor of its own."""
        merged = self.get_delta_weight(adapter_name)
        merged += base_weight(self.get_base_layer())
        return merged

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(mean, log_std or None, lora_A), in float32, as (groups, rows, columns)."""
        groups = getattr(self.get_base_layer(), "groups", 1)
        mean = self.lora_B[adapter_name].weight.float().flatten(1).unflatten(0, (groups, -1))
        lora_A = self.lora_A[adapter_name].weight.float().flatten(1).unflatten(0, (groups, -1))
        log_std = None
        if adapter_name in self.lora_log_std:
            log_std = self.lora_log_std[adapter_name].float().flatten(1).unflatten(0, (groups, -1))
        return mean, log_std, lora_A

    def gram(self, adapter_name: str) -> torch.Tensor:
        """G = s² A Aᵀ, float32 (groups, r / groups, r / groups)."""
        return posterior.gram_matrix(self.factors(adapter_name)[2], self.scaling[adapter_name])

    def rank_and_inputs(self, adapter_name: str) -> tuple[int, int]:
        """Rows and columns of ``lora_A``, of one group."""
        weight = self.lora_A[adapter_name].weight
        return len(weight) // getattr(self.get_base_layer(), "groups", 1), weight.numel() // len(weight)

    def has_kl(self, adapter_name: str) -> bool:
        """Whether the KL exists: with more rank than inputs G is singular, and the prior on B improper."""
        rank, fan_in = self.rank_and_inputs(adapter_name)
        return rank <= fan_in or adapter_name not in self.lora_log_std

    def check_rank(self, adapter_name: str) -> None:
        """Before it is learned; not when it is made: PEFT's ``add_weighted_adapter`` may stack ranks above the inputs,
        and what it makes merges and runs as any other.

        Raises:
            ValueError: the KL does not exist.
        """
        if not self.has_kl(adapter_name):
            rank, fan_in = self.rank_and_inputs(adapter_name)
            raise ValueError(
                f"rank {rank} exceeds the {fan_in} inputs of a target layer; lower r or leave the layer out"
            )

    def kl(self, adapter_name: str) -> torch.Tensor:
        """KL(q ‖ prior) of this layer's delta, a float32 scalar in nats.

        For a deterministic adapter the quadratic ‖ΔW‖²/(2σ²) alone.

        Raises:
            ValueError: see :meth:`check_rank`.
        """
        self.check_rank(adapter_name)
        mean, log_std, lora_A = self.factors(adapter_name)
        gram = posterior.gram_matrix(lora_A, self.scaling[adapter_name])
        if log_std is None:
            return posterior.delta_quadratic(mean, gram, self.prior_std[adapter_name])
        return posterior.delta_kl(mean, log_std, gram, self.prior_std[adapter_name])

    def delta_norm(self, adapter_name: str) -> float:
        """Frobenius norm of the mean delta relative to the base weight's."""
        mean, _, lora_A = self.factors(adapter_name)
        gram = posterior.gram_matrix(lora_A, self.scaling[adapter_name])
        norm = (2 * posterior.delta_quadratic(mean, gram, 1.0)).clamp_min(0).sqrt()
        return (norm / base_weight(self.get_base_layer()).norm()).item()

    def signal_to_noise(self, adapter_name: str) -> float | None:
        """Signal-to-noise power ratio of the delta; None for a deterministic adapter."""
        mean, log_std, lora_A = self.factors(adapter_name)
        if log_std is None:
            return None
        return posterior.signal_to_noise(
            mean, log_std, posterior.gram_matrix(lora_A, self.scaling[adapter_name])
        ).item()


def refuse_layer(target: nn.Module, *args, **kwargs) -> nn.Module:
    """In the place of a layer class, for targets that have none: PEFT would give them a plain LoRA without a word.

    Raises:
        ValueError: always.
    """
    kind = type(target.get_base_layer() if isinstance(target, lora.LoraLayer) else target).__name__
    raise ValueError(f"a {kind} is neither nn.Linear nor nn.Conv2d and cannot carry a posterior; leave it out")


class VariationalLinear(VariationalLayer, lora.Linear):
    """``peft.tuners.lora.Linear`` with a Gaussian ``lora_B``."""


class VariationalConv2d(VariationalLayer, lora.Conv2d):
    """``peft.tuners.lora.Conv2d`` with a Gaussian ``lora_B``."""

    def update_layer(self, adapter_name: str, *args, **kwargs) -> None:
        base = self.get_base_layer()
        # PEFT's LoRA convolution copies kernel, stride and padding only; with others it would be wrong or crash.
        if tuple(base.dilation) != (1, 1) or base.padding_mode != "zeros":
            raise ValueError(
                f"LoRA on a Conv2d with dilation {tuple(base.dilation)} and padding mode {base.padding_mode!r} "
                "is not supported by PEFT; leave the layer out of target_modules"
            )
        super().update_layer(adapter_name, *args, **kwargs)
