"""Cell types from the cells' own transcripts: lineages, then CD4 or CD8, then naive or memory.

The types of a tissue form a tree (cell_types.csv). At each node of it, two views of a cell tell its
children apart, as in co-training (Blum and Mitchell, COLT 1998):

- its own counts of their markers, negative binomial in each child, and
- all its other genes, by a logistic regression on their principal components.

Cells whose markers are clear, by themselves or pooled over their neighbours, start; the rest
follows by expectation-maximisation. The regression is out of fold throughout, so that no cell
confirms itself.
"""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import softmax
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from data import library_size
from readers.bounded import read_table
from runtime.errors import InputError, some

UNKNOWN = "Unknown"
COLUMNS = ["tissueType", "cellName", "parent", "lineage", "ontologyId", "ontologyTerm"]
COLUMNS += ["positive", "negative", "ownMarkers"]

N_NEIGHBORS = 15  # cells of a pool, fewer if there are fewer than 900 cells
POOL_PCS = 30  # principal components in which neighbours are found
N_PCS = 50  # principal components that the regression reads
N_GENES = 2000  # variable genes behind them
SEED_SCORE = 0.3  # pooled score, of 1, from which on a cell starts as a lineage
SEED_MARGIN = 0.15  # lead over the second-best score from which on a cell starts as a type
MIN_SCORE = 0.15  # pooled score of its lineage below which a cell is Unknown
MIN_SEEDS = 3  # with fewer cells to start from, a type is taken for absent
MIN_AGREEMENT = 0.6  # AUROC of one view by the other below which types cannot be told apart
NEARLY_ALL = 0.9  # of the cells to start from
MIN_CELLS = 20  # of a node that is split further
MAX_COUNTS = 3  # of one marker in one cell; more say nothing new
MARKER_WEIGHT = 0.5  # of the counts of many markers, as they depend on each other
MIN_SIZE = 4  # of the negative binomials; less would let a cell without markers be any type
MAX_STEPS = 10  # of expectation-maximisation
DOUBLETS = 0.01  # share of cells that are two of different lineages, before their counts are seen
MIN_PROBABILITY = 1e-5  # by the regression, so that counts can always decide otherwise
MAX_CELLS = 20_000  # that one regression is trained on
N_FOLDS = 5


@dataclass(frozen=True)
class CellType:
    """A row of cell_types.csv: a node of the tree."""

    name: str
    parent: str
    lineage: str
    ontology_id: str
    ontology_term: str
    positive: tuple
    negative: tuple
    own_markers: int  # that a cell must carry itself to start as this type; 0: pooled scores


# ----------------------------------------------------------------------------------- table of types


def symbols(text):
    """Gene symbols of a comma-separated text, in capitals, without repeats."""
    return tuple(dict.fromkeys(g for g in re.sub(r"\s", "", text).upper().split(",") if g))


def read_cell_types(path, tissue):
    """The tree of cell types of a tissue.

    Returns:
        dict: name -> CellType; empty if the table does not know the tissue.

    Raises:
        InputError: unreadable, a column missing, or a row that :func:`check_tree` refuses.
    """
    table = read_table(path)
    if missing := [name for name in COLUMNS if name not in table]:
        raise InputError(
            f"{path}: no column {', '.join(missing)}, expected a table with {', '.join(COLUMNS)}"
        )
    types = {}
    for row in table.loc[table["tissueType"] == tissue, COLUMNS[1:]].itertuples(index=False):
        name, parent, lineage, ontology_id, term, positive, negative, own = map(str.strip, row)
        if name in types:
            raise InputError(f"{path}: {name} of {tissue} has two rows, expected one")
        if own and not own.isdigit():
            raise InputError(f"{path}: ownMarkers of {name} is {own}, expected a whole number")
        markers = symbols(positive), symbols(negative)
        types[name] = CellType(name, parent, lineage, ontology_id, term, *markers, int(own or 0))
    check_tree(types, path)
    return types


