"""Bulk RNA-seq in, single cells out.

    python bulk2sc.py                                          # embedded data, shipped weights
    python bulk2sc.py --bulk samples.csv --n-cells 1000        # 1,000 cells for each bulk sample
    python bulk2sc.py --known-proportions mixtures.csv         # 1,000 cells for each mixture

For each bulk: Bulk Encoder -> cell type k ~ proportions -> z ~ N(mu_k, sigma_k^2) -> scDecoder ->
counts of one cell. Without --bulk, each batch of --batch-size reference cells is summed into one
bulk, and each batch yields one cell. Writes one .h5ad and, of bulk samples or mixtures, tables and
a picture beside it (see README, "The output").
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from data import DatasetSettings
from readers.bulk_options import BulkOptions
from runtime.errors import InputError
from runtime.flags import in_groups
from runtime.outputs import Outputs
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "bulk known_proportions lineages",
        "output": "n_cells cells_per_type out format report tables_only dry_run force",
        "model": "weights mrna_content calibrate platform",
        "reading tables": "genes_in gene_column columns bulk_unit log pseudocount",
        "reference cells": "data batch_size labels samples",
    },
    renamed={"proportions": "known_proportions"},
)
@dataclass
class Settings(DatasetSettings, BulkOptions):
    """Generate single cells from bulk RNA-seq samples.

    Example: python bulk2sc.py --bulk samples.csv --n-cells 1000
    """

    weights: Path | None = None
    """Folder of the models. Default: weights/pbmc with --bulk or --known-proportions, else
    weights."""
    bulk: tuple[Path, ...] = ()
    """Bulk samples: a table (csv, tsv, GCT, .xlsx, .h5ad; genes in rows or columns, symbols or
    Ensembl ids), several files of quantifiers, or a folder of them. Default: batches of --data."""
    labels: str | None = None
    """Not read here: cells of --data are summed whatever their type. Other scripts need it."""
    n_cells: int = 1000
    """Cells to generate: for each sample of --bulk or --known-proportions, in all without them."""
    batch_size: int = 100
    """Reference cells that make one bulk, when there is no --bulk."""
    known_proportions: Path | None = None
    """Known fractions of cells, or percentages: csv, a row for each sample, a column for each cell
    type. They take the place of estimates; what is empty or missing is estimated within what is
    left. Without --bulk, the mixtures to generate."""
    lineages: Path | None = None
    """The columns of --known-proportions are lineages: csv cell_type,lineage. Types share the
    fraction of their lineage as estimated."""
    mrna_content: Literal["auto", "reference", "published"] = "auto"
    """By whose mRNA content cells of --bulk are counted. reference: the counts of its cells, right
    for sums of single cells; published: measurements of blood cells (mrna_content.csv); auto:
    published if the bulks are of whole transcripts, by their share of ribosomal proteins."""
    calibrate: Literal["auto", "none", "uniform", "types"] = "auto"
    """What generated cells take of their bulk beyond proportions and states (needs --bulk). types:
    what a gene differs by is allotted to the cell types and to the platform; uniform: one factor
    per gene for all types, so that cells add up to their bulk, the platform's part included; none;
    auto: types if the reference was of several samples, else none."""
    platform: Literal["keep", "remove"] = "keep"
    """For --calibrate types: what all bulks share against the reference is the platform's. keep:
    cells show it as the bulks do; remove: cells are as the reference's platform would measure
    them."""
    cells_per_type: int | None = None
    """Cells to generate of each cell type, in place of as many as the proportions say: of each
    sample of --bulk or --known-proportions, in all without them."""
    out: Path = Path("generated.h5ad")
    """The generated cells: an .h5ad, a 10x .h5, or a 10x folder (a name without ending). Tables and
    pictures get its name with another ending, or stand in the folder."""
    format: Literal["png", "pdf", "svg"] = "png"
    """File format of pictures."""
    tables_only: bool = False
    """Of --bulk, write proportions, fit, expression, picture and report alone: no cells."""
    report: bool = True
    """Write a report of --bulk, a page to read; --no-report saves a few seconds."""
    dry_run: bool = False
    """Say how --bulk is read, and stop."""
    force: bool = False
    """Replace files that are not from bulk2sc, too; without it only its own are replaced."""

    def __post_init__(self):
        super().__post_init__()
        if self.weights is None:  # models of blood, unless the bulks are of the reference's batches
            of_samples = self.bulk or self.known_proportions is not None
            self.weights = Path("weights/pbmc" if of_samples else "weights")
        if self.n_cells < 0:
            raise InputError(f"--n-cells: found {self.n_cells}, expected 0 or more")
        if self.cells_per_type is not None and self.cells_per_type < 1:
            raise InputError(f"--cells-per-type: found {self.cells_per_type}, expected 1 or more")
        if self.batch_size < 1:
            raise InputError(f"--batch-size: found {self.batch_size}, expected 1 or more")
        if self.calibrate != "auto" and not self.bulk:
            raise InputError("--calibrate: found no --bulk, expected bulk samples to add up to")
        if self.calibrate in ("none", "uniform") and self.platform != "keep":
            raise InputError(
                f"--platform: found {self.platform} with --calibrate {self.calibrate}, expected "
                "--calibrate types, which alone tells the platform's part"
            )
        if self.tables_only and not self.bulk:
            raise InputError("--tables-only: found no --bulk, expected bulk samples")
        if self.tables_only and self.cells_per_type is not None:
            raise InputError("--tables-only: found --cells-per-type, expected one of the two")
        if self.dry_run and not self.bulk:
            raise InputError("--dry-run: found no --bulk, expected files to say how they are read")
        if not 0 <= self.pseudocount < float("inf"):
            raise InputError(f"--pseudocount: found {self.pseudocount}, expected 0 or more")
        if self.lineages is not None and self.known_proportions is None:
            raise InputError(
                "--lineages: found no --known-proportions, expected fractions of lineages"
            )
        given = (*self.bulk, self.known_proportions, self.lineages, self.data, self.labels)
        every = Outputs(self.out, True, True, self.format, cells=not self.tables_only)
        every.check_inputs([Path(path) for path in given if path is not None])


def outputs_of(cfg):
    """The files of a run with these settings."""
    of_samples = bool(cfg.bulk or cfg.known_proportions)
    of_bulks, cells = bool(cfg.bulk), not cfg.tables_only
    return Outputs(cfg.out, of_samples, of_bulks, cfg.format, cfg.report, cells)


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

from functools import partial

import numpy as np
import pandas as pd

from api import deconvolve, generate, mixtures, named_apart
from data import Reference, shipped
from deconvolution.fit import MISFIT
from generation import MODEL_FILES, CellSource, Model, encode_batches
from plots.proportions import write_proportions
from plots.report import N_SHOWN, ShownCells, write_report
from readers.bulk import read_bulk
from readers.bulk_files import read_sample_metadata
from readers.counts import EMBEDDED
from readers.fingerprint import digest
from runtime.device import pick_device, seed_everything
from runtime.errors import one_line, plain, some
from runtime.provenance import command_of, files_read, run_name, typed
from runtime.script import recorded
from runtime.version import VERSION
from runtime.writing import write_whole


def print_cell_types(proportions, cells=None):
    """Print mean proportion and number of cells of each type; cells: the AnnData, if any."""
    pi, known = proportions.cells.astype(np.float64), proportions.known
    title = "mean predicted proportion" if known is None else "mean proportion"
    table = {title: pi.mean(axis=0) if len(pi) else np.nan}
    if cells is not None:
        table["cells"] = np.bincount(cells.obs["cell_type"].cat.codes, minlength=pi.shape[1])
    if known is not None:
        table["samples where known"] = known.sum(axis=0)
    table = pd.DataFrame(table, index=proportions.cell_types)
    print(table.to_string(float_format="{:.3f}".format))


def print_fit(cfg, samples):
    """Print how well the reference's cell types add up to each sample; warn where they do not."""
    fit, unknown = samples.fit, samples.unknown
    n_shown = min(len(fit), 20)
    print(f"fit of {'the samples' if n_shown == len(fit) else f'the first {n_shown} samples'}:")
    print(fit.head(n_shown).to_string(float_format="{:.3f}".format))
    if unknown.is_flagged.any():
        worst = int(np.argmax(np.where(unknown.is_flagged, unknown.share, -1)))
        warn(
            f"{name_of(cfg.bulk)}: {unknown.is_flagged.sum()} of {len(fit)} samples "
            f"({some(fit.index[unknown.is_flagged])}) hold much RNA of types that the reference "
            f"lacks; in {fit.index[worst]} {unknown.share[worst]:.0%} ({unknown.describe(worst)}). "
            "Proportions are of the other cells"
        )
    if samples.is_shallow.any():
        depth = samples.values.sum(axis=1)[samples.is_shallow]
        warn(
            f"{name_of(cfg.bulk)}: {samples.is_shallow.sum()} of {len(fit)} samples "
            f"({some(fit.index[samples.is_shallow])}) have few counts, from {depth.min():,.0f} on "
            "in the genes of the model: proportions are rough, and whether the reference fits "
            "cannot be told"
        )
    unlike = fit.index[(fit["misfit"] > MISFIT) & ~samples.is_shallow]
    if len(unlike):
        warn(
            f"{name_of(cfg.bulk)}: {len(unlike)} of {len(fit)} samples ({some(unlike)}) are not "
            f"what the reference's cell types add up to (misfit above {MISFIT}): another tissue, "
            "or a cell type that the reference lacks"
        )


