"""The three networks.

Notation in shape comments: B batch, G genes, K cell types, D latent dimensions, S bulk samples.

- ``scGMVAE`` (stage 1): a cell's counts -> q(z|x), a Gaussian mixture over z whose component k is
  cell type k, and a decoder back to counts. The role autoCell plays in the paper (Xu et al., Cell
  Reports Methods 2023).
- ``scDecoder`` (stage 2; genVAE in the paper): z -> counts of every gene.
- ``BulkEncoder`` (stage 3): bulk profile -> mean and variance of every cell type, and proportions.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import DEPTH, library_size
from deconvolution import itakura_saito
from deconvolution.platforms import common_ratio, robust_sd
from distributions import latents, library_sizes
from distributions.fits import fit_log_factor, fit_log_theta, moments_of_counts, shrink_means
from distributions.negative_binomial import COMPILED, NegativeBinomial, ZeroInflatedNegativeBinomial
from distributions.regression import Regression
from runtime.device import in_batches, to_csr, to_sparse

# The published likelihood is mse_l1.
LIKELIHOODS = {"nb": NegativeBinomial, "zinb": ZeroInflatedNegativeBinomial, "mse_l1": Regression}
MIN_COHORT = 5  # bulks; what fewer have in common is as likely their own


@torch.no_grad()
def encode_cells(gmvae, X, rows=None, batch_size=512):
    """Posteriors of cells in eval mode, in batches: mean and variance, each (N, D), where gmvae is.

    gmvae: scGMVAE. X: counts (cells x G), CSR, in its genes. rows: the cells (N); all if None.
    """
    device, gmvae = gmvae.mu.device, gmvae.eval()
    rows = np.arange(X.shape[0]) if rows is None else rows
    return in_batches(lambda batch: gmvae.encode(to_sparse(X, batch, device)), rows, batch_size)


class Dropout(nn.Dropout):
    """``nn.Dropout`` whose mask does not depend on the number of processes.

    Each process draws the mask of the whole batch and applies its part. ``training.TrainingRun``
    sets :attr:`part` when there are several processes.

    Attributes:
        part: size of the whole batch and the slice of it that this process computes, or None.
    """

    part = None

    def forward(self, x):
        """x: (B', H), this process's part of the batch (B, H)."""
        if self.part is None or not self.training:
            return super().forward(x)
        n, part = self.part
        return x * F.dropout(x.new_ones(n, *x.shape[1:]), self.p)[part]


def hidden_layers(sizes, dropout):
    """Linear -> LayerNorm -> ReLU -> Dropout for each step of ``sizes``."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        # LayerNorm, not BatchNorm: a generated cell must not depend on the cells beside it.
        layers += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU(), Dropout(dropout)]
    return nn.Sequential(*layers)


