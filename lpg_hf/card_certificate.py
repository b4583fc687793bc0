"""The certificate of a model card: shown only if it belongs to the weights of the model."""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .weights_hash import weights_hash


logger = logging.get_logger(__name__)


def read_certificate(path: Path, model: nn.Module) -> dict[str, Any] | None:
    """
    Reads a certificate for the card of a model.

    A file that cannot be shown is named in a warning, because a card should not fail after a long training.

    Args:
        path (`Path`): The file, if there is one.
        model (`torch.nn.Module`): The model of the card.

    Returns:
        `dict`, *optional*: The entries of the certificate; `None` if there is none for these weights.
    """
    if not path.exists():
        return None
    # Imported here because most trainings have no certificate.
    from .pac_bayes.certificate import Certificate

    try:
        certificate = Certificate.load(path)
    except (OSError, ValueError) as error:
        logger.warning(f"The model card shows no certificate. {error}")
        return None
    if certificate.weights_hash is None:
        problem = "does not say which weights it belongs to (it is from an older version)"
    elif certificate.weights_hash == _hash_if_readable(model):
        return json.loads(path.read_text(encoding="utf-8"))
    else:
        problem = "belongs to other weights than those of the model"
    logger.warning(f"The model card shows no certificate, because {path} {problem}. Certify the model as it is now.")
    return None


def _hash_if_readable(model: nn.Module) -> str | None:
    try:
        return weights_hash(model)
    except RuntimeError:  # weights that are not here, such as those of other processes
        return None
