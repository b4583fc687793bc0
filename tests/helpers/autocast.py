"""Which families are tested under autocast, and how their gradients are seen, on the CPU and on a GPU."""

import torch
from families import make_family
from torch import nn
from transformers import TrainerCallback


SIMULATED = ["bert", "distilbert", "roberta", "deberta-v2", "modernbert", "gpt2", "resnet", "convnext"]


# The distance of a single gradient from the exact one is chance: that of LPGTrainer was 0.6 to 2.3 times the Trainer's
# in 128 simulated steps, and 0.8 to 1.1 times in the mean over eight of them.
SEEDS = range(4)


class RecordGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        rows = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        self.gradient = torch.cat([row.double().flatten() for row in rows])


def gradient_at_the_logits(model, run):
    """What reaches the half-precision logits, the output of the head."""
    seen = {}

    def keep(module, args, output):
        seen["logits"] = output
        output.register_hook(lambda gradient: seen.update(gradient=gradient))

    handle = head_of(model).register_forward_hook(keep)
    run()
    handle.remove()
    return seen["logits"].detach(), seen["gradient"]


def unsure(name, seed=0):
    """As a model is before its training: the logits hardly differ."""
    model = make_family(name, exact=True, seed=seed)
    with torch.no_grad():
        head_of(model).weight.mul_(0.1)
    return model


def head_of(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
