"""From runs to paired differences: a method's value and epoch, how far it is from Trainer, how sure that is."""

import numpy as np
import pandas as pd
from accuracy_methods import BASELINE, METHODS, PLUG_IN, RIVAL
from accuracy_metrics import MEASURE
from scipy import stats


CELL = ["data", "model", "optimizer", "pace", "regime"]
USUAL, TUNED = "usual", "tuned"


def scores(runs: pd.DataFrame, measure: str = MEASURE) -> pd.DataFrame:
    """
    One score per cell, method, choice and seed, in points of a measure; balanced accuracy on the test rows by default.

    `usual` takes the usual value and the last epoch. `tuned` takes the value that [`tuned_value`] finds for the cell,
    and of each run the epoch that the validation rows picked.

    Args:
        runs (`pandas.DataFrame`): Rows of the results file.
        measure (`str`): One of `accuracy_metrics.MEASURES`.

    Returns:
        `pandas.DataFrame`: Columns of the cell, `method`, `choice`, `value`, `seed`, `score`.
    """
    parts = []
    for (*_, name), group in runs.groupby([*CELL, "method"], sort=False):
        usual = group[group["value"] == METHODS[name].usual_value]
        if usual.empty:
            continue
        parts.append(usual.assign(choice=USUAL, score=100 * usual[f"{measure}_last"]))
        tuned = group[group["value"] == tuned_value(group)]
        parts.append(tuned.assign(choice=TUNED, score=100 * tuned[f"{measure}_picked"]))
    frame = pd.concat(parts) if parts else runs.assign(choice="", score=0.0)
    return frame[[*CELL, "method", "choice", "value", "seed", "score"]].reset_index(drop=True)


def tuned_value(runs: pd.DataFrame) -> str:
    """
    The value of a method's grid with the best validation score, that of the epoch it picks, on average over the seeds
    that all values have.

    Args:
        runs (`pandas.DataFrame`): Rows of one method in one cell.
    """
    method = METHODS[runs["method"].iloc[0]]
    table = runs.pivot(index="seed", columns="value", values="validation_picked").dropna()
    # In the order of the table of methods, so that a tie does not depend on which run ended first.
    values = [value for value in method.values(tune=True) if value in table.columns]
    return max(values, key=lambda value: table[value].mean()) if values and len(table) else method.usual_value


def paired(scored: pd.DataFrame, method: str, choice: str, other: str, other_choice: str) -> pd.DataFrame:
    """Differences of two methods on the cells and seeds that both have: columns of the cell, `seed`, `difference`."""
    index = [*CELL, "seed"]
    left, right = (
        scored[(scored["method"] == name) & (scored["choice"] == kind)].set_index(index)["score"]
        for name, kind in ((method, choice), (other, other_choice))
    )
    return (left - right).dropna().rename("difference").reset_index()


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values after Holm's correction for testing all of them."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    stepped = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected


