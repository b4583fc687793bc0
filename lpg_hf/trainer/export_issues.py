"""The label issues of a training that has ended, out of what is in its output folder."""

import json
import shutil
from pathlib import Path

from accelerate.logging import get_logger
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from ..data.issues_csv import check_replaceable, read_table, write_issues
from ..row_records import TrainingDynamics
from ..safe_text import unique_names
from .complete_checkpoints import last_complete_checkpoint
from .row_file import ROWS_FILE, load_rows


logger = get_logger(__name__)

# Where `report` and whoever calls `write_issues` put them.
ISSUES_FILES = ("report/label_issues.csv", "_report/label_issues.csv", "label_issues.csv")


def export_issues(output_dir: str | Path, path: str | Path) -> int:
    """
    Writes the label issues of a training to a CSV file, in the form of [`~data.write_issues`].

    They come from `label_issues.csv` in the output folder or in its report, or else from the newest complete
    checkpoint, which has no texts. What was written last counts.

    Args:
        output_dir (`str` or `Path`): The `output_dir` of the training.
        path (`str` or `Path`): The file. One of label issues without a fix is replaced.

    Returns:
        `int`: The number of rows in it.

    Raises:
        ValueError: If there is nothing to export, or if there is a file at `path` with fixes, or of something else.
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Pass the `output_dir` of a training.")
    files = [folder / name for name in ISSUES_FILES if (folder / name).is_file()]
    try:
        checkpoint = last_complete_checkpoint(folder)
    except ValueError:  # all are incomplete
        checkpoint = None
    if checkpoint is not None and (Path(checkpoint) / ROWS_FILE).is_file():
        files.append(Path(checkpoint) / ROWS_FILE)
    if not files:
        raise ValueError(
            f"There are no label issues in {folder}: neither {' nor '.join(ISSUES_FILES)}, nor a complete "
            f"checkpoint with {ROWS_FILE}. Write them after the training with `trainer.report()`, or train with "
            "checkpoints."
        )
    newest = max(files, key=lambda file: file.stat().st_mtime)
    check_replaceable(path)
    if newest.name == ROWS_FILE:
        return _export_checkpoint(newest.parent, path)
    num_rows = sum(map(bool, read_table(newest)))
    if newest.resolve() != Path(path).resolve():
        shutil.copyfile(newest, path)
    return num_rows


def _export_checkpoint(checkpoint: Path, path: str | Path) -> int:
    step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    state = load_rows(checkpoint, step)
    assert state is not None  # the file exists
    records = TrainingDynamics(TrainingDynamics.num_rows_of(state))
    records.load_state_dict(state)
    known, unknown, reordered = records.num_samples
    if reordered > 0 or known == 0:
        raise ValueError(
            f"{checkpoint / ROWS_FILE} does not know the rows of the samples: `data_collator` handed them out in "
            "another order than it got them, or changed their labels. Let it keep its items as they come."
        )
    if unknown > 0 or records.has_unverified:
        logger.warning(
            f"Some rows in {checkpoint / ROWS_FILE} may be others than the ones trained on: the training could not "
            "verify them all. `apply_fixes` compares their labels."
        )
    sums = state["_sums"]
    issues = records.ranked(_class_names(checkpoint, records), with_weight=not sums[0].equal(sums[2]))
    write_issues(issues, path)
    return len(issues)


def _class_names(checkpoint: Path, records: TrainingDynamics) -> list[str]:
    """The names in the config of the model, numbers where it has none."""
    config = checkpoint / CONFIG_NAME
    names = json.loads(config.read_text(encoding="utf-8")).get("id2label") or {} if config.is_file() else {}
    num_classes = max(records.largest_label + 1, len(names))
    return unique_names([str(names.get(str(label), label)) for label in range(num_classes)])
