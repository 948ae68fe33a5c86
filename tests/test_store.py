"""Token files and tokenizers in object stores: the same tokens as on a disk or an error, whatever store and cache do."""

import contextlib
import http.server
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pretrain.data import remote, store
from pretrain.data.errors import DataError, DataMissing, StoreError
from pretrain.data.indexed import TokenFile
from pretrain.data.reads import OpenFiles
from pretrain.data.shards import open_shards
from pretrain.data.store import Store
from pretrain.data.tokenizer import Tokenizer
from tests.models import make_tokenizer

from .test_indexed import all_tokens, documents, write

ROOT = Path(__file__).resolve().parents[1]
S3_SERVER = pytest.mark.slow  # imports moto


@pytest.fixture
def web(tmp_path) -> Path:
    """A folder of a pair with a sidecar, of 12 of the blocks below, and of a flat file."""
    folder = tmp_path / "web"
    folder.mkdir()
    write(folder / "part-0", documents([100] * 240, seed=0))
    (np.arange(9000) % 500).astype("<u2").tofile(folder / "flat.bin")
    return folder


@pytest.fixture
def memory(web, monkeypatch) -> Iterator[str]:
    """The URL of a copy of `web` in memory, which is fetched in blocks of 4 KiB."""
    monkeypatch.setattr(store, "BLOCK_BYTES", 4096)
    system = fsspec.filesystem("memory")
    for file in web.iterdir():
        system.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def opened(url: str, cache: Path, gib: float = 1.0) -> list[TokenFile]:
    return open_shards(url, open_files=OpenFiles(store=Store(cache, gib)))


def blocks(cache: Path) -> list[Path]:
    return [path for path in (cache / "blocks").rglob("*-*") if path.is_file()]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_files_of_a_store_are_those_of_a_disk(scheme, memory, web, tmp_path):
    url = memory if scheme == "memory" else f"file://{web}"
    for path, here in ((f"{url}/", f"{web}/"), (f"{url}/part-*", f"{web}/part-*"), (f"{url}/flat.bin", f"{web}/flat.bin")):
        there, local = opened(path, tmp_path / "cache"), open_shards(here)
        assert [Path(file.path).name for file in there] == [Path(file.path).name for file in local]
        for one, other in zip(there, local, strict=True):
            assert np.array_equal(all_tokens(one), all_tokens(other))
            assert one.fingerprint() == other.fingerprint() and one.sidecar == other.sidecar
    pair = opened(f"{url}/part-0", tmp_path / "cache")[0]
    pair.check_checksums()
    assert np.array_equal(pair.document(7), TokenFile(web / "part-0").document(7))
    with pytest.raises(DataMissing, match="none"):
        opened(f"{url}/none", tmp_path / "cache")


def test_only_the_blocks_that_are_read_are_fetched_and_each_once(memory, tmp_path, monkeypatch):
    fetched, cat_file = [], type(fsspec.filesystem("memory")).cat_file

    def counting(self, path: str, start: int, end: int) -> bytes:
        fetched.append(start)
        return cat_file(self, path, start, end)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", counting)
    file = opened(f"{memory}/part-0", tmp_path / "cache")[0]
    fetched.clear()
    for _ in range(2):
        file.read([5000, 5100], [10, 10])
    assert fetched == [8192]
    file.read_soon(np.array([12000]), np.array([100]))  # in bytes of two in a token
    file.read([12000], [100])
    assert fetched == [8192, 20480]


def test_tokens_that_do_not_fit_in_the_cache_are_fetched_as_they_are_read_and_not_kept(memory, tmp_path, monkeypatch):
    tokens = (np.arange(1 << 21) % 499).astype("<u2")  # 4 MiB, of which a start samples 1 MiB
    fsspec.filesystem("memory").pipe_file("/bucket/large.bin", tokens.tobytes())
    fetched, cat_file = [], type(fsspec.filesystem("memory")).cat_file

    def counting(self, path: str, start: int, end: int) -> bytes:
        fetched.append((start, end))
        return cat_file(self, path, start, end)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", counting)
    mib = 2**-10
    file = opened(f"{memory}/large.bin", tmp_path / "cache", 2 * mib)[0]
    fingerprint, kept = file.watch(), len(blocks(tmp_path / "cache"))
    assert sum(end - begin for begin, end in fetched) < 1.25 * 2**20
    fetched.clear()
    starts, lengths = np.array([5000, 100, 9000]), np.array([10, 3000, 20])
    file.read_soon(starts, lengths)
    for _ in range(2):
        expected = [tokens[begin : begin + count] for begin, count in zip(starts, lengths, strict=True)]
        assert np.array_equal(file.read(starts, lengths), np.concatenate(expected))
    once = [(10000, 10020), (200, 4296), (4296, 6200), (18000, 18040)]  # at most a block at a time
    assert sorted(fetched) == sorted(2 * once) and len(blocks(tmp_path / "cache")) == kept
    fetched.clear()
    again = opened(f"{memory}/large.bin", tmp_path / "cache", 2 * mib)[0]
    assert again.watch() == fingerprint and not fetched, "the samples of a start are not kept for the next"
    both = opened(f"{memory}/*.bin", tmp_path / "both", 4 * mib)  # each fits, but not both
    fetched.clear()
    assert both[0].read([0], [10]).tolist() == (np.arange(10) % 500).tolist() and fetched == [(0, 20)]


