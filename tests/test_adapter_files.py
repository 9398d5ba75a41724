"""Adapters in the files of every program: merged as the library that owns the format does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers as hf
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file
from test_lora import ATTENTION, GPT2, LLAMA, merged, trained

import streamconv
from streamconv.errors import PlanError, StreamconvError, UsageError

Tensors = dict[str, torch.Tensor]
TO = ["to_q", "to_k", "to_v", "to_out.0"]


def pipeline(path: Path) -> Any:
    """A tiny Stable Diffusion, saved."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    )  # fmt: skip
    text = hf.CLIPTextModel(
        hf.CLIPTextConfig(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=99, max_position_embeddings=16)
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32], in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=8
    )
    tokens = path / "words"
    tokens.mkdir(parents=True)
    (tokens / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (tokens / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = hf.CLIPTokenizer.from_pretrained(tokens)
    made = diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    made.save_pretrained(path / "base")
    return diffusers.StableDiffusionPipeline.from_pretrained(path / "base", safety_checker=None)


def tuned(pipe: Any, rank: int = 4, alpha: int = 8) -> tuple[Tensors, Tensors]:
    """Factors of unet and text encoder, as peft names them in the models, and the settings in these."""
    for model, targets in ((pipe.unet, [*TO, "conv1"]), (pipe.text_encoder, ["q_proj", "out_proj"])):
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.1
    return tuple(  # type: ignore[return-value]
        {name: value.contiguous() for name, value in convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(model)).items()}
        for model in (pipe.unet, pipe.text_encoder)
    )  # fmt: skip


def in_diffusers(unet: Tensors, text: Tensors, path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [*TO, "conv1", "q_proj", "out_proj"]}
    for old, new in (
        (".lora.down.", ".lora_A."),
        (".lora.up.", ".lora_B."),
    ):  # as its own trainers write them
        unet = {name.replace(old, new): value for name, value in unet.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        path, unet, text, unet_lora_adapter_metadata=settings, text_encoder_lora_adapter_metadata=settings
    )


def in_kohya(unet: Tensors, text: Tensors, path: Path) -> None:
    """As sd-scripts write it; of convolutions LoCon."""
    made: Tensors = {}
    for prefix, tensors in (("lora_unet_", unet), ("lora_te_", text)):
        for name, tensor in tensors.items():
            module, side = name.removesuffix(".weight").rsplit(".", 1)
            down = side in ("lora_A", "down")
            flat = prefix + module.removesuffix(".lora").removesuffix(".lora_linear_layer").replace(".", "_")
            made[f"{flat}.lora_{'down' if down else 'up'}.weight"] = tensor
            made[f"{flat}.alpha"] = torch.tensor(8.0)
    path.mkdir()
    save_file(made, path / "kohya.safetensors", {"ss_network_dim": "4", "ss_network_alpha": "8"})


def by_processors(unet: Tensors, text: Tensors, path: Path) -> None:
    """The oldest spelling of diffusers, without any scale, which is 1 then."""
    made: Tensors = {}
    for name, tensor in unet.items():
        if "conv" in name:
            continue
        module, side = name.removesuffix(".weight").rsplit(".", 1)
        block, _, leaf = module.removesuffix(".lora").removesuffix(".0").rpartition(".")
        made[f"unet.{block}.processor.{leaf}_lora.{side}.weight"] = tensor * 2 if side == "up" else tensor
    path.mkdir()
    save_file(made, path / "pytorch_lora_weights.safetensors")


FORMS: dict[str, Callable[[Tensors, Tensors, Path], None]] = {
    "diffusers": in_diffusers, "kohya": in_kohya, "processors": by_processors,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_pipeline_gets_each_part_where_it_belongs(form: str, tmp_path: Path) -> None:
    """Against the pipeline that loads the same file, and fuses it."""
    pipe = pipeline(tmp_path)
    FORMS[form](*tuned(pipe), tmp_path / "adapter")
    streamconv.convert(tmp_path / "base", tmp_path / "out", lora=tmp_path / "adapter", engine="inline")
    fresh = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    fresh.load_lora_weights(
        tmp_path / "adapter", weight_name=next((tmp_path / "adapter").glob("*.safetensors")).name
    )
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    changed = 0
    for directory, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        found, before = (
            load_file(tmp_path / root / directory / f"{stem}.safetensors") for root in ("out", "base")
        )
        expected = getattr(fresh, directory).state_dict()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
            changed += not torch.equal(tensor, before[name])
    assert changed > 8


def test_one_component_takes_what_is_for_it_alone_or_refuses(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    unet, text = tuned(pipe)
    in_kohya(unet, text, tmp_path / "both")
    with pytest.raises(PlanError, match="the base has no such weight"):
        streamconv.plan(tmp_path / "base" / "unet", lora=tmp_path / "both")
    in_kohya(unet, {}, tmp_path / "unet")
    streamconv.convert(tmp_path / "base" / "unet", tmp_path / "one", lora=tmp_path / "unet", engine="inline")
    streamconv.convert(tmp_path / "base", tmp_path / "all", lora=tmp_path / "both", engine="inline")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "all" / "unet" / name).read_bytes()


def test_a_module_of_no_component_is_named(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    unet, text = tuned(pipe)
    in_kohya({f"other.{name}": value for name, value in unet.items()}, text, tmp_path / "adapter")
    with pytest.raises(PlanError, match="no component has such a module"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")


def comfy(state: Tensors, *, alpha: bool) -> Tensors:
    """peft's factors as ComfyUI names them."""
    made: Tensors = {}
    for name, tensor in state.items():
        made[name.replace("base_model.model.", "diffusion_model.")] = (
            tensor if alpha or "lora_A" in name else tensor * 2
        )
        if alpha:
            made[name.replace("base_model.model.", "diffusion_model.").rsplit(".lora_", 1)[0] + ".alpha"] = (
                torch.tensor(8.0)
            )
    return made


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyui_with_an_alpha_or_without(alpha: bool, prefix: str, tmp_path: Path) -> None:
    model = trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    state = comfy(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), alpha=alpha)
    save_file(state, tmp_path / "lora.safetensors")
    file = tmp_path / "base" / "model.safetensors"
    save_file({prefix + name: value for name, value in load_file(file).items()}, file)
    streamconv.convert(
        tmp_path / "base", tmp_path / "out", lora=tmp_path / "lora.safetensors", engine="inline"
    )
    expected = model.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name.removeprefix(prefix)], rtol=1e-5, atol=1e-6)


def test_lycoris_in_a_file_of_its_own(tmp_path: Path) -> None:
    """LoHa, LoKr with a whole factor, LoCon in Tucker's form, and differences, each against its formula."""
    torch.manual_seed(0)
    base = {f"net.{name}.weight": torch.randn(16, 12) for name in ("a", "b", "c", "d")}
    base |= {
        "net.conv.weight": torch.randn(16, 12, 3, 3),
        "net.a.bias": torch.randn(16),
        "net.hada.weight": torch.randn(16, 12, 3, 3),
    }
    r, t = 4, torch.randn
    ha, hb, ga, gb = t(16, r), t(r, 12), t(16, r), t(r, 12)
    w1, w2a, w2b = t(4, 3), t(4, r), t(r, 4)
    whole1, whole2 = t(4, 3), t(4, 4)
    down, up, mid = t(r, 12, 1, 1), t(16, r, 1, 1), t(r, r, 3, 3)
    diff, bias = t(16, 12), t(16)
    t1, t2, wa, wb, va, vb = t(r, r, 3, 3), t(r, r, 3, 3), t(r, 16), t(r, 12), t(r, 16), t(r, 12)
    state = {
        "lycoris_net_a.hada_w1_a": ha, "lycoris_net_a.hada_w1_b": hb, "lycoris_net_a.hada_w2_a": ga, "lycoris_net_a.hada_w2_b": gb, "lycoris_net_a.alpha": torch.tensor(2.0),
        "lycoris_net_a.diff_b": bias, "lycoris_net_b.lokr_w1": w1, "lycoris_net_b.lokr_w2_a": w2a, "lycoris_net_b.lokr_w2_b": w2b, "lycoris_net_b.alpha": torch.tensor(2.0),
        "lycoris_net_c.lokr_w1": whole1, "lycoris_net_c.lokr_w2": whole2, "lycoris_net_c.alpha": torch.tensor(2.0), "lycoris_net_d.diff": diff,
        "lycoris_net_conv.lora_down.weight": down, "lycoris_net_conv.lora_up.weight": up, "lycoris_net_conv.lora_mid.weight": mid, "lycoris_net_conv.alpha": torch.tensor(2.0),
        "lycoris_net_hada.hada_t1": t1, "lycoris_net_hada.hada_w1_a": wa, "lycoris_net_hada.hada_w1_b": wb,
        "lycoris_net_hada.hada_t2": t2, "lycoris_net_hada.hada_w2_a": va, "lycoris_net_hada.hada_w2_b": vb,
    }  # fmt: skip
    cores = [torch.einsum("ijkl,jr,ip->prkl", core, b, a) for core, a, b in ((t1, wa, wb), (t2, va, vb))]
    expected = {
        "net.a.weight": base["net.a.weight"] + (ha @ hb) * (ga @ gb) / 2,
        "net.a.bias": base["net.a.bias"] + bias,
        "net.b.weight": base["net.b.weight"] + torch.kron(w1, w2a @ w2b) / 2,
        "net.c.weight": base["net.c.weight"] + torch.kron(whole1, whole2),
        "net.d.weight": base["net.d.weight"] + diff,
        "net.conv.weight": base["net.conv.weight"] + torch.einsum("mnkl,im,nj->ijkl", mid, up[..., 0, 0], down[..., 0, 0]) / 2,
        "net.hada.weight": base["net.hada.weight"] + cores[0] * cores[1],
    }  # fmt: skip
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    save_file(state, tmp_path / "lora.safetensors")
    streamconv.convert(
        tmp_path / "base", tmp_path / "out", lora=tmp_path / "lora.safetensors", engine="inline"
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


def test_peft_without_its_config_has_no_scale(tmp_path: Path) -> None:
    model = trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(PlanError, match="give the scale with --lora-scale"):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    for name, tensor in merged(tmp_path, lora_scale=2.0).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["w"], "there is no adapter in it"),
        (["layers.0.wq.mindpet_delta_lora_a"], "of MindFormers"),
        (["transformer.layers.0.attention.dense.matrix_A.0"], "of SAT"),
    ],
)
def test_what_is_no_adapter_is_refused(names: list[str], said: str, tmp_path: Path) -> None:
    trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=said):
        streamconv.plan(tmp_path / "base", lora=tmp_path / "other.safetensors")


