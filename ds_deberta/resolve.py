"""Settings that depend on the data: filled in once, after parsing, before anything reads them."""

from dataclasses import replace

from ds_deberta.config import PretrainConfig
from ds_deberta.data import MANIFEST_FILE, Manifest
from ds_deberta.recipes import planned_length


def resolve(run: PretrainConfig, *, needs_data: bool = True) -> PretrainConfig:
    """Return the run with a value for each setting that was left to the data.

    Args:
        run: as parsed.
        needs_data: False for a plan, which without data counts with the preset's own values.

    Raises:
        ValueError: the data are damaged.
        FileNotFoundError: there are none.
    """
    has_data = needs_data or (run.data.data_dir / MANIFEST_FILE).is_file()
    manifest = Manifest.load(run.data.data_dir) if has_data else None
    if run.data.max_seq_length is None:
        length = manifest.max_seq_length if manifest else planned_length(run.model.model)
        run = replace(run, data=replace(run.data, max_seq_length=length))
    return run


def describe_padding(run: PretrainConfig) -> str:
    """Say what padding to --max_seq_length costs; "" where the rows are as long."""
    data = run.data
    if not (data.data_dir / MANIFEST_FILE).is_file():
        return ""
    own = Manifest.load(data.data_dir).max_seq_length
    if own >= data.row_length:
        return ""
    return (
        f"rows of {own} are padded to {data.row_length}: {data.row_length / own:.3g} times the "
        "work. Leave out --max_seq_length, or prepare the data with longer rows."
    )
