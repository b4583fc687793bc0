"""The one table of methods, and how chains are read from names, strings and objects."""

import ast
import inspect
import re
from collections.abc import Sequence

from .auto import auto_chain
from .base import Perturbation
from .class_relative_dampening import ClassRelativeDampening
from .class_weighting import ClassWeighting
from .focal_loss import FocalLoss
from .generalized_cross_entropy import GeneralizedCrossEntropy
from .gradient_clipping import GradientClipping
from .gradient_noise import GradientNoise
from .label_smoothing import LabelSmoothing
from .logit_adjustment import LogitAdjustment
from .logit_clipping import LogitClipping
from .logit_noise import LogitNoise
from .lpg import LPG
from .lpl import LPL
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


def build_chain(
    perturbations: str | Perturbation | Sequence[str | Perturbation],
    class_counts: Sequence[int] | None = None,
    others: Sequence[Perturbation] = (),
) -> list[Perturbation]:
    """
    Turns names, strings and objects into the list of methods of a chain.

    In a longer chain `"auto"` adds only the methods that are missing: no adjustment next to `logit_adjustment` or
    `class_weighting`, no dampening next to `class_relative_dampening`. It smooths labels towards the class shares
    where the imbalance is corrected (by itself or another method), and towards all classes alike elsewhere. Where it
    adjusts logits itself, it turns a `label_smoothing` towards all classes into one towards the class shares.

    Args:
        perturbations (`str`, [`Perturbation`] or a sequence of them):
            Objects; strings in the form of a `repr` (`"lpg"`, `"lpg(epsilon=0.3)"`); `"auto"` for the default preset;
            `"none"` for an empty chain.
        class_counts (`Sequence[int]`, *optional*): Training samples of each class, for `auto`.
        others (`Sequence[Perturbation]`, *optional*): Methods that act outside of the chain, for `auto`.

    Returns:
        `list[Perturbation]`: The chain.

    Raises:
        ValueError: If a string does not name a method or cannot be read, or if `"auto"` occurs twice.
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
                f"'none' stands for an empty chain and cannot be part of a longer one; found {perturbations}. Remove "
                "it, or the other entries."
            )
        return []
    if list(perturbations).count("auto") > 1:
        raise ValueError(
            f"'auto' stands for a whole chain, which would act twice; found {list(perturbations)}. Keep one of them."
        )
    # `None` keeps the place of `auto`.
    entries = [None if entry == "auto" else _read(entry) for entry in perturbations]
    named = [entry for entry in entries if entry is not None]
    auto = auto_chain(class_counts, [*others, *named])
    return [method for entry in entries for method in (auto if entry is None else [entry])]


def parse_perturbation(text: str) -> Perturbation:
    """
    Reads one method from its `repr`, for instance `"lpg(strategy='frequency', epsilon=0.3)"`, or from its bare name.

    Arguments must be literals; nothing is evaluated.

    Raises:
        ValueError: If the text does not name a method, or the method cannot be built with its arguments.
    """
    try:
        expression = ast.parse(text.strip(), mode="eval").body
        call = expression if isinstance(expression, ast.Call) else ast.Call(func=expression, args=[], keywords=[])
        if not isinstance(call.func, ast.Name):
            raise ValueError("it does not begin with a name")
        name = call.func.id
        args = [ast.literal_eval(argument) for argument in call.args]
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(kwargs) < len(call.keywords):
            raise ValueError("an argument is given twice")
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"Cannot read the perturbation {text!r}: write a name, or a call with literal arguments such as "
            "\"lpg(strategy='frequency', epsilon=0.3)\"."
        ) from error
    if name not in METHODS:
        raise ValueError(
            f"Unknown perturbation {name!r}. The known ones are auto, none, {', '.join(sorted(METHODS))}."
        )
    try:
        return METHODS[name](*args, **kwargs)
    except TypeError as error:
        known = ", ".join(inspect.signature(METHODS[name]).parameters) or "none"
        raise ValueError(f"Cannot build the perturbation {text!r}: {error}. Its arguments: {known}.") from error


def method_card(method: type[Perturbation]) -> dict[str, str]:
    """
    The card in the docstring of a method: level, formula, helps, hurts, cost and source.

    Example:

    ```python
    >>> method_card(LabelSmoothing)["Formula"]
    '`delta = alpha (onehot(y) - t)`, `t = 1/C` or the class shares `pi`.'

    ```
    """
    entries = re.findall(
        r"^([A-Z][a-z]+): (.+?)(?=\n[A-Z][a-z]+: |\n\n)", inspect.getdoc(method) or "", re.DOTALL | re.MULTILINE
    )
    return {key: " ".join(text.split()) for key, text in entries}


def _read(entry: str | Perturbation) -> Perturbation:
    if isinstance(entry, Perturbation):
        return entry
    if isinstance(entry, str):
        return parse_perturbation(entry)
    raise TypeError(f"`perturbations` takes methods (such as `LPG()`) and strings (such as 'lpg'); found {entry!r}.")
