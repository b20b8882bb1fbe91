"""Bad input gets one clear line and exit code 2, and loses nothing: a row per mistake."""

import gzip
import shutil
import struct
from pathlib import Path

import pytest
import torch

from knep.cli.train import main
from tests.exhaustive import formats

QUICK = ["trainer=cpu", "trainer.max_epochs=1", "data.limit=100", "data.batch_size=50", "progress=false", "threads=1"]


def refused(arguments, capsys, folder):
    """The one line that these arguments get. Nothing of a run may be left behind."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, f"hydra.run.dir={folder}/run"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("knep: ")
    assert "\n" not in error
    assert "Traceback" not in error
    assert not (Path(folder) / "run").exists()
    return error


COMMAND_LINE = {
    "misspelt group": (["optimzer=sgd"], "did you mean optimizer"),
    "misspelt option": (["optimizer=admw"], "did you mean adamw"),
    "misspelt key": (["optimizer.lrr=0.1"], "did you mean optimizer.lr?"),
    "misspelt top-level key": (["sed=1"], "did you mean seed"),
    "misspelt recipe": (["recipe=modrn"], "did you mean modern"),
    "unknown option without a near one": (["init=xyzzy"], "choose from"),
    "no override at all": (["trainer max"], "not an override"),
    "text for a number": (["optimizer.lr=fast"], "optimizer.lr=fast is text: write a number"),
    "fraction for a whole number": (["trainer.max_epochs=1.5"], "write a whole number"),
    "number for a switch": (["progress=3"], "write true or false"),
    "not a finite number": (["optimizer.lr=inf"], "finite"),
    "probability over 1": (["dropout=standard", "dropout.p=1.5"], "dropout"),
    "negative learning rate": (["optimizer.lr=-1"], "-1"),
    "no epochs": (["trainer.max_epochs=0"], "trainer.max_epochs=0 must be at least 1"),
    "a group for a number, forced": (["++log_every={}"], "log_every={} is a group of keys: write a whole number"),
    "no batches": (["trainer.limit_train_batches=0"], "trainer.limit_train_batches=0 leaves nothing"),
    "a thousand threads": (["threads=1000"], "write at most 128"),
    "a trick that is called too soon": (["scaling._partial_=false"], "scaling._partial_ must be true"),
    "a trick without its mark": (["~clip._partial_"], "clip._partial_ must be true"),
    "a model that is built too soon": (["model._partial_=false"], "model._partial_ must be true"),
    "a trick that is never built": (["+augment._partial_=true"], "augment._partial_ must be false"),
    "a guard of another kind": (["guard._target_=nothing"], "guard: Error locating target 'nothing'"),
    "a number beyond float32": (["optimizer.weight_decay=1e308"], "weight_decay=1e+308 is beyond float32"),
    "accumulate 0": (["accumulate=0"], "accumulate=0"),
    "threads 0": (["threads=0"], "threads=0"),
    "layer decay over 1": (["layer_decay=2"], "layer_decay=2"),
    "negative seed": (["seed=-1"], "seed=-1"),
    "theta 0": (["clip=norm", "clip.theta=0"], "theta"),
    "warm-up longer than the run": (["scheduler=cosine", "scheduler.warmup=2"], "warmup"),
    "decay of 1": (["averaging=ema", "averaging.decay=1.0"], "decay"),
    "patience 0": (["stopping=early", "stopping.patience=0"], "patience"),
    "stopping on the test split": (["stopping=early", "stopping.monitor=test/loss"], "validation metric"),
    "a metric that nobody logs": (["stopping=early", "stopping.monitor=val/f1"], "write one of val/loss, val/acc"),
    "the same for a soup": (["averaging=soup", "averaging.monitor=val/f1"], "write one of val/loss, val/acc"),
    "the same for a schedule": (["scheduler=plateau", "scheduler.monitor=val/f1"], "write one of val/loss, val/acc"),
    "the worst epoch": (["stopping=early", "stopping.monitor=val/acc"], "write stopping.mode=max"),
    "the worst epoch by its loss": (["stopping=early", "stopping.mode=max"], "write stopping.mode=min"),
    "a soup of the worst": (["averaging=soup", "averaging.monitor=val/acc"], "write averaging.mode=max"),
    "no validation to stop by": (
        ["stopping=early", "averaging=none", "trainer.limit_val_batches=0"],
        "write stopping=none, or",
    ),
    "no validation to average by": (
        ["averaging=soup", "trainer.limit_val_batches=0.0"],
        "write stopping=none averaging=none",
    ),
    "no validation to lower by": (
        ["scheduler=plateau", "stopping=none", "trainer.limit_val_batches=0"],
        "write scheduler=none",
    ),
    "a validation too late": (["stopping=early", "trainer.check_val_every_n_epoch=2"], "write trainer.check_val_every"),
    "no such depth": (["model=resnet", "model.depth=21"], "depth"),
    "contradiction": (["optimizer=schedule_free", "scheduler=cosine"], "scheduler=none"),
    "depth to drop in a plain net": (["dropout=stochastic_depth", "model=mlp"], "no residual branch"),
    "decays twice": (["regularization=weight_decay", "optimizer=adamw"], "weight_decay"),
    "batch larger than the split": (["data.batch_size=5000"], "5000"),
    "class count": (["data.num_classes=7"], "7"),
    "unknown torchvision model": (["model=torchvision", "model.name=resnet81"], "resnet"),
    "missing checkpoint": (["ckpt=nowhere"], "nowhere"),
    "no GPU": (["trainer=gpu"], "trainer=cpu"),
    "missing data": (["data=image_folder", "data.root=/nonexistent"], "/nonexistent"),
    "no root": (["data=image_folder"], "data.root"),
}


@pytest.mark.parametrize("row", COMMAND_LINE)
def test_command_line(row, capsys, tmp_path):
    if row == "no GPU":
        assert not torch.cuda.is_available()
    arguments, said = COMMAND_LINE[row]
    given = {a.split("=")[0] for a in arguments}
    quick = [q for q in QUICK if q.split("=")[0] not in given and not (q.startswith("data.") and "data" in given)]
    assert said in refused([*quick, *arguments], capsys, tmp_path)


NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_mnist(folder, change=None):
    """MNIST's four files with 100 + 20 images; `change` maps a file's name to a function of its bytes."""
    formats.mnist(folder, 100)
    for name, changed in (change or {}).items():
        (folder / name).write_bytes(changed((folder / name).read_bytes()))


FILES = {
    "truncated images": ({NAMES[0]: lambda b: b[:-100]}, NAMES[0]),
    "corrupt header": ({NAMES[0]: lambda b: b"junk" + b[4:]}, NAMES[0]),
    "giant header": ({NAMES[0]: lambda b: struct.pack(">IIII", 2051, 2**31 - 1, 28, 28) + b[16:]}, NAMES[0]),
    "fewer labels than images": ({NAMES[1]: lambda b: struct.pack(">II", 2049, 50) + b[8:58]}, "50"),
    "empty file": ({NAMES[1]: lambda b: b""}, NAMES[1]),
    "label out of range": ({NAMES[1]: lambda b: b[:-1] + b"\x63"}, "99"),
}


@pytest.mark.parametrize("row", FILES)
def test_data_files(row, capsys, tmp_path):
    change, said = FILES[row]
    write_mnist(tmp_path, change)
    assert said in refused(["data=mnist", f"data.root={tmp_path}", *QUICK[:2], "data.batch_size=50"], capsys, tmp_path)


def test_a_missing_file_is_named(capsys, tmp_path):
    write_mnist(tmp_path)
    (tmp_path / NAMES[1]).unlink()
    said = refused(["data=mnist", f"data.root={tmp_path}", *QUICK[:2], "data.batch_size=50"], capsys, tmp_path)
    assert NAMES[1] in said


def test_a_corrupt_gzip_is_named(capsys, tmp_path):
    write_mnist(tmp_path)
    whole = gzip.compress((tmp_path / NAMES[0]).read_bytes())
    (tmp_path / NAMES[0]).unlink()
    (tmp_path / f"{NAMES[0]}.gz").write_bytes(whole[: len(whole) // 2])
    said = refused(["data=mnist", f"data.root={tmp_path}", *QUICK[:2], "data.batch_size=50"], capsys, tmp_path)
    assert f"{NAMES[0]}.gz" in said


def write_image_folder(folder, classes=("ant", "bee"), images=12):
    from torchvision.io import write_png

    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(images):
            write_png(torch.full((3, 16, 16), 40 * k + i, dtype=torch.uint8), str(folder / name / f"{i}.png"))


IMAGE_FOLDER = ["data=image_folder", "data.size=16", "data.batch_size=4", "data.workers=0", *QUICK[:2]]


def test_an_empty_class_folder_is_named(capsys, tmp_path):
    write_image_folder(tmp_path / "images")
    (tmp_path / "images" / "cow").mkdir()
    said = refused([*IMAGE_FOLDER, f"data.root={tmp_path}/images"], capsys, tmp_path)
    assert "cow" in said


def test_an_unreadable_image_is_named(capsys, tmp_path):
    write_image_folder(tmp_path / "images")
    (tmp_path / "images" / "ant" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    said = refused([*IMAGE_FOLDER, f"data.root={tmp_path}/images"], capsys, tmp_path)
    assert "3.png" in said


def test_an_unwritable_output_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as stop:
        main([*QUICK, f"hydra.run.dir={tmp_path}/file/run"])
    assert stop.value.code == 2
    assert "file/run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    main([*QUICK, f"hydra.run.dir={folder}"])
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [(lambda b: b[: len(b) // 2], "truncated"), (lambda b: b"", "truncated"), (lambda b: b"junk" * 99, "damaged")],
)
def test_a_damaged_checkpoint(damage, said, finished, capsys, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    for name in ("last.ckpt", "best.ckpt"):  # with one of them whole, the run would go on from it
        path = tmp_path / "copy" / "checkpoints" / name
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit) as stop:
        main([f"ckpt={tmp_path}/copy", "trainer.max_epochs=2"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "last.ckpt" in error
    assert said in error
    assert (tmp_path / "copy" / "summary.json").exists()


def test_a_checkpoint_of_another_model(finished, capsys):
    with pytest.raises(SystemExit) as stop:
        main([f"ckpt={finished}", "model=mlp", "trainer.max_epochs=2"])
    assert stop.value.code == 2
    assert "another model" in capsys.readouterr().err
    assert (finished / "checkpoints" / "last.ckpt").exists()


def test_other_data_on_resume(finished, capsys, tmp_path):
    write_image_folder(tmp_path / "images")
    checkpoint = f"ckpt={finished}"
    with pytest.raises(SystemExit) as stop:
        main(
            [
                checkpoint,
                "data=image_folder",
                f"data.root={tmp_path}/images",
                "data.size=8",
                "data.batch_size=4",
                "data.limit=null",
                "data.workers=0",
                "trainer.max_epochs=2",
            ]
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "data._target_: knep.data.digits.Digits -> knep.data.image_folder.ImageFolder cannot change" in error
