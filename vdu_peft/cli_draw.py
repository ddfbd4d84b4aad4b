"""``vdu-peft sample`` and ``vdu-peft evaluate``: draw with the adapter off and on, and show or measure it."""

import argparse
import logging
from importlib.util import find_spec

import torch
from PIL import Image

from vdu_peft.adapter import load_adapter
from vdu_peft.atomic_folder import check_writable
from vdu_peft.config import ConfigError
from vdu_peft.contexts import adapter_scale
from vdu_peft.data import ImageSource
from vdu_peft.denoiser import Denoiser, best_device
from vdu_peft.evaluation import Report, check_evaluation, evaluate, held_out_loss_gap
from vdu_peft.export import DTYPES
from vdu_peft.families import FAMILIES
from vdu_peft.judge import AttributeJudge, PretrainedJudge, open_judge
from vdu_peft.likeness_evaluation import LikenessReport, evaluate_likeness
from vdu_peft.options import forget_source
from vdu_peft.pictures import labelled_grids
from vdu_peft.prompt_file import Target, check_sizes, read_prompt_file, seeded
from vdu_peft.text_denoiser import TextDenoiser, open_denoiser, pipeline_kind
from vdu_peft.text_evaluation import MIN_FID_IMAGES, TextReport, asks, draw_and_look, evaluate_prompts, shown_places
from vdu_peft.text_judges import Judges, load_clip

logger = logging.getLogger(__name__)
# Reference images on which it is looked whether the judge knows their classes.
JUDGE_PROBE = 200


