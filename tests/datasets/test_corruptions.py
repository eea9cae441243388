import colorsys
import io
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from cl_zoo.datasets import CORRUPTIONS, NOISES, corrupt, corruptions, image_filters, load_digits

KEY = jax.random.key(3)
NAMES = tuple(dict.fromkeys(CORRUPTIONS + NOISES))
DRAWS = set(NAMES) - {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
# These change an image in another way at each severity, rather than more.
OTHER_WAYS = ("glass_blur", "elastic_transform", "frost")


def clean():
    """Some digits, the first one twice."""
    return np.concatenate([load_digits().test_images[:1], load_digits().test_images[:15]])


def colours(n=6, size=20):
    """Smooth coloured images."""
    noise = np.random.default_rng(0).normal(size=(n, size, size, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 0), mode="wrap")
    return np.round(255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)


@cache
def program(name):
    """All severities in one program."""
    return jax.jit(lambda images, key: jnp.stack([corrupt(images, name, s, key) for s in (1, 2, 3, 4, 5)]))


@cache
def damaged(name):
    return np.asarray(program(name)(clean(), KEY))


def one(images, name, severity, key=KEY):
    return np.asarray(jax.jit(corrupt, static_argnums=(1, 2))(jnp.asarray(images), name, severity, key))


def test_names():
    assert len(CORRUPTIONS) == 15 and len(NOISES) == 5 and len(NAMES) == 17
    assert set(corruptions._SEVERITIES) == set(NAMES)
    assert all(len(constants) == 5 for constants in corruptions._SEVERITIES.values())


@pytest.mark.parametrize("name", NAMES)
def test_shape_draws_and_growing_damage(name):
    found = damaged(name)
    assert found.shape == (5, 16, 28, 28) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, program(name)(clean(), KEY))
    again = np.asarray(program(name)(clean(), jax.random.key(4)))
    draws = name in DRAWS
    for severity in range(5):
        assert np.any(again[severity] != found[severity]) == draws, "other draws of another key, where there are any"
    assert np.any(found[:, 0] != found[:, 1]) == draws, "equal images have draws of their own"
    change = np.mean((found.astype(float) - clean()) ** 2, axis=(1, 2, 3))
    assert change[0] > 5
    if name not in OTHER_WAYS:
        growth = np.diff(change)
        same_length = name == "motion_blur"  # severity 4 has a longer radius of the same width
        assert np.all(growth > (-1e-9 if same_length else 0)) and change[4] > 1.5 * change[0]


def test_damage_of_the_other_ways():
    def change(name):
        return np.mean((damaged(name).astype(float) - clean()) ** 2, axis=(1, 2, 3))

    glass, frost = change("glass_blur"), change("frost")
    assert glass[3] > 1.3 * glass[1] and glass[4] > 1.3 * glass[2], "shuffled twice, at the same blur"
    assert frost[1] > frost[0] and frost[4] > frost[1]


@pytest.mark.parametrize("name", NAMES)
def test_colour_images(name):
    images = colours()
    found = one(images, name, 3)
    assert found.shape == images.shape and found.dtype == np.uint8
    distance = np.abs(found.astype(float) - images)
    assert 0.5 < distance.mean() < 80
    for channel in range(3):
        # Its own channel is nearest, so none were mixed up.
        assert np.corrcoef(found[..., channel].ravel(), images[..., channel].ravel())[0, 1] > 0.5


@pytest.mark.parametrize("name", ["gaussian_noise", "snow", "jpeg_compression"])
def test_a_last_axis_of_one_is_grey(name):
    np.testing.assert_array_equal(one(clean()[..., None], name, 3)[..., 0], damaged(name)[2])


def test_one_key_per_image():
    keys = jax.random.split(KEY, 16)
    whole = one(clean(), "gaussian_noise", 2, keys)
    np.testing.assert_array_equal(whole[5:9], one(clean()[5:9], "gaussian_noise", 2, keys[5:9]))
    assert np.any(whole[0] != whole[1])


# Noise on a plain grey of 128


GREY = np.full((1, 128, 128), 128, np.uint8)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "name,deviation",
    [
        ("gaussian_noise", lambda c: 255 * c),
        ("uniform_noise", lambda c: 255 * c),
        ("speckle_noise", lambda c: 128 * c),
        ("shot_noise", lambda c: 255 * np.sqrt(128 / 255 / c)),
    ],
)
def test_deviation(name, deviation, severity):
    expected = {
        "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
        "uniform_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
        "speckle_noise": [0.06, 0.1, 0.12, 0.16, 0.2],
        "shot_noise": [500, 250, 100, 75, 50],
    }[name][severity - 1]
    found = np.asarray(one(GREY, name, severity), float)
    np.testing.assert_allclose(found.std(), np.hypot(deviation(expected), 12**-0.5), rtol=0.025)
    np.testing.assert_allclose(found.mean(), 128, atol=4 * deviation(expected) / 128)
    if name == "uniform_noise":
        assert np.abs(found - 128).max() <= np.sqrt(3) * 255 * expected + 0.5


