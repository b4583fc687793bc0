"""The message for a mistyped name. Nothing is imported here that a help would have to wait for."""

import difflib
from collections.abc import Iterable


def closest(kind: str, name: str, known: Iterable[str]) -> str:
    """
    The message for a name that there is not, with the ones that may have been meant.

    Example:

    ```python
    >>> closest("argument", "--lable_noise", ["--label_noise", "--report"])
    'unknown argument --lable_noise. Did you mean --label_noise?'
    >>> closest("command", "evaluate", ["train", "report"])
    'unknown command evaluate. There are: train, report.'

    ```
    """
    names, name = list(known), name.partition("=")[0]
    similar = [known_name for known_name in names if known_name.startswith(name)][:3]
    similar = similar or difflib.get_close_matches(name, names, n=3)
    if not similar and len(names) < 10:
        return f"unknown {kind} {name}. There are: {', '.join(names)}."
    return f"unknown {kind} {name}." + (f" Did you mean {' or '.join(similar)}?" if similar else "")
