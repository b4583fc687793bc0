"""Tables and figures of the benchmark, from the results file."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from accuracy_claims import check_claims
from accuracy_data import parse_regime
from accuracy_methods import ABLATION, AUTO, BASELINE, METHODS, OURS, PLUG_IN, REFERENCE, RIVAL
from accuracy_metrics import MEASURE, MEASURES, is_lower_better, is_natural, title
from accuracy_results import Results
from accuracy_statistics import (
    CELL,
    TUNED,
    USUAL,
    against_best_rival,
    cell_differences,
    over_cells,
    overall,
    paired,
    plug_in_gains,
    roles,
    scores,
    won_back,
)


SETTING = CELL[:-1]


def summarize(results: Results) -> str:
    """
    Writes `summary.md`, the tables as CSV and the figures; returns the text.

    Raises:
        ValueError: If there is no result of Trainer yet, or one of an unknown method.
    """
    runs = results.frame()
    unknown = sorted(set(runs["method"]) - set(METHODS))
    if unknown:
        raise ValueError(
            f"{results.folder / 'results.csv'} has rows of the unknown method {unknown[0]!r}: it was written by "
            "another version. Take its rows out, or pass another `output_dir`."
        )
    if not (runs["method"] == "ce").any():
        raise ValueError(f"{results.folder / 'results.csv'} has no run of Trainer ('ce') to compare with.")
    scored_by_measure = {measure: scores(runs, measure) for measure in _measures(runs)}
    differences_by_measure = {measure: cell_differences(scored) for measure, scored in scored_by_measure.items()}
    scored, differences = scored_by_measure[MEASURE], differences_by_measure[MEASURE]
    rivals = against_best_rival(scored, runs)
    back = won_back(scored)
    times = _step_times(results.folder)

    folder = results.folder
    all_differences = pd.concat(differences_by_measure, names=["measure"]).reset_index("measure")
    all_differences.to_csv(folder / "differences.csv", index=False, float_format="%.4f")
    rivals.to_csv(folder / "best_rival.csv", index=False, float_format="%.4f")
    claims = check_claims(scored, runs)
    claims.to_csv(folder / "claims.csv", index=False, float_format="%.4f")
    back.to_csv(folder / "won_back.csv", index=False, float_format="%.4f")
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        if not rivals.empty:
            plot_regimes(differences, folder / "regimes.png")
        if roles(scored, ABLATION):
            plot_ablation(scored, folder / "ablation.png")

    text = "\n\n".join(
        part
        for part in (
            _heading(results, runs),
            claims_table(claims),
            *(main_table(part, times, measure) for measure, part in scored_by_measure.items()),
            *(setting_table(differences, setting) for setting in _settings(runs)),
            rival_table(rivals),
            singles_table(scored),
            won_back_table(back),
            plug_in_table(scored),
            ablation_table(scored, times),
        )
        if part
    )
    (folder / "summary.md").write_text(text + "\n")
    return text


def _heading(results: Results, runs: pd.DataFrame) -> str:
    failures = results.failures()
    lines = [
        f"{len(runs)} runs, {runs['seed'].nunique()} seeds, {runs.groupby(CELL).ngroups} cells (data, model, "
        f"optimizer, pace, regime); {runs['seconds'].sum() / 3600:.1f} hours of one core.",
    ]
    if len(failures):
        errors = failures["error"].str.slice(0, 120).value_counts()
        lines.append(f"**{len(failures)} runs crashed** (failures.csv):")
        lines.append("\n".join(f"- {count} x {error}" for error, count in errors.items()))
    diverged = runs[runs["diverged"].astype(str) == "True"]
    if len(diverged):
        counts = diverged["method"].value_counts()
        listed = ", ".join(f"{count} x {name}" for name, count in counts.items())
        lines.append(f"Diverged, counted with what they then predict: {listed}.")
    return "\n\n".join(lines)


def _measures(runs: pd.DataFrame) -> list[str]:
    """Those that the results tell apart: with balanced classes alone the natural test set is the test set."""
    is_all_balanced = all(parse_regime(name).is_balanced for name in runs["regime"].unique())
    return [measure for measure in MEASURES if not (is_all_balanced and is_natural(measure))]


def _settings(runs: pd.DataFrame) -> list[tuple[str, ...]]:
    return list(runs[SETTING].drop_duplicates().itertuples(index=False, name=None))


def _step_times(folder: Path) -> dict[str, float]:
    path = folder / "step_times.csv"
    return dict(pd.read_csv(path).itertuples(index=False)) if path.exists() else {}


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _number(value: float, error: float | None = None, digits: int = 1) -> str:
    if np.isnan(value):
        return ""
    text = f"{value:+.{digits}f}"
    return text if error is None or np.isnan(error) else f"{text} ± {error:.{digits}f}"


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.0%}"


def _ordered(scored: pd.DataFrame) -> list[tuple[str, str]]:
    """Methods and choices in the order of the tables: the usual one, then the tuned one where it is another."""
    lines = []
    for name in roles(scored, BASELINE, RIVAL, OURS, AUTO, PLUG_IN):
        lines.append((name, USUAL))
        if METHODS[name].role in (BASELINE, RIVAL, OURS):
            lines.append((name, TUNED))
    return lines


def _label(name: str, choice: str) -> str:
    method = METHODS[name]
    if choice == TUNED:
        return f"{method.label}, tuned"
    return method.label


def claims_table(claims: pd.DataFrame) -> str:
    """What is claimed of `auto`, and the worst cell of each claim."""
    if claims.empty:
        return ""
    rows = [
        [claim, f"{bound:g}", f"{found:.2f}", where, str(cells), "met" if met else "**not met**"]
        for claim, bound, found, where, cells, met in claims.itertuples(index=False)
    ]
    header = ["claim", "at least", "worst", "where", "cells", ""]
    note = "Differences in points of balanced accuracy, `auto` untuned and at its last epoch."
    return f"## Claims\n\n{note}\n\n{_markdown(header, rows)}"


def main_table(scored: pd.DataFrame, times: dict[str, float], measure: str) -> str:
    """All methods against Trainer's last epoch in one measure, regimes as columns, averaged over the settings."""
    better = "Lower" if is_lower_better(measure) else "Higher"
    regimes = list(scored["regime"].unique())
    rows = []
    for name, choice in _ordered(scored):
        if (name, choice) == ("ce", USUAL):
            continue
        differences = paired(scored, name, choice, "ce", USUAL)
        if differences.empty:
            continue
        cells = [over_cells(differences[differences["regime"] == regime])[:2] for regime in regimes]
        by_cell = differences.groupby(CELL)["difference"].mean()
        won = (by_cell < 0) if is_lower_better(measure) else (by_cell > 0)
        mean, error, p = over_cells(differences)
        numbers = [_number(value, cell_error) for value, cell_error in cells]
        ratio = f"{times[name]:.2f}" if choice == USUAL and name in times else ""
        label = f"**{_label(name, choice)}**" if METHODS[name].role == AUTO else _label(name, choice)
        rows.append([label, *numbers, _number(mean, error), f"{p:.1g}", f"{won.mean():.0%}", ratio])
    header = ["method", *regimes, "all cells", "p", "cells won", "step time"]
    note = (
        "Points minus those of Trainer's last epoch: mean over the settings and its standard error over the seeds. "
        f"{better} is better. p: paired t-test over the seeds, before correction. Step time: ratio to Trainer's."
    )
    return f"## All settings: {title(measure)}\n\n{note}\n\n{_markdown(header, rows)}"


