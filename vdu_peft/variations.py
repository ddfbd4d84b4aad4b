"""Few forget images made many: each as the pre-trained model itself would draw it."""

import torch

from vdu_peft.batch import deciding_timesteps
from vdu_peft.config import UnlearnConfig
from vdu_peft.denoiser import Denoiser

# Added to the run's seed: not the noise of anything else.
VARIATION_SEED = 104_729


def variations(
    denoiser: Denoiser, forget: torch.Tensor, replay: torch.Tensor, config: UnlearnConfig, progress: str | None = None
) -> torch.Tensor:
    """What makes up ``min_forget_images`` with the forget images, (K, C, H, W): variations of each in turn.

    Noised to the middle of the timesteps at which it is decided what an image shows, and drawn again, an image is
    another one of the same kind, mostly: of 100 real 3s and 1s at 16 pixels 89 and 97 still are one
    (``benchmarks.deciding``). A run that sees eight images many hundred times each learns these eight.

    Args:
        denoiser: an unconditional one, its model as it was before, without dropout.
        forget: (N_f, C, H, W), as the denoiser encodes them, and
        replay: (M, C, H, W), too.
        progress: the progress bar's title; without one there is none.
    """
    count = config.min_forget_images - len(forget)
    if count <= 0:
        return forget[:0]
    lowest, highest = deciding_timesteps(denoiser, replay)
    return denoiser.vary(
        forget[torch.arange(count) % len(forget)],
        (lowest + highest) // 2,
        seed=config.seed + VARIATION_SEED,
        num_inference_steps=config.replay_inference_steps,
        progress=progress,
    )
