"""Does the state of a bulk reach its cells? Fold changes between conditions inside cell types.

Generated cells of samples of unseen donors are summed by type, and compared with the truth: the
held-out cells' own sums, or profiles of sorted cells (``--profiles``). Profiles of samples that the
reference does not have are also mixed to the bulks themselves, so that a bulk of another platform
has a known truth.

Notation in shape comments: S samples, G genes of the decoder, K cell types, T types that are
compared (each of one or several cell types), P genes that truth and decoder share.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from counts.genes import PROTOCOL_GENES
from data import Reference, align_genes, mean_counts, sum_by_type
from deconvolution.encode import encode
from deconvolution.expression import estimate_expression
from deconvolution.samples import add_to_sums
from evaluation.baselines import bayesprism_expression, one_factor_expression
from evaluation.metrics import CellMetrics, false_changes, fold_change_metrics, random_forest_auroc
from generation import generate_cells
from models import scGMVAE
from readers.bulk import Bulk
from readers.labels import natural_order
from readers.profiles import Profiles, read_profile_types, read_profiles
from runtime.errors import InputError, some
from runtime.weights import load_model
from states.moments import mix_moments, read_samples_card

FEWEST_CELLS = 20  # real cells of a type in a sample, for a metric of it
MIXING = 5.0  # Dirichlet parameter of every type, if --mixing does not give others
NULL_CELLS = 100  # of a type on each side of the null, where no real cells limit them

# Methods whose cells are generated: bulk2sc.py's --calibrate, and whether moments are the bulk's.
GENERATED = {
    "bulk2sc": ("types", True),
    "bulk2sc, no calibration": ("none", True),
    "calibrated uniformly": ("uniform", True),
    "constant answer": ("none", False),
}
EXPECTED = "bulk2sc, expected profiles"


# ---------------------------------------------------------------------------- what is compared


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
        cfg: settings of evaluate.py. cell_types: names (K).

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


def choose_conditions(asked, known, name):
    """The two conditions to compare: those asked for, else the two there are.

    One condition alone stands on both sides: then each donor is compared with the others.

    Args:
        asked: pair or None. known: conditions there are. name: the flag, for messages.

    Raises:
        InputError: it is not clear which two, or one is not there.
    """
    if asked is None:
        if len(known) > 2:
            raise InputError(
                f"{name}: found {len(known)} conditions ({some(known, 12)}), expected {name} with "
                "two of them"
            )
        return known[0], known[-1]
    if unknown := [condition for condition in asked if condition not in known]:
        raise InputError(f"{name}: found {some(unknown)}, expected two of {some(known, 12)}")
    if asked[0] == asked[1]:
        raise InputError(f"{name}: found {asked[0]} twice, expected two conditions")
    return tuple(asked)


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


# ------------------------------------------------------------------- truth and bulks of a training


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
    """Truth from the cells of the reference's own samples, of types with FEWEST_CELLS cells."""
    sample, names = reference.sample, reference.samples
    sums, n_cells = sum_groups(model, reference, sample, len(names))
    profiles = merge_types(sums, plan.member)
    profiles[n_cells @ plan.member < FEWEST_CELLS] = np.nan
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


# ------------------------------------------------------------------------- bulk2sc's own answers


@dataclass
class Answer:
    """What a method generates cells of bulks from."""

    encoded: tuple[torch.Tensor, ...]
    """mu, var (S, K, D) and pi (S, K)."""
    log_factor: torch.Tensor | None
    """(S, K, G) or (S, G), as :func:`generation.generate_cells` takes it."""
    expected: np.ndarray | None
    """Counts that each type is expected to give to a bulk (S, K, G); None if not calibrated."""


