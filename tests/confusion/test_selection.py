"""Which images are kept."""

from __future__ import annotations

from typing import Any

import pytest

from kka_ray.confusion.selection import KeptImage, target_size, update, zeroth
from kka_ray.errors import StageError
from kka_ray.records import Verdict


def verdict(id_: str, label: Any, hardness: float = 5.0, round: int = 1) -> Verdict:
    return Verdict(id_, round, 0, 1.0, hardness, label)


def test_zeroth_is_a_seeded_draw_that_ignores_order() -> None:
    ids = [f"r0-{i}" for i in range(50)]
    kept = zeroth(ids, 10, seed=0)
    assert len(kept) == 10
    assert kept == zeroth(reversed(ids), 10, seed=0)
    assert kept != zeroth(ids, 10, seed=1)
    assert {k.label for k in kept} == {"unjudged"}
    assert len(zeroth(ids[:4], 10, seed=0)) == 4
    assert zeroth([], 10, seed=0) == []


def test_rep_replaces_easy_by_hard_at_a_fixed_size_and_never_keeps_normals() -> None:
    kept = zeroth([f"r0-{i}" for i in range(4)], 4, seed=0)
    old = ["hard", "easy", "easy", "normal_like"]
    new = [verdict(k.id, label, round=0) for k, label in zip(kept, old, strict=True)]
    new += [verdict(f"r1-{i}", "hard") for i in range(2)] + [verdict("r1-2", "normal_like"), verdict("r1-3", "between")]
    after = update(kept, new, "rep", 4, rounds=2, round=1, seed=0)
    assert {k.id for k in after} == {kept[0].id, "r1-0", "r1-1", "r1-3"}
    assert next(k for k in after if k.id == kept[0].id) == KeptImage(kept[0].id, 0, "hard", 5.0)


def test_rep_fills_up_in_order_and_may_stay_short() -> None:
    new = [verdict("a", "easy", 20), verdict("b", "easy", 9), verdict("c", "normal_like"), verdict("d", "hard")]
    assert [k.id for k in update([], new, "rep", 2, rounds=1, round=1, seed=0)] == ["b", "d"]
    assert len(update([], new, "rep", 10, rounds=1, round=1, seed=0)) == 3
    unjudged = KeptImage("z", 0)
    assert [k.id for k in update([unjudged], new, "rep", 2, rounds=1, round=1, seed=0)] == ["d", "z"]


def test_of_those_beside_the_band_the_nearer_come_first() -> None:
    for label in ("between", "easy"):
        new = [verdict(f"x{i:02d}", label, hardness=20 - i) for i in range(12)]
        kept = update([], new, "rep", 5, rounds=1, round=1, seed=0)
        assert [k.hardness for k in kept] == [13, 12, 11, 10, 9]


def test_what_a_collapsed_evaluator_judged_comes_after_what_is_known() -> None:
    new = [verdict("a", "between", hardness=0), verdict("b", "between", hardness=12), verdict("c", "easy", hardness=20)]
    kept = [update([], new, "rep", size, rounds=1, round=1, seed=0) for size in (1, 2)]
    assert [[k.id for k in images] for images in kept] == [["b"], ["a", "b"]]


def test_hard_ones_are_not_taken_from_the_lower_edge() -> None:
    new = [verdict(f"x{i:03d}", "hard", hardness=3 + i / 100) for i in range(300)]
    kept = update([], new, "rep", 100, rounds=1, round=1, seed=0)
    mean = sum(k.hardness for k in kept) / len(kept)
    assert 4.2 < mean < 4.8
    assert kept != update([], new, "rep", 100, rounds=1, round=1, seed=1)


def test_add_grows_by_equal_parts_up_to_the_budget_without_easy_ones() -> None:
    assert [target_size("add", 10, 2, r) for r in range(4)] == [3, 6, 10, 10]
    assert target_size("rep", 10, 2, 0) == 10
    kept = zeroth([f"r0-{i}" for i in range(20)], target_size("add", 10, 2, 0), seed=0)
    sizes = [len(kept)]
    for round_ in (1, 2):
        new = [verdict(f"r{round_}-{i}", "hard", round=round_) for i in range(9)]
        grown = update(kept, new, "add", 10, rounds=2, round=round_, seed=0)
        assert {k.id for k in kept} <= {k.id for k in grown}
        kept = grown
        sizes.append(len(kept))
    assert sizes == [3, 6, 10]
    # What became normal-like makes no room for more than a round's part.
    new = [verdict("r0-0", "normal_like", round=0), *(verdict(f"r1-{i}", "hard") for i in range(9))]
    shrunk = update([KeptImage("r0-0", 0), KeptImage("r0-1", 0)], new, "add", 9, rounds=2, round=1, seed=0)
    assert [k.round for k in shrunk] == [0, 1, 1, 1]
    few = update([], [verdict("a", "easy"), verdict("b", "between")], "add", 9, rounds=2, round=1, seed=0)
    assert [k.id for k in few] == ["b"]


def test_add_refuses_a_set_that_began_with_the_whole_budget_and_drops_normals() -> None:
    kept = zeroth([f"r0-{i}" for i in range(10)], 10, seed=0)
    with pytest.raises(StageError, match="part of the budget"):
        update(kept, [], "add", 10, rounds=2, round=1, seed=0)
    assert update(kept[:1], [verdict(kept[0].id, "normal_like")], "add", 10, rounds=2, round=1, seed=0) == []


def test_bad_input_is_refused() -> None:
    with pytest.raises(StageError, match="twice"):
        zeroth(["a", "a"], 1, seed=0)
    with pytest.raises(StageError, match="twice"):
        update([], [verdict("a", "hard"), verdict("a", "easy")], "rep", 1, rounds=1, round=1, seed=0)
    with pytest.raises(StageError, match="budget"):
        zeroth(["a"], -1, seed=0)
