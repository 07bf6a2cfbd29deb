from kka_ray.config.models import PreferenceConfig
from kka_ray.preference.pairs import build_pairs
from kka_ray.records import Description, Prompt, Verdict

PROMPTS = [Prompt("p0", "list:\n-", ()), Prompt("p1", "other:\n-", ())]


def line(number: int, prompt: str, text: str, reason: str = "") -> Description:
    return Description(
        f"r0-{prompt}-s{number:03d}", prompt, 0, f" {text}\n", text, "rejected" if reason else "ok", reason
    )


def verdict(description: Description, label: str, hardness: float = 1.0) -> Verdict:
    return Verdict(description.id, 0, 0, 1.0, hardness, label)  # type: ignore[arg-type]


def test_pairs_come_from_one_prompt_and_prefer_the_hard_line() -> None:
    lines = [line(0, "p0", "a fox"), line(1, "p0", "a tank"), line(0, "p1", "a bee"), line(1, "p1", "a bus")]
    verdicts = [verdict(d, label) for d, label in zip(lines, ["hard", "easy", "easy", "hard"], strict=True)]
    pairs = build_pairs(PROMPTS, lines, verdicts, PreferenceConfig(), seed=0)
    assert {(p.prompt, p.chosen, p.rejected) for p in pairs} == {
        ("list:\n-", " a fox\n", " a tank\n"),
        ("other:\n-", " a bus\n", " a bee\n"),
    }


def test_a_text_on_both_sides_is_on_neither() -> None:
    lines = [line(0, "p0", "a fox"), line(1, "p0", "A fox"), line(2, "p0", "a tank"), line(3, "p0", "a cat")]
    verdicts = [verdict(d, label) for d, label in zip(lines, ["hard", "easy", "easy", "hard"], strict=True)]
    pairs = build_pairs(PROMPTS, lines, verdicts, PreferenceConfig(), seed=0)
    assert [(p.chosen, p.rejected) for p in pairs] == [(" a cat\n", " a tank\n")]


def test_no_pair_twice_and_lines_are_used_evenly() -> None:
    hard = [line(i, "p0", f"hard {i}") for i in range(6)]
    easy = [line(10 + i, "p0", f"easy {i}") for i in range(5)]
    verdicts = [verdict(d, "hard") for d in hard] + [verdict(d, "easy") for d in easy]
    pairs = build_pairs(PROMPTS, hard + easy, verdicts, PreferenceConfig(max_pairs=12), seed=3)
    assert len({(p.chosen_id, p.rejected_id) for p in pairs}) == len(pairs) == 12
    assert all(sum(p.chosen_id == d.id for p in pairs) == 2 for d in hard)
    assert pairs == build_pairs(PROMPTS, hard + easy, verdicts, PreferenceConfig(max_pairs=12), seed=3)


def test_between_and_refused_lines_are_left_out_unless_asked_for() -> None:
    lines = [line(0, "p0", "a fox"), line(1, "p0", "a tank"), line(2, "p0", "a chair", "normal_class")]
    verdicts = [verdict(lines[0], "hard"), verdict(lines[1], "between")]
    assert build_pairs(PROMPTS, lines, verdicts, PreferenceConfig(), seed=0) == []
    asked = build_pairs(PROMPTS, lines, verdicts, PreferenceConfig(rejected=("guarded",)), seed=0)
    assert [p.rejected for p in asked] == [" a chair\n"]


def test_a_hard_line_is_preferred_to_what_is_too_far_and_to_what_is_too_near_in_turns() -> None:
    hard = [line(i, "p0", f"hard {i}") for i in range(6)]
    far = [line(10 + i, "p0", f"far {i}") for i in range(12)]
    near = [line(30, "p0", "near 0"), line(31, "p0", "near 1", "too_long")]
    labels = ["hard"] * 6 + ["easy"] * 12 + ["normal_like"]
    verdicts = [verdict(d, label) for d, label in zip([*hard, *far, near[0]], labels, strict=True)]
    config = PreferenceConfig(rejected=("easy", "normal_like", "guarded"), max_pairs=12)
    rejected = [p.rejected_id for p in build_pairs(PROMPTS, [*hard, *far, *near], verdicts, config, seed=0)]
    assert sum(id_ in {d.id for d in near} for id_ in rejected) == 6


def test_the_surest_lines_come_first() -> None:
    hard = [line(i, "p0", f"hard {i}") for i in range(5)]
    easy = [line(10 + i, "p0", f"easy {i}") for i in range(3)]
    near = [line(20 + i, "p0", f"near {i}") for i in range(3)]
    verdicts = [
        *(verdict(d, "hard", h) for d, h in zip(hard, (3.0, 5.0, 7.4, 4.5, 6.0), strict=True)),
        *(verdict(d, "easy", h) for d, h in zip(easy, (9.0, 14.0, 11.0), strict=True)),
        *(verdict(d, "normal_like", h) for d, h in zip(near, (1.9, 0.3, 2.5), strict=True)),
    ]
    config = PreferenceConfig(rejected=("easy", "normal_like"), max_pairs=4)
    pairs = build_pairs(PROMPTS, [*hard, *easy, *near], verdicts, config, seed=0)
    # The median of the hard ones is 5.0. The second chosen line meets the second surest others.
    wanted = {("hard 1", "easy 1"), ("hard 1", "near 1"), ("hard 3", "easy 2"), ("hard 3", "near 0")}
    assert {(p.chosen.strip(), p.rejected.strip()) for p in pairs} == wanted


def test_there_are_no_more_pairs_than_the_training_sees() -> None:
    hard = [line(i, "p0", f"hard {i}") for i in range(5)]
    easy = [line(10 + i, "p0", f"easy {i}") for i in range(5)]
    verdicts = [verdict(d, "hard") for d in hard] + [verdict(d, "easy") for d in easy]
    for most, wanted in ((256, 12), (7, 7)):
        config = PreferenceConfig(steps=3, warmup=0, batch=4, micro_batch=4, max_pairs=most)
        assert len(build_pairs(PROMPTS, hard + easy, verdicts, config, seed=0)) == wanted


def test_with_one_kind_of_others_lines_are_still_used_in_turns() -> None:
    hard = [line(i, "p0", f"hard {i}") for i in range(3)]
    easy = [line(10 + i, "p0", f"easy {i}") for i in range(3)]
    verdicts = [verdict(d, "hard") for d in hard] + [verdict(d, "easy", 9.0 - i) for i, d in enumerate(easy)]
    pairs = build_pairs(PROMPTS, hard + easy, verdicts, PreferenceConfig(max_pairs=6), seed=0)
    for lines, which in ((hard, "chosen_id"), (easy, "rejected_id")):
        assert [sum(getattr(p, which) == d.id for p in pairs) for d in lines] == [2, 2, 2]
