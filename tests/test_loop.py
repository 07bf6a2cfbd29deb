from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kka_ray import assets
from kka_ray.cluster import train
from kka_ray.cluster.streaming import Drawn
from kka_ray.config.models import FlowersData, LoopConfig, RunConfig
from kka_ray.errors import ConfigError, StageError
from kka_ray.loop import Loop, LoopResult, budget, check_drawn
from kka_ray.preference import dpo
from kka_ray.records import Description, PreferencePair, Prompt, Rendering, Verdict
from kka_ray.store import Store


def line(number: int, reason: str = "") -> Description:
    return Description(f"r0-p000-s{number:03d}", "p000", 0, " a line", "a line", "rejected" if reason else "ok", reason)


def test_a_round_without_a_usable_line_says_why() -> None:
    lines = [line(0, "too_short"), line(1, "too_short"), line(2, "normal_class")]
    with pytest.raises(StageError, match=r"3 lines, of which none .*2 too_short, 1 normal_class.*'a line'"):
        check_drawn(lines, Drawn(), 0)
    check_drawn(lines, Drawn(), 1)  # a later round has the set of the rounds before


def test_a_renderer_that_fails_on_everything_ends_the_run() -> None:
    failed = Drawn(renderings=[Rendering("r1-p000-s000", 1, 0, "failed", b"", "", "out of memory")])
    with pytest.raises(StageError, match="round 1: of 1 image none could be drawn.*out of memory"):
        check_drawn([line(0)], failed, 1)


def test_some_failures_are_rows_and_the_run_goes_on() -> None:
    renderings = [Rendering("a", 0, 0, "failed", b"", "", "x"), Rendering("b", 0, 0, "ok", b"x", "y")]
    check_drawn([line(0), line(1)], Drawn(renderings=renderings, ids=["b"]), 0)


def judged(label: str, count: int, collapsed: int = 0) -> LoopResult:
    """A zero-th round whose first line is hard and whose others are of a label, after another adapter."""
    lines = [line(i) for i in range(count)]
    result = LoopResult([Prompt("p000", "a prompt", ())], adapter="old")
    for i, one in enumerate(lines):
        one = Description(one.id, "p000", 0, f" line {i}", f"line {i}", "ok", "")
        lines[i] = one
        result.verdicts[one.id] = Verdict(one.id, 0, 0, 1.0, 1.0, "hard" if i == 0 else label)  # type: ignore[arg-type]
    zeroth = SimpleNamespace(
        number=0, descriptions=lines, drawn=Drawn(), diagnostics={"collapsed_folds": float(collapsed)}
    )
    result.rounds.append(zeroth)  # type: ignore[arg-type]
    return result


def preferring(monkeypatch: pytest.MonkeyPatch) -> Loop:
    """A loop whose DPO trains nothing."""
    loop = Loop.__new__(Loop)
    loop.config = RunConfig(name="x", data=FlowersData(kind="flowers"))
    loop.progress = lambda *_: None
    trained = SimpleNamespace(key="new", json=lambda name: {"pairs": 9})
    monkeypatch.setattr(loop, "_train", lambda built, previous, number: trained)
    return loop


def test_too_few_pairs_stall_the_round_and_the_old_policy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = preferring(monkeypatch)
    adapter, status, training = loop._prefer(judged("easy", 4), 1)
    assert (adapter, status, training) == ("old", "stalled: 3 pairs, fewer than min_pairs = 8", None)
    _, status, _ = loop._prefer(judged("between", 20, collapsed=2), 1)
    assert status == "stalled: 0 pairs, fewer than min_pairs = 8; the evaluator collapsed in 2 folds of round 0"


def test_what_is_said_of_images_that_do_not_show_their_text_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    result = judged("easy", 12)
    result.rounds[0].drawn.mismatched = {result.rounds[0].descriptions[i].id for i in (1, 2)}
    seen = []
    loop = preferring(monkeypatch)
    trained = SimpleNamespace(key="new", json=lambda name: {})
    monkeypatch.setattr(loop, "_train", lambda built, previous, number: (seen.extend(built), trained)[1])
    loop._prefer(result, 1)
    assert {p.rejected_id for p in seen} == {f"r0-p000-s{i:03d}" for i in range(3, 12)}


def test_the_budget_is_a_share_of_the_normals_or_the_least_number() -> None:
    assert budget(LoopConfig(budget=0.05), 1250) == 62
    assert budget(LoopConfig(budget=0.07), 100) == 7, "whatever rounding does to the product"
    assert budget(LoopConfig(budget=0.05, min_budget=20), 100) == 20
    assert budget(LoopConfig(budget=0.05, min_budget=20), 1000) == 50


