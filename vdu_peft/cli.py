"""``vdu-peft``: unlearn | sample | compose | merge | export | inspect | evaluate | demo. Call and print."""

import argparse
import dataclasses
import json
import logging
import math
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from datasets.exceptions import DatasetsError
from PIL import Image

from vdu_peft.adapter import AdapterError, adapter_scale, describe, load_adapter
from vdu_peft.classes import run_classes
from vdu_peft.compose import compose
from vdu_peft.config import ConfigError, UnlearnConfig, VDUConfig
from vdu_peft.data import DataError, ImageSource
from vdu_peft.demo import peak_memory_mib, run_demo
from vdu_peft.denoiser import Denoiser, ModelError
from vdu_peft.evaluation import evaluate, held_out_loss_gap, labelled_grids
from vdu_peft.export import DTYPES, export_lora, merge
from vdu_peft.hub import HubError, check_hub, push_to_hub
from vdu_peft.judge import AttributeJudge, Judge, JudgeError
from vdu_peft.options import ADAPTER_OPTIONS, parse
from vdu_peft.text_denoiser import TextDenoiser, anchor_prompts, neutral_prompts, open_denoiser, read_prompts
from vdu_peft.text_evaluation import (
    MIN_FID_IMAGES,
    PromptFileError,
    Target,
    draw,
    evaluate_prompts,
    load_clip,
    read_prompt_file,
)
from vdu_peft.trainer import UnlearnError, unlearn

BAD_INPUT = (
    AdapterError,
    ConfigError,
    DataError,
    HubError,
    JudgeError,
    ModelError,
    PromptFileError,
    DatasetsError,
    OSError,
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns 0, 1 for a run that failed (nothing learned, collapsed), 2 for bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        args = parse(argv)
        return COMMANDS[args.command](args)
    except BAD_INPUT as error:
        print(f"vdu-peft: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"vdu-peft: error: out of memory ({str(error).splitlines()[0]}); use a smaller train_batch_size with "
            "gradient_accumulation_steps, gradient_checkpointing, mixed_precision bf16",
            file=sys.stderr,
        )
        return 1
    except UnlearnError as error:
        print(f"vdu-peft: error: {error}", file=sys.stderr)
        return 1


def _run_config(args: argparse.Namespace) -> tuple[UnlearnConfig, dict]:
    config = UnlearnConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(UnlearnConfig)})
    adapter = {name: getattr(args, option) for option, name in ADAPTER_OPTIONS.items()}
    adapter["variational"] = args.variational
    VDUConfig(target_modules=["any"], **adapter)  # its checks, before anything is loaded
    return config, adapter


def _new_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: exists and is not a folder; choose another output_dir")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"{folder}: exists and is not empty; choose another output_dir or pass --overwrite")


def _hub_repository(args: argparse.Namespace) -> str | None:
    """Where to upload to, checked before any work; None for nowhere."""
    if args.push_to_hub:
        return check_hub(args.hub_model_id or args.output_dir.resolve().name)
    if args.hub_model_id is not None:
        raise ConfigError("hub_model_id: nothing is uploaded without push_to_hub")
    return None


def _publish(folder: Path, repository: str | None) -> None:
    if repository is not None:
        print(f"uploaded to {push_to_hub(folder, repository)}")


