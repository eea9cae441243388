"""What image corruptions are made of: resampling, blurs, a plasma, JPEG; one image `f32[H, W, C]` at a time.

A separable linear filter is a pair of matrices, made in NumPy, since they depend on shapes alone: `filtered` applies
them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.types import Array, Key

__all__ = [
    "bilinear",
    "box_matrix",
    "defocus_kernel",
    "filtered",
    "gaussian_matrix",
    "jpeg",
    "motion_blur",
    "plasma",
    "zoom_matrix",
]


def filtered(image: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """`rows @ image @ columns.T` of each channel."""
    return jnp.einsum("yh,hwc,xw->yxc", jnp.asarray(rows, jnp.float32), image, jnp.asarray(columns, jnp.float32))


def gaussian_matrix(size: int, sigma: float, truncate: float, mode: str) -> np.ndarray:
    """`[size, size]`, a Gaussian blur along an axis, cut off at `truncate` sigma, borders padded as by `np.pad`."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return np.eye(size)
    weight = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return _banded(np.pad(np.arange(size), radius, mode), weight / weight.sum(), size)  # type: ignore[call-overload]


def _banded(index: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    """Row i has `weight[j]` in column `index[i + j]`."""
    matrix = np.zeros((size, size))
    for j, w in enumerate(weight):
        np.add.at(matrix, (np.arange(size), index[j : j + size]), w)
    return matrix


def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """`[size, size]`, the middle `1 / factor` of an axis spread over all of it, linearly, ends on ends."""
    kept = math.ceil(size / factor)
    spread = round(kept * factor)
    first, trim = (size - kept) // 2, (spread - size) // 2
    place = (np.arange(spread) * (kept - 1) / max(spread - 1, 1))[trim : trim + size]
    low = np.minimum(place.astype(int), max(kept - 2, 0))
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size), first + low), 1 - (place - low))
    np.add.at(matrix, (np.arange(size), np.minimum(first + low + 1, size - 1)), place - low)
    return matrix


def box_matrix(size: int, new_size: int) -> np.ndarray:
    """`[new_size, size]`: a new pixel is the mean of the old ones whose centres it covers, or the one it lies in."""
    scale = size / new_size
    support = 0.5 * max(scale, 1.0)
    centre = (np.arange(new_size) + 0.5) * scale
    offset = np.arange(size) + 0.5 - centre[:, None]
    covered = ((offset > -support) & (offset <= support)).astype(float)
    return covered / covered.sum(axis=1, keepdims=True)


def defocus_kernel(radius: float, sigma: float) -> np.ndarray:
    """`[5, 5]`, a disk of less than 2 pixels' radius, softened by a Gaussian of 3 x 3 taps."""
    x = np.arange(-2, 3)
    disk = np.pad((x[:, None] ** 2 + x**2 <= radius**2).astype(float), 1)
    tap = np.exp(-0.5 * (np.arange(-1, 2) / sigma) ** 2)
    soft = np.outer(tap, tap) / tap.sum() ** 2
    windows = np.lib.stride_tricks.sliding_window_view(disk / disk.sum(), (3, 3))
    return np.einsum("yxij,ij->yx", windows, soft)


def motion_blur(image: Array, radius: int, sigma: float, degrees: Array) -> Array:
    """Half a Gaussian along a ray from each pixel, its `2 radius + 1` taps at the nearest whole pixels.

    Source: what ImageMagick's MotionBlurImage computes.
    """
    height, width = image.shape[:2]
    taps = np.arange(2 * radius + 1)
    weight = np.exp(-0.5 * (taps / sigma) ** 2)
    angle = jnp.deg2rad(degrees)
    down, right = (jnp.ceil(taps * f(angle) - 0.5).astype(jnp.int32) for f in (jnp.sin, jnp.cos))
    rows = jnp.clip(np.arange(height) + down[:, None], 0, height - 1)
    columns = jnp.clip(np.arange(width) + right[:, None], 0, width - 1)
    shifted = image[rows[:, :, None], columns[:, None, :]]
    return jnp.einsum("t,tyxc->yxc", jnp.asarray(weight / weight.sum(), jnp.float32), shifted)


def bilinear(image: Array, row: Array, column: Array, mode: str) -> Array:
    """Each channel interpolated between pixels, beyond the border as `map_coordinates` does in that mode."""
    return jax.vmap(
        lambda channel: jax.scipy.ndimage.map_coordinates(channel, [row, column], order=1, mode=mode),
        in_axes=2,
        out_axes=2,
    )(image)


