"""Which genes are read: variable ones, those that tell cell types or states apart."""

import re

import numpy as np

from data import log_normalise
from runtime.errors import InputError, one_line

# Shares of the genes that a point of the mean-variance trend is fitted to: scanpy's, and wider ones
# for few cells, where a third of the genes has one and the same mean (a single count).
SPANS = (0.3, 0.5, 0.7, 0.9)

# Symbols of genes whose share of a library is the protocol's rather than the cells': proteins of
# the ribosome, the mitochondrial genome, and RNAs that stay in the nucleus (in any case, so that
# mouse is meant, too). Chu et al. (Nature Cancer 2022) leave them out of deconvolution as well.
PROTOCOL_GENES = re.compile(
    r"RP[LS]\d+(A|AL|L|X|Y)?\d*(P\d+)?(-\d+)?|RPLP[0-2]|RPSA|UBA52|FAU|MT-.+|MALAT1|NEAT1",
    re.IGNORECASE,
)

# Ribosomal, mitochondrial and housekeeping genes, which mark no cell type.
HOUSEKEEPING = re.compile(
    r"(MT-|MT(RNR|ND|CO|ATP)\d|M?RP[LS]\d|RPLP\d|RPSA|MRP[LS]|(FTL|FTH1|MALAT1|NEAT1|B2M|TMSB4X|"
    r"TMSB10|ACTB|ACTG1|EEF1A1|EEF1B2|EEF2|TPT1|GAPDH|UBC|UBB|PTMA|FAU|UBA52|TUBA1B|HSP90AB1)$)",
    re.IGNORECASE,
)


def choose_genes(adata, n_genes):
    """Names of the ``n_genes`` most variable genes, in the data's order (all, if there are fewer).

    Ranked by the variance of standardised counts around a fitted mean-variance trend (Stuart et
    al., Cell 2019; scanpy's ``seurat_v3``). It works on raw counts and, unlike the older ranking by
    dispersion, does not favour genes detected in a handful of cells. Give it training cells only.
    The first of SPANS with which the trend can be fitted is taken; few cells need a wide one.

    Raises:
        InputError: the trend cannot be fitted.
    """
    if adata.n_vars <= n_genes:
        return list(adata.var_names)
    import scanpy

    counts = adata.copy()
    counts.X = counts.X.astype(np.float32)
    for span in SPANS:
        try:
            scanpy.pp.highly_variable_genes(
                counts, flavor="seurat_v3", n_top_genes=n_genes, span=span
            )
        except ValueError as error:  # of loess: too few different means within the span
            failure = error
        else:
            return list(adata.var_names[counts.var["highly_variable"]])
    raise InputError(
        f"{n_genes:,} variable genes could not be chosen from {adata.n_obs} cells x "
        f"{adata.n_vars:,} genes ({one_line(failure)}); expected more cells"
    ) from failure


def choose_marker_genes(adata, codes, n_genes, batch=None):
    """Names of the ``n_genes`` genes that best tell the cell types apart, in the data's order.

    Ranked by the variance of log-normalised expression between types over that within them (the F
    of an analysis of variance, up to a factor), with a floor so that a gene detected in one cell
    does not rank first. Give it training cells only.

        F_g = Σ_k f_k (m_gk - m_g)² / (Σ_k f_k v_gk + 0.02)

    with f_k the share of cells of type k, m and v the mean and variance of log1p counts per 10,000.
    With batches it is the geometric mean of (F + 0.05) over them, so that genes must tell types
    apart in each, and all types of a batch count the same. ``PROTOCOL_GENES`` (by name or other
    name) are not among them, unless no others are left. codes: cell types (N). batch: of the cells
    (N), or None.
    """
    usable = ~is_protocol_gene(adata)
    if usable.any():
        adata = adata[:, usable]
    if adata.n_vars <= n_genes:
        return list(adata.var_names)
    log = log_normalise(adata.X)
    if batch is None:
        rank = type_variance(log, codes)
    else:
        parts = (np.flatnonzero(batch == b) for b in np.unique(batch))
        each = [type_variance(log[rows], codes[rows], even=True) for rows in parts]
        rank = np.log(np.stack(each) + 0.05).mean(axis=0)
    best = np.argsort(-rank, kind="stable")[:n_genes]
    return list(adata.var_names[np.sort(best)])


def is_protocol_gene(adata):
    """Mask (G) of the genes that are ``PROTOCOL_GENES`` by name or other name."""
    names = zip(adata.var_names, adata.var["gene_ids"], strict=True)
    return np.array([any(map(PROTOCOL_GENES.fullmatch, pair)) for pair in names])


def type_variance(log, codes, even=False):
    """F (G) of :func:`choose_marker_genes`; log (N x G), codes (N); even: f_k is 1 / K."""
    types, share = np.unique(codes, return_counts=True)
    share = share[:, None] / len(codes)  # (K, 1)
    if even:
        share = np.full_like(share, 1 / len(types))
    parts = [log[np.flatnonzero(codes == k)] for k in types]
    mean = np.stack([np.asarray(p.mean(axis=0)).ravel() for p in parts])  # (K, G)
    square = np.stack([np.asarray(p.multiply(p).mean(axis=0)).ravel() for p in parts])
    between = (share * (mean - (share * mean).sum(axis=0)) ** 2).sum(axis=0)
    within = (share * (square - mean**2)).sum(axis=0)
    return between / (within + 0.02)


def choose_state_genes(adata, codes, sample, n_genes, batch=None):
    """Names of the ``n_genes`` genes that differ most between samples inside the cell types.

        F_g = Σ_sk n_sk ( (m_skg - m_kg)² - v_skg / n_sk ) / Σ_sk n_sk (v_skg + 0.02)

    over samples s and types k with two cells or more, with m and v the mean and variance of log1p
    counts per 10,000; what sampled cells alone would differ by is taken off. ``PROTOCOL_GENES`` are
    not among them. Give it training cells only.

    Args:
        codes, sample: type and sample of each cell (N). batch: of each cell (N), or None; with
            batches m_kg is the mean in the sample's batch.
    """
    log = log_normalise(adata.X)
    above, below = np.zeros(adata.n_vars), np.zeros(adata.n_vars)
    group = codes if batch is None else codes * (batch.max() + 1) + batch
    for k in np.unique(group):
        of_type = np.flatnonzero(group == k)
        mean = np.asarray(log[of_type].mean(axis=0)).ravel()
        for s in np.unique(sample[of_type]):
            part = log[of_type[sample[of_type] == s]]
            if (n := part.shape[0]) < 2:
                continue
            m = np.asarray(part.mean(axis=0)).ravel()
            v = np.asarray(part.multiply(part).mean(axis=0)).ravel() - m**2
            above += n * (m - mean) ** 2 - v
            below += n * (v + 0.02)
    F = np.where(is_protocol_gene(adata), -np.inf, above / np.maximum(below, 1e-9))
    best = np.argsort(-F, kind="stable")[:n_genes]
    return list(adata.var_names[np.sort(best[F[best] > 0])])
