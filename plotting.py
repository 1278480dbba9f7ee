"""Every picture, and the tables behind them."""

import numpy as np
import pandas as pd

from readers.labels import natural_order
from runtime.writing import write_whole

# Seven colours of Okabe and Ito, then each the one furthest (in Oklab) from white and from all
# before it, as seen by the one who needs it most: full colour vision, protanopia or deuteranopia
# (Machado et al., IEEE TVCG 2009). The last is still 0.05 from any other; black to white is 1.
TYPE_COLORS = [
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#4B1E00"),
    *("#000087", "#873C4B", "#0000FF", "#C3D2B4", "#5A87FF", "#003CB4", "#4B004B", "#B4D2FF"),
    *("#B43C00", "#A5B487", "#4B3C78", "#691E3C", "#964B87", "#0F69F0", "#782D00", "#E1C369"),
    *("#965A5A", "#78FF96", "#69C3C3", "#F05A69", "#E100C3", "#0087D2", "#D2E1E1", "#1E963C"),
    *("#4B0F2D", "#1EA5FF", "#1E00A5", "#2D2D69", "#966987", "#4B4B96", "#5A692D", "#E1965A"),
]
MOST_NAMED = 60  # samples in a picture; of more, names would be too small or the picture too tall


def pyplot():
    """matplotlib.pyplot without a screen."""
    import matplotlib

    matplotlib.use("Agg")  # a training run has none
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_whole_figure(path, figure, dpi=130, **options):
    """Save a matplotlib figure whole or not at all, and close it. options: of its savefig."""
    write_whole(path, lambda part: figure.savefig(part, dpi=dpi, **options))
    pyplot().close(figure)


LOSS_COLORS = {"training": "#0072B2", "held out": "#D55E00"}


def loss_names(table):
    """Columns of a table of losses that have a panel: neither the epoch nor a held-out twin."""
    return [n for n in table if n != "epoch" and not n.startswith("held_out_")]


def draw_loss(axis, table, name, title):
    """Draw a loss, and its twin ``held_out_<name>`` where there is one, against the epoch."""
    values = []
    pairs = zip((name, f"held_out_{name}"), LOSS_COLORS.values(), strict=True)
    for key, color in pairs:
        if key in table and table[key].notna().any():
            points = table[["epoch", key]].astype(float).dropna()
            axis.plot(points["epoch"], points[key], color=color, lw=1.3)
            values += list(points[key])
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")
    elif values and max(values) == 0:  # targets met from the first step on
        axis.set_ylim(-0.05, 1)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("epoch")
    axis.spines[["top", "right"]].set_visible(False)


def legend_of_losses(figure, tables):
    """The legend of :func:`draw_loss`; "held out" only where one of the tables has it."""
    held_out = any(t.filter(like="held_out_").notna().any(axis=None) for t in tables)
    shown = list(LOSS_COLORS.items())[: 1 + held_out]
    lines = [pyplot().Line2D([], [], color=color, lw=2) for _, color in shown]
    names = [name for name, _ in shown]
    figure.legend(lines, names, frameon=False, loc="outside right upper")


