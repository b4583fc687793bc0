"""What works with Trainer works with LPGTrainer: odd data, odd outputs, subclasses, calls by hand."""

import gc
import importlib
import logging
import weakref

import pytest
import torch
from datasets import Dataset
from text_cases import ClassWeightedBert, bert, plain_args, text_batches, text_dataset
from tiny import NUM_LABELS, flat_parameters, make_batch, make_model, make_trainer, split
from torch import nn
from torch.nn import functional as F
from transformers import BertForTokenClassification, Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from lpg_hf import SAM, ClassWeighting, GradientClipping, LogitClipping, LPGConfig, LPGLoss, LPGTrainer
from lpg_hf.report import ReportCallback


COUNTS = [55, 25, 15, 5]
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def parameters_after(trainer_class, model, batches, path, args=SGD, **options):
    torch.manual_seed(0)
    trainer = make_trainer(trainer_class, model, batches, path, args=args, **options)
    trainer.train()
    return flat_parameters(trainer.model)


# Memory


@pytest.mark.parametrize("chain", [[], ["auto"], ["lpg", "sam"]])
def test_a_trainer_is_freed_when_nobody_has_it_any_more(chain, tmp_path):
    """At once, as Trainer is: Python's collector may come hours later, and until then a card holds two models."""
    # The first import of matplotlib leaves an exception that has the frames of whoever imports it, up to the trainer.
    importlib.import_module("matplotlib.pyplot")
    gc.disable()
    try:
        for options in ({}, {"resume_from_checkpoint": True}):
            args = {"max_steps": 2 + len(options), "save_strategy": "steps", "save_steps": 2}
            args |= {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
            batches = split(make_batch("bert", 24), [8, 8, 8])
            trainer = make_trainer(LPGTrainer, make_model("bert"), batches, tmp_path, args=args, perturbations=chain)
            trainer.add_callback(ReportCallback(trainer))
            trainer.train(**options)
            trainer.create_model_card()
            freed = [weakref.ref(trainer), weakref.ref(trainer.model), weakref.ref(trainer.optimizer)]
            del trainer
            assert [reference() for reference in freed] == [None] * 3
    finally:
        gc.enable()


# Data


@pytest.mark.parametrize("options", [{}, {"perturbations": []}], ids=["auto", "none"])
def test_multi_label_lists_in_a_data_set_train_as_with_trainer(options, tmp_path):
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [[1.0, 0.0, 0.0, 1.0]] * 8})
    plain, ours = bert(), bert()
    Trainer(model=plain, args=plain_args(tmp_path), train_dataset=dataset).train()
    LPGTrainer(model=ours, args=plain_args(tmp_path), train_dataset=dataset, **options).train()
    assert torch.equal(flat_parameters(plain), flat_parameters(ours))
    assert plain.config.problem_type == ours.config.problem_type == "multi_label_classification"


