"""The command `knep`: find, read, copy and train recipes from any project. What does not train never imports torch."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from knep.cli import doctor, mcp, tta
from knep.cli.errors import one_line
from knep.config.catalog import CONF, GROUPS, headline, help_text, options, reason, recipe_choices
from knep.config.command_line.options import refuse_options
from knep.config.stages import stages_of
from knep.errors import InputError
from knep.evidence.arguments import help_of
from knep.run import predict, soup
from knep.utils.text import shown


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command line; exits with 2 and one line on bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        # Hydra's overrides are no argparse flags, and worker processes start the module again by its path.
        from knep.cli import train

        sys.modules["__main__"].__spec__ = None
        sys.argv = [str(Path(train.__file__)), *arguments[1:]]
        train.main(arguments[1:])
        return
    with one_line():
        if arguments and not arguments[0].startswith("-"):
            _known(arguments[0], _COMMANDS, "command")
        parser = _parser()
        args, rest = parser.parse_known_args(arguments)
        if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
            refuse_options(parser, arguments)
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:  # overrides that stand behind an option, which argparse leaves out
            args.overrides += rest
        args.run(args)


class _Parser(argparse.ArgumentParser):
    """Refuses a command line in one line, without printing what a terminal would obey."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{shown(message.removeprefix('argument '))}: write {self.prog} --help for what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="knep", description="Training tricks as recipes, for any nn.Module.")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(_COMMANDS))
    _add_catalog(commands)
    _add_studies(commands)
    _add_searches(commands)
    doctor.add_to(commands)
    mcp.add_to(commands)
    _add_evaluate(commands)
    predict.add_to(commands)
    soup.add_to(commands)
    tta.add_to(commands)
    _add_files(commands)
    commands.add_parser("train", help="the same as train.py: knep train model=resnet optimizer=muon", add_help=False)
    return parser


def _add_catalog(commands: argparse._SubParsersAction) -> None:
    ls = commands.add_parser("ls", help="the groups, or the options of one group with the reason for each")
    ls.add_argument("group", nargs="?")
    ls.set_defaults(run=_ls)
    show = commands.add_parser("show", help="a recipe or option: its file, and a recipe's values")
    show.add_argument("group")
    show.add_argument("option", nargs="?")
    show.set_defaults(run=_show)
    plan = commands.add_parser("plan", help="what a recipe would do to a model, layer by layer; nothing is trained")
    plan.add_argument("--model", metavar="PATH", help="what builds it: torchvision.models.resnet50; else a run's own")
    plan.add_argument("--sample", metavar="N,C,H,W", help="a shape that the model reads, for tricks that look at data")
    plan.add_argument("--classes", type=int, metavar="K", help="num_classes for the builder (default: its own)")
    plan.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="recipe=modern norm=group optimizer.lr=3e-3")
    plan.set_defaults(run=_plan)
    cp = commands.add_parser("cp", help="copy an option's YAML for editing, for example: knep cp optimizer/muon ./conf")
    cp.add_argument("option", metavar="group/option")
    cp.add_argument("folder", type=Path)
    cp.set_defaults(run=_cp)
    new = commands.add_parser("new", help="the files of a new trick, in a clone of knep: knep new clip/mine")
    new.add_argument("trick", metavar="slot/name")
    new.set_defaults(run=_new)


def _add_studies(commands: argparse._SubParsersAction) -> None:
    for name, (_, what) in _STUDIES.items():
        raw = argparse.RawDescriptionHelpFormatter
        study = commands.add_parser(name, help=what, description=what, epilog=help_of(name), formatter_class=raw)
        study.add_argument("words", nargs="*", metavar="KEY=VALUE")
        study.set_defaults(run=_cards if name == "cards" else _study, study=name)
        if name == "cards":
            study.add_argument("--readme", action="store_true", help="what a clone's README.md and recipes say instead")
            study.add_argument("--write", action="store_true", help="with --readme: bring them up to date")


