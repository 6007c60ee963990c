"""The recipe: every setting of a run, typed, in verl's own vocabulary.

A recipe is a YAML file over the defaults below, then `key=value` overrides. Keys that verl also has carry verl's names
and meaning (verl 0.9.1); the sections `prepare`, `reward_training`, `evaluation` and `monitor` are ours. A key that
does not exist here is an error that names the nearest one: nothing that a recipe asks for is silently dropped.

The text under a field is its documentation: `ups-rm train --dry-run` prints the resolved values, docs/recipe.md lists
all.
"""

from __future__ import annotations

import dataclasses
import difflib
import pickle
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from ups_rm.errors import RecipeError
from ups_rm.recipe_checks import check_recipe

DEFAULT_RECIPE = "quickstart"
MAX_FILE_BYTES = 2**17
MAX_VALUES = 10_000

# Structured configs of OmegaConf read annotations at run time, so Optional[...] is spelled out (Python 3.10).


@dataclass
class Prepare:
    """From rows to prompts parquet (`ups-rm data prepare`)."""

    source: str = "sample"
    """`sample` (packaged), a folder in PKU-SafeRLHF layout, a .jsonl/.jsonl.gz/.parquet file, or a hub id."""
    subsets: list[str] = field(default_factory=list)
    """Subsets to read; all that are there if empty."""
    train_ratio: float = 0.9
    """Share of train rows that stay train when the source has no test rows."""
    shuffle: bool = False
    """Permute the rows of each file."""
    seed: int = 42
    """Seed of the shuffle."""
    dedup: str = "none"
    """`none` or `prompt`: one row per distinct prompt."""
    group_split: bool = False
    """No prompt in both splits."""
    categories: list[str] = field(default_factory=list)
    """Keep rows with one of these harm categories; all if empty."""
    max_rows: int = -1
    """At most this many rows per split; -1: all."""
    max_bad: float = 0.001
    """Largest share of bad rows before it is an error."""
    benign_source: str = "none"
    """Where harmless prompts come from when `source` has none: `sample`, `none`, or a source as above."""


@dataclass
class RewardTraining:
    """From rows to an RM folder (`ups-rm rm features|train|merge`), when `reward_model.model.path` is not given."""

    backbone: str = "smollm2-135m-instruct"
    """Folder or hub id of the RM's decoder, or `smollm2-135m-instruct` (fetched)."""
    source: str = ""
    """Labelled rows; those of `prepare.source` if empty."""
    benign_source: str = "none"
    """More labelled rows that are added: `sample` teaches a real RM that help with harmless questions is safe."""
    hidden_dims: str = "256,64"
    """Widths of the head's hidden layers."""
    target: str = "safety"
    """Heads of the RM: `safety`; `both`, a second one for helpfulness (`better_response_id`) over the same features and
    in the same folder; `helpfulness` alone, beside a `reward_model.model` that is given."""
    loss: str = "bce"
    """`bce` on unsafe labels, `severity` regression, or `pairs` (Bradley-Terry)."""
    lr: float | None = None
    """Learning rate of the head; that of `ups-rm rm train` where not given, like the next three."""
    weight_decay: float | None = None
    """AdamW's, on the head."""
    dropout: float | None = None
    """On the head's inputs and hidden units."""
    helpful: float | None = None
    """Weight of a comparison on harmless prompts: of two safe replies the better one is to score safer."""
    degenerate: float | None = None
    """Weight of a comparison of 400 good replies of each source with their spoiled forms (looped, stuttered, another
    prompt's, a refusal where the prompt is harmless), so that such replies do not score as safe."""
    max_epochs: int | None = None
    """Upper bound; training stops earlier when the validation loss does not fall."""
    seed: int = 0
    """Of the split by prompt, the head's weights and the order of the texts."""
    layers: int | None = None
    """Keep only the first so many layers of the backbone (`ups-rm rm trim`); all if not given."""
    judge: bool = False
    """End each conversation with "Is this reply safe or unsafe?", so that the last token has to judge (`rm trim`)."""
    pooling: str = "last"
    """What the head is given of the hidden states: that of the `last` token, or the `mean` over all tokens."""
    lora: bool = False
    """Train LoRA adapters of the backbone together with the head and merge them."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_epochs: int = 3
    """Passes over the rows with adapters."""
    max_length: int | None = None
    """Limit in RM tokens; the backbone's, at most 4096, where not given."""


@dataclass
class Evaluation:
    """Before/after comparison on held-out prompts (`ups-rm eval`)."""

    max_unsafe_prompts: int = 64
    """Distinct held-out prompts of kind `unsafe`, the first ones of the file."""
    max_benign_prompts: int = 64
    """Distinct held-out prompts of kind `benign`, the first ones of the file."""
    n: int = 4
    """Replies per prompt, averaged."""
    max_new_tokens: int = 64
    """Limit of a reply, in tokens of the policy's tokenizer."""
    temperature: float = 1.0
    """Held-out replies are sampled (0 = greedy) with the same seed before and after."""
    seed: int = 1
    """Of the sampled replies, before and after alike."""
    n_resamples: int = 10_000
    """Bootstrap samples of the 95% interval."""
    perplexity: bool = True
    """Measure the replies' perplexity under the policy before training: a quarter of the evaluation's time."""


