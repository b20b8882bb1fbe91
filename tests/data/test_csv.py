"""Tables of a stranger: what is read, split and fitted, what travels in a checkpoint, and a line for each bad file."""

import csv
import json
import random
import re

import numpy as np
import pytest
import torch

from knep.cli.train import main
from knep.config.compose import compose_config
from knep.config.schema import DataSpec
from knep.data.own import columns as fitting
from knep.data.own.csv_table import CsvTable, rows_of
from knep.data.own.read_csv import as_list, read_csv
from knep.errors import InputError
from knep.run.run import run

draw = random.Random(0)
CUTS = ("Fair", "Good", "Ideal")


def rows(count=200):
    """A made-up table of stones: row number, size with gaps, cut, town of many levels, always the same, a name."""
    found = []
    for k in range(count):
        size = draw.uniform(1, 5)
        cut = draw.choice(CUTS)
        found.append({
            "id": k + 1,
            "size": "" if k % 10 == 3 else f"{size:.3f}",
            "cut": cut,
            "town": f"town {draw.randrange(50):02}",
            "country": "SE",
            "owner": f"owner number {k}",
            "price": f"{100 * size + CUTS.index(cut):.2f}",
            "kind": "a" if size < 2 else "b" if size < 4 else "c",
            "old": draw.randrange(2),
            "rare": draw.choice(("yes", "no")),
            "tags": ";".join(t for t in ("red", "blue") if draw.random() < 0.5),
        })  # fmt: skip
    return found


def write(path, table=None, delimiter=",", encoding="utf-8"):
    table = table or rows()
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, table[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table)
    return str(path)


def prepared(path, target, task, **more):
    data = CsvTable(path=path, target=target, task=task, batch_size=8, **more)
    data.prepare()
    return data


OTHERS = ["kind", "old", "rare", "tags"]


def test_a_table_is_split_fitted_and_told_in_a_line(tmp_path, capsys):
    data = prepared(write(tmp_path / "t.csv"), "price", "regression", leave_out=OTHERS)
    assert (data.target, data.shape, data.class_names) == ("number", (5,), ["price"])  # size, three cuts, town's rank
    assert data.sizes == {"train": 144, "val": 16, "test": 40}
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "knep: t.csv: 200 rows; target price (numbers); 3 columns: 1 of numbers, standardised, 1 of categories, as 3 "
        "of 0 and 1, 1 of many categories, by rank"
    )
    assert "missing numbers are the median of training: size (" in said[1]
    left = "id (numbers the rows), country (always SE), owner (another text in nearly every row)"
    assert said[2] == f"knep: left out: {left}"


def test_numbers_are_standardised_by_the_training_split_alone(tmp_path):
    data = prepared(write(tmp_path / "t.csv"), "price", "regression", leave_out=[*OTHERS, "town"])
    x = torch.cat(list(data.train_images()))[:, 0].double()
    assert abs(float(x.mean())) < 1e-6
    assert abs(float(x.std(correction=0)) - 1) < 1e-6
    assert abs(float(data._splits["test"][0][:, 0].mean())) > 1e-3


@pytest.mark.parametrize("scale", fitting.SCALES)
@pytest.mark.filterwarnings("ignore:n_quantiles")  # of scikit-learn, which then takes as many as there are rows
def test_plain_numbers_are_what_scikit_learn_gives(tmp_path, scale):
    table = read_csv(tmp_path / write(tmp_path / "t.csv"))
    names, train = ["size", "cut", "town"], np.arange(120)
    columns, _ = fitting.fit(table, names, train, (), 32, scale)
    kinds = [column["kind"] for column in columns]
    assert kinds == ["number", "one_hot", "ordinal"]
    x = np.empty((len(table), 3), dtype=object)
    x[:, 0] = fitting.numbers(table.columns["size"], False)
    x[:, 1], x[:, 2] = table.columns["cut"], table.columns["town"]
    wanted = fitting.column_transformer(kinds, scale).fit(x[train]).transform(x)
    np.testing.assert_allclose(fitting.encode(table, columns), wanted.astype(np.float32), rtol=1e-5, atol=1e-6)