# ----------------------------------------------------------------------------------- from one form to another


def through(source: Path, out: Path, form: str, **options: Any) -> Path:
    streamconv.convert(source, out, to_arch=form, engine="inline", **options)
    return out


def same_merge(base: Path, one: Path, other: Path, tmp_path: Path) -> None:
    """Both adapters make the same of a base, up to rounding of their factors."""
    for name, adapter in (("with-one", one), ("with-other", other)):
        streamconv.convert(base, tmp_path / name, lora=adapter, engine="inline", overwrite=True)
    changed = 0
    for file in (tmp_path / "with-one").rglob("*.safetensors"):
        inside = file.relative_to(tmp_path / "with-one")
        first, second, before = (
            load_file(place / inside) for place in (tmp_path / "with-one", tmp_path / "with-other", base)
        )
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)
            changed += not torch.equal(tensor, before[name])
    assert changed


@pytest.mark.parametrize("form", ["diffusers-lora", "kohya", "comfyui"])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LLAMA, {}),
        (LLAMA, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        (LLAMA, {"use_rslora": True}),
        (LLAMA, {"use_dora": True}),
        (LLAMA, {"lora_bias": True}),
        (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),  # below `transformer.`
    ],
)
def test_a_lora_of_peft_in_another_form_and_back(
    form: str, config: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(config, {"target_modules": ATTENTION, **options}, tmp_path)
    if form != "diffusers-lora" and options.keys() & {
        "use_dora",
        "lora_bias",
    }:  # they have no such thing, or another
        with pytest.raises(StreamconvError):
            through(tmp_path / "adapter", tmp_path / "other", form)
        return
    out = through(tmp_path / "adapter", tmp_path / "other", form)
    file = next(out.glob("*.safetensors"))
    assert len(list(out.glob("*.safetensors"))) == 1 and not (out / "adapter_config.json").exists()
    same_merge(tmp_path / "base", tmp_path / "adapter", file, tmp_path)
    likely = {"like": tmp_path / "base"} if form == "kohya" else {}
    back = through(file, tmp_path / "back", "peft", **likely)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, back)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_magnitudes_without_a_config_are_said_in_the_one_that_is_written(tmp_path: Path) -> None:
    model = trained(LLAMA, {"target_modules": ATTENTION, "use_dora": True}, tmp_path)
    file = next(through(tmp_path / "adapter", tmp_path / "other", "diffusers-lora").glob("*.safetensors"))
    back = through(file, tmp_path / "back", "peft")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.arange(20)[None]
    made = peft.PeftModel.from_pretrained(base, back)(ids).logits
    torch.testing.assert_close(made, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["diffusers-lora", "kohya"])
