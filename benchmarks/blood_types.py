"""Make blood_types.csv, the profiles that unknown.py looks for, from public data.

    python benchmarks/blood_types.py --shared ../shared/data

Monocytes, B, NK and T cells: mean over PBMC 1K, pbmc3k, Kang's controls and bead-sorted PBMCs.
Dendritic cells, platelets, progenitors: single-cell sets that have them. Neutrophils: bulk RNA-seq
of sorted cells (GSE60424). All on one platform, by the lineages that every set has.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import TABLES
from runtime.flags import in_groups
from runtime.script import parse_args, run_script


@in_groups({"input": "shared", "output": "out"})
@dataclass
class Settings:
    """Make blood_types.csv.

    Example: python benchmarks/blood_types.py --shared ../shared/data
    """

    shared: Path = Path("../shared/data")
    """Folder of the data sets."""
    out: Path = TABLES / "blood_types.csv"
    """Table to write."""


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import numpy as np
import pandas as pd

from deconvolution.unknown import LINEAGES, NOT_COUNTED, platform_factor
from readers.counts import read_counts

SETS = {"pbmc1k_v3": None, "pbmc3k": "pbmc3k.h5ad", "kang_ifnb": "kang_ifnb.h5ad"}
SETS["zheng_facs"] = "zheng_facs.h5ad"
PATTERNS = {  # of the labels of all sets; the first that fits
    "Plasmacytoid dendritic cells": r"pDC",
    "Dendritic cells": r"DC",
    "Platelets": r"Platelet|Mk",
    "Blood progenitor cells": r"CD34\+",
    "Monocytes": r".*Mono.*",
    "Natural killer cells": r"NK|CD56\+ NK|Natural killer.*",
    "B cells": r"B|B Activated|CD19\+ B|(Pre-|Naive |Memory )B cells",
    "T cells": r"CD[48].*(T|Memory|Cytotoxic|Reg|Helper2)|.*CD[48]\+ T cells"
    r"|(Naive|Memory) CD4 T|T activated",
}
SORTED = {"Monocytes": ["Monocytes"], "B cells": ["B-cells"], "T cells": ["CD4", "CD8"]}
SORTED |= {"Natural killer cells": ["NK"], "Neutrophils": ["Neutrophils"]}
FEWEST_CELLS, LOWEST = 5, 15  # cells of a profile; CPM of a gene in some type


def single_cell_profiles(folder, name):
    """CPM of types in a data set: DataFrame, genes x types."""
    path = folder / name / SETS[name] if SETS[name] else folder / name
    cells = read_counts(path)
    if SETS[name]:
        label = cells.obs["cell_type"].astype(str)
    else:
        table = pd.read_csv(path / "barcode_to_celltype.csv", index_col=0)
        label = table.iloc[:, 0].reindex(cells.obs_names).fillna("Unknown")
    if name == "kang_ifnb":
        label = label.where(cells.obs["condition"] == "ctrl", "Unknown")
    out, taken = {}, np.zeros(len(label), bool)
    for cell_type, pattern in PATTERNS.items():
        rows = label.str.fullmatch(pattern).to_numpy() & ~taken
        taken |= rows
        if rows.sum() >= FEWEST_CELLS:
            total = np.asarray(cells.X[np.flatnonzero(rows)].sum(axis=0)).ravel()
            out[cell_type] = total / total.sum() * 1e6
    return pd.DataFrame(out, index=cells.var_names)


def sorted_profiles(folder):
    """CPM of sorted cells, geometric means over draws: DataFrame, genes x types."""
    table = pd.read_csv(folder / "tmm_counts.csv.gz", index_col=0)
    sample = pd.read_csv(folder / "samples.csv")
    table = table[table["symbol"].notna()].groupby("symbol").sum()
    cpm = table / table.sum() * 1e6
    columns = {k: sample["sample"][sample["cell_type"].isin(v)] for k, v in SORTED.items()}
    return pd.DataFrame({k: np.expm1(np.log1p(cpm[v]).mean(axis=1)) for k, v in columns.items()})


def combine_profiles(sets):
    """One table of all sets: lineages of the single-cell sets, other types moved to their platform.

    sets: DataFrames (genes x types); the last is of another platform.
    """
    genes = sorted(set().union(*(s.index for s in sets[:-1])))
    lineages = list(LINEAGES)
    logs = [np.log1p(s.reindex(genes)[lineages].to_numpy()) for s in sets[:-1]]
    base = pd.DataFrame(np.expm1(np.nanmean(logs, axis=0)), genes, lineages)
    others = {}
    for table in sets:
        shared = table.index.intersection(genes)
        pair = (part.loc[shared, lineages].to_numpy().T / 1e6 for part in (table, base))
        moved = table.loc[shared].mul(np.exp(platform_factor(*pair)), axis=0)
        for name in moved.columns.difference(lineages):
            others.setdefault(name, []).append(np.log1p(moved[name]).reindex(genes))
    for name, parts in others.items():
        base[name] = np.expm1(pd.concat(parts, axis=1).mean(axis=1))
    # A gene that a rare type's set lacks is one that says nothing of it; older sets lack many.
    base = base.dropna(subset=[*lineages, *sets[-1].columns])
    mean = np.expm1(np.log1p(base[lineages]).mean(axis=1))
    base = base.apply(lambda column: column.fillna(mean))
    return base / base.sum() * 1e6


def main(cfg):
    sets = [single_cell_profiles(cfg.shared, name) for name in SETS]
    sets.append(sorted_profiles(cfg.shared / "gse60424_sorted"))
    table = combine_profiles(sets)
    counted = [NOT_COUNTED.fullmatch(name) is None for name in table.index]
    table = table[counted]
    table = table[table.max(axis=1) > LOWEST].round(1)
    table.index.name = "gene"
    table.to_csv(cfg.out)
    print(f"{cfg.out}: {len(table):,} genes, {', '.join(table.columns)}")


if __name__ == "__main__":
    run_script(main, settings)
