"""Published estimators of proportions: noise-free mixtures, and their formulas computed by hand."""

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp
import scipy.stats

from benchmarks.compare_proportions import find_estimators
from benchmarks.estimators import bayesprism, dtangle, music, nu_svr
from benchmarks.estimators.dwls import dwls_of_cells
from conftest import make_cells
from deconvolution import dwls, estimators

GENES = 300
ESTIMATORS = {each.name: each for each in (estimators.NNLS, *find_estimators())}


@pytest.fixture(scope="module")
def cells():
    """Counts (N x G), CSR, and types (N): 300 genes, the third type with twice the mRNA."""
    cells = make_cells((60, 50, 40), n_genes=GENES, seed=1)
    codes = cells.obs["cell_type"].astype("category").cat.codes.to_numpy().astype(np.int64)
    X = cells.X.toarray()
    X[codes == 2] *= 2
    return sp.csr_matrix(X), codes


@pytest.fixture(scope="module")
def reference(cells):
    return estimators.type_statistics(*cells, 3, [f"GENE{i}" for i in range(GENES)])


@pytest.fixture(scope="module")
def mixtures(reference):
    """True proportions of cells (S, K), and noise-free bulks of them (S, G)."""
    true = np.random.default_rng(0).dirichlet(np.full(3, 2.0), 6)
    return true, true @ reference.mean * 500


EVERY_GENE = np.ones(GENES, bool)


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        *[(name, 1e-3) for name in ("NNLS", "DWLS", "MuSiC", "MuSiC, no ribosomal/mitochondrial")],
        *[("nu-SVR", 0.05), ("BayesPrism", 0.01)],
    ],
)
def test_noise_free_mixtures_are_recovered_as_fractions_of_cells(
    reference, mixtures, method, tolerance
):
    """Fractions of RNA would be off by up to 0.17, as the third type has twice as much."""
    true, bulk = mixtures
    found = estimators.estimate_all(bulk, EVERY_GENE, reference, [ESTIMATORS[method]])[method]
    if method.startswith("MuSiC"):  # its profiles are means of shares, not of counts
        tolerance = 0.02
    assert found.sum(axis=1) == pytest.approx(1)
    assert np.abs(found - true).max() < tolerance
    rna = true * reference.size / (true @ reference.size)[:, None]
    assert np.abs(found - rna).max() > 0.08


def test_dtangle_of_markers_that_no_other_type_has():
    """There it is exact up to its exponent: fractions of RNA come out as p^(1/0.943)."""
    mean = np.zeros((2, 40))
    mean[0, :20], mean[1, 20:] = 1000, 3000  # the second type has three times the RNA
    reference = estimators.TypeStatistics(
        mean, mean.sum(axis=1), mean, mean, mean, np.zeros(40, bool)
    )
    cells = np.array([[0.5, 0.5], [0.2, 0.8]])
    found = dtangle.dtangle(cells @ mean, reference)
    rna = cells * [1, 3] / (cells @ [1, 3])[:, None]
    expected = rna ** (1 / 0.943) / [1, 3]
    assert found == pytest.approx(expected / expected.sum(axis=1, keepdims=True), abs=1e-4)


def test_dtangle_reads_the_tenth_of_markers_with_the_highest_ratio():
    mean = np.full((2, 40), 10.0)
    mean[0, :20] = np.arange(20) + 100.0  # the last two of type 0 are its tenth
    mean[1, 20:] = 100 + np.arange(20)
    reference = estimators.TypeStatistics(
        mean, mean.sum(axis=1), mean, mean, mean, np.zeros(40, bool)
    )
    bulk = np.full((1, 40), 60.0)
    before = dtangle.dtangle(bulk, reference)
    moved = bulk.copy()
    moved[0, [0, 19]] = [90, 30]  # the sum, and so the CPM of all others, stays
    after = dtangle.dtangle(moved, reference)
    assert after[0, 0] < before[0, 0]  # gene 19 is read, gene 0 is not


# --------------------------------------------------------------------------------- by hand


def test_weights_of_dwls_by_hand():
    fitted = np.array([1.0, 2.0, 4.0])  # 1 / fitted² over the smallest: 16, 4, 1
    assert dwls.dampened_weights(fitted, 3) == pytest.approx([8, 4, 1])
    assert dwls.dampened_weights(fitted, 10) == pytest.approx([16, 4, 1])
    assert dwls.dampened_weights(fitted, 0) == pytest.approx([1, 1, 1])
    assert np.isfinite(dwls.dampened_weights(np.array([0.0, 1.0]), 5)).all()


def test_dampening_follows_the_noise():
    """Relative noise asks for full weights, noise of rare genes for none."""
    rng = np.random.default_rng(0)
    S = np.exp(rng.normal(0, 2, (200, 1))) * rng.gamma(2.0, 1.0, (200, 2))
    x = np.array([600.0, 400.0])
    relative = (S @ x) * rng.lognormal(0, 0.3, 200)
    absolute = S @ x + rng.normal(0, np.quantile(S @ x, 0.5), 200)
    chosen = [
        dwls.choose_dampening(S, b, x, np.random.default_rng(1)) for b in (relative, absolute)
    ]
    assert chosen[0] >= 10 and chosen[1] <= 3


