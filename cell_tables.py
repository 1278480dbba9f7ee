"""The tables of generated cells: what an output holds beside the counts."""

import anndata
import numpy as np
import pandas as pd

from plotting import type_colors

# Columns of .obs that bulk2sc writes itself.
OWN_COLUMNS = ("sample", "cell_type", "synthetic", "misfit")


class CellTable:
    """What is kept in memory of all generated cells: everything but their counts."""

    def __init__(self, n_types, n_latent):
        self.pi = [np.zeros((0, n_types), np.float32)]  # proportions of the bulks
        self.cell_type, self.bulk = [np.zeros(0, int)], [np.zeros(0, int)]
        self.latent = [np.zeros((0, n_latent), np.float32)]

    def append(self, cells):
        """Add generated Cells."""
        self.cell_type.append(cells.cell_type)
        self.bulk.append(cells.bulk)
        self.latent.append(cells.latent)

    def to_anndata(self, proportions, run, samples=None, metadata=None):
        """The tables of the output: ``.obs``, ``.obsm`` and ``.uns`` of all cells (N).

        Args:
            proportions: Proportions of the bulks (S). run: dict with the run's ``name``,
                ``settings`` and ``provenance``. samples: BulkSamples with --bulk. metadata:
                DataFrame of what the input says of each sample (S rows), if anything.

        Returns:
            AnnData (N x 0). obs: sample, cell_type, synthetic and, of bulks, misfit and metadata.
        """
        names, cell_types = proportions.names, proportions.cell_types
        bulk = np.concatenate(self.bulk)
        obs = pd.DataFrame(index=[f"{run['name']}_{i}" for i in range(len(bulk))])
        obs["sample"] = pd.Categorical.from_codes(bulk, categories=names)
        cell_type = np.concatenate(self.cell_type)
        obs["cell_type"] = pd.Categorical.from_codes(cell_type, categories=cell_types)
        obs["synthetic"] = True
        if samples is not None:
            obs["misfit"] = samples.fit["misfit"].to_numpy()[bulk]
        for name, values in {} if metadata is None else metadata.items():
            obs[name] = values.iloc[bulk].set_axis(obs.index)
        cells = anndata.AnnData(obs=obs)
        cells.obsm["X_latent"] = np.concatenate(self.latent)
        cells.uns["X_name"] = "counts"
        cells.uns["proportions"] = proportions.to_table()
        cells.uns["samples"] = np.array(names, dtype=object)
        cells.uns["cell_types"] = np.array(cell_types, dtype=object)
        cells.uns["cell_type_colors"] = np.array(list(type_colors(cell_types).values()), object)
        cells.uns["settings"] = run["settings"]
        cells.uns["bulk2sc"] = run["provenance"]
        if samples is not None:
            cells.uns["fit"] = samples.fit
        return cells


def named_apart(metadata):
    """Columns of metadata (S rows), those that bulk2sc writes itself under another name."""
    clash = [name for name in metadata if name in OWN_COLUMNS]
    if clash:
        print(f"columns of the samples renamed to bulk_<name>: {', '.join(clash)}")
    return metadata.rename(columns={name: f"bulk_{name}" for name in clash})
