"""ReportsMixin: the report and the model card of a training."""

import itertools
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from ..loss import LPGLoss
from ..model_card import add_section
from ..perturbations import Perturbation
from .summary import summarize_for_report, summarize_training


logger = get_logger(__name__)


# A push to the Hub uploads all of `output_dir` but checkpoints and what begins with an underscore.
REPORT, HIDDEN_REPORT = "report", "_report"
PAGE = "report.html"


def report_folder(args: TrainingArguments) -> Path:
    """Where the report goes. It holds texts or pictures of training rows, which are not for the Hub."""
    return Path(str(args.output_dir), HIDDEN_REPORT if args.push_to_hub else REPORT)


def hide_report(output_dir: str | Path) -> None:
    """
    Renames the report of a training that was not meant for the Hub, before its folder is uploaded after all.

    A hidden report that is there already is kept, as `_report.old1`. A folder without a page is none of a report.
    """
    report, hidden = Path(output_dir, REPORT), Path(output_dir, HIDDEN_REPORT)
    if not (report / PAGE).is_file():
        return
    if hidden.exists():
        numbered = (hidden.with_name(f"{HIDDEN_REPORT}.old{number}") for number in itertools.count(1))
        hidden.rename(next(path for path in numbered if not path.exists()))
    report.rename(hidden)
    logger.warning(f"{report} shows texts or pictures of training rows. It is {hidden} now, which is not uploaded.")


class ReportsMixin(Trainer):
    """
    Adds `report` to a [`~transformers.Trainer`], and a section on the perturbations to its model card. A push to the
    Hub leaves the report out.
    """

    # Whether `push_to_hub` was called: an upload may still be reading the folder.
    _lpg_has_pushed = False

    def _lpg_built_loss(self) -> LPGLoss | None:
        """The perturbed loss, if it is built."""
        raise NotImplementedError

    def _lpg_active_methods(self) -> list[Perturbation]:
        """The methods of the chain that act on this model, in their order."""
        raise NotImplementedError

    def _lpg_norms(self) -> list[dict[str, float]]:
        """The mean norms of the gradient and of the deltas at each log."""
        raise NotImplementedError

    def _lpg_ranked_rows(self) -> Dataset:
        """The table of label issues."""
        raise NotImplementedError

    def report(self, output_dir: str | Path | None = None) -> str:
        """
        Writes a report of the training: an HTML page with its figures inside, the figures as PNG and all numbers as
        CSV (`label_issues.csv`, `classes.csv`, `confusion.csv`, `calibration.csv`, `norms.csv`).

        The report predicts `eval_dataset` once (the first one of a dict). A section that cannot be made says why. With
        several processes all must call this method, and the main one writes.

        Args:
            output_dir (`str` or `Path`, *optional*):
                The folder of the files. Defaults to `report` in `output_dir`. With `push_to_hub` it is `_report`,
                which is not uploaded: the report shows texts or pictures of training rows. Where
                `trainer.push_to_hub()` finds a `report`, it renames it to `_report`, with a warning. All else in
                `output_dir` is uploaded, also a report in another folder.

        Returns:
            `str`: Path of the page, `report.html`.

        Raises:
            ImportError: If matplotlib or Jinja2 are not installed: `pip install matplotlib jinja2`.
            ValueError: Before training.
        """
        # Imported here because the report needs optional packages.
        from ..report import check_installed, write_report

        check_installed()
        methods = self._lpg_active_methods()
        summary = summarize_for_report(self, self._lpg_built_loss(), methods, self._lpg_norms(), self._lpg_ranked_rows)
        default = Path(str(self.args.output_dir), HIDDEN_REPORT) if self._lpg_has_pushed else report_folder(self.args)
        folder = default if output_dir is None else Path(output_dir)
        if self.is_world_process_zero():
            write_report(summary, folder, self.train_dataset, self.processing_class)
        return str(folder / PAGE)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Pushes to the Hub as the Trainer does, without the report: it shows texts or pictures of training rows."""
        self._lpg_has_pushed = True
        if self.is_world_process_zero():
            hide_report(str(self.args.output_dir))
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # In a training that pushes, the folder may have the report of an earlier one. There is no public hook.
        if self.is_world_process_zero():
            hide_report(str(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """
        Writes the Trainer's model card, with tags and a section on the perturbations: methods, settings, classes, and
        the `certificate.json` in the output folder if it belongs to the model's weights (a warning says if it does
        not). Without perturbations it is the Trainer's card. A section that cannot be written is a warning.
        """
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            try:
                methods = self._lpg_active_methods()
                summary = summarize_training(self, self._lpg_built_loss(), methods, self._lpg_norms())
                add_section(summary, self.accelerator.unwrap_model(self.model))
            except Exception as error:  # a push to the Hub in a training writes a card, and must not end it
                logger.warning(
                    f"The model card has no section on the perturbations, because it could not be written: {error!r}.",
                    exc_info=True,
                )
