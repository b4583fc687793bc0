"""
Certificates: how wrong a trained classifier can be at most, with a confidence that is stated, from PAC-Bayes bounds.

The classifier is the trained one with Gaussian noise on its weights, drawn anew for every answer: posterior
`Q = N(w, sigma^2 I)`, prior `P = N(w_0, sigma^2 I)`, divergence `KL = ||w - w_0||^2 / (2 sigma^2)`. The prior must not
depend on the n rows of the certificate set, the training may have used them in any way. With `kl^-1(q, b) =
sup {p >= q : kl(q || p) <= b}`, K draws of the weights and m scales `sigma` to choose from:

- overall, after Maurer (2004): `R(Q) <= kl^-1(U, (KL + ln(xi(n) m / a)) / n)` with probability `1 - a`, where `U` is
  an upper limit of the error on the set from K draws (Langford and Caruana, 2001; Maurer and Pontil, 2009). `xi(n)`
  is computed exactly, `ln m` pays for the choice of the scale, and `U` for taking finitely many draws;
- each class: the same with its `n_c` samples and `ln(xi(n_c) C m / a)`, for all classes at once;
- balanced error: `sum_c n_c kl(R^_c || R_c) <= KL + sum_c ln xi(n_c) + ln(m / a)`, KL paid once; the largest mean of
  `R_c` under that constraint (ours), or the mean of the classes' bounds where that is smaller;
- clean error under symmetric label noise of rate r: `(bound - r) / (1 - r C / (C - 1))`.

One probability for everything that is printed: overall (with clean), classes and balanced get a third of `delta` each,
of which 4/5 goes to the certificate set and 1/5 to the draws.

Where this differs from what is usually written, and why:

- The inverse is bisected in `p - q`, not in p: for bounds below 1e-16 the divergence of two floats next to each other
  is all rounding, and the upper end of a bracket in p can lie below the true value.
- A class without samples has no bound; in the balanced error it counts as 1.
- `label_noise` may be a lower limit of the rate, since the clean bound falls in r as long as the noisy one is at most
  (C-1)/C. Beyond that it does not, and there is no clean bound. There is none for single classes either: the samples
  with noisy label c are a mixture of classes.
- Noise on weights in bfloat16 is drawn in float32 and rounded. The divergence of the rounded draws is at most the one
  used (data processing), so the bounds hold for the classifier as it runs.
- With momentum mu a path bound divides by `1 - mu` only if the learning rate never rises; see [`PathLength`].
- The bounds need independent rows. A random half of the distinct rows of a data set is as good (Hoeffding, 1963:
  sampling without replacement is the milder case), oversampled rows are not, and copies are refused.
"""

from .bounds import clean_error_bound, kl_inverse
from .certificate import Certificate, ErrorBound, ScaleChoice
from .certification import DEFAULT_SIGMA_GRID, certify
from .gibbs import GibbsError, gibbs_error
from .path_length import PathLength
from .rows import split_for_certificate


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
