"""The report: tables, what they say about the targets, and a plot."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from statistics import median

from plan import BEST_PEER, CELLS, Cell, Target

Figures = dict[tuple[str, int, str, str], list[float]]  # by cell, size, name of the figure, pool


def report(figures: Figures, skipped: list[str], rounds: int, command: str, cpus: int) -> str:
    """The tables as markdown: median, and the spread from the lowest to the highest round."""
    python, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    lines = [
        "# The local pool beside its peers",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}: medians of {rounds} alternating rounds, "
        f"lowest to highest in brackets; {cpus} CPUs, Python {python}, {system}.",
        "Ours has a time limit armed on every task; processes start by fork where the pool's name does not say another "
        "method. Absolute figures are this machine's; compare within a table.",
    ]
    if skipped:
        lines += ["", f"Skipped, because not installed: {', '.join(skipped)}."]
    short: list[str] = []
    for name in dict.fromkeys(key[0] for key in figures):
        cell = CELLS[name]
        lines += ["", f"## `{name}`: {cell.title} ({cell.unit}, {'more' if cell.more_is_better else 'less'} is better)"]
        lines += ["", *_table(name, figures), ""]
        verdicts = [verdict(figures, name, target) for target in cell.targets]
        lines += [f"- Target: {words}" for words, _ in verdicts]
        if missed := [words for words, met in verdicts if met is False]:
            short += [f"- `{name}`: {' '.join(missed)} {cell.why}".replace(" **not met**,", "").rstrip()]
    short = short or ["Nothing that was measured in this run."]
    return "\n".join([*lines, "", "## What falls short of its target, and why", "", *short]) + "\n"


def _table(name: str, figures: Figures) -> list[str]:
    cell, columns = CELLS[name], _columns(name, figures)
    heads = [_head(cell, *column) or "median" for column in columns]
    beside = [] if cell.sizes != (0,) else [f"{heads[0]} beside {cell.baseline}"]
    lines = [f"| pool | {' | '.join([*heads, *beside])} |", f"|---|{'---|' * len([*heads, *beside])}"]
    base = figures.get((name, *columns[0], cell.baseline))
    for pool in cell.pools:
        rows = [figures.get((name, *column, pool)) for column in columns]
        if any(rows):
            ratio = f" {median(rows[0]) / median(base):.2f}x |" if rows[0] and base else " - |"
            lines.append(f"| {pool} | {' | '.join(map(_shown, rows))} |{ratio if beside else ''}")
    return lines


def _columns(name: str, figures: Figures) -> list[tuple[int, str]]:
    return list(dict.fromkeys((key[1], key[2]) for key in figures if key[0] == name))


def _head(cell: Cell, size: int, part: str) -> str:
    return " ".join(filter(None, [f"{size:,}{cell.size_unit}" if size else "", part]))


def _shown(values: list[float] | None) -> str:
    if not values:
        return "-"
    low, middle, high = map(_number, (min(values), median(values), max(values)))
    return f"{middle} ({low} … {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(figures: Figures, name: str, target: Target) -> tuple[str, bool | None]:
    """What was wanted and what it is; whether that is enough, or ``None`` where it was not measured."""
    cell = CELLS[name]

    def find(pool: str, size: int) -> float | None:
        values = figures.get((name, size, target.part, pool))
        worst = min if cell.more_is_better else max
        return (worst(values) if target.worst else median(values)) if values else None

    found = find(target.ours, target.size)
    other: float | None = 1.0
    whom = target.beside
    if whom == BEST_PEER:
        known = {pool: value for pool in cell.pools if pool != target.ours and (value := find(pool, target.size))}
        if known:
            best = (max if cell.more_is_better else min)(known, key=lambda pool: known[pool])
            whom, other = f"{BEST_PEER} ({best})", known[best]
    elif whom:
        other = find(whom, target.beside_size or target.size)
    if target.beside_size:
        whom += f" with {target.beside_size:,}"
    wanted = f"{target.factor:g}x {whom}" if whom else f"{target.factor:g} {cell.unit}"
    which = ", ".join(filter(None, [target.ours, _head(cell, target.size, target.part)]))
    words = f"{which}, at {'least' if cell.more_is_better else 'most'} {wanted}"
    if found is None or not other:
        return f"{words}: not measured in this run.", None
    ratio = found / other
    met = ratio >= target.factor if cell.more_is_better else ratio <= target.factor
    found_as = (
        f"{ratio:.2f}x" if whom else f"{_number(found)} {cell.unit}{' in the worst round' if target.worst else ''}"
    )
    by = f"{100 * abs(ratio / target.factor - 1):.0f} % {'too little' if cell.more_is_better else 'too much'}"
    return f"{words}: {'met' if met else '**not met**'}, it is {found_as}{'' if met else f', {by}'}.", met


def plot(figures: Figures, target: Path) -> bool:
    """One panel a cell; ``False`` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(key[0] for key in figures))
    figure, axes = pyplot.subplots(len(names), 1, figsize=(9, 2.8 * len(names)), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        cell, columns = CELLS[name], _columns(name, figures)
        for pool in cell.pools:
            known = [
                (size, median(values))
                for size, part in columns
                if part == columns[0][1] and (values := figures.get((name, size, part, pool)))
            ]
            if known and cell.sizes != (0,):
                axis.plot(*zip(*known, strict=True), marker="o", label=pool)
            elif known:
                axis.barh(pool, known[0][1])
        if cell.sizes != (0,):
            axis.set(xscale="log", yscale="log")
            axis.legend(fontsize=6)
        else:
            axis.invert_yaxis()
        axis.set_title(f"{cell.title} ({', '.join(filter(None, [columns[0][1], cell.unit]))})", fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    return True
