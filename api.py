"""What the scripts do, as functions on AnnData.

    model = load("weights/pbmc")
    samples = deconvolve("samples.csv", model)     # or an AnnData or DataFrame, samples x genes
    cells = generate(samples, model, n_cells=500)  # AnnData, cells x genes

``bulk2sc.py`` is made of these. Errors in what is given are ``runtime.errors.InputError``, whose
text is one line that names what was found and what was expected.
"""

import tempfile
from dataclasses import fields
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm import tqdm

from data import TrainingSettings, shipped
from deconvolution.expression import mean_library
from deconvolution.proportions import make_proportions
from deconvolution.samples import BulkSamples
from generation import CellSource, Model, encode_mixtures, generate_cells
from plots.report import ShownCells
from plots.style import type_colors
from readers.bulk import Bulk, read_bulk
from readers.bulk_options import BulkOptions
from readers.counts import EMBEDDED
from readers.fingerprint import digest
from readers.proportions import read_proportions
from runtime.arguments import check_choice, check_number, check_type, for_python, in_user_terms
from runtime.cell_writers import kind_of, open_cells
from runtime.errors import InputError, one_line, some
from runtime.processes import wait_for_all
from runtime.provenance import files_read, run_name
from runtime.version import VERSION
from runtime.writing import check_writable

# Columns of .obs that bulk2sc writes itself.
OWN_COLUMNS = ("sample", "cell_type", "synthetic", "misfit")
PATH = (str, Path)


@for_python
def load(weights="weights/pbmc", device="auto"):
    """Load the models of a folder of weights.

    Args:
        weights: folder with ``bulkEncoder_model.pt`` and ``scDecoder_model.pt``; the shipped ones
            are also found from elsewhere. device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        Model, with ``cell_types`` (K), ``genes`` (G) and ``metadata``, a dict with ``settings`` and
        more.

    Raises:
        InputError: a file is missing or no weights file, or the device is not there.
    """
    check_type("weights", weights, PATH, "a folder of weights")
    check_type("device", device, str, "auto, cpu, cuda or cuda:N")
    return Model.load(shipped(weights), device)


@for_python
def train(cells, weights, labels="cell_type", epochs=None, **settings):
    """Train the three models on a labelled reference: the scripts' trainings, one after the other.

    Args:
        cells: AnnData with raw counts (N x G), or the path of a reference as ``--data`` takes it.
        weights: folder to write to. labels: column of ``.obs``, or a csv as ``--labels`` takes it.
        epochs: of scGMVAE and scDecoder, and steps of the Bulk Encoder, each None for its default;
            one number for all. settings: fields of ``data.TrainingSettings`` for all three, such as
            ``samples``, ``held_out``, ``seed``, ``device`` or ``n_genes``.

    Returns:
        Model, as :func:`load`.

    Raises:
        InputError: counts, labels or settings are not what they have to be.
    """
    import train_decoder
    import train_encoder
    import train_gmvae

    check_type("cells", cells, (anndata.AnnData, *PATH), "AnnData or a path")
    check_type("weights", weights, PATH, "a folder to write to")
    check_type("labels", labels, (*PATH, type(None)), "a column of .obs or a csv")
    known = [field.name for field in fields(TrainingSettings)]
    if unknown := [name for name in settings if name not in known]:
        raise InputError(f"{unknown[0]}: unknown, expected settings such as {some(known, 30)}")
    each = epochs if isinstance(epochs, (tuple, list)) else (epochs,) * 3
    if len(each) != 3:
        raise InputError(f"epochs: found {len(each)} numbers, expected one for each of 3 trainings")
    each = [n if n is None else check_number("--epochs", n, 1) for n in each]
    check_writable(weights, "--weights")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(cells, anndata.AnnData):
            cells = write_cells(cells, Path(folder) / "reference.h5ad")
        cells = str(cells)
        given = {
            "data": cells,
            "labels": None if labels is None else str(labels),
            "weights": Path(weights),
        } | settings
        scripts = {train_gmvae: "epochs", train_decoder: "epochs", train_encoder: "steps"}
        runs = [  # all settings are checked before anything is trained
            (script, script.Settings(**given, **({} if n is None else {name: n})))
            for (script, name), n in zip(scripts.items(), each, strict=True)
        ]
        if cells != EMBEDDED and not Path(cells).exists():
            raise InputError(f"cells: found {cells}, which is not there, expected a reference")
        for script, cfg in runs:
            script.main(cfg)
            wait_for_all()  # the first process writes what the next training reads
    return load(weights, settings.get("device", "auto"))


def write_cells(cells, path):
    """Write an AnnData for the trainings to read, and return the path.

    Raises:
        InputError: an .h5ad cannot hold it.
    """
    try:
        cells.write_h5ad(path)
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise InputError(f"cells: could not be written as .h5ad ({one_line(error)})") from error
    return path


