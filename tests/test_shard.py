"""Sizes, packing, names and indexes of shards, against the libraries that set the conventions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.serialization._base import parse_size_to_int, split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import streamconv
from streamconv import dtypes
from streamconv.errors import StreamconvError, UsageError
from streamconv.shard import (
    STEMS,
    Entry,
    Naming,
    WeightName,
    entry_of,
    index_json,
    index_name,
    pack,
    parse_size,
    parse_weight_name,
    shard_name,
    total_size,
    weight_map,
)
from streamconv.tensor import TensorSpec

# ---------------------------------------------------------------------------------------------- sizes

blanks = st.sampled_from(["", " ", "\t ", "  "])
units = st.sampled_from(["KB", "MB", "GB", "TB", "kb", "mB", "Gb"])
# Beyond 2^53 bytes the doubles of huggingface_hub no longer hold every whole number.
numbers = st.one_of(
    st.integers(1, 9000).map(str),
    st.decimals(min_value="0.01", max_value="99999", places=2).map(str),
    st.sampled_from(["1.", ".5", "1e3", "2.5E2", "+3", "007"]),
)


@settings(deadline=None)
@given(blanks, numbers, blanks, units, blanks)
def test_sizes_mean_what_they_mean_to_huggingface(before, number, between, unit, after):
    text = f"{before}{number}{between}{unit}{after}"
    assert parse_size(text) == parse_size_to_int(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1GiB", 1 << 30),
        ("1.5 gib", 3 << 29),
        ("4KIB", 4096),
        ("7MiB", 7 << 20),
        ("2tib", 2 << 40),
        ("1", 1),
        (" 1000000 ", 10**6),
        ("9007199254740993", 2**53 + 1),
        ("9007199254740993KB", (2**53 + 1) * 1000),
    ],
)
def test_sizes_beyond_huggingface(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "GB",
            ".GB",
            "0",
            "0GB",
            "0.0GiB",
            "-1GB",
            "-5",
            "5G",
            "5 B",
            "1.5",
            "1e9",
            "5GBs",
            "five",
        ),
        *(
            "inf",
            "infGB",
            "nan",
            "nanGB",
            "1e999GB",
            "0.0001KB",
            "1_000GB",
            "0x10KB",
            "\u0665GB",
            "5 G B",
            "9" * 5000,
        ),
    ],
)
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert caught.value.headline.hint is not None
    assert caught.value.exit_code == 2


# -------------------------------------------------------------------------------------------- packing


def split_by_huggingface(entries: list[Entry], limit: int):
    return split_state_dict_into_shards_factory(
        {entry.name: entry for entry in entries},
        get_storage_size=lambda entry: entry.nbytes,
        get_storage_id=lambda entry: entry.storage,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )


entry_lists = st.lists(
    st.builds(
        Entry,
        st.text(max_size=4),
        st.one_of(st.integers(0, 12), st.sampled_from([0, 10, 11, 10**15])),
        st.one_of(st.none(), st.integers(0, 4), st.tuples(st.text(max_size=1), st.integers(0, 1))),
    ),
    max_size=40,
    unique_by=lambda entry: entry.name,
)


@settings(deadline=None)
@given(entry_lists, st.integers(1, 30))
@pytest.mark.slow
def test_shards_hold_what_huggingface_puts_there(entries, limit):
    expected = split_by_huggingface(entries, limit)
    shards = pack(entries, limit)
    assert [list(names) for names in shards] == list(expected.filename_to_tensors.values())
    assert total_size(entries) == expected.metadata["total_size"]
    files = weight_map(Naming(), shards)
    assert list(files.items()) == list(expected.tensor_to_filename.items())


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [
        ("a1 b10 c1 d5 e5 f4 g1", 5, "b | a c | d | e | f g"),
        ("a6 b6 c2 d6 e2 f2", 10, "a | b c | d e f"),
        ("a10", 1, "a"),
        ("a5 b5", 10, "a b"),
        ("a10 b0 c1 d0", 10, "a b | c d"),
        ("", 1, ""),
    ],
)
def test_shards_of_known_sizes(sizes, limit, shards):
    entries = [Entry(text[0], int(text[1:])) for text in sizes.split()]
    assert pack(entries, limit) == tuple(tuple(part.split()) for part in shards.split("|") if part)


def test_tied_entries_join_the_first_and_count_once():
    entries = [Entry("embed", 4, "shared"), Entry("middle", 4), Entry("head", 4, "shared")]
    assert pack(entries, 4) == (("embed", "head"), ("middle",))
    assert total_size(entries) == 8


TORCH_DTYPES = [row for row in dtypes.BY_TORCH_NAME.values() if not row.packed]


@st.composite
def state_dicts(draw):
    """Torch tensors by name; some are the same tensor, some another view of its storage."""
    tensors: dict[str, torch.Tensor] = {}
    for name in draw(st.lists(st.text(max_size=4), max_size=10, unique=True)):
        kind = draw(st.sampled_from(["new", "new", "same", "view"])) if tensors else "new"
        if kind == "new":
            shape = draw(st.lists(st.integers(0, 4), max_size=3))
            row = draw(st.sampled_from(TORCH_DTYPES))
            tensors[name] = torch.zeros(shape, dtype=getattr(torch, row.torch_name))
        else:
            other = tensors[draw(st.sampled_from(sorted(tensors)))]
            tensors[name] = other if kind == "same" else other.view(other.shape)
    return tensors


def entries_of(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [
        entry_of(
            TensorSpec(name, dtypes.parse(str(tensor.dtype)), tuple(tensor.shape)),
            tensor.untyped_storage()._cdata,
        )
        for name, tensor in tensors.items()
    ]


@settings(deadline=None)
@given(state_dicts(), st.integers(1, 200))
def test_shards_of_torch_tensors(tensors, limit):
    # Storages that own nothing have one address for torch: all empty tensors are tied.
    expected = huggingface_hub.split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    shards = pack(entries_of(tensors), limit)
    assert [list(names) for names in shards] == list(expected.filename_to_tensors.values())
    assert total_size(entries_of(tensors)) == expected.metadata["total_size"]


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("naming", "single", "second", "index"),
    [
        (
            Naming(),
            "model.safetensors",
            "model-00002-of-00003.safetensors",
            "model.safetensors.index.json",
        ),
        (
            Naming(variant="fp16"),
            "model.fp16.safetensors",
            "model.fp16-00002-of-00003.safetensors",
            "model.safetensors.index.fp16.json",
        ),
        (
            Naming(suffix=".bin"),
            "pytorch_model.bin",
            "pytorch_model-00002-of-00003.bin",
            "pytorch_model.bin.index.json",
        ),
        (
            Naming(variant="fp16", suffix=".bin"),
            "pytorch_model.fp16.bin",
            "pytorch_model.fp16-00002-of-00003.bin",
            "pytorch_model.bin.index.fp16.json",
        ),
        (
            Naming("diffusion_pytorch_model"),
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model-00002-of-00003.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
        ),
        (
            Naming("diffusion_pytorch_model", "fp16"),
            "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.fp16-00002-of-00003.safetensors",
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
        (
            Naming("diffusion_pytorch_model", suffix=".bin"),
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model-00002-of-00003.bin",
            "diffusion_pytorch_model.bin.index.json",
        ),
        (
            Naming("adapter_model"),
            "adapter_model.safetensors",
            "adapter_model-00002-of-00003.safetensors",
            "adapter_model.safetensors.index.json",
        ),
        (
            Naming("adapter_model", suffix=".bin"),
            "adapter_model.bin",
            "adapter_model-00002-of-00003.bin",
            "adapter_model.bin.index.json",
        ),
    ],
)
def test_names_of_each_library(naming, single, second, index):
    assert shard_name(naming, 1, 1) == single
    assert shard_name(naming, 2, 3) == second
    assert index_name(naming) == index


@pytest.mark.parametrize(("number", "count"), [(0, 1), (2, 1), (1, 0), (-1, 3)])
def test_no_name_for_a_shard_that_is_not(number, count):
    with pytest.raises(ValueError, match="no shard"):
        shard_name(Naming(), number, count)


namings = st.builds(
    Naming,
    st.sampled_from(STEMS),
    st.one_of(st.none(), st.from_regex(r"[a-z0-9_\-]{1,8}", fullmatch=True)),
    st.sampled_from([".safetensors", ".bin"]),
)


@settings(deadline=None)
@given(namings, st.integers(2, 200_000), st.data())
def test_every_written_name_is_recognised(naming, count, data):
    number = data.draw(st.integers(1, count))
    assert parse_weight_name(shard_name(naming, 1, 1)) == WeightName(naming, "single")
    assert parse_weight_name(index_name(naming)) == WeightName(naming, "index")
    shard = WeightName(naming, "shard", number, count)
    assert parse_weight_name(shard_name(naming, number, count)) == shard


FP16 = Naming("diffusion_pytorch_model", "fp16")


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("diffusion_pytorch_model-00001-of-00003.fp16.safetensors", WeightName(FP16, "shard", 1, 3)),
        ("diffusion_pytorch_model.safetensors.fp16.index.json", WeightName(FP16, "index")),
        ("diffusion_pytorch_model.fp16.safetensors.index.json", WeightName(FP16, "index")),
        ("pytorch_model_00001-of-00072.bin", WeightName(Naming(suffix=".bin"), "shard", 1, 72)),
        ("model-00001-of-000163.safetensors", WeightName(Naming(), "shard", 1, 163)),
        ("model-00000-of-00001.safetensors", WeightName(Naming(), "shard", 0, 1)),
        ("sd_xl_base_1.0.safetensors", WeightName(Naming("sd_xl_base_1.0"), "single")),
        ("pytorch_model.safetensors", WeightName(Naming("pytorch_model"), "single")),
        ("consolidated-00001-of-00002.safetensors", WeightName(Naming("consolidated"), "shard", 1, 2)),
        ("other-00001-of-00002.bin", WeightName(Naming("other", suffix=".bin"), "shard", 1, 2)),
        ("model.bin", None),
        ("training_args.bin", None),
        ("tokenizer.bin", None),
        ("config.json", None),
        ("model.safetensors.backup", None),
        ("model.safetensors.index.json.partial", None),
        ("model-00004-of-00003.safetensors", None),
        ("model.fp16-00001-of-00003.bf16.safetensors", None),
        ("model.safetensors.fp16.index.bf16.json", None),
        ("tokenizer.index.json", None),
        (".safetensors", None),
        ("model-\u0660\u0660\u0660\u0660\u0661-of-\u0660\u0660\u0660\u0660\u0662.bin", None),
        ("", None),
    ],
)
def test_names_that_are_read(name, meaning):
    assert parse_weight_name(name) == meaning


@settings(deadline=None)
@given(st.text(alphabet="model-_.0123456789fp16binsafetensorsindexjsonof", max_size=50))
def test_no_name_is_read_as_another(name):
    parsed = parse_weight_name(name)
    if parsed is not None and parsed.kind == "single":
        assert shard_name(parsed.naming, 1, 1) == name


@settings(deadline=None)
@given(namings, st.integers(1, 5))
def test_diffusers_finds_the_files(naming, count):
    from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings

    if naming.stem not in ("model", "diffusion_pytorch_model"):
        naming = Naming("diffusion_pytorch_model", naming.variant, naming.suffix)
    written = {shard_name(naming, number, count) for number in range(1, count + 1)} | {index_name(naming)}
    found, of_variant = variant_compatible_siblings({f"unet/{name}" for name in written}, naming.variant)
    assert found == {f"unet/{name}" for name in written}
    assert (of_variant == found) == (naming.variant is not None)


# ---------------------------------------------------------------------------------------------- index


def test_an_index_is_sorted_ascii_text():
    text = index_json({"b": "2", "a": "1", "é": "1"}, 5, {"total_parameters": 3, "made by": "x"})
    assert text == (
        b'{\n  "metadata": {\n    "made by": "x",\n    "total_parameters": 3,\n    "total_size": 5\n  },\n'
        b'  "weight_map": {\n    "a": "1",\n    "b": "2",\n    "\\u00e9": "1"\n  }\n}\n'
    )


@pytest.mark.parametrize("files", [{}, {"a": "model.safetensors", "b": "model.safetensors"}])
def test_no_index_for_one_file(files):
    with pytest.raises(ValueError, match="two shards or more"):
        index_json(files, 1)


def as_saved(directory, naming: Naming, tensors: dict[str, torch.Tensor], limit: int, facts) -> None:
    """Assert that a library saved these tensors as this package would lay them out."""
    entries = entries_of(tensors)
    shards = pack(entries, limit)
    assert len(shards) > 2
    files = weight_map(naming, shards)
    index = directory / index_name(naming)
    assert index.read_bytes() == index_json(files, total_size(entries), facts)
    assert {path.name for path in directory.iterdir() if parse_weight_name(path.name)} == {
        *files.values(),
        index.name,
    }


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_transformers_saves_so(tmp_path, variant):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=24,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="3KB", variant=variant)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    as_saved(tmp_path, Naming("model", variant), tensors, 3000, {"total_parameters": model.num_parameters()})


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_diffusers_saves_so(tmp_path, variant, safe):
    from diffusers import UNet2DModel

    model = UNet2DModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size="10KB", variant=variant, safe_serialization=safe)
    naming = Naming("diffusion_pytorch_model", variant, ".safetensors" if safe else ".bin")
    as_saved(tmp_path, naming, model.state_dict(), 10_000, {})


def test_huggingface_hub_names_so(tmp_path):
    tensors = {f"tensor {number}": torch.zeros(number) for number in range(9)}
    huggingface_hub.save_torch_state_dict(tensors, tmp_path, max_shard_size=40)
    shards = pack(entries_of(tensors), 40)
    index = json.loads((tmp_path / index_name(Naming())).read_text())
    assert index["weight_map"] == weight_map(Naming(), shards)
    assert index["metadata"] == {"total_size": total_size(entries_of(tensors))}
    numbers = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert numbers == [shard_name(Naming(), number, len(shards)) for number in range(1, len(shards) + 1)]
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) for name in numbers)


def test_shards_whose_numbers_are_not_padded_are_shards(tmp_path: Path) -> None:
    parsed = parse_weight_name("model-1-of-2.safetensors")
    assert parsed is not None and (parsed.kind, parsed.number, parsed.count) == ("shard", 1, 2)
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1-of-2.safetensors")
    for place in (tmp_path, tmp_path / "model-1-of-2.safetensors"):
        with pytest.raises(StreamconvError):
            streamconv.open(place)
    save_file({"b": torch.zeros(2)}, tmp_path / "model-2-of-2.safetensors")
    assert set(streamconv.open(tmp_path)) == {"a", "b"}
