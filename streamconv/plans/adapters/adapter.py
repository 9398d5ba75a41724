"""An adapter: its config, and its tensors by the module that they belong to, whatever names its file gave them.

Names of peft are known by heart; those of other programs are brought to them here. (huggingface/peft 0.21:
utils/save_and_load.py, tuners/*/layer.py; kohya-ss/sd-scripts: networks/lora.py; KohakuBlueleaf/LyCORIS; huggingface/diffusers
0.42: loaders/lora_conversion_utils.py.)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from streamconv.ops import Expression
from streamconv.plans.wrappers import ANYWHERE, FACTORS, plain
from streamconv.storage.location import Location

PREFIX = "base_model.model."
"""What peft puts before the names of the model that an adapter is for."""
_SHARED = "base_model."
KIND = "peft_type"
NESTED = ".base_layer"
"""What stands in the name of a module whose factors are for another parameter of it than the last."""

_PARTS = (
    rf"{FACTORS}|lora_E|lora_mid|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|"
    "lokr_t2|ia3_l|hira_A|hira_B|vera_lambda_[bd]|oft_R|beft_bias|trainable_tokens_delta|alpha|diff|diff_b"
)
_PART = re.compile(
    rf"(?P<module>.+?)\.(?P<part>{_PARTS})(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<leaf>\.(weight|bias))?"
)
_WRAPPED = re.compile(rf"^module\.|(?<![^.])({'|'.join(ANYWHERE)})\.")
_ROWS = re.compile(r"\.token_adapter(?=\.trainable_tokens_delta)")

# What other programs call the parts, and the place in a name at which they stand.
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), made)
    for pattern, made in (
        (r"\.processor\.to_out_lora\.down(\.weight)?$", ".to_out.0.lora_A.weight"),
        (r"\.processor\.to_out_lora\.up(\.weight)?$", ".to_out.0.lora_B.weight"),
        (r"\.processor\.(\w+)_lora\.down(\.weight)?$", r".\1.lora_A.weight"),
        (r"\.processor\.(\w+)_lora\.up(\.weight)?$", r".\1.lora_B.weight"),
        (r"\.to_out_lora\.down(\.weight)?$", ".out_proj.lora_A.weight"),
        (r"\.to_out_lora\.up(\.weight)?$", ".out_proj.lora_B.weight"),
        (r"\.to_([qkv])_lora\.down(\.weight)?$", r".\1_proj.lora_A.weight"),
        (r"\.to_([qkv])_lora\.up(\.weight)?$", r".\1_proj.lora_B.weight"),
        (r"\.(lora|lora_linear_layer)\.down(\.weight)?$", ".lora_A.weight"),
        (r"\.(lora|lora_linear_layer)\.up(\.weight)?$", ".lora_B.weight"),
        (r"\.lora_down(\.weight)?$", ".lora_A.weight"),
        (r"\.lora_up(\.weight)?$", ".lora_B.weight"),
        (r"\.lora_up\.bias$", ".lora_B.bias"),
        (r"\.dora_scale$", ".lora_magnitude_vector"),
        (r"\.magnitude$", ".lora_magnitude_vector"),
    )
)
_UNKNOWN = re.compile(
    r"\.(lora_|hada_|lokr_|ia3_|vera_|oft_|boft_|hra_|hira_|miss_|gralora_|randlora_|delora_|road_|shira_|c3a_|fourierft_|"
    r"waveft_|vblora_|w_norm|b_norm|set_weight|reshape_weight|[ab][12]\b)"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        tensors: by their names in the file.
        config: `adapter_config.json`, or what takes its place; empty where there is none.
        path: named in messages.
        scale: instead of alpha / rank, where given.
        places: what was opened.
        notes: what is to be said of it where it is merged.
    """

    tensors: Mapping[str, Expression]
    config: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""
    scale: float | None = None
    places: tuple[Location, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, Expression]]:
        """Module -> part -> tensor."""
        return self._sorted[0]

    @cached_property
    def replacing(self) -> Mapping[str, Expression]:
        """Tensors that take the place of the base's, by their names there."""
        return self._sorted[1]

    @cached_property
    def shared(self) -> Mapping[str, Expression]:
        """Tensors that all layers share, by the last part of their names."""
        return self._sorted[2]

    def sorted_as(
        self,
        modules: Mapping[str, Mapping[str, Expression]],
        replacing: Mapping[str, Expression],
        directory: str = "",
    ) -> Adapter:
        """The adapter with other names, and the settings for the component of a pipeline in a directory."""
        prefix = f"{directory}."
        own = {
            key.removeprefix(prefix): value for key, value in self.config.items() if key.startswith(prefix)
        }
        if not own:  # of a file with one component, whatever the directory is called
            firsts = {key.partition(".")[0] for key in self.config if "." in key}
            own = (
                {key.partition(".")[2]: value for key, value in self.config.items() if "." in key}
                if len(firsts) == 1
                else {}
            )
        made = Adapter(self.tensors, own or self.config, self.path, self.scale, notes=self.notes)
        made.__dict__["_sorted"] = (modules, replacing, self.shared)
        return made

    @cached_property
    def unknown(self) -> list[str]:
        """Names of what is no part that is known, and replaces nothing either."""
        return [name for name in self.replacing if _UNKNOWN.search(f".{name}")]

    @cached_property
    def _sorted(
        self,
    ) -> tuple[Mapping[str, Mapping[str, Expression]], Mapping[str, Expression], Mapping[str, Expression]]:
        modules: dict[str, dict[str, Expression]] = defaultdict(dict)
        replacing: dict[str, Expression] = {}
        shared: dict[str, Expression] = {}
        for name, tensor in self.tensors.items():
            own = name.removeprefix(PREFIX)
            if own == name and name.startswith(_SHARED):
                shared[name.rpartition(".")[2] if not name.endswith(".default") else name.split(".")[-2]] = (
                    tensor
                )
                continue
            own = _ROWS.sub("", _spelled(own)).replace(".ln_tuning_layers", "")
            found = _PART.fullmatch(own)
            if found is None:
                replacing[plain(own)] = tensor
            else:
                bias = ".bias" if found["leaf"] == ".bias" else ""
                modules[found["module"]][found["part"] + bias] = tensor
        return modules, replacing, shared


def unwrapped(name: str) -> str:
    """A name without what training has put around it."""
    own = _WRAPPED.sub("", name)
    return own[own.index(PREFIX) :] if PREFIX in own else own


def is_part(name: str) -> bool:
    """Whether a tensor's name is that of a part of an adapter."""
    own = name.removeprefix(PREFIX)
    return _PART.fullmatch(_ROWS.sub("", _spelled(own))) is not None or ".ln_tuning_layers." in own


def saved_as(name: str) -> str:
    """A name in a run as peft saves it: without that of the adapter."""
    own = plain(name)
    found = _PART.fullmatch(own)
    return own if found is None else f"{found['module']}.{found['part']}{found['leaf'] or ''}"


def adapter_names(names: Iterable[str]) -> set[str]:
    """What the adapters are called that names in a run are of."""
    found = (_PART.fullmatch(name) for name in names)
    return {each["adapter"] for each in found if each and each["adapter"]}


def of_peft(name: str) -> bool:
    """Whether a name is as peft gives them, whose scale is in a config beside."""
    return name.startswith(PREFIX)


def _spelled(name: str) -> str:
    """A name as peft spells it, as far as its parts go."""
    for pattern, made in _SPELLINGS:
        changed, count = pattern.subn(made, name)
        if count:
            return changed
    return name
