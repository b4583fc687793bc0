"""The report of a training: one HTML page with its figures inside, the figures as PNG and the numbers as CSV."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


if TYPE_CHECKING:
    from ..trainer import LPGTrainer


def write_report(trainer: "LPGTrainer", output_dir: str | Path | None = None) -> str:
    """
    Writes the report of a training that is over; see [`LPGTrainer.report`], which calls this.

    Raises:
        ImportError: Without matplotlib or Jinja2.
        ValueError: Before training.
    """
    check_installed()
    from .page import write_page
    from .tables import collect_tables

    folder = Path(trainer.args.output_dir) / "report" if output_dir is None else Path(output_dir)
    # Every process takes part in collecting, one writes.
    tables = collect_tables(trainer)
    if trainer.is_world_process_zero():
        write_page(tables, trainer.train_dataset, trainer.processing_class, folder)
    return str(folder / "report.html")


def check_installed() -> None:
    """
    Raises:
        ImportError: Without matplotlib or Jinja2.
    """
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ImportError(f"The report needs {' and '.join(missing)}: `pip install lpg_hf[report]`.")


class ReportCallback(TrainerCallback):
    r"""
    Writes the report when training ends.

    Args:
        trainer ([`LPGTrainer`]): The trainer it is added to.
        output_dir (`str`, *optional*): As for [`LPGTrainer.report`].

    Raises:
        ImportError: Without matplotlib or Jinja2: at once, and not after hours of training.

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

    def __init__(self, trainer: "LPGTrainer", output_dir: str | Path | None = None):
        check_installed()
        self.trainer = trainer
        self.output_dir = output_dir

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.trainer.report(self.output_dir)
