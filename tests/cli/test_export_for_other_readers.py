"""What safetensors, llama.cpp and vLLM want of a Llama folder, as tables, and exports of every shape held against them.

llama.cpp and vLLM do not run here. Their expectations were read in their sources, which each table names:

    llama.cpp   ggml-org/llama.cpp at 0c1e57098, the copy inside PyPI's llama-cpp-python 0.3.36
    vLLM        vllm-project/vllm 0.33.0 at 4ba787ec9, PyPI's wheel
    gguf        llama.cpp's own package for its converter, PyPI 0.19.0: this one does run here

What both made of these exports when they were run by hand: docs/checkpoints.md, "Other readers".
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from gguf.utility import SafetensorsLocal
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_ledom.convert.hf import ExportOptions, export_checkpoint
from megatron_ledom.convert.tokenizer_files import write_tokenizer
from megatron_ledom.data.tokenizers import load_tokenizer
from megatron_ledom.testing import english_documents

SHAPES = ("mha", "gqa_padded", "mqa", "tied", "wide_heads", "rope_llama3", "rope_linear", "bfloat16")
SEVERAL_FILES = "several_files"
INDEX = "model.safetensors.index.json"


class Field(NamedTuple):
    """Entries of config.json that a reader takes: their names, what it can use, where it reads them."""

    names: tuple[str, ...]
    is_usable: Callable[[Any], bool]
    source: str


def is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def is_positive(value: Any) -> bool:
    return type(value) is float and value > 0


def is_rope(value: Any) -> bool:
    """The kinds that both readers compute, each with its numbers as JSON floats.

    vLLM: model_executor/layers/rotary_embedding/__init__.py get_rope; linear_scaling_rope.py takes
    an int for a list of factors. llama.cpp: conversion/base.py TextModel.set_gguf_parameters
    (linear), conversion/llama.py LlamaModel.generate_extra_tensors (llama3).
    """
    numbers = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }.get(value.get("rope_type"))
    if numbers is None or not all(is_positive(value.get(name)) for name in ("rope_theta", *numbers)):
        return False
    return value["rope_type"] != "llama3" or is_count(value.get("original_max_position_embeddings"))


COUNTS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")

LLAMA_CPP_FIELDS = (
    Field(("architectures",), lambda v: v[:1] == ["LlamaForCausalLM"], "conversion/base.py get_model_architecture"),
    Field((*COUNTS, "max_position_embeddings"), is_count, "conversion/base.py TextModel.set_gguf_parameters"),
    Field(("rms_norm_eps",), is_positive, "conversion/base.py TextModel.set_gguf_parameters"),
    Field(("rope_parameters",), is_rope, "conversion/base.py TextModel.__init__"),
    Field(("vocab_size",), is_count, "conversion/llama.py LlamaModel.set_gguf_parameters"),
    Field(("head_dim",), lambda v: is_count(v) and v % 2 == 0, "conversion/llama.py LlamaModel.set_gguf_parameters"),
    Field(("eos_token_id",), lambda v: type(v) is int, "gguf-py/gguf/vocab.py SpecialVocab._try_load_from_config_json"),
)
LLAMA_CPP_ABSENT = (
    # their presence makes the converter take the folder for another kind of model
    *("text_config", "llm_config", "lm_config", "language_config"),  # conversion/base.py ModelBase.load_hparams
    *("draft_vocab_size", "transformer_layer_config"),  # conversion/llama.py LlamaModel.__init__, index_tensors
    *("num_local_experts", "num_experts", "partial_rotary_factor"),  # conversion/base.py TextModel
    "quantization_config",  # conversion/base.py ModelBase.dequant_model
)

VLLM_FIELDS = (
    Field(("architectures",), lambda v: "LlamaForCausalLM" in v, "models/registry.py _TEXT_GENERATION_MODELS"),
    Field(("model_type",), lambda v: v == "llama", "transformers_utils/config.py get_config"),
    Field(("hidden_act",), lambda v: v == "silu", "models/llama.py LlamaMLP.__init__"),
    Field((*COUNTS, "head_dim", "vocab_size"), is_count, "models/llama.py __init__ of its classes"),
    Field(("max_position_embeddings",), is_count, "model_arch_config_convertor.py derive_max_model_len_and_key"),
    Field(("rms_norm_eps",), is_positive, "models/llama.py LlamaDecoderLayer.__init__"),
    Field(("rope_parameters",), is_rope, "models/llama.py LlamaAttention._init_rotary_emb"),
    Field(("tie_word_embeddings",), lambda v: type(v) is bool, "models/llama.py LlamaForCausalLM.__init__"),
    # no bias is exported
    Field(("attention_bias", "mlp_bias"), lambda v: v is False, "models/llama.py LlamaDecoderLayer.__init__"),
    Field(("dtype",), lambda v: hasattr(torch, v), "model_arch_config_convertor.py get_torch_dtype"),
)
VLLM_ABSENT = (
    *("bias", "qkv_bias", "is_causal", "layer_types", "sliding_window", "logit_scale"),  # models/llama.py
    *("quantization_config", "compression_config"),  # model_arch_config_convertor.py _normalize_quantization_config
    *("model_max_length", "max_seq_len", "seq_length"),  # model_arch_config_convertor.py: would beat max_position_...
    "auto_map",  # transformers_utils/config.py: code of the folder's own
)

# vllm/model_executor/models/llama.py LlamaModel.hf_to_vllm_mapper: exported name -> fused parameter and part of it
VLLM_STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


def vllm_parameters(config: dict[str, Any]) -> dict[tuple[str, Any], tuple[int, ...]]:
    """Shape of every (parameter, part) of vLLM's Llama; a part is None where nothing is fused.

    Source: models/llama.py, layers/linear.py QKVParallelLinear and MergedColumnParallelLinear,
    layers/vocab_parallel_embedding.py weight_loader. A tied head is an alias, and not loaded:
    models/utils.py AutoWeightsLoader.
    """
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    table: dict[tuple[str, Any], tuple[int, ...]] = {
        ("model.embed_tokens.weight", None): (config["vocab_size"], hidden),
        ("model.norm.weight", None): (hidden,),
    }
    if not config["tie_word_embeddings"]:
        table["lm_head.weight", None] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        table |= {
            (f"{layer}.input_layernorm.weight", None): (hidden,),
            (f"{layer}.self_attn.qkv_proj.weight", "q"): (queries, hidden),
            (f"{layer}.self_attn.qkv_proj.weight", "k"): (keys, hidden),
            (f"{layer}.self_attn.qkv_proj.weight", "v"): (keys, hidden),
            (f"{layer}.self_attn.o_proj.weight", None): (hidden, queries),
            (f"{layer}.post_attention_layernorm.weight", None): (hidden,),
            (f"{layer}.mlp.gate_up_proj.weight", 0): (ffn, hidden),
            (f"{layer}.mlp.gate_up_proj.weight", 1): (ffn, hidden),
            (f"{layer}.mlp.down_proj.weight", None): (hidden, ffn),
        }
    return table


def llama_cpp_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape (rows first) of every tensor that llama.cpp's engine asks a GGUF file of a Llama for.

    Source: src/models/llama.cpp load_arch_tensors, src/llama-model.cpp create_tensor_qkv. Where
    `output` is absent the engine uses the embedding without a word: right only for a tied model.
    """
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    table: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config["vocab_size"], hidden),
        "output_norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        table["output.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        table |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (queries, hidden),
            f"blk.{i}.attn_k.weight": (keys, hidden),
            f"blk.{i}.attn_v.weight": (keys, hidden),
            f"blk.{i}.attn_output.weight": (hidden, queries),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.ffn_gate.weight": (ffn, hidden),
            f"blk.{i}.ffn_up.weight": (ffn, hidden),
            f"blk.{i}.ffn_down.weight": (hidden, ffn),
        }
    return table


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def field_problems(folder: Path, fields: Iterable[Field], absent: Iterable[str]) -> list[str]:
    """Look at the file itself and at what transformers, through which both readers load it, makes of it."""
    problems = []
    for view, config in (
        ("config.json", read_json(folder / "config.json")),
        ("AutoConfig", AutoConfig.from_pretrained(folder).to_dict()),
    ):
        for name, is_usable, source in ((name, *field[1:]) for field in fields for name in field.names):
            if name not in config:
                problems.append(f"{view} has no {name} ({source})")
            elif not is_usable(config[name]):
                problems.append(f"{view} has {name}={config[name]!r} ({source})")
        problems += [f"{view} has {name}={config[name]!r}" for name in absent if name in config]
    return problems