def test_a_budget_of_no_image_is_refused_before_anything_is_done() -> None:
    config, few = RunConfig(name="x", data=FlowersData(kind="flowers")), SimpleNamespace(count=19)
    with pytest.raises(ConfigError, match=r"loop\.budget: 0\.05 of 19 normals is less than one image"):
        Loop(config, None, few, None, None)  # type: ignore[arg-type]


def test_enough_pairs_train_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preferring(monkeypatch)._prefer(judged("easy", 9), 1) == ("new", "ok", {"pairs": 9})


def test_the_perplexity_of_lines_is_that_after_the_prompts_as_they_are_now(tmp_path: Path) -> None:
    scored: list[list[str]] = []

    def log_probs(prompts: list[str], lines: list[str]) -> tuple[list[list[float]], dict[str, int], int]:
        scored.append(prompts)
        return [[-float(len(prompt))] for prompt in prompts], {}, 0

    loop: Any = Loop.__new__(Loop)
    loop.config, loop.store = RunConfig(name="x", data=FlowersData(kind="flowers")), Store(str(tmp_path))
    loop.streamer = SimpleNamespace(sampler_inputs=dict, log_probs=log_probs)
    loop.encoder, loop._starts_ahead = SimpleNamespace(embed=lambda lines: np.eye(len(lines))), False
    raw = [("p000", " a red tulip\n"), ("p000", " a blue tulip\n")]

    def perplexity(prompt: str) -> float:
        return float(loop._drift(LoopResult([Prompt("p000", prompt, ())]), raw)["perplexity"])

    first = perplexity("Flowers:")
    assert perplexity("Flowers:") == first
    assert perplexity("Describe flowers:") > first
    assert scored == [["Flowers:"] * 2, ["Describe flowers:"] * 2]


@pytest.mark.parametrize("ahead", [True, False])
def test_the_places_that_were_kept_for_dpo_are_given_up_before_it_starts(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    loop: Any = Loop.__new__(Loop)
    loop.config, loop.store = RunConfig(name="x", data=FlowersData(kind="flowers")), Store(str(tmp_path))
    loop.progress, loop._starts_ahead, loop._ahead = lambda *_: None, ahead, None
    loop.streamer = SimpleNamespace(rest_samplers=lambda: None)
    loop._pools = SimpleNamespace(let_dpo_in=lambda: done.append("given up"))

    def run(name: str, function: Any, arguments: dict[str, Any], *_: Any, **__: Any) -> None:
        done.append("started")
        loop.store.get_or_make("dpo", dpo.VERSION, arguments["inputs"], lambda attempt: None)

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train, "Ahead", lambda *_, **__: done.append("started"))
    monkeypatch.setattr(assets, "resolve", lambda model: SimpleNamespace(identity=model))
    if ahead:
        loop._start_ahead(0)
    else:
        loop._train([PreferencePair("p", "a", "b", "prompt", "chosen", "rejected")], None, 1)
    assert done == ["given up", "started"]


def test_a_perplexity_of_some_of_the_lines_is_measured_anew_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring may fail for a moment: what is kept under the key of all lines is of all of them."""
    loop = Loop.__new__(Loop)
    loop.config, loop.store = RunConfig(name="x", data=FlowersData(kind="flowers")), Store(str(tmp_path))
    loop.encoder = SimpleNamespace(embed=lambda lines: np.eye(len(lines)))  # type: ignore[assignment]
    monkeypatch.setattr(loop, "_start_ahead", lambda number: None, raising=False)
    result, raw = LoopResult([Prompt("p000", "a list", ())]), [("p000", " a line\n"), ("p000", " another\n")]
    unscored = iter((1, 0))

    def log_probs(prompts: list[str], lines: list[str]) -> tuple[list[list[float]], dict[str, int], int]:
        missing = next(unscored)
        return [[], [-1.0]] if missing else [[-3.0], [-1.0]], {}, missing

    loop.streamer = SimpleNamespace(log_probs=log_probs, sampler_inputs=dict)  # type: ignore[assignment]
    found = [loop._drift(result, raw) for _ in range(3)]
    assert [f["unscored"] for f in found] == [1, 0, 0]
    assert found[0]["perplexity"] == pytest.approx(np.exp(1))
    assert found[1]["perplexity"] == found[2]["perplexity"] == pytest.approx(np.exp(2))
    assert [key for stage, key in loop.store.used if stage == "drift"] == [
        key for stage, key in loop.store.names() if stage == "drift"
    ]
