"""Small labelled scenes, generated: textured shapes among clutter, under shadows, uneven light and noise.

The classes differ in shape and in texture; their hues overlap, so colour alone does not name a class.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy
from torch.nn import functional as F

Array = np.ndarray
VOID = 255
CLASS_NAMES = ("background", "disc", "box", "triangle", "ring", "cross")
HUES = (0.0, 0.02, 0.22, 0.42, 0.62, 0.82)  # the middle of each class's hue; the spread below makes them overlap
HUE_SPREAD = 0.07


def write_scenes(
    root: Path, *, labeled: int, unlabeled: int, val: int, size: tuple[int, int] = (96, 128), seed: int = 0
) -> None:
    """Writes a data set in VOC layout, with the partition `demo`.

    Unlabelled images get no mask file. Scene k of a seed is the same whatever the counts are.

    Args:
        root: folder to write into.
        labeled: number of labelled training images.
        unlabeled: number of unlabelled training images.
        val: number of validation images.
        size: height and width.
        seed: seed of the scenes.
    """
    lists = root / "ImageSets" / "Segmentation"
    for folder in (root / "JPEGImages", root / "SegmentationClass", lists / "demo"):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")
    for split, (path, count) in enumerate(
        (("demo/labeled.txt", labeled), ("demo/unlabeled.txt", unlabeled), ("val.txt", val))
    ):
        names = [f"{Path(path).stem}_{index:04d}" for index in range(count)]
        for index, name in enumerate(names):
            image, mask = make_scene(np.random.default_rng((seed, split, index)), size)
            Image.fromarray(image).save(root / "JPEGImages" / f"{name}.png")
            if path != "demo/unlabeled.txt":
                png = Image.fromarray(mask).convert("P")
                png.putpalette(voc_palette())
                png.save(root / "SegmentationClass" / f"{name}.png")
        (lists / path).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def make_scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Array, Array]:
    """One scene: (H, W, 3) uint8 image and (H, W) uint8 class ids, 255 on a thin line around each object."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float64)
    mask = np.zeros(size, np.uint8)
    image = _paint(rng, rng.uniform(0.2, 0.8, 3), rng.uniform(0.1, 0.7, 3), _noise(rng, size, (4, 8, 16, 32)))

    for _ in range(rng.integers(6, 14)):  # clutter: background that must not be taken for an object
        inside = _clutter(rng, x, y)
        image[inside] = _paint(rng, rng.uniform(size=3), rng.uniform(size=3), _noise(rng, size, (16, 32)))[inside]

    for _ in range(rng.integers(4, 8)):
        label = int(rng.integers(1, len(CLASS_NAMES)))
        radius = rng.uniform(0.14, 0.3) * height
        u, v = _local(rng, x, y, radius)
        shape, texture = SHAPES[label]
        inside = shape(u, v)
        hue = (HUES[label] + rng.normal(scale=HUE_SPREAD)) % 1.0
        light, dark = (
            _rgb(hue, rng.uniform(0.3, 0.9), 0.9),
            _rgb(hue + rng.normal(scale=0.08), 0.7, rng.uniform(0.2, 0.5)),
        )
        image[inside] = _paint(rng, light, dark, texture(u, v, rng))[inside]
        mask[_grown(inside)] = VOID
        mask[inside] = label

    for _ in range(rng.integers(1, 4)):  # shadows fall on objects and background alike
        u, v = _local(rng, x, y, rng.uniform(0.2, 0.5) * height)
        image *= (
            1.0
            - rng.uniform(0.2, 0.45) / (1.0 + np.exp(12.0 * (np.hypot(u, v * rng.uniform(0.6, 1.6)) - 1.0)))[..., None]
        )
    angle = rng.uniform(0, 2 * np.pi)
    image *= 1.0 + 0.35 * ((x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle))[..., None]
    image = image * rng.uniform(0.8, 1.2, 3) + rng.normal(scale=0.04, size=image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8), mask


