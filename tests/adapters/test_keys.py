"""Keys: an edit has one slot and any number of wordings; a text belongs to one edit."""

import pytest
import torch

from editkit.adapters.keys import MaskKeys, Routing
from editkit.functional.masks import pack, scattered


@pytest.fixture
def bits():
    return pack(scattered(12, 128, 40, torch.Generator().manual_seed(0)))


@pytest.fixture
def keys(bits):
    """Edits 7, 8, 9 with texts 70, 80, 90; edit 8 also answers to the texts 81 and 82."""
    keys = MaskKeys(2, torch.device("cpu"))
    keys.add_slots(bits[:3], [7, 8, 9], [70, 80, 90])
    keys.add_wordings(bits[3:5], 8, [81, 82])
    return keys


def owners(keys, bits_BW):
    """Return edit and slot's text of whatever each query matches."""
    index_B, _ = keys.match(bits_BW)
    slot_B = keys.slot_K[index_B]
    return list(zip(keys.edit_K[index_B].tolist(), keys.text_K[slot_B].tolist(), strict=True))


def test_wordings_open_the_slot_of_their_edit(keys, bits):
    assert owners(keys, bits[:5]) == [(7, 70), (8, 80), (9, 90), (8, 80), (8, 80)]
    assert keys.slots_of([70, 80, 90, 81, 5]).tolist() == [0, 1, 2, -1, -1]


def test_dropping_an_edit_drops_all_its_keys_and_no_others(keys, bits):
    keys.drop(8)
    assert len(keys) == 2
    assert owners(keys, bits[[0, 2]]) == [(7, 70), (9, 90)]
    keys.add_wordings(bits[5:6], 9, [91])
    assert owners(keys, bits[5:6]) == [(9, 90)]


def test_a_prompt_edited_again_keeps_slot_mask_and_wordings(keys, bits):
    keys.add_slots(bits[[11]], [20], [80])
    assert len(keys) == 5
    assert owners(keys, bits[[1, 3]]) == [(20, 80), (20, 80)]
    assert 8 not in keys.edit_K.tolist()


def test_a_prompt_edited_again_keeps_the_key_that_it_was_moved_to(keys, bits):
    keys.move(bits[5:6], [80])
    keys.add_slots(bits[[1]], [20], [80])
    assert owners(keys, bits[[1, 5]]) == [(20, 80), (20, 80)]


def test_a_prompt_named_several_times_is_one_slot(keys, bits):
    keys.add_slots(bits[[5, 6, 5]], [20, 21, 20], [100, 110, 100])
    assert keys.edit_K.tolist() == [7, 8, 9, 8, 8, 20, 21]
    assert keys.slots_of([100, 110]).tolist() == [5, 6]


def test_a_wording_that_becomes_a_prompt_belongs_to_the_new_edit(keys, bits):
    keys.add_slots(bits[[3]], [20], [81])
    assert owners(keys, bits[[1, 3, 4]]) == [(8, 80), (20, 81), (8, 80)]
    keys.drop(8)
    assert owners(keys, bits[[0, 2, 3]]) == [(7, 70), (9, 90), (20, 81)]


def test_a_batch_adds_slots_replaces_answers_and_takes_wordings_at_once(keys, bits):
    keys.add_slots(bits[[5, 11, 4]], [20, 21, 22], [100, 80, 82])
    found = owners(keys, bits[[0, 1, 2, 3, 4, 5]])
    assert found == [(7, 70), (21, 80), (9, 90), (21, 80), (22, 82), (20, 100)]
    assert keys.text_K.tolist() == [70, 80, 90, 81, 100, 82]


def test_a_wording_goes_to_the_newest_edit_unless_it_is_a_prompt(keys, bits):
    keys.add_wordings(bits[[3, 0, 6]], 9, [81, 70, 96])
    assert owners(keys, bits[[0, 3, 4, 6]]) == [(7, 70), (9, 90), (8, 80), (9, 90)]
    assert sorted(keys.text_K.tolist()) == [70, 80, 81, 82, 90, 96]


def test_older_tables_are_left_as_they_were(keys, bits):
    before, copies = keys.tables, [table.clone() for table in keys.tables]
    keys.add_slots(bits[[8]], [30], [300])
    keys.drop(7)
    keys.add_slots(bits[[9]], [31], [80])
    keys.tables = before
    assert all(torch.equal(a, b) for a, b in zip(keys.tables, copies, strict=True))


def test_tables_load_into_an_empty_index(keys, bits):
    fresh = MaskKeys(2, torch.device("cpu"))
    fresh.load_state_dict(keys.state_dict())
    assert owners(fresh, bits[:5]) == owners(keys, bits[:5])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"columns": "shuffled"}, "routing.columns is 'shuffled'"),
        ({"mask": "tophash"}, "routing.mask is 'tophash'"),
        ({"fingerprint": "max"}, "routing.fingerprint is 'max'"),
        ({"tau": 40.0}, "routing.tau is 40.0"),
        ({"false_positives": 1.0}, "routing.false_positives is 1.0"),
        ({"held_out": -1}, "held_out is -1"),
    ],
)
def test_wrong_options_are_told(wrong, told):
    with pytest.raises(ValueError, match=told):
        Routing(**wrong)
