from kka_ray import versions


def test_what_is_installed_for_a_stage_alone_counts_and_nothing_changes_without() -> None:
    here = versions.computing()
    assert versions.computing(()) == here
    assert versions.computing(("torch==2.6",)) == here | {"pip": ["torch==2.6"]}