def plain_layers(sizes):
    """Linear -> ReLU for each step of ``sizes``, as published."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers)


class CountDecoder(nn.Module):
    """z (B, D) and library size (B) -> the distribution of counts (B, G).

    The published regression is a plain ReLU network; the others have a normalised one, and one
    dispersion per gene.

    Args:
        n_latent: D. n_hidden: widths of the hidden layers. n_genes: G. likelihood: a name of
            LIKELIHOODS. dropout: in the hidden layers.

    Raises:
        ValueError: another likelihood.
    """

    def __init__(self, n_latent, n_hidden, n_genes, likelihood="nb", dropout=0.0):
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood {likelihood}")
        super().__init__()
        self.likelihood, self.family = likelihood, LIKELIHOODS[likelihood]
        has_theta, has_dropout = self.family.has_theta, self.family.has_dropout
        sizes = [n_latent, *n_hidden]
        self.hidden = hidden_layers(sizes, dropout) if has_theta else plain_layers(sizes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes)) if has_theta else None
        self.out = nn.Linear(sizes[-1], n_genes)
        self.dropout_logits = nn.Linear(sizes[-1], n_genes) if has_dropout else None

    @torch.no_grad()
    def start_at(self, profile, theta=1.0):
        """Initialise the decoder to give the mean profile (G, positive, sums to 1) for any z.

        From uniform expression, most steps would be spent on finding the mean. theta: the initial
        dispersion of every gene.
        """
        if self.family.has_theta:
            self.out.weight.mul_(0.1)
            self.out.bias.copy_(profile.log())
            self.log_theta.fill_(math.log(theta))

    @property
    def theta(self):
        """Dispersion of each gene (G), positive; variance = mean + mean² / theta."""
        return self.log_theta.exp()

    def distribution(self, z, library, log_factor=None, log_theta=None):
        """The distribution of the counts of cells, an object of a class of LIKELIHOODS.

        Args:
            z: (B, D). library: (B). log_factor: (B, G), added to the logarithm of each gene's mean,
                before the genes of a cell are scaled to its library size. log_theta: (B, G), of
                dispersions to use instead of the decoder's.
        """
        h = self.hidden(z)  # (B, H)
        dropout_logits = self.dropout_logits(h) if self.dropout_logits is not None else None
        log_theta = self.log_theta if log_theta is None else log_theta
        return self.family(self.out(h), library, log_theta, dropout_logits, log_factor)

    def forward(self, z, library, log_factor=None):
        """Parameters of :meth:`distribution`: μ (B, G), and dropout logits (B, G) or None."""
        counts = self.distribution(z, library, log_factor)
        return counts.mu, counts.dropout_logits

    def loss(self, x, z, library):
        """Reconstruction loss of each cell (B), summed over genes.

        x: counts (B, G), dense or sparse COO. z: (B, D). library: (B).
        """
        return self.distribution(z, library).loss(x)

    def sample(self, z, library, generator=None, log_factor=None):
        """Draw whole-number counts (B, G); log_factor: see :meth:`distribution`."""
        return self.distribution(z, library, log_factor).sample(generator)


def normal_kl(mean, var, prior_mean, prior_var):
    """KL(N(mean, var) || N(prior_mean, prior_var)) of diagonal normals, summed over D, the last."""
    ratio = var / prior_var
    return 0.5 * (ratio - ratio.log() + (mean - prior_mean) ** 2 / prior_var - 1).sum(dim=-1)


class scGMVAE(nn.Module):
    """Variational autoencoder whose prior is a Gaussian mixture with one component per cell type.

        q(z|x) = N(mean(x), diag var(x)),   p(z|k) = N(μ_k, diag σ_k²),   x ~ NB or ZINB(decoder(z))

    Args:
        n_genes: G. n_types: K. n_latent: D; K and D are independent.
        n_hidden: width of both hidden layers on either side (autoCell: 128-128).
        likelihood: ``nb`` or ``zinb``.
        dropout: in the hidden layers of encoder and decoder.
    """

    def __init__(self, n_genes, n_types, n_latent, n_hidden, likelihood, dropout):
        super().__init__()
        sizes = dict(n_genes=n_genes, n_types=n_types, n_latent=n_latent, n_hidden=n_hidden)
        self.config = sizes | dict(likelihood=likelihood, dropout=dropout)
        self.encoder = hidden_layers([n_genes, n_hidden, n_hidden], dropout)
        self.encode_mean = nn.Linear(n_hidden, n_latent)
        self.encode_var = nn.Linear(n_hidden, n_latent)
        self.decoder = CountDecoder(n_latent, [n_hidden] * 2, n_genes, likelihood, dropout)
        self.mu = nn.Parameter(torch.zeros(n_types, n_latent))
        self.log_var = nn.Parameter(torch.zeros(n_types, n_latent))

    @property
    def var(self):
        """σ_k² (K, D), positive by construction."""
        return self.log_var.exp()

    def encode(self, x):
        """q(z|x) of counts (B, G), dense or sparse: mean and variance, each (B, D)."""
        x = x.to_dense()
        library = x.sum(dim=1, keepdim=True).clamp(min=1.0)
        h = self.encoder(torch.log1p(x / library * DEPTH))  # (B, H)
        # Softplus grows linearly, so that an outlier cannot blow the variance up as exp would.
        return self.encode_mean(h), F.softplus(self.encode_var(h)) + 1e-4

    def kl(self, mean, var, codes=None):
        """KL(q(z|x) || prior) of each cell (B).

            KL = ½ Σ_d [ ln(σ²_kd / v_d) + (v_d + (m_d - μ_kd)²) / σ²_kd - 1 ]

        with k the type of the cell; without codes the prior is the standard normal.
        """
        if codes is None:
            return normal_kl(mean, var, torch.zeros_like(mean), torch.ones_like(var))
        return normal_kl(mean, var, self.mu[codes], self.var[codes])

    def mixture_kl(self, mean, var, log_weight):
        """KL of each cell (B) to the whole mixture, and responsibilities q(k|x) (B, K).

            KL = -ln Σ_k π_k exp(-KL_k),   q(k|x) = π_k exp(-KL_k) / Σ_j π_j exp(-KL_j)

        which is Σ_k q(k|x) KL_k + KL(q(k|x) || π) at its best q(k|x), as in VaDE (Jiang et al.,
        IJCAI 2017) and autoCell; KL_k is that to component k. For cells whose type is not known.

        Args:
            mean, var: (B, D). log_weight: ln π_k (K); -inf for components that are not in use.
        """
        each = normal_kl(mean[:, None], var[:, None], self.mu, self.var)  # (B, K)
        joint = log_weight - each
        return -joint.logsumexp(dim=1), joint.softmax(dim=1)

    def keep_types(self, kept):
        """Drop all components but these, in this order. kept: indices (K' of K)."""
        self.mu = nn.Parameter(self.mu.detach()[kept].clone())
        self.log_var = nn.Parameter(self.log_var.detach()[kept].clone())
        self.config["n_types"] = len(kept)

    @torch.no_grad()
    def fit_mixture(self, mean, var, codes):
        """Set μ_k, σ_k² to the moments of the cells' posteriors: the closed-form best prior.

            μ_k = E[m],   σ_k² = E[v] + Var[m]   over the cells of type k

        A type without cells keeps what it has. mean, var (N, D); codes (N).
        """
        for k in codes.unique():
            m, v = mean[codes == k], var[codes == k]
            self.mu[k] = m.mean(dim=0)
            self.log_var[k] = (v.mean(dim=0) + m.var(dim=0, unbiased=False)).log()


class scDecoder(CountDecoder):
    """Stage 2: z -> counts of all genes, with the distributions that new cells are drawn from.

    Published shape: D -> h/2 -> h -> G. Beside the network it keeps for each cell type its Gaussian
    μ_k, σ_k²; the shape of its cells' distribution within that Gaussian (:meth:`fit_shape`); and
    its library sizes, as quantiles of their logarithm (:meth:`fit_library`).
    """

    def __init__(
        self,
        n_latent,
        n_hidden,
        n_genes,
        n_types,
        likelihood,
        dropout,
        n_components=1,
        n_quantiles=64,
    ):
        super().__init__(n_latent, [n_hidden // 2, n_hidden], n_genes, likelihood, dropout)
        sizes = dict(n_latent=n_latent, n_hidden=n_hidden, n_genes=n_genes, n_types=n_types)
        self.config = sizes | dict(likelihood=likelihood, dropout=dropout)
        self.config |= dict(n_components=n_components, n_quantiles=n_quantiles)
        self.register_buffer("mu", torch.zeros(n_types, n_latent))
        self.register_buffer("var", torch.ones(n_types, n_latent))
        # Until a shape is fitted, all components are the standard normal.
        shape = (n_types, n_components, n_latent)
        self.register_buffer("shape_weight", torch.full(shape[:2], 1 / n_components))  # (K, C)
        self.register_buffer("shape_mean", torch.zeros(shape))  # (K, C, D)
        self.register_buffer("shape_sd", torch.ones(shape))  # (K, C, D)
        self.register_buffer("log_library", torch.zeros(n_types, n_quantiles))
        # Until they are fitted (:meth:`fit_types`), the network and its dispersions decide.
        self.register_buffer("type_log_factor", torch.zeros(n_types, n_genes))
        self.register_buffer("type_log_theta", torch.zeros(n_types, n_genes))
        self.register_buffer("type_fitted", torch.zeros(n_types))

    @torch.no_grad()
    def fit_shape(self, mean, var, codes, seed, group=None):
        """Fit the shape of each type's cloud (:mod:`distributions.latents`) to its cells.

        Args:
            mean, var: posteriors q(z|x) of the cells (N, D). codes (N). seed: of EM's start.
                group: of batch and condition, of each cell (N); default all of one.

        Returns:
            group of each part (K, C), -1 for parts that are not in use.
        """
        group = torch.zeros_like(codes) if group is None else group
        e, spread = self.standardise(mean, codes), var / self.var.cpu()[codes]  # (N, D)
        n_parts = latents.parts_of_group(self.config["n_components"], len(group.unique()))
        shapes = list(latents.fit_shapes(e, spread, codes, n_parts, seed, group))
        self.make_room(max([len(shape[0]) for _, shape in shapes], default=1))
        owner = torch.full_like(self.shape_weight, -1, dtype=torch.long)
        for k, shape in shapes:
            self.shape_weight[k] = 0.0
            buffers = self.shape_weight, self.shape_mean, self.shape_sd, owner
            for buffer, part in zip(buffers, shape, strict=True):
                buffer[k, : len(part)] = part
        return owner

    def make_room(self, n):
        """Have n parts in every cloud at least; new ones are not in use."""
        more = n - self.config["n_components"]
        if more > 0:
            self.config["n_components"] = n
            K, _, D = self.shape_mean.shape
            weight = self.shape_weight.sum(dim=1, keepdim=True) / n
            self.shape_weight = weight.expand(K, n).clone()
            self.shape_mean = torch.zeros(K, n, D)
            self.shape_sd = torch.ones(K, n, D)

    def standardise(self, mean, codes):
        """Latents (N, D) of cells of types ``codes`` (N) in standard deviations from their type's.

        On the CPU.
        """
        return (mean - self.mu.cpu()[codes]) / self.var.cpu()[codes].sqrt()

    def moments_of_weights(self, weight):
        """Mean and variance of z of clouds whose parts have other weights.

            μ = μ_k + σ_k Σ_c w_c m_kc,   σ² = σ_k² (Σ_c w_c (s_kc² + m_kc²) - (Σ_c w_c m_kc)²)

        weight: (S, K, C). Returns (S, K, D) each.
        """
        center = torch.einsum("skc,kcd->skd", weight, self.shape_mean)
        square = torch.einsum("skc,kcd->skd", weight, self.shape_mean**2 + self.shape_sd**2)
        return self.mu + self.var.sqrt() * center, self.var * (square - center**2).clamp(min=1e-6)

    def sample_latent(self, mu, var, codes, generator=None, weight=None, sample=None):
        """Draw z (B, D) with mean mu and variance var, in the shape of each cell's type.

        mu, var (B, D); codes (B). weight: of the parts of each type's cloud in samples (S, K, C),
        with sample: the row of it for each cell (B); mu and var are then of no effect, as they are
        the moments of these clouds.
        """
        parts = self.shape_weight[codes] if weight is None else weight[sample, codes]  # (B, C)
        c = torch.multinomial(parts, 1, generator=generator).squeeze(1)  # (B)
        e = torch.randn(mu.shape, generator=generator, device=mu.device)  # (B, D)
        e = self.shape_mean[codes, c] + self.shape_sd[codes, c] * e
        if weight is not None:
            mu, var = self.mu[codes], self.var[codes]
        return mu + var.sqrt() * e

    @torch.no_grad()
    def fit_library(self, library, codes):
        """Keep the quantiles of log library size of each type; library (N) > 0, codes (N).

        A type without cells gets the quantiles of all cells.
        """
        fitted = library_sizes.fit_quantiles(library, codes, *self.log_library.shape)
        self.log_library.copy_(fitted)

    def sample_library(self, codes, generator=None):
        """Draw a library size (B) for cells of types ``codes`` (B)."""
        return library_sizes.sample_quantiles(self.log_library, codes, generator)

    @torch.no_grad()
    def fit_types(self, X, codes, n=1000, seed=0, shrink=False):
        """Match the mean and dispersion of each gene in each type to its cells, given new z.

        By factors f_kg and dispersions θ_kg of :mod:`distributions.fits`, as one dispersion for all
        types makes the markers of a type too noisy in it: it must also allow for the occasional
        cell of another type that expresses them. Only for ``nb``.

        Args:
            X: counts of the training cells (N x G), CSR or backed. codes: their types (N), a
                tensor.
            n: draws of z for each type. seed: of the draws, and of the cells that stand for large
                types (:func:`moments_of_counts`). shrink: the means of genes in types first
                (:func:`shrink_means`).

        Returns:
            number of spikes.
        """
        if self.family.has_dropout or not self.family.has_theta:
            return 0
        generator = torch.Generator(self.mu.device).manual_seed(seed)
        codes, library = codes.cpu().numpy(), library_size(X).astype(np.float64)
        *sums, n_spikes = moments_of_counts(X, codes, library, len(self.mu), seed)
        totals, moments = (torch.from_numpy(part).to(self.mu.device) for part in sums)  # (K, G)
        shrunk = shrink_means(totals) if shrink else totals
        for k in np.unique(codes):
            size = library[codes == k].sum()
            z = self.draw_latent_of_type(k, n, generator)
            fraction, _ = self.moments_of_fractions(z)
            self.type_log_factor[k] = fit_log_factor(shrunk[k], size * fraction).float()
            _, square = self.moments_of_fractions(z, self.type_log_factor[k])
            ratio = moments[k] / square
            self.type_log_theta[k] = fit_log_theta(ratio, totals[k], self.theta.double()).float()
            self.type_fitted[k] = 1.0
        return n_spikes

    def moments_of_fractions(self, z, log_factor=None):
        """Means of p and p² over z (n, D), p the expected fractions of a cell's counts: (G) each.

        float64; in parts of z, as all (n, G) do not fit into a cache.
        """
        total = torch.zeros(2, self.config["n_genes"], dtype=torch.float64, device=z.device)
        for part in z.split(64):
            p, _ = self(part, torch.ones(len(part), device=z.device), log_factor)  # (b, G)
            total += torch.stack([p.sum(dim=0), p.square().sum(dim=0)])
        return total / len(z)

    def draw_latent_of_type(self, k, n, generator=None):
        """z (n, D) of n cells of type k."""
        codes = torch.full((n,), k, device=self.mu.device)
        return self.sample_latent(self.mu[codes], self.var[codes], codes, generator)

    def type_theta(self):
        """Dispersions of the genes in each type (K, G), by :meth:`fit_types` where it has run."""
        return self.log_theta_of_types().exp()

    def log_theta_of_types(self):
        """Logarithm of :meth:`type_theta` (K, G)."""
        fitted = self.type_fitted[:, None] > 0  # types without cells are not
        return torch.where(fitted, self.type_log_theta, self.log_theta)

    def sample_cells(self, z, library, codes, generator=None, log_factor=None):
        """Draw whole-number counts (B, G) of cells of types ``codes`` (B).

        As :meth:`sample`, with the means and dispersions of each type (:meth:`fit_types`);
        log_factor (B, G) is added to the former.
        """
        total_factor = self.type_log_factor[codes]  # (B, G)
        total_factor = total_factor if log_factor is None else total_factor + log_factor
        log_theta = self.log_theta_of_types()[codes] if self.family.has_theta else None  # (B, G)
        return self.distribution(z, library, total_factor, log_theta).sample(generator)

    def sample_rows(self, z, library, codes, generator, log_factor=None, sample=None):
        """As :meth:`sample_cells`, as a CSR matrix (B, G) of int32.

        On CPU :mod:`runtime.sampler` needs no dense (B, G) of counts. log_factor: (S, G), with
        sample: the row of it for each cell (B).

        Raises:
            InputError: a count would not be finite or would be over 2^31 - 1.
        """
        if self.mu.is_cuda or self.family not in COMPILED:
            factor = None if log_factor is None else log_factor[sample]
            return to_csr(self.sample_cells(z, library, codes, generator, factor))
        from runtime.sampler import CellInputs, OutputLayer, sample_csr  # compiles when needed

        seed = int(torch.randint(2**62, (1,), generator=generator))
        dropout = None
        if self.family.has_dropout:
            dropout = self.dropout_logits.weight, self.dropout_logits.bias
        factor = self.out.bias + self.type_log_factor
        layer = OutputLayer(self.out.weight, factor, self.type_theta(), log_factor, dropout)
        return sample_csr(layer, CellInputs(self.hidden(z), codes, library, sample), seed)

    @torch.no_grad()
    def type_means(self, n=500, seed=0):
        """Expected counts of a cell of each type (K, G): means over n draws of z and library."""
        generator = torch.Generator(self.mu.device).manual_seed(seed)
        means = []
        for k in range(len(self.mu)):
            z = self.draw_latent_of_type(k, n, generator)
            library = self.sample_library(torch.full((n,), k, device=z.device), generator)
            counts = self.distribution(z, library, self.type_log_factor[k])  # (n, G)
            means.append(counts.mean.mean(dim=0))
        return torch.stack(means)


class BulkEncoder(nn.Module):
    """Stage 3: bulk profile (S, G) -> μ̂_k, σ̂_k² (S, K, D) and proportions π̂ (S, K).

    Published shape: G -> hidden -> three heads, on a bulk that is depth-normalised and standardised
    gene by gene, so that its scale does not matter. A bulk is a sum of cells, so non-negative
    deconvolution with the cell types' mean counts (:meth:`deconvolve`) gives initial proportions,
    and the mixture initial moments. The network learns corrections:

        π̂ = softmax( ln(π_first + ε) + head(h) ),   μ̂_k = μ_k + head(h),   σ̂_k² = σ_k² exp(head(h))

    What a reference of several samples teaches of states is read from all genes
    (:mod:`states.reading`), not by the network.
    """

    def __init__(
        self,
        n_genes,
        n_types,
        n_latent,
        n_hidden,
        dropout,
        n_iterations=100,
        momentum=0.0,
    ):
        super().__init__()
        sizes = dict(n_genes=n_genes, n_types=n_types, n_latent=n_latent, n_hidden=n_hidden)
        self.config = sizes | dict(dropout=dropout, n_iterations=n_iterations)
        # Files of models without momentum stay as they were.
        self.config |= {"momentum": momentum} if momentum else {}
        self.momentum = momentum
        self.hidden = hidden_layers([n_genes, n_hidden], dropout)
        self.mu_head = nn.Linear(n_hidden, n_types * n_latent)
        self.var_head = nn.Linear(n_hidden, n_types * n_latent)
        self.pi_head = nn.Linear(n_hidden, n_types)
        # Heads start at zero: every bulk gets the mixture's moments, and deconvolution alone
        # decides on proportions, until the heads have learned to correct them.
        for head in (self.mu_head, self.var_head, self.pi_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.log_weight = nn.Parameter(torch.zeros(n_genes))
        self.register_buffer("mu", torch.zeros(n_types, n_latent))  # mixture it was trained for
        self.register_buffer("var", torch.ones(n_types, n_latent))
        self.register_buffer("signature", torch.full((n_types, n_genes), 1 / n_genes))
        self.register_buffer("profile", torch.full((n_genes,), 1 / n_genes))
        self.register_buffer("center", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))

    @torch.no_grad()
    def fit_input(self, bulk, signature):
        """Set signature, mean profile and the standardisation of genes from training data.

        Args:
            bulk: training bulks (S, G), which give the centre and spread of each gene.
            signature: mean counts of the cells of each type (K, G). Not depth-normalised: a type
                with twice the mRNA weighs twice in a bulk for the same number of cells.
        """
        self.signature.copy_(self.scale_signature(signature))
        self.profile.copy_((bulk / bulk.sum(dim=1, keepdim=True)).mean(dim=0))
        x = torch.log1p(self.normalise(bulk, torch.ones_like(self.profile)) * DEPTH)
        self.center.copy_(x.mean(dim=0))
        # The floor keeps genes that hardly vary in training from dominating a bulk of another lab.
        self.scale.copy_(x.std(dim=0).clamp(min=0.1))

    @staticmethod
    def scale_signature(signature):
        """Mean counts (K, G) over the mean total of the types, which keep their mRNA content."""
        return signature / signature.sum(dim=1).mean()

    def normalise(self, bulk, measured):
        """Fractions of all counts (S, G), as if absent genes had their usual share of them.

        Otherwise a bulk that lacks highly expressed genes would read too high in all others.
        """
        share = (self.profile * measured).sum()
        total = (bulk * measured).sum(dim=1, keepdim=True)
        return bulk * measured / total * share

    @property
    def floor(self):
        """ε: a fiftieth of the mean gene, as ratios of genes with hardly any counts are noise."""
        return 0.02 / len(self.profile)

    def ratio_to(self, expected, fractions, measured):
        """ln((p + ε) / (q + ε)) of fractions p (S, G) to q, expected (S, G) on any scale."""
        q = self.normalise(expected, measured)
        ratio = torch.log((fractions + self.floor) / (q + self.floor)) * measured
        return ratio.clamp(-4, 4)

    def deviation(self, pi, bulk, measured):
        """Robust sd (S) of the log-ratios of genes of bulks (S, G) to what pi (S, K) explains."""
        measured = measured.to(bulk.dtype)
        ratio = self.ratio_to(pi @ self.signature, self.normalise(bulk, measured), measured)
        return robust_sd(ratio[:, measured > 0])

    def deconvolve(self, fractions, measured, signature=None, start=None, n_iterations=None):
        """Proportions of cells by :mod:`deconvolution.itakura_saito`, with learned gene weights.

        Args:
            fractions: (S, G). measured: (G). signature: (K, G), default the model's. start:
                proportions (S, K) to start from; default the same of each type. n_iterations:
                default the model's.

        Returns:
            (S, K), rows summing to 1.
        """
        S = self.signature if signature is None else signature  # (K, G)
        there = torch.nonzero(measured).flatten()  # others would only be multiplied by 0
        n = self.config["n_iterations"] if n_iterations is None else n_iterations
        weight = self.log_weight[there].exp() * measured[there]
        given = fractions[:, there], S[:, there], self.floor, n, weight
        return itakura_saito.solve(*given, start, self.momentum)

    def forward(self, bulk, measured=None, one_platform=False, start=None):
        """Args:
            bulk: (S, G), any scale, positive sums. measured: mask (G) of measured genes, default
                all. one_platform: the bulks are of one platform, and not the reference's. Their
                proportions are those of :meth:`deconvolve_cohort`, without the network's
                correction: what it learned on simulated platforms does not carry over. start:
                proportions (S, K) that the bulks are near to, so that a quarter of the updates
                will do.

        Returns:
            ``(mu, var, pi)``: (S, K, D), (S, K, D) positive, (S, K) rows summing to 1.
        """
        measured = torch.ones_like(self.profile) if measured is None else measured.to(bulk.dtype)
        fractions = self.normalise(bulk, measured)  # (S, G)
        if one_platform:
            first = self.deconvolve_cohort(fractions, measured)  # (S, K)
            mu, var, _ = self.correct(first, fractions, measured)
            return mu, var, first
        n_iterations = None if start is None else self.config["n_iterations"] // 4
        first = self.deconvolve(fractions, measured, start=start, n_iterations=n_iterations)
        return self.correct(first, fractions, measured)

    def correct(self, first, fractions, measured):
        """What the network makes of deconvolved proportions: see :meth:`forward`.

        The network does not train the gene weights, which have a loss of their own: together they
        would leave to the network what weights can do, and it carries over to other platforms less.

        Args:
            first: of :meth:`deconvolve` (S, K). fractions: (S, G). measured: (G).
        """
        first = first.detach()
        x = (torch.log1p(fractions * DEPTH) - self.center) / self.scale
        # A gene not measured counts as average, and no gene goes far beyond what training has seen.
        h = self.hidden(x.clamp(-6, 6) * measured)  # (S, H)
        shape = (len(first), self.config["n_types"], self.config["n_latent"])
        mu, log_var = self.mu + self.mu_head(h).view(shape), self.var_head(h).view(shape)
        # Regression: unconstrained, a negative variance became NaN under the square root.
        var = self.var * torch.exp(log_var.clamp(-5, 5))
        return mu, var, torch.softmax(torch.log(first + 1e-3) + self.pi_head(h), dim=-1)

    def deconvolve_cohort(self, fractions, measured):
        """:meth:`deconvolve` of bulks of one platform, whose common deviation is taken off first.

        The cohort's mean proportions stay those of :meth:`deconvolve`. (S, G), (G) -> (S, K).
        """
        first = self.deconvolve(fractions, measured)  # (S, K)
        if len(first) < MIN_COHORT:
            return first
        ratio = self.ratio_to(first @ self.signature, fractions, measured)  # (S, G)
        offset = common_ratio(ratio)  # (G)
        moved = ((fractions + self.floor) * torch.exp(-offset) - self.floor).clamp(min=0) * measured
        moved = moved / moved.sum(dim=1, keepdim=True) * fractions.sum(dim=1, keepdim=True)
        second = self.deconvolve(moved, measured)
        second = second * ((first.mean(dim=0) + 1e-4) / (second.mean(dim=0) + 1e-4))
        return second / second.sum(dim=1, keepdim=True)
