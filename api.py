"""What the scripts do, as functions on AnnData.

    models = load("weights/pbmc")
    samples = deconvolve("samples.csv", models)     # or an AnnData or DataFrame, samples x genes
    cells = generate(samples, models, n_cells=500)  # AnnData, cells x genes

``bulk2sc.py`` is made of these. Errors in what is given are ``runtime.errors.InputError``, whose
text is one line that names what was found and what was expected.
"""

import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm import tqdm

from cell_tables import CellTable
from data import shipped
from expression import mean_library
from generation import (
    Bulks,
    BulkSamples,
    Models,
    encode_mixtures,
    generate_cells,
    load_models,
)
from proportions import make_proportions
from readers.bulk import read_bulk
from readers.fingerprint import digest
from readers.proportions import read_proportions
from runtime.cell_writers import open_cells
from runtime.device import pick_device
from runtime.errors import InputError
from runtime.processes import wait_for_all
from runtime.provenance import files_read, run_name
from runtime.version import VERSION


def load(weights="weights/pbmc", device="auto"):
    """Load the models of a folder of weights.

    Args:
        weights: folder with ``bulkEncoder_model.pt`` and ``scDecoder_model.pt``; the shipped ones
            are also found from elsewhere. device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        Models: encoder, its card, decoder, its card. A card is a dict with ``cell_types`` (K),
        ``genes`` (G), ``settings`` and more.

    Raises:
        InputError: a file is missing or no weights file, or the device is not there.
    """
    return load_models(shipped(weights), pick_device(device))


def train(cells, weights, labels="cell_type", epochs=None, **settings):
    """Train the three models on a labelled reference: the scripts' trainings, one after the other.

    Args:
        cells: AnnData with raw counts (N x G), or the path of a reference as ``--data`` takes it.
        weights: folder to write to. labels: column of ``.obs``, or a csv as ``--labels`` takes it.
        epochs: of scGMVAE, scDecoder and Bulk Encoder, each None for its default; one number for
            all. settings: fields of ``data.TrainingSettings`` for all three, such as ``samples``,
            ``held_out``, ``seed``, ``device`` or ``n_genes``.

    Returns:
        Models, as :func:`load`.

    Raises:
        InputError: counts, labels or settings are not what they have to be.
    """
    import train_decoder
    import train_encoder
    import train_gmvae

    each = epochs if isinstance(epochs, (tuple, list)) else (epochs,) * 3
    if len(each) != 3:
        raise InputError(f"epochs: found {len(each)} numbers, expected one for each of 3 trainings")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(cells, anndata.AnnData):
            path = Path(folder) / "reference.h5ad"
            cells.write_h5ad(path)
            cells = path
        given = {"data": str(cells), "labels": labels, "weights": Path(weights)} | settings
        scripts = (train_gmvae, train_decoder, train_encoder)
        runs = [  # all settings are checked before anything is trained
            (script, script.Settings(**given, **({} if n is None else {"epochs": n})))
            for script, n in zip(scripts, each, strict=True)
        ]
        for script, cfg in runs:
            script.main(cfg)
            wait_for_all()  # the first process writes what the next training reads
    return load(weights, settings.get("device", "auto"))


def deconvolve(
    bulk,
    models,
    options=None,
    where=None,
    proportions=None,
    lineages=None,
    mrna_content="auto",
    calibrate="auto",
    platform="keep",
):
    """Estimate cell-type proportions of bulk samples, and each type's expression in each sample.

    Args:
        bulk: AnnData or DataFrame (S x G), counts, TPM or CPM, genes by name; or one path or
            several of files as ``--bulk`` takes them. models: of :func:`load`. options:
            readers.bulk_options.BulkOptions, how tables are read. where: what messages name.
            proportions: known fractions of cells, a csv as ``--proportions`` takes it, or a
            DataFrame (S x types). lineages: csv of the lineages that these are of.
            mrna_content, calibrate, platform: as the flags of ``bulk2sc.py``.

    Returns:
        generation.BulkSamples: ``proportions`` (``to_table()`` gives a long DataFrame), ``fit`` (a
        row for each sample), ``expression``.

    Raises:
        InputError: the bulk is no table of samples, is on a log scale, has too few genes, or could
            be read in two ways.
    """
    encoder, _, _, card = models
    genes = card["genes"]
    is_read = isinstance(bulk, tuple) and len(bulk) == 3 and sp.issparse(bulk[0])
    if not is_read:
        bulk = read_bulk(bulk, genes, card.get("gene_ids"), options)
    known = known_proportions(proportions, card["cell_types"], lineages)
    samples = BulkSamples(bulk, where or "bulk", models, mrna_content, known)
    samples.how = how_to_calibrate(calibrate, platform, encoder)
    samples.expression = samples.estimate_expression(*samples.how)
    return samples


def how_to_calibrate(calibrate, platform, encoder):
    """``(calibrate, platform)`` for these weights; says what auto came to, if it is not none."""
    if calibrate != "auto":
        return calibrate, platform
    if not encoder.n_state:
        return "none", platform
    print(f"--calibrate types, --platform {platform}: the reference was of several samples")
    return "types", platform


def known_proportions(proportions, cell_types, lineages=None):
    """KnownProportions of a csv or a DataFrame (R x columns); None for None."""
    if proportions is None:
        return None
    return read_proportions(proportions, cell_types, lineages)


