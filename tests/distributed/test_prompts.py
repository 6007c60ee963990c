"""The file that verl reads front to back holds what the local engine would draw, step by step."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tiny import qwen_tokenizer
from tiny_training import prompt_file, tiny_recipe
from ups_rm.data.batches import fitting_prompts, prompt_batches, select_prompts
from ups_rm.data.prompts import read_prompts
from ups_rm.distributed.prompts import PromptFiles, lay_out_prompts
from ups_rm.errors import RecipeError

CASES = {
    "shuffled": [],
    "as they stand": ["data.shuffle=false"],
    "half harmless": ["data.benign_share=0.5", "data.seed=3"],
    "distinct prompts, the first ones": ["data.unique_prompts=true", "data.train_max_samples=9"],
    "long ones left out": ["data.max_prompt_length=18"],
}


def laid_out(folder: Path, policy: Path, *overrides: str) -> tuple[Any, PromptFiles]:
    recipe = tiny_recipe(folder, policy, *overrides)
    return recipe, lay_out_prompts(recipe, qwen_tokenizer(), folder / "verl")


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_steps_hold_the_prompts_that_the_local_engine_draws(
    overrides: list[str], tmp_path: Path, policy_folder: Path
) -> None:
    recipe, files = laid_out(tmp_path, policy_folder, *overrides, "trainer.total_training_steps=7")
    rows = select_prompts(read_prompts(tmp_path / "train.parquet"), recipe.data)
    fitting = fitting_prompts(rows, qwen_tokenizer(), recipe.data)
    if any("max_prompt_length" in text for text in overrides):
        assert 0 < len(fitting) < len(rows)
    expected = [row for batch in islice(prompt_batches(fitting, recipe.data), 7) for row in batch]
    found = pq.read_table(files.train).to_pylist()
    assert files.total_steps == 7
    assert [row["prompt"] for row in found] == [row.messages for row in expected]
    assert [row["extra_info"]["index"] for row in found] == [row.index for row in expected]
    assert [row["extra_info"]["kind"] for row in found] == [row.kind for row in expected]


def test_more_steps_only_append(tmp_path: Path, policy_folder: Path) -> None:
    """So the position in a checkpoint stays right when a run is made longer."""
    long, short = (
        pq.read_table(laid_out(tmp_path / str(steps), policy_folder, f"trainer.total_training_steps={steps}")[1].train)
        for steps in (9, 4)
    )
    assert long.to_pylist()[: len(short)] == short.to_pylist()


def test_epochs_are_counted_in_whole_batches(tmp_path: Path, policy_folder: Path) -> None:
    """12 prompts in batches of 5: two steps an epoch."""
    five = ["data.train_batch_size=5", "actor_rollout_ref.actor.ppo_mini_batch_size=5", "trainer.total_epochs=3"]
    _, files = laid_out(tmp_path, policy_folder, *five, "trainer.total_training_steps=null")
    assert files.total_steps == 6
    assert pq.read_table(files.train).num_rows == 30


def test_held_out_prompts_are_needed_only_for_validation(tmp_path: Path, policy_folder: Path) -> None:
    none = ["data.val_max_samples=0"]
    _, files = laid_out(tmp_path, policy_folder, *none)
    assert pq.read_table(files.val).num_rows == 1
    with pytest.raises(RecipeError, match="is left for it"):
        laid_out(tmp_path, policy_folder, *none, "trainer.test_freq=1")


def test_verls_own_loader_reads_it_in_order_and_goes_on_where_it_was(tmp_path: Path, policy_folder: Path) -> None:
    """verl's dataset and sampler under its stateful loader, with the settings that translate.py gives."""
    pytest.importorskip("verl", reason="verl is an extra")
    from omegaconf import OmegaConf
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler
    from verl.utils.dataset.rl_dataset import collate_fn

    from ups_rm.distributed.translate import verl_config, verl_overrides

    recipe = tiny_recipe(tmp_path, policy_folder, "reward_model.model.path=rm", "trainer.total_training_steps=5")
    files = lay_out_prompts(recipe, qwen_tokenizer(), tmp_path / "verl")
    given = verl_overrides(recipe, files)
    config = OmegaConf.create(verl_config(given)).data

    def loader() -> Any:
        dataset = create_rl_dataset(config.train_files, config, qwen_tokenizer(), None, is_train=True)
        sampler = create_rl_sampler(config, dataset)
        return StatefulDataLoader(
            dataset, config.train_batch_size, num_workers=0, drop_last=True, collate_fn=collate_fn, sampler=sampler
        )

    expected = [row["extra_info"]["index"] for row in pq.read_table(files.train).to_pylist()]
    first = loader()
    whole, state = [], {}
    for step, batch in enumerate(first, start=1):
        whole.append([info["index"] for info in batch["extra_info"]])
        if step == 2:
            state = first.state_dict()
    assert whole == [expected[4 * step : 4 * step + 4] for step in range(5)]
    second = loader()
    second.load_state_dict(state)
    assert [[info["index"] for info in batch["extra_info"]] for batch in second] == whole[2:]


def test_a_file_with_too_few_prompts_says_so(tmp_path: Path, policy_folder: Path) -> None:
    few = prompt_file(tmp_path / "few.parquet", unsafe=2, benign=1)
    with pytest.raises(RecipeError, match="there are only 3 prompts"):
        laid_out(tmp_path, policy_folder, f"data.train_files={few}")
