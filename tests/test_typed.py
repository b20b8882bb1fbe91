"""What people type: keys that nobody reads, words of other frameworks, paths with odd characters, own parts."""

import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from knep.cli.train import main
from knep.config.catalog import CONF, GROUPS, options
from knep.config.command_line import aliases
from knep.config.compose import compose_config
from knep.errors import InputError
from knep.io.run_folder import read_summary
from tests.test_bad_input import QUICK, refused

WORDS = yaml.safe_load((CONF.parent / "config" / "command_line" / "vocabulary.yaml").read_text())
# What a value may be where a line leaves it to the user.
VALUES = ("0.1", "3", "[0.9,0.99]", "true", "1000", "some/where", "val/loss", "5", "cpu", "0.5", "modern")


def lines_of(said):
    """The override lines in a sentence: "write a=1 b=2, or c=3" has two."""
    after = said.partition("write ")[2].split(" (")[0]
    for part in re.split(r", or | or |, (?=[\w.+-]+=)|, and then | to soften| to save", after):
        words = [w.rstrip(",:") for w in part.split() if re.match(r"\+?[\w.]+=", w)]
        if words and "-m" not in part.split() and "conf" not in part:
            yield words


def beside(line):
    """What a line needs that asks for data, a network or a machine of its kind."""
    known = {"data.root": "data=image_folder", "dropout=stochastic_depth": "model=resnet", "task=": "data=synthetic"}
    return ["recipe=none", *(extra for part, extra in known.items() if line[0].startswith(part))]


SAID = sorted({*WORDS["words"], *WORDS["flags"].values(), *WORDS["numbers"].values()})


@pytest.mark.parametrize("said", [s for s in SAID if list(lines_of(s))])
def test_every_line_to_write_composes(said):
    for words in lines_of(said):
        if any("mypkg" in word for word in words):
            continue  # a package of the user's
        failed = []
        for value in VALUES if "{v}" in " ".join(words) else ("",):
            line = [word.replace("{v}", value) for word in words]
            try:
                compose_config([*beside(line), *line])
                break
            except InputError as error:
                failed.append(str(error))
        else:
            pytest.fail(f"{words}: {failed}")


@pytest.mark.parametrize("group", sorted(WORDS["aliases"]))
def test_another_word_for_an_option_is_taken_and_said(group, capsys):
    for option, words in WORDS["aliases"][group].items():
        assert option in options(group)
        for word in str(words).split():
            assert word not in options(group)
            aliases._heard.clear()
            assert aliases.readable([f"{group}={word}"]) == [f"{group}={option}"]
            aliases.tell()
            assert f"{group}={word} is taken as {group}={option}" in capsys.readouterr().err


