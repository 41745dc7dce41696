"""Whether servers' releases still have what our plugins count on, read from their sources.

    pip install --no-deps --target omni vllm-omni && pip install --no-deps --target sgl sglang
    python tests/peer/servers.py omni sgl

Their packages want a GPU, so nothing of them is imported: names, fields and arguments are looked up
in the parsed files. Exit status 1 if something is not there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from vidsparse.integrations import sglang_diffusion, vllm_omni


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    missing, seen = [], 0
    for folder in map(Path, sys.argv[1:]):
        for name, needs in (("vllm_omni", omni_needs), ("sglang", sglang_needs)):
            if not (folder / name).is_dir():
                continue
            for what, found in needs(folder):
                seen += 1
                print(f"{'ok' if found else 'MISSING':8} {name}: {what}")
                missing += [] if found else [what]
    if not seen:
        print(f"neither vllm_omni nor sglang in {', '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    return 1 if missing else 0


def omni_needs(folder: Path) -> Iterator[tuple[str, bool]]:
    """What `vllm_omni` counts on."""
    registry, abstract, context = (
        Source(folder, name) for name in (vllm_omni.REGISTRY, vllm_omni.ABSTRACT, vllm_omni.CONTEXT)
    )
    members = {vllm_omni.MEMBER, vllm_omni.DENSE}
    yield "members", members <= registry.fields("DiffusionAttentionBackendEnum")
    yield "register", registry.arguments("register_diffusion_backend") == ["backend", "class_path"]
    fields = {*vllm_omni.UNUSUAL, *vllm_omni.PACKED, "extra", "video_layout"}
    yield "metadata", fields <= abstract.fields("AttentionMetadata")
    layout = {"prefix_len", "latent_grid", "used_len"}
    yield "layout", layout <= abstract.fields("VideoTokenLayout")
    given = abstract.arguments("AttentionImpl.__init__")
    yield "layer", given[1:7] == LAYER
    asked = abstract.arguments("AttentionBackend.supports_attention_mask")
    yield "masks", asked == ["cls", "attention_spec"]
    steps = {"denoise_step_idx", "total_denoise_steps", "omni_diffusion_config"}
    yield "steps", steps <= context.fields("ForwardContext")
    for name in ("get_forward_context", "is_forward_context_available"):
        yield name, context.arguments(name) == []
    yield "group", Source(folder, "vllm_omni.plugins").says("vllm_omni.general_plugins")
    yield "ring", Source(folder, "vllm_omni.diffusion.data").says("ring_degree")


def sglang_needs(folder: Path) -> Iterator[tuple[str, bool]]:
    """What `sglang_diffusion` counts on."""
    root = sglang_diffusion.ROOT
    registries = [Source(folder, name) for name in sglang_diffusion.PLUGINS]
    yield "hooks", any(one.says("HookRegistry") and one.says("HookType") for one in registries)
    yield "group", any(one.says("sglang.multimodal_gen.plugins") for one in registries)
    enum = Source(folder, f"{root}.runtime.platforms.interface")
    yield "member", sglang_diffusion.MEMBER in enum.fields("AttentionBackendEnum")
    where, owner, method = sglang_diffusion.PLATFORM.rsplit(".", 2)
    chosen = Source(folder, where).arguments(f"{owner}.{method}")
    yield "platform", chosen[:2] == ["cls", "selected_backend"]
    abstract = Source(folder, sglang_diffusion.ABSTRACT)
    yield "layer", abstract.arguments("AttentionImpl.__init__")[1:7] == LAYER
    yield "dense", "SDPAImpl" in Source(folder, f"{sglang_diffusion.BACKENDS}.sdpa").names
    context = Source(folder, sglang_diffusion.CONTEXT)
    yield "batch", "forward_batch" in context.fields("ForwardContext")
    yield "context", context.arguments("get_forward_context") == []
    stage = Source(folder, f"{root}.runtime.pipelines_core.stages.denoising")
    told = ("current_timestep", "raw_latent_shape", "patch_size")
    yield "metadata", all(stage.passes("build", name) for name in told)


LAYER = ["num_heads", "head_size", "softmax_scale", "causal", "num_kv_heads", "prefix"]


class Source:
    """A parsed module; one that is not there has nothing in it."""

    def __init__(self, folder: Path, module: str) -> None:
        base = folder.joinpath(*module.split("."))
        files = [base.with_suffix(".py"), base / "__init__.py"]
        file = next((one for one in files if one.is_file()), None)
        self.text = "" if file is None else file.read_text()
        self.tree = ast.parse(self.text)
        self.names = {n.name: n for n in self.tree.body
                      if isinstance(n, ast.ClassDef | ast.FunctionDef)}  # fmt: skip

    def says(self, text: str) -> bool:
        return text in self.text

    def fields(self, name: str) -> set[str]:
        """Of a class: what is assigned or annotated in it."""
        found = set()
        for node in getattr(self.names.get(name), "body", []):
            targets = [*node.targets] if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
            found |= {one.id for one in targets if isinstance(one, ast.Name)}
        return found

    def arguments(self, name: str) -> list[str] | None:
        """Of a function, or of a class's method; None if there is none."""
        owner, _, method = name.rpartition(".")
        body = getattr(self.names.get(owner), "body", []) if owner else self.tree.body
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name == method:
                return [one.arg for one in node.args.args]
        return None

    def passes(self, function: str, argument: str) -> bool:
        """Whether a call of a method by this name gives an argument by name."""
        return any(
            isinstance(node, ast.Call) and getattr(node.func, "attr", "") == function
            and argument in {one.arg for one in node.keywords}
            for node in ast.walk(self.tree)
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
