"""The adapter as a whole: attach it to a model, sum over its layers, switch its noise, save and load it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vdu_peft.atomic_folder import FolderError, atomic_folder
from vdu_peft.card import model_card
from vdu_peft.config import ConfigError, VDUConfig, layers_passed_by
from vdu_peft.layer import VariationalLayer


class AdapterError(ValueError):
    """An adapter that does not fit or cannot be read; the message names the file and the mend."""


def attach(model: nn.Module, config: VDUConfig, adapter_name: str = "default") -> PeftModel:
    """Wrap a model by ``peft.get_peft_model``, with an adapter to learn, or leave it as it was.

    Raises:
        ConfigError: ``target_modules`` matches nothing, or layers that cannot carry a posterior of this rank, or the
            name is part of a module's, or the model has an adapter already.
    """
    _check_bare(model, adapter_name)
    passed_by = layers_passed_by(model)
    with undone_on_error(model):
        try:
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
            for name, layer in variational_layers(model, adapter_name):
                layer.check_rank(adapter_name)
                if name in passed_by:
                    raise ValueError(f"{name} is never called, torch's attention reads its weights; leave it out")
        except ValueError as error:
            raise ConfigError(f"target_modules: {error}") from error
    return in_base_mode(peft_model)


def refuse_adapted(model: nn.Module) -> None:
    """A bare model is asked for: what is done to it is undone by taking all of its adapters off.

    Raises:
        ConfigError: it carries adapters.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ConfigError(
            "the model carries an adapter already; merge or unload it first, or load one more onto its PeftModel"
        )


def in_base_mode(peft_model: PeftModel) -> PeftModel:
    """The adapters in their base's mode: PEFT makes them to be trained, and their dropout would drop in samples."""
    training = peft_model.get_base_model().training
    peft_model.training = peft_model.base_model.training = training
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            module.training = training
            for name, part in module.named_children():
                if name != "base_layer":
                    part.train(training)
    return peft_model


def _check_bare(model: nn.Module, adapter_name: str) -> None:
    refuse_adapted(model)
    _check_name(model, adapter_name)


def _check_name(model: nn.Module, adapter_name: str) -> None:
    """PEFT tells adapters apart by their names between dots, and would take ``down_blocks.1`` for an adapter "1"."""
    if any(adapter_name in name.split(".") for name, _ in model.named_modules()):
        raise ConfigError(f"adapter_name {adapter_name!r}: a part of the model's module names, too; choose another")


def detach(model: nn.Module) -> None:
    """Put a base model's own layers back in place of all adapted ones; merged deltas stay where they are."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """A refused adapter, or a run that ends with an error, must not change the caller's model."""
    make_trainable_as_before = trainable_state(model)
    try:
        yield
    except BaseException:
        detach(model)
        make_trainable_as_before()
        raise


def trainable_state(model: nn.Module) -> Callable[[], None]:
    """A call that sets ``requires_grad`` of all parameters back to what it is now: PEFT freezes what it wraps."""
    trainable = [(p, p.requires_grad) for p in model.parameters()]

    def restore() -> None:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    return restore


def variational_layers(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, VariationalLayer]]:
    """(name, layer) of every layer that carries this adapter."""
    for name, module in model.named_modules():
        if isinstance(module, VariationalLayer) and adapter_name in module.prior_std:
            yield name, module


def total_kl(model: nn.Module, adapter_name: str = "default") -> torch.Tensor:
    """KL(q ‖ prior) of the whole adapter in nats, a float32 scalar with gradient."""
    kls = [layer.kl(adapter_name) for _, layer in variational_layers(model, adapter_name)]
    if not kls:
        raise AdapterError(f"the model has no variational adapter named {adapter_name!r}")
    return torch.stack(kls).sum()


def posterior_size(model: nn.Module, adapter_name: str = "default") -> int:
    """How many weights of the adapter have a posterior: those of every layer's ``lora_B``."""
    layers = variational_layers(model, adapter_name)
    return sum(layer.lora_B[adapter_name].weight.numel() for _, layer in layers)


def save_adapter(peft_model: PeftModel, folder: str | Path, card: str | None = None) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card, all or nothing.

    The folder appears by a rename, and is replaced by two, so that an interrupted save leaves the earlier one whole;
    one that is killed between the two, beside its place, where :func:`load_adapter` tells of it.

    Raises:
        FolderError: the folder cannot be written, as on a full disk, and an earlier adapter there is kept; or it holds
            something else than an adapter.
        AdapterError: the model was prepared for hot-swapping, which pads the factors and drops the deviations.
    """
    check_replaceable(folder, peft_model.peft_config)
    scalings = (s for module in peft_model.modules() if isinstance(module, LoraLayer) for s in module.scaling.values())
    if any(isinstance(scaling, torch.Tensor) for scaling in scalings):
        raise AdapterError(f"{folder}: the model is prepared for hot-swapping; save it before prepare_hotswap")
    for name, config in peft_model.peft_config.items():
        if isinstance(config, VDUConfig):
            layers = variational_layers(peft_model.get_base_model(), name)
            config.base_sample = {layer_name: layer.base_sample[name] for layer_name, layer in layers}
    with atomic_folder(Path(folder)) as fresh:
        peft_model.save_pretrained(fresh)
        # PEFT's own card is a form to fill in.
        (fresh / "README.md").write_text(card or model_card("adapter", "not named", {}), encoding="utf-8")


def check_replaceable(folder: str | Path, names: Iterable[str] = ()) -> None:
    """Before a run: whether :func:`save_adapter` may put an adapter in this folder's place.

    Args:
        names: of the adapters, of which PEFT gives each but "default" a folder of its own there.

    Raises:
        FolderError: it holds something else, which would be deleted.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not any((place / CONFIG_NAME).is_file() for place in (folder, *(folder / name for name in names))):
        raise FolderError(f"{folder}: holds something else than an adapter, and would be replaced; choose another")


