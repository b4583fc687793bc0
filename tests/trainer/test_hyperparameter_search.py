"""`hyperparameter_search` over the `lpg_*` fields: every trial trains with its own settings and starts anew."""

import pytest
from datasets import Dataset
from tiny import NUM_LABELS, make_model

from lpg_hf import LPGConfig, LPGTrainer
from lpg_hf.trainer.managed_loss import ManagedLoss


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_trial_trains_with_its_own_settings(tmp_path, monkeypatch):
    labels = [0] * 20 + [1] * 8 + [2] * 4 + [3] * 2
    dataset = Dataset.from_dict({"input_ids": [[1, 2 + label] for label in labels], "label": labels})
    seen = []
    build = ManagedLoss.build

    def spy(self, num_labels):
        build(self, num_labels)
        seen.append(repr(self.loss.perturbations[0]))

    monkeypatch.setattr(ManagedLoss, "build", spy)
    trainer = LPGTrainer(
        model_init=lambda: make_model("bert"),
        args=LPGConfig(
            str(tmp_path),
            perturbations=["lpg"],
            max_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=2,
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "lpg_epsilon": trial.suggest_categorical("lpg_epsilon", [0.2, 0.4]),
            "lpg_strategy": trial.suggest_categorical("lpg_strategy", ["accuracy"]),
        },
        n_trials=3,
        backend="optuna",
    )
    trained = [text for text in seen if "accuracy" in text]
    assert len(trained) == 3
    assert set(trained) <= {f"lpg(strategy='accuracy', epsilon={epsilon})" for epsilon in (0.2, 0.4)}
    assert f"lpg(strategy='accuracy', epsilon={best.hyperparameters['lpg_epsilon']})" in trained
    assert trainer.lpg_loss.statistics.steps == 2
    assert trainer.lpg_loss.num_labels == NUM_LABELS
