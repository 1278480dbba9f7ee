"""Make generated cells pass the checker of CELLxGENE (cellxgene-schema 7), as far as is honest.

    python examples/cellxgene.py --cells generated.h5ad --out cells_for_cellxgene.h5ad

The checker wants Ensembl ids of its own GENCODE release, ontology terms, and a normalised matrix
beside the counts. What a bulk does not say (sex, age, ancestry) is "unknown". A collection of
CELLxGENE takes measured cells only, so this is for tools that read its format.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.script import parse_args, run_script


@dataclass
class Settings:
    """Write generated cells in the form that cellxgene-schema checks.

    Example: python examples/cellxgene.py --cells generated.h5ad
    """

    cells: Path = Path("generated.h5ad")
    """An .h5ad by bulk2sc.py, with weights that know Ensembl ids (weights/pbmc does)."""
    out: Path = Path("cellxgene.h5ad")
    """The .h5ad to write."""
    retired: Path | None = None
    """Ensembl ids to leave out, one a line: those that the checker does not know."""
    title: str = "Synthetic cells by bulk2sc"
    """Of the data set."""
    assay: str = "EFO:0008913"
    """Of the reference (EFO term); single-cell RNA sequencing by default."""
    tissue: str = "UBERON:0000178"
    """Of the bulks (UBERON term); blood by default."""
    disease: str = "PATO:0000461"
    """Of the donors (MONDO term, or PATO:0000461 for normal)."""


if __name__ == "__main__":
    settings = parse_args(Settings)

import anndata
import pandas as pd
import scanpy as sc

from data import TABLES
from readers.hdf5 import readable
from runtime.errors import InputError, some
from runtime.writing import write_h5ad

SAME = {  # of every cell
    "development_stage_ontology_term_id": "unknown",
    "is_primary_data": False,
    "self_reported_ethnicity_ontology_term_id": "unknown",
    "sex_ontology_term_id": "unknown",
    "suspension_type": "cell",
    "tissue_type": "tissue",
}


def with_ids(cells, retired):
    """The cells in genes that have an Ensembl id of their own, under this name."""
    ids = cells.var["gene_ids"].astype(str)
    has_id = (ids != "") & ~ids.duplicated() & ~ids.isin(retired)
    print(f"{(~has_id).sum():,} of {len(ids):,} genes left out: no id, or one that is retired")
    cells = cells[:, has_id.to_numpy()].copy()
    cells.var = pd.DataFrame(index=list(ids[has_id]))
    return cells


def describe(cells, cfg):
    """``.obs`` as the schema has it.

    Raises:
        InputError: a cell type has no term in cell_types.csv.
    """
    terms = pd.read_csv(TABLES / "cell_types.csv").drop_duplicates("cellName")
    terms = terms.set_index("cellName")["ontologyId"]
    types = cells.obs["cell_type"].cat.remove_unused_categories()
    unknown = [name for name in types.cat.categories if name not in terms]
    if unknown:
        raise InputError(
            f"{cfg.cells}: found cell types without a term of the Cell Ontology ({some(unknown)}), "
            "expected those of cell_types.csv"
        )
    obs = pd.DataFrame({"donor_id": cells.obs["sample"], "generated_as": types})
    obs["cell_type_ontology_term_id"] = types.map(terms.to_dict()).astype(str)
    obs["assay_ontology_term_id"], obs["tissue_ontology_term_id"] = cfg.assay, cfg.tissue
    obs["disease_ontology_term_id"] = cfg.disease
    for name, value in SAME.items():
        obs[name] = value
    text = obs.select_dtypes("object").columns
    return obs.astype(dict.fromkeys(text, "category"))


def main(cfg):
    with readable(cfg.cells):
        cells = anndata.read_h5ad(cfg.cells)
    if missing := {"sample", "cell_type"} - set(cells.obs) | {"gene_ids"} - set(cells.var):
        raise InputError(f"{cfg.cells}: found no {some(sorted(missing))}, expected generated cells")
    retired = [] if cfg.retired is None else cfg.retired.read_text().split()
    counts = with_ids(cells, retired)
    counts.X = counts.X.astype("float32")
    normalised = anndata.AnnData(counts.X.copy(), describe(cells, cfg), counts.var.copy())
    sc.pp.normalize_total(normalised)
    sc.pp.log1p(normalised)
    sc.pp.pca(normalised, n_comps=min(20, min(normalised.shape) - 1))
    normalised.raw = anndata.AnnData(counts.X, normalised.obs, counts.var)
    normalised.var["feature_is_filtered"] = False
    normalised.obsm = {"X_pca": normalised.obsm["X_pca"]}
    normalised.varm, normalised.uns = {}, {}
    normalised.uns |= {"title": cfg.title, "organism_ontology_term_id": "NCBITaxon:9606"}
    write_h5ad(cfg.out, normalised)
    print(f"wrote {cfg.out}: {normalised.n_obs:,} cells x {normalised.n_vars:,} genes")


if __name__ == "__main__":
    run_script(main, settings)
