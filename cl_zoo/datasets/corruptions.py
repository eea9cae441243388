"""The image corruptions of CIFAR-10-C, at five severities."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cl_zoo.checks import check_choice
from cl_zoo.datasets.image_filters import (
    bilinear,
    box_matrix,
    defocus_kernel,
    filtered,
    gaussian_matrix,
    jpeg,
    motion_blur,
    plasma,
    zoom_matrix,
)
from cl_zoo.types import Array, Key

__all__ = ["CORRUPTIONS", "NOISES", "corrupt"]

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The 15 corruptions of CIFAR-10-C, in its order."""

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "uniform_noise")
"""Five noises, each pixel's independent of the others': the three of CIFAR-10-C, `speckle_noise` of its extra set, and
`uniform_noise`, not part of it: as strong as its gaussian noise, but bounded."""

# Everything a severity stands for. The numbers are those of the 32 x 32 set, CIFAR-10-C, not of ImageNet-C; lengths are
# in its pixels. Images run from 0 to 1.
_SEVERITIES: dict[str, tuple] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons of a white pixel
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # fraction of values replaced
    "speckle_noise": (0.06, 0.10, 0.12, 0.16, 0.20),  # standard deviation relative to the value
    "uniform_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, ours
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),  # radius, softness
    "glass_blur": ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),  # sigma, times shuffled
    "motion_blur": ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),  # radius, sigma
    "zoom_blur": (7, 12, 16, 21, 26),  # zooms 1, 1.01, 1.02, ...
    "snow": (  # mean and deviation of the flakes, their zoom and threshold; motion's radius and sigma; image kept
        (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),  # weights of image and ice
    "fog": ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),  # weight, the cloud's smoothness
    "brightness": (0.05, 0.10, 0.15, 0.20, 0.30),  # added to the HSV value
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor
    # strength and sigma of the displacements, shift of three points; fractions of the image's side
    "elastic_transform": (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # fraction of the resolution kept
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
}


def corrupt(images: Array, name: str, severity: int, key: Key) -> Array:
    """Images after a corruption, as they would be stored.

        round(255 clip(f_(name, severity)(image / 255, noise), 0, 1))

    It may be jitted with name and severity static, as they set what is compiled. Memory is some tens of floats for
    every value of an image: give large sets in parts.

    Args:
      images: `uint8[N, height, width]` (grey), or `[N, height, width, C]` with C 1 (grey) or 3 (red, green, blue).
      name: one of `CORRUPTIONS` or `NOISES`.
      severity: 1 to 5.
      key: of the draws, which differ between images; or one key per image, `[N]`, so that sets given in parts draw the
        same.
        Defocus and zoom blur, brightness, contrast, pixelate and JPEG draw nothing.

    Returns:
      `uint8` of the same shape.

    Raises:
      ValueError: an unknown name or severity, images of another type or shape.

    Source: Hendrycks and Dietterich 2019, arXiv 1903.12261, with the constants of its code for CIFAR-10-C.

    Differences from the paper or its code:
      - Grey images: luma alone is coded in JPEG; brightness adds to the grey value, which is the HSV value of a grey
        pixel, and snow whitens by it; frost has no tint. All else treats channels alike.
      - Frost: drawn, as crystals with bright edges and feathers over a cloud. The original crops photographs of ice,
        which are brighter (mean 164 of 255; drawn 100): the strength here is about 0.6 of theirs.
      - Glass blur: each pixel takes the value of a neighbour up and left of it, or keeps its own. The code means to
        swap the two, but on colour images its swap copies; so it does here, on grey ones too.
      - Results are rounded. The original truncates, which darkens by half a grey level, and rounds inside glass
        blur, motion blur and snow too.
      - Other sizes than 32 x 32: shifts of `elastic_transform` and the resolution of `pixelate` grow with the image;
        other lengths stay in pixels. Images that are not square are zoomed along each axis.

    Example:
      >>> grey = jnp.full((2, 28, 28), 100, jnp.uint8)
      >>> corrupt(grey, "brightness", 2, jax.random.key(0))[0, 0, :3].tolist()
      [126, 126, 126]
    """
    owner = "corrupt"
    check_choice(owner, "name", name, tuple(_FUNCTIONS))
    check_choice(owner, "severity", severity, (1, 2, 3, 4, 5))
    if images.dtype != jnp.uint8:
        raise ValueError(f"{owner}: images are {images.dtype}, but they must be uint8, from 0 to 255")
    if not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))):
        raise ValueError(
            f"{owner}: images have shape {images.shape}, but it must be [N, height, width], or [N, height, width, C]"
            " with C 1 or 3"
        )
    n = images.shape[0]
    if key.ndim > 0 and key.shape != (n,):
        raise ValueError(f"{owner}: key has shape {key.shape}, but it must be one key, or one per image, ({n},)")
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
    constants = _SEVERITIES[name][severity - 1]
    channels = jnp.reshape(images, (*images.shape[:3], -1)).astype(jnp.float32) / 255
    changed = jax.vmap(lambda image, k: _FUNCTIONS[name](image, constants, k))(channels, keys)
    return jnp.round(255 * jnp.clip(changed, 0, 1)).astype(jnp.uint8).reshape(images.shape)