def _add_searches(commands: argparse._SubParsersAction) -> None:
    seeds = commands.add_parser("seeds", help="accuracy over seeds, mean and deviation: knep seeds recipe=digits_best")
    seeds.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1 are run, 5 by default")
    seeds.add_argument("--processes", type=int, default=1, metavar="N", help="runs side by side, 1 by default")
    seeds.add_argument("--out", type=Path, metavar="FILE", help="keeps each run, and goes on where an earlier call was")
    seeds.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: recipe=digits_best threads=1")
    seeds.set_defaults(run=_seeds)
    lr = commands.add_parser("lr", help="a learning rate that was tried: knep lr model=cnn optimizer=muon")
    lr.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="of the range test and of each trial, 3 by default"
    )
    lr.add_argument("--out", type=Path, metavar="FILE", help="the picture, outputs/lr/RULE.png by default")
    lr.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: model=cnn optimizer=muon threads=1"
    )
    lr.set_defaults(run=_lr)
    suggest = commands.add_parser("suggest", help="three tricks worth trying on your problem: knep suggest model=cnn")
    suggest.add_argument("--json", action="store_true", help="as data, nothing else on stdout")
    suggest.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: data=digits model=cnn")
    suggest.set_defaults(run=_suggest)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("evaluate", help="a run, tested again: knep evaluate RUN")
    evaluate.add_argument("source", type=Path, metavar="run", help="a run folder or a .ckpt file")
    evaluate.add_argument("--split", choices=("val", "test"), default="test")
    evaluate.add_argument("--mirrored", action="store_true", help="average each image with its mirror, as test_flip")
    evaluate.add_argument("--allow", action="append", default=[], metavar="PACKAGE.", help="where its model comes from")
    evaluate.set_defaults(run=_evaluate)


def _add_files(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="a run's model for other programs: knep export RUN model.safetensors")
    export.add_argument("source", type=Path, metavar="run", help="a run folder or a .ckpt file")
    export.add_argument("file", type=Path, help="ends in .safetensors, .onnx or .pt2")
    export.add_argument("--format", choices=("safetensors", "onnx", "pt2"), help="as the file's ending")
    export.add_argument("--allow", action="append", default=[], metavar="PACKAGE.", help="where its model comes from")
    export.set_defaults(run=_export)
    unsafe = commands.add_parser("import-unsafe", help="a foreign pickle, run in a child, to a plain file")
    unsafe.add_argument("source", type=Path, metavar="FILE", help="a checkpoint that knep refuses to read")
    unsafe.add_argument("target", type=Path, metavar="OUT", help="the plain checkpoint to write")
    unsafe.add_argument("--i-trust-this-file", action="store_true", help="you know who made FILE, and that it is run")
    unsafe.add_argument("--keep-network", action="store_true", help="where it cannot be taken away from the child")
    unsafe.set_defaults(run=_import_unsafe)


# Name -> the module of knep.evidence that has a function of this name, and what it is for.
_STUDIES = {
    "ablate": ("study", "each trick of a recipe, left out and alone: knep ablate recipe=modern seeds=5"),
    "study": ("study", "a study from its YAML, its arms over the same seeds: knep study dropout"),
    "compare": ("compare", "options, each tuned with the same budget: knep compare optimizer=sgd,adam budget=15"),
    "ledger": ("ledger", "every option against its slot's plain one, for the cards: knep ledger seeds=10"),
    "cards": ("cards", "writes docs/cards from what the ledger measured: knep cards"),
    "verify": ("verify", "measures a card again and fails where it no longer holds: knep verify adamw"),
}
_OF_RUNS = ("seeds", "lr", "suggest", "evaluate", "predict", "soup", "tta", "export", "import-unsafe", "train")
_COMMANDS = ("ls", "show", "cp", "new", "plan", "doctor", "mcp", *_STUDIES, *_OF_RUNS)


def _study(args: argparse.Namespace) -> None:
    from importlib import import_module

    module = import_module(f"knep.evidence.{_STUDIES[args.study][0]}")
    code = getattr(module, args.study)(args.words)
    if code:
        raise SystemExit(code)


def _cards(args: argparse.Namespace) -> None:
    if args.write and not args.readme:
        raise InputError("--write goes with --readme: knep cards by itself writes the pages")
    if not args.readme:
        _study(args)
        return
    if args.words:
        raise InputError(f"{shown(args.words[0])}: --readme takes no folder, it fills the files of the clone")
    from knep.evidence.readme_table import readme

    readme(args.write)


def _seeds(args: argparse.Namespace) -> None:
    from knep.evidence.seeds import seeds

    seeds(args.overrides, args.seeds, args.processes, args.out)


def _lr(args: argparse.Namespace) -> None:
    from knep.evidence.rate.command import lr

    lr(args.overrides, args.seeds, args.out)


def _suggest(args: argparse.Namespace) -> None:
    from knep.evidence.suggest.command import suggest

    suggest(args.overrides, args.json)


def _known(word: str, known: Sequence[str], what: str) -> str:
    if word in known:
        return word
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    raise InputError(f"there is no {what} {word}: " + (f"did you mean {close[0]}?" if close else ", ".join(known)))


