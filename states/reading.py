"""What state a bulk is in: which of the reference's states explain how its genes lie off.

A bulk differs from what the baseline's cells would give by its platform and by its state. What the
reference's batches differ by at their baselines is the one, how samples differ from the baseline of
their own batch is the other.

Notation in shape comments: B bulks, S samples of the reference that are no baseline, K cell types,
C parts of a cloud, G genes, H batches.
"""

from dataclasses import dataclass

import numpy as np

from runtime.progress import progress
from states.weights import ReferenceStates

FLOOR = 5e-6  # added to fractions of all counts: five counts per million
EXPRESSED = 5e-5  # fraction of all counts from which a gene is read
SPREAD = 1.0  # scale of Cauchy's distribution of log-ratios, what platforms change
MAX_LOG = 3.0  # of what batches differ by
# Priors of a share, for each gene that is read, as what platforms change is not independent between
# genes: the precision of a normal one, and the slope of an exponential one, which keeps at 0 what
# the bulk does not show.
RIDGE, SLOPE = 0.0015, 0.003
BATCH_RIDGE = 1.0
N_ITERATIONS = 20
MOST_CELLS = 50  # of a type, beyond which a sample counts no more in a mean over samples
LIMIT = float(np.log(30))  # of a factor; a NumPy scalar would make float32 wider


@dataclass
class StateReading:
    """What is read of the states of bulks."""

    samples: list
    """Of the reference, those that are no baseline (S)."""
    conditions: list
    """Of each of them."""
    share: np.ndarray
    """Of the bulk's cells, of each of these samples' states (B, S); the rest is the baseline's."""
    sd: np.ndarray
    """Of what each condition has in all, in the order of :attr:`names` (B, conditions)."""

    @property
    def names(self):
        """Conditions, each once."""
        return list(dict.fromkeys(self.conditions))

    @property
    def member(self):
        """Which condition each sample is of (S, conditions), 0 or 1."""
        rows = [[condition == name for name in self.names] for condition in self.conditions]
        return np.array(rows, float).reshape(len(self.conditions), len(self.names))

    def by_condition(self):
        """Share of each condition (B, conditions)."""
        return self.share @ self.member


class StateProfiles:
    """Expected fractions of all counts in cells of each type, at the baseline and in each state.

    Profiles of parts are decoded once; those of states are their means by weight. A state is then
    what its sample differs by from its batch's baseline, at the baseline of all:

        Q_sk = P_sk · B_k / Z_hk,   P_sk = Σ_c w_skc P_kc

    Attributes:
        states: ReferenceStates. baseline: B (K, G). batch: Z, of each batch's baseline (H, K, G).
        own: P of samples that are no baseline (S, K, G). moved: Q (S, K, G). weight: w of the
            baseline and of these samples (1 + S, K, C).
    """

    def __init__(self, states, parts):
        """Args:
        states: ReferenceStates. parts: profiles of the parts of the clouds (K, C, G), numpy.
        """
        self.states, self.parts = states, parts
        self.weights = filled_weights(states)  # of all samples (_, K, C)
        names = sorted(set(states.batches))
        zero = np.stack([self.mean_of(states.baseline_of(name)) for name in names])
        own = [[i for i in states.baseline_of() if states.batches[i] == name] for name in names]
        # Each batch weighs the same.
        base = np.mean([self.mean_of(rows) for rows in own if rows], axis=0)  # (K, C)
        self.weight = np.concatenate([base[None], self.weights[states.others]])
        self.batch = self.decode(zero)
        self.baseline, *own = self.decode(self.weight)
        self.own = np.array(own).reshape(-1, *self.baseline.shape)
        of_batch = [names.index(states.batches[i]) for i in states.others]
        change = np.log((self.baseline + FLOOR) / (self.batch[of_batch] + FLOOR))
        self.moved = normalise(self.own * np.exp(change.clip(-LIMIT, LIMIT)))

    def decode(self, weight):
        """Profiles (n, K, G) of clouds whose parts have these weights (n, K, C)."""
        return normalise(np.einsum("nkc,kcg->nkg", weight, self.parts, optimize=True))

    def mean_of(self, rows):
        """Mean weights (K, C) of some samples, by their cells of each type."""
        n = np.minimum(self.states.n_cells[rows].numpy(), MOST_CELLS)[:, :, None] + 1e-3
        return (n * self.weights[rows]).sum(axis=0) / n.sum(axis=0)

    def read(self, bulk, measured, weight):
        """StateReading of bulks, one by one, by :func:`read_shares`.

        Args:
            bulk: (B, G), any scale; its sum counts as its depth, at least 1e5. measured: mask (G).
                weight: counts that each type gives to the bulk (B, K), on any scale.
        """
        states, rows = self.states, self.states.others
        named = ([names[i] for i in rows] for names in (states.samples, states.conditions))
        reading = StateReading(*named, np.zeros((len(bulk), len(rows))), None)
        reading.sd = np.zeros((len(bulk), len(reading.names)))
        for i in progress(range(len(bulk) if rows else 0), "states", "sample"):
            given = bulk[i, measured].astype(np.float64)
            expected = (
                normalise(np.tensordot(weight[i], part[..., measured], (0, part.ndim - 2)))
                for part in (self.baseline, self.moved, self.batch)
            )
            reading.share[i], covariance = read_shares(given, *expected)
            variance = np.einsum("sc,st,tc->c", reading.member, covariance, reading.member)
            reading.sd[i] = np.sqrt(variance)
        return reading

    def mix(self, share):
        """Weights of the parts of clouds in bulks (B, K, C), float32; share: (B, S)."""
        every = np.concatenate([1 - share.sum(axis=1, keepdims=True), share], axis=1)
        mixed = np.einsum("bs,skc->bkc", every.clip(0), self.weight)
        return mixed.astype(np.float32)

    def profiles(self, share, of_states):
        """Profiles of bulks (B, K, G) float32: the baseline's, and own or moved ones of states.

        share: (B, S). of_states: :attr:`moved` or :attr:`own` (S, K, G).
        """
        rest = (1 - share.sum(axis=1)).clip(0)[:, None, None] * self.baseline
        return (rest + np.tensordot(share, of_states, (1, 0))).astype(np.float32)


