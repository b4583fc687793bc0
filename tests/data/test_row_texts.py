"""A table shows the texts of its rows, else the names of their files, else their tokens, and decodes no picture."""

import pytest
from datasets import Audio, Dataset, Image, Value
from label_data import image_dataset, never_called

from lpg_hf.data.row_texts import row_texts
from lpg_hf.safe_text import LONGEST_SNIPPET


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(map(str, ids))


def test_the_longest_text_of_a_row():
    columns = {"title": ["a", "long title", None], "text": ["some\ntext", "", "x" * 500], "input_ids": [[1], [2], [3]]}
    dataset = Dataset.from_dict(columns).with_transform(never_called)
    expected = ["x" * (LONGEST_SNIPPET - 1) + "…", "long title", "some text"]
    assert row_texts(dataset, [2, 1, 0], Tokenizer()) == ("text", expected)
    assert row_texts(list(Dataset.from_dict(columns)), [2, 1, 0]) == ("text", expected)
    assert row_texts(dataset.select([2, 0]), [1]) == ("text", ["some text"])
    # A lone surrogate has no bytes in UTF-8.
    assert row_texts([{"text": "a\ud800"}], [0]) == ("text", ["a\\ud800"])


@pytest.mark.parametrize("feature", [Image(), Audio()])
def test_the_path_of_a_file_that_need_not_exist(feature):
    files = [{"path": f"folder/{row}.bin", "bytes": None} for row in range(3)] + [None]
    dataset = Dataset.from_dict({"file": files}).cast_column("file", type(feature)(decode=False))
    dataset = dataset.cast_column("file", feature)
    assert row_texts(dataset, [3, 2]) == ("file", ["", "folder/2.bin"])


def test_tokens_are_decoded():
    dataset = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    assert row_texts(dataset, [1, 0], Tokenizer()) == ("tokens", ["3", "1 2"])
    assert row_texts(dataset, [1, 0], object()) is None and row_texts(dataset, [1, 0]) is None


def test_rows_without_any_of_it():
    assert row_texts(image_dataset(), [0, 1]) is None  # pictures without a path
    assert row_texts(None, [0]) is None and row_texts([(1, 2)], [0]) is None
    empty = Dataset.from_dict({"text": ["", None]}).cast_column("text", Value("string"))
    assert row_texts(empty, [0, 1]) is None and row_texts(empty, []) is None
