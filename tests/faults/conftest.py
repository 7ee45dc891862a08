"""The same cases in every run of `make test`; the data tools beside their own modules."""

import sys

from hypothesis import settings

from tests.launch import ROOT

sys.path.insert(0, str(ROOT / "data_tools"))
settings.register_profile("faults", derandomize=True, deadline=None, database=None)
settings.load_profile("faults")
