"""What a pipeline of diffusers is called with: which of our settings and inputs, by which names.

All of it is read from the signature of its call, so that a new pipeline needs no entry here.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMES = {
    "height": ("height",),
    "width": ("width",),
    "frames": ("num_frames",),
    "steps": ("num_inference_steps",),
    "guidance": ("guidance_scale", "true_cfg_scale"),
    "guidance_2": ("guidance_scale_2",),
    "negative_prompt": ("negative_prompt",),
    "fps": ("frame_rate", "fps"),
    "image": ("image", "cond_image"),
    "last_image": ("last_image",),
    "video": ("video",),
}
"""Our name of a setting or an input -> what pipelines call it."""

INPUTS = ("image", "last_image", "video")
"""What a pipeline may start from, beside text."""

SETTINGS = tuple(name for name in NAMES if name not in (*INPUTS, "fps"))
"""What a user may ask for; the frames per second are the model's or those of a given video."""

FOREIGN = {
    "control_image": "a control image",
    "control_video": "a control video",
    "controls": "control videos",
    "face_video": "a video of a face",
    "id_cond": "embeddings of a face",
    "layers": "a number of layers, and makes images with transparency",
    "mask_image": "a mask",
    "mask_video": "a mask",
    "pose_video": "a video of poses",
    "pyramid_num_inference_steps_list": "numbers of steps for each of its stages",
}
"""Parameter of a pipeline that needs it, and that this command does not have -> what it is."""

SECTIONS = {"latent_window_size", "num_latent_frames_per_chunk", "temporal_tile_size"}
"""Parameters of pipelines that make whole sections, whatever number of frames is asked for."""

CONTINUES = {"frame_index", "history_sizes", "overlap_history"}
"""Parameters of pipelines in which a given video is the beginning, and not what is changed."""

FEWEST = {"MochiPipeline": 2}
"""Steps without which a pipeline cannot lay out its time steps."""

STARTS = {"image": "ImageToVideo|Image2Video|Img2Img|Edit|Refiner", "video": "VideoToVideo"}
"""Input -> how diffusers calls the pipelines that cannot do without it."""


@dataclass(frozen=True)
class Takes:
    """What a pipeline class takes.

    names: our name -> its own. defaults: our name -> its default, without those that are None.
    needs: inputs that it cannot do without. area: it is told the number of pixels, too.
    sections: it makes whole sections, so more frames than it was asked for. continues: a given
    video is where it begins. strength: share of the steps that is done, for those that start late.
    """

    pipeline: str
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    needs: frozenset[str]
    area: bool = False
    sections: bool = False
    continues: bool = False
    strength: float = 1.0

    @property
    def sized(self) -> bool:
        """Whether it makes the size that it is told."""
        return {"height", "width"} <= set(self.names)

    @property
    def fewest(self) -> int:
        """Steps of which one is done, for a pipeline that can do with so few."""
        return max(FEWEST.get(self.pipeline, 1), math.ceil(1 / self.strength))

    @property
    def still(self) -> bool:
        """Whether it makes an image. One that starts from a video makes as many frames."""
        return not {"frames", "video"} & set(self.names)


def read_takes(pipeline: Any) -> Takes:
    """Of a pipeline class. Raises ValueError if it needs what this command cannot give."""
    parameters = inspect.signature(pipeline.__call__).parameters
    name = pipeline.__name__
    for parameter, what in FOREIGN.items():
        if parameter in parameters:
            raise ValueError(f"a {name} needs {what}")
    names = {}
    for ours, theirs in NAMES.items():
        taken = [n for n in theirs if n in parameters]
        if ours == "guidance" and len(taken) == 2:
            taken = [_guides(parameters)]
        if ours == "video":  # not a tensor: it would be another one for each pipeline
            taken = [n for n in taken if not _tensor(parameters[n])]
        if taken:
            names[ours] = taken[0]
    if "steps" not in names:
        raise ValueError(f"a {name} decides on its steps itself")
    defaults = {ours: parameters[theirs].default for ours, theirs in names.items()}
    bare = {ours for ours, value in defaults.items() if value is inspect.Parameter.empty}
    needs = {n for n, words in STARTS.items() if n in names and re.search(words, name)}
    late = "strength" in parameters and "denoise_strength" not in parameters
    return Takes(
        pipeline=name,
        names=names,
        defaults={k: v for k, v in defaults.items() if k not in bare and v is not None},
        needs=frozenset(needs | bare & set(INPUTS)),
        area="max_area" in parameters,
        sections=bool(SECTIONS & set(parameters)),
        continues=bool(CONTINUES & set(parameters)),
        strength=parameters["strength"].default if late else 1.0,
    )


def _tensor(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is annotated as a tensor, None allowed, and as nothing else."""
    kind = inspect.formatannotation(parameter.annotation).strip("'\"")
    kind = re.sub(r"^(typing\.)?Optional\[(.*)\]$", r"\2", kind).removesuffix(" | None")
    return re.fullmatch(r"torch\.\w*Tensor", kind) is not None


def _guides(parameters: Mapping[str, inspect.Parameter]) -> str:
    """Which of two scales guides: not one that is embedded, and off or None by default."""
    embedded, true = parameters["guidance_scale"].default, parameters["true_cfg_scale"].default
    return "true_cfg_scale" if embedded in (None, 1.0) and true > 1 else "guidance_scale"
