"""Checkpoints in a mirror outlive the machine: whatever happens to store and node, a new node resumes to the bit."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from pretrain.checkpoint.manifest import Checkpoint, checkpoints
from pretrain.config import load
from pretrain.data import remote
from pretrain.run import mirror_store
from pretrain.run.directory import Locked, RunDirectory, read_state
from pretrain.run.mirror import Mirror
from pretrain.run.mirror_store import Damaged, MirrorStore, Pace
from pretrain.run.preflight import mirror_findings
from tests.models import train_here
from tests.ranks import run_ranks
from tests.s3 import BUCKET, s3_server
from tests.test_train import ROOT, curve, final_bytes, records, run_of, signal_itself_at

UNLIMITED = Pace(0)


@pytest.fixture
def s3(monkeypatch):
    monkeypatch.setattr("pretrain.run.mirror._LONGEST_PAUSE_SECONDS", 1.0)
    with s3_server() as server:
        yield server


@pytest.fixture
def patient(monkeypatch):
    """The run waits for each upload, unless the store fails: the mirror gets every save on a busy machine, too."""

    def and_wait(call):
        def called(self: Mirror, *args) -> None:
            call(self, *args)
            while self._wanted and self._failing_since is None:
                time.sleep(0.01)

        return called

    monkeypatch.setattr(Mirror, "begin", and_wait(Mirror.begin))
    monkeypatch.setattr(Mirror, "offer", and_wait(Mirror.offer))


@pytest.fixture
def mirrored(tiny, s3) -> list[str]:
    """Flags of the tiny run with an empty mirror."""
    return ["--checkpoint.mirror", f"{BUCKET}/{uuid.uuid4().hex}", *tiny]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The tiny run without a mirror, uninterrupted."""
    from tests.test_train import TINY

    folder = tmp_path_factory.mktemp("straight")
    (folder / "tiny.yaml").write_text(TINY)
    flags = ["--config", str(folder / "tiny.yaml"), "--run.directory", str(folder)]
    assert train_here(flags) == 0
    return run_of(flags)


def store_of(flags: list[str]) -> MirrorStore:
    return MirrorStore(f"{flags[1]}/tiny")


def steps(store: MirrorStore) -> list[int]:
    return [each.step for each in store.checkpoints()]


def lose(flags: list[str]) -> Path:
    """The node is lost: the folder of its runs has another name, and locks of this process are released."""
    runs = Path(flags[-1])
    lost = runs.with_name(f"lost-{uuid.uuid4().hex}")
    runs.rename(lost)
    return lost / "tiny"


def refused(flags: list[str]) -> int:
    """The status of a start that is refused; its error, which holds the lock of the folder, is dropped."""
    status = train_here(flags)
    gc.collect()
    return status


def with_environment(variables: dict[str, str], function, *args):
    """For ranks, which come from a server with an older environment."""
    os.environ.update(variables)
    return function(*args)


def aws() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def spoil(url: str) -> None:
    """Changes a byte of an object, and not its size."""
    with fsspec.open(url, "rb") as file:
        content = bytearray(file.read())
    content[-1] ^= 1
    with fsspec.open(url, "wb") as file:
        file.write(bytes(content))


# ---------------------------------------------------------------- a lost node


@pytest.mark.slow
def test_two_ranks_whose_node_is_lost_with_its_disk_resume_on_an_empty_one_to_the_bit(mirrored, tiny):
    straight = ["--run.name", "straight", *tiny]
    assert run_ranks(2, train_here, straight) == [0, 0]
    assert run_ranks(2, with_environment, aws(), signal_itself_at, mirrored, 1, 9, signal.SIGTERM) == [75, 75]
    stopped = read_state(run_of(tiny))
    assert stopped["mirrored_step"] == stopped["saved_step"] == stopped["step"] >= 9
    lost = lose(tiny)
    assert run_ranks(2, with_environment, aws(), train_here, mirrored) == [0, 0]
    again = run_of(tiny)
    assert curve(again) == curve(lost.parent / "straight") and final_bytes(again) == final_bytes(lost.parent / "straight")
    assert read_state(again)["attempt"] == 2 and read_state(again)["mirrored_step"] == 20
    starts = json.loads((again / "environment.json").read_text())["starts"]
    assert [each["step"] for each in starts] == [0, stopped["step"]]
    before = (lost / "console.log").read_text().splitlines()
    assert (again / "console.log").read_text().splitlines()[: len(before)] == before  # to the end of the first job


