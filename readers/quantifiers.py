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
STATISTICS = {
    *("t", "b", "f", "lr", "stat", "score", "rank", "index", "level", "z", "w", "p", "q", "se"),
    *("sem", "mad", "maximum", "minimum", "significant", "cluster", "lfc", "fc"),
}

P_VALUE = re.compile(
    r"(^|_)(pvalue|p_value|pval|padj|p_adj|p_adjust|adj_p|adj_p_val|fdr|qvalue)(_|$)"
)

SUMMARIES = {  # of all samples; compared in the same way
    *("total", "sum", "mean", "average", "avg", "median", "sd", "std", "stdev", "var", "variance"),
    *("min", "max", "cv", "rowsum", "rowsums", "row_sum", "rowmeans", "row_mean", "grand_total"),
    *("mean_expression", "total_counts", "total_count", "sum_counts", "row_sums", "row_means"),
}

# Words in the names of columns that say what they hold of a sample.
UNIT_WORDS = {
    **dict.fromkeys(("count", "counts", "read", "reads", "numreads", "raw", "est"), "counts"),
    **dict.fromkeys(("expected", "rawcount", "rawcounts", "readcount", "readcounts"), "counts"),
    **dict.fromkeys(("htseq", "bam", "unstranded"), "counts"),
    **dict.fromkeys(("tpm", "tpms", "abundance"), "tpm"),
    **dict.fromkeys(("cpm", "rpm"), "cpm"),
    **dict.fromkeys(("fpkm", "fpkms", "rpkm", "rpkms"), "fpkm"),
    **dict.fromkeys(("norm", "normalized", "normalised", "normcounts", "scaled"), "normalised"),
    **dict.fromkeys(("corrected", "batchcorrected", "combat", "adjusted", "imputed"), "normalised"),
    **dict.fromkeys(("log", "log2", "log10", "vst", "rlog", "logcpm", "log2tpm"), "log"),
    **dict.fromkeys(("log2cpm", "log2fpkm", "logtpm", "logfpkm", "zscore"), "log"),
    **dict.fromkeys(("uq",), "uq"),
    **dict.fromkeys(("coverage", "cov"), "coverage"),
    **dict.fromkeys(("length", "efflength", "conf", "status", "infreps"), "none"),
    **dict.fromkeys(("unique", "ci", "lowerbound", "upperbound"), "none"),
}

# Words that may stand beside these, and say nothing by themselves.
FILLERS = {"gene", "total", "eff", "effective", "value", "values", "lo", "hi", "num", "n"}

# Words of columns that hold something else than RNA.
PROTEINS = re.compile(
    r"\b(LFQ|iBAQ|intensity|intensities|spectral count|MS/MS count|peptides|reporter)",
    re.IGNORECASE,
)

# What aligners and their pipelines add to the name of a sample.
ALIGNMENT = re.compile(
    r"([._-]?(Aligned|sortedByCoord|sorted|sort|out|markdup|dedup|rmdup|umi|hisat2?|star))*"
    r"\.(bam|sam|cram)$",
    re.IGNORECASE,
)

# A column that names samples.
SAMPLES = re.compile("sample|run|subject|donor|patient|library", re.IGNORECASE)

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

# Names that say nothing of the sample: its folder does.
GENERIC = {
    *("quant", "quant.genes", "abundance", "gene_abund", "genes", "isoforms", "t_data", "counts"),
    *("readspergene", "readspergene.out", "genes.results"),
    *("gene_abundances", "genes.fpkm_tracking"),
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


# Statistics of several samples, as words in the name of a column.
STATISTIC = re.compile(
    r"(^|_)(mean|median|average|avg|geomean|stdev|logfc|log2fc|log2foldchange|"
    r"fold_change|foldchange|padj|pval|pvalue|p_value|p_adjust|p_adj|adj_p|fdr|qvalue|q_value|"
    r"n_zero)(_|$)"
)


def no_samples(names):
    """Mask of the columns (C) whose names are of annotation, statistics or summaries."""
    plain = [plain_name(name) for name in names]
    known = NOT_SAMPLES | SUMMARIES
    if any(P_VALUE.search(name) for name in plain):
        known = known | STATISTICS
    statistic = [
        STATISTIC.search(name) is not None
        or re.match(r"(mean|median)[A-Z]|baseMean", str(original))
        for name, original in zip(plain, names, strict=True)
    ]
    mask = [name in known or bool(s) for name, s in zip(plain, statistic, strict=True)]
    return np.array(mask, bool)


def split_words(name):
    """``(sample, words)`` of a column name: ``S1_TPM`` -> ``("S1", ["tpm"])``.

    words are those of UNIT_WORDS, with fillers beside them; the sample is what is left, "" if that
    is nothing.
    """
    text = re.sub(r"(?<=[a-z0-9])(TPM|FPKM|RPKM|CPM|Counts?|Reads)$", r"_\1", str(name).strip())
    tokens = re.findall(r"[A-Za-z0-9]+|[^A-Za-z0-9]+", text)
    is_word = [token.lower() in UNIT_WORDS for token in tokens]
    if not any(is_word):
        return str(name), []
    words = [token.lower() for token, word in zip(tokens, is_word, strict=True) if word]
    drop = list(is_word)
    order = range(len(tokens))
    for i in [*order, *reversed(order)]:  # fillers next to a word, separators aside
        near = any(0 <= j < len(tokens) and drop[j] for j in (i - 2, i + 2))
        drop[i] |= tokens[i].lower() in FILLERS and near
    left = "".join("\0" if d else token for token, d in zip(tokens, drop, strict=True))
    sample = re.sub(r"[^A-Za-z0-9\0]*\0[^A-Za-z0-9]*", "\0", left)  # with its separators
    return sample.strip("\0").replace("\0", "_"), words


def unit_of(words):
    """The unit that words of a column's name stand for: ``plain`` for none of them."""
    kinds = {UNIT_WORDS[word] for word in words}
    for kind in ("none", "log", "normalised"):
        if kind in kinds:
            return kind
    if "fpkm" in kinds:
        return "fpkm_uq" if "uq" in kinds else "fpkm"
    return next((k for k in ("tpm", "cpm", "coverage", "counts") if k in kinds), "plain")


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


def without_paths(names):
    """Names of samples that were files of alignments, without folders and endings.

    ``run/S1/S1.sorted.bam`` becomes ``S1``; so does ``run/S1/accepted_hits.bam``, if all files have
    the same name. They stay as they are if samples could not be told by these.
    """
    if not all(ALIGNMENT.search(str(name)) for name in names):
        return names
    stems = [ALIGNMENT.sub("", re.split(r"[/\\]", name)[-1]) for name in names]
    folders = [re.split(r"[/\\]", name)[-2] if re.search(r"[/\\]", name) else "" for name in names]
    for shorter in (stems, folders):
        if len(set(shorter)) == len(names) and all(shorter):
            return shorter
    return names


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
