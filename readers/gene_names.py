"""Matching genes by name: symbols, and Ensembl ids with or without a version."""

import re

import numpy as np
import pandas as pd

# Columns of .var with a second name of each gene: ids for symbols, symbols for ids.
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl", "ENSEMBL", "feature_id")

SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "symbol", "gene_name")


def bare_id(name):
    """An Ensembl gene id without its suffix: a version, ``_PAR_Y``, ``_symbol`` or ``|...``.

    Returns:
        str, or None if the name is not an Ensembl gene id.
    """
    match = re.fullmatch(r"(ENS[A-Z]*G\d+)([._|].*)?", name)
    return match and match[1]


def mostly_ids(names):
    """Whether more than half of the names that are not empty are Ensembl gene ids."""
    return sum(bare_id(name) is not None for name in names) > sum(map(bool, names)) / 2


def other_names(var):
    """The second name of each gene: its Ensembl id, or its symbol if genes are named by id.

    Args:
        var: ``.var`` of an ``.h5ad`` (G rows), searched for ``ID_COLUMNS`` or ``SYMBOL_COLUMNS``.

    Returns:
        list of str (G), "" where there is none.
    """
    named_by_id = mostly_ids(list(var.index))
    for column in SYMBOL_COLUMNS if named_by_id else ID_COLUMNS:
        if column in var:
            names = ["" if pd.isna(name) else str(name) for name in var[column]]
            if mostly_ids(names) != named_by_id:  # some files repeat the names in this column
                return names
    return [""] * len(var)


def name_map(genes, gene_ids):
    """Dict from every name of a model's genes to the gene's position in ``genes``.

    A name goes to the gene that has it as its name, else as its bare id, then as its other name,
    then as the bare id of that; among equals to the first gene.
    """
    known = {}
    for names in (genes, map(bare_id, genes), gene_ids, map(bare_id, gene_ids)):
        for position, name in enumerate(names):
            if name:
                known.setdefault(name, position)
    return known


def find_genes(names, known):
    """Position of each name (G) in the model, -1 if unknown; ``known``: see :func:`name_map`."""
    return np.array([known.get(n, known.get(bare_id(n), -1)) for n in names], np.int64)


def n_found(positions):
    """Number of the model's genes among the positions of :func:`find_genes`."""
    return len(np.unique(positions[positions >= 0]))
