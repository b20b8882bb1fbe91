"""pyproject.toml admits no release that an advisory names, and what is installed here is admitted."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
REQUIRED = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]

# Package -> releases that an advisory names, on Python 3.11 and later.
NAMED = {
    "lightning": ["2.6.0", "2.6.1", "2.6.2", "2.6.3", "2.6.5"],
    "pytorch-lightning": ["2.6.0", "2.6.1", "2.6.2", "2.6.3", "2.6.5"],
    "torch": ["2.9.1", "2.10.0"],
    "hydra-core": ["1.3.2", "1.3.3", "1.3.4", "1.3.6"],
    "scikit-learn": ["1.4.0", "1.4.2"],
    "pillow": ["10.1.0", "10.2.0", "11.3.0", "12.1.0", "12.2.0", "12.3.0"],
    "onnx": ["1.17.0", "1.20.1", "1.21.0"],
    "onnxruntime": ["1.20.0", "1.24.2", "1.30.0"],
    "pytest": ["8.4.2", "9.0.2"],
}


def admitted(package, release, python="3.12"):
    rows = [r for r in REQUIRED if r.name == package]
    assert rows, f"{package} is not required"
    at_work = [r for r in rows if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert at_work, f"{package} has no line for Python {python}"
    return all(r.specifier.contains(release) for r in at_work)


@pytest.mark.parametrize(("package", "release"), [(p, r) for p, releases in NAMED.items() for r in releases])
def test_a_release_that_an_advisory_names_is_not_admitted(package, release):
    assert not admitted(package, release)


@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
def test_releases_that_stole_credentials_stay_excluded_by_name(package):
    """A floor that is lowered some day must not let them in again."""
    assert {"!=2.6.2", "!=2.6.3"} <= {str(s) for r in REQUIRED if r.name == package for s in r.specifier}


def test_python_3_10_takes_the_newest_that_there_is():
    assert admitted("pillow", "12.3.0", "3.10")
    assert not admitted("pillow", "12.2.0", "3.10")
    assert admitted("onnxruntime", "1.23.2", "3.10")


@pytest.mark.parametrize("package", [p for p in NAMED if p != "onnxruntime"])
def test_what_is_tested_here_is_admitted(package):
    assert admitted(package, version(package), f"{sys.version_info.major}.{sys.version_info.minor}")