def check_tree(types, path):
    """Refuse a parent without a row or below its own child, and children that start unlike."""
    for cell_type in types.values():
        above = [cell_type.name]
        while parent := types[above[-1]].parent:
            if parent not in types:
                raise InputError(f"{path}: {above[-1]} has the parent {parent}, which has no row")
            if parent in above:
                raise InputError(f"{path}: {parent} is its own ancestor, expected a tree")
            above.append(parent)
        siblings = [t for t in types.values() if t.parent == cell_type.parent]
        if len({t.own_markers > 0 for t in siblings}) > 1:
            raise InputError(
                f"{path}: of {some([t.name for t in siblings])} some have ownMarkers and some have "
                "none, expected all or none of one parent's children"
            )


# ---------------------------------------------------------------------------------------- features


def scale_genes(X):
    """Each column of a sparse matrix (N x G) to mean 0 and variance 1, at most 10; dense."""
    X = X.toarray().astype(np.float64)
    sd = X.std(axis=0, ddof=1)
    return np.minimum((X - X.mean(axis=0)) / np.where(sd > 0, sd, 1), 10)


def variable_genes(X, n_genes):
    """Indices of the genes that vary most, of counts (N x G), around a quadratic trend.

    The trend of log variance by log mean is fitted by least squares, since the loess of
    :func:`counts.genes.choose_genes` cannot be fitted to the few cells of a small node.
    """
    if X.shape[1] <= n_genes:
        return np.arange(X.shape[1])
    mean = np.asarray(X.mean(axis=0)).ravel()
    variance = np.asarray(X.multiply(X).mean(axis=0)).ravel() - mean**2
    x, y = np.log10(mean), np.log10(np.maximum(variance, 1e-12))
    excess = y - np.polyval(np.polyfit(x, y, 2), x)
    return np.sort(np.argsort(-excess, kind="stable")[:n_genes])


def principal_components(X, log, n_pcs, seed):
    """Principal components (N, at most n_pcs) of the variable genes of counts X (N x G).

    Genes in fewer than 3 cells or 0.5 % of them are left out. log: X log-normalised (N x G).
    """
    n_cells = np.asarray((X > 0).sum(axis=0)).ravel()
    genes = np.flatnonzero(n_cells >= max(3, 0.005 * X.shape[0]))
    genes = genes[variable_genes(X[:, genes].astype(float), N_GENES)]
    z = scale_genes(log[:, genes])
    n_pcs = min(n_pcs, *(n - 1 for n in z.shape))
    if n_pcs < 1:
        return np.zeros((len(z), 1))
    return PCA(n_pcs, svd_solver="randomized", random_state=seed).fit_transform(z)


def neighbor_pools(pcs):
    """Matrix (N x N, CSR) whose row i averages over cell i and its nearest cells."""
    k = int(np.clip(np.sqrt(len(pcs)) / 2, 3, N_NEIGHBORS))
    k = min(k, len(pcs))
    nearest = NearestNeighbors(n_neighbors=k).fit(pcs[:, :POOL_PCS])
    return (nearest.kneighbors_graph(pcs[:, :POOL_PCS]) / k).tocsr()


def pooled_scores(log, genes, types, pools, quantile):
    """Mean expression of each type's markers in the pool of each cell, between 0 and 1.

    A marker's log-normalised expression in the pools is scaled to the range of its quantiles
    1 − q and q over all pools, but at least to log 2 (one count in 10,000), so that noise in
    markers that nobody expresses stays small.

    Args:
        log: log-normalised (N x G). genes: Index of G symbols. types: K CellTypes. pools: (N x N).

    Returns:
        scores by positive markers (N, K), the same by negative ones (N, K).
    """
    markers = {g for t in types for g in (*t.positive, *t.negative)}
    columns = np.flatnonzero(genes.isin(markers) & ~genes.duplicated())
    expression = np.expm1(log[:, columns].toarray())
    expression = np.log1p(pools @ expression)
    low, high = np.quantile(expression, [1 - quantile, quantile], axis=0)
    scaled = np.clip((expression - low) / np.maximum(high - low, np.log(2)), 0, 1)
    scaled = pd.DataFrame(scaled, columns=genes[columns])

    def mean_of(wanted):
        return scaled[[g for g in wanted if g in scaled]].mean(axis=1).fillna(0).to_numpy()

    positive = [mean_of(t.positive) for t in types]
    negative = [mean_of(t.negative) for t in types]
    return np.stack(positive, axis=1), np.stack(negative, axis=1)


