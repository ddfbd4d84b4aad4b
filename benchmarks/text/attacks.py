"""Attack the unlearned text-to-image models: how often does what was forgotten come out all the same?

    python -m benchmarks.text.attacks --concepts sword vampire --methods base ours uce

Needs the pipelines that ``benchmarks.text.run`` leaves beside its results. Every attack on every model writes into one
result; models that have one are not attacked again.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed

from benchmarks.bases import BaseError
from benchmarks.results import StaleResultError, check_current, write_result
from benchmarks.run import code_version, environment
from benchmarks.text.dolls import CONCEPTS, Dolls, base_digest
from benchmarks.text.run import (
    METHODS,
    NUM_FORGET,
    SAMPLE_STEPS,
    add_arguments,
    list_missing,
    missing_results,
    result_file,
)
from benchmarks.text.run import spec_of as model_spec
from benchmarks.text.task import make_task
from vdu_peft.attack import embedding_attack, shift_embeddings
from vdu_peft.pictures import labelled_grids
from vdu_peft.prompt_file import EvaluationPrompt, Target, seeded
from vdu_peft.text_denoiser import TextDenoiser
from vdu_peft.text_evaluation import draw

NAME = "dolls-attacks"
NUM_IMAGES = 60
# In forms that no caption has; what else they name is in many images without the target.
PARAPHRASES = ("{}", "{0} {0} {0}", "holding a torch, {}", "wearing a gold crown, a {}", "a torch and a {} and a mummy")
ATTACK_STEPS = 150
# Of the embedding attack and of relearning; earlier results are of losses on the noise.
LOSS = "on the network's own prediction"
NUM_RELEARN_IMAGES, RELEARN_STEPS, RELEARN_LEARNING_RATE = 5, (10, 30, 100), 1e-4


def attack(concept: str, method: str, seed: int, results: Path, folder: Path, commit: str) -> None:
    """All attacks on one model, ``base`` or what a method made of it."""
    dolls, forgotten = Dolls(folder), CONCEPTS[concept]
    (target,) = forgotten.targets
    unlearned = folder if method == "base" else result_file(concept, method, seed, results).with_suffix("")
    task = make_task(dolls, forgotten, NUM_FORGET, 1, seed)
    held_out = [prompt.text for prompt in dolls.evaluation_prompts(forgotten, NUM_IMAGES, 0)]
    phrases = [form.format(value) for value in target.values for form in PARAPHRASES]
    phrases = [phrases[i % len(phrases)] for i in range(NUM_IMAGES)]
    denoiser = dolls.denoiser([*task.captions, *held_out, *phrases], unlearned / "pipeline")
    labels = torch.tensor([denoiser.label(caption) for caption in task.captions])
    images = {
        "held-out prompts": sampled(denoiser, held_out, seed),
        "no prompt": sampled(denoiser, [""] * NUM_IMAGES, seed),
        "paraphrases": sampled(denoiser, phrases, seed),
    }
    embeddings = denoiser.embeddings
    shift = embedding_attack(denoiser, task.forget, labels, steps=ATTACK_STEPS, seed=seed, progress="embedding")
    shift_embeddings(denoiser, shift)
    images["embedding"] = sampled(denoiser, held_out, seed)
    denoiser.embeddings = embeddings
    rows = slice(NUM_RELEARN_IMAGES)
    for step in relearned(denoiser, task.forget[rows], labels[rows], seed):
        images[f"relearning, {step} steps"] = sampled(denoiser, held_out, seed)
    record = {
        "concept": concept,
        "method": method,
        "seed": seed,
        "base_model": dolls.base_model,
        **spec_of(method),
        "sampler": f"DDIM, {SAMPLE_STEPS} steps, guidance {denoiser.guidance_scale}, seed {seed + 1}",
        "shown": {name: share_shown(drawn, target, dolls) for name, drawn in images.items()},
        "environment": environment(commit),
    }
    file = attack_file(concept, method, seed, results)
    file.parent.mkdir(parents=True, exist_ok=True)
    grids = {name: drawn[:20] for name, drawn in images.items()}
    labelled_grids(grids, columns=4).save(file.with_suffix(".png"))
    write_result(file, record)


def spec_of(method: str) -> dict:
    """What a result depends on besides concept, seed and code; it is stored with it."""
    return {
        "model": {} if method == "base" else model_spec(method),
        "num_images": NUM_IMAGES,
        "embedding_attack": {"steps": ATTACK_STEPS, "images": NUM_FORGET, "loss": LOSS},
        "relearning": {"images": NUM_RELEARN_IMAGES, "learning_rate": RELEARN_LEARNING_RATE, "loss": LOSS},
    }


def attack_file(concept: str, method: str, seed: int, results: Path) -> Path:
    return results / NAME / f"{method}-{concept}-{seed}.json"


def sampled(denoiser: TextDenoiser, prompts: list[str], seed: int) -> torch.Tensor:
    """Images of prompts, as the benchmark draws them; the empty one is drawn without guidance away from itself."""
    rows = [EvaluationPrompt(prompt) for prompt in prompts]
    return draw(denoiser, seeded(rows, seed + 1), num_inference_steps=SAMPLE_STEPS)


def share_shown(images: torch.Tensor, target: Target, dolls: Dolls) -> float:
    """Share of the images in which the judge sees the target."""
    found = dolls.judge.judge(images)[1][target.attribute]
    return sum(value in target.values for value in found) / len(found)


def relearned(denoiser: TextDenoiser, images: torch.Tensor, labels: torch.Tensor, seed: int):
    """Fine-tune the whole network on a few images of the target with their captions; yields at ``RELEARN_STEPS``.

    On the loss that it was trained on: the error of its own prediction.
    """
    latents = denoiser.encode(images)
    denoiser.model.requires_grad_(True)
    optimizer = torch.optim.Adam(denoiser.model.parameters(), lr=RELEARN_LEARNING_RATE)
    for step in range(1, RELEARN_STEPS[-1] + 1):
        # Another seed: who relearns does not have the noise and timesteps that unlearning had.
        set_seed(((seed + 104_729) * 1_000_003 + step) % 2**32)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(denoiser.num_train_timesteps, (len(latents),))
        x_t = denoiser.add_noise(latents, noise, timesteps)
        error = denoiser.noise_pred(x_t, timesteps, labels) - noise
        denoiser.schedule.own_error(error, timesteps).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in RELEARN_STEPS:
            yield step


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    single = [name for name, forgotten in CONCEPTS.items() if len(forgotten.targets) == 1]
    add_arguments(parser, single, ["base", *METHODS])
    args = parser.parse_args(argv)
    try:
        missing = missing_results(args, attack_file, spec_of)
        if args.dry_run:
            return list_missing(missing)
        for concept, method, seed in missing:
            if method == "base":
                continue
            result = result_file(concept, method, seed, args.results_dir)
            model = result.with_suffix("") / "pipeline"
            if not (result.is_file() and model.is_dir()):
                print(f"{model}: not there; python -m benchmarks.text.run leaves it beside its result", file=sys.stderr)
                return 2
            check_current(result, model_spec(method) | {"base_model": base_digest(args.model_dir)})
    except (BaseError, StaleResultError) as error:
        print(error, file=sys.stderr)
        return 2
    commit = code_version()
    for item in missing:
        attack(*item, args.results_dir, args.model_dir, commit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
