import pytest

from kka_ray.amounts import amount


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 entries"), (1, "1 entry"), (2, "2 entries"), (1250, "1,250 entries")]
)
def test_a_thing_is_named_in_the_singular_and_others_in_the_plural(number: int, words: str) -> None:
    assert amount(number, "entry", "entries") == words
    assert amount(number, "image") == f"{number:,} image{'' if number == 1 else 's'}"
