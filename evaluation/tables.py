"""Tables of metrics: mean and std, as printed and as written, and what to conclude of them."""

import numpy as np
import pandas as pd

from evaluation.metrics import METRICS, setting_of
from plots.training import write_evaluation
from runtime.writing import write_whole

NEAR = 0.05  # excess of AUROC, what so few cells cost any model: docs/results.md


def summarise(table, n_weights, known=METRICS):
    """Mean and std of each metric: over trainings if there are several, else over draws.

    Args:
        table: data frame with the columns weights (or what else is to count once, as a donor),
            method, metric, cell_type, value. n_weights: how many of them there are.
        known: best possible value of each metric, in the order of the table.

    Returns:
        data frame with the columns metric, best, cell_type, method, mean, std, n.
    """
    keys = ["metric", "cell_type", "method"]
    if n_weights > 1:
        table = table.groupby([*keys, "weights"], sort=False, as_index=False)["value"].mean()
    table = table.groupby(keys, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    order = {metric: i for i, metric in enumerate(known)}
    # Metrics of all cells first, then each type; a stable sort leaves the methods in their order.
    table = table.sort_values(
        ["cell_type", "metric"],
        key=lambda column: column.map(order) if column.name == "metric" else column,
        kind="stable",
    )
    table.insert(1, "best", table["metric"].map(known))
    return table.rename(columns={"count": "n"}).reset_index(drop=True)


def format_table(table, transpose=False):
    """Mean ± std as printed: a row for each metric with its best value, a column for each method.

    table: of :func:`summarise`, the rows of all cell types together. transpose: a row for each
    method instead.
    """
    text = [
        f"{mean:.4f}" + ("" if np.isnan(std) else f" ± {std:.4f}")
        for mean, std in zip(table["mean"], table["std"], strict=True)
    ]
    wide = table.assign(text=text).pivot(index="metric", columns="method", values="text")
    best = dict(zip(table["metric"], table["best"], strict=True))
    wide = wide.loc[list(best), list(dict.fromkeys(table["method"]))].fillna("")
    wide.index = [f"{metric} ({value:g})" for metric, value in best.items()]
    return (wide.T if transpose else wide).to_string()


def table_of(rows, cell_types, n_weights, known=METRICS):
    """:func:`summarise` of rows (weights, method, metric, type, value).

    A type is a code, the name of a lineage, or None for all types, which the table has as "": an
    empty field in the csv, and a key that groupby keeps. cell_types: names (K).
    """
    names = {None: ""} | dict(enumerate(cell_types))
    rows = [(*row[:3], names.get(row[3], row[3]), row[4]) for row in rows]
    table = pd.DataFrame(rows, columns=["weights", "method", "metric", "cell_type", "value"])
    return summarise(table, n_weights, known)


def write_table(table, folder):
    """Write evaluation.csv, which also has every cell type by itself, and evaluation.png."""
    write_whole(folder / "evaluation.csv", lambda path: table.to_csv(path, index=False))
    overall = table[table["cell_type"] == ""]
    drawn = overall.assign(setting=overall["metric"].map(setting_of))
    write_evaluation(folder / "evaluation.png", drawn)
    print(f"wrote evaluation.csv and evaluation.png to {folder}")


def conclude_cells(mean):
    """What to conclude of the cells, in plain words: lines. mean: of (method, metric)."""

    def read(metric, method):
        return mean.get((method, metric), np.nan)

    forests = [f"random-forest AUROC, {of}" for of in ("PCs", "genes")]
    methods = "bulk2sc", "perfect model", "cell-type NB"
    ours, perfect, simple = (np.array([read(m, method) for m in forests]) for method in methods)
    if np.isnan(perfect).any():
        return []
    verdict = "no more real than cells of independent genes"
    if (ours - perfect).mean() <= NEAR:
        verdict = "about as real as a perfect model's"
    elif ours.mean() < simple.mean():
        verdict = "more real than cells of independent genes, less real than a perfect model's"
    a, b, c = ("{:.2f} and {:.2f}".format(*pair) for pair in (ours, perfect, simple))
    ratio, best, worst = (f"{read('within-type variance ratio', m):.2f}" for m in methods)
    return [
        f"The cells are {verdict}.",
        f"  A classifier tells them from real ones with AUROC {a} (on 20 PCs and on genes; 0.5: it "
        "cannot, 1: always).",
        f"  A perfect model of this size would read {b}; independent genes (cell-type NB), {c}.",
        f"  Cells of a type vary {ratio} times as much as real ones (perfect model {best}, "
        f"cell-type NB {worst}).",
    ]


def conclude_proportions(mean):
    """What to conclude of the proportions, in plain words: lines. mean: of (method, metric)."""
    lines = []
    for _, metric in (key for key in mean.index if key[0] == "bulk2sc"):
        setting = setting_of(metric)
        if not metric.startswith("proportions RMSE") or setting.endswith("lineages"):
            continue
        methods = "bulk2sc", "NNLS", "constant answer"
        ours, nnls, constant = (mean[method, metric] for method in methods)
        verdict = "no better than one answer for all bulks"
        if ours < min(nnls, constant):
            verdict = "better than the simple answers"
        elif ours < constant:
            verdict = "better than one answer for all bulks, not better than NNLS"
        of = {"within": "pseudobulks of held-out cells", "shift": "a simulated other platform"}
        lines.append(
            f"Proportions of {of.get(setting, setting)} are {verdict}: RMSE {ours:.3f}; "
            f"non-negative least squares {nnls:.3f}, the mean truth for all bulks {constant:.3f}."
        )
    return lines


def print_conclusions(table, trainings, cfg):
    """Print what to conclude, before the numbers. table: of :func:`summarise`, all cell types."""
    mean = table.set_index(["method", "metric"])["mean"]
    n_cells = ", ".join(f"{len(reference.test):,}" for _, reference in trainings)
    print(f"\n{n_cells} held-out cells; trainings: {len(trainings)}, draws of each: {cfg.n_draws}")
    print("\n".join([*conclude_cells(mean), *conclude_proportions(mean)]) + "\n")


def print_cells(table, cfg):
    """Print the metrics of cells, all cell types together."""
    n_trainings = 1 + len(cfg.more_weights)
    over = f"{n_trainings} trainings" if n_trainings > 1 else f"{cfg.n_draws} draws"
    print(f"metric (best value), mean ± std over {over}")
    print(format_table(table))


def print_proportions(table):
    """Print a table for each kind of bulks, methods in rows."""
    for setting, part in table.groupby(table["metric"].map(setting_of), sort=False):
        short = part["metric"].str.removeprefix("proportions ").str.removesuffix(f", {setting}")
        print(f"\nproportions, {setting}")
        print(format_table(part.assign(metric=short), transpose=True))
