"""Files of tensors in a checkpoint: written with a checksum, and read only if every value is as it was written."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


# Changes with the meaning of what is written.
FORMAT = "2"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """
    Writes a safetensors file whose metadata has a checksum of all names, values and entries.

    Args:
        path (`Path`): The file.
        tensors (`Mapping[str, torch.Tensor]`): The tensors, on any device.
        metadata (`Mapping[str, str]`): Further entries.
    """
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {**metadata, "format": FORMAT}
    save_file(saved, path, metadata=entries | {"checksum": _checksum(saved, entries)})


def read_tensors(path: Path, contents: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """
    Reads a file of [`write_tensors`].

    Args:
        path (`Path`): The file.
        contents (`str`): What starts anew without it, for the message.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, str]]`: The tensors, and the other entries of the metadata.

    Raises:
        ValueError: If the file is damaged or was changed, or comes from a version without checksums.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entries = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise damaged(path, f"it is no whole safetensors file ({error})", contents) from error
    checksum = entries.pop("checksum", None)
    if checksum is None or entries.get("format") != FORMAT:
        problem = "it has no checksum, or that of another version of lpg_hf, with which the training can be resumed"
        raise damaged(path, problem, contents)
    if checksum != _checksum(tensors, entries):
        raise damaged(path, "its checksum does not fit its content, so it was changed after it was written", contents)
    del entries["format"]
    return tensors, entries


def damaged(path: Path, problem: str, contents: str) -> ValueError:
    """The error for a file that cannot be used: what is wrong with it, and what to do."""
    return ValueError(
        f"{path} cannot be read: {' '.join(problem.split())}. Resume from an older checkpoint. Or delete this file to "
        f"resume without it: {contents} then starts anew."
    )


def find_misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """
    Compares names, shapes and kinds of tensors with those that belong there.

    Returns:
        `str` or `None`: What does not fit.

    Example:

    ```python
    >>> import torch
    >>> find_misfit({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
    'a is torch.float32 of shape [2] instead of torch.float32 of shape [3]'

    ```
    """
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        return f"{missing[0]} is missing"
    if unknown:
        return f"{unknown[0]} does not belong there"
    for name, tensor in expected.items():
        if _kind(found[name]) != _kind(tensor) or found[name].shape != tensor.shape:
            return f"{name} is {_describe(found[name])} instead of {_describe(tensor)}"
    return None


def find_bad_value(tensors: Mapping[str, Tensor], may_be_negative: Iterable[str] = ()) -> str | None:
    """Says which tensor has NaN, or negative entries though it is none of `may_be_negative`."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            return f"{name} has NaN"
        if name not in may_be_negative and not tensor.is_complex() and bool((tensor < 0).any()):
            return f"{name} has negative entries"
    return None


def _kind(tensor: Tensor) -> str:
    # The precision may change between two runs.
    return "float" if tensor.is_floating_point() else str(tensor.dtype)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"


def _checksum(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