FOREIGN = {
    "+loss=focal": "write loss=focal",
    "+class_weights=balanced": "write loss=cross_entropy loss.class_weight=auto",
    "+logger=wandb": "leave it out",
    "+foo=1": "there is no key foo",
    "+trainer.gradient_clip_val=1e-5": "write clip=norm clip.theta=1e-05",
    "+trainer.accumulate_grad_batches=20": "write accumulate=20",
    "+trainer.logger=wandb": "no other logger",
    "+trainer.callbacks=[a]": "callbacks=mine",
    "+trainer.profiler=simple": "write profile=true",
    "trainer.gradient_clip_val=1": "write clip=norm clip.theta=1",
    "lr=0.1": "write optimizer.lr=0.1",
    "epochs=3": "write trainer.max_epochs=3",
    "batch_size=32": "write data.batch_size=32",
    "dropout.p=0.5": "write dropout=standard dropout.p=0.5",
    "clip.max_norm=1": "write clip=norm clip.theta=1",
    "experiment=modern": "recipe=modern",
    "optimizer_name=AdamW": "optimizer=adamw",
    "init.gain=3": "init",
    "trainer.max_epoch=5": "did you mean trainer.max_epochs?",
    "model.hidden=[1]": "write model=mlp model.widths=[1]",
    "optimizer.nesterov=true": "write optimizer=nesterov",
    "scheduler.T_max=10": "leave it out",
    "optimizer.betas=[0.9]": "takes 2 numbers, got 1",
    "optimizer.betas=[0.9,0.99,0.999]": "takes 2 numbers, got 3",
    "model=vit": "write model=torchvision model.name=vit_b_16",
    "model=wide_resnet": "write model=torchvision model.name=wide_resnet",
    "optimizer=torch.optim.AdamW": "write optimizer=adamw",
    "--config=modern": "recipe=modern",
    "--resume": "write ckpt=RUN",
    "-b": "write data.batch_size=",
    "optimizer=schedulefree": "write scheduler=none",
    "hydra/job_logging=disabled": "leave it out",
    "hydra/job_logging=stdout": "leave it out",
    "data.root=~nouser/x": "nobody here is called ~nouser",
    "data.root=" + 300 * "a": "longer than a path can be",
    "data.root=" + 2000 * "a/": "longer than a path can be",
    "--resolve": "write --cfg=job --resolve",
    "--hydra-help": "write --help",
    "-c": "invalid choice",
    "--cfg=job --package=nope": "there is no key nope",
    "--info=foo": "invalid choice",
    "data.num_classes=???": "stands for a value that is missing",
    "optimizer.lr=" + 5000 * "9": "is not an override",
    "+hydra.run.foo=1": "choose from dir",
    "+hydra.job.foo=1": "choose from",
    "+hydra.launcher.n_jobs=2": "for example hydra/launcher=joblib",
    "hydra.launcher.n_jobs=2": "for example hydra/launcher=joblib",
    "data.seed=abc": "write a whole number",
    "resume=1e-400": "write auto, false, or null",
    "+trainer.min_epochs=5": "write trainer.max_epochs=5",
    "init.std=0.1": "write init=uniform init.limit=0.1",
    "trainer.precision=16-true": "trainer.precision=16-true contradicts",
    "++hydra.frobnicate=1": "hydra.frobnicate",
    "accumulate={0:0}": "by the epoch that they begin in",
    "warmup=5": "scheduler.warmup=5; but then: scheduler.warmup=5 is a share of all steps, in [0, 1)",
    "step_size=0.3": "scheduler.every=0.3; but then: scheduler.every=0.3 is a number",
    "drop_path=0.1": "write dropout=stochastic_depth dropout.p=0.1",
    "mixup=true": "there is no key mixup: write augment=mixup",
    "label_smoothing=true": "there is no key label_smoothing: write regularization=label_smoothing",
    "monitor=val_acc": "write stopping=early stopping.monitor=val/acc stopping.mode=max",
    "gpus=0": "write trainer=cpu",
    "nesterov=false": "leave it out",
    "amp=off": "leave it out",
    "survival_prob=0.8": "dropped, not kept",
    "keep_prob=0.8": "dropped, not kept",
    "averaging=swa averaging.lr=0.1": "averaging=swa takes averaging.start",
    "clip=norm clip.p=2": "clip=norm takes clip.theta",
    "guard.patience=3": "guard=stop takes guard.action",
    "random_crop=4": "write augment=shift",
    "lr_decay=0.1": "scheduler=exponential scheduler.gamma=0.95",
    "optimizer=adamw optimizer.betas=0.9,0.98": "optimizer.betas=[0.9,0.98] to mean a list",
    "model.widths=(8,8)": "write model.widths=[8,8] for a list",
    "+optimizer.weight_decouple=true": "did you mean optimizer.weight_decay?",
    "resume=outputs/x": "write ckpt=outputs/x",
    "hydra/launcher=nobodys": "pip install hydra-nobodys-launcher",
    "trainer.max_steps=-2": "must be at least 1",
    "trainer.limit_train_batches=1.5": "is no share",
    "checkpoint.every=" + 400 * "9" + "s": "is no interval",
    "trainer.max_time=" + 400 * "9" + ":00:00:00": "is no time",
    "+" + 400 * "a." + "a=1": "is no key",
    "model.widths=[" + 9000 * "1," + "1]": "at most 8,000 are read",
    "hydra.run.dir=r\udcff": "is no text in UTF-8",
}


@pytest.mark.parametrize("line", FOREIGN)
def test_a_key_that_nobody_reads_is_refused_with_the_line_to_write(line, tmp_path, capsys):
    words = line.split() if line.startswith("--") or " " in line else [line]
    said = refused([*words, *(["trainer.max_epochs=1"] if "min_epochs" in line else [])], capsys, tmp_path)
    assert FOREIGN[line] in said
    assert not re.search(r"\w\._(target|partial)_", said)


INVENTED = ("frobnicate", "alpha2", "use_magic", "n_heads", "Warm", "x1")


@pytest.mark.parametrize("group", sorted(set(GROUPS) - {"recipe"}))
def test_an_invented_key_of_any_group_is_refused(group):
    for option in options(group):
        for word in INVENTED[: 2 if len(options(group)) > 6 else 6]:
            with pytest.raises(InputError, match=re.escape(word)) as error:
                compose_config([f"{group}={option}", f"+{group}.{word}=1"])
            assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc")), min_size=1), st.booleans())
