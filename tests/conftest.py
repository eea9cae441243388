"""Set before JAX starts: eight devices on any machine, and compiling fast rather than running fast."""

import os
from importlib import metadata

# Eight devices need eight threads to meet each other, also where there are two cores.
os.environ["NPROC"] = "16"
FLAGS = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # Loops emitted as LLVM without MLIR take a third of the time; later versions end at a flag that they do not know.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cl_zoo import clear_programs, enable_compilation_cache
from cl_zoo.datasets import LabelledImages, load_digits

# Tracing makes many small objects that stay, and no test reads where an operation was traced: a fifth of the time.
gc.set_threshold(200_000, 50, 50)
jax.config.update("jax_traceback_in_locations_limit", 0)

if cache := os.environ.get("CL_ZOO_TEST_CACHE"):
    enable_compilation_cache(cache)


@pytest.fixture(scope="session")
def tiny_images() -> LabelledImages:
    """Six classes of noisy 4 x 4 patterns: learnt in a few steps, 60 + 30 images a class."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 256, (6, 4, 4))

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.tile(np.arange(6), n)
        images = 0.7 * patterns[labels] + 0.3 * random.integers(0, 256, (6 * n, 4, 4))
        return images.astype(np.uint8), labels.astype(np.uint8)

    return LabelledImages(*draw(60), *draw(30))


@pytest.fixture(scope="session")
def digits() -> LabelledImages:
    """The embedded digits."""
    return load_digits()


@pytest.fixture(scope="session")
def full_digits() -> LabelledImages:
    """All of MNIST, where CL_ZOO_DATA_DIR says where it is."""
    folder = os.environ.get("CL_ZOO_DATA_DIR")
    if not folder:
        pytest.skip("CL_ZOO_DATA_DIR is not set: it names the folder of the four MNIST files")
    return load_digits(folder)


def forget_programs() -> None:
    """Frees all compiled programs before memory maps run out: each takes some, and Linux gives a process 65 530."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        clear_programs()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module() -> Iterator[None]:
    """No module's programs outlive it."""
    yield
    forget_programs()


LONG = frozenset((Path(__file__).parent / "long.txt").read_text().split("\n"))
"""Tests that take seconds and of which others have the kind: `make test` leaves them out."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What lies beside the rooms first: studies and notebooks are few and long, and would keep one worker alone."""
    for item in items:
        if item.nodeid in LONG:
            item.add_marker(pytest.mark.long)
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests are shared out over workers by file, as what a file sets up is shared; laws by entry, and what is long one
    by one."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if file.endswith("test_laws.py") and "[" in test:
                return "law " + test.split("[")[1].rstrip("]").split("-")[0]
            return nodeid if file.endswith(("test_notebooks.py", "_studies.py", "_study.py")) else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)
