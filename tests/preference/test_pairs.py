from kka_ray.config.models import PreferenceConfig
from kka_ray.preference.pairs import build_pairs
from kka_ray.records import Description, Prompt, Verdict

PROMPTS = [Prompt("p0", "list:\n-", ()), Prompt("p1", "other:\n-", ())]


def line(number: int, prompt: str, text: str, reason: str = "") -> Description:
    return Description(
        f"r0-{prompt}-s{number:03d}", prompt, 0, f" {text}\n", text, "rejected" if reason else "ok", reason
    )


def verdict(description: Description, label: str) -> Verdict:
    return Verdict(description.id, 0, 0, 1.0, 1.0, label)  # type: ignore[arg-type]


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
