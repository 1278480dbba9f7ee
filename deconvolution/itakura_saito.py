"""Shares of known profiles in bulks, under noise that is a factor on each gene.

    min over π of  Σ_g w_g ( p_g / q_g - ln(p_g / q_g) - 1 ),   q = π S + ε,  p + ε for p

The Itakura-Saito divergence (Févotte, Bertin and Durrieu, Neural Computation 2009) counts errors as
ratios, because platforms change each gene by a factor; under least squares a few highly expressed
genes decide. After the first updates w_g is divided by 1 + ln(p_g / q_g)², the weight of Cauchy's
robust loss: a gene that is off by a large factor reflects the platform rather than the cells.
Stopping early regularises types that the data can hardly tell apart.

Notation in shape comments: S bulks, G genes, K cell types.
"""

import torch

UNROLLED = 10  # last updates, which have a gradient: more change nothing but the time


def solve(p, profiles, floor, n_iterations, weight=1.0, start=None, momentum=0.0):
    """Shares π of profiles in bulks (S, K), rows summing to 1, by multiplicative updates.

        v ← β v + ln( ((w p / q²) Sᵀ) / ((w / q) Sᵀ) ),   ln π ← ln π + v

    With momentum β (Polyak 1964), 34 updates at 0.7 come as far as 100 without. Only the last
    ``UNROLLED`` updates have a gradient: the ones before them start far from the solution, and what
    they do to it has faded by then.

    Args:
        p: fractions (S, G). profiles: S, on the same scale (K, G). floor: ε, below which ratios are
            noise. weight: w (G), or one for all. start: shares to start from, (S, K) or (K);
            default the same of each. momentum: β.
    """
    p = p + floor
    even = torch.full_like(profiles[:, 0], 1 / len(profiles))  # (K)
    log_pi = (even if start is None else start).clamp(min=1e-6).log().expand(len(p), -1)
    velocity = torch.zeros_like(log_pi)
    # From an even start, q is at first too far off for its errors to mean much.
    n_plain = n_iterations // 5 if start is None else 0
    for i in range(n_iterations):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= n_iterations - UNROLLED):
            step = log_step(log_pi.exp(), p, profiles, floor, weight, robust=i >= n_plain)
            velocity = momentum * velocity + step
            log_pi = log_pi + velocity
    return log_pi.softmax(dim=1)


def log_step(pi, p, profiles, floor, weight, robust):
    """ln of the factor of an update (S, K), arguments as in :func:`solve`; pi: (S, K)."""
    q = pi @ profiles + floor  # (S, G)
    ratio = p / q
    if robust:
        weight = weight / (1 + torch.log(ratio).detach() ** 2)  # (S, G)
    per_q = weight / q  # (S, G)
    denominator = (per_q @ profiles.T).clamp(min=1e-12)  # (S, K)
    return torch.log(((per_q * ratio) @ profiles.T / denominator).clamp(min=1e-12))
