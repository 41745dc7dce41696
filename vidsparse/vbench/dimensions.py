"""What VBench measures: a dimension's range, weight and group, and what it has to load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dimension:
    """Of VBench 0.1.5.

    low, high: scores that count 0 and 1. custom: takes clips of any prompt. loads: its weights.
    """

    group: Literal["quality", "semantic"]
    loads: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    custom: bool = True


FLICKERING = "temporal_flickering"
DIMENSIONS = {
    "subject_consistency": Dimension("quality", "DINO ViT-B/16", 0.1462),
    "background_consistency": Dimension("quality", "CLIP ViT-B/32", 0.2615),
    FLICKERING: Dimension("quality", "nothing", 0.6293),
    "motion_smoothness": Dimension("quality", "AMT-S", 0.706, 0.9975),
    "aesthetic_quality": Dimension("quality", "CLIP ViT-L/14 and LAION's head"),
    "imaging_quality": Dimension("quality", "MUSIQ-SPAQ"),
    "dynamic_degree": Dimension("quality", "RAFT", weight=0.5),
    "object_class": Dimension("semantic", "GRiT and detectron2", custom=False),
    "multiple_objects": Dimension("semantic", "GRiT and detectron2", custom=False),
    "human_action": Dimension("semantic", "UMT-L/16"),
    "color": Dimension("semantic", "GRiT and detectron2", custom=False),
    "spatial_relationship": Dimension("semantic", "GRiT and detectron2", custom=False),
    "scene": Dimension("semantic", "Tag2Text", high=0.8222, custom=False),
    "appearance_style": Dimension("semantic", "CLIP ViT-B/32", 0.0009, 0.2855, custom=False),
    "temporal_style": Dimension("semantic", "ViCLIP", high=0.364),
    "overall_consistency": Dimension("semantic", "ViCLIP", high=0.364),
}
DOCUMENTED = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""Dimensions that VBench documents for clips of any prompt."""
PER_CLIP_SCALE = {"imaging_quality": 100.0}
"""Per-clip values are this many times what the average is stated in."""
QUALITY_SHARE = 4 / 5
"""Of the Total; the rest is Semantic."""
SAMPLES, FLICKER_SAMPLES = 5, 25
"""Samples of a prompt that are read; of temporal_flickering before its filter of static clips."""

DIVERSITY = "Diversity"
SECOND = (
    "Human_Anatomy",
    "Human_Identity",
    "Human_Clothes",
    DIVERSITY,
    "Composition",
    "Dynamic_Spatial_Relationship",
    "Dynamic_Attribute",
    "Motion_Order_Understanding",
    "Human_Interaction",
    "Complex_Landscape",
    "Complex_Plot",
    "Camera_Motion",
    "Motion_Rationality",
    "Instance_Preservation",
    "Mechanics",
    "Thermotics",
    "Material",
    "Multi-View_Consistency",
)
"""Dimensions of VBench-2.0."""
SECOND_CUSTOM = (
    "Human_Anatomy",
    "Human_Identity",
    "Human_Clothes",
    DIVERSITY,
    "Multi-View_Consistency",
)
"""Those that take clips of any prompt."""
SECOND_SAMPLES, DIVERSITY_SAMPLES = 3, 20
"""Samples of a prompt that are read, and that must be there."""