def setting_table(differences: pd.DataFrame, setting: tuple[str, ...]) -> str:
    """The same for one setting; bold where Holm's correction over the cells of the method leaves p < 0.05."""
    part = differences[(differences[SETTING] == list(setting)).all(axis=1)]
    regimes = list(part["regime"].unique())
    table = part.set_index(["method", "choice", "regime"])
    rows = []
    for name, choice in _ordered(part):
        if (name, choice) == ("ce", USUAL):
            continue
        cells = []
        for regime in regimes:
            if (name, choice, regime) not in table.index:
                cells.append("")
                continue
            row = table.loc[(name, choice, regime)]
            text = _number(row["mean"], row["error"])
            cells.append(f"**{text}**" if row["holm"] < 0.05 else text)
        rows.append([_label(name, choice), *cells])
    return f"## {', '.join(setting)}\n\n{_markdown(['method', *regimes], rows)}"


def rival_table(rivals: pd.DataFrame) -> str:
    """`auto` against the best tuned rival, cell by cell."""
    if rivals.empty:
        return ""
    rows = [
        [
            ", ".join(row[name] for name in SETTING),
            row["regime"],
            METHODS[row["best"]].label,
            _number(row["mean"], row["error"]),
            METHODS[row["picked"]].label,
            _number(row["picked_mean"], row["picked_error"]),
        ]
        for _, row in rivals.sort_values("mean").iterrows()
    ]
    header = ["setting", "regime", "best by test", "auto minus it", "best by validation", "auto minus it"]
    note = (
        "`auto`, untuned, last epoch, against the tuned rival (value and epoch by validation) that is best in the "
        f"cell. Best by test: mean over the cells {_number(rivals['mean'].mean(), digits=2)}, worst cell "
        f"{_number(rivals['mean'].min())}, won {(rivals['mean'] > 0).mean():.0%}. Best by validation: mean "
        f"{_number(rivals['picked_mean'].mean(), digits=2)}, worst {_number(rivals['picked_mean'].min())}, won "
        f"{(rivals['picked_mean'] > 0).mean():.0%}."
    )
    return f"## auto against the best tuned rival\n\n{note}\n\n{_markdown(header, rows)}"