# Each is `(image f32[H, W, C] in [0, 1], constants, key) -> image`; what falls outside [0, 1] is clipped later.


def _gaussian_noise(image: Array, deviation: float, key: Key) -> Array:
    return image + deviation * jax.random.normal(key, image.shape)


def _shot_noise(image: Array, photons: float, key: Key) -> Array:
    return jax.random.poisson(key, image * photons).astype(jnp.float32) / photons


def _impulse_noise(image: Array, share: float, key: Key) -> Array:
    drawn = jax.random.uniform(key, image.shape)
    return jnp.where(drawn < share, (drawn < share / 2).astype(jnp.float32), image)


def _speckle_noise(image: Array, deviation: float, key: Key) -> Array:
    return image + image * deviation * jax.random.normal(key, image.shape)


def _uniform_noise(image: Array, deviation: float, key: Key) -> Array:
    bound = deviation * math.sqrt(3)
    return image + jax.random.uniform(key, image.shape, minval=-bound, maxval=bound)


def _defocus_blur(image: Array, constants: tuple[float, float], key: Key) -> Array:
    kernel = jnp.asarray(defocus_kernel(*constants), jnp.float32)
    padded = jnp.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    return jax.vmap(lambda channel: jax.scipy.signal.convolve2d(channel, kernel, mode="valid"), 2, 2)(padded)


def _glass_blur(image: Array, constants: tuple[float, int], key: Key) -> Array:
    sigma, times = constants
    height, width = image.shape[:2]
    blur = [gaussian_matrix(size, sigma, 4, "edge") for size in (height, width)]
    image = filtered(image, *blur)
    row, column = np.arange(height)[:, None], np.arange(width)
    inside = (row > 1) & (column > 1)
    for k in jax.random.split(key, times):
        up, left = jax.random.bernoulli(k, 0.5, (2, height, width)) & inside
        image = image[row - up, column - left]
    return filtered(image, *blur)


def _motion_blur(image: Array, constants: tuple[int, float], key: Key) -> Array:
    return motion_blur(image, *constants, jax.random.uniform(key, minval=-45.0, maxval=45.0))


def _zoom_blur(image: Array, count: int, key: Key) -> Array:
    # As `arange` rounds them: the last of 26 is 1.2500000000000002, by which 26 pixels become 33 and not 32.
    factors = np.arange(1, 1 + 0.01 * count - 0.005, 0.01)
    rows, columns = (jnp.asarray([zoom_matrix(n, f) for f in factors], jnp.float32) for n in image.shape[:2])
    zoomed = jnp.einsum("fyh,hwc,fxw->yxc", rows, image, columns)
    return (image + zoomed) / (count + 1)


def _snow(image: Array, constants: tuple[float, ...], key: Key) -> Array:
    mean, deviation, zoom, threshold, radius, sigma, kept = constants
    shape = image.shape[:2]
    flake_key, angle_key = jax.random.split(key)
    flakes = (mean + deviation * jax.random.normal(flake_key, shape))[..., None]
    flakes = filtered(flakes, *(zoom_matrix(size, zoom) for size in shape))
    flakes = jnp.clip(jnp.where(flakes < threshold, 0, flakes), 0, 1)
    angle = jax.random.uniform(angle_key, minval=-135.0, maxval=-45.0)
    flakes = motion_blur(flakes, int(radius), sigma, angle)
    whitened = kept * image + (1 - kept) * jnp.maximum(image, 1.5 * _grey(image) + 0.5)
    return whitened + flakes + flakes[::-1, ::-1]


def _grey(image: Array) -> Array:
    if image.shape[-1] == 1:
        return image
    return (image @ jnp.array([0.299, 0.587, 0.114]))[..., None]


def _frost(image: Array, constants: tuple[float, float], key: Key) -> Array:
    of_image, of_ice = constants
    tint = jnp.array([0.86, 0.94, 1.0]) if image.shape[-1] == 3 else jnp.ones(1)
    return of_image * image + of_ice * _ice(key, *image.shape[:2])[..., None] * tint


