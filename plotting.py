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
