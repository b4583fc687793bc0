r"""
Fine-tunes a text classifier on labels that are noisy, imbalanced, or both. Copy this file and change what you like.

    python examples/text_classification.py                    # nothing is downloaded: small sentences, a small BERT
    python examples/text_classification.py --model_name_or_path distilbert/distilbert-base-uncased \
        --train_file train.csv --test_file test.csv --label_noise 0 --learning_rate 2e-5 --num_train_epochs 3

The CSV files need the columns `text` and `label`. All arguments of `LPGConfig` and `TrainingArguments` work.
"""

import csv
import random
from dataclasses import dataclass, field
from pathlib import Path

from datasets import ClassLabel, Value, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    set_seed,
)

from lpg_hf import LPGConfig, LPGTrainer
from lpg_hf.data import add_label_noise, class_counts, make_long_tailed
from lpg_hf.metrics import make_compute_metrics


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Model; without one, a small BERT."})
    train_file: str | None = field(default=None, metadata={"help": "CSV to train on; without one, small sentences."})
    test_file: str | None = field(default=None, metadata={"help": "CSV to evaluate on."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})
    label_noise: float = field(default=0.3, metadata={"help": "Share of labels to make wrong, to try it out."})
    imbalance_ratio: float = field(default=1.0, metadata={"help": "Cut the training rows to a long tail, likewise."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser([ScriptArguments, LPGConfig])
    # What fits the small model. For a pretrained one pass --learning_rate 2e-5.
    parser.set_defaults(
        output_dir="text-output", learning_rate=2e-3, num_train_epochs=8, per_device_train_batch_size=16
    )
    parser.set_defaults(save_strategy="no", eval_strategy="epoch", logging_strategy="epoch", report_to=["none"])
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    # 1. Data: a label column of the type ClassLabel, with the same names in both splits.
    files = {"train": script.train_file, "test": script.test_file}
    if script.train_file is None:
        files = write_sentences(Path(args.output_dir))
    dataset = load_dataset("csv", data_files={split: file for split, file in files.items() if file is not None})
    if "test" not in dataset:
        dataset = dataset["train"].train_test_split(0.2, seed=args.seed)
    # One list of names for both splits. A class that only the test split has is an error.
    dataset = dataset.cast_column("label", Value("string"))
    names = sorted(set(dataset["train"]["label"]))
    dataset = dataset.cast_column("label", ClassLabel(names=names))
    train = dataset["train"]
    if script.imbalance_ratio > 1:
        train = make_long_tailed(train, script.imbalance_ratio, seed=args.seed)
    if script.label_noise > 0:
        train = add_label_noise(train, script.label_noise, seed=args.seed)

    # 2. Model.
    if script.model_name_or_path is None:
        tokenizer, model = small_bert(dataset["train"]["text"], names)
    else:
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        model = AutoModelForSequenceClassification.from_pretrained(
            script.model_name_or_path,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(batch["text"], truncation=True, max_length=script.max_length)

    # 3. Training. `--perturbations none` is the plain Trainer.
    trainer = LPGTrainer(
        model=model,
        args=args,
        train_dataset=train.map(tokenize, batched=True),
        eval_dataset=dataset["test"].map(tokenize, batched=True),
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(class_counts(train)),
    )
    trainer.train()
    trainer.save_model()

    # 4. Results: metrics, and the rows whose labels are most likely wrong.
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    for issue in trainer.label_issues().select(range(5)):
        row, suggested = train[issue["row"]], names[issue["suggested_label"]]
        print(f"row {issue['row']}: {row['text']!r} is labeled {names[row['label']]!r}; rather {suggested!r}?")
    return metrics


def write_sentences(folder: Path) -> dict[str, str]:
    """Requests to a shop as CSV files; one word of each tells what it is about."""
    topics = {
        "account": ["password", "login", "profile", "email"],
        "delivery": ["parcel", "courier", "tracking", "address"],
        "payment": ["invoice", "refund", "card", "receipt"],
        "product": ["battery", "screen", "manual", "charger"],
    }
    patterns = ["where is my {}", "the {} does not work", "please check the {} again", "i have a question on the {}"]
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, number in (("train", 800), ("test", 200)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(number):
                topic = rng.choice(list(topics))
                text = rng.choice(patterns).format(rng.choice(topics[topic]))
                writer.writerow([f"{text} {rng.choice(['today', 'now', 'thanks', 'again', ''])}".strip(), topic])
    return {split: str(folder / f"{split}.csv") for split in ("train", "test")}


def small_bert(texts: list[str], names: list[str]) -> tuple[PreTrainedTokenizerFast, BertForSequenceClassification]:
    """A tokenizer with the words of the texts, and a BERT of two layers with fresh weights."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(vocab_size=len(tokenizer), id2label=dict(enumerate(names)), **sizes)
    return tokenizer, BertForSequenceClassification(config)


if __name__ == "__main__":
    main()