def shape_problems(found: dict[Any, tuple[int, ...]], wanted: dict[Any, tuple[int, ...]], reader: str) -> list[str]:
    return [
        *(f"{reader} wants {name}, which nothing becomes" for name in wanted if name not in found),
        *(f"{reader} has no place for {name}" for name in found if name not in wanted),
        *(
            f"{reader} wants {name} of shape {wanted[name]}, found {shape}"
            for name, shape in found.items()
            if name in wanted and shape != wanted[name]
        ),
    ]


def shapes_in(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, read by llama.cpp's reader of safetensors (gguf-py/gguf/utility.py)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with SafetensorsLocal(path) as part:
            shapes |= {name: tensor.shape for name, tensor in part.items()}
    return shapes


def llama_cpp_files(folder: Path) -> list[Path]:
    """Source: conversion/base.py ModelBase.index_tensors, get_model_part_names."""
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
    return sorted(path for path in folder.iterdir() if path.name.startswith("model") and path.suffix == ".safetensors")


def llama_cpp_problems(folder: Path) -> list[str]:
    """Everything for which `convert_hf_to_gguf.py`, or the engine afterwards, would refuse or misread a folder."""
    config, files = read_json(folder / "config.json"), llama_cpp_files(folder)
    problems = field_problems(folder, LLAMA_CPP_FIELDS, LLAMA_CPP_ABSENT)
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        return [*problems, f"llama.cpp misses files of weights: {missing or 'there is none'}"]
    shapes = shapes_in(files)
    if (folder / INDEX).is_file() and set(read_json(folder / INDEX)["weight_map"]) != set(shapes):
        problems.append("llama.cpp finds other tensors in the files than in the index")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found = {}
    for name, shape in shapes.items():
        known = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            problems.append(f"llama.cpp can not map tensor {name}")
        else:
            found[known] = shape
        # conversion/llama.py LlamaModel.permute: rows as [heads, 2, half a head]
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(
            name.split(".")[-2], 0
        )
        if heads and shape[0] % (2 * heads):
            problems.append(f"llama.cpp cannot permute {name}: {shape[0]} rows, {heads} heads")
    return problems + shape_problems(found, llama_cpp_tensors(config), "llama.cpp") + llama_cpp_tokenizer(folder)


def llama_cpp_tokenizer(folder: Path) -> list[str]:
    """Source: conversion/llama.py LlamaModel.set_vocab and what it calls in conversion/base.py.

    Which BPE pre-tokenizers the converter knows is not held here: get_vocab_base_pre has a list
    of hashes over ids, so that no tokenizer of one's own is on it.
    """
    config, theirs = read_json(folder / "config.json"), AutoTokenizer.from_pretrained(folder)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=config["vocab_size"])
    problems = []
    if max(theirs.get_vocab().values()) >= config["vocab_size"]:  # base.py TextModel.get_vocab_base asserts it
        problems.append("llama.cpp: ids of the tokenizer lie beyond vocab_size")
    if special.special_token_ids.get("eos") != config["eos_token_id"]:  # where generation stops
        problems.append(f"llama.cpp takes {special.special_token_ids} for the special ids")
    if not special.merges and not (folder / "tokenizer.model").is_file():
        problems.append("llama.cpp finds no merges and no SentencePiece model")
    # src/llama-vocab.cpp llama_vocab::impl::load: a SentencePiece vocabulary gets both unless the file says no
    is_sentencepiece = (folder / "tokenizer.model").is_file()
    adds_bos = special.add_special_token.get("bos", is_sentencepiece)
    if adds_bos != (theirs("a")["input_ids"] != theirs("a", add_special_tokens=False)["input_ids"]):
        problems.append(f"llama.cpp {'adds a' if adds_bos else 'adds no'} first id, transformers does not agree")
    adds_space = read_json(folder / "tokenizer_config.json").get("add_prefix_space", is_sentencepiece)
    if is_sentencepiece and adds_space != (theirs.tokenize("a") != ["a"]):
        problems.append(f"llama.cpp {'adds a' if adds_space else 'adds no'} first space, transformers does not agree")
    return problems