def write_losses(stem, rows):
    """Write loss curves as ``<stem>_loss.csv`` and ``<stem>_loss.png``.

    Args:
        stem: path without suffix, e.g. ``weights/scDecoder``.
        rows: one dict per epoch, the same keys in each; ``epoch`` first. A key ``name`` and its
            twin ``held_out_name`` share a panel; None stands for "not measured at this epoch".
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


def write_evaluation(path, table):
    """Write the metrics as one picture: a panel for each metric, a dot for each method.

    Args:
        path: of the .png.
        table: data frame with the columns metric, best, method, mean, std; std may be NaN.
    """
    plt = pyplot()

    # Okabe and Ito's colours, told apart by the colour-blind too, and a grey: eight methods.
    colors = ["#D55E00", "#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9"]
    colors += ["#7F7F7F"]
    methods = list(dict.fromkeys(table["method"]))
    color_of = {m: colors[i % len(colors)] for i, m in enumerate(methods)}
    metrics = list(dict.fromkeys(table["metric"]))
    n_columns = min(3, len(metrics))
    n_rows = -(-len(metrics) // n_columns)

    figure, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=(4.2 * n_columns, (0.8 + 0.19 * len(methods)) * n_rows),
        squeeze=False,
        layout="constrained",
    )
    for axis, metric in zip(axes.flat, metrics, strict=False):
        rows = table[table["metric"] == metric].iloc[::-1]  # the first method on top
        axis.axvline(rows["best"].iloc[0], color="0.7", lw=1, ls="--", zorder=0)
        for y, row in enumerate(rows.itertuples()):
            axis.errorbar(
                row.mean,
                y,
                xerr=row.std if row.std == row.std else None,  # NaN: measured once
                fmt="o",
                ms=5,
                capsize=2,
                color=color_of[row.method],
            )
        axis.set_yticks(range(len(rows)), rows["method"], fontsize=8)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(metric, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    figure.supxlabel("mean ± standard deviation; dashed: the best there is", fontsize=9)
    write_whole_figure(path, figure, dpi=110)


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
    return name.replace("$", r"\$")  # between two of them stands a formula


def write_proportions(path, proportions, samples, cell_types):
    """Write cell-type proportions as stacked bars, one for each bulk sample, the first on top.

    Args:
        path: of the .png.
        proportions: (S, K), rows summing to 1. samples: names (S). cell_types: names (K).
    """
    plt = pyplot()
    from matplotlib.patches import Patch

    n, names, types = len(samples), map(plain_text, samples), map(plain_text, cell_types)
    names, types = list(names), list(types)
    named = n <= MOST_NAMED
    height = max(0.9 + 0.22 * n if named else 9, 0.6 + 0.2 * len(types))
    letters = max(map(len, types)) + (max(map(len, names)) if named else 0)
    ends, rows = np.cumsum(proportions, axis=1), np.arange(1, n + 1)
    colors, sideways = type_colors(cell_types).values(), {"orientation": "horizontal"}

    picture, axis = plt.subplots(figsize=(6 + 0.08 * letters, height), layout="constrained")
    for k, color in enumerate(colors):
        start = ends[:, k] - proportions[:, k]
        if named:
            axis.barh(rows, proportions[:, k], left=start, color=color, height=0.8)
        else:  # one outline for each type, so that thousands of samples draw at once
            edges = np.arange(n + 1) + 0.5
            axis.stairs(ends[:, k], edges, baseline=start, fill=True, color=color, **sideways)
    axis.set_xlim(0, 1)
    axis.set_ylim(n + 0.5, 0.5)
    axis.set_xlabel("predicted proportion")
    if named:
        axis.set_yticks(rows, names, fontsize=8)
    else:
        axis.set_ylabel(f"{n:,} bulk samples in the order of the file (too many for names)")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=color) for color in colors]
    picture.legend(handles, types, frameon=False, fontsize=8, loc="outside right upper")
    write_whole_figure(path, picture, dpi=110)


def write_clusters(path, at, clusters, cell_type):
    """Write cells in two dimensions, coloured by cell type, clusters named by their number.

    Args:
        path: of the .png.
        at: UMAP coordinates (N, 2). clusters: integer codes (N). cell_type: names (N).
    """
    plt = pyplot()

    colors = type_colors(natural_order(set(cell_type) - {"Unknown"}))
    colors |= {"Unknown": "#CCCCCC"} if "Unknown" in cell_type else {}

    letters = max(map(len, map(plain_text, colors)))
    picture, axis = plt.subplots(figsize=(5.6 + 0.08 * letters, 5), layout="constrained")
    for name, color in colors.items():
        own = cell_type == name
        axis.scatter(*at[own].T, s=max(1, min(8, 2e4 / len(at))), color=color, lw=0)
    for cluster in np.unique(clusters):
        x, y = np.median(at[clusters == cluster], axis=0)
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
        axis.text(x, y, str(cluster), ha="center", va="center", fontsize=8, bbox=box)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("UMAP 1")
    axis.set_ylabel("UMAP 2")
    axis.set_title("Cell types by ScType; numbers are clusters", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Line2D([], [], marker="o", ls="", color=c) for c in colors.values()]
    names = [plain_text(name) for name in colors]
    picture.legend(handles, names, frameon=False, fontsize=8, loc="outside right upper")
    write_whole_figure(path, picture, dpi=110)


def legend_of(figure, cell_types, **where):
    """A legend of cell types, in the colours that they have everywhere."""
    plt = pyplot()
    colors = type_colors(cell_types)
    dots = [plt.Line2D([], [], marker="o", ls="", ms=8, color=c) for c in colors.values()]
    names = [plain_text(name) for name in colors]
    figure.legend(dots, names, frameon=False, fontsize=11, handletextpad=0.2, **where)


def bare(axis):
    """Take ticks and frame away: the axes of a t-SNE have no units."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_aspect("equal", adjustable="datalim")


