"""Rank-one erasing: a LoRA of rank 1 on every layer, trained to ESD's target and anchored on other prompts.

After Lyu et al. 2024, "One-dimensional Adapter to Rule Them All" (erasing and latent anchoring), with the retained
prompts in place of anchors drawn by their distance from the concept, and without the scaling by prompt at inference
("facilitated transport"), which no stock pipeline does.
"""

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.text.esd import draw_until
from benchmarks.text.task import TextTask


def spm(
    task: TextTask, learning_rate: float, steps: int, batch_size: int, guidance: float, anchoring_weight: float
) -> str:
    """``guidance`` is η, ``anchoring_weight`` λ."""
    denoiser = task.denoiser
    network = denoiser.model.requires_grad_(False)
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    adapted = get_peft_model(network, LoraConfig(r=1, lora_alpha=1, target_modules=layers))
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    labels, anchors, retained = (task.labels(prompts) for prompts in (task.captions, task.anchors, task.retained))
    for step in range(steps):
        set_seed((task.seed * 1_000_003 + step) % 2**32)
        rows = torch.randperm(len(labels))[:batch_size]
        kept = retained[torch.randint(len(retained), (batch_size,))]
        x_t, timesteps = draw_until(denoiser, labels[rows])
        with torch.no_grad(), adapted.disable_adapter():
            under_forget, under_anchor, under_kept = (
                denoiser.noise_pred(x_t, timesteps, condition) for condition in (labels[rows], anchors[rows], kept)
            )
        target = under_anchor - guidance * (under_forget - under_anchor)
        erasing = (denoiser.noise_pred(x_t, timesteps, labels[rows]) - target).square().mean()
        anchoring = (denoiser.noise_pred(x_t, timesteps, kept) - under_kept).square().mean()
        loss = erasing + anchoring_weight * anchoring
        if not torch.isfinite(loss):
            return "not finite"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    denoiser.model = adapted.merge_and_unload()
    return "done"
