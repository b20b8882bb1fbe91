"""The command `knep`: what it lists, shows and copies, and how it refuses."""

import os
import subprocess
import sys

import pytest

from knep.cli.main import main
from knep.config.catalog import GROUPS, options, reason


def test_ls_lists_every_group_and_every_option(capsys):
    main(["ls"])
    text = capsys.readouterr().out
    assert all(f"  {group} " in text for group in GROUPS)
    main(["ls", "optimizer"])
    text = capsys.readouterr().out
    assert all(option in text and reason("optimizer", option) in text for option in options("optimizer"))


def test_show_prints_a_recipe_with_its_values(capsys):
    main(["show", "recipe", "digits_best"])
    text = capsys.readouterr().out
    assert "override /optimizer: adamw" in text
    assert "# values of optimizer=adamw" in text
    main(["show", "optimizer/muon"])
    assert "ns_steps" in capsys.readouterr().out


def test_cp_copies_for_editing_and_overwrites_nothing(tmp_path, capsys):
    main(["cp", "recipe/digits_best", str(tmp_path)])
    assert (tmp_path / "recipe" / "digits_best.yaml").is_file()
    assert (tmp_path / "recipe" / "digits_best" / "optimizer-adamw.yaml").is_file()
    (tmp_path / "recipe" / "digits_best.yaml").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["cp", "recipe/digits_best", str(tmp_path)])
    assert stop.value.code == 2
    assert (tmp_path / "recipe" / "digits_best.yaml").read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls", "optimiser"], "did you mean optimizer"),
        (["show", "recipe", "modrn"], "did you mean modern"),
        (["cp", "optimizer/moun", "."], "did you mean muon"),
        (["pln", "--model", "m:build"], "there is no command pln: did you mean plan?"),
        (["plan", "--model", "m:build", "--samle", "2,3,32,32"], "did you mean --sample?"),
        (["evaluate", "outputs", "--splitt=val"], "did you mean --split?"),
        (["evaluate", "outputs", "--frob"], "write knep evaluate --help"),
        (["seeds", "--seeds", "x"], "--seeds: invalid int value: 'x': write knep seeds --help"),
        (["evaluate"], "required: run: write knep evaluate --help"),
        ([], "write knep --help"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("knep: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["ls", "optimizer"], ["show", "recipe", "modern"], ["--help"]])
def test_it_answers_without_torch(arguments, tmp_path):
    run = "import sys; from knep.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code = f"{run}assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "optimizer"], ["show", "recipe", "modern"]])
def test_it_answers_in_half_a_second(arguments):
    """The processor's time is counted, so that what else runs on the machine does not matter."""
    code = "import sys, time; from knep.cli.main import main; main(); print(time.process_time(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ)
    assert float(done.stderr) < 0.5


def test_plan_prints_what_a_recipe_would_do(capsys):
    main(["plan", "--model", "torchvision.models.resnet18", "recipe=modern", "norm=group", "--sample", "2,3,32,32"])
    text = capsys.readouterr().out
    for words in (
        "layer4.1.bn2",
        "512, eps=1e-05, affine=True, bias=True)",
        "fc.weight",
        "1000x512",
        "he_normal",
        "muon",
        "adamw",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "torchvision.models.resnet81"], "did you mean resnet"),
        (["--model", "torchvision.model:resnet18"], "no module torchvision.model"),
        (["--model", "torch.nn:Linear"], "--model: torch.nn:Linear() failed: TypeError"),
        (["--model", "torch.nn:Flatten", "--sample", "2,x"], "write whole numbers"),
        (["--model", "torch.nn:Flatten", "recipe=modrn"], "did you mean modern"),
        (["--model", "torch.nn:Flatten"], "no trained parameters"),
        (["--model", "torchvision.models.resnet18", "--sample", "2,1,32,32"], "conv1 (Conv2d) got float32 (2, 1, 32,"),
        (["--model", "torchvision.models.resnet18", "init=lsuv"], "lsuv measures a batch"),
    ],
)
def test_plan_refuses_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_help_of_train_lists_every_option(capsys):
    from knep.cli.train import main as train

    train(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for group in GROUPS for option in options(group))
