"""Pictures of proportions: of samples with their intervals, and predicted against true ones."""

from textwrap import fill

import numpy as np

from plots.style import (
    draw_identity,
    plain_text,
    pyplot,
    rasterized,
    type_colors,
    write_whole_figure,
)

MAX_NAMED = 60  # samples whose names fit beside their bars
FEW = 4  # samples that have a panel each


def write_proportions(path, proportions):
    """Write the proportions of samples as stacked bars, and each of them with its 90 % interval.

    Of a few samples each has a panel, with a row for each cell type. Of more each cell type has a
    panel beside the bars, with a row for each sample, the first on top.

    Args:
        path: ending in .png, .pdf or .svg.
        proportions: proportions.Proportions of S samples and K types.
    """
    few = len(proportions.names) <= FEW
    write_whole_figure(path, (draw_few if few else draw_many)(proportions))


def draw_few(proportions):
    """The figure of :func:`write_proportions` for a few samples."""
    n, K = proportions.cells.shape
    types = [plain_text(name) for name in proportions.cell_types]
    colors = list(type_colors(proportions.cell_types).values())
    heights = [0.75 + 0.28 * n, 0.9 + 0.27 * K]
    letters = max(map(len, [*types, *map(plain_text, proportions.names)]))
    size = (max(2.3 * n, 4.6) + 0.08 * letters, sum(heights) + 0.2)
    figure = pyplot().figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2, n, height_ratios=heights)
    draw_stacked(figure.add_subplot(grid[0, :]), proportions, colors)
    first, rows = None, np.arange(1, K + 1)
    for i, name in enumerate(proportions.names):
        axis = figure.add_subplot(grid[1, i], sharex=first, sharey=first)
        draw_intervals(axis, proportions, (i, slice(None)), rows, colors, n_ticks=4)
        axis.set_title(plain_text(name, 28), fontsize=10)
        axis.set_xlabel("fraction of cells", fontsize=9)
        if first is None:
            axis.set_ylim(K + 0.5, 0.5)
            axis.set_yticks(rows, types, fontsize=9)
        else:
            axis.tick_params(axis="y", labelleft=False)
        first = first or axis
    end = upper_end(proportions, slice(None))
    first.set_xlim(-0.02 * end, end)
    figure.supxlabel(interval_text(proportions), fontsize=9.5)
    return figure


def draw_many(proportions):
    """The figure of :func:`write_proportions` for more than a few samples."""
    from matplotlib.patches import Patch

    n, K = proportions.cells.shape
    types = [plain_text(name) for name in proportions.cell_types]
    colors = list(type_colors(proportions.cell_types).values())
    height = max(1.9 + 0.22 * n if n <= MAX_NAMED else 9, 0.6 + 0.2 * K)
    names = map(plain_text, proportions.names if n <= MAX_NAMED else [""])
    letters = max(map(len, types)) + max(map(len, names))
    size = (3.6 + 0.08 * letters + 1.15 * K, height)
    options = {"sharey": True, "width_ratios": [3] + [1] * K, "layout": "constrained"}
    figure, axes = pyplot().subplots(1, 1 + K, figsize=size, **options)
    draw_stacked(axes[0], proportions, colors)
    rows = np.arange(1, n + 1)
    for k, axis in enumerate(axes[1:]):
        column = (slice(None), k)
        draw_intervals(axis, proportions, column, rows, [colors[k]] * n, n_ticks=2)
        end = upper_end(proportions, column)
        axis.set_xlim(-0.03 * end, end)
        axis.set_title(fill(types[k], 14), fontsize=8.5)
        axis.set_xlabel("fraction", fontsize=9)
    figure.supxlabel(f"{interval_text(proportions)}; each panel has its own scale", fontsize=9.5)
    handles = [Patch(color=color) for color in colors]
    figure.legend(handles, types, frameon=False, fontsize=8, loc="outside right upper")
    return figure


def draw_stacked(axis, proportions, colors):
    """Draw a bar for each sample, with its name as far as there is room."""
    n = len(proportions.names)
    draw_bars(axis, proportions.cells, colors, outlined=n > MAX_NAMED)
    axis.set_xlim(0, 1)
    axis.set_ylim(n + 0.5, 0.5)
    axis.set_xlabel("fraction of cells", fontsize=9)
    if n <= MAX_NAMED:
        names = [plain_text(name) for name in proportions.names]
        axis.set_yticks(np.arange(1, n + 1), names, fontsize=8)
    else:
        axis.set_ylabel(f"{n:,} samples in the order of the file (too many for names)")
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)