def answer_bulks(model, counts, measured, names):
    """The Answer of each method of GENERATED to bulks.

    Args:
        counts: (S, G). measured: mask (G). names: of the bulks (S).

    Returns:
        dict: method -> Answer.
    """
    decoder = model.decoder
    encoded = encode(model, Bulk(counts, measured, names, str(model.folder)))[:3]
    shape = (len(counts), *decoder.mu.shape)
    constant = (decoder.mu.expand(shape), decoder.var.expand(shape), encoded[2])
    answers = {}
    for method, (calibrate, own_moments) in GENERATED.items():
        moments = encoded if own_moments else constant
        answers[method] = Answer(moments, None, None)
        if calibrate != "none":
            answers[method] = Answer(
                moments, *estimate(decoder, moments, counts, measured, calibrate)
            )
    return answers


def estimate(decoder, encoded, counts, measured, calibrate):
    """log_factor of encoded bulks (S, G), and the counts expected of each type (S, K, G)."""
    expression = estimate_expression(decoder, encoded, counts, measured, calibrate)
    weight = encoded[2].cpu().numpy() * expression.library  # (S, K)
    return expression.log_factor, weight[:, :, None] * expression.profiles


def generate_sums(decoder, answer, per_bulk, seed):
    """Sums of generated cells by bulk and type (S, K, G); per_bulk cells of each."""
    S, K = answer.encoded[2].shape
    generator = torch.Generator(decoder.mu.device).manual_seed(seed)
    sums = np.zeros((S * K, decoder.out.out_features))
    for cells in generate_cells(decoder, answer.encoded, per_bulk, generator, answer.log_factor):
        add_to_sums(sums, cells.counts, cells.bulk * K + cells.cell_type)
    return sums.reshape(S, K, -1)


def generate_type(decoder, answer, s, k, n, seed):
    """Counts (n x G), CSR, of n generated cells of type k of bulk s."""
    mu, var, pi = (part[s : s + 1] for part in answer.encoded)
    pi = torch.zeros_like(pi)
    pi[0, k] = 1
    generator = torch.Generator(decoder.mu.device).manual_seed(seed)
    log_factor = None if answer.log_factor is None else answer.log_factor[s : s + 1]
    chunks = generate_cells(decoder, (mu, var, pi), n, generator, log_factor)
    return sp.vstack([cells.counts for cells in chunks], format="csr")


# -------------------------------------------------------------------------------------- baselines


def condition_sums(model, reference, plan, conditions):
    """Sums of the training cells by condition and type (C, K, G)."""
    sample, names = reference.sample, reference.samples
    condition = pd.Index(conditions).get_indexer(plan.samples["condition"].loc[names])[sample]
    group = np.where(reference.held_out, -1, condition)
    return sum_groups(model, reference, group, len(conditions))[0]


def condition_moments(model, plan):
    """Moments of the training cells of A and of B: mu, var (2, K, D) float64, or None.

    A type that no sample of a condition has gets the mean of these samples' shrunk moments.
    """
    file = model.folder / "scGMVAE_model.pt"
    card = load_model(file, scGMVAE)[1].get("samples") if file.exists() else None
    if card is None:
        return None
    names, moments = read_samples_card(card)
    condition = plan.samples["condition"].reindex(names).to_numpy()
    of_condition = np.stack([condition == c for c in plan.reference_conditions])  # (2, S)
    if not of_condition.any(axis=1).all():
        return None
    weight = of_condition[:, :, None] * (moments.n_cells + 1e-9)  # (2, S, K)
    return mix_moments(weight / weight.sum(axis=1, keepdims=True), moments)


def by_condition(values, samples, conditions):
    """Values of A and B (2, T, P) for each sample (S, T, P); NaN for other conditions."""
    index = pd.Index(dict.fromkeys(conditions)).get_indexer(samples["condition"])
    return np.where((index >= 0)[:, None, None], values[index], np.nan)


