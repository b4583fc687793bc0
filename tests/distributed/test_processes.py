"""Several processes train what one process trains on the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_exact
from train_exact import train


SCRIPT = train_exact.__file__
WATCHDOG_SECONDS = 300  # far above what a run needs: a hanging collective must not hang the suite
OPEN_GATES = "class_relative_dampening(learned=(0.0, 0.01), evidence=(0.0, 0.001))"
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
# Dampening acts in the second one.
TWO_EPOCHS = {"num_train_epochs": 2}


def launch_all(jobs, processes, output_dir, launcher=None):
    output_dir.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = torchrun if launcher is None else launcher
    done = subprocess.run(
        [*command, SCRIPT, json.dumps(jobs), str(output_dir)],
        capture_output=True,
        text=True,
        timeout=WATCHDOG_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output_dir / "results.pt")


def launch(job, processes, output_dir, launcher=None):
    (result,) = launch_all([job], processes, output_dir, launcher)
    return result


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [("bert", SGD), ("convnext", {"optim": "adamw_torch", "max_grad_norm": 0.3})],
)
@pytest.mark.parametrize(
    ("processes", "accumulation", "sizes"),
    [
        (2, 1, [8] * 30),
        (2, 2, [3, 5, 1, 7] * 15),  # micro-batches of different sizes, and processes without some of the classes
        (4, 1, [4] * 60),
    ],
)
def test_processes_train_like_one(model, optimizer, processes, accumulation, sizes, tmp_path):
    job = {"model": model, "perturbations": ["logit_adjustment", OPEN_GATES, "logit_clipping(max_norm=0.9)"]}
    job["ignored"] = [0, 1, 40]
    optimizer = optimizer | TWO_EPOCHS
    alone = train(job | {"sizes": [16] * 15, "args": optimizer}, tmp_path / "alone")
    together = launch(
        job | {"sizes": sizes, "args": optimizer | {"gradient_accumulation_steps": accumulation}},
        processes,
        tmp_path / "together",
    )
    assert together["processes"] == processes
    assert alone["steps"] == together["steps"] == 30
    torch.testing.assert_close(together["parameters"], alone["parameters"], rtol=0, atol=1e-9)
    torch.testing.assert_close(together["means"], alone["means"], rtol=0, atol=1e-9)
    torch.testing.assert_close(together["losses"], alone["losses"], rtol=0, atol=1e-6)
    torch.testing.assert_close(together["norms"], alone["norms"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "perturbations", "of_a_step"),
    [
        ("vit", ["logit_adjustment", OPEN_GATES], [(8 * 4, True)]),
        # A model that does not take the count of labeled samples: the Trainer does not count them.
        ("convnext", ["logit_adjustment", OPEN_GATES], [(1, True), (8 * 4, True)]),
        # The second pass of SAM learns nothing, and the first does not send.
        ("vit", ["logit_adjustment", "sam"], [(8 * 4, True)]),
        ("vit", [], []),
    ],
)
def test_sums_over_processes_are_few_and_travel_while_the_model_computes(model, perturbations, of_a_step, tmp_path):
    """Once per optimizer step, whatever the accumulation."""
    job = {"model": model, "perturbations": perturbations, "sizes": [4] * 24}
    together = launch(job | {"args": SGD | {"gradient_accumulation_steps": 2}}, 2, tmp_path / "together")
    assert together["steps"] == 6
    assert together["sums"] == of_a_step * 6


def test_statistics_are_waited_for_where_they_are_looked_up(tmp_path):
    """By any process alone; until then they travel."""
    job = {"model": "vit", "perturbations": ["logit_adjustment", OPEN_GATES], "looks": True}
    args = SGD | TWO_EPOCHS
    alone = train(job | {"sizes": [16] * 3, "args": args}, tmp_path / "alone")["looks"]
    together = launch(job | {"sizes": [8] * 6, "args": args}, 2, tmp_path / "together")["looks"]
    assert [(before, after) for before, after, _ in alone] == [(step, step) for step in range(1, 7)]
    assert [(before, after) for before, after, _ in together] == [(step - 1, step) for step in range(1, 7)]
    for (_, _, seen_alone), (_, _, seen_together) in zip(alone, together, strict=True):
        torch.testing.assert_close(seen_together, seen_alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("processes", [2, 4])
def test_synchronised_class_means_are_those_of_the_whole_batch(processes, tmp_path):
    job = {
        "model": "bert",
        "perturbations": ["lpg(epsilon=0.3, sync=True)", "lpg(norm='linf', sync=True)"],
        "ignored": [3],
    }
    alone = train(job | {"sizes": [16] * 30, "args": SGD}, tmp_path / "alone")
    sizes = [16 // processes] * (30 * processes) if processes == 4 else [3, 13] * 30
    together = launch(job | {"sizes": sizes, "args": SGD}, processes, tmp_path / "together")
    torch.testing.assert_close(together["parameters"], alone["parameters"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "args",
    [
        {"ddp_find_unused_parameters": True},
        {"ddp_static_graph": True},
        {"average_tokens_across_devices": False},
    ],
    ids=lambda args: next(iter(args)),
)
def test_ddp_options_do_not_change_the_training(args, tmp_path):
    """Equal micro-batches: only there is a mean of the processes' means the mean, without the tokens' average."""
    job = {"model": "vit", "perturbations": ["logit_adjustment", OPEN_GATES]}
    alone = train(job | {"sizes": [16] * 15, "args": SGD | TWO_EPOCHS}, tmp_path / "alone")
    together = launch(job | {"sizes": [8] * 30, "args": SGD | TWO_EPOCHS | args}, 2, tmp_path / "together")
    torch.testing.assert_close(together["parameters"], alone["parameters"], rtol=0, atol=1e-9)
    torch.testing.assert_close(together["means"], alone["means"], rtol=0, atol=1e-9)


def test_resume_on_two_processes_is_the_uninterrupted_run(tmp_path):
    """Four chains, each interrupted after four different steps: in both epochs, and between them."""
    chains = [
        ["auto"],
        ["lpg(epsilon=0.3)", "lpg(strategy='accuracy', sync=True)"],
        ["logit_adjustment", "logit_noise(sigma=0.05)", "sam(rho=0.05)"],
        ["logit_clipping(quantile=0.8)", "gradient_noise(eta=0.0001)"],
    ]
    args = {"save_strategy": "steps", "save_steps": 1} | TWO_EPOCHS
    jobs = [{"model": "bert", "perturbations": chain, "sizes": [8] * 12, "args": SGD | args} for chain in chains]
    whole = launch_all(jobs, 2, tmp_path / "whole")
    points = [(number, step) for number in range(len(chains)) for step in (1, 4, 6, 8)]
    resumed = launch_all(
        [
            jobs[number] | {"resume": str(tmp_path / "whole" / str(number) / f"checkpoint-{step}")}
            for number, step in points
        ],
        2,
        tmp_path / "resumed",
    )
    for (number, step), result in zip(points, resumed, strict=True):
        assert result["steps"] == 12
        for name in ("parameters", "means"):
            assert torch.equal(result[name], whole[number][name]), (chains[number], step, name)
        assert result["losses"] == whole[number]["losses"]


def test_a_stream_that_one_process_reads_for_all(tmp_path):
    """`dispatch_batches`, and class counts that are taken during the first epoch."""
    job = {"model": "bert", "perturbations": ["auto", "class_weighting"], "sizes": [64], "is_stream": True}
    args = SGD | {"max_steps": 10, "accelerator_config": {"dispatch_batches": True, "split_batches": False}}
    alone = train(job | {"args": args | {"per_device_train_batch_size": 16}}, tmp_path / "alone")
    together = launch(job | {"args": args | {"per_device_train_batch_size": 8}}, 2, tmp_path / "together")
    assert together["counts"].tolist() == alone["counts"].tolist()
    assert together["counts"].sum() == 160
    torch.testing.assert_close(together["parameters"], alone["parameters"], rtol=0, atol=1e-9)


def test_an_uneven_end_does_not_hang_and_statistics_stay_global(tmp_path):
    job = {"model": "bert", "perturbations": ["auto", "logit_clipping(quantile=0.8)", "sam"], "args": SGD}
    together = launch(job | {"sizes": [8] * 20 + [3]}, 2, tmp_path / "together")
    assert together["steps"] == 11


def test_label_issues_are_those_of_all_processes(tmp_path):
    """Each process sees its part of the rows, which change hands between epochs; resumed after the first epoch too."""
    args = SGD | {"num_train_epochs": 3, "train_sampling_strategy": "random", "save_strategy": "epoch"}
    job = {"model": "resnet", "perturbations": [OPEN_GATES], "sizes": [64], "ignored": [5], "is_map": True}
    alone = train(job | {"args": args | {"per_device_train_batch_size": 16}}, tmp_path / "alone")
    job |= {"args": args | {"per_device_train_batch_size": 8}}
    together = launch(job, 2, tmp_path / "together")
    resumed = launch(job | {"resume": str(tmp_path / "together" / "0" / "checkpoint-4")}, 2, tmp_path / "resumed")
    torch.testing.assert_close(together["parameters"], alone["parameters"], rtol=0, atol=1e-9)
    for folder in ("alone/report", "together/0/report"):
        assert (tmp_path / folder / "report.html").is_file() and (tmp_path / folder / "confusion.csv").is_file()
    expected = by_row(alone["issues"])
    assert list(expected) == [row for row in range(64) if row != 5]
    for issues in (by_row(together["issues"]), by_row(resumed["issues"])):
        assert list(issues) == list(expected)
        for row, issue in issues.items():
            for name in ("score", "weight"):
                assert issue[name] == pytest.approx(expected[row][name], abs=1e-6)
            assert (issue["label"], issue["visits"]) == (expected[row]["label"], 3)
        # Without a majority the leader depends on the order of the votes.
        same = [issue["suggested_label"] == expected[row]["suggested_label"] for row, issue in issues.items()]
        assert sum(same) > 0.9 * len(same)


def by_row(issues):
    """Rows in their own order: equal scores of two runs may differ in rounding, and so in rank."""
    lines = [dict(zip(issues, values, strict=True)) for values in zip(*issues.values(), strict=True)]
    return {line["row"]: line for line in sorted(lines, key=lambda line: line["row"])}


def test_accelerate_launch_with_the_ready_config(tmp_path):
    config = Path(__file__).parents[2] / "examples" / "accelerate" / "cpu_ddp.yaml"
    job = {"model": "bert", "perturbations": ["auto"]}
    alone = train(job | {"sizes": [16] * 10, "args": SGD}, tmp_path / "alone")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}", "--main_process_port=0"]
    together = launch(job | {"sizes": [8] * 20, "args": SGD}, 2, tmp_path / "together", launcher)
    assert together["processes"] == 2
    torch.testing.assert_close(together["parameters"], alone["parameters"], rtol=0, atol=1e-9)