def test_an_object_stays_the_version_that_was_opened_however_many_there_are(memory, web, tmp_path):
    few = OpenFiles(1, store=Store(tmp_path / "cache"))
    flat = open_shards(f"{memory}/flat.bin", open_files=few)[0]
    open_shards(f"{memory}/part-0", open_files=few)[0].read([0], [10])
    fsspec.filesystem("memory").pipe_file("/bucket/flat.bin", (web / "flat.bin").read_bytes()[::-1])
    assert flat.read([8000], [10]).tolist() == TokenFile(web / "flat.bin").read([8000], [10]).tolist()  # from the cache


def test_an_object_that_is_replaced_or_removed_while_in_use_is_an_error(memory, web, tmp_path):
    system = fsspec.filesystem("memory")
    file = opened(f"{memory}/part-0", tmp_path / "cache")[0]
    file.read([0], [100])
    content = bytearray((web / "part-0.bin").read_bytes())
    system.pipe_file("/bucket/part-0.bin", bytes(content[::-1]))
    file.read([0], [100])  # a block in the cache is that of the old version
    with pytest.raises(DataError, match="replaced"):
        file.read([6000], [100])
    again = opened(f"{memory}/part-0", tmp_path / "cache")[0]
    system.rm_file("/bucket/part-0.bin")
    with pytest.raises(DataError, match="not in the store"):
        again.read([8000], [100])


def test_a_new_version_of_an_object_is_not_read_from_old_blocks(memory, web, tmp_path):
    tokens = all_tokens(opened(f"{memory}/flat.bin", tmp_path / "cache")[0])
    fsspec.filesystem("memory").pipe_file("/bucket/flat.bin", (tokens[::-1]).astype("<u2").tobytes())  # as long as the old one
    assert np.array_equal(all_tokens(opened(f"{memory}/flat.bin", tmp_path / "cache")[0]), tokens[::-1])


CUT, FLIPPED, LONGER = lambda data: data[:100], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: data + b"x"


@pytest.mark.parametrize("damage", [CUT, FLIPPED, LONGER])
def test_a_damaged_block_of_the_cache_is_fetched_again(damage, memory, web, tmp_path):
    all_tokens(opened(f"{memory}/part-0", tmp_path / "cache")[0])
    for block in blocks(tmp_path / "cache"):
        block.write_bytes(damage(block.read_bytes()))
    opened(f"{memory}/part-0", tmp_path / "cache")[0].check_checksums()
    opened(f"{memory}/part-0", tmp_path / "cache")[0].check_checksums()  # from the cache, which is intact again


def test_the_cache_keeps_its_limit_and_the_blocks_in_use(tmp_path):
    cache = store.BlockCache(tmp_path, 100 * 1016 / 2**30)
    cache.write("00-kept", b"k" * 1000)
    for number in range(250):
        cache.write(f"{number:02}-{number}", b"x" * 1000)
        assert cache.read("00-kept", 1000, 0, 3) == b"kkk"
        assert sum(path.stat().st_size for path in blocks(tmp_path)) <= 100 * 1016
    assert len(blocks(tmp_path)) > 80 and not cache.has("01-1") and cache.has("249-249")


