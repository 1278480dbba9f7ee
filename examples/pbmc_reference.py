"""Put the four single-cell sets behind weights/pbmc into one reference, with curated cell types.

    python annotate.py --data pbmc1k_v3 --out labels/pbmc1k_v3          # and so for each set
    python examples/pbmc_reference.py --sets pbmc1k_v3 pbmc3k.h5ad kang_ifnb.h5ad zheng_facs.h5ad \
        --annotations labels/pbmc1k_v3 labels/pbmc3k labels/kang_ifnb labels/zheng_facs \
        --sorted zheng_facs

Writes an .h5ad of the genes that all sets have, with columns cell_type, batch, sample, donor and
condition. A cell stays if annotate.py knows its type and, in a set of sorted cells, it was sorted
as the same lineage. docs/your-data.md has the commands that train weights/pbmc on it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.errors import InputError
from runtime.script import parse_args, run_script


@dataclass
class Settings:
    """Put several annotated single-cell sets into one reference.

    Example: python examples/pbmc_reference.py --sets a b.h5ad --annotations labels/a labels/b
    """

    sets: tuple[Path, ...]
    """Single-cell sets, each read as --data of the other scripts. Each is one batch."""
    annotations: tuple[Path, ...]
    """For each set the folder that annotate.py wrote to."""
    sorted: tuple[str, ...] = ()
    """Sets, by name, whose column cell_type is what each cell was sorted as."""
    lineages: Path = ROOT / "examples" / "pbmc_lineages.csv"
    """Lineage of each cell type and of what cells were sorted as: csv cell_type,lineage."""
    leave_out: tuple[str, ...] = ("Erythrocytes", "Blood progenitor cells", "Plasma cells")
    """Cell types that are not to be in the reference."""
    most: int = 300
    """Most cells of a type from one sample."""
    fewest: int = 5
    """Fewest cells of a type in a batch, for the type to be taken from it."""
    seed: int = 0
    """Of the choice among more."""
    out: Path = Path("pbmc.h5ad")
    """The file to write."""

    def __post_init__(self):
        if len(self.sets) != len(self.annotations):
            raise InputError(
                f"--annotations: found {len(self.annotations)} folders, expected one for each of "
                f"{len(self.sets)} --sets"
            )


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import anndata
import numpy as np
import pandas as pd

from readers.counts import read_counts
from readers.labels import LABEL_FILE
from runtime.writing import write_whole


def read_set(path, folder, lineage_of, cfg):
    """One annotated set: AnnData of the cells that stay, with the columns of the reference."""
    cells, name = read_counts(path), path.stem
    annotated = pd.read_csv(folder / LABEL_FILE, index_col=0)["cell_type"]
    cell_type = annotated.reindex(cells.obs_names).fillna("Unknown")
    out = {"Unknown": cell_type == "Unknown", "left out": cell_type.isin(cfg.leave_out)}
    if name in cfg.sorted:
        lineages = (
            labels.astype(str).map(lineage_of) for labels in (cells.obs["cell_type"], cell_type)
        )
        out["sorted as another lineage"] = np.not_equal(*lineages)
    if "low_genes_missing" in cells.obs:  # a copy of Kang's cells that lacks 5,000 genes
        out["with genes missing"] = cells.obs["low_genes_missing"].astype(bool)
    stays = ~np.any(list(out.values()), axis=0)
    size = cell_type[stays].value_counts()
    out["of too rare a type"] = cell_type.isin(size.index[size < cfg.fewest])
    stays &= ~out["of too rare a type"].to_numpy()
    print(
        f"{path}: {len(stays):,} cells, {stays.sum():,} stay; "
        + ", ".join(f"{mask.sum():,} {why}" for why, mask in out.items())
    )
    obs = pd.DataFrame({"cell_type": cell_type, "batch": name}, index=cells.obs_names)
    given = {column: cells.obs[column].astype(str) for column in cells.obs}
    obs["donor"] = given.get("donor", name)
    obs["sample"] = given.get("sample", obs["donor"])
    obs["condition"] = given.get("condition", "healthy")
    obs.index = [f"{name}_{barcode}" for barcode in obs.index]
    return anndata.AnnData(cells.X, obs=obs, var=cells.var)[stays].copy()


def take_at_most(cells, n, rng):
    """At most n cells of each type and sample, chosen at random."""
    group = cells.obs["sample"].astype(str) + "\n" + cells.obs["cell_type"].astype(str)
    rank = pd.Series(rng.permutation(cells.n_obs)).groupby(group.to_numpy()).rank()
    return cells[(rank <= n).to_numpy()].copy()


def main(cfg):
    rng = np.random.default_rng(cfg.seed)
    lineage_of = pd.read_csv(cfg.lineages, dtype=str).set_index("cell_type")["lineage"].to_dict()
    pairs = zip(cfg.sets, cfg.annotations, strict=True)
    sets = [read_set(path, folder, lineage_of, cfg) for path, folder in pairs]
    reference = anndata.concat([take_at_most(cells, cfg.most, rng) for cells in sets], join="inner")
    ids = [cells.var["gene_ids"].reindex(reference.var_names) for cells in sets]
    # Ids of the set that has most of them, as some know symbols alone.
    reference.var["gene_ids"] = max(ids, key=lambda names: names.str.startswith("ENSG").sum())
    write_whole(cfg.out, lambda part: reference.write_h5ad(part, compression="gzip"))
    print(pd.crosstab(reference.obs["cell_type"], reference.obs["batch"]).to_string())
    print(f"wrote {cfg.out}: {reference.n_obs:,} cells x {reference.n_vars:,} genes")


if __name__ == "__main__":
    run_script(main, settings)