def test_a_path_stands_for_itself_whatever_is_in_it(text, multirun):
    if len(text.encode()) > 255:  # no name of a file
        return
    plain = not text.strip() or "\\" in text or "${" in text or text.startswith(("~", "'", '"'))
    if plain or text in ("null", "true", "false") or re.fullmatch(r"[a-z]+\(.*\)", text) or (multirun and "," in text):
        return
    (line,) = aliases.readable([f"data.root={text}"], multirun)
    assert OverridesParser.create().parse_override(line).value() == text
    (line,) = aliases.readable([f"data.root={aliases.quoted(text)}"], multirun)
    assert OverridesParser.create().parse_override(line).value() == text


@pytest.mark.parametrize("name", ["a=b", "a,b", "it's", "a[1]", "a#b", "é ü", "a b", "a{b}", "(a)", "a[/b]c"])
def test_a_run_lives_in_a_folder_of_any_name(name, tmp_path, capsys):
    folder = tmp_path / name
    main(["data=digits", "model=mlp", "model.widths=[8]", "recipe=none", *QUICK, f"hydra.run.dir={folder}"])
    assert read_summary(folder)["status"] == "finished"
    assert "Traceback" not in capsys.readouterr().err
    main([f"ckpt={folder}", "trainer.max_epochs=2"])
    assert read_summary(folder)["epochs"] == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ckpt=/nope", "/nope"),
        ("ckpt=/usr/lib/foo.ckpt", "/usr/lib/foo.ckpt"),
        ("ckpt=", "ckpt= is empty"),
        ("trainer.max_time=10", "max_time"),
        ("trainer.max_time=soon", "max_time"),
    ],
)
def test_a_line_that_ended_in_a_traceback_gets_one_line(line, said, tmp_path, capsys):
    error = refused([line], capsys, tmp_path)
    assert said in error
    assert "move" not in error


def test_a_folder_that_cannot_be_made_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main([*QUICK, "data=digits", "model=mlp", "hydra.run.dir=/proc/x"])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n"), "/proc/x" in error) == (2, 1, True)


MINE = """
    import lightning as L
    import torch
    from pathlib import Path
    from torch.utils.data import DataLoader, TensorDataset

    class Mine(L.Callback):
        def __init__(self, path):
            self.path = path

        def on_fit_end(self, trainer, pl_module):
            Path(self.path).write_text(str(trainer.global_step))

    class Data(L.LightningDataModule):
        def loader(self):
            x = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
            return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), 8)

        def train_dataloader(self):
            return self.loader()

        def val_dataloader(self):
            return self.loader()

        def test_dataloader(self):
            return self.loader()
"""


def command(folder, *lines, **environment):
    return subprocess.run(
        [sys.executable, "-m", "knep.cli", "train", *lines],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_a_callback_of_ones_own_acts(tmp_path):
    (tmp_path / "my_part.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "conf" / "callbacks").mkdir(parents=True)
    (tmp_path / "conf" / "callbacks" / "mine.yaml").write_text(
        f"mine: {{_target_: my_part.Mine, path: {tmp_path / 'said'}}}\n"
    )
    lines = ["recipe=none", "model=mlp", "model.widths=[8]", *QUICK, "hydra.run.dir=run"]
    done = command(tmp_path, "--config-dir=conf", "callbacks=mine", "allow_targets=[my_part.]", *lines)
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "said").read_text()) > 0


def test_a_datamodule_as_data_trains_or_is_answered(tmp_path):
    """knep's data say classes and shape; Lightning's do not, and are refused before a folder is made."""
    (tmp_path / "my_part.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("_target_: my_part.Data\n")
    lines = ["recipe=none", "data=mine", "model=mlp", "trainer=cpu", "trainer.max_epochs=1", "threads=1"]
    done = command(tmp_path, "--config-dir=conf", *lines, "allow_targets=[my_part.]", "hydra.run.dir=run")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "knep.load" in done.stderr or "recipe" in done.stderr


def test_a_notebook_s_backend_for_figures_is_no_matter(tmp_path):
    lines = ["recipe=none", "data=digits", "model=mlp", "model.widths=[8]", *QUICK, "hydra.run.dir=run"]
    done = command(tmp_path, *lines, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr


def test_the_line_that_is_shown_is_what_a_shell_takes():
    for text in ("a b", "it's", "a$b", 'a"b', "a,b", "a`b", "a!b"):
        (word,) = shlex.split(aliases.to_type("data.root", text))
        assert OverridesParser.create().parse_override(word).value() == text


def test_a_recipe_file_without_a_header_is_told_what_it_lacks(tmp_path):
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text("optimizer: adam\n")
    with pytest.raises(InputError, match="begin its file with `# @package _global_`"):
        compose_config(["recipe=mine"], [str(tmp_path / "conf")])
