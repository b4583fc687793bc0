"""Whether results can be written, found out before the work. Nothing is imported that a help has to wait for."""

import os
from pathlib import Path


def why_not_writable(folder: str | Path) -> str | None:
    """
    What is wrong with a folder of results, which may not exist yet.

    Args:
        folder (`str` or `Path`): The folder. Nothing is made.

    Returns:
        `str` or `None`: The end of a sentence with the cure; `None` if files can be written there.

    Example:

    ```python
    >>> why_not_writable("."), why_not_writable("")
    (None, 'which is no name. Pass a folder.')
    >>> why_not_writable(__file__)
    'which is a file. Pass a folder.'

    ```
    """
    if not str(folder).strip():
        return "which is no name. Pass a folder."
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        return "which is a file. Pass a folder." if there == path else f"but {there} is a file. Pass another folder."
    if not os.access(there, os.W_OK | os.X_OK):
        return f"but nothing can be written into {there}. Pass another folder, or change its permissions."
    return None


def check_writable(argument: str, folder: str | Path) -> None:
    """
    Raises:
        ValueError: If files cannot be written into the folder that an argument names.
    """
    if problem := why_not_writable(folder):
        raise ValueError(f"`{argument}` is {str(folder)!r}, {problem}")
