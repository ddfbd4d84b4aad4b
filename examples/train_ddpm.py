"""Train a small DDPM in diffusers format, unconditional or by class: for the demo, the benchmarks or your own images.

MNIST at 28x28, 1.8 M parameters (the demo's own model took two runs, see the card in ``vdu_peft/assets/mnist``):

    python examples/train_ddpm.py --train_data mnist.npz --image_column train_images \
        --resolution 28 --channels 1 --output_dir mnist-ddpm

Its class-conditional twin, whose last label stands for "any class":

    python examples/train_ddpm.py --train_data mnist.npz --image_column train_images --label_column train_labels \
        --class_conditional --resolution 28 --channels 1 --output_dir mnist-ddpm-classes

With options from a file, one on each line, which the command line wins over. MNIST at 16x16, whole and without a digit,
and CIFAR-10 are bases of the benchmarks:

    python examples/train_ddpm.py @examples/configs/ddpm-mnist16.txt --train_data mnist.npz --output_dir mnist16
    python examples/train_ddpm.py @examples/configs/ddpm-mnist16.txt --train_data mnist.npz --output_dir mnist16-no-3 \
        --label_column train_labels --labels 0 1 2 4 5 6 7 8 9
    python examples/train_ddpm.py @examples/configs/ddpm-cifar10.txt --train_data uoft-cs/cifar10 --image_column img \
        --output_dir cifar10

Interrupted runs go on with ``--resume_from_checkpoint latest``.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from torch.utils.data import DataLoader, StackDataset
from tqdm.auto import tqdm

from vdu_peft.data import ImageDataset, ImageSource
from vdu_peft.denoiser import Denoiser, plain_attention_on_cpu
from vdu_peft.pictures import image_grid
from vdu_peft.processes import check_processes

logger = logging.getLogger(__name__)

# Of a timestep under --debiased_estimation: where 1 % of the signal is left.
MAX_WEIGHT = 10.0


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.add_argument("--train_data", required=True, help="folder of images, .npz file, or hub dataset id")
    parser.add_argument("--image_column", help="array name in an .npz, or image column of a hub dataset")
    parser.add_argument("--label_column", help="array name or column of the labels, for --labels")
    parser.add_argument("--labels", nargs="*", default=(), help="train on these classes only")
    parser.add_argument("--class_conditional", action="store_true", help="condition on the labels of --label_column")
    parser.add_argument("--label_dropout", type=float, default=0.1, help="share of images shown under the null class")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pretrained_model_name_or_path", help="pipeline folder or hub id to start from")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=(32, 64, 96))
    parser.add_argument("--layers_per_block", type=int, default=1)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--max_train_steps", type=int, default=8000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--debiased_estimation", action="store_true", help="weight each timestep by 1 / sqrt(SNR)")
    parser.add_argument("--random_flip", action="store_true")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--checkpointing_steps", type=int, default=1000, help="also writes a sample grid")
    parser.add_argument("--resume_from_checkpoint", choices=("latest",))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build_unet(
    resolution: int, channels: int, block_out_channels, layers_per_block: int, num_class_embeds: int | None = None
) -> UNet2DModel:
    """A UNet2DModel with self-attention at its lowest resolution only."""
    depth = len(block_out_channels) - 1
    return UNet2DModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D",) * depth + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * depth,
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=num_class_embeds,
    )


def denoising_loss(
    noise_pred: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, scheduler, debiased: bool = False
) -> torch.Tensor:
    """Mean squared error in the noise per number, of (N, C, H, W) and (N,) timesteps: a scalar, float32.

    With ``debiased``, weights 1 / sqrt(SNR), at most MAX_WEIGHT (Yu et al., "Debias the Training of Diffusion
    Models", arXiv 2310.08442): unweighted, nearly clean images make up most of the loss, whose noise a small model
    never gets quite right; what an image shows is decided at higher noise, where the loss is small.
    """
    losses = F.mse_loss(noise_pred.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
    if debiased:
        losses = losses * compute_snr(scheduler, timesteps).rsqrt().clamp(max=MAX_WEIGHT)
    return losses.mean()


def sample_grid(unet: UNet2DModel, scheduler: DDPMScheduler, seed: int, rows: int = 8):
    """rows x rows samples, DDIM 25 steps; of a class-conditional model every class in turn, the null class last."""
    classes = unet.config.num_class_embeds
    labels = None if classes is None else range(classes)
    images = Denoiser(unet, scheduler).sample(rows * rows, seed=seed, class_labels=labels)
    return image_grid(images, columns=rows)


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        project_config=ProjectConfiguration(args.output_dir, automatic_checkpoint_naming=True, total_limit=2),
    )
    check_processes(accelerator)
    set_seed(args.seed, device_specific=True)  # processes must not draw the same noise
    source = ImageSource(
        args.train_data, image_column=args.image_column, label_column=args.label_column, labels=tuple(args.labels)
    )
    size, num_classes = (args.resolution, args.resolution), None
    if args.class_conditional:
        images, labels = source.load_labelled(size, args.channels)
        num_classes = int(labels.max()) + 2  # the last one is the null class
    else:
        images = source.load(size, args.channels)
        labels = torch.zeros(len(images), dtype=torch.int64)  # not shown to the model
    if len(images) < args.train_batch_size * accelerator.num_processes:
        raise SystemExit(f"--train_batch_size {args.train_batch_size}: there are only {len(images)} images; lower it")
    dataset = StackDataset(ImageDataset(images, images.flip(-1) if args.random_flip else None), labels)
    loader = DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True, drop_last=True)
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type="epsilon", clip_sample=True)
    if args.pretrained_model_name_or_path:
        start = Denoiser.from_pretrained(args.pretrained_model_name_or_path)
        expected = (size, args.channels, num_classes, scheduler.config.prediction_type)
        if (start.image_size, start.channels, start.num_classes, start.prediction_type) != expected:
            raise SystemExit(
                f"{args.pretrained_model_name_or_path}: its size, channels, classes and prediction type are "
                f"{start.image_size}, {start.channels}, {start.num_classes} and {start.prediction_type}, not {expected}"
            )
        unet, scheduler = start.model.train(), start.scheduler
    else:
        unet = build_unet(
            args.resolution, args.channels, args.block_out_channels, args.layers_per_block, num_class_embeds=num_classes
        )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate, weight_decay=0.0)
    # accelerate steps the schedule once for every process.
    schedule = [steps * accelerator.num_processes for steps in (args.lr_warmup_steps, args.max_train_steps)]
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, *schedule)
    plain_attention_on_cpu(unet.to(accelerator.device))
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    ema = EMAModel(accelerator.unwrap_model(unet).parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state()
        ema.to(accelerator.device)  # what was loaded is on the CPU
        step = accelerator.step
        accelerator.project_configuration.iteration = step // args.checkpointing_steps
    logger.info("%d images, %d parameters", len(images), sum(p.numel() for p in unet.parameters()))
    log = (args.output_dir / "train_log.jsonl").open("a") if accelerator.is_main_process else None
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process, mininterval=5)
    while step < args.max_train_steps:
        for clean, labels in loader:
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
            condition = {}
            if num_classes is not None:
                dropped = torch.rand(len(labels), device=labels.device) < args.label_dropout
                condition["class_labels"] = labels.masked_fill(dropped, num_classes - 1)
            noise_pred = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, **condition).sample
            loss = denoising_loss(noise_pred, noise, timesteps, scheduler, args.debiased_estimation)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            ema.step(accelerator.unwrap_model(unet).parameters())
            step += 1
            progress.update()
            if step % 50 == 0 and log is not None:
                progress.set_postfix(loss=f"{loss.item():.4f}")
                log.write(json.dumps({"step": step, "loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0]}) + "\n")
                log.flush()
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                accelerator.step = step
                accelerator.save_state()
                if accelerator.is_main_process:
                    write_pipeline(accelerator.unwrap_model(unet), ema, scheduler, args, accelerator.num_processes)
            if step == args.max_train_steps:
                break


def write_pipeline(
    unet: UNet2DModel, ema: EMAModel, scheduler: DDPMScheduler, args: argparse.Namespace, num_processes: int
) -> None:
    """Write the EMA weights as a fp16 diffusers pipeline, with the command's options and a sample grid beside it."""
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    sample_grid(unet, scheduler, args.seed).save(args.output_dir / "samples.png")
    folder, fresh = args.output_dir / "pipeline", args.output_dir / "pipeline.tmp"
    # Without what starts with "_": where a network that was trained on came from is a path of this machine.
    half = UNet2DModel.from_config({k: v for k, v in unet.config.items() if not k.startswith("_")})
    half.load_state_dict(unet.state_dict())
    DDPMPipeline(half.half(), scheduler).save_pretrained(fresh, safe_serialization=True)
    options = {**vars(args), "num_processes": num_processes}
    (fresh / "train_config.json").write_text(json.dumps(options, indent=2, default=str) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    ema.restore(unet.parameters())


if __name__ == "__main__":
    main()
