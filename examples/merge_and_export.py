"""From a base model and an unlearning adapter to what is released: a merged pipeline, and a plain LoRA beside it.

    python examples/merge_and_export.py --model path/or/hub-id --adapter out/adapter --output_dir release

writes ``release/pipeline`` (complete, safetensors, the adapter cannot be taken off) and ``release/lora`` (the posterior
mean, for stock PEFT), and draws the same samples from both with stock libraries to show that they agree.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from peft import PeftModel

from vdu_peft import Denoiser, export_lora, merge


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline folder or hub id of the base model")
    parser.add_argument("--adapter", required=True, help="folder of the saved adapter")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="the base's own when left out")
    parser.add_argument("--num_images", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def draw(unet, scheduler, args) -> torch.Tensor:
    """Samples (N, C, H, W) in [0, 1] of stock diffusers."""
    pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]
    images = pipeline(
        batch_size=args.num_images,
        generator=generators,
        num_inference_steps=args.num_inference_steps,
        output_type="np",
    ).images
    return torch.from_numpy(images).movedim(-1, 1)


def main(argv=None) -> float:
    """Returns the largest difference of a pixel between the two exports' samples, in [0, 1]."""
    args = parse_args(argv)
    merge(args.model, args.adapter, args.output_dir / "pipeline", args.dtype)
    export_lora(args.adapter, args.output_dir / "lora")
    merged = DDPMPipeline.from_pretrained(args.output_dir / "pipeline")
    base = Denoiser.from_pretrained(args.model)
    with_lora = PeftModel.from_pretrained(base.model, args.output_dir / "lora").get_base_model()
    difference = (draw(merged.unet, merged.scheduler, args) - draw(with_lora, base.scheduler, args)).abs().max().item()
    print(
        f"wrote {args.output_dir}; the pipeline's samples and the LoRA's differ by at most {difference:.1e} of [0, 1]"
    )
    return difference


if __name__ == "__main__":
    main()
