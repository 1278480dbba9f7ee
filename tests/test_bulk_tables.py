"""Parts of the bulk reader one by one: scales, units, names of genes and files, numbers."""

import numpy as np
import pandas as pd
import pytest

from readers.gene_names import GeneFinder, genes_of_date, likely_cause
from readers.long_tables import find_sample_column
from readers.quantifiers import choose_strand, sample_name, split_words, unit_of
from readers.scale import find_scale, same_quantiles, undo_log
from readers.tables import find_decimal, find_header, find_separator, read_numbers
from runtime.errors import InputError


@pytest.fixture(scope="module")
def counts():
    """Counts of three samples (S x G) with the dynamic range of RNA-seq."""
    rng = np.random.default_rng(0)
    mean = rng.lognormal(3, 2.2, 8000) * rng.lognormal(0, 0.3, (3, 8000))
    return rng.negative_binomial(5, 5 / (5 + mean)).astype(float)


@pytest.mark.parametrize("n_genes", [300, 8000])
@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (lambda x: x, "counts"),
        (lambda x: x / 3.7, "linear"),
        (lambda x: x / x.sum(axis=1, keepdims=True) * 1e6, "linear"),
        (lambda x: np.log2(x + 1), "log"),
        (lambda x: np.log1p(x / 7), "log"),
        (lambda x: np.log10(x + 1), "log"),
        (lambda x: np.log2(x / 20 + 8), "log"),  # variance-stabilised
        (lambda x: np.log2(x / x.sum() * 1e6 + 0.01), "log"),  # some are negative
        (lambda x: (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-9), "z-scores"),
        (lambda x: x.argsort(axis=1).argsort(axis=1) + 1.0, "ranks"),
    ],
)
def test_scales(counts, transform, name, n_genes):
    top = np.sort(np.argsort(-counts.mean(axis=0))[: 2 * n_genes])[:n_genes]
    assert find_scale(transform(counts[:, top])).name == name


def test_square_roots_of_all_genes_are_no_counts(counts):
    assert find_scale(np.sqrt(counts[:, :8000] / 7)).name == "log"


def test_one_sample_on_another_scale_is_named(counts):
    X = counts / 2
    X[1] = np.log2(X[1] + 1)
    scale = find_scale(X)
    assert scale.name == "log" and scale.samples.tolist() == [False, True, False]


@pytest.mark.parametrize("depth", [2000, 10_000, 100_000])
def test_few_counts_are_counts(counts, depth):
    """Nor does one sample of them look like another after quantile normalisation."""
    rng = np.random.default_rng(0)
    share = counts.mean(axis=0) / counts.mean(axis=0).sum()
    assert find_scale(rng.multinomial(depth, share, 3).astype(float)).name == "counts"


@pytest.mark.parametrize("n_negative", [1, 2000])
def test_negative_values_on_a_linear_scale_are_no_logarithms(counts, n_negative):
    X = counts / 3.7
    X.flat[np.random.default_rng(0).choice(X.size, n_negative, replace=False)] = -0.4
    assert find_scale(X).name == "negative"


def test_quantile_normalised_samples(counts):
    target = np.sort(counts, axis=1).mean(axis=0)
    normalised = target[counts.argsort(axis=1).argsort(axis=1)]
    assert find_scale(normalised).name == "quantile"
    assert not same_quantiles(np.repeat(counts[:1], 3, axis=0))  # the same sample three times


@pytest.mark.parametrize("base", ["2", "e", "10"])
def test_logarithms_are_undone(counts, base):
    log = np.log(counts + 0.5) / np.log(np.e if base == "e" else float(base))
    np.testing.assert_allclose(undo_log(log, base, 0.5), counts, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("S1_TPM", ("S1", "tpm")),
        ("counts.Pat 3", ("Pat 3", "counts")),
        ("S1 (FPKM)", ("S1", "fpkm")),
        ("S_2_expected_count", ("S_2", "counts")),
        ("abundance.a.b", ("a.b", "tpm")),
        ("S1TPM", ("S1", "tpm")),
        ("S1 - Total gene reads", ("S1", "counts")),
        ("S1 - Unique gene reads", ("S1", "none")),
        ("Raw counts: S1", ("S1", "counts")),
        ("S1_log2TPM", ("S1", "log")),
        ("S1 (normalized)", ("S1", "normalised")),
        ("NumReads", ("", "counts")),
        ("Sample_7", ("Sample_7", "plain")),
        ("discount", ("discount", "plain")),
    ],
)
def test_units_in_names_of_columns(name, expected):
    sample, words = split_words(name)
    assert (sample, unit_of(words)) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("x/S1.genes.results", "S1"),
        ("x/S1.ReadsPerGene.out.tab.gz", "S1"),
        ("x/S1ReadsPerGene.out.tab", "S1"),
        ("S1/quant.genes.sf", "S1"),
        ("S1/abundance.tsv", "S1"),
        ("a/S1.quant.genes.sf", "S1"),
        ("a/my.sample.counts.txt", "my.sample"),
        ("uuid.rna_seq.augmented_star_gene_counts.tsv", "uuid"),
    ],
)
def test_samples_are_named_after_files(path, expected):
    assert sample_name(path) == expected