class ListLabels(nn.Module):
    """Like a detector: labels are a list with an entry of its own for each sample."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 1)

    def forward(self, values, labels=None):
        return {"loss": sum(self.head(values[i]).sum() * len(label["boxes"]) for i, label in enumerate(labels))}


@pytest.mark.parametrize("options", [{}, {"perturbations": []}], ids=["auto", "none"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_labels_that_are_no_tensor_train_as_with_trainer(options, accumulation, tmp_path):
    batches = [{"values": torch.randn(2, 2), "labels": [{"boxes": [1]}, {"boxes": [1, 2]}]} for _ in range(4)]
    torch.manual_seed(0)
    plain = ListLabels()
    ours = ListLabels()
    ours.load_state_dict(plain.state_dict())
    args = SGD | {"gradient_accumulation_steps": accumulation, "label_names": []}
    expected = parameters_after(Trainer, plain, batches, tmp_path, args)
    assert torch.equal(parameters_after(LPGTrainer, ours, batches, tmp_path, args, **options), expected)


def test_a_step_of_ignored_labels_moves_nothing_and_breaks_nothing(tmp_path):
    batches = split(make_batch("vit", 48), [16] * 3)
    batches[1]["labels"][:] = -100
    model = make_model("vit", exact=True)
    for batch in batches:
        batch["pixel_values"] = batch["pixel_values"].double()
    trainer = make_trainer(
        LPGTrainer, model, batches, tmp_path, args=SGD, perturbations=["logit_clipping"], class_counts=COUNTS
    )
    trainer.train()
    assert flat_parameters(model).isfinite().all()
    without = parameters_after(
        LPGTrainer,
        make_model("vit", exact=True),
        [batches[0], batches[2]],
        tmp_path,
        perturbations=["logit_clipping"],
        class_counts=COUNTS,
    )
    assert torch.equal(flat_parameters(model), without)


def test_ignored_labels_alone_give_a_loss_and_a_gradient_of_zero():
    logits = torch.randn(2, 3, requires_grad=True)
    for count in (None, torch.tensor(0)):
        loss = LPGLoss(3, "logit_clipping")(logits, torch.tensor([-100, -100]), count)
        loss.backward()
        assert loss == 0 and (logits.grad == 0).all()


def test_labels_changed_on_the_way_to_the_model(tmp_path, caplog):
    """The stored labels are 1..4, a transform makes them 0..3."""
    dataset = text_dataset([1, 2, 3, 4] * 2)
    dataset.set_transform(
        lambda rows: {"input_ids": rows["input_ids"], "labels": [label - 1 for label in rows["label"]]}
    )
    args = plain_args(tmp_path, remove_unused_columns=False)
    LPGTrainer(model=bert(), args=args, train_dataset=dataset, perturbations=[]).train()
    LPGTrainer(model=bert(), args=args, train_dataset=dataset, class_counts=[2] * 4).train()
    assert not caplog.records
    trainer = LPGTrainer(model=bert(), args=args, train_dataset=dataset)
    trainer.train()
    assert "pass `class_counts` to LPGTrainer" in caplog.text and caplog.text.count("are not known") == 1
    assert trainer.lpg_loss.statistics.class_counts.tolist() == [4, 4, 4, 4]  # of two epochs


def test_a_label_out_of_range_that_no_column_shows_is_explained(tmp_path):
    batches = split(make_batch("bert", 16), [16])
    batches[0]["labels"][3] = 7
    with pytest.raises(ValueError, match=r"Target 7 is out of bounds.*`num_labels` of the model"):
        make_trainer(LPGTrainer, make_model("bert"), batches, tmp_path).train()


# Outputs and losses


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_refused_model_that_ignores_the_count_keeps_trainers_scale(accumulation, tmp_path):
    class NoCount(BertForTokenClassification):
        accepts_loss_kwargs = False

    batches = text_batches(lambda batch: batch["input_ids"] % NUM_LABELS)
    args = SGD | {"gradient_accumulation_steps": accumulation, "label_smoothing_factor": 0.1}
    expected = parameters_after(Trainer, bert(NoCount), batches, tmp_path, args)
    assert torch.equal(parameters_after(LPGTrainer, bert(NoCount), batches, tmp_path, args), expected)


def test_class_weights_show_in_the_first_batch_that_has_two_classes(tmp_path, caplog):
    """A mean weighted by class is plain cross-entropy while a batch has one class."""
    batches = text_batches(lambda batch: batch["labels"])
    batches[0]["labels"][:] = 1
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        trainer = make_trainer(LPGTrainer, bert(ClassWeightedBert), batches, tmp_path)
        trainer.train()
    assert caplog.text.count("own loss") == 1
    explicit = make_trainer(LPGTrainer, bert(ClassWeightedBert), batches, tmp_path, perturbations=["lpg"])
    with pytest.raises(ValueError, match="own loss"):
        explicit.train()
    assert explicit.state.global_step == 1


def test_a_small_auxiliary_loss_is_seen(tmp_path, caplog):
    class SmallAuxiliary(type(bert())):
        def forward(self, input_ids, labels=None):
            output = super().forward(input_ids=input_ids, labels=labels)
            if labels is not None:
                output.loss = output.loss + 2.5e-4
            return output

    batches = text_batches(lambda batch: batch["labels"])
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        make_trainer(LPGTrainer, bert(SmallAuxiliary), batches, tmp_path).train()
    assert "own loss" in caplog.text


class OnlyLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Embedding(30, NUM_LABELS)

    def forward(self, input_ids, labels=None):
        return (F.cross_entropy(self.head(input_ids).mean(1), labels),)


class TupleLogits(OnlyLoss):
    def forward(self, input_ids, labels=None):
        logits = self.head(input_ids).mean(1)
        return {"loss": F.cross_entropy(logits, labels), "logits": (logits, logits)}


@pytest.mark.parametrize("model_class", [OnlyLoss, TupleLogits])
def test_outputs_without_logits_train_as_with_trainer(model_class, tmp_path, caplog):
    batches = split(make_batch("bert", 32), [8] * 4)
    plain, ours = model_class(), model_class()
    ours.load_state_dict(plain.state_dict())
    expected = parameters_after(Trainer, plain, batches, tmp_path)
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        assert torch.equal(parameters_after(LPGTrainer, ours, batches, tmp_path), expected)
    assert caplog.text.count("logits") >= 1


def test_a_model_without_config_resumes_exactly_while_classes_are_counted(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Embedding(30, NUM_LABELS)

        def forward(self, input_ids, labels=None):
            logits = self.head(input_ids).mean(1)
            return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)

    batches = split(make_batch("bert", 96), [8] * 12)
    args = SGD | {"save_strategy": "steps", "save_steps": 3}

    def train(resume=None):
        trainer = make_trainer(LPGTrainer, Plain(), batches, tmp_path, args=args, perturbations=["logit_adjustment"])
        trainer.train(resume_from_checkpoint=resume)
        return flat_parameters(trainer.model)

    whole = train()
    assert torch.equal(train(str(tmp_path / "checkpoint-3")), whole)


# Subclasses and calls by hand


def test_an_override_that_forgets_the_count_keeps_the_scale(tmp_path):
    class Logging(LPGTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            return (loss, outputs) if return_outputs else loss

    batch = make_batch("convnext", 32, dtype=torch.float64)
    expected, split_up = (
        parameters_after(
            trainer_class,
            make_model("convnext", exact=True),
            split(batch, sizes),
            tmp_path,
            SGD | {"gradient_accumulation_steps": len(sizes) // 2},
            perturbations=["logit_clipping"],
        )
        for trainer_class, sizes in ((LPGTrainer, [16, 16]), (Logging, [5, 5, 6] * 2))
    )
    torch.testing.assert_close(split_up, expected, rtol=0, atol=1e-9)


def test_an_override_with_a_loss_of_its_own_is_not_silently_unperturbed(tmp_path, caplog):
    class Own(LPGTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return model(**inputs).loss

    batches = split(make_batch("bert", 32), [8] * 4)
    with pytest.raises(ValueError, match="`compute_loss` or `training_step` that does not call"):
        make_trainer(Own, make_model("bert"), batches, tmp_path, perturbations=["lpg"]).train()
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        make_trainer(Own, make_model("bert"), batches, tmp_path).train()
    assert caplog.text.count("`compute_loss` or `training_step` that does not call") == 1


def test_a_loss_computed_by_hand_in_eval_mode_is_plain(tmp_path):
    batches = split(make_batch("bert", 32), [16] * 2)
    trainer = make_trainer(LPGTrainer, make_model("bert"), batches, tmp_path, perturbations=["logit_clipping"])
    trainer.train()
    model = trainer.model.eval()
    model.zero_grad()
    trainer.compute_loss(model, dict(batches[0])).backward()
    ours = model.classifier.weight.grad.clone()
    model.zero_grad()
    model(**batches[0]).loss.backward()
    assert torch.equal(ours, model.classifier.weight.grad)
    assert trainer.lpg_loss.telemetry() == {}


def test_the_users_own_scale_flag_survives(tmp_path):
    trainer = make_trainer(LPGTrainer, make_model("bert"), split(make_batch("bert", 16), [16]), tmp_path)
    trainer.loss_is_scaled_for_ga = False
    trainer.train()
    assert trainer.loss_is_scaled_for_ga is False


def test_a_log_by_one_process_alone_makes_no_collective(tmp_path):
    batches = split(make_batch("bert", 16), [16])
    trainer = make_trainer(
        LPGTrainer, make_model("bert"), batches, tmp_path, perturbations=["logit_clipping", GradientClipping(0.1)]
    )
    trainer.log({"loss": 1.0})
    trainer.train()
    trainer.accelerator.gather = None
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["loss"] == 1.0


def test_a_second_training_starts_anew(tmp_path):
    batches = split(make_batch("bert", 64), [16] * 4)
    trainer = make_trainer(
        LPGTrainer, make_model("bert"), batches, tmp_path, perturbations=[LogitClipping(quantile=0.5), SAM(0.1)]
    )
    trainer.train()
    trainer.evaluate(batches[:1])
    trainer.train()
    assert trainer.lpg_loss.statistics.steps == 4


def test_sam_lets_a_schedule_free_optimizer_swap_weights_first(tmp_path):
    class Swapping(torch.optim.SGD):
        """Has other weights in training than in evaluation, as schedule-free optimizers do."""

        is_training = True

        def train(self):
            if not self.is_training:
                self._shift(1.0)
            self.is_training = True

        def eval(self):
            if self.is_training:
                self._shift(-1.0)
            self.is_training = False

        @torch.no_grad()
        def _shift(self, by):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += by

    model = make_model("bert", exact=True)
    optimizer = Swapping(model.parameters(), lr=0.0)
    before = flat_parameters(model)
    trainer = make_trainer(
        LPGTrainer,
        model,
        split(make_batch("bert", 32), [8] * 4),
        tmp_path,
        perturbations=[SAM(0.05)],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    optimizer.eval()
    trainer.train()
    torch.testing.assert_close(flat_parameters(model), before, rtol=0, atol=1e-12)


def test_sam_shifts_and_trains_the_adapters_alone(tmp_path):
    """With LoRA the ascent is that of the adapters: a hand-written step over them gives the same weights."""
    peft = pytest.importorskip("peft")

    def lora():
        model = make_model("bert", exact=True)
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2, init_lora_weights=False)
        return peft.get_peft_model(model, config).double()

    batches = split(make_batch("bert", 64), [16] * 4)
    model = lora()
    make_trainer(LPGTrainer, model, batches, tmp_path, args=SGD, perturbations=[SAM(0.5)]).train()

    by_hand = lora().train()
    trained = [parameter for parameter in by_hand.parameters() if parameter.requires_grad]
    for batch in batches:
        gradients = torch.autograd.grad(by_hand(**batch).loss, trained)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        weights = [parameter.detach().clone() for parameter in trained]
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter += 0.5 * gradient / norm
        gradients = torch.autograd.grad(by_hand(**batch).loss, trained)
        with torch.no_grad():
            for parameter, weight, gradient in zip(trained, weights, gradients, strict=True):
                parameter.copy_(weight - SGD["learning_rate"] * gradient)
    torch.testing.assert_close(flat_parameters(model), flat_parameters(by_hand), rtol=0, atol=1e-9)
    assert (flat_parameters(model) - flat_parameters(lora())).abs().max() > 1e-3


# Trainer's own options


@pytest.mark.parametrize(
    "options",
    [
        {"dataloader_drop_last": True},
        {"dataloader_num_workers": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"include_num_input_tokens_seen": "all"},
        {"eval_on_start": True, "eval_strategy": "epoch"},
        {"eval_strategy": "epoch", "include_for_metrics": ["inputs", "loss"]},
        {"logging_first_step": True, "logging_steps": 3},
        {"torch_empty_cache_steps": 1},
        {"max_steps": 3, "warmup_steps": 2},
        {"full_determinism": True},
        {"optim": "sgd", "learning_rate": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_chain_that_does_nothing_trains_and_logs_as_trainer(options, tmp_path):
    """Random order, an unused column, padding by the default collator; the bound of the clipping is never reached."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(NUM_LABELS, (50,), generator=generator).tolist()
    rows = {"input_ids": [[1, 2 + label, 3] for label in labels], "label": labels, "text": ["unused"] * 50}
    dataset = Dataset.from_dict(rows)
    seen = []

    def metrics(prediction):
        seen.append(sorted(vars(prediction)) if options.get("include_for_metrics") else None)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    def run(trainer_class, **kwargs):
        args = plain_args(tmp_path, **({"max_steps": -1, "num_train_epochs": 2, "logging_steps": 2} | options))
        trainer = trainer_class(
            model=make_model("bert"),
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset.select(range(10)),
            compute_metrics=metrics,
            **kwargs,
        )
        trainer.train()
        timeless = [
            {key: value for key, value in log.items() if "runtime" not in key and "per_second" not in key}
            for log in trainer.state.log_history
        ]
        ours = [{key: value for key, value in log.items() if not key.startswith("lpg/")} for log in timeless]
        return flat_parameters(trainer.model), ours

    try:
        expected, expected_logs = run(Trainer)
        parameters, logs = run(LPGTrainer, perturbations=["logit_clipping(max_norm=100.0)"])
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(parameters, expected, rtol=0, atol=2e-5)
    assert [list(log) for log in logs] == [list(log) for log in expected_logs]
    for log, expected_log in zip(logs, expected_logs, strict=True):
        assert log == pytest.approx(expected_log, rel=1e-3, abs=1e-4)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]


