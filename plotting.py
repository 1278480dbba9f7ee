"""Every picture that the scripts write, and the table behind the loss curves."""

from textwrap import fill

import numpy as np
import pandas as pd

from readers.labels import natural_order
from runtime.writing import write_whole

# The seven colours of Okabe and Ito, then 33 more. Each is the furthest (in Oklab) from white and
# from all before it, under the worst of full colour vision, protanopia and deuteranopia (simulated
# after Machado et al., IEEE TVCG 2009). The last is 0.05 from any other; black to white is 1.
TYPE_COLORS = [
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#4B1E00"),
    *("#000087", "#873C4B", "#0000FF", "#C3D2B4", "#5A87FF", "#003CB4", "#4B004B", "#B4D2FF"),
    *("#B43C00", "#A5B487", "#4B3C78", "#691E3C", "#964B87", "#0F69F0", "#782D00", "#E1C369"),
    *("#965A5A", "#78FF96", "#69C3C3", "#F05A69", "#E100C3", "#0087D2", "#D2E1E1", "#1E963C"),
    *("#4B0F2D", "#1EA5FF", "#1E00A5", "#2D2D69", "#966987", "#4B4B96", "#5A692D", "#E1965A"),
]
LOSS_COLORS = {"training": "#0072B2", "held out": "#D55E00"}
# What a loss on held-out bulks is read beside: prefix of its column -> legend and style of a line.
LOSS_LINES = {
    "constant": ("constant answer", "--"),
    "noise": ("sampling noise of the target", ":"),
}
# Okabe and Ito's colours, which colour-blind readers can tell apart, then a brown and a grey.
METHOD_COLORS = [
    *("#D55E00", "#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9", "#4B1E00"),
    "#7F7F7F",
]
# Real and generated cells; under two conditions, real A and B, then generated A and B.
ORIGIN_COLORS = {2: ("#0072B2", "#D55E00"), 4: ("#56B4E9", "#0072B2", "#E69F00", "#D55E00")}
PANELS = 5  # beside each other in evaluation.png
MAX_NAMED = 60  # samples whose names fit beside their bars
FEW = 4  # samples that have a panel each in the picture of proportions


