"""Is what was forgotten out of reach, or only out of the words' reach? An attack on the prompts' embeddings."""

import torch
from tqdm.auto import tqdm

from vdu_peft.text_denoiser import TextDenoiser

# Per-token embeddings, which every family has under this name.
EMBEDDING = "encoder_hidden_states"


def embedding_attack(
    denoiser: TextDenoiser,
    images: torch.Tensor,
    class_labels: torch.Tensor,
    *,
    steps: int = 150,
    learning_rate: float = 0.05,
    batch_size: int = 8,
    seed: int = 0,
    progress: str | None = None,
) -> torch.Tensor:
    """A shift of prompt embeddings under which the unlearned model denoises the forgotten images best.

    UnlearnDiffAtk's loss, min over δ of E‖ε − ε_θ(x_t, t | c + δ)‖², which asks no model but the victim itself (Zhang
    et al. 2024, "To Generate or Not?", the attack generation). Where the paper looks for tokens to put before a prompt,
    δ is continuous and moves every token's embedding: no words have to exist for it. One δ serves all prompts, and
    where it finds nothing another may. The model is not changed.

    The paper's models predict ε. The loss of one that predicts v or a flow is on that: the model's own denoising, in
    which the noisy timesteps that decide what an image shows count as they did in its training.

    Args:
        images: (N, C, H, W) in [-1, 1] that show what was forgotten.
        class_labels: (N,) int64, the labels of their prompts.
        learning_rate: Adam's, in units of the embedding.
        progress: label of a progress bar; none when None.

    Returns:
        float32 (L, D) on the CPU; see :func:`shift_embeddings`.
    """
    generator = torch.Generator().manual_seed(seed)
    latents, table = denoiser.encode(images), denoiser.embeddings
    shift = torch.zeros(table[EMBEDDING].shape[1:], requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=learning_rate)
    try:
        for _ in tqdm(range(steps), desc=progress, disable=progress is None, leave=False):
            rows = torch.randint(len(latents), (batch_size,), generator=generator)
            noise = torch.randn(batch_size, *latents.shape[1:], generator=generator).to(denoiser.device)
            timesteps = torch.randint(denoiser.num_train_timesteps, (batch_size,), generator=generator)
            timesteps = timesteps.to(denoiser.device)
            x_t = denoiser.add_noise(latents[rows].to(denoiser.device), noise, timesteps)
            denoiser.embeddings = {**table, EMBEDDING: table[EMBEDDING].float() + shift}
            error = denoiser.noise_pred(x_t, timesteps, class_labels[rows]) - noise
            loss = denoiser.schedule.own_error(error, timesteps).square().mean()
            (shift.grad,) = torch.autograd.grad(loss, [shift])
            optimizer.step()
    finally:
        denoiser.embeddings = table
    return shift.detach()


def shift_embeddings(denoiser: TextDenoiser, shift: torch.Tensor) -> None:
    """Add ``shift`` (L, D) to the embedding of every prompt but the empty one, from here on."""
    table = denoiser.embeddings[EMBEDDING]
    moved = table + shift.to(table)
    moved[denoiser.null_label] = table[denoiser.null_label]
    denoiser.embeddings = {**denoiser.embeddings, EMBEDDING: moved}