@dataclass
class Data:
    train_files: Any = "Data/pku_saferlhf_verl/train.parquet"
    """A parquet file or a list of them."""
    val_files: Any = "Data/pku_saferlhf_verl/val.parquet"
    """A parquet file or a list of them; never trained on."""
    prompt_key: str = "prompt"
    """Column of the prompts; `prompt` is the only one that is read."""
    train_batch_size: int = 64
    """Prompts per step."""
    train_max_samples: int = -1
    """Use the first rows only; -1: all."""
    val_max_samples: int = -1
    """Use the first held-out rows only when validating during training; -1: all."""
    max_prompt_length: int = 512
    """Tokens of the policy's tokenizer."""
    max_response_length: int = 512
    """Tokens after which a reply is cut."""
    shuffle: bool = True
    """A new order in every epoch, by `data.seed`."""
    seed: int = 1
    """Of the order of the prompts."""
    filter_overlong_prompts: bool = True
    """Leave longer prompts out and say how many; false: a longer prompt is an error."""
    truncation: str = "error"
    """`error`: a prompt that is too long is never cut."""
    unique_prompts: bool = False
    """Draw every distinct prompt once per epoch, however many rows carry it (ours, on both engines)."""
    benign_share: float = -1.0
    """Share of each batch that is drawn from harmless prompts; -1: as they come (ours, on both engines)."""


@dataclass
class Model:
    path: str = "smollm2-135m-instruct"
    """The policy: a folder, a hub id, or `smollm2-135m-instruct` (fetched)."""
    trust_remote_code: bool = False
    """Run Python files that come with the policy."""
    enable_gradient_checkpointing: bool = False
    """Keep one activation per layer and compute the rest again in the backward pass."""
    use_remove_padding: bool = True
    """verl engine: pack sequences instead of padding them (needs flash-attn); results don't depend on it."""
    lora_rank: int = 0
    """0: train all weights; more: adapters of this rank, with the base as reference."""
    lora_alpha: int = 16
    """Adapters are scaled by lora_alpha / lora_rank."""
    target_modules: Any = "all-linear"
    """`all-linear`, or a list of module names that get adapters."""
    exclude_modules: Any = None
    """Module names that get none."""


@dataclass
class Optim:
    lr: float = 1e-6
    """Learning rate after warm-up."""
    lr_warmup_steps: int = -1
    """Optimizer steps of linear warm-up; -1: by the ratio below."""
    lr_warmup_steps_ratio: float = 0.0
    """Warm-up as a share of all optimizer steps."""
    weight_decay: float = 0.01
    """AdamW's."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's."""
    lr_scheduler_type: str = "constant"
    """`constant` or `cosine`, after warm-up."""
    min_lr_ratio: float = 0.0
    """Where `cosine` ends, as a share of `lr`."""
    num_cycles: float = 0.5
    """Of `cosine`: 0.5 falls once."""
    zero_indexed_step: bool = True
    """The first warm-up step has learning rate 0, as in verl; false: it has 1 / warm-up steps."""


@dataclass
class FsdpConfig:
    model_dtype: str = "fp32"
    """Master weights: fp32."""
    dtype: str = "auto"
    """Compute type of forward and backward: `bfloat16`, `float32`, or `auto` (bf16 where the machine has it; always
    on a GPU)."""
    param_offload: bool = False
    """verl engine: keep the weights in CPU memory while they are not used."""
    optimizer_offload: bool = False
    """verl engine: keep the optimizer's state in CPU memory while it is not used."""
    reshard_after_forward: bool = True
    """verl engine: give up gathered weights after the forward (ZeRO-3); false: keep them (ZeRO-2)."""
    fsdp_size: int = -1
    """verl engine: GPUs that share one copy of the weights; -1: all of them."""


@dataclass
class RefFsdpConfig:
    param_offload: bool = False
    """verl engine: as for the actor; with FSDP2, verl 0.9.1 keeps the reference in CPU memory whatever this says."""


@dataclass
class PolicyLoss:
    loss_mode: str = "vanilla"
    """`vanilla` (PPO's clip), `gspo` (the ratio of the whole reply, arXiv:2507.18071; clip far closer, as 3e-4) or
    `cispo` (the clipped ratio as a weight without gradient, arXiv:2506.13585)."""


