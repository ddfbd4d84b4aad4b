"""The noise schedule: how much noise a timestep adds, and how predictions become the noise.

Everything is one linear family: x_t = α_t x_0 + σ_t ε, and a network predicts a ε + b x_0.
"""

from collections.abc import Mapping

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

# Of schedulers with betas; a flow's networks predict its velocity, ε − x_0.
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# At zero terminal SNR x_T is the noise itself, whose prediction has no error to compare with: the least α_t.
# Its square is what diffusers' own multi-step schedulers put there.
MIN_ALPHA = 2**-12

# σ_t / α_t from which on it is decided what an image shows that is REFERENCE_SIZE pixels wide: where an MNIST model
# that was trained without a 3 denoises 3s worse than one that was trained with them, by 1.13 times (timestep 100;
# benchmarks.timesteps) or more. In less noise both see the image.
LEAST_DECIDING_NOISE = 0.34
REFERENCE_SIZE = 16


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message names it and the mend."""


def plain_scheduler(kind: str, config: Mapping, **changes) -> SchedulerMixin:
    """A flow's scheduler, or one with betas: as DDPM's, whatever sampler it is of.

    Made anew: a scheduler that has sampled holds its sampler's timesteps.

    Args:
        kind: the class's name.
        changes: of the config, where there are betas.

    Raises:
        ModelError: a noise schedule of another kind.
    """
    if kind == FlowMatchEulerDiscreteScheduler.__name__:
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    if "beta_schedule" not in config:
        raise ModelError(f"{kind}: only noise schedules with betas, and FlowMatchEulerDiscreteScheduler, are supported")
    return DDPMScheduler.from_config(config, **changes)


class NoiseSchedule:
    """Timesteps 0 to T − 1, from the clean image to noise, of a diffusers scheduler.

    Args:
        scheduler: one with betas (variance preserving: α² + σ² = 1), or a ``FlowMatchEulerDiscreteScheduler``
            (rectified flow: α + σ = 1, Esser et al. 2024), whose static ``shift`` is in σ.
        image_tokens: the network's tokens per image, which a scheduler with ``use_dynamic_shifting`` samples by.
        even_sigmas: the sampler's σ of a flow, before any shift, run evenly from 1 to 1 / steps, as Flux has them;
            otherwise from the schedule's largest to its least, as Stable Diffusion 3 has them.
        latent: a latent is no pixel: samplers must not clip it, whatever the scheduler's default is.

    Attributes:
        alphas, sigmas: float32 (T,).
        network_timesteps: (T,), what the network is told: the timestep itself, or 1000 σ in a flow.

    Raises:
        ModelError: a schedule or a prediction type of another kind, or a shift by resolution without image_tokens.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        image_tokens: int | None = None,
        even_sigmas: bool = False,
        latent: bool = False,
    ):
        self.image_tokens = image_tokens
        self.even_sigmas = even_sigmas
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        kind = FlowMatchEulerDiscreteScheduler.__name__ if flow else type(scheduler).__name__
        # Given to the constructor, or samplers made of the config would take it for a default and use their own.
        self.scheduler = plain_scheduler(kind, scheduler.config, **({"clip_sample": False} if latent else {}))
        if flow:
            if self.scheduler.config.use_dynamic_shifting and image_tokens is None:
                raise ModelError("use_dynamic_shifting: this model's scheduler shifts by its number of image tokens")
            self.prediction_type = "flow"
            self.sigmas = self.scheduler.sigmas.flip(0)
            alphas = 1 - self.sigmas
            self.network_timesteps = self.sigmas * self.num_train_timesteps
        else:
            self.prediction_type = self.scheduler.config.prediction_type
            if self.prediction_type not in PREDICTION_TYPES:
                raise ModelError(f"prediction_type {self.prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}")
            self.sigmas = (1 - self.scheduler.alphas_cumprod).sqrt()
            alphas = self.scheduler.alphas_cumprod.sqrt()
            self.network_timesteps = torch.arange(self.num_train_timesteps)
        self.alphas = alphas.clamp_min(MIN_ALPHA)

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def deciding_timesteps(self, size: int, deviation: float) -> tuple[int, int]:
        """The least timestep at which it is decided what an image shows, and the one after the greatest.

        The same noise hides less of a larger image, whose neighbouring pixels tell the same: the least σ / α is in
        proportion to the size (Hoogeboom et al. 2023, "simple diffusion", section 3.1). The greatest is the deviation:
        in more noise all kinds of images are drawn alike (Biroli et al. 2024, "Dynamical regimes of diffusion models",
        arXiv 2402.18491: the speciation time, of the covariance's largest eigenvalue). Of MNIST at 16 pixels it is 2.4;
        the losses of models with and without a 3 differ by 1.2 times or more up to 2.6. At 28 pixels it is 4.9, of
        CIFAR-10 at 32, whose brightness and hue are seen through much noise, 15.

        Args:
            size: the images' width in pixels.
            deviation: their standard deviation along the direction in which they differ most. Where they do not differ
                by as much as the least noise nothing is told by it, and the range goes on to the last timestep.
        """
        noise = self.sigmas / self.alphas
        least = LEAST_DECIDING_NOISE * size / REFERENCE_SIZE
        lowest = min(int((noise < least).sum()), len(noise) - 1)
        highest = int((noise <= deviation).sum()) if deviation > least else len(noise)
        return lowest, max(highest, lowest + 1)

    def _at(self, table: torch.Tensor, timesteps: torch.Tensor, device: torch.device) -> torch.Tensor:
        return table[timesteps.to(table.device)].view(-1, 1, 1, 1).to(device)

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x_0 + σ_t ε: (N, C, H, W), at timesteps (N,) int64."""
        alpha, sigma = (self._at(table, timesteps, images.device) for table in (self.alphas, self.sigmas))
        return alpha * images + sigma * noise

    def noise_pred(self, prediction: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """ε from what the network predicts, a ε + b x_0: (α_t · prediction − b x_t) / (α_t a − σ_t b)."""
        if self.prediction_type == "epsilon":
            return prediction
        alpha, sigma = (self._at(table, timesteps, x_t.device) for table in (self.alphas, self.sigmas))
        a, b = {
            "v_prediction": (alpha, -sigma),  # Salimans and Ho 2022
            "sample": (0, 1),
            "flow": (1, -1),
        }[self.prediction_type]
        return (alpha * prediction - b * x_t) / (alpha * a - sigma * b)

    def own_error(self, noise_error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """An error of ε, (N, C, H, W), as one of what the network itself predicts: for v and flows that over α_t.

        Squared it is what such networks are trained on. An error of ε would hardly count where there is much noise.
        """
        return noise_error / self.noise_pred(torch.ones_like(noise_error), torch.zeros_like(noise_error), timesteps)

    def sampler(self, num_inference_steps: int, device: torch.device) -> SchedulerMixin:
        """A fresh DDIM (eta 0), or Euler for a flow, set to its steps as the stock pipelines set theirs."""
        config = self.scheduler.config
        if self.prediction_type != "flow":
            sampler = DDIMScheduler.from_config(config)
            sampler.set_timesteps(num_inference_steps, device=device)
            return sampler
        sampler = FlowMatchEulerDiscreteScheduler.from_config(config)
        options = {"device": device}
        if config.use_dynamic_shifting:
            # The shift grows with the logarithm of the resolution (Esser et al. 2024, section 5.3.2).
            low, high = config.base_image_seq_len, config.max_image_seq_len
            slope = (config.max_shift - config.base_shift) / (high - low)
            options["mu"] = config.base_shift + slope * (self.image_tokens - low)
        if self.even_sigmas:
            options["sigmas"] = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        sampler.set_timesteps(num_inference_steps, **options)
        return sampler

    def begun(
        self, sampler: SchedulerMixin, timestep: int, images: torch.Tensor, noise: torch.Tensor
    ) -> tuple[int, torch.Tensor]:
        """The sampler's first step from no more noise than there is at this timestep, its last where all are from more,
        and what it starts from.

        Images and noise (N, C, H, W), and so is what it starts from.
        """
        later = sampler.timesteps.cpu() > self.network_timesteps[timestep]
        first = min(int(later.sum()), len(later) - 1)
        if self.prediction_type == "flow":
            sigma = sampler.sigmas[first].item()
            return first, (1 - sigma) * images + sigma * noise
        return first, self.add_noise(images, noise, sampler.timesteps[first].cpu().expand(len(images)))
