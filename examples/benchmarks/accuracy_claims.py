"""What the library claims of `auto`, each held against the worst cell."""

from collections.abc import Callable

import pandas as pd
from accuracy_data import Regime, parse_regime
from accuracy_methods import PLUG_IN, RIVAL
from accuracy_statistics import (
    CELL,
    USUAL,
    against_best_rival,
    overall,
    paired,
    plug_in_gains,
    roles,
    won_back,
)


COLUMNS = ["claim", "bound", "found", "where", "cells", "met"]


def check_claims(scored: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """
    All claims of which the results have cells.

    Args:
        scored (`pandas.DataFrame`): What [`~accuracy_statistics.scores`] returns.
        runs (`pandas.DataFrame`): Rows of the results file.

    Returns:
        `pandas.DataFrame`: Columns `claim`, `bound`, `found` (the worst value), `where` (its cell or method), `cells`
        (how many were looked at), `met`.
    """
    ce = _cells(paired(scored, "auto", USUAL, "ce", USUAL), "difference")
    adjusted = _cells(paired(scored, "auto", USUAL, "logit_adjustment", USUAL), "difference")
    back = won_back(scored)
    back = back[(back["method"] == "auto") & (back["choice"] == USUAL)]
    rivals = against_best_rival(scored, runs)
    singles = overall(scored, [(name, USUAL) for name in ("ce", *roles(scored, RIVAL))], "auto", USUAL)
    singles = singles.assign(errors=singles["mean"] / singles["error"])
    rows = [
        _worst("auto - Trainer, balanced", -0.2, _where(ce, lambda r: r.is_balanced and not r.is_noisy)),
        _worst("auto - Trainer, long tail 50", 3.0, _where(ce, _is_long_tail_50)),
        _worst("auto - logit adjustment, long tail 50", -0.5, _where(adjusted, _is_long_tail_50)),
        _worst("share won back, noise that took a point or more", 0.75, _named(_noisy(back.dropna()), "share")),
        _worst("auto - Trainer, noise that took less", -0.2, _named(_noisy(back[back["lost"] < 1]), "gain")),
        _worst("auto - Trainer, long tail with noise", 5.0, _where(ce, lambda r: r.is_noisy and r.is_long_tailed)),
        _row("auto - best tuned rival (by test), mean over cells", 0.0, rivals["mean"].mean(), "", len(rivals)),
        _worst("auto - best tuned rival (by test)", -1.5, _named(rivals, "mean")),
        _worst("auto - each untuned rival, in standard errors", 3.0, singles.set_index("method")["errors"]),
    ]
    gains = plug_in_gains(scored) if roles(scored, PLUG_IN) else pd.DataFrame(columns=["base"])
    for base in gains["base"].unique():
        part = _cells(gains[gains["base"] == base], "mean")
        rows.append(_worst(f"auto on {base} - {base}, noisy or long-tailed", 0.0, _where(part, _is_hard)))
    return pd.DataFrame([row for row in rows if row[4] > 0], columns=COLUMNS)


def _is_long_tail_50(regime: Regime) -> bool:
    return not regime.is_noisy and regime.imbalance_ratio == 50


def _is_hard(regime: Regime) -> bool:
    return regime.is_noisy or regime.is_long_tailed


def _cells(frame: pd.DataFrame, column: str) -> pd.Series:
    """Mean of each cell, under the cell's name; the regime comes last."""
    return _named(frame.groupby(CELL, as_index=False)[column].mean(), column)


def _named(frame: pd.DataFrame, column: str) -> pd.Series:
    names = frame[CELL].agg("/".join, axis=1) if len(frame) else []
    return pd.Series(frame[column].to_numpy(), index=names, dtype=float)


def _noisy(frame: pd.DataFrame) -> pd.DataFrame:
    """Noise on classes that no long tail was cut from, which is a claim of its own."""
    return frame[[not parse_regime(name).is_long_tailed for name in frame["regime"]]] if len(frame) else frame


def _where(values: pd.Series, is_wanted: Callable[[Regime], bool]) -> pd.Series:
    return values[[is_wanted(parse_regime(name.rsplit("/", 1)[-1])) for name in values.index]]


def _worst(claim: str, bound: float, values: pd.Series) -> list:
    # One seed has no standard error.
    values = values.dropna()
    if values.empty:
        return [claim, bound, None, "", 0, False]
    return _row(claim, bound, values.min(), values.idxmin(), len(values))


def _row(claim: str, bound: float, found: float, where: str, cells: int) -> list:
    return [claim, bound, found, where, cells, bool(found >= bound)]
