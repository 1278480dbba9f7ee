"""Generated cells against held-out real ones, and the ceiling of a perfect model.

Notation in shape comments: N cells, G genes, K cell types.
"""

from functools import partial

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm import trange

from data import align_genes, split_cells
from evaluation.metrics import CellMetrics
from generation import MODEL_FILES, Model, new_cells
from readers.counts import read_counts
from runtime.device import pick_device
from runtime.errors import InputError

PERFECT_SEED = 1_000_000  # added to the seed, for cells of the perfect model that are no others'
MAX_CELLS = 1_000  # held-out cells that are compared; distances of all pairs grow with its square
REAL = "other real cells"  # the method that draws training cells


def load_trained(folder, reference, device, min_cells=2):
    """Model of a folder of weights, and the Reference with the cells held out that it lists.

    min_cells: held-out cells that there must be.

    Raises:
        InputError: the weights are of another dataset, or hold out fewer cells.
    """
    model = Model.load(folder, device)
    reference = model.split(reference)
    if len(reference.test) < min_cells:
        raise InputError(
            f"{folder / MODEL_FILES[1]}: no cells were held out, so nothing can be measured"
        )
    return model, reference


def load_all(cfg, reference, min_cells=2):
    """:func:`load_trained` of all folders of weights that the settings name, a list."""
    folders, device = (cfg.weights, *cfg.more_weights), pick_device(cfg.device)
    return [load_trained(folder, reference, device, min_cells) for folder in folders]


def limit_held_out(reference, seed):
    """The Reference with at most ``MAX_CELLS`` held-out cells, drawn at random."""
    test = reference.test
    if len(test) <= MAX_CELLS:
        return reference
    print(f"{MAX_CELLS:,} of {len(test):,} held-out cells, drawn at random, are compared")
    drawn = np.random.default_rng(seed).choice(test, MAX_CELLS, replace=False)
    return reference.subset(np.sort(np.concatenate([reference.train, drawn])))


def match_types(codes, target, pool, rng):
    """Draw cells, as many of each type as in ``target`` or, of a type with fewer, all of them.

    codes: cell types (N). target: types to draw (M). pool: indices of the cells to draw from.

    Returns:
        indices (M or fewer).
    """
    drawn = []
    for k, n in zip(*np.unique(target, return_counts=True), strict=True):
        drawn.append(rng.permutation(pool[codes[pool] == k])[:n])
    return np.concatenate(drawn)


def decode_types(model, reference, codes, generator, log_factor=None, decoder=None):
    """Counts (N x G) of cells of types ``codes`` (N) in the genes of the data, CSR.

    z of the mixture, decoded. log_factor: (1, G) in the decoder's genes, or None. decoder: in place
    of the model's.
    """
    decoder = model.decoder if decoder is None else decoder
    k = torch.as_tensor(codes, device=decoder.mu.device)
    X = new_cells(decoder, k, generator, log_factor)
    return align_genes(X, model.genes, reference.genes, "the decoder", report=False)[0]


def draw_decoded(model, reference, generator, log_factor=None, decoder=None):
    """Cells of the held-out types by :func:`decode_types`."""
    codes = reference.test_codes
    return decode_types(model, reference, codes, generator, log_factor, decoder), codes


def draw_cell_type_nb(X, codes, target, rng):
    """Draw cells of independent genes, negative binomial with the moments of their cell type.

        θ = mean² / (variance - mean);   Poisson where the variance is not above the mean

    Library sizes are whatever the genes add up to.

    Args:
        X: training counts (N x G), CSR. codes: their types (N). target: types of the cells to
            draw (M). rng: numpy Generator.

    Returns:
        CSR int32 (M x G).
    """
    drawn = np.zeros((len(target), X.shape[1]), dtype=np.int32)
    for k in np.unique(target):
        train = X[np.flatnonzero(codes == k)].toarray().astype(np.float64)
        rows = np.flatnonzero(target == k)
        if len(train):
            mean = train.mean(axis=0)
            overdispersion = train.var(axis=0) - mean
            theta = np.clip(mean**2 / np.maximum(overdispersion, 1e-12), 1e-6, 1e6)
            rate = rng.gamma(theta, np.maximum(mean, 1e-12) / theta, (len(rows), len(mean)))
            drawn[rows] = rng.poisson(rate)
    return sp.csr_matrix(drawn)


def draw_nb(reference, rng):
    """Cells of the held-out types, genes negative binomial."""
    rows, target = reference.train, reference.test_codes
    return draw_cell_type_nb(reference.cells.X[rows], reference.codes[rows], target, rng), target


def draw_from_file(path, generated, codes, target, rng):
    """Cells of a file of generated ones (M x G) with types codes (M), of the types ``target``."""
    rows = match_types(codes, target, np.arange(len(codes)), rng)
    if len(rows) < 2:
        raise InputError(f"{path}: found {len(rows)} cells of the held-out types")
    return generated[rows], codes[rows]


