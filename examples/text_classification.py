r"""
Fine-tunes a model on texts, or pairs of texts, with one label each.

A model and a data set of the hub:

    python examples/text_classification.py --model_name_or_path distilbert/distilbert-base-uncased \
        --dataset_name fancyzhx/ag_news --validation_split_name test --do_train --do_eval --output_dir output

A model and files on this machine, which need the columns text and label:

    python examples/text_classification.py --model_name_or_path path/to/model --train_file train.csv \
        --validation_file test.csv --do_train --do_eval --output_dir output

On several GPUs put `accelerate launch --config_file examples/accelerate/multi_gpu_ddp.yaml` in the place of `python`.
"""

from dataclasses import dataclass, field

from classification.arguments import Arguments, DataArguments
from classification.data import check_input_column, shorten
from classification.training import ClassificationTask, run
from datasets import Dataset, DatasetDict, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class TextArguments(DataArguments):
    text_column_names: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={
            "help": "Column of the texts; two columns for pairs, such as premise and hypothesis.",
            "aliases": ["--text_column_name"],
        },
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a text at most; the rest is cut off."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Whether every batch has this length, instead of that of its longest text."}
    )


class TextClassification(ClassificationTask):
    name = "text-classification"
    data_class = TextArguments
    auto_model = AutoModelForSequenceClassification
    auto_processor = AutoTokenizer
    peft_task_type = "SEQ_CLS"
    needs_all_columns = False

    def check(self, splits: DatasetDict, data: TextArguments) -> DatasetDict:
        if len(data.text_column_names) > 2:
            raise ValueError(f"`--text_column_names` is {data.text_column_names}, but must be one column or two.")
        for column in data.text_column_names:
            check_input_column(splits, data, "text_column_names", column)
            for split, dataset in splits.items():
                check_texts(dataset, split, column)
        return splits

    def prepare(
        self, dataset: Dataset, split: str, processor: PreTrainedTokenizerBase, data: TextArguments
    ) -> Dataset:
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
        own_tokens = processor.num_special_tokens_to_add(pair=len(data.text_column_names) == 2)
        if data.max_seq_length <= own_tokens:
            raise ValueError(
                f"`--max_seq_length` is {data.max_seq_length}, but must be at least {own_tokens + 1}: the tokenizer "
                f"adds {own_tokens} tokens of its own to every text."
            )
        max_length = min(data.max_seq_length, processor.model_max_length)
        padding = "max_length" if data.pad_to_max_length else False

        def tokenize(batch: dict[str, list]) -> dict[str, list]:
            texts = [batch[column] for column in data.text_column_names]
            return processor(*texts, padding=padding, max_length=max_length, truncation=True)

        return dataset.map(tokenize, batched=True, desc=f"Tokenizing the {split} data")

    def adapt(self, model: PreTrainedModel, arguments: Arguments, processor: PreTrainedTokenizerBase) -> None:
        # Decoders look for the last token that is no padding, and come without a token for it.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = processor.pad_token_id


def check_texts(dataset: Dataset, split: str, column: str) -> None:
    feature = dataset.features[column]
    if not isinstance(feature, Value) or "string" not in feature.dtype:
        raise ValueError(
            f"Column {column!r} of the {split} data holds {feature}, not texts. Pass another --text_column_names."
        )
    empty = [row for row, text in enumerate(dataset[column][:]) if text is None or not text.strip()]
    if empty:
        raise ValueError(
            f"Column {column!r} of the {split} data has {len(empty)} empty texts (rows {shorten(empty)}, counted from "
            "0). Remove these rows: a model learns nothing from them but their labels."
        )


def main(argv: list[str] | None = None) -> dict[str, float]:
    return run(TextClassification(), __doc__, argv)


if __name__ == "__main__":
    main()
