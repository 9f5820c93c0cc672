from dynaroute.reporting import tables


def test_columns_of_numbers_are_aligned_to_the_right():
    text = tables.table(["name", "n"], [["a", "1"], ["b", "–"], ["c", "**+2.5**"]])
    assert text.splitlines() == ["| name | n |", "| :--- | ---: |", "| a | 1 |", "| b | – |", "| c | **+2.5** |"]


def test_sizes_take_the_unit_that_suits_them():
    assert [tables.size(n) for n in (12, 2048, 8_398_848, 3 * 2**30)] == ["12 B", "2.00 KiB", "8.01 MiB", "3.00 GiB"]


def test_perplexity_has_four_digits():
    assert [tables.perplexity(loss) for loss in (0.1, 3.5, 5.4181, 10.8)] == ["1.105", "33.12", "225.5", "49,021"]
    assert tables.perplexity(1e4) == "e^10,000"  # more than a float holds


def test_durations():
    assert [tables.duration(s) for s in (0.0456, 1.25, 600, 36_000)] == ["45.6 ms", "1.2 s", "10.0 min", "10.0 h"]
    assert [tables.duration(s) for s in (0.9994, 0.9996)] == ["999 ms", "1.0 s"]


def test_a_count_agrees_with_its_noun():
    assert [tables.count(n, "check") for n in (0, 1, 2000)] == ["0 checks", "1 check", "2,000 checks"]


def test_a_table_takes_rows_and_a_list_of_columns():
    rows = [{"name": "a", "loss": 1.23456, "steps": 1200}, {"name": "b", "loss": None, "steps": float("nan")}]
    text = tables.tabulate(rows, [("name", "run"), ("loss", "NLL", "+.3f"), ("steps", "steps")])
    assert text.splitlines()[2:] == ["| a | +1.235 | 1,200 |", "| b | – | – |"]


def test_items_are_listed_as_in_a_sentence():
    assert [tables.listed(items) for items in ([], "a", "ab", "abc")] == ["–", "a", "a and b", "a, b and c"]


def test_a_paragraph_becomes_one_line_and_what_is_no_paragraph_keeps_its_lines():
    text = (
        "# T\n\nOne\n`two`\n3 of\n  four.\n- a\n  b\n- c\n1. d\n| e |\n| f |\n> g\n> h\n![i](j)\n```\nk\nl\n```\n\nm\n"
    )
    assert tables.unwrap(text).splitlines() == [
        *("# T", "", "One `two` 3 of four.", "- a b", "- c", "1. d", "| e |", "| f |", "> g", "> h", "![i](j)"),
        *("```", "k", "l", "```", "", "m"),
    ]


def test_no_cell_breaks_a_table():
    assert tables.table(["a|b"], [["c\n| d"]]).splitlines()[-1] == "| c \\| d |"