def voc_palette() -> list[int]:
    """The 256 colours of VOC's palette PNGs, flat: bit k of a channel comes from bit 3 (7 - k) + channel of the id."""
    return [
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8))
        for index in range(256)
        for channel in range(3)
    ]


def _triangle(u: Array, v: Array) -> Array:
    return (v < 0.6) & (v > 1.9 * np.abs(u) - 1.1)


def _cross(u: Array, v: Array) -> Array:
    return (np.minimum(abs(u), abs(v)) < 0.36) & (np.maximum(abs(u), abs(v)) < 1.05)


def _wave(t: Array, rng: np.random.Generator) -> Array:
    return 0.5 + 0.5 * np.sin(t * rng.uniform(8, 13) + rng.uniform(0, 6))


def _checks(u: Array, v: Array, rng: np.random.Generator) -> Array:
    period = rng.uniform(2.0, 3.5)
    return ((np.floor(u * period) + np.floor(v * period)) % 2).astype(np.float64)


def _dots(u: Array, v: Array, rng: np.random.Generator) -> Array:
    period = rng.uniform(2.5, 3.5)
    return (np.hypot((u * period) % 1 - 0.5, (v * period) % 1 - 0.5) < 0.3).astype(np.float64)


# Class id -> (shape, texture), both on coordinates in which the object has radius 1.
SHAPES: dict[int, tuple[Callable[[Array, Array], Array], Callable[[Array, Array, np.random.Generator], Array]]] = {
    1: (lambda u, v: np.hypot(u, v) < 1.0, lambda u, v, rng: _wave(np.hypot(u, v), rng)),
    2: (lambda u, v: np.maximum(abs(u), abs(v)) < 0.88, _checks),
    3: (_triangle, lambda u, v, rng: _wave(u, rng)),
    4: (lambda u, v: abs(np.hypot(u, v) - 0.78) < 0.27, lambda u, v, rng: _wave(3 * np.arctan2(u, v) / 5, rng)),
    5: (_cross, _dots),
}


def _local(rng: np.random.Generator, x: Array, y: Array, radius: float) -> tuple[Array, Array]:
    """Coordinates around a random place, turned at random, in units of `radius`."""
    height, width = x.shape
    angle = rng.uniform(0, 2 * np.pi)
    dx, dy = x - rng.uniform(0, width), y - rng.uniform(0, height)
    return (dx * np.cos(angle) + dy * np.sin(angle)) / radius, (dy * np.cos(angle) - dx * np.sin(angle)) / radius


def _clutter(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """A bar, a wedge or a speck."""
    u, v = _local(rng, x, y, rng.uniform(0.04, 0.12) * x.shape[0])
    kind = rng.integers(3)
    if kind == 0:
        return (abs(u) < rng.uniform(3, 8)) & (abs(v) < 0.3)
    if kind == 1:
        return (u > 0) & (v > 0) & (u + 2 * v < 2)
    return np.hypot(u, 2 * v) < 0.8


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, ...]) -> Array:
    """Smooth noise in [0, 1]: random grids of several sizes, enlarged and summed."""
    total = np.zeros(size)
    for count in cells:
        grid: Tensor = from_numpy(rng.uniform(size=(1, 1, count, count)))
        total += F.interpolate(grid, size, mode="bicubic", align_corners=False)[0, 0].numpy()
    return ((total / len(cells) - 0.5) * 2 + 0.5).clip(0, 1)


def _paint(rng: np.random.Generator, light: Array, dark: Array, texture: Array) -> Array:
    """(H, W, 3) blend of two colours by a texture in [0, 1]."""
    contrast = rng.uniform(0.5, 1.0)
    blend = (0.5 + contrast * (texture - 0.5))[..., None]
    return blend * light + (1 - blend) * dark


def _rgb(hue: float, saturation: float, value: float) -> Array:
    """HSV to RGB, channels as shifted triangle waves of the hue."""
    wave = abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return value * (1 - saturation + saturation * wave.clip(0, 1))


def _grown(inside: Array) -> Array:
    """`inside` and its neighbours."""
    padded = np.pad(inside, 1)
    return padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:] | inside
