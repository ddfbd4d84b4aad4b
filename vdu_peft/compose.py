"""Several adapters in one: the product of their posteriors, in closed form on the deltas.

All of them are posteriors of the same pre-trained model, q_a ∝ q_0 · f_a: what they share is q_0, what the model
itself says of where it may go (the stability term and the prior), and f_a is what adapter a's forget images say. The
product q_0 · ∏ q_a / q_0 counts the first once. Stock PEFT's ``add_weighted_adapter`` adds means alone.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from vdu_peft.adapter import (
    attach,
    check_replaceable,
    detach,
    load_adapter,
    refuse_adapted,
    save_adapter,
    trainable_state,
    variational_layers,
)
from vdu_peft.atomic_folder import check_output
from vdu_peft.card import card_facts, model_card
from vdu_peft.config import ConfigError, VDUConfig, exactly


class Factors(NamedTuple):
    """One layer's posterior: ΔW = B A with B ~ N(mean, diag(exp(log_std)²)); the scaling is inside ``lora_A``."""

    mean: torch.Tensor  # (..., out, r)
    log_std: torch.Tensor  # (..., out, r)
    lora_A: torch.Tensor  # (..., r, in)


# Eigenvalues of the projectors' sum below this are rounding: no adapter reaches that direction.
REACHED = 1e-9


def posterior_product(factors: Sequence[Factors], prior_std: float, rank: int) -> tuple[Factors, float]:
    """The product q_0 · ∏ (q_a / q_0) over the delta, and back to rank ``rank``.

    Bounded plasticity falls as the forget images' denoising loss rises, which curves upwards in the delta, and is flat
    where the target is met: those images push, with a force Λ_a μ_a, and make nobody more certain. So each Λ_a is q_0's
    precision as adapter a found it on its row space, and q_0 has their mean: with P_a the projector on a's row space
    and N = Σ_a P_a, every row i of the delta has

        Λ_i = N^-½ (Σ_a Λ_ai) N^-½        μ_i = Λ_i⁻¹ Σ_a Λ_ai μ_ai

    in the row spaces taken together. Where all are equally certain the means add up, however the row spaces lie:
    N^-½ is Löwdin's orthogonalisation, which gives nearly parallel directions no large differences to make. Else each
    counts by how certain it is in a row and direction beside its layer's other ones; how certain it is in all (the
    geometric mean) tells of kl_weight and of how long it learned, and is left out of Λ_a here. The mean is cut to the
    rank by SVD; what is left of the covariance is its diagonal in the new factor.

    Args:
        factors: of the same layer, ranks may differ.
        prior_std: σ of one element of the delta, for directions of the result that no adapter reaches.
        rank: of the result.

    Returns:
        the factors in float64, ``lora_A`` with orthonormal rows, and the share of ‖mean delta‖² that the cut discards.

    Raises:
        ConfigError: the rank exceeds the adapters' together, or the layer's columns.
    """
    factors = [Factors(*(t.double() for t in f)) for f in factors]
    stacked = torch.cat([f.lora_A for f in factors], dim=-2)  # (..., R, in)
    basis = torch.linalg.qr(stacked.mT).Q  # (..., in, R)
    size = basis.shape[-1]
    if rank > size:
        raise ConfigError(f"rank {rank} exceeds the {size} directions of a layer; lower it")
    projectors, information, evidence = 0, 0, 0  # (..., R, R), (..., rows, R, R), (..., rows, R)
    levels = []
    for mean, log_std, lora_A in factors:
        coordinates = basis.mT @ lora_A.mT  # (..., R, r): row i of the delta is coordinates @ B_i
        own = torch.linalg.qr(coordinates).Q  # (..., R, r), orthonormal: the adapter's own row space
        to_own = (torch.linalg.pinv(coordinates) @ own).unsqueeze(-3)  # (..., 1, r, r)
        own_precision = to_own.mT @ ((-2 * log_std).exp().unsqueeze(-1) * to_own)  # Λ_ai, (..., rows, r, r)
        own_mean = (mean @ coordinates.mT @ own).unsqueeze(-1)  # (..., rows, r, 1)
        levels.append(torch.linalg.slogdet(own_precision).logabsdet.mean() / own.shape[-1])
        own_precision = own_precision * (-levels[-1]).exp()
        own_rows = own.unsqueeze(-3)
        projectors = projectors + own @ own.mT
        information = information + own_rows @ own_precision @ own_rows.mT
        evidence = evidence + (own_rows @ own_precision @ own_mean).squeeze(-1)
    level = torch.stack(levels).mean().exp()  # the result's own: the geometric mean of theirs
    information, evidence = level * information, level * evidence
    overlap, directions = torch.linalg.eigh(projectors)
    reached = overlap > REACHED
    root = (directions * torch.where(reached, overlap, 1).rsqrt().unsqueeze(-2)) @ directions.mT
    unreached = (directions * (~reached / prior_std**2).unsqueeze(-2)) @ directions.mT
    covariance = torch.linalg.inv(root.unsqueeze(-3) @ information @ root.unsqueeze(-3) + unreached.unsqueeze(-3))
    delta = (covariance @ evidence.unsqueeze(-1)).squeeze(-1)  # (..., rows, R)
    # Right singular vectors of the mean delta; all R of them, also where the layer has fewer rows.
    energy, right = torch.linalg.eigh(delta.mT @ delta)
    energy, right = energy.flip(-1).clamp_min(0), right.flip(-1)[..., :rank]  # (..., R), (..., R, rank)
    per_row = right.unsqueeze(-3)
    variance = (per_row.mT @ covariance @ per_row).diagonal(dim1=-2, dim2=-1)
    discarded = energy[..., rank:].sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    return Factors(delta @ right, variance.log() / 2, (basis @ right).mT), discarded.item()


