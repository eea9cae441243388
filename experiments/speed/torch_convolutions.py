"""One update of convolutional networks in plain PyTorch: milliseconds, as JSON. Run by `convolutions.py`."""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, n_in, n_out, stride, norm):
        super().__init__()
        self.norm_0, self.norm_1 = norm(n_in), norm(n_out)
        self.conv_0 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.conv_1 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.stride, self.more = stride, n_out - n_in

    def forward(self, x):
        h = self.conv_1(F.relu(self.norm_1(self.conv_0(F.relu(self.norm_0(x))))))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.more)) + h


def resnet26(norm):
    make = (lambda n: nn.GroupNorm(8, n)) if norm == "group" else nn.BatchNorm2d
    layers, width = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
    for wider, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(4):
            layers.append(Block(width, wider, stride if i == 0 else 1, make))
            width = wider
    return nn.Sequential(*layers, make(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def cnn():
    conv = lambda a, b: [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # noqa: E731
    dense = [nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*conv(1, 16), *conv(16, 32), *dense)


NETS = {
    "resnet26, group norm": (lambda: resnet26("group"), (3, 32, 32)),
    "resnet26, batch norm": (lambda: resnet26("batch"), (3, 32, 32)),
    "cnn": (cnn, (1, 28, 28)),
}


def main() -> None:
    name, batch, updates, threads = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    make, shape = NETS[name]
    net = make()
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    x, y = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8), torch.arange(batch) % 10

    def update():
        optimiser.zero_grad()
        F.cross_entropy(net(x.float() / 255), y).backward()
        optimiser.step()

    for _ in range(3):
        update()
    start = time.perf_counter()
    for _ in range(updates):
        update()
    print(json.dumps({"ms": 1e3 * (time.perf_counter() - start) / updates}))


main()
