"""The names that a gene goes by: symbols, and Ensembl ids with or without what follows them."""

import re

import numpy as np
import pandas as pd

# Where an .h5ad keeps the other name of each gene: ids of symbols, and symbols of ids.
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl", "ENSEMBL", "feature_id")

SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "symbol", "gene_name")


def bare_id(name):
    """An Ensembl gene id without what may follow it: version, ``_PAR_Y``, ``_symbol``, ``|...``.

    Returns:
        str, or None if the name is no Ensembl gene id.
    """
    found = re.fullmatch(r"(ENS[A-Z]*G\d+)([._|].*)?", name)
    return found and found[1]


def other_names(var):
    """The other name of each gene of an ``.h5ad``: its Ensembl id, or its symbol if names are ids.

    Args:
        var: the file's ``.var`` (G), searched for ``ID_COLUMNS`` or ``SYMBOL_COLUMNS``.

    Returns:
        list of str (G), "" where there is none.
    """

    def mostly_ids(names):
        return sum(bare_id(name) is not None for name in names) > sum(map(bool, names)) / 2

    by_id = mostly_ids(list(var.index))
    for column in SYMBOL_COLUMNS if by_id else ID_COLUMNS:
        if column in var:
            names = ["" if pd.isna(name) else str(name) for name in var[column]]
            if mostly_ids(names) != by_id:  # else it says the same as the names, or something else
                return names
    return [""] * len(var)


def name_map(genes, gene_ids):
    """Every name that the genes of a model go by -> position in ``genes``.

    Names come before other names, each as it is and as :func:`bare_id`; of genes that share one,
    the first has it.
    """
    known = {}
    for names in (genes, map(bare_id, genes), gene_ids, map(bare_id, gene_ids)):
        for i, name in enumerate(names):
            if name:
                known.setdefault(name, i)
    return known


def find_genes(names, known):
    """Position of each name (G) in the model, -1 where unknown; ``known`` is a name_map."""
    return np.array([known.get(n, known.get(bare_id(n), -1)) for n in names], np.int64)


def n_found(at):
    """How many genes of the model are among the positions of :func:`find_genes`."""
    return len(np.unique(at[at >= 0]))
