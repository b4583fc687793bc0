"""Scripts that write the way of the batches anew: loaders with an `__iter__`, and `get_batch_samples`."""

import pytest
import torch
from clients import distance, exact_bert, run, token_rows, warnings_of, weights_of
from torch.utils.data import DataLoader
from transformers import Trainer

from lpg_hf import LPGTrainer


CHAIN = ["logit_adjustment", "logit_clipping(max_norm=0.3)"]
# 24 rows, so that all micro-batches have the same size.
COUNTS = (12, 6, 4, 2)


class Unpacking(DataLoader):
    """Knows which entries a batch has."""

    def __iter__(self):
        for batch in super().__iter__():
            labels, input_ids = batch.values()
            yield {"input_ids": input_ids, "labels": labels}


class Halving(DataLoader):
    """Sends all but the labels in half precision."""

    def __iter__(self):
        for batch in super().__iter__():
            halves = {name: values if name == "labels" else values.half() for name, values in batch.items()}
            yield halves | {"input_ids": halves["input_ids"].long()}


def with_loader(base, loader_class):
    class OwnLoader(base):
        def get_train_dataloader(self):
            generator = torch.Generator().manual_seed(0)
            return loader_class(
                self.train_dataset, batch_size=4, shuffle=True, generator=generator, collate_fn=self.data_collator
            )

    return OwnLoader


@pytest.mark.parametrize("loader_class", [Unpacking, Halving])
def test_a_loader_with_an_iteration_of_its_own_sees_the_batches_of_trainer(loader_class, tmp_path, caplog):
    rows, args = token_rows(COUNTS), {"max_steps": 12}
    plain = run(with_loader(Trainer, loader_class), exact_bert(), tmp_path, rows, args=args)
    none = run(with_loader(LPGTrainer, loader_class), exact_bert(), tmp_path, rows, args=args, perturbations=[])
    assert torch.equal(weights_of(none), weights_of(plain))
    ours = run(with_loader(LPGTrainer, loader_class), exact_bert(), tmp_path, rows, args=args, perturbations=CHAIN)
    expected = run(with_loader(LPGTrainer, DataLoader), exact_bert(), tmp_path, rows, args=args, perturbations=CHAIN)
    assert torch.equal(weights_of(ours), weights_of(expected)) and distance(ours, plain) > 1e-3
    assert not warnings_of(caplog)
    assert len(expected.label_issues()) == 24
    with pytest.raises(ValueError, match="`__iter__` of its own"):
        ours.label_issues()


def with_batch_samples(base):
    class OwnBatchSamples(base):
        """As scripts have it that worked around the loss of earlier versions under accumulation."""

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches = []
            for _ in range(num_batches):
                try:
                    batches.append(next(epoch_iterator))
                except StopIteration:
                    break
            return batches, None

    return OwnBatchSamples


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_taken_in_an_own_way_train_as_with_trainer(accumulation, tmp_path, caplog):
    rows, args = token_rows(COUNTS), {"max_steps": 7, "gradient_accumulation_steps": accumulation}
    plain = run(with_batch_samples(Trainer), exact_bert(), tmp_path, rows, args=args)
    none = run(with_batch_samples(LPGTrainer), exact_bert(), tmp_path, rows, args=args, perturbations=[])
    assert torch.equal(weights_of(none), weights_of(plain))
    ours = run(with_batch_samples(LPGTrainer), exact_bert(), tmp_path, rows, args=args, perturbations=CHAIN)
    expected = run(LPGTrainer, exact_bert(), tmp_path, rows, args=args, perturbations=CHAIN)
    assert distance(ours, expected) < 1e-9 and distance(ours, plain) > 1e-3
    assert not warnings_of(caplog)
    statistics, others = ours.lpg_loss.statistics, expected.lpg_loss.statistics
    assert statistics.epochs == others.epochs == (1 if accumulation == 1 else 2)
    assert torch.equal(statistics.seen_counts, others.seen_counts)
    assert ours.label_issues()["visits"] == expected.label_issues()["visits"]
