"""The verl engine: the recipe on stock verl 0.9.1 (Ray, FSDP2, vLLM), without a fork or a patched file.

translate.py turns a recipe into verl's configuration, prompts.py lays the prompts out in the order of the recipe,
launch.py runs `verl.trainer.main_ppo` and cleans up after it, export.py makes a Hugging Face folder of its checkpoint.

Inside verl: reward_manager.py takes replies, batch_queue.py makes batches of them, rm_workers.py scores them on Ray
actors; verl_trainer.py adds metrics and group log (step_record.py) and ends a run whose RM failed (failures.py).
"""
