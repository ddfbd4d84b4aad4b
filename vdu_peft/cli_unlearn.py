"""``vdu-peft unlearn`` and ``vdu-peft demo``: the options as a run, and how it ended."""

import argparse
import dataclasses
import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import torch
from accelerate import PartialState

from vdu_peft.classes import Classes, run_classes
from vdu_peft.config import ConfigError, UnlearnConfig, VDUConfig
from vdu_peft.contexts import adapter_scale
from vdu_peft.demo import peak_memory_mib, run_demo
from vdu_peft.denoiser import Denoiser, best_device, image_seeds, in_turn
from vdu_peft.evaluation import check_evaluation
from vdu_peft.first_line import first_line
from vdu_peft.history import loss_plot
from vdu_peft.options import ADAPTER_OPTIONS, forget_source
from vdu_peft.pictures import labelled_grids
from vdu_peft.precision import check_precision
from vdu_peft.prompts import anchor_prompts, holding, neutral_prompts, read_prompts
from vdu_peft.replay import draw_replay
from vdu_peft.text_denoiser import TextDenoiser, open_denoiser
from vdu_peft.trainer import UnlearnResult, check_run, unlearn

logger = logging.getLogger(__name__)
# Samples of each kind, in the picture of what a run did.
SHOWN = 8


def run_unlearn(args: argparse.Namespace) -> int:
    config, adapter_options = _run_config(args)
    source = dataclasses.replace(forget_source(args), caption_column=args.caption_column)
    if args.forget_prompt is not None and args.caption_column is not None:
        raise ConfigError("forget_prompt: caption_column gives each image its own; name one of them")
    if args.forget_prompt == "" and args.anchor_prompt:
        raise ConfigError("anchor_prompt: an empty forget_prompt is redirected to nothing; leave anchor_prompt out")
    if args.forget_prompt and args.forget_prompt == args.anchor_prompt:
        raise ConfigError("forget_prompt: must be a prompt other than the anchor_prompt")
    if args.plasticity == "elbo" and args.anchor_prompt:
        raise ConfigError("anchor_prompt: plasticity elbo redirects to nothing; use hinge, or leave anchor_prompt out")
    captions = source.captions() if args.caption_column is not None else []
    if args.anchor_prompt and args.anchor_prompt in captions:
        raise ConfigError(f"anchor_prompt: {args.anchor_prompt!r} is the caption of a forget image itself")
    anchors = _anchor_captions(captions, args)
    prompts = [*captions, *anchors] if args.forget_prompt is None else [args.forget_prompt]
    if prompts:
        retained = read_prompts(args.retain_prompts) if args.retain_prompts else neutral_prompts()
        _tell_held(retained, captions, args)
        prompts = list(dict.fromkeys([*prompts, args.anchor_prompt, *retained]))
    # Frozen weights in what the forward computes in; the adapter stays in float32.
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    denoiser = open_denoiser(
        args.model,
        prompts,
        dtypes[config.mixed_precision],
        resolution=args.resolution,
        guidance_scale=args.guidance_scale,
    )
    config = _with_prompts(config, denoiser, args)
    forget_labels = torch.tensor([denoiser.label(caption) for caption in captions]) if captions else None
    anchor_labels = torch.tensor([denoiser.label(caption) for caption in anchors]) if anchors else None
    forget = source.load(denoiser.image_size, denoiser.channels)
    adapter = VDUConfig.for_model(denoiser.model, target_modules=args.target_modules, **adapter_options)
    size = " x ".join(map(str, forget.shape[1:]))
    print(f"{len(forget)} forget images of {size}; {args.model}")
    classes = run_classes(denoiser, config, forget_labels, len(forget), anchor_labels)
    if args.dry_run:
        check_run(denoiser, config, adapter, args.output_dir, resume=bool(args.resume_from_checkpoint))
        print("dry run: model, images and options are fine")
        return 0
    result = unlearn(
        denoiser,
        forget,
        config,
        adapter,
        forget_labels=forget_labels,
        anchor_labels=anchor_labels,
        output_dir=args.output_dir,
        resume=bool(args.resume_from_checkpoint),
    )
    code = _outcome(result, args.output_dir)
    if PartialState().is_main_process:
        try:
            _show(result, forget, classes, config, args.output_dir)
        except Exception as error:  # of whatever kind: the adapter is not lost for a picture of it
            what = f"{type(error).__name__}: {first_line(error)}"
            print(
                f"vdu-peft: warning: not all pictures could be drawn ({what}); the adapter is whole, and vdu-peft "
                "sample draws with it",
                file=sys.stderr,
            )
    return code


