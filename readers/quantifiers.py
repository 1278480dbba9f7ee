"""What quantifiers of RNA-seq write: their columns, units and rows, and names of their files."""

import re
from pathlib import Path

import numpy as np

from runtime.errors import InputError, some

# Columns of numbers that are not samples, in the tables of quantifiers, of biomaRt and of tests
# for differential expression; compared in lower case, with points and blanks as underscores.
NOT_SAMPLES = {
    *("chr", "chrom", "chromosome", "chromosome_name", "seqname", "seqnames", "strand", "width"),
    *("start", "end", "start_position", "end_position", "position", "tss", "band", "exon_count"),
    *("transcription_start_site", "transcript_start", "transcript_end", "n_exons"),
    *("length", "gene_length", "effective_length", "effectivelength", "eff_length", "efflength"),
    *("transcript_length", "transcript_count", "isopct", "total_length", "exon_length"),
    *("entrez", "entrezid", "entrez_id", "entrezgene", "entrezgene_id", "entrez_gene_id"),
    *("ncbi_geneid", "ncbi_gene_id", "geneid_ncbi", "hgnc_id"),
    *("gc", "gc_content", "gccontent", "percentage_gene_gc_content", "percent_gc", "mappability"),
    *("basemean", "log2foldchange", "lfcse", "pvalue", "p_value", "pval", "padj"),
    *("p_adj", "adj_p_val", "fdr", "qvalue", "q_value", "logfc", "logcpm", "aveexpr"),
    *("fold_change", "foldchange", "log2fc", "logratio", "svalue"),
    *("posterior_mean_count", "posterior_standard_deviation_of_count", "pme_tpm", "pme_fpkm"),
    *("tpm_ci_lower_bound", "tpm_ci_upper_bound", "fpkm_ci_lower_bound", "fpkm_ci_upper_bound"),
    *("tpm_coefficient_of_quartile_variation", "fpkm_coefficient_of_quartile_variation"),
    *("fpkm_conf_lo", "fpkm_conf_hi", "conf_lo", "conf_hi", "transcript_version", "version"),
    *("isopct_from_pme_tpm", "dispersion", "dispgeneest", "dispfit"),
}

# Statistics whose names may as well be those of samples: only beside a p-value.
STATISTICS = {"t", "b", "f", "lr", "stat", "score", "rank", "index", "level", "z", "w"}

P_VALUES = {"pvalue", "p_value", "pval", "padj", "p_adj", "adj_p_val", "fdr", "qvalue", "q_value"}

SUMMARIES = {  # of all samples; compared in the same way
    *("total", "sum", "mean", "average", "avg", "median", "sd", "std", "stdev", "var", "variance"),
    *("min", "max", "cv", "rowsum", "rowsums", "row_sum", "rowmeans", "row_mean", "grand_total"),
    *("mean_expression", "total_counts", "total_count", "sum_counts", "row_sums", "row_means"),
}

UNITS = {  # names of columns of one sample, and what they hold
    **dict.fromkeys(("count", "counts", "raw_count", "raw_counts", "read_count"), "counts"),
    **dict.fromkeys(("read_counts", "reads", "numreads", "num_reads", "est_counts"), "counts"),
    **dict.fromkeys(("expected_count", "expected_counts", "htseq_count", "n_reads"), "counts"),
    **dict.fromkeys(("unstranded", "stranded_first", "stranded_second"), "counts"),
    **dict.fromkeys(("tpm", "abundance", "tpm_unstranded", "tpms"), "tpm"),
    **dict.fromkeys(("cpm", "rpm"), "cpm"),
    **dict.fromkeys(("fpkm", "rpkm", "fpkm_unstranded", "fpkms"), "fpkm"),
    **dict.fromkeys(("fpkm_uq", "fpkm_uq_unstranded"), "fpkm_uq"),
    **dict.fromkeys(("coverage", "cov"), "coverage"),
    **dict.fromkeys(("length", "effective_length", "eff_length"), "length"),
}

PREFERRED = ("counts", "tpm", "cpm", "fpkm", "fpkm_uq", "coverage")

STRANDS = ("unstranded", "stranded_first", "stranded_second")  # columns of STAR's gene counts

# Rows of HTSeq and STAR that count reads outside of genes.
NO_GENES = re.compile(
    r"__(no_feature|ambiguous|too_low_aQual|not_aligned|alignment_not_unique)|"
    r"N_(unmapped|multimapping|noFeature|ambiguous)|"
    r"(no_feature|ambiguous|too_low_aQual|not_aligned|alignment_not_unique)"
)

# Endings that tools give to the file of a sample, the longest first.
ENDINGS = re.compile(
    r"(\.rna_seq\.augmented_star_gene_counts|[._-]?ReadsPerGene\.out|\.quant\.genes|"
    r"\.(genes|isoforms)\.results|\.(genes|isoforms)\.fpkm_tracking|[._-]gene_abund(ance)?s?|"
    r"\.htseq\.counts|\.counts?|\.FPKM(-UQ)?|\.quant|[._-]abundance|[._-]featureCounts)?"
    r"(\.(tab|tsv|txt|csv|sf|counts?|results|gct|xlsx|ctab|out|fpkm_tracking))?"
    r"(\.(gz|bz2|xz|zip))?",
    re.IGNORECASE,
)

GENERIC = {  # names that say nothing of the sample: its folder does
    *("quant", "quant.genes", "abundance", "gene_abund", "genes", "isoforms", "t_data", "counts"),
    *(
        "readspergene",
        "readspergene.out",
        "genes.results",
        "gene_abundances",
        "genes.fpkm_tracking",
    ),
}

