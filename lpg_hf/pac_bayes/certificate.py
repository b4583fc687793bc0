"""What a certificate holds, how it prints, and how it is stored."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ErrorBound:
    """
    One certified error.

    Attributes:
        bound (`float`): Upper bound on the true Gibbs error, in [0, 1]; `nan` where there is none.
        error (`float`): Gibbs error on the certificate set, the mean over the draws; `nan` without samples.
        error_limit (`float`): Upper confidence limit of that mean, had there been infinitely many draws; `nan` where
            there is none of its own.
        num_samples (`int`): Samples that it was taken on.
        reason (`str`): Why `bound` is `nan`, or what it assumes; empty otherwise.
    """

    bound: float
    error: float
    error_limit: float
    num_samples: int
    reason: str = ""


@dataclass(frozen=True)
class ScaleChoice:
    """
    What one scale of the noise looked like when the scale was chosen, on draws that certify nothing.

    Attributes:
        sigma (`float`): Standard deviation of the noise.
        error (`float`): Gibbs error on the certificate set, over few draws.
        kl (`float`): Divergence of posterior from prior, in nats.
        complexity (`float`): `(kl + ln(xi(n) m / level)) / n`, which the bound pays on top of the error.
        bound (`float`): The bound that the two give, without any correction for the draws.
    """

    sigma: float
    error: float
    kl: float
    complexity: float
    bound: float


@dataclass(frozen=True)
class Certificate:
    """
    PAC-Bayes certificate of a randomised classifier, returned by [`certify`].

    With probability at least `1 - delta` over the certificate set and the draws, **all** bounds in it hold at once.
    They speak of the classifier that draws new weights from `N(w, sigma^2 I)` for every answer.

    Attributes:
        overall ([`ErrorBound`]): The error on the distribution that the certificate set comes from.
        per_class (`tuple[ErrorBound, ...]`): The error among the samples of each class.
        balanced ([`ErrorBound`]): The mean of the classes' errors.
        clean ([`ErrorBound`] or `None`): The error under the true labels; `None` if `label_noise` was not given.
        delta (`float`): Probability with which any of the bounds may fail.
        sample_level (`float`): Of it, what one of the three certificates (overall, per class, balanced) may fail by
            the certificate set: 4/5 of `delta` / 3.
        draw_level (`float`): The same for the draws, 1/5 of `delta` / 3; divided by C for each class.
        kl (`float`): Divergence of posterior from prior, `distance^2 / (2 sigma^2)`, in nats.
        distance (`float`): Euclidean distance of the weights from the prior's.
        sigma (`float`): Standard deviation of the noise, chosen from `sigma_grid` on other draws.
        sigma_grid (`tuple[float, ...]`): The scales that the union bound runs over.
        num_draws (`int`): Draws behind each error, K.
        num_samples (`int`): Labelled rows of the certificate set, n.
        num_labels (`int`): Classes, C.
        label_names (`tuple[str, ...]`): Their names.
        scope (`str`): Which parameters are noisy.
        num_parameters (`int`): How many these are.
        label_noise (`float` or `None`): The noise rate that `clean` rests on.
        num_prior_rows (`int` or `None`): Rows of `prior_dataset`, compared with the certificate set; `None` if none
            was given, so that the prior's independence is taken on trust.
        seed (`int`): Of the draws.
        selection (`tuple[ScaleChoice, ...]`): What the choice of `sigma` saw; empty for a grid of one.

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
            else f"its {self.num_prior_rows} rows share none with the set"
        )
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
        """Writes everything as JSON; a `nan` becomes `null`."""
        Path(path).write_text(json.dumps(_to_json(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Certificate":
        """Reads what [`save`] wrote."""
        content = json.loads(Path(path).read_text())
        for name in ("overall", "balanced", "clean"):
            content[name] = content[name] and _load_bound(content[name])
        content["per_class"] = tuple(map(_load_bound, content["per_class"]))
        content["selection"] = tuple(ScaleChoice(**entry) for entry in content["selection"])
        for name in ("sigma_grid", "label_names"):
            content[name] = tuple(content[name])
        return cls(**content)


def _to_json(value: object) -> object:
    if isinstance(value, dict):
        return {name: _to_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _load_bound(content: dict) -> ErrorBound:
    return ErrorBound(**{name: math.nan if value is None else value for name, value in content.items()})