def pyplot():
    """matplotlib.pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_whole_figure(path, figure, dpi=130, **options):
    """Save a matplotlib figure whole or not at all, and close it. options: of ``savefig``."""
    write_whole(path, lambda part: figure.savefig(part, dpi=dpi, **options))
    pyplot().close(figure)


# ----------------------------------------------------------------------------------------- losses


def loss_names(table):
    """Columns of a loss table that get a panel: not the epoch, nor what is drawn beside a loss."""
    beside = tuple(f"{prefix}_" for prefix in ("held_out", *LOSS_LINES))
    return [name for name in table if name != "epoch" and not name.startswith(beside)]


def draw_loss(axis, table, name, title):
    """Draw a loss against the epoch, and beside it ``held_out_<name>`` and its LOSS_LINES."""
    values = draw_lines(axis, table, name)
    pairs = zip((name, f"held_out_{name}"), LOSS_COLORS.values(), strict=True)
    for key, color in pairs:
        if key in table and table[key].notna().any():
            points = table[["epoch", key]].astype(float).dropna()
            axis.plot(points["epoch"], points[key], color=color, lw=1.3)
            values += list(points[key])
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")
    elif values and max(values) == 0:  # the loss is 0 from the first step on
        axis.set_ylim(-0.05, 1)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("epoch")
    axis.spines[["top", "right"]].set_visible(False)


def draw_lines(axis, table, name):
    """Draw the LOSS_LINES of a loss, as far as the table has them. Returns their values."""
    values = []
    for prefix, (_, style) in LOSS_LINES.items():
        key = f"{prefix}_{name}"
        if key in table and table[key].notna().any():
            values.append(float(table[key].dropna().iloc[-1]))  # the same at every epoch
            axis.axhline(values[-1], color="0.35", lw=1.3, ls=style)
    return values


def legend_of_losses(figure, tables):
    """The legend of :func:`draw_loss`, of what one of the tables has."""

    def any_has(prefix):
        return any(t.filter(regex=f"^{prefix}_").notna().any(axis=None) for t in tables)

    styles = {"training": {"color": LOSS_COLORS["training"]}}
    if any_has("held_out"):
        styles["held out"] = {"color": LOSS_COLORS["held out"]}
    for prefix, (name, style) in LOSS_LINES.items():
        if any_has(prefix):
            styles[name] = {"color": "0.35", "ls": style}
    lines = [pyplot().Line2D([], [], lw=2, **style) for style in styles.values()]
    figure.legend(lines, list(styles), frameon=False, loc="outside right upper")


def write_losses(stem, rows):
    """Write loss curves as ``<stem>_loss.csv`` and ``<stem>_loss.png``.

    Args:
        stem: path without suffix, e.g. ``weights/scDecoder``.
        rows: one dict per epoch with the same keys, ``epoch`` first. ``name``, ``held_out_name``,
            ``constant_name`` and ``noise_name`` share a panel; None stands for "not measured in
            this epoch".
    """
    table = pd.DataFrame(rows)
    write_whole(f"{stem}_loss.csv", lambda path: table.to_csv(path, index=False))
    names = loss_names(table)
    size = (3.2 * len(names) + 1, 2.8)
    options = {"squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(1, len(names), figsize=size, **options)
    for axis, name in zip(axes[0], names, strict=True):
        draw_loss(axis, table, name, name.replace("_", " "))
    axes[0][0].set_ylabel("loss")
    legend_of_losses(figure, [table])
    write_whole_figure(f"{stem}_loss.png", figure)


def write_curves(path, curves):
    """Write the loss curves of all trainings as one picture, a row for each.

    curves: stage -> data frame of the csv that :func:`write_losses` writes.
    """
    columns = {stage: loss_names(table) for stage, table in curves.items()}
    width = max(map(len, columns.values()))
    size = (3.4 * width + 1.3, 2.5 * len(curves))
    options = {"squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(len(curves), width, figsize=size, **options)
    for row, (stage, table) in zip(axes, curves.items(), strict=True):
        for axis in row[len(columns[stage]) :]:
            axis.set_visible(False)
        for axis, name in zip(row, columns[stage], strict=False):
            draw_loss(axis, table, name, f"{stage}: {name.replace('_', ' ')}")
    legend_of_losses(figure, curves.values())
    write_whole_figure(path, figure)


# ------------------------------------------------------------------------------------- evaluation


def write_evaluation(path, table):
    """Write the metrics as one picture: a panel for each metric, a dot for each method.

    Args:
        path: of the .png.
        table: data frame with the columns metric, best, method, mean, std, setting; std may be NaN.
            The metrics of each setting have rows of panels of their own.
    """
    rows = []  # of panels: their metrics, and the methods that any of them has
    for _, part in table.groupby("setting", sort=False):
        metrics, methods = (list(dict.fromkeys(part[name])) for name in ("metric", "method"))
        rows += [(metrics[i : i + PANELS], methods) for i in range(0, len(metrics), PANELS)]
    width = max(len(metrics) for metrics, _ in rows)
    heights = [0.9 + 0.19 * len(methods) for _, methods in rows]
    letters = max(len(plain_text(name)) for name in table["method"])
    size = (2.8 * width + 0.07 * letters, sum(heights) + 0.3)
    options = {"squeeze": False, "layout": "constrained", "height_ratios": heights}
    figure, axes = pyplot().subplots(len(rows), width, figsize=size, **options)
    for row, (metrics, methods) in zip(axes, rows, strict=True):
        for axis, metric in zip(row, metrics, strict=False):
            draw_metric(axis, table[table["metric"] == metric], metric, methods)
        for axis in row[1:]:
            axis.set_yticklabels([])
        for axis in row[len(metrics) :]:
            axis.set_visible(False)
    figure.supxlabel("mean ± standard deviation; dashed: the best there is", fontsize=9)
    write_whole_figure(path, figure, dpi=110)


def draw_metric(axis, table, metric, methods):
    """Draw one metric, a line for each of the methods (as far as they have it), the best dashed."""
    axis.axvline(table["best"].iloc[0], color="0.7", lw=1, ls="--", zorder=0)
    for row in table.itertuples():
        i = methods.index(row.method)
        std = None if np.isnan(row.std) else row.std  # NaN: measured once
        style = {"fmt": "o", "ms": 5, "capsize": 2, "color": METHOD_COLORS[i % len(METHOD_COLORS)]}
        axis.errorbar(row.mean, i, xerr=std, **style)
    axis.set_yticks(range(len(methods)), [plain_text(name) for name in methods], fontsize=8)
    axis.set_ylim(len(methods) - 0.4, -0.6)  # the first method on top
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(fill(plain_text(metric, 80), 36), fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------- cell types


def type_colors(cell_types):
    """Colour of each cell type, the same in every picture of one model.

    cell_types: all names of the model in its order (K). Beyond 40 types colours repeat.

    Returns:
        dict: name -> "#RRGGBB".
    """
    return {name: TYPE_COLORS[k % len(TYPE_COLORS)] for k, name in enumerate(cell_types)}


def plain_text(name, longest=40):
    """A name as matplotlib shows it letter by letter, cut if it is very long."""
    name = str(name)
    name = name if len(name) <= longest else name[: longest - 1] + "…"
    return name.replace("$", r"\$")  # matplotlib sets what stands between two $ as a formula


def legend_of(figure, cell_types, **where):
    """A legend of cell types, in the colours that they have everywhere."""
    plt = pyplot()
    colors = type_colors(cell_types)
    dots = [plt.Line2D([], [], marker="o", ls="", ms=8, color=c) for c in colors.values()]
    names = [plain_text(name) for name in colors]
    figure.legend(dots, names, frameon=False, fontsize=11, handletextpad=0.2, **where)


def legend_width(cell_types):
    """Inches that :func:`legend_of` takes."""
    return 0.6 + 0.095 * max(len(plain_text(name)) for name in cell_types)


def write_legend(path, cell_types):
    """Write the legend of the cell types (K) by itself."""
    figure = pyplot().figure(figsize=(legend_width(cell_types), 0.2 + 0.25 * len(cell_types)))
    legend_of(figure, cell_types, loc="center")
    write_whole_figure(path, figure)


# ------------------------------------------------------------------------------------ proportions


def write_proportions(path, proportions):
    """Write the proportions of samples as stacked bars, and each of them with its 90 % interval.

    Of a few samples each has a panel, with a row for each cell type. Of more each cell type has a
    panel beside the bars, with a row for each sample, the first on top.

    Args:
        path: of the .png. proportions: proportions.Proportions of S samples and K types.
    """
    few = len(proportions.names) <= FEW
    write_whole_figure(path, (draw_few if few else draw_many)(proportions), dpi=110)


def draw_few(proportions):
    """The figure of :func:`write_proportions` for a few samples."""
    n, K = proportions.cells.shape
    types = [plain_text(name) for name in proportions.cell_types]
    colors = list(type_colors(proportions.cell_types).values())
    heights = [0.75 + 0.25 * n, 0.9 + 0.25 * K]
    letters = max(map(len, [*types, *map(plain_text, proportions.names)]))
    size = (max(2.2 * n, 4) + 0.08 * letters, sum(heights))
    figure = pyplot().figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2, n, height_ratios=heights)
    draw_stacked(figure.add_subplot(grid[0, :]), proportions, colors)
    first, rows = None, np.arange(1, K + 1)
    for i, name in enumerate(proportions.names):
        axis = figure.add_subplot(grid[1, i], sharex=first, sharey=first)
        draw_intervals(axis, proportions, (i, slice(None)), rows, colors, n_ticks=4)
        axis.set_title(plain_text(name, 28), fontsize=9)
        if first is None:
            axis.set_ylim(K + 0.5, 0.5)
            axis.set_yticks(rows, types, fontsize=8)
        else:
            axis.tick_params(axis="y", labelleft=False)
        first = first or axis
    first.set_xlim(0, upper_end(proportions, slice(None)))
    figure.supxlabel(interval_text(proportions), fontsize=9)
    return figure


def draw_many(proportions):
    """The figure of :func:`write_proportions` for more than a few samples."""
    from matplotlib.patches import Patch

    n, K = proportions.cells.shape
    types = [plain_text(name) for name in proportions.cell_types]
    colors = list(type_colors(proportions.cell_types).values())
    height = max(1.7 + 0.22 * n if n <= MAX_NAMED else 9, 0.6 + 0.2 * K)
    letters = max(map(len, types)) + (longest_name(proportions) if n <= MAX_NAMED else 0)
    size = (3.6 + 0.08 * letters + 0.95 * K, height)
    options = {"sharey": True, "width_ratios": [3.2] + [1] * K, "layout": "constrained"}
    figure, axes = pyplot().subplots(1, 1 + K, figsize=size, **options)
    draw_stacked(axes[0], proportions, colors)
    rows = np.arange(1, n + 1)
    for k, axis in enumerate(axes[1:]):
        of_type = (slice(None), k)
        draw_intervals(axis, proportions, of_type, rows, [colors[k]] * n, n_ticks=2)
        axis.set_xlim(0, upper_end(proportions, of_type))
        axis.set_title(fill(types[k], 14), fontsize=8)
    figure.supxlabel(f"{interval_text(proportions)}; each panel has its own scale", fontsize=9)
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
    axis.grid(axis="y", color="0.92", lw=0 if dense else 0.6)
    axis.set_axisbelow(True)
    cells, colors = proportions.cells[part], np.array(colors)
    is_known = np.zeros(len(rows), bool) if proportions.known is None else proportions.known[part]
    ends = [np.where(is_known, np.nan, end[part]) for end in (proportions.low, proportions.high)]
    axis.hlines(rows, *ends, color="0.35", lw=0.7 if dense else 1.3, zorder=2)
    if not dense:  # an interval may be narrower than its point
        axis.scatter(ends, [rows, rows], s=45, c="0.35", marker="|", linewidths=1, clip_on=False)
    style = {"s": 5 if dense else 22, "edgecolors": "0.2", "linewidths": 0.3 if dense else 0.6}
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
    known = proportions.known is not None and proportions.known.any()
    lines = "" if np.isnan(proportions.low).all() else ", with 90 % intervals"
    return f"fraction of cells{lines}{'; diamonds: known' if known else ''}"


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
        path: of the .png.
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
        axis.scatter(*points[cell_type == name].T, s=size, color=color, lw=0)
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
    write_whole_figure(path, figure, dpi=110)


def bare(axis):
    """Remove ticks and frame: the axes of a t-SNE have no units."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_aspect("equal", adjustable="datalim")


