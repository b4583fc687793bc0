"""The results file: one row per run, appended and flushed, so that a killed benchmark goes on where it was."""

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from accuracy_metrics import SCORE_COLUMNS
from filelock import FileLock


KEY = ("data", "model", "optimizer", "pace", "regime", "method", "value", "seed")
VALUES = (
    *SCORE_COLUMNS,
    "validation_last",
    "validation_picked",
    "picked_epoch",
    "validation_by_epoch",
    "epochs",
    "steps",
    "train_rows",
    "noise_rate",
    "diverged",
    "chain",
    "version",
    "seconds",
)
COLUMNS = KEY + VALUES
FAILURE_COLUMNS = (*KEY, "error")


class Results:
    """
    The folder of a benchmark: `results.csv`, `failures.csv`, and `settings.json`, which says what the rows depend on.

    Several processes may append to it.

    Args:
        folder (`Path`): Where the files are; made if need be.

    Raises:
        ValueError: If there is a `results.csv` that is not one of this benchmark.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(folder / ".lock")
        with self.lock:
            for name, columns in (("results.csv", COLUMNS), ("failures.csv", FAILURE_COLUMNS)):
                _prepare(folder / name, columns)

    def check_settings(self, settings: dict[str, dict]) -> None:
        """
        Adds settings to `settings.json`.

        Raises:
            ValueError: If the folder holds results of a setting of the same name that was trained in another way.
        """
        path = self.folder / "settings.json"
        with self.lock:
            known = json.loads(path.read_text()) if path.exists() else {}
            for name, setting in settings.items():
                # As JSON writes it, where a tuple is a list.
                setting = json.loads(json.dumps(setting))
                before = known.setdefault(name, setting)
                changed = [key for key in before.keys() | setting.keys() if before.get(key) != setting.get(key)]
                if changed:
                    key = sorted(changed)[0]
                    raise ValueError(
                        f"{self.folder} holds results of another grid: {name} was run with {key} = "
                        f"{before.get(key)!r}, and is now asked for with {setting.get(key)!r}. Pass another "
                        "`output_dir`, or the arguments of that run."
                    )
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
            unfinished.rename(path)

    def append(self, key: tuple[str, ...], values: dict[str, str]) -> None:
        """Writes one run to the disk."""
        self._append("results.csv", [*key, *(values[name] for name in VALUES)])

    def append_failure(self, key: tuple[str, ...], error: str) -> None:
        """Notes that a run crashed; it is tried again next time."""
        self._append("failures.csv", [*key, error])

    def keys(self) -> set[tuple[str, ...]]:
        """The runs that are done."""
        frame = self.frame()
        return set(frame[list(KEY)].astype(str).itertuples(index=False, name=None))

    def frame(self) -> pd.DataFrame:
        """All rows. If a run is there twice, the later one counts."""
        with self.lock:
            frame = pd.read_csv(
                self.folder / "results.csv",
                dtype=dict.fromkeys(KEY, str),
                keep_default_na=False,
                # A model that diverged has no calibration error.
                na_values={name: ["nan"] for name in SCORE_COLUMNS},
            )
        return frame.drop_duplicates(list(KEY), keep="last")

    def failures(self) -> pd.DataFrame:
        """The crashes of runs that have no result since."""
        with self.lock:
            frame = pd.read_csv(self.folder / "failures.csv", dtype=str, keep_default_na=False)
        done = self.keys()
        is_open = [key not in done for key in frame[list(KEY)].itertuples(index=False, name=None)]
        return frame[is_open].drop_duplicates(list(KEY), keep="last")

    def set_aside(self, methods: Iterable[str]) -> int:
        """Moves the rows of some methods to a file of their own, so that they run anew; returns how many."""
        with self.lock:
            path = self.folder / "results.csv"
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
            is_old = frame["method"].isin(list(methods))
            if is_old.any():
                number = len(list(self.folder.glob("results-set-aside-*.csv"))) + 1
                frame[is_old].to_csv(self.folder / f"results-set-aside-{number}.csv", index=False)
                unfinished = path.with_suffix(".unfinished")
                frame[~is_old].to_csv(unfinished, index=False)
                unfinished.rename(path)
            return int(is_old.sum())

    def _append(self, name: str, row: list[str]) -> None:
        with self.lock, (self.folder / name).open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
            file.flush()
            os.fsync(file.fileno())


def _prepare(path: Path, columns: tuple[str, ...]) -> None:
    """Starts the file, or checks its header and cuts the half row that a kill may have left."""
    header = ",".join(columns)
    if not path.exists() or path.stat().st_size == 0:
        path.write_text(header + "\n")
        return
    text = path.read_bytes()
    found, end, _ = text.partition(b"\n")
    if not end or found.decode(errors="replace") != header:
        names = found.decode(errors="replace")
        missing = [name for name in columns if name not in names.split(",")]
        raise ValueError(
            f"{path} is not a results file of this benchmark, or one of another version: its columns are {names!r}, "
            f"it lacks {', '.join(missing) or 'none, but they stand in another order'}. Pass another `output_dir`."
        )
    if not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
