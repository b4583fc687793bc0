"""What the command line can be told, as dataclasses; the names are those of the examples of transformers."""

import math
from dataclasses import dataclass, field

from ..config import LPGConfig
from ..report import check_installed


OUR_HEADING = "noisy and imbalanced labels (lpg_hf)"
TRAINING_HEADING = "training (transformers.TrainingArguments)"


@dataclass
class ModelArguments:
    """Which model, and whether all of it is trained."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained model: a folder, or its name on the hub. Without it and without --config_name it is "
            "google/vit-base-patch16-224-in21k for images and facebook/wav2vec2-base for recordings."
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Config, where it is not the model's. Without --model_name_or_path a model with fresh weights is "
            "made from it."
        },
    )
    processor_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer, image processor or feature extractor, where it is not the model's.",
            "aliases": ["--tokenizer_name", "--image_processor_name", "--feature_extractor_name"],
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(default=None, metadata={"help": "Token for private models and data on the hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with the model may run on this machine."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Whether a head that was trained for other classes is replaced by a fresh one."},
    )
    use_lora: bool = field(
        default=False, metadata={"help": "Whether to train LoRA adapters and the head alone (needs `peft`)."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, divided by their rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers that get adapters; `all-linear` for every linear layer but the head."},
    )

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"`--lora_r` is {self.lora_r}, but must be at least 1. Common ranks are 8 to 64.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`--lora_dropout` is {self.lora_dropout}, but must be in [0, 1): a share of the inputs.")


@dataclass
class DataArguments:
    """Where rows come from, and how many are used. Give a data set of the hub, or local files."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set: its name on the hub, or a folder that `load_dataset` understands."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_split_name: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split_name: str = field(
        default="validation", metadata={"help": "Its split to evaluate on.", "aliases": ["--eval_split_name"]}
    )
    test_split_name: str = field(default="test", metadata={"help": "Its split for --do_predict."})
    remove_splits: str | None = field(
        default=None, metadata={"help": "Its splits that are not used, separated by commas."}
    )
    remove_columns: str | None = field(
        default=None, metadata={"help": "Columns that are not used, separated by commas."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "CSV, JSON lines or Parquet to train on; may be a pattern in quotes."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same to evaluate on.", "aliases": ["--eval_file"]}
    )
    test_file: str | None = field(default=None, metadata={"help": "The same for --do_predict; labels not needed."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels: names or integers."})
    eval_label_column_name: str | None = field(
        default=None,
        metadata={"help": "Label column for evaluation, where it is another one, such as labels that were checked."},
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training rows to evaluate on where there are no others."}
    )
    shuffle_train_dataset: bool = field(
        default=False,
        metadata={"help": "Whether to shuffle the training rows before some are chosen; each epoch shuffles anyway."},
    )
    shuffle_seed: int = field(default=42, metadata={"help": "Seed of that."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many rows, drawn at random with --seed."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict so many rows."})
    metric_name: str | None = field(
        default=None,
        metadata={
            "help": "One more metric: f1, precision, recall, matthews_correlation, or any of `evaluate`. Accuracy, "
            "balanced accuracy, macro-F1 and calibration error are always computed."
        },
    )

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` is {value}, but must be at least 1. Leave it out for all rows.")


@dataclass
class FolderArguments(DataArguments):
    """As well as files, folders with one folder per class, or with a `metadata.csv`."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder to train on: one folder per class, or a metadata.csv with file_name."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same to evaluate on."})
    test_dir: str | None = field(default=None, metadata={"help": "The same for --do_predict."})


@dataclass
class FixesArguments:
    """Corrects training labels that a person has looked at."""

    _argument_group_name = OUR_HEADING

    fixes: str | None = field(
        default=None,
        metadata={
            "help": "CSV file of `lpg-hf issues OUT --export`, or of a report, with labels in its column fix. "
            "Train with the arguments of OUT and another --output_dir."
        },
    )


@dataclass
class StressArguments:
    """Makes clean training data noisy and imbalanced, to see what that costs. Evaluation data stays as it is."""

    _argument_group_name = OUR_HEADING

    label_noise: float = field(
        default=0.0, metadata={"help": "Share of training labels to replace by another class at random, in [0, 1)."}
    )
    imbalance_ratio: float = field(
        default=1.0,
        metadata={"help": "Cut the training data to a long tail: size of the largest class over the smallest."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise < 1:
            raise ValueError(
                f"`--label_noise` is {self.label_noise}, but must be in [0, 1): 0.4 gives 40 % of the rows "
                "a wrong label."
            )
        if not 1 <= self.imbalance_ratio < math.inf:
            raise ValueError(
                f"`--imbalance_ratio` is {self.imbalance_ratio}, but must be a finite number of at least 1: with 20 "
                "the largest class has 20 times the rows of the smallest."
            )


@dataclass
class ReportArguments:
    """What is written about the training."""

    _argument_group_name = OUR_HEADING

    report: bool = field(
        default=False,
        metadata={"help": "Write a report of the training, with the rows most likely labeled wrong, to output_dir."},
    )

    def __post_init__(self) -> None:
        if self.report:
            check_installed()


@dataclass
class FolderUseArguments:
    """What becomes of an output folder that was used before."""

    _argument_group_name = TRAINING_HEADING

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Whether to train anew although --output_dir has a checkpoint to resume from."},
    )


@dataclass
class Arguments:
    """All that was asked for. `data` also holds what only one kind of data has."""

    model: ModelArguments
    data: DataArguments
    fixes: FixesArguments
    stress: StressArguments
    report: ReportArguments
    folder_use: FolderUseArguments
    training: LPGConfig

    @property
    def output_dir(self) -> str:
        return str(self.training.output_dir)