def compose(
    model: nn.Module,
    folders: Sequence[str | Path],
    output_dir: str | Path,
    rank: int | None = None,
    base_model: str = "not named",
    overwrite: bool = False,
) -> dict[str, float]:
    """Write one adapter that stands for several saved ones of the same base model.

    Args:
        model: the base, without an adapter; it is left as it was.
        folders: saved adapters.
        output_dir: the new adapter's folder.
        base_model: its name on the new adapter's card.
        rank: of the new adapter; the sum of theirs when None, which discards nothing.
        overwrite: replace an adapter that is in ``output_dir``.

    Returns:
        for every layer the share of the mean delta's energy that the cut to ``rank`` discards.

    Raises:
        ConfigError: fewer than two adapters, one of them twice, a deterministic one, priors that differ, or a model
            with an adapter.
        AdapterError: an adapter that does not fit the model.
        FolderError: one lies in ``output_dir``, or this is not empty.
    """
    if len(folders) < 2:
        raise ConfigError("compose needs at least two adapters")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ConfigError("compose: an adapter is named twice, and would count twice; name each once")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    refuse_adapted(model)
    check_output(output_dir, folders, overwrite)
    check_replaceable(output_dir)
    configs = [VDUConfig.from_pretrained(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if not config.variational:
            raise ConfigError(f"{folder}: is deterministic, its means say not how certain they are; use PEFT's sum")
        if config.prior_scale != configs[0].prior_scale:
            raise ConfigError(
                f"{folder}: prior_scale {config.prior_scale}, but {configs[0].prior_scale} in {folders[0]}; "
                "only posteriors of one prior have a product"
            )
    make_trainable_as_before = trainable_state(model)
    try:
        return _compose(model, folders, configs, Path(output_dir), rank, base_model)
    finally:
        detach(model)
        make_trainable_as_before()


def _compose(model, folders, configs, output_dir, rank, base_model) -> dict[str, float]:
    factors: dict[str, list[Factors]] = {}
    prior_std: dict[str, float] = {}
    for folder in folders:
        load_adapter(model, folder)
        for name, layer in variational_layers(model):
            mean, log_std, lora_A = (t.detach().cpu().double() for t in layer.factors("default"))
            factors.setdefault(name, []).append(Factors(mean, log_std, layer.scaling["default"] * lora_A))
            prior_std[name] = layer.prior_std["default"]
        detach(model)
    # Per group: a layer has no more directions than its adapters together, and than it has inputs.
    wanted = rank or sum(config.r for config in configs)
    per_group = {name: min(max(wanted // len(f[0].mean), 1), *_directions(f)) for name, f in factors.items()}
    ranks = {name: per_group[name] * len(f[0].mean) for name, f in factors.items()}
    total = max(ranks.values())
    # PEFT takes a pattern for the end of a name, too; the lookbehind makes it the whole name.
    by_layer = {f"(?<!.){re.escape(name)}": r for name, r in ranks.items() if r != total}
    config = VDUConfig(
        target_modules=exactly(list(factors), model),
        r=total,
        lora_alpha=total,
        rank_pattern=by_layer,
        alpha_pattern=by_layer,
        prior_scale=configs[0].prior_scale,
        init_scale=configs[0].init_scale,
    )
    peft_model = attach(model, config)
    discarded = {}
    for name, layer in variational_layers(model):
        composed, discarded[name] = posterior_product(factors[name], prior_std[name], per_group[name])
        targets = (layer.lora_B["default"].weight, layer.lora_log_std["default"], layer.lora_A["default"].weight)
        for parameter, value in zip(targets, composed, strict=True):
            parameter.data.copy_(value.reshape(parameter.shape))
    cut = f"{max(discarded.values()):.2%} of a layer's delta at most"
    facts = {"product of": f"{len(configs)} adapters", "rank": total, "energy discarded by the rank": cut}
    for number, folder in enumerate(folders, 1):
        facts |= {f"{name} (adapter {number})": value for name, value in card_facts(folder).items()}
    save_adapter(peft_model, output_dir, model_card("adapter", base_model, facts))
    return discarded


def _directions(factors: Sequence[Factors]) -> tuple[int, int]:
    """What bounds the rank of a group's composed delta: the ranks together, and the columns."""
    return sum(f.lora_A.shape[-2] for f in factors), factors[0].lora_A.shape[-1]
