"""
The one word: `Trainer` becomes `LPGTrainer`. Handwritten digits, 40 % of the training labels wrong, no download.

    python examples/swap.py
"""

from datasets import ClassLabel, Dataset
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from lpg_hf import LPGTrainer
from lpg_hf.data import add_label_noise
from lpg_hf.metrics import make_compute_metrics


digits = load_digits()
images = digits.images[:, None].repeat(4, axis=2).repeat(4, axis=3) / 8 - 1
dataset = Dataset.from_dict({"pixel_values": images.astype("float32"), "label": digits.target})
dataset = dataset.cast_column("label", ClassLabel(10)).train_test_split(0.2, seed=0, stratify_by_column="label")
train, test = add_label_noise(dataset["train"], 0.4, seed=0), dataset["test"]

sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
config = ResNetConfig(num_channels=1, num_labels=10, **sizes)
quiet = {"output_dir": "swap-output", "save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False}
for trainer_class in (Trainer, LPGTrainer):
    set_seed(0)
    trainer = trainer_class(
        model=ResNetForImageClassification(config),
        args=TrainingArguments(per_device_train_batch_size=32, learning_rate=2e-3, num_train_epochs=20, **quiet),
        train_dataset=train.with_format("torch"),
        eval_dataset=test.with_format("torch"),
        compute_metrics=make_compute_metrics(),
    )
    trainer.train()
    print(f"{trainer_class.__name__}: {trainer.evaluate()['eval_accuracy']:.1%} of the test digits are right")
