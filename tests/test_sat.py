"""SAT checkpoints: joining ranks, merging LoRA, CogVideoX to a diffusers pipeline, CogVLM to Hugging Face, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from comparing import assert_alike, terms_of
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from recipe_contract import contents
from reference_models import sat_cogvideox
from safetensors.torch import load_file
from test_tokenizers import KINDS, trained
from transformers import T5Config, T5EncoderModel

import streamconv
from streamconv.errors import CheckpointError, PlanError, UsageError
from streamconv.families.cogvideox import COGVIDEOX, SAT_COGVIDEOX, SAT_COGVIDEOX_DIFFUSERS
from streamconv.families.cogvideox_vae import COGVIDEOX_VAE, SAT_COGVIDEOX_VAE, SAT_VAE
from streamconv.families.cogvlm import COGVLM, SAT_COGAGENT, SAT_COGVLM

State = dict[str, torch.Tensor]


def random_state(
    architecture: Any, config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32
) -> State:
    """Every tensor of a table, random; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, declared in architecture.tensors(architecture.sizes_of(config)).items():
        if declared.optional:
            continue
        tensor = torch.randn(declared.shape, generator=generator)
        norm = "norm" in name and name.endswith("weight") and len(declared.shape) == 1
        fan = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 1
        state[name] = ((1 + 0.1 * tensor) if norm else 0.5 * tensor / fan**0.5).to(dtype)
    return state


def save(directory: Path, ranks: list[State], config: dict[str, Any] | None = None, **beside: Any) -> Path:
    """A directory as SAT writes it."""
    (directory / "100").mkdir(parents=True)
    (directory / "latest").write_text("100")
    for rank, state in enumerate(ranks):
        torch.save({**beside, "module": state}, directory / "100" / f"mp_rank_{rank:02d}_model_states.pt")
    if config is not None:
        shown = {key: value for key, value in config.items() if key != "model_type"}
        (directory / "model_config.json").write_text(json.dumps({**shown, "model_parallel_size": len(ranks)}))
    return directory


# ------------------------------------------------------------------------------------- CogVideoX

_BASE = {
    "model_type": "sat-cogvideox", "attention_head_dim": 64, "patch_size": 2, "patch_size_t": None, "text_embed_dim": 32,
    "time_embed_dim": 512, "in_channels": 16, "out_channels": 16, "hidden_size": 128, "num_layers": 2,
    "learned_positions": False, "positions": 0, "sines": False, "ofs_embed_dim": None,
}  # fmt: skip
TINY = {
    "2B": _BASE | {"hidden_size": 30 * 64, "sines": True, "num_layers": 1},
    "5B": _BASE,
    "5B-I2V": _BASE | {"in_channels": 32, "learned_positions": True, "positions": 17776},
    "1.5-5B": _BASE | {"patch_size_t": 2},
    "1.5-5B-I2V": _BASE | {"patch_size_t": 2, "in_channels": 32, "ofs_embed_dim": 512},
}
REAL = {
    "2B": {"hidden_size": 1920, "num_layers": 30, "text_embed_dim": 4096},
    "5B": {"hidden_size": 3072, "num_layers": 42, "text_embed_dim": 4096},
    "5B-I2V": {"hidden_size": 3072, "num_layers": 42, "text_embed_dim": 4096},
    "1.5-5B": {"hidden_size": 3072, "num_layers": 42, "text_embed_dim": 4096},
    "1.5-5B-I2V": {"hidden_size": 3072, "num_layers": 42, "text_embed_dim": 4096},
}
KEYS = {
    "2B": (556, 736),
    "5B": (772, 1024),
    "5B-I2V": (773, 1025),
    "1.5-5B": (772, 1024),
    "1.5-5B-I2V": (776, 1028),
}
VAE = {"block_out_channels": [32, 64, 64, 96], "layers_per_block": 2, "latent_channels": 16, "in_channels": 3}


def own(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers config without what is not an argument."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("variant", TINY)
def test_tables_are_the_real_class_at_full_size(variant: str) -> None:
    config = {**TINY[variant], **REAL[variant]}
    made = SAT_COGVIDEOX_DIFFUSERS.config(config)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**own(made))
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table = {name: each.shape for name, each in COGVIDEOX.tensors(COGVIDEOX.sizes_of(made)).items()}
    assert table == real
    source = SAT_COGVIDEOX.tensors(SAT_COGVIDEOX.sizes_of(config))
    assert (len(source), len(real)) == KEYS[variant]


def test_the_autoencoders_table_is_the_real_class_at_full_size() -> None:
    config = VAE | {
        "block_out_channels": [128, 256, 256, 512],
        "layers_per_block": 3,
        "scaling_factor": 0.7,
        "generation": "1.0",
    }
    made = SAT_VAE.config(config)
    with torch.device("meta"):
        model = AutoencoderKLCogVideoX(**own(made))
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {
        name: each.shape for name, each in COGVIDEOX_VAE.tensors(COGVIDEOX_VAE.sizes_of(made)).items()
    } == real
    assert len(SAT_COGVIDEOX_VAE.tensors(SAT_COGVIDEOX_VAE.sizes_of(config))) == 436


def t5() -> T5EncoderModel:
    torch.manual_seed(1)
    return T5EncoderModel(
        T5Config(
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_heads=4,
            num_layers=2,
            vocab_size=50,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def engine(variant: str, **extra: torch.Tensor) -> State:
    """What a training run saves: everything, each under its prefix."""
    state = {
        f"model.diffusion_model.{name}": tensor
        for name, tensor in random_state(SAT_COGVIDEOX, TINY[variant]).items()
    }
    state |= {
        f"first_stage_model.{name}": tensor
        for name, tensor in random_state(SAT_COGVIDEOX_VAE, VAE, 2).items()
    }
    state |= {
        f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in t5().state_dict().items()
    }
    return state | extra


def loaded(cls: Any, directory: Path) -> Any:
    model, info = cls.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name == "2B" else []) for name in TINY]
)
@pytest.mark.slow
def test_a_training_run_becomes_a_pipeline_that_loads(variant: str, tmp_path: Path) -> None:
    leftovers = {
        "model.diffusion_model.transformer.position_embeddings.weight": torch.zeros(64, 128),
        "model.diffusion_model.mixins.pos_embed.freqs_sin": torch.zeros(8, 64),
    }
    if TINY[variant]["sines"]:
        leftovers.popitem()
        leftovers["model.diffusion_model.mixins.pos_embed.pos_embedding"] = torch.zeros(
            1, 9, TINY[variant]["hidden_size"]
        )
    if variant == "5B-I2V":
        leftovers.popitem()
    source = save(
        tmp_path / "sat", [engine(variant, **leftovers)], lr_scheduler=None, global_steps=7, ds_version="0.16"
    )
    plan = streamconv.plan(source, recipe="sat-cogvideox")
    named = {name.replace("model.diffusion_model.", "transformer/") for name in leftovers}
    assert {dropped.name for dropped in plan.dropped} == named
    streamconv.convert(plan, tmp_path / "out")
    transformer = loaded(CogVideoXTransformer3DModel, tmp_path / "out" / "transformer")
    autoencoder = loaded(AutoencoderKLCogVideoX, tmp_path / "out" / "vae")
    text = loaded(T5EncoderModel, tmp_path / "out" / "text_encoder")
    ids = torch.arange(7)[None]
    assert_alike(text(ids).last_hidden_state, t5()(ids).last_hidden_state, terms_of(text))
    assert transformer.config.in_channels == TINY[variant]["in_channels"]
    assert autoencoder.config.scaling_factor == (1.15258426 if variant == "2B" else 0.7)
    assert bool(autoencoder.config.invert_scale_latents) == variant.startswith("1.5")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == (
        "CogVideoXImageToVideoPipeline" if "I2V" in variant else "CogVideoXPipeline"
    )
    scheduler = diffusers.CogVideoXDDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.config.snr_shift_scale == (3.0 if variant == "2B" else 1.0)