def _unlearn(args: argparse.Namespace) -> int:
    config, adapter_options = _run_config(args)
    repository = _hub_repository(args)
    if not args.resume_from_checkpoint:
        _new_folder(args.output_dir, args.overwrite)
    source = ImageSource(
        args.forget_data,
        split=args.dataset_split,
        image_column=args.image_column,
        label_column=args.label_column,
        labels=tuple(args.forget_label),
        caption_column=args.caption_column,
        max_images=args.max_forget_images,
    )
    if args.forget_prompt is not None and args.caption_column is not None:
        raise ConfigError("forget_prompt: caption_column gives each image its own; name one of them")
    if args.forget_prompt is not None and args.forget_prompt in ("", args.anchor_prompt):
        raise ConfigError("forget_prompt: must be a prompt other than the anchor_prompt and the empty one")
    captions = source.captions() if args.caption_column is not None else []
    anchors = _anchor_captions(captions, args)
    prompts = [*captions, *anchors] if args.forget_prompt is None else [args.forget_prompt]
    if prompts:
        retained = read_prompts(args.retain_prompts) if args.retain_prompts else neutral_prompts()
        prompts = list(dict.fromkeys([*prompts, args.anchor_prompt, *retained]))
    # Frozen weights in what the forward computes in; the adapter stays in float32.
    dtypes = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    denoiser = open_denoiser(args.model, prompts, dtypes[config.mixed_precision], resolution=args.resolution)
    config = _with_prompts(config, denoiser, args)
    _set_guidance(denoiser, args)
    forget_labels = torch.tensor([denoiser.label(caption) for caption in captions]) if captions else None
    anchor_labels = torch.tensor([denoiser.label(caption) for caption in anchors]) if anchors else None
    forget = source.load(denoiser.image_size, denoiser.channels)
    adapter = VDUConfig.for_model(denoiser.model, target_modules=args.target_modules, **adapter_options)
    size = " x ".join(map(str, forget.shape[1:]))
    print(f"{len(forget)} forget images of {size}; {args.model}")
    if args.dry_run:
        run_classes(denoiser, config, forget_labels, len(forget), anchor_labels)
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
    if not result.failed and PartialState().is_main_process:
        _publish(args.output_dir / "adapter", repository)
    return code


def _anchor_captions(captions: list[str], args: argparse.Namespace) -> list[str]:
    """Every caption with anchor_concept in place of forget_concept; none without a forget_concept."""
    if not args.forget_concept:
        if args.anchor_concept:
            raise ConfigError("anchor_concept: stands in place of a forget_concept; name that, too")
        return []
    if not captions:
        raise ConfigError("forget_concept: its words are looked for in captions; give a caption_column")
    if args.plasticity != "hinge" or args.anchor_prompt:
        name = "anchor_prompt" if args.anchor_prompt else f"plasticity {args.plasticity}"
        raise ConfigError(f"forget_concept: every caption is redirected to one of its own; leave out {name}")
    anchors = anchor_prompts(captions, args.forget_concept, args.anchor_concept)
    if both := [anchor for anchor in anchors if anchor in captions]:
        raise ConfigError(f"anchor_concept: {both[0]!r} is the caption of a forget image itself; take that one out")
    return anchors


def _with_prompts(config: UnlearnConfig, denoiser: Denoiser, args: argparse.Namespace) -> UnlearnConfig:
    """The run's classes, where they are prompts."""
    options = [n for n in ("forget_prompt", "caption_column") if getattr(args, n) is not None]
    if not isinstance(denoiser, TextDenoiser):
        if options:
            raise ConfigError(f"{options[0]}: {args.model} is not a text-to-image model; leave it out")
        return config
    if not options:
        raise ConfigError(
            "forget_prompt: the model draws from prompts; tell which one the forget images belong to, or give a "
            "caption_column"
        )
    labels = {"null_class": ""}
    if config.plasticity == "hinge" and not args.forget_concept:
        labels["anchor_class"] = args.anchor_prompt
    if args.forget_prompt is not None:
        labels["forget_class"] = args.forget_prompt
    for name in ("forget_class", "anchor_class", "null_class"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name}: a text-to-image model's classes are prompts; use forget_prompt, anchor_prompt")
    return dataclasses.replace(config, **{name: denoiser.label(prompt) for name, prompt in labels.items()})


def _set_guidance(denoiser: Denoiser, args: argparse.Namespace) -> None:
    if args.guidance_scale is not None:
        if not isinstance(denoiser, TextDenoiser):
            raise ConfigError(f"guidance_scale: {args.model} is not a text-to-image model; leave it out")
        if not 0 <= args.guidance_scale < math.inf:
            raise ConfigError(f"guidance_scale must be a number from 0, not {args.guidance_scale}")
        denoiser.guidance_scale = args.guidance_scale


def _outcome(result, output_dir: Path) -> int:
    last = result.history[-1]
    print(
        f"{result.status} after {len(result.history)} steps; {result.trained_parameters:,} parameters trained, "
        f"{result.num_replay} replay images; "
        f"forget ratio {last['forget_ratio']:.2f}, stability {last['stability']:.3f}; "
        f"adapter in {output_dir / 'adapter'}"
    )
    if result.failed:
        mend = {
            "nothing learned": "raise max_train_steps or learning_rate, and check that target_modules covers the model",
            "collapsed": "use plasticity hinge, a larger stability_weight, or a smaller learning_rate or init_scale",
        }[result.status]
        print(f"vdu-peft: error: {result.status}: {mend}", file=sys.stderr)
        return 1
    return 0