# ------------------------------------------------------------------------------------- two views


def stratified_folds(codes, rng):
    """Fold (N) of each cell, 0 to N_FOLDS − 1, each class spread evenly over the folds."""
    order = rng.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    folds = np.empty(len(codes), int)
    folds[order] = np.arange(len(codes)) % N_FOLDS
    return folds


def regression_view(pcs, R, seed):
    """Out-of-fold log probabilities (N, K) by logistic regression on soft labels.

    Args:
        pcs: (N, D). R: responsibilities (N, K); cells without any are not trained on.
    """
    rng = np.random.default_rng(seed)
    out = np.zeros(R.shape)
    folds = stratified_folds(np.where(R.sum(axis=1) > 0, R.argmax(axis=1), -1), rng)
    for fold in range(N_FOLDS):
        train = np.flatnonzero(folds != fold)
        train = rng.permutation(train)[:MAX_CELLS]
        cell, code = np.nonzero(R[train] > 1e-3)
        if len(np.unique(code)) < 2:  # nothing to tell apart
            continue
        weight = R[train][cell, code]
        model = LogisticRegression(C=0.1, tol=1e-3, max_iter=300)
        model.fit(pcs[train][cell], code, sample_weight=weight)
        held_out = model.predict_proba(pcs[folds == fold])
        out[folds == fold] = np.log(MIN_PROBABILITY)
        held_out = np.log(np.maximum(held_out, MIN_PROBABILITY))
        out[np.ix_(folds == fold, model.classes_)] = held_out
    return out


def count_means(counts, depth, R):
    """Mean of each set of markers in each type, per relative depth (K types, K sets)."""
    return (R.T @ counts + 0.5) / ((R.T @ depth)[:, None] + 5)


def count_sizes(counts, depth, R, means):
    """Size (1 / dispersion, K sets) of the negative binomial of each set, over all types.

    By moments, within types; MIN_SIZE to 1,000, which is Poisson.
    """
    sizes = np.empty(len(means))
    for s, y in enumerate(counts.T):
        mu = depth[:, None] * means[:, s]  # (N, K)
        surplus = (R * ((y[:, None] - mu) ** 2 - mu)).sum() / (R * mu**2).sum()
        sizes[s] = 1 / np.clip(surplus, 1e-3, 1 / MIN_SIZE)
    return sizes


def count_view(counts, depth, means, sizes):
    """Negative binomial log-likelihoods (N, M) of marker counts under M profiles.

    What does not depend on the profile is left out.

    Args:
        counts: of each set of markers (N, K). depth: relative library sizes (N).
        means: (M, K). sizes: (K).
    """
    out = np.zeros((len(counts), len(means)))
    for y, mean, size in zip(counts.T, means.T, sizes, strict=True):
        mu = depth[:, None] * mean  # (N, M)
        out += y[:, None] * np.log(mu / (mu + size)) - size * np.log1p(mu / size)
    return out


