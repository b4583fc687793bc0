"""LPGConfig: TrainingArguments and the settings of the perturbations."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from .perturbations import LPG, Perturbation, build_chain


@dataclass
class LPGConfig(TrainingArguments):
    r"""
    Configuration class for the [`LPGTrainer`].

    This class adds the settings of the perturbations to [`~transformers.TrainingArguments`]; all of those keep their
    defaults. With [`~transformers.HfArgumentParser`] every field is a command-line option. Fields hold strings and
    numbers only; a method with its arguments is written as its `repr`, for instance
    `"lpg(strategy='frequency', epsilon=0.3)"`.

    The `lpg_*` fields are the arguments of the method `lpg` where `perturbations` names it without its own, so that
    `hyperparameter_search` can vary them.

    Parameters:
        perturbations (`list[str]`, *optional*, defaults to `["auto"]`):
            The chain of methods, in order. `["auto"]` is the preset that needs no tuning, `["none"]` (or `[]`) trains
            as `Trainer`.
        lpg_strategy (`str`, *optional*, defaults to `"frequency"`):
            What decides sign and radius of each class: `"frequency"` or `"accuracy"`.
        lpg_epsilon (`float`, *optional*, defaults to `0.1`):
            Largest radius of a class's delta, at least 0, in per-sample units.
        lpg_max_dampening (`float`, *optional*, defaults to `0.5`):
            Share of a class's mean gradient that dampening may remove, in (0, 1].
        lpg_direction (`str`, *optional*, defaults to `"class"`):
            Along the mean gradient of the class (`"class"`) or each sample's own (`"sample"`).
        lpg_norm (`str`, *optional*, defaults to `"l2"`):
            Norm of the ball: `"l2"` or `"linf"`.
        lpg_solver (`str`, *optional*, defaults to `"closed_form"`):
            `"closed_form"` or `"pgd"`.
        lpg_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps without perturbation at the start.
        lpg_sync (`bool`, *optional*, defaults to `False`):
            Whether class means run over all processes, at the cost of moving every process's logit gradients.

    Raises:
        ValueError: If a method is unknown, an argument is out of range, or an `lpg_*` field is set but unused.

    Example:

    ```python
    >>> LPGConfig("out", perturbations=["lpg"], lpg_epsilon=0.3).chain()
    ['lpg(epsilon=0.3)']

    ```
    """

    # Parameters that control the perturbations
    perturbations: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": 'The chain of perturbations, in order: names or calls such as "lpg(epsilon=0.3)". `auto` needs no '
            "tuning, `none` trains as Trainer."
        },
    )
    lpg_strategy: str = field(
        default="frequency",
        metadata={
            "help": "What decides sign and radius of each class for `lpg`.",
            "choices": ["frequency", "accuracy"],
        },
    )
    lpg_epsilon: float = field(
        default=0.1, metadata={"help": "Largest radius of a class's delta for `lpg`, at least 0, in per-sample units."}
    )
    lpg_max_dampening: float = field(
        default=0.5,
        metadata={"help": "Share of a class's mean gradient that `lpg` may remove when it dampens, in (0, 1]."},
    )
    lpg_direction: str = field(
        default="class",
        metadata={
            "help": "Whether `lpg` moves along the mean gradient of the class or each sample's own.",
            "choices": ["class", "sample"],
        },
    )
    lpg_norm: str = field(default="l2", metadata={"help": "Norm of the ball for `lpg`.", "choices": ["l2", "linf"]})
    lpg_solver: str = field(
        default="closed_form",
        metadata={
            "help": "How `lpg` finds its delta: by formula, or by projected gradient steps that converge to it.",
            "choices": ["closed_form", "pgd"],
        },
    )
    lpg_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps without perturbation at the start, for `lpg`."}
    )
    lpg_sync: bool = field(
        default=False,
        metadata={"help": "Whether the class means of `lpg` run over all processes; moves their logit gradients."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.perturbations, str):
            self.perturbations = [self.perturbations]
        if not all(isinstance(entry, str) for entry in self.perturbations):
            raise ValueError(
                f"`perturbations` of a config must be strings, which JSON and the command line can hold; found "
                f"{self.perturbations}. Write the methods as their `repr`, or pass them to LPGTrainer."
            )
        build_chain(self.chain())

    def chain(self, perturbations: Sequence[str | Perturbation] | None = None) -> list[str | Perturbation]:
        """
        A chain with the `lpg_*` fields, as they are now, written out where it has a bare `lpg`.

        Args:
            perturbations (`Sequence[str | Perturbation]`, *optional*): The field `perturbations` when left out.

        Raises:
            ValueError: If an `lpg_*` field is set and there is no bare `lpg`.
        """
        if perturbations is None:
            perturbations = self.perturbations
            # `hyperparameter_search` makes a list of the string it was given: letter by letter.
            if perturbations and all(len(entry) == 1 for entry in perturbations):
                perturbations = ["".join(perturbations)]
        own_fields = [f for f in fields(self) if f.name.startswith("lpg_")]
        lpg = repr(LPG(**{f.name.removeprefix("lpg_"): getattr(self, f.name) for f in own_fields}))
        if "lpg" not in perturbations:
            unused = [f"{f.name}={getattr(self, f.name)!r}" for f in own_fields if getattr(self, f.name) != f.default]
            if unused:
                raise ValueError(
                    f"`{', '.join(unused)}` would have no effect: `perturbations` is {list(perturbations)}. Put 'lpg' "
                    "without arguments in it, or leave these fields at their defaults."
                )
        return [lpg if entry == "lpg" else entry for entry in perturbations]