def filled_weights(states):
    """Weights of all samples (S, K, C); of a type that a batch and condition lacks, the baseline's.

    The cloud of a type is that of all samples, so its own weights would hold every condition.
    """
    weight, n = states.weight.double().numpy(), states.n_cells.numpy()
    weight = weight.copy()
    groups = [(b, c) for b, c in zip(states.batches, states.conditions, strict=True)]
    for i, group in enumerate(groups):
        own = [j for j, other in enumerate(groups) if other == group]
        lacking = n[own].sum(axis=0) == 0  # (K)
        for rows in (states.baseline_of(group[0]), states.baseline_of()):
            there = lacking & (n[rows].sum(axis=0) > 0)
            mean = (n[rows][:, :, None] * states.weight[rows].double().numpy()).sum(axis=0)
            weight[i, there] = (mean / mean.sum(axis=1, keepdims=True).clip(1e-300))[there]
            lacking = lacking & ~there
    return weight


def read_shares(bulk, baseline, moved, batch):
    """Shares of states in one bulk, by their effect on each gene and robust to the platform's.

        ln p_g = ln( b_g + Σ_s ω_s (q_sg - b_g) ) + Σ_h γ_h ln(z_hg / b_g) + e_g

    with ω ≥ 0, Σ_s ω_s ≤ 1, e of Cauchy's distribution, an exponential prior on ω and normal ones
    on ω and γ: Gauss and Newton's method, with non-negative least squares (Lawson and Hanson,
    1974) at each step.

    Args:
        bulk: counts or their like (G). baseline: b (G), moved: q (S, G), batch: z (H, G), what the
            bulk's types add up to, as fractions.

    Returns:
        ω (S), and its covariance (S, S).
    """
    from scipy.optimize import nnls

    read = np.maximum(baseline, moved.max(axis=0)) > EXPRESSED
    if not read.any():
        return np.zeros(len(moved)), np.eye(len(moved))
    depth = max(bulk.sum(), 1e5)
    p = bulk[read] / max(bulk.sum(), 1e-300) + FLOOR
    b, q, z = (part[..., read] + FLOOR for part in (baseline, moved, batch))
    S, H = len(q), len(z)
    platform = np.log(z / b).clip(-MAX_LOG, MAX_LOG)  # (H, G)
    change, x = q - b, np.zeros(S + H)  # (S, G), ω and γ
    n_read = read.sum()
    prior = np.diag(np.r_[np.full(S, RIDGE * n_read), np.full(H, BATCH_RIDGE)])
    slope = np.r_[np.full(S, SLOPE * n_read), np.zeros(H)]
    for _ in range(N_ITERATIONS):
        mixed = b + x[:S] @ change
        expected = np.log(mixed) + x[S:] @ platform
        off = np.log(p) - expected
        off = off - np.average(off, weights=1 / (1 + off**2))
        variance = SPREAD**2 + 1 / (np.exp(expected) * depth)
        weight = 1 / (variance + off**2)  # Cauchy's, over the variance
        J = np.concatenate([change / mixed, platform])  # (S + H, G)
        A = (J * weight) @ J.T + prior
        y = (J * weight) @ (off + x @ J) - slope
        # γ has no bounds, so it is eliminated.
        solved = np.linalg.solve(A[S:, S:], np.c_[A[S:, :S], y[S:]])
        M, v = A[:S, :S] - A[:S, S:] @ solved[:, :S], y[:S] - A[:S, S:] @ solved[:, -1]
        L = np.linalg.cholesky(M)
        new = nnls(L.T, np.linalg.solve(L, v))[0]
        new = new / max(new.sum(), 1)
        target = np.r_[new, solved[:, -1] - solved[:, :S] @ new]
        x = (x + target) / 2
    return x[:S], np.linalg.inv(M)


def normalise(profiles):
    """Profiles (..., G) over their sums, all 0 if that is 0."""
    return profiles / np.maximum(profiles.sum(axis=-1, keepdims=True), 1e-12)


def states_of(metadata):
    """ReferenceStates of scDecoder's file; None where the reference was of one sample."""
    saved = metadata.get("states")
    return None if saved is None else ReferenceStates(**saved)