def _ice(key: Key, height: int, width: int) -> Array:
    """`f32[height, width]` in [0, 1]: crystals around random points, each with its own direction of feathers."""
    point_key, angle_key, cloud_key = jax.random.split(key, 3)
    count = max(height * width // 64, 2)  # a crystal is about 8 pixels wide
    points = jax.random.uniform(point_key, (count, 2), minval=-0.1, maxval=1.1) * jnp.array([height, width])
    angles = jax.random.uniform(angle_key, (count,), maxval=math.pi)
    place = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1)
    offset = place[:, :, None] - points
    near, crystal = jax.lax.top_k(-jnp.sqrt(jnp.sum(offset**2, axis=-1)), 2)
    edge = jnp.exp(-((near[..., 0] - near[..., 1]) ** 2) / 2)
    mine = crystal[..., 0]
    from_centre = jnp.take_along_axis(offset, mine[..., None, None], axis=2)[..., 0, :]
    along = from_centre[..., 0] * jnp.sin(angles[mine]) + from_centre[..., 1] * jnp.cos(angles[mine])
    feather = 0.5 + 0.5 * jnp.cos(2 * math.pi * along / 3)  # 3 pixels apart
    return 0.45 * edge + 0.2 * feather + 0.35 * plasma(cloud_key, height, width, 1.5)


def _fog(image: Array, constants: tuple[float, float], key: Key) -> Array:
    weight, decay = constants
    height, width = image.shape[:2]
    brightest = jnp.max(image)
    cloud = plasma(key, height, width, decay)[..., None]
    return (image + weight * cloud) * brightest / (brightest + weight)


def _brightness(image: Array, added: float, key: Key) -> Array:
    # Of HSV, hue and saturation are unchanged where all channels grow by the factor by which their largest, the value,
    # does. Black has neither, and turns grey.
    value = jnp.max(image, axis=-1, keepdims=True)
    brighter = jnp.minimum(value + added, 1)
    return jnp.where(value > 0, image * brighter / jnp.where(value > 0, value, 1), brighter)


def _contrast(image: Array, factor: float, key: Key) -> Array:
    mean = jnp.mean(image, axis=(0, 1))
    return mean + factor * (image - mean)


def _elastic_transform(image: Array, constants: tuple[float, float, float], key: Key) -> Array:
    height, width = image.shape[:2]
    side = min(height, width)
    strength, sigma, shift = (side * c for c in constants)
    corner_key, row_key, column_key = jax.random.split(key, 3)
    middle, arm = np.array([height // 2, width // 2]), side // 3
    corners = np.array([middle + arm, middle + [-arm, arm], middle - arm], np.float32)
    moved = corners + jax.random.uniform(corner_key, (3, 2), minval=-shift, maxval=shift)
    # The affine map under which the moved points are read at the corners.
    matrix = jnp.linalg.solve(jnp.concatenate([moved, jnp.ones((3, 1))], axis=1), corners)
    row, column = jnp.meshgrid(jnp.arange(height) * 1.0, jnp.arange(width) * 1.0, indexing="ij")
    source = jnp.stack([row, column, jnp.ones_like(row)], axis=-1) @ matrix
    image = bilinear(image, source[..., 0], source[..., 1], "mirror")
    if strength == 0:
        return image
    blur = [gaussian_matrix(size, sigma, 3, "symmetric") for size in (height, width)]
    by_example, by_column = (
        strength * filtered(jax.random.uniform(k, (height, width, 1), minval=-1.0), *blur)[..., 0]
        for k in (row_key, column_key)
    )
    return bilinear(image, row + by_example, column + by_column, "reflect")


def _pixelate(image: Array, share: float, key: Key) -> Array:
    height, width = image.shape[:2]
    small = (max(int(height * share), 1), max(int(width * share), 1))
    for (old_height, old_width), (new_height, new_width) in (((height, width), small), (small, (height, width))):
        # Columns first, and rounded in between, as Pillow does.
        image = _to_bytes(filtered(image, np.eye(old_height), box_matrix(old_width, new_width)))
        image = _to_bytes(filtered(image, box_matrix(old_height, new_height), np.eye(new_width)))
    return image


def _to_bytes(image: Array) -> Array:
    return jnp.floor(255 * image + 0.5) / 255


def _jpeg_compression(image: Array, quality: int, key: Key) -> Array:
    return jpeg(jnp.round(255 * image), quality) / 255


_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "uniform_noise": _uniform_noise,
}
