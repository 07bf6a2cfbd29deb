from pathlib import Path

import pytest

from kka_ray import memory
from kka_ray.memory import physical_memory, usable_memory


@pytest.mark.parametrize(
    ("groups", "limits", "usable"),
    [
        ("0::/\n", {"memory.max": "3000\n"}, 3000),
        ("0::/user/job\n", {"user/memory.max": "2000\n", "user/job/memory.max": "max\n"}, 2000),
        ("0::/user/job\n", {"user/memory.max": "2000\n", "user/job/memory.max": "1000\n"}, 1000),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "1500\n"}, 1500),
        # As a container sees it: its own group is the root.
        ("4:cpu,memory:/docker/1f\n", {"memory/memory.limit_in_bytes": "1200\n"}, 1200),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("3:cpu:/\n", {"memory.max": "1\n", "cpu/memory.max": "1\n"}, None),
        (None, {}, None),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str | None,
    limits: dict[str, str],
    usable: int | None,
) -> None:
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    if groups is not None:
        (tmp_path / "own").write_text(groups)
    for name, limit in limits.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(limit)
    assert usable_memory() == (usable or physical_memory())
