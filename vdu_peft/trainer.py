"""unlearn(): the loop that joins adapter, objective and replay, on accelerate."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from peft import PeftModel
from tqdm.auto import tqdm

from vdu_peft.acceleration import checkpointed, prepared, run_accelerator
from vdu_peft.adapter import (
    attach,
    check_replaceable,
    detach,
    in_base_mode,
    posterior_size,
    refuse_adapted,
    total_kl,
    trainable_state,
    undone_on_error,
)
from vdu_peft.batch import BatchSource, batch_shares, forget_timesteps
from vdu_peft.checkpoint import check_resumable, load_checkpoint, run_options, save_checkpoint
from vdu_peft.classes import check_labels, run_classes
from vdu_peft.config import ConfigError, UnlearnConfig, VDUConfig
from vdu_peft.contexts import adapter_scale, dropping, evaluating, posterior_noise
from vdu_peft.data import ImageDataset
from vdu_peft.denoiser import Denoiser, as_denoiser
from vdu_peft.history import COLLAPSE, FAILED, collapsed, recent, run_status, steps_to_target, target_holds
from vdu_peft.learning_rate import last_step, lr_factor
from vdu_peft.pixels import check_images
from vdu_peft.reached import Reached, reached
from vdu_peft.replay import OwnAlike, own_replay
from vdu_peft.run_folder import run_facts, save_run
from vdu_peft.strength import Strength, calibrate, scale_delta
from vdu_peft.terms import loss_terms
from vdu_peft.variations import NOISE_SHARE, variations


class UnlearnError(RuntimeError):
    """A run that cannot go on; the message says what is kept and what to change."""


@dataclass
class UnlearnResult:
    """What :func:`unlearn` returns.

    Attributes:
        model: the PEFT model with the trained adapter; its base is the model passed in.
        denoiser: the denoiser around it.
        history: one record per optimizer step: loss, plasticity, stability, kl (nats), forget_ratio; redirect, too,
            where the forgotten class is not the null class.
        reached: how far the steps have come.
        status: ``forgotten``, ``partly forgotten``, ``nothing learned`` or ``collapsed``.
        num_replay: how many replay images were kept.
        variations: (K, C, H, W) in [-1, 1], what the forget images were made up by, variations of each in turn.
        trained_parameters: adapter parameters that the optimizer saw.
        strength: what is left of the forget concept, and the scale that the delta was given for it, after all that
            ``history`` and ``reached`` tell of; None where that is not looked for: of a model with a condition, of
            given replay, of a single forget image, of a failed run.
        alike_seeds: that those of the pre-trained model's own samples were drawn from, with
            ``config.replay_inference_steps``, that look like the forget images; none where that is not looked for.
    """

    model: PeftModel
    denoiser: Denoiser
    history: list[dict[str, float]]
    reached: Reached
    status: str
    num_replay: int
    variations: torch.Tensor
    trained_parameters: int
    strength: Strength | None
    alike_seeds: list[int]

    @property
    def failed(self) -> bool:
        return self.status in FAILED


def unlearn(
    model,
    forget: torch.Tensor,
    config: UnlearnConfig | None = None,
    adapter: VDUConfig | None = None,
    *,
    forget_labels: torch.Tensor | None = None,
    anchor_labels: torch.Tensor | None = None,
    replay: torch.Tensor | None = None,
    replay_labels: torch.Tensor | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> UnlearnResult:
    """Learn a variational adapter that forgets the given images.

    Args:
        model: a Denoiser, a diffusers pipeline, a folder or a hub id.
        forget: (N, C, H, W) in [-1, 1].
        config: the run; defaults when None.
        adapter: the adapter; :meth:`VDUConfig.for_model` when None.
        forget_labels: (N,) int64, of a model with a condition, the label under which it knows each forget image;
            ``config.forget_class`` for all when None.
        anchor_labels: (N,) int64, what each forget image's label shall draw instead; ``config.anchor_class`` for all
            when None.
        replay: (M, C, H, W) in [-1, 1] to retain; the model draws its own when None.
        replay_labels: (M,) int64, the classes of ``replay``, for a class-conditional model.
        output_dir: gets ``adapter/``, ``history.json`` and checkpoints; nothing is written when None.
        resume: go on from the last checkpoint in ``output_dir``, to the same result as without the interruption.
        callback: called with (step, terms) after every optimizer step.

    Raises:
        DataError, ConfigError, ModelError: bad input, before any heavy work.
        UnlearnError: the loss is not finite; the last good adapter is kept in ``output_dir``. After an error up to the
            last step the model is without an adapter again.
    """
    denoiser = as_denoiser(model)
    refuse_adapted(denoiser.model)
    config = (config or UnlearnConfig()).filled(denoiser.condition)
    forget = check_images(forget, denoiser.image_size, denoiser.channels, "forget images")
    classes = run_classes(denoiser, config, forget_labels, len(forget), anchor_labels, draws_replay=replay is None)
    replay_labels = None if replay_labels is None else replay_labels.cpu()
    replay = given_replay = _check_replay(replay, replay_labels, denoiser)
    output_dir = Path(output_dir) if output_dir is not None else None
    if resume:
        check_resumable(output_dir, config)
    if replay is None:
        denoiser.check_inference_steps(config.replay_inference_steps, "replay_inference_steps")
    accelerator = run_accelerator(config, output_dir, denoiser.dtype)
    if output_dir is not None:
        check_replaceable(output_dir / "adapter")
        output_dir.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written fails now, not after training
    bar_off = not accelerator.is_local_main_process
    # In the steps, too, the base computes as when it draws.
    with checkpointed(denoiser.model, config), evaluating(denoiser.model):
        with undone_on_error(denoiser.model):  # the caller's can be used again; what was learned whole is kept
            denoiser.model.to(accelerator.device).requires_grad_(False)
            set_seed(config.seed)
            # Once: what encodes is not needed again. A latent's mirror image is not its image's.
            mirrored = denoiser.encode(forget.flip(-1)) if config.random_flip else None
            images, forget = forget, denoiser.encode(forget)
            peft_model = attach(denoiser.model, adapter or VDUConfig.for_model(denoiser.model))
            history: list[dict[str, float]] = []
            own: OwnAlike | None = None
            varied = forget[:0]
            parameters = {n: p for n, p in denoiser.model.named_parameters() if p.requires_grad}
            num_posterior = posterior_size(denoiser.model)
            optimizer = torch.optim.Adam(parameters.values(), lr=config.learning_rate)
            options = run_options(
                config,
                peft_model.active_peft_config,
                images,
                torch.cat([classes.forget_labels[:, None], classes.anchors], dim=1) if classes else None,
                given_replay,
                replay_labels,
                getattr(denoiser, "prompts", None),
                denoiser.guidance_scale,
                batch_shares(classes) | {"variation_noise": NOISE_SHARE},
                accelerator.num_processes,
                (p for p in denoiser.model.parameters() if not p.requires_grad),
            )
            if resume:  # before replay is drawn, which takes its time, and in which the adapter has no part
                history = load_checkpoint(output_dir, parameters, optimizer, options)
            if replay is None:
                with adapter_scale(denoiser.model, 0), accelerator.autocast():
                    retained, title = classes.retained if classes else None, None if bar_off else "replay"
                    replay, replay_labels, own = own_replay(denoiser, forget, config, retained, title)
            else:
                replay = denoiser.encode(replay)
            if classes is None and config.plasticity != "elbo":  # whose likelihood is of the given images
                with adapter_scale(denoiser.model, 0), accelerator.autocast():
                    title = None if bar_off else "variations"
                    varied = denoiser.decode(variations(denoiser, forget, replay, config, title))
                forget = torch.cat([forget, denoiser.encode(varied)])
                if mirrored is not None:
                    mirrored = torch.cat([mirrored, denoiser.encode(varied.flip(-1))])
            # Processes may round apart, but must draw from one range.
            (shown_at,) = broadcast_object_list([forget_timesteps(config, denoiser, replay, conditional=bool(classes))])
            source = BatchSource(
                ImageDataset(forget, mirrored),
                replay,
                replay_labels,
                classes,
                config,
                shown_at,
                denoiser.num_train_timesteps,
            )
            facts = run_facts(
                denoiser, len(images), len(varied), shown_at, peft_model.active_peft_config.r, classes, config
            )
            save = partial(save_run, peft_model, denoiser.name, output_dir, facts, history, accelerator)

            def ended() -> tuple[str, Reached]:
                at = reached(denoiser, source, config, accelerator, progress=not bar_off)
                return run_status(history, at, config), at

            if config.report_to and accelerator.is_main_process:
                accelerator.init_trackers("unlearn", config={k: v for k, v in asdict(config).items() if v is not None})
            bar = tqdm(total=config.max_train_steps, initial=len(history), desc="unlearn", disable=bar_off)
            with bar, prepared(accelerator, denoiser.model, optimizer) as (network, optimizer):
                to_target = steps_to_target(history, config)
                while (step := len(history)) < last_step(to_target, config.max_train_steps) and not collapsed(history):
                    # Every step has its own seed, so that a resumed run draws what the uninterrupted one would have.
                    set_seed((config.seed * 1_000_003 + step) % 2**32)
                    for group in optimizer.param_groups:
                        group["lr"] = config.learning_rate * lr_factor(step, config.max_train_steps, to_target)
                    terms = _gradient(denoiser, network, source, config, num_posterior, accelerator)
                    record = {name: accelerator.reduce(value, "mean").item() for name, value in terms.items()}
                    grad_norm = accelerator.clip_grad_norm_(parameters.values(), config.max_grad_norm)
                    # With a gradient scaler an infinite norm is ordinary: it skips the step and lowers the scale.
                    finite_gradient = (
                        accelerator.scaler is not None or torch.isfinite(torch.as_tensor(grad_norm)).item()
                    )
                    if not (finite_gradient and torch.isfinite(torch.tensor(list(record.values()))).all()):
                        where = save(*ended()) if history else save()
                        # Before the first step the adapter is the model itself.
                        mend = "Lower learning_rate" if history else "Look whether the model draws images as it is"
                        raise UnlearnError(
                            f"step {step + 1}: the loss or its gradient is not finite ({record}); {where}. "
                            f"{mend}, or use mixed_precision no"
                        )
                    optimizer.step()
                    optimizer.zero_grad()
                    history.append(record)
                    if to_target is None and target_holds(history, config):
                        to_target = len(history)
                    bar.update()
                    bar.set_postfix({name: f"{value:.3g}" for name, value in record.items()})
                    if config.report_to:
                        accelerator.log(record, step=step + 1)
                    if callback:
                        callback(step + 1, record)
                    if config.checkpointing_steps and len(history) % config.checkpointing_steps == 0 and output_dir:
                        if accelerator.is_main_process:
                            save_checkpoint(output_dir, parameters, optimizer, history, options)
                        accelerator.wait_for_everyone()
        status, at, strength = *ended(), None
        save(status, at)  # before it is looked what it leaves: an interrupt there loses nothing of the run
        if own is not None and status not in FAILED:
            with accelerator.autocast():
                strength = calibrate(
                    denoiser,
                    own,
                    tolerance=config.forget_tolerance,
                    # Stability grows about as the square of the delta.
                    max_scale=(COLLAPSE / max(recent(history, "stability"), 1e-12)) ** 0.5,
                    num_inference_steps=config.replay_inference_steps,
                    progress=not bar_off,
                )
            (strength,) = broadcast_object_list([strength])  # processes may round apart, but must end with one adapter
            status = run_status(history, at, config, strength.remaining_share)
            scale_delta(denoiser.model, strength.scale)
            save(status, at, strength)
        if config.report_to:
            accelerator.end_training()  # takes processes apart, after which they cannot wait for each other
    in_base_mode(peft_model)
    return UnlearnResult(
        peft_model,
        denoiser,
        history,
        at,
        status,
        len(replay),
        varied,
        sum(p.numel() for p in parameters.values()),
        strength,
        own.seeds if own else [],
    )


def _gradient(
    denoiser: Denoiser,
    network: torch.nn.Module,
    source: BatchSource,
    config: UnlearnConfig,
    num_posterior: int,
    accelerator: Accelerator,
) -> dict[str, torch.Tensor]:
    """Accumulate the gradient of one optimizer step; returns its terms, means over its batches."""
    count = config.gradient_accumulation_steps
    batches = [source.draw(accelerator) for _ in range(count)]
    if accelerator.num_processes > 1:
        # Alike so far; the posterior's draws must be each process's own.
        torch.manual_seed(int(torch.randint(2**31, ())) + accelerator.process_index)
    terms: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches, 1):
        # Around the backward too: gradient checkpointing runs the forward again in it.
        with posterior_noise(denoiser.model), dropping(denoiser.model):
            batch_terms = loss_terms(denoiser, network, batch, config, accelerator)
            loss = batch_terms["plasticity"] + batch_terms.get("redirect", 0)
            loss = (loss + config.stability_weight * batch_terms["stability"]) / count
            if number == count:  # of the whole step
                kl = total_kl(denoiser.model)
                loss = loss + config.kl_weight * kl / num_posterior
            accelerator.backward(loss)
        for name, value in {"loss": loss * count, **batch_terms}.items():
            terms[name] = terms.get(name, 0) + value.detach() / count
    return {**terms, "kl": kl.detach()}


def check_run(
    denoiser: Denoiser, config: UnlearnConfig, adapter: VDUConfig, output_dir: Path, resume: bool = False
) -> None:
    """Whether :func:`unlearn` would start with this precision, tracker, replay and adapter, and could be resumed.

    The model is left as it was.

    Raises:
        ConfigError, ModelError, AdapterError: it would not.
    """
    if resume:
        check_resumable(output_dir, config)
    denoiser.check_inference_steps(config.replay_inference_steps, "replay_inference_steps")
    check_replaceable(output_dir / "adapter")
    run_accelerator(config, output_dir, denoiser.dtype)
    make_trainable_as_before = trainable_state(denoiser.model)
    with checkpointed(denoiser.model, config):
        attach(denoiser.model, copy.deepcopy(adapter))  # PEFT writes into the config
    detach(denoiser.model)
    make_trainable_as_before()


def _check_replay(
    replay: torch.Tensor | None, replay_labels: torch.Tensor | None, denoiser: Denoiser
) -> torch.Tensor | None:
    if replay is None:
        if replay_labels is not None:
            raise ConfigError("replay_labels are those of replay images; pass both or neither")
        return None
    replay = check_images(replay, denoiser.image_size, denoiser.channels, "replay images")
    if (replay_labels is not None) != bool(denoiser.num_classes):
        raise ConfigError("replay_labels are for class-conditional models, which need one for every replay image")
    if replay_labels is not None:
        check_labels(replay_labels, len(replay), denoiser.num_classes, "replay")
    return replay