def fit_views(pcs, counts, depth, seeds, weight, seed):
    """Responsibilities (N, K) by expectation-maximisation from the cells that start (N, K, 0/1).

        log r_ik = log p(k | other genes of i) + weight · log p(marker counts of i | k)

    Returns:
        responsibilities (N, K), log probabilities by the regression alone (N, K).
    """
    balance = seeds / seeds.sum(axis=0) * seeds.sum() / seeds.shape[1]
    view = regression_view(pcs, balance, seed)
    R = np.where(seeds.any(axis=1, keepdims=True), seeds, np.exp(view))
    for _ in range(MAX_STEPS):
        means = count_means(counts, depth, R)
        sizes = count_sizes(counts, depth, R, means)
        new = softmax(view + weight * count_view(counts, depth, means, sizes), axis=1)
        change, R = np.abs(new - R).mean(), new
        if change < 3e-3:
            break
        view = regression_view(pcs, R, seed)
    return R, view


def agreement(view, counts, depth, R):
    """AUROC (K) with which the regression finds the cells richest in each type's own markers.

    As many cells count as rich as there are of the type.
    """
    rate = counts / depth[:, None]
    rich = [r > np.quantile(r, 1 - share) for r, share in zip(rate.T, R.mean(axis=0), strict=True)]
    return np.array([auroc(r, v) for r, v in zip(rich, view.T, strict=True)])


def auroc(positive, score):
    """Probability that a positive cell scores above a negative one; 0.5 if one kind is absent."""
    n, m = positive.sum(), (~positive).sum()
    if not n or not m:
        return 0.5
    return (rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m)


# --------------------------------------------------------------------------------------------- tree


def detected(X, genes, markers):
    """How many of these markers each cell has counts of (N)."""
    return (X[:, genes.isin(markers)] > 0).sum(axis=1).A1


def seeds_by_pool(score, least):
    """Cells whose best score (N, K) is above ``least`` and leads clearly (N, K, bool)."""
    ranked = np.sort(np.c_[np.zeros(len(score)), score], axis=1)
    best, second = ranked[:, -1], ranked[:, -2]
    clear = (best > least) & (best - second > SEED_MARGIN)
    return clear[:, None] & (score == best[:, None])


def seeds_by_cell(X, genes, types):
    """Cells that carry enough markers of one type and none of another (N, K, bool).

    A cell with two of a type's negative markers does not count.
    """
    carried = np.stack([detected(X, genes, t.positive) for t in types], axis=1)
    against = np.stack([detected(X, genes, t.negative) for t in types], axis=1)
    enough = carried >= [t.own_markers for t in types]
    alone = (carried > 0).sum(axis=1, keepdims=True) == 1
    return enough & alone & (against < 2)


def marker_counts(X, genes, types):
    """Counts of each type's markers (N, K), of one marker at most MAX_COUNTS in a cell.

    Of types that cells start as by ``own_markers``, markers do not count in a cell that carries two
    of the negative ones (CD40LG in MAIT cells, which are no CD4 T cells).
    """
    out = [X[:, genes.isin(t.positive)].minimum(MAX_COUNTS).sum(axis=1).A1 for t in types]
    valid = [(t.own_markers == 0) | (detected(X, genes, t.negative) < 2) for t in types]
    return np.stack([c * v for c, v in zip(out, valid, strict=True)], axis=1).astype(float)


def find_seeds(X, log, genes, types, pools):
    """Cells that are clearly of one child (n, K, bool) and scores by its markers (n, K)."""
    is_root = types[0].parent == ""
    # The highest pool is the scale of lineages, as they may be rare.
    positive, negative = pooled_scores(log, genes, types, pools, 1.0 if is_root else 0.95)
    if types[0].own_markers:
        return seeds_by_cell(X, genes, types), positive
    return seeds_by_pool(positive - negative, SEED_SCORE if is_root else 0), positive


