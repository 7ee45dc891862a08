import pytest

from ds_deberta.distributed import initialize


def set_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_world_size_without_a_launcher_is_refused(monkeypatch):
    set_environment(monkeypatch, WORLD_SIZE="2", RANK="0")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 is set without LOCAL_RANK"):
        initialize(0)


def test_a_launcher_that_sets_half_is_refused(monkeypatch):
    set_environment(monkeypatch, WORLD_SIZE="2", LOCAL_RANK="0")
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT is not"):
        initialize(0)
