import pytest

from kka_ray.cluster.streaming import Drawn
from kka_ray.errors import StageError
from kka_ray.loop import check_drawn
from kka_ray.records import Description, Rendering


def line(number: int, reason: str = "") -> Description:
    return Description(f"r0-p000-s{number:03d}", "p000", 0, " a line", "a line", "rejected" if reason else "ok", reason)


def test_a_round_without_a_usable_line_says_why() -> None:
    lines = [line(0, "too_short"), line(1, "too_short"), line(2, "normal_class")]
    with pytest.raises(StageError, match=r"none of the 3 lines .*2 too_short, 1 normal_class.*'a line'"):
        check_drawn(lines, Drawn(), 0)
    check_drawn(lines, Drawn(), 1)  # a later round has the set of the rounds before


def test_a_renderer_that_fails_on_everything_ends_the_run() -> None:
    failed = Drawn(renderings=[Rendering("r1-p000-s000", 1, 0, "failed", b"", "", "out of memory")])
    with pytest.raises(StageError, match="all 1 images of round 1 .*out of memory"):
        check_drawn([line(0)], failed, 1)


def test_some_failures_are_rows_and_the_run_goes_on() -> None:
    renderings = [Rendering("a", 0, 0, "failed", b"", "", "x"), Rendering("b", 0, 0, "ok", b"x", "y")]
    check_drawn([line(0), line(1)], Drawn(renderings=renderings, ids=["b"]), 0)