def singles_table(scored: pd.DataFrame) -> str:
    """`auto` against every single rival over all cells."""
    names = roles(scored, BASELINE, RIVAL, OURS)
    frame = overall(scored, [(name, choice) for choice in (USUAL, TUNED) for name in names], "auto", USUAL)
    if frame.empty:
        return ""
    rows = [
        [
            _label(row["method"], row["choice"]),
            _number(row["mean"], row["error"], 2),
            f"{row['mean'] / row['error']:.1f}" if row["error"] > 0 else "",
            f"{row['holm']:.1g}",
            f"{row['won']:.0%}",
            _number(row["worst"]),
        ]
        for _, row in frame.iterrows()
    ]
    header = ["auto minus", "mean over the cells", "standard errors", "p, Holm", "cells won", "worst cell"]
    return f"## auto against every single method\n\n{_markdown(header, rows)}"


def won_back_table(back: pd.DataFrame) -> str:
    """
    What `auto` wins back of what the noise took, what the rival that is best in the cell does, and what leaving out
    rows could.
    """
    part = back[(back["method"] == "auto") & (back["choice"] == USUAL)]
    if part.empty:
        return ""
    rivals = back[[METHODS[name].role == RIVAL for name in back["method"]]]
    best = rivals.loc[rivals.groupby(CELL)["gain"].idxmax()].set_index(CELL)
    references = roles(back, REFERENCE)
    gains = back[back["choice"] == USUAL].pivot(index=CELL, columns="method", values="gain")
    rows = []
    for _, row in part.iterrows():
        cell = tuple(row[CELL])
        rival = best.loc[cell] if cell in best.index else None
        rows.append(
            [
                ", ".join(row[name] for name in SETTING),
                row["regime"],
                f"{row['lost']:.1f}",
                _number(row["gain"]),
                _share(row["share"]),
                "" if rival is None else _label(rival["method"], rival["choice"]),
                "" if rival is None else _share(rival["share"]),
                *(_number(gains.loc[cell, name]) for name in references),
            ]
        )
    note = (
        "What the wrong labels took from Trainer (clean labels would give it), and the share that is won back: by "
        "`auto`, and by the rival, tuned or not, that does best in the cell by the test."
    )
    header = ["setting", "regime", "lost", "gain of auto", "share", "best rival by test", "its share"]
    if references:
        shared = gains[["auto", *references]].dropna()
        listed = [f"{METHODS[name].label} {_number(shared[name].mean(), digits=2)}" for name in shared]
        note += f" Mean gains over the {len(shared)} cells with all of them: {', '.join(listed)}."
    return f"## Won back\n\n{note}\n\n{_markdown([*header, *(METHODS[name].label for name in references)], rows)}"


def plug_in_table(scored: pd.DataFrame) -> str:
    """`auto` on top of each loss against the loss alone."""
    gains = plug_in_gains(scored)
    if gains.empty:
        return ""
    regimes = list(scored["regime"].unique())
    rows = []
    for base in gains["base"].unique():
        part = gains[gains["base"] == base]
        name = next(n for n in roles(scored, PLUG_IN) if METHODS[n].base == base)
        differences = paired(scored, name, USUAL, base, USUAL)
        cells = [over_cells(differences[differences["regime"] == regime])[:2] for regime in regimes]
        mean, error, _ = over_cells(differences)
        rows.append(
            [
                METHODS[base].label,
                *(_number(*cell) for cell in cells),
                _number(mean, error),
                f"{(part['mean'] > 0).mean():.0%}",
                _number(part["mean"].min()),
            ]
        )
    note = (
        "The chain of `auto` with the loss's own perturbation, against the loss alone, both with the usual value. "
        "Beside what corrects the imbalance itself, `auto` leaves its own adjustment out."
    )
    header = ["loss", *regimes, "all cells", "cells won", "worst cell"]
    return f"## auto on top of a loss\n\n{note}\n\n{_markdown(header, rows)}"


