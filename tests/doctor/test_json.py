"""`knep doctor --json` for programs: JSON alone on stdout, by the schema that the package ships."""

from __future__ import annotations

import json
import math
from importlib.resources import files

import pytest

from knep.cli import main
from knep.cli.doctor_json import SCHEMA, strict

_SHIPPED = json.loads((files("knep.doctor.report") / "doctor.schema.json").read_text(encoding="utf-8"))
_TYPES = {"object": dict, "array": list, "string": str, "number": (int, float), "boolean": bool, "integer": int}
_SMALL = ["data=synthetic", "data.images=600", "data.image_size=8", "model=mlp", "model.widths=[32]", "threads=1"]


def wrong(value, schema, at="$"):
    """What a value has against a schema, of the words that ours uses; None where it fits."""
    if "const" in schema and value != schema["const"]:
        return f"{at} is not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{at} is none of {schema['enum']}"
    if "type" in schema and (
        not isinstance(value, _TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean")
    ):
        return f"{at} is no {schema['type']}"
    if isinstance(value, (int, float)) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return f"{at} is out of range"
    if "anyOf" in schema:
        said = [wrong(value, way, at) for way in schema["anyOf"]]
        if None not in said:
            return " and ".join(said)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        missing = [key for key in schema.get("required", ()) if key not in value]
        extra = [key for key in value if key not in known] if schema.get("additionalProperties") is False else []
        if missing or extra:
            return f"{at} lacks {missing} and has {extra}"
        return next((w for k, v in value.items() if k in known and (w := wrong(v, known[k], f"{at}.{k}"))), None)
    if isinstance(value, list) and "items" in schema:
        return next((w for i, v in enumerate(value) if (w := wrong(v, schema["items"], f"{at}[{i}]"))), None)
    return None


def said(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main.main(["doctor", *words])
    return left.value.code, json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))


def test_a_run_is_examined(capsys):
    code, found = said(capsys, "--json", "recipe=baseline", *_SMALL, "optimizer=sgd", "optimizer.lr=1e-6")
    assert (code, found["schema"], found["examined"], found["sick"]) == (1, SCHEMA, "run", True)
    assert wrong(found, _SHIPPED) is None
    assert found["findings"][0]["disease"] == "lr_too_low"


def test_a_log_is_read(capsys, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss\n" + "".join(f"{i},{2.3 if i < 4 else 'nan'}\n" for i in range(9)))
    code, found = said(capsys, "--log", str(path), "--json")
    assert (code, found["examined"], found["findings"][0]["began"]) == (1, "log", 4)
    assert wrong(found, _SHIPPED) is None


@pytest.mark.parametrize(
    "words",
    [
        ("--json", "optimizer.lr=fast"),
        ("--json", "--log", "/no/where"),
        ("--log", "/no/where", "model=mlp", "--json"),
        ("--log", "/no/where", "--cure", "--json"),
        ("--speed", "--cure", "--json"),
    ],
)
def test_errors_are_data_with_code_2(words, capsys):
    code, found = said(capsys, *words)
    assert code == 2
    assert list(found) == ["schema", "error"]
    assert wrong(found, _SHIPPED) is None


def test_a_schema_that_does_not_fit_is_noticed():
    assert wrong({"schema": SCHEMA, "error": 3}, _SHIPPED)
    assert wrong({"schema": "knep.doctor/0", "error": "x"}, _SHIPPED)
    assert wrong({"schema": SCHEMA, "error": "x", "more": 1}, _SHIPPED)


def test_what_is_not_finite_is_null():
    assert strict({"a": [1.0, math.nan, (math.inf, "x")]}) == {"a": [1.0, None, [None, "x"]]}
