"""Matching genes by name: symbols, and Ensembl ids with or without a version."""

import re
from collections import Counter

import numpy as np
import pandas as pd

from runtime.errors import some

# Usual names of columns of .var with ids and symbols, as plain_column writes them. They decide only
# between columns that hold the same kind of names.
ID_COLUMNS = ("geneids", "geneid", "ensemblid", "ensembl", "featureid")

SYMBOL_COLUMNS = (
    *("featurename", "genesymbols", "genesymbol", "symbol", "symbols", "genename", "genenames"),
    *("geneshortname", "hgncsymbol", "externalgenename", "features", "feature", "gene", "genes"),
    *("name", "names"),
)

# Symbols that nearly every count matrix has, of man (and, in another case, of mouse).
COMMON_GENES = {
    *("ACTB", "B2M", "MALAT1", "CD3E", "GAPDH", "EEF1A1", "TMSB4X", "PTPRC", "VIM", "FTH1", "FTL"),
    *("RPLP0", "RPS6", "TPT1", "EPCAM", "CD19", "LYZ", "NKG7", "CD14", "MT-CO1", "MT-ND1"),
}

# What references of several genomes put in front of the names of each: GRCh38_CD3E, mm10___Cd3e.
GENOME = re.compile(
    r"((?:hg|mm|rn|dm|ce|GRC[hmrzg]|BDGP|WBcel|Rnor_|mRatBN|Sscrofa|Mmul_)\d[\d.-]*)_+(?=.)"
)

# Lower-case names are mended if that finds so much of the model's genes, or of the table's: human
# genes in lower case, and not those of another species.
MOSTLY_FOUND = 0.6

MIN_COMMON = 3  # of COMMON_GENES, that are evidence of symbols

SPECIES = {
    "ENSMUSG": "mouse",
    "ENSRNOG": "rat",
    "ENSDARG": "zebrafish",
    "ENSSSCG": "pig",
    "ENSMMUG": "macaque",
    "ENSG": "human",
}


def bare_id(name):
    """An Ensembl gene id without its suffix: a version, ``_PAR_Y``, ``_symbol`` or ``|...``.

    Returns:
        str, or None if the name is not an Ensembl gene id.
    """
    match = re.fullmatch(r"(ENS[A-Z]*G\d+)([._|](?!intron|exon|utr).*)?", name)
    return match and match[1]


def mostly_ids(names):
    """Whether more than half of the names that are not empty are ids, genome in front or not."""
    n_ids = sum(bare_id(without_genome(name)) is not None for name in names)
    return n_ids > sum(map(bool, names)) / 2


def other_names(var):
    """The second name of each gene: its Ensembl id, or its symbol if genes are named otherwise.

    The column is chosen by what it holds; a usual name decides only between several.

    Args:
        var: ``.var`` of an ``.h5ad`` (G rows).

    Returns:
        list of str (G), "" where there is none.
    """
    named_by_id = mostly_ids(list(var.index))
    numbered = all(str(name).isdigit() for name in var.index)  # or Entrez ids
    columns = {}
    for column in var:
        if var[column].dtype.kind not in "biufcmM":
            columns[column] = ["" if pd.isna(name) else str(name).strip() for name in var[column]]
    found = None
    if named_by_id or numbered:
        found = best_column(columns, SYMBOL_COLUMNS, hold_symbols)
    if found is None and not named_by_id:
        found = best_column(columns, ID_COLUMNS, lambda names, _: mostly_ids(names))
    return found or [""] * len(var)


def best_column(columns, usual, holds):
    """Names of the column that holds the right ones: one with a usual name, else the first.

    Args:
        columns: name -> names of the genes (G). usual: names of columns, the likeliest first.
            holds: function of names and of whether their column has a usual name.

    Returns:
        list of str (G), or None.
    """
    plain = {column: re.sub(r"[^a-z0-9]", "", str(column).lower()) for column in columns}
    order = sorted(
        columns, key=lambda c: usual.index(plain[c]) if plain[c] in usual else len(usual)
    )
    return next((columns[c] for c in order if holds(columns[c], plain[c] in usual)), None)


def hold_symbols(names, is_usual):
    """Whether names of genes (G) are symbols: hardly any repeats, and COMMON_GENES are among them.

    Genes of a column with a usual name need not be common ones.
    """
    filled = [name for name in names if name]
    if not filled or mostly_ids(names) or len(set(filled)) < 0.5 * len(filled):
        return False
    return (
        is_usual
        or len({without_genome(name).upper() for name in filled} & COMMON_GENES) >= MIN_COMMON
    )


def without_genome(name):
    """A gene's name without a genome in front."""
    match = GENOME.match(name)
    return name[match.end() :] if match else name


