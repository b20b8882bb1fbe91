"""The test split is read once: a second reading is counted in the run's summary."""

import json

from knep.io.run_folder import read_again, reads, write_summary


def test_readings_are_counted_in_the_summary(tmp_path):
    run = tmp_path / "run"
    weights = run / "member_0" / "checkpoints" / "final.ckpt"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert reads(run) == 0
    read_again(run)  # not finished: there is nothing to count in
    assert not (run / "summary.json").exists()
    (run / "summary.json").write_text(json.dumps({"status": "finished", "sealed": 1}))
    read_again(run)
    assert reads(run) == 2
    read_again(weights)
    write_summary(run, {"status": "running"})  # it goes on: what was read stays read
    assert json.loads((run / "summary.json").read_text()) == {"status": "running", "sealed": 3}
