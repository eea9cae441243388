"""La-MAML: an inner pass over the rows of a batch with learned rates, which are then the rates of the outer step too.

incoming = (x, y), the rows in the order of the inner pass.  meta = (x, y), the rows of the meta-loss.
alpha: a tree like theta, or a number.  loss: as in maml.py; of a pair, the second is the meta-loss.
"""

import numpy as np

from .maml import central_difference, pair_of_losses, scaled, trajectory
from .mlp import tree_add, tree_copy, tree_map, tree_sum, tree_zeros

VARIANTS = ("la_maml", "sync", "c_maml")


def relu(alpha):
    return tree_map(lambda a: np.maximum(a, 0.0), alpha)


def inner_pass(theta, alpha, incoming, loss="cross_entropy"):
    """phi_0 = theta;  phi_{j+1} = phi_j - relu(alpha) * g_j  with  g_j = dL(phi_j; row j)/dphi.

    Returns ([phi_1, ..., phi_n], [g_0, ..., g_{n-1}]).
    """
    phis, grads = trajectory(theta, *incoming, relu(alpha), len(incoming[0]), loss, rows=1)
    return phis[1:], grads


def meta_loss(theta, alpha, incoming, meta, loss="cross_entropy"):
    """Mean over j = 1 ... n of L(phi_j; meta)."""
    _, loss_of = pair_of_losses(loss)
    phis, _ = inner_pass(theta, alpha, incoming, loss)
    return float(np.mean([loss_of(phi, *meta)[0] for phi in phis]))


def exact_gradients(theta, alpha, incoming, meta, loss="cross_entropy", h=1e-6):
    """(d meta_loss / d theta, d meta_loss / d alpha), through the inner pass, by finite differences."""
    return (
        central_difference(lambda t: meta_loss(t, alpha, incoming, meta, loss), theta, h),
        central_difference(lambda a: meta_loss(theta, a, incoming, meta, loss), alpha, h),
    )


def first_order_gradients(theta, alpha, incoming, meta, loss="cross_entropy"):
    """The same two with the inner gradients held constant.  With q_j = dL(phi_j; meta)/dphi:

    of theta:  mean_j q_j.    of alpha:  -[alpha > 0] * mean_j (g_0 + ... + g_{j-1}) * q_j,
    summed over all parameters if alpha is a number.
    """
    _, loss_of = pair_of_losses(loss)
    phis, grads = inner_pass(theta, alpha, incoming, loss)
    of_theta, of_alpha, walked = tree_zeros(theta), tree_zeros(theta), tree_zeros(theta)
    for phi, g in zip(phis, grads):
        walked = tree_add(walked, g)
        _, q = loss_of(phi, *meta)
        of_theta = tree_add(of_theta, q, 1.0 / len(phis))
        of_alpha = tree_add(of_alpha, tree_map(lambda s, q: s * q, walked, q), -1.0 / len(phis))
    if not isinstance(alpha, dict):
        return of_theta, tree_sum(of_alpha) * (alpha > 0)
    return of_theta, tree_map(lambda g, a: g * (a > 0), of_alpha, alpha)


def clip(grads, bound):
    """grads * min(1, bound / norm), the norm over the whole tree; bound None: as they are."""
    norm = np.sqrt(tree_sum(tree_map(np.square, grads)))
    if bound is None or norm <= bound:
        return grads
    return tree_map(lambda g: g * (bound / norm), grads)


def step(theta, alpha, incoming, meta, eta, beta=None, variant="la_maml", exact=False, bound=2.0, loss="cross_entropy"):
    """With g_theta and g_alpha, each clipped to the norm bound:

    'la_maml':  alpha <- alpha - eta * g_alpha,  then  theta <- theta - relu(alpha, the new one) * g_theta.
    'sync':     alpha <- alpha - eta * g_alpha,  and   theta <- theta - beta * g_theta.
    'c_maml':   alpha stays,                           theta <- theta - beta * g_theta.
    Returns (theta, alpha, meta-loss before the step).
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}")
    theta, alpha = tree_copy(theta), tree_copy(alpha)
    before = meta_loss(theta, alpha, incoming, meta, loss)
    of_both = exact_gradients if exact else first_order_gradients
    of_theta, of_alpha = of_both(theta, alpha, incoming, meta, loss)
    if variant != "c_maml":
        alpha = tree_add(alpha, clip(of_alpha, bound), -eta)
    rates = relu(alpha) if variant == "la_maml" else beta
    return tree_add(theta, scaled(rates, clip(of_theta, bound)), -1.0), alpha, before


def run(theta, alpha, batches, eta, **options):
    """A step for each (incoming, meta) of batches; a glance more at a batch is the batch once more.

    Returns ([meta-loss before each step], theta, alpha).
    """
    history = []
    for incoming, meta in batches:
        theta, alpha, before = step(theta, alpha, incoming, meta, eta, **options)
        history.append(before)
    return history, theta, alpha
