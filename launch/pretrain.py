"""Trains a model: accelerate launch launch/pretrain.py --config configs/quickstart.yaml [--section.key value ...]

Works the same under python (one process), torchrun and accelerate launch. --help lists every setting.
"""

import faulthandler
import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else `import pretrain` would find this very file

from pretrain.config import load
from pretrain.run import command_line
from pretrain.run.stop import StopRequest


def main(argv: list[str]) -> int:
    """-> exit status: 0 done, 2 refused; docs/running.md lists them all."""
    config = load(argv, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    if sys.stderr:
        faulthandler.register(signal.SIGUSR1, file=2)  # stacks; once the run has its directory, those of all ranks go there
    stop = StopRequest()
    from pretrain.train import train  # torch is imported here, after the settings are known to be right

    return train(config, stop)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
