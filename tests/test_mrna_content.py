"""mRNA content of cell types, fractions of cells and of RNA, and the protocol of a bulk."""

import numpy as np
import pytest
import torch

from conftest import ROOT
from deconvolution import mrna_content
from deconvolution.encode import choose_content, encode_samples, rescale
from deconvolution.mrna_content import counts_reads, published_content
from generation import Model
from readers.bulk import Bulk
from runtime.errors import InputError

RIBOSOMAL = [f"RPL{i}" for i in range(3, 15)]


def test_published_content_is_the_geometric_mean_of_three_sources():
    """By hand: monocytes 1.4196 / 0.3952, 130.65 / 63.87 and 22,824.32 / 15,682.09 of a T cell."""
    names = ["Classical monocytes", "Memory CD4+ T cells"]
    content, n_known = published_content(names, np.array([6000.0, 7000.0]))
    expected = np.prod([1.4196 / 0.3952, 130.65 / 63.87, 22824.32 / 15682.09]) ** (1 / 3)
    assert n_known == 2
    np.testing.assert_allclose(content, [expected, 1], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("CD14 Mono", "Monocytes"),
        ("FCGR3A+ Mono", "Non-classical monocytes"),
        ("NK", "Natural killer cells"),
        ("CD56+ NK", "Natural killer cells"),
        ("CD8+ NKT-like cells", "CD8+ T cells"),
        ("CD8+/CD45RA+ Naive Cytotoxic", "Naive CD8+ T cells"),
        ("CD4 Naive T", "Naive CD4+ T cells"),
        ("CD4+/CD25 T Reg", "Regulatory T cells"),
        ("B", "B cells"),
        ("Pre-B cells", "Naive B cells"),
        ("pDC", "Plasmacytoid dendritic cells"),
        ("cDC2", "Dendritic cells"),
        ("T activated", "T cells"),
    ],
)
def test_names_of_other_tools_are_recognised(name, like):
    counts = np.array([1000.0, 1000.0])
    of_name, _ = published_content([name, "CD4+ T cells"], counts)
    of_like, _ = published_content([like, "CD4+ T cells"], counts)
    assert of_name[0] == of_like[0]


def test_a_type_that_nobody_measured_keeps_its_counts_beside_the_others():
    """Known types hold 2 and 1 per 1,000 counts by geometric mean; so does the unknown one."""
    names = ["T cells", "CD4+ T cells", "Hepatocytes"]
    content, n_known = published_content(names, np.array([1000.0, 1000.0, 5000.0]))
    assert n_known == 2
    assert content[2] == pytest.approx(5 * np.sqrt(content[0] * content[1]))


@pytest.mark.parametrize("names", [["Hepatocytes", "Cholangiocytes"], ["Hepatocytes", "T cells"]])
def test_without_two_known_types_there_is_no_published_content(names):
    assert published_content(names, np.ones(2))[0] is None


def test_fractions_of_cells_undo_what_content_does():
    """The inverse of what mixing cells does to counts."""
    cells = np.array([[0.5, 0.3, 0.2], [0.0, 0.9, 0.1]])
    counts, content = np.array([1000.0, 2000.0, 500.0]), np.array([2.0, 1.0, 4.0])
    rna = cells * content / (cells * content).sum(axis=1, keepdims=True)
    as_counted = rna / counts / (rna / counts).sum(axis=1, keepdims=True)
    found = rescale(torch.from_numpy(as_counted), counts / content)
    np.testing.assert_allclose(found, cells, atol=1e-12)


def make_bulk(ribosomal, noise, rng, S=5):
    """Expected counts, and bulks with other ribosomal shares and log-normal factors of genes."""
    genes = [*RIBOSOMAL, *(f"GENE{i}" for i in range(400))]
    expected = rng.lognormal(4, 1, (1, len(genes))).repeat(S, axis=0)
    bulk = expected * np.exp(noise * rng.standard_normal(len(genes)))
    bulk[:, : len(RIBOSOMAL)] *= ribosomal
    return bulk, expected, genes


@pytest.mark.parametrize(
    ("ribosomal", "noise", "reads"),
    [(1.0, 0.1, False), (0.75, 0.6, False), (1.5, 0.6, False), (0.3, 0.1, True), (0.25, 1.0, True)],
)
def test_the_share_of_ribosomal_proteins_tells_the_protocol(ribosomal, noise, reads):
    bulk, expected, genes = make_bulk(ribosomal, noise, np.random.default_rng(0))
    every = np.ones(len(genes), bool)
    found, why = counts_reads(bulk, expected, genes, every)
    assert found == reads and "ribosomal" in why
    assert counts_reads(bulk * 7.5, expected * 1e-3, genes, every)[0] == reads  # of any scale


