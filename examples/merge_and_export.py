"""From a base model and an unlearning adapter to what is released: a merged pipeline, and a plain LoRA beside it.

    python examples/merge_and_export.py --model path/or/hub-id --adapter out/adapter --output_dir release

writes ``release/pipeline`` (complete, safetensors, the adapter cannot be taken off) and ``release/lora`` (the posterior
mean, for stock PEFT), loads both back with the stock libraries, and draws from both to show that they agree.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline
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
    """Samples (N, C, H, W) in [-1, 1]; of a class-conditional model every class in turn."""
    denoiser = Denoiser(unet, scheduler)
    classes = denoiser.num_classes
    labels = range(classes) if classes else None
    steps = args.num_inference_steps
    return denoiser.sample(args.num_images, seed=args.seed, num_inference_steps=steps, class_labels=labels)


def main(argv=None) -> float:
    """Returns the largest difference of a pixel between the two exports' samples, of a range of 2."""
    args = parse_args(argv)
    merge(args.model, args.adapter, args.output_dir / "pipeline", args.dtype)
    export_lora(args.adapter, args.output_dir / "lora")
    merged = DDPMPipeline.from_pretrained(args.output_dir / "pipeline")
    base = Denoiser.from_pretrained(args.model)
    with_lora = PeftModel.from_pretrained(base.model, args.output_dir / "lora").get_base_model()
    difference = (draw(merged.unet, merged.scheduler, args) - draw(with_lora, base.scheduler, args)).abs().max().item()
    print(f"wrote {args.output_dir}; samples of both differ by at most {difference:.1e} of a range of 2")
    return difference


if __name__ == "__main__":
    main()
