"""The load of each GPU in each layer as a picture: before and after, on one scale."""

from pathlib import Path

import numpy as np

from moe_align_jax._expert_load.files import write_atomically

MISSING = (
    "no picture: matplotlib is not installed (extra `plot`: pip install 'moe-align-jax[plot]'; "
    "in a checkout: pip install -e '.[plot]')"
)
# Beyond it colours stop: one GPU with a tenfold load would leave the others indistinguishable.
_MOST = 4.0


def draw(
    before: np.ndarray,
    after: np.ndarray,
    path: Path,
    titles: tuple[str, str],
) -> None:
    """Writes a PNG of two maps side by side, layers down and GPUs across.

    Args:
        before, after: `[L, D]` loads; each layer is drawn relative to its own mean.
        path: the file to write.
        titles: of the two maps.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written; one that was there is as it was.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    relative = [
        load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9) for load in (before, after)
    ]
    most = float(max(part.max(initial=1.0) for part in relative))
    figure = Figure(figsize=(11, 2.6 + 0.075 * len(before)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    images = []
    for axis, part, title in zip(axes, relative, titles, strict=True):
        scale = {"vmin": 0, "vmax": min(most, _MOST)}
        images.append(axis.imshow(part, aspect="auto", interpolation="nearest", **scale))
        axis.set(title=title, xlabel="GPU")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("layer")
    figure.colorbar(
        images[0],
        ax=list(axes),
        label="load / mean load of the layer",
        extend="max" if most > _MOST else "neither",
    )
    options = {"dpi": 120, "format": "png", "metadata": {"Software": None}}
    write_atomically(path, lambda opened: figure.savefig(opened, **options))