def _drawing_denoiser(args: argparse.Namespace, prompts: list[str]) -> Denoiser:
    """The model as ``sample`` and ``evaluate`` are told to draw with it."""
    if args.dtype == "float16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ConfigError("dtype: float16 needs a GPU; use bfloat16 or float32")
    denoiser = open_denoiser(args.model, prompts, DTYPES[args.dtype or "float32"], resolution=args.resolution)
    if args.dtype and not isinstance(denoiser, TextDenoiser):
        raise ConfigError(f"dtype: {args.model} is not a text-to-image model; leave it out")
    _set_guidance(denoiser, args)
    return denoiser


def _sample(args: argparse.Namespace) -> int:
    if args.num_images < 1:
        raise ConfigError(f"num_images must be at least 1, not {args.num_images}")
    if args.output_file.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"{args.output_file}: not an image file name; end it in .png")
    denoiser = _drawing_denoiser(args, args.prompt).to_best_device()
    options = {"seed": args.seed, "num_inference_steps": args.num_inference_steps}
    if isinstance(denoiser, TextDenoiser):
        if args.class_labels:
            raise ConfigError("class_labels: a text-to-image model's classes are prompts; use prompt")
        options["class_labels"] = [denoiser.label(prompt) for prompt in args.prompt or [""]]
    elif args.prompt:
        raise ConfigError(f"prompt: {args.model} is not a text-to-image model; leave it out")
    elif denoiser.num_classes:
        labels = args.class_labels or range(denoiser.num_classes)
        if not {*labels} <= {*range(denoiser.num_classes)}:
            raise ConfigError(f"class_labels must lie in 0 to {denoiser.num_classes - 1}")
        options["class_labels"] = labels
    elif args.class_labels:
        raise ConfigError("class_labels: the model is unconditional; leave them out")
    if args.adapter is None:
        panels = {"base": denoiser.sample(args.num_images, progress="base", **options)}
    else:
        denoiser.model = load_adapter(denoiser.model, args.adapter).get_base_model()
        panels = {}
        for scale in args.scale:
            with adapter_scale(denoiser.model, scale):
                pass  # a block that is not there fails now, not after the grids before it are drawn
        for scale in args.scale:
            if isinstance(scale, dict):
                title = ", ".join(f"{block} {value:g}" for block, value in scale.items())
            else:
                title = "adapter off" if scale == 0 else f"scale {scale:g}"
            with adapter_scale(denoiser.model, scale):
                panels[title] = denoiser.sample(args.num_images, progress=title, **options)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    labelled_grids(panels, columns=8).save(args.output_file)
    print(f"wrote {args.output_file}")
    return 0


def _compose(args: argparse.Namespace) -> int:
    _new_folder(args.output_dir, args.overwrite)
    repository = _hub_repository(args)
    denoiser = open_denoiser(args.model)
    discarded = compose(denoiser.model, args.adapter, args.output_dir, args.rank, denoiser.name)
    worst = max(discarded, key=discarded.get)
    print(
        f"wrote {args.output_dir}; energy of the delta that the rank discards: at most {discarded[worst]:.2%} ({worst})"
    )
    _publish(args.output_dir, repository)
    return 0


def _merge(args: argparse.Namespace) -> int:
    _new_folder(args.output_dir, args.overwrite)
    repository = _hub_repository(args)
    merge(args.model, args.adapter, args.output_dir, args.dtype, args.onnx)
    print(f"wrote {args.output_dir}: load it with diffusers.DiffusionPipeline.from_pretrained")
    _publish(args.output_dir, repository)
    return 0


