"""A report of one run on bulk samples: a single HTML page that needs no network and no script.

It says what was read, how the samples fit, which proportions were estimated, what the cells look
like, and what they must not be taken for.

Notation in shape comments: S samples, N shown cells, K cell types, G genes, D latent dimensions.
"""

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
import scipy.sparse as sp
import torch

from counts.markers import markers_of_profiles
from data import log_normalise
from deconvolution.fit import MISFIT
from plots.cells import bare, draw_markers, scatter, tsne
from plots.proportions import draw_intervals
from plots.style import ORIGIN_COLORS, plain_text, pyplot, type_colors
from runtime.writing import write_whole

N_SHOWN = 1200  # cells in pictures: enough to see shapes, and t-SNE takes seconds
N_VARIABLE = 1000  # genes of the picture beside the reference
N_BACKGROUND = 500  # positions drawn from the reference
MIN_CELLS = 10  # shown cells of a type, for a mean of them
MAX_ROWS = 500  # of a table; the csv beside the report has all

LABELLED = 30  # samples that have their names beside each panel

SHARED = "#c9ced6"  # grey of what is not coloured


class ShownCells:
    """A sample of the generated cells, evenly spaced, whose counts are kept for the report."""

    def start(self, n_cells, n_genes, n_latent):
        """Choose among n_cells that are to come."""
        last, n = max(n_cells - 1, 0), min(n_cells, N_SHOWN)
        self.chosen, self.n_seen = np.unique(np.linspace(0, last, n, dtype=int)), 0
        self.counts = [sp.csr_matrix((0, n_genes), dtype=np.int32)]
        self.latent = [np.zeros((0, n_latent), np.float32)]
        self.cell_type, self.bulk = [np.zeros(0, int)], [np.zeros(0, int)]

    def add(self, cells):
        """Keep those of generated Cells that were chosen."""
        n = len(cells.cell_type)
        rows = self.chosen[(self.chosen >= self.n_seen) & (self.chosen < self.n_seen + n)]
        rows = rows - self.n_seen
        self.n_seen += n
        for chunks, values in (
            (self.counts, cells.counts),
            (self.latent, cells.latent),
            (self.cell_type, cells.cell_type),
            (self.bulk, cells.bulk),
        ):
            chunks.append(values[rows])

    def all(self):
        """Counts (N x G) CSR, latents (N, D), codes (N) and indices of samples (N)."""
        parts = self.latent, self.cell_type, self.bulk
        return sp.vstack(self.counts, format="csr"), *(np.concatenate(part) for part in parts)


# --------------------------------------------------------------------------------------- pictures