def test_what_was_fitted_travels_and_reads_another_file(tmp_path):
    path = write(tmp_path / "t.csv")
    data = prepared(path, "price", "regression", leave_out=OTHERS)
    spec = DataSpec.of(data)
    facts = spec.plain()
    assert DataSpec.stored(facts) == spec
    table = [{"size": "", "cut": "never seen", "town": "nowhere"}, {"size": "2.5", "cut": "Ideal", "town": "town 01"}]
    x = rows_of(tmp_path / write(tmp_path / "new.csv", table), facts)
    assert x[0, 1:4].tolist() == [0, 0, 0]
    assert x[1, 1:4].tolist() == [0, 0, 1]
    with pytest.raises(InputError, match="has no column town"):
        rows_of(tmp_path / write(tmp_path / "less.csv", [{"size": 1, "cut": "Fair"}]), facts)
    # A run that is evaluated reads by what is kept, not by what it would fit anew.
    again = CsvTable(path=path, target="price", task="regression", batch_size=8, leave_out=OTHERS)
    facts["fitted"]["columns"][0] = {**facts["fitted"]["columns"][0], "mean": 100.0}
    again.keep(facts)
    again.prepare()
    assert float(again._splits["train"][0][:, 0].max()) < -10
    with pytest.raises(InputError, match=r"fitted.columns\[0\].std is"):
        again.keep({"fitted": {"columns": [{**facts["fitted"]["columns"][0], "std": 0.0}]}})


def test_classes_labels_and_several_numbers(tmp_path):
    path = write(tmp_path / "t.csv")
    kinds = prepared(path, "kind", "multiclass")
    assert kinds.class_names == ["a", "b", "c"]
    counts = [torch.bincount(kinds._splits[s][1]).double() / kinds.sizes[s] for s in ("train", "test")]
    assert (counts[0] - counts[1]).abs().max() < 0.03
    assert prepared(path, "rare", "binary").class_names == ["no", "yes"]
    assert prepared(path, "tags", "multilabel").class_names == ["blue", "red"]
    both = prepared(path, ["old", "rare"], "multilabel")
    assert (both.target, both.class_names) == ("label", ["old", "rare"])
    assert prepared(path, ["price", "size"], "regression").class_names == ["price", "size"]
    numbered = write(tmp_path / "n.csv", [{"x": draw.random(), "y": float(k % 3 + 5)} for k in range(60)])
    assert prepared(numbered, "y", "multiclass").class_names == ["5", "6", "7"]


def test_rows_without_a_target_and_classes_of_one_row(tmp_path, capsys):
    table = rows()
    table[7]["kind"], table[8]["kind"] = "", "seldom"
    data = prepared(write(tmp_path / "t.csv", table), "kind", "multiclass")
    said = capsys.readouterr().err
    assert "classes of too few rows to split are for training alone: seldom" in said
    assert "199 rows, 1 more without a target left out" in said
    assert sum(data.sizes.values()) == 199
    assert 3 not in data._splits["val"][1]


def test_a_test_file_of_its_own_and_a_limit(tmp_path):
    path, test = write(tmp_path / "t.csv"), write(tmp_path / "test.csv", rows(30))
    data = prepared(path, "kind", "multiclass", test_path=test, limit=90)
    assert (data.sizes["train"], data.sizes["test"]) == (90, 30)
    assert data.class_names == ["a", "b", "c"]
    strange = rows(30)
    strange[0]["kind"] = "d"
    with pytest.raises(InputError, match="class 'd' in kind, which the training data have not"):
        prepared(path, "kind", "multiclass", test_path=write(tmp_path / "s.csv", strange))


@pytest.mark.parametrize(("delimiter", "encoding"), [(";", "utf-8"), ("\t", "utf-8-sig"), ("|", "latin-1")])
def test_other_delimiters_and_encodings(tmp_path, delimiter, encoding):
    table = [{"größe": f"{k / 7:.2f}".replace(".", ","), "y": "åå" if k % 2 else "b"} for k in range(60)]
    path = write(tmp_path / "t.csv", table, delimiter, encoding)
    data = prepared(path, "y", "multiclass", encoding="utf-8" if "utf" in encoding else encoding)
    assert data.fitted["columns"][0]["name"] == "größe"
    assert data.fitted["columns"][0]["kind"] == "number"  # decimal commas, where commas part no cells
    assert data.class_names == ["b", "åå"]