def test_impulses():
    for severity, share in enumerate((0.01, 0.02, 0.03, 0.05, 0.07), start=1):
        found = one(GREY, "impulse_noise", severity)
        assert set(np.unique(found)) == {0, 128, 255}
        spread = 4 * np.sqrt(share / 2 / GREY.size)
        assert abs(np.mean(found == 255) - share / 2) < spread and abs(np.mean(found == 0) - share / 2) < spread


def test_dark_stays_dark_under_noise_of_light():
    for name in ("shot_noise", "speckle_noise"):
        assert np.all(one(np.zeros((1, 8, 8), np.uint8), name, 5) == 0)


# Closed forms


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_adds_to_the_value(severity):
    images = colours(1, 12)
    images[0, 0, :3] = [[0, 0, 0], [255, 0, 0], [255, 255, 255]]
    added = {1: 0.05, 5: 0.3}[severity]
    expected = np.empty(images.shape)
    for place in np.ndindex(images.shape[:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(images[place] / 255))
        expected[place] = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
    np.testing.assert_allclose(one(images, "brightness", severity), 255 * expected, atol=0.502)
    expected = np.minimum(clean() + 255 * added, 255)
    np.testing.assert_allclose(damaged("brightness")[severity - 1], expected, atol=0.502)


def test_contrast_shrinks_towards_the_mean_of_each_channel():
    images = colours()
    mean = images.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(one(images, "contrast", 4), mean + 0.3 * (images - mean), atol=0.502)


def test_fog_on_white():
    """Between full white, where the cloud is densest, and 1 / (1 + weight)."""
    found = one(np.full((3, 32, 32), 255, np.uint8), "fog", 3)
    assert np.all(found.max(axis=(1, 2)) == 255) and np.all(found.min(axis=(1, 2)) == round(255 / 1.75))
    assert np.all(one(np.zeros((1, 32, 32), np.uint8), "fog", 3) == 0)


def test_snow_on_black():
    """Flakes lie on a grey of 0.5 (1 - kept), and once more turned half around."""
    found = one(np.zeros((3, 32, 32), np.uint8), "snow", 4)
    assert found.min() >= round(255 * 0.5 * 0.15) and found.max() > 60
    np.testing.assert_array_equal(found, found[:, ::-1, ::-1])


def test_frost_adds_the_same_ice_to_any_image():
    ice = one(np.zeros((2, 28, 28), np.uint8), "frost", 4)
    assert 60 < ice.max() <= 0.4 * 255 and ice.min() >= 0 and ice.std() > 8
    found = one(np.full((2, 28, 28), 100, np.uint8), "frost", 4)
    np.testing.assert_allclose(found, ice + 85.0, atol=1.001)


# Filters, against scipy, Pillow and hand-worked numbers


@pytest.mark.parametrize("mode,pad", [("nearest", "edge"), ("reflect", "symmetric")])
@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.3, 6.4])
def test_gaussian_matrix(sigma, mode, pad):
    signal = np.random.default_rng(0).normal(size=20)
    found = image_filters.gaussian_matrix(20, sigma, 3, pad) @ signal
    np.testing.assert_allclose(found, ndimage.gaussian_filter1d(signal, sigma, mode=mode, truncate=3), atol=1e-12)


@pytest.mark.parametrize("size", [19, 28, 32])
@pytest.mark.parametrize("factor", [1.0, 1.04, 1.25, 2.25])
def test_zoom_matrix(size, factor):
    signal = np.random.default_rng(0).normal(size=size)
    kept = int(np.ceil(size / factor))
    first = (size - kept) // 2
    spread = ndimage.zoom(signal[first : first + kept], factor, order=1, mode="nearest")
    trim = (len(spread) - size) // 2
    found = image_filters.zoom_matrix(size, factor) @ signal
    np.testing.assert_allclose(found, spread[trim : trim + size], atol=1e-12)


