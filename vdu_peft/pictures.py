"""Images side by side, for a person to look at."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vdu_peft.pixels import to_pixels


def image_grid(images: torch.Tensor, columns: int = 10, scale: int = 1) -> Image.Image:
    """Images (N, C, H, W) in [-1, 1] side by side, each pixel ``scale`` pixels wide."""
    array = to_pixels(images).movedim(1, -1).numpy()
    count, height, width, channels = array.shape
    rows = -(-count // columns)
    canvas = np.full((rows * columns, height, width, channels), 255, dtype=np.uint8)
    canvas[:count] = array
    canvas = canvas.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    canvas = canvas.reshape(rows * height, columns * width, channels)
    image = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def labelled_grids(panels: dict[str, torch.Tensor], columns: int = 10, numbered: bool = False) -> Image.Image:
    """One grid per panel, side by side under its title, small images at double size.

    Args:
        panels: images (N, C, H, W) of one size by title.
        numbered: before every row stands the number of its first image, from 1.
    """
    size = next(iter(panels.values())).shape[-2]
    scale = 2 if size <= 64 else 1
    grids = {title: image_grid(images, columns, scale).convert("RGB") for title, images in panels.items()}
    margin, header, side, font = 12, 24, 28 if numbered else 0, ImageFont.load_default(14)
    widths = {title: max(grid.width, round(font.getlength(title)) + 4) for title, grid in grids.items()}
    height = max(grid.height for grid in grids.values()) + header
    sheet = Image.new("RGB", (sum(widths.values()) + margin * (len(grids) - 1) + side, height), "white")
    draw, left = ImageDraw.Draw(sheet), side
    for row in range((height - header) // (size * scale) if numbered else 0):
        draw.text((2, header + row * size * scale), str(row * columns + 1), fill="black", font=font)
    for title, grid in grids.items():
        draw.text((left + 2, 5), title, fill="black", font=font)
        sheet.paste(grid, (left, header))
        left += widths[title] + margin
    return sheet