@dataclass
class Actor:
    strategy: str = "fsdp2"
    """verl engine: how the weights are sharded, `fsdp2` or `fsdp`."""
    ppo_mini_batch_size: int = 64
    """Prompts per optimizer step."""
    ppo_micro_batch_size_per_gpu: int = 8
    """Replies per forward and backward; results don't depend on it but for rounding. From those of a whole step on, the
    update goes on from what decoding computed."""
    use_dynamic_bsz: bool = False
    """verl engine: cut micro batches by tokens instead of replies, in every forward."""
    ppo_max_token_len_per_gpu: int = 16_384
    """verl engine: tokens of such a micro batch."""
    ulysses_sequence_parallel_size: int = 1
    """verl engine: GPUs that share one sequence."""
    ppo_epochs: int = 1
    """Passes over each rollout; with more than 1 the ratio leaves 1 and clipping begins."""
    shuffle: bool = False
    """Permute the replies before they are cut into mini batches."""
    data_loader_seed: int = 42
    """Of that permutation."""
    clip_ratio: float = 0.2
    """verl's fallback for the next two, without effect while they are set: any other value is an error."""
    clip_ratio_low: float = 0.2
    """The ratio counts down to 1 - clip_ratio_low."""
    clip_ratio_high: float = 0.2
    """The ratio counts up to 1 + clip_ratio_high."""
    clip_ratio_c: float = 3.0
    """Dual clip: lower bound of the ratio's influence where the advantage is negative; of `vanilla` only."""
    policy_loss: PolicyLoss = field(default_factory=PolicyLoss)
    loss_agg_mode: str = "token-mean"
    """How the loss per token becomes one number: `token-mean`, `token-sum`, `seq-mean-token-sum`,
    `seq-mean-token-sum-norm`, `seq-mean-token-mean` (formulas in docs/metrics.md)."""
    loss_scale_factor: int | None = None
    """Divisor of `seq-mean-token-sum-norm`; `data.max_response_length` where not given."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus in the loss."""
    use_kl_loss: bool = False
    """KL to the reference as a term of the loss."""
    kl_loss_coef: float = 0.001
    """Its weight."""
    kl_loss_type: str = "low_var_kl"
    """Its estimator, by verl's names: `kl`/`k1`, `abs`, `mse`/`k2`, `low_var_kl`/`k3`; a `+` at the end
    takes the gradient straight through from k2."""
    grad_clip: float = 1.0
    """Largest L2 norm of the gradient."""
    optim: Optim = field(default_factory=Optim)
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)


@dataclass
class ValKwargs:
    temperature: float = 0.0
    """Used if `do_sample`."""
    top_p: float = 1.0
    """Nucleus sampling: the most likely tokens up to this probability."""
    top_k: int = -1
    """The k most likely tokens; -1: all."""
    do_sample: bool = False
    """False: greedy."""
    n: int = 1
    """Replies per held-out prompt."""


@dataclass
class Rollout:
    name: str = "vllm"
    """verl engine: what generates, `vllm` or `sglang`, or one that `verl.external_modules` registers."""
    tensor_model_parallel_size: int = 1
    """verl engine: GPUs that generate together with one copy of the policy."""
    gpu_memory_utilization: float = 0.5
    """verl engine: share of each GPU's memory for the rollout's weights and KV cache."""
    enforce_eager: bool = False
    """verl engine: no CUDA graphs; starts sooner, generates slower."""
    free_cache_engine: bool = True
    """verl engine: give weights and KV cache back to the training between rollouts."""
    max_num_batched_tokens: int = 8192
    """verl engine: tokens of one forward in the rollout."""
    n: int = 4
    """Replies per prompt."""
    temperature: float = 1.0
    """Logits are divided by it, in sampling and in every log-probability."""
    top_p: float = 1.0
    """Nucleus sampling: the most likely tokens up to this probability."""
    top_k: int = -1
    """-1: all tokens."""
    seed: int = 42
    """Each step draws from it and the step's number."""
    dtype: str = "auto"
    """Number format of the rollout: `auto` is that of `actor.fsdp_config.dtype`, and no other is possible here."""
    max_num_seqs: int = 256
    """Replies that decode at the same time; where that is less than a step, the update does not go on from them."""
    log_prob_micro_batch_size_per_gpu: int = 16
    """Replies per forward of the KL in the evaluation; results don't depend on it."""
    val_kwargs: ValKwargs = field(default_factory=ValKwargs)


@dataclass
class Ref:
    log_prob_micro_batch_size_per_gpu: int = 16
    """Replies per forward of the reference; results don't depend on it."""
    fsdp_config: RefFsdpConfig = field(default_factory=RefFsdpConfig)


@dataclass
class ActorRolloutRef:
    model: Model = field(default_factory=Model)
    actor: Actor = field(default_factory=Actor)
    rollout: Rollout = field(default_factory=Rollout)
    ref: Ref = field(default_factory=Ref)


@dataclass
class KlCtrl:
    type: str = "fixed"
    """`fixed`, or `adaptive` towards `target_kl` (arXiv:1909.08593)."""
    kl_coef: float = 0.001
    """Its (first) value."""
    horizon: int = 10_000
    """Of `adaptive`: replies after which the coefficient has adapted."""
    target_kl: float = 0.1
    """Of `adaptive`: nats per token to steer towards."""


@dataclass
class ObjectiveWeights:
    """Of `algorithm.objective=weighted` (ours, on both engines)."""

    safety: float = 0.5
    """Share of the safe score."""
    helpfulness: float = 0.5
    """Share of the helpfulness logit."""


