"""Small classifiers whose noise takes every way to the logits: in front of, inside, behind, and past a backbone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import PreTrainedConfig, PreTrainedModel


SIZE, NUM_LABELS = 4, 3


class Config(PreTrainedConfig):
    model_type = "noisy_models"


class Encoder(nn.Module):
    """Two tokens attend to each other and to a prompt, if there is one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.prompt: Tensor | None = None

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        for extra in (prompt, self.prompt):
            if extra is not None:
                x = torch.cat([extra.expand(len(x), -1, -1), x], dim=1)
        hidden = self.first(x)
        hidden = (hidden @ hidden.transpose(1, 2)).softmax(-1) @ hidden
        return self.second(torch.tanh(hidden)).mean(1)


class Classifier(PreTrainedModel):
    """A backbone and a head. Its parameters are set by a fixed seed."""

    config_class = Config
    base_model_prefix = "encoder"
    trained: tuple[str, ...] = ("classifier",)

    def __init__(self):
        super().__init__(Config(num_labels=NUM_LABELS))
        self.encoder = Encoder()
        self.classifier = nn.Linear(SIZE, NUM_LABELS)
        self.build()
        self.post_init()
        self.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                # With large biases all rows would be of one class.
                scale = 0.1 if name.endswith("bias") else 1.0
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
                parameter.requires_grad_(any(part in name for part in self.trained))
        self.load_state_dict(self.state_dict())

    def build(self) -> None:
        pass

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.classifier(torch.tanh(self.encode(x)))}

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)


# Noise in front of a frozen backbone


class Prompt(Classifier):
    trained = ("prompt",)

    def build(self):
        self.prompt = nn.Parameter(torch.empty(1, 2, SIZE))

    def encode(self, x):
        return self.encoder(torch.cat([self.prompt.expand(len(x), -1, -1), x], dim=1))


class PromptAsKeyword(Prompt):
    def encode(self, x):
        return self.encoder(x, prompt=self.prompt)


class PromptOfNetwork(Classifier):
    """P-tuning: a network makes the prompt."""

    trained = ("network",)

    def build(self):
        self.network = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))

    def encode(self, x):
        return self.encoder(x, prompt=self.network(torch.eye(2, SIZE, dtype=x.dtype))[None])


@dataclass
class Holder:
    prompt: Tensor | None


class PromptInObject(Prompt):
    """As keys and values of a cache arrive: in an object that is the same in every pass."""

    def build(self):
        super().build()
        self.encoder = EncoderOfHolder()
        self.holder = Holder(torch.zeros(1, 2, SIZE))

    def encode(self, x):
        self.holder.prompt = self.prompt
        return self.encoder(x, self.holder)


class EncoderOfHolder(Encoder):
    def forward(self, x, holder):
        return super().forward(x, holder.prompt)


class Embedding(Classifier):
    trained = ("embedding",)

    def build(self):
        self.embedding = nn.Linear(SIZE, SIZE)

    def encode(self, x):
        return self.encoder(self.embedding(x))


class Gate(Classifier):
    """Only few draws change the inputs of the backbone."""

    trained = ("gate",)

    def build(self):
        self.gate = nn.Parameter(torch.empty(1))

    def encode(self, x):
        return self.encoder(torch.where(self.gate > 2.5, -x, x))


class EncoderOfSwitches(Encoder):
    def forward(self, x, switches):
        return super().forward(-x if switches[0] else x)


class GateInList(Gate):
    """The list is the same in every pass."""

    def build(self):
        super().build()
        self.encoder = EncoderOfSwitches()
        self.switches = [False]

    def encode(self, x):
        self.switches[0] = bool(self.gate > 2.5)
        return self.encoder(x, self.switches)


class TwoRuns(Classifier):
    """The backbone runs twice, once on what has noise and once on what has none."""

    trained = ("embedding",)

    def build(self):
        self.embedding = nn.Linear(SIZE, SIZE)

    def encode(self, x):
        return self.encoder(x) - self.encoder(self.embedding(x))


# Noise past the inputs of a backbone that has none of the noisy parameters


class PromptAsAttribute(Prompt):
    def encode(self, x):
        self.encoder.prompt = 1.0 * self.prompt
        return self.encoder(x)


