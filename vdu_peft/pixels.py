"""Pixels: images as files and arrays hold them ↔ tensors in [-1, 1], as models take and give them."""

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """An image source that cannot be used; the message names the file or option and the mend."""


def eight_bits(images: np.ndarray, name: str | Path) -> np.ndarray:
    """Images as uint8, as files hold them: from floats in [-1, 1], or in [0, 1] where not one of all is negative.

    Raises:
        DataError: other values, or no numbers.
    """
    if images.dtype == np.uint8 or not images.size:
        return images
    if images.dtype.kind not in "biuf":
        raise DataError(f"{name}: expected images as numbers, found {images.dtype}")
    images = images.astype(np.float32)
    if not np.isfinite(images).all():
        raise DataError(f"{name}: holds NaN or infinite values")
    low, high = images.min(), images.max()
    if low < -1 - 1e-4 or high > 1 + 1e-4:
        raise DataError(
            f"{name}: values that are not uint8 must lie in [0, 1] or [-1, 1], found {low:.3g} to {high:.3g}; write "
            "0 to 255 as uint8"
        )
    scaled = images * 255 if low >= 0 else (images + 1) * 127.5
    return scaled.round().clip(0, 255).astype(np.uint8)


def to_tensor(
    image: Image.Image | np.ndarray, image_size: tuple[int, int], channels: int, name: str = "image"
) -> torch.Tensor:
    """One image as float32 (channels, height, width) in [-1, 1], center-cropped to the aspect ratio.

    Arrays are [H, W] or [H, W, C], uint8; :func:`eight_bits` makes others so.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise DataError(f"{name}: expected an array of uint8, found {image.dtype}")
        if image.ndim == 3 and image.shape[-1] > 4:
            raise DataError(f"{name}: expected images [H, W] or [H, W, C], found shape {list(image.shape)}")
        image = Image.fromarray(image.squeeze(-1) if image.shape[-1:] == (1,) else image)
    image = ImageOps.exif_transpose(image)
    if min(image.size) < 2:
        raise DataError(f"{getattr(image, 'filename', name)}: a {image.width}x{image.height} image is too small to use")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255, not scale them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # Transparent pixels carry arbitrary colours; put them on white, as image viewers do.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != image_size[::-1]:
        image = ImageOps.fit(image, image_size[::-1], method=Image.Resampling.BICUBIC)
    array = np.asarray(image, dtype=np.float32).reshape(*image_size, channels)
    return torch.from_numpy(array).movedim(-1, 0).div(127.5).sub(1.0).contiguous()


def check_images(images: torch.Tensor, image_size: tuple[int, int], channels: int, name: str) -> torch.Tensor:
    """Check that a tensor is finite, (N, channels, height, width) and in [-1, 1]; returns it as float32 on the CPU."""
    if images.ndim != 4 or not len(images):
        raise DataError(f"{name}: expected a non-empty (N, C, H, W) tensor, found shape {list(images.shape)}")
    if tuple(images.shape[1:]) != (channels, *image_size):
        raise DataError(
            f"{name}: the model expects {channels} x {image_size[0]} x {image_size[1]} images, "
            f"found {' x '.join(map(str, images.shape[1:]))}"
        )
    images = images.float().cpu()
    if not images.isfinite().all():
        raise DataError(f"{name}: holds NaN or infinite values")
    if images.abs().max() > 1.0 + 1e-4:
        raise DataError(f"{name}: float images must lie in [-1, 1], found up to {images.abs().max():.3g}")
    if images.min() >= 0:
        logger.warning("%s: nothing in them is darker than middle grey; images in [0, 1] go as 2 * images - 1", name)
    return images


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8, of the same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
