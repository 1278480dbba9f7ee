"""Annotate cells with cell types, without R: ScType's clusters, then each cell by its transcripts.

    python annotate.py --data pbmc1k_v3
    python annotate.py --data liver.h5ad --db ScTypeDB_full.xlsx --tissue Liver --out liver

Names clusters as scType.R does, by the same score on the same kind of clusters (Ianevski, Giri and
Aittokallio, Nature Communications 2022). Then it checks every cell by the transcripts of the
lineages (see annotation/cell_types.py), if tables/cell_types.csv knows the tissue's types;
``--method sctype`` keeps ScType's names. Writes barcode_to_celltype.csv, clusters.csv and
clusters.png to --out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from readers.counts import EMBEDDED, read_counts
from runtime.errors import InputError
from runtime.flags import check_least, in_groups
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "data tissue db types",
        "output": "out export",
        "cell types": "method min_confidence min_cells",
        "clusters": "resolution dims n_genes n_neighbors",
    }
)
@dataclass
class Settings:
    """Annotate cells with cell types by the ScType score and the cells' own transcripts.

    Example: python annotate.py --data pbmc1k_v3
    """

    data: str = EMBEDDED
    """Cells: a 10x folder (matrix.mtx), a 10x .h5 or an .h5ad with raw counts."""
    tissue: str = "Immune system"
    """One of the marker table's tissues."""
    db: str = "tables/markers.csv"
    """Marker table: a csv, ScType's xlsx, or the address of one.
    An address is downloaded once and kept in the current folder."""
    method: Literal["refined", "sctype"] = "refined"
    """refined: check each cell after ScType's clusters. sctype: the clusters' names as they are."""
    types: Path | None = None
    """Lineages, Cell Ontology terms and markers of the cell types, for --method refined.
    Default: tables/cell_types.csv."""
    min_confidence: float = 0.8
    """Cells whose lineage is less probable than this are Unknown, for --method refined."""
    min_cells: int = 10
    """Cells of a type with fewer are Unknown, for --method refined: no model can learn of them."""
    out: Path | None = None
    """Folder to write to. Default: where the data is, unless cell types are there already."""
    resolution: float = 0.8
    """Resolution of the clustering; a higher one gives more and smaller clusters."""
    dims: int = 10
    """Principal components that clustering and UMAP read."""
    n_genes: int = 2000
    """Highly variable genes that the PCA reads."""
    n_neighbors: int = 20
    """Neighbours of each cell in the graph that is clustered."""
    seed: int = 0
    """Seed of PCA, clustering and UMAP."""
    export: Path | None = None
    """Only write the counts to this folder in 10x layout, for scType.R or other tools."""

    def __post_init__(self):
        check_least(self, ("dims", "n_genes", "n_neighbors", "min_cells"))
        if not 0 < self.resolution < float("inf"):
            raise InputError(f"--resolution: found {self.resolution}, expected a number above 0")
        if not 0 <= self.min_confidence <= 1:
            raise InputError(f"--min-confidence: found {self.min_confidence}, expected 0 to 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed: found {self.seed}, expected 0 to 4294967295")


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import re
import urllib.error
import urllib.request
import warnings

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors

from annotation.cell_types import UNKNOWN, read_cell_types, scale_genes, type_cells
from counts.genes import choose_genes
from data import TABLES, library_size, log_normalise, shipped
from plots.cells import write_clusters
from readers.bounded import read_excel, read_table
from readers.gene_names import bare_id
from readers.labels import LABEL_FILE
from runtime.cell_writers import FolderWriter, open_folder
from runtime.compression import CompressionQueue
from runtime.errors import one_line, some
from runtime.writing import check_writable, write_whole

# Of the marker table, in ScType's spelling; the last two are positive and negative markers.
COLUMNS = ["tissueType", "cellName", "geneSymbolmore1", "geneSymbolmore2"]


# ----------------------------------------------------------------------------------- marker table


