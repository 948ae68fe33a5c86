"""Repeatedly kills two processes that save and prune, at random instants, and checks that acknowledged checkpoints exist.

    python -m tests.faults.kill_loop FOLDER [--trials 1000] [--seed 0] [--mutant NAME]        prints one line of JSON

A mutant is a planted bug: with one, the loop stops at the first violation.

The processes run the real Saver on a state of a few tensors; only the collectives are replaced, by a pair of sockets, so that a
trial takes some tens of milliseconds. They are forked from this process, which has imported torch and has no threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Checkpoint, CheckpointError, checkpoints
from pretrain.checkpoint.saver import Saver
from pretrain.config import CheckpointConfig, EngineConfig
from pretrain.engines.shards import Shard

SIZES = {"model/embedding": 3000, "exp_avg/embedding": 3000, "model/norm": 7}
LONGEST_SYNC_SECONDS = 0.002


class Rank:
    """The part of an engine that checkpoints use, for a state that is a function of the step."""

    device = torch.device("cpu")
    config = EngineConfig()

    def __init__(self, rank: int = 0, world_size: int = 1, peer: socket.socket | None = None):
        self.rank, self.world_size, self.peer = rank, world_size, peer
        self.tensors = {name: torch.empty(size) for name, size in SIZES.items()}
        self.updates = 0

    def become(self, step: int) -> None:
        """Sets the state after `step`."""
        self.updates = step
        for name, tensor in self.tensors.items():
            tensor.copy_(expected(name, step))

    def shards(self, *, saving: bool) -> Iterator[Shard]:
        for name, tensor in self.tensors.items():
            share = -(-len(tensor) // self.world_size)
            start, stop = (self.rank * share, (self.rank + 1) * share) if saving else (0, len(tensor))
            yield Shard(name, tuple(tensor.shape), start, tensor[start:stop])

    def saved_values(self) -> int:
        return sum(shard.values.numel() for shard in self.shards(saving=True))

    def restore(self, fill: Callable[[Shard], None]) -> None:
        for shard in self.shards(saving=False):
            fill(shard)

    def all_reduce(self, values: Tensor) -> Tensor:
        if self.peer:
            mine = json.dumps(values.tolist()).encode()
            self.peer.sendall(mine.ljust(64))
            received = b""
            while len(received) < 64:
                received += (part := self.peer.recv(64 - len(received)))
                if not part:
                    signal.pause()  # the peer was killed: a real rank would hang in the collective until it is killed, too
            values += torch.tensor(json.loads(received))
        return values

    def broadcast(self, number: int) -> int:
        return int(self.all_reduce(torch.tensor(number if self.rank == 0 else 0)))

    def barrier(self) -> None:
        self.broadcast(0)


def expected(name: str, step: int) -> Tensor:
    """The values of a tensor after `step`."""
    return torch.arange(SIZES[name]) * 0.5 + step


def slow_disk(seed: str) -> None:
    """Slows down syncs and renames as a disk would, so that kills hit between any two of them, even on a RAM disk."""
    randomly, fsync, rename = random.Random(seed), os.fsync, os.rename

    def sleep() -> None:
        time.sleep(randomly.uniform(0, LONGEST_SYNC_SECONDS))

    os.fsync = lambda descriptor: (sleep(), fsync(descriptor), sleep())
    os.rename = lambda source, target: (sleep(), rename(source, target), sleep())


def save_forever(folder: Path, rank: Rank, acknowledged: int, first_step: int, asynchronous: bool) -> None:
    """Runs steps and saves at every second one, until the process is killed."""
    torch.set_num_threads(1)
    config = CheckpointConfig(keep_last=2, keep_best=1, asynchronous=asynchronous)
    saver = Saver(folder, rank, config, lambda saved: os.write(acknowledged, saved.step.to_bytes(8, "little")))
    for step in itertools.count(first_step):
        rank.become(step)
        saver.settle(rank.all_reduce(torch.tensor(saver.votes())).tolist())
        if step % 2 == 0:
            saver.save(step, {"val_loss": (step * 7919) % 101 / 100}, last=False)


class Pace:
    """Estimates how long a save takes on this machine now; kills are spread over that time."""

    def __init__(self) -> None:
        self.seconds = 0.02

    def wait(self, reader: int, saves: int, randomly: random.Random) -> bytes:
        """Waits for `saves` acknowledgements, then a random time. Returns the acknowledgements."""
        data = b""
        for number in range(saves):
            began = time.monotonic()
            data += os.read(reader, 8)
            if number:  # the first one includes the start
                self.seconds += 0.2 * (time.monotonic() - began - self.seconds)
        time.sleep(randomly.uniform(0, 1.5 * self.seconds))
        return data


def trial(folder: Path, randomly: random.Random, pace: Pace, first_step: int) -> list[int]:
    """Starts two processes and kills them. Returns the steps that were acknowledged."""
    pair, (reader, writer) = socket.socketpair(), os.pipe()
    asynchronous, seed = randomly.random() < 0.7, randomly.random()
    processes = []
    for number in range(2):
        if not (process := os.fork()):
            try:
                slow_disk(f"{seed} {number}")
                save_forever(folder, Rank(number, 2, pair[number]), writer, first_step, asynchronous)
            except BaseException as error:
                print(f"rank {number}: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(1)
        processes.append(process)
    os.close(writer)
    for each in pair:
        each.close()
    data = pace.wait(reader, randomly.randrange(4), randomly)
    randomly.shuffle(processes)
    gap = randomly.choice([0, 0, randomly.uniform(0, 0.01)])  # all at once, or one first
    for process in processes:
        os.kill(process, signal.SIGKILL)
        time.sleep(gap)
    for process in processes:
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "a process exited by itself"
    with os.fdopen(reader, "rb") as pipe:
        data += pipe.read()
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def violations(counts: dict[str, int]) -> dict[str, int]:
    return {key: count for key, count in counts.items() if key not in ("trials", "acknowledged") and count}


def run(folder: Path, trials: int, seed: int, *, stop_at_violation: bool) -> dict[str, int]:
    """Runs trials. Returns counts of trials, acknowledgements and violations."""
    randomly, pace, alone = random.Random(seed), Pace(), Rank()
    counts = dict.fromkeys(["trials", "acknowledged", "lost", "damaged", "wrong", "left_over", "fewer_than_kept"], 0)
    last_acknowledged, first_step, steps = -1, 2, set()
    for _ in range(trials):
        acknowledged = trial(folder, randomly, pace, first_step)
        counts["trials"] += 1
        counts["acknowledged"] += len(acknowledged)
        steps |= {*acknowledged}
        last_acknowledged = acknowledged[-1] if acknowledged else last_acknowledged
        messages: list[str] = []
        storage.clean(folder)
        try:
            found = storage.newest_valid(folder, alone, messages.append)
        except CheckpointError:
            found = None
        counts["damaged"] += len(messages)
        counts["lost"] += last_acknowledged > (found.step if found else -1)
        counts["left_over"] += any(path.name.startswith(".") for path in folder.glob("*"))
        if found:
            storage.load(found, alone)
            right = all(torch.equal(tensor, expected(name, found.step)) for name, tensor in alone.tensors.items())
            counts["wrong"] += not right or alone.updates != found.step
        intact = [each for each in checkpoints(folder) if each.damage() is None]
        counts["fewer_than_kept"] += len(intact) < min(2, len(steps))  # a step that was saved again counts once
        last_acknowledged = found.step if found else -1  # the next trial must not lose it
        if stop_at_violation and violations(counts):
            break
        # Go back every other time, so that a step is saved again.
        first_step = max(2, last_acknowledged + 1 - randomly.choice([0, 2]))
    return counts


# ---------------------------------------------------------------- bugs that the loop must find


def manifest_first() -> None:
    """Writes rank 0's tensors after the manifest and the rename."""
    write, commit, later = storage.write_file, storage.commit, []

    def write_later(path: Path, blocks, *on_progress) -> dict:
        if not path.name.startswith("tensors-00000"):
            return write(path, blocks, *on_progress)
        data = b"".join(bytes(block) for block in blocks)
        later.append((path.name, data))
        return {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}

    def commit_and_write(*args) -> Checkpoint:
        saved = commit(*args)
        while later:
            name, data = later.pop()
            write(saved.path / name, [data])
        return saved

    storage.write_file, storage.commit = write_later, commit_and_write


