"""The sample table: rows that are another's sample once more."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scaletransfer.sample_table import rows_twice


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=40))
def test_rows_twice_are_those_after_the_first(keys):
    expected = [row for row, key in enumerate(keys) if key in keys[:row]]
    assert rows_twice(np.array(keys, dtype=np.uint64)).tolist() == expected
