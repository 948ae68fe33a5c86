"""Every JSON file that the project reads back may hold anything: a value that cannot be used is an error, never a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain import UserError
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError, UnsafeCheckpoint, digest_json
from pretrain.config import ConfigError, load
from pretrain.data.batches import open_train
from pretrain.data.indexed import DataError, Sidecar
from pretrain.interop.load import open_hf_folder, open_run
from pretrain.interop.weights import CheckpointWeights
from pretrain.report import environment
from pretrain.report.metrics import Meter
from pretrain.report.plot import read_curves
from pretrain.report.records import RecordsError, cut_records, merge_equal, read_records
from pretrain.report.spikes import SpikeWatch
from pretrain.run.directory import RunDirectory, read_state
from pretrain.run.parts import open_parts
from pretrain.run.progress import Progress, read_saved
from pretrain.run.resume import check_settings
from tests.models import make_hf_folder, make_run, model_of
from tests.test_indexed import write
from tests.test_manifest import rewrite_manifest
from tests.test_train import TINY, run_of, train_here

VALUES = (None, "text", "", -1, 0, 10**30, 0.5, True, [], [None], [[1]], {}, {"a": 1}, math.nan, math.inf)
MOE = ["--model.moe.num_experts", "4", "--model.moe.num_experts_per_tok", "2"]
SHORT = ["--train.max_steps", "6", "--checkpoint.every_steps", "5", "--log.every_steps", "3", "--evaluate.every_steps", "0"]


def mutants(content: Any) -> Iterator[Any]:
    """`content` with each value, in turn, replaced by each of VALUES, and without each key, and with one more."""

    def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
        yield path
        children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
        for key, child in children:
            yield from places(child, (*path, key))

    def changed(path: tuple, change) -> Any:
        root = [copy.deepcopy(content)]
        holder: Any = root
        for key in (0, *path)[:-1]:
            holder = holder[key]
        change(holder, (0, *path)[-1])
        return root[0]

    for path in places(content):
        for value in VALUES:
            yield changed(path, lambda holder, key, value=value: holder.__setitem__(key, value))
        if path:
            yield changed(path, lambda holder, key: holder.pop(key))
            yield changed(path[:-1], lambda holder, key: holder[key].update(zzz=1) if isinstance(holder[key], dict) else None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of a mixture of experts, saved in the middle of a logging interval."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(TINY)
    tiny = [*MOE, *SHORT, "--config", str(folder / "tiny.yaml"), "--run.directory", str(folder)]
    assert train_here(tiny) == 0
    return run_of(tiny)


@pytest.fixture
def saved(run, tmp_path) -> Checkpoint:
    """A copy of its checkpoint, in a run."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    return Checkpoint(tmp_path / "run" / "checkpoints" / "step_00000005")


def rewrite(saved: Checkpoint, state: Any) -> None:
    (saved.path / "state.json").write_text(json.dumps(state))
    rewrite_manifest(saved.path)


def test_a_run_resumes_from_any_state_json_or_refuses_it(saved):
    config = load(["--config", str(saved.path.parents[1] / "config.yaml")])
    parts, state, outcomes = open_parts(config), saved.state(), {}
    assert "routing" in state["meter"]
    settings = state.pop("settings")
    section = {"run": settings["run"], "data": settings["data"]}
    tried = [each | {"settings": settings} if isinstance(each, dict) else each for each in mutants(state)]
    tried += [state | {"settings": settings | each if isinstance(each, dict) else each} for each in mutants(section)]
    for mutant in tried:
        (saved.path / "state.json").write_text(json.dumps(mutant))
        try:
            check_settings(config, parts, saved)
            content = read_saved(saved)
            Progress(**content["progress"])
            meter = Meter(torch.device("cpu"), 0, 1, content.get("meter"))
            one = torch.tensor(1)
            routing_LX = torch.ones(config.model.num_hidden_layers, 6)
            meter.add(one.double(), one, one, one > 0, routing_LX)
            SpikeWatch(content.get("spikes")).judge(1.0)
            outcome = None
        except UserError as error:
            assert len(str(error)) < 2000 and str(saved.path) in str(error)
            outcome = type(error)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes.keys() == {None, ConfigError, CheckpointError, UnsafeCheckpoint}, outcomes
    assert min(outcomes.values()) > 5


