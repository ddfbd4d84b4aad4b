"""Options of the adapter (VDUConfig) and of a run (UnlearnConfig); every check of an option is here."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from peft import LoraConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from torch import nn

from vdu_peft.layer import VariationalConv2d, VariationalLinear, refuse_layer

# What stock LoRA training of conditional UNets and diffusion transformers adapts.
ATTENTION_PROJECTIONS = ["to_k", "to_out.0", "to_q", "to_v"]
# Of joint attention over text and image (Stable Diffusion 3, Flux), the text's.
JOINT_PROJECTIONS = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]

# LoRA features that put something else where the posterior sits, or train what the teacher, which is the same module
# with its adapter off, would then have, too. So do PEFT's variants, by whatever name.
_INCOMPATIBLE = (
    "fan_in_fan_out",
    "use_qalora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
    "layer_replication",
    *(option.name for option in dataclasses.fields(LoraConfig) if option.metadata.get("is_lora_variant")),
)


class ConfigError(ValueError):
    """An option that cannot be used; the message names it and the mend."""


@dataclass
class VDUConfig(LoraConfig):
    """A LoRA whose ``lora_B`` has a Gaussian posterior, regularized toward the zero delta.

    For ``peft.get_peft_model``, ``peft.inject_adapter_in_model`` and diffusers' ``add_adapter``. On disk
    it is a plain LoRA at the posterior mean, which stock PEFT loads without this package.

    Args:
        r: rank.
        lora_alpha: s = lora_alpha / r scales the delta.
        target_modules: as in LoraConfig; :meth:`for_model` fills in a default.
        prior_scale: prior standard deviation of a delta element, relative to the layer's RMS weight.
        init_scale: initial posterior standard deviation, in the same unit.
        variational: False gives the deterministic twin, for ablation.
        base_sample: no option: some base weights of every adapted layer, by which the base model is known again when
            the adapter is loaded; ``save_adapter`` fills it in.

    Raises:
        ConfigError: an option out of range, or a LoRA feature that cannot carry a posterior.
    """

    r: int = field(default=4, metadata={"help": "Rank of the adapter."})
    lora_alpha: float = field(default=4, metadata={"help": "s = lora_alpha / r scales the delta."})
    prior_scale: float = field(default=0.1, metadata={"help": "Prior std of the delta, relative to RMS(W)."})
    init_scale: float = field(default=0.01, metadata={"help": "Initial posterior std, relative to RMS(W)."})
    variational: bool = field(default=True, metadata={"help": "False gives the deterministic twin."})
    base_sample: dict[str, list[float]] | None = field(
        default=None, metadata={"help": "Some weights of the base model that the adapter is for; set when it is saved."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.r < 1:
            raise ConfigError(f"rank must be at least 1, not {self.r}")
        for name in ("prior_scale", "init_scale", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number greater than 0, not {getattr(self, name)}")
        for name in _INCOMPATIBLE:
            if getattr(self, name, None):
                raise ConfigError(f"{name} cannot be combined with a variational adapter")
        if self.bias != "none":
            raise ConfigError(
                f"bias must be none, not {self.bias!r}: with the adapter off the model is the pre-trained one"
            )
        if self.init_lora_weights not in (True, "gaussian"):
            raise ConfigError(
                f"init_lora_weights must be True or gaussian, not {self.init_lora_weights!r}: the adapter starts at "
                "the pre-trained model, which stays as it is"
            )
        # In this order: the first class that a target is an instance of counts.
        self._register_custom_module(
            {nn.Linear: VariationalLinear, nn.Conv2d: VariationalConv2d, nn.Module: refuse_layer}
        )

    @classmethod
    def for_model(cls, model: nn.Module, **options) -> "VDUConfig":
        """A config whose ``target_modules`` default to what suits the model.

        Models with cross attention or transformer blocks: attention projections. Others (UNet2DModel, a
        user's own network): every Linear and Conv2d that LoRA can adapt.
        """
        if options.get("target_modules") is None:
            rank = options.get("r", cls.r)
            passed_by = layers_passed_by(model)
            names = [n for n, module in model.named_modules() if _adaptable(module, rank) and n not in passed_by]
            attention = any("transformer_blocks" in name for name in names)
            joint = JOINT_PROJECTIONS if any(name.endswith(".add_k_proj") for name in names) else []
            options["target_modules"] = [*ATTENTION_PROJECTIONS, *joint] if attention else exactly(names, model)
        return cls(**options)

    def layer_scaling(self, layer: str) -> float:
        """s of the layer with this full name, with the patterns' own rank and alpha where they name it."""
        rank = self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), layer), self.r)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern.keys(), layer), self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options) -> "VDUConfig":
        """Read ``adapter_config.json`` with our fields, which PEFT would drop: it takes peft_type LORA for LoraConfig.

        Raises:
            ConfigError: the folder holds no adapter config, one of a plain LoRA, or one with values that cannot be.
        """
        file = Path(folder) / CONFIG_NAME
        if not file.is_file():
            # Between save_adapter's two renames the earlier adapter lies beside its place.
            aside = [*Path(folder).parent.glob(f".{Path(folder).name}-old-*/{Path(folder).name}")]
            mend = "give a saved adapter's folder"
            if aside:
                mend = f"a killed save left it as {aside[0]}; move it back"
            elif (within := file.parent / "adapter" / CONFIG_NAME).is_file():  # a run's folder
                mend = f"give {within.parent}"
            raise ConfigError(f"{folder}: no {CONFIG_NAME} there; {mend}")
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:  # not JSON, or not even text
            raise ConfigError(f"{file}: not valid JSON ({error})") from error
        if not isinstance(stored, dict) or "prior_scale" not in stored:
            raise ConfigError(f"{file}: not a VDU adapter (no prior_scale); load it with peft as a plain LoRA")
        if stored.get("init_lora_weights") in (False, "orthogonal"):  # a start that is past, and left the base alone
            stored["init_lora_weights"] = True
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        try:
            # A null is an option's default, which of some is no None.
            return cls(**{k: v for k, v in {**stored, **options}.items() if k in names and v is not None})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{file}: {error}") from error


