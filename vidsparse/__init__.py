"""Training-free block-sparse attention for video diffusion transformers in diffusers.

The public names are imported on first use, so that `import vidsparse` costs nothing and needs
neither diffusers nor triton.
"""

TYPE_CHECKING = False  # as in typing, whose import takes longer than all of this
if TYPE_CHECKING:
    from vidsparse.accelerate import accelerate_pipeline as accelerate_pipeline
    from vidsparse.accelerate import restore_pipeline as restore_pipeline
    from vidsparse.accelerate import run_report as run_report
    from vidsparse.attention import sparse_attention as sparse_attention
    from vidsparse.config import SparseConfig as SparseConfig
    from vidsparse.config import presets as presets
    from vidsparse.grid import TokenGrid as TokenGrid
    from vidsparse.pipelines.adapter import Adapter as Adapter
    from vidsparse.pipelines.adapter import RealText as RealText
    from vidsparse.pipelines.adapter import Site as Site
    from vidsparse.pipelines.generic import generic_adapter as generic_adapter
    from vidsparse.pipelines.position import step as step
    from vidsparse.plan import BlockPlan as BlockPlan
    from vidsparse.plan import StepContext as StepContext

__version__ = "0.1.0"

_HOME = {
    "Adapter": "pipelines.adapter",
    "BlockPlan": "plan",
    "RealText": "pipelines.adapter",
    "Site": "pipelines.adapter",
    "SparseConfig": "config",
    "StepContext": "plan",
    "TokenGrid": "grid",
    "accelerate_pipeline": "accelerate",
    "generic_adapter": "pipelines.generic",
    "presets": "config",
    "restore_pipeline": "accelerate",
    "run_report": "accelerate",
    "sparse_attention": "attention",
    "step": "pipelines.position",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'vidsparse' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"vidsparse.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