def draw_intervals(axis, proportions, part, rows, colors, n_ticks):
    """Draw some proportions as points with their intervals; known ones are diamonds.

    Args:
        part: index of n of the (S, K). rows: heights (n). colors: (n). n_ticks: at most so many.
    """
    dense = len(rows) > MAX_NAMED
    axis.grid(axis="y", color="0.88", lw=0 if dense else 0.6)
    axis.set_axisbelow(True)
    cells, colors = proportions.cells[part], np.array(colors)
    is_known = np.zeros(len(rows), bool) if proportions.known is None else proportions.known[part]
    ends = [np.where(is_known, np.nan, end[part]) for end in (proportions.low, proportions.high)]
    layer = {"rasterized": rasterized(len(rows))}
    line = {"color": "0.75", "lw": 0.5} if dense else {"color": "0.25", "lw": 1.6}
    axis.hlines(rows, *ends, zorder=2, **line, **layer)
    if not dense:  # an interval may be narrower than its point
        caps = {"s": 70, "c": "0.25", "marker": "|", "linewidths": 1.4, "clip_on": False}
        axis.scatter(ends, [rows, rows], **caps)
    style = {"s": 4 if dense else 26, "edgecolors": "0.2", "linewidths": 0 if dense else 0.6}
    style |= layer
    for marker, shown in (("o", ~is_known), ("D", is_known)):
        points = cells[shown], rows[shown]
        axis.scatter(*points, c=colors[shown], marker=marker, clip_on=False, zorder=3, **style)
    axis.xaxis.set_major_locator(pyplot().MaxNLocator(n_ticks))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def upper_end(proportions, part):
    """Where the axis of some proportions ends, so that all intervals are inside."""
    values = np.fmax(proportions.high, proportions.cells)[part]  # fmax: there may be no interval
    return max(1.05 * values.max(), 1e-3)


def interval_text(proportions):
    """What lines and points stand for."""
    known = proportions.known is not None and bool(proportions.known.any())
    lines = "" if np.isnan(proportions.low).all() else "; bars: 90 % intervals"
    return (
        f"points: estimated fractions of cells{lines}{'; diamonds: given, not estimated' * known}"
    )


def draw_bars(axis, proportions, colors, outlined):
    """Draw proportions (S, K) as stacked bars, sample i at height i + 1.

    outlined: without gaps, as one shape for each type, so that thousands of samples draw at once.
    """
    n, ends = len(proportions), np.cumsum(proportions, axis=1)
    for k, color in enumerate(colors):
        start = ends[:, k] - proportions[:, k]
        if outlined:
            style = {"fill": True, "color": color, "orientation": "horizontal"}
            axis.stairs(ends[:, k], np.arange(n + 1) + 0.5, baseline=start, **style)
        else:
            rows = np.arange(1, n + 1)
            axis.barh(rows, proportions[:, k], left=start, color=color, height=0.8)


def write_predictions(path, true, ours, other, cell_types, texts):
    """Write predicted against true proportions of pseudobulks, a panel for each cell type.

    Args:
        path: ending in .png, .pdf or .svg. true: fractions of cells (S, K).
        ours: predicted fractions and both ends of their 90 % intervals, three of (S, K).
        other: those of the method to compare with (S, K), whose points are grey.
        cell_types: names (K). texts: what the legend calls ours and the other.
    """
    plt = pyplot()
    K = len(cell_types)
    width = min(4, K)
    height = -(-K // width)
    options = {"squeeze": False, "layout": "constrained"}
    size = (2.7 * width + 0.4, 2.75 * height + 0.9)
    figure, axes = plt.subplots(height, width, figsize=size, **options)
    figure.get_layout_engine().set(hspace=0.06)
    predicted, low, high = ours
    many = {"rasterized": rasterized(len(true))}
    for k, (axis, (name, color)) in enumerate(
        zip(axes.flat, type_colors(cell_types).items(), strict=False)
    ):
        ends = true[:, k], predicted[:, k], other[:, k], high[:, k]
        draw_identity(axis, max(max(map(np.nanmax, ends)), 1e-3))
        style = {"s": 12, "facecolors": "none", "edgecolors": "0.6", "lw": 0.8, "zorder": 1}
        axis.scatter(true[:, k], other[:, k], **style, **many)
        axis.vlines(true[:, k], low[:, k], high[:, k], color="0.3", lw=0.8, alpha=0.7, zorder=2)
        style = {"s": 15, "color": color, "edgecolors": "0.2", "lw": 0.4, "zorder": 3}
        axis.scatter(true[:, k], predicted[:, k], **style, **many)
        axis.set_title(plain_text(name), fontsize=10.5)
        axis.locator_params(nbins=4)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(labelsize=8.5)
    for axis in axes.flat[K:]:
        axis.remove()
    dots = [
        plt.Line2D([], [], marker="o", color="0.3", ms=5, lw=1.2, mec="0.2"),
        plt.Line2D([], [], marker="o", ls="", ms=5, mfc="none", mec="0.6"),
    ]
    style = {"frameon": False, "fontsize": 10, "loc": "outside upper center", "ncols": 1}
    figure.legend(dots, list(texts), **style)
    figure.supxlabel("true fraction of cells", fontsize=11)
    figure.supylabel("predicted fraction of cells", fontsize=11)
    write_whole_figure(path, figure)