# Settings


def test_config_fields_reach_a_bare_lpg_in_the_argument(tmp_path):
    config = LPGConfig(str(tmp_path), perturbations=["lpg"], lpg_epsilon=0.7, report_to=[])
    trainer = LPGTrainer(model=bert(), args=config, perturbations=["lpg", LogitClipping(0.4)])
    assert list(map(repr, trainer.lpg_loss.perturbations)) == ["lpg(epsilon=0.7)", "logit_clipping(max_norm=0.4)"]


def test_a_string_is_a_chain_of_one_also_letter_by_letter(tmp_path):
    assert LPGConfig(str(tmp_path), perturbations="lpg(epsilon=0.3)").chain() == ["lpg(epsilon=0.3)"]
    config = LPGConfig(str(tmp_path))
    config.perturbations = list("logit_clipping")  # what `hyperparameter_search` does to a string
    assert config.chain() == ["logit_clipping"]


def test_a_config_takes_no_objects(tmp_path):
    with pytest.raises(ValueError, match=r"`perturbations` of a config must be strings.*logit_clipping"):
        LPGConfig(str(tmp_path), perturbations=[LogitClipping()])


@pytest.mark.parametrize("perturbations", [("auto",), ["auto", SAM(0.05)], "auto"])
def test_auto_beside_parameter_methods_is_still_the_default(perturbations, tmp_path, caplog):
    batches = text_batches(lambda batch: batch["labels"].float())
    with caplog.at_level(logging.WARNING, logger="lpg_hf"):
        make_trainer(LPGTrainer, bert(num_labels=1), batches, tmp_path, perturbations=perturbations).train()
    assert caplog.text.count("regression") == 1


