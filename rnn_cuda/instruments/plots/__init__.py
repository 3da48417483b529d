"""The figures that a reader of gradient-flow studies expects, from plain tensors and arrays.

    figure = plots.adjoint_profile({"rnn": norms}, relative=True)  # (T,) or (seeds, T)
    plots.save(figure, "figures/profile")  # profile.png and profile.svg

Labels and titles are text: ``$`` and a leading ``_`` mean nothing in them. A formula can be set on
the figure's axes. For what you draw yourself there are `as_text` and `legend`.

Each function takes results by label, draws in new axes or in yours (``ax``), and returns the
``matplotlib.figure.Figure``; pyplot is not used, so nothing pops up or stays open. Colours are
those of Okabe & Ito, which colour-blind readers can tell apart, and lines have markers too. Where
there are several seeds the line is their median and the band their range, or the quantiles asked
for. What is exactly zero has no place on a logarithmic axis: it is a cross at its foot.

matplotlib is needed only once something is drawn.
"""

from rnn_cuda.instruments.plots._canvas import COLOURS, MARKERS, STYLE, as_text, legend, save
from rnn_cuda.instruments.plots._flow import (
    adjoint_heatmap,
    adjoint_profile,
    jacobian_singular_values,
    lyapunov_spectrum,
)
from rnn_cuda.instruments.plots._outcome import (
    remedy_bars,
    saturation_histograms,
    speed_against_accuracy,
)
from rnn_cuda.instruments.plots._training import (
    gradient_norms,
    horizon_cliff,
    loss_curves,
    quality_by_horizon,
    recurrent_weights,
    solved_by_ratio,
)

__all__ = [
    "COLOURS",
    "MARKERS",
    "STYLE",
    "adjoint_heatmap",
    "adjoint_profile",
    "as_text",
    "gradient_norms",
    "horizon_cliff",
    "jacobian_singular_values",
    "legend",
    "loss_curves",
    "lyapunov_spectrum",
    "quality_by_horizon",
    "recurrent_weights",
    "remedy_bars",
    "saturation_histograms",
    "save",
    "solved_by_ratio",
    "speed_against_accuracy",
]
