"""Lists of stages for Hydra: `augment=[flip,erase]` is an option whose file is made when it is asked for.

Hydra by itself puts the options of a list into one node, where the last one wins. The file that is made here has each
in a node of its own, `augment.flip` and `augment.erase`, beside their order; so has the one of a recipe's values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.default_element import ConfigDefault, GroupDefault, InputDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from knep.config.stages import SLOT, TARGET, as_option, listed, refuse_stages

Load = Callable[[ConfigRepository, str], ConfigResult | None]


def taught() -> None:
    """Lets Hydra read lists of stages, on a command line and in the defaults of a file; once."""
    load: Load = ConfigRepository.load_config
    if hasattr(load, "of_hydra"):
        return

    def load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        folder, _, name = config_path.rpartition("/")
        stages = listed(name.removeprefix(f"{SLOT}-"))
        if stages is None:
            return _as_options(load(self, config_path))
        if folder == SLOT:
            return _of_stages(config_path, stages)
        there = [stage for stage in stages if self.config_exists(f"{folder}/{SLOT}-{stage}")]
        return _of_values(config_path, there) if there else None

    load_config.of_hydra = load  # type: ignore[attr-defined]
    ConfigRepository.load_config = load_config


def _as_options(read: ConfigResult | None) -> ConfigResult | None:
    """A list of stages in a file's defaults as the one option that it is."""
    for default in (read.defaults_list if read is not None else None) or ():
        group = (default.group or "").lstrip("/") if isinstance(default, GroupDefault) else ""
        if isinstance(default, GroupDefault) and group == SLOT and isinstance(default.value, list):
            default.value = as_option(default.value)
    return read


def _of_stages(path: str, stages: Sequence[str]) -> ConfigResult:
    refuse_stages(stages)
    defaults: list[InputDefault] = [ConfigDefault(path="_self_")]
    defaults += [ConfigDefault(path=stage, package=stage) for stage in stages]
    return _made(path, {"_target_": TARGET, "order": list(stages)}, defaults)


def _of_values(path: str, stages: Sequence[str]) -> ConfigResult:
    folder = path.removeprefix("recipe/").rpartition("/")[0]
    values = [(stage, f"{folder}/{SLOT}-{stage}") for stage in stages]
    return _made(path, {}, [GroupDefault(group="/recipe", value=file, package=stage) for stage, file in values])


def _made(path: str, content: dict[str, Any], defaults: list[InputDefault]) -> ConfigResult:
    return ConfigResult(
        provider="knep",
        path="pkg://knep.conf",
        config=OmegaConf.create(content),
        header={"package": None},
        defaults_list=defaults,
    )
