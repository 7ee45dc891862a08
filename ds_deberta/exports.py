"""Exports on the way: the models of some checkpoints, kept after these are deleted.

exports/step_0100000/generator/ ...    as export/, which holds the last ones
"""

from pathlib import Path

from ds_deberta.distributed import is_main, logger
from ds_deberta.hf import update_export


class Exports:
    """Exports each checkpoint whose step is a multiple of an interval.

    Args:
        output_dir: gets exports/.
        interval: in steps; None: never.
    """

    def __init__(self, output_dir: Path, interval: int | None) -> None:
        self._folder = output_dir / "exports"
        self._interval = interval
        self._seen: Path | None = None

    def update(self, checkpoint: Path | None) -> None:
        """Export the newest checkpoint if its turn has come and it is not exported yet.

        On rank 0. What cannot be exported is announced, and the training goes on.
        """
        if checkpoint is None or checkpoint == self._seen or not self._interval or not is_main():
            return
        self._seen = checkpoint
        if int(checkpoint.name.removeprefix("step_")) % self._interval:
            return
        try:
            if update_export(checkpoint, self._folder / checkpoint.name):
                logger.info("exported %s to %s", checkpoint.name, self._folder / checkpoint.name)
        except (OSError, ValueError) as error:
            logger.warning(
                "%s could not be exported: %s; training goes on without this export. As long as "
                "the checkpoint is kept, `python -m ds_deberta.hf %s OUT` exports it.",
                *(checkpoint, error, checkpoint),
            )
