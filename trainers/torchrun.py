"""A run in several processes of this machine: `python -m trainers.torchrun RUN_DIR`, one for each part of the spec's device.

It is what `torchrun` does, but ends with the status that the trainers ended with: 0, 1, 2 or 75.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from trainers.spec import EXIT_DONE, EXIT_REFUSED, EXIT_RESUMABLE, read_device

EXIT_FAILED = 1
STOP_SECONDS = 600
"""So long the trainers have for their checkpoint; whoever is in a hurry kills them."""


def main() -> int:
    """Start the processes and wait for them."""
    parser = argparse.ArgumentParser(prog="python -m trainers.torchrun", description="Perform one run in several processes.")
    parser.add_argument("run_dir", type=Path, help="a folder with spec.json")
    parser.add_argument("--attempt", help="number of the attempt (default: the latest)")
    arguments = parser.parse_args()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(read_device(arguments.run_dir).split("+")),
        run_id=arguments.run_dir.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=STOP_SECONDS,
    )
    attempt = ["--attempt", arguments.attempt] if arguments.attempt else []
    try:
        elastic_launch(config, sys.executable)("-m", "trainers.train", str(arguments.run_dir), *attempt)
    except ChildFailedError as error:
        return choose_status({failure.exitcode for failure in error.failures.values()})
    except SignalException:
        return EXIT_RESUMABLE
    return EXIT_DONE


def choose_status(statuses: set[int]) -> int:
    """The status of a run whose processes ended so: all are stopped or refused together, and the first that fails is the reason."""
    return next((status for status in (EXIT_REFUSED, EXIT_RESUMABLE) if statuses == {status}), EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main())
