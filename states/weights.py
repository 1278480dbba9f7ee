"""States of the reference's samples: what parts of their types' clouds their cells are in.

The cloud of a cell type has parts (:mod:`distributions.latents`). A sample's state is its weights
of them: the shares of its own cells. What a treatment does is seen against the baseline samples of
the same batch, as batches differ by their platforms as well.

Notation in shape comments: n cells, S samples, K cell types, C parts of a cloud, D latent
dimensions.
"""

from dataclasses import dataclass

import numpy as np
import torch

from runtime.errors import InputError, some

# Cells that the weights of all samples of a batch and condition count for against a sample's own.
PRIOR_CELLS = 10.0
N_ITERATIONS = 50  # of EM


@dataclass
class ReferenceStates:
    """The states of the reference's samples, as scDecoder's file has them under ``states``."""

    samples: list
    """Names (S)."""
    conditions: list
    """Of each sample (S); its own name where no conditions were given."""
    batches: list
    """Of each sample (S)."""
    baseline: list
    """Conditions that count as the baseline, the first that a batch has; none were given: empty."""
    n_cells: torch.Tensor
    """Of each type (S, K) float32."""
    weight: torch.Tensor
    """Of the parts of each type's cloud (S, K, C) float32; rows sum to 1."""

    def baseline_of(self, batch=None):
        """Indices of the baseline samples: of a batch, or of the first condition of the baseline.

        Without a baseline they are all samples.
        """
        rows = [i for i, b in enumerate(self.batches) if batch in (None, b)]
        for condition in self.baseline:
            if found := [i for i in rows if self.conditions[i] == condition]:
                return found
        return rows

    @property
    def others(self):
        """Indices of the samples that are no batch's baseline; all samples if there is none."""
        if not self.baseline:
            return list(range(len(self.samples)))
        zero = {i for batch in set(self.batches) for i in self.baseline_of(batch)}
        return [i for i in range(len(self.samples)) if i not in zero]


def choose_baseline(asked, conditions, batches):
    """Conditions that count as the baseline, in order, so that every batch has one of them.

    Those asked for; else the most common one, and of batches without it their own most common one.
    Of conditions of as many samples the first by name is taken.

    Args:
        asked: names, or empty. conditions, batches: of each sample (S).

    Raises:
        InputError: a name is no condition, or a batch has none of those asked for.
    """
    known, chosen = sorted(set(conditions)), list(asked)
    if unknown := [name for name in asked if name not in known]:
        raise InputError(f"--baseline: found {some(unknown)}, expected some of {some(known, 12)}")
    if not asked:
        chosen = [max(known, key=conditions.count)]
    for batch in sorted(set(batches)):
        own = [c for c, b in zip(conditions, batches, strict=True) if b == batch]
        if set(own) & set(chosen):
            continue
        if asked:
            raise InputError(
                f"--baseline {' '.join(asked)}: batch {batch} has none of these, expected one of "
                f"its conditions ({some(sorted(set(own)), 12)}) as well"
            )
        chosen.append(max(sorted(set(own)), key=own.count))
    return chosen


def group_cells(reference):
    """Groups of cells that share parts of clouds: those of a batch and condition.

    Returns:
        code of each cell's group (N) int64, all 0 where neither is known.
    """
    obs = reference.cells.obs
    columns = [obs[name].cat.codes.to_numpy() for name in ("batch", "condition") if name in obs]
    if not columns:
        return np.zeros(len(obs), np.int64)
    return np.unique(np.stack(columns), axis=1, return_inverse=True)[1].astype(np.int64)


def fit_states(decoder, mean, reference, group, owner, baseline):
    """ReferenceStates of the training cells.

        w_skc ∝ Σ_n r_nc + α w_gkc,   r_nc ∝ w_skc N(e_n; m_kc, s_kc²)   over the sample's cells

    by EM, with the weights w_gk of all cells of the sample's batch and condition as the prior
    (Dirichlet). A sample without cells of a type has these.

    Args:
        decoder: scDecoder, whose clouds have been fitted. mean: of the posteriors of all cells
            (N, D), on the CPU. reference: Reference with samples. group: of each cell (N). owner:
            group of each part (K, C). baseline: of :func:`choose_baseline`, or empty.
    """
    rows = reference.train
    codes, sample = reference.codes[rows], reference.sample[rows]
    used = np.unique(sample)
    names = [reference.samples[s] for s in used]
    sample = np.searchsorted(used, sample)
    table = reference.cells.obs.iloc[rows].groupby("sample", observed=True).first().loc[names]
    codes, of_cell = torch.as_tensor(codes), torch.as_tensor(group[rows])
    density = log_density(decoder, decoder.standardise(mean[rows], codes), codes)  # (n, C)
    density = density.masked_fill(owner[codes] != of_cell[:, None], -torch.inf)
    likelihood = (density - density.max(dim=1, keepdim=True).values).exp()
    likelihood = likelihood.nan_to_num(0.0).numpy()  # of cells whose group has no part: unknown
    codes = codes.numpy()
    groups, member = np.unique(group[rows], return_inverse=True)
    of_sample = member[np.unique(sample, return_index=True)[1]]  # group of each sample (S)
    every = decoder.shape_weight.double().numpy()
    own = owner.numpy() == groups[:, None, None]  # parts of each group (_, K, C)
    prior = np.where(own.any(axis=2, keepdims=True), own * every, every)
    prior /= prior.sum(axis=2, keepdims=True)
    weight, n_cells = weights_of(likelihood, codes, sample, prior[of_sample], PRIOR_CELLS)
    columns = [
        list(table[name].astype(str)) if name in table else default
        for name, default in (("condition", names), ("batch", ["all"] * len(names)))
    ]
    tensors = (torch.from_numpy(v).float() for v in (n_cells, weight))
    return ReferenceStates(names, *columns, list(baseline), *tensors)


def log_density(decoder, e, codes):
    """ln N(e; m_kc, s_kc²) of cells (n, D) in each part of their type's cloud (n, C), float64.

    -inf for parts that are not in use.
    """
    mean, sd = decoder.shape_mean[codes].double(), decoder.shape_sd[codes].double()  # (n, C, D)
    density = -0.5 * (((e[:, None] - mean) / sd) ** 2 + 2 * sd.log()).sum(dim=2)
    return density.masked_fill(decoder.shape_weight[codes] == 0, -torch.inf)


def weights_of(likelihood, codes, group, prior, prior_cells):
    """Weights of the parts in groups of cells (S, K, C), and their cells (S, K); see fit_states.

    Args:
        likelihood: of each cell in each part, up to a factor (n, C). codes, group: of each cell
            (n). prior: (S, K, C), which counts for ``prior_cells`` cells.
    """
    weight = prior
    n_cells = np.zeros(prior.shape[:2])
    np.add.at(n_cells, (group, codes), 1)
    for _ in range(N_ITERATIONS):
        share = likelihood * weight[group, codes]
        share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-300)
        total = np.zeros_like(prior)
        np.add.at(total, (group, codes), share)
        weight = total + prior_cells * prior
        weight = weight / weight.sum(axis=2, keepdims=True)
    return weight, n_cells
