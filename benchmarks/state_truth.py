"""What is true of samples that no training has seen, and the bulks that methods read.

Notation in shape comments: S samples, K cell types, T compared types, G genes of the decoder, P
genes that truth and decoder share.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from data import Reference, align_genes, sum_by_type
from readers.labels import natural_order
from readers.profiles import Profiles, read_profile_types, read_profiles
from runtime.errors import InputError, some
from states.conditions import choose_conditions

MIN_CELLS = 20  # real cells of a type in a sample, for a metric of it
MIXING = 5.0  # Dirichlet parameter of every type, if --mixing does not give others


@dataclass
class ContrastPlan:
    """What the settings ask to be compared, the same for every training."""

    samples: pd.DataFrame
    """Of the reference: donor and condition, by name of the sample (S)."""
    bulk: np.ndarray
    """Sums of all cells of each of these samples, labelled or not (S, genes of the data)."""
    types: list[str]
    """Names of the types that are compared (T)."""
    member: np.ndarray
    """Which cell types make each of them (K, T), 0 or 1."""
    profiles: Profiles | None
    """True profiles; None: the reference's own cells are the truth."""
    mixing: np.ndarray | None
    """Dirichlet parameters (T) by which profiles are mixed to bulks; None: bulks are ``bulk``."""
    conditions: tuple[str, str]
    """A and B; fold changes are from A to B."""
    reference_conditions: tuple[str, str] | None
    """The same of the reference's cells; None if it has no such conditions."""


@dataclass
class Truth:
    """True expression of the compared types in samples."""

    samples: pd.DataFrame
    """Donor and condition, by name of the sample (S)."""
    profiles: np.ndarray
    """CPM (S, T, P), NaN where a sample lacks a type."""
    genes: np.ndarray
    """The shared genes, as positions in the decoder's (P)."""


@dataclass
class TestSamples:
    """Samples that no training has seen, and which of them are compared."""

    truth: Truth
    names: list[str]
    """(S), some of those of ``truth``."""
    contrasts: list[tuple[str, np.ndarray, np.ndarray]]
    """Of :func:`list_contrasts`, as indices of ``names``."""
    all_contrasts: list[tuple[str, np.ndarray, np.ndarray]]
    """The same of all samples that have a truth, as indices of ``truth``."""

    @property
    def compared(self):
        """Indices of the names that are in a contrast."""
        return sorted({i for _, a, b in self.contrasts for i in (*a, *b)})

    @property
    def index(self):
        """Of the names in ``truth`` (S)."""
        return self.truth.samples.index.get_indexer(self.names)


@dataclass
class TestBulks:
    """Bulks of samples that no training has seen."""

    counts: np.ndarray
    """Counts or CPM (S, G)."""
    measured: np.ndarray
    """Mask of the genes that they have (G)."""
    shares: np.ndarray
    """True share of each cell type in the counts (S, K), rows summing to 1."""


def plan_contrasts(cfg, cell_types):
    """Read and check everything that the settings name, before anything is measured.

    Args:
        cfg: settings of compare_states.py. cell_types: names (K).

    Raises:
        InputError: a file or setting cannot be used, or the two conditions are not clear.
    """
    everything = Reference.load(cfg, need_labels=False)
    names = everything.samples
    bulk = sum_by_type(everything.X, everything.sample, len(names))
    samples = describe_samples(everything.cells.obs).loc[names]
    known = natural_order(samples["condition"])
    profiles, mixing = None, None
    types, type_of = cell_types, cell_types
    if cfg.profiles is not None:
        profiles = read_profiles(cfg.profiles, cfg.profile_table)
        profiled = list(dict.fromkeys(profiles.table["cell_type"]))
        types, type_of = read_profile_types(cfg.profile_types, cell_types, profiled)
        own = profiles.table["sample"].isin(names)
        if own.any():
            check_agreement(profiles.table[own], samples, cfg)
        else:
            mixing = np.array(cfg.mixing or [MIXING] * len(types))
            known = natural_order(profiles.table["condition"])
    check_mixing(cfg, mixing, types)
    conditions = choose_conditions(cfg.contrast, known, "--contrast")
    member = np.array([[name == t for t in types] for name in type_of], float)
    reference_conditions = find_reference_conditions(cfg, samples, conditions)
    return ContrastPlan(
        samples, bulk, types, member, profiles, mixing, conditions, reference_conditions
    )