BAD = {
    "ragged": (b"a,b\n1,2\n1,2,3\n", "3 cells in line 3 and 2 names of columns"),
    "no header": (b"1,2\n3,4\n", "begins with numbers (1, 2)"),
    "empty": (b"", "is empty"),
    "blank": (b"\n\n", "is empty"),
    "names alone": (b"a,b\n", "has names of columns and no rows"),
    "two of a name": (b"a,a\n1,2\n", "two columns a"),
    "not UTF-8": (b"a,b\n1,\xe9\n", "is not in utf-8 (byte 0xe9)"),
    "open quote": (b'a,b\n1,"2\n', "is no table"),
    "bytes": (b"a,b\n\0,2\n", "t.csv"),
    "no such target": (b"a,b\n1,2\n", "data.target=price is no column of"),
    "terminal codes": (b"a\x1b[31m,b\n1,2\n", r"write one of a\x1b[31m, b"),
}


@pytest.mark.parametrize("row", BAD)
def test_a_bad_file_is_refused_in_a_line(row, tmp_path):
    content, said = BAD[row]
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        prepared(str(path), "price", "regression")
    assert said in str(error.value)
    assert str(error.value).isprintable()


UNFIT = {
    "continuous": ("price", "multiclass", "holds numbers that are no classes, such as"),
    "many whole numbers": ("id", "multiclass", "write task=regression, or data.categories=[id]"),
    "text": ("cut", "regression", "holds text such as"),
    "several classes": (["cut", "kind"], "multiclass", "learns one column, and data.target names 2"),
    "one value": ("country", "multiclass", "is 'SE' in every row"),
    "all apart": ("owner", "multiclass", "has no class of more than 2 rows"),
    "no yes or no": (["old", "cut"], "multilabel", "labels are 1 and 0, or yes and no"),
    "one label": ("country", "multilabel", "holds 1 label"),
    "tokens": ("cut", "tokens", "learns other targets than columns"),
    "none": (None, "multiclass", "data.target is missing"),
    "twice": (["price", "price"], "regression", "each once"),
}


@pytest.mark.parametrize("row", UNFIT)
def test_a_target_that_does_not_fit_is_refused_in_a_line(row, tmp_path):
    target, task, said = UNFIT[row]
    with pytest.raises(InputError) as error:
        prepared(write(tmp_path / "t.csv"), target, task)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_values_are_checked_and_files_found(tmp_path):
    for key, value in (("test_share", 1.5), ("max_levels", -1), ("separator", ""), ("leave_out", "id")):
        with pytest.raises(InputError, match=f"data.{key}="):
            CsvTable(path="t.csv", **{key: value})
    for path, said in ((None, "data.path is missing"), ("nowhere.csv", "is missing"), (str(tmp_path), "is a folder")):
        with pytest.raises(InputError, match=said):
            prepared(path, "price", "regression")
    with pytest.raises(InputError, match=r"data.encoding=zip"):
        prepared(write(tmp_path / "t.csv"), "price", "regression", encoding="zip")
    with pytest.raises(InputError, match="no column to learn from"):
        prepared(write(tmp_path / "one.csv", [{"y": k % 7 / 2} for k in range(50)]), "y", "regression")


def test_the_task_of_the_run_reads_the_target():
    config = compose_config(["data=csv", "task=regression", "data.path=a b.csv", "data.target=price"]).config
    assert (config["data"]["task"], config["data"]["path"]) == ("regression", "a b.csv")


