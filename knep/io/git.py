"""What git says of a checkout."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

_OF_THE_USER = ("system", "global", "command")  # scopes of git's config that no checkout brings

DIFF = ("diff", "--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty", "HEAD")


def git(*args: str) -> str:
    """What git prints. A checkout may be a stranger's: no program that its own config names is run, nothing fetched."""
    own = _asked(["config", "--show-scope", "--includes", "--null", "--get-regexp", r"^filter\..*"], {}).split("\0")
    # Scope, then "key\nvalue": filters of the checkout's own config are none, those of the user's stay.
    filters = {
        key.partition("\n")[0] for scope, key in zip(own[::2], own[1::2], strict=False) if scope not in _OF_THE_USER
    }
    emptied = {key: "false" if key.endswith(".required") else "" for key in filters}
    quiet = {"core.fsmonitor": "false", "core.hooksPath": os.devnull, "safe.bareRepository": "explicit"}
    return _asked(args, quiet | emptied)


def _asked(args: Sequence[str], config: Mapping[str, str]) -> str:
    set_to = {f"GIT_CONFIG_KEY_{i}": key for i, key in enumerate(config)}
    set_to |= {f"GIT_CONFIG_VALUE_{i}": value for i, value in enumerate(config.values())}
    none = {"GIT_CONFIG_COUNT": str(len(config)), "GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1"}
    optional = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    env = os.environ | set_to | none | optional
    try:
        done = subprocess.run(["git", *args], capture_output=True, timeout=20, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