class PromptInHook(Prompt):
    def build(self):
        super().build()
        self.encoder.second.register_forward_pre_hook(lambda _, inputs: (inputs[0] + self.prompt[:, 0],))

    def encode(self, x):
        return self.encoder(x)


class SharedMemory(Classifier):
    """Two parameters with one memory: the head's bias shifts the backbone, too."""

    trained = ("classifier.bias",)

    def build(self):
        self.encoder.second.bias = nn.Parameter(torch.empty(SIZE, dtype=torch.float64))
        self.classifier.bias = nn.Parameter(self.encoder.second.bias.data[:NUM_LABELS])

    def double(self):
        return self.to(torch.float64)


# Noise inside a backbone


class Adapter(Classifier):
    trained = ("adapter",)

    def build(self):
        self.encoder.first = nn.Sequential(self.encoder.first)
        self.encoder.first.add_module("adapter", nn.Linear(SIZE, SIZE))


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 1):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


class LoRA(Classifier):
    trained = ("lora_",)

    def build(self):
        self.encoder.first = LowRank(self.encoder.first)


class Full(Classifier):
    trained = ("",)


class TiedWeight(Classifier):
    trained = ("second.weight",)

    def build(self):
        self.classifier = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, NUM_LABELS))
        self.classifier[0].weight = self.encoder.second.weight


# Modules that compute something from their weights


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * torch.tanh(weight)


class Parametrized(Classifier):
    trained = ("second",)

    def build(self):
        parametrize.register_parametrization(self.encoder.second, "weight", Doubled())


class WeightNorm(Classifier):
    trained = ("second",)

    def build(self):
        parametrizations.weight_norm(self.encoder.second)


class OldWeightNorm(Classifier):
    trained = ("second",)

    def build(self):
        torch.nn.utils.weight_norm(self.encoder.second)


class Recurrent(Classifier):
    trained = ("lstm",)

    def build(self):
        self.lstm = nn.LSTM(SIZE, SIZE, batch_first=True)

    def encode(self, x):
        return self.encoder(self.lstm(x)[0])


class KeptUntilTraining(nn.Linear):
    """As the attention biases of LeViT."""

    def __init__(self):
        super().__init__(SIZE, SIZE)
        self.kept = {}

    def train(self, mode=True):
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return nn.functional.linear(x, torch.tanh(self.weight), self.bias)
        if "weight" not in self.kept:
            self.kept["weight"] = torch.tanh(self.weight)
        return nn.functional.linear(x, self.kept["weight"], self.bias)


class BufferForEvaluation(nn.Linear):
    def __init__(self):
        super().__init__(SIZE, SIZE)
        self.register_buffer("kept", torch.zeros(SIZE, SIZE), persistent=False)

    def train(self, mode=True):
        if not mode:
            self.kept = torch.tanh(self.weight.detach())
        return super().train(mode)

    def forward(self, x):
        return nn.functional.linear(x, torch.tanh(self.weight) if self.training else self.kept, self.bias)


class BufferOfCheckpoint(BufferForEvaluation):
    """What it keeps is computed when weights are loaded."""

    def train(self, mode=True):
        return nn.Linear.train(self, mode)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.kept = torch.tanh(self.weight.detach())


class Merged(nn.Module):
    """An adapter that is added to the frozen weight for evaluation, and subtracted for training."""

    def __init__(self):
        super().__init__()
        self.base, self.trained_adapter = nn.Linear(SIZE, SIZE), nn.Parameter(torch.empty(SIZE, SIZE))

    def train(self, mode=True):
        if mode != self.training:
            self.base.weight.data += -self.trained_adapter.data if mode else self.trained_adapter.data
        return super().train(mode)

    def forward(self, x):
        weight = self.base.weight + self.trained_adapter if self.training else self.base.weight
        return nn.functional.linear(x, weight, self.base.bias)


class Aliased(nn.Linear):
    """It reads its parameters from a list of its own."""

    def __init__(self):
        super().__init__(SIZE, SIZE)
        self.own = [self.weight, self.bias]

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.own = [self.weight, self.bias]
        return self

    def forward(self, x):
        return nn.functional.linear(x, *self.own)


class NeverDropped(KeptUntilTraining):
    def train(self, mode=True):
        return nn.Linear.train(self, mode)


