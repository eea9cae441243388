"""EWC on permuted MNIST with Avalanche, the way its users write it; prints one JSON line.

Avalanche's Fisher differs from the per-example one: it squares each training batch's mean
gradient, which makes it about `batch` times smaller, and its penalty has no factor 1/2. So the
counterpart of a strength s on the per-example Fisher is near ewc_lambda = s * batch / 2. Its
online mode keeps the sum of the Fishers and the latest parameters as the anchor.
Avalanche fetches examples one by one, so the data is cut into rows beforehand (--dataset rows);
--dataset tensors is the usual TensorDataset.
"""

import time
import warnings

import torch

# torchvision's own operators may be missing in this build; avalanche needs none of them.
_torchvision_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _torchvision_library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import avalanche  # noqa: E402
from avalanche.benchmarks import CLScenario, benchmark_from_datasets  # noqa: E402
from avalanche.benchmarks.utils import make_avalanche_dataset  # noqa: E402
from avalanche.evaluation.metrics import accuracy_metrics  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin  # noqa: E402
from avalanche.training.supervised import EWC  # noqa: E402
from peer_common import (  # noqa: E402
    EVAL_BATCH,
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
        self.rows = list(zip(x.unbind(), y.tolist()))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.rows[index]


DATASETS = {"rows": RowDataset, "tensors": TensorDataset}


def make_benchmark(tasks: list[Task], dataset: type[Dataset]) -> CLScenario:
    """Streams of in-memory data, without transforms and without task labels."""
    return benchmark_from_datasets(
        train=[make_avalanche_dataset(dataset(t.train_x, t.train_y)) for t in tasks],
        test=[make_avalanche_dataset(dataset(t.test_x, t.test_y)) for t in tasks],
    )


def experience_accuracies(metrics: dict[str, float], count: int) -> list[float]:
    """The last accuracy of every test experience, in order."""
    by_suffix = {name.rsplit("/", 1)[-1]: value for name, value in metrics.items()}
    return [float(by_suffix[f"Exp{index:03d}"]) for index in range(count)]


def main() -> None:
    """Train, estimate the importances and evaluate; time that apart from the building."""
    start = time.perf_counter()
    parser = make_parser(__doc__, "factor of the penalty, no 1/2; default 50 * batch")
    parser.add_argument("--dataset", choices=sorted(DATASETS), default="rows")
    args = parser.parse_args()
    setting = prepare(args)
    if args.ewc_lambda is None:
        args.ewc_lambda = 50.0 * setting.batch
    tasks = load_tasks(args.data, setting)
    loaded = time.perf_counter()
    benchmark = make_benchmark(tasks, DATASETS[args.dataset])
    built = time.perf_counter()

    model = make_mlp(setting.hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no loggers: as wanted
        evaluator = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    strategy = EWC(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=setting.learning_rate),
        criterion=torch.nn.CrossEntropyLoss(),
        ewc_lambda=args.ewc_lambda,
        mode="online",
        decay_factor=1.0,
        train_mb_size=setting.batch,
        train_epochs=1,
        eval_mb_size=EVAL_BATCH,
        device="cpu",
        evaluator=evaluator,
    )
    strategy.eval(benchmark.streams["test"], num_workers=0)  # row 0 of the accuracy matrix, as the others have it
    matrix = []
    for experience in benchmark.streams["train"]:
        strategy.train(experience, num_workers=0, drop_last=True)
        metrics = strategy.eval(benchmark.streams["test"], num_workers=0)
        matrix.append(experience_accuracies(metrics, len(tasks)))
    end = time.perf_counter()

    seconds = {
        "seconds_total_after_imports": end - start,
        "seconds_load": loaded - start,
        "seconds_benchmark": built - loaded,
        "seconds_run": end - built,
    }
    versions = {"avalanche": avalanche.__version__}
    print_report(args, seconds, matrix, versions, peer="avalanche", dataset=args.dataset)


if __name__ == "__main__":
    main()