@pytest.mark.parametrize("variant", ["5B", "1.5-5B", "1.5-5B-I2V"])
def test_the_transformer_computes_what_sat_computes(variant: str, tmp_path: Path) -> None:
    config = TINY[variant]
    state = random_state(SAT_COGVIDEOX, config)
    wrapped = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    streamconv.convert(
        save(tmp_path / "sat", [wrapped]), tmp_path / "out", recipe="sat-cogvideox", engine="inline"
    )
    model = loaded(CogVideoXTransformer3DModel, tmp_path / "out" / "transformer")
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(1, 4, config["in_channels"], 8, 12, generator=generator)
    text, step = torch.randn(1, 5, 32, generator=generator), torch.tensor([321])
    ofs = torch.tensor([2.0]) if config["ofs_embed_dim"] else None
    frames = 4 // (config["patch_size_t"] or 1)
    grid = get_3d_rotary_pos_embed(64, ((0, 0), (4, 6)), (4, 6), frames, grid_type="linspace")
    with torch.no_grad():
        found = model(video, text, step, ofs=ofs, image_rotary_emb=grid, return_dict=False)[0]
        expected = sat_cogvideox.transformer(state, config, video, text, step, ofs)
    assert_alike(found, expected, terms_of(model))


@pytest.mark.slow
def test_the_autoencoder_computes_what_sat_computes(tmp_path: Path) -> None:
    state = random_state(SAT_COGVIDEOX_VAE, VAE, 4)
    torch.save({"state_dict": state}, tmp_path / "3d-vae.pt")
    config = {"model_type": "sat-cogvideox-vae", "scaling_factor": 0.7, "generation": "1.0", **VAE}
    (tmp_path / "vae.json").write_text(json.dumps(config))
    streamconv.convert(
        tmp_path / "3d-vae.pt",
        tmp_path / "out",
        recipe="sat-cogvideox-vae",
        config=tmp_path / "vae.json",
        engine="inline",
    )
    model = loaded(AutoencoderKLCogVideoX, tmp_path / "out")
    generator = torch.Generator().manual_seed(3)
    video, latent = (
        torch.randn(1, 3, 5, 32, 32, generator=generator),
        torch.randn(1, 16, 3, 4, 4, generator=generator),
    )
    with torch.no_grad():
        found = model.encode(video).latent_dist.parameters
        expected = sat_cogvideox.encode(state, VAE, video)
        assert_alike(found, expected, terms_of(model))
        found = model.decode(latent).sample
        expected = sat_cogvideox.decode(state, VAE, latent)
        assert_alike(found, expected, terms_of(model))


