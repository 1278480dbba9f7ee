"""Pictures of cells, markers, proportions and the networks."""

from textwrap import fill

import numpy as np

from plots.style import (
    ORIGIN_COLORS,
    legend_columns,
    legend_of,
    legend_width,
    plain_text,
    pyplot,
    rasterized,
    type_colors,
    write_whole_figure,
)
from readers.labels import natural_order

MAX_NAMED = 60  # samples whose names fit beside their bars
FEW = 4  # samples that have a panel each in the picture of proportions


def write_legend(path, cell_types):
    """Write the legend of the cell types (K) by itself."""
    n = -(-len(cell_types) // legend_columns(cell_types))
    figure = pyplot().figure(figsize=(legend_width(cell_types), 0.2 + 0.25 * n))
    legend_of(figure, cell_types, loc="center")
    write_whole_figure(path, figure)


# ------------------------------------------------------------------------------------ proportions


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
    letters = max(map(len, types)) + (longest_name(proportions) if n <= MAX_NAMED else 0)
    size = (3.6 + 0.08 * letters + 1.15 * K, height)
    options = {"sharey": True, "width_ratios": [3] + [1] * K, "layout": "constrained"}
    figure, axes = pyplot().subplots(1, 1 + K, figsize=size, **options)
    draw_stacked(axes[0], proportions, colors)
    rows = np.arange(1, n + 1)
    for k, axis in enumerate(axes[1:]):
        of_type = (slice(None), k)
        draw_intervals(axis, proportions, of_type, rows, [colors[k]] * n, n_ticks=2)
        end = upper_end(proportions, of_type)
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


def longest_name(proportions):
    """Letters of the longest name of a sample."""
    return max(len(plain_text(name)) for name in proportions.names)


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


# ---------------------------------------------------------------------------- cells as points


def write_clusters(path, points, clusters, cell_type, source="by ScType"):
    """Write cells in two dimensions, coloured by cell type, clusters named by their number.

    Args:
        path: ending in .png, .pdf or .svg.
        points: UMAP coordinates (N, 2). clusters: integer codes (N). cell_type: names (N).
        source: of the names, for the title.
    """
    plt = pyplot()

    colors = type_colors(natural_order(set(cell_type) - {"Unknown"}))
    colors |= {"Unknown": "#CCCCCC"} if "Unknown" in cell_type else {}
    letters = max(map(len, map(plain_text, colors)))
    figure, axis = plt.subplots(figsize=(5.6 + 0.08 * letters, 5), layout="constrained")
    for name, color in colors.items():
        size = max(1, min(8, 2e4 / len(points)))
        shown = points[cell_type == name].T
        axis.scatter(*shown, s=size, color=color, lw=0, rasterized=rasterized(len(points)))
    for cluster in np.unique(clusters):
        x, y = np.median(points[clusters == cluster], axis=0)
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
        axis.text(x, y, str(cluster), ha="center", va="center", fontsize=8, bbox=box)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("UMAP 1")
    axis.set_ylabel("UMAP 2")
    axis.set_title(f"Cell types {source}; numbers are clusters", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Line2D([], [], marker="o", ls="", color=c) for c in colors.values()]
    names = [plain_text(name) for name in colors]
    figure.legend(handles, names, frameon=False, fontsize=8, loc="outside right upper")
    write_whole_figure(path, figure)


def bare(axis):
    """Name the axes of a t-SNE and remove their ticks, as they have no units."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("t-SNE 1", fontsize=11)
    axis.set_ylabel("t-SNE 2", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("0.5")
    axis.set_aspect("equal", adjustable="datalim")


def scatter(axis, points, colors):
    """Draw points (N, 2) in their colours (N), in random order so that none hides another."""
    order = np.random.default_rng(0).permutation(len(points))
    size = float(np.clip(1.2e4 / len(points), 2, 18))
    style = {"lw": 0, "rasterized": rasterized(len(points))}
    axis.scatter(*points[order].T, s=size, c=np.asarray(colors)[order], **style)


def scatter_types(axis, points, names, cell_types):
    """Draw points (N, 2) in the colours of their cell types: names (N) of cell_types (K)."""
    colors = type_colors(cell_types)
    scatter(axis, points, [colors[name] for name in names])


def write_panel(path, points, names, cell_types, title):
    """Write one t-SNE panel with its legend.

    Args:
        path: ending in .png, .pdf or .svg.
        points: (N, 2). names: cell type of each point (N). cell_types: all (K).
    """
    width = 4.6 + legend_width(cell_types)
    figure, axis = pyplot().subplots(figsize=(width, 4.6), layout="constrained")
    scatter_types(axis, points, names, cell_types)
    bare(axis)
    axis.set_title(title, fontsize=13)
    legend_of(figure, cell_types, loc="outside right center")
    write_whole_figure(path, figure)


def write_joint(path, points, names, cell_types, origins, caption):
    """Write real and generated cells in one t-SNE: by origin on the left, by type on the right.

    Args:
        path: ending in .png, .pdf or .svg.
        points: (N, 2). names: cell types (N). cell_types: all (K).
        origins: where each cell comes from (N), one of two or four texts for the legend, in order
            of ORIGIN_COLORS.
        caption: below the right panel.
    """
    width = 9.4 + legend_width(cell_types)
    figure, axes = pyplot().subplots(1, 2, figsize=(width, 4.9), layout="constrained")
    texts = dict.fromkeys(origins)
    colors = dict(zip(texts, ORIGIN_COLORS[len(texts)], strict=True))
    scatter(axes[0], points, [colors[origin] for origin in origins])
    for origin, color in colors.items():
        axes[0].scatter([], [], s=50, color=color, label=plain_text(origin, 24))
    axes[0].legend(frameon=False, fontsize=11, loc="upper center", ncols=2, handletextpad=0.1,
                   bbox_to_anchor=(0.5, -0.06))  # fmt: skip
    scatter_types(axes[1], points, names, cell_types)
    for axis, title in zip(
        axes, ("real and generated cells", "the same cells by cell type"), strict=True
    ):
        bare(axis)
        axis.set_title(title, fontsize=13)
    style = {"transform": axes[1].transAxes, "ha": "center", "va": "top", "fontsize": 11}
    axes[1].text(0.5, -0.09, plain_text(caption, len(caption)), **style)
    legend_of(figure, cell_types, loc="outside right center")
    write_whole_figure(path, figure)


def write_points(path, panels, axes_names):
    """Write scatter plots side by side, each with the line on which x and y are equal.

    Args:
        path: ending in .png, .pdf or .svg. panels: title -> (x, y), arrays of one shape.
            axes_names: of x and y.
    """
    size = (4.2 * len(panels), 4.4)
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, **options)
    end = max(np.nanmax(values) for pair in panels.values() for values in pair)
    for axis, (title, (x, y)) in zip(axes[0], panels.items(), strict=True):
        draw_identity(axis, end)
        style = {"s": 4, "color": "#0072B2", "alpha": 0.3, "lw": 0}
        axis.scatter(np.ravel(x), np.ravel(y), rasterized=rasterized(np.size(x)), **style)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel(axes_names[0], fontsize=11)
    axes[0][0].set_ylabel(axes_names[1], fontsize=11)
    figure.supxlabel("a dot: a gene; dashed: equal", fontsize=9.5)
    write_whole_figure(path, figure)


def draw_identity(axis, end):
    """Draw the line x = y, with both axes from 0 to end."""
    axis.axline((0, 0), slope=1, color="0.6", lw=1, ls="--", zorder=0)
    axis.set_xlim(-0.02 * end, 1.03 * end)
    axis.set_ylim(-0.02 * end, 1.03 * end)
    axis.set_box_aspect(1)
    axis.spines[["top", "right"]].set_visible(False)


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


# ---------------------------------------------------------------------------------- marker genes


def write_markers(path, tables, markers, shown):
    """Write a dot plot of marker genes, each cell type's real cells above its generated ones.

    Args:
        path: ending in .png, .pdf or .svg.
        tables: mean log-expression and fraction of cells with counts, of real and of generated
            cells: two arrays (2, T, P), NaN where there is no cell.
        markers: cell type -> its marker genes (P in all), in the order of the columns.
        shown: names of the types in the rows (T).
    """
    plt = pyplot()
    mean, fraction = tables
    genes = [gene for names in markers.values() for gene in names]
    T, P = len(shown), len(genes)
    low, high = np.nanmin(mean, axis=(0, 1)), np.nanmax(mean, axis=(0, 1))  # (P)
    scaled = (mean - low) / np.maximum(high - low, 1e-9)
    letters = max(len(plain_text(name)) for name in [*shown, *markers])
    size = (0.36 * P + 0.085 * letters + 2.9, 0.5 * T + 0.065 * letters + 1.6)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    t, p = np.meshgrid(np.arange(T), np.arange(P), indexing="ij")
    for origin, offset in ((0, -0.22), (1, 0.22)):
        style = {"vmin": 0, "vmax": 1, "cmap": "viridis_r", "edgecolors": "0.3", "lw": 0.4}
        dots = axis.scatter(
            p.ravel(), (t + offset).ravel(), s=130 * np.nan_to_num(fraction[origin]).ravel(),
            c=scaled[origin].ravel(), zorder=2, **style,
        )  # fmt: skip
    for row in range(0, T, 2):
        axis.axhspan(row - 0.5, row + 0.5, color="0.95", lw=0, zorder=0)
    start = 0
    for name, own in markers.items():
        if own:  # a bracket over the type's own genes
            axis.plot(
                [start - 0.3, start + len(own) - 0.7], [-0.75] * 2, color="0.2", clip_on=False
            )
            place = (start + len(own) / 2 - 0.5, -0.85)
            style = {"rotation": 40, "ha": "left", "va": "bottom", "fontsize": 9}
            axis.text(*place, plain_text(name), **style)
        start += len(own)
    rows = np.repeat(np.arange(T), 2) + np.tile([-0.22, 0.22], T)
    axis.set_yticks(rows, ["real", "generated"] * T, fontsize=7.5)
    axis.tick_params(axis="both", length=0)
    for row, name in enumerate(shown):
        style = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "center"}
        place = {"xytext": (-52, 0), "textcoords": "offset points", "fontsize": 10}
        axis.annotate(plain_text(name), (0, row), xycoords=style["transform"], ha="right",
                      va="center", **place)  # fmt: skip
    axis.set_xticks(range(P), [plain_text(gene, 16) for gene in genes], rotation=90, style="italic")
    axis.set_xlim(-0.7, P - 0.3)
    axis.set_ylim(T - 0.4, -0.6)
    bar = figure.colorbar(dots, ax=axis, shrink=0.4, aspect=12, anchor=(0, 0))
    bar.set_label("mean log(CP10k + 1),\nscaled per gene", fontsize=9)
    sizes = [
        axis.scatter([], [], s=130 * f, c="0.6", edgecolors="0.3", lw=0.4, label=f"{f:.0%}")
        for f in (0.2, 0.5, 1)
    ]
    style = {"frameon": False, "fontsize": 9, "title_fontsize": 9, "title": "cells with\ncounts"}
    figure.legend(handles=sizes, loc="outside right upper", **style)
    figure.suptitle("marker genes of each cell type, in real cells and in as many generated ones")
    write_whole_figure(path, figure)


# ---------------------------------------------------------------------- genes under two conditions


def write_state_genes(path, table, genes, cell_types, conditions, donor):
    """Write genes in cell types under two conditions: a row for each gene, a column for each type.

    Args:
        path: ending in .png, .pdf or .svg.
        table: as :func:`plots.states.state_table` gives it. genes: names (P).
        cell_types: name -> number of real cells under A and B (T). conditions: A and B.
        donor: whose cells these are.
    """
    names = [plain_text(condition, 20) for condition in conditions]
    upright = max(map(len, names)) > 8  # they would run into each other
    width = max(1.55 * len(cell_types) + 1.2, 7.6)  # at least that of the line below the panels
    size = (width, 1.35 * len(genes) + (3.2 if upright else 1.6))
    options = {"sharex": True, "sharey": "row", "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(len(genes), len(cell_types), figsize=size, **options)
    for (p, t), axis in np.ndenumerate(axes):
        draw_states(axis, {key: values[..., t, p] for key, values in table.items()})
    for axis, gene in zip(axes[:, 0], genes, strict=True):
        axis.set_ylabel(plain_text(gene, 16), fontsize=11, style="italic")
    for axis, (name, n) in zip(axes[0], cell_types.items(), strict=True):
        axis.set_title(f"{fill(plain_text(name), 18)}\nn = {n[0]}, {n[1]}", fontsize=10.5)
    for axis in axes[-1]:
        axis.set_xticks([0, 1], names, rotation=90 if upright else 0)
    figure.align_ylabels(axes[:, 0])
    figure.supylabel("expression, log2(CPM + 10)", fontsize=11)
    figure.supxlabel(
        f"donor {plain_text(donor)}, never trained on; n real cells and as many generated, "
        "± standard error; dotted: no counts",
        fontsize=10.5,
    )
    handles, names = axes[0, 0].get_legend_handles_labels()
    order = ("real", "generated", "expected expression")
    handles = [handles[names.index(name)] for name in order]
    style = {"frameon": False, "fontsize": 11, "ncols": 3, "loc": "outside upper center"}
    figure.legend(handles, order, **style)
    write_whole_figure(path, figure)


def draw_states(axis, values):
    """Draw one gene in one type, A on the left and B on the right; values: a part of the table."""
    axis.axhline(np.log2(10), color="0.6", lw=1, ls=":", zorder=0)
    for x, origin, color in zip((-0.12, 0), ("real", "generated"), ORIGIN_COLORS[2], strict=True):
        mean, low, high = values[origin]
        style = {"fmt": "o-", "ms": 5, "lw": 1.3, "color": color}
        axis.errorbar([x, x + 1], mean, [mean - low, high - mean], label=origin, **style)
    style = {"ls": "", "marker": "D", "ms": 5, "mfc": "none", "mec": "#222222"}
    axis.plot([0.12, 1.12], values["expected"], label="expected expression", **style)
    axis.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    axis.set_xlim(-0.45, 1.45)
    axis.spines[["top", "right"]].set_visible(False)


# -------------------------------------------------------------------------------------- schematic


def write_schematic(path):
    """Write the three networks and the data that flow between them, as README explains them."""
    figure, axis = pyplot().subplots(figsize=(10.4, 5.2))
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set_xlim(0, 104)
    axis.set_ylim(0, 52)
    axis.axis("off")
    for y, label in ((49.4, "TRAINING, on a labelled single-cell reference"), (16.6, "GENERATION")):
        axis.text(2, y, label, fontsize=10.5, weight="bold", color="#333333")
    axis.plot([1, 103], [20.5, 20.5], color="0.7", lw=1, ls=":")
    draw_training(axis)
    draw_generation(axis)
    figure.patch.set_facecolor("white")  # the page behind may be dark
    write_whole_figure(path, figure)


DATA, NETWORK, LATENT = "#F2F2F2", "#CFE5F5", "#FBE3C4"  # colours of the schematic's boxes


def draw_training(axis):
    """Draw the upper part of the schematic."""
    draw_box(axis, (2, 36, 15, 9), "reference cells\ncounts x\ncell types k", DATA)
    draw_box(axis, (27, 36, 18, 9), "1  scGMVAE\nencoder of cells,\nmixture prior", NETWORK)
    draw_box(
        axis,
        (56, 36, 17, 9),
        "latent z of each cell\nK types × D dims:\nmean μₖ, variance σₖ²",
        LATENT,
    )
    draw_box(axis, (84, 36, 17, 9), "2  scDecoder\n(paper: genVAE)\nz → all genes (NB)", NETWORK)
    draw_box(axis, (2, 23.4, 15, 7.4), "pseudobulks of\ndrawn cells", DATA)
    draw_box(axis, (27, 23.4, 18, 7.4), "3  Bulk Encoder\ndeconvolution, network", NETWORK)
    draw_box(axis, (56, 23.4, 17, 7.4), "μ̂ₖ, σ̂ₖ² (K × D)\nproportions π̂ (K)", LATENT)
    draw_arrow(axis, (17.6, 40.5), (26.4, 40.5))
    draw_arrow(axis, (45.6, 40.5), (55.4, 40.5))
    draw_arrow(axis, (73.6, 40.5), (83.4, 40.5), "z paired with\nits own x", (78.5, 45.2))
    draw_arrow(axis, (9.5, 35.4), (9.5, 31.4), "Σ", (11.6, 33.4))
    draw_arrow(axis, (17.6, 27.1), (26.4, 27.1))
    draw_arrow(axis, (45.6, 27.1), (55.4, 27.1))
    draw_arrow(axis, (64.5, 35.4), (64.5, 31.4), "targets", (68.6, 33.4))


def draw_generation(axis):
    """Draw the lower part of the schematic."""
    draw_box(axis, (2, 3.5, 15, 9), "bulk RNA-seq\nof a sample", DATA)
    draw_box(axis, (27, 3.5, 18, 9), "3  Bulk Encoder\n(trained)", NETWORK)
    draw_box(axis, (56, 3.5, 17, 9), "k ~ π̂\nz ~ N(μ̂ₖ, σ̂ₖ²)", LATENT)
    draw_box(axis, (84, 3.5, 17, 9), "2  scDecoder\n(paper: genVAE)\n→ counts of a cell", NETWORK)
    draw_arrow(axis, (17.6, 8), (26.4, 8))
    draw_arrow(axis, (45.6, 8), (55.4, 8), "μ̂ₖ, σ̂ₖ², π̂", (50.5, 10))
    draw_arrow(axis, (73.6, 8), (83.4, 8), "z", (78.5, 10))


def draw_box(axis, place, text, color):
    """Draw a rounded box with a text. place: x, y, width, height."""
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = place
    patch = FancyBboxPatch((x, y), width, height, "round,pad=0.4,rounding_size=1.4",
                           fc=color, ec="#333333", lw=1.3)  # fmt: skip
    axis.add_patch(patch)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10.5)


def draw_arrow(axis, start, end, text="", text_place=None):
    """Draw an arrow, with a text at ``text_place`` if it has one."""
    from matplotlib.patches import FancyArrowPatch

    style = {"arrowstyle": "-|>", "mutation_scale": 14, "lw": 1.4, "color": "#333333"}
    axis.add_patch(FancyArrowPatch(start, end, **style))
    if text:
        axis.text(*text_place, text, ha="center", va="center", fontsize=9, color="#333333")
