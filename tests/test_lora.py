"""LoRA adapters, merged while converting: held against peft's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from comparing import assert_alike, terms_of
from peft import LoraConfig
from recipe_contract import contents, load
from reference_models import chatglm
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.errors import PlanError, UsageError

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = hf.LlamaConfig(**TINY, attention_bias=True)
TIED = hf.LlamaConfig(**TINY, tie_word_embeddings=True)
GPT2 = hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2)
ATTENTION = ["q_proj", "v_proj"]

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (LLAMA, {"target_modules": ATTENTION}),
    "all layers": (LLAMA, {"target_modules": "all-linear", "r": 6, "lora_alpha": 10}),
    "patterns": (
        LLAMA,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"], "rank_pattern": {"k_proj": 2, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {"q_proj": 5, r"layers\.0\.self_attn\.k_proj": 7},
        },
    ),
    "rslora": (LLAMA, {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": (LLAMA, {"target_modules": [*ATTENTION, "up_proj"], "use_dora": True}),
    "embedding": (LLAMA, {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules to save": (LLAMA, {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "biases": (LLAMA, {"target_modules": ATTENTION, "bias": "all"}),
    "biases of its layers": (LLAMA, {"target_modules": ATTENTION, "bias": "lora_only"}),
    "bias of the factor": (LLAMA, {"target_modules": ATTENTION, "lora_bias": True}),
    "tied": (TIED, {"target_modules": ATTENTION}),
    "transposed": (GPT2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}  # fmt: skip


def trained(config: Any, options: dict[str, Any], tmp_path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A base, an adapter with random factors beside it, and peft's model of both."""
    torch.manual_seed(0)
    base = hf.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if parameter.ndim == 1 else 0))
    base.save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model = peft.get_peft_model(
        base, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    )
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    return model


def merged(tmp_path: Path, **options: Any) -> dict[str, torch.Tensor]:
    streamconv.convert(
        tmp_path / "base", tmp_path / "out", lora=tmp_path / "adapter", engine="inline", **options
    )
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    model = trained(*CASES[name], tmp_path)
    expected = model.merge_and_unload().state_dict()
    found = merged(tmp_path)
    before = load_file(tmp_path / "base" / "model.safetensors")
    changed = 0
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6)
        changed += key not in before or not torch.equal(tensor, before[key])
    assert changed
    if name != "modules to save":
        assert found.keys() == before.keys()
    ids = torch.arange(20)[None]
    made = load(tmp_path / "out")
    assert_alike(made(ids).logits, model.base_model.model(ids).logits, terms_of(made))


TIES: dict[str, dict[str, Any]] = {
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both saved as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding trained": {"target_modules": ["embed_tokens", "q_proj"]},
    "head trained": {"target_modules": ["lm_head", "q_proj"]},
    "head trained, its base not saved": {"target_modules": ["lm_head"]},
}


@pytest.mark.parametrize(
    "config", [TIED, hf.GPT2Config(**GPT2.to_diff_dict() | {"tie_word_embeddings": True})]
)
@pytest.mark.parametrize("name", TIES)
def test_a_head_that_was_the_embedding_becomes_a_tensor_of_its_own(
    name: str, config: Any, tmp_path: Path
) -> None:
    """The logits of training: peft's own merge changes the head with the embedding."""
    options = {"target_modules": ["q_proj"], **TIES[name]}
    if config.model_type == "gpt2":
        renamed = {"q_proj": "c_attn", "embed_tokens": "wte"}
        options = {
            key: [renamed.get(each, each) for each in value] if isinstance(value, list) else value
            for key, value in options.items()
        }
    model = trained(config, options, tmp_path)
    if "not saved" in name:
        state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        state = {key: tensor for key, tensor in state.items() if "base_layer" not in key}
        save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    ids = torch.arange(20)[None]
    before = model(ids).logits
    merged(tmp_path)
    made = load(tmp_path / "out")
    assert made.config.tie_word_embeddings is False
    assert_alike(made(ids).logits, before, terms_of(made))


