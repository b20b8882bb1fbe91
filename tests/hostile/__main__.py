"""`python -m tests.hostile [WORD]`: the table of attacks, or of those whose name has WORD in it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from .attack import fight
from .catalogue import ATTACKS
from .doors import warm


def main() -> None:
    warm()
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = {name: a for name, a in ATTACKS.items() if word in name}
    failed = 0
    for name, attack in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            result = fight(attack, Path(folder))
        o = result.outcome
        failed += bool(result.wrong)
        verdict = "; ".join(result.wrong) or ("tamed" if attack.tamed else "refused")
        shown = "FAILED " + verdict if result.wrong else verdict
        print(f"{name:44} {o.seconds:5.2f} s {o.grew >> 20:5} MB  {shown}  {o.err.strip()[:150]}", flush=True)
    print(f"{len(chosen)} attacks, {failed} of them not refused as they should be")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
