"""The data tools are scripts: what they import lies beside them."""

import sys
from pathlib import Path

import pytest

DATA_TOOLS = Path(__file__).parents[2] / "data_tools"
sys.path.insert(0, str(DATA_TOOLS))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Texts are handled in pieces of 16 characters."""
    monkeypatch.setattr("sources.PIECE", 16)
    return 16