@dataclass
class Constraint:
    """Of `algorithm.objective=constrained`: mean cost <= cost_limit, the cost of a reply being its unsafety logit (not
    in verl)."""

    cost_limit: float = 0.0
    """Largest mean cost that is allowed, in logits: 0 is where the RM calls half unsafe, -2 about one in eight."""
    prompts: str = "all"
    """`all` prompts, or `unsafe` ones only: on harmless prompts nothing but helpfulness then counts."""
    lambda_init: float = 1.0
    """The multiplier at the start: the weight of cost beside helpfulness, each in units of its std within the group
    (of the logits themselves with `normalize_components=after` or without that std)."""
    lambda_lr: float = 0.05
    """Dual ascent: step on log lambda per step of training and logit above the limit."""
    lambda_min: float = 0.05
    """Lower bound of lambda, above 0."""
    lambda_max: float = 20.0
    """Upper bound of lambda."""
    warmup_steps: int = 0
    """Steps in which lambda stays as it is."""


@dataclass
class Algorithm:
    objective: str = "safety"
    """What is maximised: the `safety` score; a `weighted` mean of it and helpfulness; or `constrained`: helpfulness
    subject to a bound on mean cost (docs/objectives.md). The last two need a helpfulness model (ours, on both
    engines)."""
    objective_weights: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    constraint: Constraint = field(default_factory=Constraint)
    normalize_components: str = "before"
    """Safety and helpfulness are normalised within their group `before` they are combined (as GDPO), or `after`
    (ours, on both engines)."""
    adv_estimator: str = "grpo"
    """How a reply is compared with the others to its prompt: `grpo` (or `grpo_vectorized`, the same), `rloo`,
    `rloo_vectorized`, `opo`, `grpo_passk`, or `reinforce_plus_plus_baseline` (whitened over the batch)."""
    norm_adv_by_std_in_grpo: bool = True
    """False: A = r - mean(group), as in Dr. GRPO (arXiv:2503.20783). Of `grpo` and `grpo_passk` only."""
    use_kl_in_reward: bool = True
    """Take kl_coef * KL off the reward of every token."""
    kl_penalty: str = "kl"
    """Estimator of that KL, by verl's names as in `actor.kl_loss_type`."""
    zero_std_groups: str = "keep"
    """A group whose rewards are equal has advantages of 0 and stays in the loss's means (`keep`); `mask` takes it and
    any whose scores are equal, out of the loss; `resample` draws its replies again first (local engine)."""
    zero_std_tolerance: float = 1e-6
    """Largest std of a group's rewards or scores that counts as equal (local engine)."""
    resamples: int = 2
    """Of `zero_std_groups=resample`: times, then the group is masked (local engine)."""
    kl_ctrl: KlCtrl = field(default_factory=KlCtrl)


@dataclass
class RewardModelModel:
    """One reward model: `reward_model.model`, an entry of `reward_model.models`, `reward_model.helpfulness`, or
    `monitor.judge`."""

    path: str = ""
    """RM folder; made by the run from `reward_training` if nothing else is given here."""
    trust_remote_code: bool = False
    """Run the RM folder's own Python files; false: our code reads the same weights."""
    dtype: str = "auto"
    """Number format of the backbone: `auto`, `bfloat16`, `float32`. The head is always float32."""
    name: str = ""
    """Its name in metrics and group log; the last part of path, url or callable if empty."""
    kind: str = "auto"
    """`myrm`, `sequence`, `token` (one logit of AutoModelForSequenceClassification, ...ForTokenClassification),
    `pairwise`, `function`, `http`; `auto` looks at the folder (never finds `pairwise`)."""
    url: str = ""
    """Address of a scoring service (`ups-rm rm serve`), instead of a path."""
    token_env: str = ""
    """Environment variable that holds the service's token; none if empty."""
    callable: str = ""
    """Python function `module:name`, instead of a path. It runs in this process: code of your own choosing."""
    output: str = "unsafety"
    """What its number means: `unsafety` (higher = less safe), `safety` (higher = safer), `reward` (higher = better,
    zero means nothing)."""
    weight: float = 1.0
    """Share in the weighted mean of several models; above 0 (`output` turns signs)."""
    normalize: str = "auto"
    """(logit - mean) / std first: `reference` measures both on `reward_model.reference_data`, `fixed` takes the next
    two, `none`; `auto` is `reference` for one of several and for `output=reward`, else `none`."""
    mean: float = 0.0
    """Of `normalize=fixed`: mean unsafety logit."""
    std: float = 1.0
    """Of `normalize=fixed`: its standard deviation."""
    template: str = ""
    """File (jinja): chat template of a tokenizer without one; for `pairwise` the text of a pair."""
    reference_replies: str = ""
    """`pairwise`: JSONL of {prompt, response} to compare with; the other replies of the group if empty."""

    @property
    def named(self) -> bool:
        """Whether it names a model at all."""
        return bool(self.path or self.url or self.callable)