def legend_width(cell_types):
    """Inches that :func:`legend_of` takes."""
    return 0.6 + 0.095 * max(len(plain_text(name)) for name in cell_types)


def scatter(axis, at, colors):
    """Points (N, 2) in their colours (N), in random order so that none hides another."""
    order = np.random.default_rng(0).permutation(len(at))
    size = float(np.clip(1.2e4 / len(at), 2, 18))
    axis.scatter(*at[order].T, s=size, c=np.asarray(colors)[order], lw=0)


def scatter_types(axis, at, names, cell_types):
    """Points (N, 2) in the colours of their cell types: names (N) of cell_types (K)."""
    colors = type_colors(cell_types)
    scatter(axis, at, [colors[name] for name in names])


def write_panel(path, at, names, cell_types, title):
    """Write one t-SNE panel with its legend.

    Args:
        path: of the .png. at: (N, 2). names: cell type of each point (N). cell_types: all (K).
    """
    width = 4.6 + legend_width(cell_types)
    figure, axis = pyplot().subplots(figsize=(width, 4.6), layout="constrained")
    scatter_types(axis, at, names, cell_types)
    bare(axis)
    axis.set_title(title, fontsize=15)
    legend_of(figure, cell_types, loc="outside right center")
    write_whole_figure(path, figure)


def write_legend(path, cell_types):
    """Write the colours of the cell types (K) alone."""
    figure = pyplot().figure(figsize=(legend_width(cell_types), 0.2 + 0.25 * len(cell_types)))
    legend_of(figure, cell_types, loc="center")
    write_whole_figure(path, figure)


def write_joint(path, at, names, cell_types, made, share, n_neighbors, unseen):
    """Write real and generated cells in one t-SNE: by origin on the left, by type on the right.

    Args:
        at: (N, 2). names: cell types (N). made: which are generated (N). share: of generated cells
            among the ``n_neighbors`` neighbours of a real one. unseen: no training saw the real.
    """
    width = 9.4 + legend_width(cell_types)
    figure, axes = pyplot().subplots(1, 2, figsize=(width, 4.9), layout="constrained")
    scatter(axes[0], at, np.where(made, "#D55E00", "#0072B2"))
    real = "real, never trained on" if unseen else "real, trained on"
    for label, color in ((real, "#0072B2"), ("generated", "#D55E00")):
        axes[0].scatter([], [], s=50, color=color, label=label)
    axes[0].legend(frameon=False, fontsize=11, loc="upper center", ncols=2, handletextpad=0.1,
                   bbox_to_anchor=(0.5, 0.0))  # fmt: skip
    scatter_types(axes[1], at, names, cell_types)
    for axis, title in zip(axes, ("real and generated cells", "their cell types"), strict=True):
        bare(axis)
        axis.set_title(title, fontsize=15)
    axes[1].text(
        *(0.5, -0.06),
        f"generated cells among the {n_neighbors} nearest neighbours\n"
        f"of a real cell: {100 * share:.0f} % (50 % if they were alike)",
        transform=axes[1].transAxes,
        ha="center",
        va="top",
        fontsize=11,
    )
    legend_of(figure, cell_types, loc="outside right center")
    write_whole_figure(path, figure)


