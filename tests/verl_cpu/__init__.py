"""What stock verl 0.9.1 needs to run on a CPU, for tests only.

`platform`: the accelerator's place (VERL_PLATFORM=cpu), loaded in every process by VERL_USE_EXTERNAL_MODULES.
`rollout`: token-by-token generation in place of vLLM, and verl's FSDP engine registered for the device "cpu".
`tokens`: what verl computed token by token is kept for comparison.
Nothing here touches rewards, advantages, losses, data order or checkpoints: those are verl's own.
"""