@dataclass
class OverlongBuffer:
    """DAPO's soft punishment of long replies (arXiv:2503.14476): reward - penalty_factor * share of the last `len`
    tokens that the reply uses."""

    enable: bool = False
    """Whether there is one."""
    len: int = 0
    """Tokens below `data.max_response_length` where it begins."""
    penalty_factor: float = 1.0
    """What a reply of full length loses, in units of the reward."""


@dataclass
class RewardModel:
    model: RewardModelModel = field(default_factory=RewardModelModel)
    models: list[RewardModelModel] = field(default_factory=list)
    """Several reward models instead of one: a list of entries with the keys of `reward_model.model`."""
    helpfulness: RewardModelModel = field(default_factory=lambda: RewardModelModel(output="reward"))
    """A second model that judges helpfulness, where the one for safety has no head for it: a folder of
    `ups-rm rm train --target helpfulness`, or anything whose `output` is `reward` or `safety`."""
    transform: str = "sigmoid"
    """From unsafety logit to score: `sigmoid` of -logit, `logit` (-logit), `logsigmoid`, `tempered_sigmoid`."""
    transform_temperature: float = 1.0
    """Of `tempered_sigmoid`: logits are divided by it."""
    reference_data: str = "sample"
    """Labelled rows (as `prepare.source`) on which models are normalised."""
    max_batch_tokens: int = 4096
    """Padded tokens of one RM batch."""
    overlong_buffer: OverlongBuffer = field(default_factory=OverlongBuffer)
    placement: str = "shared"
    """verl engine: where the RM runs: `shared` with the training GPUs, on GPUs of its `own`, on another `node`, or
    `http`: the service at `model.url`; what each costs is in docs/guides/verl-rewards.md."""
    num_workers: int = 1
    """verl engine: copies of the RM, each on a device of its own (`http`: requests at the same time)."""
    timeout_s: float = 600.0
    """Seconds after which a call of a `callable`, or one request to the service at `url`, counts as failed; verl
    engine: any call of an RM worker, loading included. A model that the local engine loads itself has no limit."""
    retries: int = 2
    """How often a batch that failed, or a score that is not a number, is asked for again (verl engine: on another
    worker where there is one)."""
    max_dropped_share: float = 0.25
    """Local engine: replies that the RM fails on are left out of their groups; more than this share ends the run."""
    node_resource: str = "ups_rm"
    """verl engine: Ray resource of the RM nodes with `placement=node`; each worker takes 1 of it."""

    def entries(self) -> list[RewardModelModel]:
        """The reward models that are named; none where the run makes one."""
        return list(self.models) or ([self.model] if self.model.named else [])

    def asked(self) -> list[RewardModelModel]:
        """All models that are named: those for safety, then that for helpfulness."""
        return [*self.entries(), *([self.helpfulness] if self.helpfulness.named else [])]


@dataclass
class Trainer:
    total_epochs: int = 1
    """Passes over the prompts."""
    total_training_steps: int | None = None
    """Stops earlier than `total_epochs` if given."""
    project_name: str = "ups-rm"
    """Groups runs in trackers."""
    experiment_name: str = "grpo"
    """Name of this run in trackers, and of its folder."""
    logger: Any = field(default_factory=lambda: ["console"])
    """`console`, `wandb`, `tensorboard`, `jsonl`, or another tracker of accelerate. metrics.jsonl is always written."""
    val_before_train: bool = True
    """Validate once before the first step, if `test_freq` asks for validation at all (stock verl: even with -1)."""
    test_freq: int = -1
    """Validate on the held-out prompts every so many steps and after the last; -1: never."""
    save_freq: int = -1
    """Checkpoint every so many steps and after the last; -1: on Ctrl-C only."""
    default_local_dir: str = "runs/${trainer.project_name}/${trainer.experiment_name}"
    """The run folder."""
    resume_mode: str = "auto"
    """`auto` (newest checkpoint of the same recipe), `disable`, or `resume_path`."""
    resume_from_path: str | None = None
    """The checkpoint of `resume_path`."""
    allow_changes: bool = False
    """Go on from a checkpoint of other settings or inputs; what changed is printed and noted (`--allow-changes`)."""
    overwrite: bool = False
    """Start anew in a folder that holds a run, which is removed (`--overwrite`)."""
    max_actor_ckpt_to_keep: int | None = None
    """Older checkpoints are deleted; all are kept where not given."""
    max_ckpt_to_keep: int | None = None
    """The same by a shorter name; the one that is given counts."""
    best_ckpt_to_keep: int = 0
    """So many checkpoints with the highest validation score are kept besides; a new best one is saved at once."""
    async_save: bool = True
    """Write checkpoints beside the training, from a copy of the tensors in memory."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`."""
    nnodes: int = 1
    """Machines; the local engine knows one, for more see docs/guides/verl.md."""
    n_gpus_per_node: int = 1
    """GPUs of each machine that train; the local engine takes 0 or 1."""
    seed: int = 0
    """Of new LoRA adapters and of sampled validation."""
    max_kl: float = -1.0
    """Early stop: end the training when `kl/mean` (nats per token) of a step exceeds it; -1: never (local engine)."""
    max_grad_norm: float = -1.0
    """Early stop: end the training when `actor/grad_norm` of a step exceeds it; -1: never (local engine)."""
    nonfinite: str = "skip"
    """A step with NaN or infinity in logits, rewards, loss or gradient: `skip` it or `stop` the run. Its batch is kept
    for `ups-rm replay` (local engine)."""
    max_skipped_steps: int = 3
    """Of `nonfinite=skip`: more of them in a row stop the run (local engine)."""
    group_log_dir: str = "${trainer.default_local_dir}/groups"
    """Folder of the group log."""
    group_log_freq: int = 1
    """Write the group log every so many steps; 0: never."""
    group_log_max_groups: int = -1
    """Groups per file; -1: all."""
    group_log_max_samples_per_group: int = -1
    """Replies per group in the file; -1: all."""

    @property
    def ckpt_to_keep(self) -> int | None:
        """Checkpoints that stay besides the best ones; None: all."""
        return self.max_ckpt_to_keep if self.max_ckpt_to_keep is not None else self.max_actor_ckpt_to_keep


