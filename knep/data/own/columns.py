"""Columns of a table to numbers: fitted by scikit-learn on the training rows, kept as plain data, applied by numpy.

A column of numbers: missing ones are the median, then (x - mean) / std; or, by `quantile`, the normal deviate of its
rank in training, which an outlier cannot stretch (scikit-learn's QuantileTransformer). A category: one column of 0 and
1 for each level; with more levels than `max_levels` the rank of the level in alphabetical order, standardised. A level
that was not there in training is none of them, or the median. Left out: what is the same in every row, and what counts
rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri

from knep.data.own.read_csv import MISSING, Table, number, some
from knep.errors import InputError
from knep.io.schema import Check, either, listed, one_of, record, text
from knep.io.schema import number as finite
from knep.utils.text import shown

_MOSTLY = 0.95  # of the values of a column of numbers: the others are taken as missing, and told
# Beside `MISSING`, in a column otherwise of numbers, in any case; a category may be called so.
_NO_NUMBER = frozenset(("-", "--", ".", "na", "n/a", "n.a.", "nan", "null", "none", "nil", "inf", "-inf", "+inf"))
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?!\d)|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}(?!\d)")
_OWN = 0.9  # of the rows have a value of their own: names, or numbers of rows
_LEVEL = text(most=100_000)
_NUMBER = {"name": _LEVEL, "kind": one_of("number"), "median": finite(), "mean": finite(), "std": finite(1e-30)}
SCALES = ("standard", "quantile")
_QUANTILES = 1000  # numbers kept of a column, as QuantileTransformer does
_ALL = 10**12  # rows to fit on: more than there are
_TAIL = 1e-7  # probability at which a rank is cut off: the normal deviate stays within 5.2
_RANK = _NUMBER | {"kind": one_of("ordinal"), "levels": listed(_LEVEL, 1)}
_HOT = {"name": _LEVEL, "kind": one_of("one_hot"), "levels": listed(_LEVEL)}
_RANKED = {"quantiles": listed(finite(), 2, _QUANTILES)}
COLUMNS: Check = listed(either(record(_NUMBER, _RANKED), record(_RANK), record(_HOT)), 1)
Column = Mapping[str, Any]  # what `fit` found of one: name, kind, and median, mean, std or levels


def numbers(cells: Sequence[str], comma: bool) -> np.ndarray:
    """float64 (N,), NaN where a cell has no number."""
    return np.array([np.nan if (v := number(c, comma)) is None else v for c in cells])


def fit(
    table: Table,
    names: Sequence[str],
    rows: np.ndarray,
    categories: Sequence[str],
    max_levels: int,
    scale: str = "standard",
) -> tuple[list[Column], list[str]]:
    """The columns that have something to tell, as fitted on some rows, and what was done in a line each.

    names: columns to look at; rows: indices of the training split; categories: columns of which numbers name levels;
    scale: of columns of numbers, standard or quantile.
    Raises InputError where no column is left.
    """
    kinds, odd, left = {}, [], []
    for name in names:
        cells = [table.columns[name][i] for i in rows]
        kind, why = _kind(
            cells, _counts_up(table.columns[name]), name in categories, max_levels, table.delimiter != ","
        )
        if kind is None:
            left.append(f"{shown(name)} ({why})")
            continue
        kinds[name] = kind
        odd += [f"{shown(name)} ({why})"] if why else []
    if not kinds:
        raise InputError(f"{shown(table.path)} has no column to learn from beside the target: {'; '.join(left[:5])}")
    found, missing = _by_sklearn(table, kinds, rows, scale)
    dates = [shown(name) for name in kinds if kinds[name] != "number" and _dates(table.columns[name], rows)]
    return found, [
        _did(found),
        *([f"dates, read as categories: {some(dates)}; write columns of year, month, day"] if dates else []),
        *([f"taken as missing: {some(odd)}"] if odd else []),
        *([f"missing numbers are the median of training: {some(missing)}"] if missing else []),
        *([f"left out: {some(left)}"] if left else []),
    ]


def _dates(cells: list[str], rows: np.ndarray) -> bool:
    there = [cells[i] for i in rows if cells[i] not in MISSING]
    return sum(_DATE.match(cell) is not None for cell in there) >= _MOSTLY * len(there)


def _counts_up(cells: Sequence[str]) -> bool:
    """Whether a column numbers the rows."""
    try:
        values = np.array(cells, dtype=np.int64)
    except (ValueError, OverflowError):
        return False
    return len(values) > 2 and bool((np.diff(values) == 1).all())


def _kind(
    cells: Sequence[str], counts_up: bool, category: bool, max_levels: int, comma: bool
) -> tuple[str | None, str]:
    """number, one_hot, ordinal or None; with what is odd about it."""
    there = [cell for cell in cells if cell not in MISSING]
    levels = set(there)
    if not there or len(levels | ({""} if len(there) < len(cells) else set())) < 2:
        return None, f"always {shown(there[0])[:20]}" if there else "empty"
    if not category:
        if counts_up:
            return None, "numbers the rows"
        known = sum(number(cell, comma) is not None for cell in there)
        marks = sum(cell.lower() in _NO_NUMBER for cell in there)
        if known >= _MOSTLY * (len(there) - marks) and 2 * known >= len(there):
            wrong = next((cell for cell in there if number(cell, comma) is None), None)
            if len({number(cell, comma) for cell in there}) < 2:
                return None, f"always {shown(there[0])[:20]}"
            return "number", "" if wrong is None else f"{len(there) - known:,} such as {shown(wrong)[:20]!r}"
    if len(levels) > max_levels:
        if len(levels) > _OWN * len(cells):
            return None, "another text in nearly every row"
        return "ordinal", ""
    return "one_hot", ""


def _levels(cells: Sequence[str]) -> list[str]:
    return ["" if cell in MISSING else cell for cell in cells]


def _by_sklearn(table: Table, kinds: Mapping[str, str], rows: np.ndarray, scale: str) -> tuple[list[Column], list[str]]:
    """What a ColumnTransformer finds on the training rows, and which numbers were missing there."""
    parts: dict[str, list[str]] = {
        kind: [n for n, k in kinds.items() if k == kind] for kind in dict.fromkeys(kinds.values())
    }
    comma, missing = table.delimiter != ",", []
    x = np.empty((len(rows), len(kinds)), dtype=object)
    for at, (name, kind) in enumerate(kinds.items()):
        cells = [table.columns[name][i] for i in rows]
        x[:, at] = numbers(cells, comma) if kind == "number" else _levels(cells)
        if kind == "number":
            gone = sum(v != v for v in x[:, at])
            missing += [f"{name} ({gone:,} of {len(rows):,})"] if gone else []
    transformer = column_transformer(list(kinds.values()), scale).fit(x)
    found: dict[str, Column] = {}
    for kind, names in parts.items():
        fitted = transformer.named_transformers_[kind]
        for at, name in enumerate(names):
            found[name] = {"name": name, "kind": kind, **_plain(fitted, kind, at)}
    return [found[name] for name in kinds], missing


def column_transformer(kinds: Sequence[str], scale: str = "standard") -> Any:
    """scikit-learn's ColumnTransformer for columns of these kinds, in this order, of an object array (N, columns)."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import (
        FunctionTransformer,
        OneHotEncoder,
        OrdinalEncoder,
        QuantileTransformer,
        StandardScaler,
    )

    def numbers_scaler() -> Any:
        if scale == "standard":
            return StandardScaler()
        return QuantileTransformer(n_quantiles=_QUANTILES, output_distribution="normal", subsample=_ALL)

    scaled = {
        "number": lambda: (FunctionTransformer(_floats), SimpleImputer(strategy="median"), numbers_scaler()),
        "ordinal": lambda: (
            OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan),
            SimpleImputer(strategy="median"),
            StandardScaler(),
        ),
    }
    steps = []
    for kind in dict.fromkeys(kinds):
        one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
        step = make_pipeline(*scaled[kind]()) if kind in scaled else one_hot
        steps.append((kind, step, [at for at, k in enumerate(kinds) if k == kind]))
    return ColumnTransformer(steps)