def acknowledged_first() -> None:
    """Acknowledges a save when its bytes are written, before the rename."""
    commit = storage.commit

    def late(temporary: Path, state: bytes, world_size: int) -> Checkpoint:
        late.saver.acknowledge(Checkpoint(temporary.with_name(temporary.name.removeprefix(".tmp-"))))
        return commit(temporary, state, world_size)

    settle = Saver.settle

    def remember(self: Saver, sums: list[int]) -> None:
        late.saver = self
        settle(self, sums)

    storage.commit, Saver.settle = late, remember


def pruned_first() -> None:
    """Removes old checkpoints before the new one exists."""
    begin = storage.begin

    def prune_and_begin(folder: Path, step: int, rank: Rank) -> Path:
        for each in checkpoints(folder) if rank.rank == 0 else []:
            storage.remove(each)
        return begin(folder, step, rank)

    storage.begin = prune_and_begin


def replaced_in_place() -> None:
    """Deletes the old checkpoint of a step before renaming the new one."""
    commit = storage.commit

    def delete_and_commit(temporary: Path, state: bytes, world_size: int) -> Checkpoint:
        shutil.rmtree(temporary.with_name(temporary.name.removeprefix(".tmp-")), ignore_errors=True)
        return commit(temporary, state, world_size)

    storage.commit = delete_and_commit


MUTANTS = {each.__name__: each for each in (manifest_first, acknowledged_first, pruned_first, replaced_in_place)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutant", choices=MUTANTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.mutant:
        MUTANTS[arguments.mutant]()
    print(json.dumps(run(arguments.folder, arguments.trials, arguments.seed, stop_at_violation=bool(arguments.mutant))))


if __name__ == "__main__":
    main()
