"""Forget concepts in the dolls' text-to-image model by every method, and measure each.

    python -m benchmarks.text.run
    python -m benchmarks.text.run --concepts sword vampire --methods ours uce --jobs 2 --dry_run
    python -m benchmarks.text.run --concepts red-robe --methods ours-20-images ours-5-images

Every run writes one result; those that have one are not run again.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from accelerate.utils import set_seed

from benchmarks.bases import BaseError
from benchmarks.experiment import RESULTS
from benchmarks.processes import exit_code, in_processes
from benchmarks.results import StaleResultError, check_current, kept_images, write_result
from benchmarks.run import code_version, environment
from benchmarks.text.dolls import CONCEPTS, FOLDER, Dolls, Forgotten, base_digest
from benchmarks.text.esd import esd
from benchmarks.text.negative_mse import negative_mse
from benchmarks.text.spm import spm
from benchmarks.text.task import TextTask, make_task
from benchmarks.text.uce import uce
from vdu_peft.config import UnlearnConfig, VDUConfig
from vdu_peft.metrics import frechet_distance
from vdu_peft.prompt_file import EvaluationPrompt, Target, seeded
from vdu_peft.prompts import anchor_prompts
from vdu_peft.text_denoiser import TextDenoiser
from vdu_peft.text_evaluation import draw, evaluate_prompts, shown_places
from vdu_peft.text_judges import Judges
from vdu_peft.trainer import UnlearnError, unlearn

NAME = "dolls"
SAMPLE_STEPS = 20
NUM_FORGET, NUM_RETAINED_PROMPTS = 50, 100
NUM_TARGET, NUM_OTHERS, NUM_REFERENCE = 100, 150, 500
ANCHOR_DISTANCE = "FID to real images of the anchor"


def ours(task: TextTask, variational: bool = True, learning_rate: float = 3e-3, **options) -> str:
    """This package, from the forget images and their captions; options of UnlearnConfig.

    The network is a small one, for which its default learning rate is too low.
    """
    config = UnlearnConfig(null_class=task.denoiser.null_label, seed=task.seed, learning_rate=learning_rate, **options)
    labels = {"forget_labels": task.labels(task.captions), "anchor_labels": task.labels(task.anchors)}
    adapter = VDUConfig.for_model(task.denoiser.model, variational=variational)
    try:
        result = unlearn(task.denoiser, task.forget, config, adapter, **labels)
    except UnlearnError:
        return "not finite"
    task.denoiser.model = result.model.merge_and_unload()
    return result.status


# Half the default's batch: the model is larger than the demo's, and quicker to forget. Its attributes lie close
# together, and need more to hold them in place.
# The KL's weight is what the default was when these were run.
OURS = {"train_batch_size": 8, "max_train_steps": 300, "stability_weight": 16.0, "kl_weight": 0.0125}
METHODS = {
    "ours": (ours, OURS),
    "ours-20-images": (ours, OURS),
    "ours-5-images": (ours, OURS),
    "ours-20-images-one-prompt": (ours, OURS),
    "ours-deterministic": (ours, {**OURS, "variational": False}),
    "esd-x": (esd, {"parameters": "x", "learning_rate": 3e-4, "steps": 200, "batch_size": 8, "guidance": 1.0}),
    "esd-u": (esd, {"parameters": "u", "learning_rate": 1e-4, "steps": 200, "batch_size": 8, "guidance": 1.0}),
    "spm": (
        spm,
        {"learning_rate": 1e-3, "steps": 100, "batch_size": 8, "guidance": 1.0, "anchoring_weight": 1000.0},
    ),
    "negative-mse": (negative_mse, {"learning_rate": 1e-4, "steps": 50, "batch_size": 8}),
    "uce": (uce, {"preserve_scale": 1.0, "ridge": 0.1}),
}
# Counts up when a method's code comes to do something else under the same options. 2: losses on the network's own
# prediction; negative MSE trains part of the text encoder; the KL of ours is weighed per posterior weight. 3: ours
# learns the redirection on images of the anchor, too.
REVISIONS = {"esd-x": 2, "esd-u": 2, "spm": 2, "negative-mse": 2}
REVISIONS |= {method: 3 for method in METHODS if method.startswith("ours")}
# Forget images of those that have fewer, and those that have one prompt for all.
FEW = {"ours-20-images": 20, "ours-5-images": 5, "ours-20-images-one-prompt": 20}
ONE_PROMPT = {"ours-20-images-one-prompt"}


def spec_of(method: str) -> dict:
    """What a result depends on besides concept, seed and the code that all methods share; it is stored with it."""
    return {
        "options": METHODS[method][1],
        "revision": REVISIONS.get(method),
        "num_forget_images": FEW.get(method, NUM_FORGET),
        "num_retained_prompts": NUM_RETAINED_PROMPTS,
        "num_target_images": NUM_TARGET,
        "num_other_images": NUM_OTHERS,
    }


def run(concept: str, method: str, seed: int, results: Path, folder: Path, threads: int, commit: str) -> None:
    """Forget, draw, judge, write the result and a picture; in a process of its own."""
    torch.set_num_threads(threads)
    dolls, forgotten = Dolls(folder), CONCEPTS[concept]
    prompts = dolls.evaluation_prompts(forgotten, NUM_TARGET, NUM_OTHERS)
    before = base_images(dolls, concept, prompts, seed, results)
    images, one_prompt = FEW.get(method, NUM_FORGET), method in ONE_PROMPT
    task = make_task(dolls, forgotten, images, NUM_RETAINED_PROMPTS, seed, one_prompt)
    function, options = METHODS[method]
    set_seed(seed)
    start = time.process_time()
    status = function(task, **options)
    cpu_seconds = time.process_time() - start
    after = images_of(task.denoiser, prompts, seed)
    count = len(prompts) - NUM_OTHERS
    anchored = anchor_prompts([prompt.text for prompt in prompts[:count]], forgotten.concepts, forgotten.anchors)
    anchored = base_images(dolls, f"{concept}-anchors", [EvaluationPrompt(text) for text in anchored], seed, results)
    without, figures, floor = images_without(dolls, forgotten), {}, {}
    judges, (real_without, _) = Judges(dolls.judge), dolls.judge.judge(without.reference)
    for target, instead in zip(forgotten.targets, forgotten.instead, strict=True):
        # Each by itself, against the prompts that ask for none of them.
        rows = [i for i, prompt in enumerate(prompts) if target.is_asked_by(prompt) or i >= count]
        asking = [prompts[i] for i in rows]
        seen = (judges.look(images[rows], asking) for images in (before, after))
        report = evaluate_prompts(*seen, asking, target, real_without)
        of_anchor = images_of_anchor(dolls, target, instead)
        real_features, _ = dolls.judge.judge(of_anchor.reference)
        asked = [i for i in rows if i < count]
        distances = tuple(
            frechet_distance(dolls.judge.judge(images[asked])[0], real_features)
            for images in (anchored, after)  # before: the base model, asked for the anchor
        )
        name = f"{target.attribute}={','.join(target.values)}"
        figures[name] = {**report.figures, ANCHOR_DISTANCE: distances}
        floor[name] = real_distances(dolls, without, of_anchor)
    record = {
        "concept": concept,
        "method": method,
        "seed": seed,
        "base_model": dolls.base_model,
        **spec_of(method),
        "status": status,
        "cpu_seconds": cpu_seconds,
        "sampler": f"DDIM, {SAMPLE_STEPS} steps, guidance {task.denoiser.guidance_scale}, seed {seed + 1}",
        "figures": figures,
        "real images": floor,
        "environment": environment(commit),
    }
    file = result_file(concept, method, seed, results)
    shown = [rows[i] for i in shown_places(asking, target)]
    report.save(file.with_suffix(""), before[shown], after[shown], method=method)
    if status != "not finite":  # its network may still be half wrapped
        task.denoiser.save_pretrained(file.with_suffix("") / "pipeline")  # for benchmarks.text.attacks
    write_result(file, record)


def result_file(concept: str, method: str, seed: int, results: Path) -> Path:
    return results / NAME / f"{method}-{concept}-{seed}.json"


@dataclass(frozen=True)
class RealImages:
    """Rows of the training split: none is of a character that an evaluation prompt describes.

    Attributes:
        reference: (up to NUM_REFERENCE, 3, H, W), what drawn images are measured against.
        sample: (N, 3, H, W), others of the same kind, as many as are drawn: what a perfect model would draw.
    """

    reference: torch.Tensor
    sample: torch.Tensor

    @classmethod
    def of(cls, dolls: Dolls, wanted: Callable[[dict[str, str]], bool], count: int) -> "RealImages":
        return cls(*(dolls.real_images(rows) for rows in real_rows(dolls, wanted, count)))


def real_rows(dolls: Dolls, wanted: Callable[[dict[str, str]], bool], count: int) -> tuple[list[int], list[int]]:
    """(reference, sample): the sample from the split's start, the reference from its end, whatever is wanted."""
    rows = [i for i in range(dolls.count) if wanted(dolls.attributes[i])]
    return rows[count:][-NUM_REFERENCE:], rows[:count]