def baseline_sums(model, reference, plan, bulks):
    """Baselines that read the bulks: dict method -> counts (S, K, G)."""
    shares = bulks.shares + 1e-6 * training_shares(model, reference)  # so that no type is missing
    shares /= shares.sum(axis=1, keepdims=True)
    rows = reference.train
    profiles = mean_counts(
        model.counts(reference, rows),
        reference.codes[rows],
        shares.shape[1],
    )
    profiles /= np.maximum(profiles.sum(axis=1, keepdims=True), 1e-12)
    conditions = natural_order(plan.samples["condition"])
    states = condition_sums(model, reference, plan, conditions)  # (C, K, G)
    type_of = np.tile(np.arange(len(profiles)), len(conditions))
    genes = model.genes
    in_theta = bulks.measured & ~np.array([bool(PROTOCOL_GENES.fullmatch(g)) for g in genes])
    Z = bayesprism_expression(
        bulks.counts,
        np.where(bulks.measured, states, 0.0).reshape(len(type_of), -1),
        type_of,
        in_theta if (bulks.counts[:, in_theta].sum(axis=1) > 0).all() else bulks.measured,
    )
    return {
        "one factor per gene": one_factor_expression(
            bulks.counts, bulks.measured, shares, profiles
        ),
        "BayesPrism Z": Z,
    }


def condition_profiles(model, reference, plan, samples):
    """Baselines that know the condition of each sample: dict method -> CPM (S, T, G)."""
    if plan.reference_conditions is None:
        return {}
    a, b = plan.reference_conditions
    sums = condition_sums(model, reference, plan, list(dict.fromkeys((a, b))))[[0, -1]]  # (2, K, G)
    values = {"training cells of the condition": merge_types(sums, plan.member)}
    moments = condition_moments(model, plan)
    if moments is not None:
        decoder = model.decoder
        mu, var = (torch.from_numpy(part).to(decoder.mu) for part in moments)
        share = sums.sum(axis=2)  # (2, K)
        pi = torch.from_numpy(share / share.sum(axis=1, keepdims=True)).to(mu)
        bulk = sums.sum(axis=1)  # (2, G); of no use without calibration
        everything = np.ones(bulk.shape[1], bool)
        _, expected = estimate(decoder, (mu, var, pi), bulk, everything, "none")
        values["decoder, moments of the condition"] = merge_types(expected, plan.member)
    return {m: by_condition(v, samples, plan.conditions) for m, v in values.items()}


# ----------------------------------------------------------------------------------- measurements
# Each returns rows (donor, method, metric, type or "" for all types, value).


def measure_contrasts(model, reference, plan, cfg):
    """Everything that is measured of the states of samples, of one training.

    Raises:
        InputError: see :func:`find_test_samples`.
    """
    test = find_test_samples(model, reference, plan)
    mix_rng, null_rng = (np.random.default_rng([cfg.seed, i]) for i in range(2))
    rows, left_out = [], Counter()
    for draw in range(cfg.n_draws):
        if plan.mixing is not None:
            bulks = mix_profiles(model, reference, plan, test.truth, mix_rng)
        elif draw == 0:  # nothing of these bulks is drawn
            bulks = bulks_of_samples(model, reference, plan, test.names)
        predicted = predict_profiles(model, reference, plan, test, bulks, cfg, draw)
        rows += measure_fold_changes(plan, test, predicted, left_out)
        rows += measure_null(model, reference, plan, test, cfg, null_rng, draw)
    for method, n in (+left_out).items():
        print(
            f"{model.folder}: {method} has no expression of {n} types of donors (over "
            f"{cfg.n_draws} draws), which are left out of its metrics"
        )
    if plan.mixing is None:
        rows += measure_auroc(model, reference, plan, test, bulks, cfg)
    return rows