def test_zoom_blur():
    image = clean()[5].astype(float)
    matrices = [image_filters.zoom_matrix(28, 1 + 0.01 * i) for i in range(16)]
    expected = (image + sum(m @ image @ m.T for m in matrices)) / 17
    np.testing.assert_allclose(damaged("zoom_blur")[2, 5], expected, atol=0.51)


def test_defocus_blur_of_the_strongest_is_a_mean_of_nine():
    image = clean()[5].astype(float)
    padded = np.pad(image, 1, mode="reflect")
    expected = sum(padded[i : i + 28, j : j + 28] for i in range(3) for j in range(3)) / 9
    np.testing.assert_allclose(damaged("defocus_blur")[4, 5], expected, atol=0.51)


def test_defocus_blur_of_the_weakest_is_a_gaussian():
    tap = np.exp(-0.5 / 0.4**2)
    tap = np.array([tap, 1, tap]) / (1 + 2 * tap)
    expected = ndimage.correlate(clean()[5].astype(float), np.outer(tap, tap), mode="mirror")
    np.testing.assert_allclose(damaged("defocus_blur")[0, 5], expected, atol=0.51)


@pytest.mark.parametrize("degrees,step", [(0, (0, 1)), (90, (1, 0)), (-45, (-1, 1)), (180, (0, -1))])
def test_motion_blur_of_a_dot(degrees, step):
    """A pixel reads along the ray, so a dot is drawn out against it."""
    image = np.zeros((15, 15, 1), np.float32)
    image[7, 7] = 1
    found = np.asarray(image_filters.motion_blur(jnp.asarray(image), 3, 2.0, jnp.float32(degrees)))
    weight = np.exp(-0.5 * (np.arange(7) / 2.0) ** 2)
    # Diagonally, two taps may share a pixel.
    length = np.hypot(*step)
    expected = np.zeros((15, 15))
    for i, w in enumerate(weight / weight.sum()):
        row, column = (int(np.ceil(i * s / length - 0.5)) for s in step)
        expected[7 - row, 7 - column] += w
    np.testing.assert_allclose(found[..., 0], expected, atol=1e-6)


def test_glass_blur_takes_neighbours():
    image = np.random.default_rng(0).permutation(400).reshape(20, 20)[..., None] / 400
    found = np.asarray(corruptions._glass_blur(jnp.asarray(image, jnp.float32), (0.05, 1), KEY))[..., 0]
    image = image[..., 0]
    np.testing.assert_allclose(found[:2], image[:2], atol=1e-6)
    np.testing.assert_allclose(found[:, :2], image[:, :2], atol=1e-6)
    counts = np.zeros(4, int)
    for i in range(2, 20):
        for j in range(2, 20):
            around = [image[i, j], image[i - 1, j], image[i, j - 1], image[i - 1, j - 1]]
            counts[np.flatnonzero(np.isclose(found[i, j], around, atol=1e-5))[0]] += 1
    assert counts.sum() == 18**2 and np.all(np.abs(counts / 18**2 - 0.25) < 0.1)


def test_plasma_is_rougher_where_it_decays_less():
    made = jax.jit(image_filters.plasma, static_argnums=(1, 2, 3))
    clouds = [np.asarray(made(KEY, 32, 32, decay)) for decay in (1.0, 1.75, 3.0)]
    for cloud in clouds:
        assert cloud.shape == (32, 32) and cloud.min() == 0 and cloud.max() == 1
        assert cloud.std() > 0.1
    rough = [np.abs(np.diff(cloud)).mean() / cloud.std() for cloud in clouds]
    assert rough[0] > 2 * rough[1] > 2 * rough[2]
    assert made(KEY, 20, 28, 2.0).shape == (20, 28)


def test_plasma_without_noise_below_its_first_level_is_a_mean():
    """With noise that dies out at once, every point is the mean of its four neighbours at twice the distance."""
    cloud = np.asarray(image_filters.plasma(KEY, 4, 4, 1e3))
    corner, right, below, middle = cloud[0, 0], cloud[0, 2], cloud[2, 0], cloud[2, 2]
    np.testing.assert_allclose(cloud[1, 1], (corner + right + below + middle) / 4, atol=1e-5)
    np.testing.assert_allclose(cloud[0, 1], (corner + right + cloud[1, 1] + cloud[3, 1]) / 4, atol=1e-5)
    np.testing.assert_allclose(cloud[1, 0], (corner + below + cloud[1, 1] + cloud[1, 3]) / 4, atol=1e-5)