@pytest.mark.parametrize("variant", ["5B", "5B-I2V", "1.5-5B-I2V"])
@pytest.mark.slow
def test_and_back_it_is_sats_release(variant: str, tmp_path: Path) -> None:
    state = engine(variant)
    streamconv.convert(
        save(tmp_path / "sat", [state]), tmp_path / "out", recipe="sat-cogvideox", engine="inline"
    )
    streamconv.convert(
        tmp_path / "out", tmp_path / "back", recipe="sat-cogvideox", reverse=True, to="sat", only=["transformer/*", "vae/*"],
        engine="inline",
    )  # fmt: skip
    release = tmp_path / "back" / "transformer"
    assert (release / "latest").read_text() == "1"
    after = torch.load(release / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    wanted = {name: tensor for name, tensor in state.items() if name.startswith("model.diffusion_model.")}
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in wanted.items())
    after = torch.load(tmp_path / "back" / "vae" / "3d-vae.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(after[name], state[f"first_stage_model.{name}"]) for name in after)
    streamconv.convert(tmp_path / "back", tmp_path / "again", recipe="sat-cogvideox", engine="inline")
    parts = contents(tmp_path / "out")
    assert contents(tmp_path / "again") == {
        name: parts[name] for name in parts if not name.startswith("text_encoder")
    }


def test_the_separate_autoencoder_is_preferred(tmp_path: Path) -> None:
    """As SAT distributes: transformer/1/..., vae/3d-vae.pt, with the discriminator still in it."""
    save(tmp_path / "sat" / "transformer", [engine("5B")])
    (tmp_path / "sat" / "vae").mkdir()
    state = random_state(SAT_COGVIDEOX_VAE, VAE, 9)
    torch.save(
        {"state_dict": {**state, "loss.discriminator.weight": torch.ones(3)}},
        tmp_path / "sat" / "vae" / "3d-vae.pt",
    )
    plan = streamconv.plan(tmp_path / "sat", recipe="sat-cogvideox")
    assert any("3d-vae.pt" in note for note in plan.notes)
    assert [dropped.name for dropped in plan.dropped] == ["vae/loss.discriminator.weight"]
    streamconv.convert(plan, tmp_path / "out", engine="inline")
    made = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(made["encoder.conv_in.conv.weight"], state["encoder.conv_in.conv.weight"])


def test_an_autoencoder_alone_needs_to_know_its_model(tmp_path: Path) -> None:
    torch.save({"state_dict": random_state(SAT_COGVIDEOX_VAE, VAE)}, tmp_path / "3d-vae.pt")
    source = tmp_path / "3d-vae.pt"
    with pytest.raises(PlanError, match="scaling factor"):
        streamconv.plan(source, recipe="sat-cogvideox-vae")
    # What the refusal names is all that is needed: the rest is in names and shapes.
    (tmp_path / "vae.json").write_text('{"scaling_factor": 0.7}')
    with pytest.raises(PlanError, match='"generation"'):
        streamconv.plan(source, recipe="sat-cogvideox-vae", config=tmp_path / "vae.json")
    (tmp_path / "vae.json").write_text('{"scaling_factor": 0.7, "generation": "1.5"}')
    streamconv.convert(
        source,
        tmp_path / "out",
        recipe="sat-cogvideox-vae",
        config=tmp_path / "vae.json",
        engine="inline",
    )
    loaded(AutoencoderKLCogVideoX, tmp_path / "out")
    # A converted one says it, too, where it is what the result is like and not what the source is.
    streamconv.convert(
        source, tmp_path / "alike", recipe="sat-cogvideox-vae", like=tmp_path / "out", engine="inline"
    )
    assert contents(tmp_path / "alike") == contents(tmp_path / "out")
    # So does a pipeline, in which it gets the place that it has there.
    pipeline = tmp_path / "pipeline"
    t5().save_pretrained(pipeline / "text_encoder")
    (tmp_path / "out").rename(pipeline / "vae")
    index = {
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "text_encoder": ["transformers", "T5EncoderModel"],
    }
    (pipeline / "model_index.json").write_text(json.dumps(index))
    streamconv.convert(source, tmp_path / "in", recipe="sat-cogvideox-vae", like=pipeline, engine="inline")
    assert contents(tmp_path / "in") == contents(pipeline)
    loaded(AutoencoderKLCogVideoX, tmp_path / "in" / "vae")
    with pytest.raises(
        PlanError, match=r"an AutoencoderKLCogVideoX already, .*--like DIR, not with --config"
    ):
        streamconv.plan(source, recipe="sat-cogvideox-vae", config=pipeline / "vae" / "config.json")


def test_a_whole_pipeline_back_to_sat_says_what_stands_in_the_way(tmp_path: Path) -> None:
    state = engine("5B")
    pipeline, back = tmp_path / "pipeline", tmp_path / "back"
    streamconv.convert(save(tmp_path / "sat", [state]), pipeline, recipe="sat-cogvideox", engine="inline")
    with pytest.raises(PlanError) as caught:
        streamconv.plan(pipeline, to="sat")
    found = {
        re.findall(r"which (\w+)/ is not in", each.message)[0]: each.hint for each in caught.value.problems
    }
    assert found["transformer"] == found["vae"] == "what leads there: --recipe sat-cogvideox --reverse"
    assert "leave it out with --drop 'text_encoder/*'" in str(found["text_encoder"])
    with pytest.raises(PlanError, match=r"which text_encoder/ is not in .*--drop 'text_encoder/\*'"):
        streamconv.plan(pipeline, recipe="sat-cogvideox", reverse=True, to="sat")
    plan = streamconv.plan(pipeline, recipe="sat-cogvideox", reverse=True, to="sat", drop=["text_encoder/*"])
    # What is SAT's is told nothing about the index that diffusers reads, which it does not have.
    (said,) = (note for note in plan.notes if "model_index.json" in note)
    assert said == "not copied: model_index.json (diffusers loads no transformer, vae in this naming)"
    streamconv.convert(plan, back, engine="inline")
    assert not (back / "model_index.json").exists() and not (back / "scheduler").exists()
    after = torch.load(back / "transformer" / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert after.keys() == {name for name in state if name.startswith("model.diffusion_model.")}
    assert all(torch.equal(after[name], state[name]) for name in after)
    streamconv.convert(back, tmp_path / "again", recipe="sat-cogvideox", engine="inline")
    loaded(CogVideoXTransformer3DModel, tmp_path / "again" / "transformer")


def test_what_no_recipe_leads_to_sat_from_is_not_said_to_be_left_out(tmp_path: Path) -> None:
    """Leaving out everything would leave nothing to write."""
    for name in ("text_encoder", "text_encoder_2"):
        t5().save_pretrained(tmp_path / "pipeline" / name)
    index = {
        "_class_name": "Pipe",
        **{name: ["transformers", "T5"] for name in ("text_encoder", "text_encoder_2")},
    }
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(PlanError, match="there is no recipe that leads there") as caught:
        streamconv.plan(tmp_path / "pipeline", to="sat")
    assert len(caught.value.problems) == 2
    assert "--drop" not in str(caught.value)


def test_like_may_be_the_one_component_that_a_recipe_leads_to(tmp_path: Path) -> None:
    """Its config holds what shapes do not show."""
    source = save(tmp_path / "sat", [engine("5B")])
    pipeline = tmp_path / "pipeline"
    streamconv.convert(source, pipeline, recipe="sat-cogvideox", engine="inline")
    whole = contents(pipeline)
    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    (pipeline / "transformer" / "config.json").write_text(json.dumps(config | {"sample_frames": 17}))
    plan = streamconv.plan(source, recipe="sat-cogvideox", like=pipeline / "transformer")
    streamconv.convert(plan, tmp_path / "out", engine="inline")
    assert contents(tmp_path / "out") == whole
    assert loaded(CogVideoXTransformer3DModel, tmp_path / "out" / "transformer").config.sample_frames == 17
    assert not (tmp_path / "out" / "config.json").exists()
    # Without a recipe, it is the one that has its names.
    noted = streamconv.plan(pipeline, like=pipeline / "vae").notes
    assert any("3 weight files" in note for note in noted)
    # What is none of them is refused, and so is what is of another size.
    (tmp_path / "another").mkdir()
    torch.save({"wte.weight": torch.ones(3, 3)}, tmp_path / "another" / "pytorch_model.bin")
    with pytest.raises(PlanError, match="is one model, and not known to be one of transformer, vae, text_"):
        streamconv.plan(source, recipe="sat-cogvideox", like=tmp_path / "another")
    other = streamconv.plan(save(tmp_path / "wide", [engine("1.5-5B")]), recipe="sat-cogvideox")
    streamconv.convert(other, tmp_path / "other", engine="inline")
    with pytest.raises(PlanError, match="of this config has"):
        streamconv.plan(source, recipe="sat-cogvideox", like=tmp_path / "other" / "transformer")


def test_like_completes_the_pipeline(tmp_path: Path) -> None:
    """Text encoder, tokenizer and whatever else from the original; the plan says what differs."""
    original = save(tmp_path / "original-sat", [engine("5B")])
    streamconv.convert(original, tmp_path / "original", recipe="sat-cogvideox", engine="inline")
    (tmp_path / "original" / "tokenizer").mkdir()
    (tmp_path / "original" / "tokenizer" / "spiece.model").write_bytes(b"\x00\xff")
    tuned = {
        name: tensor * 2 for name, tensor in engine("5B").items() if name.startswith("model.diffusion_model.")
    }
    source = save(tmp_path / "tuned-sat", [tuned])
    plan = streamconv.plan(source, recipe="sat-cogvideox", like=tmp_path / "original")
    assert any("vae/ is taken from" in note for note in plan.notes)
    assert any("names, shapes and number of files are those of" in note for note in plan.notes)
    streamconv.convert(plan, tmp_path / "out")
    before, after = contents(tmp_path / "original"), contents(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if not name.startswith("transformer/"))
    assert (tmp_path / "out" / "tokenizer" / "spiece.model").read_bytes() == b"\x00\xff"
    assert (tmp_path / "out" / "model_index.json").is_file()
    loaded(CogVideoXTransformer3DModel, tmp_path / "out" / "transformer")


@pytest.mark.slow
def test_one_command_ends_in_a_pipeline_that_loads_with_its_lora(tmp_path: Path) -> None:
    """Everything that CogVideoXPipeline wants; then the LoRA of the same run, by load_lora_weights."""
    original = save(tmp_path / "original-sat", [engine("5B")])
    streamconv.convert(original, tmp_path / "original", recipe="sat-cogvideox", engine="inline")
    (tmp_path / "original" / "tokenizer").mkdir()
    (tmp_path / "original" / "tokenizer" / "spiece.model").write_bytes(trained(**KINDS["unigram nfkc"]))
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 226}
    (tmp_path / "original" / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    tuned = with_lora(
        {name: tensor for name, tensor in engine("5B").items() if name.startswith("model.diffusion_model.")}
    )
    source = save(tmp_path / "tuned-sat", [tuned])
    streamconv.convert(source, tmp_path / "out", recipe="sat-cogvideox", like=tmp_path / "original")
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.tokenizer is not None
    assert pipeline.transformer.config.num_layers == 2

    streamconv.convert(source, tmp_path / "lora", to_arch="diffusers-lora", engine="inline")
    base = diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "original")
    base.load_lora_weights(tmp_path / "lora", adapter_name="tuned")
    assert base.get_list_adapters() == {"transformer": ["tuned"]}
    base.fuse_lora()
    fused = base.transformer.transformer_blocks[0].attn1.to_q.base_layer.weight
    torch.testing.assert_close(
        fused, pipeline.transformer.transformer_blocks[0].attn1.to_q.weight, rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_the_variant_is_said(tmp_path: Path) -> None:
    for variant in TINY:
        state = random_state(SAT_COGVIDEOX, TINY[variant])
        if TINY[variant]["sines"]:
            state["mixins.pos_embed.pos_embedding"] = torch.zeros(1, 9, TINY[variant]["hidden_size"])
        source = save(
            tmp_path / variant, [{f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}]
        )
        plan = streamconv.plan(source, recipe="sat-cogvideox")
        assert any(f"it is a CogVideoX {variant}: " in note for note in plan.notes), plan.notes


def test_a_config_of_another_model_is_named(tmp_path: Path) -> None:
    state = random_state(SAT_COGVLM, COGVLM1)
    source = save(tmp_path / "sat", [state], COGVLM1 | {"inner_hidden_size": 128})
    with pytest.raises(PlanError) as caught:
        streamconv.plan(source, recipe="sat-cogvlm")
    said = str(caught.value)
    assert "it is [96, 64]; a CogVLM of SAT of this config has [128, 64]" in said
    assert "--config" in said
    (source / "model_config.json").unlink()
    with pytest.raises(PlanError, match="name it with --config FILE"):
        streamconv.plan(source, recipe="sat-cogvlm")


def test_quantised_weights_under_a_lora_are_refused(tmp_path: Path) -> None:
    base = {
        f"model.diffusion_model.{name}": tensor for name, tensor in random_state(SAT_COGVIDEOX, _BASE).items()
    }
    state = with_lora(base)
    name = "model.diffusion_model.transformer.layers.0.attention.dense.original.weight"
    state[name] = torch.zeros(128 * 64, 1, dtype=torch.uint8)
    with pytest.raises(PlanError, match="QLoRA"):
        streamconv.plan(save(tmp_path / "sat", [state]), recipe="sat-cogvideox")


def test_a_lora_without_its_base_is_refused(tmp_path: Path) -> None:
    state = with_lora(
        {
            f"model.diffusion_model.{name}": tensor
            for name, tensor in random_state(SAT_COGVIDEOX, _BASE).items()
        }
    )
    state = {name: tensor for name, tensor in state.items() if "dense.original" not in name}
    with pytest.raises(PlanError, match="no weights to add them to"):
        streamconv.plan(save(tmp_path / "sat", [state]), recipe="sat-cogvideox")


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("keep", [False, True])
def test_factors_that_are_none_are_refused(side: str, keep: bool, tmp_path: Path) -> None:
    wrapped = {
        f"model.diffusion_model.{name}": tensor for name, tensor in random_state(SAT_COGVIDEOX, _BASE).items()
    }
    state = with_lora(wrapped)
    module = "model.diffusion_model.transformer.layers.0.attention.query_key_value"
    options = {"to_arch": "diffusers-lora"} if keep else {"recipe": "sat-cogvideox"}
    state[f"{module}.matrix_{side}.0"] = torch.tensor(1.0)
    with pytest.raises(PlanError, match="is not a matrix"):
        streamconv.plan(save(tmp_path / "scalar", [state]), **options)
    del state[f"{module}.matrix_{side}.0"]
    with pytest.raises(PlanError, match="missing"):
        streamconv.plan(save(tmp_path / "gone", [state]), **options)


def test_a_base_whose_lora_was_taken_out_is_a_plain_model(tmp_path: Path) -> None:
    state = with_lora(engine("5B"))
    base = {name: tensor for name, tensor in state.items() if ".matrix_" not in name}
    plan = streamconv.plan(save(tmp_path / "sat", [base]), recipe="sat-cogvideox")
    assert not any("LoRA" in note for note in plan.notes)


def test_several_iterations_without_latest_are_listed(tmp_path: Path) -> None:
    source = save(tmp_path / "sat", [random_state(SAT_COGVLM, COGVLM1)], COGVLM1)
    (source / "latest").unlink()
    (source / "100").rename(source / "200")
    save(tmp_path / "more", [random_state(SAT_COGVLM, COGVLM1)])
    (tmp_path / "more" / "100").rename(source / "100")
    with pytest.raises(CheckpointError, match="give one of the directories: 100, 200"):
        streamconv.open(source)


def test_what_is_left_over_is_named_by_group(tmp_path: Path) -> None:
    state = engine(
        "5B",
        **{"conditioner.embedders.1.open_clip.weight": torch.zeros(2), "optimizer.exp_avg.0": torch.zeros(2)},
    )
    state["model.diffusion_model.transformer.layers.0.attention.extra.weight"] = torch.zeros(2)
    source = save(tmp_path / "sat", [state])
    with pytest.raises(PlanError) as caught:
        streamconv.plan(source, recipe="sat-cogvideox")
    said = str(caught.value)
    assert "a text encoder that was saved with the model" in said
    assert "attention.extra.weight" in said
    plan = streamconv.plan(source, recipe="sat-cogvideox", allow_unmatched=True)
    assert any("left out the tensors at module.optimizer.exp_avg.0" in note for note in plan.notes)


@pytest.mark.parametrize(
    "lost", ["mixins.patch_embed.text_proj.weight", "transformer.layers.1.mlp.dense_4h_to_h.bias"]
)
def test_a_partial_checkpoint_is_named(lost: str, tmp_path: Path) -> None:
    state = engine("5B")
    del state[f"model.diffusion_model.{lost}"]
    with pytest.raises((PlanError, CheckpointError), match=re.escape(lost)):
        streamconv.plan(save(tmp_path / "sat", [state]), recipe="sat-cogvideox")


@pytest.mark.parametrize(
    "lost",
    [
        "conditioner.embedders.0.transformer.shared.weight",
        "conditioner.embedders.0.transformer.encoder.block.1.layer.0.SelfAttention.k.weight",
        "conditioner.embedders.0.transformer.encoder.block.0.",
        "first_stage_model.decoder.conv_in.conv.weight",
        "first_stage_model.encoder.",
    ],
)
def test_a_companion_that_is_not_whole_can_be_left_out(lost: str, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in engine("5B").items() if not name.startswith(lost)}
    source = save(tmp_path / "sat", [state])
    part = "vae" if lost.startswith("first") else "text_encoder"
    with pytest.raises(PlanError, match=r"missing|number of levels"):
        streamconv.plan(source, to_arch="diffusers")
    if part == "text_encoder":
        with pytest.raises(PlanError, match=re.escape("--drop 'text_encoder/*'")):
            streamconv.plan(source)
    streamconv.convert(source, tmp_path / "out", to_arch="diffusers", drop=[f"{part}/*"])
    assert not (tmp_path / "out" / part).exists()
    loaded(CogVideoXTransformer3DModel, tmp_path / "out" / "transformer")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index[part] == [None, None]


def test_what_cannot_be_read_is_not_lost_beside_a_companion_in_part(tmp_path: Path) -> None:
    state = engine("5B")
    state = {name: tensor for name, tensor in state.items() if not name.endswith("shared.weight")}
    state["model.diffusion_model.transformer.layers.0.lost.weight"] = torch.eye(3).to_sparse()
    source = save(tmp_path / "sat", [state])
    with pytest.raises(CheckpointError, match=r"lost\.weight"):
        streamconv.plan(source, drop=["text_encoder/*"])


def test_what_cannot_be_read_of_the_autoencoder_beside_is_not_lost(tmp_path: Path) -> None:
    save(tmp_path / "sat" / "transformer", [engine("5B")])
    (tmp_path / "sat" / "vae").mkdir()
    state = {**random_state(SAT_COGVIDEOX_VAE, VAE, 9), "lost": torch.eye(3).to_sparse()}
    torch.save({"state_dict": state}, tmp_path / "sat" / "vae" / "3d-vae.pt")
    with pytest.raises(PlanError, match="vae/lost"):
        streamconv.plan(tmp_path / "sat")
    plan = streamconv.plan(tmp_path / "sat", drop=["vae/lost"])
    assert [dropped.name for dropped in plan.dropped] == ["vae/lost"]


def test_a_few_layers_of_a_training_run_become_a_pipeline_that_loads(tmp_path: Path) -> None:
    source = save(tmp_path / "sat", [engine("5B")])
    streamconv.convert(source, tmp_path / "out", recipe="sat-cogvideox", try_layers=1)
    transformer = loaded(CogVideoXTransformer3DModel, tmp_path / "out" / "transformer")
    assert transformer.config.num_layers == 1 < TINY["5B"]["num_layers"]
    loaded(AutoencoderKLCogVideoX, tmp_path / "out" / "vae")
    loaded(T5EncoderModel, tmp_path / "out" / "text_encoder")
    alone = save(tmp_path / "alone", [random_state(SAT_COGVIDEOX, TINY["5B"])])
    streamconv.convert(alone, tmp_path / "single", to_arch="diffusers", layers="1")
    assert loaded(CogVideoXTransformer3DModel, tmp_path / "single" / "transformer").config.num_layers == 1


def test_without_a_recipe_it_has_no_name_that_diffusers_opens(tmp_path: Path) -> None:
    source = save(tmp_path / "sat", [engine("5B")])
    plan = streamconv.plan(source)
    assert {"transformer/model.safetensors", "vae/model.safetensors"} <= {file.path for file in plan.outputs}
    assert any("the names are those of a CogVideoX transformer of SAT" in note for note in plan.notes)
    streamconv.convert(source, tmp_path / "out")
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")


# -------------------------------------------------------------------------------------- its LoRA


def with_lora(
    state: State, rank: int = 4, prefix: str = "model.diffusion_model.", seed: int = 5, parts_of_qkv: int = 3
) -> State:
    """The attention of every layer wrapped as SAT's LoraMixin wraps it."""
    made: State = {}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        found = re.fullmatch(
            re.escape(prefix)
            + r"(transformer\.layers\.\d+\.attention\.(query_key_value|dense))\.(weight|bias)",
            name,
        )
        if found is None:
            made[name] = tensor
            continue
        module = prefix + found[1]
        made[f"{module}.original.{found[3]}"] = tensor
        if found[3] == "weight":
            parts = parts_of_qkv if found[2] == "query_key_value" else 1
            for part in range(parts):
                made[f"{module}.matrix_A.{part}"] = torch.randn(rank, tensor.shape[1], generator=generator)
                made[f"{module}.matrix_B.{part}"] = torch.randn(
                    tensor.shape[0] // parts, rank, generator=generator
                )
    return made


def merged(state: State, scale: float) -> State:
    """W + scale * B A for each part of the rows, in F32, rounded once."""
    made = {}
    for name, tensor in state.items():
        if ".matrix_" in name:
            continue
        target = name.replace(".original.", ".")
        factors = sorted(
            key for key in state if key.startswith(name.removesuffix("original.weight") + "matrix_A")
        )
        if name.endswith(".original.weight"):
            delta = torch.cat(
                [state[key.replace("_A", "_B")].float() @ state[key].float() for key in factors]
            )
            tensor = (tensor.float() + scale * delta).to(tensor.dtype)
        made[target] = tensor
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_an_unmerged_lora_is_merged(scale: float | None, dtype: torch.dtype, tmp_path: Path) -> None:
    base = {
        f"model.diffusion_model.{name}": tensor
        for name, tensor in random_state(SAT_COGVIDEOX, _BASE, dtype=dtype).items()
    }
    state = with_lora(base)
    source = save(tmp_path / "sat", [state])
    plan = streamconv.plan(source, recipe="sat-cogvideox", lora_scale=scale)
    assert any("unmerged LoRA of rank 4 is merged into 4 weights" in note for note in plan.notes)
    for each in (plan, streamconv.plan(source, lora_scale=scale)):  # what is merged is in no config
        assert not any("lora_" in text.content for text in each.texts)
    stored = streamconv.open(source).contents.keys()
    assert {each for tensor in plan.tensors for each in tensor.sources} <= stored
    (made,) = [each for each in plan.tensors if each.spec.name.endswith("blocks.1.attn1.to_out.0.weight")]
    assert [name.rpartition("dense.")[2] for name in made.sources] == [
        "original.weight", "matrix_A.0", "matrix_B.0",
    ]  # fmt: skip
    streamconv.convert(plan, tmp_path / "out", engine="inline")
    expected = merged(state, 1 / 4 if scale is None else scale)
    streamconv.convert(
        save(tmp_path / "merged", [expected]), tmp_path / "wanted", recipe="sat-cogvideox", engine="inline"
    )
    found, wanted = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("out", "wanted")
    )
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_lora_is_exported_for_diffusers(scale: float | None, tmp_path: Path) -> None:
    state = with_lora(engine("5B"))
    plan = streamconv.plan(save(tmp_path / "sat", [state]), to_arch="diffusers-lora", lora_scale=scale)
    assert len(plan.tensors) == 8 * _BASE["num_layers"]
    streamconv.convert(plan, tmp_path / "out", engine="inline")
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    a, b = (weights[f"transformer.transformer_blocks.1.attn1.to_k.lora_{side}.weight"] for side in "AB")
    module = "model.diffusion_model.transformer.layers.1.attention.query_key_value.matrix_{}.1"
    assert torch.equal(a, state[module.format("A")])
    torch.testing.assert_close(b, state[module.format("B")] * (1 / 4 if scale is None else scale))

    base = {name: tensor for name, tensor in state.items() if ".matrix_" not in name}
    base = {name.replace(".original.", "."): tensor for name, tensor in base.items()}
    streamconv.convert(
        save(tmp_path / "base", [base]), tmp_path / "pipeline", recipe="sat-cogvideox", engine="inline"
    )
    model = loaded(CogVideoXTransformer3DModel, tmp_path / "pipeline" / "transformer")
    before = model.transformer_blocks[1].attn1.to_k.weight.clone()
    model.load_lora_adapter(weights, prefix="transformer", adapter_name="tuned")
    assert model.peft_config["tuned"].r == 4
    model.fuse_lora()
    torch.testing.assert_close(
        model.transformer_blocks[1].attn1.to_k.base_layer.weight, before + b @ a, rtol=1e-5, atol=1e-5
    )


# ---------------------------------------------------------------------------------- model parallel


def split(state: State, count: int, config: dict[str, Any]) -> list[State]:
    """Ranks as SAT's modules hold them, by what kind of layer each is."""
    heads, groups = (
        config["num_attention_heads"],
        config.get("num_multi_query_heads") or config["num_attention_heads"],
    )

    def parts(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        leaf = name.rpartition(".")[2]
        if "linear_proj" in name or "patch_embedding" in name:
            return [tensor] * count
        if "query_key_value" in name:
            ratios = (1, 1, 1) if "mixins.eva" in name else (heads, groups, groups)
            unit = len(tensor) // sum(ratios)
            kinds = [kind.chunk(count) for kind in tensor.split([unit * ratio for ratio in ratios])]
            return [torch.cat([kind[rank] for kind in kinds]) for rank in range(count)]
        column = ("dense_h_to_4h", "gate_proj", "lm_head")
        if any(word in name for word in column) or (
            name.endswith("word_embeddings.weight") and len(tensor) >= 1000
        ):
            return list(tensor.chunk(count))
        if leaf == "weight" and any(
            word in name for word in ("dense_4h_to_h", "attention.dense", "vision_dense_list")
        ):
            return list(tensor.chunk(count, dim=1))
        return [tensor] * count

    pieces = {name: parts(name, tensor) for name, tensor in state.items()}
    return [{name: piece[rank].clone() for name, piece in pieces.items()} for rank in range(count)]


def with_lora_each(ranks: list[State], parts_of_qkv: int = 3) -> list[State]:
    """A LoRA on every rank, each with factors of its own."""
    return [
        with_lora(rank, prefix="", seed=seed, parts_of_qkv=parts_of_qkv) for seed, rank in enumerate(ranks)
    ]


_EVA = {
    "model_class": "EVA2CLIPModel", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "vocab_size": 1,
    "inner_hidden_size": 64, "max_sequence_length": 5, "use_final_layernorm": False, "layernorm_epsilon": 1e-6,
    "image_size": [28, 28], "in_channels": 3, "patch_size": 14,
}  # fmt: skip
COGVLM1 = {
    "model_type": "sat-cogvlm", "model_class": "CogVLMModel", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 8,
    "vocab_size": 1024, "inner_hidden_size": 96, "use_bias": False, "eva_args": _EVA, "text_processor_version": "chat",
}  # fmt: skip
COGVLM2 = COGVLM1 | {"model_class": "CogVLM2Model", "num_attention_heads": 16, "num_multi_query_heads": 8}
COGVLMS = {"sat-cogvlm": COGVLM1, "sat-cogvlm2": COGVLM2}


@pytest.mark.parametrize("recipe", COGVLMS)
def test_any_number_of_ranks_gives_the_same_bytes(recipe: str, tmp_path: Path) -> None:
    config = COGVLMS[recipe]
    state = random_state(SAT_COGVLM, config, dtype=torch.bfloat16)
    state["mixins.rotary.rotary_emb.inv_freq"] = torch.rand(64 // config["num_attention_heads"] // 2)
    found = []
    for count in (1, 2, 4, 8):
        source = save(tmp_path / f"mp{count}", split(state, count, config), config)
        streamconv.convert(source, tmp_path / f"out{count}", recipe=recipe, engine="inline")
        found.append(contents(tmp_path / f"out{count}"))
    assert found[0] == found[1] == found[2] == found[3]
    assert streamconv.verify(tmp_path / "mp4", tmp_path / "out4").problems == ()


@pytest.mark.parametrize(("recipe", "parts"), [("sat-cogvlm", 3), ("sat-cogvlm", 1), ("sat-cogvlm2", 1)])
def test_a_lora_on_several_ranks_is_merged_into_each_ones_part(
    recipe: str, parts: int, tmp_path: Path
) -> None:
    config = COGVLMS[recipe]
    state = random_state(SAT_COGVLM, config)
    state["mixins.rotary.rotary_emb.inv_freq"] = torch.rand(64 // config["num_attention_heads"] // 2)
    ranks = with_lora_each(split(state, 2, config), parts)
    plan = streamconv.plan(save(tmp_path / "sat", ranks, config), recipe=recipe, lora_scale=0.5)
    assert any("of rank 4 is merged into 4 weights with scale 0.5" in note for note in plan.notes)
    streamconv.convert(plan, tmp_path / "out", engine="inline")
    expected = save(tmp_path / "merged", [merged(rank, 0.5) for rank in ranks], config)
    streamconv.convert(expected, tmp_path / "wanted", recipe=recipe, engine="inline")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wanted"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_reading_leaves_a_lora_as_it_is(tmp_path: Path) -> None:
    """What is in the file is what is shown; each rank's factors are its own."""
    one = with_lora(engine("5B"))
    opened = streamconv.open(save(tmp_path / "one", [one]))
    name = "transformer/transformer.layers.0.attention.dense.matrix_B.0"
    assert torch.equal(
        torch.from_numpy(opened[name].numpy()), one[f"model.diffusion_model.{name.partition('/')[2]}"]
    )
    several = with_lora_each(split(random_state(SAT_COGVLM, COGVLM1), 2, COGVLM1))
    opened = streamconv.open(save(tmp_path / "two", several, COGVLM1))
    for rank, state in enumerate(several):
        name = "transformer.layers.1.attention.query_key_value.matrix_A.2"
        assert torch.equal(torch.from_numpy(opened[f"{name}.rank_{rank}"].numpy()), state[name])
    assert opened["transformer.layers.1.attention.dense.original.weight"].shape == (64, 64)


def test_a_lora_on_several_ranks_is_not_exported(tmp_path: Path) -> None:
    wrapped = {
        f"model.diffusion_model.{name}": tensor for name, tensor in random_state(SAT_COGVIDEOX, _BASE).items()
    }
    ranks = [with_lora(each) for each in split(wrapped, 2, {"num_attention_heads": 2})]
    source = save(tmp_path / "sat", ranks)
    with pytest.raises(PlanError, match="split among ranks cannot be kept apart"):
        streamconv.plan(source, to_arch="diffusers-lora")


def test_the_merged_model_is_what_auto_finds(tmp_path: Path) -> None:
    """Its LoRA is exported only where that is asked for; the other components come along."""
    plan = streamconv.plan(save(tmp_path / "sat", [with_lora(engine("5B"))]), recipe="auto")
    assert any("merged into 4 weights" in note for note in plan.notes)
    assert {output.path.partition("/")[0] for output in plan.outputs} == {
        "transformer",
        "vae",
        "text_encoder",
    }


@pytest.mark.parametrize("recipe", COGVLMS)
def test_ranks_are_written_as_sat_splits_them(recipe: str, tmp_path: Path) -> None:
    config = COGVLMS[recipe]
    state = random_state(SAT_COGVLM, config)
    state["mixins.rotary.rotary_emb.inv_freq"] = torch.rand(64 // config["num_attention_heads"] // 2)
    streamconv.convert(
        save(tmp_path / "sat", [state], config), tmp_path / "hf", recipe=recipe, engine="inline"
    )
    streamconv.convert(
        tmp_path / "hf", tmp_path / "out", recipe=recipe, reverse=True, to="sat", tp=4, workers=2
    )
    for rank, expected in enumerate(split(state, 4, config)):
        file = tmp_path / "out" / "1" / f"mp_rank_{rank:02d}_model_states.pt"
        found = torch.load(file, weights_only=True)["module"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "out" / "model_config.json").read_text())["model_parallel_size"] == 4
    assert streamconv.verify(tmp_path / "hf", tmp_path / "out").problems == ()
    streamconv.convert(tmp_path / "out", tmp_path / "again", recipe=recipe, engine="inline")
    assert contents(tmp_path / "again") == contents(tmp_path / "hf")
    with pytest.raises(PlanError, match="do not divide by 3"):
        streamconv.plan(tmp_path / "hf", recipe=recipe, reverse=True, to="sat", tp=3)
    with pytest.raises(UsageError, match="--tp has no effect with --to safetensors"):
        streamconv.plan(tmp_path / "hf", recipe=recipe, reverse=True, tp=2)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recipe", COGVLMS)
def test_sats_own_models_are_split_anew(recipe: str, ranks: int, tmp_path: Path) -> None:
    config = COGVLMS[recipe]
    state = random_state(SAT_COGVLM, config)
    source = save(tmp_path / "sat", split(state, 3 - ranks, config), config)
    streamconv.convert(source, tmp_path / "out", to="sat", tp=ranks)
    for rank, expected in enumerate(split(state, ranks, config)):
        file = tmp_path / "out" / "1" / f"mp_rank_{rank:02d}_model_states.pt"
        found = torch.load(file, weights_only=True)["module"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "out" / "latest").read_text() == "1"
    assert json.loads((tmp_path / "out" / "model_config.json").read_text())["model_parallel_size"] == ranks
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(PlanError, match="is for models in its own naming"):
        streamconv.plan(source, to="sat", recipe=recipe)  # what that makes is none


def test_a_training_run_of_sat_becomes_its_release(tmp_path: Path) -> None:
    source = save(tmp_path / "sat", [engine("5B")])
    with pytest.raises(PlanError, match="text_encoder"):
        streamconv.plan(source, to="sat")
    streamconv.convert(source, tmp_path / "out", to="sat", drop=["text_encoder/*"])
    found = torch.load(tmp_path / "out/transformer/1/mp_rank_00_model_states.pt", weights_only=True)["module"]
    wanted = {name: each for name, each in engine("5B").items() if name.startswith("model.diffusion_model.")}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
    assert (tmp_path / "out/vae/3d-vae.pt").is_file() and (tmp_path / "out/transformer/latest").is_file()
    streamconv.convert(tmp_path / "out", tmp_path / "pipeline", recipe="sat-cogvideox")
    loaded(CogVideoXTransformer3DModel, tmp_path / "pipeline" / "transformer")


@pytest.mark.parametrize("recipe", COGVLMS)
def test_cogvlm_has_the_names_and_the_buffer_that_its_code_wants(recipe: str, tmp_path: Path) -> None:
    config = COGVLMS[recipe]
    state = random_state(SAT_COGVLM, config)
    frequencies = torch.rand(64 // config["num_attention_heads"] // 2)
    state["mixins.rotary.rotary_emb.inv_freq"] = frequencies
    streamconv.convert(
        save(tmp_path / "sat", [state], config), tmp_path / "hf", recipe=recipe, engine="inline"
    )
    made = load_file(tmp_path / "hf" / "model.safetensors")
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    table = COGVLM.tensors(COGVLM.sizes_of(document))
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        name: each.shape for name, each in table.items()
    }
    for layer in range(2):
        assert torch.equal(made[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"], frequencies)
    assert document["vision_config"]["num_positions"] == 5
    assert ("num_multi_query_heads" in document) == (recipe == "sat-cogvlm2")

    streamconv.convert(
        tmp_path / "hf", tmp_path / "back", recipe=recipe, reverse=True, to="sat", engine="inline"
    )
    after = torch.load(tmp_path / "back" / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    again = streamconv.plan(tmp_path / "back", recipe=recipe)
    assert len(again.tensors) == len(made)


@pytest.mark.parametrize(("recipe", "source_keys", "target_keys"), [("sat-cogvlm", 1156, 1187)])
def test_the_published_size_has_as_many_keys(recipe: str, source_keys: int, target_keys: int) -> None:
    config = {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000, "inner_hidden_size": 11008,
        "eva_args": _EVA | {"num_layers": 63, "hidden_size": 1792, "num_attention_heads": 16, "inner_hidden_size": 15360,
                            "max_sequence_length": 1226},
    }  # fmt: skip
    from streamconv.plans import named

    made = named(recipe)
    assert made.source is not None
    assert made.target is not None
    assert made.config is not None
    assert len(made.source.tensors(made.source.sizes_of(config))) == source_keys
    assert len(made.target.tensors(made.target.sizes_of(made.config(config)))) == target_keys


def test_cogagent_with_its_second_tower(tmp_path: Path) -> None:
    """Cross attention is split among ranks as any other; the second tower is whole in each."""
    config = COGVLM1 | {
        "model_class": "CogAgentModel", "is_decoder": [True] * 2, "cross_attn_hidden_size": 32,
        "cross_hidden_size_per_attention_head": 4, "cross_image_pix": 56,
    }  # fmt: skip
    state = random_state(SAT_COGAGENT, config)
    state["mixins.rotary.rotary_emb.inv_freq"] = torch.rand(4)
    state["mixins.encoder.vit.model.blocks.0.attn.q_proj.weight"] = torch.randn(32, 32)

    def rank_of(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        if ".cross_attention.key_value." in name:
            return torch.cat([kind.chunk(2)[rank] for kind in tensor.chunk(2)])
        if ".cross_attention.query." in name:
            return tensor.chunk(2)[rank]
        if ".cross_attention.dense." in name:
            return tensor.chunk(2, 1)[rank]
        return split({name: tensor}, 2, config)[rank][name]

    ranks = [
        {name: rank_of(name, tensor, rank).clone() for name, tensor in state.items()} for rank in range(2)
    ]
    streamconv.convert(
        save(tmp_path / "two", ranks, config), tmp_path / "hf", recipe="sat-cogagent", engine="inline"
    )
    made = load_file(tmp_path / "hf" / "model.safetensors")
    name = "layers.1.cross_attention.key_value.weight"
    assert torch.equal(made["model.layers.1.cross_attn.key_value.weight"], state[f"transformer.{name}"])
    assert "model.cross_vision.vit.model.blocks.0.attn.q_proj.weight" in made
    streamconv.convert(
        tmp_path / "hf", tmp_path / "back", recipe="sat-cogagent", reverse=True, to="sat", engine="inline"
    )
    after = torch.load(tmp_path / "back" / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    with pytest.raises(PlanError, match="use --recipe sat-cogagent"):
        streamconv.plan(tmp_path / "two", recipe="sat-cogvlm")


def test_experts_are_where_the_arithmetic_wants_them(tmp_path: Path) -> None:
    """One layer: SAT's arithmetic on SAT's names, the Hugging Face code's on its names."""
    config = COGVLM1 | {"num_layers": 1}
    state = random_state(SAT_COGVLM, config)
    streamconv.convert(
        save(tmp_path / "sat", [state], config), tmp_path / "hf", recipe="sat-cogvlm", engine="inline"
    )
    made = load_file(tmp_path / "hf" / "model.safetensors")
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    vision = torch.tensor([False, True, True, True, False, False])[:, None]

    def attention(
        qkv: tuple[torch.Tensor, torch.Tensor], dense: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        mixed = torch.where(vision, x @ qkv[1].T, x @ qkv[0].T)
        q, k, v = (part.view(6, 8, 8).transpose(0, 1) for part in mixed.chunk(3, -1))
        context = (
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(0, 1)
            .reshape(6, 64)
        )
        return torch.where(vision, context @ dense[1].T, context @ dense[0].T)

    def glu(up: torch.Tensor, gate: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    sat, hf = state, {name.removeprefix("model.layers.0."): tensor for name, tensor in made.items()}
    ours = attention(
        (
            sat["transformer.layers.0.attention.query_key_value.weight"],
            sat["mixins.rotary.vision_query_key_value_list.0.weight"],
        ),
        (sat["transformer.layers.0.attention.dense.weight"], sat["mixins.rotary.vision_dense_list.0.weight"]),
    )
    theirs = attention(
        (
            hf["self_attn.language_expert_query_key_value.weight"],
            hf["self_attn.vision_expert_query_key_value.weight"],
        ),
        (hf["self_attn.language_expert_dense.weight"], hf["self_attn.vision_expert_dense.weight"]),
    )
    assert_alike(theirs, ours, 2 * 64)
    language = glu(
        sat["transformer.layers.0.mlp.dense_h_to_4h.weight"], sat["mixins.mlp.gate_proj.0.weight"],
        sat["transformer.layers.0.mlp.dense_4h_to_h.weight"],
    )  # fmt: skip
    seen = glu(
        sat["mixins.mlp.vision_dense_h_to_4h_list.0.weight"], sat["mixins.mlp.vision_gate_proj.0.weight"],
        sat["mixins.mlp.vision_dense_4h_to_h_list.0.weight"],
    )  # fmt: skip
    for expert, expected in (("language", language), ("vision", seen)):
        parts = (hf[f"mlp.{expert}_mlp.{part}_proj.weight"] for part in ("up", "gate", "down"))
        assert_alike(glu(*parts), expected, 2 * 64)


# --------------------------------------------------------------------------------- which files


def test_an_averaged_copy_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    state = random_state(SAT_COGVLM, COGVLM1)
    source = save(tmp_path / "sat", [state], COGVLM1)
    (source / "100-ema").mkdir()
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"module": averaged}, source / "100-ema" / "mp_rank_00_model_states.pt")
    for ema, wanted in ((False, state), (True, averaged)):
        opened = streamconv.open(source, ema=ema)
        assert torch.equal(torch.from_numpy(opened["mixins.eva.boi"].numpy()), wanted["mixins.eva.boi"])
    (source / "latest").write_text("100-ema")  # as a run leaves it that is killed between the two saves
    assert len(streamconv.open(source)) == len(state)


@pytest.mark.parametrize("given", ["iteration", "file", "without latest"])
def test_it_is_found_however_it_is_given(given: str, tmp_path: Path) -> None:
    source = save(tmp_path / "sat", [random_state(SAT_COGVLM, COGVLM1)], COGVLM1)
    if given == "without latest":
        (source / "latest").unlink()
    path = {"iteration": source / "100", "file": source / "100" / "mp_rank_00_model_states.pt"}.get(
        given, source
    )
    if given == "iteration":
        (source / "model_config.json").rename(source / "100" / "model_config.json")
    assert streamconv.plan(path, recipe="sat-cogvlm").tensors


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    source = save(tmp_path / "sat", split(random_state(SAT_COGVLM, COGVLM1), 4, COGVLM1), COGVLM1)
    (source / "100" / "mp_rank_02_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="of 4 model-parallel ranks, 2 are missing"):
        streamconv.open(source)
    (source / "100" / "mp_rank_03_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="says that there are 4 model-parallel ranks; there are 2"):
        streamconv.open(source)


def test_a_save_whose_first_rank_went_elsewhere_is_not_whole(tmp_path: Path) -> None:
    ranks = split(random_state(SAT_COGVLM, COGVLM1), 4, COGVLM1)
    source, apart = save(tmp_path / "sat", ranks, COGVLM1), tmp_path / "apart"
    (apart / "100").mkdir(parents=True)
    (apart / "latest").write_text("100")
    for name in ("model_config.json", "100/mp_rank_00_model_states.pt"):
        (source / name).rename(apart / name)
    for part in (source, apart):
        with pytest.raises(CheckpointError, match=r"model-parallel ranks"):
            streamconv.open(part)
    for name in ("model_config.json", "100/mp_rank_00_model_states.pt"):
        (apart / name).rename(source / name)
    assert streamconv.plan(source, recipe="sat-cogvlm").tensors


def test_ranks_that_hold_other_tensors_are_named(tmp_path: Path) -> None:
    ranks = split(random_state(SAT_COGVLM, COGVLM1), 2, COGVLM1)
    ranks[1].pop("mixins.eva.boi")
    with pytest.raises(CheckpointError, match=r"other tensors than rank 0: mixins\.eva\.boi"):
        streamconv.open(save(tmp_path / "sat", ranks, COGVLM1))


def test_copies_that_should_be_equal_are_proven(tmp_path: Path) -> None:
    from streamconv.errors import ConversionError

    ranks = split(random_state(SAT_COGVLM, COGVLM1), 2, COGVLM1)
    ranks[1]["transformer.final_layernorm.weight"][3] += 1
    source = save(tmp_path / "sat", ranks, COGVLM1)
    with pytest.raises(ConversionError, match=r"transformer\.final_layernorm\.weight"):
        streamconv.convert(source, tmp_path / "out", recipe="sat-cogvlm", engine="inline")


@pytest.mark.parametrize("recipe", COGVLMS)
def test_the_other_generation_is_told_so(recipe: str, tmp_path: Path) -> None:
    (other,) = set(COGVLMS) - {recipe}
    source = save(tmp_path / "sat", [random_state(SAT_COGVLM, COGVLMS[other])], COGVLMS[other])
    with pytest.raises(PlanError, match=f"use --recipe {other}"):
        streamconv.plan(source, recipe=recipe)


@pytest.mark.parametrize("recipe", COGVLMS)
@pytest.mark.parametrize("options", [{"recipe": "auto"}, {"to_arch": "hf"}])
def test_the_config_of_the_source_decides_which_generation_it_is(
    recipe: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = save(tmp_path / "sat", [random_state(SAT_COGVLM, COGVLMS[recipe])], COGVLMS[recipe])
    found, named = streamconv.plan(source, **options), streamconv.plan(source, recipe=recipe)
    assert any(note.startswith(f"recipe {recipe}:") for note in found.notes)
    assert [tensor.spec for tensor in found.tensors] == [tensor.spec for tensor in named.tensors]


def test_a_latest_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    source = save(tmp_path / "sat", [random_state(SAT_COGVLM, COGVLM1)], COGVLM1)
    (source / "latest").write_text("../../etc")
    assert streamconv.open(source).format == "SAT"


def test_a_prefix_that_others_have_too_does_not_make_it_one_of_sat(tmp_path: Path) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"  # of Stable Diffusion
    torch.save({"state_dict": {name: torch.zeros(4, 4, 3, 3)}}, tmp_path / "model.ckpt")
    assert streamconv.open(tmp_path / "model.ckpt").format != "SAT"
