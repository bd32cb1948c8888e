"""From files to rows."""

import json

import pytest

from hf_slim.cli.data import DataArguments, load_text_data

REVIEWS = "text,label\ngood film,yes\nbad film,no\ngood play,yes\nbad play,no\n"


def _write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_classes_are_sorted_names(tmp_path):
    train = _write(tmp_path / "train.csv", REVIEWS)
    validation = _write(tmp_path / "validation.csv", "label,text,more\nyes,a film,1\n")
    data = load_text_data(DataArguments(train, validation))
    assert (data.task, data.classes, data.documents) == ("classification", ("no", "yes"), True)
    assert data.train.to_dict() == {
        "text": ["good film", "bad film", "good play", "bad play"],
        "labels": [1, 0, 1, 0],
    }
    assert data.validation.to_dict() == {"text": ["a film"], "labels": [1]}


def test_numbers_as_classes_sort_as_numbers(tmp_path):
    train = _write(tmp_path / "train.csv", "text,label\na,10\nb,2\nc,10\n")
    # The same classes, read as floating-point numbers from the other file.
    validation = _write(tmp_path / "validation.json", '{"text": "d", "label": 2.0}\n')
    data = load_text_data(DataArguments(train, validation))
    assert (data.classes, data.train["labels"][:], data.validation["labels"][:]) == (("2", "10"), [1, 0, 1], [0])


def test_pairs_and_floats_are_a_regression(tmp_path):
    rows = [{"one": "a b", "two": "c", "score": 1.5}, {"one": "d", "two": "e", "score": 2}]
    train = _write(tmp_path / "train.jsonl", "\n".join(json.dumps(row) for row in rows))
    data = load_text_data(DataArguments(train, train, label_column="score"))
    assert (data.task, data.classes) == ("regression", ())
    assert data.train.to_dict() == {"text": ["a b", "d"], "text_pair": ["c", "e"], "labels": [1.5, 2.0]}


def test_the_order_of_text_columns_is_the_one_given(tmp_path):
    train = _write(tmp_path / "train.csv", "one,two,id,label\na,b,x,0\nc,d,y,1\n")
    data = load_text_data(DataArguments(train, train, text_column=["two", "one"]))
    assert data.train[0] == {"text": "b", "text_pair": "a", "labels": 0}


def test_integers_can_be_a_regression(tmp_path):
    train = _write(tmp_path / "train.csv", "text,label\na,1\nb,3\n")
    data = load_text_data(DataArguments(train, train, task="regression"))
    assert data.train["labels"][:] == [1.0, 3.0]


def test_words_that_mean_missing_elsewhere_are_text(tmp_path):
    train = _write(tmp_path / "train.csv", "text,label\nNone,NA\nnull,n/a\n")
    data = load_text_data(DataArguments(train, train))
    assert (data.train["text"][:], data.classes) == (["None", "null"], ("NA", "n/a"))


def test_lines_of_text_keep_their_ends(tmp_path):
    content = "".join(f"line {number}\n\n" for number in range(10))
    data = load_text_data(DataArguments(_write(tmp_path / "input.txt", content)))
    assert (data.task, data.documents) == ("causal-lm", False)
    assert "".join(data.train["text"]) + "".join(data.validation["text"]) == content
    assert data.validation["text"][:] == ["line 9\n", "\n"]


def test_held_out_rows_are_random_by_the_seed(tmp_path):
    content = "text,label\n" + "".join(f"t{number},{number % 2}\n" for number in range(100))
    arguments = DataArguments(_write(tmp_path / "train.csv", content))
    parts = [load_text_data(arguments, seed=seed) for seed in (1, 1, 2)]
    held_out = [part.validation["text"][:] for part in parts]
    assert held_out[0] == held_out[1] != held_out[2]
    assert len(held_out[0]) == 10
    assert {*held_out[0], *parts[0].train["text"]} == {f"t{number}" for number in range(100)}
    assert held_out[0] != [f"t{number}" for number in range(90, 100)]