def as_uri(figure, kind, dpi=150):
    """A figure as the address of an inline picture; kind: ``svg`` or ``png``. It is closed."""
    buffer = io.BytesIO()
    options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": dpi}
    figure.savefig(buffer, format=kind, bbox_inches="tight", **options)
    pyplot().close(figure)
    kind = "svg+xml" if kind == "svg" else kind
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def proportions_picture(proportions):
    """A panel for each cell type: proportion and 90 % interval in each sample.

    Of more samples than LABELLED each panel has its own order, by the proportion: of a cohort, how
    far a type spreads is more to see than noise in the order of the file.
    """
    S, K = proportions.cells.shape
    n_columns, is_many = min(K, 4), S > LABELLED
    n_rows = -(-K // n_columns)
    height = 2.4 if is_many else max(0.65 + 0.17 * S, 1.5)
    grid = {"sharey": True, "squeeze": False, "figsize": (11, height * n_rows)}
    figure, axes = pyplot().subplots(n_rows, n_columns, **grid)
    colors, rows = type_colors(proportions.cell_types), np.arange(S)
    for k, (axis, name) in enumerate(zip(axes.flat, proportions.cell_types, strict=False)):
        order = np.argsort(-proportions.cells[:, k], kind="stable") if is_many else rows
        draw_intervals(axis, proportions, (order, k), rows, [colors[name]] * S, n_ticks=4)
        axis.set_title(plain_text(name), fontsize=9)
        axis.set(xlim=(0, None), ylim=(S - 0.4, -0.6), yticks=[])
        if not is_many:
            axis.set_yticks(rows, [plain_text(name, 18) for name in proportions.names], fontsize=8)
    for axis in axes[:, 0] if is_many else ():
        axis.set_ylabel(f"{S:,} samples, sorted", fontsize=8)
    for axis in axes.flat[K:]:
        axis.set_visible(False)
    figure.supxlabel("fraction of the cells of a sample", fontsize=9)
    figure.tight_layout()
    return as_uri(figure, "svg" if S * K < 2000 else "png")


def cloud_picture(latent, codes, bulk, background, names, cell_types):
    """Latent positions of cells in one t-SNE with the reference's clouds: by type and by sample.

    Args:
        latent: (N, D). codes, bulk: types and samples of the cells (N). background: positions
            drawn from the reference's types (M, D). names: samples (S). cell_types: names (K).
    """
    xy = tsne(np.concatenate([latent, background]), max_iter=500)
    panels = {
        "by cell type": (codes, cell_types, list(type_colors(cell_types).values())),
        "by sample": (bulk, names, sample_colors(len(names))),
    }
    return tsne_picture(xy, panels)


def joint_picture(generated, codes, reference, cell_types):
    """Generated cells and cells of the reference in one t-SNE: by origin, and by cell type.

    Args:
        generated, reference: log(CP10K + 1) (N x G) and (M x G), CSR, in genes of both. codes:
            types of the generated cells (N).
    """
    from sklearn.decomposition import PCA

    both = sp.vstack([generated, reference], format="csr")
    variance = np.asarray(both.multiply(both).mean(axis=0) - np.square(both.mean(axis=0))).ravel()
    both = both[:, np.argsort(-variance, kind="stable")[:N_VARIABLE]].toarray()
    n_components = min(20, *(np.array(both.shape) - 1))
    xy = tsne(PCA(n_components, random_state=0).fit_transform(both))
    colors = list(type_colors(cell_types).values())
    is_generated = (np.arange(len(xy)) < len(codes)).astype(int)
    panels = {
        "by origin": (is_generated, ("reference", "generated"), ORIGIN_COLORS[2]),
        "generated cells by cell type": (codes, cell_types, colors),
    }
    return tsne_picture(xy, panels)


def tsne_picture(xy, panels):
    """Panels of one t-SNE (M, 2): the first points in colours, those behind them in grey.

    panels: title -> codes of the first points (N), and names and colours of the codes.
    """
    figure, axes = pyplot().subplots(1, len(panels), figsize=(11, 5))
    for axis, (title, (codes, names, colors)) in zip(axes, panels.items(), strict=True):
        if len(codes) < len(xy):
            axis.scatter(*xy[len(codes) :].T, s=6, c=SHARED, lw=0, label="reference")
        scatter(axis, xy[: len(codes)], [colors[k] for k in codes])
        for k in np.unique(codes)[:20]:
            axis.scatter([], [], s=25, color=colors[k], label=plain_text(names[k], 30))
        axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        bare(axis)
        axis.set_title(title)
    figure.tight_layout()
    return as_uri(figure, "png")


def sample_colors(n):
    """Colours of n samples, in order."""
    colors = pyplot().get_cmap("turbo")(np.linspace(0.05, 0.95, max(n, 2)))
    return [tuple(color) for color in colors[:n]]


def marker_picture(X, codes, markers, genes, cell_types):
    """Dots: mean log(CP10K + 1) and share of cells with the gene, of types with MIN_CELLS.

    Args:
        X: log(CP10K + 1) (N x G), CSR. codes: types (N). markers: of each type (K lists).
    """
    columns = [genes.index(gene) for own in markers for gene in own]
    shown = np.flatnonzero(np.bincount(codes) >= MIN_CELLS)
    X = X[:, columns].toarray()  # (N, markers)
    mean = np.stack([X[codes == k].mean(axis=0) for k in shown])
    fraction = np.stack([(X[codes == k] > 0).mean(axis=0) for k in shown])
    named = dict(zip(cell_types, markers, strict=True))
    figure = draw_markers((mean[None], fraction[None]), named, [cell_types[k] for k in shown])
    return as_uri(figure, "svg")


# ----------------------------------------------------------------------------------------- tables


def proportion_rows(proportions):
    """Rows of the table of proportions: sample, type, percentages and how they came about."""
    table = proportions.to_table().head(MAX_ROWS)
    rows = []
    for row in table.itertuples():
        has_interval = np.isfinite(row.low) and not getattr(row, "known", False)
        rows.append(
            {
                "sample": row.sample,
                "cell_type": row.cell_type,
                "proportion": f"{row.proportion:.1%}",
                "interval": f"{row.low:.1%} to {row.high:.1%}" if has_interval else "",
                "rna": f"{row.rna_fraction:.1%}",
                "known": bool(getattr(row, "known", False)),
                "width": round(100 * row.proportion, 1),
            }
        )
    return rows


def fit_rows(samples):
    """Rows of the table of fit: those with something to be said first, then the worst misfit."""
    rows, agreement = [], samples.fit.get("agreement", np.full(len(samples.fit), np.nan))
    agreement = np.asarray(agreement)  # nan without cells
    for i, (name, row) in enumerate(samples.fit.iterrows()):
        remarks = []
        if samples.is_shallow[i]:
            remarks.append("too few counts for the fit to be told")
        elif row["misfit"] > MISFIT:
            remarks.append("not what the reference's cell types add up to")
        if samples.unknown.is_flagged[i]:
            remarks.append(
                f"much RNA of types that the reference lacks: {samples.unknown.describe(i)}"
            )
        rows.append(
            {
                "sample": name,
                "correlation": f"{row['correlation']:.3f}",
                "misfit": "" if np.isnan(row["misfit"]) else f"{row['misfit']:.1f}",
                "unknown": f"{row['unknown']:.1%}",
                "interval": f"{row['unknown_low']:.1%} to {row['unknown_high']:.1%}",
                "agreement": "" if np.isnan(agreement[i]) else f"{agreement[i]:.3f}",
                "remark": "; ".join(remarks),
            }
        )
    misfit = samples.fit["misfit"].fillna(-np.inf).to_numpy()
    order = sorted(range(len(rows)), key=lambda i: (not rows[i]["remark"], -misfit[i]))
    return [rows[i] for i in order[:MAX_ROWS]]


CALIBRATION = {
    "none": "Cells take the proportions of their sample and, if the reference was of several "
    "samples, the state of their cell type in it. Nothing else of the bulk shows in them.",
    "uniform": "One factor for each gene, the same in all cell types, makes the cells of a sample "
    "add up to its bulk. What the platform changes is part of it.",
    "types": "What a gene differs by in a sample was allotted to its cell types and to the "
    "platform, that is to what all samples share against the reference.",
}
PLATFORM = {
    "keep": " Cells show the platform's part as the bulks do.",
    "remove": " The platform's part is left out: cells are as the reference's platform measures.",
    "none": " Nothing was taken for the platform's, as asked for.",
}


def describe_cells(samples, cells, shown, reference):
    """What the page says of generated cells: tables, numbers and pictures."""
    decoder, genes, names = samples.model.decoder, samples.model.genes, samples.names
    cell_types = samples.proportions.cell_types
    X, latent, codes, bulk = shown.all()
    means = decoder.type_means().cpu().numpy()  # (K, G)
    markers = markers_of_profiles(means / means.sum(axis=1, keepdims=True), genes)
    background = draw_background(decoder, torch.Generator(decoder.mu.device).manual_seed(0))
    pictures = {}
    if len(codes) > 10:
        pictures["clouds"] = cloud_picture(latent, codes, bulk, background, names, cell_types)
        if reference is not None:
            X_reference, measured = reference
            logs = [log_normalise(part[:, measured]) for part in (X, X_reference)]
            pictures["joint"] = joint_picture(logs[0], codes, logs[1], cell_types)
        if any(markers) and (np.bincount(codes) >= MIN_CELLS).any():
            log = log_normalise(X)
            pictures["markers"] = marker_picture(log, codes, markers, genes, cell_types)
    return {
        "counts": type_rows(cells, set(codes), codes, X, markers),
        "n_cells": cells.n_obs,
        "n_shown": len(codes),
        "n_background": len(background),
        "pictures": pictures,
        "agreement": samples.fit["agreement"].median() if cells.n_obs else None,
    }


def draw_background(decoder, generator):
    """Latent positions of the reference's cell types, as many of each (M, D)."""
    K = len(decoder.mu)
    codes = torch.arange(K, device=decoder.mu.device).repeat_interleave(max(N_BACKGROUND // K, 1))
    with torch.inference_mode():
        z = decoder.sample_latent(decoder.mu[codes], decoder.var[codes], codes, generator)
    return z.cpu().numpy()


def type_rows(cells, shown, codes, X, markers):
    """Rows of the table of cells: of each type, how many, and how many counts and genes they have.

    Args:
        cells: AnnData of all cells. shown: types that have shown cells. codes: their types (N). X:
            their counts (N x G), CSR. markers: of each type (K lists).
    """
    depth, n_genes = np.asarray(X.sum(axis=1)).ravel(), np.diff(X.indptr)
    rows = []
    for k, (name, n) in enumerate(cells.obs["cell_type"].value_counts(sort=False).items()):
        row = {"cell_type": name, "n": f"{n:,}", "markers": ", ".join(markers[k])}
        if k in shown:
            row["counts"] = f"{np.median(depth[codes == k]):,.0f}"
            row["genes"] = f"{np.median(n_genes[codes == k]):,.0f}"
        rows.append(row)
    return rows


def write_report(path, run, samples, cells, shown, lines, n_read, reference=None):
    """Write the report of a run.

    Args:
        path: of the page. run: dict with ``settings`` and ``provenance``. samples: BulkSamples.
            cells: AnnData of all cells without counts, and shown: ShownCells; None of both if
            there are none. lines: that the run printed; the first n_read say what was read.
        reference: counts of some cells of the reference in the decoder's genes (M x G), CSR, and
            the mask of those that it has (G).
    """
    proportions, pictures, about_cells = samples.proportions, {}, {}
    genes, cell_types = samples.model.genes, proportions.cell_types
    if cells is not None:
        about_cells = describe_cells(samples, cells, shown, reference)
        pictures = about_cells.pop("pictures")
    pictures["proportions"] = proportions_picture(proportions)
    calibrate, platform = samples.calibration
    fit = fit_rows(samples)
    remarked = samples.unknown.is_flagged | samples.is_shallow | (samples.fit["misfit"] > MISFIT)
    calibration = CALIBRATION[calibrate] + PLATFORM[platform] * (calibrate == "types")
    warned = [line for line in lines if line.startswith("warning: ")]
    page = template().render(
        run=run["provenance"],
        settings=run["settings"],
        files=run["provenance"]["files"].to_dict("records"),
        lines=[line for line in lines[:n_read] if line not in warned],
        warnings=[line.removeprefix("warning: ") for line in warned],
        n_samples=len(samples.names),
        n_genes=len(genes),
        n_types=len(cell_types),
        n_reference=0 if reference is None else reference[0].shape[0],
        n_rows=len(samples.names) * len(cell_types),
        max_rows=MAX_ROWS,
        misfit=MISFIT,
        min_cells=MIN_CELLS,
        proportions=proportion_rows(proportions),
        fit=fit,
        n_remarks=f"{remarked.sum():,}",
        calibration=calibration,
        pictures=pictures,
        has_cells=cells is not None,
        **about_cells,
    )
    write_whole(path, lambda part: part.write_text(page, encoding="utf-8"))


def template():
    """The page's template; what is filled in is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")