def describe_samples(table):
    """Donor and condition by name of the sample, of a table with the columns sample and both."""
    columns = table[["sample", "donor", "condition"]].astype(str).drop_duplicates()
    return columns.set_index("sample")


def check_agreement(table, samples, cfg):
    """Check that the profiles' table says of samples what the reference's columns say.

    Raises:
        InputError: a donor or condition differs.
    """
    given = describe_samples(table)
    for column in ("donor", "condition"):
        differs = given[column] != samples[column].loc[given.index]
        if differs.any():
            name = given.index[differs][0]
            raise InputError(
                f"{cfg.profile_table}: {column} of sample {name} is {given[column][name]}, "
                f"expected {samples[column][name]} as --{column}s has it"
            )


def check_mixing(cfg, mixing, types):
    """Check --mixing against the types that are mixed.

    Raises:
        InputError: it is given for bulks that are not mixed, or not one positive number a type.
    """
    if mixing is None and cfg.mixing:
        raise InputError("--mixing: found nothing to mix, expected --profiles of other samples")
    if mixing is not None and len(mixing) != len(types):
        raise InputError(
            f"--mixing: found {len(mixing)} numbers, expected {len(types)}, one for each of "
            f"{', '.join(types)}"
        )
    if mixing is not None and not all(0 < a < np.inf for a in mixing):
        raise InputError(f"--mixing: found {some(cfg.mixing, 8)}, expected positive numbers")


def find_reference_conditions(cfg, samples, conditions):
    """The conditions of the reference's cells that stand for A and B, or None."""
    known = natural_order(samples["condition"])
    if cfg.reference_contrast is not None:
        return choose_conditions(cfg.reference_contrast, known, "--reference-contrast")
    if set(conditions) <= set(known):
        return conditions
    print(
        f"--conditions {cfg.conditions}: the reference has no {' and no '.join(conditions)}; "
        "baselines of one condition left out without --reference-contrast"
    )
    return None


def list_contrasts(samples, conditions, paired):
    """Which samples are compared: from the mean of some to the mean of others.

    Args:
        samples: with donor and condition (S rows). conditions: A and B. paired: a contrast for
            each donor that has both; else one for each donor of B, from all other donors of A.

    Returns:
        list of ``(donor, a, b)``, a and b indices of samples.
    """
    donor, condition = samples["donor"].to_numpy(), samples["condition"].to_numpy()
    contrasts = []
    for name in natural_order(donor):
        own = (donor == name) if paired else (donor != name)
        a = np.flatnonzero(own & (condition == conditions[0]))
        b = np.flatnonzero((donor == name) & (condition == conditions[1]))
        if len(a) and len(b):
            contrasts.append((name, a, b))
    return contrasts


def is_paired(samples, conditions):
    """Whether any donor has samples of two different conditions A and B."""
    return conditions[0] != conditions[1] and bool(list_contrasts(samples, conditions, True))


def average_samples(profiles):
    """Mean over samples (n, T, P) -> (T, P) of those that have a type; NaN where none has."""
    there = ~np.isnan(profiles).any(axis=2, keepdims=True)  # (n, T, 1)
    total = np.where(there, profiles, 0.0).sum(axis=0)  # (T, P)
    n = there.sum(axis=0)  # (T, 1)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def merge_types(sums, member):
    """Profiles in CPM of the compared types.

    sums: counts (..., K, G). member: (K, T). Returns (..., T, G), NaN where there is no count.
    """
    merged = np.einsum("...kg,kt->...tg", sums, member, optimize=True)
    total = merged.sum(axis=-1, keepdims=True)
    return np.where(total > 0, merged / np.where(total > 0, total, 1) * 1e6, np.nan)


def sum_groups(model, reference, group, n):
    """Sums of real cells by group and type (n, K, G), and their numbers (n, K).

    group: of each cell (N), 0 to n - 1; -1 for cells to leave out.
    """
    rows, K = np.flatnonzero(group >= 0), len(model.cell_types)
    codes = group[rows] * K + reference.codes[rows]
    sums = sum_by_type(model.counts(reference, rows), codes, n * K).reshape(n, K, -1)
    return sums, np.bincount(codes, minlength=n * K).reshape(n, K)