@for_python
def deconvolve(
    bulk,
    model,
    options=None,
    proportions=None,
    lineages=None,
    mrna_content="auto",
    calibrate="auto",
    platform="keep",
):
    """Estimate cell-type proportions of bulk samples, and each type's expression in each sample.

    Args:
        bulk: AnnData or DataFrame (S x G), counts, TPM or CPM, genes by name; a Series (G) of one
            sample; or one path or several of files. model: of :func:`load`. options:
            readers.bulk_options.BulkOptions, how tables are read.
            proportions: known fractions of cells, a csv as ``--known-proportions`` takes it, or a
            DataFrame (S x types). lineages: csv of the lineages that these are of.
            mrna_content: ``auto``, ``reference`` or ``published``. calibrate: ``auto``, ``none``,
            ``uniform`` or ``types``. platform: ``keep`` or ``remove``; see the flags of
            ``bulk2sc.py``.

    Returns:
        BulkSamples: ``proportions`` (``to_table()`` gives a long DataFrame), ``fit`` (a
        row for each sample), ``expression``.

    Raises:
        InputError: an argument has another type or value; or the bulk is no table of samples, is
            on a log scale, has too few genes, or could be read in two ways.
    """
    check_model(model)
    check_type("options", options, (BulkOptions, type(None)), "BulkOptions")
    check_choice("mrna_content", mrna_content, ("auto", "reference", "published"))
    check_choice("calibrate", calibrate, ("auto", "none", "uniform", "types"))
    check_choice("platform", platform, ("keep", "remove"))
    if not isinstance(bulk, Bulk):
        bulk = read_bulk(as_bulk(bulk), model.genes, model.gene_ids, options)
    known = known_proportions(proportions, model.cell_types, lineages)
    samples = BulkSamples(bulk, model, mrna_content, known)
    samples.estimate_expression(*choose_calibration(calibrate, platform, model))
    return samples


def check_model(model):
    """Check that a model is what :func:`load` gives.

    Raises:
        InputError: it is not.
    """
    check_type("model", model, Model, "what load() gives")


def as_bulk(bulk):
    """Bulk samples as readers.bulk takes them: a Series is one sample.

    Raises:
        InputError: they are neither AnnData, DataFrame, Series nor paths, or have names in levels.
    """
    expected = "AnnData or DataFrame (samples x genes), a Series of one sample, or paths"
    if isinstance(bulk, pd.Series):
        bulk = bulk.to_frame(bulk.name if bulk.name is not None else "bulk").T
    is_path = isinstance(bulk, PATH)
    if isinstance(bulk, (tuple, list)):
        is_path = bool(bulk) and all(isinstance(path, PATH) for path in bulk)
    if not is_path:
        check_type("bulk", bulk, (anndata.AnnData, pd.DataFrame), expected)
    if isinstance(bulk, pd.DataFrame):
        for what, index in (("genes", bulk.columns), ("samples", bulk.index)):
            if index.nlevels > 1:
                raise InputError(
                    f"bulk: found names of {what} in {index.nlevels} levels (MultiIndex), expected "
                    f"one name each, such as table.{'columns' if what == 'genes' else 'index'}"
                    ".get_level_values(0)"
                )
    return bulk


def choose_calibration(calibrate, platform, model):
    """``(calibrate, platform)`` for these weights; says what auto came to, if it is not none.

    Raises:
        InputError: a platform is given, and cells are not calibrated by type.
    """
    auto = "types" if model.states else "none"
    if platform != "keep" and (auto if calibrate == "auto" else calibrate) != "types":
        why = f" ({auto} for these weights, of one sample)" if calibrate == "auto" else ""
        raise InputError(
            f"--platform: found {platform} with --calibrate {calibrate}{why}, expected --calibrate "
            "types, which alone tells the platform's part"
        )
    if calibrate != "auto":
        return calibrate, platform
    if not model.states:
        return "none", platform
    print(
        in_user_terms(
            f"--calibrate types, --platform {platform}: the reference was of several samples"
        )
    )
    return "types", platform


def known_proportions(proportions, cell_types, lineages=None):
    """KnownProportions of a csv or a DataFrame (R x columns); None for None."""
    if proportions is None:
        return None
    check_type("proportions", proportions, (pd.DataFrame, *PATH), "a DataFrame or a csv")
    check_type("lineages", lineages, (*PATH, type(None)), "a csv of the lineages")
    return read_proportions(proportions, cell_types, lineages)


@for_python
def mixtures(proportions, model, lineages=None):
    """Mixtures of the reference's cell types to generate, without a bulk.

    Args:
        proportions: fractions of cells, a DataFrame (R x types) or a csv. model: of :func:`load`.
        lineages: csv of the lineages that these are of.

    Returns:
        CellSource, for :func:`generate`.
    """
    check_model(model)
    check_type("proportions", proportions, (pd.DataFrame, *PATH), "a DataFrame or a csv")
    known = known_proportions(proportions, model.cell_types, lineages)
    proportions, encoded = encode_mixtures(model, known)
    return CellSource(proportions.names, [encoded], proportions)