def _show(
    result: UnlearnResult, forget: torch.Tensor, classes: Classes | None, config: UnlearnConfig, output_dir: Path
) -> None:
    """Pictures of what a run did."""
    if len(result.variations):
        file = output_dir / "variations.png"
        labelled_grids({"forget images": forget, "variations of them": result.variations}).save(file)
        print(
            f"{len(result.variations)} variations of the forget images were shown as such, too; look in {file} that "
            "they show the same (min_forget_images 0 makes none)"
        )
    if find_spec("matplotlib"):  # of the extra eval, which a run does not need
        loss_plot(result.history, output_dir / "loss.png")
    file, drawn = output_dir / "samples.png", _drawn(result, classes, config)
    labelled_grids(_samples(result, drawn, config), columns=2, numbered=classes is not None).save(file)
    print(f"look at {file}: samples with the adapter off and on")
    for kind, (_, labels) in drawn.items():
        if labels is not None:
            prompts, each = getattr(result.denoiser, "prompts", None), dict.fromkeys(labels.tolist())
            print(f"  {kind}{', in turn' if len(each) < SHOWN else ''}:")
            for number, label in enumerate(each, 1):
                print(f"    {number} {prompts[label]!r}" if prompts else f"    {number} class {label}")


def _drawn(
    result: UnlearnResult, classes: Classes | None, config: UnlearnConfig
) -> dict[str, tuple[list[int], torch.Tensor | None]]:
    """What the picture shows, by kind: seeds, and of a model with a condition labels.

    Of an unconditional model one kind are its own samples that looked like the forget images, where there are any.
    """
    seeds = image_seeds(config.seed, SHOWN)
    if classes is None:
        return {
            kind: (each, None)
            for kind, each in {"forget-like": result.alike_seeds[:SHOWN], "any": seeds}.items()
            if each
        }
    forgotten = classes.forget_labels.unique().tolist()
    # Not what stands in for the forgotten, unless that is all there is.
    beside = {*classes.anchors.flatten().tolist(), classes.null}
    held = [label for label in classes.retained if label not in beside]
    # Of many, from all over them.
    return {
        kind: (seeds, in_turn(labels[:: -(-len(labels) // SHOWN)], SHOWN))
        for kind, labels in {"forgotten": forgotten, "retained": held or classes.retained}.items()
    }


def _samples(
    result: UnlearnResult, drawn: dict[str, tuple[list[int], torch.Tensor | None]], config: UnlearnConfig
) -> dict[str, torch.Tensor]:
    """What the model draws of each kind with the adapter off and on, from the same noise, by title."""
    panels = {}
    for kind, (seeds, labels) in drawn.items():
        for title, scale in ((f"{kind}, adapter off", 0), (f"{kind}, adapter on", 1)):
            drawing = {"num_inference_steps": config.replay_inference_steps, "labels": labels, "progress": title}
            with adapter_scale(result.denoiser.model, scale):
                panels[title] = result.denoiser.decode(draw_replay(result.denoiser, seeds, **drawing)).cpu()
    return panels


def _anchor_captions(captions: list[str], args: argparse.Namespace) -> list[str]:
    """Every caption with anchor_concept in place of forget_concept; none without a forget_concept."""
    if not args.forget_concept:
        if args.anchor_concept:
            raise ConfigError("anchor_concept: stands in place of a forget_concept; name that, too")
        return []
    if not captions:
        raise ConfigError("forget_concept: its words are looked for in captions; give a caption_column")
    if args.plasticity == "elbo" or args.anchor_prompt:
        name = "anchor_prompt" if args.anchor_prompt else f"plasticity {args.plasticity}"
        raise ConfigError(f"forget_concept: every caption is redirected to one of its own; leave out {name}")
    anchors = anchor_prompts(captions, args.forget_concept, args.anchor_concept)
    if both := [anchor for anchor in anchors if anchor in captions]:
        raise ConfigError(f"anchor_concept: {both[0]!r} is the caption of a forget image itself; take that one out")
    return anchors


def _tell_held(retained: list[str], captions: list[str], args: argparse.Namespace) -> None:
    """Warn of prompts to retain that ask for what is to be forgotten; those that are it are not retained."""
    forgotten = captions or [args.forget_prompt or ""]
    held = [prompt for prompt in holding(retained, args.forget_concept or forgotten) if prompt not in forgotten]
    if held:
        logger.warning(
            "retain_prompts: %d of %d%s hold what is to be forgotten, such as %r, and would keep it; %s",
            len(held),
            len(retained),
            "" if args.retain_prompts else " of the package's own",
            held[0],
            "take them out" if args.retain_prompts else "give others in a file",
        )


def _with_prompts(config: UnlearnConfig, denoiser: Denoiser, args: argparse.Namespace) -> UnlearnConfig:
    """The run's classes, where they are prompts."""
    options = [n for n in ("forget_prompt", "caption_column") if getattr(args, n) is not None]
    if not isinstance(denoiser, TextDenoiser):
        if given := [*options, *(n for n in ("anchor_prompt", "retain_prompts") if getattr(args, n))]:
            raise ConfigError(f"{given[0]}: {args.model} is not a text-to-image model; leave it out")
        return config
    if not options:
        raise ConfigError(
            'forget_prompt: the model draws from prompts; tell which one the forget images belong to ("" for what is '
            "drawn without one), or give a caption_column"
        )
    labels = {"null_class": ""}
    if config.plasticity != "elbo" and not args.forget_concept and args.forget_prompt != "":
        labels["anchor_class"] = args.anchor_prompt
    if args.forget_prompt is not None:
        labels["forget_class"] = args.forget_prompt
    for name in ("forget_class", "anchor_class", "null_class"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name}: a text-to-image model's classes are prompts; use forget_prompt, anchor_prompt")
    return dataclasses.replace(config, **{name: denoiser.label(prompt) for name, prompt in labels.items()})


def run_demo_command(args: argparse.Namespace) -> int:
    config, adapter_options = _run_config(args)
    check_evaluation(args.num_samples)
    if not 1 <= args.num_inference_steps <= 1000:
        raise ConfigError(f"num_inference_steps must lie in 1 to 1000, not {args.num_inference_steps}")
    result, report = run_demo(
        args.forget_digit, args.output_dir, config, adapter_options, args.num_samples, args.num_inference_steps
    )
    code = _outcome(result, args.output_dir)
    print("\n".join(report.lines()))
    written = json.loads((args.output_dir / "report.json").read_text(encoding="utf-8"))
    print(
        f"{written['total_seconds']:.0f} s ({written['unlearning_seconds']:.0f} s unlearning), "
        f"peak memory {peak_memory_mib():.0f} MiB; look at {args.output_dir / 'grid.png'}"
    )
    return code


def _run_config(args: argparse.Namespace) -> tuple[UnlearnConfig, dict]:
    names = [field.name for field in dataclasses.fields(UnlearnConfig) if hasattr(args, field.name)]
    config = UnlearnConfig(**{name: getattr(args, name) for name in names})
    # Not accelerate's device: to ask for it so early starts accelerate without the run's options.
    check_precision(config, best_device())
    adapter = {name: getattr(args, option) for option, name in ADAPTER_OPTIONS.items()}
    adapter["variational"] = args.variational
    VDUConfig(target_modules=["any"], **adapter)  # its checks, before anything is loaded
    return config, adapter


def _outcome(result, output_dir: Path) -> int:
    _say(
        f"{result.status} after {len(result.history)} steps; {result.trained_parameters:,} parameters trained, "
        f"{result.num_replay} replay images; "
        f"{result.reached}; "
        f"adapter in {output_dir / 'adapter'}"
    )
    if result.strength is not None:
        _say(str(result.strength))
        if not result.strength.enough:
            _say("look at them by evaluate --forget_data; a smaller stability_weight or more images forget more")
    if result.status == "partly forgotten" and result.reached.redirect_left is not None:
        _say(
            "more than half of the way to the anchor is left: look at samples.png whether that is enough; a larger "
            "max_train_steps or learning_rate goes further"
        )
    if result.failed:
        mend = {
            "nothing learned": "raise max_train_steps or learning_rate, or lower kl_weight, and check that "
            "target_modules covers the model",
            "collapsed": "use bounded plasticity, a larger stability_weight, or a smaller learning_rate or init_scale",
        }[result.status]
        _say(f"vdu-peft: error: {result.status}: {mend}", file=sys.stderr)
        return 1
    return 0


def _say(text: str, file: TextIO | None = None) -> None:
    """Print, of several processes in one; after the run, whose Accelerator says which they are."""
    if PartialState().is_main_process:
        print(text, file=file)