class BufferNeverDropped(NeverDropped):
    def __init__(self):
        super().__init__()
        self.register_buffer("buffer", None)

    def forward(self, x):
        if self.training:
            return nn.functional.linear(x, torch.tanh(self.weight), self.bias)
        if self.buffer is None:
            self.buffer = torch.tanh(self.weight.detach())
        return nn.functional.linear(x, self.buffer, self.bias)


class KeptByParent(nn.Module):
    """The parent keeps what it computed from a child."""

    def __init__(self):
        super().__init__()
        self.child, self.kept = nn.Linear(SIZE, SIZE), None

    def forward(self, x):
        if self.training:
            return self.child(x).sin()
        if self.kept is None:
            self.kept = self.child.weight.detach().clone()
        return nn.functional.linear(x, self.kept, self.child.bias).sin()


class KeptInObject(NeverDropped):
    def __init__(self):
        super().__init__()
        self.holder = Holder(None)

    def keep(self) -> Tensor:
        if self.holder.prompt is None:
            self.holder.prompt = torch.tanh(self.weight.detach())
        return self.holder.prompt

    def forward(self, x):
        weight = torch.tanh(self.weight) if self.training else self.keep()
        return nn.functional.linear(x, weight, self.bias)


class KeptByFunction(KeptInObject):
    """The function is one that `copy.deepcopy` shares, as it shares all functions."""

    def __init__(self):
        super().__init__()
        kept = {}
        self.remember = lambda weight: kept.setdefault("weight", torch.tanh(weight.detach()))

    def keep(self):
        return self.remember(self.weight)


class SpectrumNeverDropped(nn.Linear):
    """What it keeps are complex numbers."""

    def __init__(self):
        super().__init__(SIZE, SIZE)
        self.kept = None

    def forward(self, x):
        spectrum = torch.fft.rfft(self.weight)
        if not self.training:
            self.kept = spectrum.detach() if self.kept is None else self.kept
            spectrum = self.kept
        return nn.functional.linear(x, torch.fft.irfft(spectrum, n=SIZE), self.bias)


class RunningMean(nn.Linear):
    """Statistics of its own, in a buffer and in an attribute, that a pass in training mode moves."""

    def __init__(self):
        super().__init__(SIZE, SIZE)
        self.register_buffer("mean", torch.zeros(SIZE))
        self.size = torch.ones(SIZE, dtype=torch.float64)

    def forward(self, x):
        x = super().forward(x)
        if self.training:
            self.mean.mul_(0.5).add_(x.detach().mean((0, 1)))
            self.size = 0.5 * self.size + x.detach().abs().mean((0, 1))
        return (x - self.mean) / self.size


class OldSpectralNorm(Classifier):
    """The vectors of its power iteration are buffers, which training moves."""

    trained = ("second",)

    def build(self):
        self.encoder.second = nn.utils.spectral_norm(nn.Linear(SIZE, SIZE))


def with_layer(layer: type[nn.Module]) -> type[Classifier]:
    """A classifier whose frozen backbone has one trained layer of this type."""

    class WithLayer(Classifier):
        trained = ("second.weight", "second.trained", "second.child")

        def build(self):
            self.encoder.second = layer()

    return WithLayer


RIGHT: dict[str, Callable[[], Classifier]] = {
    cls.__name__: cls
    for cls in (
        *(Classifier, Prompt, PromptAsKeyword, PromptOfNetwork, PromptInObject, Embedding, Gate, GateInList),
        TwoRuns,
        *(PromptAsAttribute, PromptInHook, SharedMemory, Adapter, LoRA, Full, TiedWeight),
        *(Parametrized, WeightNorm, OldWeightNorm, Recurrent),
    )
} | {
    cls.__name__: with_layer(cls)
    for cls in (KeptUntilTraining, BufferForEvaluation, BufferOfCheckpoint, Merged, Aliased)
}
REFUSED = {
    cls.__name__: with_layer(cls)
    for cls in (
        *(NeverDropped, BufferNeverDropped, KeptByParent, KeptInObject, KeptByFunction),
        SpectrumNeverDropped,
    )
}
MOVED = {"RunningMean": with_layer(RunningMean), "OldSpectralNorm": OldSpectralNorm}
