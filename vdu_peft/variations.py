"""Few forget images made many: each as the pre-trained model itself would draw it."""

import torch
from accelerate.utils import broadcast_object_list

from vdu_peft.batch import deciding_timesteps
from vdu_peft.config import UnlearnConfig
from vdu_peft.denoiser import Denoiser

# How far from the least to the greatest of the timesteps at which it is decided what an image shows. At a half 8 and 32
# images of a 3 forgot as much at as high a cost, but more of what is drawn is another kind.
NOISE_SHARE = 0.25
# Enough that one of the sampler's steps lies near it, whatever its spacing.
NUM_STEPS = 25
# Added to the run's seed: not the noise of anything else.
VARIATION_SEED = 104_729


def variations(
    denoiser: Denoiser, forget: torch.Tensor, replay: torch.Tensor, config: UnlearnConfig, progress: str | None = None
) -> torch.Tensor:
    """What makes up ``min_forget_images`` with the forget images, (K, C, H, W): variations of each in turn.

    Noised to the lower ones of the timesteps at which it is decided what an image shows, and drawn again, an image is
    another one of the same kind: of 100 real 3s and 1s at 16 pixels 96 and 98 still are one, of deer and ships that a
    weak color model draws again 58 and 63 (``benchmarks.deciding``). A run that sees eight images many hundred times
    each learns these eight.

    Nothing is varied where the replay does not tell which timesteps those are.

    Args:
        denoiser: an unconditional one, its model as it was before, without dropout.
        forget: (N_f, C, H, W), as the denoiser encodes them, and
        replay: (M, C, H, W), too.
        progress: the progress bar's title; without one there is none.
    """
    count = config.min_forget_images - len(forget)
    if count <= 0:
        return forget[:0]
    # Processes may round apart, but must vary alike.
    ((lowest, highest),) = broadcast_object_list([deciding_timesteps(denoiser, replay)])
    if highest == denoiser.num_train_timesteps:
        return forget[:0]
    return denoiser.vary(
        forget[torch.arange(count) % len(forget)],
        lowest + int(NOISE_SHARE * (highest - lowest)),
        seed=config.seed + VARIATION_SEED,
        num_inference_steps=min(NUM_STEPS, denoiser.num_train_timesteps),
        progress=progress,
    )