def _adaptable(module: nn.Module, rank: int) -> bool:
    if isinstance(module, nn.Conv2d):
        if tuple(module.dilation) != (1, 1) or module.padding_mode != "zeros" or rank % module.groups:
            return False
        fan_in = module.weight[0].numel() * module.groups  # lora_A is not grouped
        return rank // module.groups <= fan_in
    return isinstance(module, nn.Linear) and rank <= module.in_features


def layers_passed_by(model: nn.Module) -> set[str]:
    """Names of layers that torch's attention modules never call, or not without gradients: they read the weights."""
    parts = {nn.MultiheadAttention: ("out_proj",), nn.TransformerEncoderLayer: ("linear1", "linear2")}
    return {
        f"{name}.{part}" if name else part
        for name, module in model.named_modules()
        for kind, of_kind in parts.items()
        if isinstance(module, kind)
        for part in of_kind
    }


def exactly(names: list[str], model: nn.Module) -> list[str] | str:
    """``target_modules`` that match these modules and no other: PEFT takes a name for the end of a name, too."""
    targets = set(names)
    others = [name for name, _ in model.named_modules() if name not in targets]
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name in others):
        return "|".join(re.escape(name) for name in names)
    return names


Plasticity = Literal["hinge", "reciprocal", "elbo"]
Precision = Literal["no", "bf16", "fp16"]

