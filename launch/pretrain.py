"""Trains a model: accelerate launch launch/pretrain.py --config configs/quickstart.yaml [--section.key value ...]

Works the same under python (one process), torchrun and accelerate launch. --help lists every setting.
"""

import faulthandler
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else `import pretrain` would find this very file

from pretrain.config import ConfigError, load
from pretrain.engines.place import read_place
from pretrain.run import command_line
from pretrain.run.stop import StopRequest


def main(argv: list[str]) -> int:
    """-> exit status: 0 done, 2 refused; docs/running.md lists them all."""
    place = read_place()
    try:
        config = load(argv, world_size=place.world_size)
    except ConfigError as refusal:
        if place.several_machines:  # on this one, the launcher ends the others
            from pretrain.engines.rendezvous import meet

            meet(place, 0, refusal=refusal)  # the other machines learn of it; raises it again
        raise
    if sys.stderr:
        faulthandler.register(signal.SIGUSR1, file=2)  # stacks; once the run has its directory, those of all ranks go there
    stop = StopRequest(exits=True)
    from pretrain.train import train  # torch is imported here, after the settings are known to be right

    return train(config, stop)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
