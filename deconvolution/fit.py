"""How well the reference's cell types, and the generated cells, add up to a bulk.

Notation in shape comments: S bulk samples, G genes.
"""

import numpy as np

# Of the median expressed gene. Bulks that fit, thinned: the misfit is above 4 from 1.2 down, and
# below 3.3 from 1.7 up (25,000 counts over 11,000 genes are 1.5).
MIN_COUNTS = 1.5
MISFIT = 4  # standard deviations beyond pseudobulks of the reference from which users are warned


def log_cpm(bulk, measured, pseudocount):
    """log2(CPM + pseudocount) of bulks (S, G) over the measured genes (G); nan without counts."""
    part = bulk[:, measured]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log2(part / part.sum(axis=1, keepdims=True) * 1e6 + pseudocount)


def bulk_fit(bulk, expected, measured):
    """How well the reference's cell types add up to a bulk, by two measures.

    Args:
        bulk: (S, G), counts, TPM or CPM. expected: (S, G), the sum that the predicted proportions
            make. measured: mask (G) of the genes that the bulk has.

    Returns:
        ``(correlation, unexplained)``, each (S): Pearson correlation of log2(CPM + 10) over genes
        above 30 CPM in either; and the share of these genes far above what is expected (three
        robust standard deviations of the log-ratio) less the share far below. A platform moves
        genes both ways, a cell type that the reference lacks only up.
    """
    logs = (log_cpm(part, measured, pseudocount=10) for part in (bulk, expected))
    correlation, unexplained = np.full(len(bulk), np.nan), np.full(len(bulk), np.nan)
    for i, (b, e) in enumerate(zip(*logs, strict=True)):
        expressed = (b > np.log2(40)) | (e > np.log2(40))
        if expressed.sum() < 10:  # too few for either measure
            continue
        ratio = b[expressed] - e[expressed]
        ratio = ratio - np.median(ratio)
        width = 3 * 1.4826 * np.median(np.abs(ratio))
        unexplained[i] = np.mean(ratio > width) - np.mean(ratio < -width)
        correlation[i] = np.corrcoef(b[expressed], e[expressed])[0, 1]
    return correlation, unexplained


def misfit(correlation, unexplained, reference):
    """The worse of the two measures of fit (S), in standard deviations of the reference's own.

    reference: mean and sd of each on pseudobulks, as train_encoder.py saves them.
    """
    (c_mean, c_sd), (u_mean, u_sd) = reference["correlation"], reference["unexplained"]
    return np.maximum((c_mean - correlation) / c_sd, (unexplained - u_mean) / u_sd)


def counts_of_genes(bulk, expected, measured):
    """Median count (S) that the genes above 30 CPM in expectation have by a bulk's depth.

    bulk, expected: (S, G). measured: mask (G). Infinite for what is no counts, whose depth is
    unknown.
    """
    share = expected[:, measured] / expected[:, measured].sum(axis=1, keepdims=True)
    median = np.nanmedian(np.where(share > 3e-5, share, np.nan), axis=1)
    is_counts = (bulk == np.rint(bulk)).all(axis=1)
    return np.where(is_counts, bulk[:, measured].sum(axis=1) * median, np.inf)


def sum_agreement(bulk, sums, measured):
    """Pearson correlation (S) of log2(CPM + 1), each bulk against the sum of its cells.

    bulk, sums: (S, G). measured: mask (G).
    """
    logs = (log_cpm(part, measured, pseudocount=1) for part in (bulk, sums))
    with np.errstate(invalid="ignore"):  # a sample without cells reads nan
        return np.array([np.corrcoef(*pair)[0, 1] for pair in zip(*logs, strict=True)])
