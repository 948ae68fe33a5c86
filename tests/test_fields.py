"""Texts are the exact values under keys, or templates filled with them; what is missing is never left out unnoticed."""

import json

import pyarrow.parquet
import pytest

from pretrain.data.corpus import Corpus
from pretrain.data.fields import Bad, Key, Missing, Template
from pretrain.data.indexed import DataError

ROWS = [
    {"title": "A \\n {name}", "text": "one\r\n", "year": 1999},
    {"title": "  ü\t", "text": '"two", 2', "year": -5},
    {"title": "", "text": "x\n\ny", "year": 0},
]


def filled(template: str, record) -> str | Bad:
    return Template(template).text(record, "a.jsonl:1")


def test_a_template_joins_exact_values_and_literal_text():
    record = {"title": "T {x}", "body": {"text": "a\\nb", "lines": 2}, "a.b": "literal", "a": {"b": "nested"}, "dc:x": "!"}
    for template, text in (
        ("{title}\\n\\n{body.text}", "T {x}\n\na\\nb"),
        ("{title}\n{title}", "T {x}\nT {x}"),
        ("\\t\\\\n\\r{{{a.b}}}{{}}", "\t\\n\r{literal}{}"),
        ("{body.lines} lines: {dc:x}", "2 lines: !"),
        ("{none?}{title}{body.none?}", "T {x}"),
    ):
        assert filled(template, record) == text


@pytest.mark.parametrize("template", ["no key", "", "{}", "{?}", "{a", "a}", "{a}}", "{{a}", "{a{b}}", "{a}\\x", "{a}\\"])
def test_a_template_that_is_no_template_is_refused(template):
    with pytest.raises(DataError, match="--template"):
        Template(template)


def test_a_value_that_is_missing_null_or_of_another_type_is_bad_unless_it_is_optional():
    record = {"text": "x", "null": None, "list": ["a"], "object": {"a": "b"}, "float": 0.1, "bool": True, "bytes": b"\xff"}
    for key in ("none", "null", "object.none", "null.a", "list", "list.a", "object", "float", "bool", "text.a", "bytes"):
        assert isinstance(filled(f"{{text}} {{{key}}}", record), Bad), key
        optional = filled(f"{{text}} {{{key}?}}", record)
        if key in ("none", "null", "object.none", "null.a"):
            assert optional == "x "
        else:  # what is there must not be left out because it cannot be used
            assert isinstance(optional, Bad) and not isinstance(optional, Missing), key
    for not_an_object in (["x"], "x", None, 3):
        assert isinstance(filled("{text?}", not_an_object), Bad)
        assert isinstance(Key("text").text(not_an_object, "a.jsonl:1"), Bad)


def test_a_document_of_nothing_but_literal_text_is_empty():
    assert filled("Title: {title}\n\n{text?}", {"title": " ", "text": None}) == ""
    assert filled("Title: {title}\n\n{text?}", {"title": " ", "text": "x"}) == "Title:  \n\nx"
    assert filled("{year}", {"year": 0}) == "0"


def write(folder, form: str, rows: list[dict]) -> str:
    """The rows in a file of this format, as pandas writes it."""
    import pandas

    path, frame = folder / f"a.{form}", pandas.DataFrame(rows)
    if form in ("csv", "tsv"):
        frame.to_csv(path, sep="," if form == "csv" else "\t", index=False)
    elif form == "parquet":
        frame.to_parquet(path)
    elif form == "arrow":
        frame.to_feather(path)
    else:
        frame.to_json(path, orient="records", lines=form == "jsonl", force_ascii=False)
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "hub"])
def test_templates_work_with_every_format(tmp_path, form):
    path = write(tmp_path, "jsonl" if form == "hub" else form, ROWS)
    expected = [f"{row['title']}\n{row['year']}\n{row['text']}" for row in ROWS]
    if form == "hub":
        corpus = Corpus.from_hub(str(tmp_path), template="{title}\\n{year}\\n{text}")
    else:
        corpus = Corpus([path], template="{title}\\n{year}\\n{text}")
    assert [text for _, text in corpus.documents()] == expected
    assert corpus.description()["template"] == "{title}\\n{year}\\n{text}" and corpus.most_characters is None
    if form != "hub":
        with pytest.raises(DataError, match=r"a\..*'subtitle'"):
            list(Corpus([path], template="{title}{subtitle}").documents())
        assert len(list(Corpus([path], template="{title}{subtitle?}").documents())) == 2  # one title is empty


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_only_the_columns_that_a_template_names_are_read_from_parquet(tmp_path, compression):
    rows = [{"meta": {"title": f"t{i}", "unused": "x" * 100}, "body": {"text": f"b{i}"}, "big": "y" * 100} for i in range(50)]
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, compression=compression, use_dictionary=False, row_group_size=20)
    data, unused = bytearray(path.read_bytes()), []
    about = pyarrow.parquet.ParquetFile(path).metadata
    for group in range(about.num_row_groups):
        for i in range(about.num_columns):
            column = about.row_group(group).column(i)
            if column.path_in_schema in ("big", "meta.unused"):
                unused.append((column.data_page_offset, column.total_compressed_size))
    for start, size in unused:
        data[start : start + size] = b"\xff" * size
    path.write_bytes(data)
    corpus = Corpus([str(path)], template="{meta.title}: {body.text}")
    assert [text for _, text in corpus.documents()] == [f"t{i}: b{i}" for i in range(50)]
    with pytest.raises(DataError):
        list(Corpus([str(path)], template="{meta.title}: {big}").documents())


def test_a_missing_value_is_reported_with_its_place_or_skipped_and_counted(tmp_path):
    rows = [{"title": "a", "text": "b"}, {"title": None, "text": "b"}, {"text": "b"}, {"title": "c", "text": "d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'title' is null.*\{title\?\}"):
        list(Corpus([str(tmp_path / "a.jsonl")], template="{title}: {text}").documents())
    corpus = Corpus([str(tmp_path / "a.jsonl")], template="{title}: {text}", on_bad_line="skip")
    assert [text for _, text in corpus.documents()] == ["a: b", "c: d"] and corpus.bad.total() == 2
    corpus = Corpus([str(tmp_path / "a.jsonl")], template="{title?}: {text}")
    assert [text for _, text in corpus.documents()] == ["a: b", ": b", ": b", "c: d"]


def test_a_column_whose_name_occurs_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,id,text\na,1,b\n")
    with pytest.raises(DataError, match=r"2 columns 'text'"):
        list(Corpus([str(tmp_path / "a.csv")]).documents())
    assert [text for _, text in Corpus([str(tmp_path / "a.csv")], text_key="id").documents()] == ["1"]
