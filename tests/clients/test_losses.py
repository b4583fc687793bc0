"""Scripts with a loss of their own: class weights, focal loss, EWC, R-Drop, two tasks, a cross-encoder's mixin."""

import copy

import pytest
import torch
from clients import (
    OPEN_GATES,
    assert_dampened,
    confident_bert,
    distance,
    exact_bert,
    few_rows,
    losses_of,
    run,
    token_rows,
    warnings_of,
    weights_of,
)
from text_cases import bert
from tiny import class_means
from torch import nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from lpg_hf import LPGLoss, LPGTrainer


CLASS_WEIGHTS = torch.tensor([0.5, 1.1, 1.8, 2.7], dtype=torch.float64)


# A subclass that weights the classes, as most answers on forums have it


def class_weighted(base):
    class WeightedTrainer(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)(outputs.logits.view(-1, 4), labels.view(-1))
            return (loss, outputs) if return_outputs else loss

    return WeightedTrainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_class_weighted_subclass_trains_as_with_trainer_and_is_told_once(accumulation, tmp_path, caplog):
    args = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2, "max_steps": -1}
    plain, ours = (run(class_weighted(base), exact_bert(), tmp_path, args=args) for base in (Trainer, LPGTrainer))
    assert torch.equal(weights_of(ours), weights_of(plain)) and losses_of(ours) == losses_of(plain)
    (message,) = warnings_of(caplog)
    assert "`compute_loss`" in message
    assert distance(plain, run(Trainer, exact_bert(), tmp_path, args=args)) > 1e-3


def test_methods_asked_for_under_a_class_weighted_subclass_raise(tmp_path):
    with pytest.raises(ValueError, match="`compute_loss`"):
        run(class_weighted(LPGTrainer), exact_bert(), tmp_path, perturbations=["logit_adjustment"])


def test_the_method_for_class_weights_trains_what_the_subclass_trains(tmp_path):
    """On batches whose weights have the mean 1: the subclass divides by their sum, the method by their number."""
    rows = token_rows((8, 8, 8, 8))
    by_hand = run(class_weighted(Trainer), exact_bert(), tmp_path, rows, args={"per_device_train_batch_size": 32})
    mean = CLASS_WEIGHTS.mean().item()
    method = f"class_weighting(weights={[w / mean for w in CLASS_WEIGHTS.tolist()]})"
    args = {"per_device_train_batch_size": 32}
    ours = run(LPGTrainer, exact_bert(), tmp_path, rows, args=args, perturbations=[method])
    assert distance(ours, by_hand) < 1e-7
    assert distance(ours, run(Trainer, exact_bert(), tmp_path, rows, args=args)) > 1e-3


# `compute_loss_func`


def focal_loss(outputs, labels, num_items_in_batch=None, gamma=2.0):
    log_probs = F.log_softmax(outputs.logits, dim=-1).gather(-1, labels[:, None]).squeeze(-1)
    values = -((1 - log_probs.exp()) ** gamma) * log_probs
    return values.sum() / num_items_in_batch if num_items_in_batch is not None else values.mean()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_focal_loss_func_is_the_base_of_the_perturbations(accumulation, tmp_path):
    def train(base, **kwargs):
        args = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
        return run(base, exact_bert(), tmp_path, args=args, compute_loss_func=focal_loss, **kwargs)

    plain = train(Trainer)
    assert torch.equal(weights_of(train(LPGTrainer, perturbations=[])), weights_of(plain))
    idle = train(LPGTrainer, perturbations=["logit_clipping(max_norm=100.0)"])
    assert distance(idle, plain) < 1e-9
    assert losses_of(idle) == pytest.approx(losses_of(plain), abs=1e-6)
    adjusted = train(LPGTrainer, perturbations=["logit_adjustment"])
    assert distance(adjusted, plain) > 1e-3
    # What is logged is the focal loss, whatever its gradient.
    assert losses_of(adjusted)[0] == pytest.approx(losses_of(plain)[0], abs=1e-6)


def test_a_focal_loss_func_under_accumulation_is_that_of_the_whole_batch(tmp_path):
    def train(size, accumulation):
        args = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": size}
        chain = ["logit_adjustment", "logit_clipping(max_norm=0.3)"]
        return run(LPGTrainer, exact_bert(), tmp_path, args=args, compute_loss_func=focal_loss, perturbations=chain)

    assert distance(train(2, 4), train(8, 1)) < 1e-9


# EWC: a penalty on top of the loss of the base class


