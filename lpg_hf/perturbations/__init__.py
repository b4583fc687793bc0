"""The methods, and the one table that knows them by name."""

import ast
import inspect
import re
from collections.abc import Sequence

from .base import GradientPerturbation, LogitPerturbation, ParameterPerturbation, Perturbation, Rescaling
from .class_relative_dampening import ClassRelativeDampening
from .class_weighting import ClassWeighting
from .clipping import LogitClipping
from .focal import FocalLoss
from .generalized_cross_entropy import GeneralizedCrossEntropy
from .gradient_clipping import GradientClipping
from .gradient_noise import GradientNoise
from .label_smoothing import LabelSmoothing
from .logit_adjustment import LogitAdjustment
from .lpg import LPG
from .lpl import LPL
from .noise import LogitNoise
from .sam import SAM


METHODS: dict[str, type[Perturbation]] = {
    method.name: method
    for method in (
        LPG,
        ClassRelativeDampening,
        LPL,
        LogitClipping,
        LogitNoise,
        LabelSmoothing,
        ClassWeighting,
        LogitAdjustment,
        FocalLoss,
        GeneralizedCrossEntropy,
        SAM,
        GradientClipping,
        GradientNoise,
    )
}

# Above this ratio of the largest to the smallest class, `auto` adjusts the logits.
AUTO_MIN_IMBALANCE = 2.0

__all__ = [
    "LPG",
    "LPL",
    "METHODS",
    "SAM",
    "ClassRelativeDampening",
    "ClassWeighting",
    "FocalLoss",
    "GeneralizedCrossEntropy",
    "GradientClipping",
    "GradientNoise",
    "GradientPerturbation",
    "LabelSmoothing",
    "LogitAdjustment",
    "LogitClipping",
    "LogitNoise",
    "LogitPerturbation",
    "ParameterPerturbation",
    "Perturbation",
    "Rescaling",
    "build_chain",
    "method_card",
    "parse_perturbation",
]


def build_chain(
    perturbations: str | LogitPerturbation | Sequence[str | LogitPerturbation],
    class_counts: Sequence[int] | None = None,
    beside: Sequence[LogitPerturbation] = (),
) -> list[LogitPerturbation]:
    """
    Turns names, strings and objects into the list of methods of a chain.

    Args:
        perturbations (`str`, [`Perturbation`] or a sequence of them):
            Objects; strings as their `repr` writes them (`"lpg"`, `"lpg(epsilon=0.3)"`); `"auto"`, which stands for
            the default preset; `"none"` for an empty chain. In a longer chain `"auto"` adds what the others leave to
            it: no adjustment beside `logit_adjustment` or `class_weighting`, no dampening beside
            `class_relative_dampening`. It smooths labels towards the class shares where the imbalance is corrected, by
            itself or another method, and towards all classes alike where it is not. Where it adjusts logits itself, it
            turns a `label_smoothing` towards all classes into one towards the class shares.
        class_counts (`Sequence[int]`, *optional*): Training samples of each class, which `auto` looks at.
        beside (`Sequence[LogitPerturbation]`, *optional*): What acts outside of the chain, for `auto` to look at.

    Returns:
        `list[Perturbation]`: The chain.

    Raises:
        ValueError: If a string names no method or cannot be read.
        TypeError: If an entry is neither a string nor a method.

    Example:

    ```python
    >>> build_chain(["logit_adjustment(tau=0.5)", "logit_clipping"])
    [logit_adjustment(tau=0.5), logit_clipping()]
    >>> [method.name for method in build_chain("auto", class_counts=[900, 100])]
    ['logit_adjustment', 'label_smoothing', 'class_relative_dampening']
    >>> [method.name for method in build_chain(["class_weighting", "auto"], class_counts=[900, 100])]
    ['class_weighting', 'label_smoothing', 'class_relative_dampening']

    ```
    """
    if isinstance(perturbations, str | Perturbation):
        perturbations = [perturbations]
    elif not isinstance(perturbations, Sequence):
        raise TypeError(
            f"`perturbations` takes a list of methods (such as `LPG()`) and strings (such as 'lpg'); found "
            f"{perturbations!r}."
        )
    if "none" in perturbations:
        if len(perturbations) > 1:
            raise ValueError(
                f"'none' stands for an empty chain and cannot be part of a longer one; found {perturbations}."
            )
        return []
    read = [entry if entry == "auto" else _read(entry) for entry in perturbations]
    auto = _auto_chain(class_counts, beside=[*beside, *(entry for entry in read if entry != "auto")])
    return [method for entry in read for method in (auto if entry == "auto" else [entry])]


