"""run_pretrain.py whose saves and evaluations take a second longer, and say that they have begun.

They leave a file `saving` or `evaluating` in --output_dir.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from ds_deberta import checkpoint, trainer
from ds_deberta.config import parse
from ds_deberta.distributed import shutdown
from run_pretrain import pretrain


def main() -> int:
    run = parse()

    def slowed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def slow(*args: Any) -> Any:
            run.output_dir.mkdir(exist_ok=True)
            (run.output_dir / name).touch()
            time.sleep(1)
            return function(*args)

        return slow

    checkpoint.write_shares = slowed(checkpoint.write_shares, "saving")
    trainer.evaluate = slowed(trainer.evaluate, "evaluating")
    return pretrain(run)


if __name__ == "__main__":
    status = main()
    shutdown()
    os._exit(status)
