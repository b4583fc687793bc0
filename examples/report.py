"""
Trains on noisy, long-tailed digits and writes a report: which labels are wrong, and how well each class is learned.

    python examples/report.py --output_dir report-output

The picture in docs/benchmarks.md shows this page in a headless browser:

    chromium --headless --no-sandbox --hide-scrollbars --window-size=1280,1602 \
        --screenshot=report.png report-output/report/report.html
"""

from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from digits import load_digits, small_resnet, to_pixels, training_arguments
from sklearn.metrics import average_precision_score
from transformers import HfArgumentParser, PrinterCallback

from lpg_hf import LPGTrainer
from lpg_hf.data import add_label_noise, make_long_tailed


@dataclass
class ReportArguments:
    output_dir: str = field(
        default="report-output", metadata={"help": "The report goes to the folder `report` in it."}
    )
    epochs: int = field(default=40, metadata={"help": "Epochs of the training."})
    imbalance_ratio: float = field(default=20, metadata={"help": "Size of the largest class over the smallest."})
    label_noise: float = field(default=0.2, metadata={"help": "Share of wrong labels."})
    seed: int = field(default=0, metadata={"help": "Seed of split, noise and weights."})


def main() -> None:
    (arguments,) = HfArgumentParser(ReportArguments).parse_args_into_dataclasses()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    digits = load_digits(arguments.seed)
    train = make_long_tailed(digits["train"], arguments.imbalance_ratio, seed=arguments.seed)
    train = add_label_noise(train, arguments.label_noise, seed=arguments.seed)
    trainer = LPGTrainer(
        model=small_resnet(arguments.seed),
        args=training_arguments(
            arguments.output_dir, seed=arguments.seed, num_train_epochs=arguments.epochs, logging_strategy="epoch"
        ),
        train_dataset=train.with_transform(to_pixels),
        eval_dataset=digits["test"].with_transform(to_pixels),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    rows = trainer.label_issues()["row"][:]
    is_wrong = np.array(train["label"]) != np.array(train["clean_label"])
    precision = average_precision_score(is_wrong[rows], -np.arange(len(rows)))
    print(f"{is_wrong.sum()} of {len(train)} labels are wrong; average precision of their ranking: {precision:.3f}")
    print(f"Among the first {is_wrong.sum()} of the ranking, {is_wrong[rows][: is_wrong.sum()].sum()} are wrong.")
    print(f"Report: {trainer.report()}")


if __name__ == "__main__":
    main()