def scatter(axis, points, colors):
    """Draw points (N, 2) in their colours (N), in random order so that none hides another."""
    order = np.random.default_rng(0).permutation(len(points))
    size = float(np.clip(1.2e4 / len(points), 2, 18))
    axis.scatter(*points[order].T, s=size, c=np.asarray(colors)[order], lw=0)


def scatter_types(axis, points, names, cell_types):
    """Draw points (N, 2) in the colours of their cell types: names (N) of cell_types (K)."""
    colors = type_colors(cell_types)
    scatter(axis, points, [colors[name] for name in names])


def write_panel(path, points, names, cell_types, title):
    """Write one t-SNE panel with its legend.

    Args:
        path: of the .png. points: (N, 2). names: cell type of each point (N). cell_types: all (K).
    """
    width = 4.6 + legend_width(cell_types)
    figure, axis = pyplot().subplots(figsize=(width, 4.6), layout="constrained")
    scatter_types(axis, points, names, cell_types)
    bare(axis)
    axis.set_title(title, fontsize=15)
    legend_of(figure, cell_types, loc="outside right center")
    write_whole_figure(path, figure)


def write_joint(path, points, names, cell_types, origins, caption):
    """Write real and generated cells in one t-SNE: by origin on the left, by type on the right.

    Args:
        path: of the .png. points: (N, 2). names: cell types (N). cell_types: all (K).
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
                   bbox_to_anchor=(0.5, 0.0))  # fmt: skip
    scatter_types(axes[1], points, names, cell_types)
    for axis, title in zip(axes, ("real and generated cells", "their cell types"), strict=True):
        bare(axis)
        axis.set_title(title, fontsize=15)
    style = {"transform": axes[1].transAxes, "ha": "center", "va": "top", "fontsize": 11}
    axes[1].text(0.5, -0.06, plain_text(caption, len(caption)), **style)
    legend_of(figure, cell_types, loc="outside right center")
    write_whole_figure(path, figure)


def write_points(path, panels, axes_names, names=None, cell_types=()):
    """Write scatter plots side by side, each with the line on which x and y are equal.

    Args:
        path: of the .png. panels: title -> (x, y), arrays of one shape. axes_names: of x and y.
        names: cell type of each point, if they are to be coloured; cell_types: all (K).
    """
    extra = legend_width(cell_types) if names is not None else 0
    size = (4.2 * len(panels) + extra, 4.2)
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, **options)
    end = max(np.nanmax(values) for pair in panels.values() for values in pair)
    for axis, (title, (x, y)) in zip(axes[0], panels.items(), strict=True):
        axis.axline((0, 0), slope=1, color="0.6", lw=1, ls="--", zorder=0)
        points = np.column_stack([np.ravel(x), np.ravel(y)])
        if names is None:
            axis.scatter(*points.T, s=4, color="#0072B2", alpha=0.3, lw=0, rasterized=True)
        else:
            scatter_types(axis, points, names, cell_types)
        axis.set_title(title, fontsize=13)
        axis.set_xlabel(axes_names[0], fontsize=11)
        axis.set_xlim(-0.02 * end, 1.03 * end)
        axis.set_ylim(-0.02 * end, 1.03 * end)
        axis.set_box_aspect(1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(axes_names[1], fontsize=11)
    if names is not None:
        legend_of(figure, cell_types, loc="outside right center")
    write_whole_figure(path, figure)


def write_state_genes(path, table, genes, cell_types, conditions, donor):
    """Write genes in cell types under two conditions: a row for each gene, a column for each type.

    Args:
        path: of the .png. table: as :func:`state_figures.state_table` gives it. genes: names (P).
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
    figure.supylabel("log2(CPM + 10)", fontsize=11)
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
    draw_box(axis, (56, 36, 17, 9), "latent z of each cell\nμₖ, σₖ² of\neach type", LATENT)
    draw_box(axis, (84, 36, 17, 9), "2  scDecoder\nz → counts of\nall genes (NB)", NETWORK)
    draw_box(axis, (2, 23.4, 15, 7.4), "pseudobulks of\ndrawn cells", DATA)
    draw_box(axis, (27, 23.4, 18, 7.4), "3  Bulk Encoder\ndeconvolution, network", NETWORK)
    draw_box(axis, (56, 23.4, 17, 7.4), "μ̂ₖ, σ̂ₖ², π̂", LATENT)
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
    draw_box(axis, (84, 3.5, 17, 9), "2  scDecoder\n→ one cell's\ncounts", NETWORK)
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
