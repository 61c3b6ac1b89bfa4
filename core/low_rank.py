"""Low-rank arithmetic on factor pairs, in numpy.

A pair is ``a`` with the rank as its last axis and ``b`` with the rank as its first axis.
Flattened to (m, r) and (r, n) it stands for the update ``a @ b`` of an (m, n) matrix. What
the matrix means for a layer is said in ``plan.py``; here only the product matters. Nothing
forms an (m, n) matrix unless its name says so.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Pair = tuple[Array, Array]


def flatten(pair: Pair) -> tuple[Wide, Wide]:
    """Return the pair as float64 matrices (m, r) and (r, n)."""
    a, b = pair
    left = np.asarray(a, np.float64).reshape(-1, a.shape[-1])
    return left, np.asarray(b, np.float64).reshape(b.shape[0], -1)


def dense_product(pair: Pair) -> Wide:
    """Return the update itself, (m, n) float64."""
    left, right = flatten(pair)
    return left @ right


def mean_of_products(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    """Return the best rank-``rank`` pair for the weighted sum of the products.

    The (m, n) mean is never formed: its column space lies in the stacked left factors and
    its row space in the stacked right ones, so two thin QR factorisations reduce the problem
    to a square one of side ``sum(r_k)``. Sums run in float64. The singular values are shared
    equally between the factors and the sign of each direction is fixed by making the largest
    entry of its left vector positive, so equal input gives equal bits.

    Args:
        pairs: K pairs of one layer; ranks may differ, the other axes agree.
        weights: K weights, usually with sum 1.
        rank: Rank of the result; where the layer allows fewer directions, zeros follow.

    Returns:
        A float32 pair shaped like the given ones, with ``rank`` as the rank axis.

    Source:
        The aggregate of FlexLoRA, https://arxiv.org/abs/2402.11505, computed on the stacked
        factors; the cut is the best one by the theorem of Eckart and Young.
    """
    flat = [flatten(pair) for pair in pairs]
    left = np.concatenate([a for a, _ in flat], axis=1)
    right = np.concatenate([w * b for w, (_, b) in zip(weights, flat, strict=True)], axis=0)
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = min(rank, s.size)
    root = np.sqrt(s[:kept])
    columns = (q_left @ u[:, :kept]) * root
    rows = root[:, None] * (vt[:kept] @ q_right.T)
    largest = np.abs(columns).argmax(axis=0)
    sign = np.where(columns[largest, np.arange(kept)] < 0, -1.0, 1.0)
    a = np.zeros((left.shape[0], rank), np.float32)
    b = np.zeros((rank, right.shape[1]), np.float32)
    a[:, :kept] = columns * sign
    b[:kept] = rows * sign[:, None]
    first_a, first_b = pairs[0]
    return a.reshape(*first_a.shape[:-1], rank), b.reshape(rank, *first_b.shape[1:])


def product_norm(pair: Pair) -> float:
    """Return the Frobenius norm of the product, from the (r, r) Gram matrices.

    Source:
        ||AB||^2 = trace(A'A B B'), which is the sum over the entrywise product of the two
        symmetric Gram matrices.
    """
    left, right = flatten(pair)
    return float(np.sqrt(max(np.sum((left.T @ left) * (right @ right.T)), 0.0)))


def inner_product(first: Pair, second: Pair) -> float:
    """Return the inner product of two products, the sum over their entrywise product."""
    a1, b1 = flatten(first)
    a2, b2 = flatten(second)
    return float(np.sum((a1.T @ a2) * (b1 @ b2.T)))


def distance_to_sum(pair: Pair, pairs: Sequence[Pair], weights: Sequence[float]) -> float:
    """Return ``||sum_k w_k a_k b_k - a b||`` (Frobenius), without forming either matrix.

    Source:
        Expansion of the square into inner products of pairs; the R factor of the stacked
        left sides is used in their place, so that differences near zero keep their digits.
    """
    flat = [flatten(pair), *map(flatten, pairs)]
    signs = [-1.0, *weights]
    left = np.concatenate([a for a, _ in flat], axis=1)
    right = np.concatenate([w * b for w, (_, b) in zip(signs, flat, strict=True)], axis=0)
    _, r_left = np.linalg.qr(left)
    _, r_right = np.linalg.qr(right.T)
    return float(np.linalg.norm(r_left @ r_right.T))
