"""The image runs: networks, augmentation, schedule, tasks, and whole trainings against a plain loop."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from cifar_data import MEAN, PADDING, STD, VIEWS, Cifar, crop_and_flip, load_cifar, make_task
from cifar_gpu import CifarArguments, main, table
from cifar_networks import FreeShortcut, build_network
from cifar_pack import pack
from cifar_settings import RunSettings, batch_plan, epoch_ends, learning_rates, read_run
from cifar_training import CifarRun, NesterovSGD
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lpg_hf import LPGLoss


NUM_TRAIN, NUM_TEST, BATCH_SIZE = 90, 40, 20
TIMES = ("seconds", "ms_per_step", "streams")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of random images, brighter in one place for each class, with half of the labels wrong in `worse`."""
    rng = np.random.default_rng(0)
    labels = np.arange(NUM_TRAIN + NUM_TEST) % 10
    images = rng.integers(0, 128, (len(labels), 32, 32, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[3 * label : 3 * label + 4] += 127
    clean = labels[:NUM_TRAIN]
    wrong = np.where(rng.random(NUM_TRAIN) < 0.5, (clean + 1) % 10, clean)
    path = tmp_path_factory.mktemp("cifar") / "cifar.npz"
    np.savez(path, x=images, y=clean, yt=labels[NUM_TRAIN:], worse=wrong, aggre=clean, rand1=clean)
    return str(path)


@pytest.fixture(scope="module")
def cifar(data):
    return load_cifar(data, torch.device("cpu"))


def labels_only(clean):
    """A data set without images."""
    nothing = torch.empty(0)
    return Cifar(nothing, nothing, {"clean": clean, "worst": (clean + 1) % 10}, np.array([]))


# Networks


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet18", 11_173_962), ("resnet34", 21_282_122), ("resnet32", 464_154)]
)
def test_networks_have_the_published_sizes(name, expected):
    assert sum(parameter.numel() for parameter in build_network(name, 10, seed=0).parameters()) == expected


def test_a_small_network_has_one_block_per_stage_and_free_shortcuts():
    network = build_network("small", 10, seed=0)
    widths = [(3, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    expected = sum(9 * before * after + 2 * after for before, after in widths) + 64 * 10 + 10
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_free_shortcut_takes_every_second_pixel_and_adds_zeros():
    inputs = torch.arange(32.0).view(1, 2, 4, 4)
    outputs = FreeShortcut(num_new_channels=2, stride=2)(inputs)
    assert outputs.shape == (1, 4, 2, 2)
    assert outputs[0, 1].tolist() == [[0, 2], [8, 10]] and outputs[0, 2].tolist() == [[16, 18], [24, 26]]
    assert not outputs[0, [0, 3]].any()


def test_weights_belong_to_the_seed():
    first, again, other = (build_network("small", 10, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


# Data


def test_every_view_is_a_crop_of_the_normalized_image_with_a_margin_of_zeros(data, cifar):
    with np.load(data) as file:
        image = (file["x"][7].astype(np.float64) - MEAN) / STD
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    views = torch.arange(VIEWS)
    crops = crop_and_flip(cifar.train_images, torch.full_like(views, 7), views)
    assert crops.shape == (162, 3, 32, 32) and crops.is_contiguous(memory_format=torch.channels_last)
    expected = [
        padded[top : top + 32, left : left + 32][:, ::step].transpose(2, 0, 1)
        for top in range(9)
        for left in range(9)
        for step in (1, -1)
    ]
    np.testing.assert_allclose(crops.numpy(), np.stack(expected), atol=1e-5)


def test_test_images_are_normalized_and_not_cropped(data, cifar):
    with np.load(data) as file:
        expected = (file["x"][NUM_TRAIN:].astype(np.float64) - MEAN) / STD
    np.testing.assert_allclose(cifar.test_images.numpy(), expected, atol=1e-5)
    few = load_cifar(data, torch.device("cpu"), num_test=7)
    assert torch.equal(few.test_images, cifar.test_images[:7])
    assert few.test_labels.tolist() == cifar.test_labels[:7].tolist()


def test_a_long_tail_has_the_usual_counts():
    task = make_task(labels_only(np.arange(50_000) % 10), "lt100", seed=0)
    assert task.class_counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert (task.labels == task.rows % 10).all() and not task.is_wrong.any()
    assert len(set(task.rows)) == len(task.rows)


def test_symmetric_noise_replaces_its_share_by_any_other_class():
    clean = np.arange(50_000) % 10
    task = make_task(labels_only(clean), "sym40", seed=1)
    assert (task.is_wrong == (task.labels != clean)).all()
    # Five standard errors.
    assert task.is_wrong.mean() == pytest.approx(0.4, abs=0.011)
    shifts = np.bincount((task.labels - clean)[task.is_wrong] % 10, minlength=10)
    assert shifts[0] == 0 and shifts[1:] == pytest.approx(np.full(9, task.is_wrong.sum() / 9), rel=0.11)


def test_the_first_images_are_taken_before_anything_else():
    clean = np.arange(1000) % 10
    task = make_task(labels_only(clean), "worst", seed=0, num_train=300)
    assert task.rows.tolist() == list(range(300)) and task.labels.tolist() == ((clean + 1) % 10)[:300].tolist()
    assert make_task(labels_only(clean), "lt10", seed=0, num_train=300).rows.max() < 300
    with pytest.raises(ValueError, match="`num_train` must lie in"):
        make_task(labels_only(clean), "worst", seed=0, num_train=1001)


def test_files_that_do_not_fit_are_refused(data, tmp_path):
    device = torch.device("cpu")
    with np.load(data) as file:
        arrays = {name: file[name] for name in file.files}
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_cifar(str(tmp_path / "nothing.npz"), device)
    for change, message in (
        ({"yt": arrays["yt"][1:]}, r"'x' of .* must be uint8 of shape \(129, 32, 32, 3\)"),
        ({"worse": arrays["worse"][1:]}, "has 89 labels 'worst' for 90 training images"),
        ({"rand1": arrays["rand1"] + 1}, r"labels 'random1' .* must lie in \[0, 10\)"),
    ):
        np.savez(tmp_path / "changed.npz", **(arrays | change))
        with pytest.raises(ValueError, match=message):
            load_cifar(str(tmp_path / "changed.npz"), device)
    np.savez(tmp_path / "less.npz", **{name: arrays[name] for name in arrays if name != "aggre"})
    with pytest.raises(ValueError, match="has no array 'aggre'"):
        load_cifar(str(tmp_path / "less.npz"), device)


def test_published_files_are_packed(tmp_path):
    """Tiny ones in the formats of CIFAR-10 and CIFAR-10N: the channels one after the other, each row by row."""
    rng = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    pixels, labels = rng.integers(0, 256, (6, 2, 3072), dtype=np.uint8), rng.integers(0, 10, (6, 2))
    for name, data, batch_labels in zip(names, pixels, labels, strict=True):
        batch = {b"data": data, b"labels": batch_labels.tolist()}
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    clean = labels[:5].flatten()
    human = {"clean_label": clean, "worse_label": (clean + 1) % 10, "aggre_label": clean}
    human |= {f"random_label{number}": (clean + 1 + number) % 10 for number in (1, 2, 3)}
    torch.save(human, tmp_path / "CIFAR-10_human.pt")
    pack(tmp_path, tmp_path / "CIFAR-10_human.pt", tmp_path / "cifar.npz")

    with np.load(tmp_path / "cifar.npz") as file:
        packed = {name: file[name] for name in file.files}
    assert packed["x"].shape == (12, 32, 32, 3)
    for row, y, x, channel in [(0, 0, 0, 0), (3, 5, 31, 1), (11, 31, 7, 2)]:
        assert packed["x"][row, y, x, channel] == pixels[row // 2, row % 2, 1024 * channel + 32 * y + x]
    assert packed["y"].tolist() == clean.tolist() and packed["yt"].tolist() == labels[5].tolist()
    assert packed["worse"].tolist() == ((clean + 1) % 10).tolist() and packed["aggre"].tolist() == clean.tolist()
    assert packed["rand1"].tolist() == ((clean + 2) % 10).tolist()
    assert len(load_cifar(str(tmp_path / "cifar.npz"), torch.device("cpu")).test_images) == 2

    torch.save(human | {"clean_label": clean[::-1].copy()}, tmp_path / "ordered.pt")
    with pytest.raises(ValueError, match="are not those in"):
        pack(tmp_path, tmp_path / "ordered.pt", tmp_path / "cifar.npz")


# Settings


def test_a_run_is_read_with_its_options_and_the_defaults():
    run = read_run("worst:small:auto:15:seed=1:num_train=20000", {"learning_rate": 0.05, "seed": 3})
    assert run == RunSettings("worst", "small", "auto", 15, seed=1, num_train=20_000, learning_rate=0.05)
    assert read_run(str(run), {}) == run
    assert run.chain == ["auto"]


@pytest.mark.parametrize(
    ("method", "chain"),
    [
        ("ce", None),
        ("la", ["logit_adjustment"]),
        ("class_relative_dampening(power=4)", ["class_relative_dampening(power=4)"]),
        ("logit_adjustment(tau=1e+0)+auto", ["logit_adjustment(tau=1e+0)", "auto"]),
    ],
)
def test_chains_are_split_outside_of_parentheses(method, chain):
    run = read_run(f"clean:small:{method}:3:seed=2", {})
    assert (run.method, run.chain, run.epochs, run.seed) == (method, chain, 3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worst:small:auto", "Write task:network:method:epochs"),
        ("worst:small:auto:many", "Write task:network:method:epochs"),
        ("worst:small:auto:0", "`epochs` must be a whole number of at least 1"),
        ("worse:small:auto:3", "Unknown task 'worse'"),
        ("sym100:small:auto:3", "Unknown task 'sym100'"),
        ("lt1:small:auto:3", "Unknown task 'lt1'"),
        ("worst:large:auto:3", "Unknown network 'large'"),
        ("worst:small:nothing:3", "Unknown perturbation 'nothing'"),
        ("worst:small:lpg(strategy='a:b=c+d'):3", r"strategy.*'a:b=c\+d'"),
        ("worst:small:sam:3", "gradient of the parameters"),
        ("worst:small:auto:3:size=4", "unknown option 'size'"),
        ("worst:small:auto:3:seed=one", "must be a number"),
        ("worst:small:auto:3:batch_size=0", "`batch_size` must be a whole number of at least 1"),
        ("worst:small:auto:3:learning_rate=-1", "`learning_rate` must be at least 0"),
    ],
)
def test_runs_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_run(text, {})


@given(st.integers(5, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_every_row_comes_once_per_epoch(num_rows, batch_size, epochs, seed):
    settings = RunSettings("clean", "small", "ce", epochs, seed=seed, batch_size=batch_size)
    rows, views = batch_plan(num_rows, settings)
    assert rows.shape == views.shape == (num_rows * epochs // batch_size, batch_size)
    assert views.min() >= 0 and views.max() < VIEWS
    for epoch in range(epochs):
        part = rows.flatten()[epoch * num_rows : (epoch + 1) * num_rows].tolist()
        assert len(set(part)) == len(part)
    ends = epoch_ends(num_rows, settings)
    assert ends[-1] == len(rows)
    assert all(end * batch_size <= num_rows * epoch < (end + 1) * batch_size for epoch, end in enumerate(ends, 1))


def test_the_plan_belongs_to_the_seed_alone():
    one, other = (RunSettings("clean", "small", *method, 2, batch_size=10) for method in (["ce"], ["auto"]))
    assert all(torch.equal(a, b) for a, b in zip(batch_plan(55, one), batch_plan(55, other), strict=True))
    again = batch_plan(55, RunSettings("clean", "small", "ce", 2, seed=1, batch_size=10))
    assert not torch.equal(batch_plan(55, one)[0], again[0])


def test_the_schedule_is_half_a_cosine_times_a_warm_up():
    settings = RunSettings("clean", "small", "ce", 4, batch_size=10, learning_rate=0.2, warmup_epochs=0.5)
    rates = learning_rates(100, settings).tolist()
    expected = [0.2 * min(1, (k + 1) / 5) * (1 + math.cos(math.pi * k / 40)) / 2 for k in range(40)]
    assert rates == pytest.approx(expected)
    in_steps = RunSettings("clean", "small", "ce", 4, batch_size=10, learning_rate=0.2, warmup_steps=5)
    assert learning_rates(100, in_steps).tolist() == rates
    without = RunSettings("clean", "small", "ce", 4, batch_size=10, learning_rate=0.2, warmup_steps=0)
    assert learning_rates(100, without)[0].item() == pytest.approx(0.2)


def test_the_optimizer_is_nesterovs_of_torch():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    optimizer = NesterovSGD(ours, momentum=0.9, weight_decay=0.01)
    expected = torch.optim.SGD(theirs, lr=1.0, momentum=0.9, weight_decay=0.01, nesterov=True)
    for step in range(5):
        rate = 0.1 / (step + 1)
        expected.param_groups[0]["lr"] = rate
        for parameters in (ours, theirs):
            sum(parameter.sin().sum() for parameter in parameters).backward()
        optimizer.step(torch.tensor(rate, dtype=torch.float64))
        expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
    for parameter, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-14)


# Trainings


def train(run):
    while not run.is_done:
        run.advance()
    return run.result()


@pytest.mark.parametrize("method", ["ce", "gce", "logit_adjustment+class_relative_dampening(power=2)"])
def test_a_run_is_what_a_plain_loop_computes(data, cifar, method):
    """The loop pads and crops with NumPy, and takes the optimizer of torch."""
    settings = RunSettings("worst", "small", method, 3, batch_size=BATCH_SIZE, learning_rate=0.03, warmup_steps=4)
    run = CifarRun(settings, cifar)
    result = train(run)

    with np.load(data) as file:
        images, labels, clean, test_labels = (file[name] for name in ("x", "worse", "y", "yt"))
    images = ((images - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    padded = np.pad(images[:NUM_TRAIN], ((0, 0), (PADDING,) * 2, (PADDING,) * 2, (0, 0)))
    network = build_network("small", 10, seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    loss_fn = F.cross_entropy
    if method != "ce":
        loss_fn = LPGLoss(10, settings.chain, np.bincount(labels, minlength=10))
    accuracies, weights = [], {"right": [], "wrong": []}
    rates = learning_rates(NUM_TRAIN, settings).tolist()

    def predict(images):
        network.eval()
        with torch.no_grad():
            predictions = network(torch.from_numpy(images).permute(0, 3, 1, 2)).argmax(1).numpy()
        network.train()
        return predictions

    for step, (rows, views) in enumerate(zip(*batch_plan(NUM_TRAIN, settings), strict=True)):
        batch = []
        for row, view in zip(rows.tolist(), views.tolist(), strict=True):
            (top, left), is_mirrored = divmod(view // 2, 9), view % 2
            crop = padded[row, top : top + 32, left : left + 32]
            batch.append(crop[:, ::-1] if is_mirrored else crop)
        logits = network(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2))
        optimizer.zero_grad()
        loss_fn(logits, torch.from_numpy(labels[rows.numpy()])).backward()
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
        if method != "ce" and step >= epoch_ends(NUM_TRAIN, settings)[1]:
            for row, weight in zip(rows.tolist(), loss_fn.perturbations[-1].last_weight.tolist(), strict=True):
                weights["right" if labels[row] == clean[row] else "wrong"].append(weight)
        if step + 1 in epoch_ends(NUM_TRAIN, settings):
            accuracies.append((predict(images[NUM_TRAIN:]) == test_labels).mean())

    for parameter, expected in zip(run.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-4)
    assert result["accuracies"] == pytest.approx(accuracies)
    assert result["accuracy"] == pytest.approx(accuracies[-1])
    assert result["best_accuracy"] == pytest.approx(max(accuracies))
    assert result["best_epoch"] == 1 + accuracies.index(max(accuracies))
    is_wrong = labels != clean
    assert result["wrong_rows"] == is_wrong.sum()
    fitted = (predict(images[:NUM_TRAIN]) == labels)[is_wrong].mean()
    assert result["wrong_fitted"] == pytest.approx(fitted, abs=1e-5)
    means = {f"weight_{name}": np.mean(values) for name, values in weights.items() if values}
    assert {name: result[name] for name in result if name.startswith("weight")} == pytest.approx(means, abs=1e-3)


@pytest.mark.parametrize("method", ["ce", "auto"])
def test_a_rehearsal_leaves_no_trace(cifar, method):
    settings = RunSettings("worst", "small", method, 2, batch_size=BATCH_SIZE)
    rehearsed, plain = CifarRun(settings, cifar), CifarRun(settings, cifar)
    addresses = [tensor.data_ptr() for tensor in rehearsed._state()]
    rehearsed._rehearse()
    assert [tensor.data_ptr() for tensor in rehearsed._state()] == addresses
    assert all(torch.equal(a, b) for a, b in zip(rehearsed._state(), plain._state(), strict=True))
    train(rehearsed), train(plain)
    assert all(torch.equal(a, b) for a, b in zip(rehearsed._state(), plain._state(), strict=True))


def test_runs_are_the_same_one_by_one_and_side_by_side(data, tmp_path, capsys):
    runs = ["worst:small:auto:2", "worst:small:ce:2", "sym20:small:ce:1:seed=1"]
    lines = []
    for number, streams in enumerate((1, 2, 2)):
        out = tmp_path / f"{number}.jsonl"
        arguments = CifarArguments(data, runs, str(out), "cpu", streams, batch_size=BATCH_SIZE)
        assert main(arguments) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["is_finished"] for row in rows] == [True] * 3
        rows.sort(key=lambda row: (row["task"], row["method"]))
        lines.append([{name: value for name, value in row.items() if name not in TIMES} for row in rows])
    assert lines[0] == lines[1] == lines[2]
    assert [row["method"] for row in lines[0]] == ["ce", "auto", "ce"]
    assert capsys.readouterr().out.count("| worst | small |") == 6


def test_a_crash_of_one_run_does_not_stop_the_others(data, tmp_path, capsys):
    runs = ["worst:small:ce:1:batch_size=91", "worst:small:ce:1", "clean:small:ce:1:learning_rate=1e30"]
    out = tmp_path / "out.jsonl"
    assert main(CifarArguments(data, runs, str(out), "cpu", batch_size=BATCH_SIZE, warmup_epochs=0)) == 2
    crashed, fine, diverged = [json.loads(line) for line in out.read_text().splitlines()]
    assert crashed["error"].startswith("ValueError: worst:small:ce:1:") and "do not fill a batch" in crashed["error"]
    assert fine["is_finished"] and "error" not in fine
    assert "logits are not finite" in diverged["error"]
    assert "do not fill a batch of 91" in capsys.readouterr().out


def test_a_limit_ends_the_runs_with_what_is_there(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    runs = ["worst:small:ce:1", "worst:small:auto:1"]
    assert main(CifarArguments(data, runs, str(out), "cpu", max_seconds=0.0, batch_size=BATCH_SIZE)) == 2
    assert not out.exists() and "left 2 of 2 runs unstarted" in capsys.readouterr().err

    settings = RunSettings("worst", "small", "auto", 3, batch_size=BATCH_SIZE)
    run = CifarRun(settings, load_cifar(data, torch.device("cpu")))
    while run.steps < epoch_ends(NUM_TRAIN, settings)[1]:
        run.advance()
    result = run.result()
    assert result["is_finished"] is False and result["steps"] == 9 and len(result["accuracies"]) == 2
    line = {"task": "worst", "network": "small", "method": "auto", "epochs": 3, "seed": 0} | result
    assert "| 2 of 3 |" in table([line])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "`device` must be cuda or cpu"),
        ({"streams": 0}, "`streams` must lie in"),
        ({"num_test": 0}, "`num_test`"),
    ],
)
def test_arguments_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        CifarArguments(**({"data": "x.npz", "runs": [], "out": "out", "device": "cpu"} | change))
