"""How genes of bulks lie off what cell types explain: of each bulk, and of all of one platform.

Notation in shape comments: S bulks, G genes.
"""

PLATFORM_VAR = 0.25  # prior variance of what all bulks of a table share against the reference


def robust_sd(ratio):
    """Standard deviation over genes of log-ratios (S, G), by the median deviation: (S)."""
    if ratio.shape[1] == 0:
        return ratio.new_zeros(len(ratio))
    median = ratio.median(dim=1, keepdim=True).values
    return 1.4826 * (ratio - median).abs().median(dim=1).values


def common_ratio(ratio):
    """What all bulks of a table share against the sum of the types: log factors of genes (G).

        P_g = τ² / (τ² + e_g² / S) · median_s r_sg,   τ = 0.5

    with e_g² the mean squared deviation of r_sg from its median. The mean composition of a
    cohort cannot be told from its platform, but how its samples differ can: without their
    common part, genes say so with less noise.

    Args:
        ratio: r, of :meth:`models.BulkEncoder.ratio_to` the expected bulks (S, G).
    """
    median = ratio.median(dim=0).values
    error = ((ratio - median) ** 2).mean(dim=0)
    return median * PLATFORM_VAR / (PLATFORM_VAR + error / len(ratio))
