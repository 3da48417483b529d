"""The polynomial in the CPU kernel's float32 tanh (csrc/cpu/vector.h), and how far that tanh errs.

    python -m benchmarks.tanh

prints the coefficients of q in e^(2r) - 1 = 2 r + r^2 q(r), |r| <= ln(2) / 4, and the largest error
of the kernel over every float32 from 2^-14 to 9.5, in units in the last place of the result.
"""

import numpy as np
import torch

from rnn_cuda.functional import elman_rnn

DEGREE = 4


def minimax(degree: int = DEGREE) -> tuple[np.ndarray, float]:
    """Coefficients of q, lowest first, that make the largest relative error least, and that error.

    Remez' exchange algorithm: solve for an error of equal size and alternating sign at
    ``degree + 2`` points, then move them to where the error is largest between its zeros.
    """
    grid = (np.arange(4000) + 0.5) / 2000 - 1
    r = grid * np.log(2) / 4 * (1 + 2.0**-12)  # r is rounded
    q = (np.expm1(2 * r) - 2 * r) / r**2
    powers = r[:, None] ** np.arange(degree + 1)
    weight = np.abs(r**2 / np.expm1(2 * r))  # error of q to relative error of e^(2r) - 1
    signs = (-1.0) ** np.arange(degree + 2)
    chebyshev = -np.cos(np.pi * (np.arange(degree + 2) + 0.5) / (degree + 2))
    points = np.abs(grid[:, None] - chebyshev).argmin(0)
    for _ in range(20):
        rows = np.column_stack([powers[points], signs / weight[points]])
        *coefficients, level = np.linalg.solve(rows, q[points])
        error = (powers @ coefficients - q) * weight
        if np.abs(error).max() < abs(level) * (1 + 1e-4):
            return np.array(coefficients), np.abs(error).max()
        pieces = np.split(np.arange(len(r)), np.flatnonzero(np.diff(np.sign(error))) + 1)
        points = np.array([piece[np.abs(error[piece]).argmax()] for piece in pieces])
    raise RuntimeError("the exchange did not come to an end")


def errors_in_ulp(x: torch.Tensor) -> torch.Tensor:
    """Errors of the kernel's tanh of float32 values, in units in the last place of the result."""
    one = torch.ones(1, 1)
    actual = elman_rnn(x.view(1, -1, 1), None, one, one)[0].view(-1).double()
    exact = x.double().tanh()
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    return (actual - exact).abs() / unit


def main() -> None:
    """Print the coefficients and the errors."""
    coefficients, error = minimax()
    for k, coefficient in enumerate(coefficients):
        print(f"q_{k} = {np.float32(coefficient):.9g}")
    print(f"relative error of e^(2r) - 1, before rounding: {error:.3g}")
    first, last = torch.tensor([2.0**-14, 9.5]).view(torch.int32).tolist()
    largest = total = 0.0
    for start in range(first, last, 1 << 22):
        x = torch.arange(start, min(start + (1 << 22), last), dtype=torch.int32).view(torch.float32)
        errors = errors_in_ulp(x)
        total += errors.sum().item()
        largest = max(largest, errors.max().item())
    print(f"tanh: at most {largest:.2f} ulp, {total / (last - first):.2f} on average")


if __name__ == "__main__":
    main()
