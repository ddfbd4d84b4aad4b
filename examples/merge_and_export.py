"""From a base model and an unlearning adapter to what is released: a merged pipeline, and a plain LoRA beside it.

    python examples/merge_and_export.py --model path/or/hub-id --adapter out/adapter --output_dir release

writes ``release/pipeline`` (complete, safetensors, the adapter cannot be taken off) and ``release/lora`` (the posterior
mean; of a text-to-image model for a pipeline's ``load_lora_weights``, else for stock PEFT), loads both back with the
stock libraries, and draws from both to show that they agree.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel

from vdu_peft import Denoiser, TextDenoiser, export_lora, merge
from vdu_peft.atomic_folder import check_output
from vdu_peft.text_denoiser import open_denoiser


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline folder or hub id of the base model")
    parser.add_argument("--adapter", required=True, help="folder of the saved adapter")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace what is in an existing output_dir")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="the base's own when left out")
    parser.add_argument("--prompt", help="of a text-to-image model: what to draw; none when left out")
    parser.add_argument("--num_images", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def release(args: argparse.Namespace) -> tuple[Denoiser, Denoiser]:
    """Write both, and load both back: (the merged model, the base with the plain LoRA)."""
    if args.num_images < 1:
        raise ValueError(f"num_images must be at least 1, not {args.num_images}")
    check_output(args.output_dir, [], args.overwrite)
    base = open_denoiser(args.model, [args.prompt or ""])
    is_text = isinstance(base, TextDenoiser)
    if args.prompt is not None and not is_text:
        raise ValueError(f"prompt: {args.model} is not a text-to-image model; leave it out")
    merge(args.model, args.adapter, args.output_dir / "pipeline", args.dtype, overwrite=True)
    export_lora(args.adapter, args.output_dir / "lora", "diffusers" if is_text else "peft", overwrite=True)
    merged = DiffusionPipeline.from_pretrained(args.output_dir / "pipeline")
    if is_text:
        base.pipeline.load_lora_weights(args.output_dir / "lora")
        return TextDenoiser(merged, [args.prompt or ""]), base
    PeftModel.from_pretrained(base.model, args.output_dir / "lora")
    return Denoiser(merged.unet, merged.scheduler), base


def draw(denoiser: Denoiser, args: argparse.Namespace) -> torch.Tensor:
    """Samples (N, C, H, W) in [-1, 1]; of a class-conditional model every class in turn."""
    if isinstance(denoiser, TextDenoiser):
        labels = [denoiser.label(args.prompt or "")]
    else:
        labels = range(denoiser.num_classes) if denoiser.num_classes else None
    steps = args.num_inference_steps
    return denoiser.sample(args.num_images, seed=args.seed, num_inference_steps=steps, class_labels=labels)


def main(argv=None) -> float:
    """Returns the largest difference of a pixel between the two exports' samples, of a range of 2."""
    args = parse_args(argv)
    try:
        merged, with_lora = release(args)
        difference = (draw(merged, args) - draw(with_lora, args)).abs().max().item()
    except ValueError as error:  # bad input: the message names it and the mend
        print(f"merge_and_export.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.output_dir}; samples of both differ by at most {difference:.1e} of a range of 2")
    return difference


if __name__ == "__main__":
    main()
