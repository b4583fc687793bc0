"""
PAC-Bayes certificates: an upper bound on the error of a trained classifier that holds with a stated confidence.

The certified classifier is the trained one with Gaussian noise on its weights, drawn anew for every prediction. Its
posterior is `Q = N(w, sigma^2 I)`, the prior is `P = N(w_0, sigma^2 I)`, and the divergence between them is
`KL = ||w - w_0||^2 / (2 sigma^2)`. The prior must not depend on the n rows of the certificate set. The training may
have used them in any way. With `kl^-1(q, b) = sup {p >= q : kl(q || p) <= b}`, K draws of the weights, and m scales
`sigma` to choose from, the bounds are:

- Overall error, after Maurer (2004): `R(Q) <= kl^-1(U, (KL + ln(xi(n) m / a)) / n)` with probability `1 - a`. `U` is
  an upper confidence limit of the error on the certificate set, computed from the K draws (Langford and Caruana, 2001;
  Maurer and Pontil, 2009). `xi(n)` is computed exactly, `ln m` pays for the choice of the scale, and `U` pays for the
  finite number of draws.
- Error of each class: the same bound on the `n_c` samples of the class, with `ln(xi(n_c) C m / a)`, for all classes at
  once.
- Balanced error: the constraint `sum_c n_c kl(R^_c || R_c) <= KL + sum_c ln xi(n_c) + ln(m / a)` pays KL once. The
  bound is the largest mean of the `R_c` under this constraint (our own result), or the mean of the classes' bounds
  where that mean is smaller.
- Clean error under symmetric label noise of rate r: `(bound - r) / (1 - r C / (C - 1))`.

One probability `delta` covers everything that a certificate prints. Overall (with clean), per class, and balanced get
a third of it each, of which 4/5 goes to the certificate set and 1/5 to the draws.

The implementation differs from the usual presentation in these points:

- The inverse is bisected in `p - q` instead of p. For bounds below 1e-16, the divergence of two adjacent floats is
  dominated by rounding, and the upper end of a bracket in p can lie below the true value.
- A class without samples has no bound. It counts as 1 in the balanced error.
- `label_noise` may be a lower limit of the rate, because the clean bound falls in r as long as the noisy bound is at
  most (C-1)/C. Above that value the clean bound does not exist. Single classes have no clean bound either, because the
  samples with noisy label c are a mixture of classes.
- Noise on bfloat16 weights is drawn in float32 and rounded. Rounding cannot increase the divergence (data processing
  inequality), so the bounds hold for the classifier as it runs.
- With momentum mu, a path bound divides by `1 - mu` only if the learning rate never rises; see [`PathLength`].
- The bounds need independent rows. A random half of the distinct rows of a data set is just as good: Hoeffding (1963)
  shows that sampling without replacement concentrates at least as well. Oversampled rows are not independent, and
  copies are refused.
"""

from .bounds import clean_error_bound, kl_inverse
from .certificate import Certificate, ErrorBound, ScaleChoice
from .certify import DEFAULT_SIGMA_GRID, certify
from .gibbs import GibbsError, gibbs_error
from .path_length import PathLength
from .splitting import split_for_certificate


__all__ = [
    "DEFAULT_SIGMA_GRID",
    "Certificate",
    "ErrorBound",
    "GibbsError",
    "PathLength",
    "ScaleChoice",
    "certify",
    "clean_error_bound",
    "gibbs_error",
    "kl_inverse",
    "split_for_certificate",
]
