"""The oldest versions of other packages that lpg_hf works with. An older one is refused at import."""

import re
from importlib.metadata import PackageNotFoundError, version


# The packages that an old environment most often holds back. The lower bounds are the ones of pyproject.toml.
# transformers 5.2 to 5.5 divide the loss twice under gradient accumulation.
OLDEST = {"torch": (2, 6), "transformers": (5, 6), "accelerate": (1, 7), "datasets": (4, 0)}


def check_versions() -> None:
    """
    Checks the installed packages by their metadata, without importing them.

    A package without metadata is not checked: it is missing, which its first import says, or it was built by hand.

    Raises:
        ImportError: If a package is too old.
    """
    too_old = {}
    for name, oldest in OLDEST.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        # Two numbers, so that a pre-release ("2.6.0a0+git") counts as its release.
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < oldest:
            too_old[name] = found
    if too_old:
        needed = {name: f"{name}>={'.'.join(map(str, OLDEST[name]))}" for name in too_old}
        found_list = ", ".join(f"{name} {found}" for name, found in too_old.items())
        command = " ".join(f'"{requirement}"' for requirement in needed.values())
        raise ImportError(
            f"lpg_hf needs {', '.join(needed.values())}; found {found_list}. Run `pip install --upgrade {command}`."
        )