@pytest.mark.slow
def test_a_node_with_an_older_checkpoint_takes_the_newer_one_of_the_mirror_and_keeps_its_own_records(
    mirrored, straight, patient
):
    assert train_here(["--checkpoint.keep_last", "3", *mirrored]) == 0
    run = run_of(mirrored)
    for step in (16, 20):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]))
    assert train_here(mirrored) == 0
    assert (run / "left-metrics.jsonl").read_text() == "".join(lines[:5])
    assert curve(run) == curve(straight) and [each.step for each in checkpoints(run / "checkpoints")] == [20, 12]


@pytest.mark.slow
def test_a_node_that_is_killed_during_an_upload_loses_the_steps_since_the_last_complete_one(mirrored, straight, s3):
    begun, first = threading.Event(), threading.Event()

    def slow_after_step_4(method: str, path: str) -> float | None:
        if method == "PUT" and path.endswith("/manifest.json"):
            first.set()
        if first.is_set() and method == "PUT" and "/tensors" in path:
            begun.set()
            return 30.0
        return None

    s3.fault = slow_after_step_4
    command = [sys.executable, "launch/pretrain.py", *mirrored]
    node = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert begun.wait(150)
    node.kill()
    node.wait()
    s3.fault = lambda method, path: None
    store = store_of(mirrored)
    complete, half = steps(store)[0], max(store.listing())
    assert half > complete and "manifest.json" not in store.listing()[half]
    lose(mirrored)
    assert train_here(mirrored) == 0
    assert f", resuming after step {complete}" in (run_of(mirrored) / "console.log").read_text()
    assert curve(run_of(mirrored)) == curve(straight)
    assert set(store.listing()) == set(steps(store))  # what the kill left is removed, or complete


@pytest.mark.slow
def test_after_a_notice_the_job_waits_for_its_upload_only_until_the_deadline(mirrored, s3):
    s3.fault = lambda method, path: 60.0 if method == "PUT" and "/tensors" in path else None
    flags = ["--checkpoint.deadline_seconds", "20", "--checkpoint.every_steps", "0", "--train.max_steps", "1000000", *mirrored]
    command = [sys.executable, "launch/pretrain.py", *flags]
    node = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    metrics = run_of(mirrored) / "metrics.jsonl"
    while node.poll() is None and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.05)
    node.terminate()
    assert node.wait(60) == 75
    state, text = read_state(run_of(mirrored)), (run_of(mirrored) / "console.log").read_text()
    assert state["saved_step"] == state["step"] >= 5 and state["mirrored_step"] is None and state["exit_status"] == 75
    assert f"lacks step {state['step']}, it has no checkpoint yet" in text
    assert json.loads(store_of(mirrored).read("owner.json"))["ended"]  # the next node need not wait for a sign of life


