"""The methods that the benchmark compares, and the variants of `auto` for the ablation: one table."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lpg_hf.perturbations import METHODS as REGISTRY
from lpg_hf.perturbations import Perturbation, build_chain


# What a method is to the comparison: Trainer; Trainer on other labels than the noisy ones; what others have proposed;
# parts of this library; its preset; the preset on top of a rival; the preset with one thing changed.
BASELINE, REFERENCE, RIVAL, OURS, AUTO, PLUG_IN, ABLATION = (
    "baseline",
    "reference",
    "rival",
    "ours",
    "auto",
    "plug-in",
    "ablation",
)

Edit = Callable[[list[Perturbation]], list[Perturbation]]


@dataclass(frozen=True)
class Method:
    """
    One line of the tables.

    Args:
        name (`str`): How the command line and the results write it.
        label (`str`): How tables and figures write it.
        role (`str`): One of the roles above.
        chain (`tuple[str, ...]`):
            The perturbations; `{value}` stands for the hyper-parameter, `{dampen_all}` for a -1 per class.
        usual (`float`, *optional*): The value of the hyper-parameter that people take without tuning.
        grid (`tuple[float, ...]`): The values that tuning chooses from, the usual one among them.
        base (`str`, *optional*): The method that a plug-in stands on.
        edit (`Callable`, *optional*): Changes the chain, for the ablation.
        constants (`dict[str, object]`):
            Constants of the library with another value, for the ablation, as `"module.NAME"`.
        labels (`str`):
            Which training labels it gets: `"noisy"`; `"clean"`; `"right"`, the noisy ones without the wrong ones; or
            `"believed"`, the noisy ones without those that a finished training with `auto` contradicts.
        is_told_shares (`bool`):
            Whether it is told the class shares of the test set. Otherwise it takes those of the training set.
    """

    name: str
    label: str
    role: str
    chain: tuple[str, ...] = ()
    usual: float | None = None
    grid: tuple[float, ...] = ()
    base: str | None = None
    edit: Edit | None = None
    constants: dict[str, object] = field(default_factory=dict)
    labels: str = "noisy"
    is_told_shares: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the plain Trainer trains it."""
        return self.role in (BASELINE, REFERENCE)

    @property
    def usual_value(self) -> str:
        """The usual value as the results write it; empty for a method without one."""
        return _as_text(self.usual)

    def values(self, tune: bool) -> list[str]:
        """The values to run."""
        return [_as_text(value) for value in self.grid] if tune and self.grid else [self.usual_value]

    def perturbations(self, value: str, class_counts: Sequence[int]) -> list[Perturbation]:
        """The chain with one value, on data with these class counts."""
        texts = [text.format(value=value, dampen_all=[-1] * len(class_counts)) for text in self.chain]
        chain = build_chain(texts)
        return self.edit(chain) if self.edit else chain


def _as_text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def without(*names: str) -> Edit:
    """Takes methods out of the chain."""
    return lambda chain: [method for method in chain if method.name not in names]


def with_arguments(name: str, **arguments: object) -> Edit:
    """Changes arguments of one method of the chain, where the chain has it."""

    def edit(chain: list[Perturbation]) -> list[Perturbation]:
        return [_rebuilt(method, arguments) if method.name == name else method for method in chain]

    return edit


def _rebuilt(method: Perturbation, arguments: dict[str, object]) -> Perturbation:
    # Every method keeps the arguments of its `__init__` under their names.
    names = [name for name in inspect.signature(type(method).__init__).parameters if name != "self"]
    return type(method)(**({name: getattr(method, name) for name in names} | arguments))


def _plug_in(base: str, label: str, call: str) -> Method:
    return Method(f"auto_on_{base}", f"auto on {label}", PLUG_IN, (call, "auto"), base=base)