# What a model's prediction is conditioned on.
Condition = Literal["class", "text"]
# What None stands for where nothing else is asked for, by the condition. A text-to-image model is a large one, whose
# attributes lie close together: the learning rate is that of diffusers' LoRA script.
_REDIRECTED = {"plasticity": "hinge", "replay_size": 256, "replay_keep_quantile": 0.05}
DEFAULTS: dict[Condition | None, dict[str, object]] = {
    None: {"plasticity": "reciprocal", "stability_weight": 1.75, "learning_rate": 3e-3, "replay_size": 1024},
    "class": {**_REDIRECTED, "stability_weight": 1.0, "learning_rate": 3e-3},
    "text": {**_REDIRECTED, "stability_weight": 16.0, "learning_rate": 1e-4},
}


@dataclass(frozen=True)
class UnlearnConfig:
    """One unlearning run. Names follow diffusers' training scripts where those have one.

    loss = plasticity + redirect + stability_weight · stability + kl_weight · KL / K

    ``redirect`` is there for class-conditional and text-to-image models, not with ``elbo`` and not of the null class.

    Args:
        plasticity: ``hinge`` or ``reciprocal`` (bounded), or ``elbo`` (the paper's, unbounded). When None,
            ``reciprocal`` for an unconditional model: its push falls as the loss rises, so that it ends where replay
            resists, near what is like the concept, and goes on where nothing does. ``hinge`` for a model with a
            condition, which is redirected.
        forget_target: c of ``hinge`` and ``reciprocal``: raise the forget images' denoising loss to c times the
            original, and no further.
        stability_weight: weight of the function-space stability on self-generated replay. When None, 1.75 for an
            unconditional model, 1 for a class-conditional and 16 for a text-to-image one.
        kl_weight: weight of the KL (nats) per posterior weight: K is how many weights ``lora_B`` has. Not per element
            of the forget images, as beside a likelihood: bounded plasticity is a ratio, in no nats, and then 20 images,
            or small ones, would be held by a prior so much stronger that nothing is learned.
        min_forget_timestep: noise forget images at least to this timestep (of 1000). When None, to where it is decided
            what an image of the model's size shows: with less noise a higher loss only makes samples noisy. 200 for a
            model with a condition; 0 for plasticity ``elbo``.
        max_forget_timestep: and to less than this one. When None, to where the noise is as large as what the replay
            images differ in most: with more everything else is lost as well. 1000 for a model with a condition, which
            is redirected at all noise levels, and for ``elbo``.
        forget_class: of a class-conditional model, the label under which it knows the forget images.
        anchor_class: what that label shall draw instead; when None, each time another label at random.
        null_class: the label that stands for no condition, where the model was trained with one: half of the
            images are then shown under it, so that it forgets and retains too. It can be the forget_class itself: the
            unconditional likelihood then falls, and all other labels are retained.
        train_batch_size: forget images, and as many replay images, per process and step.
        max_train_steps: optimizer steps at most.
        learning_rate: of Adam at its peak, reached after a tenth of ``max_train_steps``; then it falls linearly to 0.
            When None, 0.003, and 0.0001 for a text-to-image model.
        gradient_accumulation_steps: batches per optimizer step.
        max_grad_norm: gradient clipping.
        gradient_checkpointing: recompute activations in the backward pass.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        random_flip: mirror forget images at random.
        min_forget_images: of an unconditional model, and not with ``elbo``: fewer forget images are made up to so many
            by variations of them, each noised and drawn again by the pre-trained model; 0 adds none.
        replay_size: how many images the pre-trained model draws of itself; on a CPU that computes in it, in bfloat16.
            When None, 1024 for an unconditional model (256, seen 20 times each, are held better than what lies between
            them), 256 for one with a condition.
        replay_inference_steps: sampler steps for them.
        replay_keep_quantile: replay images whose forget-likeness exceeds this quantile of the forget images' own are
            dropped; 1 keeps all. When None, an unconditional model keeps all, as its samples are distributed, with the
            concept's own share among them, but no more of that than a tenth of all: it weighs against the forget
            images as in the loss of a model trained without those, and at a greater share too little is forgotten. 0.05
            for a model with a condition, where the concept must not be held under other conditions.
        forget_tolerance: of the model's own samples that look like the forget images, the share that may still do so,
            even if less plainly, when the adapter draws them again (two always may). While more do, the delta is scaled
            up, to twice at most and only as far as that helps and what else it draws stays as plausible to the
            pre-trained model; 1 leaves it as it was learned. Not looked at with fewer than ten such samples, a single
            forget image, given replay, or a condition.
        early_stopping: once the forget target holds, let the learning rate fall to 0 over a fifth of
            ``max_train_steps`` and stop; not where a class or prompt is redirected, which has no target value.
        checkpointing_steps: save every so many steps; 0 never.
        report_to: tracker of accelerate, such as ``tensorboard``; none when None.
        seed: of everything random.
    """

    plasticity: Plasticity | None = None
    forget_target: float = 3.0
    stability_weight: float | None = None
    kl_weight: float = 0.0005
    min_forget_timestep: int | None = None
    max_forget_timestep: int | None = None
    forget_class: int | None = None
    anchor_class: int | None = None
    null_class: int | None = None
    train_batch_size: int = 16
    max_train_steps: int = 350
    learning_rate: float | None = None
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    mixed_precision: Precision = "no"
    random_flip: bool = False
    min_forget_images: int = 100
    replay_size: int | None = None
    replay_inference_steps: int = 25
    replay_keep_quantile: float | None = None
    forget_tolerance: float = 0.05
    early_stopping: bool = True
    checkpointing_steps: int = 0
    report_to: str | None = None
    seed: int = 0

    def __post_init__(self):
        for name, kind in (("plasticity", Plasticity), ("mixed_precision", Precision)):
            known = get_args(kind)
            if getattr(self, name) not in (*known, self.__dataclass_fields__[name].default):
                raise ConfigError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not 1 < self.forget_target < math.inf:
            raise ConfigError(
                f"forget_target must be a number greater than 1 (1 is the original loss), not {self.forget_target}"
            )
        for name in ("learning_rate", "max_grad_norm"):
            # No clipping is a gradient norm of infinity.
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf and (name, value) != ("max_grad_norm", math.inf):
                raise ConfigError(f"{name} must be a number greater than 0, not {value}")
        for name in ("stability_weight", "kl_weight", "min_forget_images", "checkpointing_steps"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number from 0, not {getattr(self, name)}")
        for name in (
            "train_batch_size",
            "max_train_steps",
            "gradient_accumulation_steps",
            "replay_size",
            "replay_inference_steps",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.plasticity == "elbo" and self.anchor_class is not None:
            raise ConfigError(
                "anchor_class: plasticity elbo redirects to nothing; use hinge, or leave anchor_class out"
            )
        if self.forget_class is not None and self.forget_class == self.anchor_class:
            raise ConfigError(f"forget_class {self.forget_class} cannot be its own anchor_class")
        lowest, highest = self.min_forget_timestep, self.max_forget_timestep
        if lowest is not None and not 0 <= lowest < 1000:
            raise ConfigError(f"min_forget_timestep must lie in 0 to 999, not {lowest}")
        if highest is not None and not (lowest or 0) < highest <= 1000:
            raise ConfigError(f"max_forget_timestep must lie in {(lowest or 0) + 1} to 1000, not {highest}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in [0, 2**32), not {self.seed}")
        if self.replay_keep_quantile is not None and not 0 <= self.replay_keep_quantile <= 1:
            raise ConfigError(f"replay_keep_quantile must lie in [0, 1], not {self.replay_keep_quantile}")
        if not 0 <= self.forget_tolerance <= 1:
            raise ConfigError(f"forget_tolerance must lie in [0, 1], not {self.forget_tolerance}")

    def filled(self, condition: Condition | None) -> "UnlearnConfig":
        """With the options that are None as they are for a model with this condition; not the timesteps', which the
        model's schedule decides.
        """
        return dataclasses.replace(self, **{n: v for n, v in DEFAULTS[condition].items() if getattr(self, n) is None})