@for_python
def generate(
    source,
    model,
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
        source: of :func:`deconvolve` or :func:`mixtures`. model: of :func:`load`.
            n_cells: cells of each sample (1 if each bulk yields one).
            cells_per_type: cells of each type of each sample, in place of as many as the
            proportions say. seed: the same seed gives the same cells on CPU. out: an ``.h5ad``, a
            10x ``.h5`` or a folder to write block by block. run: dict with ``name``, ``settings``
            and ``provenance``. metadata: DataFrame (S rows) for ``.obs``. shown: ShownCells
            to fill.

    Returns:
        AnnData (N x G) with counts in X; with ``out``, (N x 0), its tables alone.

    Raises:
        InputError: an argument has another type or value.
    """
    check_type("source", source, (CellSource, BulkSamples), "what deconvolve() or mixtures() gives")
    check_model(model)
    n_cells, cells_per_type, seed = check_amounts(n_cells, cells_per_type, seed)
    check_sink(out)
    check_source(source, model)
    check_tables(run, metadata, shown, len(source.names))
    metadata = None if metadata is None else named_apart(metadata)
    decoder, genes = model.decoder, model.genes
    bulks = source if isinstance(source, CellSource) else CellSource.of_samples(source)
    samples = bulks.samples
    run = run or describe(bulks, n_cells, cells_per_type, seed)
    codes = fixed_types(cells_per_type, len(model.cell_types))
    per_bulk = 1 if bulks.one_cell_each else n_cells if codes is None else len(codes)
    generator = torch.Generator(model.device).manual_seed(seed)
    table, n = CellTable(*decoder.mu.shape), per_bulk * len(bulks.names)
    bar = tqdm(total=n, desc="cells", unit="cell", unit_scale=True)
    if shown is not None:
        shown.start(n, len(genes), decoder.mu.shape[1])
    with bar, open_sink(out, genes, model.gene_ids, n) as sink:
        for first, encoded, log_factor in bulks.parts():
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
        if samples is not None:
            samples.compare_sums()
        if bulks.proportions is None:  # known when all have been encoded
            bulks.proportions = proportions_of(bulks, table, model)
        tables = table.to_anndata(bulks.proportions, run, samples, metadata)
        cells = sink.write_tables(tables)
    return tables if cells is None else cells


def proportions_of(bulks, table, model):
    """Proportions of bulks that have been encoded, of sums of single cells."""
    pi, library = np.concatenate(table.pi), mean_library(model.decoder)
    return make_proportions(bulks.names, model.cell_types, pi, library)


def check_amounts(n_cells, cells_per_type, seed):
    """The three as integers; cells_per_type may be None.

    Raises:
        InputError: one is no integer, or out of range.
    """
    if cells_per_type is not None:
        cells_per_type = check_number("cells_per_type", cells_per_type, 1)
    n_cells, seed = check_number("n_cells", n_cells, 0), check_number("seed", seed, 0, 2**32 - 1)
    return n_cells, cells_per_type, seed


def check_source(source, model):
    """Raise InputError unless bulks or mixtures were made with the cell types of a model."""
    proportions = source.proportions
    if proportions is not None and list(proportions.cell_types) != list(model.cell_types):
        raise InputError(
            f"source: made for {len(proportions.cell_types)} cell types "
            f"({some(proportions.cell_types)}), the model has {len(model.cell_types)} "
            f"({some(model.cell_types)}); expected one and the same model"
        )


def check_tables(run, metadata, shown, n_samples):
    """Raise InputError unless what cells are to say of themselves has the form they need."""
    keys, nothing = ("name", "settings", "provenance"), type(None)
    check_type("run", run, (dict, nothing), f"a dict with {some(keys)}")
    if run is not None and (missing := [key for key in keys if key not in run]):
        raise InputError(f"run: found no {some(missing)}, expected a dict with {some(keys)}")
    expected = f"a DataFrame with a row for each of {n_samples} samples"
    check_type("metadata", metadata, (pd.DataFrame, nothing), expected)
    if metadata is not None and len(metadata) != n_samples:
        raise InputError(f"metadata: found {len(metadata)} rows, expected {expected}")
    check_type("shown", shown, (ShownCells, nothing), "plots.report.ShownCells")


def check_sink(out):
    """Raise InputError unless cells can be written to this path; None is for memory."""
    if out is not None:
        check_type("out", out, PATH, "a path")
        if kind_of(out) is None:
            raise InputError(f"out: found {out}, expected a name ending in .h5ad or .h5, or none")


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


__all__ = ["Model", "deconvolve", "generate", "load", "mixtures", "train"]