_BENCHMARK = (
    Method("ce", "Trainer (cross-entropy)", BASELINE),
    Method("clean_labels", "Trainer on clean labels", REFERENCE, labels="clean"),
    Method(
        "label_smoothing", "label smoothing", RIVAL, ("label_smoothing(alpha={value})",), 0.1, (0.05, 0.1, 0.2, 0.4)
    ),
    Method("class_weighting", "class weights, balanced", RIVAL, ("class_weighting",)),
    Method(
        "effective_number",
        "class weights, effective number",
        RIVAL,
        ("class_weighting(weights='effective', beta={value})",),
        0.999,
        (0.9, 0.99, 0.999, 0.9999),
    ),
    Method(
        "logit_adjustment", "logit adjustment", RIVAL, ("logit_adjustment(tau={value})",), 1.0, (0.5, 1.0, 1.5, 2.0)
    ),
    Method("focal_loss", "focal loss", RIVAL, ("focal_loss(gamma={value})",), 2.0, (0.5, 1.0, 2.0, 5.0)),
    Method(
        "gce",
        "generalized cross-entropy",
        RIVAL,
        ("generalized_cross_entropy(q={value})",),
        0.7,
        (0.1, 0.3, 0.5, 0.7),
    ),
    Method(
        "logit_clipping", "logit clipping", RIVAL, ("logit_clipping(max_norm={value})",), 0.3, (0.1, 0.3, 0.5, 0.8)
    ),
    # Trainer itself clips at 1.
    Method(
        "gradient_clipping",
        "global clipping",
        RIVAL,
        ("gradient_clipping(max_norm={value})",),
        1.0,
        (0.03, 0.1, 0.3, 1.0),
    ),
    Method(
        "gradient_noise", "gradient noise", RIVAL, ("gradient_noise(eta={value})",), 0.01, (1e-6, 1e-5, 1e-4, 0.01)
    ),
    Method("logit_noise", "logit noise", RIVAL, ("logit_noise(sigma={value})",), 0.1, (0.03, 0.1, 0.3, 1.0)),
    Method("sam", "SAM", RIVAL, ("sam(rho={value})",), 0.05, (0.02, 0.05, 0.1, 0.2)),
    Method("lpl", "LPL", RIVAL, ("lpl(epsilon={value})",), 1.0, (0.3, 1.0, 2.0, 4.0)),
    Method(
        "lpg_frequency",
        "LPG, frequency",
        OURS,
        ("lpg(strategy='frequency', epsilon={value})",),
        0.1,
        (0.03, 0.1, 0.2, 0.4),
    ),
    Method(
        "lpg_accuracy",
        "LPG, accuracy",
        OURS,
        ("lpg(strategy='accuracy', epsilon={value})",),
        0.1,
        (0.03, 0.1, 0.2, 0.4),
    ),
    Method(
        "lpg_fixed",
        "LPG, fixed: all dampened",
        OURS,
        ("lpg(strategy='fixed', epsilon={value}, signs={dampen_all})",),
        0.1,
        (0.03, 0.1, 0.2, 0.4),
    ),
    Method(
        "class_relative_dampening",
        "class-relative dampening",
        OURS,
        ("class_relative_dampening(power={value})",),
        2.0,
        (1.0, 2.0, 4.0, 8.0),
    ),
    Method("auto", "auto", AUTO, ("auto",)),
    Method("auto_without_eval", "auto without an evaluation set", OURS, ("auto",), is_told_shares=False),
    _plug_in("label_smoothing", "label smoothing", "label_smoothing"),
    _plug_in("class_weighting", "class weights", "class_weighting"),
    _plug_in("effective_number", "effective number", "class_weighting(weights='effective')"),
    _plug_in("logit_adjustment", "logit adjustment", "logit_adjustment"),
    Method("auto_on_focal_loss", "auto on focal loss", PLUG_IN, ("auto", "focal_loss"), base="focal_loss"),
)

# How much can be won back by leaving rows out? With perfect knowledge, and with that of a finished training.
_CEILINGS = (
    Method("right_labels", "Trainer without the wrong labels", REFERENCE, labels="right"),
    Method("believed_labels", "Trainer without what auto contradicts", REFERENCE, labels="believed"),
)

_AUTO_DAMPENING = "class_relative_dampening"


def _variant(name: str, label: str, edit: Edit | None = None, chain: tuple[str, ...] = ("auto",), **kwargs) -> Method:
    return Method(name, label, ABLATION, chain, edit=edit, **kwargs)


def _lpg_step(name: str, label: str, call: str) -> Method:
    return _variant(name, label, chain=("auto", call))


