"""Tables of the pages: they are what the rows say, and a page that differs is found."""

import pytest

from benchmarks import tables


def test_every_page_is_what_the_rows_say():
    assert tables.main(["--check"]) == 0


def test_every_table_stands_in_some_page():
    shown = {found[2] for page in tables.pages() for found in tables.MARKED.finditer(page.read_text())}
    assert shown == set(tables.CONTENTS)


def test_a_page_that_differs_is_found_and_rewritten(tmp_path, monkeypatch):
    monkeypatch.setitem(tables.CONTENTS, "figure", lambda: "59.5 dB")
    monkeypatch.setitem(tables.CONTENTS, "table", lambda: tables.markdown(["a", "b"], [["1", "2"]]))
    page = tmp_path / "README.md"
    page.write_text("We reach <!-- figure: figure -->60 dB<!-- end -->.\n\n<!-- table: table --><!-- end -->\n")
    assert tables.main(["--check"], root=tmp_path) == 1
    assert tables.main(["--write"], root=tmp_path) == 0
    assert page.read_text() == (
        "We reach <!-- figure: figure -->59.5 dB<!-- end -->.\n\n"
        "<!-- table: table -->\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n<!-- end -->\n"
    )
    assert tables.main(["--check"], root=tmp_path) == 0


def test_an_unknown_table_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("<!-- table: nonsense --><!-- end -->")
    with pytest.raises(ValueError, match="nonsense"):
        tables.main(["--check"], root=tmp_path)


def test_the_newest_row_of_a_cell_counts():
    rows = [{"op": "a", "us": "1"}, {"op": "b", "us": "2"}, {"op": "a", "us": "3"}]
    assert tables.newest(rows, "op") == {("a",): rows[2], ("b",): rows[1]}


def test_support_shows_only_what_was_tried(monkeypatch):
    tried = {"guidance": "2 calls", "output": "yes", "hidden": "", "compile": "", "offload": "yes", "lora": ""}
    rows = [
        {"pipeline": "APipeline", "denoiser": "Net", **tried},
        {"pipeline": "BPipeline, guided", "denoiser": "Net", **tried, "output": "0.2 from the oracle", "guidance": ""},
    ]
    monkeypatch.setattr(tables, "rows_of", lambda name: rows)
    assert tables.support().splitlines()[-1] == "| Net | A, B | 1 of 2 |  | 2 calls |  | yes |  |"


def test_fits_are_ahead_of_every_other_method():
    """What README.md claims of the newest rows: the best PSNR in every column, with guidance and without."""
    cells = tables.newest(tables.rows_of("fitted.csv"), "guidance", "method", "schedule", "site", "effort", "computed")
    for guidance in "13":
        for budget in tables.BUDGETS:
            psnr = {key: float(row["psnr"]) for key, row in cells.items() if (key[0], key[-1]) == (guidance, budget)}
            others = [figure for key, figure in psnr.items() if key[1] != "lesa.fit"]
            ours = [figure for key, figure in psnr.items() if key[1] == "lesa.fit"]
            assert len(ours) == 3 and len(others) > 25 and min(ours) > max(others)