def group_by_sample(reference, names):
    """Position of each cell's sample among ``names`` (N), -1 if it is none of them."""
    return pd.Index(names).get_indexer(reference.samples)[reference.sample]


def held_out_samples(model, reference):
    """Names of the samples whose cells are all held out.

    Raises:
        InputError: there is none, or a sample is held out in part.
    """
    sample, names = reference.sample, reference.samples
    n = np.bincount(sample, minlength=len(names))
    n_held_out = np.bincount(sample[reference.held_out], minlength=len(names))
    whole = (n_held_out == n) & (n > 0)
    partial = (n_held_out > 0) & ~whole
    if partial.any() or not whole.any():
        found = f"{partial.sum()} samples held out in part" if partial.any() else "no sample"
        raise InputError(
            f"{model.folder / 'scDecoder_model.pt'}: found {found}, expected whole samples held "
            "out, as by --samples with --held-out-donors in the trainings"
        )
    return [name for name, kept in zip(names, whole, strict=True) if kept]


def truth_of_cells(model, reference, plan):
    """Truth from the cells of the reference's own samples, of types with MIN_CELLS cells."""
    sample, names = reference.sample, reference.samples
    sums, n_cells = sum_groups(model, reference, sample, len(names))
    profiles = merge_types(sums, plan.member)
    profiles[n_cells @ plan.member < MIN_CELLS] = np.nan
    return Truth(plan.samples.loc[names], profiles, np.arange(profiles.shape[2]))


def truth_of_profiles(model, plan):
    """Truth from --profiles: their values as they are, or CPM where they are mixed to bulks."""
    table, values = plan.profiles.table, plan.profiles.values  # (n, R)
    if plan.mixing is not None:
        values = values / values.sum(axis=1, keepdims=True) * 1e6
    rows, genes = plan.profiles.match_genes(model.genes, model.gene_ids)
    used = table["cell_type"].isin(plan.types).to_numpy()
    samples = describe_samples(table[used])
    profiles = np.full((len(samples), len(plan.types), len(genes)), np.nan)
    s = samples.index.get_indexer(table["sample"][used])
    t = pd.Index(plan.types).get_indexer(table["cell_type"][used])
    profiles[s, t] = values[used][:, rows]
    return Truth(samples, profiles, genes)


def bulks_of_samples(model, reference, plan, names):
    """TestBulks of the reference's own samples ``names``: the sums of all of their cells."""
    index = plan.samples.index.get_indexer(names)
    genes = model.genes
    X, measured = align_genes(plan.bulk[index], reference.genes, genes, "the decoder", report=False)
    sums, _ = sum_groups(model, reference, group_by_sample(reference, names), len(names))
    shares = sums.sum(axis=2)  # (S, K)
    return TestBulks(X.toarray(), measured, shares / shares.sum(axis=1, keepdims=True))


def mix_profiles(model, reference, plan, truth, rng):
    """TestBulks that mix each sample's own profiles by Dirichlet weights.

    A sample that lacks a type is mixed of the others. Within a compared type, cell types have the
    shares that they have in the training cells.
    """
    there = ~np.isnan(truth.profiles).any(axis=2)  # (S, T)
    weights = np.zeros(there.shape)
    for s, types in enumerate(there):
        weights[s, types] = rng.dirichlet(plan.mixing[types])
    G = len(model.genes)
    counts, measured = np.zeros((len(weights), G)), np.isin(np.arange(G), truth.genes)
    counts[:, truth.genes] = np.einsum("st,stp->sp", weights, np.nan_to_num(truth.profiles))
    share = training_shares(model, reference)  # (K)
    within = plan.member * share[:, None]  # (K, T)
    within = within / np.maximum(within.sum(axis=0), 1e-12)
    return TestBulks(counts, measured, weights @ within.T)


def training_shares(model, reference):
    """Share of each cell type in the counts of all training cells (K)."""
    sums, _ = sum_groups(model, reference, np.where(reference.held_out, -1, 0), 1)
    shares = sums[0].sum(axis=1)
    return shares / shares.sum()