def load_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Attach a saved adapter with its full posterior; to a PeftModel as one more, inactive until ``set_adapter``.

    Raises:
        ConfigError: no VDU adapter in the folder, or the name is taken.
        AdapterError: the weights are missing, unreadable, not finite, or of another model, which is left as it was.
    """
    config = VDUConfig.from_pretrained(folder)
    tensors = read_adapter_weights(folder)
    if not isinstance(model, PeftModel):
        _check_bare(model, adapter_name)
        with undone_on_error(model):
            try:
                peft_model = get_peft_model(model, config, adapter_name=adapter_name)
            except ValueError as error:
                if other := another_class(model, config):
                    raise AdapterError(f"{folder}: {other}: target_modules: {error}") from error
                raise ConfigError(f"target_modules: {error}") from error
            _check_fit(peft_model, tensors, adapter_name, folder)
    else:
        peft_model = model
        if adapter_name in peft_model.peft_config:
            raise ConfigError(f"the model has an adapter {adapter_name!r} already; choose another adapter_name")
        _check_name(peft_model, adapter_name)
        make_trainable_as_before = trainable_state(peft_model)
        try:
            peft_model.add_adapter(adapter_name, config)
            _check_fit(peft_model, tensors, adapter_name, folder)
        except BaseException as error:
            _take_off(peft_model, adapter_name)
            make_trainable_as_before()
            if isinstance(error, ValueError) and not isinstance(error, AdapterError):
                other = another_class(peft_model.get_base_model(), config) or "made for another model"
                raise AdapterError(f"{folder}: {other}: {error}") from error
            raise
    set_peft_model_state_dict(peft_model, tensors, adapter_name=adapter_name)
    return in_base_mode(peft_model)


def _take_off(peft_model: PeftModel, adapter_name: str) -> None:
    """Remove an adapter that may sit on some of its layers only, and the wrappers that it alone needed."""
    peft_model.peft_config.pop(adapter_name, None)
    for name, module in list(peft_model.named_modules()):
        if isinstance(module, LoraLayer):
            module.delete_adapter(adapter_name)
            if not module.r:
                peft_model.set_submodule(name, module.get_base_layer())


def another_class(base: nn.Module, config: VDUConfig) -> str:
    """Says that an adapter was made for a model of another class, as of another family; empty if it was not."""
    made_for, there = (config.auto_mapping or {}).get("base_model_class"), type(base).__name__
    return "" if made_for in (None, there) else f"made for a {made_for}, this is a {there}"


def _check_fit(peft_model: PeftModel, tensors: dict[str, torch.Tensor], adapter_name: str, folder) -> None:
    config = peft_model.peft_config[adapter_name]
    other = another_class(peft_model.get_base_model(), config) or "made for another model"
    expected = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    for name in sorted(expected.keys() | tensors.keys()):
        there, wanted = tensors.get(name), expected.get(name)
        if there is None or wanted is None or there.shape != wanted.shape:
            found = "is missing" if there is None else f"has shape {list(there.shape)}"
            need = "does not exist" if wanted is None else f"needs {list(wanted.shape)}"
            raise AdapterError(f"{folder}: {other}: {name} {found}, the model's {need}")
    check_base(variational_layers(peft_model.get_base_model(), adapter_name), adapter_name, config, folder)


def check_base(layers: Iterable[tuple[str, VariationalLayer]], adapter_name: str, config: VDUConfig, folder) -> None:
    """Whether an adapter was made for weights like those that the layers have.

    A base in another precision, quantised or trained on a little has nearly the same weights; of another model of
    the same shape they are independent, and twice as far away as this allows.

    Args:
        layers: with their names in the base model.
        adapter_name: of the adapter that sits on them, ``config`` or the one whose place it takes.

    Raises:
        AdapterError: they are another model's.
    """
    stored = config.base_sample or {}
    pairs = [pair for name, layer in layers for pair in zip(stored.get(name, ()), layer.base_sample[adapter_name])]  # noqa: B905
    if pairs:
        made_for, there = torch.tensor(pairs, dtype=torch.float64).T
        if (made_for - there).square().sum() > made_for.square().sum():
            raise AdapterError(f"{folder}: made for another base model, of the same shape but with other weights")


def read_adapter_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, checked to be finite."""
    file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise AdapterError(f"{file}: no such file; only safetensors are read, never pickle")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a readable safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{file}: {name} holds NaN or infinite values")
    return tensors


def describe(peft_model: PeftModel, adapter_name: str = "default") -> list[dict]:
    """One record per layer: name, rank, parameters, relative delta norm, signal-to-noise, KL in nats.

    The signal-to-noise of a deterministic adapter is None, and so is the KL of one with more rank than a layer has
    inputs.
    """
    return [
        {
            "layer": name,
            "rank": layer.r[adapter_name],
            "parameters": sum(
                p.numel()
                for n, p in layer.named_parameters()
                if n.startswith("lora_") and n.split(".")[1] == adapter_name
            ),
            "delta_norm": layer.delta_norm(adapter_name),
            "signal_to_noise": layer.signal_to_noise(adapter_name),
            "kl": layer.kl(adapter_name).item() if layer.has_kl(adapter_name) else None,
        }
        for name, layer in variational_layers(peft_model.get_base_model(), adapter_name)
    ]