def warn(text):
    """Print a warning in one line on stderr."""
    print(f"warning: {text}", file=sys.stderr)


def describe_run(cfg, bulk=None):
    """What an output says of the run it comes from: its name, settings and provenance.

    bulk: the Bulk that was read, in place of the checksum of a pipe.
    """
    left_out = {"dry_run", "force", "report", "tables_only"}
    options = {field.name for field in fields(BulkOptions)}
    if not cfg.bulk:
        left_out |= {*options, "mrna_content", "calibrate", "platform"}
    roles = {"weights": [cfg.weights / name for name in MODEL_FILES], "bulk": cfg.bulk}
    if cfg.bulk or cfg.known_proportions is not None:
        left_out |= {"labels", "samples", "batch_size"}
        left_out |= {"data"} if cfg.data == EMBEDDED or not cfg.bulk else set()
    if cfg.data != EMBEDDED and "data" not in left_out:
        roles["data"] = [cfg.data]
    for name in ("known_proportions", "lineages"):
        roles[name] = [] if getattr(cfg, name) is None else [getattr(cfg, name)]
    settings, files = typed(cfg, left_out), files_read(roles)
    contents = "" if bulk is None else digest(bulk.values, bulk.measured, bulk.samples)
    name = run_name(settings, files, contents, aside=(*roles, "out", "format", "device"))
    provenance = {
        "version": VERSION,
        "run": name,
        "command": command_of(cfg, "bulk2sc.py"),
        "seed": cfg.seed,
        "files": files,
    }
    return {"name": name, "settings": settings, "provenance": provenance}


