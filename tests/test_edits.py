"""When a probe is asked."""

import pytest

from editkit.edits import Probe


@pytest.mark.parametrize(
    ("edit_id", "until", "due"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        (1, None, [2, 3, 4]),
        (1, 3, [2, 3]),  # after edit 3 four edits are made
        (None, 2, [0, 1, 2]),
        (1, 1, []),
        (2, 0, []),
    ],
)
def test_a_probe_is_due_from_its_own_edit_until_one_overwrites_it(edit_id, until, due):
    probe = Probe("p", edit_id, "reliability", "q", "a", until=until)
    assert [seen for seen in range(5) if probe.is_due(seen)] == due