def fetch(db):
    """Path of the marker table; an address is downloaded once, into the current folder."""
    if not re.match(r"(https?|ftp|file)://", db):
        path = shipped(db)
        if not path.is_file():
            raise InputError(f"{db}: no such file, expected a marker table for --db")
        return path
    path = Path(Path(re.sub(r"[?#].*", "", db)).name)
    if not path.is_file():
        try:
            with urllib.request.urlopen(db, timeout=60) as response:
                content = response.read()
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise InputError(f"{db}: could not be downloaded for --db ({error})") from error
        write_whole(path, lambda part: part.write_bytes(content))
        print(f"{db}: downloaded, kept as {path}")
    return path


def read_markers(db, tissue):
    """Marker genes of a tissue from a table with the columns ``COLUMNS``, comma-separated genes.

    Rows of one cell type are joined. Symbols are compared in capitals, so that a table of human
    symbols also serves mouse data.

    Args:
        db: path or address of a csv or xlsx. tissue: one of its tissues.

    Returns:
        dict: cell type -> (positive, negative), two lists of gene symbols.

    Raises:
        InputError: unreadable, columns missing, or no such tissue.
    """
    path = fetch(db)
    if path.suffix.lower() == ".xlsx":
        try:
            table = read_excel(path, dtype=str, keep_default_na=False)
        except Exception as error:
            raise InputError(f"{path}: not a readable Excel table ({one_line(error)})") from error
    else:
        table = read_table(path)
    if missing := [name for name in COLUMNS if name not in table]:
        raise InputError(
            f"{path}: no column {', '.join(missing)}, expected a marker table with "
            f"{', '.join(COLUMNS)}"
        )
    tissues = sorted(set(table["tissueType"]) - {""})
    if tissue not in tissues:
        raise InputError(f"--tissue {tissue}: not in {path}, which knows {', '.join(tissues)}")
    markers = {}
    rows = table.loc[table["tissueType"] == tissue, COLUMNS]
    for _, name, *columns in rows.itertuples(index=False):
        positive_negative = markers.setdefault(name.strip(), ([], []))
        for markers_of_sign, text in zip(positive_negative, columns, strict=True):
            symbols = re.sub(r"\s", "", text).upper().split(",")
            known = {"", "NA", *markers_of_sign}
            markers_of_sign += [g for g in dict.fromkeys(symbols) if g not in known]
    return markers


# ------------------------------------------------------------------------------------------- score


def sctype_scores(z, genes, markers):
    """ScType scores (K, N) of cells by the markers of K cell types.

        score_kc = Σ_{g in P_k} s_g z_gc / √|P_k| − Σ_{g in N_k} s_g z_gc / √|N_k|
        s_g = 1 − (n_g − 1) / (K − 1)

    P_k, N_k: positive and negative markers of type k that the data has; n_g: how many types have
    gene g as a positive marker. A gene that is only ever negative has s_g = 1.

    Args:
        z: expression scaled to mean 0 and variance 1 over all cells (N, G). genes: names (G).
        markers: as :func:`read_markers` gives them.
    """
    positive, negative = zip(*markers.values(), strict=True)
    n_types = pd.Series([g for p in positive for g in set(p)], dtype=object).value_counts()  # n_g
    sensitivity = 1 - (n_types - 1) / max(len(markers) - 1, 1)
    genes = pd.Index(genes).str.upper()
    s = sensitivity.reindex(genes).fillna(1.0).to_numpy(float)  # (G)
    weights = marker_weights(positive, genes, s) - marker_weights(negative, genes, s)  # (K, G)
    return weights @ np.asarray(z, float).T  # (K, N)


def marker_weights(marker_sets, genes, sensitivity):
    """s_g / √|P_k| at the markers of each type that the data has, else 0 (K, G)."""
    member = np.array([genes.isin(list(symbols)) for symbols in marker_sets], float)  # (K, G)
    return member * sensitivity / np.sqrt(np.maximum(member.sum(axis=1, keepdims=True), 1))