def run_sample(args: argparse.Namespace) -> int:
    if args.num_images is not None and args.num_images < 1:
        raise ConfigError(f"num_images must be at least 1, not {args.num_images}")
    if args.adapter is None and args.scale is not None:
        raise ConfigError("scale: is an adapter's; name it with adapter")
    if Image.registered_extensions().get(args.output_file.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"{args.output_file}: not an image file name; end it in .png")
    if args.output_file.is_dir():
        raise ConfigError(f"output_file: {args.output_file} is a folder; name a file")
    check_writable(args.output_file.parent, "output_file")
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
    count = args.num_images or (max(8, len(args.prompt)) if isinstance(denoiser, TextDenoiser) else 64)
    if args.adapter is None:
        panels = {"base": denoiser.sample(count, progress="base", **options)}
    else:
        denoiser.model = load_adapter(denoiser.model, args.adapter).get_base_model()
        panels, scales = {}, args.scale or [0.0, 1.0]
        for scale in scales:
            with adapter_scale(denoiser.model, scale):
                pass  # a block that is not there fails now, not after the grids before it are drawn
        for scale in scales:
            if isinstance(scale, dict):
                title = ", ".join(f"{block} {value:g}" for block, value in scale.items())
            else:
                title = "adapter off" if scale == 0 else f"scale {scale:g}"
            with adapter_scale(denoiser.model, scale):
                panels[title] = denoiser.sample(count, progress=title, **options)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    labelled_grids(panels, columns=8).save(args.output_file)
    print(f"wrote {args.output_file}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    if args.prompts:
        report = _evaluate_prompts(args)
    else:
        report = _evaluate_likeness(args) if args.forget_data else _evaluate_class(args)
    print("\n".join(report.lines()))
    print(f"look at {args.output_dir / 'grid.png'}; figures are in {args.output_dir / 'report.json'}")
    return 0


def _check_samples(args: argparse.Namespace) -> None:
    """Of an evaluation that draws samples without a prompt: enough of them, and no option or model that goes with
    prompts."""
    for name in ("forget_attribute", "clip_model", "nudenet", "resolution", "guidance_scale", "dtype"):
        if getattr(args, name) is not None and getattr(args, name) is not False:  # 0 is a guidance scale
            raise ConfigError(f"{name}: goes with prompts")
    if (kind := pipeline_kind(args.model)) in FAMILIES:
        raise ConfigError(f"model: a {kind}, which draws what prompts ask for; evaluate it with prompts")
    check_evaluation(args.num_samples)


def _check_no_choice(args: argparse.Namespace) -> None:
    """Of an evaluation without forget_data: no option that chooses from it."""
    if args.forget_label or args.max_forget_images is not None:
        name = "forget_label" if args.forget_label else "max_forget_images"
        raise ConfigError(f"{name}: chooses from forget_data, which is not given")


def _context(args: argparse.Namespace, *names: str) -> dict[str, str]:
    """How the figures of samples that are drawn without a prompt came about."""
    told = {name: str(getattr(args, name)) for name in ("model", "adapter", *names)}
    return told | {"sampler": f"DDIM, {args.num_inference_steps} steps, seed {args.seed}"}


def _evaluate_likeness(args: argparse.Namespace) -> LikenessReport:
    for name in ("judge", "reference", "forget_class"):
        if getattr(args, name) is not None:
            raise ConfigError(f"{name}: forget_data is looked for without a judge; give one or the other")
    source = forget_source(args)
    _check_samples(args)
    denoiser = Denoiser.from_pretrained(args.model)
    forget = source.load(denoiser.image_size, denoiser.channels)
    denoiser.model = load_adapter(denoiser.to_best_device().model, args.adapter).get_base_model()
    sampling = {"num_inference_steps": args.num_inference_steps, "seed": args.seed}
    report, panels = evaluate_likeness(denoiser, forget, num_samples=args.num_samples, progress=True, **sampling)
    report.save(args.output_dir, panels, **_context(args, "forget_data"))
    return report


def _evaluate_class(args: argparse.Namespace) -> Report:
    for name in ("judge", "reference", "label_column", "forget_class"):
        if getattr(args, name) is None:
            raise ConfigError(
                f"{name}: needed to evaluate a forgotten class; without a judge give forget_data, of text-to-image "
                "models prompts"
            )
    _check_samples(args)
    _check_no_choice(args)
    judge = open_judge(args.judge, best_device())
    if not 0 <= args.forget_class < judge.num_classes:
        raise ConfigError(f"forget_class must lie in 0 to {judge.num_classes - 1}, the judge's classes")
    denoiser = Denoiser.from_pretrained(args.model)
    source = ImageSource(
        args.reference,
        split=args.dataset_split or "test",
        image_column=args.image_column,
        label_column=args.label_column,
    )
    if isinstance(judge, PretrainedJudge):
        if denoiser.channels not in (1, judge.channels):
            raise ConfigError(f"judge: takes {judge.channels} channels, {args.model} draws {denoiser.channels}")
    elif (denoiser.image_size, denoiser.channels) != (judge.image_size, judge.channels):
        raise ConfigError(
            f"judge: takes {judge.channels} x {judge.image_size[0]} x {judge.image_size[1]} images, "
            f"{args.model} draws {denoiser.channels} x {denoiser.image_size[0]} x {denoiser.image_size[1]}"
        )
    reference, labels = source.load_labelled(denoiser.image_size, denoiser.channels)
    retained = int((labels != args.forget_class).sum())
    if retained < 100:
        raise ConfigError(f"reference: {retained} images without the forget class are too few for a u-FID; give 100")
    if (count := min(args.num_samples, retained)) < 10 * judge.num_features:
        logger.warning(
            "u-FID: on %d features it is too high from %d images; compare it only at the same numbers, or go by the "
            "KID",
            judge.num_features,
            count,
        )
    if denoiser.num_classes and not 0 <= labels.min() <= labels.max() < denoiser.num_classes:
        raise ConfigError(
            f"label_column: {labels.min()} to {labels.max()}, but {args.model} knows the classes 0 to "
            f"{denoiser.num_classes - 1}; the reference, the judge and the model must mean the same by a number"
        )
    # At random: in order, a file sorted by class or in turn would show it few of them.
    probe = torch.randperm(len(reference), generator=torch.Generator().manual_seed(args.seed))[:JUDGE_PROBE]
    accuracy = (judge.judge(reference[probe])[1] == labels[probe]).double().mean().item()
    if accuracy < 0.5:
        logger.warning(
            "judge: gives only %.0f %% of the reference's images their label; it cannot tell them, or its class "
            "numbers are not the reference's",
            100 * accuracy,
        )
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
    context = _context(args, "judge", "reference") | {"judge_accuracy": accuracy}
    report.save(args.output_dir, {"adapter off": before, "adapter on": after}, **context)
    return report


def _evaluate_prompts(args: argparse.Namespace) -> TextReport:
    check_evaluation()
    if args.forget_data is not None:
        raise ConfigError("forget_data: of a prompt file the judge tells what is forgotten; leave it out")
    if args.forget_class is not None:
        raise ConfigError("forget_class: a prompt file's target is a forget_attribute")
    if args.label_column is not None:
        raise ConfigError("label_column: the reference of a prompt file has no labels; leave it out")
    _check_no_choice(args)
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
    prompts = seeded(read_prompt_file(args.prompts, judge, target), args.seed)
    denoiser = _drawing_denoiser(args, [prompt.text for prompt in prompts])
    if not isinstance(denoiser, TextDenoiser):
        raise ConfigError(f"prompts: {args.model} is not a text-to-image model")
    check_sizes(prompts, denoiser.image_size)
    if judge and denoiser.image_size != judge.image_size:
        raise ConfigError(f"judge: takes {judge.image_size} images, {args.model} draws {denoiser.image_size}")
    reference = None
    if args.reference is not None:
        source = ImageSource(args.reference, split=args.dataset_split or "test", image_column=args.image_column)
        images = source.load(denoiser.image_size, denoiser.channels)
        if len(images) < MIN_FID_IMAGES:
            raise ConfigError(f"reference: {len(images)} images are too few for a distance; give {MIN_FID_IMAGES}")
        reference, _ = judge.judge(images)
        asked = asks(prompts, target)  # with a reference there is a judge, and with that a target
        for kind, count in (("target", int(asked.sum())), ("other", int((~asked).sum()))):
            if 0 < count < MIN_FID_IMAGES:
                logger.warning(
                    "reference: of %d %s prompts no distance to it is told; give %d", count, kind, MIN_FID_IMAGES
                )
    clip = load_clip(args.clip_model) if args.clip_model is not None else None
    judges = Judges(judge, clip, _nude_detector() if args.nudenet else None)
    denoiser.model = load_adapter(denoiser.to_best_device().model, args.adapter).get_base_model()
    drawn = (denoiser, prompts, judges, shown_places(prompts, target))
    sampling = {"num_inference_steps": args.num_inference_steps}
    with adapter_scale(denoiser.model, 0):
        seen_before, before = draw_and_look(*drawn, progress="adapter off", **sampling)
    seen_after, after = draw_and_look(*drawn, progress="adapter on", **sampling)
    report = evaluate_prompts(seen_before, seen_after, prompts, target, reference)
    names = ("model", "adapter", "judge", "prompts", "reference", "forget_attribute", "clip_model")
    context = {name: str(getattr(args, name)) for name in names if getattr(args, name) is not None}
    context |= {"guidance_scale": denoiser.guidance_scale, "image_size": denoiser.image_size}
    context["dtype"] = str(denoiser.dtype).removeprefix("torch.")
    context["sampler"] = f"{type(denoiser.schedule.sampler(1, denoiser.device)).__name__}, {args.num_inference_steps} "
    context["sampler"] += f"steps, seed {args.seed} where a prompt has none of its own"
    report.save(args.output_dir, before, after, **context)
    return report


def _nude_detector():
    from nudenet import NudeDetector

    return NudeDetector()


def _drawing_denoiser(args: argparse.Namespace, prompts: list[str]) -> Denoiser:
    """The model as the options tell to draw with it."""
    if args.dtype == "float16" and best_device().type == "cpu":
        raise ConfigError("dtype: float16 needs a GPU; use bfloat16 or float32")
    denoiser = open_denoiser(
        args.model,
        prompts,
        DTYPES[args.dtype or "float32"],
        resolution=args.resolution,
        guidance_scale=args.guidance_scale,
    )
    if args.dtype and not isinstance(denoiser, TextDenoiser):
        raise ConfigError(f"dtype: {args.model} is not a text-to-image model; leave it out")
    return denoiser