def write_points(path, panels, axes_names, names=None, cell_types=()):
    """Write scatter plots side by side, each with the line on which both would be equal.

    Args:
        panels: title -> (x, y), arrays of one shape. axes_names: of x and y.
        names: cell type of each point, if they are to be coloured; cell_types: all (K).
    """
    extra = legend_width(cell_types) if names is not None else 0
    figure, axes = pyplot().subplots(
        *(1, len(panels)), figsize=(4.2 * len(panels) + extra, 4.2), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
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


def write_curves(path, curves):
    """Write the loss curves of the trainings in one picture, a row each.

    curves: stage -> data frame as :func:`write_losses` writes it.
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


def write_schematic(path):
    """Write the three networks and what flows between them, as README explains them."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure, axis = pyplot().subplots(figsize=(10.4, 5.2))
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set_xlim(0, 104)
    axis.set_ylim(0, 52)
    axis.axis("off")

    def box(x, y, width, height, text, color):
        patch = FancyBboxPatch((x, y), width, height, "round,pad=0.4,rounding_size=1.4",
                               fc=color, ec="#333333", lw=1.3)  # fmt: skip
        axis.add_patch(patch)
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10.5)

    def arrow(start, end, text="", at=None):
        style = {"arrowstyle": "-|>", "mutation_scale": 14, "lw": 1.4, "color": "#333333"}
        axis.add_patch(FancyArrowPatch(start, end, **style))
        if text:
            axis.text(*at, text, ha="center", va="center", fontsize=9, color="#333333")

    data, network, latent = "#F2F2F2", "#CFE5F5", "#FBE3C4"
    for y, label in ((49.4, "TRAINING, on a labelled single-cell reference"), (16.6, "GENERATION")):
        axis.text(2, y, label, fontsize=10.5, weight="bold", color="#333333")
    axis.plot([1, 103], [20.5, 20.5], color="0.7", lw=1, ls=":")

    box(2, 36, 15, 9, "reference cells\ncounts x\ncell types k", data)
    box(27, 36, 18, 9, "1  scGMVAE\nencoder of cells,\nmixture prior", network)
    box(56, 36, 17, 9, "latent z of each cell\nμₖ, σₖ² of\neach type", latent)
    box(84, 36, 17, 9, "2  scDecoder\nz → counts of\nall genes (NB)", network)
    box(2, 23.4, 15, 7.4, "pseudobulks of\ndrawn cells", data)
    box(27, 23.4, 18, 7.4, "3  Bulk Encoder\ndeconvolution, network", network)
    box(56, 23.4, 17, 7.4, "μ̂ₖ, σ̂ₖ², π̂", latent)
    arrow((17.6, 40.5), (26.4, 40.5))
    arrow((45.6, 40.5), (55.4, 40.5))
    arrow((73.6, 40.5), (83.4, 40.5), "z paired with\nits own x", (78.5, 45.2))
    arrow((9.5, 35.4), (9.5, 31.4), "Σ", (11.6, 33.4))
    arrow((17.6, 27.1), (26.4, 27.1))
    arrow((45.6, 27.1), (55.4, 27.1))
    arrow((64.5, 35.4), (64.5, 31.4), "targets", (68.6, 33.4))

    box(2, 3.5, 15, 9, "bulk RNA-seq\nof a sample", data)
    box(27, 3.5, 18, 9, "3  Bulk Encoder\n(trained)", network)
    box(56, 3.5, 17, 9, "k ~ π̂\nz ~ N(μ̂ₖ, σ̂ₖ²)", latent)
    box(84, 3.5, 17, 9, "2  scDecoder\n→ one cell's\ncounts", network)
    arrow((17.6, 8), (26.4, 8))
    arrow((45.6, 8), (55.4, 8), "μ̂ₖ, σ̂ₖ², π̂", (50.5, 10))
    arrow((73.6, 8), (83.4, 8), "z", (78.5, 10))
    # A white ground: the page behind may be dark.
    figure.patch.set_facecolor("white")
    write_whole_figure(path, figure)
