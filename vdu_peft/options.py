"""The options of ``vdu-peft``: one parser for every command, from the command line and from a file."""

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from vdu_peft.atomic_folder import check_output, check_writable
from vdu_peft.checkpoint import CHECKPOINT_NAME
from vdu_peft.config import ConfigError, UnlearnConfig, VDUConfig
from vdu_peft.data import ImageSource
from vdu_peft.denoiser import best_device
from vdu_peft.export import DTYPES, FORMATS
from vdu_peft.option_file import file_arguments
from vdu_peft.precision import quick_precision
from vdu_peft.version import __version__

# The adapter's options, by the names that diffusers' LoRA scripts use.
ADAPTER_OPTIONS = {"rank": "r", "lora_alpha": "lora_alpha", "prior_scale": "prior_scale", "init_scale": "init_scale"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line as a namespace whose ``command`` is the command's name.

    Raises:
        ConfigError: the file of ``--config`` cannot be read, or output_dir holds something that is not to be
            overwritten.
    """
    parser = argparse.ArgumentParser(prog="vdu-peft", description="Remove a class or a concept from a diffusion model.")
    parser.add_argument("--version", action="version", version=f"vdu-peft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name, summary, example):
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=name)
        sub.add_argument("--config", type=Path, help="YAML or JSON file of options; the command line wins over it")
        return sub

    sub = command(
        "unlearn",
        "Learn an adapter that forgets a folder of images.",
        "vdu-peft unlearn --model google/ddpm-cifar10-32 --forget_data bad_pictures/ --output_dir out",
    )
    _model_argument(sub)
    sub.add_argument(
        "--forget_data",
        required=True,
        help="folder of images (png, jpg, webp), .npz file (uint8, or floats in [-1, 1] or [0, 1]), or hub dataset id; "
        "of an image of another shape than the model's the middle is used, and what is transparent becomes white",
    )
    sub.add_argument("--output_dir", type=Path, required=True, help="gets adapter/, history.json and pictures")
    _source_arguments(sub, "default train")
    _forget_arguments(sub)
    sub.add_argument(
        "--forget_prompt",
        help='of a text-to-image model: what draws the forget images; "" for what is drawn without a prompt',
    )
    sub.add_argument(
        "--caption_column",
        help="of a text-to-image model, instead of one prompt: each forget image's own, a column of metadata.csv or "
        "metadata.jsonl in the folder (beside file_name), of a hub dataset, or an array of an .npz",
    )
    sub.add_argument("--anchor_prompt", default="", help="what that prompt shall draw instead; default: no condition")
    sub.add_argument(
        "--forget_concept",
        nargs="+",
        default=[],
        help="words of the captions that are to be forgotten, rather than all that a caption says: every image's own "
        "caption, with anchor_concept in place of them, is what its caption shall draw instead",
    )
    sub.add_argument(
        "--anchor_concept", nargs="+", default=[], help="one for all, or one for each; default: the words are left out"
    )
    sub.add_argument(
        "--retain_prompts", type=Path, help="file of prompts to retain, one a line; default: everyday things"
    )
    _text_arguments(sub)
    sub.add_argument("--target_modules", nargs="+", help="modules to adapt; the default suits the model")
    sub.add_argument(
        "--resume_from_checkpoint", choices=("latest",), help="go on from the last checkpoint in output_dir"
    )
    sub.add_argument("--overwrite", action="store_true", help="write into an output_dir that is not empty")
    sub.add_argument("--dry_run", action="store_true", help="check model, images and options, then stop")
    _hub_arguments(sub)
    _run_arguments(sub)

    sub = command(
        "sample",
        "Draw a grid with the adapter off, on, or at any scale.",
        "vdu-peft sample --model base --adapter out/adapter --scale 0 0.5 1 --output_file grid.png",
    )
    _model_argument(sub)
    sub.add_argument("--adapter", type=Path, help="folder of a saved adapter; the base alone when left out")
    sub.add_argument(
        "--scale",
        type=_scale,
        nargs="+",
        help="one grid for each; 0 is off, 1 is on (default: both), and down_blocks=0.5,mid_block=0 scales by block",
    )
    sub.add_argument(
        "--num_images", type=int, help="of each grid; default 64, of a text-to-image model 8, or one of each prompt"
    )
    sub.add_argument("--class_labels", type=int, nargs="+", help="of a class-conditional model: draw these in turn")
    sub.add_argument("--prompt", nargs="+", default=[], help="of a text-to-image model: draw these in turn")
    _text_arguments(sub)
    _dtype_argument(sub)
    _steps_argument(sub)
    sub.add_argument("--output_file", type=Path, default=Path("samples.png"), help="picture of all grids")
    sub.add_argument("--seed", type=int, default=0, help="of the samples, the same at every scale")

    sub = command(
        "compose",
        "Write one adapter that forgets what several do: the product of their posteriors.",
        "vdu-peft compose --model base --adapter sword/adapter robe/adapter --output_dir both",
    )
    _model_argument(sub)
    sub.add_argument("--adapter", type=Path, nargs="+", required=True, help="folders of two or more saved adapters")
    sub.add_argument("--rank", type=int, help="of the new adapter; the sum of theirs when left out")
    _output_arguments(sub)

    sub = command(
        "merge",
        "Write a complete pipeline with the posterior mean merged in; it loads without this package.",
        "vdu-peft merge --model base --adapter out/adapter --output_dir merged",
    )
    _model_argument(sub)
    _adapter_argument(sub)
    sub.add_argument("--dtype", choices=DTYPES, help="of the written weights; the base's own when left out")
    sub.add_argument("--onnx", action="store_true", help="write unet/model.onnx, too; of a UNet2DModel")
    _output_arguments(sub)

    sub = command(
        "export",
        "Write the posterior mean alone as a plain LoRA for stock PEFT, diffusers, ComfyUI or WebUI.",
        "vdu-peft export --adapter out/adapter --format kohya --output_dir lora",
    )
    _adapter_argument(sub)
    sub.add_argument("--format", choices=FORMATS, default="peft", help="kohya is what ComfyUI and WebUI read")
    _output_arguments(sub)

    sub = command(
        "inspect",
        "Show an adapter's config, sizes, per-layer delta norms and signal-to-noise.",
        "vdu-peft inspect --model base --adapter out/adapter",
    )
    _model_argument(sub)
    _adapter_argument(sub)

    sub = command(
        "evaluate",
        "Measure what an adapter forgot, by the forget images alone, or with what it cost, by a judge and real images.",
        "vdu-peft evaluate --model base --adapter out/adapter --forget_data bad_pictures/ --output_dir report\n"
        "  vdu-peft evaluate --model base --adapter out/adapter --judge judge.safetensors --reference test.npz "
        "--image_column images --label_column labels --forget_class 3 --output_dir report\n"
        "  vdu-peft evaluate --model sd --adapter out/adapter --prompts prompts.csv --judge judge.safetensors "
        "--forget_attribute weapon=sword --output_dir report",
    )
    _model_argument(sub)
    _adapter_argument(sub)
    sub.add_argument(
        "--forget_data",
        help="of a model that draws without prompts: the forget images, as for unlearn; how many samples look like "
        "them, told without a judge or labels",
    )
    _forget_arguments(sub)
    sub.add_argument(
        "--judge",
        help="an image classifier of transformers (folder or hub id, such as microsoft/resnet-50), or a file that "
        "examples/train_judge.py writes; for prompts one that examples/train_attribute_judge.py writes",
    )
    sub.add_argument(
        "--reference", help="real images: with labels, of all classes; for prompts without labels or the target"
    )
    _source_arguments(sub, "default train of forget_data, test of the reference")
    sub.add_argument("--forget_class", type=int, help="number of the forgotten class, the judge's and the reference's")
    sub.add_argument(
        "--prompts",
        type=Path,
        help="of a text-to-image model: CSV with a column prompt; seed, guidance_scale and the judge's attributes "
        "(what the prompt asks of each) where it has them",
    )
    sub.add_argument("--forget_attribute", help="what the adapter forgot, as the judge calls it: weapon=sword")
    sub.add_argument("--clip_model", help="hub id or folder: measure the CLIP score of image and prompt, too")
    sub.add_argument("--nudenet", action="store_true", help="count the exposed parts that NudeNet finds, too")
    _text_arguments(sub)
    _dtype_argument(sub)
    sub.add_argument(
        "--num_samples",
        type=int,
        default=1000,
        help="samples with the adapter off, and as many with it on (for forget_data as many again, to compare with); "
        "of prompts one each",
    )
    _steps_argument(sub)
    sub.add_argument("--output_dir", type=Path, required=True, help="gets report.json and pictures")
    sub.add_argument("--overwrite", action="store_true", help="write into an output_dir that is not empty")
    sub.add_argument("--seed", type=int, default=1, help="of the samples")

    sub = command(
        "demo",
        "Forget one digit of the MNIST model that ships with the package.",
        "vdu-peft demo --forget_digit 1 --output_dir demo",
    )
    sub.add_argument("--forget_digit", type=int, default=1, choices=range(10), help="what to forget")
    sub.add_argument("--num_samples", type=int, default=200, help="samples before and after, for the report")
    _steps_argument(sub)
    sub.add_argument("--output_dir", type=Path, default=Path("demo"), help="gets adapter/, report.json and pictures")
    sub.add_argument("--overwrite", action="store_true", help="write into an output_dir that is not empty")
    # Its model has no condition, and it does not resume.
    left_out = ("forget_class", "anchor_class", "null_class", "checkpointing_steps")
    _run_arguments(sub, left_out, mixed_precision=quick_precision(best_device()))

    args = _with_config_file(parser, commands, argv)
    if getattr(args, "resume_from_checkpoint", None):
        check_writable(args.output_dir, "output_dir")
    elif hasattr(args, "overwrite"):
        if args.command == "unlearn" and (args.output_dir / CHECKPOINT_NAME).is_file() and not args.overwrite:
            raise ConfigError(
                f"{args.output_dir}: holds a run's checkpoint; go on from it with --resume_from_checkpoint latest, or "
                "begin anew with --overwrite"
            )
        check_output(args.output_dir, [], args.overwrite)
    return args


def _with_config_file(
    parser: argparse.ArgumentParser, commands: argparse._SubParsersAction, argv: list[str] | None
) -> argparse.Namespace:
    """Options of ``--config FILE`` go in front of the command line's own, which therefore win."""
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    file = finder.parse_known_args(argv)[0].config
    if file is None:
        return _known_arguments(parser, commands, argv)
    if not argv or argv[0] not in commands.choices:
        raise ConfigError(f"config: the command comes first, as in vdu-peft unlearn --config {file}")
    options = commands.choices[argv[0]]._option_string_actions
    known = {option[2:]: action for option, action in options.items() if option.startswith("--")}
    flags = [name for name, action in known.items() if action.nargs == 0]
    return _known_arguments(parser, commands, [argv[0], *file_arguments(file, argv[0], known, flags), *argv[1:]])


def _known_arguments(
    parser: argparse.ArgumentParser, commands: argparse._SubParsersAction, argv: list[str]
) -> argparse.Namespace:
    """As ``parse_args``; for an option that is not there it names the one that is most like it."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands.choices[args.command]
        near = difflib.get_close_matches(unknown[0].split("=")[0], command._option_string_actions, 1)
        command.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; is it {near[0]}?" if near else ""))
    return args


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Tells the default of every option that has one and does not tell it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_flag = action.default is False and not isinstance(action, argparse.BooleanOptionalAction)
        if is_flag or action.default is None or action.default in ("", [], argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text.removesuffix('.')}. Default: %(default)s."


def forget_source(args: argparse.Namespace) -> ImageSource:
    """The forget images as the options name them.

    Raises:
        ConfigError: a number of none, or labels to choose from and no choice.
    """
    if args.max_forget_images is not None and args.max_forget_images < 1:
        raise ConfigError(f"max_forget_images must be at least 1, not {args.max_forget_images}")
    if args.label_column is not None and not args.forget_label:
        raise ConfigError("label_column: chooses nothing by itself; say which label to forget with forget_label")
    return ImageSource(
        args.forget_data,
        split=args.dataset_split or "train",
        image_column=args.image_column,
        label_column=args.label_column,
        labels=tuple(args.forget_label),
        max_images=args.max_forget_images,
    )


def _scale(text: str) -> float | dict[str, float]:
    """A scale for all layers, or one for each block."""
    try:
        if "=" not in text:
            return float(text)
        return {block.strip(): float(value) for block, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor block=number,...") from error


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrained_model_name_or_path",
        "--model",
        dest="model",
        required=True,
        help="pipeline folder, UNet folder or hub id",
    )


def _adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, required=True, help="folder of a saved adapter, such as out/adapter")


def _steps_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_inference_steps", type=int, default=25, help="sampler steps")


def _forget_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images of forget_data are meant."""
    parser.add_argument("--forget_label", nargs="+", default=[], help="keep only images that the data set labels so")
    parser.add_argument("--max_forget_images", type=int, help="use at most this many, evenly spread")


def _source_arguments(parser: argparse.ArgumentParser, default_split: str) -> None:
    """Where images and labels lie in an ImageSource."""
    parser.add_argument("--dataset_split", help=f"split of a hub dataset; {default_split}")
    parser.add_argument("--image_column", help="image column of a hub dataset, or array name in an .npz")
    parser.add_argument("--label_column", help="label column of a hub dataset, or array name in an .npz")


def _text_arguments(parser: argparse.ArgumentParser) -> None:
    """How a text-to-image model draws."""
    parser.add_argument("--resolution", type=int, help="of a text-to-image model; default the model's own")
    parser.add_argument("--guidance_scale", type=float, help="of a text-to-image model; default the stock pipeline's")


def _dtype_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of a text-to-image model's computation; default float32")


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    """A folder that is written whole."""
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output_dir")
    _hub_arguments(parser)


def _hub_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--push_to_hub", action="store_true", help="upload the result to the Hugging Face hub")
    parser.add_argument("--hub_model_id", help="repository to upload to; output_dir's name when left out")
    parser.add_argument("--hub_private_repo", action="store_true", help="if it is not there yet, make it a private one")


def _explained(config: type) -> dict[str, str]:
    """What the docstring's ``Args`` say of every field: the one place where options are explained."""
    # Without docstrings (python -OO) there is nothing to find.
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(config) or "", flags=re.MULTILINE)
    # Nobody can give None on a command line.
    return {
        name: " ".join(text.replace("``", "").split()).replace("hen None", "hen left out") for name, text in entries
    }


def _run_arguments(parser: argparse.ArgumentParser, left_out: Sequence[str] = (), **defaults) -> None:
    """One option for every other field of UnlearnConfig, and the adapter's; ``defaults`` in place of the fields'."""
    group = parser.add_argument_group("unlearning")
    explained = _explained(UnlearnConfig)
    for field in dataclasses.fields(UnlearnConfig):
        if field.name in left_out:
            continue
        kind, default = field.type, defaults.get(field.name, field.default)
        options = {"default": default, "help": explained.get(field.name, "").replace("%", "%%")}
        if type(None) in typing.get_args(kind):  # int | None: int
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        if kind is bool:
            group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(kind) is typing.Literal:
            group.add_argument(f"--{field.name}", choices=typing.get_args(kind), **options)
        else:
            group.add_argument(f"--{field.name}", type=kind, **options)
    group = parser.add_argument_group("adapter")
    for option, name in ADAPTER_OPTIONS.items():
        field = VDUConfig.__dataclass_fields__[name]
        group.add_argument(f"--{option}", type=field.type, default=field.default, help=field.metadata["help"])
    text = VDUConfig.__dataclass_fields__["variational"].metadata["help"]
    group.add_argument("--variational", action=argparse.BooleanOptionalAction, default=True, help=text)
