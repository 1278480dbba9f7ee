"""Pictures of cells, of their markers, and of genes under two conditions."""

from textwrap import fill

import numpy as np

from plots.style import (
    ORIGIN_COLORS,
    draw_identity,
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


def write_legend(path, cell_types):
    """Write the legend of the cell types (K) by itself."""
    n = -(-len(cell_types) // legend_columns(cell_types))
    figure = pyplot().figure(figsize=(legend_width(cell_types), 0.2 + 0.25 * n))
    legend_of(figure, cell_types, loc="center")
    write_whole_figure(path, figure)


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
    scatter(axis, points, [colors[name] for name in cell_type])
    for cluster in np.unique(clusters):
        x, y = np.median(points[clusters == cluster], axis=0)
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
        axis.text(x, y, str(cluster), ha="center", va="center", fontsize=8, bbox=box)
    bare(axis, "UMAP")
    axis.set_title(f"Cell types {source}; numbers are clusters", fontsize=10)
    handles = [plt.Line2D([], [], marker="o", ls="", color=c) for c in colors.values()]
    names = [plain_text(name) for name in colors]
    figure.legend(handles, names, frameon=False, fontsize=8, loc="outside right upper")
    write_whole_figure(path, figure)


def tsne(points, seed=0, **options):
    """t-SNE (N, 2) of points (N, D); perplexity 30, or a third of their number if that is less."""
    from sklearn.manifold import TSNE

    perplexity = min(30, max((len(points) - 1) / 3, 1))
    model = TSNE(perplexity=perplexity, init="pca", random_state=seed, **options)
    return model.fit_transform(points)


def bare(axis, method="t-SNE"):
    """Name the axes of an embedding and remove their ticks, as they have no units."""
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(f"{method} 1", fontsize=11)
    axis.set_ylabel(f"{method} 2", fontsize=11)
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


def write_markers(path, tables, markers, shown):
    """Write the dot plot of marker genes in real and generated cells, see :func:`draw_markers`."""
    figure = draw_markers(tables, markers, shown, ("real", "generated"))
    figure.suptitle("marker genes of each cell type, in real cells and in as many generated ones")
    write_whole_figure(path, figure)


def draw_markers(tables, markers, shown, origins=("",)):
    """Dot plot of marker genes; the cells of each type have a row for each origin.

    Args:
        tables: mean log-expression and fraction of cells with counts: two arrays (O, T, P), NaN
            where there is no cell.
        markers: cell type -> its marker genes (P in all), in the order of the columns.
        shown: names of the types in the rows (T). origins: of the cells (O), one or two.
    """
    plt = pyplot()
    mean, fraction = tables
    genes = [gene for names in markers.values() for gene in names]
    n_origins, T, P = mean.shape
    low, high = np.nanmin(mean, axis=(0, 1)), np.nanmax(mean, axis=(0, 1))  # (P)
    scaled = (mean - low) / np.maximum(high - low, 1e-9)
    letters = max(len(plain_text(name)) for name in [*shown, *markers])
    row_height = 0.06 + 0.22 * n_origins
    size = (0.36 * P + 0.085 * letters + 2.9, row_height * T + 0.065 * letters + 1.6)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    offsets = np.linspace(-0.22, 0.22, n_origins) * (n_origins > 1)
    rows = np.arange(T) + offsets[:, None]  # (O, T)
    y, x = np.broadcast_arrays(rows[:, :, None], np.arange(P))  # (O, T, P)
    dots = axis.scatter(
        x.ravel(), y.ravel(), s=130 * np.nan_to_num(fraction).ravel(), c=scaled.ravel(), zorder=2,
        vmin=0, vmax=1, cmap="viridis_r", edgecolors="0.3", lw=0.4,
    )  # fmt: skip
    for row in range(0, T, 2):
        axis.axhspan(row - 0.5, row + 0.5, color="0.95", lw=0, zorder=0)
    draw_brackets(axis, markers)
    axis.set_yticks(rows.T.ravel(), list(origins) * T, fontsize=7.5)
    axis.tick_params(axis="both", length=0)
    for row, name in enumerate(shown):
        place = {"xytext": (-52 if any(origins) else -6, 0), "textcoords": "offset points"}
        axis.annotate(plain_text(name), (0, row), xycoords=axis.get_yaxis_transform(), ha="right",
                      va="center", fontsize=10, **place)  # fmt: skip
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
    return figure


def draw_brackets(axis, markers):
    """Draw a bracket with its name over the columns of each cell type's own genes."""
    start = 0
    for name, own in markers.items():
        if own:
            ends = [start - 0.3, start + len(own) - 0.7]
            axis.plot(ends, [-0.75] * 2, color="0.2", clip_on=False)
            style = {"rotation": 40, "ha": "left", "va": "bottom", "fontsize": 9}
            axis.text(start + len(own) / 2 - 0.5, -0.85, plain_text(name), **style)
        start += len(own)


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