def read_generated(path, model, reference):
    """Read an .h5ad of generated cells.

    Returns:
        counts (M x G) in the genes of the data, cell types (M).

    Raises:
        InputError: unreadable, no ``cell_type``, a type that the model does not know, or values
            that are not counts.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; bulk2sc.py makes it")
    generated = read_counts(path)
    if "cell_type" not in generated.obs:
        raise InputError(f"{path}: has no column cell_type, expected cells by bulk2sc.py")
    names = generated.obs["cell_type"].astype(str)
    cell_types = model.cell_types
    codes = pd.Index(cell_types).get_indexer(names)
    if (codes < 0).any():
        unknown = names[codes < 0].iloc[0]
        raise InputError(f"{path}: cell type {unknown} is not one of the model's")
    X, _ = align_genes(generated.X, generated.var_names, reference.genes, path)
    n_target = np.bincount(reference.test_codes, minlength=len(cell_types))
    n_file = np.bincount(codes, minlength=len(cell_types))
    short = {
        cell_types[k]: f"{n_file[k]} of {n_target[k]}" for k in np.flatnonzero(n_file < n_target)
    }
    if short:
        print(f"{path}: fewer cells than are held out: {short}")
    return X, codes


def simulate(model, reference, generator):
    """A data set of the model's own cells, AnnData (N x G): as many of each type as real ones."""
    simulated = reference.cells.copy()
    simulated.X = decode_types(model, reference, reference.codes, generator)
    return simulated


def compare_perfect(model, reference, generator, seed, cfg):
    """Fresh cells of the model against a data set of its cells, also in the metrics' space.

    Args:
        generator: torch Generator. seed: of compare.

    Returns:
        rows of :meth:`CellMetrics.compare`.
    """
    simulated = simulate(model, reference, generator)
    cell_metrics = CellMetrics(simulated, reference.held_out, reference.codes, cfg.n_trees)
    return cell_metrics.compare(*draw_decoded(model, reference, generator), seed)


def excess_auroc(values, ceiling):
    """Rows of the excess of AUROC over the perfect model's.

    values, ceiling: rows of :meth:`CellMetrics.compare`, of a method and of the perfect model.
    """
    auroc, best = ({metric: v for metric, k, v in rows if k is None} for rows in (values, ceiling))
    names = {f"random-forest AUROC, {of}": f"excess of AUROC, {of}" for of in ("PCs", "genes")}
    return [(excess, None, auroc[name] - best[name]) for name, excess in names.items()]


def measure_left_out(reference, cfg):
    """Half of the training cells, in a space that was fitted without them."""
    cells, codes, held_out = reference.cells, reference.codes, reference.held_out
    left_out = reference.train[split_cells(codes[reference.train], 0.5, cfg.seed)]
    if len(np.unique(codes[left_out])) < 2:
        return []
    others = np.ones(cells.n_obs, dtype=bool)
    others[left_out] = False
    cell_metrics = CellMetrics(cells[others].copy(), held_out[others], codes[others], cfg.n_trees)
    left_out = np.random.default_rng(cfg.seed).permutation(left_out)[:MAX_CELLS]
    values = cell_metrics.compare(cells.X[left_out], codes[left_out], cfg.seed)
    # Copying is not measured: these cells are neither generated nor part of the space.
    return [("unseen real cells", *row) for row in values if not row[0].startswith("nearest")]


def tool_methods(model, reference, cfg, rng):
    """bulk2sc (or a file of its cells) and a simple baseline: name -> function that draws cells."""
    generator = torch.Generator(model.device).manual_seed(cfg.seed)
    ours = partial(draw_decoded, model, reference, generator)
    if (path := getattr(cfg, "generated", None)) is not None:
        generated = read_generated(path, model, reference)
        ours = partial(draw_from_file, path, *generated, reference.test_codes, rng)
    return {"bulk2sc": ours, "cell-type NB": partial(draw_nb, reference, rng)}


def measure_cells(model, reference, methods, cfg):
    """Every method's cells against the held-out ones, and a perfect model's.

    methods: name -> function that draws counts (N x G) and their types (N).

    Returns:
        rows (method, metric, type code or None for all types, value).
    """
    cell_metrics = CellMetrics(reference.cells, reference.held_out, reference.codes, cfg.n_trees)
    own_generator = torch.Generator(model.device).manual_seed(cfg.seed + PERFECT_SEED)
    rows, of_perfect = [], []
    for i in trange(cfg.n_draws, desc=f"cells of {model.folder}", unit="draw"):
        ceiling = compare_perfect(model, reference, own_generator, i, cfg)
        of_perfect += [("perfect model", *row) for row in ceiling]
        for method, draw in methods.items():
            real = method == REAL
            values = cell_metrics.compare(*draw(), seed=i, trained_on=real)
            # The space is fitted on these real cells, too, which no generated cells can match.
            values += [] if real else excess_auroc(values, ceiling)
            rows += [(method, *row) for row in values]
    print(f"{model.folder}: unseen real cells", flush=True)
    return rows + measure_left_out(reference, cfg) + of_perfect