def test_a_tied_base_stays_so_where_neither_is_changed(tmp_path: Path) -> None:
    trained(TIED, {"target_modules": ATTENTION}, tmp_path)
    assert "lm_head.weight" not in merged(tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("changes", [{"vocab_size": 96, "architectures": ["TheirsForCausalLM"]}])
def test_an_embedding_of_an_unknown_name_that_is_the_head_is_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    trained(TIED, {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}, tmp_path)
    for file in (tmp_path / "base" / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"):
        save_file(
            {key.replace("embed_tokens", "table"): value for key, value in load_file(file).items()}, file
        )
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(PlanError, match="it is the head of the model too"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def test_several_are_merged_one_after_another(tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path, torch.bfloat16)
    (tmp_path / "adapter").rename(tmp_path / "first")
    (tmp_path / "second").mkdir()
    state = load_file(tmp_path / "first" / "adapter_model.safetensors")
    save_file(
        {key: torch.randn_like(value) for key, value in state.items()},
        tmp_path / "second" / "adapter_model.safetensors",
    )
    (tmp_path / "second" / "adapter_config.json").write_text(
        (tmp_path / "first" / "adapter_config.json").read_text()
    )
    both = [tmp_path / "first", tmp_path / "second"]
    streamconv.convert(
        tmp_path / "base", tmp_path / "out", lora=both, lora_scale=[None, 0.5], engine="inline"
    )
    streamconv.convert(tmp_path / "base", tmp_path / "one", lora=both[0], engine="inline")
    streamconv.convert(tmp_path / "one", tmp_path / "two", lora=both[1], lora_scale=0.5, engine="inline")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    for path in both:
        changed(path, **({"lora_alpha": 2} if path == both[1] else {}))
        base = peft.PeftModel.from_pretrained(base, path).merge_and_unload()
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, base.state_dict()[key], rtol=2**-7, atol=1e-6)


def test_more_scales_than_adapters_are_refused(tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path)
    with pytest.raises(UsageError, match="there are 2 scales for 1 adapter"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter", lora_scale=[1.0, 2.0])


@pytest.mark.parametrize("name", ["plain", "embedding", "transposed", "dora"])
def test_a_bf16_base_is_rounded_once(name: str, tmp_path: Path) -> None:
    """The F32 merge of the same factors, rounded: nearer to the truth than peft's two roundings."""
    config, options = CASES[name]
    trained(config, options, tmp_path, torch.bfloat16)
    found = merged(tmp_path)
    exact = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    wide = peft.PeftModel.from_pretrained(exact, tmp_path / "adapter").merge_and_unload().state_dict()
    apart = 0
    for key, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        rounded = wide[key].to(torch.bfloat16)
        # One step; and where the sum almost vanishes, what F32 itself is off by.
        torch.testing.assert_close(tensor, rounded, rtol=2**-7, atol=1e-7)
        apart += int((tensor != rounded).sum())
    # A tie that F32 sums in another order may fall to the other side.
    assert apart <= sum(tensor.numel() for tensor in found.values()) / 1000


def test_in_f32_nothing_is_rounded_to_bf16_on_the_way(tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path, torch.bfloat16)
    found = merged(tmp_path, dtype="F32")
    exact = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    wide = peft.PeftModel.from_pretrained(exact, tmp_path / "adapter").merge_and_unload().state_dict()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wide[key], rtol=1e-6, atol=1e-7)


def test_a_convolution(tmp_path: Path) -> None:
    """W + scale * B @ A over the window, as peft computes it with a convolution."""
    torch.manual_seed(0)
    base = {"conv.weight": torch.randn(8, 6, 3, 3)}
    a, b = torch.randn(4, 6, 3, 3), torch.randn(8, 4, 1, 1)
    for directory in ("base", "adapter"):
        (tmp_path / directory).mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    names = {"base_model.model.conv.lora_A.weight": a, "base_model.model.conv.lora_B.weight": b}
    save_file(names, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    delta = torch.nn.functional.conv2d(a.permute(1, 0, 2, 3), b).permute(1, 0, 2, 3) * 2
    torch.testing.assert_close(
        merged(tmp_path)["conv.weight"], base["conv.weight"] + delta, rtol=1e-5, atol=1e-5
    )


def test_workers_and_blocks_do_not_change_a_byte(tmp_path: Path) -> None:
    trained(*CASES["all layers"], tmp_path, torch.bfloat16)
    merged(tmp_path)
    streamconv.convert(
        tmp_path / "base",
        tmp_path / "small",
        lora=tmp_path / "adapter",
        memory_budget="16MiB",
        workers=2,
        max_shard="50KB",
    )
    assert contents(tmp_path / "small") == contents(tmp_path / "out")
    assert streamconv.verify(tmp_path / "base", tmp_path / "small").problems == ()


def test_the_scale_can_be_given(tmp_path: Path) -> None:
    model = trained(*CASES["plain"], tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    found = merged(tmp_path, lora_scale=0.5)
    expected = model.merge_and_unload().state_dict()
    key = "model.layers.0.self_attn.q_proj.weight"
    # The adapter says 8 / 4; a quarter of that is half.
    torch.testing.assert_close(found[key] - base[key], (expected[key] - base[key]) / 4, rtol=1e-4, atol=1e-6)


def test_the_plan_says_what_is_merged(tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path)
    plan = streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")
    assert any("adapter of rank 4 is merged into 4 weights with scale 2" in note for note in plan.notes)
    labels = {tensor.spec.name: tensor.exactness.label for tensor in plan.tensors}
    assert labels["model.layers.1.self_attn.v_proj.weight"] == "rounding"
    assert labels["model.layers.1.self_attn.k_proj.weight"] == "bit-exact"
    assert any("adapter_model.safetensors" in file.path for file in plan.files)
    assert not any("adapter" in side.path for side in plan.side_files)


def test_a_recipe_can_follow(tmp_path: Path) -> None:
    """A fine-tuned ChatGLM as a Llama, in one go."""
    chatglm.write(tmp_path / "base", chatglm.Config())
    (tmp_path / "adapter").mkdir()
    torch.manual_seed(1)
    module = "base_model.model.transformer.encoder.layers.{}.self_attention.query_key_value.lora_{}.weight"
    factors = {module.format(i, "A"): torch.randn(4, 64) for i in range(2)}
    factors |= {module.format(i, "B"): torch.randn(128, 4) for i in range(2)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merged(tmp_path, to_arch="llama")
    original = chatglm.load(tmp_path / "base")
    state = original.state_dict()
    for i in range(2):
        weight = state[f"transformer.encoder.layers.{i}.self_attention.query_key_value.weight"]
        weight += factors[module.format(i, "B")] @ factors[module.format(i, "A")]
    original.load_state_dict(state)
    ids = torch.arange(40)[None]
    model = load(tmp_path / "out")
    assert_alike(model(ids).logits, original(ids), terms_of(model))


# --------------------------------------------------------------------------------------- refused


def changed(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "BOFT"}, "the adapter is BOFT"),
        ({"layer_replication": [[0, 1]]}, "it repeats layers of the base"),
        ({"kasa_config": {"beta": 0.1}}, "singular values of the base"),
        ({"lora_alpha": None}, "has no lora_alpha"),
        ({"lora_alpha": "8"}, "has no lora_alpha"),
        ({"r": 8}, "says that its rank is 8; its factors have 4"),
        ({"alpha_pattern": {"(a+)+": 2}}, "repeats a group"),
        ({"alpha_pattern": {"[": 2}}, "is not a regular"),
        ({"alpha_pattern": {"a" * 300: 2}}, "is not followed"),
    ],
)
def test_what_cannot_be_merged_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path)
    changed(tmp_path / "adapter", **changes)
    with pytest.raises((PlanError, UsageError)) as caught:
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")
    assert said in str(caught.value)


BEGINNINGS = ["pissa", "pissa_niter_2", "olora", "loftq", "corda", "lora_ga"]


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_an_adapter_of_a_base_that_training_changed_is_refused(beginning: str, tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path)
    changed(tmp_path / "adapter", init_lora_weights=beginning)
    with pytest.raises(PlanError, match=f"init_lora_weights is '{beginning}'") as caught:
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")
    can_convert = "path_initial_model_for_weight_conversion" in str(caught.value)
    assert can_convert == (beginning != "loftq")


@pytest.mark.parametrize("beginning", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_converts_of_it_is_merged(beginning: str, rslora: bool, tmp_path: Path) -> None:
    config, options = CASES["plain"]
    options = options | {"init_lora_weights": beginning, "use_rslora": rslora, "r": 4, "lora_alpha": 8}
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.peft_config["default"].init_lora_weights = beginning
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    ours = merged(tmp_path)
    theirs = model.merge_and_unload().state_dict()
    changes = 0
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)
        changes += not torch.equal(tensor, original[name])
    assert changes == 4


def begun(beginning: str, options: dict[str, Any], tmp_path: Path) -> Any:
    """A base, an adapter that changed it, as it was before and after training, and peft's model of the changed base."""
    config, _ = CASES["plain"]
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8} | options
    model = peft.get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=beginning, **options)
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.peft_config["default"].init_lora_weights = beginning
    model.save_pretrained(tmp_path / "adapter")
    return model


