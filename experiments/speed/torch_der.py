"""DER++ on permuted MNIST as a plain PyTorch loop; prints one JSON line.

The memory lies in preallocated tensors; a batch goes into the reservoir by one indexed write, and both draws go through
the net in one forward pass with the rows that come.
"""

import time

import torch
import torch.nn.functional as F
from peer_common import ALPHA, BETA, CLASSES, MEMORY, PIXELS, load_tasks, make_mlp, make_parser, prepare, print_report
from torch import Tensor
from torch_loop import accuracy, shuffled_batches


class Reservoir:
    """A uniform sample of all rows seen, with the outputs they got."""

    def __init__(self, capacity: int) -> None:
        self.x = torch.zeros(capacity, PIXELS)
        self.y = torch.zeros(capacity, dtype=torch.int64)
        self.outputs = torch.zeros(capacity, CLASSES)
        self.capacity = capacity
        self.seen = 0

    def add(self, x: Tensor, y: Tensor, outputs: Tensor) -> None:
        """The i-th row ever seen goes to slot i, or to a slot drawn from 0..i if that exists."""
        number = torch.arange(self.seen, self.seen + len(x))
        slot = number if self.seen + len(x) <= self.capacity else (torch.rand(len(x)) * (number + 1)).long()
        keep = slot < self.capacity
        slot = slot[keep]
        self.x[slot], self.y[slot], self.outputs[slot] = x[keep], y[keep], outputs[keep]
        self.seen += len(x)

    def draw(self, size: int) -> Tensor:
        """Indices of different rows."""
        return torch.randperm(min(self.seen, self.capacity))[:size]


def main() -> None:
    """Train and evaluate; time that apart from the data's preparation."""
    start = time.perf_counter()
    args = make_parser(__doc__, "not used").parse_args()
    setting = prepare(args)
    tasks = load_tasks(args.data, setting)
    loaded = time.perf_counter()

    net = make_mlp(setting.hidden)
    optimizer = torch.optim.Adam(net.parameters(), lr=setting.learning_rate, fused=True)
    memory = Reservoir(MEMORY)
    _before = [accuracy(net, task) for task in tasks]  # row 0 of the accuracy matrix
    matrix = []
    for task in tasks:
        for x, y in shuffled_batches(task, setting.batch):
            optimizer.zero_grad()
            n = len(x)
            if memory.seen:
                first, second = memory.draw(n), memory.draw(n)
                outputs = net(torch.cat((x, memory.x[first], memory.x[second])))
                m = n + len(first)
                loss = (
                    F.cross_entropy(outputs[:n], y)
                    + ALPHA * F.mse_loss(outputs[n:m], memory.outputs[first])
                    + BETA * F.cross_entropy(outputs[m:], memory.y[second])
                )
            else:
                outputs = net(x)
                loss = F.cross_entropy(outputs, y)
            loss.backward()
            optimizer.step()
            memory.add(x, y, outputs[:n].detach())
        matrix.append([accuracy(net, other) for other in tasks])
    end = time.perf_counter()

    seconds = {
        "seconds_total_after_imports": end - start,
        "seconds_load": loaded - start,
        "seconds_run": end - loaded,
    }
    print_report(args, seconds, matrix, {}, peer="torch", method="der++")


if __name__ == "__main__":
    main()
