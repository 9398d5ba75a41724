"""Whisper of MindFormers.

Source: mindspore-lab/mindformers r1.3.0: mindformers/models/whisper/convert_weight.py.
"""

from __future__ import annotations

from streamconv.plans.architectures.mindformers import Names, family
from streamconv.plans.architectures.whisper import WHISPER

CONVOLUTIONS = {"model.encoder.conv1.weight": "mels", "model.encoder.conv2.weight": "audio"}
"""Name -> its channels; the net has a window of height 1."""

_NORM = {"weight": "gamma", "bias": "beta"}
_TIED = "proj_out.weight"


def _name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if "layer_norm" in module:
        return f"{module}.{_NORM[leaf]}"
    return f"{module}.embedding_weight" if module.endswith(("embed_tokens", "embed_positions")) else name


_NAMES: Names = {
    line.name.text: _name(line.name.text)
    for line in WHISPER.lines
    if line.name.text not in (_TIED, *CONVOLUTIONS)
}
MF_WHISPER = family(
    WHISPER,
    "Whisper",
    _NAMES,
    "\n".join(f"{name} [audio, {channels}, 1, 3]" for name, channels in CONVOLUTIONS.items()),
)
