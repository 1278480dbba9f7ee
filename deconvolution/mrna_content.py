"""How much mRNA a cell of each type holds, and what that makes of a bulk's fractions.

A bulk sees RNA, not cells: a monocyte gives more of it than a T cell, so fractions of RNA must be
divided by the types' mRNA content. For a sum of single cells that is their counts. For RNA-seq of a
tissue it is not: a library of single cells saturates, and cells above some number of counts are
often filtered out, so large cells seem to hold less than they do. There, content measured
otherwise is used (mrna_content.csv).

Notation in shape comments: S samples, K cell types, G genes.
"""

import re

import numpy as np
import pandas as pd

from counts.genes import PROTOCOL_GENES
from data import TABLES

PUBLISHED = TABLES / "mrna_content.csv"
# Proteins of the ribosome: short genes of many transcripts. A library of transcript ends counts
# each of these once, one of whole transcripts counts them by their length.
RIBOSOMAL = re.compile(r"RP[LS]\d+(A|L|X|Y)?\d*|RPLP[0-2]|RPSA", re.IGNORECASE)
FEWEST_RIBOSOMAL = 10  # of these genes, for their share to say anything
WHOLE_TRANSCRIPTS = -0.6  # log2 of their share to the expected one, below which a bulk counts reads
# Without them: robust sd of log-ratios of genes from which a bulk is of another protocol.
OTHER_PROTOCOL = 0.65
EXPRESSED = 30  # CPM


def published_content(cell_types, counts):
    """mRNA content of cell types by published measurements, and how many of them have one.

        c_k = geometric mean over sources of v_k / v_CD4

    Sources are EPIC (Racle et al., eLife 2017), quanTIseq (Finotello et al., Genome Medicine 2019)
    and ABIS (Monaco et al., Cell Reports 2019), as SimBu collects them (Dietrich et al.,
    Bioinformatics 2022). Types are recognised by name, with the patterns of ``mrna_content.csv``. A
    type that none of these has keeps its counts in the reference, in proportion to the others.

    Args:
        cell_types: names (K). counts: mean counts of a cell of each type in the reference (K).

    Returns:
        ``(content, n_known)``: (K), CD4 T cells about 1; content is None if fewer than
        two types are known.
    """
    table = pd.read_csv(PUBLISHED)
    sources = table.columns[2:]
    of_cd4 = table.set_index("cell_type").loc["CD4+ T cells", sources].astype(float)
    content = np.exp(np.log(table[sources] / of_cd4).mean(axis=1)).to_numpy()
    found = np.full(len(cell_types), np.nan)
    for k, name in enumerate(cell_types):
        rows = [i for i, p in enumerate(table["pattern"]) if re.search(p, name, re.IGNORECASE)]
        if rows:  # the first that fits, as special types stand above general ones
            found[k] = content[rows[0]]
    known = ~np.isnan(found)
    if known.sum() < 2:  # of one type alone, a content means nothing
        return None, int(known.sum())
    scale = np.exp(np.mean(np.log(found[known] / counts[known])))
    return np.where(known, found, scale * counts), int(known.sum())


def deviation_of_genes(bulk, expected, genes):
    """Robust sd (S) of the natural log-ratios of bulks to what is expected, both in CPM plus 10.

    Over genes above EXPRESSED in either: the ratios of others are about 1 on any platform.

    bulk, expected: (S, G). genes: mask (G) that CPM are taken over.
    """
    parts = (part[:, genes] for part in (bulk, expected))
    pairs = zip(*(p / p.sum(axis=1, keepdims=True) * 1e6 for p in parts), strict=True)
    sds = []
    for b, e in pairs:
        expressed = np.maximum(b, e) > EXPRESSED
        ratio = np.log((b[expressed] + 10) / (e[expressed] + 10))
        sds.append(1.4826 * np.median(np.abs(ratio - np.median(ratio))))
    return np.array(sds)


def counts_reads(bulk, expected, genes, measured):
    """Whether bulks are of whole transcripts rather than of single cells' transcript ends.

    By the share of ribosomal proteins, whose genes are short: less than WHOLE_TRANSCRIPTS of what
    the reference's cells would give. Where too few of these genes are there, by how far genes lie
    off what is expected.

    Args:
        bulk, expected: (S, G); expected of a reference of transcript ends. genes: names (G).
        measured: mask (G).

    Returns:
        ``(reads, why)``: bool for the whole table, and the evidence in words.
    """
    ribosomal = np.array([bool(RIBOSOMAL.fullmatch(name)) for name in genes]) & measured
    if ribosomal.sum() >= FEWEST_RIBOSOMAL:
        share = [
            part[:, ribosomal].sum(axis=1) / part[:, measured].sum(axis=1)
            for part in (bulk, expected)
        ]
        change = float(np.median(np.log2((share[0] + 1e-6) / (share[1] + 1e-6))))
        why = f"ribosomal proteins at {2**change:.0%} of what single cells would give"
        return change < WHOLE_TRANSCRIPTS, why
    others = measured & np.array([not PROTOCOL_GENES.fullmatch(name) for name in genes])
    sd = float(np.median(deviation_of_genes(bulk, expected, others)))
    why = f"genes lie off the expected by a factor of {np.exp(sd):.1f}"
    unsure = "too few ribosomal genes to be sure, --mrna-content settles it"
    return sd > OTHER_PROTOCOL, f"{why} ({unsure})"
