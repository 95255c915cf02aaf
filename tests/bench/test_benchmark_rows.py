"""Files of rows: what is written is read again, and facts stand once."""

import json

from benchmarks import rows

FACTS = {"gpu": "a GPU", "date": "2026-11-28", "jax": "0.12.0"}


def test_rows_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    writer = rows.Writer(file, FACTS)
    writer.write([{"case": "a", "p50_us": 1.5}, {"case": "b", "gpu": "another"}])
    writer.write([{**FACTS, "case": "c", "note": None}])
    rows.Writer(file, FACTS | {"jax": "0.11.2"}).write([{"case": "d"}])
    assert rows.read([file, file])[:4] == [
        {**FACTS, "case": "a", "p50_us": 1.5},
        {**FACTS, "case": "b", "gpu": "another"},
        {**FACTS, "case": "c", "note": None},
        {**FACTS, "case": "d", "jax": "0.11.2"},
    ]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert (
        len(lines) == 6 and lines[0] == {"facts": FACTS} and lines[3] == {"case": "c", "note": None}
    )


def test_facts_that_rows_bring_stand_once(tmp_path):
    """Of processes that measure a case each: a later date stands in its rows, nothing else again."""
    file, later = tmp_path / "rows.jsonl", {**FACTS, "date": "2026-11-29"}
    writer = rows.Writer(file)
    given = [{"case": "a", **FACTS}, {"case": "b", "note": None, **FACTS}, {"case": "c", **later}]
    for row in given:
        writer.write([row])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [
        {"facts": FACTS},
        *({"case": "a"}, {"case": "b", "note": None}, {"case": "c", "date": "2026-11-29"}),
    ]
    assert rows.read([file]) == given


def test_a_case_that_failed_before_it_had_facts_takes_them_from_no_other(tmp_path):
    """A child that died brings none: they are those of the next row, and an earlier run's are not its own."""
    file = tmp_path / "rows.jsonl"
    rows.Writer(file, FACTS).write([{"case": "earlier"}])
    given = [{"case": "died"}, {"case": "b", **FACTS}, {"case": "c", **FACTS}]
    rows.Writer(file).write(given)
    assert rows.read([file]) == [{"case": "earlier", **FACTS}, *given]
    lines = file.read_text().splitlines()
    assert json.loads(lines[-1]) == {"case": "c"} and len(lines) == 7


def test_rows_without_facts_are_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"case": "a", "gpu": "x"}\n\n{"case": "b"}\n')
    assert rows.read([file]) == [{"case": "a", "gpu": "x"}, {"case": "b"}]


def test_nothing_is_written_without_rows_or_a_file(tmp_path):
    rows.Writer(None, FACTS).write([{"case": "a"}])
    rows.Writer(tmp_path / "rows.jsonl", FACTS).write([])
    assert rows.read([tmp_path / "rows.jsonl"]) == []
