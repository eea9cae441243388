"""Nothing computes otherwise than before: update the goldens only if the mathematics changed, and say why."""

import jax
import numpy as np
import pytest

from tests.goldens import make

pytestmark = pytest.mark.long
# Whole numbers are equal; others as far apart as another program's rounding lets them be.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


@pytest.fixture(scope="module")
def kept():
    if not make.FILE.exists():
        pytest.skip(f"there is no {make.FILE.name} yet: python -m {make.__name__}")
    with np.load(make.FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("name", make.names())
def test_golden(kept, tiny_images, name: str) -> None:
    wanted = {key: value for key, value in kept.items() if key.startswith(f"{name}/")}
    found = make.found(name, tiny_images, name in kept["in_float64"])
    assert found.keys() == wanted.keys(), f"update only if the mathematics changed: python -m {make.__name__}"
    for key, value in wanted.items():
        now, where = found[key], f"{key} (kept by JAX {kept['jax_version']}, now {jax.__version__})"
        if value.dtype.kind in "fc":
            scale = max(np.max(np.abs(value), initial=0, where=np.isfinite(value)), 1e-3)
            np.testing.assert_allclose(now, value, rtol=0, atol=TOLERANCE[value.dtype.name] * scale, err_msg=where)
        else:
            np.testing.assert_array_equal(now, value, err_msg=where)
