"""Files for the runs, made from Debian's and PyPI's packages: none is downloaded, none is in the repository."""

from __future__ import annotations

import csv
import gzip
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from knep.errors import InputError

_R = Path("/usr/lib/R/site-library")
Maker = Callable[[Path], Path]  # makes a file or a folder inside another
_ANY = zlib.MAX_WBITS | 32  # of zlib: a stream of its own or of gzip, whichever it is
_EVERY = 16  # of the standard library's modules one in sixteen: 100 to 300 kB by Python's version, a minute a seed


def diamonds(folder: Path) -> Path:
    """53,940 diamonds with price: ggplot2's, from its lazy-load database, which is a list of zlib streams."""
    base = _found(_R / "ggplot2/data/Rdata.rdb", "apt install r-cran-ggplot2")
    rdata = _rdata()
    places = rdata.conversion.convert(
        rdata.parser.parse_data(zlib.decompress(base.with_suffix(".rdx").read_bytes(), _ANY))
    )
    start, length = (int(number) for number in places["variables"]["diamonds"])
    stored = base.read_bytes()[start : start + length]
    table = rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress(stored[4:])))  # 4 bytes tell the length
    table.to_csv(folder / "diamonds.csv", index=False)
    return folder / "diamonds.csv"


def letter(folder: Path) -> Path:
    """20,000 letters in 20 fonts as 16 numbers each: mlbench's LetterRecognition."""
    path = _found(_R / "mlbench/data/LetterRecognition.rda", "apt install r-cran-mlbench")
    rdata = _rdata()
    table = rdata.conversion.convert(rdata.parser.parse_file(path))["LetterRecognition"]
    table.to_csv(folder / "letter.csv", index=False)
    return folder / "letter.csv"


def diabetes(folder: Path) -> Path:
    """442 patients with the progress of their diabetes: scikit-learn's."""
    from sklearn.datasets import load_diabetes

    found: Any = load_diabetes()  # as arrays: its frame would need pandas, which comes with no package of knep's
    with (folder / "diabetes.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*found.feature_names, "target"])
        rows.writerows([*row, target] for row, target in zip(found.data.tolist(), found.target.tolist(), strict=True))
    return folder / "diabetes.csv"


def yeast(folder: Path) -> Path:
    """2,417 genes of yeast as 103 numbers with 14 labels: river's, as columns of 0 and 1."""
    try:
        from river import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("yeast needs the package river: pip install river") from error
    path = Path(datasets.__file__).parent / "yeast.csv.gz"
    (folder / "yeast.csv").write_bytes(gzip.decompress(_found(path, "pip install river").read_bytes()))
    return folder / "yeast.csv"


def modules(folder: Path) -> Path:
    """Every sixteenth module of Python's standard library, those in packages left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    (folder / "library").mkdir(exist_ok=True)
    for path in sorted(library.glob("*.py"))[::_EVERY]:
        (folder / "library" / path.name).write_bytes(path.read_bytes())
    return folder / "library"


def scenes(folder: Path) -> Path:
    """Nothing to make: `scripts.quality.scenes` draws them."""
    return folder


def _found(path: Path, remedy: str) -> Path:
    if not path.is_file():
        raise InputError(f"{path} is missing: {remedy}")
    return path


def _rdata() -> Any:
    try:
        import rdata  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("R's files need the package rdata: pip install rdata") from error
    return rdata