@pytest.mark.parametrize(
    ("key", "value", "status"),
    [
        ("progress.step", "5", 77),
        ("progress.position", None, 77),
        ("progress.tokens", math.nan, 77),
        ("progress.unknown", 1, 2),
        ("progress.skipped_positions", [[5, 3]], 77),
        ("meter.counts", [1], 77),
        ("meter.routing", [[1.0], [1.0, 2.0]], 77),
        ("spikes.accepted", ["a"], 77),
        ("settings", None, 77),
        ("settings.run", [], 77),
        ("model.moe", "x", 77),
        ("model.hidden_size", 10**30, 2),
        ("data", 1, 77),
        ("quarantine", [[7, 0, 10**15]], 2),
        ("wandb_id", 5, 77),
        ("step", 4, 77),
        ("optimizer_updates", None, 77),
        (None, [1], 77),
    ],
)
def test_a_state_json_with_wrong_content_ends_the_run_with_its_documented_status(saved, capsys, key, value, status):
    state = saved.state()
    *path, last = (key or "").split(".")
    holder = state
    for part in path:
        holder = holder[part]
    holder[last] = value
    rewrite(saved, state if key else value)
    config = saved.path.parents[1] / "config.yaml"
    run = ["--config", str(config), "--run.directory", str(config.parents[1]), "--run.name", "run"]
    assert train_here(run) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error and (last in error or "routing" in error)
    assert saved.path.is_dir() and read_state(config.parent)["exit_status"] == status


def test_a_model_is_opened_from_any_state_json_or_refused(saved):
    state, refused = saved.state(), 0
    small = {"model": state["model"], "val_loss": state["val_loss"], "tokenizer": None}
    for number, mutant in enumerate(mutants(small)):
        rewrite(saved, mutant)
        try:
            CheckpointWeights(saved)
            if number % 20 == 0:
                open_run(saved.path.parents[1], "best")
        except UserError as error:
            assert error.status in (2, 77)
            refused += 1
    assert refused > 100


def test_a_manifest_with_any_content_is_damage_or_refused(saved):
    manifest = json.loads((saved.path / "manifest.json").read_text())
    del manifest["xxh3"]
    for mutant in mutants(manifest):
        if isinstance(mutant, dict):
            mutant["xxh3"] = digest_json(mutant)
        (saved.path / "manifest.json").write_text(json.dumps(mutant))
        try:
            assert saved.damage() is None or isinstance(saved.damage(), str)
        except CheckpointError as error:
            assert error.status in (2, 77)


def test_a_start_survives_any_run_state_json_and_environment_json(run, tmp_path):
    for mutant in mutants(json.loads((run / "run_state.json").read_text())):
        (tmp_path / "run_state.json").write_text(json.dumps(mutant))
        directory = RunDirectory(tmp_path)
        directory.write_state("running")
        state = read_state(tmp_path)
        assert (state.get("saved_step") or 0) >= -1 and state["attempt"] > -2
        del directory
    for mutant in mutants(json.loads((run / "environment.json").read_text())):
        (tmp_path / "environment.json").write_text(json.dumps(mutant))
        read = environment.read(tmp_path)
        json.dumps(environment.with_start(read, {}, {"step": 3}))
        environment.start_of_step(read, 3).get("world_size")


def test_token_files_open_with_any_sidecar_or_are_refused(tmp_path):
    from tests.test_batches import OPEN, config

    write(tmp_path / "a")
    sidecar, refused = json.loads((tmp_path / "a.json").read_text()), 0
    for mutant in mutants(sidecar):
        (tmp_path / "a.json").write_text(json.dumps(mutant))
        try:
            Sidecar.read(tmp_path / "a.json")
            data = open_train(config(tmp_path / "a", valid=[tmp_path / "a"], document_mask=True), **OPEN)
            data.take(0, 2)
            data.sources[0].file.check_checksums()
        except DataError:
            refused += 1
    assert refused > 200


def test_a_start_and_its_tools_read_any_line_of_metrics_or_leave_it_out(run, tmp_path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if "loss" in line)
    odd = step | {"loss": None, "nonfinite": {"loss": "nan"}, "val_loss": 1.5, "skipped_positions": [8, 16]}
    kept = 0
    for mutant in [*mutants(lines[0]), *mutants(odd)]:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(mutant) + "\n")
        _, reference = cut_records(tmp_path / "metrics.jsonl", 4)
        merge_equal(reference or {})
        kept += len(read_records(tmp_path))
        with contextlib.suppress(RecordsError):  # no logging step
            read_curves(tmp_path)
    assert kept > 100


def test_a_hugging_face_folder_opens_with_any_config_and_index_or_is_refused(tmp_path):
    model = model_of("mixtral")
    folder = make_hf_folder(tmp_path / "hf", open_run(make_run(tmp_path / "run", model, None)).weights)
    config, outcomes = json.loads((folder / "config.json").read_text()), {True: 0, False: 0}
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    for name, content in (("config.json", config), ("model.safetensors.index.json", index)):
        if name != "config.json":
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        for mutant in list(mutants(content))[::3]:
            (folder / name).write_text(json.dumps(mutant))
            refused = False
            try:
                open_hf_folder(folder)
            except UserError:
                refused = True
            outcomes[refused] += 1
        (folder / name).write_text(json.dumps(content))
    assert min(outcomes.values()) > 50
