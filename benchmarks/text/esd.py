"""Erased Stable Diffusion: the forgotten prompt's prediction is trained to point away from it.

Gandikota et al. 2023, "Erasing Concepts from Diffusion Models", equation 7, on latents that the model itself draws of
the prompt; ``ESD-x`` trains the cross-attention, ``ESD-u`` everything else. The anchor is the caption with other words
in place of the concept's, where the paper has the empty prompt, so that it sees what ours sees. The paper's models
predict the noise; here the loss is on whatever the network predicts, which weighs its timesteps as the paper's are.
"""

import copy

import torch
from accelerate.utils import set_seed

from benchmarks.text.task import TextTask


def esd(task: TextTask, parameters: str, learning_rate: float, steps: int, batch_size: int, guidance: float) -> str:
    """``parameters`` is x (cross-attention) or u (everything else); ``guidance`` is η."""
    denoiser = task.denoiser
    teacher = copy.deepcopy(denoiser.model)
    is_cross = {name: "attn2" in name for name, _ in denoiser.model.named_parameters()}
    trained = [p for name, p in denoiser.model.named_parameters() if is_cross[name] == (parameters == "x")]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    labels, anchors = task.labels(task.captions), task.labels(task.anchors)
    for step in range(steps):
        set_seed((task.seed * 1_000_003 + step) % 2**32)
        rows = torch.randperm(len(labels))[:batch_size]
        x_t, timesteps = draw_until(denoiser, labels[rows])
        with torch.no_grad():
            under_forget = denoiser.noise_pred(x_t, timesteps, labels[rows], model=teacher)
            under_anchor = denoiser.noise_pred(x_t, timesteps, anchors[rows], model=teacher)
        noise_pred = denoiser.noise_pred(x_t, timesteps, labels[rows])
        target = under_anchor - guidance * (under_forget - under_anchor)
        loss = denoiser.schedule.own_error(noise_pred - target, timesteps).square().mean()
        if not torch.isfinite(loss):
            return "not finite"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        denoiser.model.zero_grad()
    return "done"


@torch.no_grad()
def draw_until(denoiser, labels: torch.Tensor, num_inference_steps: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, timesteps) of a trajectory that stops at a random step, the same for the batch."""
    sampler = denoiser.schedule.sampler(num_inference_steps, denoiser.device)
    stop = int(torch.randint(num_inference_steps, ()))
    x_t = torch.randn(len(labels), *denoiser.latent_shape)
    for t in sampler.timesteps[:stop]:
        output = denoiser.guided_prediction(x_t, t.expand(len(x_t)), labels, denoiser.guidance_scale)
        x_t = sampler.step(output, t, x_t).prev_sample
    return x_t, sampler.timesteps[stop].expand(len(x_t))