def genome_of(name):
    """The genome in front of a gene's name, or the species of an Ensembl id; None if neither."""
    if match := GENOME.match(name):
        return match[1]
    match = re.match(r"(ENS[A-Z]*G)\d{6,}", name)
    return match and SPECIES.get(match[1], match[1])


def name_map(genes, gene_ids):
    """Dict from every name of a model's genes to the gene's position in ``genes``.

    A name goes to the gene that has it as its name, else as its bare id, then as its other name,
    then as the bare id of that; among equals to the first gene.
    """
    known = {}
    for names in (genes, map(bare_id, genes), gene_ids, map(bare_id, gene_ids)):
        for position, name in enumerate(names):
            if name:
                known.setdefault(name, position)
    return known


def find_genes(names, known):
    """Position of each name (G) in the model, -1 if unknown; ``known``: see :func:`name_map`."""
    return np.array([known.get(n, known.get(bare_id(n), -1)) for n in names], np.int64)


def n_found(positions):
    """Number of the model's genes among the positions of :func:`find_genes`."""
    return len(np.unique(positions[positions >= 0]))


# --------------------------------------------------------------- names as they are found in files


class GeneFinder:
    """Finds a model's genes under the names that files give them.

    A name that is not known as it stands is mended where there is one reading of it, and the kinds
    of mended names are counted.

    Args:
        genes: the model's (M). gene_ids: their other names (M), "" where there is none.
    """

    def __init__(self, genes, gene_ids):
        self.known = name_map(genes, gene_ids)
        self.n_genes = len(genes)
        upper = Counter(name.upper() for name in set(genes))
        self.by_upper = {n.upper(): self.known[n] for n in genes if n and upper[n.upper()] == 1}
        self.symbols = set(genes)

    def count(self, names):
        """Number of the model's genes among names as they stand."""
        return n_found(find_genes(map(str, names), self.known))

    def find(self, names):
        """Positions of names (G) in the model, -1 if unknown, and Counter of the kinds of mending.

        Names are mended one by one, lower-case ones only where most of them are known then.
        """
        names = [str(name) for name in names]
        positions = find_genes(names, self.known)
        kinds = Counter()
        for i in np.flatnonzero(positions < 0):
            for kind, candidates in variants(names[i]):
                found = {self.known[name] for name in candidates if name in self.known}
                if len(found) == 1:
                    positions[i] = found.pop()
                    kinds[kind] += 1
                if found:  # of several genes, none is meant
                    break
        positions = self.mend_dates(names, positions, kinds)
        return self.mend_lower_case(names, positions, kinds), kinds

    def mend_dates(self, names, positions, kinds):
        """Genes that a spreadsheet turned into dates, where one gene of the model can be meant."""
        dates = {i: genes_of_date(names[i]) for i in np.flatnonzero(positions < 0)}
        counts = Counter(tuple(genes) for genes in dates.values() if genes)
        for i, genes in dates.items():
            possible = {self.known[name] for name in genes if name in self.known}
            if len(possible) == 1 and counts[tuple(genes)] == 1:
                positions[i] = possible.pop()
                kinds["dates in place of genes"] += 1
        return positions

    def mend_lower_case(self, names, positions, kinds):
        """Symbols in lower case, if these are the model's genes and not another species'."""
        lower = [i for i in np.flatnonzero(positions < 0) if names[i].islower()]
        found = {
            i: self.by_upper[names[i].upper()] for i in lower if names[i].upper() in self.by_upper
        }
        mended = positions.copy()
        mended[list(found)] = list(found.values())
        share_of_model = n_found(mended) / max(self.n_genes, 1)
        share_of_table = np.mean(mended >= 0) if len(mended) else 0
        if not found or max(share_of_model, share_of_table) < MOSTLY_FOUND:
            return positions
        kinds["in lower case"] += len(found)
        return mended

    def n_in_other_case(self, names):
        """Number of names that are known in upper case only, written otherwise."""
        return sum(
            name not in self.known and name.upper() in self.by_upper for name in map(str, names)
        )