def _export(args: argparse.Namespace) -> int:
    _new_folder(args.output_dir, args.overwrite)
    repository = _hub_repository(args)
    export_lora(args.adapter, args.output_dir, args.format)
    how = "peft.PeftModel.from_pretrained" if args.format == "peft" else "a pipeline's load_lora_weights"
    print(f"wrote {args.output_dir}: load it with {how}")
    _publish(args.output_dir, repository)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    denoiser = open_denoiser(args.model)
    model_parameters = sum(p.numel() for p in denoiser.model.parameters())
    peft_model = load_adapter(denoiser.model, args.adapter)
    config = peft_model.peft_config["default"]
    rows = describe(peft_model)
    shown = {k: getattr(config, k) for k in ("r", "lora_alpha", "prior_scale", "init_scale", "variational")}
    total = sum(row["parameters"] for row in rows)
    print(json.dumps(shown))
    print(f"{total:,} adapter parameters, {100 * total / model_parameters:.1f} % of the model's {model_parameters:,}")
    print(f"{'layer':<52}{'rank':>5}{'params':>9}{'|dW|/|W|':>10}{'SNR':>10}{'KL (nats)':>12}")
    for row in rows:
        snr = "-" if row["signal_to_noise"] is None else f"{row['signal_to_noise']:.3g}"
        print(
            f"{row['layer']:<52}{row['rank']:>5}{row['parameters']:>9}{row['delta_norm']:>10.4f}{snr:>10}{row['kl']:>12.1f}"
        )
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    _new_folder(args.output_dir, args.overwrite)
    return _evaluate_prompts(args) if args.prompts else _evaluate_class(args)


def _evaluate_class(args: argparse.Namespace) -> int:
    for name in ("judge", "reference", "label_column", "forget_class"):
        if getattr(args, name) is None:
            raise ConfigError(f"{name}: needed to evaluate a forgotten class; for text-to-image models give prompts")
    for name in ("forget_attribute", "clip_model", "nudenet", "resolution", "guidance_scale", "dtype"):
        if getattr(args, name) is not None and getattr(args, name) is not False:  # 0 is a guidance scale
            raise ConfigError(f"{name}: goes with prompts")
    _check_evaluation(args.num_samples)
    judge = Judge.from_file(args.judge)
    num_classes = judge.head.out_features
    if not 0 <= args.forget_class < num_classes:
        raise ConfigError(f"forget_class must lie in 0 to {num_classes - 1}, the judge's classes")
    denoiser = Denoiser.from_pretrained(args.model)
    source = ImageSource(
        args.reference, split=args.dataset_split, image_column=args.image_column, label_column=args.label_column
    )
    if (denoiser.image_size, denoiser.channels) != (judge.image_size, judge.channels):
        raise ConfigError(
            f"judge: takes {judge.channels} x {judge.image_size[0]} x {judge.image_size[1]} images, "
            f"{args.model} draws {denoiser.channels} x {denoiser.image_size[0]} x {denoiser.image_size[1]}"
        )
    reference, labels = source.load_labelled(denoiser.image_size, denoiser.channels)
    retained = int((labels != args.forget_class).sum())
    if retained < 100:
        raise ConfigError(f"reference: {retained} images without the forget class are too few for a u-FID; give 100")
    denoiser.model = load_adapter(denoiser.to_best_device().model, args.adapter).get_base_model()
    sampling = {"seed": args.seed, "num_inference_steps": args.num_inference_steps}
    if denoiser.num_classes:
        sampling["class_labels"] = range(denoiser.num_classes)
    held_out = (reference, labels, args.forget_class, args.seed)
    with adapter_scale(denoiser.model, 0):
        before = denoiser.sample(args.num_samples, progress="adapter off", **sampling)
        gap_before = held_out_loss_gap(denoiser, *held_out)
    gaps = (gap_before, held_out_loss_gap(denoiser, *held_out))
    after = denoiser.sample(args.num_samples, progress="adapter on", **sampling)
    report = evaluate(before, after, judge, args.forget_class, reference, labels, gaps)
    context = {name: str(getattr(args, name)) for name in ("model", "adapter", "judge", "reference")}
    context["sampler"] = f"DDIM, {args.num_inference_steps} steps, seed {args.seed}"
    report.save(args.output_dir, {"adapter off": before, "adapter on": after}, **context)
    print("\n".join(report.lines()))
    return 0


