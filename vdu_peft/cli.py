"""``vdu-peft``: unlearn | sample | compose | merge | export | inspect | evaluate | demo. Call and print."""

import argparse
import json
import logging
import sys
import time

import torch
from accelerate import PartialState
from datasets.exceptions import DatasetsError
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from vdu_peft.adapter import AdapterError, check_replaceable, describe, load_adapter
from vdu_peft.atomic_folder import FolderError, check_output
from vdu_peft.checkpoint import CHECKPOINT_NAME
from vdu_peft.cli_draw import run_evaluate, run_sample
from vdu_peft.cli_unlearn import run_demo_command, run_unlearn
from vdu_peft.compose import compose
from vdu_peft.config import ConfigError
from vdu_peft.denoiser import ModelError
from vdu_peft.export import export_lora, merge
from vdu_peft.first_line import first_line
from vdu_peft.hub import HubError, check_hub, push_to_hub
from vdu_peft.judge import JudgeError
from vdu_peft.options import parse
from vdu_peft.pixels import DataError
from vdu_peft.prompt_file import PromptFileError
from vdu_peft.text_denoiser import open_network
from vdu_peft.trainer import UnlearnError

BAD_INPUT = (
    AdapterError,
    ConfigError,
    DataError,
    FolderError,
    HubError,
    JudgeError,
    ModelError,
    PromptFileError,
    DatasetsError,
    OSError,
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns 0, 1 for a run that failed (nothing learned, collapsed), 2 for bad input, 130 for an
    interrupt."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args, started = None, time.time()
    try:
        args = parse(argv)
        repository = _hub_repository(args)
        code = COMMANDS[args.command](args)
        if repository is not None and code == 0 and not getattr(args, "dry_run", False):
            _publish(args, repository)
        return code
    except BAD_INPUT as error:
        print(f"vdu-peft: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        mend = (
            "a smaller train_batch_size with gradient_accumulation_steps, gradient_checkpointing, mixed_precision bf16"
        )
        if args.command not in ("unlearn", "demo"):
            mend = "of text-to-image models dtype bfloat16 or a smaller resolution"
        print(f"vdu-peft: error: out of memory ({first_line(error)}); use {mend}", file=sys.stderr)
        return 1
    except UnlearnError as error:
        print(f"vdu-peft: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nvdu-peft: interrupted{_left(args, started)}", file=sys.stderr)
        return 130


def _left(args: argparse.Namespace | None, started: float) -> str:
    """What a run that is interrupted leaves, and how to go on from it, as a part of a sentence."""
    if args is None or args.command != "unlearn" or args.dry_run:
        return ""
    adapter, checkpoint = args.output_dir / "adapter" / SAFETENSORS_WEIGHTS_NAME, args.output_dir / CHECKPOINT_NAME
    # By their times: earlier runs' may lie there, too.
    learned, kept = (file.is_file() and file.stat().st_mtime >= started for file in (adapter, checkpoint))
    if learned:
        return f"; all steps are done, and the adapter is in {adapter.parent}"
    if kept or args.resume_from_checkpoint:
        return f"; --resume_from_checkpoint latest goes on from the last checkpoint in {args.output_dir}"
    return "; checkpointing_steps keeps what is learned on the way" if args.mixed_precision != "fp16" else ""


def _hub_repository(args: argparse.Namespace) -> str | None:
    """Where to upload to, checked before any work; None for nowhere."""
    if getattr(args, "push_to_hub", False):
        return check_hub(args.hub_model_id or args.output_dir.resolve().name)
    for name in ("hub_model_id", "hub_private_repo"):
        if getattr(args, name, None):
            raise ConfigError(f"{name}: nothing is uploaded without push_to_hub")
    return None


def _publish(args: argparse.Namespace, repository: str) -> None:
    # Of a run the adapter, without its checkpoints.
    folder = args.output_dir / "adapter" if args.command == "unlearn" else args.output_dir
    if PartialState().is_main_process:
        print(f"uploaded to {push_to_hub(folder, repository, args.hub_private_repo)}")


def _compose(args: argparse.Namespace) -> int:
    # Before the network is read or fetched; it, too, must stay.
    check_output(args.output_dir, [args.model, *args.adapter], args.overwrite)
    check_replaceable(args.output_dir)
    network, name = open_network(args.model)
    discarded = compose(network, args.adapter, args.output_dir, args.rank, name, args.overwrite)
    worst = max(discarded, key=discarded.get)
    print(
        f"wrote {args.output_dir}; energy of the delta that the rank discards: at most {discarded[worst]:.2%} ({worst})"
    )
    return 0


def _merge(args: argparse.Namespace) -> int:
    dtype = merge(args.model, args.adapter, args.output_dir, args.dtype, args.onnx, args.overwrite).dtype
    # Named: of a pipeline whose parts are kept in several dtypes each would else be loaded in its own.
    how = f"diffusers.DiffusionPipeline.from_pretrained({str(args.output_dir)!r}, dtype={dtype})"
    print(f"wrote {args.output_dir}: load it with {how}")
    return 0


def _export(args: argparse.Namespace) -> int:
    export_lora(args.adapter, args.output_dir, args.format, args.overwrite)
    how = "peft.PeftModel.from_pretrained" if args.format == "peft" else "a pipeline's load_lora_weights"
    print(f"wrote {args.output_dir}: load it with {how}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    network, _ = open_network(args.model)
    model_parameters = sum(p.numel() for p in network.parameters())
    peft_model = load_adapter(network, args.adapter)
    config = peft_model.peft_config["default"]
    rows = describe(peft_model)
    shown = {k: getattr(config, k) for k in ("r", "lora_alpha", "prior_scale", "init_scale", "variational")}
    total = sum(row["parameters"] for row in rows)
    print(json.dumps(shown))
    print(f"{total:,} adapter parameters, {100 * total / model_parameters:.1f} % of the model's {model_parameters:,}")
    print(f"{'layer':<52}{'rank':>5}{'params':>9}{'|dW|/|W|':>10}{'SNR':>10}{'KL (nats)':>12}")
    for row in rows:
        snr = "-" if row["signal_to_noise"] is None else f"{row['signal_to_noise']:.3g}"
        kl = "-" if row["kl"] is None else f"{row['kl']:.1f}"
        print(f"{row['layer']:<52}{row['rank']:>5}{row['parameters']:>9}{row['delta_norm']:>10.4f}{snr:>10}{kl:>12}")
    return 0


COMMANDS = {
    "unlearn": run_unlearn,
    "sample": run_sample,
    "compose": _compose,
    "merge": _merge,
    "export": _export,
    "inspect": _inspect,
    "evaluate": run_evaluate,
    "demo": run_demo_command,
}
