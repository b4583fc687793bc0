"""The registry: methods and chains read from text, and the cards."""

import inspect
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_batches import more_examples
from method_examples import variants

from lpg_hf.perturbations import (
    LPG,
    METHODS,
    SAM,
    ClassRelativeDampening,
    LogitClipping,
    Perturbation,
    build_chain,
    method_card,
    parse_perturbation,
)


# A method and its text.


def arguments(method):
    return {name: getattr(method, name) for name in inspect.signature(type(method)).parameters}


@pytest.mark.parametrize("example", variants(), ids=repr)
def test_a_method_is_read_back_from_its_repr(example):
    again = parse_perturbation(repr(example))
    assert type(again) is type(example)
    assert arguments(again) == arguments(example)
    assert repr(again) == repr(example)


@pytest.mark.parametrize("name", METHODS)
def test_a_bare_name_empty_brackets_and_blanks_mean_the_defaults(name):
    required = [p for p in inspect.signature(METHODS[name]).parameters.values() if p.default is p.empty]
    assert not required
    for text in (name, f"{name}()", f"  {name} ( ) "):
        method = parse_perturbation(text)
        assert type(method) is METHODS[name]
        assert arguments(method) == {p.name: p.default for p in inspect.signature(METHODS[name]).parameters.values()}
        assert repr(method) == f"{name}()"


def test_repr_shows_only_what_is_off_its_default():
    assert repr(LPG("accuracy", epsilon=0.1, warmup_steps=5)) == "lpg(strategy='accuracy', warmup_steps=5)"
    assert repr(LPG("frequency")) == "lpg()"


@more_examples
@given(
    epsilon=st.floats(0, 1e6),
    max_dampening=st.floats(0, 1, exclude_min=True),
    warmup_steps=st.integers(0, 10**9),
    signs=st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=4),
)
def test_any_numbers_survive_the_repr(epsilon, max_dampening, warmup_steps, signs):
    method = LPG("fixed", epsilon, max_dampening, warmup_steps=warmup_steps, signs=signs)
    assert arguments(parse_perturbation(repr(method))) == arguments(method)


@pytest.mark.parametrize(
    "method",
    [
        LPG(epsilon=np.float64(0.3)),
        LPG("fixed", signs=np.array([1, -1]), bounds=np.array([0.1, 0.2])),
        ClassRelativeDampening(learned=[0.2, 0.6]),
    ],
    ids=["scalar", "array", "list"],
)
def test_numpy_numbers_and_lists_survive_the_repr_too(method):
    assert arguments(parse_perturbation(repr(method))) == arguments(method)


# Cards.


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_complete_card(name):
    card = method_card(METHODS[name])
    assert list(card) == ["Level", "Formula", "Helps", "Hurts", "Cost", "Source"]
    assert all(len(text) > 3 for text in card.values())
    assert card["Level"].split()[0].strip(".,") in ("class", "sample", "batch")


# Chains.


def reprs(chain):
    methods = build_chain(chain)
    assert isinstance(methods, list)
    assert all(isinstance(method, Perturbation) for method in methods)
    return [repr(method) for method in methods]


@pytest.mark.parametrize("nothing", ["none", ["none"], ("none",), [], ()])
def test_none_and_an_empty_sequence_are_an_empty_chain(nothing):
    assert reprs(nothing) == []


def test_strings_and_objects_keep_their_order_and_objects_their_identity():
    clipping = LogitClipping(0.5)
    chain = build_chain(["lpg(epsilon=0.3)", clipping, "logit_adjustment"])
    assert [repr(method) for method in chain] == [
        "lpg(epsilon=0.3)",
        "logit_clipping(max_norm=0.5)",
        "logit_adjustment()",
    ]
    assert chain[1] is clipping


def test_a_single_string_or_object_is_a_chain_of_one():
    clipping = LogitClipping()
    assert build_chain(clipping)[0] is clipping
    assert reprs(clipping) == reprs("logit_clipping") == ["logit_clipping()"]


def test_a_chain_may_have_methods_for_the_parameters():
    assert reprs(["sam(rho=0.1)", SAM(), "lpg"]) == ["sam(rho=0.1)", "sam()", "lpg()"]


@pytest.mark.parametrize("entry", [3, None, 0.5, LPG])
def test_entries_that_are_not_methods_are_refused(entry):
    message = f"`perturbations` takes methods .*strings .*found {re.escape(repr(entry))}"
    with pytest.raises(TypeError, match=message):
        build_chain(["lpg", entry])


# Errors.


@pytest.mark.parametrize("text", ["sma", "LPG", "lpgg(epsilon=0.1)", "print", "print('x')", "eval('1')", "auto()"])
def test_unknown_names_are_refused_with_the_known_ones(text):
    name = text.partition("(")[0]
    known = ", ".join(["auto", "none", *sorted(METHODS)])
    with pytest.raises(ValueError, match=f"Unknown perturbation '{name}'\\. The known ones are {known}\\."):
        build_chain(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "lpg(",
        "lpg)",
        "lpg lpg",
        "lpg; lpg",
        "lpg, lpg",
        "lpg.delta",
        "lpg()()",
        "[lpg]",
        "3",
        "lpg = 3",
        "lpg(epsilon=epsilon)",
        "lpg(epsilon=0.1 if True else 0.2)",
        "lpg(epsilon=2 * 0.1)",
        "lpg(*['frequency'])",
        "lpg({[]: 1})",
    ],
)
def test_text_that_cannot_be_read_is_refused_with_an_example(text):
    message = f"Cannot read the perturbation {re.escape(repr(text))}: write a name, or a call with literal arguments"
    with pytest.raises(ValueError, match=message):
        parse_perturbation(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('{command}')",
        "lpg(epsilon=__import__('os').system('{command}'))",
        "lpg(__import__('os').system('{command}'))",
        "lpg(signs=[__import__('os').system('{command}')])",
        "lpg(**__import__('os').system('{command}'))",
        "(lambda: __import__('os').system('{command}'))()",
        "lpg(epsilon=(lambda: __import__('os').system('{command}'))())",
        "[__import__('os').system('{command}') for _ in [1]]",
        'lpg(strategy=f\'{{__import__("os").system("{command}")}}\')',
        "exec(\"__import__('os').system('{command}')\")",
    ],
)
def test_nothing_in_a_string_is_evaluated(text, tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(ValueError, match="perturbation"):
        build_chain([text.format(command=f"touch {trace}")])
    assert not trace.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lpg(nope=1)",
            r"Cannot build the perturbation 'lpg\(nope=1\)': .*'nope'. Its arguments: strategy, epsilon,",
        ),
        ("logit_adjustment(1, 2, (0.1, 0.2), 4)", r"Cannot build the perturbation 'logit_adjustment.*positional"),
        ("lpg('frequency', strategy='fixed')", r"Cannot build the perturbation .*multiple values .*'strategy'"),
        ("lpg(epsilon='large')", r"Cannot build the perturbation \"lpg\(epsilon='large'\)\": .*'str'"),
        ("lpg(epsilon=-1)", r"`epsilon` must be at least 0; found -1"),
    ],
)
def test_arguments_that_are_not_the_methods_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_perturbation(text)