def variants(name):
    """Other spellings of a gene's name: what is mended, and the candidates; the likeliest first.

    Of several candidates of one spelling, only one may be a gene of the model.
    """
    bare = name.strip().strip("\"'").strip()
    bare = re.sub(r"^gene[-:]", "", without_genome(bare))
    if bare != name:
        yield "with blanks, quotes or prefixes", [bare, *filter(None, [bare_id(bare)])]
    if match := set(re.findall(r"ENS[A-Z]*G\d{11}", bare)):
        if not re.search(r"ENS[A-Z]*G\d{11}(\.\d+)?:E?\d+$|intron|exon|utr", bare, re.I):
            yield "of several names", list(match)
        return
    parts = [part for part in re.split(r"[|;,]+| \((?=\d+\)$)", bare) if part]
    if len(parts) > 1:
        yield "of several names", [part for part in parts if not part.isdigit()]
    if "." in bare:
        yield "with points for hyphens", [bare.replace(".", "-")]
    if match := re.fullmatch(r"C(\d+)ORF(\d+)", bare):
        yield "in upper case", [f"C{match[1]}orf{match[2]}"]
    if match := re.fullmatch(r"MARCH(\d+)|SEPT(\d+)", bare):  # their names since 2020
        yield "of older names", [f"MARCHF{match[1]}" if match[1] else f"SEPTIN{match[2]}"]
    if match := re.fullmatch(r"MARCHF(\d+)|SEPTIN(\d+)", bare):
        yield "of newer names", [f"MARCH{match[1]}" if match[1] else f"SEPT{match[2]}"]


def genes_of_date(name):
    """Symbols that a spreadsheet turns into this date: ``1-Mar`` may be MARCH1 or MARC1."""
    match = re.fullmatch(r"0?(\d{1,2})-(Mar|Sep|Dec)|(Mar|Sep|Dec)-0?(\d{1,2})", name.strip())
    if match is None:
        return []
    number, month = match[1] or match[4], match[2] or match[3]
    stems = {
        "Mar": ("MARCH", "MARCHF", "MARC", "MTARC"),
        "Sep": ("SEPT", "SEPTIN"),
        "Dec": ("DEC",),
    }
    return [f"{stem}{number}" for stem in stems[month]]


# What names look like that are no gene symbols of the model, and what helps.
KINDS_OF_NAMES = (
    (r"ENS[A-Z]*G\d+(\.\d+)?:E?\d+", "exons (DEXSeq)", "genes"),
    (r".+-2\d\d", "names of transcripts", "genes: sum them with tximport, or quantify by gene"),
    (r"ENST\d+.*", "Ensembl transcripts", "genes: sum them with tximport, or quantify by gene"),
    (r"(NM|NR|XM|XR)_\d+.*", "RefSeq transcripts", "gene symbols or Ensembl ids"),
    (r"\d+(_[a-z]+)*_at", "probes of a microarray", "gene symbols or Ensembl ids"),
    (r"ILMN_\d+", "probes of a microarray", "gene symbols or Ensembl ids"),
    (r"(hsa|mmu)-(mir|miR|let)-.*", "microRNAs", "genes"),
    (r"\d+(\.0)?", "numbers, such as Entrez ids", "gene symbols or Ensembl ids"),
    (r"(chr)?[\dXYM]+:\d+.*", "positions in the genome", "gene symbols or Ensembl ids"),
)


def likely_cause(names, finder):
    """Why few of these names are genes of the model, in a few words; "" if nothing is known.

    Args:
        names: as the file has them (G). finder: GeneFinder of the model.
    """
    names = [str(name).strip() for name in names if str(name).strip()]
    if not names:
        return ""
    prefixes = Counter(re.match(r"ENS[A-Z]*G(?=\d)", n)[0] for n in names if bare_id(n))
    if sum(prefixes.values()) > len(names) / 2:
        prefix = prefixes.most_common(1)[0][0]
        model = Counter(re.match(r"ENS[A-Z]*G(?=\d)", n)[0] for n in finder.known if bare_id(n))
        if model and prefix not in model:
            species = SPECIES.get(prefix, "another species")
            return f"these are Ensembl ids of {species} ({prefix}...)"
        if not model:
            return "the weights hold no Ensembl ids"
    for pattern, kind, expected in KINDS_OF_NAMES:
        if sum(re.fullmatch(pattern, name) is not None for name in names) > len(names) / 2:
            return f"these are {kind}, expected {expected}"
    n_other = finder.n_in_other_case(names)
    if n_other > finder.count(names):
        title = sum(name[:1].isupper() and name[1:] == name[1:].lower() for name in names)
        if title > len(names) / 2:
            return f"{n_other:,} are known in upper case only: written as genes of mouse or rat are"
        return f"{n_other:,} are known in upper case only: in another case, or of another species"
    return ""


def describe_kinds(kinds):
    """Text on what was mended, of a Counter of :meth:`GeneFinder.find`."""
    return some([f"{n:,} {kind}" for kind, n in kinds.most_common()], 8)


def second_names(genes, gene_ids):
    """The other names of genes that differ from their names."""
    return [other for gene, other in zip(genes, gene_ids, strict=True) if other not in ("", gene)]


def examples(genes, gene_ids):
    """A few names that the model knows, for messages."""
    others = second_names(genes, gene_ids)
    return some(genes) + (f", or {some(others)}" if others else "")
