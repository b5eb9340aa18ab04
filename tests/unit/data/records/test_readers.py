"""The cells of csv files."""

import csv
import json

import pytest

from erniekit.data.records.readers import load_record, open_file


def records_of(path):
    file = open_file(path, lambda raw, where: None, lambda error: None)
    return [load_record(file.raw(i), file.where(i)) for i in range(len(file))]


def test_csv_cells_that_hold_messages_or_turns_as_json(tmp_path):
    answer, turns = [{"role": "assistant", "content": "a"}], [{"from": "human", "value": "q"}]
    rows = {
        "prompt,chosen,rejected": ["q", json.dumps(answer), "b"],
        "completion,prompt": ["[1, 2]", json.dumps(turns)],
        "src,tgt": ['["q", "p"]', '["a", "b"]'],
        "tgt,src": ['["a list as JSON"]', "Name one."],
    }
    read = []
    for number, (header, row) in enumerate(rows.items()):
        with open(tmp_path / f"{number}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header.split(","), row])
        read += records_of(tmp_path / f"{number}.csv")
    assert read == [
        {"prompt": "q", "chosen": answer, "rejected": "b"},
        {"completion": "[1, 2]", "prompt": turns},
        {"src": ["q", "p"], "tgt": ["a", "b"]},
        {"tgt": '["a list as JSON"]', "src": "Name one."},
    ]


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_csv_cells_with_a_judgement(tmp_path, column):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion,{column}\nq,a,True\nq,a,False\nq,a,true\nq,a,0\nq,a,FALSE\n")
    assert [record[column] for record in records_of(path)] == [True, False, True, 0, False]


def test_csv_with_spaces_behind_its_commas(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('src, tgt, system\n1+1?, 2, "Add, please."\n" q ",a ,\n"x", "a\nb", s\n')
    assert records_of(path) == [
        {"src": "1+1?", "tgt": "2", "system": "Add, please."},
        {"src": " q ", "tgt": "a "},
        {"src": "x", "tgt": "a\nb", "system": "s"},
    ]


def test_csv_with_a_byte_order_mark_before_a_quoted_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"src","tgt"\n"1, 2?","a"\n', encoding="utf-8-sig")
    assert records_of(path) == [{"src": "1, 2?", "tgt": "a"}]


def test_csv_cells_keep_their_spaces_where_the_header_has_none(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("src,tgt\nq, a\n")
    assert records_of(path) == [{"src": "q", "tgt": " a"}]