def _floats(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def _plain(fitted: Any, kind: str, at: int) -> dict[str, Any]:
    """Of one column: what scikit-learn fitted, as numbers and text."""
    if kind == "one_hot":
        return {"levels": [str(level) for level in fitted.categories_[at]]}
    first, imputer, scaler = (step for _, step in fitted.steps)
    median = {"median": float(imputer.statistics_[at])}
    if hasattr(scaler, "quantiles_"):
        return median | {"mean": 0.0, "std": 1.0, "quantiles": scaler.quantiles_[:, at].tolist()}
    scale = median | {"mean": float(scaler.mean_[at]), "std": float(scaler.scale_[at])}
    return scale | ({"levels": [str(level) for level in first.categories_[at]]} if kind == "ordinal" else {})


def encode(table: Table, columns: Sequence[Column]) -> np.ndarray:
    """float32 (N, F): the columns of a table as `fit` found them.

    Raises InputError for a column that the table lacks.
    """
    missing = [column["name"] for column in columns if column["name"] not in table.columns]
    if missing:
        raise InputError(f"{shown(table.path)} has no column {some(missing)}, which the model was trained on: add it")
    width = sum(width_of(column) for column in columns)
    x = np.zeros((len(table), width), dtype=np.float32)
    at = 0
    for column in columns:
        cells, wide = table.columns[column["name"]], width_of(column)
        if column["kind"] == "number":
            values = numbers(cells, table.delimiter != ",")
        else:
            rank = {level: float(k) for k, level in enumerate(column["levels"])}
            values = np.array([rank.get(level, np.nan) for level in _levels(cells)])
        if column["kind"] == "one_hot":
            rows = np.flatnonzero(~np.isnan(values))
            x[rows, at + values[rows].astype(int)] = 1
        else:
            known = np.where(np.isnan(values), column["median"], values)
            if "quantiles" in column:
                known = _deviates(known, np.array(column["quantiles"]))
            x[:, at] = (known - column["mean"]) / column["std"]
        at += wide
    return x


def _deviates(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Normal deviates of ranks among quantiles; of a value that fills several of them, that of the middle one."""
    places = np.linspace(0, 1, len(quantiles))
    below = np.interp(values, quantiles, places)
    above = -np.interp(-values, -quantiles[::-1], -places[::-1])
    return ndtri(np.clip((below + above) / 2, _TAIL, 1 - _TAIL))


def width_of(column: Column) -> int:
    """Numbers that a column becomes."""
    return len(column["levels"]) if column["kind"] == "one_hot" else 1


def _did(columns: Sequence[Column]) -> str:
    kinds = [column["kind"] for column in columns]
    hot = sum(width_of(column) for column in columns if column["kind"] == "one_hot")
    said = {
        "number": f"{kinds.count('number')} of numbers, standardised",
        "one_hot": f"{kinds.count('one_hot')} of categories, as {hot} of 0 and 1",
        "ordinal": f"{kinds.count('ordinal')} of many categories, by rank",
    }
    if any("quantiles" in column for column in columns):
        said["number"] = f"{kinds.count('number')} of numbers, by normal deviates of their ranks"
    return f"{len(columns)} columns: " + ", ".join(text for kind, text in said.items() if kind in kinds)