def vllm_files(folder: Path) -> list[Path]:
    """Source: model_loader/default_loader.py _prepare_weights, weight_utils.py filter_duplicate_safetensors_files."""
    if (folder / INDEX).is_file():  # then what it does not name is not loaded
        return sorted({folder / name for name in read_json(folder / INDEX)["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


def vllm_problems(folder: Path) -> list[str]:
    """Everything for which vLLM would refuse or misread a folder."""
    config = read_json(folder / "config.json")
    problems = field_problems(folder, VLLM_FIELDS, VLLM_ABSENT)
    if list(folder.glob("consolidated*.safetensors")):  # default_loader.py: these win, and mean Mistral's format
        problems.append("vLLM takes the folder for Mistral's format")
    found: dict[tuple[str, Any], tuple[int, ...]] = {}
    files = vllm_files(folder)
    if lost := {path.name for path in files if not path.is_file()}:
        return [*problems, f"vLLM misses {lost}"]
    for path in files:
        for name, shape in shapes_in([path]).items():
            stacked = next((part for part in VLLM_STACKED if f"{part}." in name), None)
            fused, part = VLLM_STACKED.get(stacked or "", ("", None))
            place = (name.replace(f"{stacked}.", f"{fused}.") if stacked else name, part)
            if place in found:
                problems.append(f"vLLM loads {name} twice")
            found[place] = shape
    if config["num_attention_heads"] % config["num_key_value_heads"]:  # config/model.py, layers/attention
        problems.append("vLLM: query heads do not share key heads evenly")
    generation = GenerationConfig.from_pretrained(folder)  # config/model.py try_get_generation_config
    if generation.eos_token_id != config["eos_token_id"]:
        problems.append(f"vLLM: generation_config.json ends at {generation.eos_token_id}")
    sampling = set(read_json(folder / "generation_config.json")) - {"bos_token_id", "eos_token_id", "pad_token_id"}
    if sampling:  # config/model.py get_diff_sampling_param: they become the server's defaults
        problems.append(f"vLLM would sample by {sampling}")
    return problems + shape_problems(found, vllm_parameters(config), "vLLM")


def make_export(cases: Path, name: str, output: Path) -> Path:
    source, size = ("gqa_padded", 60_000) if name == SEVERAL_FILES else (name, 10**9)
    export_checkpoint(cases / source, output, options=ExportOptions(parity=False, max_shard_bytes=size))
    return output


@pytest.fixture(scope="module")
def exports(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {name: make_export(cases, name, root / name) for name in (*SHAPES, SEVERAL_FILES)}


@pytest.mark.parametrize("name", [*SHAPES, SEVERAL_FILES])
def test_safetensors_reads_every_tensor_of_the_right_shape_once(name: str, exports: dict[str, Path]) -> None:
    folder = exports[name]
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == (1 if name != SEVERAL_FILES else len(set(read_json(folder / INDEX)["weight_map"].values())))
    assert (len(files) > 3) == (folder / INDEX).is_file() == (name == SEVERAL_FILES)
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert not set(file.keys()) & set(weights)
            weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dictionary
        for key, tensor in load_file(path).items():
            assert torch.equal(tensor, weights[key])
        if name != "bfloat16":  # which numpy has no word for
            assert all(torch.equal(torch.from_numpy(array), weights[k]) for k, array in load_numpy(path).items())
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == wanted
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{read_json(folder / 'config.json')['dtype']}"}
    if name == SEVERAL_FILES:
        index = read_json(folder / INDEX)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
        for key, file_name in index["weight_map"].items():
            with safe_open(folder / file_name, "pt") as file:
                assert key in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("name", [*SHAPES, SEVERAL_FILES])
def test_the_reader_of_llama_cpp_sees_the_same_bytes(name: str, exports: dict[str, Path]) -> None:
    codes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    for path in llama_cpp_files(exports[name]):
        with SafetensorsLocal(path) as part:
            for key, tensor in load_file(path).items():
                assert part[key].dtype == codes[tensor.dtype] and part[key].shape == tuple(tensor.shape)
                assert part[key].mmap_bytes().tobytes() == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", [*SHAPES, SEVERAL_FILES])
def test_llama_cpp_finds_what_it_wants(name: str, exports: dict[str, Path]) -> None:
    assert llama_cpp_problems(exports[name]) == []


@pytest.mark.parametrize("name", [*SHAPES, SEVERAL_FILES])
def test_vllm_finds_what_it_wants(name: str, exports: dict[str, Path]) -> None:
    assert vllm_problems(exports[name]) == []


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(read_json(path) | entries), encoding="utf-8")


def rename(weights: dict[str, torch.Tensor], before: str, after: str) -> None:
    weights[after] = weights.pop(before)


K_PROJ, DOWN_PROJ = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"
INTEGER_FACTOR = {"rope_type": "linear", "factor": 4, "rope_theta": 1e4}
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    # what is done: to which export, how, what llama.cpp's checker says, what vLLM's says
    "a tensor is dropped": (
        *("mha", lambda folder: change_weights(folder, lambda w: w.pop(K_PROJ))),
        *("wants blk.1.attn_k.weight, which", "wants ('model.layers.1.self_attn.qkv_proj.weight', 'k'), which"),
    ),
    "a tensor has another name": (
        *("mqa", lambda folder: change_weights(folder, lambda w: rename(w, DOWN_PROJ, "model.layers.0.mlp.w2.weight"))),
        *("can not map tensor model.layers.0.mlp.w2", "no place for ('model.layers.0.mlp.w2.weight', None)"),
    ),
    "the head of an untied model is dropped": (
        *("gqa_padded", lambda folder: change_weights(folder, lambda w: w.pop("lm_head.weight"))),
        *("wants output.weight, which nothing", "wants ('lm_head.weight', None), which nothing"),
    ),
    "a tensor lies on its side": (
        *("mha", lambda folder: change_weights(folder, lambda w: w.update({DOWN_PROJ: w[DOWN_PROJ].T.contiguous()}))),
        *("wants blk.0.ffn_down.weight of shape (48, 80)", "('model.layers.0.mlp.down_proj.weight', None) of shape"),
    ),
    "wide heads are not mentioned": (
        *("wide_heads", lambda folder: change_json(folder / "config.json", head_dim=12)),
        *("wants blk.0.attn_q.weight of shape (48, 48), found (80, 48)", "'q') of shape (48, 48), found (80, 48)"),
    ),
    "a factor is an integer": (
        *("rope_linear", lambda folder: change_json(folder / "config.json", rope_parameters=INTEGER_FACTOR)),
        *("config.json has rope_parameters={", "(models/llama.py LlamaAttention._init_rotary_emb)"),
    ),
    "another end of the document": (
        *("tied", lambda folder: change_json(folder / "config.json", eos_token_id=5)),
        *("takes {'bos': 0, 'eos': 0} for the special ids", "generation_config.json ends at 0"),
    ),
    "a quantization is claimed": (
        *("tied", lambda folder: change_json(folder / "config.json", quantization_config={"quant_method": "fp8"})),
        *("config.json has quantization_config=", "config.json has quantization_config="),
    ),
    "the file has another name": (
        *("tied", lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors")),
        *("misses files of weights: there is none", "takes the folder for Mistral's format"),
    ),
    "a file is lost": (
        *(SEVERAL_FILES, lambda folder: min(folder.glob("model-00002-*")).unlink()),
        *("misses files of weights: ['model-00002-of-0", "vLLM misses {'model-00002-of-0"),
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder_is_noticed(what: str, exports: dict[str, Path], tmp_path: Path) -> None:
    name, damage, llama_cpp_words, vllm_words = DAMAGES[what]
    folder = Path(shutil.copytree(exports[name], tmp_path / "hf"))
    damage(folder)
    assert llama_cpp_words in "\n".join(llama_cpp_problems(folder))
    assert vllm_words in "\n".join(vllm_problems(folder))


@pytest.mark.parametrize("name", ["mha", "rope_linear", "rope_llama3"])
def test_readers_older_than_transformers_5_find_the_same_rotation(name: str, exports: dict[str, Path]) -> None:
    """They take base and scaling from two entries, and a scaling that they do not see is left out in silence.

    Source: transformers 4.57.1 models/llama/configuration_llama.py LlamaConfig, modeling_rope_utils.py.
    """
    config = read_json(exports[name] / "config.json")
    rope = dict(config["rope_parameters"])
    assert config["rope_theta"] == rope.pop("rope_theta")
    assert config["torch_dtype"] == config["dtype"]
    assert (config.get("rope_scaling") or {"rope_type": "default"}) == rope


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_llama_cpp_encodes_with_a_sentencepiece_model_as_transformers_does(
    dummy_prefix: bool, exports: dict[str, Path], tmp_path: Path
) -> None:
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in english_documents()[:20] for line in text.splitlines() if line),
        model_prefix=str(tmp_path / "small"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        add_dummy_prefix=dummy_prefix,
    )
    tokenizer = load_tokenizer("SentencePieceTokenizer", tmp_path / "small.model")
    folder = Path(shutil.copytree(exports["mha"], tmp_path / "hf", ignore=shutil.ignore_patterns("tokenizer*")))
    write_tokenizer(tokenizer, None, folder)  # type: ignore[arg-type]  it asks only GPT-2's arguments
    change_json(folder / "config.json", eos_token_id=tokenizer.eod_id)
    assert llama_cpp_problems(folder) == []
