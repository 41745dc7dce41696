"""Servers' plugins against stubs of the signatures that the servers have published."""

from __future__ import annotations

import enum
import importlib
import sys
import tomllib
import warnings
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vidsparse import StepContext, TokenGrid, sparse_attention
from vidsparse.integrations import served, sglang_diffusion, vllm_omni

HEADS, DEPTH, LAYER, STEPS = 2, 16, 3, 8
GRID = (3, 4, 6)
CHANGES = (
    "schedule.min_tokens=0; kernel.block_q=16; kernel.block_k=16; kernel.impl=reference;"
    "layout.tile=[2,2,2]"
)
PREFIX = f"transformer.blocks.{LAYER}.attn1"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(served.PRESET, "tiles")
    monkeypatch.setenv(served.OVERRIDES, CHANGES)


def rows(count: int, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    q, k, v = torch.randn(3, 1, count, heads, DEPTH, generator=generator)
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def sparse(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, step: int = 5) -> Tensor:
    config, context = served.asked(), StepContext(step, STEPS, LAYER, LAYER + 1)
    assert config is not None
    out: Tensor = sparse_attention(q, k, v, grid=grid, config=config, context=context)
    return out


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> Any:
    """A stub of a module, with the packages above it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    vars(sys.modules[name]).update(content)
    return sys.modules[name]


def fresh(monkeypatch: pytest.MonkeyPatch, plugin: Any) -> None:
    """Classes that a plugin has made of the stubs are of this test alone."""
    for name in ("Backend", "Impl", "Builder"):
        monkeypatch.delitem(vars(plugin), name, raising=False)


def named(path: str) -> Any:
    where, _, name = path.rpartition(".")
    return getattr(importlib.import_module(where), name)


class Sdpa:
    """Of a server: dense, with the mask of the metadata."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, metadata: Any = None) -> Tensor:
        return dense(q, k, v, getattr(metadata, "attn_mask", None))


# vLLM-Omni


@pytest.fixture
def omni(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server: its enum, how it finds a class, its forward context."""
    overrides: dict[Any, str] = {}

    class Backends(enum.Enum):
        TORCH_SDPA = "sdpa"
        RAINFUSION_ATTN = "rainfusion"

        def get_class(self) -> Any:
            if self.name == "TORCH_SDPA":
                return SimpleNamespace(get_impl_cls=lambda: Sdpa)
            return named(overrides[self])

    class AttentionBackend(ABC):
        @staticmethod
        @abstractmethod
        def get_name() -> str: ...

        @staticmethod
        @abstractmethod
        def get_impl_cls() -> Any: ...

        @staticmethod
        @abstractmethod
        def get_metadata_cls() -> Any: ...

        @staticmethod
        @abstractmethod
        def get_builder_cls() -> Any: ...

        @staticmethod
        @abstractmethod
        def get_supported_head_sizes() -> list[int]: ...

    class AttentionImpl(ABC):
        @abstractmethod
        def __init__(self, num_heads: int, head_size: int, softmax_scale: float) -> None: ...

    context = SimpleNamespace(
        denoise_step_idx=5, total_denoise_steps=STEPS, latent_shape=None, patch_size=None,
        omni_diffusion_config=SimpleNamespace(parallel_config=SimpleNamespace(ring_degree=1)),
    )  # fmt: skip
    module(
        monkeypatch,
        vllm_omni.REGISTRY,
        DiffusionAttentionBackendEnum=Backends,
        register_diffusion_backend=overrides.__setitem__,
    )
    module(
        monkeypatch,
        vllm_omni.ABSTRACT,
        AttentionBackend=AttentionBackend,
        AttentionImpl=AttentionImpl,
        AttentionMetadata=SimpleNamespace,
    )
    module(
        monkeypatch,
        vllm_omni.CONTEXT,
        get_forward_context=lambda: context,
        is_forward_context_available=lambda: True,
    )
    fresh(monkeypatch, vllm_omni)
    return SimpleNamespace(member=Backends.RAINFUSION_ATTN, overrides=overrides, context=context)


def omni_layer(omni: Any, **options: Any) -> Any:
    vllm_omni.register()
    backend = omni.member.get_class()
    assert backend.get_name() == "RAINFUSION_ATTN" and backend.get_supported_head_sizes() == []
    given = {"causal": False, "prefix": PREFIX, "qkv_layout": "BSND", **options}
    return backend.get_impl_cls()(HEADS, DEPTH, DEPTH**-0.5, **given)


def layout(prefix: int = 0, mask: Tensor | None = None) -> Any:
    video = SimpleNamespace(prefix_len=prefix, latent_grid=GRID, used_len=prefix + 72)
    return SimpleNamespace(video_layout=video, attn_mask=mask)


@pytest.mark.usefixtures("settings")
def test_omni_metadata_that_one_video_does_not_describe_is_dense(omni: Any) -> None:
    """Several videos in a row; spans that are causal; padding that only lengths tell of."""
    layer, (q, k, v) = omni_layer(omni), rows(72)
    omni.context.latent_shape, omni.context.patch_size = (3, 8, 12), (1, 2, 2)
    assert torch.equal(layer.forward(q, k, v), sparse(q, k, v, TokenGrid(*GRID)))
    several = SimpleNamespace(prefix_len=None, latent_grid=None, used_len=72, video_spans=(1, 2))
    for metadata in (
        SimpleNamespace(video_layout=several),
        SimpleNamespace(video_layout=SimpleNamespace(prefix_len=0, latent_grid=GRID, used_len=70)),
        SimpleNamespace(**{**vars(layout()), "full_attn_spans": [[(0, 72)]]}),
        SimpleNamespace(query_ranges=(0,)),
        SimpleNamespace(packed_padding=object()),
        SimpleNamespace(extra={"valid_kv_length": 60}),
        SimpleNamespace(extra={"cu_seqlens_q": torch.tensor([0, 60, 72])}),
    ):
        assert torch.equal(layer.forward(q, k, v, metadata), dense(q, k, v)), metadata
    assert torch.equal(
        layer.forward(q, k, v, SimpleNamespace(extra={"kv_cache_dtype": None})),
        sparse(q, k, v, TokenGrid(*GRID)),
    )
    assert omni.member.get_class().supports_attention_mask(object())


def test_omni_is_left_alone_without_settings(omni: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(served.PRESET, raising=False)
    vllm_omni.register()
    assert not omni.overrides


@pytest.mark.usefixtures("settings")
def test_omni_reads_prefix_and_video_and_no_padding(omni: Any) -> None:
    layer = omni_layer(omni)
    q, k, v = rows(10 + 72 + 6)
    out = layer.forward(q, k, v, layout(10))
    grid = TokenGrid(*GRID, text_tokens=10, text_first=True)
    right = sparse(q[:, :82], k[:, :82], v[:, :82], grid)
    assert torch.equal(out[:, :82], right) and not out[:, 82:].any()
    short = dense(q[:, :82], k[:, :82], v[:, :82])
    assert (right - short).abs().max() > 1e-2
    assert torch.allclose(right[:, :10], short[:, :10], atol=1e-5), "text is exact"


@pytest.mark.usefixtures("settings")
def test_omni_reads_the_forward_context(omni: Any) -> None:
    layer = omni_layer(omni)
    q, k, v = rows(72)
    assert torch.equal(layer.forward(q, k, v), dense(q, k, v)), "nobody tells a grid"
    omni.context.latent_shape, omni.context.patch_size = (3, 8, 12), (1, 2, 2)
    assert torch.equal(layer.forward_cuda(q, k, v), sparse(q, k, v, TokenGrid(*GRID)))
    omni.context.denoise_step_idx = 0
    assert torch.allclose(layer.forward(q, k, v), dense(q, k, v), atol=1e-6), "a dense step"
    q, k, v = rows(80)
    assert torch.equal(layer.forward(q, k, v), dense(q, k, v)), "rows of another kind"


@pytest.mark.usefixtures("settings")
def test_omni_calls_that_stay_dense(omni: Any) -> None:
    layer, (q, k, v) = omni_layer(omni), rows(72)
    mask = (torch.arange(72) < 60)[None]
    masked = SimpleNamespace(attn_mask=mask)
    assert torch.equal(layer.forward(q, k, v, masked), dense(q, k, v, mask))
    few = k[:, :20], v[:, :20]
    assert torch.equal(layer.forward(q, *few, layout()), dense(q, *few)), "cross-attention"
    causal = omni_layer(omni, causal=True)
    assert torch.equal(causal.forward(q, k, v, layout()), dense(q, k, v))
    assert causal.dense.options["qkv_layout"] == "BSND"
    served.tell_once.cache_clear()
    omni.context.total_denoise_steps = None
    with pytest.warns(RuntimeWarning, match="does not tell step and number of steps"):
        assert torch.equal(layer.forward(q, k, v, layout()), dense(q, k, v))


@pytest.mark.usefixtures("settings")
def test_omni_refuses_ring_and_layers_without_an_index(omni: Any) -> None:
    with pytest.raises(ValueError, match="no index of a layer"):
        omni_layer(omni, prefix="attn").forward(*rows(72), layout())
    omni.context.omni_diffusion_config.parallel_config.ring_degree = 2
    with pytest.raises(ValueError, match="one chunk of the keys at a time"):
        omni_layer(omni).forward(*rows(72), layout())


# SGLang Diffusion


@pytest.fixture(params=sglang_diffusion.PLUGINS)
def sgl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server: hooks around a class method of its platform, its forward context."""
    hooks: dict[str, Any] = {}

    class Backends(enum.Enum):
        FA = enum.auto()
        SLIDING_TILE_ATTN = enum.auto()

    class CudaPlatformBase:
        @classmethod
        def get_attn_backend_cls_str(cls, selected_backend: Any, size: int, dtype: Any) -> str:
            return f"{cls.__name__} {selected_backend.name} {size}"

    class Registry:
        @classmethod
        def register(cls, target: str, hook: Any, hook_type: str) -> None:
            assert hook_type == "around"
            hooks[target] = hook

        @classmethod
        def apply(cls) -> None:
            for target, hook in hooks.items():
                owner = named(target.rpartition(".")[0])
                name = target.rpartition(".")[2]
                original = vars(owner)[name].__func__
                setattr(owner, name, classmethod(partial(hook, original)))

    batch = SimpleNamespace(num_inference_steps=STEPS)
    context = SimpleNamespace(forward_batch=batch)
    root = sglang_diffusion.ROOT
    platforms = module(monkeypatch, f"{root}.runtime.platforms", AttentionBackendEnum=Backends)
    module(monkeypatch, f"{root}.runtime.platforms.cuda", CudaPlatformBase=CudaPlatformBase)
    kinds = SimpleNamespace(AROUND="around")
    module(monkeypatch, request.param, HookRegistry=Registry, HookType=kinds)
    bases = {n: type(n, (ABC,), {}) for n in ("AttentionBackend", "AttentionImpl")}
    builder = type("AttentionMetadataBuilder", (ABC,), {})
    module(monkeypatch, sglang_diffusion.ABSTRACT, **bases, AttentionMetadataBuilder=builder)
    module(monkeypatch, f"{sglang_diffusion.BACKENDS}.sdpa", SDPAImpl=Sdpa)
    module(monkeypatch, sglang_diffusion.CONTEXT, get_forward_context=lambda: context)
    fresh(monkeypatch, sglang_diffusion)
    return SimpleNamespace(
        hooks=hooks, apply=Registry.apply, platform=CudaPlatformBase, context=context,
        enum=platforms.AttentionBackendEnum,
    )  # fmt: skip


def test_sglang_is_left_alone_without_settings(sgl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(served.PRESET, raising=False)
    sglang_diffusion.register()
    assert not sgl.hooks


@pytest.mark.usefixtures("settings")
def test_sglang_without_a_registry_of_hooks_is_said(
    sgl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in sglang_diffusion.PLUGINS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"is in none of sglang\.multimodal_gen\.runtime"):
        sglang_diffusion.register()
    assert not sgl.hooks


@pytest.mark.usefixtures("settings")
def test_sglang_takes_the_class_for_one_member(sgl: Any) -> None:
    sglang_diffusion.register()
    sgl.apply()
    choose = sgl.platform.get_attn_backend_cls_str
    assert choose(sgl.enum.FA, 64, torch.bfloat16) == "CudaPlatformBase FA 64"
    backend = named(choose(sgl.enum.SLIDING_TILE_ATTN, 64, torch.bfloat16))
    assert backend.get_enum() is sgl.enum.SLIDING_TILE_ATTN
    metadata = backend.get_builder_cls()().build(
        current_timestep=5, raw_latent_shape=(1, 16, 3, 8, 12), patch_size=(1, 2, 2),
        STA_param=None, VSA_sparsity=0.5, device=torch.device("cpu"),
    )  # fmt: skip
    layer = backend.get_impl_cls()(HEADS, DEPTH, softmax_scale=DEPTH**-0.5, prefix=PREFIX)
    q, k, v = rows(72)
    assert torch.equal(layer.forward(q, k, v, metadata), sparse(q, k, v, TokenGrid(*GRID)))
    few = k[:, :20], v[:, :20]
    assert torch.equal(layer.forward(q, *few, metadata), dense(q, *few)), "cross-attention"
    joint = rows(80)
    assert torch.equal(layer.forward(*joint, metadata), dense(*joint)), "with text"
    assert torch.equal(layer.forward(q, k, v, None), dense(q, k, v)), "no step of a video"
    metadata.current_timestep = 0
    assert torch.allclose(layer.forward(q, k, v, metadata), dense(q, k, v), atol=1e-6)


# Both


@pytest.mark.parametrize(
    "changes, text",
    [
        ("schedule.dense_layers=[-1]", "counts from the last layer"),
        ("schedule={name: ramp}", "section.key=value"),
        ("schedule.name=ramp; schedule.layer_density=[0.2]", "names each layer"),
        ("schedule.density=2", "schedule.density"),
        ("schedule.name=table", "a density for each layer"),
        ("keep.plans=2", "keep carries from step to step"),
    ],
)
def test_settings_that_a_server_cannot_take(changes: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        served.asked({served.PRESET: "tiles", served.OVERRIDES: changes})


def test_orders_that_cannot_be_kept_are_told() -> None:
    served.tell_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="order their tokens anew in every call.*preset tiles"):
        assert served.asked({served.PRESET: "balanced"}) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served.asked({served.PRESET: "tiles"}) is not None


def test_layers_by_their_names() -> None:
    assert served.layer_of("blocks.17.attn1") == 17
    assert served.layer_of("single_transformer_blocks.4") == 4


def test_entry_points_name_what_is_there() -> None:
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    points = tomllib.loads(text)["project"]["entry-points"]
    assert set(points) == {"vllm_omni.general_plugins", "sglang.multimodal_gen.plugins"}
    for (target,) in (group.values() for group in points.values()):
        assert callable(named(target.replace(":", ".")))