def name_clusters(scores, cell_types, clusters):
    """Name each cluster by its best type, or Unknown, and list its three best types.

    A cluster's score is the sum over its cells. Below a quarter of their number it is Unknown.

    Args:
        scores: (K, N). cell_types: names (K). clusters: integer codes (N).

    Returns:
        DataFrame: cluster, cells, cell_type, rank, candidate, score; up to three rows a cluster.
    """
    rows = []
    for cluster in np.unique(clusters):
        in_cluster = clusters == cluster
        n_cells = in_cluster.sum()
        total = scores[:, in_cluster].sum(axis=1)  # (K)
        best = np.argsort(-total, kind="stable")[:3]
        name = "Unknown" if total[best[0]] < n_cells / 4 else cell_types[best[0]]
        for rank, k in enumerate(best, 1):
            rows.append((cluster, n_cells, name, rank, cell_types[k], round(total[k], 3)))
    return pd.DataFrame(
        rows, columns=["cluster", "cells", "cell_type", "rank", "candidate", "score"]
    )


# ---------------------------------------------------------------------------------------- clusters


def shared_neighbors(pcs, k):
    """Graph of cells by the neighbours they share, as Seurat builds it: CSR (N x N).

        w_ij = |N_i ∩ N_j| / |N_i ∪ N_j|, 0 below 1/15

    N_i: the k nearest cells of cell i, with i itself. pcs: (N, D).
    """
    A = NearestNeighbors(n_neighbors=k).fit(pcs).kneighbors_graph(pcs)  # (N x N)
    shared = (A @ A.T).tocsr()
    shared.data /= 2 * k - shared.data
    shared.data[shared.data < 1 / 15] = 0
    shared.setdiag(0)
    shared.eliminate_zeros()
    return shared


def cluster_cells(cells, cfg):
    """Log-normalise, choose variable genes, and cluster the cells by their PCs.

    As Seurat does, with Leiden in place of Louvain.

    Returns:
        AnnData of log-normalised cells with ``.obs["cluster"]`` (codes by falling size),
        ``.obsm["X_umap"]`` and ``.obsm["X_pca"]``.
    """
    n_pcs = min(50, cells.n_obs - 1, cells.n_vars - 1, cfg.n_genes - 1)
    if n_pcs < cfg.dims:
        raise InputError(
            f"--dims: found {cfg.dims}, expected at most {max(n_pcs, 0)} for {cells.n_obs} cells"
        )
    log = cells.copy()
    log.X = log_normalise(cells.X, dtype=np.float32)  # as scanpy does by default
    variable = anndata.AnnData(scale_genes(log[:, choose_genes(cells, cfg.n_genes)].X))
    sc.pp.pca(variable, n_comps=n_pcs, random_state=cfg.seed)
    k = min(cfg.n_neighbors, cells.n_obs - 1)
    sc.tl.leiden(
        variable,
        resolution=cfg.resolution,
        random_state=cfg.seed,
        flavor="igraph",
        n_iterations=-1,
        directed=False,
        adjacency=shared_neighbors(variable.obsm["X_pca"][:, : cfg.dims], k),
    )
    sc.pp.neighbors(variable, n_neighbors=k, n_pcs=cfg.dims, random_state=cfg.seed)
    sc.tl.umap(variable, random_state=cfg.seed)
    _, codes, size = np.unique(variable.obs["leiden"], return_inverse=True, return_counts=True)
    log.obs["cluster"] = np.argsort(np.argsort(-size, kind="stable"))[codes]
    log.obsm["X_umap"] = variable.obsm["X_umap"]
    log.obsm["X_pca"] = variable.obsm["X_pca"]
    return log


# --------------------------------------------------------------------------------- input and output