def ablation_table(scored: pd.DataFrame, times: dict[str, float]) -> str:
    """Each variant of `auto` against `auto` itself."""
    names = roles(scored, ABLATION)
    if not names or "auto" not in set(scored["method"]):
        return ""
    regimes = list(scored["regime"].unique())
    rows = []
    for name in names:
        differences = paired(scored, name, USUAL, "auto", USUAL)
        cells = [over_cells(differences[differences["regime"] == regime])[:2] for regime in regimes]
        mean, error, _ = over_cells(differences)
        ratio = f"{times[name]:.2f}" if name in times else ""
        rows.append([METHODS[name].label, *(_number(*cell) for cell in cells), _number(mean, error, 2), ratio])
    header = ["variant", *regimes, "all cells", "step time"]
    return f"## Ablation\n\nVariant minus `auto`, in points.\n\n{_markdown(header, rows)}"


def plot_regimes(differences: pd.DataFrame, path: Path) -> None:
    """A panel per regime, a row per method: its mean difference to Trainer in each setting, and their mean."""
    part = differences[differences["choice"] == USUAL]
    names = roles(part, RIVAL, OURS, AUTO)[::-1]
    regimes = list(part["regime"].unique())
    figure, panels = plt.subplots(
        1,
        len(regimes),
        figsize=(2 + 1.7 * len(regimes), 1.2 + 0.28 * len(names)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    # A method that breaks down must not flatten the others.
    low, high = max(part["mean"].min(), -12), min(part["mean"].max(), 40)
    for axes, regime in zip(panels[0], regimes, strict=True):
        for height, name in enumerate(names):
            means = part[(part["method"] == name) & (part["regime"] == regime)]["mean"].to_numpy()
            color = {AUTO: "tab:blue", OURS: "tab:cyan"}.get(METHODS[name].role, "tab:gray")
            inside = means[means >= low]
            axes.scatter(inside, np.full(len(inside), height), s=12, color=color, alpha=0.5, linewidths=0)
            if len(inside) < len(means):
                axes.plot(low, height, marker="<", markersize=5, color=color, clip_on=False)
            if len(means) and means.mean() >= low:
                axes.plot(means.mean(), height, marker="|", markersize=11, markeredgewidth=2, color=color)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(_regime_label(regime), fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlim(low - 1, high + 1)
    panels[0, 0].set_yticks(range(len(names)), [METHODS[name].label for name in names], fontsize=8)
    explanation = "a dot per setting, | their mean, < settings further left"
    figure.supxlabel(f"points of balanced accuracy above Trainer; {explanation}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _regime_label(name: str) -> str:
    return name.replace("+", "\n+ ").replace("_", " ")


def plot_ablation(scored: pd.DataFrame, path: Path) -> None:
    """The mean difference of each variant to `auto`, for clean, long-tailed and noisy regimes."""
    names = roles(scored, ABLATION)
    groups = {
        "balanced": lambda regime: not regime.is_noisy and not regime.is_long_tailed,
        "long tail": lambda regime: not regime.is_noisy and regime.is_long_tailed,
        "noise": lambda regime: regime.is_noisy and not regime.is_long_tailed,
        "long tail and noise": lambda regime: regime.is_noisy and regime.is_long_tailed,
    }
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(names)), layout="constrained")
    heights = np.arange(len(names))[::-1]
    for offset, (label, belongs) in enumerate(groups.items()):
        regimes = [regime for regime in scored["regime"].unique() if belongs(parse_regime(regime))]
        if not regimes:
            continue
        part = scored[scored["regime"].isin(regimes)]
        cells = [over_cells(paired(part, name, USUAL, "auto", USUAL))[:2] for name in names]
        means, errors = np.array(cells, dtype=float).T
        axes.errorbar(means, heights + 0.24 - 0.16 * offset, xerr=errors, fmt="o", markersize=4, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(heights, [METHODS[name].label for name in names], fontsize=8)
    axes.set_xlabel("points of balanced accuracy, variant minus auto")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