BEGUN: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("pissa", {}),
    "randomised": ("pissa_niter_2", {}),
    "olora": ("olora", {}),
    "rslora with patterns": (
        "olora",
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    ),
    "dora": ("pissa", {"use_dora": True}),
    "with whole tensors": ("olora", {"modules_to_save": ["lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("place", ["adapter/pissa_init", "initial_adapter"])
@pytest.mark.parametrize("name", BEGUN)
def test_with_the_adapter_as_it_began_the_base_as_it_was_is_enough(
    name: str, place: str, tmp_path: Path
) -> None:
    model = begun(*BEGUN[name], tmp_path)
    (tmp_path / "initial").rename(tmp_path / place)
    before = load_file(tmp_path / "base" / "model.safetensors")
    expected = model.merge_and_unload().state_dict()
    plan = streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")
    assert any(place.rpartition("/")[2] in note and "taken away" in note for note in plan.notes)
    changes = 0
    for key, tensor in merged(tmp_path).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=2e-6)
        changes += key not in before or not torch.equal(tensor, before[key])
    assert changes >= 4


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another scale": ({"lora_alpha": 16}, "lora_alpha is 16 there, and 8 here"),
    "another rank": ({"r": 2}, "r is 2 there, and 4 here"),
    "another model": ({}, "no such tensor there"),
    "other factors": ({}, r"its shape is \[4, 32\] there"),
    "one of two": ({}, "may have begun as any of"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_the_adapter_as_it_began_is_not_taken_for_it(name: str, tmp_path: Path) -> None:
    changes, said = OTHERS[name]
    begun("olora", {}, tmp_path)
    changed(tmp_path / "initial", **changes)
    file = tmp_path / "initial" / "adapter_model.safetensors"
    state = load_file(file)
    if name == "another model":
        save_file({key.replace("q_proj", "o_proj"): value for key, value in state.items()}, file)
    elif name == "other factors":
        save_file(
            {key: value[:, :32].clone() if "lora_A" in key else value for key, value in state.items()}, file
        )
    elif name == "one of two":
        (tmp_path / "init_of_another").mkdir()
        (tmp_path / "init_of_another" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=said):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def test_a_base_that_training_changed_and_saved_is_the_one_that_the_factors_are_for(tmp_path: Path) -> None:
    model = begun("olora", {}, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    save_file({key: value.clone() for key, value in model.state_dict().items()}, run / "model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").rename(run / "adapter_config.json")
    expected = model.merge_and_unload().state_dict()
    streamconv.convert(run, tmp_path / "out", engine="inline")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=2e-6)
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("beginning", ["gaussian", "orthogonal", "eva", "mica"])
def test_beginnings_that_leave_the_base_alone_are_merged(beginning: str, tmp_path: Path) -> None:
    config, options = CASES["plain"]
    trained(config, options | {"init_lora_weights": beginning}, tmp_path)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in merged(tmp_path).items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_model_is_named_once_a_kind(tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    state = {name.replace("self_attn", "attention"): tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(PlanError) as caught:
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")
    said = str(caught.value)
    assert "model.layers.0.attention.q_proj.weight" in said
    assert "(and 1 more like it)" in said
    assert "the nearest is 'model.layers." in said
    assert said.count("the base has no such weight") == 2


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    state = {name: tensor for name, tensor in state.items() if "layers.1.self_attn.q_proj.lora_B" not in name}
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(PlanError, match="only one of its two factors"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def test_factors_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    state[name] = state[name][:, :60].clone()
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(PlanError, match="lowrank_add"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def lengthened(model: Any, rows: int, options: dict[str, Any], path: Path) -> Any:
    """Peft's model over one with more tokens, and its adapter."""
    model.resize_token_embeddings(rows)
    made = peft.get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in (each for each in made.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(path)
    return made


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["apart", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
    ],
    ids=["saved", "adapted"],
)
@pytest.mark.parametrize("resized", [False, True])
def test_new_tokens_of_an_adapter_are_new_rows_of_the_model(
    resized: bool, options: dict[str, Any], config: Any, tmp_path: Path
) -> None:
    """The adapter's rows count, also where the base has been made as long, by other random rows."""
    trained(config, {"target_modules": ATTENTION}, tmp_path)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = lengthened(base, 101, options, tmp_path / "adapter")
    ids = torch.arange(90, 101)[None]
    before = model(ids).logits
    if resized:
        other = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        other.resize_token_embeddings(101)
        with torch.no_grad():
            other.get_input_embeddings().weight[96:] += 1
        other.save_pretrained(tmp_path / "base")
    merged(tmp_path)
    made = load(tmp_path / "out")
    assert made.config.vocab_size == 101
    assert_alike(made(ids).logits, before, terms_of(made))


@pytest.mark.parametrize(
    ("options", "other", "said"),
    [
        ({"modules_to_save": ["mlp"]}, {"intermediate_size": 128}, r"mlp\.down_proj\.weight': the adapter has it as \[64, 96\]"),
        ({"bias": "all"}, {"attention_bias": False}, r"proj\.bias': the adapter has it, and the base has not"),
        ({"modules_to_save": ["lm_head"]}, {"vocab_size": 90}, r"embed_tokens\.weight': it has 90 rows, and the adapter's .* 96"),
    ],
)  # fmt: skip
def test_what_is_replaced_has_to_be_there_and_of_its_shape(
    options: dict[str, Any], other: dict[str, Any], said: str, tmp_path: Path
) -> None:
    trained(LLAMA, {"target_modules": ATTENTION, **options}, tmp_path)
    changed = hf.LlamaConfig(**LLAMA.to_diff_dict() | other)
    hf.LlamaForCausalLM(changed).save_pretrained(tmp_path / "base")
    with pytest.raises(PlanError, match=said):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def test_a_directory_without_an_adapter_is_refused(tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path)
    with pytest.raises(UsageError, match="there is no adapter in it"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "base")


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    trained(*CASES["plain"], tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(PlanError, match="the base is F8_E4M3, quantised"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def test_one_scale_is_not_taken_for_two_adapters(tmp_path: Path) -> None:
    dense = "transformer.layers.0.attention.dense"
    factors = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
    (tmp_path / "sat" / "1").mkdir(parents=True)
    state = {f"{dense}.matrix_{side}.0": factor for side, factor in factors.items()}
    path = tmp_path / "sat" / "1" / "mp_rank_00_model_states.pt"
    torch.save({"module": state}, path)
    with pytest.raises(PlanError, match=f"LoRA factors for {dense}, and no weights to add them to"):
        streamconv.plan(tmp_path / "sat")
    torch.save({"module": {**state, f"{dense}.original.weight": torch.zeros(4, 4)}}, path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {f"base_model.model.{dense}.lora_{side}.weight": factor for side, factor in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert len(streamconv.plan(tmp_path / "sat", lora=adapter).tensors) == 1
    with pytest.raises(PlanError) as caught:
        streamconv.plan(tmp_path / "sat", lora=adapter, lora_scale=2.0)
    assert "--lora-scale may mean the LoRA in the source or the one of --lora" in str(caught.value)
