from pathlib import Path

import pytest

from kka_ray import assets


def test_a_relative_folder_is_made_absolute_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert assets.absolute("models/qwen") == str(tmp_path / "models" / "qwen")
    for reference in ("builtin:natural", "hub:org/name@main", "/models/qwen"):
        assert assets.absolute(reference) == reference
