"""Unified Concept Editing: the cross-attention's keys and values in closed form.

Gandikota et al. 2024, "Unified Concept Editing in Diffusion Models", equation 7: with W the weights of a key or value
projection, c the embeddings to edit, c* what they shall read as and p those to preserve,

    W_new = W (Σ c* cᵀ + Σ p pᵀ + λ I) (Σ c cᵀ + Σ p pᵀ + λ I)⁻¹.

Captions are edited place by place: a caption's embedding reads as that of the caption with the anchor's words.
"""

import torch

from benchmarks.text.task import TextTask


@torch.no_grad()
def uce(task: TextTask, preserve_scale: float, ridge: float) -> str:
    table = task.denoiser.embeddings["encoder_hidden_states"]
    edited, instead, kept = (
        table[task.labels(prompts)].flatten(0, 1).double() for prompts in (task.captions, task.anchors, task.retained)
    )
    retained = preserve_scale * kept.T @ kept + ridge * torch.eye(table.shape[-1], dtype=torch.float64)
    new = torch.linalg.solve(edited.T @ edited + retained, edited.T @ instead + retained).T
    for name, module in task.denoiser.model.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.weight.copy_((module.weight.double() @ new).to(module.weight))
    return "done"
