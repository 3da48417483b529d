"""The polynomial in the CPU kernel's float32 tanh (csrc/cpu/vector.h), and how far that tanh errs.

    python -m benchmarks.tanh

prints the coefficients of q in e^(2r) - 1 = 2 r + r^2 q(r), |r| <= ln(2) / 4, and the largest error
of the kernel over every float32 from 2^-14 to 9.5, in units in the last place of the result.
(mpmath comes with torch.)
"""

import mpmath
import torch

from rnn_cuda.functional import elman_rnn

DEGREE = 4
_GRID_POINTS = 4000


def _target(r):
    """What q has to be."""
    return (mpmath.expm1(2 * r) - 2 * r) / r**2


def _weight(r):
    """Error of q to relative error of e^(2r) - 1, up to the sign of r."""
    return abs(r**2 / mpmath.expm1(2 * r))


def minimax(degree: int = DEGREE) -> tuple[list, object]:
    """Coefficients of q, lowest first, that make the largest relative error least, and that error.

    Remez' exchange algorithm: solve for an error of equal size and alternating sign at
    ``degree + 2`` points, then move them to where the error is largest between its zeros.
    """
    with mpmath.workdps(40):
        bound = mpmath.log(2) / 4 * (1 + mpmath.mpf(2) ** -12)  # r is rounded
        count = degree + 2
        points = [-bound * mpmath.cos(mpmath.pi * (i + 0.5) / count) for i in range(count)]
        grid = [-bound + 2 * bound * (i + 0.5) / _GRID_POINTS for i in range(_GRID_POINTS)]
        for _ in range(20):
            rows = [[r**k for k in range(degree + 1)] for r in points]
            for i, r in enumerate(points):
                rows[i].append((-1) ** i / _weight(r))
            solution = mpmath.lu_solve(
                mpmath.matrix(rows), mpmath.matrix([_target(r) for r in points])
            )
            coefficients, level = list(solution)[:-1], abs(solution[degree + 1])
            extremes = []
            for r in grid:
                error = (mpmath.polyval(coefficients[::-1], r) - _target(r)) * _weight(r)
                if not extremes or (error > 0) != (extremes[-1][0] > 0):
                    extremes.append((error, r))
                elif abs(error) > abs(extremes[-1][0]):
                    extremes[-1] = (error, r)
            largest = max(abs(error) for error, _ in extremes)
            if largest < level * (1 + mpmath.mpf(10) ** -4):
                return coefficients, largest
            if len(extremes) != count:
                raise RuntimeError(f"the error has {len(extremes)} extremes, not {count}")
            points = [r for _, r in extremes]
        raise RuntimeError("the exchange did not come to an end")


def errors_in_ulp(x: torch.Tensor) -> torch.Tensor:
    """Errors of the kernel's tanh of float32 values, in units in the last place of the result."""
    one = torch.ones(1, 1)
    actual = elman_rnn(x.view(1, -1, 1), None, one, one)[0].view(-1).double()
    exact = x.double().tanh()
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    return (actual - exact).abs() / unit


def largest_error(values_at_once: int = 1 << 22) -> tuple[float, float, float]:
    """Largest error of the kernel's tanh in ulp, where that is, and the mean error."""
    first, last = (torch.tensor(v).view(torch.int32).item() for v in (2.0**-14, 9.5))
    largest, place, total = 0.0, 0.0, 0.0
    for start in range(first, last, values_at_once):
        end = min(start + values_at_once, last)
        x = torch.arange(start, end, dtype=torch.int32).view(torch.float32)
        errors = errors_in_ulp(x)
        total += errors.sum().item()
        if errors.max() > largest:
            largest, place = errors.max().item(), x[errors.argmax()].item()
    return largest, place, total / (last - first)


def main() -> None:
    """Print the coefficients and the errors."""
    coefficients, error = minimax()
    for k, coefficient in enumerate(coefficients):
        value = torch.tensor(float(coefficient)).item()
        print(f"q_{k} = {value:.9g}")
    print(f"relative error of e^(2r) - 1, before rounding: {mpmath.nstr(error, 3)}")
    largest, place, mean = largest_error()
    print(f"tanh: at most {largest:.2f} ulp (at {place:.6g}), {mean:.2f} on average")


if __name__ == "__main__":
    main()
