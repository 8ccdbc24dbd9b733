from __future__ import annotations

import itertools

import pytest
from grids import covering, pairs


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_any_few_choices_meet_in_far_fewer_cells(strength: int) -> None:
    axes = ["ab", "cd", "efghi", "jklm", "no", "pqrs", "tu"]
    cells = covering(strength, *axes)
    for some in itertools.combinations(range(7), strength):
        met = {tuple(cell[axis] for axis in some) for cell in cells}
        assert met == set(itertools.product(*(axes[axis] for axis in some)))
    assert len(cells) <= {1: 5, 2: 30, 3: 125}[strength]
    assert len(set(cells)) == len(cells)
    assert cells == covering(strength, *axes)


def test_two_axes_meet_everywhere() -> None:
    assert sorted(pairs("abc", [0, 1])) == sorted(itertools.product("abc", [0, 1]))
