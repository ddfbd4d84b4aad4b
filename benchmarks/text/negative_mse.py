"""Few-shot erasing: the text encoder climbs the denoising loss of the forget images under their captions.

After Fuchi and Takagi 2024, "Erasing Concepts from Text-to-Image Diffusion Models with Few-shot Unlearning". The
encoder's MLPs and its last attention are trained: what their code (fmp453/few-shot-erasing) means to do, though its
``require_grad = False`` freezes nothing. As there the loss is on what the network predicts, noise or v. Nothing bounds
it but the number of steps. Their learning rate is 1e-5.
"""

import torch
from accelerate.utils import set_seed

from benchmarks.text.task import TextTask
from vdu_peft.batch import draw_indices


def negative_mse(task: TextTask, learning_rate: float, steps: int, batch_size: int) -> str:
    denoiser, pipeline = task.denoiser, task.denoiser.pipeline
    encoder = pipeline.text_encoder.requires_grad_(False)
    denoiser.model.requires_grad_(False)
    places = (".mlp.", f".layers.{encoder.config.num_hidden_layers - 1}.self_attn.")
    trained = [p for name, p in encoder.named_parameters() if any(place in name for place in places)]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    latents, tables = denoiser.encode(task.forget), denoiser.embeddings
    length = pipeline.tokenizer.model_max_length
    tokens = pipeline.tokenizer(task.captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
    for step in range(steps):
        set_seed((task.seed * 1_000_003 + step) % 2**32)
        rows = draw_indices(len(latents), batch_size)
        noise = torch.randn(batch_size, *denoiser.latent_shape)
        timesteps = torch.randint(denoiser.num_train_timesteps, (batch_size,))
        denoiser.embeddings = {"encoder_hidden_states": encoder(tokens[rows])[0]}
        x_t = denoiser.add_noise(latents[rows], noise, timesteps)
        error = denoiser.noise_pred(x_t, timesteps, torch.arange(batch_size)) - noise
        loss = -denoiser.schedule.own_error(error, timesteps).square().mean()
        if not torch.isfinite(loss):
            return "not finite"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    denoiser.embeddings = tables
    encoder.requires_grad_(False)
    return "done"
