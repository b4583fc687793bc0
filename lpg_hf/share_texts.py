"""The class shares of the evaluation as users write them: as text for command line and JSON, or as numbers."""

import json
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .class_shares import Keyed


EVAL_DATASET, TRAIN, UNIFORM = "eval_dataset", "train", "uniform"

NamedShares = Mapping[str, float] | Mapping[int, float] | Mapping[str | int, float]
EvalShares = str | Sequence[float] | NamedShares

LONGEST_SHOWN = 200


def read_eval_shares(text: str) -> EvalShares:
    """
    Reads the form that command line and JSON use: a word, or shares with commas between them, with the names of their
    classes or without. Names that have commas themselves need a JSON object.

    Raises:
        ValueError: If it is none of these.

    Example:

    ```python
    >>> read_eval_shares("uniform"), read_eval_shares("0.9, 0.1")
    ('uniform', [0.9, 0.1])
    >>> read_eval_shares("ham=0.9, spam=0.1") == read_eval_shares('{"ham": 0.9, "spam": 0.1}')
    True

    ```
    """
    if text in (EVAL_DATASET, TRAIN, UNIFORM):
        return text
    try:
        if text.startswith("{"):
            pairs = json.loads(text, object_pairs_hook=list)
        elif "=" in text:
            pairs = [(name.strip(), share) for name, _, share in (part.rpartition("=") for part in text.split(","))]
        else:
            return [float(part) for part in text.split(",")]
        shares = {name: float(share) for name, share in pairs}
        if "" in shares or len(shares) < len(pairs):
            raise ValueError("a number without a name, or a name twice")
        return shares
    except (TypeError, ValueError):
        raise ValueError(
            f"`eval_shares` is {_shown(text)}. Use 'eval_dataset', 'train', 'uniform', or one number per class with "
            "commas between them: 0.9,0.1 in the order of the classes, or ham=0.9,spam=0.1 with each name once. If "
            """names have commas, write '{"a, b": 0.9, "c": 0.1}'."""
        ) from None


def plain_shares(shares: Any) -> EvalShares:
    """
    Shares in Python's own types, from whatever holds them: lists, arrays, tensors, mappings, or a Series of pandas,
    which is a mapping by its index.

    Args:
        shares: A text stays as it is. Texts in a list, as the command line has them, become one.

    Raises:
        ValueError: If they are no numbers, or keys are neither names nor indices of classes.

    Example:

    ```python
    >>> import numpy as np
    >>> plain_shares(np.array([0.75, 0.25])), plain_shares({"ham": np.float32(0.75), "spam": 0.25})
    ([0.75, 0.25], {'ham': 0.75, 'spam': 0.25})

    ```
    """
    if isinstance(shares, str):
        return shares
    if isinstance(shares, Keyed):
        pairs = list(shares.items())
        named = {_key(key, shares): _number(share, shares) for key, share in pairs}
        if len(named) < len(pairs) or not pairs:
            raise _unusable(shares, "has a class twice" if pairs else "has no number per class")
        return named
    try:
        values: list[Any] = list(shares)
    except TypeError:  # a single number, also as an array without dimensions
        values = []
    if not values:
        raise _unusable(shares, "has no number per class")
    if all(isinstance(value, str) for value in values):
        return ",".join(values)
    return [_number(value, shares) for value in values]


def eval_shares_text(shares: object) -> str:
    """
    The text that [`read_eval_shares`] reads, for a config.

    Args:
        shares: What [`plain_shares`] takes. Indices of classes must be all from 0 on: a text does not tell an index
            from the name of a class that is called by a number.

    Raises:
        ValueError: If it is nothing of this.

    Example:

    ```python
    >>> eval_shares_text({1: 0.25, 0: 0.75}), eval_shares_text({"ham": 0.75, "spam": 0.25})
    ('0.75,0.25', '{"ham": 0.75, "spam": 0.25}')

    ```
    """
    plain = plain_shares(shares)
    if isinstance(plain, Mapping):
        if not any(isinstance(key, int) for key in plain):
            text = json.dumps(plain)
        elif set(plain) == set(range(len(plain))):
            text = ",".join(repr(share) for _, share in sorted(plain.items()))
        else:
            raise _unusable(
                shares,
                f"has not the class indices 0 to {len(plain) - 1}",
                "If classes are called by numbers, put these in quotes.",
            )
    else:
        text = plain if isinstance(plain, str) else ",".join(map(repr, plain))
    read_eval_shares(text)
    return text


def _key(key: object, shares: object) -> str | int:
    if isinstance(key, bool | np.bool_):
        raise _unusable(
            shares,
            f"has the key {key!r}",
            "A class that is called on, off, yes, no, true or false needs quotes in YAML and Python.",
        )
    if isinstance(key, numbers.Integral):
        return int(key)
    if isinstance(key, str):
        return str(key)
    raise _unusable(shares, f"has the key {key!r}")


def _number(share: Any, shares: object) -> float:
    try:
        if np.ndim(share) == 0:
            return float(share)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise _unusable(shares, f"has the share {_shown(share)}, which is no number")


def _unusable(shares: object, problem: str, more: str = "") -> ValueError:
    return ValueError(
        f"`eval_shares` is {_shown(shares)}, which {problem}. Use 'eval_dataset', 'train', 'uniform', or one number "
        "per class: [0.9, 0.1] in the order of the classes, or by name, as in {'ham': 0.9, 'spam': 0.1}. "
        f"{more}".rstrip()
    )


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
