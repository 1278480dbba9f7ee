"""Every picture, and the tables behind them."""

import csv

import numpy as np

from data import natural_order, write_whole

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


def write_losses(stem, rows):
    """Write loss curves as ``<stem>_loss.csv`` and ``<stem>_loss.png``.

    Args:
        stem: path without suffix, e.g. ``weights/scDecoder``.
        rows: one dict per epoch, the same keys in each; ``epoch`` first. A key ``name`` and its
            twin ``held_out_name`` share a panel; None stands for "not measured at this epoch".
    """
    import matplotlib

    matplotlib.use("Agg")  # a training run has no screen
    import matplotlib.pyplot as plt

    def write_csv(path):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def write_png(path):
        names = [n for n in rows[0] if n != "epoch" and not n.startswith("held_out_")]
        figure, axes = plt.subplots(
            1, len(names), figsize=(3.2 * len(names) + 1, 2.8), squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes[0], names, strict=True):
            for key, label, color in (
                (name, "training", "#0072B2"),
                (f"held_out_{name}", "held out", "#D55E00"),
            ):
                points = [(r["epoch"], r[key]) for r in rows if r.get(key) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), label=label, color=color, lw=1.3)
            values = [
                r[k] for r in rows for k in (name, f"held_out_{name}") if r.get(k) is not None
            ]
            if values and min(values) > 0 and max(values) > 20 * min(values):
                axis.set_yscale("log")
            axis.set_title(name.replace("_", " "), fontsize=10)
            axis.set_xlabel("epoch")
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel("loss")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside right upper")
        figure.savefig(path, dpi=110)
        plt.close(figure)

    write_whole(f"{stem}_loss.csv", write_csv)
    write_whole(f"{stem}_loss.png", write_png)


def write_evaluation(path, table):
    """Write the figures of merit as one picture, a panel for each, a dot for each method.

    Args:
        path: of the .png.
        table: data frame with the columns figure, best, method, mean, std; std may be NaN.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Okabe and Ito's colours, told apart by the colour-blind too, and a grey: eight methods.
    colors = ["#D55E00", "#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9"]
    colors += ["#7F7F7F"]
    methods = list(dict.fromkeys(table["method"]))
    color_of = {m: colors[i % len(colors)] for i, m in enumerate(methods)}
    figures = list(dict.fromkeys(table["figure"]))
    n_columns = min(3, len(figures))
    n_rows = -(-len(figures) // n_columns)

    def write_png(path):
        picture, axes = plt.subplots(
            n_rows,
            n_columns,
            figsize=(4.2 * n_columns, (0.8 + 0.19 * len(methods)) * n_rows),
            squeeze=False,
            layout="constrained",
        )
        for axis, figure in zip(axes.flat, figures, strict=False):
            rows = table[table["figure"] == figure].iloc[::-1]  # the first method on top
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
            axis.set_title(figure, fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes.flat[len(figures) :]:
            axis.set_visible(False)
        picture.supxlabel("mean ± standard deviation; dashed: the best there is", fontsize=9)
        picture.savefig(path, dpi=110)
        plt.close(picture)

    write_whole(path, write_png)


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    n, names, types = len(samples), map(plain_text, samples), map(plain_text, cell_types)
    names, types = list(names), list(types)
    named = n <= MOST_NAMED
    height = max(0.9 + 0.22 * n if named else 9, 0.6 + 0.2 * len(types))
    letters = max(map(len, types)) + (max(map(len, names)) if named else 0)
    ends, rows = np.cumsum(proportions, axis=1), np.arange(1, n + 1)
    colors, sideways = type_colors(cell_types).values(), {"orientation": "horizontal"}

    def write_png(path):
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
        picture.savefig(path, dpi=110)
        plt.close(picture)

    write_whole(path, write_png)


def write_clusters(path, at, clusters, cell_type):
    """Write cells in two dimensions, coloured by cell type, clusters named by their number.

    Args:
        path: of the .png.
        at: UMAP coordinates (N, 2). clusters: integer codes (N). cell_type: names (N).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = type_colors(natural_order(set(cell_type) - {"Unknown"}))
    colors |= {"Unknown": "#CCCCCC"} if "Unknown" in cell_type else {}

    def write_png(path):
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
        picture.savefig(path, dpi=110)
        plt.close(picture)

    write_whole(path, write_png)