def find_test_samples(model, reference, plan):
    """The samples whose cells are generated, what is true of them, and which are compared.

    Raises:
        InputError: no sample, or no pair of samples, can be compared.
    """
    if plan.profiles is None:
        truth = truth_of_cells(model, reference, plan)
    else:
        truth = truth_of_profiles(model, plan)
    names = list(truth.samples.index)
    if plan.mixing is None:
        names = keep_known(held_out_samples(model, reference), names, plan)
    paired = is_paired(truth.samples, plan.conditions)
    samples = truth.samples.loc[names]
    contrasts = list_contrasts(samples, plan.conditions, paired)
    a, b = plan.conditions
    if not contrasts:
        found = [f"{name}: {condition}" for name, condition in samples["condition"].items()]
        raise InputError(
            f"{model.folder}: found no two test samples to compare ({some(found, 8)}), expected "
            f"{a} and {b} of {'one donor' if paired else 'different donors'}"
        )
    whose = "of the same donor" if paired else "of other donors, their mean"
    print(
        f"{model.folder}: {len(names)} test samples, {len(contrasts)} donors whose {b} is "
        f"compared with {a} {whose}; {len(truth.genes):,} genes, {len(plan.types)} cell types"
    )
    every = list_contrasts(truth.samples, plan.conditions, paired)
    return TestSamples(truth, names, contrasts, every)


def keep_known(held_out, known, plan):
    """The held-out samples that have a truth; the others are counted.

    Raises:
        InputError: none is left.
    """
    lost = [name for name in held_out if name not in known]
    if len(lost) == len(held_out):
        raise InputError(
            f"{plan.profiles.path}: has no profile of the held-out samples ({some(held_out)})"
        )
    if lost:
        print(f"{plan.profiles.path}: no profile of {len(lost)} held-out samples ({some(lost)})")
    return [name for name in held_out if name in known]


def predict_profiles(model, reference, plan, test, bulks, cfg, draw):
    """Every method's profiles of the test samples: dict method -> CPM (S, T, P)."""
    answers = answer_bulks(model, bulks.counts, bulks.measured, test.names)
    sums = {
        method: generate_sums(model.decoder, answer, cfg.cells_per_sample, cfg.seed + draw)
        for method, answer in answers.items()
    }
    sums[EXPECTED] = answers["bulk2sc"].expected
    sums |= baseline_sums(model, reference, plan, bulks)
    predicted = {method: merge_types(values, plan.member) for method, values in sums.items()}
    predicted |= condition_profiles(model, reference, plan, test.truth.samples.loc[test.names])
    return {method: profiles[..., test.truth.genes] for method, profiles in predicted.items()}


def measure_fold_changes(plan, test, predicted, left_out):
    """Predicted against true fold changes from A to B, of each donor.

    predicted: of :func:`predict_profiles`. left_out: Counter of the types of donors that a method
    has no expression of.
    """
    true = test.truth.profiles[test.index]  # (S, T, P)
    rows = []
    for donor, a, b in test.contrasts:
        pair = average_samples(true[a]), average_samples(true[b])
        for method, profiles in predicted.items():
            sides = average_samples(profiles[a]), average_samples(profiles[b])
            overall, by_type, n_left_out = fold_change_metrics(*pair, *sides)
            left_out[method] += n_left_out - int(np.isnan(pair).any(axis=(0, 2)).sum())
            rows += metric_rows(donor, method, plan.types, overall, by_type)
        rows += another_donor(test, pair, donor, plan.types)
    return rows


def metric_rows(donor, method, types, overall, by_type):
    """Rows of what :func:`fold_change_metrics` gives; values that are NaN have none."""
    rows = [(donor, method, metric, "", value) for metric, value in overall.items()]
    for metric, values in by_type.items():
        rows += [(donor, method, metric, *pair) for pair in zip(types, values, strict=True)]
    return [row for row in rows if not np.isnan(row[-1])]


def another_donor(test, pair, donor, types):
    """Rows of the truth of one other donor as the prediction: the mean over the other donors.

    pair: true profiles of A and B of this donor, each (T, P).
    """
    profiles, values = test.truth.profiles, {}
    for other, a, b in test.all_contrasts:
        if other != donor:
            sides = average_samples(profiles[a]), average_samples(profiles[b])
            overall, by_type, _ = fold_change_metrics(*pair, *sides)
            for row in metric_rows(donor, "another donor's profiles", types, overall, by_type):
                values.setdefault(row[:-1], []).append(row[-1])
    return [(*key, float(np.mean(value))) for key, value in values.items()]