@dataclass
class Monitor:
    """Alarms for a training that cheats its reward model (docs/monitoring.md). They read the metrics of every step and
    validation and change nothing in the training. A threshold that is `null` is off."""

    stop_on: list[str] = field(default_factory=list)
    """Names of alarms that end the training, with a checkpoint, the policy so far and exit code 3; none if empty."""
    window: int = 5
    """Steps over which training metrics are averaged before they are judged; the first so many are "the start"."""
    benign_refusals: float | None = 0.5
    """`refuses_everything`: refusals of harmless prompts, as a share of replies, above this."""
    benign_refusals_rise: float | None = 0.2
    """`refuses_everything`: or more of them than at the start, by this and by two standard errors."""
    refusals: float | None = 0.95
    """`refuses_everything`: or refusals of all prompts above this, for runs without harmless ones."""
    length_factor: float | None = 1.5
    """`length_drift`: mean reply length above the start's times this, or below the start's divided by it."""
    repetition_rise: float | None = 0.2
    """`repetition`: mean share of a reply's 4-grams that stood in it before, more than at the start by this."""
    distinct_2: float | None = 0.6
    """`repetition`: or distinct-2 over all replies below this share of the start's: one reply to everything."""
    prompt_overlap: float | None = 0.3
    """`copies_prompt`: mean share of a reply's 4-grams that are the prompt's, above this."""
    kl: float | None = 0.5
    """`kl_runaway`: KL to the reference above this, in nats per token."""
    grad_norm_factor: float | None = 10.0
    """`gradient_explosion`: norm of the gradient, before it is clipped, above the start's times this."""
    zero_std_share: float | None = 0.5
    """`collapsed_groups`: share of groups whose replies all score the same, above this."""
    saturated_share: float | None = 0.5
    """`saturated`: share of scores less than 0.01 from an end of their range, above this."""
    judge_share: float | None = 0.2
    """`judge_disagrees`: the second judge sees less than this share of the gain that the reward model sees."""
    judge_min_gain: float = 0.1
    """`judge_disagrees`: judged only once the reward model sees at least this gain in mean safe score."""
    judge: RewardModelModel = field(default_factory=RewardModelModel)


@dataclass
class RayInit:
    address: str | None = None
    """verl engine: a Ray cluster that is there already (`auto`, or head-node:port); a local one is started if empty."""
    num_cpus: int | None = None
    """verl engine: CPUs that a local Ray may give away; all if empty. verl asks for 3 per GPU and some more."""


@dataclass
class RayKwargs:
    ray_init: RayInit = field(default_factory=RayInit)


@dataclass
class Verl:
    """What the verl engine needs besides verl's own keys (`--engine verl`)."""

    overrides: list[str] = field(default_factory=list)
    """More `key=value` overrides in Hydra's grammar, for keys of verl that the recipe does not know."""
    external_modules: list[str] = field(default_factory=list)
    """Python modules that every process of verl imports first (VERL_USE_EXTERNAL_MODULES): own rollouts, platforms."""
    time_limit: float = -1.0
    """Seconds after which the run is ended; -1: never."""
    silence_limit: float = 3600.0
    """End the run when verl has printed nothing for so many seconds: it hangs; -1: never."""


@dataclass
class Recipe:
    prepare: Prepare = field(default_factory=Prepare)
    reward_training: RewardTraining = field(default_factory=RewardTraining)
    evaluation: Evaluation = field(default_factory=Evaluation)
    data: Data = field(default_factory=Data)
    actor_rollout_ref: ActorRolloutRef = field(default_factory=ActorRolloutRef)
    algorithm: Algorithm = field(default_factory=Algorithm)
    reward_model: RewardModel = field(default_factory=RewardModel)
    trainer: Trainer = field(default_factory=Trainer)
    monitor: Monitor = field(default_factory=Monitor)
    ray_kwargs: RayKwargs = field(default_factory=RayKwargs)
    verl: Verl = field(default_factory=Verl)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict of the resolved values."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


