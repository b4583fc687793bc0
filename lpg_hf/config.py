"""LPGConfig: TrainingArguments and the settings of the perturbations."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from .perturbations import LPG, Perturbation, build_chain
from .share_texts import eval_shares_text


@dataclass
class LPGConfig(TrainingArguments):
    r"""
    Configuration class for the [`LPGTrainer`].

    This class adds the settings of the perturbations to [`~transformers.TrainingArguments`], whose fields keep their
    defaults. With [`~transformers.HfArgumentParser`] every field is a command-line option. The fields hold only
    strings and numbers. A method with arguments is written as its `repr`, for instance
    `"lpg(strategy='frequency', epsilon=0.3)"`.

    If `perturbations` names the method `lpg` without arguments, the `lpg_*` fields are its arguments. This lets
    `hyperparameter_search` vary them.

    Parameters:
        perturbations (`list[str]`, *optional*, defaults to `["auto"]`):
            The chain of methods, in order. `["auto"]` is the preset that needs no tuning. `["none"]` (or `[]`) trains
            as `Trainer` does.
        log_perturbations (`bool`, *optional*, defaults to `False`):
            Whether all numbers of the perturbations are logged with each training loss, and not only the three that
            `docs/logged_keys.md` marks.
        eval_shares (`str`, *optional*, defaults to `"eval_dataset"`):
            The class shares of the data that the model will meet: `"eval_dataset"`, `"train"`, `"uniform"`, or one
            number per class with commas between them: in the order of the class indices (`"0.9,0.1"`), or with their
            names (`"ham=0.9,spam=0.1"`). A list or an array, and a mapping by name or by index, become such a string.
        track_rows (`bool`, *optional*, defaults to `True`):
            Whether training records how it sees each row, 24 bytes on the host, for [`LPGTrainer.label_issues`].
        lpg_strategy (`str`, *optional*, defaults to `"frequency"`):
            The measure that decides sign and radius of each class: `"frequency"` or `"accuracy"`.
        lpg_epsilon (`float`, *optional*, defaults to `0.1`):
            Largest radius of a class's delta, at least 0, in per-sample units.
        lpg_max_dampening (`float`, *optional*, defaults to `0.5`):
            Largest share of a class's mean gradient that dampening may remove, in (0, 1].
        lpg_direction (`str`, *optional*, defaults to `"class"`):
            Direction of the delta: the mean gradient of the class (`"class"`) or the gradient of each sample
            (`"sample"`).
        lpg_norm (`str`, *optional*, defaults to `"l2"`):
            Norm of the ball: `"l2"` or `"linf"`.
        lpg_solver (`str`, *optional*, defaults to `"closed_form"`):
            How the delta is found: `"closed_form"` or `"pgd"`.
        lpg_warmup_steps (`int`, *optional*, defaults to `0`):
            Number of optimizer steps at the start without perturbation.
        lpg_sync (`bool`, *optional*, defaults to `False`):
            Whether class means are taken over all processes, which sends the logit gradients of every process.

    Raises:
        ValueError: If a method is unknown, an argument is out of range, `eval_shares` are no shares, or an `lpg_*`
            field is set but unused.

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
    log_perturbations: bool = field(
        default=False,
        metadata={"help": "Whether norms, ratios and weights of every method are logged with each training loss."},
    )
    eval_shares: str = field(
        default="eval_dataset",
        metadata={
            "help": "Class shares of the data that the model will meet: eval_dataset, train, uniform, or one number "
            "per class: by name, as in ham=0.9 spam=0.1, or in the order of the class indices, as in 0.9 0.1.",
            "nargs": "+",
        },
    )
    track_rows: bool = field(
        default=True,
        metadata={"help": "Whether training records how it sees each row, for `label_issues` and the report."},
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
        self.eval_shares = eval_shares_text(self.eval_shares)
        if not all(isinstance(entry, str) for entry in self.perturbations):
            raise ValueError(
                f"`perturbations` of a config must be strings, which JSON and the command line can hold; found "
                f"{self.perturbations}. Write the methods as their `repr`, or pass them to LPGTrainer."
            )
        build_chain(self.chain())

    def chain(self, perturbations: Sequence[str | Perturbation] | None = None) -> list[str | Perturbation]:
        """
        Writes the present `lpg_*` fields into a chain, in place of an `lpg` without arguments.

        Args:
            perturbations (`Sequence[str | Perturbation]`, *optional*): The chain. Defaults to `self.perturbations`.

        Returns:
            `list[str | Perturbation]`: The chain.

        Raises:
            ValueError: If an `lpg_*` field is set but the chain has no `lpg` without arguments.
        """
        if perturbations is None:
            perturbations = self.perturbations
            # `hyperparameter_search` turns a string into a list of its letters.
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