def test_predict_reads_another_table_in_the_units_of_the_first(tmp_path, capsys):
    from knep.cli.main import main as knep
    from knep.cli.train import main as train

    path = write(tmp_path / "t.csv")
    lines = ["recipe=none", "optimizer=adamw", "optimizer.lr=0.01", "model=mlp", "model.widths=[16]", "trainer=cpu"]
    lines += ["trainer.max_epochs=30", "progress=false", "threads=1", f"hydra.run.dir={tmp_path / 'run'}", "data=csv"]
    out = [f"data.path={path}", "data.target=price", "task=regression", "data.leave_out=[kind,tags,old,rare,town]"]
    train([*lines, *out])
    new = [{"size": s, "cut": "Ideal"} for s in ("1.5", "4.5")]
    capsys.readouterr()
    knep(["predict", str(tmp_path / "run"), write(tmp_path / "new.csv", new)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].split("  ")[0].endswith("new.csv:1")
    low, high = (float(line.rpartition("price ")[2]) for line in said)
    assert 50 < low < 300 < high < 600
    with pytest.raises(SystemExit):
        knep(["predict", str(tmp_path / "run"), write(tmp_path / "less.csv", [{"cut": "Fair"}])])
    assert "has no column size" in capsys.readouterr().err


def test_mistakes_on_rows_are_no_pictures_and_a_constant_number_is_no_target(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn = random.Random(0)
    lines = [f"{drawn.random():.3f},{drawn.random():.3f},{drawn.choice('ab')},7.5" for _ in range(200)]
    (tmp_path / "noise.csv").write_text("\n".join(["x,z,kind,same", *lines]) + "\n")
    lines = ["recipe=none", "optimizer=adamw", "model=mlp", "model.widths=[8]", "trainer=cpu", "trainer.max_epochs=1"]
    lines += ["data=csv", "data.path=noise.csv", "data.target=kind", "data.leave_out=[same]", "progress=false"]
    made = compose_config([*lines, "threads=1"])
    summary = run(made.config, tmp_path / "run", made.choices, made.overrides)
    assert summary["test/acc"] < 1
    with pytest.raises(InputError, match="in every row: choose another column"):
        prepared(str(tmp_path / "noise.csv"), "same", "regression")


def test_a_table_of_classes_is_trained_and_told(tmp_path):
    write(tmp_path / "t.csv")
    lines = ["data=csv", f"data.path={tmp_path / 't.csv'}", "data.target=kind", "recipe=none", "model=mlp"]
    lines += ["model.widths=[8]", "data.batch_size=16", "trainer.max_epochs=1", "progress=false"]
    main([*lines, f"hydra.run.dir={tmp_path / 'run'}"])
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"
    assert "precision 32-true" in (tmp_path / "run/train.log").read_text()


def test_a_scaling_of_pixels_is_refused_for_a_table(tmp_path, capsys):
    write(tmp_path / "t.csv")
    lines = ["data=csv", f"data.path={tmp_path / 't.csv'}", "data.target=kind", "recipe=baseline", "model=mlp"]
    with pytest.raises(SystemExit) as stop:
        main([*lines, "data.batch_size=16", f"hydra.run.dir={tmp_path / 'run'}"])
    assert stop.value.code == 2
    assert "write scaling=none" in capsys.readouterr().err


def test_dates_are_named_and_columns_of_any_name_can_be_typed(tmp_path, capsys):
    rows = [f"2024-01-{1 + k % 5:02d},{k % 7}.5,{k * 37 % 101}" for k in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(['day,"größe, m",price', *rows]) + "\n", encoding="utf-8")
    lines = ["data=csv", f"data.path={tmp_path / 't.csv'}", "recipe=none", "optimizer=adamw", "model=mlp"]
    lines += ["model.widths=[8]", "data.batch_size=16", "trainer.max_epochs=1", "progress=false", "threads=1"]
    main([*lines, "data.target=größe, m", "task=regression", f"hydra.run.dir={tmp_path / 'run'}"])
    assert "dates, read as categories: day" in capsys.readouterr().err
    config = json.loads((tmp_path / "run/summary.json").read_text())
    assert config["status"] == "finished"
    with pytest.raises(SystemExit):
        main([*lines, "data.target=größe, m"])
    assert "\"data.categories=['größe, m']\"" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"write \"data.leave_out=\['größe'\]\" for names"):
        compose_config([*lines, "data.leave_out=[größe]"])
    assert as_list("data.categories", "kind") == "data.categories=[kind]"


def test_marks_of_missing_numbers_are_told_and_leave_a_column_of_numbers(tmp_path, capsys):
    marks = ["NA", "N/A", "nan", "null", "-", "?", "", "inf", "n.a."]
    table = [
        {"a": marks[k // 2 % 9] if k % 2 else f"{k}.5", "c": "-" if k % 2 else "red", "y": k % 3} for k in range(90)
    ]
    data = prepared(write(tmp_path / "t.csv", table), "y", "regression")
    columns = {column["name"]: column for column in data.fitted["columns"]}
    assert columns["a"]["kind"] == "number"
    assert columns["c"]["levels"] == ["-", "red"]  # which a category may be called
    gone = sum(row["a"] != "" and not row["a"][0].isdigit() for row in table)
    said = capsys.readouterr().err
    assert re.search(r"missing numbers are the median of training: a \(\d+ of", said)
    assert 0 < int(re.search(r"taken as missing: a \((\d+) such as", said)[1]) <= gone
