"""Pictures for ldm/langevin/README.md: stationary variances against their formula, and the mixture of Welling & Teh (2011).

`PYTHONPATH=tests python tests/benchmarks/sgld_figures.py` draws both beside that page, in about a minute.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from targets import Mixture, Target, run

from ldm.langevin.sgld import SGHMC, SGLD, Polynomial
from ldm.report.plots import COLOURS, STYLE, _save

FOLDER = Path(__file__).parents[2] / "ldm" / "langevin"
CHAINS = 5000
FRICTION = 0.3


def stationary(path: Path) -> None:
    """Variance over the posterior's against εa: the formula's curves, and 3 standard errors around simulated ones."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, friction in zip(panels, ("SGLD", f"SGHMC, friction α = {FRICTION}"), (1.0, FRICTION), strict=True):
        for (precision, noise), colour in zip([(1.0, 0.0), (1.0, 4.0), (25.0, 500.0)], COLOURS, strict=False):
            target = Target(0.0, precision, noise, friction=friction)
            at = [replace(target, lr=size / precision) for size in np.linspace(0.01, 2, 100)]
            label = f"a = {precision:g}, V = {noise:g}"
            axes.plot(
                [t.lr * precision for t in at], [t.formula * precision for t in at], color=colour, linewidth=1.6, label=label
            )
            for size in (0.05, 0.25, 0.5, 1.0, 1.4, 1.9):
                make = SGLD if friction == 1 else partial(SGHMC, friction=friction)
                found = float(run(replace(target, lr=size / precision), make, chains=CHAINS).var()) * precision
                error = 3 * found * math.sqrt(2 / CHAINS)
                axes.errorbar(size, found, error, fmt="o", color=colour, markersize=4, capsize=3, linewidth=1.0)
        axes.axhline(1, color="#7a7a80", linewidth=1.0, linestyle="--", label="posterior")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(title=name, xlabel="step size ε · curvature a", ylabel="stationary variance · a" if friction == 1 else "")
    panels[0].legend(frameon=False, loc="upper left")
    _save(figure, path)


def mixture(path: Path) -> None:
    """Probabilities of a grid's cells, exact and of samples, both with contours of the exact density."""
    target, steps = Mixture(), 8000
    schedule = Polynomial.between(2e-3, 3e-4, steps)
    found = target.sample(schedule, steps, chains=1000, batch=10, burn_in=3000)
    exact = target.posterior()
    figure = Figure(figsize=(7.5, 3.7), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = ("exact posterior", f"SGLD, total variation {Mixture.distance(found, exact):.3f}")
    smooth = replace(target, cells=160)  # for contours
    density = smooth.posterior(inside=1).T
    centres = [e[:-1] + np.diff(e) / 2 for e in smooth.edges]
    for axes, cells, title in zip(panels, (exact, found), titles, strict=True):
        axes.pcolormesh(*target.edges, cells.T, cmap="Blues", vmin=0, vmax=1.1 * exact.max())
        axes.contour(*centres, density, density.max() * np.array([0.05, 0.2, 0.4, 0.6, 0.8]), colors=COLOURS[1], linewidths=0.9)
        axes.set(title=title, xlabel="θ₁", ylabel="θ₂" if axes is panels[0] else "")
        axes.grid(False)
        axes.set_xlim(-1.2, 2.2)
        axes.set_ylim(-2.6, 2.6)
    _save(figure, path)


@matplotlib.rc_context(STYLE)
def main() -> None:
    for draw in (stationary, mixture):
        path = FOLDER / f"sgld_{draw.__name__}.png"
        draw(path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
