"""Does the state of a bulk reach its cells? Fold changes between conditions inside cell types.

    python benchmarks/compare_states.py --data atlas.h5ad --samples sample --donors donor \\
        --conditions condition --weights w_atlas

Cells are generated for the bulks of held-out donors, and compared with the donors' own cells or
--profiles. If the profiles are of samples that the reference does not have, their mixtures are the
bulks. Methods:

- bulk2sc: cells of the encoded bulk, calibrated as by --calibrate types; with no calibration;
  calibrated uniformly; and expected profiles in place of cells
- constant answer: cells of the types' own clouds
- one factor per gene: the training cells' profiles of types, each gene times one factor in all
  types that makes them sum to the bulk at the true proportions
- BayesPrism Z: counts allotted to cell states, which are the reference's types by condition
- training cells of the condition; decoder, states of the condition; another donor's profiles:
  what is expected without the bulk

Beside them a null, bulks of one sample's cells that differ in proportions alone; and random forests
that tell generated cells from the sample's own. Writes evaluation.csv and evaluation.png to --out.

Notation in shape comments: S samples, K cell types, T compared types, G genes of the decoder, P
genes that truth and decoder share.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.settings import EvaluationSettings, check_out
from runtime.errors import InputError
from runtime.flags import check_needs, in_groups
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "data labels samples donors conditions contrast",
        "true profiles": "profiles profile_table profile_types mixing reference_contrast",
        "model": "weights more_weights",
        "output": "out",
        "what is measured": "n_draws cells_per_sample n_trees",
    }
)
@dataclass
class Settings(EvaluationSettings):
    """Compare fold changes between conditions in generated cells with true ones.

    Example: python benchmarks/compare_states.py --data x.h5ad --samples sample --conditions group
    """

    out: Path = Path("results/states")
    """Folder of the results, evaluation.csv and evaluation.png; those of an earlier run are
    replaced."""
    donors: str | None = None
    """Donor of each cell, given as --samples is. Default: each sample is a donor of its own."""
    conditions: str | None = None
    """Condition of each cell, given as --samples is."""
    contrast: tuple[str, str] | None = None
    """The two conditions, A B: changes are from A to B. Default: the two there are."""
    profiles: Path | None = None
    """True expression of cell types in samples: a csv (.gz), genes in rows, by symbol in a column
    symbol or else the first. Default: the held-out cells' own sums."""
    profile_table: Path | None = None
    """What each column of --profiles is: a csv column,sample,donor,condition,cell_type."""
    profile_types: Path | None = None
    """Which cell types make each type of --profiles: a csv cell_type,profile_type. Default: they
    have the same names."""
    mixing: tuple[float, ...] = ()
    """Dirichlet parameters, in the order of the types in --profile-types, by which each sample's
    profiles are mixed to a bulk if the reference does not have these samples. Default: 5 each."""
    reference_contrast: tuple[str, str] | None = None
    """Conditions of the reference's cells that stand for A and B in the baselines, where those of
    --profiles have other names."""
    cells_per_sample: int = 3000
    """Cells generated for each bulk whose fold changes are measured."""
    n_trees: int = 300
    """Trees of each random forest."""

    def __post_init__(self):
        super().__post_init__()
        check_needs(self, donors="samples", conditions="samples")
        check_needs(self, contrast="conditions", reference_contrast="conditions")
        check_needs(self, profiles="profile_table", profile_table="profiles")
        check_needs(self, profile_types="profiles", mixing="profiles")
        if self.conditions is None:
            raise InputError(
                "--conditions: found none, expected the condition of each cell and its --samples"
            )


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

from collections import Counter

import numpy as np
import pandas as pd

from benchmarks.state_methods import (
    EXPECTED,
    answer_bulks,
    baseline_sums,
    condition_profiles,
    generate_sums,
    generate_type,
)
from benchmarks.state_truth import (
    MIN_CELLS,
    TestSamples,
    average_samples,
    bulks_of_samples,
    group_by_sample,
    held_out_samples,
    is_paired,
    list_contrasts,
    merge_types,
    mix_profiles,
    plan_contrasts,
    sum_groups,
    truth_of_cells,
    truth_of_profiles,
)
from data import Reference, align_genes, sum_by_type
from evaluation.cells import load_all
from evaluation.metrics import CellMetrics, false_changes, fold_change_metrics, random_forest_auroc
from evaluation.tables import format_table, summarise, write_table
from runtime.errors import some

NULL_CELLS = 100  # of a type on each side of the null, where no real cells limit them

# Measurements return rows (donor, method, metric, type or "" for all types, value).


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

    As many cells on either side, of the reference's own types with MIN_CELLS in the sample.
    """
    space = CellMetrics(reference.cells, reference.held_out, reference.codes, cfg.n_trees)
    sample = group_by_sample(reference, test.names)
    answers = answer_bulks(model, bulks.counts, bulks.measured, test.names)
    rng = np.random.default_rng(cfg.seed)
    values = {}
    for s in test.compared:
        name, own = test.names[s], np.flatnonzero(sample == s)
        donor = plan.samples["donor"][name]
        for k in np.flatnonzero(np.bincount(reference.codes[own]) >= MIN_CELLS):
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
    if len(pool) < MIN_CELLS:
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
    n_compared = np.where(n_cells >= MIN_CELLS, n_cells // 2, 0)
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


def print_contrasts(table, plan, donors):
    """Print the table of fold changes, all cell types together; methods in rows, as there are many.

    donors: names of those measured.
    """
    a, b = plan.conditions
    between = f"from {a} to {b}" if a != b else "between donors"
    over = f"{len(donors)} donors" if len(donors) > 1 else f"draws of donor {donors[0]}"
    print(f"\nfold changes {between} inside cell types (best value), mean ± std over {over}")
    print(format_table(table, transpose=True))


def main(cfg):
    check_out(cfg.out)
    reference = Reference.load(cfg)
    plan = plan_contrasts(cfg, reference.cell_types)
    rows = []
    for trained in load_all(cfg, reference, min_cells=0):
        rows += measure_contrasts(*trained, plan, cfg)
    if not rows:
        raise InputError(
            f"--conditions {cfg.conditions}: found no cell type with {MIN_CELLS} cells in "
            "held-out samples of both conditions, expected more cells, other held-out donors, or "
            "--profiles"
        )
    # Mean and std are over donors, whichever training they were held out from.
    table = pd.DataFrame(rows, columns=["weights", "method", "metric", "cell_type", "value"])
    donors = list(dict.fromkeys(table["weights"]))
    table = summarise(table, len(donors))
    print_contrasts(table[table["cell_type"] == ""], plan, donors)
    write_table(table, cfg.out)


if __name__ == "__main__":
    run_script(main, settings)
