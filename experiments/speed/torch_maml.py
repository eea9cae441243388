"""Second-order MAML on sinusoids as a plain PyTorch loop; prints one JSON line.

Every iteration draws fresh tasks y = A sin(x - phase), takes one step of SGD on each task's support set, and one step
of Adam down the gradient, through those steps, of the mean squared error that is left on the query sets. Four ways:

    func      `torch.func`: a task's loss after its step by `functional_call` and `grad`, all tasks' by `vmap`
    batched   no transformations: a copy of the weights for each task, products by `baddbmm`, `autograd.grad` twice
    tasks     task after task with clones of the parameters
    learn2learn    the same by that library's MAML: a clone of the module for each task

With --compile, the outer gradient of "func" is taken by `torch.func` too, and all of it is one compiled function.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch._dynamo  # an optimizer's first use would import it, in timed code
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

TASKS, SHOTS, QUERIES, WIDTH = 25, 10, 10, 40
INNER_RATE, OUTER_RATE = 0.01, 1e-3

Tasks = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_tasks() -> Tasks:
    """Support x and y, query x and y, each [tasks, rows, 1]."""
    amplitude = torch.empty(TASKS, 1, 1).uniform_(0.1, 5.0)
    phase = torch.empty(TASKS, 1, 1).uniform_(0.0, math.pi)
    x = torch.empty(TASKS, SHOTS + QUERIES, 1).uniform_(-5.0, 5.0)
    y = amplitude * torch.sin(x - phase)
    return x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:]


def func_loss(net: nn.Module) -> Callable[[list[Tensor], Tasks], Tensor]:
    """The mean of a function of one task over all of them."""
    names = [name for name, _ in net.named_parameters()]

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(net, params, (x,)), y)

    def after_step(params: dict[str, Tensor], x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        gradient = grad(loss)(params, x, y)
        return loss({name: params[name] - INNER_RATE * gradient[name] for name in names}, query_x, query_y)

    every = vmap(after_step, in_dims=(None, 0, 0, 0, 0))
    return lambda params, tasks: every(dict(zip(names, params)), *tasks).mean()


def batched_loss(net: nn.Module) -> Callable[[list[Tensor], Tasks], Tensor]:
    """The gradient of the sum of all tasks' losses by each task's copy of the weights is that task's own gradient."""

    def forward(params: list[Tensor], x: Tensor) -> Tensor:
        for i in range(0, len(params), 2):
            weight, bias = params[i], params[i + 1]
            x = torch.baddbmm(bias.unsqueeze(1), x.relu() if i else x, weight.transpose(1, 2))
        return x

    def losses(params: list[Tensor], tasks: Tasks) -> Tensor:
        x, y, query_x, query_y = tasks
        copies = [param.expand(TASKS, *param.shape) for param in params]
        support = F.mse_loss(forward(copies, x), y, reduction="sum") / SHOTS
        gradients = torch.autograd.grad(support, copies, create_graph=True)
        adapted = [copy.sub(gradient, alpha=INNER_RATE) for copy, gradient in zip(copies, gradients)]
        return F.mse_loss(forward(adapted, query_x), query_y)

    return losses


def tasks_loss(net: nn.Module) -> Callable[[list[Tensor], Tasks], Tensor]:
    """A graph for each task, from clones of the parameters on."""

    def loss(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        for i in range(0, len(params), 2):
            x = F.linear(x.relu() if i else x, params[i], params[i + 1])
        return F.mse_loss(x, y)

    def losses(params: list[Tensor], tasks: Tasks) -> Tensor:
        total = torch.zeros(())
        for x, y, query_x, query_y in zip(*tasks):
            clones = [param.clone() for param in params]
            gradients = torch.autograd.grad(loss(clones, x, y), clones, create_graph=True)
            adapted = [clone - INNER_RATE * gradient for clone, gradient in zip(clones, gradients)]
            total = total + loss(adapted, query_x, query_y)
        return total / TASKS

    return losses


def learn2learn_loss(net: nn.Module) -> Callable[[list[Tensor], Tasks], Tensor]:
    """Its own loop: `clone`, `adapt`, the loss of the adapted clone."""
    from learn2learn.algorithms.maml import MAML

    learner = MAML(net, lr=INNER_RATE)

    def losses(params: list[Tensor], tasks: Tasks) -> Tensor:
        total = torch.zeros(())
        for x, y, query_x, query_y in zip(*tasks):
            clone = learner.clone()
            clone.adapt(F.mse_loss(clone(x), y))
            total = total + F.mse_loss(clone(query_x), query_y)
        return total / TASKS

    return losses


LOSSES = {"func": func_loss, "batched": batched_loss, "tasks": tasks_loss, "learn2learn": learn2learn_loss}


def main() -> None:
    """Warms up, then times rounds of iterations, the drawing of tasks included."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=sorted(LOSSES), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--compile", action="store_true", help='for the way "func" alone')
    parser.add_argument("--adam", choices=["foreach", "fused"], default="fused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up", type=int, default=100, help="iterations")
    parser.add_argument("--iterations", type=int, default=300, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.compile and args.way != "func":
        parser.error("--compile is for --way func")
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    torch.manual_seed(args.seed)

    hidden = [nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(WIDTH, 1))
    params = list(net.parameters())
    optimizer = torch.optim.Adam(params, lr=OUTER_RATE, **{args.adam: True})
    loss = LOSSES[args.way](net)
    compiled = torch.compile(grad_and_value(loss)) if args.compile else None

    def gradient() -> Tensor:
        """Into the parameters' `grad`; the loss."""
        if compiled is None:
            optimizer.zero_grad()
            value = loss(params, draw_tasks())
            value.backward()
            return value.detach()
        gradients, value = compiled(params, draw_tasks())
        for param, found in zip(params, gradients):
            param.grad = found
        return value

    def iterations(n: int) -> float:
        total = torch.zeros(())
        for _ in range(n):
            total += gradient()
            optimizer.step()
        return total.item() / n

    first = iterations(args.warm_up)
    seconds, last = [], first
    for _ in range(args.rounds):
        start = time.perf_counter()
        last = iterations(args.iterations)
        seconds.append((time.perf_counter() - start) / args.iterations)
    report = {
        "peer": "torch",
        "way": args.way,
        "compile": args.compile,
        "adam": args.adam,
        "threads": args.threads,
        "seed": args.seed,
        "seconds_iteration": statistics.median(seconds),
        "seconds_rounds": seconds,
        "iterations": args.warm_up + args.rounds * args.iterations,
        "loss_first": first,
        "loss_last": last,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