def measure_auroc(model, reference, plan, test, bulks, cfg):
    """Random-forest AUROC of generated cells against the same sample's held-out cells, by type.

    As many cells on either side, of the reference's own types with FEWEST_CELLS in the sample.
    """
    space = CellMetrics(reference.cells, reference.held_out, reference.codes, cfg.n_trees)
    sample = group_by_sample(reference, test.names)
    answers = answer_bulks(model, bulks.counts, bulks.measured, test.names)
    rng = np.random.default_rng(cfg.seed)
    values = {}
    for s in test.compared:
        name, own = test.names[s], np.flatnonzero(sample == s)
        donor = plan.samples["donor"][name]
        for k in np.flatnonzero(np.bincount(reference.codes[own]) >= FEWEST_CELLS):
            real = own[reference.codes[own] == k]
            drawn = {
                method: cells_like(model, reference, answer, s, k, len(real), cfg.seed)
                for method, answer in answers.items()
            }
            drawn["training cells of the condition"] = draw_training_cells(
                reference, plan, name, k, len(real), rng
            )
            pcs = space.features(reference.cells.X[real]).pcs
            for method, X in drawn.items():
                if X is not None:
                    auroc = random_forest_auroc(pcs, space.features(X).pcs, cfg.seed, cfg.n_trees)
                    key = donor, method, model.cell_types[k]
                    values.setdefault(key, []).append(auroc)
    return mean_rows(values, "AUROC against the sample's own cells, PCs")


def cells_like(model, reference, answer, s, k, n, seed):
    """Counts (n x genes of the data) of generated cells of type k of bulk s."""
    X = generate_type(model.decoder, answer, s, k, n, seed)
    return align_genes(X, model.genes, reference.genes, "the decoder", report=False)[0]


def draw_training_cells(reference, plan, name, k, n, rng):
    """Counts of n training cells of type k in the condition of a sample; None if too few."""
    condition = plan.samples["condition"]
    same = group_by_sample(reference, condition.index[condition == condition[name]]) >= 0
    pool = np.flatnonzero(same & ~reference.held_out & (reference.codes == k))
    if len(pool) < FEWEST_CELLS:
        return None
    return reference.cells.X[rng.permutation(pool)[:n]]


def mean_rows(values, metric):
    """Rows of each type, and of all types: dict (donor, method, type) -> list of values."""
    rows, overall = [], {}
    for (donor, method, cell_type), several in values.items():
        rows.append((donor, method, metric, cell_type, float(np.mean(several))))
        overall.setdefault((donor, method), []).append(rows[-1][-1])
    return [(*key, metric, "", float(np.mean(v))) for key, v in overall.items()] + rows


# -------------------------------------------------------------- bulks that differ in proportions


def measure_null(model, reference, plan, test, cfg, rng, draw):
    """False changes between bulks of one sample's own types that differ in proportions alone.

    Each sample is mixed twice, by two draws of proportions and without any noise, and all bulks are
    read in one call. Generated cells are compared at as many cells of a type as half of the real
    ones.
    """
    profiles, n_cells, measured = null_profiles(model, reference, plan, test)
    counts, sample = mix_null(profiles, rng)  # (2 S, G)
    answers = answer_bulks(model, counts, measured, np.array(test.names)[sample])
    values = {}
    for s in test.compared:
        name, pair = test.names[s], np.flatnonzero(sample == s)
        shares = null_shares(model.decoder, answers, pair, n_cells[s], cfg.seed + draw)
        if plan.mixing is None:
            own = np.flatnonzero(group_by_sample(reference, [name]) == 0)
            shares["real cells, two halves"] = halves_share(model, reference, own, n_cells[s], rng)
        for method, of_types in shares.items():
            for k in np.flatnonzero((n_cells[s] > 0) & ~np.isnan(of_types)):
                key = test.truth.samples["donor"][name], method, model.cell_types[k]
                values.setdefault(key, []).append(of_types[k])
    return mean_rows(values, "false changes, same state")