def with_ewc(base, strength=3.0):
    class EWCTrainer(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.anchor = {n: p.detach().clone() + 0.1 for n, p in self.model.named_parameters()}
            self.fisher = {n: 1.0 + p.detach().abs() for n, p in self.model.named_parameters()}
            self.penalties = []

        def penalty(self, model):
            named = model.named_parameters()
            return strength / 2 * sum((self.fisher[n] * (p - self.anchor[n]) ** 2).sum() for n, p in named)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            penalty = self.penalty(model)
            self.penalties.append(penalty.item())
            loss = loss + penalty
            return (loss, outputs) if return_outputs else loss

    return EWCTrainer


@pytest.mark.parametrize("perturbations", [[], ["logit_adjustment"]])
def test_an_ewc_penalty_under_accumulation_counts_as_often_as_with_trainer(perturbations, tmp_path):
    def step(base, **kwargs):
        model = exact_bert()
        before = weights_of_model(model)
        args = ONE_STEP | {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
        return (before - weights_of(run(base, model, tmp_path, args=args, **kwargs))) / ONE_STEP["learning_rate"]

    penalty = step(with_ewc(Trainer)) - step(Trainer)
    ours = step(with_ewc(LPGTrainer), perturbations=perturbations) - step(LPGTrainer, perturbations=perturbations)
    torch.testing.assert_close(ours, penalty, rtol=0, atol=1e-9)


ONE_STEP = {"max_steps": 1, "learning_rate": 1e-3}


@pytest.mark.parametrize("perturbations", [[], ["auto"], ["logit_adjustment", "logit_clipping(max_norm=0.3)"]])
def test_an_ewc_penalty_keeps_its_gradient(perturbations, tmp_path):
    def step(base, **kwargs):
        model = exact_bert()
        before = weights_of_model(model)
        trainer = run(base, model, tmp_path, args=ONE_STEP, **kwargs)
        return trainer, (before - weights_of(trainer)) / ONE_STEP["learning_rate"]

    plain, gradient = step(Trainer)
    plain_ewc, gradient_ewc = step(with_ewc(Trainer))
    ours, our_gradient = step(LPGTrainer, perturbations=perturbations)
    ours_ewc, our_gradient_ewc = step(with_ewc(LPGTrainer), perturbations=perturbations)
    penalty = gradient_ewc - gradient
    assert penalty.norm() > 1
    torch.testing.assert_close(our_gradient_ewc - our_gradient, penalty, rtol=0, atol=1e-9)
    assert ((our_gradient - gradient).norm() > 1e-2) == (perturbations != [])
    added = losses_of(plain_ewc)[0] - losses_of(plain)[0]
    assert losses_of(ours_ewc)[0] - losses_of(ours)[0] == pytest.approx(added, abs=1e-5)


def weights_of_model(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# R-Drop


def with_r_drop(base):
    class RDropTrainer(base):
        """Two passes through the loss of the base class, and the divergence of their predictions."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            first, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
            second, others = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
            p, q = outputs.logits.log_softmax(-1), others.logits.log_softmax(-1)
            divergence = (p.exp() * (p - q)).sum(-1).mean() + (q.exp() * (q - p)).sum(-1).mean()
            loss = (first + second) / 2 + divergence
            return (loss, outputs) if return_outputs else loss

    return RDropTrainer


def test_r_drop_without_perturbations_is_that_of_trainer(tmp_path):
    """Bit for bit, with dropout."""
    plain, ours = (
        run(with_r_drop(base), bert(), tmp_path, **kwargs)
        for base, kwargs in ((Trainer, {}), (LPGTrainer, {"perturbations": []}))
    )
    assert torch.equal(weights_of(ours), weights_of(plain))


CHAIN = ["logit_adjustment", "logit_clipping(max_norm=0.3)"]


def test_r_drop_without_dropout_is_training_without_it(tmp_path):
    """Both passes are the same then, so a perturbation that acts in one of them alone would show."""
    single = run(LPGTrainer, exact_bert(), tmp_path, perturbations=CHAIN)
    double = run(with_r_drop(LPGTrainer), exact_bert(), tmp_path, perturbations=CHAIN)
    assert distance(double, single) < 1e-9
    assert distance(single, run(Trainer, exact_bert(), tmp_path)) > 1e-3


def test_statistics_see_each_sample_of_r_drop_once(tmp_path):
    """They decide what the dampening does, and they count the labels that training meets."""
    rows = list(few_rows())
    single, double = (
        run(trainer_class, confident_bert(), tmp_path, rows, perturbations=OPEN_GATES)
        for trainer_class in (LPGTrainer, with_r_drop(LPGTrainer))
    )
    assert double.lpg_loss.statistics.seen_counts.sum() == 24
    assert torch.equal(double.lpg_loss.statistics.seen_counts, single.lpg_loss.statistics.seen_counts)
    means = [class_means(trainer.lpg_loss) for trainer in (double, single)]
    torch.testing.assert_close(*means, rtol=0, atol=1e-9)
    assert_dampened(single)
    assert sum(double.label_issues()["visits"]) == 24


# Co-teaching and the like: some samples of a micro-batch are left out, or get a label


def masked(inputs):
    return inputs | {"labels": inputs["labels"].where(torch.arange(4) != 1, -100)}


def masked_in_place(inputs):
    inputs["labels"][1] = -100
    return inputs


def left_out(inputs):
    return {name: values[[0, 2, 3]] for name, values in inputs.items()}


def pseudo_labeled(inputs):
    return inputs | {"labels": inputs["labels"].where(inputs["labels"] != -100, 1)}


def with_selection(base, select, loss_of=None):
    class SelectsTrainer(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = select(dict(inputs))
            if loss_of is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            # Trainer would add up the means of the micro-batches.
            return loss_of(model(**inputs), inputs["labels"]) / self.args.gradient_accumulation_steps

    return SelectsTrainer


@pytest.mark.parametrize("select", [masked, masked_in_place, left_out, pseudo_labeled])
@pytest.mark.parametrize("chain", [["logit_clipping(max_norm=0.3)"], []], ids=["clipping", "none"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_selected_samples_have_the_scale_that_they_have_with_trainer(select, chain, accumulation, tmp_path):
    """Base and delta alike: the mean over the selected samples of each micro-batch, and over the micro-batches."""
    data = token_rows((16, 8, 5, 3))
    if select is pseudo_labeled:  # two of the four samples of each micro-batch
        labels = [-100 if row % 2 else label for row, label in enumerate(data["label"])]
        data = data.remove_columns("label").add_column("label", labels)
    rows = list(data.with_format("torch"))
    args = {"gradient_accumulation_steps": accumulation, "max_steps": 4}
    args |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
    reference = with_selection(Trainer, select, loss_of=LPGLoss(4, chain))
    expected = run(reference, confident_bert(), tmp_path, copy.deepcopy(rows), args=args)
    ours = run(
        with_selection(LPGTrainer, select),
        confident_bert(),
        tmp_path,
        copy.deepcopy(rows),
        args=args,
        perturbations=chain,
    )
    assert distance(ours, expected) < 1e-7
    plain = run(with_selection(Trainer, select), confident_bert(), tmp_path, copy.deepcopy(rows), args=args)
    assert (distance(ours, plain) > 1e-3) == (chain != [] or accumulation > 1)


# A loss of one's own from the outputs of the base class


def with_sample_weights(base):
    class SampleWeightsTrainer(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            losses = F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
            loss = (losses * torch.arange(1, len(losses) + 1)).mean()
            return (loss, outputs) if return_outputs else loss

    return SampleWeightsTrainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_whoever_takes_the_outputs_alone_is_told_once(accumulation, tmp_path, caplog):
    args = {"gradient_accumulation_steps": accumulation}
    plain = run(with_sample_weights(Trainer), exact_bert(), tmp_path, args=args)
    ours = run(with_sample_weights(LPGTrainer), exact_bert(), tmp_path, args=args)
    assert torch.equal(weights_of(ours), weights_of(plain))
    (message,) = warnings_of(caplog)
    assert "takes another loss" in message and "`compute_loss_func`" in message


def test_an_override_that_takes_the_loss_after_a_warm_up_is_perturbed_from_then_on(tmp_path, caplog):
    class WarmsUp(LPGTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if self.state.global_step < 2:
                loss = F.cross_entropy(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    ours, expected = (run(WarmsUp, exact_bert(), tmp_path, perturbations=chain) for chain in (CHAIN, []))
    assert distance(ours, expected) > 1e-3
    (message,) = warnings_of(caplog)
    assert "As long as it does, nothing is perturbed" in message


# Two tasks


class TwoTaskBert(BertForSequenceClassification):
    """A second head, whose loss the model adds."""

    def __init__(self, config):
        super().__init__(config)
        self.topic = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, topics=None):
        pooled = self.bert(input_ids, attention_mask=attention_mask).pooler_output
        logits, topic_logits = self.classifier(pooled), self.topic(pooled)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels)
            if topics is not None:
                loss = loss + 0.5 * F.cross_entropy(topic_logits, topics)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=(topic_logits,))


def rows_with_topics():
    rows = token_rows()
    return rows.add_column("topics", [ids[0] % 3 for ids in rows["input_ids"]])


def test_a_second_loss_inside_the_model_is_kept_and_told_once(tmp_path, caplog):
    plain, ours = (run(base, exact_bert(TwoTaskBert), tmp_path, rows_with_topics()) for base in (Trainer, LPGTrainer))
    assert torch.equal(weights_of(ours), weights_of(plain))
    (message,) = warnings_of(caplog)
    assert "own loss" in message


def with_second_task(base):
    class TwoTaskTrainer(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            topics = inputs.pop("topics")
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss + 0.5 * F.cross_entropy(outputs.hidden_states[0], topics)
            return (loss, outputs) if return_outputs else loss

    return TwoTaskTrainer


def test_a_second_loss_outside_of_the_model_leaves_the_first_one_perturbed(tmp_path, caplog):
    def step(base, **kwargs):
        model = exact_bert(TwoTaskBert)
        heads = [head.weight.detach().clone() for head in (model.classifier, model.topic)]
        trainer = run(base, model, tmp_path, rows_with_topics(), args=ONE_STEP, **kwargs)
        moved = [h - head.weight.detach() for h, head in zip(heads, (model.classifier, model.topic), strict=True)]
        return trainer, [way / ONE_STEP["learning_rate"] for way in moved]

    _, (label, topic) = step(with_second_task(Trainer))
    # A correction toward all classes alike is large enough to be seen.
    _, (our_label, our_topic) = step(with_second_task(LPGTrainer), eval_shares="uniform")
    torch.testing.assert_close(our_topic, topic, rtol=0, atol=1e-9)
    assert topic.norm() > 0.05 and (our_label - label).norm() > 0.05
    # The first head learns what it learns without the second task.
    before = exact_bert(TwoTaskBert).classifier.weight.detach().clone()
    model = exact_bert(TwoTaskBert)
    alone = run(LPGTrainer, model, tmp_path, token_rows(), args=ONE_STEP, eval_shares="uniform")
    way = (before - alone.model.classifier.weight.detach()) / ONE_STEP["learning_rate"]
    torch.testing.assert_close(our_label, way, rtol=0, atol=1e-9)
    assert not warnings_of(caplog)


# A mixin as sentence-transformers' trainers are built


class PairScores(nn.Module):
    """A loss object that holds the model, as those of sentence-transformers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.cross_entropy = nn.CrossEntropyLoss()

    def forward(self, features, labels):
        logits = self.model(**features).logits
        return self.cross_entropy(logits, labels), logits


class CrossEncoderMixin:
    """Calls its own loss object; the base class only sees features and labels."""

    def __init__(self, model=None, args=None, loss=None, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self.loss = PairScores(model) if loss is None else loss

    def collect_features(self, inputs):
        return {name: value for name, value in inputs.items() if name != "labels"}, inputs.get("labels")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        features, labels = self.collect_features(inputs)
        loss, logits = self.loss(features, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


class PlainCrossEncoderTrainer(CrossEncoderMixin, Trainer):
    pass


class CrossEncoderTrainer(CrossEncoderMixin, LPGTrainer):
    pass


def test_a_cross_encoder_mixin_trains_and_evaluates_as_with_trainer(tmp_path, caplog):
    rows = token_rows()
    plain, ours = (
        run(trainer_class, exact_bert(), tmp_path, rows, eval_dataset=rows)
        for trainer_class in (PlainCrossEncoderTrainer, CrossEncoderTrainer)
    )
    assert torch.equal(weights_of(ours), weights_of(plain)) and losses_of(ours) == losses_of(plain)
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    (message,) = warnings_of(caplog)
    assert "`compute_loss`" in message


class CollectingMixin:
    """One that only prepares the batch, and leaves the loss to the base class."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_features = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.num_features += len(inputs["labels"])
        return super().compute_loss(model, {**inputs}, return_outputs, num_items_in_batch)


class CollectingTrainer(CollectingMixin, LPGTrainer):
    pass


def test_a_mixin_that_calls_the_base_class_is_perturbed(tmp_path, caplog):
    ours, direct = (run(trainer_class, exact_bert(), tmp_path) for trainer_class in (CollectingTrainer, LPGTrainer))
    assert torch.equal(weights_of(ours), weights_of(direct)) and ours.num_features == 24
    assert distance(ours, run(Trainer, exact_bert(), tmp_path)) > 1e-3
    assert ours.lpg_loss.statistics.steps == 6 and not warnings_of(caplog)
    assert sum(ours.label_issues()["visits"]) == 24