def test_strand_by_the_reads_themselves():
    gene = np.array([[100, 95, 5], [50, 48, 2]])
    assert choose_strand(gene)[0] == 1
    assert choose_strand(gene[:, [0, 2, 1]])[0] == 2
    assert choose_strand(np.array([[100, 52, 48]]))[0] == 0


def finder(genes, ids=None):
    return GeneFinder(genes, ids or [""] * len(genes))


@pytest.mark.parametrize(
    "name",
    ["CD3E ", '"CD3E"', "ENSG00000198851.9|CD3E", "CD3E_ENSG00000198851", "CD3E|916", "CD3E (916)"],
)
def test_spellings_of_a_gene(name):
    positions, kinds = finder(["ACTB", "CD3E"], ["", "ENSG00000198851"]).find([name])
    assert positions.tolist() == [1]
    # An id with a suffix is an Ensembl id as it stands.
    assert sum(kinds.values()) == (0 if name.startswith("ENSG") else 1)


def test_names_with_two_readings_are_not_guessed():
    genes = ["MARCH1", "MARC1", "SEPT2", "HLA-A", "S", "A"]
    positions, _ = finder(genes).find(["1-Mar", "2-Sep", "HLA.A", "S A", "S_A"])
    assert positions.tolist() == [-1, 2, 3, -1, -1]
    assert finder(["SEPTIN2"]).find(["SEPT2"])[0].tolist() == [0]
    twice, _ = finder(["MARCH1"]).find(["1-Mar", "1-Mar"])
    assert twice.tolist() == [-1, -1]
    assert "DEC1" in genes_of_date("1-Dec") and genes_of_date("1-Jan") == []


def test_lower_case_is_mended_for_the_models_genes_only():
    genes = [f"GENE{i}" for i in range(100)]
    most = [name.lower() for name in genes[:80]]
    positions, kinds = finder(genes).find(most)
    assert (positions == np.arange(80)).all() and kinds["in lower case"] == 80
    foreign = most[:30] + [f"zgc{i}" for i in range(70)]  # of another species
    assert (finder(genes).find(foreign)[0] == -1).all()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"ENSMUSG{i:011d}" for i in range(9)], "mouse"),
        ([f"ENST{i:011d}.1" for i in range(9)], "transcripts"),
        ([str(i) for i in range(9)], "Entrez"),
        (["1007_s_at", "1053_at"], "microarray"),
        (["Cd3e", "Actb", "Cd19"], "mouse"),
        (["cd3e", "actb"], "case"),
        (["something", "else"], ""),
    ],
)
def test_likely_cause(names, words):
    model = finder(["CD3E", "ACTB", "CD19"], ["ENSG00000000001", "ENSG00000000002", ""])
    cause = likely_cause(names, model)
    assert words in cause and bool(words) == bool(cause)


def test_numbers_with_separators():
    grouped = np.array([f"{v:,}" for v in range(0, 200_000, 3001)], object)
    values, note = read_numbers(grouped, "x.csv")
    assert values.tolist() == list(range(0, 200_000, 3001)) and "thousands" in note
    points = np.array([text.replace(",", ".") for text in grouped], object)
    assert read_numbers(points, "x.csv")[0].tolist() == values.tolist()
    mixed = np.array(["1.234,5", "12,25", "1.000.000"], object)
    assert read_numbers(mixed, "x.csv")[0].tolist() == [1234.5, 12.25, 1e6]
    three_decimals = np.array([f"{v:.3f}" for v in np.linspace(0.1, 900, 99)], object)
    np.testing.assert_allclose(read_numbers(three_decimals, "x")[0], three_decimals.astype(float))
    with pytest.raises(InputError, match=r"x.csv: found '3,801', which may be thousands or dec"):
        read_numbers(np.array(["3,801", "12"], object), "x.csv")


def test_decimal_mark():
    assert find_decimal(["a;1,5;2", "b;3;4,25"], ";") == ","
    assert find_decimal(["a;1,234;2", "b;3;4"], ";") == "."  # may be thousands
    assert find_decimal(["a;1,5;2", "b;3.5;4"], ";") == "."
    assert find_decimal(["a,1,5"], ",") == "."


def test_header_below_titles_and_comments():
    table = ["gene,a,b\n", "X,1,2\n", "Y,3,4\n"]
    for above in ([], ["Supplementary Table 2\n"], ["Title,,\n", ",,\n"], ["# made by x\n", "\n"]):
        assert find_header([*above, *table]) == len(above)
    assert find_separator('"S1" "S2"', '"G" 1 2') == " "
    assert find_separator("gene\tS 1\tS 2", "X\t1\t2") == "\t"


def test_long_tables_by_pairs_of_gene_and_sample():
    rows = [(s, g, c) for s in "abc" for g, c in (("X", "chr1"), ("Y", "chr2"), ("Z", "chr1"))]
    table = pd.DataFrame(rows, columns=["run", "gene", "chromosome"])
    is_text = np.ones(3, bool)
    assert find_sample_column(table, table["gene"], is_text, 1, "x.csv") == 0
    wide = table.iloc[:3]
    assert find_sample_column(wide, wide["gene"], is_text, 1, "x.csv") is None