def write_samples(outputs, proportions, samples=None):
    """Write the proportions of samples or mixtures beside --out and, with --bulk, their fit."""
    tables = {"proportions.csv": proportions.to_table()}
    if samples is not None:
        tables["fit.csv"] = samples.fit.rename_axis("sample").reset_index()
    for ending, table in tables.items():
        write_whole(outputs[ending], partial(table.to_csv, index=False))
    written = [outputs[ending].name for ending in tables]
    picture = outputs[outputs.picture]
    if draw(write_proportions, picture, proportions):
        written.append(picture.name)
    print(f"wrote {', '.join(written)} to {outputs['fit.csv'].parent}")


def draw(write, path, *arguments):
    """Write a picture or a report, and whether that worked; a failure is only a warning."""
    try:
        write(path, *arguments)
    except Exception as error:  # matplotlib, its fonts, the disk: cells and tables matter more
        warn(f"{path}: could not be drawn ({plain(one_line(error))})")
        return False
    return True


def write_types(outputs, samples):
    """Write what each type is expected to express in each sample, beside --out."""
    path, (S, K, G) = outputs["expression.h5ad"], samples.expression.shape
    samples.write_expression(path)
    print(f"wrote {path}: {S * K:,} cell types of samples x {G:,} genes")


def name_of(bulk):
    """What messages call the files of --bulk (a tuple)."""
    return str(bulk[0]) if len(bulk) == 1 else f"--bulk ({len(bulk)} files)"