def _read(entry: str | Perturbation) -> Perturbation:
    if isinstance(entry, Perturbation):
        return entry
    if isinstance(entry, str):
        return parse_perturbation(entry)
    raise TypeError(f"`perturbations` takes methods (such as `LPG()`) and strings (such as 'lpg'); found {entry!r}.")


def parse_perturbation(text: str) -> Perturbation:
    """
    Reads one method from its `repr`, for instance `"lpg(strategy='frequency', epsilon=0.3)"`, or its bare name.

    Only literals are read as arguments; nothing is evaluated.

    Raises:
        ValueError: If the text names no method, or its arguments cannot be read or are not the method's.
    """
    try:
        expression = ast.parse(text.strip(), mode="eval").body
        call = expression if isinstance(expression, ast.Call) else ast.Call(func=expression, args=[], keywords=[])
        name = call.func.id
        args = [ast.literal_eval(argument) for argument in call.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(kwargs) < len(call.keywords):
            raise ValueError("an argument is given twice")
    except (SyntaxError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Cannot read the perturbation {text!r}: write a name, or a call with literal arguments such as "
            "\"lpg(strategy='frequency', epsilon=0.3)\"."
        ) from error
    if name not in METHODS:
        raise ValueError(
            f"Unknown perturbation {name!r}: the known ones are auto, none, {', '.join(sorted(METHODS))}."
        )
    try:
        return METHODS[name](*args, **kwargs)
    except TypeError as error:
        known = ", ".join(inspect.signature(METHODS[name]).parameters) or "none"
        raise ValueError(f"Cannot build the perturbation {text!r}: {error}. Its arguments: {known}.") from error


def method_card(method: type[Perturbation]) -> dict[str, str]:
    """
    The card in a method's docstring: level, formula, helps, hurts, cost and source.

    Example:

    ```python
    >>> method_card(LabelSmoothing)["Formula"]
    '`delta = alpha (onehot(y) - t)`, `t = 1/C` or the class shares `pi`.'

    ```
    """
    entries = re.findall(
        r"^([A-Z][a-z]+): (.+?)(?=\n[A-Z][a-z]+: |\n\n)", inspect.getdoc(method), re.DOTALL | re.MULTILINE
    )
    return {key: " ".join(text.split()) for key, text in entries}


def _auto_chain(class_counts: Sequence[int] | None, beside: Sequence[Perturbation]) -> list[Perturbation]:
    """
    The default preset (ours): logit adjustment where classes are imbalanced, smoothing, class-relative dampening; of
    these what the methods `beside` it in the chain do not do already.

    While the counts are unknown the adjustment stays in the chain and looks at the running prior itself.
    """
    chain: list[Perturbation] = []
    is_nearly_balanced = _is_nearly_balanced(class_counts)
    is_corrected = any(isinstance(method, LogitAdjustment | ClassWeighting) for method in beside)
    if not is_corrected and not is_nearly_balanced:
        is_corrected = True
        chain.append(LogitAdjustment(tau=1.0, min_imbalance=AUTO_MIN_IMBALANCE, learned=(0.05, 0.2)))
        # After an adjustment of 100 : 1, 1 % of the target on a tail class would make it as likely as the head.
        for method in beside:
            if isinstance(method, LabelSmoothing) and method.target == "uniform":
                chain += [LabelSmoothing(-method.alpha), LabelSmoothing(method.alpha, target="prior")]
    # For the same reason; where nothing is corrected, the shares of the classes may be those of wrong labels. A user's
    # label smoothing does not replace it: with both, more cells of the benchmark gain.
    chain.append(LabelSmoothing(alpha=0.1, target="prior" if is_corrected else "uniform"))
    if not any(isinstance(method, ClassRelativeDampening) for method in beside):
        chain.append(
            ClassRelativeDampening(
                power=8.0,
                learned=(0.05, 0.3),
                contradicted=(0.01, 0.03),
                decided=(0.1, 0.13),
                # A long tail stays unsure for so long that wrong labels would be memorised.
                rising=(0.5, 0.8) if is_nearly_balanced else None,
                compensated=True,
            )
        )
    return chain


def _is_nearly_balanced(class_counts: Sequence[int] | None) -> bool:
    present = [] if class_counts is None else [count for count in class_counts if count > 0]
    return bool(present) and max(present) <= AUTO_MIN_IMBALANCE * min(present)
