"""Pictures of how the networks trained and of how good their cells are: losses and evaluation."""

from pathlib import Path
from textwrap import fill, wrap

import numpy as np
import pandas as pd

from plots.style import plain_text, pyplot, write_whole_figure
from runtime.writing import write_whole

LOSS_COLORS = {"training": "#0072B2", "held out": "#D55E00"}
# What a loss on held-out bulks is read beside: prefix of its column -> name and style of a line.
LOSS_LINES = {
    "constant": ("constant answer", "--"),
    "noise": ("sampling noise of the target", ":"),
}
# What the column "epoch" counts.
STEPS = {
    "scGMVAE": "epoch (pass over the training cells)",
    "scDecoder": "epoch (pass over the training cells)",
    "bulkEncoder": "step (a fresh batch of pseudobulks each)",
}
NATS = "−log p(x | z) per cell (nats)"
# Stage and column -> heading, name of the y axis, and what the loss is and should do.
LOSS_TEXTS = {
    ("scGMVAE", "reconstruction"): (
        *("scGMVAE: reconstruction", NATS),
        "misfit of a cell's counts x in variable genes: should fall, but counts are random, so "
        "not to 0",
    ),
    ("scGMVAE", "kl"): (
        *("scGMVAE: KL divergence", "KL(q(z | x) ‖ prior) per cell (nats)"),
        "distance of z from its prior: need not fall; jumps where the mixture replaces N(0, 1)",
    ),
    ("scDecoder", "reconstruction"): (
        *("scDecoder (genVAE): reconstruction", NATS),
        "misfit of a cell's counts x in all genes: should fall, but counts are random, so not to 0",
    ),
    ("bulkEncoder", "mu"): (
        *("Bulk Encoder: μ̂ₖ", "squared + absolute error"),
        "error of the types' latent means: should fall towards 0",
    ),
    ("bulkEncoder", "var"): (
        *("Bulk Encoder: σ̂ₖ²", "squared + absolute error"),
        "error of the types' latent variances: should fall towards 0",
    ),
    ("bulkEncoder", "pi"): (
        *("Bulk Encoder: π̂", "mean squared error"),
        "error of the cell-type proportions: should fall towards 0",
    ),
    ("bulkEncoder", "deconvolved"): (
        *("Bulk Encoder: deconvolution", "mean squared error"),
        "error of the proportions before the network corrects them: should fall towards 0",
    ),
}
RISING = (
    "Where held-out reconstruction rises, the network learns noise of its training cells. With "
    "fewer than 2,000 there is no early stopping: the last epoch is kept."
)
# Measured, see docs/figures.md.
RISING_DECODER = (
    "For scDecoder this did no harm on PBMC 1K: a training stopped at the lowest made no better "
    "cells (docs/figures.md)."
)
REGRESSION = "squared + absolute error"  # scDecoder's loss with --loss mse_l1
LINE = 64  # letters of a line above a panel
CLEARLY = 0.005  # relative rise of a held-out loss that is worth a sentence


# ----------------------------------------------------------------------------------------- losses


def counted_in(stage):
    """What a stage's training is counted in: epoch or step."""
    return STEPS.get(stage, "epoch").partition(" ")[0]


def loss_names(table):
    """Columns of a loss table that get a panel.

    Not the epoch, nor what is drawn beside a loss, nor a loss that is 0 throughout.
    """
    beside = tuple(f"{prefix}_" for prefix in ("held_out", *LOSS_LINES))
    names = [name for name in table if name != "epoch" and not name.startswith(beside)]
    return [name for name in names if has_values(table, name)]


def has_values(table, name):
    """Whether a loss, or the same loss on held-out data, was ever measured and other than 0."""
    columns = [key for key in (name, f"held_out_{name}") if key in table]
    return bool((table[columns].astype(float).fillna(0) != 0).any(axis=None))


def left_out_text(tables):
    """A line on the losses that have no panel, "" if all have one. tables: stage -> data frame."""
    left = [
        name.replace("mu", "μ̂ₖ").replace("var", "σ̂ₖ²")
        for table in tables.values()
        for name in ("mu", "var")
        if name in table and not has_values(table, name)
    ]
    if not left:
        return ""
    return (
        f"Not drawn: Bulk Encoder, {' and '.join(left)}, 0 throughout. Without --samples the "
        "targets are the mixture's own μₖ and σₖ², at which the network starts."
    )


