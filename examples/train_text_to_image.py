"""Train a small Stable Diffusion from nothing, on images with captions: UNet and text encoder together.

The dolls' model, after ``train_autoencoder.py`` made dolls-vae/vae:

    python examples/train_text_to_image.py --train_data crawl_dolls_32.npz --caption_column captions \
        --vae dolls-vae/vae --tokenizer clip_tokenizer --output_dir dolls-sd

``--tokenizer`` is a folder with CLIP's vocab.json and merges.txt, which is cut to the words of the captions. The last
twentieth of the images is held out. Interrupted runs go on with ``--resume_from_checkpoint latest``.
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
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vdu_peft.data import ImageSource
from vdu_peft.pictures import image_grid
from vdu_peft.processes import check_processes
from vdu_peft.text_denoiser import TextDenoiser

logger = logging.getLogger(__name__)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data", required=True, help="folder of images, .npz file, or hub dataset id")
    parser.add_argument("--image_column", help="array name in an .npz, or image column of a hub dataset")
    parser.add_argument("--caption_column", required=True, help="as of vdu-peft unlearn")
    parser.add_argument("--vae", required=True, help="AutoencoderKL folder or hub id")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=(96, 128))
    parser.add_argument("--text_channels", type=int, default=128)
    parser.add_argument("--text_layers", type=int, default=2)
    parser.add_argument("--max_caption_tokens", type=int, default=36)
    parser.add_argument("--caption_dropout", type=float, default=0.1, help="share of images shown without caption")
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--max_train_steps", type=int, default=6500)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_scheduler", default="cosine", help="a name that diffusers' get_scheduler knows")
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--checkpointing_steps", type=int, default=1000, help="also writes the pipeline and a grid")
    parser.add_argument("--resume_from_checkpoint", choices=("latest",))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def cut_tokenizer(source: Path, captions: list[str], folder: Path, max_tokens: int) -> CLIPTokenizer:
    """CLIP's tokenizer with the tokens that the captions need, and all single bytes for whatever else is asked for.

    The captions' tokens are those of the whole tokenizer: byte pairs are merged in the order of merges.txt, and the
    merges that these words go through are all kept. So are their pieces', which the words are made of.
    """
    whole = CLIPTokenizer.from_pretrained(source)
    header, *lines = (source / "merges.txt").read_text(encoding="utf-8").splitlines()
    made_of = {"".join(pair): pair for pair in (tuple(line.split()) for line in lines if line.strip())}
    specials = {whole.bos_token, whole.eos_token}
    needed = {token for caption in captions for token in whole.tokenize(caption)} - specials
    queue = [token for token in needed if token in made_of]
    while queue:
        for piece in made_of[queue.pop()]:
            if piece not in needed:
                needed.add(piece)
                queue += [piece] if piece in made_of else []
    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    kept = [t for t in sorted(vocabulary, key=vocabulary.get) if t in needed | specials or t not in made_of]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(kept)}), encoding="utf-8")
    merges = [" ".join(pair) for token, pair in made_of.items() if token in needed]
    (folder / "merges.txt").write_text("\n".join([header, *merges]) + "\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_tokens)


def build_pipeline(args: argparse.Namespace, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline whose UNet and text encoder are new, with v-prediction and SD's noise schedule."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.text_channels,
            intermediate_size=4 * args.text_channels,
            num_hidden_layers=args.text_layers,
            num_attention_heads=4,
            max_position_embeddings=args.max_caption_tokens,
            projection_dim=args.text_channels,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    depth = len(args.block_out_channels)
    unet = UNet2DConditionModel(
        sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=tuple(args.block_out_channels),
        down_block_types=("CrossAttnDownBlock2D",) * depth,
        up_block_types=("CrossAttnUpBlock2D",) * depth,
        layers_per_block=1,
        cross_attention_dim=args.text_channels,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class TextAndUNet(torch.nn.Module):
    """Both trained modules behind one forward: (x_t, timesteps, token ids (N, L)) → prediction (N, C, h, w)."""

    def __init__(self, pipeline: StableDiffusionPipeline):
        super().__init__()
        self.text_encoder, self.unet = pipeline.text_encoder, pipeline.unet

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return self.unet(x_t, timesteps, encoder_hidden_states=self.text_encoder(input_ids)[0]).sample


def main(argv=None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        project_config=ProjectConfiguration(args.output_dir, automatic_checkpoint_naming=True, total_limit=1)
    )
    check_processes(accelerator)
    set_seed(args.seed, device_specific=True)  # processes must not draw the same noise
    source = ImageSource(args.train_data, image_column=args.image_column, caption_column=args.caption_column)
    vae = AutoencoderKL.from_pretrained(args.vae, use_safetensors=True).to(accelerator.device)
    captions = source.captions()
    tokenizer = cut_tokenizer(args.tokenizer, captions, args.output_dir / "tokenizer", args.max_caption_tokens)
    pipeline = build_pipeline(args, vae, tokenizer)
    images = source.load((vae.config.sample_size,) * 2, vae.config.in_channels)
    held_out = max(len(images) // 20, 1)
    if len(images) - held_out < args.train_batch_size * accelerator.num_processes:
        raise SystemExit(f"--train_batch_size {args.train_batch_size}: there are only {len(images)} images; lower it")
    with torch.no_grad():
        modes = [vae.encode(batch.to(vae.device)).latent_dist.mode().cpu() for batch in images[:-held_out].split(64)]
    latents = (torch.cat(modes) - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    input_ids = tokenizer(captions[:-held_out], **options).input_ids
    empty_ids = tokenizer([""], **options).input_ids.to(accelerator.device)
    loader = DataLoader(
        TensorDataset(latents, input_ids), batch_size=args.train_batch_size, shuffle=True, drop_last=True
    )

    network = TextAndUNet(pipeline).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=0.0)
    # accelerate steps the schedule once for every process.
    warmup, steps = (n * accelerator.num_processes for n in (args.lr_warmup_steps, args.max_train_steps))
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    network, optimizer, loader, lr_scheduler = accelerator.prepare(network, optimizer, loader, lr_scheduler)
    ema = EMAModel(network.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state()
        ema.to(accelerator.device)  # what was loaded is on the CPU
        step = accelerator.step
        accelerator.project_configuration.iteration = step // args.checkpointing_steps
    logger.info("%d images, %d parameters", len(latents), sum(p.numel() for p in network.parameters()))
    log = (args.output_dir / "train_log.jsonl").open("a") if accelerator.is_main_process else None
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_main_process, mininterval=5)
    losses = []
    while step < args.max_train_steps:
        for clean, ids in loader:
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, pipeline.scheduler.config.num_train_timesteps, (len(clean),)).to(clean.device)
            dropped = torch.rand(len(ids), 1, device=ids.device) < args.caption_dropout
            prediction = network(
                pipeline.scheduler.add_noise(clean, noise, timesteps), timesteps, ids.where(~dropped, empty_ids)
            )
            loss = F.mse_loss(prediction.float(), pipeline.scheduler.get_velocity(clean, noise, timesteps))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            ema.step(network.parameters())
            step += 1
            progress.update()
            losses.append(loss.item())
            if step % 50 == 0 and log is not None:
                mean = sum(losses) / len(losses)
                progress.set_postfix(loss=f"{mean:.4f}")
                log.write(json.dumps({"step": step, "loss": mean, "lr": lr_scheduler.get_last_lr()[0]}) + "\n")
                log.flush()
                losses = []
            if step % args.checkpointing_steps == 0 or step == args.max_train_steps:
                accelerator.step = step
                accelerator.save_state()
                if accelerator.is_main_process:
                    ema.store(network.parameters())
                    ema.copy_to(network.parameters())
                    write_pipeline(pipeline, captions[-held_out:], args)
                    ema.restore(network.parameters())
            if step == args.max_train_steps:
                break


def write_pipeline(pipeline: StableDiffusionPipeline, held_out: list[str], args: argparse.Namespace) -> None:
    """Write a fp16 pipeline, with the command's options, the held-out captions and samples of some beside it."""
    folder, fresh = args.output_dir / "pipeline", args.output_dir / "pipeline.tmp"
    pipeline.unet.eval(), pipeline.text_encoder.eval()
    denoiser = TextDenoiser(pipeline, held_out[:32])
    labels = [denoiser.label(caption) for caption in held_out[:32]]
    shown = denoiser.sample(32, seed=args.seed, class_labels=labels, guidance_scale=2.0)
    image_grid(shown, columns=8, scale=3).save(args.output_dir / "samples.png")
    pipeline.unet.train(), pipeline.text_encoder.train()
    halves = {}
    for name in ("unet", "vae", "text_encoder"):
        module = getattr(pipeline, name)
        halves[name] = (
            type(module)(module.config) if name == "text_encoder" else type(module).from_config(module.config)
        )
        halves[name].load_state_dict(module.state_dict())
        halves[name].half()
    type(pipeline)(**{**pipeline.components, **halves}, requires_safety_checker=False).save_pretrained(fresh)
    (fresh / "train_config.json").write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    (fresh / "held_out_captions.txt").write_text("\n".join(held_out) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


if __name__ == "__main__":
    main()
