import json
from pathlib import Path

import pytest

from tests import stage_versions


def test_no_stage_changes_without_a_new_version() -> None:
    recorded, present = json.loads(stage_versions.RECORD.read_text()), stage_versions.current()
    stages = stage_versions.unraised(recorded, present)
    assert not stages, (
        f"the sources of {', '.join(stages)} changed: raise VERSION, or old outputs in the store would be taken for "
        "new ones; then run `python -m tests.stage_versions`"
    )
    assert recorded == present, "run `python -m tests.stage_versions` to record the sources"


def test_a_change_of_code_counts_and_a_change_of_words_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_versions, "ROOT", tmp_path)
    file = tmp_path / "kka_ray" / "stage" / "code.py"
    file.parent.mkdir(parents=True)

    def of(text: str) -> str:
        file.write_text(text)
        return stage_versions.fingerprint(("stage",))

    first = of('"""Doc."""\n\ndef f(x):\n    """Words."""\n    return x + 1\n')
    assert of('"""Other."""\ndef f(x):\n    # a comment\n    """More words."""\n    return (x + 1)\n') == first
    assert of("def f(x):\n    return x + 2\n") != first
    assert stage_versions.unraised({"s": {"version": 1, "sources": "a"}}, {"s": {"version": 1, "sources": "b"}}) == [
        "s"
    ]
    assert stage_versions.unraised({"s": {"version": 1, "sources": "a"}}, {"s": {"version": 2, "sources": "b"}}) == []