def loss_text(table, stage, name, loss):
    """Heading, name of the y axis and lines of explanation of a panel. loss: scDecoder's --loss."""
    plain = name.replace("_", " ")
    heading, unit, text = LOSS_TEXTS.get((stage, name), (f"{stage}: {plain}", "loss", ""))
    if stage == "scDecoder" and loss == "mse_l1":
        unit, text = REGRESSION, "distance of decoded from measured expression: should fall"
    return heading, unit, wrap(text, LINE) + wrap(held_out_text(table, stage, name), LINE)


def held_out_text(table, stage, name):
    """What the held-out curve of a loss ended at, in words; "" without one."""
    key = f"held_out_{name}"
    if key not in table or name == "kl" or not table[key].notna().any():
        return ""
    points = table[["epoch", key]].astype(float).dropna()
    last, best = points[key].iloc[-1], points[key].min()
    if (constant := f"constant_{name}") in table and table[constant].notna().any():
        gap = last / max(float(table[constant].dropna().iloc[-1]), 1e-12) - 1
        side = "below" if gap < 0 else "above"
        return f"held out should be below the constant answer: ends {100 * abs(gap):.0f} % {side}"
    if last <= best * (1 + CLEARLY):
        return "held out: ends at its lowest (within 0.5 %)"
    at = int(points["epoch"].iloc[points[key].argmin()])
    return (
        f"held out: lowest at {counted_in(stage)} {at}, ends {100 * (last / best - 1):.1f} % higher"
    )