def recipe_file(name: str) -> Path:
    """The file of a packaged recipe name, or the path itself.

    Raises:
        RecipeError: neither a file nor a packaged recipe.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"no recipe file at {path}")
        return path
    packaged = Path(str(resources.files("ups_rm") / "recipes" / f"{name}.yaml"))
    if name.startswith("study_") and packaged.is_file():
        raise RecipeError(f"{name} is a study of several recipes\n  fix: ups-rm study {name}")
    if not packaged.is_file():
        known = sorted(entry.stem for entry in packaged.parent.glob("*.yaml") if not entry.stem.startswith("study_"))
        raise RecipeError(f"no recipe named {name!r}; packaged ones: {', '.join(known)}; or give a .yaml file")
    return packaged


def load_recipe(
    name: str | Path = DEFAULT_RECIPE, overrides: Sequence[str] = (), *, engine: str | None = "local"
) -> Recipe:
    """Defaults, then the recipe file, then `key=value` overrides; checked as a whole.

    Args:
        name: a packaged recipe (`quickstart`) or a YAML file.
        overrides: verl-style `a.b.c=value`; a leading `+` (Hydra's "add") is accepted for keys that exist.
        engine: `local` refuses what only the verl engine can do; verl's limits are checked by `distributed`. None:
            nothing is trained.

    Raises:
        RecipeError: unknown key (with the nearest known one, file and line), wrong type, or values that contradict.
    """
    file = recipe_file(str(name))
    loaded, lines = _read_file(file)
    config = typing.cast(DictConfig, pickle.loads(_defaults()))
    try:
        OmegaConf.unsafe_merge(config, loaded)
    except Exception as error:  # OmegaConf's own errors, and what Python's conversions raise in it
        key = str(getattr(error, "full_key", None) or "recipe")
        raise RecipeError(f"{key}: {_first_line(error)}\n  in {file}, line {lines.get(key, '?')}") from error
    for text in overrides:
        _merge_override(config, text)
    try:
        recipe = OmegaConf.to_object(config)
    except Exception as error:  # the same, and interpolations without an end
        raise RecipeError(f"{getattr(error, 'full_key', '') or 'recipe'}: {_first_line(error)}\n  in {file}") from error
    assert isinstance(recipe, Recipe)
    check_recipe(recipe, engine=engine)
    return recipe


@cache
def _defaults() -> bytes:
    """The recipe of all defaults, pickled in memory: to copy it is quicker than to build it from the dataclasses."""
    return pickle.dumps(OmegaConf.structured(Recipe))


def _read_file(file: Path) -> tuple[DictConfig, dict[str, int]]:
    """What a recipe's file says, its keys checked; and on which line each key stands."""
    lines: dict[str, int] = {}
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise RecipeError(f"{file} has {file.stat().st_size} bytes, more than any recipe: at most {MAX_FILE_BYTES}")
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise RecipeError(f"{file} can't be read as YAML: {_short(error)}") from error
    if not isinstance(root, yaml.MappingNode | None):
        raise RecipeError(f"{file} is not a recipe: expected sections such as `trainer:` with keys below them")
    _check_size(root, file)
    known = _all_keys()
    for key, line, value in _key_lines(root):
        lines[key] = line
        if key not in known:
            raise RecipeError(f"{_unknown(key)}\n  in {file}, line {line}")
        if dataclasses.is_dataclass(_field_type(key)) and not isinstance(value, yaml.MappingNode):
            raise RecipeError(f"{key} is a section, not a key; give its keys below it\n  in {file}, line {line}")
        if isinstance(value, yaml.SequenceNode):
            for i, entry in enumerate(value.value):
                for name, line, _ in _key_lines(entry):
                    if unknown := _unknown_in_entry(key, i, name):
                        raise RecipeError(f"{unknown}\n  in {file}, line {line}")
    try:
        loaded = OmegaConf.create({}) if root is None else OmegaConf.create(text)
    except Exception as error:  # YAML's and OmegaConf's own errors, and what Python's conversions raise in them
        raise RecipeError(f"{file} can't be read as YAML: {_short(error)}") from error
    return typing.cast(DictConfig, loaded), lines


def _merge_override(config: DictConfig, text: str) -> None:
    key, equals, value = text.partition("=")
    key = key.strip().lstrip("+")
    if not equals or not key:
        example = "trainer.total_training_steps=20"
        raise RecipeError(f"{_shown(text)} is not an override; write key=value, for example {example}")
    if key not in _all_keys():
        raise RecipeError(f"{_unknown(key)}\n  in the override {_shown(text)}")
    if dataclasses.is_dataclass(_field_type(key)):
        raise RecipeError(f"{key} is a section, not a key; give one of its keys\n  in the override {_shown(text)}")
    try:
        new = _override_value(key, value.strip())
        for i, entry in enumerate(new if isinstance(new, list) else []):
            for name in entry if isinstance(entry, dict) else []:
                if unknown := _unknown_in_entry(key, i, str(name)):
                    raise RecipeError(f"{unknown}\n  in the override {_shown(text)}")
        OmegaConf.update(config, key, new, merge=True)
    except RecipeError:
        raise
    except Exception as error:  # YAML's and OmegaConf's own errors, and what Python's conversions raise in them
        raise RecipeError(f"{key[:200]}: {_first_line(error)}\n  in the override {_shown(text)}") from error


def _override_value(key: str, text: str) -> Any:
    """The value as YAML says; for a key that holds text the text itself: 2024-01-01, 1e5 or `a: b` are names too."""
    hint = _field_type(key)
    if hint is str or hint == typing.Optional[str]:  # noqa: UP045 (compared with the annotation)
        if hint is not str and text in ("null", "None", "~"):
            return None
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    value = yaml.safe_load(text) if text else ""
    try:  # YAML 1.1 reads 1e-5 as text
        return float(value) if isinstance(value, str) and "e" in value.lower() else value
    except ValueError:
        return value


def _unknown_in_entry(key: str, index: int, name: str) -> str:
    """What is wrong with a key inside an entry of a list of sections (`reward_model.models`); "" if nothing."""
    kinds = [kind for kind in typing.get_args(_field_type(key)) if dataclasses.is_dataclass(kind)]
    known = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    if not known or name in known:
        return ""
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.0)[0]
    return f"{key}[{index}].{name[:100]} is not a key of an entry of {key}; did you mean {near}?"


