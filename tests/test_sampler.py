"""The sampler of counts against scipy's distributions."""

import numpy as np
import pytest
import scipy.stats
import torch

from runtime import sampler
from runtime.sampler import exp32, exp64, log1p64, poisson_draw

MEANS = 10.0 ** np.arange(-3, 4.5, 0.5)
THETAS = 10.0 ** np.arange(-4, 5)


def sample_csr(hidden, weight, factor, theta, codes, library, seed, **options):
    """Of the sampler, with all that a cell depends on by position."""
    layer = {name: options.pop(name, None) for name in ("extra", "dropout")}
    inputs = sampler.CellInputs(hidden, codes, library, options.pop("sample", None))
    layer = sampler.OutputLayer(weight, factor, theta, **layer)
    return sampler.sample_csr(layer, inputs, seed, **options)


def draw(mean, theta, n_cells, seed=0, **options):
    """Counts (n_cells, G) in CSR, of these means and dispersions (G)."""
    factor = torch.from_numpy(np.log(mean)).float()[None]
    theta = torch.from_numpy(np.broadcast_to(theta, mean.shape).copy()).float()[None]
    hidden, weight = torch.zeros(n_cells, 1), torch.zeros(len(mean), 1)
    codes = torch.zeros(n_cells, dtype=torch.long)
    library = torch.full((n_cells,), mean.sum(), dtype=torch.float64)
    return sample_csr(hidden, weight, factor, theta, codes, library, seed, **options)


def negative_binomial(mean, theta):
    return scipy.stats.nbinom(theta, theta / (theta + mean))


