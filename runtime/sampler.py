"""Draw negative binomial cells from the decoder's last hidden layer, straight into sparse rows.

Notation in shape comments: N cells, B cells of one block, G genes, H hidden units, K cell types,
S bulk samples.

    logit_g = h · w_g + factor_kg + extra_sg,   μ_g = library softmax(logit)_g
    x_g ~ NB(μ_g, θ_kg),   variance μ + μ² / θ

Nine genes in ten have no count, and nearly all of these are decided by one comparison. With
v_g uniform on (0, 1),

    x_g > 0   only if   v_g < 1 - p_g(0) = 1 - (1 + μ_g/θ_g)^(-θ_g) <= μ_g

so logarithms are for the genes with v_g < μ_g alone. The draws are exact; nothing is cut off or
approximated beyond rounding (float32 for μ, float64 from there on; a probability below 1e-16 is
zero).

Each number is a hash of (seed, cell, gene), so that a cell is the same whatever block or thread it
is drawn in, and whatever its neighbours are.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numba import njit

from runtime.errors import InputError

BLOCK = 512  # cells of one matrix product; fewer are slower for each cell, more take more memory
HIGH = 16.0  # mean from which a gamma and a Poisson draw cost less than climbing the distribution
FLOOR = 1e-10  # least mean, as in NegativeBinomial.mu

f32, i32, i64, u64 = np.float32, np.int32, np.int64, np.uint64

# "contract" allows fused multiply-add; "numpy" drops the test for division by zero, which would
# keep the loops from being vectorised.
# Compiled once, in ten seconds, and cached beside this file or in the user's home.
KEEP = any(os.access(folder, os.W_OK) for folder in (Path(__file__).parent, Path.home()))
LOOP = dict(nogil=True, cache=KEEP, error_model="numpy")
EXACT = dict(fastmath={"contract"}, **LOOP)
SUM = dict(fastmath={"contract", "reassoc", "nsz"}, **LOOP)  # sums in any order

# ------------------------------------------------------------------------------ random numbers

STEP = u64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: number j of a stream hashes key + j STEP


@njit(**EXACT)
def mix(z):
    """The hash of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): 64 bits -> 64 bits."""
    z = (z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> u64(27))) * u64(0x94D049BB133111EB)
    return z ^ (z >> u64(31))


@njit(**EXACT)
def key_of(seed, cell):
    """Where the stream of a cell starts."""
    return mix(mix(u64(seed) + STEP) ^ mix(u64(cell) * u64(0xD1342543DE82EF95) + u64(1)))


@njit(**EXACT)
def uniform(state):
    """Next number of a stream on (0, 1), for the few genes that need several; state: uint64 (1)."""
    state[0] += STEP
    return (float(mix(state[0]) >> u64(11)) + 0.5) * 2.0**-53


# ---------------------------------------------- exponential and logarithm, written to vectorise


@njit(**EXACT)
def exp32(x):
    """exp of a float32 of at most 0, to 1e-7 of its value; below -87 as at -87.

    exp(x) = 2^n exp(r),   n = round(x / ln 2),   |r| <= ln 2 / 2   (Cephes' polynomial)
    """
    x = max(x, f32(-87.0))
    t = x * f32(1.44269504) + f32(12582912.0)  # 1.5 · 2^23 rounds: n is in the lowest bits of t
    n = t - f32(12582912.0)
    r = x - n * f32(0.693359375)
    r = r - n * f32(-2.12194440e-4)
    y = f32(1.9875691500e-4)
    y = y * r + f32(1.3981999507e-3)
    y = y * r + f32(8.3334519073e-3)
    y = y * r + f32(4.1665795894e-2)
    y = y * r + f32(1.6666665459e-1)
    y = y * r + f32(5.0000001201e-1)
    y = y * (r * r) + r + f32(1.0)
    bits = i32(i32(f32(t).view(np.int32) << i32(23)) + i32(0x3F800000))
    return y * i32(bits).view(np.float32)


@njit(**EXACT)
def exp64(x):
    """exp of a float64 of at most 0, to 3e-16 of its value; below -700 as at -700."""
    x = max(x, -700.0)
    t = x * 1.4426950408889634 + 6755399441055744.0  # 1.5 · 2^52
    n = t - 6755399441055744.0
    r = x - n * 6.93147180369123816490e-01
    r = r - n * 1.90821492927058770002e-10
    y = 1 / 6227020800  # 1 / 13!, and so on: Taylor's series
    y = y * r + 1 / 479001600
    y = y * r + 1 / 39916800
    y = y * r + 1 / 3628800
    y = y * r + 1 / 362880
    y = y * r + 1 / 40320
    y = y * r + 1 / 5040
    y = y * r + 1 / 720
    y = y * r + 1 / 120
    y = y * r + 1 / 24
    y = y * r + 1 / 6
    y = y * r + 0.5
    y = y * (r * r) + r + 1.0
    bits = i64(f64_bits(t) << i64(52)) + i64(0x3FF0000000000000)
    return y * i64(bits).view(np.float64)


@njit(**EXACT)
def f64_bits(x):
    """The 64 bits of a float64, as an integer."""
    return np.float64(x).view(np.int64)


@njit(**EXACT)
def log1p64(x):
    """ln(1 + x) for x >= 0, to 3e-16 of its value.

    ln(u) = k ln 2 + ln(m),   u = 2^k m,   m within a factor √2 of 1   (fdlibm's polynomial)

    u = 1 + x has lost digits of x; the last term gives them back.
    """
    u = 1.0 + x
    bits = f64_bits(u)
    k = (bits - i64(0x3FE6A09E667F3BCD)) >> i64(52)
    f = i64(bits - (k << i64(52))).view(np.float64) - 1.0
    s = f / (2.0 + f)
    z = s * s
    r = 1.531383769920937332e-01 + z * 1.479819860511658591e-01
    r = 1.818357216161805012e-01 + z * r
    r = 2.222219843214978396e-01 + z * r
    r = 2.857142874366239149e-01 + z * r
    r = 3.999999999940941908e-01 + z * r
    r = z * (6.666666666666735130e-01 + z * r)
    h = 0.5 * f * f
    return k * 0.6931471805599453 - ((h - s * (h + r)) - f) + (x - (u - 1.0)) / u


# ------------------------------------------------------------------------------------ one cell


@njit(**EXACT)
def add_and_max(row, add, lanes):
    """row (G) += add (G); returns the greatest. lanes (32): room for 32 maxima side by side."""
    lanes[:] = f32(-3e38)
    whole = row.size // 32 * 32
    for i in range(0, whole, 32):
        for j in range(32):
            value = row[i + j] + add[i + j]
            row[i + j] = value
            lanes[j] = value if value > lanes[j] else lanes[j]
    greatest = f32(-3e38)
    for j in range(32):
        greatest = max(greatest, lanes[j])
    for i in range(whole, row.size):
        row[i] += add[i]
        greatest = max(greatest, row[i])
    return greatest


@njit(**SUM)
def exp_and_sum(row, shift):
    """row (n) becomes exp(row - shift); returns its sum."""
    total = f32(0.0)
    for j in range(row.size):
        value = exp32(row[j] - shift)
        row[j] = value
        total += value
    return total


@njit(**EXACT)
def mark(row, scale, key, marks):
    """Mark the genes with v < μ = scale · row; the others have no count for sure.

    The comparison is in float32 and errs on the side of marking. row (G), marks: bool (G).
    """
    scale = f32(scale * (1 + 1e-6))
    for j in range(row.size):
        bits = mix(key + u64(j) * STEP)
        marks[j] = f32(bits >> u64(24)) * f32(2.0**-40) < row[j] * scale + f32(1e-9)


@njit(**LOOP)
def collect(marks, eights, gene):
    """Write the marked positions to gene; returns how many. eights: marks, eight in a uint64.

    No branch on single marks, which a processor could not foresee.
    """
    n = 0
    for w in range(eights.size):
        if eights[w]:
            for j in range(8 * w, 8 * w + 8):
                gene[n] = j
                n += marks[j]
    return n


@njit(**EXACT)
def zero_probability(n, mean, theta, p, left, ratio):
    """p = p(0), left = u - p(0), ratio = μ / (μ + θ) of n genes; left holds u before."""
    for c in range(n):
        m, t = mean[c], theta[c]
        p[c] = exp64(-t * log1p64(m / t))
        left[c] -= p[c]
        ratio[c] = m / (m + t)


@njit(**EXACT)
def climb(n, k, theta, ratio, p, left):
    """From p(k) to p(k+1), which is taken off what is left of the uniform, of n genes.

    p(k+1) = p(k) (k + θ) / (k + 1) μ/(μ+θ);   Σ_{j>k} p(j) <= p(k+1) / (1 - μ/(μ+θ)) far out

    Where the remaining mass is below the uniform's resolution, the climb ends.
    """
    step = 1.0 / (k + 1.0)
    for c in range(n):
        p[c] *= (k + theta[c]) * step * ratio[c]
        rest = left[c] - p[c]
        left[c] = rest if p[c] > 1e-17 * (1.0 - ratio[c]) else -1.0


@njit(**LOOP)
def gamma_draw(shape, state):
    """One gamma variate of scale 1 (Marsaglia and Tsang, ACM TOMS 2000)."""
    boost = 1.0
    if shape < 1.0:  # Γ(a) = Γ(a+1) U^(1/a)
        boost = math.exp(math.log(uniform(state)) / shape)
        shape += 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        radius = math.sqrt(-2.0 * math.log(uniform(state)))  # Box and Muller
        x = radius * math.cos(2.0 * math.pi * uniform(state))
        v = (1.0 + c * x) ** 3
        if v > 0.0 and math.log(uniform(state)) < 0.5 * x * x + d - d * v + d * math.log(v):
            return boost * d * v


@njit(**LOOP)
def poisson_draw(rate, state):
    """One Poisson variate: climbing below 10, else PTRS (Hörmann, Insurance: Math. Econ. 1993)."""
    if rate < 10.0:
        p = math.exp(-rate)
        left = uniform(state) - p
        k = 0
        while left > 0.0 and k < 200:  # at 200 the remaining mass is below 1e-180
            k += 1
            p *= rate / k
            left -= p
        return float(k)
    b = 0.931 + 2.53 * math.sqrt(rate)
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2.0)
    while True:
        u = uniform(state) - 0.5
        v = uniform(state)
        us = 0.5 - abs(u)
        k = math.floor((2.0 * a / us + b) * u + rate + 0.43)
        if us >= 0.07 and v <= v_r:
            return k
        if k < 0.0 or (us < 0.013 and v > us):
            continue
        accept = math.log(v * inverse_alpha / (a / (us * us) + b))
        if accept <= k * math.log(rate) - rate - math.lgamma(k + 1.0):
            return k


@njit(**LOOP)
def scale_of(row, factor, library, lanes):
    """row (G) becomes proportional to μ; returns the scale in μ = scale · row."""
    shift = add_and_max(row, factor, lanes)
    total = 0.0  # in double precision, of float32 sums over some hundred genes
    for j in range(0, row.size, 1024):
        total += exp_and_sum(row[j : j + 1024], shift)
    return max(library, 1.0) / total


@njit(**LOOP)
def start_genes(gene, row, scale, theta, key, work):
    """Means, θ, uniforms and p(0) of the marked genes (n) of a cell, into ``work``."""
    mean, t, p, left, ratio = work
    for c in range(gene.size):
        j = u64(gene[c])
        mean[c] = max(row[j] * scale, FLOOR)
        t[c] = theta[j]
        left[c] = 1.0 - float(mix(key + j * STEP) >> u64(11)) * 2.0**-53  # u = 1 - v
    zero_probability(gene.size, mean, t, p, left, ratio)


@njit(**LOOP)
def draw_high(gene, n_genes, key, work, position, w, indices, data):
    """Draw the genes of large mean, and gather the others that have a count, which are to climb.

    Genes with a count move to the front of the arrays, those without are overwritten. position:
    place in data of each gene that climbs; w: counts written so far. Returns w and their number.
    """
    mean, t, p, left, ratio = work
    state = np.empty(1, np.uint64)
    n_climb = 0
    for c in range(gene.size):
        j = gene[c]
        indices[w] = j
        if mean[c] > HIGH:
            state[0] = mix(key + u64(n_genes + j) * STEP)
            rate = gamma_draw(t[c], state) * (mean[c] / t[c])
            data[w] = i32(min(poisson_draw(rate, state), 2147483647.0))
            w += data[w] > 0
        else:
            t[n_climb], ratio[n_climb], p[n_climb] = t[c], ratio[c], p[c]
            left[n_climb] = left[c]
            position[n_climb] = w
            has_count = i64(left[c] >= 0.0)
            w += has_count
            n_climb += has_count
    return w, n_climb


@njit(**LOOP)
def climb_all(n_climb, work, position, data):
    """Count up the genes of a cell together, so that the arithmetic vectorises."""
    _, t, p, left, ratio = work
    k = 0
    while n_climb > 0:
        climb(n_climb, float(k), t, ratio, p, left)
        k += 1
        n_next = 0
        for c in range(n_climb):
            data[position[c]] = k
            t[n_next], ratio[n_next], p[n_next] = t[c], ratio[c], p[c]
            left[n_next], position[n_next] = left[c], position[c]
            n_next += i64(left[c] >= 0.0)
        n_climb = n_next


@njit(**LOOP)
def sample_block(logits, factor, codes, extra, sample, library, theta, seed, cells):
    """Draw the cells of one block.

    Args:
        logits: h · w_g, without bias (B, G) float32; overwritten. factor: added to them, of each
            type (K, G) float32, bias and log factor together. codes: type of each cell (B).
        extra: added on top, of each sample (S, G) float32, S = 0 for none. sample (B).
        library: (B) float64. theta: (K, G) float32. seed. cells: number of each cell (B), which
            with the seed decides on its random numbers.

    Returns:
        ``(indptr, indices, data)`` of a CSR matrix (B, G): int64, int32, int32.
    """
    n_cells, n_genes = logits.shape
    lanes = np.empty(32, np.float32)
    marks = np.zeros((n_genes + 7) // 8 * 8, np.uint8)
    eights = marks.view(np.uint64)
    gene = np.empty(n_genes + 8, np.int64)
    position = np.empty(n_genes, np.int64)
    values = np.empty((5, n_genes))
    work = values[0], values[1], values[2], values[3], values[4]
    indptr = np.zeros(n_cells + 1, np.int64)
    room = max(n_genes, n_cells * n_genes // 8)
    indices, data = np.empty(room, np.int32), np.empty(room, np.int32)
    w = 0
    for i in range(n_cells):
        row = logits[i]
        if extra.shape[0] > 0:
            add_and_max(row, extra[sample[i]], lanes)
        scale = scale_of(row, factor[codes[i]], library[i], lanes)
        key = key_of(seed, cells[i])
        mark(row, scale, key, marks)
        n = collect(marks, eights, gene)
        if w + n > room:
            room = 2 * room
            indices = np.concatenate((indices, np.empty(room - indices.size, np.int32)))
            data = np.concatenate((data, np.empty(room - data.size, np.int32)))
        start_genes(gene[:n], row, scale, theta[codes[i]], key, work)
        w, n_climb = draw_high(gene[:n], n_genes, key, work, position, w, indices, data)
        climb_all(n_climb, work, position, data)
        indptr[i + 1] = w
    return indptr, indices[:w].copy(), data[:w].copy()


@njit(**SUM)
def dot(a, b):
    """Inner product of two float32 vectors (H)."""
    total = f32(0.0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@njit(**LOOP)
def drop_block(indptr, indices, data, hidden, weight, bias, seed, cells):
    """Zero inflation of a block's counts: each is kept with probability 1 - sigmoid(dropout logit).

    A zero stays zero, so the logits are needed where there are counts alone. hidden (B, H),
    weight (G, H), bias (G). Returns ``(indptr, indices, data)`` as :func:`sample_block`.
    """
    n_genes = weight.shape[0]
    left = np.zeros_like(indptr)
    w = 0
    for i in range(len(indptr) - 1):
        key = key_of(seed, cells[i])
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            logit = float(dot(hidden[i], weight[j]) + bias[j])
            v = float(mix(key + u64(2 * n_genes + j) * STEP) >> u64(11)) * 2.0**-53
            indices[w], data[w] = j, data[e]
            w += v * (1.0 + math.exp(-logit)) >= 1.0
        left[i + 1] = w
    return left, indices[:w].copy(), data[:w].copy()


# ------------------------------------------------------------------------------------ all cells


class OutputLayer(NamedTuple):
    """What the decoder's last layer does to a hidden vector. Tensors."""

    weight: torch.Tensor
    """(G, H)."""
    factor: torch.Tensor
    """Bias and log factor of each type (K, G)."""
    theta: torch.Tensor
    """(K, G)."""
    extra: torch.Tensor | None = None
    """Log factor of each bulk sample (S, G)."""
    dropout: tuple | None = None
    """Weight (G, H) and bias (G) of the dropout logits, for ``zinb``."""

    def numpy(self):
        """The same as float32 arrays, without samples (0, G) if there are none."""
        extra = self.factor.new_empty(0, len(self.weight)) if self.extra is None else self.extra
        dropout = None if self.dropout is None else [as_float32(v).numpy() for v in self.dropout]
        arrays = (as_float32(v).numpy() for v in (self.weight, self.factor, self.theta, extra))
        return OutputLayer(*arrays, dropout)


class CellInputs(NamedTuple):
    """What cells are drawn from. Tensors."""

    hidden: torch.Tensor
    """Last hidden layer (N, H)."""
    codes: torch.Tensor
    """Cell types (N)."""
    library: torch.Tensor
    """(N)."""
    sample: torch.Tensor | None = None
    """Row of ``extra`` (N)."""


def as_float32(tensor):
    """A tensor without gradient, in float32 and contiguous."""
    return tensor.detach().float().contiguous()


def sample_csr(layer, inputs, seed, n_threads=None, block=BLOCK):
    """Draw the counts of all cells, block by block in threads.

    Args:
        layer: OutputLayer. inputs: CellInputs. seed: whole number of 0 or more. n_threads: default
            as many as torch uses. block: cells of a matrix product.

    Returns:
        CSR matrix (N, G) int32, its indices sorted.

    Raises:
        InputError: logits would not be finite; weights of a training that diverged.
    """
    hidden, weight, library = as_float32(inputs.hidden), as_float32(layer.weight), inputs.library
    size = weight.abs().sum(dim=1).max() * (hidden.abs().max() if len(hidden) else 0)
    if not size + layer.factor.abs().max() < 1e30 or not library.isfinite().all():
        raise InputError("the decoder gives means that are not finite, expected trained weights")
    _, factor, theta, extra, dropout = layer.numpy()
    codes, library = inputs.codes.long().numpy(), library.double().numpy()
    sample = codes if layer.extra is None else inputs.sample.long().numpy()

    def draw(start):
        rows = slice(start, min(start + block, len(hidden)))
        cells = np.arange(rows.start, rows.stop, dtype=np.uint64)
        logits = torch.mm(hidden[rows], weight.T).numpy()  # (B, G)
        per_cell = codes[rows], extra, sample[rows], library[rows]
        counts = sample_block(logits, factor, *per_cell, theta, np.uint64(seed), cells)
        if dropout is not None:
            counts = drop_block(*counts, hidden[rows].numpy(), *dropout, np.uint64(seed), cells)
        return counts

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread computes whole blocks, not slices of one product
    try:
        with ThreadPoolExecutor(
            n_threads or before, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            blocks = list(pool.map(draw, range(0, len(hidden), block)))
    finally:
        torch.set_num_threads(before)
    return stack_csr(blocks, len(weight))


def stack_csr(blocks, n_genes):
    """Stack the ``(indptr, indices, data)`` of blocks (B x G) into one CSR matrix (N x G) int32."""
    if not blocks:
        return sp.csr_matrix((0, n_genes), dtype=np.int32)
    sizes = np.concatenate([np.diff(indptr) for indptr, _, _ in blocks])  # (N,)
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    if indptr[-1] < 2**31:  # as scipy chooses it
        indptr = indptr.astype(np.int32)
    X = sp.csr_matrix((len(sizes), n_genes), dtype=np.int32)
    X.indptr = indptr
    X.indices = np.concatenate([indices for _, indices, _ in blocks])
    X.data = np.concatenate([data for _, _, data in blocks])
    return X