def export_10x(cells, folder):
    """Write counts as a 10x folder in the layout of Cell Ranger 3; each file whole or not at all.

    The first column of features.tsv.gz holds ids, the second symbols, whichever of them is the
    cells' gene name. A gene with a single name has it in both.
    """
    names = zip(cells.var_names, cells.var["gene_ids"], strict=True)
    pairs = [(n, other or n) if bare_id(n) else (other or n, n) for n, other in names]
    ids, symbols = zip(*pairs, strict=True)
    with open_folder(folder) as files, CompressionQueue() as queue:
        writer = FolderWriter(folder, cells.n_obs, queue, symbols, ids, *files)
        writer.append(cells.X)
        writer.write_tables(cells)


def output_folder(cfg):
    """--out, or the folder of the data.

    Raises:
        InputError: without --out, if cell types are there already.
    """
    if cfg.out is not None:
        return cfg.out
    source = Path(cfg.data)
    folder = source if source.is_dir() or cfg.data == EMBEDDED else source.parent
    if (folder / LABEL_FILE).exists():
        raise InputError(
            f"{folder / LABEL_FILE}: cell types are there already; name the folder with --out to "
            "write over them"
        )
    return folder


def read_cells(cfg):
    """AnnData of raw counts; cells without any are left out."""
    cells = read_counts(cfg.data)
    if (empty := library_size(cells.X) == 0).any():
        print(f"{cfg.data}: {empty.sum():,} cells without a single count left out")
        cells = cells[~empty].copy()
    print(f"{cfg.data}: {cells.n_obs:,} cells x {cells.n_vars:,} genes")
    return cells


def match_markers(cells, markers, cfg):
    """Find the marker genes among the genes of the data, by name or, if those are ids, by symbol.

    Returns:
        names of all genes in capitals (G) and a mask of the markers among them (G).

    Raises:
        InputError: the data has none of the markers.
    """
    symbols = {g for positive, negative in markers.values() for g in (*positive, *negative)}
    names = [pd.Index(n).str.upper() for n in (cells.var_names, cells.var["gene_ids"])]
    names = max(names, key=lambda n: n.isin(symbols).sum())
    is_marker = names.isin(symbols)
    if not is_marker.any():
        raise InputError(
            f"{cfg.db}: none of its {len(symbols)} markers ({some(sorted(symbols))}) is a gene of "
            f"the data ({some(cells.var_names)})"
        )
    print(
        f"{cfg.db}: {len(markers)} cell types of {cfg.tissue}; {len(set(names[is_marker]))} of "
        f"{len(symbols)} markers are genes of the data"
    )
    return names, is_marker


def types_to_refine(cfg, markers):
    """The tree of cell types, or None if ScType's names are to stay; says so if they must."""
    if cfg.method == "sctype":
        return None
    path = cfg.types or TABLES / "cell_types.csv"
    types = read_cell_types(path, cfg.tissue)
    if missing := [name for name in markers if name not in types]:
        print(
            f"{path}: no lineage of {some(missing)} of {cfg.tissue}; cells keep the names of "
            "their clusters, as with --method sctype"
        )
        return None
    return types


def refine_labels(cells, clustered, labels, genes, types, cfg):
    """Check each cell by its transcripts, and print what that changed.

    Args:
        cells, clustered: counts and what :func:`cluster_cells` made of them. labels: by cluster.
        genes: names in capitals (G). types: of :func:`annotation.cell_types.read_cell_types`.

    Returns:
        ``labels`` with the new cell_type and the columns confidence, lineage, ontology_id,
        ontology_term and sctype (N).
    """
    counts, log = sp.csr_matrix(cells.X), sp.csr_matrix(clustered.X)
    found = type_cells(counts, log, pd.Index(genes), types, clustered.obsm["X_pca"], cfg.seed)
    undecided = (found["lineage_confidence"] < cfg.min_confidence).to_numpy()
    name = leave_out_rare(found["cell_type"].where(~undecided, UNKNOWN), cfg.min_cells).to_numpy()
    rows = [types.get(n) for n in name]
    refined = labels[["barcode"]].assign(
        cell_type=name,
        confidence=found["confidence"].round(3).to_numpy(),
        lineage=[t.lineage if t else UNKNOWN for t in rows],
        ontology_id=[t.ontology_id if t else "" for t in rows],
        ontology_term=[t.ontology_term if t else "" for t in rows],
        sctype=labels["cell_type"],
    )
    print_changes(refined, types)
    return refined


