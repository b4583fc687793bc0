"""The report of a training: one HTML page with its figures inside, the figures as PNG and the numbers as CSV."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..summary import TrainingSummary
from ..weak_proxy import WeakProxy


logger = logging.getLogger(__name__)


class Reporter(Protocol):
    """Whatever writes a report of its training, as [`LPGTrainer`] does."""

    def report(self, output_dir: str | Path | None = None, /) -> str: ...


def write_report(
    summary: TrainingSummary, output_dir: str | Path, train_dataset: object = None, tokenizer: object = None
) -> str:
    """
    Writes the report of a training; see [`LPGTrainer.report`], which calls this.

    Args:
        summary ([`TrainingSummary`]): The training.
        output_dir (`str` or `Path`): Where the files go. The folder is made if it does not exist.
        train_dataset (*optional*): The training set, which has the images and texts of the label issues.
        tokenizer (*optional*): Decodes rows that have nothing but tokens.

    Returns:
        `str`: Path of the page, `report.html`.

    Raises:
        ImportError: If matplotlib or Jinja2 are not installed.
    """
    check_installed()
    from .page import write_page
    from .tables import make_tables

    return str(write_page(make_tables(summary), train_dataset, tokenizer, Path(output_dir)))


def check_installed() -> None:
    """
    Checks for the packages that only the report needs.

    Raises:
        ImportError: If matplotlib or Jinja2 are not installed.
    """
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ImportError(f"The report needs {' and '.join(missing)}. Run `pip install {' '.join(missing)}`.")


class ReportCallback(TrainerCallback):
    r"""
    Writes the report when training ends. A report that fails is a warning, and `train` returns all the same.

    Args:
        trainer ([`LPGTrainer`]): The trainer that the callback is added to.
        output_dir (`str`, *optional*): As for [`LPGTrainer.report`].

    Raises:
        ImportError: If matplotlib or Jinja2 are not installed. This is checked before the training.

    Example:

    ```python
    >>> from tempfile import mkdtemp
    >>> from datasets import Dataset
    >>> from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments
    >>> from lpg_hf import LPGTrainer

    >>> model = ResNetForImageClassification(ResNetConfig(num_labels=2, hidden_sizes=[8], depths=[1]))
    >>> dataset = Dataset.from_dict({"pixel_values": [[[[0.0] * 8] * 8] * 3] * 2, "label": [0, 1]})
    >>> args = TrainingArguments(mkdtemp(), report_to=[], use_cpu=True)
    >>> trainer = LPGTrainer(model=model, args=args, train_dataset=dataset)
    >>> trainer.add_callback(ReportCallback(trainer))

    ```
    """

    def __init__(self, trainer: Reporter, output_dir: str | Path | None = None) -> None:
        check_installed()
        self.trainer: Any = WeakProxy(trainer)  # which has this callback
        self.output_dir = output_dir

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        try:
            self.trainer.report(self.output_dir)
        except Exception as error:  # whatever it is, `train` shall return
            logger.warning(
                f"The report could not be written: {error!r}. The training is complete, and `trainer.report()` tries "
                "again.",
                exc_info=True,
            )
