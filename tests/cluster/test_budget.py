import pytest

from kka_ray.cluster.budget import BudgetError, ErrorBudget
from kka_ray.config.models import ClusterConfig


def test_what_is_allowed_is_the_smaller_of_share_and_number() -> None:
    assert ErrorBudget("x", 50, ClusterConfig(max_failed_share=0.1)).allowed == 5
    assert ErrorBudget("x", 50, ClusterConfig(max_failed_share=0.1, max_failed_rows=3)).allowed == 3
    assert ErrorBudget("x", 50, ClusterConfig(max_failed_share=0.1, max_failed_rows=9)).allowed == 5
    assert ErrorBudget("x", 180, ClusterConfig(max_failed_share=0.35)).allowed == 63


def test_one_too_many_ends_the_run_and_says_why() -> None:
    budget = ErrorBudget("drawing the images of round 1", 10, ClusterConfig(max_failed_share=0.2))
    budget.add(["a", "b"], "out of paint")
    budget.add(["a", "b"], "out of paint")  # the pool finds them, then they are read
    with pytest.raises(
        BudgetError, match=r"(?s)images of round 1: 3 of 10 .*only 2 may.*2 x out of paint.*1 x torn.*a, b, c"
    ):
        budget.add(["c"], "torn")
