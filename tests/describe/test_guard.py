from pathlib import Path

import pytest

from kka_ray import assets
from kka_ray.config.models import GuardConfig
from kka_ray.data.cifar100 import SUPERCLASSES, SYNONYMS
from kka_ray.describe.guard import Guard, clean, form_reason, subject
from kka_ray.features.text import TextEncoder

LINES = Path(__file__).parent / "furniture_lines.tsv"
TERMS = (*SUPERCLASSES["household_furniture"], *SYNONYMS["household_furniture"])


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    if not assets.is_present("builtin:minilm-l6-v2"):
        pytest.skip("the built-in models are missing: run `kka setup`")
    return TextEncoder()


def labelled() -> list[tuple[str, str]]:
    rows = [line.split("\t") for line in LINES.read_text().splitlines()]
    return [(label, text) for label, text in rows]


def test_refuses_the_normal_class_and_little_else(encoder: TextEncoder) -> None:
    guard = Guard(GuardConfig(), TERMS, (), encoder)
    rows = labelled()
    assert len(rows) >= 200
    normal = [guard.is_normal_class(text) for label, text in rows if label == "normal"]
    other = [guard.is_normal_class(text) for label, text in rows if label == "other"]
    assert sum(normal) / len(normal) >= 0.9
    assert sum(other) / len(other) <= 0.05


def test_vocabulary_rule_wants_something_new(encoder: TextEncoder) -> None:
    captions = ["five rounded pink petals and a yellow center", "a white flower with six petals"]
    guard = Guard(GuardConfig(normal_vocabulary=True), (), captions, encoder)
    assert guard.is_normal_class("a pink flower with five petals")
    assert not guard.is_normal_class("a blue flower with five petals")
    assert not guard.is_normal_class("a pink flower with seven petals")


DEFECTS = (
    "a steel screw with a bent tip",
    "a rusty steel screw",
    "a screw whose thread is worn off",
    "a steel screw broken in two",
    "a photo of a steel screw with deep scratches",
)


def test_defects_of_the_normal_object_pass_once_the_subject_rule_is_off(encoder: TextEncoder) -> None:
    """As in configs/folder.yaml, where the normal object is the subject of every line that is wanted."""
    normals = [
        "a photo of a steel screw",
        "a sharp photo of a steel screw",
        "a steel screw in the middle of the picture",
    ]
    config = GuardConfig(subject=False, normal_vocabulary=True)
    guard = Guard(config, ("steel screw",), normals, encoder)
    assert [reason for _, reason in guard.judge([f" {line}\n" for line in DEFECTS])] == [""] * len(DEFECTS)
    assert [reason for _, reason in guard.judge([f" {line}\n" for line in normals])] == ["normal_class"] * 3
    strict = Guard(GuardConfig(), ("steel screw",), normals, encoder)
    assert all(strict.is_normal_class(line) for line in DEFECTS[:2])


def test_names_count_at_the_largest_similarity_too(encoder: TextEncoder) -> None:
    guard = Guard(GuardConfig(subject_similarity=1), ("chair",), (), encoder)
    assert guard.is_normal_class("a photo of two wooden chairs")
    assert not guard.is_normal_class("a wooden stool in a kitchen")


def test_names_count_whatever_word_of_them_is_in_the_plural(encoder: TextEncoder) -> None:
    guard = Guard(GuardConfig(subject_similarity=1), ("glasses case", "colt's foot"), (), encoder)
    assert guard.is_normal_class("a black glasses case on a table")
    assert guard.is_normal_class("two colt's foot in a garden")
    assert not guard.is_normal_class("a pair of glasses on a table")


def test_names_count_in_plurals_that_end_in_ves(encoder: TextEncoder) -> None:
    guard = Guard(GuardConfig(subject_similarity=1), ("shelf", "knife", "leaf", "glove", "valve"), (), encoder)
    for line in ("two wooden shelves on a wall", "a set of kitchen knives", "three green leaves on a table"):
        assert guard.is_normal_class(line)
    for line in ("a pair of red gloves", "a brass valve", "two brass valves in a factory"):
        assert guard.is_normal_class(line)
    assert not guard.is_normal_class("two wolves in a forest")


