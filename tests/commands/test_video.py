"""`lpg-hf train video`: which frames are read, by Pillow and by PyAV, and a run against the same by hand."""

import numpy as np
import pytest
import torch
from command_data import EVAL_ROWS, QUIET, TRAIN_ROWS, video_model, words, write_csv, write_videos
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor

from lpg_hf.commands import video
from lpg_hf.commands.train import train


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")


def gray_frames(number, size=16):
    """The brightness of a frame is twelve times its number."""
    return [np.full((size, size, 3), 12 * frame, dtype=np.uint8) for frame in range(number)]


def write_animation(path, frames):
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40)
    return {"path": str(path), "bytes": None}


def write_mp4(path, frames):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return {"path": str(path), "bytes": None}


@given(total=st.integers(1, 500), number=st.integers(1, 64))
def test_positions_are_spread_over_the_video(total, number):
    found = video.positions(total, number)
    assert len(found) == number and found == sorted(found) and found[0] == 0
    assert number == 1 or found[-1] == total - 1
    assert all(0 <= position < total for position in found)
    gaps = np.diff(found)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animations_are_read_at_equal_distances(suffix, tmp_path):
    file = write_animation(tmp_path / f"a{suffix}", gray_frames(10))
    for source in (file, {"path": None, "bytes": (tmp_path / f"a{suffix}").read_bytes()}):
        frames = video.decode(source, 4)
        assert frames.shape == (4, 16, 16, 3) and frames.dtype == np.uint8
        np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [0, 36, 72, 108], atol=2)
        assert video.find_damage(source) is None


@pytest.mark.parametrize("as_bytes", [False, True])
def test_other_videos_are_read_by_pyav(as_bytes, tmp_path):
    file = write_mp4(tmp_path / "a.mp4", gray_frames(10, size=32))
    source = {"path": None, "bytes": (tmp_path / "a.mp4").read_bytes()} if as_bytes else file
    frames = video.decode(source, 4)
    assert frames.shape == (4, 32, 32, 3)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [0, 36, 72, 108], atol=6)  # the codec is lossy
    assert video.find_damage(source) is None


def test_videos_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_bytes(b"no video")
    assert "a.gif cannot be decoded" in video.find_damage({"path": str(tmp_path / "a.gif"), "bytes": None})
    assert video.find_damage({"path": str(tmp_path / "b.gif"), "bytes": None}).endswith("b.gif is not there")
    assert video.find_damage(None) == "A video is missing (None)"
    (tmp_path / "c.mp4").write_bytes(b"no video")
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    assert "need PyAV (run `pip install av`)" in video.find_damage({"path": str(tmp_path / "c.mp4"), "bytes": None})


def test_a_damaged_mp4(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "c.mp4").write_bytes(b"no video")
    assert "c.mp4 cannot be decoded" in video.find_damage({"path": str(tmp_path / "c.mp4"), "bytes": None})


@torch.no_grad()
def evaluate(folder, paths):
    model = VideoMAEForVideoClassification.from_pretrained(folder).eval()
    processor = VideoMAEImageProcessor.from_pretrained(folder)
    right = []
    for path in paths:
        with Image.open(path) as animation:
            frames = []
            for position in range(4):
                animation.seek(position)
                frames.append(np.asarray(animation.convert("RGB")))
        index = model(**processor(frames, return_tensors="pt")).logits.argmax().item()
        right.append(model.config.id2label[index] == path.parent.name)
    return np.mean(right)


def test_videos_from_folders_and_from_a_csv(tmp_path):
    video_model(tmp_path / "model")
    write_videos(tmp_path / "train", TRAIN_ROWS)
    write_videos(tmp_path / "validation", EVAL_ROWS)
    argv = ["--model_name_or_path", tmp_path / "model", "--do_train", *QUIET, "--learning_rate", 0.02]
    argv += ["--per_device_train_batch_size", 12, "--save_strategy", "no", "--num_train_epochs", 10]
    more = ["--train_dir", tmp_path / "train", "--validation_dir", tmp_path / "validation", "--do_eval"]
    results = train("video", words(*argv, *more, "--output_dir", tmp_path / "a"))
    paths = sorted((tmp_path / "validation").glob("*/*.gif"))
    assert results["eval_accuracy"] == pytest.approx(evaluate(tmp_path / "a", paths)) == 1.0

    rows = [{"clip": path, "label": path.parent.name} for path in sorted((tmp_path / "train").glob("*/*.gif"))]
    more = ["--train_file", write_csv(tmp_path / "train.csv", rows), "--video_column_name", "clip"]
    train("video", words(*argv, *more, "--output_dir", tmp_path / "b"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_number_of_frames(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        train("video", words("--num_frames", 0, "--output_dir", tmp_path, "--do_train"))
    assert "`--num_frames` is 0, but must be at least 1" in capsys.readouterr().err