def test_resuming_with_fewer_methods_is_refused(tmp_path):
    batches = split(make_batch("bert", 32), [8] * 4)
    args = SGD | {"save_strategy": "steps", "save_steps": 2}
    make_trainer(
        LPGTrainer, make_model("bert"), batches, tmp_path, args=args, perturbations=["logit_clipping", "sam"]
    ).train()
    for fewer in (["logit_clipping"], ["sam"], []):
        trainer = make_trainer(LPGTrainer, make_model("bert"), batches, tmp_path, args=args, perturbations=fewer)
        with pytest.raises(ValueError, match="The checkpoint was written with perturbations"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_loss_has_its_own_copies_of_the_methods():
    method = LogitClipping(quantile=0.9)
    first, second = LPGLoss(3, method), LPGLoss(5, method)
    assert len(first.perturbations[0].bounds) == 3 and len(second.perturbations[0].bounds) == 5


def test_effective_weights_wait_for_the_prior():
    loss = LPGLoss(3, ClassWeighting("effective"), managed=True)
    loss(torch.randn(8, 3, requires_grad=True), torch.tensor([0] * 6 + [1] * 2))
    weights = loss.perturbations[0].class_weights(loss.statistics)
    torch.testing.assert_close(weights, torch.ones(3))


def test_a_users_base_loss_keeps_its_dtype():
    head = nn.Linear(3, 3)

    def forward(logits, labels):
        return F.cross_entropy(head(logits.float()), labels, reduction="none")

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, logits, labels):
            return forward(logits, labels)

    loss = LPGLoss(3, "logit_clipping", base_loss=Base())
    loss(torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1]))
    assert head.weight.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"perturbations": []}], ids=["auto", "none"])