def _evaluate_prompts(args: argparse.Namespace) -> int:
    _check_libraries()
    if args.forget_class is not None:
        raise ConfigError("forget_class: a prompt file's target is a forget_attribute")
    if args.label_column is not None:
        raise ConfigError("label_column: the reference of a prompt file has no labels; leave it out")
    if (args.judge is None) != (args.forget_attribute is None):
        raise ConfigError("forget_attribute: is what a judge looks for; give both or neither")
    if args.judge is None and args.clip_model is None and not args.nudenet:
        raise ConfigError("judge: nothing would be measured; give a judge, a clip_model or nudenet")
    if args.nudenet and find_spec("nudenet") is None:
        raise ConfigError("nudenet: pip install nudenet")
    if args.judge is None and args.reference is not None:
        raise ConfigError("reference: the distance to it is on a judge's features; give a judge")
    judge = AttributeJudge.from_file(args.judge) if args.judge else None
    target = Target.parse(args.forget_attribute) if args.forget_attribute else None
    prompts = read_prompt_file(args.prompts, judge, target)
    denoiser = _drawing_denoiser(args, [prompt.text for prompt in prompts])
    if not isinstance(denoiser, TextDenoiser):
        raise ConfigError(f"prompts: {args.model} is not a text-to-image model")
    if judge and denoiser.image_size != judge.image_size:
        raise ConfigError(f"judge: takes {judge.image_size} images, {args.model} draws {denoiser.image_size}")
    reference = None
    if args.reference is not None:
        source = ImageSource(args.reference, split=args.dataset_split, image_column=args.image_column)
        reference = source.load(denoiser.image_size, denoiser.channels)
        if len(reference) < MIN_FID_IMAGES:
            raise ConfigError(f"reference: {len(reference)} images are too few for a distance; give {MIN_FID_IMAGES}")
    clip = load_clip(args.clip_model) if args.clip_model is not None else None
    nudenet = _nude_detector() if args.nudenet else None
    denoiser.model = load_adapter(denoiser.to_best_device().model, args.adapter).get_base_model()
    sampling = {"seed": args.seed, "num_inference_steps": args.num_inference_steps}
    with adapter_scale(denoiser.model, 0):
        before = draw(denoiser, prompts, progress="adapter off", **sampling)
    after = draw(denoiser, prompts, progress="adapter on", **sampling)
    report = evaluate_prompts(before, after, prompts, target, judge, reference, clip, nudenet)
    names = ("model", "adapter", "judge", "prompts", "reference", "forget_attribute", "clip_model")
    context = {name: str(getattr(args, name)) for name in names if getattr(args, name) is not None}
    context |= {"guidance_scale": denoiser.guidance_scale, "image_size": denoiser.image_size}
    context["dtype"] = str(denoiser.dtype).removeprefix("torch.")
    context["sampler"] = f"{type(denoiser.schedule.sampler(1, denoiser.device)).__name__}, {args.num_inference_steps} "
    context["sampler"] += f"steps, seed {args.seed} where a prompt has none of its own"
    report.save(args.output_dir, before, after, **context)
    print("\n".join(report.lines()))
    return 0


def _nude_detector():
    from nudenet import NudeDetector

    return NudeDetector()


def _check_evaluation(num_samples: int) -> None:
    if num_samples < 100:
        raise ConfigError(f"num-samples must be at least 100 for a u-FID on 64 features, not {num_samples}")
    _check_libraries()


def _check_libraries() -> None:
    for library in ("matplotlib", "scipy", "torchmetrics"):
        if find_spec(library) is None:
            raise ConfigError(f"evaluation needs {library}: pip install 'vdu-peft[eval]'")


def _demo(args: argparse.Namespace) -> int:
    config, adapter_options = _run_config(args)
    _check_evaluation(args.num_samples)
    if not 1 <= args.num_inference_steps <= 1000:
        raise ConfigError(f"num_inference_steps must lie in 1 to 1000, not {args.num_inference_steps}")
    _new_folder(args.output_dir, args.overwrite)
    if args.output_dir.exists():
        shutil.rmtree(args.output_dir)
    result, report = run_demo(
        args.forget_digit, args.output_dir, config, adapter_options, args.num_samples, args.num_inference_steps
    )
    code = _outcome(result, args.output_dir)
    print("\n".join(report.lines()))
    written = json.loads((args.output_dir / "report.json").read_text())
    print(
        f"{written['total_seconds']:.0f} s ({written['unlearning_seconds']:.0f} s unlearning), "
        f"peak memory {peak_memory_mib():.0f} MiB; look at {args.output_dir / 'grid.png'}"
    )
    return code


COMMANDS = {
    "unlearn": _unlearn,
    "sample": _sample,
    "compose": _compose,
    "merge": _merge,
    "export": _export,
    "inspect": _inspect,
    "evaluate": _evaluate,
    "demo": _demo,
}