def draw_loss(axis, table, name, texts, step="epoch"):
    """Draw a loss against the epoch, and beside it ``held_out_<name>`` and its LOSS_LINES.

    texts: of :func:`loss_text`. step: what the epoch counts.
    """
    values = []
    for key, color in zip((name, f"held_out_{name}"), LOSS_COLORS.values(), strict=True):
        if key in table and table[key].notna().any():
            points = table[["epoch", key]].astype(float).dropna()
            style = {"marker": "o", "ms": 2.5} if len(points) < 30 else {}
            axis.plot(points["epoch"], points[key], color=color, lw=1.4, **style)
            values += list(points[key])
    values += draw_lines(axis, table, name)
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")
        # Ticks at 1, 2 and 5, so that two decades have more than two.
        axis.yaxis.set_major_locator(pyplot().LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    heading, unit, lines = texts
    axis.set_title(heading, fontsize=10.5, weight="bold", loc="left", pad=6 + 10.5 * len(lines))
    style = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    axis.annotate("\n".join(lines), (0, 1), (0, 4), fontsize=8, color="0.25", **style)
    axis.set_xlabel(step, fontsize=9)
    axis.set_ylabel(unit, fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)


def draw_lines(axis, table, name):
    """Draw the LOSS_LINES of a loss with their names, as far as it has them. Returns values."""
    values = []
    for prefix, (label, style) in LOSS_LINES.items():
        key = f"{prefix}_{name}"
        if key in table and table[key].notna().any():
            values.append(float(table[key].dropna().iloc[-1]))  # the same at every epoch
            axis.axhline(values[-1], color="0.35", lw=1.3, ls=style)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            text = {"fontsize": 8, "color": "0.25", "va": "center"}
            axis.annotate(fill(label, 12), (1, values[-1]), (3, 0), **place, **text)
    return values


def legend_of_losses(figure, tables, **where):
    """The legend of :func:`draw_loss`, of what one of the tables has."""
    lines = {"training": LOSS_COLORS["training"]}
    if any(t.filter(regex="^held_out_").notna().any(axis=None) for t in tables):
        lines["held out, never trained on"] = LOSS_COLORS["held out"]
    handles = [pyplot().Line2D([], [], lw=2, color=color) for color in lines.values()]
    figure.legend(handles, list(lines), frameon=False, fontsize=9.5, **where)


def write_losses(stem, rows, loss="nb"):
    """Write loss curves as ``<stem>_loss.csv`` and ``<stem>_loss.png``.

    Args:
        stem: path without suffix whose name is the stage, e.g. ``weights/scDecoder``.
        rows: one dict per epoch with the same keys, ``epoch`` first. ``name``, ``held_out_name``,
            ``constant_name`` and ``noise_name`` share a panel; None stands for "not measured in
            this epoch".
        loss: scDecoder's and scGMVAE's --loss, which says the unit.
    """
    stage = Path(stem).name
    table = pd.DataFrame(rows).rename(columns={"epoch": counted_in(stage)})
    write_whole(f"{stem}_loss.csv", lambda path: table.to_csv(path, index=False))
    write_curves(f"{stem}_loss.png", {stage: table}, loss)


def write_curves(path, curves, loss="nb"):
    """Write the loss curves of trainings as one picture, a panel for each loss.

    Args:
        path: ending in .png, .pdf or .svg. curves: stage -> data frame of the csv that
            :func:`write_losses` writes. loss: scDecoder's --loss.
    """
    curves = {stage: t.rename(columns={"step": "epoch"}) for stage, t in curves.items()}
    panels = [(stage, name) for stage, table in curves.items() for name in loss_names(table)]
    texts = [loss_text(curves[stage], stage, name, loss) for stage, name in panels]
    n = max(len(panels), 1)
    width = n if n <= 3 else -(-n // 2)
    height = -(-n // width)
    size = (4.3 * width + 0.2, 3.3 * height + 0.9)
    figure = pyplot().figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(height, width)
    for i, ((stage, name), text) in enumerate(zip(panels, texts, strict=True)):
        beside = texts[i // width * width :][:width]  # whose headings stand at one height
        *names, lines = text
        lines = lines + [""] * (max(len(other[2]) for other in beside) - len(lines))
        axis = figure.add_subplot(grid[i // width, i % width])
        draw_loss(axis, curves[stage], name, (*names, lines), STEPS.get(stage, "epoch"))
    legend_of_losses(figure, curves.values(), loc="outside upper left", ncols=2)
    notes = fill(" ".join(notes_of_losses(curves, texts)), int(13.5 * size[0]))
    figure.supxlabel(notes, fontsize=8.5, color="0.25", x=0.01, ha="left")
    write_whole_figure(path, figure)


def notes_of_losses(curves, texts):
    """Sentences below the panels. curves: see :func:`write_curves`. texts: of their panels."""
    rising = [
        heading
        for heading, _, lines in texts
        if "reconstruction" in heading and any("higher" in line for line in lines)
    ]
    notes = [RISING * bool(rising), RISING_DECODER * any("Decoder" in name for name in rising)]
    notes.append(left_out_text(curves))
    if "bulkEncoder" in curves:
        notes.append(
            "Bulk Encoder: a point every 25 steps; a training loss is of that step's fresh batch "
            "alone, so it jumps."
        )
    return [note for note in notes if note]


# ------------------------------------------------------------------------------------- evaluation

# Headings of the panels of cells -> how the names of their metrics start. The last takes the rest.
CELL_GROUPS = {
    "Realism: can generated cells be told from real ones?": (
        *("random-forest AUROC", "excess of AUROC", "MMD2", "energy distance"),
    ),
    "Realism: do genes vary, and vary together, as in real cells?": (
        *("within-type variance", "gene-gene correlation", "zero-fraction", "library-size"),
    ),
    "Cell types: classification and marker genes": ("macro-F1", "marker", "fold-change"),
    "Copies of training cells; sums of cells against their bulk": (),
}
SETTINGS = {
    "within": "Proportions: pseudobulks of held-out cells",
    "lineages": "Proportions: the same, by lineage",
    "shift": "Proportions: pseudobulks on a simulated other platform",
    "shift, lineages": "Proportions: the same, by lineage, on a simulated other platform",
    "real bulk": "Proportions: real bulk against measured fractions",
    "fold changes": "Changes between conditions inside cell types",
}
# Every method in the order and colour that it has in all panels: ours, real cells, then baselines.
METHOD_COLORS = {
    "bulk2sc": "#D55E00",
    "calibrated": "#E69F00",
    "other real cells": "#000000",
    "unseen real cells": "#7F7F7F",
    "perfect model": "#009E73",
    "cell-type NB": "#0072B2",
    "scDesign2 copula": "#5A0069",
    "scVI": "#56B4E9",
    "published recipe": "#CC79A7",
    "DWLS": "#009E73",
    "MuSiC": "#0072B2",
    "MuSiC, no ribosomal/mitochondrial": "#56B4E9",
    "BayesPrism": "#CC79A7",
    "dtangle": "#5A0069",
    "nu-SVR": "#4B3C00",
    "NNLS": "#7F7F7F",
}
LAST = "constant answer"  # below all others: what needs no method
OTHER_COLOR = "#4B5A69"  # of a method without a colour of its own
PANELS = 4  # beside each other


def method_order(methods):
    """Methods in their fixed order: those of METHOD_COLORS, others as given, the constant last."""
    known = list(METHOD_COLORS)

    def place(name):
        if name.startswith(LAST):
            return 2 * len(known)
        return known.index(name) if name in known else len(known) - name.startswith("bulk2sc") / 2

    methods = list(dict.fromkeys(methods))
    ours = [name for name in methods if name.startswith("bulk2sc")]
    return ours + sorted((name for name in methods if name not in ours), key=place)


def group_metrics(table):
    """Headings -> metrics, in the order of the picture. table: see :func:`write_evaluation`."""
    groups = {}
    for setting, part in table.groupby("setting", sort=False):
        for metric in dict.fromkeys(part["metric"]):
            heading = SETTINGS.get(setting, f"Proportions: {setting}")
            if setting == "":
                starts = CELL_GROUPS.items()
                rest = list(CELL_GROUPS)[-1]
                heading = next((name for name, s in starts if s and metric.startswith(s)), rest)
            groups.setdefault(heading, []).append(metric)
    order = {name: i for i, name in enumerate([*CELL_GROUPS, *SETTINGS.values()])}
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))


def direction_text(metric, best, smallest):
    """Which way a metric is better. best: its best value. smallest: that is drawn."""
    if best == 0 and smallest >= 0:
        return "lower is better, 0 is best"
    if best == 1 and not any(word in metric for word in ("ratio", "slope")):  # may be above 1
        return "higher is better, 1 is best"
    return f"{best:g} is best"


def write_evaluation(path, table):
    """Write the metrics as one picture: a panel for each metric, a dot for each method.

    Args:
        path: ending in .png, .pdf or .svg.
        table: data frame with the columns metric, best, method, mean, std, setting and, if it is
            known, n, the draws or trainings that mean and std are over; std may be NaN. The metrics
            of each setting have rows of panels of their own.
    """
    rows = []  # of panels: heading, their metrics, and the methods that any of them has
    for heading, metrics in group_metrics(table).items():
        methods = method_order(table.loc[table["metric"].isin(metrics), "method"])
        parts = [metrics[i : i + PANELS] for i in range(0, len(metrics), PANELS)]
        rows += [(heading if part is parts[0] else "", part, methods) for part in parts]
    letters = max(min(len(plain_text(name)), 24) for name in table["method"])
    heights = [h for _, _, methods in rows for h in (0.3, 0.85 + 0.22 * len(methods))]
    size = (2.3 * PANELS + 0.07 * letters, sum(heights) + 0.4)
    figure = pyplot().figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2 * len(rows), PANELS, height_ratios=heights)
    for i, (heading, metrics, methods) in enumerate(rows):
        title = figure.add_subplot(grid[2 * i, :])
        title.axis("off")
        title.text(0, 0, heading, fontsize=11.5, weight="bold", va="bottom", in_layout=False)
        for j, metric in enumerate(metrics):
            axis = figure.add_subplot(grid[2 * i + 1, j])
            draw_metric(axis, table[table["metric"] == metric], metric, methods)
            if j:
                axis.set_yticklabels([])
    figure.supxlabel(error_text(table), fontsize=9)
    write_whole_figure(path, figure)


def error_text(table):
    """What dots, bars and dashed lines of the picture are."""
    over = ""
    if "n" in table and len(numbers := sorted({int(n) for n in table["n"] if n > 1})):
        over = f" over {' or '.join(map(str, numbers))} trainings or draws"
    return f"dot: mean; bar: ± standard deviation{over} (none: measured once); dashed: best value"


def draw_metric(axis, table, metric, methods):
    """Draw one metric, a line for each of the methods (as far as they have it), the best dashed."""
    best = table["best"].iloc[0]
    axis.axvline(best, color="0.55", lw=1, ls="--", zorder=0)
    for i, name in enumerate(methods):
        if name.startswith("bulk2sc"):
            axis.axhspan(i - 0.42, i + 0.42, color="#D55E00", alpha=0.12, lw=0, zorder=-1)
    for row in table.itertuples():
        i = methods.index(row.method)
        ours = row.method.startswith("bulk2sc")
        color = METHOD_COLORS.get(row.method, METHOD_COLORS["bulk2sc"] if ours else OTHER_COLOR)
        std = None if np.isnan(row.std) else row.std  # NaN: measured once
        style = {"fmt": "D" if ours else "o", "ms": 6 if ours else 4.5, "capsize": 2.5, "lw": 1.3}
        axis.errorbar(row.mean, i, xerr=std, color=color, **style)
    names = [fill(plain_text(name), 24) for name in methods]
    axis.set_yticks(range(len(methods)), names, fontsize=8, linespacing=0.9)
    for name, label in zip(methods, axis.get_yticklabels(), strict=True):
        label.set_weight("bold" if name.startswith("bulk2sc") else "normal")
    axis.set_ylim(len(methods) - 0.4, -0.6)  # the first method on top
    axis.margins(x=0.08)
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel(direction_text(metric, best, table["mean"].min()), fontsize=8.5)
    name = metric.removeprefix("proportions ").partition(", ")
    is_proportion = metric.startswith("proportions ")
    shown = name[0] if is_proportion else metric
    axis.set_title(fill(plain_text(shown, 80), 34), fontsize=9.5)
    axis.spines[["top", "right"]].set_visible(False)
