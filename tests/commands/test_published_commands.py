"""The commands that the examples of transformers publish, on data and models of the same names."""

import json
import shlex

import pytest
from command_data import QUIET
from published_data import make_all
from transformers import AutoConfig, Trainer

from lpg_hf.commands.main import main


pytestmark = pytest.mark.usefixtures("fresh_datasets_cache")


# Without the name of the script; with ${dataset} and ${subset} as the shell puts them in.
REVIEWS = r"""
    --model_name_or_path  google-bert/bert-base-uncased \
    --dataset_name amazon_reviews_multi \
    --dataset_config_name en \
    --shuffle_train_dataset \
    --metric_name accuracy \
    --text_column_name "review_title,review_body,product_category" \
    --text_column_delimiter "\n" \
    --label_column_name stars \
    --do_train \
    --do_eval \
    --max_seq_length 512 \
    --per_device_train_batch_size 32 \
    --learning_rate 2e-5 \
    --num_train_epochs 1 \
    --output_dir OUT
"""
TOPICS = r"""
    --model_name_or_path google-bert/bert-base-uncased \
    --dataset_name reuters21578 \
    --dataset_config_name ModApte \
    --shuffle_train_dataset \
    --remove_splits "unused" \
    --metric_name f1 \
    --text_column_name text \
    --label_column_name topics \
    --do_train \
    --do_eval \
    --max_seq_length 512 \
    --per_device_train_batch_size 32 \
    --learning_rate 2e-5 \
    --num_train_epochs 15 \
    --output_dir OUT
"""
BEANS = r"""
    --dataset_name beans \
    --output_dir OUT \
    --remove_unused_columns False \
    --label_column_name labels \
    --do_train \
    --do_eval \
    --push_to_hub \
    --push_to_hub_model_id vit-base-beans \
    --learning_rate 2e-5 \
    --num_train_epochs 5 \
    --per_device_train_batch_size 8 \
    --per_device_eval_batch_size 8 \
    --logging_strategy steps \
    --logging_steps 10 \
    --eval_strategy epoch \
    --save_strategy epoch \
    --load_best_model_at_end True \
    --save_total_limit 3 \
    --seed 1337
"""
FOLDERS = r"""
    --train_dir images \
    --output_dir OUT \
    --remove_unused_columns False \
    --do_train \
    --do_eval
"""
KEYWORDS = r"""
    --model_name_or_path facebook/wav2vec2-base \
    --dataset_name superb \
    --dataset_config_name ks \
    --output_dir OUT \
    --remove_unused_columns False \
    --do_train \
    --do_eval \
    --fp16 \
    --learning_rate 3e-5 \
    --max_length_seconds 1 \
    --attention_mask False \
    --warmup_steps 0.1 \
    --num_train_epochs 5 \
    --per_device_train_batch_size 32 \
    --gradient_accumulation_steps 4 \
    --per_device_eval_batch_size 32 \
    --dataloader_num_workers 4 \
    --logging_strategy steps \
    --logging_steps 10 \
    --eval_strategy epoch \
    --save_strategy epoch \
    --load_best_model_at_end True \
    --metric_for_best_model accuracy \
    --save_total_limit 3 \
    --seed 0 \
    --push_to_hub
"""
LANGUAGES = r"""
    --model_name_or_path facebook/wav2vec2-base \
    --dataset_name common_language \
    --audio_column_name audio \
    --label_column_name language \
    --output_dir OUT \
    --remove_unused_columns False \
    --do_train \
    --do_eval \
    --fp16 \
    --learning_rate 3e-4 \
    --max_length_seconds 16 \
    --attention_mask False \
    --warmup_steps 0.1 \
    --num_train_epochs 10 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 4 \
    --per_device_eval_batch_size 1 \
    --dataloader_num_workers 8 \
    --logging_strategy steps \
    --logging_steps 10 \
    --eval_strategy epoch \
    --save_strategy epoch \
    --load_best_model_at_end True \
    --metric_for_best_model accuracy \
    --save_total_limit 3 \
    --seed 0 \
    --push_to_hub
"""
COMMANDS = {
    "reviews": ("text", REVIEWS, 18, ["1", "2", "3"]),
    "beans": ("image", BEANS, 9, ["angular_leaf_spot", "bean_rust", "healthy"]),
    "folders": ("image", FOLDERS, 4, ["blue", "green", "red"]),
    "keywords": ("audio", KEYWORDS, 8, ["loud", "soft"]),
    "languages": ("audio", LANGUAGES, 8, ["loud", "soft"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    make_all(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


@pytest.fixture
def pushes(monkeypatch):
    """The names that are pushed to, in the place of the hub."""
    found = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer, **_: found.append(trainer.args.hub_model_id))
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *_: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *_, **__: found.append("pushed"))
    return found


def arguments(command, output_dir):
    return shlex.split(command.replace("\\\n", "").replace("OUT", str(output_dir)))


# Eight workers that begin twenty times take half a minute on two processors.
@pytest.mark.parametrize(
    "name", [name if name != "languages" else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_published_commands_run_unchanged(name, folder, pushes, tmp_path):
    kind, command, rows, names = COMMANDS[name]
    # The processors of CI have no card; nothing else is added.
    main(["train", kind, *arguments(command, tmp_path / "out"), *QUIET])
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_samples"] == rows and 0 <= results["eval_accuracy"] <= 1
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert [config.id2label[index] for index in range(len(names))] == names
    if "--push_to_hub" in command:
        assert pushes[0] == {"beans": "vit-base-beans"}.get(name) and set(pushes[1:]) == {"pushed"}


def test_the_multi_label_command_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"'topics' of the train data holds lists .* multi-label .* keep one"):
        main(["train", "text", *arguments(TOPICS, tmp_path / "out"), *QUIET])
