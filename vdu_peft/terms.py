"""The objective's terms of one batch: the network and its teacher, which is the same module with the adapter off."""

import torch
from accelerate import Accelerator

from vdu_peft import objective
from vdu_peft.batch import Batch
from vdu_peft.config import UnlearnConfig
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import Denoiser


def loss_terms(
    denoiser: Denoiser, network: torch.nn.Module, batch: Batch, config: UnlearnConfig, accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """The objective's terms of one batch, scalars by name; ``network`` is the denoiser's, as accelerate wrapped it."""
    images, noise, timesteps, labels, anchors, replaced = batch
    half = len(images) // 2
    x_t = denoiser.add_noise(images, noise, timesteps)
    with accelerator.autocast():
        with torch.no_grad(), adapter_scale(denoiser.model, 0):  # the teacher: the same module, adapter off
            base_noise_pred = denoiser.noise_pred(x_t, timesteps, labels)
            if anchors is not None:
                anchor_noise_pred = denoiser.noise_pred(x_t[:half], timesteps[:half], anchors)
        noise_pred = denoiser.noise_pred(x_t, timesteps, labels, model=network)
    loss = objective.denoising_loss(noise_pred[:half], noise[:half])
    base_loss = objective.denoising_loss(base_noise_pred[:half], noise[:half])
    if replaced is not None:
        loss, base_loss = loss[~replaced], base_loss[~replaced]
    terms = {
        "stability": objective.stability(noise_pred[half:], base_noise_pred[half:], noise[half:]),
        "forget_ratio": objective.forget_ratio(loss, base_loss),
    }
    if config.plasticity == "elbo":
        return {"plasticity": objective.elbo(loss), **terms}
    bounded = {"hinge": objective.hinge, "reciprocal": objective.reciprocal}[config.plasticity]
    terms["plasticity"] = bounded(loss, base_loss, config.forget_target)
    if anchors is not None:
        terms["redirect"] = objective.redirect(
            noise_pred[:half],
            base_noise_pred[:half],
            anchor_noise_pred,
            noise[:half],
            conditional=labels[:half] != (-1 if config.null_class is None else config.null_class),
        )
    return terms
