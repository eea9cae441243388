"""What the peer benchmarks share: settings, arguments, data and the JSON line."""

import argparse
import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # an optimizer's first use would import it, in timed code
from torch import Tensor, nn

PIXELS = 784
CLASSES = 10
EVAL_BATCH = 1000
# Of DER++: rows in memory, and the weights of its two terms. As many rows are replayed as come.
MEMORY, ALPHA, BETA = 500, 0.5, 0.5


@dataclass(frozen=True)
class Setting:
    """A continual-learning problem; one epoch a task, Adam, evaluation after each task."""

    tasks: int
    train_size: int
    hidden: tuple[int, ...]
    batch: int
    learning_rate: float = 1e-3


SETTINGS = {
    "permuted": Setting(tasks=5, train_size=10_000, hidden=(256, 256), batch=64),
    "online": Setting(tasks=10, train_size=2_000, hidden=(100, 100), batch=10),
}


@dataclass
class Task:
    """One permutation's data: pixels / 255 as float32 [n, 784], labels as int64 [n]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def make_parser(description: str, lambda_help: str) -> argparse.ArgumentParser:
    """The arguments that every peer script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="npz with images and permutations")
    parser.add_argument("--setting", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ewc-lambda", type=float, help=lambda_help)
    parser.add_argument("--tasks", type=int, help="override the setting (for a smoke test)")
    parser.add_argument("--train-size", type=int, help="override the setting (for a smoke test)")
    return parser


def prepare(args: argparse.Namespace) -> Setting:
    """Set the threads and the seed; return the setting with its overrides."""
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    torch.manual_seed(args.seed)
    overrides = {"tasks": args.tasks, "train_size": args.train_size}
    return replace(SETTINGS[args.setting], **{k: v for k, v in overrides.items() if v is not None})


def load_tasks(path: Path, setting: Setting) -> list[Task]:
    """Permuted in-memory tensors of every task: the first training images, all test images."""
    with np.load(path, allow_pickle=False) as data:
        if len(data["permutations"]) < setting.tasks:
            raise ValueError(f"{path} has fewer than {setting.tasks} permutations")
        if len(data["train_images"]) < setting.train_size:
            raise ValueError(f"{path} has fewer than {setting.train_size} training images")
        train_x = _pixels(data["train_images"][: setting.train_size])
        test_x = _pixels(data["test_images"])
        train_y = torch.from_numpy(data["train_labels"][: setting.train_size].astype(np.int64))
        test_y = torch.from_numpy(data["test_labels"].astype(np.int64))
        orders = torch.from_numpy(data["permutations"][: setting.tasks].astype(np.int64))
    return [Task(train_x.index_select(1, order), train_y, test_x.index_select(1, order), test_y) for order in orders]


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).reshape(len(images), PIXELS).float().div_(255)


def make_mlp(hidden: tuple[int, ...]) -> nn.Sequential:
    """A ReLU net on flat pixels with one head, without dropout."""
    layers: list[nn.Module] = []
    width = PIXELS
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def print_report(
    args: argparse.Namespace,
    seconds: dict[str, float],
    accuracy_matrix: list[list[float]],
    versions: dict[str, str],
    **extra: object,
) -> None:
    """Print the JSON line: row i of the matrix is the accuracy on each task after task i."""
    report = {
        "setting": args.setting,
        "threads": args.threads,
        "seed": args.seed,
        "ewc_lambda": args.ewc_lambda,
        **extra,
        **{name: round(value, 4) for name, value in seconds.items()},
        "mean_accuracy": round(sum(accuracy_matrix[-1]) / len(accuracy_matrix[-1]), 4),
        "accuracy_matrix": [[round(value, 4) for value in row] for row in accuracy_matrix],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
    }
    print(json.dumps(report))
