"""Learning curves: a grid of them is fitted to the losses of tasks, and weighted by how well each fits (ours).

    (1)  L(x) = E + C g(x),   g(x) = exp(-k x)  or  (1 + x / c)^-e              a curve; x in fair shares
    (2)  E = phi l,   C = max(0, sum_t w_t (y_t - E) g_t / sum_t w_t g_t^2)     fitted to y_t, for each phi and g
         w_t = d_t / (m_t + y0)^2
    (3)  P(L) ~ P(phi) ( sum_t w_t (y_t - L(x_t))^2 / W + r0^2 )^(-W / 2)       how well each fits,   W = sum_t d_t

A loss y_t counts as d_t losses, and its error relative to m_t. (3) is the likelihood of a curve whose errors, relative
to the losses, have an unknown size, but not below r0. What may be expected of a task is the mean over the curves, with
all that is not known about it: flat losses may be those of a slow task or of one that is done, and tokens tell.

A fair share of tokens is the budget / the number of tasks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The grid of (1) and (2): k in 1 / fair share, the pairs (c, e), and phi.
SPEEDS = torch.logspace(-1, math.log10(60), 14, dtype=torch.float64)
POWERS = torch.tensor([[c, e] for c in (0.03, 0.1, 0.3, 1.0) for e in (0.3, 0.7, 1.5)], dtype=torch.float64)
ASYMPTOTES = torch.tensor([0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 1.0], dtype=torch.float64)
# y0 in nats, and r0.
LOSS_OFFSET, SMALLEST_ERROR = 0.05, 0.03


def asymptote_prior(k: float) -> Tensor:
    """P(phi): of the density k (1 - phi)^(k - 1), and a tenth for 1, a task in which nothing is left to learn.

    Each asymptote of the grid stands for what is nearer to it than to any other: (A,) float64.
    """
    middles = (ASYMPTOTES[1:] + ASYMPTOTES[:-1]) / 2
    above = 1 - torch.cat([ASYMPTOTES[:1], middles, ASYMPTOTES[-1:]])
    prior = 0.9 * (above[:-1] ** k - above[1:] ** k)
    prior[-1] += 0.1
    return prior


class Curves(NamedTuple):
    """The curves of n tasks, of all asymptotes (A) and shapes (S) of the grid; float64."""

    E: Tensor  # (A, 1, n), nats
    C: Tensor  # (A, S, n), nats
    P: Tensor  # (A, S, n), sums to 1 for each task

    def mean(
        self,
        x: Tensor,  # (..., n) fair shares
    ) -> Tensor:
        """The expected losses at x: (..., n) nats."""
        E, C = self.averaged()
        return E + torch.einsum("sn,s...n->...n", C, shapes(x)[0])

    def averaged(self) -> tuple[Tensor, Tensor]:
        """The expected E, (n,); and C of each shape, times its probability, (S, n)."""
        return (self.P * self.E).sum((0, 1)), (self.P * self.C).sum(0)

    def at(
        self,
        x: Tensor,  # (n,) fair shares
    ) -> Tensor:
        """The loss of every curve at x: (A, S, n) nats."""
        return self.E + self.C * shapes(x)[0]

    def draw(self, generator: torch.Generator) -> Curves:
        """Curves of which one is certain for each task, drawn by its probability."""
        _, num_shapes, num_tasks = self.P.shape
        drawn = torch.multinomial(self.P.flatten(0, 1).T, 1, generator=generator)[:, 0]
        P = torch.zeros_like(self.P)
        P[drawn // num_shapes, drawn % num_shapes, torch.arange(num_tasks)] = 1
        return Curves(self.E, self.C, P)


def fit(
    x: Tensor,  # (T, n) float64, fair shares
    y: Tensor,  # (T, n) float64, nats per supervised token
    d: Tensor,  # (T, n) float64, >= 0; 0 for a loss that is missing
    m: Tensor,  # (T, n) float64, nats: the size of the losses, about y
    level: Tensor,  # (n,) float64, nats: l, the lowest loss so far
    prior: Tensor,  # (A,) float64: P(phi)
) -> Curves:
    """Fits every curve of the grid to the losses of n tasks."""
    # (2): E = phi l, w_t = d_t / (m_t + y0)^2, C = max(0, sum_t w_t (y_t - E) g_t / sum_t w_t g_t^2)
    E = ASYMPTOTES[:, None, None] * level
    w, g = d / (m + LOSS_OFFSET).square(), shapes(x)[0]
    w_zg = (w * y * g).sum(1) - E * (w * g).sum(1)  # z = y - E
    w_gg = (w * g * g).sum(1)
    C = (w_zg / w_gg.clamp_min(torch.finfo(y.dtype).tiny)).clamp_min(0)
    # (3): P(L) ~ P(phi) ( sum_t w_t (y_t - L(x_t))^2 / W + r0^2 )^(-W / 2)
    w_zz = (w * y * y).sum(0) - 2 * E * (w * y).sum(0) + E**2 * w.sum(0)
    squares = (w_zz - 2 * C * w_zg + C**2 * w_gg).clamp_min(0) / d.sum(0)
    log_P = -d.sum(0) / 2 * torch.log(squares + SMALLEST_ERROR**2) + prior.log()[:, None, None]
    return Curves(E, C, torch.softmax(log_P.flatten(0, 1), 0).reshape(log_P.shape))


def shapes(
    x: Tensor,  # (..., n) float64, fair shares
) -> tuple[Tensor, Tensor]:
    """g of (1) for every shape of the grid, and -dg/dx / g: (S, ..., n) each."""
    k, c, e = (each.reshape(-1, *[1] * x.dim()) for each in (SPEEDS, *POWERS.T))
    g = torch.cat([torch.exp(-k * x), (1 + x / c) ** -e])
    return g, torch.cat([k.expand(-1, *x.shape), e / (c + x)])
