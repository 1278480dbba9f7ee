"""Bulk files as tools write them are read right, or refused in one line that names the cause."""

import pytest

from bulk_cases import all_cases, judge


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_bulk_file(case, tmp_path):
    verdict, detail = judge(case, tmp_path)
    assert verdict == ("right" if case.right is not None else "refused clearly"), detail