def plasma(key: Key, height: int, width: int, decay: float) -> Array:
    """`f32[height, width]` in [0, 1], a cloud by midpoint displacement on a torus.

    Every doubling of the grid sets the middles of squares, then of edges, to the mean of their four neighbours plus
    noise from U(-a, a), with a smaller by `decay ** 2` each time.
    """
    levels = max(math.ceil(math.log2(max(height, width))), 1)
    drawn = jax.random.uniform(key, (2**levels, 2**levels), minval=-1.0)  # one number for every pixel
    grid, amplitude = jnp.zeros((1, 1)), 1.0
    for level in range(levels):
        grid = jax.lax.optimization_barrier(grid)  # fused into one loop, all levels take seconds to compile
        half = 2 ** (levels - level - 1)
        new = amplitude * drawn[::half, ::half]
        noise = [new[1::2, 1::2], new[::2, 1::2], new[1::2, ::2]]
        below, right = jnp.roll(grid, -1, 0), jnp.roll(grid, -1, 1)
        middle = (grid + below + right + jnp.roll(below, -1, 1)) / 4 + noise[0]
        on_row = (grid + right + middle + jnp.roll(middle, 1, 0)) / 4 + noise[1]
        on_column = (grid + below + middle + jnp.roll(middle, 1, 1)) / 4 + noise[2]
        rows = [jnp.stack([grid, on_row], axis=-1), jnp.stack([on_column, middle], axis=-1)]
        grid = jnp.stack(rows, axis=1).reshape(2 * grid.shape[0], -1)
        amplitude = amplitude / decay**2
    grid = grid - jnp.min(grid)
    return (grid / jnp.max(grid))[:height, :width]


# JPEG (ITU-T T.81). The tables are its examples K.1 and K.2, which all encoders in use take.
_LUMA = """16 11 10 16  24  40  51  61   12 12 14 19  26  58  60  55   14 13 16 24  40  57  69  56
           14 17 22 29  51  87  80  62   18 22 37 56  68 109 103  77   24 35 55 64  81 104 113  92
           49 64 78 87 103 121 120 101   72 92 95 98 112 100 103  99"""
_CHROMA = """17 18 24 47 99 99 99 99   18 21 26 66 99 99 99 99   24 26 56 99 99 99 99 99   47 66 99 99 99 99 99 99
             99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99"""
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]])
_FREQUENCY = np.arange(8)[:, None]
_DCT = np.cos(np.pi * (2 * np.arange(8) + 1) * _FREQUENCY / 16) * np.where(_FREQUENCY == 0, 0.5**1.5, 0.5)


def jpeg(image: Array, quality: int) -> Array:
    """What is left of an image after JPEG at this quality: `[0, 255]`, whole numbers, in and out.

    Colour as luma and chroma, chroma at half the resolution (4:2:0) and interpolated back; 8 x 8 cosine
    transforms rounded to multiples of the quantisation table. The entropy coding loses nothing, so it is left out.
    """
    height, width, channels = image.shape
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = [
        np.clip((np.array(table.split(), int).reshape(8, 8) * scale + 50) // 100, 1, 255)
        for table in (_LUMA, _CHROMA, _CHROMA)
    ]
    if channels == 1:
        return _coded(image[..., 0], tables[0])[..., None]
    ycc = jnp.round(image @ jnp.asarray(_TO_YCC.T, jnp.float32) + np.array([0, 128, 128], np.float32))
    planes = [_coded(ycc[..., 0], tables[0])]
    for plane, table in zip((ycc[..., 1], ycc[..., 2]), tables[1:], strict=True):
        even = jnp.pad(plane, ((0, height % 2), (0, -width % 16)), mode="edge")  # columns are padded before halving
        half = even.reshape(even.shape[0] // 2, 2, -1, 2).sum(axis=(1, 3))
        half = jnp.floor((half + 1 + np.arange(half.shape[1]) % 2) / 4)  # sums of ...2 go down and up by turns
        coded = _coded(half, table)[:, : -(-width // 2)]
        planes.append(_doubled(coded, height, width))
    red_green_blue = np.linalg.inv(_TO_YCC).T
    offset = jnp.stack(planes, axis=-1) - np.array([0, 128, 128], np.float32)
    return jnp.clip(jnp.round(offset @ jnp.asarray(red_green_blue, jnp.float32)), 0, 255)


def _coded(plane: Array, table: np.ndarray) -> Array:
    """A plane after its blocks' cosine transforms were rounded."""
    height, width = plane.shape
    padded = jnp.pad(plane, ((0, -height % 8), (0, -width % 8)), mode="edge") - 128
    blocks = padded.reshape(padded.shape[0] // 8, 8, -1, 8)
    dct = jnp.asarray(_DCT, jnp.float32)
    table = np.asarray(table, np.float32)[:, None]
    kept = jnp.round(jnp.einsum("uy,aybx,vx->aubv", dct, blocks, dct) / table) * table
    back = jnp.einsum("uy,aubv,vx->aybx", dct, kept, dct).reshape(padded.shape)
    return jnp.clip(jnp.round(back + 128), 0, 255)[:height, :width]


def _doubled(plane: Array, height: int, width: int) -> Array:
    """Twice the resolution: each new pixel has 3/4 of the nearest old one and 1/4 of the next, in both directions."""
    matrices = []
    for size, new_size in zip(plane.shape, (height, width), strict=True):
        index = np.pad(np.arange(size), 1, "edge")
        matrix = 0.75 * np.repeat(np.eye(size), 2, axis=0)
        np.add.at(matrix, (np.arange(0, 2 * size, 2), index[:-2]), 0.25)
        np.add.at(matrix, (np.arange(1, 2 * size, 2), index[2:]), 0.25)
        matrices.append(matrix[:new_size])
    smooth = filtered(plane[..., None], *matrices)[..., 0]
    return jnp.floor(smooth + np.where(np.arange(width) % 2, 7 / 16, 0.5))  # as its decoder rounds