def test_diffusers_reads_what_is_written(form: str, tmp_path: Path) -> None:
    """From kohya's form to diffusers' and back, each loaded by the pipeline itself."""
    pipe = pipeline(tmp_path)
    unet, text = tuned(pipe)
    first, second = (in_diffusers, in_kohya) if form == "kohya" else (in_kohya, in_diffusers)
    first(unet, text, tmp_path / "source")
    second(unet, text, tmp_path / "same")
    out = through(
        next((tmp_path / "source").glob("*.safetensors")), tmp_path / "out", form, like=tmp_path / "base"
    )
    same_merge(tmp_path / "base", tmp_path / "same", next(out.glob("*.safetensors")), tmp_path)
    fresh = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    fresh.load_lora_weights(out, weight_name=next(out.glob("*.safetensors")).name)
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    expected = fresh.unet.state_dict()
    for name, tensor in load_file(
        tmp_path / "with-one" / "unet" / "diffusion_pytorch_model.safetensors"
    ).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_flat_names_need_the_base(tmp_path: Path) -> None:
    trained(LLAMA, {"target_modules": ATTENTION}, tmp_path)
    file = next(through(tmp_path / "adapter", tmp_path / "other", "kohya").glob("*.safetensors"))
    with pytest.raises(PlanError, match="give the base that it is for with --like"):
        streamconv.plan(file, to_arch="peft")


@pytest.mark.parametrize(
    ("options", "form", "said"),
    [
        ({"use_dora": True}, "kohya", "it is DoRA, and only LoRA"),
        ({"modules_to_save": ["lm_head"]}, "comfyui", "replaces whole tensors"),
        ({"lora_bias": True}, "kohya", "and only LoRA are written"),
    ],
)
def test_what_a_form_has_not_is_refused(
    options: dict[str, Any], form: str, said: str, tmp_path: Path
) -> None:
    trained(LLAMA, {"target_modules": ATTENTION, **options}, tmp_path)
    with pytest.raises(PlanError, match=said):
        streamconv.plan(tmp_path / "adapter", to_arch=form)
