"""Cells and expression of bulk samples by bulk2sc, and by what it is compared with.

Notation in shape comments: S samples, K cell types, T compared types, C conditions, G genes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from benchmarks.estimators.bayesprism import bayesprism_fixed_point, positive_shares
from benchmarks.state_truth import merge_types, sum_groups, training_shares
from counts.genes import PROTOCOL_GENES
from data import mean_counts
from deconvolution.samples import BulkSamples, add_to_sums
from generation import generate_cells
from readers.bulk import Bulk
from readers.labels import natural_order

# Methods whose cells are generated: bulk2sc.py's --calibrate, and whether states are the bulk's.
GENERATED = {
    "bulk2sc": ("types", True),
    "bulk2sc, no calibration": ("none", True),
    "calibrated uniformly": ("uniform", True),
    "constant answer": ("none", False),
}
EXPECTED = "bulk2sc, expected profiles"


@dataclass
class Answer:
    """What a method generates cells of bulks from."""

    encoded: list[torch.Tensor]
    """As :func:`generation.generate_cells` takes it: mu, var (S, K, D), pi (S, K) and more."""
    log_factor: torch.Tensor | None
    """(S, K, G) or (S, G), as :func:`generation.generate_cells` takes it."""
    expected: np.ndarray | None
    """Counts that each type is expected to give to a bulk (S, K, G); None without a state."""


def answer_bulks(model, counts, measured, names):
    """The Answer of each method of GENERATED to bulks.

    Args:
        counts: (S, G). measured: mask (G). names: of the bulks (S).

    Returns:
        dict: method -> Answer.
    """
    decoder, K = model.decoder, len(model.cell_types)
    samples = BulkSamples(Bulk(counts, measured, names, str(model.folder)), model)
    shape = len(counts), K, decoder.mu.shape[1]
    constant = [decoder.mu.expand(shape), decoder.var.expand(shape), samples.encoded[2]]
    weight = samples.mixing.cpu().numpy()[:, :, None]  # (S, K, 1)
    answers = {}
    for method, (calibrate, own_state) in GENERATED.items():
        if not own_state:
            answers[method] = Answer(constant, None, None)
            continue
        samples.estimate_expression(calibrate, "keep")
        found = samples.expression
        expected = weight * found.library[:, None] * found.profiles
        answers[method] = Answer(samples.encoded, found.log_factor, expected)
    return answers


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
    encoded = [part[s : s + 1] for part in answer.encoded]
    encoded[2] = torch.zeros_like(encoded[2])
    encoded[2][0, k] = 1
    generator = torch.Generator(decoder.mu.device).manual_seed(seed)
    log_factor = None if answer.log_factor is None else answer.log_factor[s : s + 1]
    chunks = generate_cells(decoder, encoded, n, generator, log_factor)
    return sp.vstack([cells.counts for cells in chunks], format="csr")


# -------------------------------------------------------------------------------------- baselines


def condition_sums(model, reference, plan, conditions):
    """Sums of the training cells by condition and type (C, K, G)."""
    sample, names = reference.sample, reference.samples
    condition = pd.Index(conditions).get_indexer(plan.samples["condition"].loc[names])[sample]
    group = np.where(reference.held_out, -1, condition)
    return sum_groups(model, reference, group, len(conditions))[0]


def condition_states(model, plan):
    """Profiles of the states of A and of B, mean over the training samples (2, K, G), or None."""
    if model.states is None:
        return None
    condition = plan.samples["condition"].reindex(model.states.states.samples).to_numpy()
    rows = [np.flatnonzero(condition == name) for name in plan.reference_conditions]
    if not all(map(len, rows)):
        return None
    return model.states.decode(np.stack([model.states.mean_of(own) for own in rows]))


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
    profiles = condition_states(model, plan)
    if profiles is not None:
        weighted = sums.sum(axis=2, keepdims=True) * profiles
        values["decoder, states of the condition"] = merge_types(weighted, plan.member)
    return {m: by_condition(v, samples, plan.conditions) for m, v in values.items()}


def bayesprism_expression(bulk, states, type_of, in_theta, n_iterations=100):
    """Counts of each cell type in each bulk: the Z of BayesPrism (Chu et al., Nature Cancer 2022).

        Z_smg = x_sg θ_sm φ_mg / Σ_m' θ_sm' φ_m'g

    over cell states m, then summed to cell types; θ of
    :func:`bayesprism_fixed_point`.

    Args:
        bulk: counts or CPM (S, G). states: summed counts of the training cells of each state
            (M, G); states without counts are left out. type_of: cell type of each state (M).
        in_theta: mask of the genes that θ is estimated from (G). n_iterations: of θ.

    Returns:
        (S, K, G) float64, K one more than the last of the types; rows of zeros for a type without
        a state.
    """
    n_types = type_of.max() + 1
    used = states.sum(axis=1) > 0
    states, type_of = states[used], type_of[used]
    phi = positive_shares(states)  # (M, G)
    share = phi[:, in_theta].sum(axis=1, keepdims=True)  # (M, 1) of a state's counts in these genes
    theta = bayesprism_fixed_point(bulk[:, in_theta], phi[:, in_theta] / share, n_iterations)
    theta = theta / share.T  # of the counts of all genes, up to a factor that ratio takes back
    ratio = bulk / np.maximum(theta @ phi, 1e-300)  # (S, G)
    Z = np.zeros((len(bulk), n_types, bulk.shape[1]))
    for k in np.unique(type_of):
        Z[:, k] = ratio * (theta[:, type_of == k] @ phi[type_of == k])
    return Z


def one_factor_expression(bulk, measured, shares, profiles):
    """Counts of each cell type in each bulk if every gene changes by one factor in all types.

        x_skg = r_sk p_kg f_sg,   f_sg = b_sg / Σ_k r_sk p_kg

    with the true shares r of the types in the counts, which no method can have for a bulk. One
    count per million is added to p, as a gene that the reference lacks has no factor otherwise.

    Args:
        bulk: b (S, G). measured: mask (G); other genes get 0. shares: r (S, K), positive, rows
            summing to 1. profiles: fractions p of the counts of each type (K, G).

    Returns:
        (S, K, G) float64.
    """
    profiles = profiles + 1e-6
    factor = np.where(measured, bulk, 0.0) / (shares @ profiles)  # (S, G)
    return shares[:, :, None] * profiles * factor[:, None]