def chi_square(counts, reference, min_expected=20):
    """p-value of counts against a scipy distribution; each bin expects ``min_expected`` or more."""
    n, k = len(counts), np.arange(int(min(reference.ppf(1 - 1e-9), 1e6)) + 1)
    expected_below = np.concatenate([[0], n * reference.cdf(k)])  # expected number below k
    edges = [0]
    while edges[-1] < len(k):
        edge = np.searchsorted(expected_below, expected_below[edges[-1]] + min_expected)
        if edge > len(k) or n - expected_below[edge] < min_expected:
            break
        edges.append(edge)
    expected = np.diff(np.append(expected_below[edges], n))
    observed = np.histogram(counts, np.append(edges, np.inf))[0]
    if len(expected) < 2:  # nearly all zeros: test the number of the others
        return scipy.stats.binomtest(int((counts > 0).sum()), n, reference.sf(0)).pvalue
    return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def decoder_inputs(n_cells=300, n_genes=1001, n_types=3, n_hidden=16, seed=0):
    """Arguments of sample_csr up to library, for a decoder's last layer of random weights."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_cells, n_hidden, generator=g).relu()
    weight = 0.1 * torch.randn(n_genes, n_hidden, generator=g)
    factor = 2 * torch.randn(n_types, n_genes, generator=g)
    theta = torch.randn(n_types, n_genes, generator=g).exp()
    codes = torch.randint(n_types, (n_cells,), generator=g)
    library = 1000 * torch.rand(n_cells, generator=g)
    return hidden, weight, factor, theta, codes, library


def test_distribution_over_means_and_dispersions():
    mean, theta = (v.ravel() for v in np.meshgrid(MEANS, THETAS))
    copies, n_cells = 400, 100
    X = draw(np.repeat(mean, copies), np.repeat(theta, copies), n_cells).tocsc()
    p = []
    for i in range(len(mean)):
        counts = X[:, i * copies : (i + 1) * copies].toarray().ravel()
        p.append(chi_square(counts, negative_binomial(mean[i], theta[i])))
    p = np.array(p)
    worst = np.argmin(p)
    assert p[worst] > 1e-5, (mean[worst], theta[worst], p[worst])
    # Rare counts give few distinct p-values; all other p-values must be uniform.
    not_rare = mean * theta / (theta + mean) > 0.01
    assert scipy.stats.kstest(p[not_rare], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("theta", [0.01, 1.0, 1e4])
def test_mean_and_variance_of_large_means(theta):
    for mean in (15.9, 16.1, 300.0, 1e4):
        n = 400 * 500
        counts = draw(np.full(500, mean), theta, 400, seed=3).toarray().ravel()
        variance = mean + mean**2 / theta
        fourth = float(negative_binomial(mean, theta).stats("k")) + 3
        assert abs(counts.mean() - mean) < 5 * np.sqrt(variance / n)
        spread = variance * np.sqrt((fourth - 1) / n)
        assert abs(counts.var() - variance) < 5 * spread


@pytest.mark.parametrize("mean", [1e-6, 1e-8])
def test_small_means_have_counts_as_often_as_they_should(mean):
    n_genes, n_cells = 100_000, 4000
    means = np.full(n_genes, mean)
    means[0] = 10.0  # a library size is at least one count
    n = (n_genes - 1) * n_cells
    total = draw(means, 1.0, n_cells)[:, 1:].nnz
    expected = scipy.stats.poisson(n * negative_binomial(mean, 1.0).sf(0))
    assert expected.sf(total - 1) > 1e-4 and expected.cdf(total) > 1e-4


def test_probabilities_below_the_resolution_of_a_24_bit_uniform():
    n_genes, n_cells, mean, theta = 100_000, 4000, 2e-4, 1.0
    X = draw(np.full(n_genes, mean), theta, n_cells, seed=5)
    expected = n_genes * n_cells * negative_binomial(mean, theta).sf(1)  # 16
    assert negative_binomial(mean, theta).sf(1) < 2.0**-24
    assert 3 < (X.data > 1).sum() < 38
    assert 10 < expected < 20


def test_counts_of_two_genes_and_of_two_cells_are_independent():
    X = draw(np.full(2000, 0.5), 2.0, 2000, seed=1).toarray().astype(float)
    n = 2000 * 1999
    for a, b in ((X[:, 1:], X[:, :-1]), (X[1:], X[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(n)


def test_totals_of_cells_and_of_genes_vary_as_independent_counts_do():
    mean, theta, n = np.geomspace(1e-2, 100, 2000), 1.5, 4000
    X = draw(mean, theta, n, seed=2)
    variance = mean + mean**2 / theta  # (G,)
    of_cells = np.asarray(X.sum(axis=1)).ravel()
    assert abs(of_cells.var() / variance.sum() - 1) < 5 * np.sqrt(2 / n)
    scaled = (X.toarray() - mean) / np.sqrt(variance)
    of_genes = scaled.sum(axis=0) / np.sqrt(n)  # standard normal
    assert scipy.stats.kstest(of_genes, "norm").pvalue > 1e-3


def test_means_are_library_times_softmax():
    hidden, weight, factor, theta, codes, library = decoder_inputs(n_cells=2, n_genes=203)
    copies = 20_000
    args = (v.repeat_interleave(copies, dim=0) for v in (codes, library))
    X = sample_csr(hidden.repeat_interleave(copies, dim=0), weight, factor, theta, *args, 11)
    logits = hidden @ weight.T + factor[codes]
    mean = (library[:, None] * logits.softmax(dim=1)).double().numpy()
    sd = np.sqrt((mean + mean**2 / theta[codes].double().numpy()) / copies)
    means = np.stack([np.asarray(X[i * copies : (i + 1) * copies].mean(axis=0)) for i in (0, 1)])
    well_expressed = mean * copies > 50
    assert np.abs((means.squeeze() - mean) / sd)[well_expressed].max() < 5


def test_extra_factor_of_a_sample_is_added_to_that_of_the_type():
    hidden, weight, factor, theta, codes, library = decoder_inputs()
    extra = torch.randn(2, factor.shape[1])
    sample = torch.arange(len(codes)) % 2
    X = sample_csr(hidden, weight, factor, theta, codes, library, 1, extra=extra, sample=sample)
    combined = (factor[:, None] + extra[None]).flatten(0, 1)  # type and sample as one
    pair = 2 * codes + sample
    Y = sample_csr(hidden, weight, combined, theta.repeat_interleave(2, dim=0), pair, library, 1)
    assert (X != Y).nnz <= 3  # another order of summation rounds differently


@pytest.mark.parametrize("n_genes", [1, 7, 8, 31, 765, 2000])
def test_same_cells_for_any_number_of_threads_and_any_block(n_genes):
    args = decoder_inputs(n_genes=n_genes)
    X = sample_csr(*args, 4, n_threads=1)
    for n_threads, block in ((2, 512), (2, 50), (3, 37)):
        Y = sample_csr(*args, 4, n_threads=n_threads, block=block)
        # Only the matrix product may round differently for another number of rows.
        assert (X != Y).nnz <= 2
    repeated = sample_csr(*args, 4, n_threads=2)
    assert np.array_equal(X.data, repeated.data) and np.array_equal(X.indices, repeated.indices)
    assert n_genes < 5 or (sample_csr(*args, 5) != X).nnz > 0


def test_rows_are_canonical_and_integer():
    X = sample_csr(*decoder_inputs(), 0)
    assert X.data.dtype == X.indices.dtype == np.int32
    assert (X.data > 0).all()
    X.has_sorted_indices = X.has_canonical_format = None
    for row in range(X.shape[0]):
        columns = X.indices[X.indptr[row] : X.indptr[row + 1]]
        assert (np.diff(columns) > 0).all() and (columns < X.shape[1]).all()
    none = (v[:0] if i in (0, 4, 5) else v for i, v in enumerate(decoder_inputs()))
    assert sample_csr(*none, 0).shape[0] == 0


def test_extreme_logits_stay_finite():
    hidden, weight, factor, theta, codes, library = decoder_inputs()
    factor[:, 0] = 500.0  # takes all counts; the softmax of the others underflows
    factor[:, 1] = -500.0
    X = sample_csr(hidden, weight, factor, theta, codes, library, 0)
    assert X.nnz == X[:, 0].nnz and X[:, 0].max() < 1e6


def test_dropout_keeps_each_count_with_its_probability():
    n_cells, n_genes = 4000, 200
    hidden = torch.rand(1, 8).repeat(n_cells, 1)
    weight, bias = torch.randn(n_genes, 8), torch.randn(n_genes)
    args = (hidden, torch.zeros(n_genes, 8), torch.zeros(1, n_genes), torch.ones(1, n_genes))
    args += (torch.zeros(n_cells, dtype=torch.long), torch.full((n_cells,), 2.0 * n_genes))
    X = sample_csr(*args, 0)
    Y = sample_csr(*args, 0, dropout=(weight, bias))
    assert ((Y != 0).multiply(X) != Y).nnz == 0  # kept counts are unchanged
    keep = torch.sigmoid(-(hidden[0] @ weight.T + bias)).double().numpy()
    n = np.asarray((X > 0).sum(axis=0)).ravel()
    n_kept = np.asarray((Y > 0).sum(axis=0)).ravel()
    assert np.abs((n_kept - n * keep) / np.sqrt(n * keep * (1 - keep) + 1)).max() < 5


@pytest.mark.parametrize("rate", [0.01, 3.0, 9.9, 10.1, 80.0, 5000.0])
def test_poisson(rate):
    state = np.array([12345], np.uint64)
    counts = np.array([poisson_draw(rate, state) for _ in range(100_000)])
    assert chi_square(counts, scipy.stats.poisson(rate)) > 1e-4


def test_exponential_and_logarithm():
    x = -np.geomspace(1e-12, 86.9, 2000)
    assert max(abs(exp32(v) / np.exp(np.float64(v)) - 1) for v in x.astype(np.float32)) < 2e-7
    assert max(abs(exp64(v) / np.exp(v) - 1) for v in x) < 1e-15
    x = np.geomspace(1e-300, 1e12, 4000)
    assert max(abs(log1p64(v) / np.log1p(v) - 1) for v in x) < 1e-15
