"""Slow float64 references of the scores, written from the formulas of the papers with plain loops.

x[t][j] are inputs, a[t][i] outputs with bias, w[i][j] weights; O, I, T as everywhere. ``ranks`` says why a constant
factor is free: a score only ranks.
"""

from __future__ import annotations

import math

Matrix = list[list[float]]


def magnitude(w: Matrix) -> Matrix:
    return [[abs(value) for value in row] for row in w]


def input_norm(x: Matrix, j: int) -> float:
    """||X_j||_2 over all tokens."""
    return math.sqrt(sum(row[j] ** 2 for row in x))


def wanda(w: Matrix, x: Matrix) -> Matrix:
    return [[abs(value) * input_norm(x, j) for j, value in enumerate(row)] for row in w]


def relative(w: Matrix) -> Matrix:
    """|W_ij| / sum of its column + |W_ij| / sum of its row; a sum of zero contributes nothing."""
    rows = [sum(abs(value) for value in row) for row in w]
    columns = [sum(abs(row[j]) for row in w) for j in range(len(w[0]))]

    def share(value: float, total: float) -> float:
        return abs(value) / total if total else 0.0

    return [[share(v, columns[j]) + share(v, rows[i]) for j, v in enumerate(row)] for i, row in enumerate(w)]


def ria(w: Matrix, x: Matrix, alpha: float) -> Matrix:
    return [[value * input_norm(x, j) ** alpha for j, value in enumerate(row)] for row in relative(w)]


def normalised_squares(x: Matrix, norm: str) -> Matrix:
    """v_tj: x^2 raw, or over ||x_t||^2 (share), mean x^2 (rms), lam + ||x_t||^2 (token), max x^2 / (1 - 1e-3) (max)."""
    squares = [[value**2 for value in row] for row in x]
    flat = [value for row in squares for value in row]
    if norm == "raw":
        return squares
    if norm == "rms":
        return [[value / (sum(flat) / len(flat)) for value in row] for row in squares]
    if norm == "max":
        return [[(1 - 1e-3) * value / max(flat) for value in row] for row in squares]
    lam = 0.01 * sum(flat) / len(squares) if norm == "token" else 0.0
    return [[value / (lam + sum(row)) for value in row] for row in squares]


def variance_factors(x: Matrix, norm: str, form: str) -> list[float]:
    """norms: E[v]^(1/2) (1 + Var[v] / E[v]^2)^(1/8); poly: h + Var[v], h = E[v]^2 + E[v] + 1 (Equations 1-3);
    series: E[1 / (1 - min(v, 1 - 1e-2))] (Equation 7)."""
    v = normalised_squares(x, norm)
    factors = []
    for j in range(len(x[0])):
        column = [row[j] for row in v]
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        if form == "norms":
            factors.append(mean**0.5 * (1 + variance / mean**2) ** 0.125)
        elif form == "poly":
            factors.append(mean**2 + mean + 1 + variance)
        else:
            factors.append(sum(1 / (1 - min(value, 1 - 1e-2)) for value in column) / len(column))
    return factors


def varp(w: Matrix, x: Matrix, norm: str, form: str, wpow: int = 1) -> Matrix:
    f = variance_factors(x, norm, form)
    return [[abs(value) ** wpow * f[j] for j, value in enumerate(row)] for row in w]


def ria_varp(w: Matrix, x: Matrix, norm: str, form: str, alpha: float) -> Matrix:
    f = variance_factors(x, norm, form)
    return [[value * f[j] ** alpha for j, value in enumerate(row)] for row in relative(w)]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def cosine_loss(w: Matrix, x: Matrix, a: Matrix, mode: str) -> Matrix:
    """L_ij, linear in |W_ij|: CosP without the paper's |W_ij| ||X_j||."""
    return [[_loss(w[i][j], x, a, mode, i, j) for j in range(len(w[0]))] for i in range(len(w))]


def _loss(w_ij: float, x: Matrix, a: Matrix, mode: str, i: int, j: int) -> float:
    total = 0.0
    for x_t, a_t in zip(x, a, strict=True):
        size = sum(value**2 for value in a_t)
        if mode == "paper":
            total += a_t[i] * w_ij * x_t[j] / size
        elif mode == "paper_abs":
            total += abs(a_t[i] * w_ij * x_t[j]) / size
        elif mode == "exact2":
            total += (size - a_t[i] ** 2) * (w_ij * x_t[j]) ** 2 / size**2
        elif mode == "tokwanda":
            total += (w_ij * x_t[j]) ** 2 / size
        else:  # the change itself: the output without this one weight
            without = [value - (w_ij * x_t[j] if row == i else 0.0) for row, value in enumerate(a_t)]
            total += 1 - cosine(a_t, without)
    mean = total / len(x)
    return abs(mean) if mode in ("paper", "paper_abs") else math.sqrt(max(mean, 0.0))


def cosp(w: Matrix, x: Matrix, a: Matrix, mode: str) -> Matrix:
    """S_cos: the paper's modes multiply the loss by |W_ij| ||X_j||_2, the others are the loss."""
    loss = cosine_loss(w, x, a, mode)
    if mode not in ("paper", "paper_abs"):
        return loss
    return [[loss[i][j] * abs(value) * input_norm(x, j) for j, value in enumerate(row)] for i, row in enumerate(w)]


def ace(w: Matrix, x: Matrix, a: Matrix, mode: str, combine: str, norm: str, form: str, relative_too: bool) -> Matrix:
    """product: S_cos S_var; replace: |W_ij| f_j L_ij; relative: RIA's weight for one |W_ij|."""
    cos = cosine_loss(w, x, a, mode) if combine == "replace" else cosp(w, x, a, mode)
    var = varp(w, x, norm, form)
    ratio = relative(w) if relative_too else magnitude(w)
    return [
        [c * v * r / abs(weight) for c, v, r, weight in zip(*rows, strict=True)]
        for rows in zip(cos, var, ratio, w, strict=True)
    ]