def read_reference(cfg, genes):
    """Some cells of --data for the report: counts (M x G) and the mask of genes that it has (G).

    None without --data.
    """
    if cfg.data == EMBEDDED:
        return None
    reference = Reference.load(cfg, need_labels=False)
    n = reference.cells.n_obs
    rows = np.linspace(0, n - 1, min(n, N_SHOWN), dtype=int)
    return reference.counts(genes, cfg.data, rows, report=True)


def read_source(cfg, model, bulk, rng):
    """What cells are to be generated of, as the settings say.

    Returns:
        CellSource, and DataFrame of what the input says of its samples, or None.
    """
    if bulk is not None:
        given = {name: getattr(cfg, name) for name in ("mrna_content", "calibrate", "platform")}
        known = {"proportions": cfg.known_proportions, "lineages": cfg.lineages}
        samples = deconvolve(bulk, model, **known, **given)
        metadata = read_sample_metadata(cfg.bulk, bulk.samples)
        source = CellSource.of_samples(samples)
        return source, None if metadata is None else named_apart(metadata)
    if cfg.known_proportions is not None:
        return mixtures(cfg.known_proportions, model, cfg.lineages), None
    n = cfg.n_cells
    if cfg.cells_per_type is not None:
        n = cfg.cells_per_type * len(model.cell_types)
    encoded = encode_batches(cfg, n, model, rng)
    return CellSource([f"batch_{i}" for i in range(n)], encoded, one_cell_each=True), None


def main(cfg):
    outputs = outputs_of(cfg)
    if not cfg.dry_run:
        outputs.check_replaced(cfg.force)
    with recorded() as said:
        generate_and_write(cfg, outputs, said)


def generate_and_write(cfg, outputs, said):
    """Read, deconvolve, generate and write; said: gets the lines that are printed meanwhile."""
    cfg.weights = shipped(cfg.weights)
    rng = seed_everything(cfg.seed)
    model = Model.load(cfg.weights, pick_device(cfg.device))
    genes = model.genes
    print(f"{cfg.weights}: {len(model.cell_types)} cell types, {len(genes):,} genes")
    bulk = None
    if cfg.bulk:
        bulk = read_bulk(cfg.bulk, genes, model.gene_ids, cfg)
        bulk.where = name_of(cfg.bulk)
        if cfg.dry_run:
            return
    bulks, metadata = read_source(cfg, model, bulk, rng)
    reference = read_reference(cfg, genes) if cfg.bulk and cfg.report else None
    is_reported = "report.html" in outputs.beside
    n_read, run = len(said), describe_run(cfg, bulk)
    shown = ShownCells() if is_reported and not cfg.tables_only else None
    options = {"run": run, "metadata": metadata, "shown": shown}
    cells = None
    if not cfg.tables_only:
        asked = cfg.n_cells, cfg.cells_per_type, cfg.seed, cfg.out
        cells = generate(bulks, model, *asked, **options)
        if outputs.kind != "h5ad":
            write_whole(outputs["cells.csv"], partial(cells.obs.to_csv, index_label="cell"))
    print_cell_types(bulks.proportions, cells)
    if bulks.samples is not None:
        print_fit(cfg, bulks.samples)
    if not bulks.one_cell_each:  # else every cell has a bulk of its own
        write_samples(outputs, bulks.proportions, bulks.samples)
    if bulks.samples is not None:
        write_types(outputs, bulks.samples)
    if is_reported:
        page, given = outputs["report.html"], (run, bulks.samples, cells, shown, said, n_read)
        if draw(write_report, page, *given, reference):
            cells_too = ", what the cells look like" if cells is not None else ""
            print(f"wrote {page}: what was read, how samples fit{cells_too}")
    if cells is None:
        print("no cells, as --tables-only asks for; so fit.csv has no agreement with their sums")
        if cfg.out.exists():
            print(f"{cfg.out}: of an earlier run, left as it is")
        return
    source = "mixtures" if bulks.samples is None and cfg.known_proportions is not None else "bulks"
    n = len(bulks.names)
    print(f"wrote {cfg.out}: {cells.n_obs:,} cells x {len(genes):,} genes from {n:,} {source}")


if __name__ == "__main__":
    run_script(main, settings)
