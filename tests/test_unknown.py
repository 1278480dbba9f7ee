"""Share of a bulk that no type of the reference explains (deconvolution/unknown.py)."""

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from counts.genes import PROTOCOL_GENES
from deconvolution import unknown
from deconvolution.unknown import (
    LINEAGES,
    read_types,
    unknown_share,
)

G = 3000
SHARED = ROOT.parent / "shared" / "data"
GENES = [f"G{g}" for g in range(G)]


def platform(rng, sd, n=1):
    return np.exp(sd * rng.standard_normal((n, G)))


@pytest.fixture(scope="module")
def world():
    """A table of five types on one platform; a reference of four of them, T cells in two, on
    another."""
    rng = np.random.default_rng(0)
    housekeeping = rng.lognormal(3, 1.2, G)
    profiles = np.tile(housekeeping, (5, 1)) * np.exp(0.3 * rng.standard_normal((5, G)))
    for k in range(5):
        profiles[:, 100 * k : 100 * (k + 1)] *= 0.02
        profiles[k, 100 * k : 100 * (k + 1)] *= 50 * 8
    profiles /= profiles.sum(axis=1, keepdims=True)
    names = [*LINEAGES, "Neutrophils"]
    table = pd.DataFrame(profiles.T * 1e6, index=GENES, columns=names)
    reference = np.concatenate([profiles[:4], profiles[3:4] * platform(rng, 0.2)])
    reference = reference * platform(rng, 0.4)
    return table, reference / reference.sum(axis=1, keepdims=True)


def simulate(world, share, rng, sd=0.6, n=8, own=False):
    """Bulks (n, G) counts with a share of neutrophils, on a platform of their own."""
    table, reference = world
    known = rng.dirichlet(np.ones(4), n) @ (table.to_numpy().T[:4] / 1e6)
    known = rng.dirichlet(np.ones(5), n) @ reference if own else known
    bulk = (1 - share) * known + share * table["Neutrophils"].to_numpy() / 1e6
    bulk = bulk * platform(rng, sd)
    return rng.poisson(bulk / bulk.sum(axis=1, keepdims=True) * 1e6)


def estimate(world, bulk, measured=None, **kwargs):
    table, reference = world
    measured = np.ones(G, bool) if measured is None else measured
    return unknown_share(bulk, measured, reference, GENES, types=table, **kwargs)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("sd", [0.0, 0.6])
def test_share_of_a_missing_type_is_found_on_any_platform(world, share, sd):
    result = estimate(world, simulate(world, share, np.random.default_rng(1), sd))
    assert result.cell_types == ["Neutrophils"]
    assert np.abs(result.share - share).max() < 0.1
    assert np.mean((result.low <= share) & (share <= result.high)) >= 0.75
    if share != 0.1:
        assert (result.is_flagged == (share > 0.1)).all()


def test_several_missing_types_are_told_apart(world):
    table, reference = world
    bulk = simulate(world, 0.3, np.random.default_rng(2))
    no_b = np.delete(reference, 1, axis=0)
    result = unknown_share(bulk, np.ones(G, bool), no_b, GENES, types=table)
    assert sorted(result.cell_types) == ["B cells", "Neutrophils"]
    neutrophils = result.parts[:, result.cell_types.index("Neutrophils")]
    assert np.abs(neutrophils - 0.3).max() < 0.12
    np.testing.assert_allclose(result.parts.sum(axis=1), result.share)
    assert "Neutrophils" in result.describe(0)


def test_scale_and_number_of_samples_do_not_matter(world):
    bulk = simulate(world, 0.3, np.random.default_rng(3))
    result = estimate(world, bulk)
    tpm = estimate(world, bulk / bulk.sum(axis=1, keepdims=True) * 1e6)
    np.testing.assert_allclose(tpm.share, result.share, rtol=1e-6)
    one = estimate(world, bulk[2:3])
    np.testing.assert_allclose(
        [one.share[0], one.low[0], one.high[0]],
        [result.share[2], result.low[2], result.high[2]],
        rtol=1e-6,
    )


def test_genes_not_measured_do_not_count(world):
    rng = np.random.default_rng(4)
    bulk, measured = simulate(world, 0.3, rng), rng.random(G) < 0.6
    result = estimate(world, bulk, measured)
    changed = np.where(measured, bulk, 1e6)
    np.testing.assert_array_equal(estimate(world, changed, measured).share, result.share)
    assert np.abs(result.share - 0.3).max() < 0.12


def test_protocol_genes_and_haemoglobin_do_not_count(world):
    table, reference = world
    bulk = simulate(world, 0.3, np.random.default_rng(5))
    names = GENES.copy()
    names[:4] = ["HBB", "IGKC", "MT-CO1", "RPL3"]
    assert PROTOCOL_GENES.fullmatch("RPL3")
    table = table.set_axis(names)
    low, high = bulk.copy(), bulk.copy()
    high[:, :4] = bulk.sum(axis=1, keepdims=True)
    a, b = (unknown_share(x, np.ones(G, bool), reference, names, types=table) for x in (low, high))
    np.testing.assert_array_equal(a.share, b.share)


def test_own_markers_limit_what_the_platform_can_pass_for(world):
    table, _ = world
    known, missing = table[list(LINEAGES)].to_numpy().T, table["Neutrophils"].to_numpy()
    bulk = simulate(world, 0.0, np.random.default_rng(6)).astype(float)
    bulk = bulk * missing / known.mean(axis=0)  # all genes go the way of neutrophils,
    bulk[:, 400:500] *= 0.002  # but for those that only neutrophils have
    result = estimate(world, bulk)
    assert result.high.min() > 0.15  # what is fitted is fooled
    assert result.share.max() < 0.05 and not result.is_flagged.any()


