"""Rank-one erasing: a LoRA of rank 1 on every layer, trained to ESD's target and anchored on other prompts.

After Lyu et al. 2024, "One-dimensional Adapter to Rule Them All" (erasing and latent anchoring), with the retained
prompts in place of anchors drawn by their distance from the concept, and without the scaling by prompt at inference
("facilitated transport"), which no stock pipeline does. The authors' code (Con6924/SPM) weighs the anchoring by 1000,
as ours does, but takes 3,000 steps at a learning rate of 1e-4, with warmup, where ours takes 100 of a batch of 8 at
1e-3. Its models predict the noise; here the losses are on whatever the network predicts.
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
        erasing, anchoring = (
            denoiser.schedule.own_error(denoiser.noise_pred(x_t, timesteps, condition) - to, timesteps).square().mean()
            for condition, to in ((labels[rows], target), (kept, under_kept))
        )
        loss = erasing + anchoring_weight * anchoring
        if not torch.isfinite(loss):
            return "not finite"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    denoiser.model = adapted.merge_and_unload()
    return "done"