def test_elastic_transform_of_the_weakest_is_affine():
    """A plane stays a plane, where it does not come from beyond the border; the corners move by at most 0.08 sides."""
    row, column = np.meshgrid(np.arange(32.0), np.arange(32.0), indexing="ij")
    planes = jnp.asarray(np.stack([row, column], axis=-1), jnp.float32)
    source = np.asarray(corruptions._elastic_transform(planes, (0.0, 0.0, 0.08), KEY))
    inner = source[10:22, 10:22]
    for axis in (0, 1):
        np.testing.assert_allclose(np.diff(inner, n=2, axis=axis), 0, atol=1e-4)
    # The affine map, read off in the middle, takes the moved corners to corners.
    slopes = np.stack([inner[1, 0] - inner[0, 0], inner[0, 1] - inner[0, 0]])
    moved = np.array([[26, 26], [6, 26], [6, 6]]) @ slopes + inner[0, 0] - np.array([10, 10]) @ slopes
    back = (np.array([[26, 26], [6, 26], [6, 6]]) - moved) @ np.linalg.inv(slopes)
    assert 0.1 < np.abs(back).max() <= 0.08 * 32 + 1e-3


def test_elastic_transform_displaces():
    row, column = np.meshgrid(np.arange(32.0), np.arange(32.0), indexing="ij")
    planes = jnp.asarray(np.stack([row, column], axis=-1), jnp.float32)
    source = np.asarray(corruptions._elastic_transform(planes, (0.1, 0.03, 0.0), KEY))
    moved = (source - np.asarray(planes))[6:-6, 6:-6]
    # Uniform numbers of deviation 1/sqrt(3), blurred over 2 sqrt(pi) sigma pixels each way, times 3.2 pixels.
    np.testing.assert_allclose(moved.std(axis=(0, 1)), 3.2 / np.sqrt(3) / (2 * np.sqrt(np.pi) * 0.96), rtol=0.2)


@pytest.mark.parametrize("share", [0.95, 0.9, 0.85, 0.75, 0.65])
@pytest.mark.parametrize("size", [28, 32])
def test_pixelate_is_pillows(share, size):
    pillow = pytest.importorskip("PIL.Image")
    image = colours(1, size)[0]
    small = pillow.fromarray(image).resize((int(size * share), int(size * share)), pillow.BOX)
    expected = np.asarray(small.resize((size, size), pillow.BOX)).astype(int)
    found = 255 * np.asarray(corruptions._pixelate(jnp.asarray(image, jnp.float32) / 255, share, KEY))
    assert np.abs(found - expected).max() < 1.001 and np.mean(np.abs(found - expected) > 0.5) < 0.01


@pytest.mark.parametrize("quality", [80, 65, 58, 50, 40])
@pytest.mark.parametrize("shape", [(28, 28), (32, 32), (27, 19), (32, 32, 3), (28, 28, 3), (27, 19, 3)])
def test_jpeg_is_pillows(quality, shape):
    """Up to rounding: a coefficient half between two steps may go either way, and changes its block a little."""
    pillow = pytest.importorskip("PIL.Image")
    images = colours(8, 32)[:, : shape[0], : shape[1]]
    images = images if len(shape) == 3 else images[..., 1]
    expected = []
    for image in images:
        file = io.BytesIO()
        pillow.fromarray(image).save(file, "JPEG", quality=quality)
        expected.append(np.asarray(pillow.open(file)).astype(float))
    found = jpeg_program(quality)(images.reshape(*images.shape[:3], -1).astype(np.float32))
    distance = np.abs(np.asarray(found).reshape(images.shape) - expected)
    damage = np.abs(np.array(expected) - images).mean()
    assert distance.mean() < 0.6 and distance.mean() < 0.15 * damage and np.mean(distance > 2) < 0.08


@cache
def jpeg_program(quality):
    return jax.jit(jax.vmap(lambda image: image_filters.jpeg(image, quality)))


# Refusals


@pytest.mark.parametrize(
    "images,name,severity,key,message",
    [
        (GREY, "rain", 1, KEY, "name is 'rain'.*'gaussian_noise'"),
        (GREY, "fog", 0, KEY, "severity is 0.*1, 2, 3, 4, 5"),
        (GREY / 255, "fog", 1, KEY, "images are float.*uint8"),
        (GREY[0], "fog", 1, KEY, r"shape \(128, 128\).*\[N, height, width\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), "fog", 1, KEY, "C 1 or 3"),
        (GREY, "fog", 1, jax.random.split(KEY, 3), r"key has shape \(3,\).*\(1,\)"),
    ],
)
def test_refusals(images, name, severity, key, message):
    with pytest.raises(ValueError, match=message):
        corrupt(images, name, severity, key)
