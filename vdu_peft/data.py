"""Image sources: a folder, an ``.npz`` or a hub dataset, as one float tensor in [-1, 1]."""

import csv
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from vdu_peft.pixels import DataError, eight_bits, to_tensor

logger = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Other pictures, of which it is said that they are left out.
OTHER_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".tif", ".tiff")
# What numpy raises on an .npz that is none, is damaged, or holds pickled objects.
_UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ImageSource:
    """Where images come from and which of them are meant.

    Args:
        path: folder of images (nested, png/jpg/webp), an ``.npz`` file (uint8, or floats in [-1, 1], or in [0, 1] where
            none is negative), or a hub dataset id.
        split: split of a hub dataset.
        image_column: image column of a hub dataset, or array name in an ``.npz``.
        label_column: label column of a hub dataset, or array name in an ``.npz``.
        labels: keep only images with one of these labels (a class name or number); all when empty.
        caption_column: each image's caption: a column of ``metadata.csv`` or ``metadata.jsonl`` in the folder (beside
            ``file_name``, as the ``datasets`` library's image folders have it), or of a hub dataset, or an array of an
            ``.npz``.
        max_images: keep at most this many, evenly spread over the source; all when None.
    """

    path: str
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    labels: tuple[str, ...] = ()
    caption_column: str | None = None
    max_images: int | None = None

    def load(self, image_size: tuple[int, int], channels: int) -> torch.Tensor:
        """Read, resize and scale the images.

        Args:
            image_size: (height, width) that the model expects.
            channels: 1 (grayscale) or 3 (RGB).

        Returns:
            float32 tensor (N, channels, height, width) in [-1, 1].

        Raises:
            DataError: the source is missing, empty, unreadable, or holds non-finite values.
        """
        return self._load(image_size, channels)[0]

    def captions(self) -> list[str]:
        """Each image's caption, in the order of :meth:`load`.

        Raises:
            DataError: as :meth:`load`, or there is no ``caption_column``, or an image without a caption.
        """
        if self.caption_column is None:
            raise DataError(f"{self.path}: captions are needed; name their column with caption_column")
        return self._read()[2]

    def load_labelled(self, image_size: tuple[int, int], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`load`, with the labels, int64 (N,).

        Raises:
            DataError: as :meth:`load`, or the source has no integer labels (a folder, no ``label_column``).
        """
        if self.label_column is None:
            raise DataError(f"{self.path}: labels are needed; name their array or column with label_column")
        images, labels = self._load(image_size, channels)
        if not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"{self.path}: no integer labels there; {self.label_column} holds {labels.dtype}")
        return images, torch.from_numpy(labels.astype(np.int64))

    def _load(self, image_size: tuple[int, int], channels: int) -> tuple[torch.Tensor, np.ndarray | None]:
        images, labels, _ = self._read()
        _tell_left_out(Path(self.path))
        # A file at a time: photos are many times the size that the model takes.
        opened = (_open(image) if isinstance(image, Path) else image for image in images)
        return torch.stack([to_tensor(image, image_size, channels, name=self.path) for image in opened]), labels

    def _read(self) -> tuple[Sequence, np.ndarray | None, list[str] | None]:
        """Images as they come (files not yet opened), labels and captions, where the source has them."""
        captions = None
        if self.max_images is not None and self.max_images < 1:
            raise DataError(f"max_images must be at least 1, not {self.max_images}")
        path = Path(self.path)
        if path.is_dir():
            labels, (images, captions) = None, self._from_folder(path)
        elif path.suffix == ".npz":
            images, labels, captions = self._from_npz(path)
        elif path.exists():
            raise DataError(f"{path}: not a folder of images or an .npz file; put the images in a folder")
        elif (
            path.is_absolute() or self.path.startswith((".", "~")) or self.path.count("/") > 1 or self.path[-1:] == "/"
        ):
            raise DataError(f"{path}: no such folder or .npz file")
        else:
            images, labels, captions = self._from_hub()
        if not len(images):
            chosen = f" with label {', '.join(self.labels)}" if self.labels else ""
            kinds = " (png, jpg or webp)" if path.is_dir() else ""
            raise DataError(f"{self.path}: no images{chosen} found{kinds}")
        if self.max_images is not None and len(images) > self.max_images:
            keep = np.linspace(0, len(images) - 1, self.max_images).round().astype(int)
            images = [images[i] for i in keep]
            labels = None if labels is None else labels[keep]
            captions = None if captions is None else [captions[i] for i in keep]
        return images, labels, captions

    def _from_folder(self, folder: Path) -> tuple[list[Path], list[str] | None]:
        if self.labels:
            raise DataError(f"{folder}: a folder has no labels to choose from; give the folder of one class")
        for name in ("image_column", "label_column"):
            if getattr(self, name) is not None:
                raise DataError(
                    f"{folder}: a folder of images has no {name}; leave it out, or use an .npz or a hub dataset"
                )
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
        captions = None if self.caption_column is None else _read_captions(folder, files, self.caption_column)
        return files, captions

    def _from_npz(self, file: Path) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
        if not file.is_file():
            raise DataError(f"{file}: no such file")
        try:
            arrays = np.load(file, allow_pickle=False)
        except _UNREADABLE as error:
            raise DataError(f"{file}: not a readable .npz ({error})") from error
        if isinstance(arrays, np.ndarray):  # np.load goes by what is in the file, not by its name
            raise DataError(f"{file}: a single array (.npy) by another name; write it with numpy.savez")
        images = self._npz_array(arrays, self.image_column, "image_column", file)
        if images.ndim not in (3, 4):
            raise DataError(f"{file}: expected images [N, H, W] or [N, H, W, C], found shape {list(images.shape)}")
        images = eight_bits(images, file)  # of all labels: a few bright images alone may have no negative value
        if self.label_column is None and self.labels:
            raise DataError(f"{file}: labels asked for but no label_column; the file holds {', '.join(arrays.files)}")
        columns = []
        for option in ("label_column", "caption_column"):
            key = getattr(self, option)
            column = None if key is None else self._npz_array(arrays, key, option, file)
            if column is not None and column.shape != (len(images),):
                raise DataError(f"{file}: {option} {key!r} is {list(column.shape)} values for {len(images)} images")
            columns.append(column)
        labels, captions = columns
        if captions is not None and captions.dtype.kind != "U":
            raise DataError(f"{file}: caption_column {self.caption_column!r} holds {captions.dtype}, not text")
        if captions is not None and not all(map(str.strip, captions.tolist())):
            raise DataError(f"{file}: caption_column {self.caption_column!r} holds empty captions")
        if self.labels:
            has_names = "class_names" in arrays.files
            names = self._npz_array(arrays, "class_names", "class_names", file).tolist() if has_names else []
            keep = np.isin(labels, _label_numbers(self.labels, names, file))
            images, labels = images[keep], labels[keep]
            captions = None if captions is None else captions[keep]
        return images, labels, None if captions is None else captions.tolist()

    def _npz_array(self, arrays, key: str | None, option: str, file: Path) -> np.ndarray:
        if key is None and len(arrays.files) == 1:
            key = arrays.files[0]
        elif key is None and "images" in arrays.files:
            key = "images"
        if key is None:
            raise DataError(f"{file}: holds {', '.join(arrays.files)}; say with {option} which of them")
        if key not in arrays.files:
            raise DataError(f"{file}: {option} {key!r} not found; the file holds {', '.join(arrays.files)}")
        try:
            return arrays[key]
        except _UNREADABLE as error:
            raise DataError(f"{file}: {option} {key!r} cannot be read ({error})") from error

    def _from_hub(self) -> tuple[Sequence[Image.Image], np.ndarray | None, list[str] | None]:
        from datasets import Image as ImageFeature
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub.errors import HFValidationError

        try:
            dataset = load_dataset(self.path, split=self.split)
        except (DatasetNotFoundError, ConnectionError, FileNotFoundError, HFValidationError) as error:
            raise DataError(
                f"{self.path}: neither a local folder or .npz nor a hub dataset that can be reached"
            ) from error
        except ValueError as error:  # unknown split, ambiguous config: datasets' own words say which
            raise DataError(f"{self.path}, dataset_split {self.split}: {error}") from error
        column = self.image_column or next(
            (n for n, f in dataset.features.items() if isinstance(f, ImageFeature)), None
        )
        if column not in dataset.column_names:
            raise DataError(f"{self.path}: no image column {column!r}; columns are {', '.join(dataset.column_names)}")
        if self.caption_column is not None and self.caption_column not in dataset.column_names:
            raise DataError(
                f"{self.path}: no caption_column {self.caption_column!r}; columns are {', '.join(dataset.column_names)}"
            )
        if self.label_column is None and not self.labels:
            return dataset[column], None, self._hub_captions(dataset)
        if self.label_column not in dataset.column_names:
            raise DataError(
                f"{self.path}: no label_column {self.label_column!r}; columns are {', '.join(dataset.column_names)}"
            )
        labels = np.asarray(dataset[self.label_column])
        if self.labels:
            names = getattr(dataset.features[self.label_column], "names", None) or []
            keep = np.flatnonzero(np.isin(labels, _label_numbers(self.labels, names, self.path)))
            dataset, labels = dataset.select(keep), labels[keep]
        return dataset[column], labels, self._hub_captions(dataset)

    def _hub_captions(self, dataset) -> list[str] | None:
        if self.caption_column is None:
            return None
        captions = [_one_line(caption) for caption in dataset[self.caption_column]]
        if "" in captions:
            raise DataError(f"{self.path}: caption_column {self.caption_column!r} is empty in row {captions.index('')}")
        return captions


class ImageDataset(Dataset):
    """A tensor of images as a map-style dataset; with ``mirrored``, each image or its mirror image at random.

    The choice draws from torch's global generator, which the trainer seeds anew at every step.
    """

    def __init__(self, images: torch.Tensor, mirrored: torch.Tensor | None = None):
        self.images = images
        self.mirrored = mirrored

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        flip = self.mirrored is not None and torch.rand(()) < 0.5
        return (self.mirrored if flip else self.images)[index]


def _read_captions(folder: Path, files: Sequence[Path], column: str) -> list[str]:
    """The captions of these files of the folder, from its ``metadata.csv`` or ``metadata.jsonl``."""
    metadata = next((folder / n for n in ("metadata.csv", "metadata.jsonl") if (folder / n).is_file()), None)
    if metadata is None:
        raise DataError(f"{folder}: no metadata.csv or metadata.jsonl there, which would hold the captions")
    try:
        text = metadata.read_text(encoding="utf-8-sig")
        if metadata.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        named = [(row["file_name"], _one_line(row[column])) for row in rows]
        captions = dict(named)
    except KeyError as error:
        found = f"the first row's are {', '.join(map(repr, rows[0]))}"
        found += " (commas stand between columns)" if metadata.suffix == ".csv" else ""
        raise DataError(f"{metadata}: no {error} in every row; {found}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{metadata}: not rows of file_name and {column} ({error})") from error
    if len(captions) < len(named):
        seen = [name for name, _ in named]
        twice = next(name for name in seen if seen.count(name) > 1)
        raise DataError(f"{metadata}: {twice} has more than one row; leave one")
    if blank := [name for name, caption in named if not caption]:
        raise DataError(f"{metadata}: {column} is empty for {blank[0]!r}; give it a caption, or take image and row out")
    names = [file.relative_to(folder).as_posix() for file in files]
    missing = [name for name in names if name not in captions] or sorted(captions.keys() - set(names))
    if missing:
        raise DataError(f"{metadata}: captions and images do not match; the other one is missing for {missing[0]}")
    return [captions[name] for name in names]


def _one_line(caption) -> str:
    """A caption with single spaces in place of line breaks; empty if there is none."""
    return "" if caption is None else " ".join(str(caption).split())


def _tell_left_out(folder: Path) -> None:
    """Warn of pictures in a folder that are not read; any other source has none."""
    others = sorted(f for f in folder.rglob("*") if f.suffix.lower() in OTHER_SUFFIXES) if folder.is_dir() else []
    if others:
        logger.warning(
            "%s: %d pictures are left out that are no png, jpg or webp, such as %s; convert them",
            folder,
            len(others),
            others[0].relative_to(folder),
        )


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            image.filename = str(file)
            return image
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: not a readable image ({error}); mend or remove it") from error


def _label_numbers(labels: Sequence[str], names: Sequence[str], source) -> list[int]:
    numbers = []
    for label in labels:
        if label in names:
            numbers.append(names.index(label))
        elif str(label).isdigit():
            numbers.append(int(label))
        else:
            known = f"; classes are {', '.join(names)}" if names else "; give the label's number"
            raise DataError(f"{source}: unknown label {label!r}{known}")
    return numbers
