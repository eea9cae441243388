"""EWC on permuted MNIST as a plain PyTorch loop; prints one JSON line.

Separate EWC in constant memory: the sum of the tasks' quadratic penalties equals, up to a
constant, one penalty with the sum of the Fishers around their Fisher-weighted mean anchor. The
Fisher is the exact diagonal: for a dense layer the mean over examples of (g^2)^T (x^2), with x
the layer's input and g the cotangent of its pre-activation, one example a row.
"""

import time

import torch
import torch.nn.functional as F
from peer_common import (
    EVAL_BATCH,
    Task,
    load_tasks,
    make_mlp,
    make_parser,
    prepare,
    print_report,
)
from torch import Tensor, nn

FISHER_BATCH = 250


class Penalty:
    """strength / 2 * sum F (p - anchor)^2, applied as its gradient."""

    def __init__(self, params: list[Tensor], strength: float) -> None:
        self.params = params
        self.strength = strength
        self.fisher: list[Tensor] = []
        self.anchor: list[Tensor] = []

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add strength * F (p - anchor) to the gradients; nothing before the first update."""
        for param, fisher, anchor in zip(self.params, self.fisher, self.anchor):
            param.grad.addcmul_(fisher, param - anchor, value=self.strength)

    @torch.no_grad()
    def update(self, new: list[Tensor]) -> None:
        """Take in a task's Fisher at the present parameters."""
        if not self.fisher:
            self.fisher = new
            self.anchor = [param.detach().clone() for param in self.params]
            return
        for param, fisher, anchor, extra in zip(self.params, self.fisher, self.anchor, new):
            fisher += extra
            weight = torch.where(fisher > 0, extra / fisher, 1.0)
            anchor.lerp_(param, weight)


@torch.no_grad()
def fisher_diagonal(net: nn.Sequential, x: Tensor, y: Tensor, labels: str) -> list[Tensor]:
    """Mean squared per-example gradient of each parameter, in the order of parameters().

    labels 'observed' takes the given labels; 'expected' the mean over the net's own
    predictive distribution, which needs a cotangent for each class.
    """
    dense = [layer for layer in net if isinstance(layer, nn.Linear)]
    total = [torch.zeros_like(param) for param in net.parameters()]
    for batch_x, batch_y in zip(x.split(FISHER_BATCH), y.split(FISHER_BATCH)):
        inputs = [batch_x]
        for layer in dense[:-1]:
            inputs.append(layer(inputs[-1]).relu_())
        probs = dense[-1](inputs[-1]).softmax(1)
        # Cotangents of the logits [classes or 1, n, classes]; backward is linear in them, so
        # each class's may carry the root of its probability from the start.
        if labels == "expected":
            eye = torch.eye(probs.shape[1])
            cotangent = probs.T.sqrt().unsqueeze(2) * (probs - eye.unsqueeze(1))
        else:
            cotangent = (probs - F.one_hot(batch_y, probs.shape[1])).unsqueeze(0)
        for index in reversed(range(len(dense))):
            squared = cotangent.square().sum(0)
            total[2 * index].addmm_(squared.T, inputs[index].square())
            total[2 * index + 1] += squared.sum(0)
            if index:
                cotangent = (cotangent @ dense[index].weight).mul_(inputs[index] > 0)
    return [value.div_(len(x)) for value in total]


@torch.inference_mode()
def accuracy(net: nn.Module, task: Task) -> float:
    """Fraction of the task's test images that are classified correctly."""
    right = torch.zeros((), dtype=torch.int64)
    for x, y in zip(task.test_x.split(EVAL_BATCH), task.test_y.split(EVAL_BATCH)):
        right += (net(x).argmax(1) == y).sum()
    return right.item() / len(task.test_y)


def shuffled_batches(task: Task, batch: int) -> zip:
    """One epoch's batches: rows shuffled and batched at once, the incomplete one dropped."""
    count = len(task.train_x) // batch
    order = torch.randperm(len(task.train_x))[: count * batch]
    x = task.train_x[order].view(count, batch, -1)
    return zip(x.unbind(), task.train_y[order].view(count, batch).unbind())


def main() -> None:
    """Train, estimate the Fisher and evaluate; time that apart from the data's preparation."""
    start = time.perf_counter()
    parser = make_parser(__doc__, "strength; the penalty has the factor 1/2; default 100")
    parser.set_defaults(ewc_lambda=100.0)
    parser.add_argument("--labels", choices=["expected", "observed"], default="observed")
    parser.add_argument("--compile", action="store_true", help="torch.compile the net")
    parser.add_argument("--adam", choices=["foreach", "fused"], default="fused")
    args = parser.parse_args()
    setting = prepare(args)
    tasks = load_tasks(args.data, setting)
    loaded = time.perf_counter()

    net = make_mlp(setting.hidden)
    params = list(net.parameters())
    optimizer = torch.optim.Adam(params, lr=setting.learning_rate, **{args.adam: True})
    penalty = Penalty(params, args.ewc_lambda)
    model = torch.compile(net) if args.compile else net
    _before = [accuracy(model, task) for task in tasks]  # row 0 of the accuracy matrix
    matrix = []
    for task in tasks:
        for x, y in shuffled_batches(task, setting.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            penalty.add_gradient()
            optimizer.step()
        penalty.update(fisher_diagonal(net, task.train_x, task.train_y, args.labels))
        matrix.append([accuracy(model, other) for other in tasks])
    end = time.perf_counter()

    seconds = {
        "seconds_total_after_imports": end - start,
        "seconds_load": loaded - start,
        "seconds_run": end - loaded,
    }
    extra = {"labels": args.labels, "adam": args.adam, "compile": args.compile}
    print_report(args, seconds, matrix, {}, peer="torch", **extra)


if __name__ == "__main__":
    main()