@pytest.mark.slow
@pytest.mark.parametrize("content", ["half", "garbage"])
def test_an_interrupted_download_continues_where_it_ended(content, mirrored, straight, s3, monkeypatch):
    store = store_of(mirrored)
    store.claim(straight, print)
    store.upload(checkpoints(straight / "checkpoints")[0], UNLIMITED, threading.Event())
    store.beat(ended=True)
    monkeypatch.setattr("pretrain.run.restore.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert refused(mirrored) == 74 and "GiB free" in read_state(run_of(mirrored))["reason"]
    monkeypatch.undo()
    source = next((straight / "checkpoints" / "step_00000020").glob("*.safetensors"))
    half = source.read_bytes()[: source.stat().st_size // 2]
    partial = run_of(mirrored) / "checkpoints" / ".get-step_00000020" / source.name
    partial.write_bytes(half if content == "half" else bytes(len(half)))
    s3.bytes = 0
    assert train_here(mirrored) == 0
    assert final_bytes(run_of(mirrored)) == final_bytes(straight) and curve(run_of(mirrored)) == curve(straight)
    assert (s3.bytes < source.stat().st_size) == (content == "half")


@pytest.mark.slow
def test_a_damaged_checkpoint_on_the_disk_is_replaced_by_that_of_the_mirror(mirrored, straight):
    assert train_here(mirrored) == 0
    run = run_of(mirrored)
    file = next((run / "checkpoints" / "step_00000020").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert train_here(mirrored) == 0
    assert final_bytes(run) == final_bytes(straight) and (run / "checkpoints" / "damaged-step_00000020").is_dir()
    assert records(run)[-1]["step"] == 20


@pytest.mark.slow
def test_the_run_at_wandb_is_continued_from_the_mirror(mirrored, monkeypatch):
    known = []

    def no_wandb(run):
        known.append(run.id)
        return contextlib.nullcontext(lambda step, values: None)

    monkeypatch.setattr("pretrain.report.trackers.WandbRun.open", no_wandb)
    wandb = [*mirrored[:2], "--log.sinks", "[console, jsonl, wandb]", *mirrored[2:]]
    assert train_here(wandb) == 0
    lose(mirrored)
    assert train_here(wandb) == 0
    assert known[0] == known[1]


# ---------------------------------------------------------------- what is chosen


@pytest.mark.slow
def test_a_corrupt_object_in_the_mirror_is_passed_over_and_an_older_checkpoint_is_resumed(mirrored, straight, patient, capsys):
    assert train_here(mirrored) == 0
    store = store_of(mirrored)
    names = store.listing()
    spoil(f"{store.url}/checkpoints/step_00000020/{next(name for name in names[20] if 'tensors' in name)}")
    lose(mirrored)
    assert train_here(mirrored) == 0
    assert "damaged checkpoint passed over" in capsys.readouterr().out
    assert ", resuming after step 16" in (run_of(mirrored) / "console.log").read_text()
    assert curve(run_of(mirrored)) == curve(straight) and steps(store) == [20, 16]
    lose(mirrored)
    for step, files in store.listing().items():
        spoil(f"{store.url}/checkpoints/step_{step:08d}/{next(name for name in files if 'tensors' in name)}")
    assert train_here(mirrored) == 2  # and not a fresh start
    assert "none of its checkpoints is valid" in read_state(run_of(mirrored))["reason"]


@pytest.mark.slow
def test_a_half_upload_is_never_chosen(mirrored, straight, patient, s3):
    s3.fault = lambda method, path: "503" if "step_00000020/tensors" in path else None
    monkey = pytest.MonkeyPatch()
    monkey.setattr(remote, "RETRY_SECONDS", 2.0)
    assert train_here(mirrored) == 0
    monkey.undo()
    state, text = read_state(run_of(mirrored)), (run_of(mirrored) / "console.log").read_text()
    before = state["mirrored_step"]
    assert before == 16 and state["saved_step"] == 20
    assert f"lacks step 20, it has step {before}" in text
    store = store_of(mirrored)
    assert "state.json" in store.listing()[20] and steps(store)[0] == before
    s3.fault = lambda method, path: None
    lost = lose(mirrored)
    assert train_here(mirrored) == 0
    assert f", resuming after step {before}" in (run_of(mirrored) / "console.log").read_text()
    assert curve(run_of(mirrored)) == curve(straight) == curve(lost)
    assert steps(store)[0] == 20 and set(store.listing()) == set(steps(store))


@pytest.mark.slow
def test_the_manifest_is_the_last_object_of_a_checkpoint_that_appears_and_the_first_that_disappears(mirrored, s3):
    seen = []

    def note(method: str, path: str) -> None:
        if method in ("PUT", "POST", "DELETE") and "/checkpoints/" in path:
            seen.append((method, path.partition("/checkpoints/step_000000")[2]))

    s3.fault = note
    assert train_here(mirrored) == 0
    order = [name.partition("/")[2] for method, name in seen if method == "PUT" and name.startswith("20")]
    assert order[0] == "uploading.json" and order[-1] == "manifest.json" and len(order) == 4


@pytest.mark.slow
def test_a_run_that_goes_back_withdraws_later_checkpoints_of_the_mirror(mirrored, patient):
    assert train_here(["--checkpoint.keep_last", "3", *mirrored]) == 0
    before = steps(store_of(mirrored))
    back = ["--checkpoint.resume", str(run_of(mirrored) / "checkpoints" / "step_00000012")]
    other = ["--optimizer.lr", "5e-3", "--checkpoint.allow_changes", "[optimizer.lr]"]
    assert train_here([*back, *other, "--train.max_steps", "20", "--checkpoint.every_steps", "0", *mirrored]) == 0
    store, changed = store_of(mirrored), curve(run_of(mirrored))
    assert steps(store)[:2] == [20, 12]
    left = {step for step, files in store.listing().items() if "left-manifest.json" in files}
    assert left == {step for step in before if 12 < step < 20}
    lose(mirrored)
    assert train_here([*other, *mirrored]) == 0
    assert curve(run_of(mirrored)) == changed


@pytest.mark.slow
def test_the_mirror_keeps_what_the_disk_keeps(mirrored):
    assert train_here(["--checkpoint.keep_last", "1", *mirrored]) == 0
    kept = steps(store_of(mirrored))
    assert kept[0] == 20 and len(kept) <= 2 and set(store_of(mirrored).listing()) == set(kept)
    losses = {each.step: each.state()["val_loss"] for each in store_of(mirrored).checkpoints()}
    assert min(filter(None, losses.values())) == min(
        record["val_loss"] for record in records(run_of(mirrored)) if record.get("val_loss") and record["step"] % 4 == 0
    )


# ---------------------------------------------------------------- uploads


@pytest.fixture
def saved(tmp_path, straight, s3) -> tuple[MirrorStore, Checkpoint]:
    """An empty mirror whose owner is this job, and a checkpoint on the disk."""
    shutil.copytree(straight, tmp_path / "tiny")
    store = MirrorStore(f"{BUCKET}/{uuid.uuid4().hex}/tiny", remote.tried_once)
    store.claim(tmp_path / "tiny", print)
    return store, checkpoints(tmp_path / "tiny" / "checkpoints")[0]


def test_an_interrupted_upload_continues_with_the_files_that_are_missing(saved, s3):
    store, found = saved
    s3.fault = lambda method, path: "503" if "tensors" in path else None
    with pytest.raises(Exception, match="no"):
        store.upload(found, UNLIMITED, threading.Event())
    assert store.checkpoints() == [] and "state.json" in store.listing()[20]
    put = Counter()

    def count(method: str, path: str) -> None:
        put[Path(path).name] += method in ("PUT", "POST")

    s3.fault = count
    store.upload(found, UNLIMITED, threading.Event())
    assert put["state.json"] == 0 and sum(put[name] for name in put if "tensors" in name) == 1 and steps(store) == [20]
    put.clear()
    store.upload(found, UNLIMITED, threading.Event())
    assert not +put  # it is there


def test_files_of_another_checkpoint_of_this_step_are_not_taken_for_its_own(saved, s3):
    store, found = saved
    folder = mirror_store.folder_of(20)
    for name, entry in found.manifest()["files"].items():
        store.write(f"{folder}/{name}", bytes(entry["bytes"]))
    store.write(f"{folder}/uploading.json", b"{}")
    store.upload(found, UNLIMITED, threading.Event())
    assert store.read(f"{folder}/state.json") == (found.path / "state.json").read_bytes()


def test_a_file_that_changed_on_the_disk_is_not_uploaded_under_a_manifest(saved):
    store, found = saved
    file = next(found.path.glob("*.safetensors"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(Damaged, match="has changed"):
        store.upload(found, UNLIMITED, threading.Event())
    assert store.checkpoints() == [] and file.name not in store.listing()[20]


def test_uploads_keep_to_their_bandwidth(saved):
    store, found = saved
    total = sum(entry["bytes"] for entry in found.manifest()["files"].values())
    pace, began = Pace(total / 1e6), time.monotonic()  # 1 s for all of it; the last block is not waited for
    store.upload(found, pace, threading.Event())
    pace.wait(1, threading.Event())
    assert time.monotonic() - began >= 1


def test_an_upload_that_keeps_to_a_bandwidth_ends_when_it_is_stopped():
    pace, stopped, began = Pace(0.001), threading.Event(), time.monotonic()
    pace.wait(100_000, stopped)  # the next byte may be sent in 100 s
    threading.Timer(0.1, stopped.set).start()
    pace.wait(1, stopped)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_an_outage_of_the_store_changes_no_loss_and_is_reported_once(mirrored, straight, s3, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 1.0)
    out = threading.Event()
    out.set()
    s3.fault = lambda method, path: "503" if out.is_set() and "/checkpoints" in path and method in ("PUT", "POST") else None
    assert train_here(mirrored) == 0
    assert curve(run_of(mirrored)) == curve(straight)
    lines = [line for line in (run_of(mirrored) / "console.log").read_text().splitlines() if "  mirror  " in line]
    assert sum("is tried again" in line for line in lines) == 1 and "lacks step 20" in lines[-1], lines
    assert read_state(run_of(mirrored))["mirrored_step"] is None
    out.clear()
    assert train_here(mirrored) == 0  # done, and uploads what the mirror lacks
    assert steps(store_of(mirrored)) == [20] and read_state(run_of(mirrored))["mirrored_step"] == 20


@pytest.mark.slow
def test_a_slow_link_skips_checkpoints_and_ends_with_the_newest(mirrored, s3):
    s3.fault = lambda method, path: 0.4 if "/checkpoints/" in path and method == "PUT" else None
    assert train_here(["--checkpoint.every_steps", "1", *mirrored]) == 0
    assert steps(store_of(mirrored))[0] == 20 and len(steps(store_of(mirrored))) < 20
    assert "is behind: step" in (run_of(mirrored) / "console.log").read_text()


# ---------------------------------------------------------------- refused at the start


def test_a_mirror_that_cannot_be_used_is_refused_before_training(mirrored, s3, capsys, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 1.0)
    nowhere = ["--checkpoint.mirror", "s3://nowhere/runs", *mirrored[2:]]
    unknown = ["--checkpoint.mirror", "nothing://bucket", *mirrored[2:]]
    for flags, part in ((nowhere, "s3://nowhere/runs"), (unknown, "nothing://bucket")):
        assert mirror_findings(load(flags))[0].stops and mirror_findings(load(flags))[0].name == "mirror-unusable"
        assert refused(flags) == 2 and part in (error := capsys.readouterr().err)
        assert ("no such bucket" in error) == (flags is nowhere)
    s3.fault = lambda method, path: "403"
    assert refused(mirrored) == 2 and "refuses access" in capsys.readouterr().err
    s3.fault = lambda method, path: "503"
    assert refused(mirrored) == 75 and "does not answer" in capsys.readouterr().err
    s3.fault = lambda method, path: None
    assert mirror_findings(load(mirrored)) == [] and not store_of(mirrored).listing()
    assert not (run_of(mirrored) / "metrics.jsonl").exists()


@pytest.mark.slow
def test_checkpoints_of_another_run_in_the_mirror_are_refused(mirrored, capsys):
    assert train_here(mirrored) == 0
    lose(mirrored)
    assert refused(["--model.hidden_size", "48", *mirrored]) == 2
    errors = capsys.readouterr().err
    assert "model.hidden_size" in errors and mirrored[1] in errors
    assert not list((run_of(mirrored) / "checkpoints").glob(".get-*"))  # nothing was downloaded for that
    assert refused(["--checkpoint.resume", "never", *mirrored]) == 2 and mirrored[1] in capsys.readouterr().err
    assert train_here(mirrored[2:]) == 0  # another run, which only later gets this mirror
    assert refused(mirrored) == 2 and "checkpoints of another run" in capsys.readouterr().err


def test_a_second_job_is_refused_while_the_first_lives_and_takes_the_place_of_one_that_died(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_store, "SILENCE_SECONDS", 2.0)
    url = f"{BUCKET}/{uuid.uuid4().hex}"
    first, second = MirrorStore(url), MirrorStore(url)
    first.claim(tmp_path / "a", print)
    end = threading.Event()
    thread = threading.Thread(target=lambda: [first.beat() for _ in iter(lambda: end.wait(0.1), True)])
    thread.start()
    with pytest.raises(Locked, match="is in use by process"):
        second.claim(tmp_path / "b", print)
    end.set()
    thread.join()
    second.claim(tmp_path / "b", print)  # no sign of life any more
    with pytest.raises(Locked):
        first.beat()
    with pytest.raises(Locked):
        first.require_owner()
    second.beat(ended=True)
    began = time.monotonic()
    MirrorStore(url).claim(tmp_path / "c", print)  # at once
    third = MirrorStore(url)
    third.claim(tmp_path / "c", print)  # its folder was locked by the last owner, which therefore has died
    assert time.monotonic() - began < 2


def test_the_account_is_uploaded_between_checkpoints_once_the_run_has_opened_it(tiny, tmp_path, monkeypatch):
    """What a lost machine did after its last checkpoint was paid for. Before, the mirror's account may be the newer one."""
    monkeypatch.setattr(mirror_store, "BEAT_SECONDS", 0.01)
    config = load(["--checkpoint.mirror", f"file://{tmp_path}/disk", *tiny])
    directory, there = RunDirectory(run_of(tiny)), tmp_path / "disk/tiny"

    def arrives(text: str) -> bool:
        end = time.monotonic() + 60
        while not ((there / "ledger.json").exists() and (there / "ledger.json").read_text() == text) and time.monotonic() < end:
            time.sleep(0.01)
        return time.monotonic() < end

    def beats() -> int:
        with contextlib.suppress(ValueError):  # it is being written
            return json.loads((there / "owner.json").read_bytes())["beat"]
        return 0

    with Mirror(config, directory, 0) as mirror:
        directory.write_text("ledger.json", "older")
        mirror.open()
        while beats() < 3:
            time.sleep(0.01)
        assert not (there / "ledger.json").exists()
        mirror.begin(0, None, print, print)
        assert arrives("older")
        directory.write_text("ledger.json", "newer")
        assert arrives("newer")


@pytest.mark.slow
def test_a_job_whose_place_is_taken_ends_with_73(mirrored, monkeypatch):
    monkeypatch.setattr(mirror_store, "BEAT_SECONDS", 0.05)

    def take_over() -> None:
        store = store_of(mirrored)
        while not any(each.step >= 4 for each in store.checkpoints()):
            time.sleep(0.02)
        while not ended.wait(0.1):  # a sign of life that was on its way may overwrite it once
            store.write("owner.json", json.dumps({"job": "another", "host": "elsewhere", "pid": 1}).encode())

    ended = threading.Event()
    threading.Thread(target=take_over, daemon=True).start()
    assert train_here(["--train.max_steps", "5000", "--log.every_steps", "100", *mirrored]) == 73
    ended.set()
    assert "elsewhere" in read_state(run_of(mirrored))["reason"]


def test_a_mirror_may_be_a_folder_of_another_disk(tiny, tmp_path, straight):
    flags = ["--checkpoint.mirror", f"file://{tmp_path}/disk", *tiny]
    assert train_here(flags) == 0
    lose(flags)
    assert train_here(flags) == 0 and curve(run_of(flags)) == curve(straight)
    assert sorted(path.name for path in (tmp_path / "disk/tiny/checkpoints").iterdir()) == ["step_00000016", "step_00000020"]
