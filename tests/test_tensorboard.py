"""What TensorBoard shows of a sweep: jobs called by what they were, earlier ones too, and what was swept as columns."""

import csv

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from knep.cli.train import main
from knep.io.run_names import events_folder, link_job, name_job

QUICK = ["trainer=cpu", "trainer.max_epochs=2", "data.limit=60", "data.batch_size=15", "progress=false", "threads=1"]


def sweep(folder, *arguments):
    main(["-m", *QUICK, *arguments, f"hydra.sweep.dir={folder}"])
    return list(csv.DictReader((folder / "sweep.csv").open()))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The rows of a sweep of three jobs, two of which ended in an earlier one, its folder, and what it printed."""
    home = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        lines = ["stopping=early", "stopping.patience=1", "seed=3"]
        sweep(home / "outputs" / "a", *lines, "optimizer.lr=1e-2,1e-3")
        return sweep(home / "outputs" / "b", *lines, "optimizer.lr=1e-2,1e-3,3e-3"), home / "outputs" / "b"


@pytest.fixture(scope="module")
def board(swept):
    """The sweep as TensorBoard reads it."""
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(swept[1]))
    runs.Reload()
    return runs


@pytest.fixture(scope="module")
def context(board):
    provider = MultiplexerDataProvider(board, "swept")
    return backend_context.Context(TBContext(data_provider=provider))


def experiment(context):
    request, known = RequestContext(), context.hparams_metadata(RequestContext(), "swept")
    return context.experiment_from_metadata(request, "swept", True, known, [])


def test_jobs_are_called_by_what_they_were_and_earlier_ones_are_there(swept, board):
    assert sorted(board.Runs()) == ["0/lr=0.01", "1/lr=0.001", "2/lr=0.003"]
    assert [row["folder"].split("/")[-2] for row in swept[0]] == ["a", "a", "b"]


def test_what_was_swept_comes_first_and_only_what_tells_runs_apart_is_there(context):
    names = [info.name for info in experiment(context).hparam_infos]
    assert names[0] == "optimizer.lr"
    assert {"recipe", "dropout", "seed", "data.limit", "stopping.patience", "optimizer.weight_decay"} <= set(names)
    assert not {"progress", "threads", "ckpt", "optimizer._target_", "data.val_share"} & set(names)
    assert len(names) < 40


def test_the_table_sorts_by_the_accuracy_that_the_sweep_tells(swept, context):
    metrics = [info.name.tag for info in experiment(context).metric_infos]
    assert metrics[:4] == ["train/acc", "train/loss", "val/acc", "val/loss"]  # TensorBoard shows five
    columns = [api_pb2.ColParams(hparam="optimizer.lr")]
    columns += [api_pb2.ColParams(metric=api_pb2.MetricName(tag="val/acc"), order=api_pb2.ORDER_DESC)]
    statuses = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING, api_pb2.STATUS_UNKNOWN]
    asked = api_pb2.ListSessionGroupsRequest(
        col_params=columns,
        allowed_statuses=statuses,
        slice_size=10,
        include_metrics=True,
        aggregation_type=api_pb2.AGGREGATION_AVG,
    )
    handler = list_session_groups.Handler(RequestContext(), context, "swept", asked)
    shown = [
        (group.hparams["optimizer.lr"].number_value, value.value)
        for group in handler.run().session_groups
        for value in group.metric_values
        if value.name.tag == "val/acc"
    ]
    told = {float(row["overrides"].partition("=")[2]): float(row["val/acc"]) for row in swept[0]}
    assert [acc for _, acc in shown] == sorted((acc for _, acc in shown), reverse=True)
    assert dict(shown) == pytest.approx(told)


def test_a_sweep_says_how_to_look_at_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("knep.run.run.run", lambda *_: {"status": "finished", "val/loss": 1.0})
    sweep(tmp_path, "seed=0,1")
    assert f"tensorboard --logdir {tmp_path}\n" in capsys.readouterr().out


def test_a_job_s_events_keep_to_its_own_folder(tmp_path):
    earlier, job = tmp_path / "a" / "0", tmp_path / "b" / "0"
    name_job(earlier, ["optimizer.lr=0.1", "+data.root=/x y/[1]"])
    assert events_folder(earlier) == events_folder(earlier / "member_1") == "lr=0.1,root=_x_y__1_"
    (earlier / events_folder(earlier)).mkdir(parents=True)
    link_job(job, ["optimizer.lr=0.1"], earlier)
    assert (job / "lr=0.1").resolve() == earlier / events_folder(earlier)
    name_job(job, ["optimizer.lr=0.1"])  # now it runs here: not through the link
    assert not (job / "lr=0.1").exists()
    assert (earlier / events_folder(earlier)).is_dir()
    (job / events_folder(job)).mkdir()
    name_job(job, ["optimizer.lr=0.1", "averaging.lr=2"])  # the same command with more in it
    assert [p.name for p in job.iterdir()] == ["optimizer.lr=0.1,averaging.lr=2"]


def test_a_name_is_no_longer_than_a_folder_s(tmp_path):
    name_job(tmp_path, [f"model.widths=[{','.join(map(str, range(400)))}]"])
    assert len(events_folder(tmp_path).encode()) < 200
