"""How well the dolls' base model follows held-out captions, by the judge; beside what its VAE alone would allow.

python -m benchmarks.text.base --num_images 400
"""

import argparse
from pathlib import Path

import torch

from benchmarks.text.dolls import FOLDER, Dolls
from benchmarks.text.run import SAMPLE_STEPS
from vdu_peft.pictures import image_grid
from vdu_peft.pixels import to_tensor
from vdu_peft.prompt_file import EvaluationPrompt, seeded
from vdu_peft.text_evaluation import attribute_accuracy, draw


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, default=FOLDER, help="with pipeline/, judge.safetensors, dolls.npz")
    parser.add_argument("--num_images", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_file", type=Path, help="gets a grid of the first 32 images")
    args = parser.parse_args(argv)
    dolls = Dolls(args.model_dir)
    rows = range(dolls.count, len(dolls.images))[: args.num_images]
    prompts = [EvaluationPrompt(dolls.captions[i], attributes=dolls.attributes[i]) for i in rows]
    denoiser = dolls.denoiser([prompt.text for prompt in prompts])
    real = torch.stack([to_tensor(dolls.images[i], denoiser.image_size, 3) for i in rows])
    prompts = seeded(prompts, args.seed)
    drawn = draw(denoiser, prompts, num_inference_steps=SAMPLE_STEPS, progress="held-out captions")
    kinds = {"real images": real, "their reconstructions": denoiser.decode(denoiser.encode(real)), "drawn": drawn}
    sampler = f"DDIM, {SAMPLE_STEPS} steps, guidance {denoiser.guidance_scale}, seed {args.seed}"
    print(f"{len(prompts)} held-out captions; {sampler}")
    print("| | " + " | ".join(dolls.judge.attributes) + " |\n" + "|---" * (len(dolls.judge.attributes) + 1) + "|")
    for kind, images in kinds.items():
        _, found = dolls.judge.judge(images)
        cells = [f"{attribute_accuracy(found, prompts, [name]):.1%}" for name in dolls.judge.attributes]
        print("| " + " | ".join([kind, *cells]) + " |")
    if args.output_file:
        image_grid(drawn[:32], columns=8, scale=3).save(args.output_file)


if __name__ == "__main__":
    main()