def test_names_count_with_the_prepositions_in_them(encoder: TextEncoder) -> None:
    terms = ("chest of drawers", "love in the mist", "rocking chair", "pair of scissors")
    guard = Guard(GuardConfig(subject_similarity=1), terms, (), encoder)
    for line in (
        "a wooden chest of drawers in a bedroom",
        "a photo of two old chests of drawers",
        "blue love in the mist in a garden",
        "a wooden rocking chair on a porch",
        "a rusty pair of scissors on a table",
    ):
        assert guard.is_normal_class(line)
    for line in ("a chest of gold coins", "a wooden chest of drawers handle", "a lamp on a chest of drawers"):
        assert not guard.is_normal_class(line)


def test_it_is_the_noun_that_is_compared_with_the_names(encoder: TextEncoder) -> None:
    guard = Guard(GuardConfig(), ("chair",), (), encoder)
    assert guard.is_normal_class("a green armchair in a garden")
    assert not guard.is_normal_class("an armchair factory in a city")


def test_copies_are_refused_in_order(encoder: TextEncoder) -> None:
    guard = Guard(GuardConfig(), (), (), encoder)
    lines = [" a small red fox in the snow\n", " A small red fox in the snow.\n", " a rocket on its launch pad\n"]
    assert [reason for _, reason in guard.judge(lines)] == ["", "duplicate", ""]
    assert [reason for _, reason in guard.judge(lines[2:])] == ["duplicate"]


def test_lines_that_nearly_say_what_another_said_are_refused(encoder: TextEncoder) -> None:
    lines = [" a rocket on its launch pad\n", " a small red fox in the snow\n", " a small red fox in snow\n"]
    near = float(encoder.embed([clean(lines[1])])[0] @ encoder.embed([clean(lines[2])])[0])
    for limit, reasons in ((near - 0.01, ["", "", "near_duplicate"]), (1, ["", "", ""])):
        guard = Guard(GuardConfig(near_duplicate=limit), (), (), encoder)
        assert [reason for _, reason in guard.judge(lines)] == reasons


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("\n", "empty"),
        (" a fox\n", "too_short"),
        (" a fox that was cut off by the limit", "too_long"),
        (" " + "word " * 50 + "\n", "too_long"),
        (" 1234 5678 9012 3456\n", "malformed"),
        (" see http://example.org for more\n", "malformed"),
        (" the red one is the red one is the red one is it\n", "malformed"),
        (" a red fox in the snow\n", ""),
    ],
)
def test_form(raw: str, reason: str) -> None:
    assert form_reason(raw, clean(raw), GuardConfig()) == reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a photo of a wooden chair", ["wooden", "chair"]),
        ("a table lamp on a desk", ["table", "lamp"]),
        ("a pair of old shoes", ["old", "shoe"]),
        ("there are three birds sitting on a couch", ["three", "bird"]),
    ],
)
def test_subject(text: str, words: list[str]) -> None:
    assert subject(text) == words


def test_clean_takes_the_first_line_without_marks() -> None:
    assert clean(' - "a red fox."\nanother') == "a red fox"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (" 20 narrow blue petals\n", "20 narrow blue petals"),
        (" 3D printed chair\n", "3D printed chair"),
        (" 1960s telephone\n", "1960s telephone"),
        (" 1.5 metres of rope\n", "1.5 metres of rope"),
        (" 1. a fox\n", "a fox"),
        (" 2) a fox\n", "a fox"),
        (" - 3: 20 petals\n", "20 petals"),
        (' * "4. a fox"\n', "a fox"),
    ],
)
def test_clean_takes_numbers_of_lists_away_and_leaves_those_of_descriptions(raw: str, text: str) -> None:
    assert clean(raw) == text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a red, soft couch in a room", ["red", "soft", "couch"]),
        ("two red and blue chairs in a room", ["two", "red", "blue", "chair"]),
        ("four tennis courts arranged neatly with some plants around", ["four", "tennis", "court"]),
        ("a chair, a lamp and a cat", ["chair"]),
        ("a table lamp on a desk", ["table", "lamp"]),
    ],
)
def test_the_subject_goes_on_after_adjectives_and_ends_with_a_term(line: str, words: list[str]) -> None:
    assert subject(line, {"couch", "chair", "tennis court", "table"}) == words