def images_without(dolls: Dolls, forgotten: Forgotten) -> RealImages:
    return RealImages.of(dolls, lambda attributes: not forgotten.is_shown(attributes), NUM_OTHERS)


def images_of_anchor(dolls: Dolls, target: Target, instead: str) -> RealImages:
    return RealImages.of(dolls, lambda attributes: attributes[target.attribute] == instead, NUM_TARGET)


def real_distances(dolls: Dolls, without: RealImages, of_anchor: RealImages) -> dict[str, float]:
    """The distances of real images in place of drawn ones: where no method that draws the anchor comes out lower."""
    pairs = {
        "FID, target prompts": (of_anchor.sample, without.reference),
        "FID, other prompts": (without.sample, without.reference),
        ANCHOR_DISTANCE: (of_anchor.sample, of_anchor.reference),
    }
    return {name: frechet_distance(*(dolls.judge.judge(images)[0] for images in pair)) for name, pair in pairs.items()}


def images_of(denoiser: TextDenoiser, prompts, seed: int) -> torch.Tensor:
    """The evaluation prompts' images, by the network as it is now."""
    reader = TextDenoiser(denoiser.pipeline, [prompt.text for prompt in prompts])
    reader.model, reader.guidance_scale, reader.batch_size = denoiser.model, denoiser.guidance_scale, 32
    return draw(reader, seeded(prompts, seed + 1), num_inference_steps=SAMPLE_STEPS)