def test_one_column_name_may_be_a_string():
    assert DataArguments("train.csv", text_column="text").text_column == ["text"]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (
            REVIEWS,
            {"train_file": "train.parquet"},
            r"train\.parquet: data must be one of \.csv, \.json, \.jsonl, \.txt",
        ),
        (REVIEWS, {"train_file": "nowhere.csv"}, r"There is no file nowhere\.csv"),
        (REVIEWS, {"validation_file": "nowhere.csv"}, r"There is no file nowhere\.csv"),
        ("", {}, r"train\.csv is empty"),
        ("text,label\n", {}, r"train\.csv has no rows, or is no csv"),
        (
            "text,label\na,b\na,b,c\n",
            {},
            r"is no csv: Error tokenizing data\. C error: Expected 2 fields in line 3, saw 3",
        ),
        (REVIEWS, {"label_column": "class"}, r"train\.csv has no column 'class'; it has text, label"),
        (REVIEWS, {"text_column": ["body"]}, r"train\.csv has no column 'body'; it has text, label"),
        (REVIEWS, {"text_column": ["label"]}, "'label' is both --text_column and --label_column"),
        (REVIEWS, {"task": "causal-lm"}, r"causal-lm takes one text column; .*train\.csv has 2 \(text, label\)"),
        (REVIEWS, {"task": "causal-lm", "label_column": "label"}, "causal-lm has no labels: leave out --label_column"),
        (REVIEWS, {"task": "regression"}, "'yes' in column 'label' is not a finite number"),
        ("text,label\na,1.5\nb,nan\n", {"task": "regression"}, "'nan' in column 'label' is not a finite number"),
        (
            "text\nfilm\n",
            {"task": "classification"},
            r"classification needs labels: name the --label_column, one of text",
        ),
        ("a,b,c,label\nx,y,z,1\n", {}, r"classification takes one or two text columns; .* has 3 \(a, b, c\)"),
        (
            "a,b,score\nx,y,0.5\n",
            {},
            r"has 2 \(a, b\)\. Name the --text_column \(and for a task with labels the --label",
        ),
        ("a,label\n1,2\n", {}, r"train\.csv has none\. Name the --text_column, of a, label"),
        ("a,label\n1,2\n", {"text_column": ["a"]}, r"Column 'a' of .*train\.csv holds int64, not text"),
        (
            "text,label\na,x\n,y\n,y\n",
            {},
            r"2 of 3 rows have nothing in column 'text', the first is row 2 of the data",
        ),
        ("text,label\na,x\nb,\n", {}, r"1 of 2 rows have nothing in column 'label', the first is row 2"),
        (REVIEWS, {"max_seq_length": 1}, "max_seq_length must be at least 2, got 1"),
        ("text,label\na,x\n", {}, r"train\.csv has 1 row: name a --validation_file"),
    ],
)
def test_bad_data_is_refused(tmp_path, content, changes, message):
    train = _write(tmp_path / "train.csv", content)
    with pytest.raises(ValueError, match=message):
        load_text_data(DataArguments(**{"train_file": train, **changes}))


def test_a_list_is_no_label(tmp_path):
    train = _write(tmp_path / "train.json", '{"text": "a", "label": [1, 2]}\n')
    with pytest.raises(ValueError, match=r"Column 'label' of .*train\.json holds \w+, not one label a row"):
        load_text_data(DataArguments(train, train))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,label\na,yes\nb,maybe\n",
            r"validation\.csv: the labels maybe of column 'label' do not occur in the tr.*no, yes",
        ),
        ("body,label\na,yes\n", r"validation\.csv has no column 'text'; it has body, label"),
        ("text,label\n1,yes\n", r"Column 'text' of .*validation\.csv holds int64, not text"),
    ],
)
def test_validation_data_must_match(tmp_path, content, message):
    train = _write(tmp_path / "train.csv", REVIEWS)
    with pytest.raises(ValueError, match=message):
        load_text_data(DataArguments(train, _write(tmp_path / "validation.csv", content)))