def test_a_cache_that_cannot_be_written_costs_requests_and_one_message(memory, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = opened(f"{memory}/part-0", tmp_path / "cache")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writing a block fails half way
    try:
        tokens = all_tokens(files[0])
        again = all_tokens(files[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert np.array_equal(tokens, again)
    assert capsys.readouterr().err.count("cannot be cached") == 1
    files[0].check_checksums()
    assert not list((tmp_path / "cache").rglob(".*")), "temporary files of failed writes stay"


def test_a_server_that_cannot_send_parts_of_a_file_is_refused_in_words(web, tmp_path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=web)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        with pytest.raises(DataError, match="cannot send parts of a file; use another server, or download it"):
            opened(f"http://127.0.0.1:{server.server_port}/flat.bin", tmp_path / "cache")
    finally:
        server.shutdown()
        server.server_close()


READER = """
import random, sys
import numpy as np
from pretrain.data import store
from pretrain.data.reads import OpenFiles
from pretrain.data.shards import open_shards
store.BLOCK_BYTES = 4096
url, cache, seed, reads = sys.argv[1:]
file = open_shards(url, open_files=OpenFiles(store=store.Store(cache, 3 * 2**20 / 2**30)))[0]
chosen = random.Random(seed)
for _ in range(int(reads)):
    starts = np.array([chosen.randrange(1 << 20) for _ in range(8)])
    found = file.read(starts, np.full(8, 100))
    assert (found == (starts[:, None] + np.arange(100)).ravel() % 499).all(), "wrong tokens"
"""


def test_processes_that_share_a_small_cache_and_are_killed_read_the_right_tokens(tmp_path):
    cache = tmp_path / "cache"
    for number in range(2):  # of 2 MiB each: one fits in the cache of 3 MiB, both do not
        (np.arange((1 << 20) + 100) % 499).astype("<u2").tofile(tmp_path / f"{number}.bin")

    def reader(seed: int, reads: int) -> subprocess.Popen:
        program = [sys.executable, "-c", READER, f"file://{tmp_path}/{seed % 2}.bin", str(cache), str(seed), str(reads)]
        return subprocess.Popen(program, cwd=ROOT)

    killed, readers = [reader(seed, 10**9) for seed in range(2)], [reader(seed, 150) for seed in range(2, 4)]
    while not (cache.exists() and blocks(cache)):
        time.sleep(0.01)
    time.sleep(0.5)  # all of them read and evict
    for process in killed:
        process.send_signal(signal.SIGKILL)
    assert [process.wait(120) for process in readers] == [0, 0]
    assert [process.wait(120) for process in killed] == [-signal.SIGKILL] * 2
    assert 2 << 20 < sum(path.stat().st_size for path in blocks(cache)) <= 3 << 20
    assert reader(5, 100).wait(120) == 0


def test_a_tokenizer_is_loaded_from_a_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    local = make_tokenizer(tmp_path / "tokenizer")
    loaded, original = Tokenizer.load(f"file://{local}"), Tokenizer.load(local)
    assert loaded.fingerprint == original.fingerprint and loaded.encode("the fox") == original.encode("the fox")
    with pytest.raises(DataError, match="nothing"):
        Tokenizer.load(f"file://{tmp_path}/nothing")


# ---------------------------------------------------------------- a real S3 server


@pytest.fixture
def s3(tmp_path, web):
    from .s3 import BUCKET, s3_server, upload

    with s3_server() as server:
        upload(web, f"{BUCKET}/web")
        yield server


@S3_SERVER
def test_answers_of_s3_that_fail_now_and_then_change_nothing(s3, web, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_BYTES", 4096)
    chosen = random.Random(0)
    for fault in ("503", "cut", "short", "close", 0.2):
        s3.fault = lambda method, path, fault=fault: fault if chosen.random() < 0.2 else None
        pair, flat = (opened(f"s3://corpus/web/{name}", tmp_path / str(fault))[0] for name in ("part-0", "flat.bin"))
        pair.check_checksums()
        assert np.array_equal(all_tokens(flat), all_tokens(TokenFile(web / "flat.bin")))


@S3_SERVER
@pytest.mark.parametrize("fault", [60.0, "drip"])
def test_an_answer_that_never_ends_is_not_waited_for(fault, s3, web, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_REQUEST_SECONDS", 1.0)
    flat = opened("s3://corpus/web/flat.bin", tmp_path / "cache")[0]
    monkeypatch.setattr(store, "BLOCK_BYTES", 4096)  # other blocks than those of the start
    asked = Counter()

    def first_two(method: str, path: str) -> str | float | None:
        asked[method] += 1
        return fault if method == "GET" and asked[method] <= 2 else None

    s3.fault = first_two
    started = time.monotonic()
    assert np.array_equal(all_tokens(flat), all_tokens(TokenFile(web / "flat.bin")))
    assert asked["GET"] == 5 + 2 and time.monotonic() - started < 30
    s3.fault = lambda method, path: fault if method == "GET" else None
    monkeypatch.setattr(remote, "RETRY_SECONDS", 2.0)
    with pytest.raises(StoreError, match="no complete answer in 1 s"):
        opened("s3://corpus/web/flat.bin", tmp_path / "another")
    assert time.monotonic() - started < 60


@S3_SERVER
def test_listings_are_tried_again(s3, web, tmp_path):
    asked = Counter()

    def every_other(method: str, path: str) -> str | None:
        asked["all"] += 1
        return "503" if asked["all"] % 2 else None

    s3.fault = every_other
    assert [Path(file.path).name for file in opened("s3://corpus/web/", tmp_path / "cache")] == ["flat.bin", "part-0"]
    pair = ["part-0.bin", "part-0.idx", "part-0.json"]
    assert [Path(name).name for name in remote.find("s3://corpus/web/part*")[0]] == pair
    assert [Path(name).name for name in remote.find("s3://corpus/web")[0]] == ["flat.bin", *pair]
    assert [Path(name).name for name in remote.find("s3://corpus/web/flat.bin")[0]] == ["flat.bin"]
    assert remote.exists("s3://corpus/web/part-0.idx") and not remote.exists("s3://corpus/web/none")


@S3_SERVER
def test_what_s3_refuses_for_good_is_an_error_in_words(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 1.0)
    for url in ("s3://corpus/web/none", "s3://nowhere/web/part-0", "s3://nowhere/web/"):
        with pytest.raises(DataMissing, match=url):
            opened(url, tmp_path / "cache")
    s3.fault = lambda method, path: "403"
    with pytest.raises(DataError, match="refuses access"):
        opened("s3://corpus/web/part-0", tmp_path / "cache")
    s3.fault = lambda method, path: "503"
    with pytest.raises(StoreError, match=r"s3://corpus/web/part-0.bin.*does not answer"):
        opened("s3://corpus/web/part-0", tmp_path / "cache")


RUN = """
run: {name: tiny}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, vocab_size: 100}
data: {sequence_length: 32}
batch: {global_batch_size: 8, micro_batch_size: 8}
train: {max_steps: 40}
checkpoint: {every_steps: 4}
log: {every_steps: 1, sinks: [jsonl]}
"""


SMALL_BLOCKS = """
import sys
from pretrain.data import remote, store
from tests.models import train_here
store.BLOCK_BYTES, remote.RETRY_SECONDS = 4096, 1.0
sys.exit(train_here(sys.argv[1:]))
"""


def losses(run: Path) -> dict[int, float]:
    return {each["step"]: each["loss"] for each in map(json.loads, open(run / "metrics.jsonl")) if "loss" in each}


@pytest.fixture
def large(s3, tmp_path) -> Path:
    """A pair of 1,500 of the blocks below, of which opening reads some; also at s3://corpus/large."""
    from .s3 import BUCKET, upload

    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "large").mkdir()
    write(tmp_path / "large" / "part-0", documents([2000] * 1500, seed=1))
    upload(tmp_path / "large", f"{BUCKET}/large")
    return tmp_path / "large" / "part-0"


def start(folder: Path, directory: str, path: str, cache: str) -> subprocess.Popen:
    """Starts or resumes a run in `folder`/`directory`."""
    flags = ["--config", str(folder / "run.yaml"), "--run.directory", str(folder / directory)]
    flags += ["--data.train", f"[{{path: '{path}'}}]", "--data.cache_directory", str(folder / cache)]
    program = [sys.executable, "-c", SMALL_BLOCKS, *flags, "--checkpoint.resume", "auto"]
    return subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def train(*arguments) -> tuple[int, str]:
    process = start(*arguments)
    errors = process.communicate(timeout=300)[1]
    return process.returncode, errors


@S3_SERVER
def test_a_run_on_s3_survives_its_store_and_has_the_losses_of_a_run_on_a_disk(s3, large, tmp_path):
    assert train(tmp_path, "disk", str(large), "unused")[0] == 0
    s3.fault = lambda method, path: "503"
    status, errors = train(tmp_path, "s3", "s3://corpus/large/part-0", "cache")
    assert status == 75 and "s3://corpus/large/part-0.bin: the store does not answer" in errors  # like any later time
    fetched = Counter()

    def fails_later(method: str, path: str) -> str | None:
        fetched[method] += path.endswith(".bin")
        return "503" if method == "GET" and fetched["GET"] > 450 else None  # 256 at the start, then about 8 per step

    s3.fault = fails_later
    status, errors = train(tmp_path, "s3", "s3://corpus/large/part-0", "cache")
    assert list((tmp_path / "s3/tiny/checkpoints").glob("step_*"))
    assert status == 75 and "s3://corpus/large/part-0.bin: the store does not answer" in errors
    s3.fault = lambda method, path: None
    shutil.rmtree(tmp_path / "cache")
    assert train(tmp_path, "s3", "s3://corpus/large/part-0", "cache")[0] == 0
    assert losses(tmp_path / "s3" / "tiny") == losses(tmp_path / "disk" / "tiny")


@S3_SERVER
def test_a_run_on_s3_that_is_killed_resumes_to_the_bit_and_so_does_an_outage_of_seconds(s3, large, tmp_path):
    assert train(tmp_path, "disk", str(large), "unused")[0] == 0
    fetched = Counter()

    def slow_with_an_outage(method: str, path: str) -> str | float | None:
        fetched[method] += path.endswith(".bin")
        return "503" if 300 < fetched["GET"] < 320 else 0.1 if method == "GET" else None

    s3.fault = slow_with_an_outage
    killed = start(tmp_path, "s3", "s3://corpus/large/part-0", "cache")
    metrics = tmp_path / "s3" / "tiny" / "metrics.jsonl"
    while killed.poll() is None and not (metrics.exists() and len(losses(metrics.parent)) > 5):
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read()
    killed.stderr.close()
    assert train(tmp_path, "s3", "s3://corpus/large/part-0", "cache")[0] == 0
    assert losses(tmp_path / "s3" / "tiny") == losses(tmp_path / "disk" / "tiny") and fetched["GET"] > 320


# ---------------------------------------------------------------- the emulators of Google's and Azure's stores

COMPARE = """
import sys
from pathlib import Path
import fsspec
import numpy as np
from pretrain.data import remote
from pretrain.data.errors import DataError
from tests.test_indexed import all_tokens
from tests.test_store import opened
from pretrain.data.shards import open_shards
protocol, folder, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
base = f"{protocol}://corpus/web"
if protocol == "az":
    fsspec.filesystem("az").mkdir("corpus")
for file in folder.iterdir():
    with fsspec.open(f"{base}/{file.name}", "wb") as target:
        target.write(file.read_bytes())
for gib in (1.0, 1e-6):  # in blocks, and by exact ranges
    for name in ("", "part-*", "flat.bin"):
        there, here = opened(f"{base}/{name}", scratch / str(gib), gib), open_shards(f"{folder}/{name}")
        assert [Path(file.path).name for file in there] == [Path(file.path).name for file in here]
        for one, other in zip(there, here, strict=True):
            assert np.array_equal(all_tokens(one), all_tokens(other)) and one.fingerprint() == other.fingerprint()
assert remote.find(f"{base}/part*")[0] == [f"{base}/part-0{end}" for end in (".bin", ".idx", ".json")]
flat = opened(f"{base}/flat.bin", scratch / "replaced", 1e-6)[0]
with fsspec.open(f"{base}/flat.bin", "wb") as target:
    target.write(bytes(18000))
try:
    flat.read([10], [20])
except DataError as error:
    assert "replaced while in use" in str(error)
else:
    sys.exit("a replaced object is read")
"""
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The one that the emulator's documentation names."""
PACKAGES = {"gs": ["gcsfs", "gcp-storage-emulator"], "az": ["adlfs"]}


@pytest.mark.release
@pytest.mark.timeout(600)
@pytest.mark.parametrize("protocol", ["gs", "az"])
def test_google_and_azure_give_the_files_of_a_disk_and_notice_a_replaced_object(protocol, web, tmp_path):
    from tests.test_convert import python_with

    same = f"fsspec=={fsspec.__version__}"
    python = python_with(PACKAGES[protocol][0], tmp_path / "python", *PACKAGES[protocol][1:], same)
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    if protocol == "gs":
        start = "import sys; from gcp_storage_emulator.__main__ import main; sys.exit(main())"
        server = [
            python,
            "-c",
            start,
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--in-memory",
            "--default-bucket",
            "corpus",
        ]
        environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
    else:
        if not shutil.which("npm"):
            pytest.skip("npm is not installed, which installs the emulator azurite")
        install = subprocess.run(["npm", "install", "--prefix", tmp_path, "azurite"], capture_output=True, text=True)
        if install.returncode:
            pytest.skip(f"azurite cannot be installed: {install.stderr.strip().splitlines()[-1]}")
        server = [tmp_path / "node_modules/.bin/azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", port, "--silent"]
        server += ["--location", tmp_path / "azurite", "--skipApiVersionCheck", "--disableTelemetry"]
        account = f"AccountName=devstoreaccount1;AccountKey={AZURITE_KEY};BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1"
        environment = {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{account};"}
    process = subprocess.Popen(list(map(str, server)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        done = subprocess.run(
            [python, "-c", COMPARE, protocol, web, tmp_path / "scratch"],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    finally:
        process.terminate()
        process.wait()
