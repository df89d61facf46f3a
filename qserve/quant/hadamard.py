"""Orthonormal Hadamard matrices of every order that Sylvester's and Paley's constructions reach.

Sources: Sylvester (1867), Kronecker products; Paley (1933), the quadratic character of a finite
field of q elements: order q + 1 where q = 3 modulo 4, order 2 (q + 1) where q = 1 modulo 4.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

_OF_ORDER_2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
_FOR_ZEROS = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
"""What replaces the zeros of a symmetric conference matrix; the other replaces its +-1."""


class HadamardError(ValueError):
    """No construction known here gives a Hadamard matrix of this order."""


def hadamard(order: int) -> Tensor:
    """The orthonormal matrix float64 [order, order], entries +-1 / sqrt(order)."""
    signs = _signs(order)
    if signs is None:
        raise HadamardError(f"no Hadamard matrix of order {order} is constructed here")
    return signs / math.sqrt(order)


@lru_cache(maxsize=64)
def _signs(order: int) -> Tensor | None:
    """A matrix of +-1 with orthogonal rows, or None."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return _OF_ORDER_2
    if order < 1 or order % 4:
        return None
    paley = _paley(order)
    return _kronecker(order) if paley is None else paley


def _kronecker(order: int) -> Tensor | None:
    for factor in range(2, math.isqrt(order) + 1):
        if order % factor:
            continue
        first, second = _signs(factor), _signs(order // factor)
        if first is not None and second is not None:
            return torch.kron(first, second)
    return None


def _paley(order: int) -> Tensor | None:
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        core = _conference(order - 1, skew=True)
        return core + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if (half - 1) % 4 == 1 and _prime_power(half - 1):
        core, identity = _conference(half - 1, skew=False), torch.eye(half, dtype=torch.float64)
        return torch.kron(core, _OF_ORDER_2) + torch.kron(identity, _FOR_ZEROS)
    return None


def _conference(q: int, skew: bool) -> Tensor:
    """[q + 1, q + 1]: zero diagonal, +-1 elsewhere, C @ C.T = q; skew or symmetric."""
    border = torch.ones(q, dtype=torch.float64)
    top = torch.cat((torch.zeros(1, dtype=torch.float64), border))
    left = -border if skew else border
    return torch.cat((top[None], torch.cat((left[:, None], _characters(q)), dim=1)))


def _characters(q: int) -> Tensor:
    """[q, q]: 1 where the difference of two field elements is a square, -1 where not, 0 if equal."""
    prime, degree = _prime_power_parts(q)
    elements = torch.cartesian_prod(*[torch.arange(prime)] * degree).reshape(q, degree)
    weights = prime ** torch.arange(degree - 1, -1, -1)
    table = torch.full((q,), -1.0, dtype=torch.float64)
    table[_squares(elements, prime) @ weights] = 1.0
    table[0] = 0.0
    differences = (elements[:, None] - elements) % prime
    return table[differences @ weights]


def _squares(elements: Tensor, prime: int) -> Tensor:
    """All squares of a field of q elements, whose polynomials over the prime are `elements` [q, k].

    Only modulo an irreducible polynomial do the q - 1 nonzero elements have (q - 1) / 2 squares.
    """
    q, degree = elements.shape
    for tail in itertools.product(range(prime), repeat=degree):
        squares = _square_modulo(elements, tail, prime)
        distinct = torch.unique(squares[1:], dim=0)
        if len(distinct) == (q - 1) // 2 and bool(distinct.any(dim=1).all()):
            return squares
    raise AssertionError(f"no irreducible polynomial of degree {degree} over {prime}")


def _square_modulo(elements: Tensor, tail: tuple[int, ...], prime: int) -> Tensor:
    """Squares [q, k] modulo x^k - tail(x), coefficients from the highest power down."""
    degree = elements.shape[1]
    product = torch.zeros(len(elements), 2 * degree - 1, dtype=torch.int64)
    for power in range(degree):
        product[:, power : power + degree] += elements[:, power, None] * elements
    for power in range(degree - 1):
        product[:, power + 1 : power + 1 + degree] += product[:, power, None] * torch.tensor(tail)
        product %= prime
    return product[:, degree - 1 :] % prime


def _prime_power(q: int) -> bool:
    prime, degree = _prime_power_parts(q)
    return bool(prime**degree == q)


def _prime_power_parts(q: int) -> tuple[int, int]:
    """The smallest prime factor of q, and how often it divides."""
    prime = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    degree = 1
    while q % prime ** (degree + 1) == 0:
        degree += 1
    return prime, degree