def mean_error_p(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean, standard error and p-value of the paired t-test; error NaN and p 1 where there is but one pair."""
    differences = np.asarray(differences, dtype=float)
    count = len(differences)
    if count < 2:
        return float(differences.mean()) if count else np.nan, np.nan, 1.0
    error = differences.std(ddof=1) / count**0.5
    if error == 0:
        return float(differences.mean()), 0.0, 1.0 if differences.mean() == 0 else 0.0
    return float(differences.mean()), float(error), float(stats.ttest_1samp(differences, 0).pvalue)


def cell_differences(scored: pd.DataFrame, other: str = "ce", other_choice: str = USUAL) -> pd.DataFrame:
    """
    Every method and choice against another one (Trainer's last epoch), cell by cell.

    Returns:
        `pandas.DataFrame`: Columns of the cell, `method`, `choice`, `seeds`, `mean`, `error`, `p`, and `holm`, which
        is corrected over the cells of the method.
    """
    rows = []
    for method, choice in scored[["method", "choice"]].drop_duplicates().itertuples(index=False):
        differences = paired(scored, method, choice, other, other_choice)
        for cell, group in differences.groupby(CELL, sort=False):
            rows.append([*cell, method, choice, len(group), *mean_error_p(group["difference"])])
    frame = pd.DataFrame(rows, columns=[*CELL, "method", "choice", "seeds", "mean", "error", "p"])
    frame["holm"] = frame.groupby(["method", "choice"])["p"].transform(lambda p: holm(p.to_numpy()))
    return frame


def over_cells(differences: pd.DataFrame) -> tuple[float, float, float]:
    """
    Mean over all cells, its standard error and p-value.

    The seeds are the repetitions: cells of a seed share their data, so each seed counts once, with its mean over the
    cells. Seeds that lack a cell are left out.
    """
    by_seed = differences.pivot_table(index="seed", columns=CELL, values="difference").dropna()
    return mean_error_p(by_seed.mean(axis=1))


def overall(scored: pd.DataFrame, others: list[tuple[str, str]], method: str, choice: str) -> pd.DataFrame:
    """
    A method against each of some others, over all cells.

    Returns:
        `pandas.DataFrame`: Columns `method`, `choice` (of the other), `cells`, `mean`, `error`, `p`, `holm` (over the
        others), `won` (share of cells with a positive mean), `worst` (the smallest mean of a cell).
    """
    rows = []
    for name, kind in others:
        differences = paired(scored, method, choice, name, kind)
        if differences.empty:
            continue
        by_cell = differences.groupby(CELL)["difference"].mean()
        rows.append([name, kind, len(by_cell), *over_cells(differences), (by_cell > 0).mean(), by_cell.min()])
    frame = pd.DataFrame(rows, columns=["method", "choice", "cells", "mean", "error", "p", "won", "worst"])
    frame.insert(6, "holm", holm(frame["p"].to_numpy()))
    return frame


def against_best_rival(scored: pd.DataFrame, runs: pd.DataFrame, method: str = "auto") -> pd.DataFrame:
    """
    A method, untuned, against the best tuned rival of each cell (Trainer with a picked epoch is one of them).

    The best one in two ways: by its test score, which no user can know (and which favors the rivals, as the largest
    of many noisy means), and by its validation score.

    Returns:
        `pandas.DataFrame`: Columns of the cell, `method`, `choice`, `best`, `mean`, `error` for the best by test, and
        `picked`, `picked_mean`, `picked_error` for the best by validation.
    """
    rivals = [name for name in scored["method"].unique() if METHODS[name].role in (RIVAL, BASELINE)]
    validation = runs.groupby([*CELL, "method", "value"])["validation_picked"].mean()
    rows = []
    for cell, group in scored.groupby(CELL, sort=False):
        ours = group[(group["method"] == method) & (group["choice"] == USUAL)].set_index("seed")["score"]
        tuned = group[(group["choice"] == TUNED) & group["method"].isin(rivals)]
        if ours.empty or tuned.empty:
            continue
        table = tuned.pivot(index="seed", columns="method", values="score").reindex(ours.index).dropna(axis=1)
        if table.empty:
            continue
        value_of = tuned.drop_duplicates("method").set_index("method")["value"]
        best = table.mean().idxmax()
        picked = max(table.columns, key=lambda name: validation.loc[(*cell, name, value_of[name])])
        rows.append(
            [*cell, best, *mean_error_p(ours - table[best])[:2], picked, *mean_error_p(ours - table[picked])[:2]]
        )
    columns = [*CELL, "best", "mean", "error", "picked", "picked_mean", "picked_error"]
    return pd.DataFrame(rows, columns=columns)


def won_back(scored: pd.DataFrame) -> pd.DataFrame:
    """
    How much of what the noise took a method wins back: (method - Trainer) / (Trainer on clean labels - Trainer).

    Returns:
        `pandas.DataFrame`: For every noisy cell, method and choice: the columns of the cell, `method`, `choice`,
        `lost` (what the noise took from Trainer, in points), `gain` and `share` (NaN where less than a point was
        lost).
    """
    usual = scored[scored["choice"] == USUAL]
    means = scored.groupby([*CELL, "method", "choice"], sort=False, as_index=False)["score"].mean()
    clean, noisy = (
        usual[usual["method"] == name].groupby(CELL, as_index=False)["score"].mean().rename(columns={"score": column})
        for name, column in (("clean_labels", "clean"), ("ce", "noisy"))
    )
    frame = means.merge(clean, on=CELL).merge(noisy, on=CELL)
    frame = frame[~frame["method"].isin([*roles(scored, BASELINE), "clean_labels"])]
    frame = frame.assign(lost=frame["clean"] - frame["noisy"], gain=frame["score"] - frame["noisy"])
    frame["share"] = (frame["gain"] / frame["lost"]).where(frame["lost"] >= 1)
    return frame[[*CELL, "method", "choice", "lost", "gain", "share"]].reset_index(drop=True)


def plug_in_gains(scored: pd.DataFrame) -> pd.DataFrame:
    """`auto` on top of each loss against the loss alone (usual values), cell by cell: `base`, `mean`, `error`, `p`."""
    rows = []
    for name in scored["method"].unique():
        if METHODS[name].role != PLUG_IN:
            continue
        differences = paired(scored, name, USUAL, METHODS[name].base, USUAL)
        for cell, group in differences.groupby(CELL, sort=False):
            rows.append([*cell, METHODS[name].base, *mean_error_p(group["difference"])])
    return pd.DataFrame(rows, columns=[*CELL, "base", "mean", "error", "p"])


def roles(scored: pd.DataFrame, *wanted: str) -> list[str]:
    """The methods of some roles that have results, in the order of the table of methods."""
    present = set(scored["method"])
    return [name for name, method in METHODS.items() if method.role in wanted and name in present]
