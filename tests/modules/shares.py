"""How 41 rows and 13 users are shared out among ranks; some ranks have none of either."""

import pytest

on_every_number_of_ranks = pytest.mark.parametrize(
    ("row_edges", "user_edges"),
    [
        ([0, 41], [0, 13]),
        ([0, 30, 41], [0, 0, 13]),
        ([0, 41, 41], [0, 9, 13]),
        ([0, 0, 23, 41], [0, 7, 13, 13]),
    ],
    ids=["W1", "W2-no-users", "W2-no-rows", "W3-both"],
)