def test_types_come_to_the_platform_of_the_reference(world):
    table, reference = world
    rng = np.random.default_rng(12)
    other = platform(rng, 1.0)[0]
    moved = table * other[:, None]
    names = np.array(table.columns)
    adapted, lacking = unknown.adapt_types(unknown.fractions(moved.T), names, reference)
    assert list(names[lacking]) == ["Neutrophils"]
    true = unknown.fractions(table.T)[4]
    errors = [
        np.log((x + 1e-5) / (true + 1e-5)) for x in (adapted[4], unknown.fractions(moved.T)[4])
    ]
    assert errors[0].std() < 0.6 * errors[1].std()
    bulk = simulate(world, 0.3, rng)
    result = unknown_share(bulk, np.ones(G, bool), reference, GENES, types=moved)
    assert np.abs(result.share - 0.3).max() < 0.12


def test_rare_types_of_the_reference_are_not_lacking(world):
    """Their profiles of few cells correlate less with the table's, but with nothing else more."""
    table, reference = world
    rng = np.random.default_rng(14)
    types = unknown.fractions(table.T)
    rare = rng.multinomial(2000, types[-1])
    profiles = np.concatenate([reference, rare[None] / rare.sum()])
    adapted, lacking = unknown.adapt_types(types, table.columns, profiles)
    both = np.concatenate([profiles, adapted])
    logs = unknown.centred_logs(both[:, unknown.most_variable(both, G // 4)])
    assert unknown.ALIKE < np.corrcoef(logs)[5, -1] < unknown.IN_REFERENCE
    assert not lacking.any()


def test_genes_off_by_a_large_factor_hardly_count(world):
    table, _ = world
    rng = np.random.default_rng(13)
    profiles = unknown.fractions(table.T)
    true = rng.dirichlet(np.ones(5), 8)
    bulk = true @ profiles
    wild = np.where(rng.random(bulk.shape) < 0.1, rng.choice([0.02, 50.0], bulk.shape), 1)
    error = np.abs(unknown.fit_types(bulk * wild, profiles) - true).mean()
    assert error < 0.015  # 0.029 without the weights


def test_nan_where_nothing_can_be_told(world):
    table, reference = world
    bulk = simulate(world, 0.3, np.random.default_rng(7))
    bulk[1] = 0
    with_empty = estimate(world, bulk)
    assert np.isnan(with_empty.share[1]) and not with_empty.is_flagged[1]
    assert np.isfinite(np.delete(with_empty.share, 1)).all()
    few = np.arange(G) < unknown.FEWEST_GENES - 1
    scrambled = np.random.default_rng(8).permuted(reference, axis=1)  # no blood
    everything = np.concatenate([reference, table[["Neutrophils"]].to_numpy().T / 1e6])
    for result in (
        estimate(world, bulk, few),
        unknown_share(bulk, np.ones(G, bool), scrambled, GENES, types=table),
        unknown_share(bulk, np.ones(G, bool), everything, GENES, types=table),
        unknown_share(bulk, np.ones(G, bool), reference[:1], GENES, types=table),
    ):
        for values in (result.share, result.low, result.high):
            assert values.shape == (len(bulk),) and np.isnan(values).all()
        assert not result.is_flagged.any()
    assert estimate(world, bulk[:0]).share.shape == (0,)


def test_profiles_of_samples_are_averaged(world):
    table, reference = world
    bulk = simulate(world, 0.3, np.random.default_rng(9))
    by_sample = np.stack([reference * scale for scale in np.linspace(0.5, 2, len(bulk))])
    result = unknown_share(bulk, np.ones(G, bool), by_sample, GENES, types=table)
    np.testing.assert_allclose(result.share, estimate(world, bulk).share, rtol=1e-6)


def test_the_shipped_table_holds_types_of_blood():
    table = read_types()
    assert {*LINEAGES, "Neutrophils", "Platelets"} <= set(table.columns)
    assert table.index.is_unique and np.isfinite(table.to_numpy()).all()
    assert (table.to_numpy() >= 0).all() and len(table) > 5000
    for gene, cell_type in (("CXCR2", "Neutrophils"), ("PPBP", "Platelets"), ("CD79A", "B cells")):
        assert table.loc[gene].idxmax() == cell_type


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_whole_blood_is_flagged_and_pbmc_are_not():
    table = read_types()
    genes, reference = list(table.index), table[list(LINEAGES)].to_numpy().T
    pbmc = pd.read_csv(SHARED / "bulk_pbmc_gse107572" / "counts.csv.gz", index_col=0)
    folder = SHARED / "gse60424_sorted"
    sorted_cells = pd.read_csv(folder / "tmm_counts.csv.gz", index_col=0)
    sample = pd.read_csv(folder / "samples.csv").set_index("sample")["cell_type"]
    sorted_cells = sorted_cells.groupby("symbol").sum()
    blood = sorted_cells[sample.index[sample == "Whole Blood"]]
    for bulk, flagged in ((pbmc, False), (blood, True)):
        bulk = bulk[~bulk.index.duplicated()].reindex(genes)
        measured = bulk.notna().all(axis=1).to_numpy()
        result = unknown_share(bulk.fillna(0).to_numpy().T, measured, reference, genes)
        assert (result.is_flagged == flagged).all(), result
        assert result.cell_types[result.parts.mean(axis=0).argmax()] == "Neutrophils" or not flagged