# Files that a folder of quantifications holds, by the ending of their names.
QUANTIFICATIONS = (
    *("*.quant.genes.sf", "quant.genes.sf", "*.genes.results", "*ReadsPerGene.out.tab*"),
    *("*star_gene_counts.tsv*", "abundance.tsv*", "quant.sf*", "*gene_abund*.tab*"),
    *("genes.fpkm_tracking", "*.htseq.counts*", "*.counts*", "*.count*", "*.tsv*", "*.txt*"),
    *("*.csv*", "*.tab*"),
)


def plain_name(name):
    """The name of a column for comparisons: lower case, underscores for all else."""
    return re.sub(r"[^a-z0-9]+", "_", str(name).strip().lower()).strip("_")


def no_samples(names):
    """Mask of the columns (C) whose names are of annotation, statistics or summaries."""
    names = [plain_name(name) for name in names]
    known = NOT_SAMPLES | SUMMARIES
    if P_VALUES & set(names):
        known = known | STATISTICS
    return np.array([name in known for name in names], bool)


def split_unit(name):
    """``(sample, unit)`` of a column name such as ``S1_TPM``, ``counts.S1`` or ``S1 (FPKM)``.

    Returns:
        the unit is None if the name has none; the sample is "" if the name is the unit alone.
    """
    text = str(name).strip()
    if plain_name(text) in UNITS:
        return "", UNITS[plain_name(text)]
    for pattern in (
        r"(?P<unit>[A-Za-z_]+?)[._ \-:/](?P<sample>.+)",
        r"(?P<sample>.+?)[._ \-:/]+\(?\[?(?P<unit>[A-Za-z_]+)\)?\]?",
    ):
        match = re.fullmatch(pattern, text)
        if match and plain_name(match["unit"]) in UNITS:
            return match["sample"].strip(), UNITS[plain_name(match["unit"])]
    # An underscore may be part of the unit: S1_expected_count.
    for words in (2, 3):
        parts = re.split(r"([._ -])", text)
        tail = "".join(parts[-(2 * words - 1) :])
        if len(parts) > 2 * words and plain_name(tail) in UNITS:
            return "".join(parts[: -2 * words]), UNITS[plain_name(tail)]
    return text, None


def choose_unit(found, wanted, where):
    """The unit to read, of those that a file has for each sample.

    Args:
        found: units. wanted: ``auto``, or a unit. where: what messages name.

    Raises:
        InputError: the unit that is wanted is not there, or there is none.
    """
    possible = [unit for unit in PREFERRED if unit in found]
    if wanted != "auto":
        if wanted not in possible:
            raise InputError(
                f"--bulk-unit {wanted}: found {some(sorted(found))} in {where}, expected one of "
                "them"
            )
        return wanted
    if not possible:
        raise InputError(
            f"{where}: found no counts, TPM or FPKM in it ({some(sorted(found))}), expected one"
        )
    return possible[0]


def choose_strand(counts):
    """Column of STAR's gene counts that holds the sense strand's reads, and why.

    Args:
        counts: reads in genes, unstranded and on either strand (G x 3).

    Returns:
        index 0 to 2, and a text. A library is stranded if one strand has over four times the reads
        of the other.
    """
    total, first, second = counts.sum(axis=0)
    share = first / max(first + second, 1)
    why = f"{share:.0%} of the reads in genes are on the first strand"
    if share > 0.8:
        return 1, f"stranded_first, as {why}"
    if share < 0.2:
        return 2, f"stranded_second, as {why}"
    return 0, f"unstranded, as {why}"


def sample_name(path):
    """The sample that a quantifier's file is named after: of its folder if the name is generic."""
    path = Path(path)
    match = next(m for i in range(len(path.name) + 1) if (m := ENDINGS.fullmatch(path.name, i)))
    stem = path.name[: match.start()]
    stem = re.sub(r"[._-]?(ReadsPerGene|gene_abund)$", "", stem, flags=re.IGNORECASE)
    if not stem or plain_name(stem) in {plain_name(name) for name in GENERIC}:
        return path.absolute().parent.name or path.name
    return stem


def expand(paths):
    """Files of paths: of a folder its quantifications, one kind of them.

    Raises:
        InputError: a path is a folder without any, or of single cells; or there is no path.
    """
    files = []
    for path in paths:
        files += files_of(Path(path)) if Path(path).is_dir() else [Path(path)]
    return files


def files_of(folder):
    """The quantifications in a folder or in its subfolders.

    Raises:
        InputError: there is none, or a matrix of single cells.
    """
    if any(folder.glob("*matrix.mtx*")):
        raise InputError(
            f"{folder}: found a matrix of single cells, expected bulk samples; for a reference it "
            "is --data, for a bulk sum the cells of each sample"
        )
    for pattern in QUANTIFICATIONS:
        found = sorted({*folder.glob(pattern), *folder.glob(f"*/{pattern}")})
        found = [path for path in found if path.is_file() and not path.name.endswith(".summary")]
        if found:
            print(f"{folder}: {len(found)} files ({some([path.name for path in found])})")
            return found
    raise InputError(f"{folder}: found a folder without tables, expected bulk samples")


def is_no_gene(names):
    """Mask of rows (G) that count reads outside of genes."""
    return np.array([NO_GENES.fullmatch(str(name)) is not None for name in names], bool)
