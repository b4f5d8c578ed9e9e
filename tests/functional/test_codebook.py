"""Places in a codebook: worked by hand, against a loop over points, and undone."""

import math

import pytest
import torch

from editkit.functional.codebook import GUARD, TOUCH, Book, distances, placed

NONE = torch.zeros(0)
EMPTY = Book(torch.zeros(0, 2), NONE, NONE.long(), NONE.long(), NONE.long(), NONE.bool())


def edits(points, labels, texts=None, eps=1.0, first=0):
    """Return edits as keys; the prompts differ unless texts are given."""
    ids = torch.arange(first, first + len(labels))
    texts = ids if texts is None else torch.tensor(texts)
    return Book(
        torch.tensor(points, dtype=torch.float32).view(len(labels), -1),
        torch.full((len(labels),), eps),
        torch.tensor(labels),
        ids,
        texts,
        torch.zeros(len(labels), dtype=torch.bool),
    )


def stream(seed, count=40, dim=2):
    """Return a crowded stream: few answers, and a few prompts that come twice."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, int(1.5 * count), (count,), generator=generator)
    where = torch.randn(2 * count, dim, generator=generator) * 4
    labels = torch.randint(0, 3, (count,), generator=generator)
    return edits(where[texts].tolist(), labels.tolist(), texts.tolist())


def rows(book, index):
    return Book(*(table[index] for table in book))


def by_loop(points, labels, texts, eps):
    """Alg. 1 over lists of points."""
    keys = []  # [point, radius, label, text, edit]
    taught = []
    for i, (point, label, text) in enumerate(zip(points, labels, texts, strict=True)):
        keys = [k for k in keys if k[3] != text or k[2] == label]
        near = min(keys, key=lambda k: math.dist(point, k[0]), default=None)
        d = math.inf if near is None else math.dist(point, near[0])
        mine = [point, eps, label, text, i]
        if near is None or d > eps + near[1]:
            keys.append(mine)
        elif near[2] != label:
            near[1] = max(d / 2 - GUARD, TOUCH * math.hypot(*near[0]))
            mine[1] = max(d / 2, TOUCH * math.hypot(*point))
            keys.append(mine)
        else:
            near[1] = max(near[1], d)
            mine = near
        taught.append(mine)
    return keys, [next((n for n, k in enumerate(keys) if k is mine), -1) for mine in taught]


def test_four_edits_worked_by_hand():
    # far apart: two keys; 1.5 from the first and of its answer: widened; 1.0 from the second and
    # of another answer: a key, and both halved
    book, kept_K, key_E = placed(
        EMPTY, edits([[0, 0], [10, 0], [1.5, 0], [9, 0]], [7, 8, 7, 9]), eps=1.0
    )
    assert book.key_KF.tolist() == [[0, 0], [10, 0], [9, 0]]
    assert book.radius_K.tolist() == pytest.approx([1.5, 0.5 - GUARD, 0.5])
    assert (kept_K.tolist(), key_E.tolist()) == ([0, 1, 3], [0, 1, 0, 2])
    assert book.is_shaped_K.tolist() == [True, True, True]


def test_an_edit_out_of_reach_leaves_all_other_keys_as_they_are():
    book = placed(EMPTY, edits([[0, 0]], [7]), eps=1.0).book
    apart, _, key_E = placed(book, edits([[2.01, 0]], [8], first=1), eps=1.0)
    assert apart.radius_K.tolist() == [1.0, 1.0]
    assert apart.is_shaped_K.tolist() == [False, False]
    assert key_E.tolist() == [1]
    near = placed(book, edits([[1.99, 0]], [8], first=1), eps=1.0).book
    assert near.radius_K.tolist() == pytest.approx([0.995 - GUARD, 0.995])


def test_a_prompt_that_is_edited_again_loses_its_old_key():
    book = placed(EMPTY, edits([[3, 0], [9, 0]], [7, 7], texts=[5, 6]), eps=1.0).book
    again, kept_K, key_E = placed(book, edits([[3, 0]], [8], texts=[5], first=2), eps=1.0)
    assert (again.edit_K.tolist(), again.label_K.tolist()) == ([1, 2], [7, 8])
    assert again.radius_K.tolist() == [1.0, 1.0]
    assert (kept_K.tolist(), key_E.tolist()) == ([1, 2], [1])
    # to the same answer: the key stays
    same = placed(book, edits([[3, 0]], [7], texts=[5], first=2), eps=1.0)
    assert (same.book.edit_K.tolist(), same.key_E.tolist()) == ([0, 1], [0])


def test_a_key_that_a_later_edit_of_the_batch_takes_away_is_not_taught():
    twice = edits([[3, 0], [3, 0]], [7, 8], texts=[5, 5])
    book, kept_K, key_E = placed(EMPTY, twice, eps=1.0)
    assert (book.edit_K.tolist(), kept_K.tolist(), key_E.tolist()) == ([1], [1], [-1, 0])


def test_a_halved_radius_does_not_fall_below_what_rounding_moves():
    close = edits([[4, 3], [4.001, 3]], [7, 8])
    book = placed(EMPTY, close, eps=1.0).book
    assert book.radius_K.tolist() == pytest.approx([0.05, 0.05], rel=1e-3)


@pytest.mark.parametrize("eps", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_stream_is_placed_as_by_a_loop_over_points(eps, seed):
    given = stream(seed)._replace(radius_K=torch.full((40,), eps))
    found, kept_K, key_E = placed(EMPTY, given, eps)
    keys, taught = by_loop(
        given.key_KF.double().tolist(), given.label_K.tolist(), given.text_K.tolist(), eps
    )
    assert found.edit_K.tolist() == [k[4] for k in keys] == kept_K.tolist()
    assert found.radius_K.tolist() == pytest.approx([k[1] for k in keys], rel=1e-5)
    assert key_E.tolist() == taught


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_placed_as_one_edit_after_another(seed):
    given = stream(seed)
    book = EMPTY
    for i in range(len(given.label_K)):
        book = placed(book, rows(given, slice(i, i + 1)), 1.0).book
    whole = placed(EMPTY, given, 1.0).book
    halves = placed(
        placed(EMPTY, rows(given, slice(0, 17)), 1.0).book, rows(given, slice(17, None)), 1.0
    )
    for one, other in ((book, whole), (halves.book, whole)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("eps", [0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_key_that_met_no_other_may_go_as_if_it_had_never_come(eps, seed):
    given = stream(seed)._replace(radius_K=torch.full((40,), eps))
    book, _, key_E = placed(EMPTY, given, eps)
    free = (~book.is_shaped_K).nonzero()[:, 0].tolist()
    assert free
    for key in free:
        edit = int(book.edit_K[key])
        without, _, other_E = placed(EMPTY, rows(given, given.edit_K != edit), eps)
        left = rows(book, torch.arange(len(book.edit_K)) != key)
        for name in ("key_KF", "radius_K", "label_K", "edit_K", "text_K"):
            assert torch.equal(getattr(without, name), getattr(left, name))
        # and the others are taught at the same keys
        assert key_E.tolist().count(key) == 1
        others = [k - (k > key) for e, k in enumerate(key_E.tolist()) if e != edit]
        assert other_E.tolist() == others


def test_distances_are_exact_where_matrix_products_are_not():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 64, generator=generator) * 100
    moved = keys[:50] + torch.randn(50, 64, generator=generator) * 1e-3
    found = distances(moved, keys)
    wanted = (moved.double()[:, None] - keys.double()).norm(dim=-1)
    assert torch.allclose(found.double(), wanted, rtol=1e-5)
    assert not distances(keys, keys).diagonal().any()
