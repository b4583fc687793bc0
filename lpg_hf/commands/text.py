r"""
Fine-tunes a model on texts, or pairs of texts, with one label each.

A model and a data set of the hub:

    lpg-hf train text --model_name_or_path distilbert/distilbert-base-uncased \
        --dataset_name fancyzhx/ag_news --validation_split_name test --do_train --do_eval --output_dir output

A model and files on this machine, which need the columns text and label:

    lpg-hf train text --model_name_or_path path/to/model --train_file train.csv \
        --validation_file test.csv --do_train --do_eval --output_dir output

On several GPUs write `accelerate launch -m lpg_hf.commands` in the place of `lpg-hf`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from .arguments import Arguments, DataArguments
from .load_data import EMPTY_CELLS, check_input_column, shorten
from .task import ClassificationTask


@dataclass
class TextArguments(DataArguments):
    text_column_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Column of the texts (default: text, else sentence). Commas join several columns to one text, as "
            "in title,body; two names with a space between are pairs, such as premise and hypothesis.",
            "aliases": ["--text_column_name"],
        },
    )
    text_column_delimiter: str = field(
        default=" ", metadata={"help": "What stands between columns that are joined; \\n is a new line, \\t a tab."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text at most; the rest is cut off."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Whether every batch has this length, instead of that of its longest text."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Whether to tokenize anew what `datasets` has in its cache."}
    )
    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "For older commands: transformers 5 has fast tokenizers alone."}
    )
    do_regression: bool | None = field(
        default=None,
        metadata={"help": "For older commands: this one classifies.", "nargs": "?", "const": True},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.do_regression:
            raise ValueError(
                "`--do_regression` is true, but this command trains one label per row. Leave it out where the labels "
                "are classes. For regression use run_classification.py of transformers."
            )
        if not self.use_fast_tokenizer:
            raise ValueError("`--use_fast_tokenizer` is false, but transformers 5 has no slow ones. Leave it out.")


class TextClassification(ClassificationTask):
    description = __doc__
    kind = "text"
    name = "text-classification"
    data_class = TextArguments
    auto_model = AutoModelForSequenceClassification
    auto_processor = AutoTokenizer
    peft_task_type = "SEQ_CLS"
    needs_all_columns = False

    def check(self, splits: DatasetDict, data: TextArguments) -> DatasetDict:
        if data.text_column_names is None:
            columns = {column for dataset in splits.values() for column in dataset.column_names}
            data.text_column_names = ["sentence" if "sentence" in columns and "text" not in columns else "text"]
        if len(data.text_column_names) > 2:
            raise ValueError(
                f"`--text_column_names` is {data.text_column_names}, but must be one column or two. To join columns "
                f"to one text, separate them by commas: {','.join(data.text_column_names)}"
            )
        for name in data.text_column_names:
            for column in joined_columns(splits, name):
                check_input_column(splits, data, "text_column_names", column)
            for split, dataset in splits.items():
                check_texts(dataset, split, name)
        return splits

    def prepare(
        self, dataset: Dataset, split: str, processor: PreTrainedTokenizerBase, data: TextArguments
    ) -> Dataset:
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        names = data.text_column_names
        assert names is not None  # `check` has set it
        own_tokens = processor.num_special_tokens_to_add(pair=len(names) == 2)
        if data.max_seq_length <= own_tokens:
            raise ValueError(
                f"`--max_seq_length` is {data.max_seq_length}, but must be at least {own_tokens + 1}: the tokenizer "
                f"adds {own_tokens} tokens of its own to every text."
            )
        max_length = min(data.max_seq_length, processor.model_max_length)
        padding = "max_length" if data.pad_to_max_length else False
        # A shell passes a backslash and a letter.
        delimiter = data.text_column_delimiter.replace("\\n", "\n").replace("\\t", "\t")
        columns = [joined_columns({split: dataset}, name) for name in names]

        def tokenize(batch: dict[str, list]) -> dict[str, list]:
            texts = [join([batch[column] for column in group], delimiter) for group in columns]
            return processor(*texts, padding=padding, max_length=max_length, truncation=True)

        return dataset.map(
            tokenize,
            batched=True,
            num_proc=data.preprocessing_num_workers,
            load_from_cache_file=not data.overwrite_cache,
            desc=f"Tokenizing the {split} data",
        )

    def adapt(self, model: Any, arguments: Arguments, processor: PreTrainedTokenizerBase) -> None:
        # Decoders look for the last token that is no padding, and come without a token for it.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id


def joined_columns(splits: Mapping[str, Dataset], name: str) -> list[str]:
    """The columns that a name stands for: those that commas separate, unless a column has the whole name."""
    is_column = any(name in dataset.column_names for dataset in splits.values())
    return [name] if is_column else name.split(",")


def join(columns: Sequence[Sequence[str | None]], delimiter: str) -> list[str]:
    """
    One text per row; what a row has not is left out.

    Example:

    ```python
    >>> join([["A title", None], ["Its text.", "No title."]], ": ")
    ['A title: Its text.', 'No title.']

    ```
    """
    return [delimiter.join(part for part in parts if part) for parts in zip(*columns, strict=True)]


def check_texts(dataset: Dataset, split: str, name: str) -> None:
    """
    Raises:
        ValueError: If a column holds no texts, or a row has nothing in any of them.
    """
    columns = joined_columns({split: dataset}, name)
    for column in columns:
        feature = dataset.features[column]
        if not isinstance(feature, Value) or "string" not in feature.dtype:
            raise ValueError(
                f"Column {column!r} of the {split} data holds {feature}, not texts. Pass another --text_column_names."
            )
    texts = join([dataset[column][:] for column in columns], " ")
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ValueError(
            f"Column {name!r} of the {split} data has {len(empty)} empty texts (rows {shorten(empty)}, counted from "
            f"0). Remove these rows: a model learns nothing from them but their labels. {EMPTY_CELLS}"
        )
