"""Residual networks for images of 32 x 32 (He et al., 2016), with the stem that such images need."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


#: Widths of the stages, blocks per stage, and whether the shortcuts have no parameters (option A of the paper).
NETWORKS = {
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2), False),
    "resnet34": ((64, 128, 256, 512), (3, 4, 6, 3), False),
    "resnet32": ((16, 32, 64), (5, 5, 5), True),
    "small": ((16, 32, 64), (1, 1, 1), True),
}


def build_network(name: str, num_labels: int, seed: int) -> nn.Module:
    """
    A network with the fresh weights that belong to `seed`.

    Raises:
        ValueError: If the name is not among [`NETWORKS`].
    """
    if name not in NETWORKS:
        raise ValueError(f"Unknown network {name!r}. The known ones are {', '.join(NETWORKS)}.")
    widths, depths, has_free_shortcuts = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet(widths, depths, num_labels, has_free_shortcuts)
    return network.to(memory_format=torch.channels_last)


class ResNet(nn.Module):
    """A convolution of 3 x 3, stages of basic blocks that halve the image from the second on, mean, linear layer."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], num_labels: int, has_free_shortcuts: bool):
        super().__init__()
        layers: list[nn.Module] = [conv_and_norm(3, widths[0]), nn.ReLU()]
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(channels, width, stride, has_free_shortcuts))
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, has_free_shortcut: bool):
        super().__init__()
        self.first = conv_and_norm(in_channels, out_channels, stride)
        self.second = conv_and_norm(out_channels, out_channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif has_free_shortcut:
            self.shortcut = FreeShortcut(out_channels - in_channels, stride)
        else:
            self.shortcut = conv_and_norm(in_channels, out_channels, stride, size=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(inputs))) + self.shortcut(inputs))


class FreeShortcut(nn.Module):
    """Takes every `stride`-th pixel and adds channels of zeros, half of them before and half behind the others."""

    def __init__(self, num_new_channels: int, stride: int):
        super().__init__()
        before = num_new_channels // 2
        self.padding = (0, 0, 0, 0, before, num_new_channels - before)
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        return F.pad(inputs[:, :, :: self.stride, :: self.stride], self.padding)


def conv_and_norm(in_channels: int, out_channels: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
