"""Low-rank arithmetic on factor pairs, in numpy.

A pair is ``a`` with the rank as its last axis and ``b`` with the rank as its first axis.
Flattened to (m, r) and (r, n) it stands for the update ``a @ b`` of an (m, n) matrix. What
the matrix means for a layer is said in ``plan.py``; here only the product matters. Nothing
forms an (m, n) matrix unless its name says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Directions:
    """A sum of products as its singular value decomposition, without directions that are zero.

    Attributes:
        left: Unit directions (m, r), float64.
        values: Singular values (r,), falling.
        right: Unit directions (r, n).
        shape: Axes of ``a`` without the rank and of ``b`` without the rank.
    """

    left: Wide
    values: Wide
    right: Wide
    shape: tuple[tuple[int, ...], tuple[int, ...]]

    def pair(self, first: int, end: int) -> Pair:
        """Return directions ``first`` up to ``end`` as a float32 pair; zeros follow the last.

        The singular values are shared equally between the factors and the sign of each
        direction is fixed by making the largest entry of its left vector positive, so equal
        input gives equal bits.
        """
        chosen = slice(first, min(end, self.values.size))
        root = np.sqrt(self.values[chosen])
        columns, rows = self.left[:, chosen] * root, root[:, None] * self.right[chosen]
        largest = np.abs(columns).argmax(axis=0)
        sign = np.where(columns[largest, np.arange(root.size)] < 0, -1.0, 1.0)
        a = np.zeros((columns.shape[0], end - first), np.float32)
        b = np.zeros((end - first, rows.shape[1]), np.float32)
        a[:, : root.size] = columns * sign
        b[: root.size] = rows * sign[:, None]
        axes_a, axes_b = self.shape
        return a.reshape(*axes_a, -1), b.reshape(-1, *axes_b)

    def norm(self, first: int = 0) -> float:
        """Return the Frobenius norm of what directions ``first`` and later hold."""
        return float(np.linalg.norm(self.values[first:]))


def directions(pairs: Sequence[Pair], weights: Sequence[float]) -> Directions:
    """Return the directions of the weighted sum of the products.

    The (m, n) sum is never formed: its column space lies in the stacked left factors and its
    row space in the stacked right ones, so two thin QR factorisations reduce the problem to a
    square one of side ``sum(r_k)``. All in float64. Directions whose singular value is zero
    but for rounding are left out, so the stack of equal products has their rank.

    Args:
        pairs: K pairs of one layer; ranks may differ, the other axes agree.
        weights: K weights, usually with sum 1.
    """
    flat = [flatten(pair) for pair in pairs]
    left = np.concatenate([a for a, _ in flat], axis=1)
    right = np.concatenate([w * b for w, (_, b) in zip(weights, flat, strict=True)], axis=0)
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # As numpy.linalg.matrix_rank; the scale is that of the stacks, whose products may cancel.
    scale = np.linalg.norm(r_left) * np.linalg.norm(r_right)
    rank = int(np.count_nonzero(s > max(left.shape) * np.finfo(np.float64).eps * scale))
    first_a, first_b = pairs[0]
    return Directions(
        q_left @ u[:, :rank],
        s[:rank],
        vt[:rank] @ q_right.T,
        (first_a.shape[:-1], first_b.shape[1:]),
    )


def mean_of_products(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    """Return the best rank-``rank`` pair for the weighted sum of the products.

    Args:
        pairs: K pairs of one layer; ranks may differ, the other axes agree.
        weights: K weights, usually with sum 1.
        rank: Rank of the result; where the sum has fewer directions, zeros follow.

    Returns:
        A float32 pair shaped like the given ones, with ``rank`` as the rank axis.

    Source:
        The aggregate of FlexLoRA, https://arxiv.org/abs/2402.11505, computed on the stacked
        factors; the cut is the best one by the theorem of Eckart and Young.
    """
    return directions(pairs, weights).pair(0, rank)


def widen(pair: Pair, rank: int) -> Pair:
    """Return the same product with zeros behind, up to ``rank``."""
    a, b = pair
    more = rank - a.shape[-1]
    return (
        np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)]),
        np.pad(b, [(0, more)] + [(0, 0)] * (b.ndim - 1)),
    )


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


def product_gram(pairs: Sequence[Pair]) -> Wide:
    """Return the inner products of all products with each other, (K, K) float64.

    The factors are stacked once, so that two matrix products hold all of ``a_i' a_j`` and
    ``b_i b_j'``; the sum over each block of their entrywise product is one inner product.
    """
    flat = [flatten(pair) for pair in pairs]
    left = np.concatenate([a for a, _ in flat], axis=1)
    right = np.concatenate([b for _, b in flat], axis=0)
    starts = np.cumsum([0, *(a.shape[1] for a, _ in flat[:-1])])
    entries = (left.T @ left) * (right @ right.T)
    return np.add.reduceat(np.add.reduceat(entries, starts, axis=0), starts, axis=1)


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