@pytest.mark.parametrize(("noise", "reads"), [(0.3, False), (1.2, True)])
def test_without_ribosomal_genes_the_other_genes_tell(noise, reads):
    bulk, expected, genes = make_bulk(1.0, noise, np.random.default_rng(0))
    measured = np.array([name.startswith("GENE") for name in genes])
    found, why = counts_reads(bulk, expected, genes, measured)
    assert found == reads and "factor" in why


# --------------------------------------------------------------------- bulks of the shipped model


@pytest.fixture(scope="module")
def model():
    return Model.load(ROOT / "weights" / "pbmc1k")


def mix(model, reads, seed=0, S=3):
    """Bulks of the model's own types (S, G), as single cells or as whole transcripts count them."""
    decoder, genes = model.decoder, model.genes
    pi = np.random.default_rng(seed).dirichlet(np.ones(len(decoder.mu)), S)
    bulk = pi @ decoder.type_means().numpy()
    if reads:
        bulk[:, [bool(mrna_content.RIBOSOMAL.fullmatch(name)) for name in genes]] *= 0.3
    return bulk, pi


def encode(model, bulk, **options):
    names = [f"s{i}" for i in range(len(bulk))]
    measured = np.ones(bulk.shape[1], bool)
    return encode_samples(model, Bulk(bulk, measured, names, "x.csv"), **options)


@pytest.mark.parametrize("reads", [False, True])
def test_bulks_of_whole_transcripts_are_counted_by_published_content(model, reads, capsys):
    bulk, _ = mix(model, reads)
    answer = encode(model, bulk)
    said = capsys.readouterr().out
    assert ("as published" in said) == reads and ("as counted in the reference" in said) != reads
    named = encode(model, bulk, mrna_content="published" if reads else "reference")
    assert torch.equal(answer.cells, named.cells)


def test_content_moves_fractions_of_cells_and_not_what_makes_the_bulk(model):
    """Monocytes hold more mRNA than their counts say, so fewer of them make the same bulk."""
    bulk, _ = mix(model, reads=False)
    as_counted, published = (
        encode(model, bulk, mrna_content=m) for m in ("reference", "published")
    )
    counts, content = as_counted.content, published.content
    expected = rescale(as_counted.cells.double(), counts / content)
    np.testing.assert_allclose(published.cells, expected, atol=1e-5)
    torch.testing.assert_close(published.mixing(), as_counted.mixing(), atol=1e-5, rtol=0)
    monocytes = [k for k, name in enumerate(model.cell_types) if "onocyte" in name]
    assert (published.cells[:, monocytes] < as_counted.cells[:, monocytes]).all()
    assert (published.sd > 0).all()


def test_known_cells_are_mixed_by_their_content(model):
    answer = encode(model, mix(model, reads=True)[0])
    cells = torch.full_like(answer.cells, 1 / answer.cells.shape[1])
    mixing = answer.mixing(cells).numpy()
    expected = answer.content / answer.library
    np.testing.assert_allclose(mixing[0], expected / expected.sum(), rtol=1e-4)


def test_published_content_needs_types_that_somebody_measured():
    with pytest.raises(
        InputError, match="--mrna-content published: found measurements for 0 of the 2"
    ):
        choose_content("published", ["Hepatocytes", "Acinar"], np.ones(2), True, "", "x.csv")
    # auto falls back to the reference's counts, as no better are known
    counts = np.array([3.0, 4.0])
    assert choose_content("auto", ["Hepatocytes", "Acinar"], counts, True, "", "x.csv") is counts


def test_intervals_widen_with_the_distance_from_the_reference(model):
    bulk, _ = mix(model, reads=False)
    moved = bulk * np.random.default_rng(1).lognormal(0, 0.6, bulk.shape[1])
    assert (encode(model, moved).sd.mean() > 2 * encode(model, bulk).sd.mean()).item()


def test_genes_that_are_hardly_expressed_do_not_hide_another_protocol():
    """Their ratios are about 1 on any platform, so many of them would."""
    rng = np.random.default_rng(0)
    bulk, expected, genes = make_bulk(1.0, 0.9, rng)
    few, n = np.full((len(bulk), 4000), 1e-4), len(RIBOSOMAL)
    bulk, expected = (np.hstack([part[:, n:], few]) for part in (bulk, expected))
    names = [*genes[n:], *(f"LOW{i}" for i in range(4000))]
    reads, why = counts_reads(bulk, expected, names, np.ones(len(names), bool))
    assert reads and "--mrna-content" in why
