"""
Writes a small audio data set that no one has to download: half a second of a tone, labeled with how it sounds.

    python examples/make_tones.py --output_dir tones

Eight classes, four wave forms that are steady or trembling, at random pitch and loudness in some noise; one folder per
class in `train` and in `test`, as `--train_dir` and `--validation_dir` of `audio_classification.py` take it.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from scipy import signal
from transformers import HfArgumentParser


RATE = 16_000
SECONDS = 0.5
WAVE_FORMS = {
    "sine": np.sin,
    "square": signal.square,
    "sawtooth": signal.sawtooth,
    "triangle": lambda phase: signal.sawtooth(phase, width=0.5),
}
TREMOLO_HZ = {"steady": 0.0, "trembling": 12.0}


@dataclass
class ToneArguments:
    output_dir: str = field(metadata={"help": "Where the folders go."})
    train_samples: int = field(default=1600, metadata={"help": "Recordings to train on, of all classes together."})
    test_samples: int = field(default=400, metadata={"help": "Recordings to test on, of all classes together."})
    seed: int = field(default=0, metadata={"help": "The same seed gives the same recordings."})


def tone(wave_form: str, tremolo_hz: float, rng: np.random.Generator) -> np.ndarray:
    """Samples in [-1, 1], shape `[T]`."""
    time = np.arange(int(RATE * SECONDS)) / RATE
    pitch, loudness, phase = 110 * 2 ** rng.uniform(0, 3), rng.uniform(0.2, 0.8), rng.uniform(0, 2 * np.pi)
    wave = WAVE_FORMS[wave_form](2 * np.pi * pitch * time + phase)
    envelope = 1 - 0.4 * (1 - np.cos(2 * np.pi * tremolo_hz * time))
    return np.clip(loudness * envelope * wave + rng.normal(0, 0.02, len(time)), -1, 1)


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(ToneArguments).parse_args_into_dataclasses(argv)
    rng = np.random.default_rng(arguments.seed)
    classes = [(wave_form, tremolo) for wave_form in WAVE_FORMS for tremolo in TREMOLO_HZ]
    for split, number in (("train", arguments.train_samples), ("test", arguments.test_samples)):
        for index in range(number):
            wave_form, tremolo = classes[index % len(classes)]
            path = Path(arguments.output_dir, split, f"{tremolo}_{wave_form}", f"{index:04}.wav")
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, tone(wave_form, TREMOLO_HZ[tremolo], rng), RATE)
    print(f"Recordings of {len(classes)} classes: {arguments.output_dir}")


if __name__ == "__main__":
    main()
