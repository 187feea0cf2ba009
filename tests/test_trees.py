import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import trees

BRANCHES = trees.build_branches([[7, 8, 9], [7, 9]])


@st.composite
def forests(draw):
    """Distinct prompts, many of which begin alike."""
    return draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=24), min_size=1, max_size=40, unique_by=tuple))


CASES = [(BRANCHES, [[], [7], [7, 8], [7]]), (trees.build_branches([[7], [8]]), [[]])]
"""Labels, and what stands behind a prompt in each of the columns that are read; of labels with one token nothing does."""


@settings(max_examples=60, deadline=None)
@given(prompts=forests(), max_tokens=st.integers(1, 200), window=st.sampled_from([None, 5]), case=st.sampled_from(CASES))
def test_each_prompt_and_each_branch_attends_to_its_own_past_and_to_nothing_else(prompts, max_tokens, window, case):
    branches, behind = case
    kept, answered = [], []
    for tree in trees.grow(prompts, branches, max_tokens, window, "cpu"):
        assert tree.input_ids.shape[1] <= max_tokens or len(tree.rows) == 1
        known = kept[: tree.kept] + list(zip(tree.position_ids[0].tolist(), tree.input_ids[0].tolist(), strict=True))
        asked = tree.asked.view(len(tree.rows), -1).numpy()
        for place, keys in enumerate(list_seen(tree)):
            place_of_row = int(np.searchsorted(asked[:, -1], place))
            prompt = prompts[tree.rows[place_of_row]]
            sentence = prompt + behind[max(0, place - asked[place_of_row, 0])]
            past = list(enumerate(sentence))[: known[tree.kept + place][0] + 1]
            assert sorted(known[key] for key in keys) == (past[-window:] if window else past)
        kept = [known[key] for key in tree.path.tolist()]
        answered += tree.rows
    assert sorted(answered) == list(range(len(prompts)))


def list_seen(tree):
    """For each place of the pass the keys that it attends to."""
    cells = [
        (place, {key for key, sees in zip(keys, mask, strict=True) if sees})
        for group in tree.groups
        for places, keys, masks in zip(group.queries.tolist(), group.keys.tolist(), group.mask[:, 0].tolist(), strict=True)
        for place, mask in zip(places, masks, strict=True)
    ]
    for place, cell in enumerate(tree.cells.tolist()):
        assert cells[cell][0] == place
        yield cells[cell][1]


@pytest.mark.parametrize("max_tokens", [1, 30, 4096])
def test_what_prompts_begin_with_is_read_once_whatever_a_pass_holds(max_tokens):
    prompts = [[1] * 9 + [2] * shared + [3, own] for shared in range(6) for own in (4, 5)]
    passes = list(trees.grow(prompts, BRANCHES, max_tokens, None, "cpu"))
    beginnings = {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}
    assert sum(tree.input_ids.shape[1] for tree in passes) == len(beginnings) + len(prompts) * len(BRANCHES.tokens)


def test_a_long_prompt_lends_its_padding_to_no_short_one(monkeypatch):
    monkeypatch.setattr(trees, "CELLS", 512)
    prompts = [[1] * 300, *([2, number, *([3] * 20)] for number in range(30))]
    (tree,) = trees.grow(prompts, BRANCHES, 4096, None, "cpu")
    assert sum(group.keys.numel() for group in tree.groups) < 300 + 31 * 2 * 25
    assert max(group.keys.numel() for group in tree.groups if len(group.keys) > 1) <= 512


def test_no_more_is_asked_than_its_share_of_a_pass_so_that_what_the_head_says_fits():
    prompts = [[1] * 9 + [2] * shared + [3, own] for shared in range(6) for own in (4, 5)]
    passes = list(trees.grow(prompts, BRANCHES, 160, None, "cpu"))
    assert max(len(tree.asked) for tree in passes) == 8 <= 160 / trees.ASKED
    assert sum(len(tree.rows) for tree in passes) == len(prompts)
