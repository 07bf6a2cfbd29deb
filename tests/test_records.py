from kka_ray.records import Description, PreferencePair, Prompt, Rendering, Verdict, from_table, to_table

RECORDS = [
    Prompt("p000", "text", ("a", "b")),
    Description("r0-p000-s000", "p000", 0, " raw\n", "raw", "rejected", "too_short"),
    Rendering("r0-p000-s000", 0, 7, "ok", b"\x89PNG", "ab"),
    Verdict("r0-p000-s000", 0, 1, 0.5, 3.25, "hard"),
    PreferencePair("p000", "a", "b", "prompt", "x", "y"),
]


def test_round_trip_through_arrow() -> None:
    for record in RECORDS:
        assert from_table(type(record), to_table(type(record), [record])) == [record]


def test_no_records_keep_their_columns() -> None:
    table = to_table(Verdict, [])
    assert table.column_names == ["id", "round", "fold", "score", "hardness", "label"]
    assert from_table(Verdict, table) == []
