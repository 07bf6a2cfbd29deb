import numpy as np

from kka_ray.config.models import DescribeConfig
from kka_ray.data.base import ImageSet
from kka_ray.describe.prompts import build_prompts


def normals() -> tuple[ImageSet, np.ndarray]:
    """Two groups of three images; in each two have the same caption."""
    captions = ("red rose", "red rose", "pink rose", "white lily", "white lily", "green lily")
    features = np.array([[0, 0], [0.1, 0], [0.3, 0], [5, 5], [5.1, 5], [5.3, 5]], np.float32)
    ids = tuple("abcdef")
    images = tuple(np.zeros((2, 2, 3), np.uint8) for _ in ids)
    return ImageSet(ids, images, captions, ("",) * 6, np.zeros(6, bool)), features


def test_a_prompt_a_group_lists_the_central_captions_once() -> None:
    prompts = build_prompts(*normals(), "flowers", DescribeConfig(prompts=2, examples=2), 0)
    assert [p.id for p in prompts] == ["p000", "p001"]
    assert {frozenset(p.normal_ids) for p in prompts} <= {frozenset(x) for x in ("ac", "bc", "df", "ef")}
    assert {p.text for p in prompts} == {
        "A list of descriptions of many different flowers:\n- red rose\n- pink rose\n-",
        "A list of descriptions of many different flowers:\n- white lily\n- green lily\n-",
    }


def test_a_contrast_stands_between_the_examples_and_what_is_written() -> None:
    config = DescribeConfig(prompts=1, examples=1, instruction="Common flowers:", contrast="Rare flowers:")
    (prompt,) = build_prompts(*normals(), "flowers", config, 0)
    head, example, turn, last = prompt.text.split("\n")
    assert (head, turn, last) == ("Common flowers:", "Rare flowers:", "-")
    assert example.startswith("- ")


def test_there_are_no_more_prompts_than_normals() -> None:
    assert len(build_prompts(*normals(), "flowers", DescribeConfig(prompts=16), 0)) == 6


def test_the_heading_is_english_for_one_thing_as_well() -> None:
    (prompt,) = build_prompts(*normals(), "a steel screw", DescribeConfig(prompts=1, examples=1), 0)
    assert prompt.text.startswith("A list of descriptions of many different pictures of a steel screw:\n")
