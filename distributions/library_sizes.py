"""Library sizes of a cell type, as quantiles of their logarithm."""

import torch


def fit_quantiles(library, codes, n_types, n_quantiles):
    """Quantiles of the logarithm of each type's library sizes (K, n), float64, evenly spaced.

    A type without cells gets those of all cells. library (N), positive; codes (N).
    """
    level = torch.linspace(0, 1, n_quantiles, dtype=torch.float64)
    log_library, codes = library.double().log().cpu(), codes.cpu()
    of_types = (log_library[codes == k] for k in range(n_types))
    return torch.stack([torch.quantile(x if len(x) else log_library, level) for x in of_types])


def sample_quantiles(quantiles, codes, generator=None):
    """Draw a library size (B) for cells of types ``codes`` (B); quantiles: (K, n)."""
    n = quantiles.shape[1] - 1
    u = torch.rand(codes.shape, generator=generator, device=codes.device) * n
    low = u.floor().clamp(max=n - 1).long()
    a, b = quantiles[codes, low], quantiles[codes, low + 1]
    return torch.exp(a + (u - low) * (b - a))