def _ls(args: argparse.Namespace) -> None:
    if args.group is None:
        print(help_text())
        return
    group = _known(args.group, GROUPS, "group")
    width = max(map(len, options(group)))
    measured = headline(group)
    for option in options(group):
        print(f"{option:{width}}  {reason(group, option)}")
        if option in measured:
            print(f"{'':{width}}  measured, points of test accuracy: {measured[option]}")


def _split(group: str, option: str | None) -> tuple[str, str]:
    if option is None:
        group, _, option = group.partition("/")
    group = _known(group, GROUPS, "group")
    return group, _known(option, options(group), f"{group} option")


def _show(args: argparse.Namespace) -> None:
    group, option = _split(args.group, args.option)
    print((CONF / group / f"{option}.yaml").read_text(encoding="utf-8").rstrip())
    if group == "recipe":
        named = [(slot, one) for slot, picked in recipe_choices(option).items() for one in stages_of(picked)]
        for slot, picked in named:
            values = CONF / "recipe" / option / f"{slot}-{picked}.yaml"
            if values.is_file():
                print(f"\n# values of {slot}={picked}\n{values.read_text(encoding='utf-8').rstrip()}")


def _plan(args: argparse.Namespace) -> None:
    shape = _shape(args.sample)
    if args.model is None:
        _plan_of_run(args, shape)
        return
    name = next((line[7:] for line in args.overrides if line.startswith("recipe=")), "none")

    import torch

    from knep.config.compose import compose_recipe
    from knep.engine.apply_recipe import Recipe
    from knep.models.user_model import build

    lines = [line for line in args.overrides if not line.startswith("recipe=")]
    recipe = Recipe.from_config(compose_recipe(name, lines))
    offered = {} if args.classes is None else {"num_classes": args.classes}
    if len(shape) == 4:
        offered |= {"in_channels": shape[1], "image_size": shape[-1]}
    plan = recipe.dry_run(build(args.model, offered, key="--model"), torch.zeros(shape) if shape else None)
    if plan.refused:
        raise InputError(f"this recipe does not fit {args.model}: " + "; ".join(plan.refused.values()))


def _plan_of_run(args: argparse.Namespace, shape: list[int]) -> None:
    """Of the lines of a whole run, with its data and the weights that it starts from."""
    if shape or args.classes is not None:
        raise InputError("--sample and --classes go with --model: a run takes both from its data")
    from knep.config.instantiate import allow_typed, instantiate
    from knep.engine.apply_recipe import plan_of_run
    from knep.run.run import check

    allow_typed(args.overrides)
    run = check(list(args.overrides), []).run
    data = instantiate(run.data)
    data.prepare()
    print(plan_of_run(run, data))


def _shape(text: str | None) -> list[int]:
    """[N, C, H, W] of "N,C,H,W"; [] for None."""
    parts = text.split(",") if text is not None else []
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--sample={text} is no shape: write whole numbers, for example --sample 2,3,64,64")
    return [int(part) for part in parts]


def _cp(args: argparse.Namespace) -> None:
    group, option = _split(args.option, None)
    paths = [CONF / group / f"{option}.yaml", *sorted((CONF / group / option).glob("*.yaml"))]
    for source in paths:
        target = args.folder / source.relative_to(CONF)
        if target.exists():
            raise InputError(f"{target} exists already: remove it or copy to another folder")
    for source in paths:
        target = args.folder / source.relative_to(CONF)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        print(shown(target))


def _new(args: argparse.Namespace) -> None:
    from knep.cli.new_trick import new

    new(args.trick)


def _evaluate(args: argparse.Namespace) -> None:
    from knep.config.instantiate import allow
    from knep.utils.text import shown

    for name in args.allow:
        allow(name)
    if not args.source.exists():
        raise InputError(f"{shown(args.source)} is missing: give a run folder or a .ckpt file")

    from knep.engine.evaluate import retest  # brings torch

    print(json.dumps(retest(args.source, args.split, args.mirrored), indent=2))


def _export(args: argparse.Namespace) -> None:
    from knep.config.instantiate import allow
    from knep.export.export import export

    for name in args.allow:
        allow(name)
    for path in export(args.source, args.file, args.format):
        print(shown(path))


def _import_unsafe(args: argparse.Namespace) -> None:
    from knep.io.import_pickle import import_unsafe

    import_unsafe(args.source, args.target, args.i_trust_this_file, args.keep_network)
