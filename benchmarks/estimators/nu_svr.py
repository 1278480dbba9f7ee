"""ν-support vector regression, the estimator of CIBERSORT."""

import numpy as np
from sklearn.svm import NuSVR
from sklearn.utils.parallel import Parallel, delayed

from deconvolution.dwls import choose_signature, to_proportions
from deconvolution.estimators import Estimator


def nu_svr(bulk, statistics):
    """ν-support vector regression, linear (CIBERSORT: Newman et al., Nature Methods 2015).

    Signature and bulk are in CPM, each standardised as a whole; no quantile normalisation, as
    advised for RNA-seq. Genes are those of :func:`choose_signature`, so that only the estimator
    differs from DWLS (the paper's limit of q is 0.3). The paper's fractions are of RNA; here they
    are divided by the library sizes of the types.
    """
    genes = choose_signature(statistics.mean, statistics.change)
    X = (statistics.mean / statistics.size[:, None])[:, genes].T  # (M, K)
    X = (X - X.mean()) / X.std()
    fits = (delayed(fit_nu_svr)(X, y) for y in bulk[:, genes].astype(float))
    weights = np.array(Parallel(n_jobs=-1, prefer="threads")(fits))  # (S, K)
    return to_proportions(weights / statistics.size)


def fit_nu_svr(X, y):
    """Weights of the types (K) in one bulk: of ν = 0.25, 0.5 and 0.75, the fit of lowest RMSE.

    Negative coefficients become 0, and the others sum to 1. X: standardised signature (M, K).
    y: bulk (M).
    """
    y = (y - y.mean()) / max(y.std(), 1e-300)
    fits = [NuSVR(nu=nu, C=1.0, kernel="linear").fit(X, y) for nu in (0.25, 0.5, 0.75)]
    weights = [to_proportions(np.maximum(fit.coef_[0], 0)) for fit in fits]
    return min(weights, key=lambda w: np.mean((X @ w - y) ** 2))


ESTIMATORS = [
    Estimator(
        "nu-SVR",
        "Newman et al., Nature Methods 2015",
        lambda bulk, statistics, seed: nu_svr(bulk, statistics),
    ),
]