def leave_out_rare(cell_type, min_cells):
    """Cell types (N) in which those of fewer cells are Unknown; the types are reported."""
    size = cell_type[cell_type != UNKNOWN].value_counts()
    rare = size[size < min_cells]
    if len(rare):
        which = ", ".join(f"{n} {name}" for name, n in rare.items())
        print(f"--min-cells {min_cells}: types with fewer cells are Unknown ({which})")
    return cell_type.where(~cell_type.isin(rare.index), UNKNOWN)


def print_changes(refined, types):
    """How many cells of each type have another name, or lineage, than their cluster."""
    known = refined["cell_type"] != UNKNOWN
    renamed = known & (refined["cell_type"] != refined["sctype"])
    lineage = refined["sctype"].map({name: t.lineage for name, t in types.items()})
    moved = known & (refined["lineage"] != lineage)
    unknown = ~known & (refined["sctype"] != UNKNOWN)
    print(
        f"each cell checked by its own transcripts: {renamed.sum():,} of {len(refined):,} renamed, "
        f"{moved.sum():,} of them to another lineage, {unknown.sum():,} undecided"
    )
    counts = pd.DataFrame(
        {
            "cells": refined["cell_type"].value_counts(),
            "of them renamed": refined["cell_type"][renamed].value_counts(),
            "ScType had": refined["sctype"].value_counts(),
        }
    )
    print(counts.fillna(0).astype(int).to_string())


def write_results(out, clustered, table, labels):
    """Write the cell types, the table of clusters and their picture, and print a summary.

    clustered: as :func:`cluster_cells` gives it. table: of :func:`name_clusters`. labels: with
    the columns of LABEL_FILE (N).
    """
    cell_type = labels["cell_type"].to_numpy()
    write_whole(out / LABEL_FILE, lambda path: labels.to_csv(path, index=False))
    write_whole(out / "clusters.csv", lambda path: table.to_csv(path, index=False))
    clusters = clustered.obs["cluster"].to_numpy()
    title = "by ScType" + (", each cell checked" if "confidence" in labels else "")
    write_clusters(out / "clusters.png", clustered.obsm["X_umap"], clusters, cell_type, title)
    print(
        f"wrote {LABEL_FILE}, clusters.csv and clusters.png to {out}: "
        f"{len(set(cell_type) - {UNKNOWN})} cell types, {np.sum(cell_type == UNKNOWN):,} of "
        f"{len(cell_type):,} cells Unknown"
    )


def main(cfg):
    if cfg.export is not None:
        check_writable(cfg.export, "--export")
        cells = read_counts(cfg.data)
        export_10x(cells, cfg.export)
        print(f"wrote {cells.n_obs:,} cells x {cells.n_vars:,} genes to {cfg.export}")
        return
    out = output_folder(cfg)
    check_writable(out)  # rather now than after the clustering
    markers = read_markers(cfg.db, cfg.tissue)  # before the data, as it takes less time
    types = types_to_refine(cfg, markers)
    cells = read_cells(cfg)
    names, is_marker = match_markers(cells, markers, cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        clustered = cluster_cells(cells, cfg)
    z = scale_genes(clustered.X[:, is_marker])  # (N, markers)
    scores = sctype_scores(z, names[is_marker], markers)
    table = name_clusters(scores, list(markers), clustered.obs["cluster"].to_numpy())
    best = table[table["rank"] == 1].set_index("cluster")
    print(best[["cells", "cell_type", "score"]].to_string())
    cell_type = best["cell_type"].reindex(clustered.obs["cluster"]).to_numpy()
    labels = pd.DataFrame({"barcode": clustered.obs_names, "cell_type": cell_type})
    if types is not None:
        labels = refine_labels(cells, clustered, labels, names, types, cfg)
    write_results(out, clustered, table, labels)


if __name__ == "__main__":
    run_script(main, settings)