_ABLATION = (
    _variant("auto-adjustment", "without logit adjustment", without("logit_adjustment")),
    _variant("target=uniform", "adjusted to all classes alike", with_arguments("logit_adjustment", target="uniform")),
    _variant("auto-weights", "without weights at first", with_arguments("logit_adjustment", learned=None)),
    *(
        _variant(f"weights={low}..{high}", f"weights until learned = {low} to {high}", edit)
        for low, high in ((0.0, 0.2), (0.05, 0.3), (0.2, 0.5))
        for edit in [with_arguments("logit_adjustment", learned=(low, high))]
    ),
    _variant("auto-dampening", "without dampening", without(_AUTO_DAMPENING)),
    # The narrowest interval opens the gate at once.
    _variant("auto-learned", "without the gate 'learned'", with_arguments(_AUTO_DAMPENING, learned=(0.0, 1e-9))),
    _variant("auto-evidence", "without the gate 'evidence'", with_arguments(_AUTO_DAMPENING, evidence=(0.0, 1e-9))),
    # No fit excess is above 1.
    _variant("auto-memorizing", "without 'memorizing'", constants={"noise_evidence.EXCESS": (1.0, 2.0)}),
    *(
        _variant(f"power={value}", f"power q = {value}", with_arguments(_AUTO_DAMPENING, power=value))
        for value in (1.0, 4.0)
    ),
    *(
        _variant(
            f"least={value}",
            f"least weight {value} at first",
            constants={"perturbations.class_relative_dampening.LEAST_WEIGHT": value},
        )
        for value in (0.0, 0.5)
    ),
    *(
        _variant(f"learned={low}..{high}", f"learned = {low} to {high}", edit)
        for low, high in ((0.1, 0.5), (0.2, 0.8))
        for edit in [with_arguments(_AUTO_DAMPENING, learned=(low, high))]
    ),
    *(
        _variant(f"evidence={low}..{high}", f"evidence = {low} to {high}", edit)
        for low, high in ((0.5, 1.0), (2.0, 4.0))
        for edit in [with_arguments(_AUTO_DAMPENING, evidence=(low, high))]
    ),
    *(
        _variant(f"ema={value}", f"EMA constant = {value}", constants={"class_means.INERTIA": value})
        for value in (5, 80)
    ),
    *(
        _variant(
            f"exponent={value}",
            f"pi_out ~ pi_eval ^ {value}",
            constants={"perturbations.logit_adjustment.OUTPUT_EXPONENT": value},
        )
        for value in (0.5, 0.8)
    ),
    *(
        _variant(f"tau={value}", f"tau = {value}", with_arguments("logit_adjustment", tau=value))
        for value in (0.5, 1.5, 2.0)
    ),
    _lpg_step("+lpg", "with LPG: eps 0.1, kappa 0.5", "lpg"),
    *(_lpg_step(f"+lpg_eps={value}", f"with LPG: eps {value}", f"lpg(epsilon={value})") for value in (0.03, 0.3)),
    *(
        _lpg_step(f"+lpg_kappa={value}", f"with LPG: kappa {value}", f"lpg(max_dampening={value})")
        for value in (0.25, 1.0)
    ),
    _lpg_step("+lpg_sample", "with LPG: sample direction", "lpg(direction='sample')"),
    _lpg_step("+lpg_linf", "with LPG: l_inf", "lpg(norm='linf')"),
    _lpg_step("+lpg_pgd", "with LPG: PGD", "lpg(solver='pgd')"),
    *(
        _lpg_step(f"+lpg_warmup={value}", f"with LPG: {value} warmup steps", f"lpg(warmup_steps={value})")
        for value in (50, 200)
    ),
)

# Methods of the library without a line above take part with their defaults.
_NAMED = {text.partition("(")[0] for method in _BENCHMARK for text in method.chain}
_OTHERS = tuple(Method(name, name.replace("_", " "), OURS, (name,)) for name in REGISTRY if name not in _NAMED)

METHODS = {method.name: method for method in _BENCHMARK + _OTHERS + _CEILINGS + _ABLATION}
BENCHMARK = tuple(method.name for method in _BENCHMARK + _OTHERS)
ABLATIONS = ("ce", "clean_labels", "auto", *(method.name for method in _ABLATION))


def check_methods(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: If a name is none of [`METHODS`].
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        ceilings = [method.name for method in _CEILINGS]
        raise ValueError(
            f"`methods` has the unknown {', '.join(map(repr, unknown))}. The known ones are "
            f"{', '.join([*BENCHMARK, *ceilings])}; for the ablation {', '.join(ABLATIONS[3:])}."
        )
