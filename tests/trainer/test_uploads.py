"""What a push to the Hub would upload: everything but the network, with the patterns of huggingface_hub itself."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import transformers
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from text_cases import bert, text_dataset
from transformers import TrainingArguments

from lpg_hf import LPGTrainer
from lpg_hf.trainer.reports import hide_report


WANTED = {"README.md", "config.json", "model.safetensors", "training_args.bin"}


@pytest.fixture
def uploads(monkeypatch):
    """The paths of the files of each upload."""
    found = []

    def upload(*_, folder_path, ignore_patterns, **__):
        files = [file for file in Path(folder_path).rglob("*") if file.is_file()]
        names = [file.relative_to(folder_path).as_posix() for file in files]
        found.append(set(filter_repo_objects(names, ignore_patterns=ignore_patterns)))
        done = Future()
        done.set_result(None)
        return done

    def create_repo(*_, **__):
        return RepoUrl("https://hf.co/somebody/something")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    # Older transformers, 5.6 among them, call functions that their Trainer has imported.
    monkeypatch.setattr(transformers.trainer, "create_repo", create_repo, raising=False)
    monkeypatch.setattr(transformers.trainer, "upload_folder", upload, raising=False)
    return found


def make_trainer(path, **options):
    settings = {"save_strategy": "no", "max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(path), **(settings | options))
    return LPGTrainer(model=bert(), args=args, train_dataset=text_dataset([0] * 4 + [1, 1, 2, 3]))


def trained(path, **options):
    trainer = make_trainer(path, **options)
    trainer.train()
    return trainer


def test_a_push_that_was_not_planned_leaves_the_report_out(uploads, tmp_path, caplog):
    trainer = trained(tmp_path)
    page = Path(trainer.report())
    assert page == tmp_path / "report" / "report.html"
    content = page.read_bytes()
    trainer.push_to_hub()
    assert uploads[-1] >= WANTED and not [name for name in uploads[-1] if "report" in name]
    assert (tmp_path / "_report" / "report.html").read_bytes() == content
    moved = f"{tmp_path / 'report'} shows texts or pictures of training rows. It is {tmp_path / '_report'} now"
    assert caplog.text.count(moved) == 1
    # An upload in the background may still be reading the folder.
    assert Path(trainer.report()) == tmp_path / "_report" / "report.html"
    trainer.push_to_hub()
    assert not [name for name in uploads[-1] if "report" in name]
    assert caplog.text.count("not uploaded") == 1 and not (tmp_path / "report").exists()


def test_a_training_that_pushes_leaves_the_report_of_an_earlier_one_out(uploads, tmp_path):
    trained(tmp_path).report()
    trainer = trained(tmp_path, push_to_hub=True, save_strategy="steps", save_steps=2)
    trainer.push_to_hub()
    assert len(uploads) == 2
    for names in uploads:
        assert names >= WANTED - {"README.md"} and not [name for name in names if "report" in name]


def test_fixes_in_a_report_that_was_hidden_before_are_kept(tmp_path):
    for name, text in (("report", "new"), ("_report", "old"), ("_report.old1", "oldest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.html").write_text(text)
    hide_report(tmp_path)
    texts = {path.name: (path / "report.html").read_text() for path in tmp_path.iterdir()}
    assert texts == {"_report": "new", "_report.old1": "oldest", "_report.old2": "old"}


def test_a_folder_of_something_else_stays_and_is_uploaded(uploads, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "paper.tex").write_text("ours")
    trainer = make_trainer(tmp_path)
    trainer.push_to_hub()
    assert "report/paper.tex" in uploads[-1]
