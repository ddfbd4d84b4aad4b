"""Folders that appear whole or not at all, and what must not be lost in their place."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class FolderError(ValueError):
    """A folder that cannot be written, or must not be replaced; the message names it and the mend."""


def check_output(folder: str | Path, inputs: Iterable[str | Path], overwrite: bool) -> None:
    """Before any work whose result goes into the folder or takes its place.

    Args:
        inputs: what is read for it; of what is made from inputs the folder is replaced, by a rename in its parent.
        overwrite: whether the folder may be replaced with all that it holds.

    Raises:
        FolderError: it is not empty or cannot be written, or one of the inputs would be deleted.
    """
    folder, inputs = Path(folder), list(inputs)
    for read in inputs:
        if Path(read).exists() and Path(read).resolve().is_relative_to(folder.resolve()):
            raise FolderError(f"{folder}: would be replaced, and {read} is in it; choose another output_dir")
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder}: exists and is not a folder; choose another output_dir")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FolderError(
            f"{folder}: exists and is not empty; choose another output_dir or pass --overwrite (overwrite=True)"
        )
    check_writable(folder.absolute().parent if inputs else folder, "output_dir")


def check_writable(folder: str | Path, option: str) -> None:
    """Whether a folder that may not be there yet can be written into; nothing is made.

    Raises:
        FolderError: it cannot; ``option`` named it.
    """
    folder = Path(folder).absolute()
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:
        raise FolderError(f"{folder}: cannot be reached ({error}); choose another {option}") from error
    if not there.is_dir():
        raise FolderError(f"{folder}: {there} is a file, not a folder; choose another {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FolderError(f"{folder}: {there} cannot be written into; choose another {option}")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder beside ``folder`` that takes its place when the block ends without an error.

    It appears by a rename, and is replaced by two; one that is killed between them lies beside its place.

    Raises:
        FolderError: it cannot be written; what was there before is kept.
    """
    try:
        with _atomic_folder(folder) as fresh:
            yield fresh
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{folder}: cannot be written ({error}); what was there before is kept") from error


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    fresh.chmod(0o755)
    try:
        yield fresh
        for file in fresh.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors' own is the writer's alone, and the folder is to be released
        if folder.exists():
            _replace(folder, fresh)
        else:
            fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _replace(folder: Path, fresh: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    old = aside / folder.name
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException as error:  # an interrupt, too
        try:
            old.rename(folder)
        except OSError:
            raise FolderError(f"{folder}: cannot be replaced ({error}); what was there before is {old}") from error
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)  # the new one is in its place, whatever becomes of this
