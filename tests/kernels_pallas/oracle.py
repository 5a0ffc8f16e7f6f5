"""What grouped_matmul and grouped_ffn must give, in float64 NumPy: one group after the other, gradients by hand."""

from typing import NamedTuple

import numpy as np

from kernels_pallas.grouped_matmul.ffn import Weights


class Checked(NamedTuple):
    """An expected array, and where the contract specifies it (None: everywhere)."""

    value: np.ndarray
    where: np.ndarray | None = None


def error(actual, expected):
    """Norm of the difference over the norm of what is expected (or of 1 where that is zero)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1.0)


def check(name, actual, expected, tolerance):
    """`actual` is close where it is specified, and exactly zero where no row adds anything."""
    actual, (value, where) = np.asarray(actual), expected
    assert actual.shape == value.shape, name
    if where is not None:
        actual, value = actual[where], value[where]
    assert error(actual, value) < tolerance, name
    # Sums of products of random numbers are not zero: what is zero here was never touched.
    assert not np.any(actual[value == 0]), name


def columns(extent, size):
    """An extent in whole blocks of 64 columns, at most `size`."""
    return min(size, 64 * int(np.ceil(extent / 64)))


def spans(sizes, extents, experts, rows, size):
    """(expert, its rows, its columns) of every group."""
    ends = np.minimum(np.cumsum(sizes), rows)
    extents = [size] * len(sizes) if extents is None else extents
    for g, (start, end) in enumerate(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)):
        yield g * experts // len(sizes), slice(start, end), slice(columns(int(extents[g]), size))


def matmul(lhs, rhs, sizes, dy, *, transpose_rhs=False, extents=None, axis="n"):
    """(out, dlhs, drhs) as `Checked`. Tail rows and ignored columns of the inputs are never read."""
    lhs, rhs, dy = (np.asarray(a, np.float64) for a in (lhs, rhs, dy))
    w = np.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    out, dlhs, dw = np.zeros(dy.shape), np.zeros(lhs.shape), np.zeros(w.shape)
    in_out, in_dlhs = np.zeros(dy.shape, bool), np.zeros(lhs.shape, bool)
    every = slice(None)
    for e, rows, some in spans(sizes, extents, len(rhs), len(lhs), w.shape[2 if axis == "n" else 1]):
        k, n = (every, some) if axis == "n" else (some, every)
        out[rows, n] = lhs[rows, k] @ w[e, k, n]
        dlhs[rows, k] = dy[rows, n] @ w[e, k, n].T
        dw[e, k, n] += lhs[rows, k].T @ dy[rows, n]
        in_out[rows, n] = in_dlhs[rows, k] = True
        if axis == "k":  # nothing to add up is a sum of 0
            in_out[rows] = True
    drhs = np.swapaxes(dw, 1, 2) if transpose_rhs else dw
    return {"out": Checked(out, in_out), "dlhs": Checked(dlhs, in_dlhs), "drhs": Checked(drhs)}


def _act(name, x):
    """An activation and its derivative."""
    if name in ("swiglu", "silu"):
        s = 1 / (1 + np.exp(-x))
        return x * s, s * (1 + x * (1 - s))
    if name == "relu":
        return np.maximum(x, 0), (x > 0).astype(float)
    t = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t**2) / 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def _clamped(gate, up):
    """gpt-oss's h and its derivatives: what a clamp cuts off has none."""
    g, u = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    s = 1 / (1 + np.exp(-1.702 * g))
    slope = s * (1 + 1.702 * g * (1 - s))
    return g * s * (u + 1), {"gate": slope * (u + 1) * (gate < 7), "up": g * s * (np.abs(up) < 7)}


def ffn(xs, weights, sizes, dy, activation, *, extents=None, row_weights=None):
    """(ys, dxs, drow_weights, each weight's gradient by its name) as `Checked`."""
    xs, dy = np.asarray(xs, np.float64), np.asarray(dy, np.float64)
    given = {name: np.asarray(a, np.float64) for name, a in weights._asdict().items() if a is not None}
    scale = np.ones(len(xs)) if row_weights is None else np.asarray(row_weights, np.float64)
    ys, dxs, drow = np.zeros(xs.shape), np.zeros(xs.shape), np.zeros(len(xs))
    grads = {name: np.zeros(a.shape) for name, a in given.items()}
    valid = np.zeros(len(xs), bool)
    for e, rows, some in spans(sizes, extents, len(weights.up), len(xs), weights.up.shape[2]):
        x, s, valid[rows] = xs[rows], scale[rows, None], True

        def project(name, e=e, x=x, some=some):
            bias = given[f"{name}_bias"][e, some] if f"{name}_bias" in given else 0
            return x @ given[name][e][:, some] + bias

        up = project("up")
        if "gate" in given:
            gate = project("gate")
            if activation == "swiglu_clamped":
                h, pull = _clamped(gate, up)
            else:
                a, slope = _act(activation, gate)
                h, pull = a * up, {"gate": slope * up, "up": a}
        else:
            h, slope = _act(activation, up)
            pull = {"up": slope}
        y = h @ given["down"][e, some] + (given["down_bias"][e] if "down_bias" in given else 0)
        ys[rows] = s * y
        drow[rows] = np.sum(dy[rows] * y, axis=1)
        d = s * dy[rows]
        grads["down"][e, some] += h.T @ d
        if "down_bias" in given:
            grads["down_bias"][e] += d.sum(0)
        dh = d @ given["down"][e, some].T
        for name, slope in pull.items():
            dpre = dh * slope
            dxs[rows] += dpre @ given[name][e][:, some].T
            grads[name][e][:, some] += x.T @ dpre
            if f"{name}_bias" in given:
                grads[f"{name}_bias"][e, some] += dpre.sum(0)
    expected = {"ys": Checked(ys, valid), "dxs": Checked(dxs, valid)}
    if row_weights is not None:
        expected["drow_weights"] = Checked(drow, valid)
    return expected | {f"d{name}": Checked(grad) for name, grad in grads.items()}


def directional(function, arguments, directions, step=1e-6):
    """Central difference of `function(*arguments)`, a number, along `directions` (a tree for each argument)."""

    def moved(sign):
        return function(*(_add(a, d, sign * step) for a, d in zip(arguments, directions, strict=True)))

    return (moved(1) - moved(-1)) / (2 * step)


def _add(a, d, by):
    if isinstance(a, Weights):
        return Weights(*(None if x is None else x + by * y for x, y in zip(a, d, strict=True)))
    return a + by * d