def null_profiles(model, reference, plan, test):
    """What the null mixes: profiles of each sample's types, and cells to compare of each type.

    Returns:
        ``(profiles, n_cells, measured)``: (S, K or T, G), zero where a sample lacks a type;
        (S, K); and a mask (G).
    """
    truth, names, G = test.truth, test.names, len(model.genes)
    if plan.mixing is not None:
        profiles = np.zeros((len(names), len(plan.types), G))
        profiles[..., truth.genes] = np.nan_to_num(truth.profiles)
        in_types = plan.member.any(axis=1)  # (K)
        n_cells = np.tile(np.where(in_types, NULL_CELLS, 0), (len(names), 1))
        return profiles, n_cells, np.isin(np.arange(G), truth.genes)
    sums, n_cells = sum_groups(model, reference, group_by_sample(reference, names), len(names))
    n_compared = np.where(n_cells >= FEWEST_CELLS, n_cells // 2, 0)
    mean = sums / np.maximum(n_cells, 1)[:, :, None]
    return mean, n_compared, np.ones(G, bool)


def mix_null(profiles, rng):
    """Mix the profiles (S, K, G) of each sample twice, proportions from Dirichlet(1).

    Returns:
        bulks in CPM (2 S, G) and the sample of each (2 S).
    """
    there = profiles.sum(axis=2) > 0  # (S, K)
    sample = np.repeat(np.arange(len(profiles)), 2)
    counts = np.zeros((len(sample), profiles.shape[2]))
    for i, s in enumerate(sample):
        weights = rng.dirichlet(np.ones(there[s].sum()))
        counts[i] = weights @ profiles[s, there[s]]
    return counts / counts.sum(axis=1, keepdims=True) * 1e6, sample


def null_shares(decoder, answers, pair, n_cells, seed):
    """Shares of false changes (K) between two bulks: dict method -> array.

    Args:
        answers: of :func:`answer_bulks`. pair: indices of the two bulks. n_cells: cells of each
            type on either side (K). seed: of the draws.
    """
    identity = np.eye(len(n_cells))
    shares = {}
    for method, answer in answers.items():
        sides = [
            merge_types(generate_types(decoder, answer, s, n_cells, 2 * seed + i), identity)
            for i, s in enumerate(pair)
        ]
        shares[method] = false_changes(*sides)
    shares[EXPECTED] = false_changes(*merge_types(answers["bulk2sc"].expected[pair], identity))
    return shares


def generate_types(decoder, answer, s, n_cells, seed):
    """Sums (K, G) of generated cells of bulk s, n_cells of each type (K)."""
    sums = np.zeros((len(n_cells), decoder.out.out_features))
    for k in np.flatnonzero(n_cells):
        sums[k] = generate_type(decoder, answer, s, k, n_cells[k], seed).sum(axis=0)
    return sums


def halves_share(model, reference, own, n_cells, rng):
    """Shares of false changes (K) between random halves of the real cells ``own`` of a sample."""
    K = len(n_cells)
    sides = []
    order = rng.permutation(own)
    rank = pd.Series(reference.codes[order]).groupby(reference.codes[order]).cumcount().to_numpy()
    for low in (0, 1):
        n = n_cells[reference.codes[order]]  # cells of a half, of the type of each cell
        rows = order[(rank >= low * n) & (rank < (low + 1) * n)]
        sums = sum_by_type(model.counts(reference, rows), reference.codes[rows], K)
        sides.append(merge_types(sums, np.eye(K)))
    return false_changes(*sides)
