"""Every picture, and the tables behind them."""

import csv

from data import write_whole


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

    # Okabe and Ito's colours, told apart by the colour-blind too.
    colors = ["#D55E00", "#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9"]
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