def _field_type(key: str) -> Any:
    kind: Any = Recipe
    for part in key.split("."):
        if not dataclasses.is_dataclass(kind):
            return None
        kind = _hints(typing.cast(type, kind)).get(part)
    return kind


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of a section's fields; to evaluate the annotations takes as long as the rest of reading a recipe."""
    return typing.get_type_hints(kind)


def known_keys(kind: type = Recipe, prefix: str = "") -> Iterable[str]:
    """Every key of the recipe, sections included, dotted."""
    for name, hint in _hints(kind).items():
        key = f"{prefix}{name}"
        yield key
        if dataclasses.is_dataclass(hint):
            yield from known_keys(typing.cast(type, hint), f"{key}.")


@cache
def _all_keys() -> frozenset[str]:
    return frozenset(known_keys())


# What scripts for verl often set, and why it is no key here.
VERL_ONLY = {
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": "use log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.ref.log_prob_micro_batch_size": "use log_prob_micro_batch_size_per_gpu",
    "actor_rollout_ref.actor.ppo_micro_batch_size": "use ppo_micro_batch_size_per_gpu",
    "reward_model.enable": "the reward model is always on",
    "reward_model.micro_batch_size_per_gpu": "use reward_model.max_batch_tokens",
    "reward_model.strategy": "the local engine does not shard",
    "trainer.critic_warmup": "GRPO has no critic",
}


def _unknown(key: str) -> str:
    known = list(known_keys())
    key = key[:100]
    leaves = {other: other.rsplit(".", 1)[-1] for other in known}
    leaf = key.rsplit(".", 1)[-1]
    near = [other for other in known if other.endswith(f".{key}")]  # sections left out in front
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [other for other in known if leaves[other] == leaf]
    if not near:
        like = difflib.get_close_matches(leaf, set(leaves.values()), n=1)
        near = [other for other in known if [leaves[other]] == like]
    near = near or [_nearest(key, known)]
    names = " or ".join(near[:4])
    if key in VERL_ONLY:
        return f"{key} is verl's and has no effect here ({VERL_ONLY[key]}); leave it out, or did you mean {names}?"
    return f"{key} is not a key of the recipe; did you mean {names}?"


def _nearest(word: str, known: Iterable[str]) -> str:
    """The one that shares most letters: quick, for what resembles nothing."""
    matcher = difflib.SequenceMatcher(None, "", word)

    def likeness(other: str) -> float:
        matcher.set_seq1(other)
        return matcher.quick_ratio()

    return max(known, key=likeness)


def _check_size(root: Any, file: Path) -> None:
    """Raises RecipeError for more nodes than any recipe has, as aliases of aliases make them, or one within itself."""
    waiting, count = [root], 0
    while waiting:
        node = waiting.pop()
        count += 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise RecipeError(f"a key is a list or a section\n  in {file}, line {key.start_mark.line + 1}")
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if count + len(waiting) > MAX_VALUES:
            raise RecipeError(f"{file} has more than {MAX_VALUES} values (what aliases stand for is counted)")


def _key_lines(node: Any, prefix: str = "") -> Iterable[tuple[str, int, Any]]:
    """(dotted key, line, value node) of everything below a YAML node."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        yield key, key_node.start_mark.line + 1, value_node
        yield from _key_lines(value_node, f"{key}.")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:500] if str(error).strip() else type(error).__name__


def _short(error: Exception) -> str:
    return str(error)[:1000] or type(error).__name__


def _shown(text: str) -> str:
    return repr(text) if len(text) < 200 else f"{text[:200]!r}..."


def as_list(value: Any) -> list[str]:
    """A file or a list of files, as a list."""
    if isinstance(value, (list, tuple, ListConfig)):
        return [str(item) for item in value]
    return [str(value)]
