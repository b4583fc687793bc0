"""
A certificate for a pretrained model fine-tuned on noisy labels: LoRA adapters, or the classification head alone.

    python examples/certificate_text.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --train_file train.parquet --test_file test.parquet

It needs `pip install peft`. The files have the columns `text` and `label` (CSV, JSON or Parquet). A share of the
training labels is made wrong; the prior is trained on half of the rows, the posterior goes on with LPGTrainer on all
of them, and the other half certifies it. The weights of the pretrained model stay as they are, so only what was
trained is paid for. What takes time are the draws: one evaluation on the certificate rows for each, of the head alone
with `--scope head`.
"""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from lpg_hf import LPGTrainer
from lpg_hf.data import add_label_noise
from lpg_hf.pac_bayes import PathLength, certify, gibbs_error, split_for_certificate


@dataclass
class TextCertificateArguments:
    model_name_or_path: str = field(metadata={"help": "Pretrained encoder, from the hub or a folder."})
    train_file: str = field(metadata={"help": "Training rows with the columns `text` and `label`."})
    test_file: str = field(metadata={"help": "Test rows with correct labels."})
    scope: str = field(default="lora", metadata={"help": "What is trained and certified: `lora` or `head`."})
    label_noise: float = field(default=0.2, metadata={"help": "Share of training labels that are made wrong."})
    fraction: float = field(default=0.5, metadata={"help": "Share of the training rows that the prior gets."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the adapters."})
    prior_epochs: float = field(default=10, metadata={"help": "Epochs of the prior."})
    posterior_epochs: float = field(default=1, metadata={"help": "Epochs of the posterior."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of the prior; a twentieth of it for the posterior."})
    num_draws: int = field(default=100, metadata={"help": "Draws of the weights that certify."})
    num_selection_draws: int = field(default=2, metadata={"help": "Draws to choose the scale by, for each scale."})
    sigma_grid: list[float] = field(
        default_factory=lambda: [0.1, 0.05, 0.025, 0.0125, 0.00625], metadata={"help": "Scales to choose from."}
    )
    max_length: int = field(default=48, metadata={"help": "Tokens of a text."})
    seed: int = field(default=0, metadata={"help": "Of noise, split, weights and draws."})
    output_dir: str = field(default="certificate-text-output", metadata={"help": "Where the certificate goes."})


def load(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    kind = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}[Path(path).suffix]
    rows = load_dataset(kind, data_files=path, split="train")
    if not isinstance(rows.features["label"], ClassLabel):
        rows = rows.class_encode_column("label")
    return rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length), batched=True)


def main() -> None:
    (arguments,) = HfArgumentParser(TextCertificateArguments).parse_args_into_dataclasses()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    train = load(arguments.train_file, tokenizer, arguments.max_length)
    test = load(arguments.test_file, tokenizer, arguments.max_length)
    if arguments.label_noise > 0:
        train = add_label_noise(train, arguments.label_noise, seed=arguments.seed)
    # Texts that differ in case alone are one input to an uncased model.
    parts = split_for_certificate(train, arguments.fraction, arguments.seed, columns=["input_ids"])

    set_seed(arguments.seed)
    names = train.features["label"].names
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model_name_or_path, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    if arguments.scope == "lora":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=arguments.lora_rank, lora_dropout=0.0))
    else:
        model.base_model.requires_grad_(False)
    collator = DataCollatorWithPadding(tokenizer)

    def fit(start, rows: Dataset, epochs: float, learning_rate: float) -> LPGTrainer:
        args = TrainingArguments(
            arguments.output_dir,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=32,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
        )
        trainer = LPGTrainer(
            model=start, args=args, train_dataset=rows, data_collator=collator, callbacks=[PathLength(interval=20)]
        )
        trainer.train()
        return trainer

    start = time.monotonic()
    prior = fit(model, parts["prior"], arguments.prior_epochs, arguments.learning_rate).model
    trainer = fit(copy.deepcopy(prior), train, arguments.posterior_epochs, arguments.learning_rate / 20)
    posterior = trainer.model
    trained = time.monotonic()
    certificate = certify(
        posterior,
        parts["certificate"],
        prior=prior,
        prior_dataset=parts["prior"],
        scope=arguments.scope,
        sigma_grid=arguments.sigma_grid,
        num_draws=arguments.num_draws,
        num_selection_draws=arguments.num_selection_draws,
        label_noise=arguments.label_noise or None,
        data_collator=collator,
        batch_size=256,
        seed=arguments.seed,
    )
    certified = time.monotonic()
    certificate.save(Path(arguments.output_dir) / "certificate.json")
    print(f"\n{certificate}\n")

    settings = {"scope": arguments.scope, "data_collator": collator, "batch_size": 256, "disable_tqdm": True}
    randomized = gibbs_error(posterior, test, sigma=certificate.sigma, num_draws=10, **settings)
    plain = gibbs_error(posterior, test, sigma=0.0, num_draws=1, **settings)
    for name, value in (
        ("certified error under the true labels", (certificate.clean or certificate.overall).bound),
        ("test error: randomized, as certified", randomized.overall),
        ("test error: without noise on the weights", plain.overall),
    ):
        print(f"{name:42} {value:.4f}")
    print(f"training {trained - start:.0f} s, certificate {certified - trained:.0f} s")


if __name__ == "__main__":
    main()
