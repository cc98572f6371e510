"""torchrun that keeps the exit code and says nothing of its own.

    python -m hola_megatron.launch --nproc-per-node 8 -m hola_megatron.train RECIPE ...

Takes torchrun's arguments. torchrun itself answers every failure with code 1 and a traceback
of its own; a scheduler needs to tell a bad recipe (2) from a run to queue again (75).
"""

from __future__ import annotations

import logging
import signal
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args


def launch(argv: list[str]) -> int:
    """Start the workers, wait, and return the code of the first that failed (0 if none did)."""
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    args = parse_args(argv)
    if args.master_port is None and args.rdzv_backend == "static":
        # one machine and no address given: any free port, so that two runs do not collide
        args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    config, command, arguments = config_from_args(args)
    try:
        elastic_launch(config, command)(*arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code < 0:
            print(f"launch: rank {error.get_first_failure()[0]} was ended by {signal.Signals(-code).name}",
                  file=sys.stderr)
            return 128 - code
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
