"""`Certificate`: the numbers of a certificate, printed as a table and stored as JSON."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from .certificate_json import read_json, write_json


@dataclass(frozen=True)
class ErrorBound:
    """
    One certified error.

    Attributes:
        bound (`float`): Upper bound on the true Gibbs error, in [0, 1]; `nan` if it does not exist.
        error (`float`): Gibbs error on the certificate set, averaged over the draws; `nan` without samples, and for
            the clean error.
        error_limit (`float`): Upper confidence limit of the average over infinitely many draws; `nan` if `error` is.
        num_samples (`int`): Samples that `error` was measured on.
        reason (`str`): Why `bound` is `nan`, or which assumption it makes; empty otherwise.
    """

    bound: float
    error: float
    error_limit: float
    num_samples: int
    reason: str = ""


@dataclass(frozen=True)
class ScaleChoice:
    """
    One scale of the noise as it looked when the scale was chosen, on draws that are not used to certify.

    Attributes:
        sigma (`float`): Standard deviation of the noise.
        error (`float`): Gibbs error on the certificate set, averaged over few draws.
        kl (`float`): Divergence of posterior from prior, in nats.
        complexity (`float`): `(kl + ln(xi(n) m / level)) / n`, which the bound adds to the error.
        bound (`float`): Bound from `error` and `complexity`, without a correction for the draws.
    """

    sigma: float
    error: float
    kl: float
    complexity: float
    bound: float


@dataclass(frozen=True)
class Certificate:
    """
    PAC-Bayes certificate of a randomized classifier, returned by [`certify`].

    With probability at least `1 - delta` over the certificate set and the draws, **all** bounds in it hold at once.
    The certified classifier draws new weights from `N(w, sigma^2 I)` for every prediction.

    Attributes:
        overall ([`ErrorBound`]): Error on the distribution that the certificate set comes from.
        per_class (`tuple[ErrorBound, ...]`): Error among the samples of each class.
        balanced ([`ErrorBound`]): Mean of the classes' errors.
        clean ([`ErrorBound`] or `None`): Error under the true labels; `None` if `label_noise` was not given.
        delta (`float`): Probability with which any of the bounds may fail.
        sample_level (`float`): Share of `delta` with which one of the three certificates (overall, per class,
            balanced) may fail because of the certificate set, 4/5 of `delta` / 3.
        draw_level (`float`): Share of `delta` with which one of them may fail because of the draws, 1/5 of
            `delta` / 3; divided by C for each class.
        kl (`float`): Divergence of posterior from prior, `distance^2 / (2 sigma^2)`, in nats.
        distance (`float`): Euclidean distance of the weights from the prior's.
        sigma (`float`): Standard deviation of the noise, chosen from `sigma_grid` on other draws.
        sigma_grid (`tuple[float, ...]`): Scales that the union bound runs over.
        num_draws (`int`): Number of draws K that each error is averaged over.
        num_samples (`int`): Number of labeled rows n of the certificate set.
        num_labels (`int`): Number of classes C.
        label_names (`tuple[str, ...]`): Names of the classes.
        scope (`str`): Parameters that get noise.
        num_parameters (`int`): Number of these parameters.
        label_noise (`float` or `None`): Rate of label noise that `clean` assumes.
        num_prior_rows (`int` or `None`): Number of rows of `prior_dataset`, which were compared with the certificate
            set; `None` if no `prior_dataset` was given, so that the prior's independence is taken on trust.
        seed (`int`): Seed of the draws.
        selection (`tuple[ScaleChoice, ...]`): Scales that `sigma` was chosen from; empty for a grid of one.
        num_near_copies (`int` or `None`): Rows whose texts differ from a row of `prior_dataset` in case and spacing
            alone, or whose numbers are all but the same; `None` if no `prior_dataset` was given, or if the rows have
            neither texts nor 16 fractional numbers.
        weights_hash (`str` or `None`): Hash of the weights that are certified, with which a model card compares the
            model's; `None` in certificates of older versions.

    Example:

    ```python
    >>> bound = ErrorBound(bound=0.1, error=0.05, error_limit=0.06, num_samples=500)
    >>> bound.bound
    0.1

    ```
    """

    overall: ErrorBound
    per_class: tuple[ErrorBound, ...]
    balanced: ErrorBound
    clean: ErrorBound | None
    delta: float
    sample_level: float
    draw_level: float
    kl: float
    distance: float
    sigma: float
    sigma_grid: tuple[float, ...]
    num_draws: int
    num_samples: int
    num_labels: int
    label_names: tuple[str, ...]
    scope: str
    num_parameters: int
    label_noise: float | None
    num_prior_rows: int | None
    seed: int
    selection: tuple[ScaleChoice, ...]
    num_near_copies: int | None = None
    weights_hash: str | None = None

    def __str__(self) -> str:
        rows = [("overall", self.overall), ("balanced", self.balanced)]
        if self.clean is not None:
            rows.append((f"clean labels (noise {self.label_noise:g})", self.clean))
        rows += [(f"class {name}", entry) for name, entry in zip(self.label_names, self.per_class, strict=True)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'':{width}}  certified  on the set  with draws  samples"]
        for name, entry in rows:
            numbers = "  ".join(
                f"{'-' if math.isnan(value) else f'{value:.4f}':>{size}}"
                for value, size in ((entry.bound, 9), (entry.error, 10), (entry.error_limit, 10))
            )
            lines.append(f"{name:{width}}  {numbers}  {entry.num_samples:7d}  {entry.reason}".rstrip())
        prior = (
            "taken on trust to be independent of the set"
            if self.num_prior_rows is None
            else f"trained on {self.num_prior_rows} rows, none of which is in the set"
        )
        if self.kl == 0:
            prior += "; it has the weights of the model, which must not have seen the set either"
        if self.num_near_copies:
            prior += f"; {self.num_near_copies} rows of the set are near copies of one of them, in texts or numbers"
        return "\n".join(
            [
                f"Error of the classifier with weights N(w, {self.sigma:.4g}^2 I) on {self.scope} parameters "
                f"({self.num_parameters:,}): at most `certified`,",
                f"all rows at once with probability {1 - self.delta:g}.",
                "",
                *lines,
                "",
                f"KL {self.kl:.4g} nats, distance from the prior {self.distance:.4g}, {self.num_draws} draws, "
                f"{len(self.sigma_grid)} scales tried.",
                f"Prior: {prior}.",
            ]
        )

    def save(self, path: str | Path) -> None:
        """Writes the certificate as JSON, with `null` for `nan`."""
        write_json(dataclasses.asdict(self), path)

    @classmethod
    def load(cls, path: str | Path) -> "Certificate":
        """
        Reads a certificate that [`~Certificate.save`] wrote.

        Raises:
            OSError: If there is no such file.
            ValueError: If the file holds something else.
        """
        certificate = read_json(cls, path)
        lengths = {len(certificate.per_class), len(certificate.label_names), certificate.num_labels}
        entries = [certificate.overall, certificate.balanced, certificate.clean, *certificate.per_class]
        bounds = [entry.bound for entry in entries if entry is not None and not math.isnan(entry.bound)]
        if len(lengths) > 1 or not 0 < certificate.delta < 1 or not all(0 <= bound <= 1 for bound in bounds):
            raise ValueError(
                f"{path} holds no certificate: its bounds must lie in [0, 1], `delta` strictly between 0 and 1, and "
                "there must be one bound and one name for each class. Certify again if the file was changed."
            )
        return certificate
