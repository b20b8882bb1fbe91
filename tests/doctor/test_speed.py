"""`knep doctor --speed`: what is saved is told with its interval, noise is not, and a real run is timed."""

from __future__ import annotations

import random

from knep.config.compose import compose_config
from knep.doctor.speed.prescribe import speed, ways
from knep.doctor.speed.timing import Block, block

_LINES = ["recipe=none", "data=digits", "model=mlp", "model.widths=[16]", "trainer=cpu", "threads=1"]


def timed(factor, noise=0.01):
    """Blocks of made-up times: `factor` for the line that is the last one."""
    draw = random.Random(0)

    def one(lines, steps, data):
        size = 256 if "data.batch_size=256" in lines else 64
        took = steps * size * 1e-4 * factor.get(lines[-1], 1.0) * (1 + noise * draw.gauss(0, 1))
        return Block(took, took, 0.2 * took, steps, steps * size, "cpu")

    return one


def test_what_saves_time_is_prescribed_with_its_interval():
    report = speed(_LINES, time_block=timed({"data.batch_size=256": 0.5}))
    assert [f.disease for f in report.findings] == ["small_batches"]
    assert report.findings[0].overrides == (("data.batch_size=256",),)
    assert "saves 50% of the processor time for a row" in report.findings[0].evidence
    assert "20% of it passes between steps" in report.notes[0]


def test_noise_is_no_gain():
    report = speed(_LINES, time_block=timed({}, noise=0.3))
    assert report.findings == ()
    assert str(report).startswith("healthy: nothing found that makes a step faster")


def test_what_is_tried_can_be_typed_and_changes_something():
    config = compose_config(_LINES).config
    tried = [way.line for way in ways(config)]
    assert len(tried) >= 3
    assert all(compose_config([*_LINES, line]).config != config for line in tried)


def test_steps_of_a_run_are_timed():
    found = block(_LINES, 5, {})
    assert (found.steps, found.rows, found.device) == (5, 320, "cpu")
    assert found.cpu > 0
    assert 0 <= found.between <= found.wall