def test_dwls_is_the_fixed_point_of_its_own_weights(reference, mixtures):
    """Noisy bulks: the solution solves the weighted problem that its own fit makes."""
    rng = np.random.default_rng(0)
    bulk = rng.poisson(mixtures[1][:1] * rng.lognormal(0, 0.3, GENES))
    found = dwls_of_cells(bulk, reference, seed=3)[0]
    genes = dwls.choose_signature(reference.mean, reference.change)
    S, b = reference.mean[:, genes].T, bulk[0, genes].astype(float)
    start = dwls.solve_nonnegative(S.T @ S, S.T @ b)
    b *= 1000 / start.sum()
    start *= 1000 / start.sum()
    j = dwls.choose_dampening(S, b, start, np.random.default_rng([3, 0]))
    w = np.sqrt(dwls.dampened_weights(S @ found, j))[:, None]  # up to a factor
    solved = scipy.optimize.nnls(w * S, w[:, 0] * b)[0]
    assert solved / solved.sum() == pytest.approx(found, abs=2e-4)
    assert start / start.sum() != pytest.approx(found, abs=2e-4)


def test_dwls_repeats_for_a_seed(reference, mixtures):
    bulk = np.random.default_rng(0).poisson(mixtures[1] / 50)
    first, again, other = (dwls_of_cells(bulk, reference, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert np.abs(first - other).max() < 0.1
    # A bulk is read the same whatever stands beside it, and at any depth.
    assert dwls_of_cells(bulk[:2], reference, 1) == pytest.approx(first[:2])
    assert dwls_of_cells(bulk * 1e3, reference, 1) == pytest.approx(first, abs=1e-6)


def test_weights_of_music_by_hand():
    weights = music.music_weights(
        residual=np.array([0.0, 0.1]),
        x=np.array([2.0, 1.0]),
        size=np.array([1.0, 3.0]),
        variance=np.array([[1e-4, 0.0], [0.0, 1e-4]]),
    )
    assert weights == pytest.approx([1 / (1e-4 + 4e-4), 1 / (1e-4 + 0.01 + 9e-4)])


def test_shares_vary_over_samples_where_there_are_several_and_over_cells_where_not():
    X = sp.csr_matrix([[1, 1], [3, 1], [1, 3], [2, 2], [1, 0], [0, 1]])
    codes = np.array([0, 0, 0, 0, 1, 1])
    mean, variance = estimators.moments_of_shares(X, codes, 3)
    assert mean[0] == pytest.approx([0.5, 0.5])
    assert variance[0] == pytest.approx(np.full(2, np.var([0.5, 0.75, 0.25, 0.5], ddof=1)))
    assert (mean[2] == 0).all() and (variance[2] == 0).all()  # a type without cells
    sample = np.array([0, 0, 1, 1, 0, 1])
    mean, variance = estimators.moments_of_shares(X, codes, 3, sample)
    shares = [4 / 6, 3 / 8]  # of gene 0 in the summed counts of either sample
    assert mean[0, 0] == pytest.approx(np.mean(shares))
    assert variance[0, 0] == pytest.approx(np.var(shares, ddof=1))
    # The second type is in one sample alone, so cells stand for subjects again.
    _, variance = estimators.moments_of_shares(X, codes, 3, np.array([0, 0, 1, 1, 0, 0]))
    assert variance[0, 0] == pytest.approx(np.var([0.5, 0.75, 0.25, 0.5], ddof=1))


def test_music_trusts_genes_that_agree_between_cells(reference, mixtures):
    """A gene that varies wildly between cells may be wrong in the bulk."""
    true, bulk = mixtures
    wild = np.argsort(-reference.mean.sum(axis=0))[:10]
    wrong = bulk.copy()
    wrong[:, wild] *= 2
    steady, varied = (
        estimators.TypeStatistics(**(vars(reference) | {"variance": variance}))
        for variance in (
            np.full_like(reference.variance, 1e-9),
            np.where(np.isin(np.arange(GENES), wild), 1.0, 1e-9) * np.ones((3, 1)),
        )
    )
    error = [np.abs(music.music(wrong, r) - true).max() for r in (steady, varied)]
    assert error[1] < 0.5 * error[0]


def test_fixed_point_by_hand_and_after_many_steps():
    x, phi = np.array([[3.0, 1.0]]), np.array([[0.75, 0.25], [0.25, 0.75]])
    # θ = ½, ½ explains ½ of each gene: ratios 6 and 2, so θ becomes ½ (4.5 + 0.5) : ½ (1.5 + 1.5).
    once = bayesprism.bayesprism_fixed_point(x, phi, 1)
    assert once == pytest.approx(np.array([[2.5 / 4, 1.5 / 4]]))
    assert bayesprism.bayesprism_fixed_point(x, phi, 500) == pytest.approx(
        np.array([[1.0, 0.0]]), abs=3e-3
    )


def test_shares_of_states_are_positive():
    phi = bayesprism.positive_shares(np.array([[0.0, 4.0, 0.0], [1.0, 1.0, 2.0]]))
    assert phi.sum(axis=1) == pytest.approx(1) and (phi > 0).all()
    assert phi[0, 0] == pytest.approx(1e-8, rel=1e-6)


def test_nonnegative_solver_against_scipy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        A, b = rng.normal(size=(30, 5)) * rng.lognormal(0, 3, 5), rng.normal(size=30)
        found = dwls.solve_nonnegative(A.T @ A, A.T @ b)
        assert found == pytest.approx(scipy.optimize.nnls(A, b)[0], rel=1e-4, abs=1e-8)


def test_nu_svr_is_robust_to_genes_that_are_far_off(reference, mixtures):
    true, bulk = mixtures
    genes = dwls.choose_signature(reference.mean, reference.change)
    off = bulk.copy()
    off[:, genes[::40]] *= 5
    svr = nu_svr.nu_svr(off, reference)
    nnls = estimators.nnls_proportions(off[:, genes], reference.mean[:, genes])
    assert np.abs(svr - true).mean() < 0.5 * np.abs(nnls - true).mean()
    assert (svr >= 0).all()


# ---------------------------------------------------------------------------------- signatures


def test_differential_expression_against_scipy(cells, reference):
    X, codes = cells
    depth = X.toarray() / X.toarray().sum(axis=1, keepdims=True) * 1e4
    log, inside = np.log1p(depth), codes == 1
    p = scipy.stats.ttest_ind(log[inside], log[~inside], equal_var=False).pvalue
    # Moments divide by n in place of n - 1, which matters little for 50 cells.
    adjusted = scipy.stats.false_discovery_control(np.nan_to_num(p, nan=1.0))
    log2_change, p_adjusted = dwls.differential_expression(X, codes, 3)
    assert np.log(p_adjusted[1]) == pytest.approx(np.log(adjusted), rel=0.03, abs=0.05)
    change = np.log2((depth[inside].mean(axis=0) + 0.1) / (depth[~inside].mean(axis=0) + 0.1))
    assert log2_change[1] == pytest.approx(change)
    rises = (p_adjusted < 0.01) & (log2_change > 0.5)
    assert (reference.change == np.where(rises, log2_change, -np.inf)).all()


def test_signature_has_the_lowest_condition_number_of_all_numbers_of_genes(reference):
    chosen = dwls.choose_signature(reference.mean, reference.change, fewest=5, most=30)
    passed = np.isfinite(reference.change)
    assert passed[:, chosen].any(axis=0).all()
    condition = {}
    for n in range(5, 31):
        genes = set()
        for k in range(3):
            order = np.argsort(-reference.change[k])
            genes |= set(order[: min(n, passed[k].sum())])
        condition[n] = np.linalg.cond(reference.mean[:, sorted(genes)])
    assert np.linalg.cond(reference.mean[:, chosen]) == pytest.approx(min(condition.values()))


def test_without_any_marker_every_gene_is_in_the_signature(reference):
    none = np.full_like(reference.change, -np.inf)
    assert len(dwls.choose_signature(reference.mean, none)) == GENES


# -------------------------------------------------------------------------------- all together


def test_types_without_cells_and_genes_that_were_not_measured(cells, mixtures):
    X, codes = cells
    reference = estimators.type_statistics(
        X, np.where(codes == 2, 3, codes), 4, [f"GENE{i}" for i in range(GENES)]
    )
    true, bulk = mixtures
    measured = np.arange(GENES) % 5 > 0
    garbage = np.where(measured, bulk, 1e9)
    results = estimators.estimate_all(garbage, measured, reference, ESTIMATORS.values())
    assert list(results) == list(ESTIMATORS)
    for method, found in results.items():
        assert found.shape == (6, 4) and (found[:, 2] == 0).all(), method
        assert found.sum(axis=1) == pytest.approx(1), method
        limit = 0.25 if method == "dtangle" else 0.06
        assert np.abs(found[:, [0, 1, 3]] - true).max() < limit, method


def test_protocol_genes_are_found_by_name_and_left_out(cells, mixtures):
    names = [f"GENE{i}" for i in range(GENES)]
    names[:4] = ["RPL3", "MT-CO1", "MALAT1", "rps12"]
    reference = estimators.type_statistics(*cells, 3, names)
    assert reference.is_protocol.sum() == 4
    bulk = mixtures[1].copy()
    moved = bulk * np.where(np.arange(GENES) < 4, 20, 1)
    methods = ["MuSiC", "MuSiC, no ribosomal/mitochondrial", "BayesPrism"]
    before, after = (
        estimators.estimate_all(b, EVERY_GENE, reference, map(ESTIMATORS.get, methods))
        for b in (bulk, moved)
    )
    differs = [np.abs(before[name] - after[name]).max() for name in methods]
    assert differs[0] > 1e-4 and max(differs[1:]) < 1e-9
