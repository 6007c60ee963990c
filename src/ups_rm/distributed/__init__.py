"""The verl engine: the recipe on stock verl 0.9.1 (Ray, FSDP2, vLLM), without a fork or a patched file.

translate.py turns a recipe into verl's configuration, prompts.py lays the prompts out in the order of the recipe,
launch.py runs `verl.trainer.main_ppo` and cleans up after it, export.py makes a Hugging Face folder of its checkpoint.
"""