def mixtures(proportions, models, lineages=None):
    """Mixtures of the reference's cell types to generate, without a bulk.

    Args:
        proportions: fractions of cells, a DataFrame (R x types) or a csv. models: of :func:`load`.
        lineages: csv of the lineages that these are of.

    Returns:
        generation.Bulks, for :func:`generate`.
    """
    _, encoder_card, decoder, _ = models
    known = known_proportions(proportions, encoder_card["cell_types"], lineages)
    proportions, encoded = encode_mixtures(encoder_card, decoder, known)
    return Bulks(proportions.names, [encoded], proportions)


def generate(
    source,
    models,
    n_cells=1000,
    cells_per_type=None,
    seed=0,
    out=None,
    run=None,
    metadata=None,
    shown=None,
):
    """Generate single cells.

    Args:
        source: of :func:`deconvolve` or :func:`mixtures`; generation.Bulks. models: of
            :func:`load`. n_cells: cells of each sample (1 if each bulk yields one).
            cells_per_type: cells of each type of each sample, in place of as many as the
            proportions say. seed: the same seed gives the same cells on CPU. out: an ``.h5ad``, a
            10x ``.h5`` or a folder to write block by block. run: dict with ``name``, ``settings``
            and ``provenance``. metadata: DataFrame (S rows) for ``.obs``. shown: report.ShownCells
            to fill.

    Returns:
        AnnData (N x G) with counts in X; with ``out``, (N x 0), its tables alone.
    """
    decoder, card = models[2], models[3]
    bulks = source if isinstance(source, Bulks) else source.to_bulks()
    samples, cell_types, genes = bulks.samples, card["cell_types"], card["genes"]
    run = run or describe(bulks, n_cells, cells_per_type, seed)
    codes = fixed_types(cells_per_type, len(cell_types))
    per_bulk = 1 if bulks.one_cell_each else n_cells if codes is None else len(codes)
    generator = torch.Generator(decoder.mu.device).manual_seed(seed)
    table, first, n = CellTable(*decoder.mu.shape), 0, per_bulk * len(bulks.names)
    bar = tqdm(total=n, desc="cells", unit="cell", unit_scale=True)
    if shown is not None:
        shown.start(n, len(genes), decoder.mu.shape[1])
    with bar, open_sink(out, genes, card.get("gene_ids"), n) as sink:
        for encoded in bulks.encoded:  # mu (S, K, D), var (S, K, D), pi (S, K)
            rows, log_factor = slice(first, first + len(encoded[2])), None
            if bulks.expression is not None:
                log_factor = bulks.expression.part(rows).log_factor
            options = {"log_factor": log_factor, "first": first, "codes": codes}
            for cells in generate_cells(decoder, encoded, per_bulk, generator, **options):
                sink.append(cells.counts)
                table.append(cells)
                if shown is not None:
                    shown.add(cells)
                if samples is not None:
                    samples.add(cells, balanced=codes is not None)
                bar.update(len(cells.bulk))
            table.pi.append(encoded[2].cpu().numpy())
            first += len(encoded[2])
        if samples is not None:
            samples.compare_sums()
        if bulks.proportions is None:  # known when all have been encoded
            pi = np.concatenate(table.pi)
            library = mean_library(decoder)
            bulks.proportions = make_proportions(bulks.names, cell_types, pi, library)
        tables = table.to_anndata(bulks.proportions, run, samples, metadata)
        cells = sink.write_tables(tables)
    return tables if cells is None else cells


def fixed_types(cells_per_type, n_types):
    """Codes of the cells of a sample, N of each type; None if they are drawn."""
    if cells_per_type is None:
        return None
    return torch.arange(n_types).repeat_interleave(cells_per_type)


def open_sink(out, genes, gene_ids, n_cells):
    """A writer of cells, into files or into memory."""
    return open_cells(out, genes, gene_ids, n_cells) if out else MemorySink(genes, gene_ids)


class MemorySink:
    """Keeps cells in memory, in place of a writer of files."""

    def __init__(self, genes, gene_ids):
        self.var = pd.DataFrame(index=list(genes))
        self.var["gene_ids"] = [""] * len(genes) if gene_ids is None else list(gene_ids)
        self.counts = [sp.csr_matrix((0, len(genes)), dtype=np.int32)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def append(self, counts):
        """Keep the counts (B x G) of the next cells."""
        self.counts.append(counts)

    def write_tables(self, tables):
        """AnnData of all cells, with their tables."""
        X = sp.vstack(self.counts, format="csr")
        return anndata.AnnData(X, tables.obs, self.var, uns=tables.uns, obsm=dict(tables.obsm))


def describe(bulks, n_cells, cells_per_type, seed):
    """What cells say of the run they come from, when no script names it."""
    settings = {"n_cells": n_cells, "seed": seed}
    if cells_per_type is not None:
        settings["cells_per_type"] = cells_per_type
    contents = list(bulks.names)
    if bulks.proportions is not None:
        contents += [bulks.proportions.cells, *(part for each in bulks.encoded for part in each)]
    files = files_read({})
    name = run_name(settings, files, digest(*contents), aside=())
    provenance = {"version": VERSION, "run": name, "seed": seed, "files": files}
    return {"name": name, "settings": settings, "provenance": provenance}


__all__ = ["Models", "deconvolve", "generate", "load", "mixtures", "train"]
