"""
Makes the file that cifar_gpu.py reads, from CIFAR-10 and CIFAR-10N as they are published.

    python examples/benchmarks/cifar_pack.py cifar-10-batches-py CIFAR-10_human.pt cifar.npz

`cifar-10-batches-py` is the folder in the Python version of CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html),
`CIFAR-10_human.pt` the labels of CIFAR-10N (https://github.com/UCSC-REAL/cifar-10-100n). Both are pickles, which can
run code when they are read: take them from there alone.
"""

import pickle
import sys
from pathlib import Path

import numpy as np
import torch


TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
#: Arrays of the file, and what CIFAR-10N calls them.
HUMAN_LABELS = {"worse": "worse_label", "aggre": "aggre_label", "rand1": "random_label1"}


def read_batches(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Images `[n, 32, 32, 3]` and labels `[n]` of some files of CIFAR-10, one after the other."""
    batches = [pickle.loads(path.read_bytes(), encoding="bytes") for path in paths]
    pixels = np.concatenate([batch[b"data"] for batch in batches])
    labels = np.concatenate([batch[b"labels"] for batch in batches])
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def pack(batches: Path, human: Path, out: Path) -> None:
    """
    Args:
        batches (`Path`): The folder of CIFAR-10.
        human (`Path`): The labels of CIFAR-10N.
        out (`Path`): The npz file.

    Raises:
        ValueError: If the two do not belong to each other.
    """
    images, labels = read_batches([batches / name for name in TRAIN_BATCHES])
    test_images, test_labels = read_batches([batches / "test_batch"])
    noisy = torch.load(human, weights_only=False)
    if not np.array_equal(noisy["clean_label"], labels):
        raise ValueError(
            f"The clean labels in {human} are not those in {batches}. The order must be that of the Python version "
            "of CIFAR-10; the files with 'ordered' in their name have another one."
        )
    arrays = {name: np.asarray(noisy[key]) for name, key in HUMAN_LABELS.items()}
    np.savez(out, x=np.concatenate([images, test_images]), y=labels, yt=test_labels, **arrays)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: cifar_pack.py FOLDER_OF_CIFAR10 CIFAR-10_human.pt OUT.npz")
    pack(*map(Path, sys.argv[1:]))
