"""SGLang Diffusion: an attention backend, put by a plugin in the place of one of its own.

    VIDSPARSE_PRESET=tiles sglang generate ... --attention-backend sliding_tile_attn

SGLang selects backends by the members of an enum. A plugin registers hooks on its functions, and
ours answers which class `MEMBER` stands for. It is the one whose metadata the denoising stage
builds with the latent video and the patches, which models with dense weights support, and which
needs no weights of its own. All others, and `MEMBER` without VIDSPARSE_PRESET, stay SGLang's.

Facts, of the published sources of 2026 below `sglang/multimodal_gen`:

    plugin        the entry point group `sglang.multimodal_gen.plugins`, called once in every
                  process, before hooks are applied; hooks are registered in one of `PLUGINS`
    class         `CudaPlatformBase.get_attn_backend_cls_str(selected_backend, head_size, dtype)`
    tensors       [B, rows, H, D]; behind its Ulysses exchange, so all rows and some heads
    grid          `raw_latent_shape` (t, h, w) and `patch_size`, with which the stage calls `build`;
                  what else there is of rows is text, before the video or behind it, which nobody
                  says: such calls are dense
    step          `current_timestep` of the metadata, which is an index; the number of steps is
                  `num_inference_steps` of the batch in the forward context
    layer         a number in the prefix of the layer
    dense calls   `SDPAImpl` of SGLang

So models that attend over the video alone, such as Wan, are sparse; joint ones stay dense.

Not verified: none of this has run inside SGLang, whose package needs a GPU; it is tested against
stubs of those signatures, which were compared with the sources in the wheel of release 0.5.23.
Whether hooks reach `CudaPlatformBase` by that name in every release, whether `prefix` holds the
index of the layer for every model, and what CUDA graphs and torch.compile make of
`sparse_attention`, a graph break, is unknown.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.integrations import served

MEMBER = "SLIDING_TILE_ATTN"
ROOT = "sglang.multimodal_gen"
PLUGINS = (f"{ROOT}.runtime.platforms.plugins", f"{ROOT}.plugins")
"""Where releases have the registry of hooks, the newest first."""
PLATFORM = f"{ROOT}.runtime.platforms.cuda.CudaPlatformBase.get_attn_backend_cls_str"
BACKENDS = f"{ROOT}.runtime.layers.attention.backends"
ABSTRACT = f"{BACKENDS}.attention_backend"
CONTEXT = f"{ROOT}.runtime.managers.forward_context"


def register() -> None:
    """The entry point: hook the platform's choice in this process, if settings are asked for."""
    if served.asked() is None:
        return
    where = next((name for name in PLUGINS if importable(name)), None)
    if where is None:
        raise ImportError(f"SGLang's registry of hooks is in none of {', '.join(PLUGINS)}")
    plugins = import_module(where)
    plugins.HookRegistry.register(PLATFORM, chosen, plugins.HookType.AROUND)


def importable(name: str) -> bool:
    """Whether a module is there; what is wrong inside it is not hidden."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return False
        raise
    return True


def chosen(original: Any, cls: Any, selected_backend: Any, *rest: Any, **more: Any) -> Any:
    """Name of the class of a backend: `Backend` for `MEMBER`, else what SGLang says."""
    if getattr(selected_backend, "name", None) == MEMBER:
        return f"{__name__}.Backend"
    return original(cls, selected_backend, *rest, **more)


def __getattr__(name: str) -> Any:
    """`Backend`, `Impl` and `Builder`, made when the server asks for them: their bases are its."""
    if name not in ("Backend", "Impl", "Builder"):
        raise AttributeError(name)
    abstract = import_module(ABSTRACT)
    bases = {
        "Backend": (Facts, abstract.AttentionBackend),
        "Impl": (Sparse, abstract.AttentionImpl),
        "Builder": (Building, abstract.AttentionMetadataBuilder),
    }
    made = {n: type(n, own, {"__module__": __name__}) for n, own in bases.items()}
    globals().update(made)
    return made[name]


class Facts:
    """What the server asks a backend."""

    accept_output_buffer = False

    @staticmethod
    def get_enum() -> Any:
        return import_module(f"{ROOT}.runtime.platforms").AttentionBackendEnum[MEMBER]

    @staticmethod
    def get_impl_cls() -> Any:
        return import_module(__name__).Impl

    @staticmethod
    def get_metadata_cls() -> Any:
        return SimpleNamespace

    @staticmethod
    def get_builder_cls() -> Any:
        return import_module(__name__).Builder

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return [64, 96, 128, 256]


class Building:
    """Makes the metadata of a step."""

    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def build(
        self, current_timestep: int, raw_latent_shape: Any, patch_size: Any, **options: Any
    ) -> SimpleNamespace:
        """raw_latent_shape: (t, h, w), or [B, C, t, h, w]. What the tiles of others need is not
        looked at."""
        sizes = zip(tuple(raw_latent_shape)[-3:], patch_size, strict=True)
        grid = TokenGrid.of(tuple(int(size) // int(side) for size, side in sizes))
        return SimpleNamespace(current_timestep=current_timestep, grid=grid)


class Sparse(served.Layer):
    """Attention of one layer."""

    member = MEMBER

    @staticmethod
    def dense_class() -> Any:
        return import_module(f"{BACKENDS}.sdpa").SDPAImpl

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any) -> Any:
        """[B, rows, H, D] each."""
        grid = getattr(attn_metadata, "grid", None)
        rows = {query.shape[1], key.shape[1]}
        if grid is None or not self.usual or rows != {grid.tokens}:
            return self.dense.forward(query, key, value, attn_metadata)
        batch = getattr(import_module(CONTEXT).get_forward_context(), "forward_batch", None)
        steps = getattr(batch, "num_inference_steps", None)
        at = served.where(attn_metadata.current_timestep, steps, served.layer_of(self.prefix))
        if at is None:
            return self.dense.forward(query, key, value, attn_metadata)
        return served.attend(query, key, value, grid, at, self.config)
