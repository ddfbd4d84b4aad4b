"""One contract over diffusion models: predict noise, add noise, sample.

Covers unconditional and class-conditional ``UNet2DModel`` with a diffusers scheduler that has betas (epsilon, v and
sample prediction) or is a rectified flow's, and a user's own module that maps (x_t, t) to what such a one predicts.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    DDPMPipeline,
    DiffusionPipeline,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm

from vdu_peft.first_line import first_line
from vdu_peft.model_folder import PIPELINES, check_folder, from_hub, stored_dtype, stored_sampler, stored_scheduler
from vdu_peft.schedule import ModelError, NoiseSchedule


def best_device() -> torch.device:
    """The accelerator that torch finds (CUDA, MPS, XPU and others), or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def plain_attention_on_cpu(model: nn.Module) -> None:
    """Let a model on a CPU compute softmax(QKᵀ)V step by step, which holds the N x N weights of every head in memory.

    PyTorch's fused attention is the slower one there for few tokens and narrow heads: with it the demo's model (49
    tokens, heads of 8) took a quarter to two fifths longer for forward and backward in bfloat16.
    """
    if next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())


class Denoiser:
    """A network with its noise schedule.

    Args:
        model: called as ``model(x_t, timesteps)`` with x_t (N, C, H, W) and timesteps (N,), int64 or a flow's 1000 σ,
            and with ``class_labels=`` (N,) when its config has ``num_class_embeds``; returns a tensor (N, C, H, W) or
            an object with ``.sample``. Twice the channels means that a variance is learned too; it is left alone.
        scheduler: a diffusers scheduler, whose betas and ``prediction_type`` are used, or a noise schedule made of one.
        image_size: (height, width); taken from ``model.config.sample_size`` when None.
        channels: taken from ``model.config.in_channels`` when None.

    Raises:
        ModelError: an unknown prediction type, or a size that neither the model nor the caller names.
    """

    # Classifier-free guidance that its users sample with; 1 is none.
    guidance_scale = 1.0
    # The network's name in its pipeline.
    component = "unet"

    def __init__(
        self,
        model: nn.Module,
        scheduler: SchedulerMixin | NoiseSchedule,
        image_size: tuple[int, int] | None = None,
        channels: int | None = None,
    ):
        config = getattr(model, "config", None)
        if not isinstance(config, Mapping):  # a user's own module may call anything so
            config = {}
        size = config.get("sample_size") if image_size is None else image_size
        self.channels = config.get("in_channels") if channels is None else channels
        if size is None or self.channels is None:
            raise ModelError(f"{type(model).__name__} does not tell its image size; pass image_size and channels")
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.latent_shape = (self.channels, *self.image_size)
        # Images that go through the network at a time without gradients: of 64 x 64 pixels 64, fewer of larger ones.
        self.batch_size = max(1, min(64, 2**18 // math.prod(self.image_size)))
        self.num_classes = config.get("num_class_embeds")
        self.model = model
        self.null_label: int | None = None
        self.name = type(model).__name__
        self.stored_dtype = self.dtype
        # The stock pipeline that it is written as, and that one's scheduler; DDPM's when None.
        self.sampled_by: tuple[type[DiffusionPipeline], SchedulerMixin] | None = None
        self.schedule = scheduler if isinstance(scheduler, NoiseSchedule) else NoiseSchedule(scheduler)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> "Denoiser":
        """Load a diffusers pipeline folder, a bare UNet folder, or a hub id; safetensors only.

        Raises:
            ModelError: nothing there, no safetensors weights, or a model that is not a UNet2DModel.
        """
        folder = Path(name_or_path)
        if folder.is_dir():
            unet_folder, scheduler_folder = check_folder(folder)
        elif folder.is_file():
            raise ModelError(
                f"{name_or_path}: a file; write its pipeline as a folder first, with diffusers' from_single_file(...) "
                "and save_pretrained(...)"
            )
        elif folder.exists() or folder.is_absolute() or str(name_or_path).count("/") != 1:
            raise ModelError(f"{name_or_path}: no such folder, and not a hub id of the form owner/name")
        else:
            unet_folder, scheduler_folder = from_hub(str(name_or_path))
        try:
            unet = UNet2DModel.from_pretrained(
                str(unet_folder),  # it goes into the config, and from there into cards, where a Path is no plain YAML
                dtype=dtype,
                use_safetensors=True,
                low_cpu_mem_usage=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{unet_folder}: cannot be loaded as a UNet2DModel ({first_line(error)})") from error
        denoiser = cls(unet.eval(), stored_scheduler(scheduler_folder, name_or_path))
        # What cards call it: a local path says nothing elsewhere, and names the machine it was on.
        denoiser.name = folder.resolve().name if folder.is_dir() else str(name_or_path)
        denoiser.stored_dtype = stored_dtype(unet_folder)
        denoiser.sampled_by = stored_sampler(scheduler_folder)
        return denoiser

    def to_best_device(self) -> "Denoiser":
        """Move to the machine's best device; returns self."""
        self.model.to(best_device())
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        # Quantised weights are integers, which say nothing of what the network computes in.
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def condition(self) -> Literal["class", "text"] | None:
        """What the prediction is conditioned on."""
        return "class" if self.num_classes else None

    @property
    def scheduler(self) -> SchedulerMixin:
        return self.schedule.scheduler

    @property
    def prediction_type(self) -> str:
        return self.schedule.prediction_type

    @property
    def num_train_timesteps(self) -> int:
        return self.schedule.num_train_timesteps

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """What the network denoises of images (N, C, H, W) in [-1, 1]: here the images themselves."""
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] of what :meth:`encode` made, or of what was sampled."""
        return latents.clamp(-1, 1)

    def _predict(self, x_t, timesteps, class_labels, model: nn.Module) -> torch.Tensor:
        """What the network predicts, float32, without a learned variance; timesteps as the network is told them."""
        condition = {} if class_labels is None else {"class_labels": class_labels}
        output = model(x_t.to(self.dtype), timesteps, **condition)
        return getattr(output, "sample", output)[:, : self.latent_shape[0]].float()

    def guided_prediction(self, x_t, timesteps, class_labels, guidance_scale: float) -> torch.Tensor:
        """What a sampler steps by."""
        output = self._predict(x_t, timesteps, class_labels, self.model)
        if guidance_scale <= 1:  # as the stock pipelines have it
            return output
        null = self._predict(x_t, timesteps, torch.full_like(class_labels, self.null_label), self.model)
        return null + guidance_scale * (output - null)

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x_0 + σ_t ε, (N, C, H, W), at timesteps (N,) int64."""
        return self.schedule.add_noise(images, noise, timesteps)

    def noise_pred(
        self,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        model: nn.Module | None = None,
    ) -> torch.Tensor:
        """The predicted noise ε, float32 (N, C, H, W), whatever the model predicts.

        Args:
            model: stands in for ``self.model``; the trainer passes it wrapped for several processes.
        """
        told = self.schedule.network_timesteps.to(timesteps.device)[timesteps]
        prediction = self._predict(x_t, told, class_labels, model or self.model)
        return self.schedule.noise_pred(prediction, x_t, timesteps)

    def check_inference_steps(self, num_inference_steps: int, name: str = "num_inference_steps") -> None:
        """Raises ModelError, with the option's ``name``, unless the schedule has so many steps to sample with."""
        if not 1 <= num_inference_steps <= self.num_train_timesteps:
            raise ModelError(f"{name} must lie in 1 to {self.num_train_timesteps}, not {num_inference_steps}")

    @torch.no_grad()
    def sample(
        self,
        num_images: int,
        *,
        seed: int | Sequence[int],
        num_inference_steps: int = 25,
        batch_size: int | None = None,
        class_labels: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        decode: bool = True,
        progress: str | None = None,
    ) -> torch.Tensor:
        """Draw images with DDIM (eta 0), or with Euler steps where the schedule is a flow's.

        Every image has its own generator, so image i of a seed is the same whatever the batch size.

        Args:
            seed: of all images, or one for each, as a stock pipeline's generator has it.
            batch_size: images at a time; the model's own :attr:`batch_size` when None.
            class_labels: of a model with a condition, the labels to draw, in turn.
            guidance_scale: classifier-free guidance (Ho and Salimans 2022) away from ``null_label``; 1 is none, the
                model's own :attr:`guidance_scale` when None. A guidance-distilled model is told it instead.
            decode: False returns what :meth:`encode` would make of the images.
            progress: label of a progress bar; none when None.

        Returns:
            float32 (num_images, C, H, W) on the CPU, in [-1, 1].

        Raises:
            ModelError: no image to draw, more steps than the schedule has, guidance for a model without a null label,
                a seed that is out of range, or not one for each image.
        """
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if guidance_scale > 1 and (self.null_label is None or class_labels is None):
            raise ModelError("guidance needs class labels and a null label, the one that stands for no condition")
        self.check_inference_steps(num_inference_steps)
        if num_images < 1:
            raise ModelError(f"num_images must be at least 1, not {num_images}")
        seeds = seed if isinstance(seed, Sequence) else image_seeds(seed, num_images)
        if len(seeds) != num_images:
            raise ModelError(f"seed: {len(seeds)} of them for {num_images} images")
        if not all(0 <= s < 2**64 for s in seeds):  # torch's range
            raise ModelError(f"seed: must lie in 0 to {2**64 // 1_000_003 - num_images}, not {seed}")
        noise = torch.stack([torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        labels = None if class_labels is None else in_turn(class_labels, num_images)
        batch_size = batch_size or self.batch_size
        batches, total = [], num_images * num_inference_steps
        bar = tqdm(total=total, desc=progress, unit="step", disable=progress is None, leave=False)
        for start in range(0, num_images, batch_size):
            x_t = noise[start : start + batch_size].to(self.device)
            batch_labels = None if labels is None else labels[start : start + batch_size].to(self.device)
            x_t = self._denoised(x_t, num_inference_steps, 0, batch_labels, guidance_scale, bar)
            batches.append((self.decode(x_t) if decode else x_t).cpu())
        bar.close()
        return torch.cat(batches)

    @torch.no_grad()
    def vary(
        self,
        images: torch.Tensor,
        timestep: int,
        *,
        seed: int,
        num_inference_steps: int = 25,
        progress: str | None = None,
    ) -> torch.Tensor:
        """Images as an unconditional model itself would draw them: noised, and denoised from there (SDEdit, Meng et al.
        2022), as :meth:`sample` denoises.

        Args:
            images: (N, C, H, W), as :meth:`encode` makes them.
            timestep: they are noised to the sampler's highest that is no higher than this one, or its lowest.
            seed: of the noise.
            progress: label of a progress bar; none when None.

        Returns:
            float32 (N, C, H, W) on the CPU, as :meth:`encode` would make them.

        Raises:
            ModelError: more steps than the schedule has.
        """
        self.check_inference_steps(num_inference_steps)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        sampler = self.schedule.sampler(num_inference_steps, self.device)
        first, x_t = self.schedule.begun(sampler, timestep, images.cpu(), noise)
        total = len(images) * (num_inference_steps - first)
        with tqdm(total=total, desc=progress, unit="step", disable=progress is None, leave=False) as bar:
            drawn = [
                self._denoised(batch.to(self.device), num_inference_steps, first, None, 1.0, bar)
                for batch in x_t.split(self.batch_size)
            ]
        return torch.cat(drawn).cpu()

    def _denoised(self, x_t, num_inference_steps: int, first: int, labels, guidance_scale: float, bar) -> torch.Tensor:
        """What a sampler of so many steps makes of x_t (N, C, H, W) from its step ``first`` on."""
        sampler = self.schedule.sampler(num_inference_steps, self.device)
        for t in sampler.timesteps[first:]:
            output = self.guided_prediction(x_t, t.expand(len(x_t)), labels, guidance_scale)
            x_t = sampler.step(output, t, x_t).prev_sample
            bar.update(len(x_t))
        return x_t

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a complete diffusers pipeline, as safetensors; its class and scheduler are those it came with.

        Raises:
            ModelError: a network that is not diffusers', or one that carries an adapter.
        """
        self._refuse_adapted()
        if not isinstance(self.model, UNet2DModel):
            raise ModelError(f"{type(self.model).__name__} is not a diffusers model; save its state_dict yourself")
        pipeline, scheduler = self.sampled_by or (DDPMPipeline, self.scheduler)
        pipeline(self.model, scheduler).save_pretrained(folder, safe_serialization=True)

    def _refuse_adapted(self) -> None:
        """Written with an adapter's layers in it, a network loads as one that has lost the weights below them."""
        if any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            raise ModelError(
                "the model carries an adapter, which a pipeline cannot hold; put what merge_and_unload() of its "
                "PeftModel gives in its place first, or use vdu_peft.export.merge"
            )


def image_seeds(seed: int, num_images: int) -> list[int]:
    """Each image's own seed, in a sample of this seed."""
    return [int(seed) * 1_000_003 + i for i in range(num_images)]


def in_turn(class_labels: Sequence[int], count: int) -> torch.Tensor:
    """Labels (count,) int64: the given ones, from the first again when they are through."""
    return torch.tensor([int(class_labels[i % len(class_labels)]) for i in range(count)])


def as_denoiser(model: Denoiser | DiffusionPipeline | str | Path) -> Denoiser:
    """A Denoiser from itself, a pipeline object, a folder or a hub id."""
    if isinstance(model, Denoiser):
        return model
    if isinstance(model, DiffusionPipeline):
        if not isinstance(getattr(model, "unet", None), UNet2DModel):
            raise ModelError(
                f"{type(model).__name__}: not a pipeline around a UNet2DModel; wrap text-to-image in a TextDenoiser"
            )
        denoiser = Denoiser(model.unet, model.scheduler)
        if type(model).__name__ in PIPELINES:
            denoiser.sampled_by = type(model), model.scheduler
        return denoiser
    return Denoiser.from_pretrained(model)