def split_node(X, log, genes, types, space, seed):
    """Probabilities of the children of a node for its cells.

    A child without MIN_SEEDS cells to start from is taken for absent. If the two views do not
    agree on states, all cells are the state that nearly all seeds carry the markers of, or none.

    Args:
        X, log: counts and log-normalised (n x G). genes: Index of G symbols. types: K children.
        space: components (n, D) in which cells are neighbours; None: those of the other genes.

    Returns:
        probabilities (n, K), 0 of absent children; scores by positive markers (n, K).
    """
    is_root, by_cell = types[0].parent == "", types[0].own_markers > 0
    other = ~genes.isin([g for t in types for g in t.positive])
    pcs = principal_components(X[:, other], log[:, other], N_PCS, seed)
    pools = neighbor_pools(pcs if space is None else space)
    seeds, scores = find_seeds(X, log, genes, types, pools)
    n_seeds = seeds.sum(axis=0)
    present = n_seeds >= MIN_SEEDS
    out = np.zeros(seeds.shape)
    if present.sum() > 1:
        counts, depth = marker_counts(X, genes, types)[:, present], library_size(X)
        depth = depth / depth.mean()
        weight = 1.0 if by_cell else MARKER_WEIGHT
        R, view = fit_views(pcs, counts, depth, seeds[:, present].astype(float), weight, seed)
        if is_root:
            R[is_doublet(counts, depth, R)] = 0
        if is_root or agreement(view, counts, depth, R).min() >= MIN_AGREEMENT:
            out[:, present] = R
            return out, scores
        # Pooled scores of states are relative; only markers in the cells themselves count here.
        present = by_cell & (n_seeds >= NEARLY_ALL * n_seeds.sum())
    out[:, present] = 1.0
    return out, scores


def is_doublet(counts, depth, R):
    """Cells whose marker counts are more likely those of two types at once (N, bool).

    Compared are the profile of a cell's own type and the mean of two, by the negative binomial.
    """
    means = count_means(counts, depth, R)
    sizes = count_sizes(counts, depth, R, means)
    own = R.argmax(axis=1)
    one = np.take_along_axis(count_view(counts, depth, means, sizes), own[:, None], axis=1)
    out = np.zeros(len(counts), bool)
    for k in range(len(means)):
        mixed = count_view(counts[own == k], depth[own == k], (means[k] + means) / 2, sizes)
        ratio = mixed - one[own == k]  # (n_k, K); 0 for type k itself
        out[own == k] = ratio.max(axis=1, initial=0) > np.log((1 - DOUBLETS) / DOUBLETS)
    return out


def type_cells(X, log, genes, types, space, seed):
    """Type of each cell, from the lineages down to the finest types that can be told apart.

    Args:
        X, log: counts and log-normalised, CSR (N x G). genes: Index of G symbols in capitals.
        types: of :func:`read_cell_types`. space: principal components (N, D) of all genes; None:
            of those that are no marker of a lineage.

    Returns:
        DataFrame (N): cell_type, its probability ``confidence``, and the probability of its lineage
        ``lineage_confidence``. A cell without signs of a single lineage is Unknown, with 0.
    """
    names = np.full(X.shape[0], UNKNOWN, dtype=object)
    confidence, lineage_confidence = np.ones(len(names)), np.ones(len(names))
    waiting = [("", np.arange(len(names)))]  # nodes that may be split, with their cells
    while waiting:
        parent, cells = waiting.pop()
        children = [t for t in types.values() if t.parent == parent]
        if not children or len(cells) < MIN_CELLS:
            continue
        near = None if parent else space
        P, scores = split_node(X[cells], log[cells], genes, children, near, seed)
        best = P.argmax(axis=1)
        p = np.take_along_axis(P, best[:, None], axis=1)[:, 0]
        if not parent:
            p[np.take_along_axis(scores, best[:, None], axis=1)[:, 0] < MIN_SCORE] = 0
        for k, child in enumerate(children):
            chosen = (best == k) & (p > 0)
            names[cells[chosen]] = child.name
            confidence[cells[chosen]] *= p[chosen]
            if not parent or types[parent].lineage != child.lineage:
                lineage_confidence[cells[chosen]] *= p[chosen]
            waiting.append((child.name, cells[chosen]))
    confidence[names == UNKNOWN] = lineage_confidence[names == UNKNOWN] = 0
    return pd.DataFrame(
        {"cell_type": names, "confidence": confidence, "lineage_confidence": lineage_confidence}
    )