def test_batches_that_are_tuples_train_as_with_trainer(options, tmp_path):
    """With a data set of tuples, the default of PyTorch, and a `compute_loss` that knows them."""

    def hand_written(trainer_class):
        class HandWritten(trainer_class):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return F.cross_entropy(model(inputs[0]), inputs[1])

        return HandWritten

    batch = make_batch("vit", 24, dtype=torch.float32)
    batches = [tuple(piece.values()) for piece in split(batch, [6] * 4)]
    results = []
    for trainer_class, extra in ((Trainer, {}), (LPGTrainer, options)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, NUM_LABELS))
        results.append(parameters_after(hand_written(trainer_class), model, batches, tmp_path, **extra))
    assert torch.equal(*results)


@pytest.mark.parametrize("perturbations", [[], [LogitClipping(100.0)]], ids=["none", "idle"])
def test_without_a_count_the_scale_is_trainers(perturbations, tmp_path):
    """A subclass that counts nothing: each micro-batch is a mean, and the step is the mean of these."""

    def without_count(trainer_class):
        class WithoutCount(trainer_class):
            def get_batch_samples(self, *args, **kwargs):
                return super().get_batch_samples(*args, **kwargs)[0], None

            def _count_labelled(self, *args):
                return None

        return WithoutCount

    batches = split(make_batch("vit", 32, dtype=torch.float64), [8] * 4)
    args = SGD | {"gradient_accumulation_steps": 4}
    runs = [
        make_trainer(
            without_count(trainer_class), make_model("vit", exact=True), batches, tmp_path, args=args, **extra
        )
        for trainer_class, extra in ((Trainer, {}), (LPGTrainer, {"perturbations": perturbations}))
    ]
    for run in runs:
        run.train()
    torch.testing.assert_close(*[flat_parameters(run.model) for run in runs], rtol=0, atol=1e-10)
    plain, ours = (run.state.log_history[0] for run in runs)
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_the_gradient_that_a_users_loss_has_at_unlabelled_samples_stays(tmp_path):
    """Cross-entropy where there are labels, entropy everywhere; a method that has nothing to do."""

    def semi_supervised(outputs, labels, num_items_in_batch):
        log_p = outputs.logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum()
        return (F.cross_entropy(outputs.logits, labels, reduction="sum") + entropy) / num_items_in_batch

    batch = make_batch("vit", 32, dtype=torch.float64)
    batch["labels"][::3] = -100
    batches = split(batch, [8] * 4)
    results = [
        parameters_after(
            LPGTrainer,
            make_model("vit", exact=True),
            batches,
            tmp_path,
            perturbations=perturbations,
            compute_loss_func=semi_supervised,
            class_counts=COUNTS,
        )
        for perturbations in ([], [LogitClipping(100.0)])
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
