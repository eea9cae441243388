"""Convolutions and both of their adjoints, place of the kernel by place, in NumPy.

y[b, p, o] = sum over places q and inputs i of x_padded[b, s p + d q, i] k[q, i, o], x with zeros between its places and
at its edges; each of `groups` groups of outputs reads its own group of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Convolution:
    """With channels last: x `[B, *S, I]`, k `[*K, I / groups, O]`, y `[B, *S', O]`."""

    x_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    x_dilation: tuple[int, ...]
    k_dilation: tuple[int, ...]
    groups: int = 1

    def padded_shape(self) -> tuple[int, ...]:
        lengths = zip(self.x_shape[1:-1], self.x_dilation, self.padding, strict=True)
        places = (low + (n - 1) * d + 1 + high for n, d, (low, high) in lengths)
        return (self.x_shape[0], *places, self.x_shape[-1])

    def inside(self) -> tuple[slice, ...]:
        """Where x lies in its padded form."""
        lengths = zip(self.x_shape[1:-1], self.x_dilation, self.padding, strict=True)
        return (slice(None), *(slice(low, low + (n - 1) * d + 1, d) for n, d, (low, _) in lengths), slice(None))

    def y_shape(self) -> tuple[int, ...]:
        sizes = zip(self.padded_shape()[1:-1], self.k_shape[:-2], self.k_dilation, self.strides, strict=True)
        return (self.x_shape[0], *((n - (k - 1) * d - 1) // s + 1 for n, k, d, s in sizes), self.k_shape[-1])

    def terms(self):
        """For each place of the kernel and each group: what of padded x, of k, and of y belong together."""
        i, o = self.k_shape[-2], self.k_shape[-1] // self.groups
        for place in np.ndindex(*self.k_shape[:-2]):
            start = [q * d for q, d in zip(place, self.k_dilation, strict=True)]
            sizes = zip(start, self.y_shape()[1:-1], self.strides, strict=True)
            read = tuple(slice(a, a + (n - 1) * s + 1, s) for a, n, s in sizes)
            for g in range(self.groups):
                outputs = slice(g * o, (g + 1) * o)
                yield (
                    (slice(None), *read, slice(g * i, (g + 1) * i)),
                    (*place, slice(None), outputs),
                    (..., outputs),
                )

    def pad(self, x: np.ndarray) -> np.ndarray:
        padded = np.zeros(self.padded_shape(), x.dtype)
        padded[self.inside()] = x
        return padded

    def output(self, x: np.ndarray, k: np.ndarray) -> np.ndarray:
        padded, y = self.pad(x), np.zeros(self.y_shape(), x.dtype)
        for of_x, of_k, of_y in self.terms():
            y[of_y] += padded[of_x] @ k[of_k]
        return y

    def input(self, y: np.ndarray, k: np.ndarray) -> np.ndarray:
        padded = np.zeros(self.padded_shape(), y.dtype)
        for of_x, of_k, of_y in self.terms():
            padded[of_x] += y[of_y] @ k[of_k].T
        return padded[self.inside()]

    def kernel(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        padded, k = self.pad(x), np.zeros(self.k_shape, x.dtype)
        axes = tuple(range(y.ndim - 1))
        for of_x, of_k, of_y in self.terms():
            k[of_k] += np.tensordot(padded[of_x], y[of_y], (axes, axes))
        return k

    def sine_loss(self, x, k, dx, dk):
        """Of F = sum(sin(y)): y, dF/dx, dF/dk, and the changes of both gradients along (dx, dk)."""
        y, dy = self.output(x, k), self.output(dx, k) + self.output(x, dk)
        c, dc = np.cos(y), -np.sin(y) * dy
        first = self.input(c, k), self.kernel(x, c)
        second = self.input(dc, k) + self.input(c, dk), self.kernel(x, dc) + self.kernel(dx, c)
        return y, first, second
