"""Train a small AutoencoderKL: the first half of a small Stable Diffusion.

The dolls' (32x32 images to 8x8 latents of 8 channels; then see train_text_to_image.py):

    python examples/train_autoencoder.py --train_data crawl_dolls_32.npz --output_dir dolls-vae

Its decoder alone can be trained further, while what learns from its latents goes on:

    python examples/train_autoencoder.py --train_data crawl_dolls_32.npz --decoder_of dolls-vae/vae \
        --output_dir dolls-vae-decoder

Interrupted runs go on with ``--resume_from_checkpoint latest``.
"""

import argparse
import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vdu_peft.data import ImageDataset, ImageSource
from vdu_peft.pictures import labelled_grids
from vdu_peft.processes import check_processes

logger = logging.getLogger(__name__)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data", required=True, help="folder of images, .npz file, or hub dataset id")
    parser.add_argument("--image_column", help="array name in an .npz, or image column of a hub dataset")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--decoder_of", help="AutoencoderKL folder or hub id, whose encoder stays as it is")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--latent_channels", type=int, default=8)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=(24, 48, 64), help="each but one halves")
    parser.add_argument("--kl_weight", type=float, default=1e-3, help="of the KL (nats) per number of a latent")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--max_train_steps", type=int, default=5000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=100)
    parser.add_argument("--checkpointing_steps", type=int, default=500, help="also writes the autoencoder and a grid")
    parser.add_argument("--resume_from_checkpoint", choices=("latest",))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build_vae(resolution: int, latent_channels: int, block_out_channels) -> AutoencoderKL:
    """Without attention: what a small image's patches hold is local."""
    depth = len(block_out_channels)
    return AutoencoderKL(
        sample_size=resolution,
        latent_channels=latent_channels,
        block_out_channels=tuple(block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def autoencoder_loss(
    vae: AutoencoderKL, images: torch.Tensor, kl_weight: float, decoder_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, mean absolute error) of images (N, 3, H, W) in [-1, 1]: error per number + kl_weight · KL per number.

    With ``decoder_only`` the error alone, of the latents' means: what denoising ends at.
    """
    if decoder_only:
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
        error = (vae.decode(latents).sample - images).abs().mean()
        return error, error
    posterior = vae.encode(images).latent_dist
    error = (vae.decode(posterior.sample()).sample - images).abs().mean()
    return error + kl_weight * posterior.kl().mean() / posterior.mean[0].numel(), error


@torch.no_grad()
def write_vae(vae: AutoencoderKL, images: torch.Tensor, folder: Path, decoder_only: bool) -> None:
    """The autoencoder with its latents' scale in its config, and a grid of images beside their reconstructions."""
    vae.eval()
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(64)])
    if not decoder_only:  # what learned from the latents knows them at this scale
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder / "vae", safe_serialization=True)
    shown = vae.decode(latents[:40]).sample
    labelled_grids({"images": images[:40].cpu(), "reconstructions": shown.cpu()}).save(folder / "reconstructions.png")
    error = (torch.cat([vae.decode(z).sample for z in latents.split(64)]).clamp(-1, 1) - images).square().mean()
    logger.info("held-out PSNR %.1f dB", 10 * torch.log10(4 / error).item())
    vae.train()


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        project_config=ProjectConfiguration(args.output_dir, automatic_checkpoint_naming=True, total_limit=1)
    )
    check_processes(accelerator)
    if accelerator.num_processes > 1:
        raise SystemExit("the autoencoder is small: train it in one process")
    set_seed(args.seed)
    images = ImageSource(args.train_data, image_column=args.image_column).load((args.resolution,) * 2, 3)
    # The last images are held out, as train_text_to_image.py has it.
    count = len(images) - max(len(images) // 20, 1)
    if count < args.train_batch_size:
        raise SystemExit(f"--train_batch_size {args.train_batch_size}: there are only {len(images)} images; lower it")
    images, held_out = images[:count], images[count:].to(accelerator.device)
    loader = DataLoader(ImageDataset(images), batch_size=args.train_batch_size, shuffle=True, drop_last=True)
    if args.decoder_of:
        vae = AutoencoderKL.from_pretrained(args.decoder_of, use_safetensors=True).train()
    else:
        vae = build_vae(args.resolution, args.latent_channels, args.block_out_channels)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()] if args.decoder_of else vae.parameters()
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, args.max_train_steps)
    vae.to(accelerator.device)
    optimizer, loader, lr_scheduler = accelerator.prepare(optimizer, loader, lr_scheduler)
    accelerator.register_for_checkpointing(vae)
    step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state()
        step = accelerator.step
        accelerator.project_configuration.iteration = step // args.checkpointing_steps
    logger.info("%d images, %d parameters", len(images), sum(p.numel() for p in vae.parameters()))
    progress = tqdm(total=args.max_train_steps, initial=step, mininterval=5)
    while step < args.max_train_steps:
        for batch in loader:
            loss, error = autoencoder_loss(vae, batch, args.kl_weight, decoder_only=bool(args.decoder_of))
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            step += 1
            progress.update()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}", error=f"{error.item():.4f}")
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                accelerator.step = step
                accelerator.save_state()
                write_vae(vae, held_out, args.output_dir, decoder_only=bool(args.decoder_of))
            if step == args.max_train_steps:
                break


if __name__ == "__main__":
    main()