def base_images(dolls: Dolls, concept: str, prompts, seed: int, results: Path) -> torch.Tensor:
    """The base model's images, drawn once for all methods; another model or other prompts have others."""
    key = hashlib.sha256(repr((dolls.base_model, [prompt.text for prompt in prompts])).encode()).hexdigest()[:8]
    file = results / f"{NAME}-before-{concept}-{key}-{seed}.safetensors"
    return kept_images(file, lambda: images_of(dolls.denoiser([]), prompts, seed))


def add_arguments(parser: argparse.ArgumentParser, concepts: list[str], methods: list[str]) -> None:
    """What is run, where from and where to."""
    parser.add_argument("--concepts", nargs="+", choices=concepts, default=concepts)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model_dir", type=Path, default=FOLDER, help="with pipeline/, judge.safetensors, dolls.npz")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--dry_run", action="store_true", help="list what is missing and end")


def missing_results(
    args: argparse.Namespace, file: Callable[..., Path], spec: Callable[[str], dict]
) -> list[tuple[str, str, int]]:
    """(concept, method, seed) of what has no result ``file`` yet.

    Raises:
        StaleResultError: one that is there was made of another base, or with other options than its method's ``spec``
            has now.
    """
    missing, base = [], {"base_model": base_digest(args.model_dir)}
    for seed, concept, method in product(args.seeds, args.concepts, args.methods):
        result = file(concept, method, seed, args.results_dir)
        if result.is_file():
            check_current(result, base | spec(method))
        else:
            missing.append((concept, method, seed))
    return missing


def list_missing(missing: list[tuple[str, str, int]]) -> int:
    """A dry run, which ends with exit code 0."""
    print("\n".join(f"{method}-{concept}-{seed}" for concept, method, seed in missing))
    return 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, list(CONCEPTS), list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out among them")
    args = parser.parse_args(argv)
    try:
        missing = missing_results(args, result_file, spec_of)
    except (BaseError, StaleResultError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.dry_run:
        return list_missing(missing)
    shared = (args.results_dir, args.model_dir, max(1, torch.get_num_threads() // args.jobs), code_version())
    failed = in_processes(run, [(*item, *shared) for item in missing], args.jobs)
    return exit_code([result_file(*item, args.results_dir) for *item, _, _, _, _ in failed])


if __name__ == "__main__":
    sys.exit(main())
