"""EWC or DER++ on permuted MNIST with Avalanche; prints one JSON line.

Avalanche's Fisher differs from the per-example one: it squares each training batch's mean
gradient, which makes it about `batch` times smaller, and its penalty has no factor 1/2. So the
counterpart of a strength s on the per-example Fisher is near ewc_lambda = s * batch / 2. Its
online mode keeps the sum of the Fishers and the latest parameters as the anchor.

Its DER++ draws one batch from memory where the paper draws two, and stores outputs at the end of each task.

--dataset says how much of it is Avalanche's own way:
  classic  its PermutedMNIST and the metrics and interactive logger of its example `ewc_mnist.py`, the digits as files;
  tensors  permuted beforehand, an in-memory TensorDataset, no logger, one metric;
  rows     the same, cut into rows beforehand, since Avalanche fetches examples one by one.
"""

import argparse
import contextlib
import io
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

# torchvision's own operators may be missing in this build; avalanche needs none of them.
_torchvision_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _torchvision_library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import avalanche  # noqa: E402
from avalanche.benchmarks import CLScenario, benchmark_from_datasets  # noqa: E402
from avalanche.benchmarks.classic import PermutedMNIST  # noqa: E402
from avalanche.benchmarks.utils import (  # noqa: E402
    _make_taskaware_classification_dataset,
    make_avalanche_dataset,
)
from avalanche.evaluation.metrics import (  # noqa: E402
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    loss_metrics,
)
from avalanche.logging import InteractiveLogger  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin  # noqa: E402
from avalanche.training.supervised import DER, EWC  # noqa: E402
from peer_common import (  # noqa: E402
    ALPHA,
    BETA,
    EVAL_BATCH,
    MEMORY,
    Setting,
    Task,
    load_tasks,
    make_mlp,
    make_parser,
    prepare,
    print_report,
)
from torch.utils.data import Dataset, TensorDataset  # noqa: E402


class RowDataset(Dataset):
    """In-memory examples cut into rows once, which makes fetching one cheap."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.targets = y.tolist()
        self.rows = list(zip(x.unbind(), self.targets))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.rows[index]


DATASETS = {"rows": RowDataset, "tensors": TensorDataset}


def make_benchmark(tasks: list[Task], dataset: type[Dataset], task_labels: bool) -> CLScenario:
    """Streams of in-memory data, without transforms; its DER++ needs task labels, always 0."""

    def make(x: torch.Tensor, y: torch.Tensor) -> Dataset:
        if not task_labels:
            return make_avalanche_dataset(dataset(x, y))
        return _make_taskaware_classification_dataset(dataset(x, y), targets=y.tolist(), task_labels=0)

    return benchmark_from_datasets(
        train=[make(t.train_x, t.train_y) for t in tasks], test=[make(t.test_x, t.test_y) for t in tasks]
    )


def write_idx(path: Path, values: np.ndarray) -> None:
    """An MNIST file: magic number, sizes, bytes."""
    header = np.array([0x0800 + values.ndim, *values.shape], ">i4")
    path.write_bytes(header.tobytes() + values.astype(np.uint8).tobytes())


def make_classic(data: Path, setting: Setting, folder: Path) -> CLScenario:
    """Avalanche's PermutedMNIST on the digits of `data`, written where torchvision keeps MNIST."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    with np.load(data, allow_pickle=False) as digits:
        for split, name, n in (("train", "train", setting.train_size), ("test", "t10k", None)):
            write_idx(raw / f"{name}-images-idx3-ubyte", digits[f"{split}_images"][:n].reshape(-1, 28, 28))
            write_idx(raw / f"{name}-labels-idx1-ubyte", digits[f"{split}_labels"][:n])
    return PermutedMNIST(setting.tasks, dataset_root=folder, seed=0)


def make_evaluator(dataset: str) -> EvaluationPlugin:
    """Of Avalanche's EWC example (less TensorBoard) for "classic", else the accuracy of every experience alone."""
    if dataset == "classic":
        every = {"minibatch": True, "epoch": True, "experience": True, "stream": True}
        last = {"experience": True, "stream": True}
        metrics = accuracy_metrics(**every), loss_metrics(**every), forgetting_metrics(**last), bwt_metrics(**last)
        return EvaluationPlugin(*metrics, loggers=[InteractiveLogger()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no loggers: as wanted
        return EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])


def experience_accuracies(metrics: dict[str, float], count: int) -> list[float]:
    """The last accuracy of every test experience, in order."""
    found = {name.rsplit("/", 1)[-1]: value for name, value in metrics.items() if name.startswith("Top1_Acc_Exp")}
    return [float(found[f"Exp{index:03d}"]) for index in range(count)]


def run(args: argparse.Namespace, setting: Setting, folder: Path) -> tuple[list[list[float]], dict[str, float]]:
    """Build, train, estimate the importances and evaluate: the accuracy matrix and the seconds."""
    start = time.perf_counter()
    if args.dataset == "classic":
        benchmark = make_classic(args.data, setting, folder)
    else:
        benchmark = make_benchmark(load_tasks(args.data, setting), DATASETS[args.dataset], args.method == "der++")
    built = time.perf_counter()

    model = torch.nn.Sequential(torch.nn.Flatten(), *make_mlp(setting.hidden))
    make, options = {
        "ewc": (EWC, {"ewc_lambda": args.ewc_lambda, "mode": "online", "decay_factor": 1.0}),
        "der++": (DER, {"mem_size": MEMORY, "batch_size_mem": setting.batch, "alpha": ALPHA, "beta": BETA}),
    }[args.method]
    strategy = make(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=setting.learning_rate),
        criterion=torch.nn.CrossEntropyLoss(),
        **options,
        train_mb_size=setting.batch,
        train_epochs=1,
        eval_mb_size=EVAL_BATCH,
        device="cpu",
        evaluator=make_evaluator(args.dataset),
    )
    strategy.eval(benchmark.streams["test"], num_workers=0)  # row 0 of the accuracy matrix, as the others have it
    matrix = []
    for experience in benchmark.streams["train"]:
        strategy.train(experience, num_workers=0, drop_last=True)
        metrics = strategy.eval(benchmark.streams["test"], num_workers=0)
        matrix.append(experience_accuracies(metrics, setting.tasks))
    end = time.perf_counter()
    seconds = {
        "seconds_total_after_imports": end - start,
        "seconds_build": built - start,
        "seconds_run": end - built,
    }
    return matrix, seconds


def main() -> None:
    """See above."""
    parser = make_parser(__doc__, "factor of the penalty, no 1/2; default 50 * batch")
    parser.add_argument("--dataset", choices=["classic", *sorted(DATASETS)], default="classic")
    parser.add_argument("--method", choices=["ewc", "der++"], default="ewc")
    args = parser.parse_args()
    setting = prepare(args)
    if args.ewc_lambda is None:
        args.ewc_lambda = 50.0 * setting.batch
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        matrix, seconds = run(args, setting, Path(folder))
    print_report(
        args,
        seconds,
        matrix,
        {"avalanche": avalanche.__version__},
        peer="avalanche",
        dataset=args.dataset,
        method=args.method,
    )


if __name__ == "__main__":
    main()
